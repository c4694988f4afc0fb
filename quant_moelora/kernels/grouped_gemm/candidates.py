"""What a tuner tries: tiles around the formula's, a pure function of the layer, the number of pairs and the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from quant_moelora.kernels.grouped_gemm.config import formula
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles, faults
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.specialized.config import specialized_tile

Gemm = Literal["w13", "w2"]
GEMMS: tuple[Gemm, Gemm] = ("w13", "w2")


@dataclass(frozen=True)
class Cut:
    """How one GEMM of a layer is launched.

    Attributes:
        tile: its tile.
        fused: whether the activation is part of it.
    """

    tile: Tile
    fused: bool = False


def cuts_of(tiles: LayerTiles) -> dict[Gemm, Cut]:
    """What a forward of the base model launches."""
    w13 = Cut(tiles.w13) if tiles.w13_fused is None else Cut(tiles.w13_fused, fused=True)
    return {"w13": w13, "w2": Cut(tiles.w2)}


def tiles_of(w13: Cut, w2: Cut, own: LayerTiles) -> LayerTiles:
    """The tiles of a layer that launches these, where the formula has its ``own``.

    With adapters the first GEMM has no activation. Its tile is the formula's where that has the same height and no
    split, since it need not hold rows of gate and up, otherwise that of the base model.
    """
    if not w13.fused:
        return LayerTiles(own.direct, w13.tile, None, w2.tile)
    plain = own.w13 if own.bm == w13.tile.bm and own.w13.split == 1 else w13.tile
    return LayerTiles(own.direct, plain, w13.tile, w2.tile)


def candidates(shape: LayerShape, num_pairs: int, capability: tuple[int, int]) -> dict[Gemm, list[Cut]]:
    """What is worth a try for each GEMM, the formula's choice first; tiles of some heights, each launchable."""
    own = formula(shape, num_pairs, capability)
    plain = min(own.bm, 128)
    heights = [plain] if own.direct else [plain, *(bm for bm in (plain // 2, plain * 2) if 16 <= bm <= 128)]
    found: dict[Gemm, list[Cut]] = {}
    for gemm, first in cuts_of(own).items():
        cuts = [first, *(cut for bm in heights for cut in _around(shape, gemm, first, bm))]
        if own.bm >= 128:
            cuts += [Cut(specialized_tile(bm), first.fused) for bm in (128, 192)]
        found[gemm] = [cut for cut in dict.fromkeys(cuts) if launchable(cut, gemm, shape, capability)]
    return found


def launchable(cut: Cut, gemm: Gemm, shape: LayerShape, capability: tuple[int, int]) -> bool:
    """Whether the GPU can launch a cut for a layer."""
    if gemm == "w2":
        return not faults(cut.tile, shape.w2, capability)
    half_rows = shape.w2.columns if cut.fused or shape.halves_apart else None
    return not faults(cut.tile, shape.w13, capability, fused=cut.fused, half_rows=half_rows)


def _around(shape: LayerShape, gemm: Gemm, first: Cut, bm: int) -> Iterator[Cut]:
    """Cuts of one height around the formula's."""
    low, high = bm == 16, bm >= 64
    registers = 128 if low else None
    base = Tile(bm, 128, first.tile.bk, stages=4, mixed=high, registers=registers, group_m=2 if high else 1)
    if first.tile.bm == bm and not first.tile.consumers:
        base = replace(first.tile, split=1)
    forms = [True, False] if gemm == "w13" and shape.fuses else [False]
    for fused in forms:
        # Without the activation a first GEMM that could have it is worth a try only to be split.
        unsplit = fused or not (gemm == "w13" and shape.fuses)
        for tile in _tiles(base, unsplit=unsplit, split=low and not fused):
            yield Cut(tile, fused)


def _tiles(base: Tile, *, unsplit: bool, split: bool) -> Iterator[Tile]:
    """Widths and steps in all combinations, with what goes with them; what else there is, one at a time."""
    low = base.bm <= 32
    for bn, bk in itertools.product((64, 128, 256), (128, 64)):
        if low and bk != (64 if bn == 256 else base.bk):
            continue  # shorter steps lose wherever memory is the limit
        if bn == 256 and base.bm > 64:
            continue  # the sums do not fit (benchmarks/NOTES.md)
        tile = replace(base, bn=bn, bk=bk)
        if unsplit:
            yield from (replace(tile, stages=stages) for stages in ((4, 5) if low else (4, 3)))
        if split:
            yield from (replace(tile, split=parts) for parts in (2, 4, 8))
    if unsplit:
        yield replace(base, bn=128, stages=6, registers=None)
        yield replace(base, bn=128, registers=None if base.registers else 128 if base.bm == 16 else 168)
        yield replace(base, bn=128, group_m=1 if base.group_m > 1 else 2)
        if base.mixed:
            yield replace(base, mixed=False)
            yield replace(base, group_m=8)
