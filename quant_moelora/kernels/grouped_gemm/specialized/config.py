"""What the specialised grouped GEMM serves, and its tiles. All else is the plain kernel's, with the same bits."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from quant_moelora.kernels.grouped_gemm.spec import Tile

_log = logging.getLogger(__name__)
# Gluon is part of Triton, but not of what Triton promises: those releases whose code was compiled and read.
_OLDEST, _NEWEST = (3, 6), (3, 9)
_ALIGNED = 8  # 16-bit values in the 16 bytes that a thread copies at once


def serves(capability: tuple[int, int], *, halves_apart: bool) -> bool:
    """Whether there is a specialised kernel for a GEMM with a list of tiles.

    It multiplies by wgmma, which only sm_90 has. A block's units may lie in both halves of the weight, which therefore
    cannot have rows of x of their own.

    Args:
        capability: compute capability of the GPU.
        halves_apart: whether a tile has to lie in one of the two halves of the weight's rows.
    """
    return capability == (9, 0) and not halves_apart and _compiles()


@functools.cache
def _compiles() -> bool:
    """Whether the installed Triton is one of those that the kernel is written for."""
    try:
        import triton
    except ImportError:  # where there is none, nothing is launched
        return False
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if _OLDEST <= release <= _NEWEST:
        return True
    _log.warning("Triton %s is not known to compile the GEMM for many rows; the plain one is used", triton.__version__)
    return False


def specialized_tile(bm: int) -> Tile:
    """The tile for lists of tiles of at most ``bm`` rows, 128 or 192: 256 or 192 rows of the weight.

    All threads of a block, 4 warps for each consumer and 4 of the producer, start with the same share of a
    multiprocessor's 65536 registers. Of its 227 KB of shared memory a stage takes 128 bytes a row, and what a consumer
    stores goes through 16 KB.
    """
    if bm == 128:
        return Tile(128, 256, 64, stages=8, registers=96, group_m=6, consumers=4)
    assert bm == 192, bm
    return Tile(192, 192, 64, stages=6, registers=128, group_m=6, consumers=3)


def heights(bm: int) -> tuple[int, ...]:
    """Rows of x that there is a loop for, ascending: each a power of two, or one and a smaller one."""
    return tuple(height for height in (32, 48, 64, 96, 128, 144, 160, 192) if height <= bm)


def aligned(
    x: Tensor,  # (rows, columns)
) -> Tensor:  # (rows, columns, rounded up to 8)
    """x itself, or a copy whose rows begin on 16 bytes, as copies to shared memory want them."""
    if not (x.data_ptr() % 16 or x.stride(0) % _ALIGNED or x.shape[1] % _ALIGNED):
        return x
    rows, columns = x.shape
    copy = x.new_zeros(rows, -(-columns // _ALIGNED) * _ALIGNED)
    copy[:, :columns] = x
    return copy
