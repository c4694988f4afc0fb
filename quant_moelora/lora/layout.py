"""How an adapter's factors in one layer stand in a block of the arena, and the tables' rows that find them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import A2, A13, B2, B13, DOWN, GATE, NO_FACTOR, UP
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig, Shard, Span
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors

ALIGNMENT = 8  # elements; a factor of 16-bit floats begins at a multiple of 16 bytes, the widest load
_ROWS: tuple[tuple[int, Projection], ...] = ((GATE, "gate"), (UP, "up"), (DOWN, "down"))


class Tables(NamedTuple):
    """The tables of `MoELoRAContext`, with any leading dimensions."""

    offsets: Tensor  # (..., 4, E) int64
    rank: Tensor  # (..., 3, E) int32
    up_col: Tensor  # (..., E) int32
    scaling: Tensor  # (..., 3, E) float32

    @staticmethod
    def empty(leading: tuple[int, ...], experts: int, device: torch.device) -> Tables:
        """Tables of adapters without a factor."""
        tables = Tables(
            torch.empty((*leading, 4, experts), dtype=torch.int64, device=device),
            torch.empty((*leading, 3, experts), dtype=torch.int32, device=device),
            torch.empty((*leading, experts), dtype=torch.int32, device=device),
            torch.empty((*leading, 3, experts), dtype=torch.float32, device=device),
        )
        tables.clear()
        return tables

    def at(self, *index: int | slice) -> Tables:
        """Views at an index of the leading dimensions."""
        return Tables(*(table[index] for table in self))

    def clear(self) -> None:
        """Take all factors out."""
        for table in self:
            table.fill_(NO_FACTOR if table is self.offsets else 0)


def shard_of(info: MoEQuantInfo) -> Shard:
    """What is held of a layer, which may be all of it."""
    experts, inter = info.num_experts, info.intermediate_size
    return info.shard or Shard(ParallelConfig(), experts, inter, Span(0, experts), Span(0, inter))


class Layers:
    """What the host has to know of a model's layers, so that an adapter is laid out without asking their device.

    Attributes:
        infos: by layer.
        device: of all of them.
        experts: E of all of them, as held here.
        config: this process's place among those that share them.
        orders: by layer, stored position of the intermediate -> logical one of the whole layer, int64 [E, I] in host
            memory, or None where each is its own.

    Raises:
        AdapterError: there is no layer, or they differ in device, E or the processes they are shared by.
    """

    def __init__(self, infos: Mapping[int, MoEQuantInfo]) -> None:
        found = {(info.device, info.num_experts, shard_of(info).config) for info in infos.values()}
        if len(found) != 1:
            held = (f"{experts} experts on {device}" for device, experts, _ in sorted(found, key=str))
            raise AdapterError(
                "layers of an adapter bank",
                got=", ".join(held) or "none",
                rule="one device, one number of experts and one place in a mesh",
                remedy="give the layers of one model, and a bank to each group of them",
            )
        self.infos = dict(infos)
        ((self.device, self.experts, self.config),) = found
        self.orders = {layer: _order(info) for layer, info in infos.items()}


def _order(info: MoEQuantInfo) -> Tensor | None:  # (E, I) int64
    if info.inter_perm is not None:
        return info.inter_perm.to("cpu", torch.int64)
    if info.shard is None:
        return None
    inter = info.shard.inter
    return torch.arange(inter.begin, inter.end).expand(info.num_experts, -1)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows [r, K] that stand at ``offset`` of a block, each ``width`` elements wide: K in stored order, then zeros."""

    offset: int
    value: Tensor  # (r, any)
    width: int
    columns: Tensor | slice | None = None  # those of value that are held, in their order: (K,) int64; None for all

    def write(
        self,
        block: Tensor,  # (any,) float, zeros
    ) -> None:
        """Put the rows where they stand."""
        held = self.value if self.columns is None else self.value[:, self.columns]
        rows, columns = held.shape
        block[self.offset : self.offset + rows * self.width].view(rows, self.width)[:, :columns] = held


