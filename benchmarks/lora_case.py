"""Cases of the LoRA benchmark: random adapters, which of them each token has, and the bytes that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.moe_case import DTYPE, Case, Roofs, Shape
from quant_moelora.core.lora_context import NO_FACTOR, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo

SLOTS = (8, 128)  # of a context: the first that suffice
_TIMES_CACHE = 2  # what adapters of one layer are read before the same layer's come again


@dataclass(frozen=True)
class Adapters:
    """Adapters of one rank on gate, up and down of every expert.

    Attributes:
        count: A.
        rank: r, of each projection.
    """

    count: int
    rank: int

    def pair_bytes(self, shape: Shape) -> int:
        """Of the factors of one (adapter, expert): 6 r (H + I)."""
        return 6 * self.rank * (shape.hidden + shape.inter)

    def copies(self, shape: Shape, cache_bytes: int) -> int:
        """Layers that take turns, so that factors come from memory."""
        return math.ceil(_TIMES_CACHE * cache_bytes / (self.count * shape.experts * self.pair_bytes(shape)))

    def context(self, info: MoEQuantInfo, device: str) -> MoELoRAContext:
        """One layer's adapters, random, in the first slots of 8 or 128; without data on the meta device."""
        hidden, inter, experts, rank = info.hidden_size, info.inter_pad, info.num_experts, self.rank
        sizes = torch.tensor([2 * rank * hidden, 2 * rank * inter, rank * inter, rank * hidden])
        ends = sizes.repeat(self.count * experts).cumsum(0).view(self.count, experts, 4)
        arena = torch.empty(int(ends[-1, -1, -1]), dtype=DTYPE, device=device)
        if device != "meta":
            arena.normal_(std=0.02)
        slots = next(slots for slots in SLOTS if slots >= self.count)
        table = {"dtype": torch.int32, "device": device}
        offsets = torch.full((slots, 4, experts), NO_FACTOR, dtype=torch.int64)
        offsets[: self.count] = (ends - sizes).transpose(1, 2)
        ranks = torch.where(torch.arange(slots) < self.count, rank, 0).to(**table)
        return MoELoRAContext(
            num_experts=experts,
            hidden_size=hidden,
            inter_pad=inter,
            arena=arena,
            offsets=offsets.to(device),
            rank=ranks[:, None, None].expand(-1, 3, experts).contiguous(),
            up_col=ranks[:, None].expand(-1, experts).contiguous(),
            scaling=torch.full((slots, 3, experts), 2.0, device=device),
            max_rank=rank,
        )

    def slots(self, case: Case) -> list[Tensor]:  # of (M,) int32
        """An adapter for each token, drawn anew for each routing."""
        generator = torch.Generator().manual_seed(1)
        draw = (torch.randint(0, self.count, (case.tokens,), generator=generator) for _ in case.routings)
        return [slots.to(torch.int32).to(case.x.device) for slots in draw]


def active_pairs(routings: Sequence[Tensor], slots: Sequence[Tensor]) -> float:
    """(adapter, expert) pairs that have any token, on average."""
    keys = (ids.long() + (held.long()[:, None] << 32) for ids, held in zip(routings, slots, strict=True))
    return sum(key.unique().numel() for key in keys) / len(routings)


def floor_us(roofs: Roofs, case: Case, adapters: Adapters, pairs: float) -> float:
    """Least time of the layer: that of its GEMMs, and the active pairs' factors read once."""
    base = roofs.floor_us(case.shape, case.bits, case.tokens, case.active)
    return base + pairs * adapters.pair_bytes(case.shape) / roofs.read_tbps / 1e6
