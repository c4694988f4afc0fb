"""Cases of the LoRA benchmark: random adapters, which of them each token has, and the bytes that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.moe_case import DTYPE, Case, Roofs, Shape
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.kernels.common.sample import random_adapters, random_slots

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
        return random_adapters(info, DTYPE, self.count, self.rank, self.num_slots, device)

    @property
    def num_slots(self) -> int:
        """Of a context."""
        return next(slots for slots in SLOTS if slots >= self.count)

    def slots(self, case: Case) -> list[Tensor]:  # of (M,) int32
        """An adapter for each token, drawn anew for each routing."""
        return random_slots(self.count, case.tokens, len(case.routings), case.x.device)


def active_pairs(routings: Sequence[Tensor], slots: Sequence[Tensor]) -> float:
    """(adapter, expert) pairs that have any token, on average."""
    keys = (ids.long() + (held.long()[:, None] << 32) for ids, held in zip(routings, slots, strict=True))
    return sum(key.unique().numel() for key in keys) / len(routings)


def floor_us(roofs: Roofs, case: Case, adapters: Adapters, pairs: float) -> float:
    """Least time of the layer: that of its GEMMs, and the active pairs' factors read once."""
    base = roofs.floor_us(case.shape, case.bits, case.tokens, case.active)
    return base + pairs * adapters.pair_bytes(case.shape) / roofs.read_tbps / 1e6
