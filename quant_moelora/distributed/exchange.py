"""How tokens come to the processes that have their experts, and their outputs back: all-gather or all-to-all.

A token travels with its experts, their weights and its adapter, so that a process computes a token of another one with
that token's adapter, whether or not its own tokens use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import BASE_SLOT
from quant_moelora.core.shard import Span
from quant_moelora.distributed.mesh import Group
from quant_moelora.kernels.moe_sum.op import moe_sum
from quant_moelora.kernels.moe_sum.reference import weighted_sum

NO_EXPERT = -1


class Tokens(NamedTuple):
    """Tokens with all that a layer has to know of them."""

    x: Tensor  # (M, H) float
    ids: Tensor  # (M, k) int32, experts of the whole layer
    weights: Tensor  # (M, k) float32
    slots: Tensor  # (M,) int32

    def pack(self) -> Tensor:  # (M, bytes) uint8
        """A row of bytes for each token."""
        parts = (self.x, self.ids, self.weights, self.slots[:, None])
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)

    def unpack(
        self,
        rows: Tensor,  # (any, bytes) uint8
    ) -> Tokens:
        """Inverse of `pack`, for tokens of the shape and dtypes of these."""
        top_k, (_, hidden) = self.ids.shape[1], self.x.shape
        x, ids, weights, slots = rows.split((hidden * self.x.itemsize, 4 * top_k, 4 * top_k, 4), 1)

        def typed(part: Tensor, dtype: torch.dtype) -> Tensor:
            """Bytes as what they were."""
            return part.contiguous().view(dtype)

        slot = typed(slots, torch.int32)[:, 0]
        return Tokens(typed(x, self.x.dtype), typed(ids, torch.int32), typed(weights, torch.float32), slot)

    def padded(self, rows: int) -> Tokens:
        """As many tokens as ``rows``; those that are added have no expert.

        Raises:
            ShapeError: there are more.
        """
        missing = rows - self.x.shape[0]
        if missing < 0:
            raise ShapeError(
                "tokens of this process",
                got=self.x.shape[0],
                rule=f"at most rows = {rows}",
                remedy="make the layer with more rows, or with rows=None where no graph is captured",
            )
        if not missing:
            return self
        below = (0, 0, 0, missing)
        return Tokens(
            F.pad(self.x, below),
            F.pad(self.ids, below, value=NO_EXPERT),
            F.pad(self.weights, below),
            F.pad(self.slots, (0, missing), value=BASE_SLOT),
        )

    def pieces(self, count: int) -> list[Tokens]:
        """``count`` of neighbours, as equal as can be."""
        parts = [tensor.tensor_split(count) for tensor in self]
        return [Tokens(*piece) for piece in zip(*parts, strict=True)]


def owners(
    ids: Tensor,  # (M, k) int32
    spans: Sequence[Span],
) -> Tensor:  # (M, processes) bool
    """Which processes have an expert of each token; nobody has an id outside the layer."""
    return torch.stack([((ids >= span.begin) & (ids < span.end)).any(1) for span in spans], 1)


@dataclass(frozen=True)
class Traffic:
    """What all processes are about to send, so that all take the same way.

    Attributes:
        tokens: of each process.
        sent: ``sent[i][j]`` tokens of process i have an expert of process j.
    """

    tokens: list[int]
    sent: list[list[int]]

    @staticmethod
    def of(
        group: Group,
        needed: Tensor,  # (M, size) bool, of `owners`
    ) -> Traffic:
        """Ask everybody: a small all-gather, and the host waits for it."""
        own = F.pad(needed.sum(0), (1, 0), value=needed.shape[0])[None]
        table = group.all_gather(own).tolist()
        return Traffic([row[0] for row in table], [row[1:] for row in table])

    @property
    def gathered_rows(self) -> int:
        """Rows that each process takes from others by all-gather."""
        return (len(self.tokens) - 1) * max(self.tokens)

    @property
    def exchanged_rows(self) -> int:
        """Rows that the busiest process gives to, or takes from, others by all-to-all."""
        size = range(len(self.tokens))
        given = (sum(row) - row[i] for i, row in enumerate(self.sent))
        taken = (sum(self.sent[i][j] for i in size if i != j) for j in size)
        return max((*given, *taken))


class Delivery(NamedTuple):
    """Where tokens went by all-to-all.

    Attributes:
        given: rows to each process.
        taken: rows from each process.
        targets: processes of each token, ascending, then -1.
        rows: of what comes back, for each token and target; anything where there is none.
    """

    given: list[int]
    taken: list[int]
    targets: Tensor  # (M, most) int32
    rows: Tensor  # (M, most) int32


def deliver(
    tokens: Tokens,
    needed: Tensor,  # (M, size) bool, of `owners`
    traffic: Traffic,
    group: Group,
) -> tuple[Tokens, Delivery]:
    """Give each token once to every process that has an expert of it, and take what others give."""
    given, taken = traffic.sent[group.rank], [row[group.rank] for row in traffic.sent]
    target, token = needed.T.nonzero(as_tuple=True)  # by target, then by token
    arrived = tokens.unpack(group.all_to_all(tokens.pack()[token], given, taken))
    most = min(group.size, tokens.ids.shape[1])
    places = torch.zeros_like(needed, dtype=torch.int32)
    places[token, target] = torch.arange(len(token), dtype=torch.int32, device=token.device)
    first = needed.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    targets = torch.where(needed.gather(1, first), first, -1).to(torch.int32)
    return arrived, Delivery(given, taken, targets, places.gather(1, first))


def collect(
    y: Tensor,  # (sum of taken, H), the arrived tokens' outputs
    delivery: Delivery,
    group: Group,
) -> Tensor:  # (M, H)
    """The sum of what all processes made of each token, in their order in float32, rounded once."""
    back = group.all_to_all(y, delivery.taken, delivery.given)
    targets, rows = delivery.targets, delivery.rows.reshape(-1)
    if back.is_cuda:
        return moe_sum(back, targets, None, rows, group.size, back.shape[1], back.dtype)
    out = back.new_empty(targets.shape[0], back.shape[1])
    return weighted_sum(back, targets, None, rows, group.size, out)