class LayerLayout:
    """Where the factors of one adapter in one layer stand in a block of their own.

    Attributes:
        size: elements of the block, a multiple of `ALIGNMENT`; 0 if nothing of the adapter is held here.
    """

    def __init__(
        self,
        info: MoEQuantInfo,
        orders: Tensor | None,  # (E, I) int64 in host memory, of `Layers`
        factors: LayerFactors,  # of the whole layer
        row: Tables,  # without leading dimensions, of an adapter without a factor
    ) -> None:
        """Lay the factors out that belong here; ``row`` gets offsets relative to the block."""
        self.size = 0
        self._parts: list[_Rows] = []
        self._placed: dict[tuple[int, ...], int] = {}  # offset, by the identities of what all experts may share
        shard = shard_of(info)
        columns = shard.hidden(info.hidden_size)
        self._own, self._of = shard.config.rank_shard
        hidden, inter = info.hidden_size, info.inter_pad
        for whole in sorted({expert for expert, _ in factors}):
            if not shard.experts.begin <= whole < shard.experts.end:
                continue
            expert = whole - shard.experts.begin
            gate, up, down = (factors.get((whole, projection)) for _, projection in _ROWS)
            for index, factor in ((GATE, gate), (UP, up), (DOWN, down)):
                if factor is not None:
                    row.rank[index, expert] = factor.a.shape[0]
                    row.scaling[index, expert] = factor.scaling
            order = None if orders is None else orders[expert]
            held = [factor for factor in (gate, up) if factor is not None]
            if held:
                shared = gate is not None and up is not None and gate.a is up.a  # as in a fused file
                row.up_col[expert] = 0 if shared or gate is None else gate.a.shape[0]
                row.offsets[A13, expert] = self._add_a13([f.a for f in (held[:1] if shared else held)], hidden)
                row.offsets[B13, expert] = self._add([f.b.T for f in held], inter, order)
            if down is not None:
                row.offsets[A2, expert] = self._add([down.a], inter, order)
                row.offsets[B2, expert] = self._add_b2(down.b, columns)

    def _add_a13(self, values: Sequence[Tensor], hidden: int) -> int:
        """Place A of gate and up [r, H], unless an earlier expert has the very same tensors; return its offset."""
        key = tuple(map(id, values))
        if key not in self._placed:
            above, own = 0, list[Tensor]()
            for value in values:  # the processes take turns at the rows of all of them
                own.append(value[(self._own - above) % self._of :: self._of])
                above += len(value)
            self._placed[key] = self._add(own, hidden)
        return self._placed[key]

    def _add_b2(
        self,
        value: Tensor,  # (H, r)
        columns: Span,
    ) -> int:
        """Place B of down transposed, unless an earlier expert has the very same tensor; return its offset."""
        key = (id(value),)
        if key not in self._placed:
            self._placed[key] = self._add([value.T], columns.size, columns.slice)
        return self._placed[key]

    def _add(self, values: Iterable[Tensor], width: int, columns: Tensor | slice | None = None) -> int:
        """Place [r, K] values under one another; return the first's offset."""
        offset = self.size
        for value in values:
            self._parts.append(_Rows(self.size, value, width, columns))
            self.size += value.shape[0] * width
        self.size = _aligned(self.size)
        return offset

    def write(
        self,
        block: Tensor,  # (size,) float in host memory, zeros
    ) -> None:
        """Write the factors, each rounded once to the block's dtype."""
        for part in self._parts:
            part.write(block)


def full_size(info: MoEQuantInfo, rank: int) -> int:
    """Elements of the block of an adapter that has all of a layer's experts and projections, at one rank."""
    shard, rows13 = shard_of(info), info.activation.halves * rank
    own13 = -(-rows13 // shard.config.rank_shard[1])
    hidden, inter = info.hidden_size, info.inter_pad
    sizes = (own13 * hidden, rows13 * inter, rank * inter, rank * shard.hidden(hidden).size)
    return info.num_experts * sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def check_factors(what: str, info: MoEQuantInfo, factors: LayerFactors, max_rank: int) -> None:
    """Raise unless the factors belong to the layer of which ``info`` is all or a part.

    Args:
        what: adapter and layer, as the message names them.
        info: the layer.
        factors: by expert and projection.
        max_rank: largest rank that is served.

    Raises:
        AdapterError: an expert or projection that the layer does not have, a wrong shape, or too high a rank.
    """
    experts = shard_of(info).num_experts
    names = tuple(name for _, name in _ROWS if info.activation.gated or name != "gate")
    for (expert, projection), factor in factors.items():
        if not 0 <= expert < experts or projection not in names:
            raise AdapterError(
                what,
                got=f"factors of {projection} of expert {expert}",
                rule=f"experts 0 to {experts - 1} and {', '.join(names)}",
                remedy="give the adapter to the model it was trained on",
            )
        _check_factor(f"{what}, {projection} of expert {expert}", info, projection, factor, max_rank)


def _check_factor(what: str, info: MoEQuantInfo, projection: Projection, factor: Factor, max_rank: int) -> None:
    n, k = shard_of(info).intermediate_size, info.hidden_size
    n, k = (k, n) if projection == "down" else (n, k)
    a, b = factor.a, factor.b
    if (a.ndim, b.ndim) != (2, 2) or (a.shape[1], b.shape[0]) != (k, n) or a.shape[0] != b.shape[1] or not len(a):
        raise AdapterError(
            what,
            got=f"A {list(a.shape)}, B {list(b.shape)}",
            rule=f"A [r, {k}] and B [{n}, r]",
            remedy="give the adapter to the model it was trained on",
        )
    if len(a) > max_rank:
        raise AdapterError(
            what, got=f"rank {len(a)}", rule=f"at most max_rank = {max_rank}", remedy="make the bank for a higher rank"
        )
