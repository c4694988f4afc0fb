"""Tiles of the grouped GEMMs: a pure function of logical dimensions, the GPU and what was measured there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles
from quant_moelora.kernels.grouped_gemm.spec import Tile, uses_mma_sync
from quant_moelora.kernels.grouped_gemm.specialized.config import serves, specialized_tile
from quant_moelora.kernels.lora import spec as lora

# Programs below which a launch leaves the memory idle: four on each of an H200's 132 multiprocessors. Where experts
# hardly repeat, half of them will do, since fewer parts are read sooner by what follows.
_FULL = 528
# Rows of an expert above which the specialised kernel is the faster one, and up to which three consumers by 192 rows
# are faster than four by 128, which read the weight once more.
_MANY, _MOST_OF_192 = 96, 192
_LEAST_STEPS = 4  # of a program, below which a split costs more than it brings
_SPLIT_STEPS = 8  # of a program, from which on a split costs less than narrow tiles do
_FEW = 1.5  # pairs of an expert, up to which experts hardly repeat
_NEAR = 2.0  # factor between numbers of pairs, up to which what was measured with one serves the other


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was measured on one GPU: tiles of layers, by number of pairs. Compared by identity, so that it hashes fast.

    Attributes:
        layers: of each layer, by number of pairs; `LayerTiles.direct` of these does not count.
        lora: how LoRA is cut, of each layer, by number of pairs and largest rank.
    """

    layers: Mapping[LayerShape, Mapping[int, LayerTiles]] = field(default_factory=dict)
    lora: Mapping[LayerShape, Mapping[tuple[int, int], lora.Cut]] = field(default_factory=dict)


NOTHING_TUNED = Tuned()


@functools.lru_cache(maxsize=1 << 14)  # a forward asks, and has no time for the formula
def choose_tiles(
    shape: LayerShape, num_pairs: int, capability: tuple[int, int], tuned: Tuned = NOTHING_TUNED
) -> LayerTiles:
    """Tiles of a layer's forward with P pairs: what was measured with about as many, otherwise the formula's.

    Where the formula's own tiles were the best, the formula goes on deciding around that number of pairs too. Whether
    pairs are sorted is always the formula's to say.

    Args:
        shape: the layer.
        num_pairs: P, at least 1.
        capability: compute capability of the GPU.
        tuned: what was measured on this GPU.
    """
    computed = formula(shape, num_pairs, capability)
    measured = tuned.layers.get(shape)
    if not measured:
        return computed
    near = min(measured, key=lambda pairs: (_apart(pairs, num_pairs), pairs))
    if _apart(near, num_pairs) > _NEAR:
        return computed
    own = formula(shape, near, capability)
    found = replace(measured[near], direct=own.direct)
    return computed if found == own else replace(found, direct=computed.direct)


@functools.lru_cache(maxsize=1 << 14)
def choose_lora_cut(shape: LayerShape, num_pairs: int, max_rank: int, tuned: Tuned = NOTHING_TUNED) -> lora.Cut:
    """How a layer's LoRA is cut: what was measured with about as many pairs, otherwise the formula's.

    What was measured with one rank serves those that have the same next power of two, from 16 on.

    Args:
        shape: the layer.
        num_pairs: P, at least 1.
        max_rank: of the adapters.
        tuned: what was measured on this GPU.
    """
    computed = lora.choose_cut(num_pairs, shape.num_experts, shape.w13.columns, shape.w2.columns, max_rank)
    measured = tuned.lora.get(shape, {})
    ranks = lora.rank_class(max_rank)
    near = [pairs for pairs, rank in measured if rank == ranks and _apart(pairs, num_pairs) <= _NEAR]
    if not near:
        return computed
    return measured[min(near, key=lambda pairs: (_apart(pairs, num_pairs), pairs)), ranks]


def _apart(pairs: int, other: int) -> float:
    """Factor between two numbers of pairs."""
    return max(pairs, other) / min(pairs, other)


def formula(shape: LayerShape, num_pairs: int, capability: tuple[int, int]) -> LayerTiles:
    """Tiles of a layer that nobody measured."""

    def tile(rows: int, columns: int, bits: int, *, fused: bool = False, apart: bool = False) -> Tile:
        """The formula's tile of one product."""
        return choose_tile(
            num_pairs, shape.num_experts, rows, columns, bits, capability, fused=fused, halves_apart=apart
        )

    w13, w2 = shape.w13, shape.w2
    plain = tile(w13.rows, w13.columns, w13.bits, apart=shape.halves_apart)
    fuses = shape.fuses and plain.split == 1
    return LayerTiles(
        direct=is_direct(num_pairs, shape.num_experts) and not shape.act_order,
        w13=plain,
        w13_fused=tile(w13.rows, w13.columns, w13.bits, fused=True) if fuses else None,
        w2=tile(w2.rows, w2.columns, w2.bits),
    )


