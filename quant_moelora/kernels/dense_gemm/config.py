"""Tiles of the dense grouped GEMM: a pure function of logical dimensions and the GPU, and nothing of adapters."""

from __future__ import annotations

from dataclasses import dataclass

from quant_moelora.kernels.grouped_gemm.config import expected_rows
from quant_moelora.kernels.grouped_gemm.spec import Tile, uses_mma_sync


@dataclass(frozen=True)
class DenseSpec:
    """A tile and a weight, as the kernel sees them. All members are compile-time constants of the kernel.

    Attributes:
        tile: how it is cut, without ``mixed``, ``split``, ``registers`` and ``consumers``.
        n: columns of the output; as many rows of the weight are read.
        rows: stored rows of the weight, all halves.
        k: columns that are multiplied, those of x.
        k_pad: stored columns of the weight.
        has_bias: whether there is a bias.
        gather: whether rows of x are those of the tokens, and not in sorted order.
        wide: whether offsets into one expert's weight need 64 bits.
        overlap: whether the kernel may be launched while the one before still runs.
    """

    tile: Tile
    n: int
    rows: int
    k: int
    k_pad: int
    has_bias: bool
    gather: bool
    wide: bool
    overlap: bool


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Most rows of a tile, for both GEMMs of a layer, since they share the list of tiles.

    Args:
        num_pairs: P, at least 1.
        num_experts: E.
    """
    rows = expected_rows(num_pairs, num_experts)
    return 16 if rows <= 10 else 32 if rows <= 24 else 64 if rows <= 48 else 128


def choose_tile(num_pairs: int, num_experts: int, n: int, k: int, capability: tuple[int, int]) -> Tile:
    """Tile for a product with n columns of the output and k of x.

    It must not depend on adapters: rows without one are bitwise those of the base model. Few rows are cut so that two
    programs a multiprocessor have 100 KB and more of the weight in flight, many rows as is usual for dense products. On
    an H200 it is within 6 % of the best of some 15 tiles at 41 of 42 points, and within 16 % at the last
    (benchmarks/NOTES.md, "Unquantised experts"). All but the highest tiles of sm_90 and sm_100 fit the 99 KB of a block
    on sm_86, sm_89 and sm_120.

    Args:
        num_pairs: P, at least 1.
        num_experts: E.
        n: columns of the output.
        k: columns of x.
        capability: compute capability of the GPU.
    """
    bm, sync = tile_rows(num_pairs, num_experts), uses_mma_sync(capability)
    if bm == 16:
        bk = 128 if k % 128 == 0 else 64  # rows of 256 bytes, where no step reaches past the end
        return Tile(bm, 64, bk, stages=4 if sync or bk == 64 else 5)
    bn = 64 if n <= 64 else 128
    if bm < 128:
        return Tile(bm, bn, 64, stages=4, group_m=bm // 32)
    if sync:  # operands pass through registers, and there may be no room for more in shared memory
        return Tile(bm, bn, 64, warps=bn // 16, stages=3, group_m=4)
    bn = 256 if n % 256 == 0 else bn
    return Tile(bm, bn, 64, warps=min(8, bn // 16), stages=4, group_m=4)


def shared_bytes(tile: Tile) -> int:
    """Shared memory of a program, at most: what is in flight of both operands, and barriers on sm_100.

    The output passes through the same bytes on its way to a store, as 16-bit floats, and needs fewer.
    """
    return tile.stages * (tile.bm + tile.bn) * tile.bk * 2 + 64
