"""LayerShape and LayerTiles: what the choice of a layer's tiles is made from, and what it is."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.dequant.prepare import regrouped
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.specialized.config import serves, specialized_tile

# Kilobytes of shared memory that a block may have: CUDA C++ Programming Guide, table of compute capabilities.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED = 99  # of all others from 8.0 on
_ACCUMULATORS = 128  # of a thread; with more, sums and operands together are beyond its 255 registers


_WEIGHT_NAME = r"(\d+)x(\d+)-int(\d)-g(\d+)(-zeros)?"
_NAME = re.compile(rf"E(\d+)-{_WEIGHT_NAME}-{_WEIGHT_NAME}-(\w+?)(-act_order)?(-unfused)?")


@dataclass(frozen=True)
class WeightShape:
    """A packed weight as a kernel sees it.

    Attributes:
        rows: stored rows, all halves.
        columns: stored columns.
        bits: of a code.
        group: columns that share a scale, after `regrouped`.
        zeros: whether there are zero points.
    """

    rows: int
    columns: int
    bits: int
    group: int
    zeros: bool

    @staticmethod
    def of(weight: PackedWeight) -> WeightShape:
        """The shape of a weight, which may be on the meta device."""
        zeros = weight.zeros is not None
        return WeightShape(weight.rows, weight.k_pad, weight.scheme.bits, regrouped(weight), zeros)

    @property
    def name(self) -> str:
        """Short name such as ``1536x2048-int4-g128``."""
        return f"{self.rows}x{self.columns}-int{self.bits}-g{self.group}{'-zeros' if self.zeros else ''}"


@dataclass(frozen=True)
class LayerShape:
    """All facts of a layer that its tiles may depend on. Nothing of adapters is among them.

    Attributes:
        num_experts: E.
        w13: gate and up, or up alone.
        w2: down; its columns are the stored rows of a half of w13.
        dtype: of the activations, ``bfloat16`` or ``float16``.
        act_order: whether gate and up each read x in an order of their own.
        fuses: whether the activation may be part of the first GEMM.
    """

    num_experts: int
    w13: WeightShape
    w2: WeightShape
    dtype: str
    act_order: bool
    fuses: bool

    @staticmethod
    def of(info: MoEQuantInfo, dtype: torch.dtype) -> LayerShape:
        """The shape of a layer with packed weights, which may be on the meta device."""
        w13, w2 = info.w13, info.w2
        assert isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight)  # the backend's `supports`
        act_order = w13.k_perm is not None
        return LayerShape(
            num_experts=info.num_experts,
            w13=WeightShape.of(w13),
            w2=WeightShape.of(w2),
            dtype=str(dtype).removeprefix("torch."),
            act_order=act_order,
            fuses=info.activation.gated and not act_order and info.router_weight == "output",
        )

    @staticmethod
    @functools.cache
    def parse(name: str) -> LayerShape:
        """Inverse of `name`, which is how a shape goes into an operator."""
        matched = _NAME.fullmatch(name)
        assert matched, f"{name} is no name of a LayerShape"
        w13, w2 = (
            WeightShape(int(rows), int(columns), int(bits), int(group), bool(zeros))
            for rows, columns, bits, group, zeros in (matched.groups()[i : i + 5] for i in (1, 6))
        )
        experts, dtype, act_order, unfused = matched.group(1, 12, 13, 14)
        return LayerShape(int(experts), w13, w2, dtype, bool(act_order), not unfused)

    @property
    def halves_apart(self) -> bool:
        """Whether a tile of w13 has to lie in one of its halves."""
        return self.act_order and self.w13.rows > self.w2.columns

    @property
    def name(self) -> str:
        """Short name, for files and messages."""
        parts = [f"E{self.num_experts}", self.w13.name, self.w2.name, self.dtype]
        parts += [word for word, said in (("act_order", self.act_order), ("unfused", not self.fuses)) if said]
        return "-".join(parts)


@dataclass(frozen=True)
class LayerTiles:
    """How both GEMMs of a layer are cut.

    Attributes:
        direct: whether each pair is a tile of its own, so that nothing has to be sorted.
        w13: tile of the first GEMM; with adapters always this one.
        w13_fused: tile of the first GEMM with the activation in it, for the base model; None where it is a launch of
            its own.
        w2: tile of the second GEMM.
    """

    direct: bool
    w13: Tile
    w13_fused: Tile | None
    w2: Tile

    def __post_init__(self) -> None:
        heights = {tile.bm for tile in (self.w13, self.w13_fused, self.w2) if tile is not None}
        assert len(heights) == 1, "both GEMMs share the list of tiles"
        # A split alone changes bits, and a row without an adapter has those of the base model.
        assert self.w13_fused is None or self.w13_fused.split == self.w13.split == 1

    @property
    def bm(self) -> int:
        """Most rows of a tile of either GEMM."""
        return self.w13.bm


def shared_bytes(tile: Tile, weight: WeightShape, capability: tuple[int, int]) -> int:
    """Shared memory of a program, at most: what is in flight of x, and one step less of the weight and its scales.

    Those go into registers before the matrix unit starts, which reads x where it lies. Where it takes both from
    registers (all but sm_90 and sm_100), int4 weights pass through shared memory once more, half a tile at a time.
    """
    codes = tile.bn * tile.bk * weight.bits // 8
    pairs = tile.bn // 2 * 4 * max(1, tile.bk // weight.group) * (2 if weight.zeros else 1)
    again = tile.bn * tile.bk if weight.bits == 4 and capability[0] not in {9, 10} else 0
    return again + max(tile.stages - 1, 1) * (codes + pairs) + tile.stages * tile.bm * tile.bk * 2


def faults(
    tile: Tile, weight: WeightShape, capability: tuple[int, int], *, fused: bool = False, half_rows: int | None = None
) -> list[str]:
    """Why a tile cannot be launched for a weight; empty if it can.

    Args:
        tile: the tile.
        weight: what it cuts.
        capability: compute capability of the GPU.
        fused: whether the activation is applied to it.
        half_rows: stored rows of a half, if a tile has to lie in one (act-order) or to hold as many of both (fused).
    """
    apart = half_rows is not None and not fused
    if tile.consumers:
        served = serves(capability, halves_apart=apart) and tile.bm in (128, 192)
        return (
            [] if served and _is_specialized(tile) else ["consumers are those of `specialized_tile`, where it serves"]
        )
    shared = shared_bytes(tile, weight, capability)
    limit = _SHARED.get(capability, _LEAST_SHARED) << 10
    steps = weight.columns // tile.bk if tile.bk else 0
    rules = {
        "bm is a power of two from 16 to 128, or 192": tile.bm in (16, 32, 64, 128, 192),
        "bn is 64, 128 or 256": tile.bn in (64, 128, 256),
        "bk is 64 or 128": tile.bk in (64, 128),
        "warps are 4, or 8 with 128 rows of the weight and more": tile.warps == 4
        or (tile.warps == 8 and tile.bn >= 128 and not fused),
        "stages, split and group_m are at least 1": min(tile.stages, tile.split, tile.group_m) >= 1,
        "registers are 32 to 255 of a thread": tile.registers is None or 32 <= tile.registers <= 255,
        "mixed needs 64 rows": tile.bm >= 64 or not tile.mixed,
        "bn divides the rows": tile.bn > 0 and weight.rows % tile.bn == 0,
        "bk and split divide the columns": steps > 0
        and weight.columns % tile.bk == 0
        and tile.split > 0
        and steps % tile.split == 0,
        f"sums fit {_ACCUMULATORS} registers of a thread": tile.bm * tile.bn <= _ACCUMULATORS * 32 * tile.warps,
        f"its {shared} bytes of shared memory fit {limit}": shared <= limit,
        "a fused tile is not split": not fused or tile.split == 1,
        "a fused tile holds whole tiles of 64 rows of gate and of up": not fused
        or (tile.bn >= 128 and half_rows is not None and half_rows % (tile.bn // 2) == 0),
        "a tile lies in one half": not apart or (half_rows is not None and tile.bn > 0 and half_rows % tile.bn == 0),
    }
    return [rule for rule, kept in rules.items() if not kept]


def _is_specialized(tile: Tile) -> bool:
    return tile == replace(specialized_tile(tile.bm), group_m=tile.group_m)


def layer_faults(tiles: LayerTiles, shape: LayerShape, capability: tuple[int, int]) -> list[str]:
    """Why the tiles cannot serve a layer, by GEMM; empty if they can."""
    half_rows = shape.w2.columns
    found = {
        "w13": faults(tiles.w13, shape.w13, capability, half_rows=half_rows if shape.halves_apart else None),
        "w2": faults(tiles.w2, shape.w2, capability),
    }
    if tiles.w13_fused is not None:
        found["w13_fused"] = faults(tiles.w13_fused, shape.w13, capability, fused=True, half_rows=half_rows)
        if not shape.fuses:
            found["w13_fused"].append("the layer's activation is a launch of its own")
    return [f"{name}: {rule}" for name, rules in found.items() for rule in rules]