def expected_rows(num_pairs: int, num_experts: int) -> float:
    """Pairs of an expert that has any, if experts are drawn evenly."""
    return num_pairs / _active(num_pairs, num_experts)


def _active(num_pairs: int, num_experts: int) -> float:
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** num_pairs)


def is_direct(num_pairs: int, num_experts: int) -> bool:
    """Whether each pair is a tile of its own: so few that experts hardly repeat; a sort costs more than it saves."""
    return 4 * num_pairs <= num_experts


def _is_large(capability: tuple[int, int]) -> bool:
    """Whether the largest tiles fit: on sm_90 and sm_100, whose matrix units read x from shared memory.

    Others need registers for x as well, so that int4 tiles of 128 rows spill, and sm_86, sm_89 and sm_120 have 99 KB of
    shared memory for a block, where these take 113.
    """
    return not uses_mma_sync(capability)


def tile_rows(num_pairs: int, num_experts: int, capability: tuple[int, int]) -> int:
    """Most rows of a tile, for both GEMMs of a layer, since they share the list of tiles."""
    rows = expected_rows(num_pairs, num_experts)
    if _MANY < rows <= _MOST_OF_192 and serves(capability, halves_apart=False):
        return 192
    return 16 if rows <= 10 else 32 if rows <= 24 else 64 if rows <= 40 or not _is_large(capability) else 128


def choose_tile(
    num_pairs: int,
    num_experts: int,
    n: int,
    k: int,
    bits: int,
    capability: tuple[int, int],
    *,
    fused: bool,
    halves_apart: bool,
) -> Tile:
    """Tile for a weight of n x k stored rows and columns; the table behind it is in benchmarks/NOTES.md.

    It must not depend on adapters: rows without one are bitwise those of the base model.

    Args:
        num_pairs: P.
        num_experts: E.
        n: stored rows, all halves; a multiple of 64.
        k: stored columns; a multiple of 64.
        bits: of a code.
        capability: compute capability of the GPU.
        fused: whether the activation is applied to the tile, which then holds as many rows of gate as of up.
        halves_apart: whether a tile has to lie in one of the two halves of n rows.
    """
    bm, rows = tile_rows(num_pairs, num_experts, capability), expected_rows(num_pairs, num_experts)
    if rows > _MANY and serves(capability, halves_apart=halves_apart):
        return specialized_tile(bm)
    if bm == 192:  # a narrow tile, so that the sums of 128 and of 64 rows fit into registers
        return Tile(bm, 64, 64, stages=4, mixed=True, group_m=2)
    rows_of_tiles, bk = n // 2 if halves_apart else n, 128 if k % 128 == 0 else 64
    programs, steps, few = _active(num_pairs, num_experts) * (n // 128), k // bk, rows <= _FEW
    narrow = not fused and (
        rows_of_tiles % 128 != 0 or (few and programs * _split(programs, steps, _SPLIT_STEPS, _FULL // 2) < _FULL // 2)
    )
    bn = 64 if narrow else 128
    if bm == 64:
        wide = _is_large(capability) and n % 512 == 0 and not halves_apart  # each row of x is read half as often
        return Tile(bm, 256 if wide else bn, 64, stages=4, mixed=True, group_m=2)
    if bm == 128:
        bk = 64 if bits == 8 else bk  # so that two programs fit a multiprocessor's shared memory
        return Tile(bm, bn, bk, stages=3 if bk == 128 else 4, mixed=True, group_m=2)
    split = 1
    if bm == 16 and not fused:
        split = _split(programs * 128 // bn, steps, _LEAST_STEPS, _FULL // 2 if few and not narrow else _FULL)
    return Tile(bm, bn, bk, stages=4, split=split, registers=128 if bm == 16 else None)


def _split(programs: float, steps: int, least: int, enough: int) -> int:
    """Least power of two of parts with which there are enough programs; each part has at least some steps."""
    split = 1
    while programs * split < enough and steps % (2 * split) == 0 and steps // (2 * split) >= least:
        split *= 2
    return split
