"""Routing (what the router decided) and Plan (the order in which the pairs are worked on)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from quant_moelora.core.checks import check_same_device, check_tensor
from quant_moelora.core.errors import ShapeError

BASE_SLOT = -1  # slot of a token without an adapter
SEGMENT_ROWS = 32  # of a segment, at most: what a LoRA kernel works on at once (benchmarks/NOTES.md)
_ANY_SLOTS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Routing:
    """Experts, weights and adapter of each of M tokens.

    Pair p = token * k + slot of the top-k; the Plan's sorted order of pairs is that of every intermediate's rows.

    Attributes:
        topk_ids: int32 or int64 [M, k], local expert ids; an id outside 0..E-1 means no expert here.
        topk_weights: float32 [M, k], router weights.
        slots: int32 [M], the adapter's slot in the LoRA context, -1 for the base model; None means all base.
        num_slots: slots that the LoRA context has. Slots outside -1..num_slots-1 are one slot, num_slots, that no
            adapter has.

    Raises:
        ShapeError: on a wrong shape, dtype or device. Values are not looked at: that would wait for the device.
    """

    topk_ids: Tensor  # (M, k) int32 or int64
    topk_weights: Tensor  # (M, k) float32
    slots: Tensor | None = None  # (M,) int32
    num_slots: int = _ANY_SLOTS

    def __post_init__(self) -> None:
        if self.topk_ids.ndim != 2 or self.topk_ids.dtype not in (torch.int32, torch.int64):
            raise ShapeError(
                "topk_ids",
                got=f"shape {list(self.topk_ids.shape)}, dtype {self.topk_ids.dtype}",
                rule="[tokens, k] of int32 or int64",
                remedy="pass the router's indices, one row a token",
            )
        # Constant texts: to write a number of tokens down, torch.compile would make a graph for each.
        ids = tuple(self.topk_ids.shape)
        check_tensor("topk_weights", self.topk_weights, ids, torch.float32, why="one for each id")
        tensors = {"topk_ids": self.topk_ids, "topk_weights": self.topk_weights}
        if self.slots is not None:
            check_tensor("slots", self.slots, (self.num_tokens,), torch.int32, why="one for each token")
            tensors["slots"] = self.slots
        check_same_device(tensors)

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.topk_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        """P = M * k."""
        return self.topk_ids.numel()


@dataclass(frozen=True, eq=False)
class Plan:
    """Pairs sorted by (expert, slot); its shapes depend on P and E alone, so that a graph can be captured.

    Attributes:
        rows: int32 [P]; rows[i] is the pair at sorted position i. Pairs without an expert come last.
        inverse: int32 [P]; inverse[p] is the sorted position of pair p.
        expert_offsets: int32 [E + 1]; expert e owns sorted positions expert_offsets[e]..expert_offsets[e+1]-1.
        segments: int32 [T, 4] of (expert, first sorted row, rows, slot), with T = `num_segments`; None if no token can
            have an adapter. At most `SEGMENT_ROWS` rows of one expert and one slot; each row that has an expert is in
            one of them, whether it has an adapter or not. They are in the order of their rows, and expert e's begin at
            place min(b, e * (num_slots + 2) + b // SEGMENT_ROWS) with b = expert_offsets[e]: from e to e + 1 each of
            the two grows by at least the segments that e needs. Places between and after are (0, 0, 0, 0).

    Raises:
        ShapeError: on a wrong shape, dtype or device.
    """

    rows: Tensor  # (P,) int32
    inverse: Tensor  # (P,) int32
    expert_offsets: Tensor  # (E + 1,) int32
    segments: Tensor | None  # (T, 4) int32

    def __post_init__(self) -> None:
        pairs = self.rows.shape[0]
        why = "one for each pair"  # no number, as in Routing
        check_tensor("rows", self.rows, (pairs,), torch.int32, why=why)
        check_tensor("inverse", self.inverse, (pairs,), torch.int32, why=why)
        if self.segments is not None:
            check_tensor("segments", self.segments, (self.segments.shape[0], 4), torch.int32, why="segments of 4 words")
        check_tensor(
            "expert_offsets", self.expert_offsets, (self.expert_offsets.numel(),), torch.int32, why="E + 1 offsets"
        )
        held = {"rows": self.rows, "inverse": self.inverse, "expert_offsets": self.expert_offsets}
        check_same_device(held if self.segments is None else held | {"segments": self.segments})


def num_segments(num_pairs: int, num_experts: int, num_slots: int) -> int:
    """Places of `Plan.segments`: that of an expert E's first one, if all pairs had lower experts."""
    # Not `min`, which would ask torch.compile which of two sizes is the smaller.
    return cast(int, torch.sym_min(num_pairs, num_experts * (num_slots + 2) + num_pairs // SEGMENT_ROWS))
