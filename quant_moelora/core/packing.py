"""The packed layout ``frag64.v1``: the only place that knows where a weight's code lies.

A weight [N, K] of int4 or int8 codes is cut into tiles of 64 rows by 64 columns. A tile is 128 * bits
consecutive int32 words, and tiles run along K first: ``qweight[tile_n, tile_k, word]``.

Inside a tile, row n (0..63) and column k (0..63) split into

    n = 16 * warp + 8 * rh + g                  warp 0..3, rh 0..1, g 0..7
    k = 32 * kq + 16 * kr + 8 * kh + 2 * t + e  kq 0..1, kr 0..1, kh 0..1, t 0..3, e 0..1

and the code of (n, k) stands, with lane = ((warp * 8 + g) * 4 + t) * 4, in

    int4: word lane + 2 * kq + kr             bits 16 * e + 8 * kh + 4 * rh .. + 3
    int8: word 512 * kq + lane + 2 * kr + kh  bits 16 * e + 8 * rh          .. + 7

so that lane 4 * g + t of a warp finds in 16 consecutive bytes its left operand of four (int4) or two (int8) steps of 16
columns, and a warp's 16-byte loads are 512 consecutive bytes (the register fragment of wgmma and of mma.m16n8k16: PTX
ISA, "Register Fragments"; how the order was chosen: benchmarks/NOTES.md).

Gate and up are two halves of the rows, each padded to whole tiles, so that tile i of gate and tile i of up can be
loaded together and meet in one thread.

Scales and zero points of one group of columns are 16-bit values. Rows n and n + 8 of a tile share an int32:
``pairs[tile_n, group, 8 * warp + g]`` holds row 16 * warp + g in its low and row 16 * warp + g + 8 in its high half.

Everything here is plain torch, exact both ways, works on any device (the meta device included) and under any number
of leading dimensions. Integers are viewed as narrower and wider ones, on a machine whose low byte comes first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError

if sys.byteorder != "little":
    raise UnsupportedError(
        "byte order", got=sys.byteorder, rule="little", remedy="use a little-endian machine, as safetensors files are"
    )

LAYOUT = "frag64.v1"  # written into saved headers; change it with any change of the formula above
TILE = 64  # rows and columns of a tile
WORD_BITS = 32
CODE_DTYPES = {4: torch.int8, 8: torch.int16}  # of a code less its zero point
_SPLIT_N = (4, 2, 8)  # warp, rh, g
_SPLIT_K = (2, 2, 2, 4, 2)  # kq, kr, kh, t, e
# Two codes, of rows n and n + 8, are a pair; two pairs, of columns k and k + 1, are a half of a word. These are the
# integers that hold them, and the digits that count halves, most significant first: of a weight [N, K] that lies there
# row by row, and of its words. With 4 bits the two halves of a word (kh) are mingled, byte by byte.
_PAIR = {4: torch.uint8, 8: torch.int16}
_HALF = {4: torch.int16, 8: torch.int32}
_NATURAL = ("lead", "tile_n", "warp", "g", "tile_k", "kq", "kr", "kh", "t")
_ORDER = {
    4: ("lead", "tile_n", "tile_k", "warp", "g", "t", "kq", "kr", "kh"),
    8: ("lead", "tile_n", "tile_k", "kq", "warp", "g", "t", "kr", "kh"),
}
# The digits of a column as a row's codes lie in a tile, for each length of run, in columns: t stands behind those that
# count runs.
_COLUMN_DIGITS = ("kq", "kr", "kh", "t", "e")
_RUNS = {
    4: {
        64: ("t", "kq", "kr", "e", "kh"),
        32: ("kq", "t", "kr", "e", "kh"),
        16: ("kq", "kr", "t", "e", "kh"),
    },
    8: {
        32: ("kq", "t", "kr", "kh", "e"),
        16: ("kq", "kr", "t", "kh", "e"),
    },
}


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def padded_rows(n: int) -> int:
    """Rows that n logical rows take in the packed layout."""
    return round_up(n, TILE)


def padded_columns(k: int, group_size: int | None) -> int:
    """Columns that k logical columns take: whole tiles and whole groups."""
    multiple = TILE if group_size is None else math.lcm(TILE, group_size)
    return round_up(k, multiple)


def qweight_shape(num_experts: int, rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """Shape of the int32 codes of ``rows`` x ``columns`` padded weights."""
    return (num_experts, rows // TILE, columns // TILE, TILE * TILE * bits // WORD_BITS)


def pairs_shape(num_experts: int, rows: int, groups: int) -> tuple[int, ...]:
    """Shape of the int32 pairs that hold ``groups`` 16-bit values for each of ``rows`` padded rows."""
    return (num_experts, rows // TILE, groups, TILE // 2)


def pack_codes(
    codes: Tensor,  # (..., N, K) uint8, N and K multiples of 64
    bits: int,
) -> Tensor:  # (..., N/64, K/64, 128*bits) int32
    """Order unsigned codes as ``frag64.v1`` words.

    Codes are put together in whole rows before anything is moved, so that little is moved and in large pieces.
    """
    *lead, n, k = codes.shape
    sizes = _natural_sizes(lead, n // TILE, k // TILE)
    low, high = codes.reshape(*sizes[:3], 2, sizes[3], k).to(_PAIR[bits]).unbind(3)
    pairs = torch.add(low, high, alpha=1 << bits)  # of 16 bits it wraps where the high code has the sign bit
    halves = pairs.flatten().view(_HALF[bits]).view(sizes)
    words = halves.permute([_NATURAL.index(digit) for digit in _ORDER[bits]]).contiguous().flatten().view(torch.int32)
    if bits == 4:
        words = _swap_middle_bytes(words)
    return words.view(*lead, n // TILE, k // TILE, TILE * TILE * bits // WORD_BITS)


def unpack_codes(
    qweight: Tensor,  # (..., N/64, K/64, 128*bits) int32
    bits: int,
) -> Tensor:  # (..., N, K) uint8
    """Inverse of `pack_codes`."""
    *lead, tiles_n, tiles_k, _ = qweight.shape
    words = qweight.contiguous().flatten()
    if bits == 4:
        words = _swap_middle_bytes(words)
    sizes = _natural_sizes(lead, tiles_n, tiles_k)
    halves = words.view(_HALF[bits]).view([sizes[_NATURAL.index(digit)] for digit in _ORDER[bits]])
    natural = halves.permute([_ORDER[bits].index(digit) for digit in _NATURAL]).contiguous()
    pairs = natural.flatten().view(_PAIR[bits]).view(*sizes[:4], tiles_k * TILE)
    mask = (1 << bits) - 1
    codes = torch.stack((pairs & mask, pairs >> bits & mask), dim=3).to(torch.uint8)
    return codes.view(*lead, tiles_n * TILE, tiles_k * TILE)


def _natural_sizes(lead: Sequence[int], tiles_n: int, tiles_k: int) -> tuple[int, ...]:
    """Sizes of the digits of `_NATURAL`."""
    warps, _, lane_rows = _SPLIT_N
    return (math.prod(lead), tiles_n, warps, lane_rows, tiles_k, *_SPLIT_K[:-1])


def _swap_middle_bytes(
    words: Tensor,  # (X) int32
) -> Tensor:  # (X) int32
    """Bytes 0, 1, 2, 3 of each word as 0, 2, 1, 3: from (kh, e) to (e, kh), and back."""
    differing = (words >> 8).bitwise_xor_(words).bitwise_and_(0xFF00)
    return words ^ differing.mul_(0x101)  # at byte 1 and again at byte 2


def pack_pairs(
    values: Tensor,  # (..., N, G) of a 16-bit dtype, N a multiple of 64
) -> Tensor:  # (..., N/64, G, 32) int32
    """Put the raw bits of rows n and n + 8 of each group into one int32."""
    *lead, n, groups = values.shape
    raw = values.contiguous().view(torch.int16).to(torch.int32)
    rows = raw.reshape(*lead, n // TILE, *_SPLIT_N, groups)
    low, high = rows.unbind(len(lead) + 2)
    pairs = (low & 0xFFFF) | (high << 16)  # (..., N/64, warp, g, G)
    return pairs.reshape(*lead, n // TILE, TILE // 2, groups).transpose(-1, -2).contiguous()


def unpack_pairs(
    pairs: Tensor,  # (..., N/64, G, 32) int32
    dtype: torch.dtype,
) -> Tensor:  # (..., N, G) dtype
    """Inverse of `pack_pairs`; ``dtype`` is the 16-bit dtype whose bits the pairs hold."""
    *lead, tiles_n, groups, _ = pairs.shape
    warps, row_halves, lane_rows = _SPLIT_N
    rows = pairs.contiguous().view(torch.int16).view(*lead, tiles_n, groups, warps, lane_rows, row_halves)
    first = len(lead)
    nt, group, warp, g, rh = range(first, first + 5)
    ordered = rows.permute(*range(first), nt, warp, rh, g, group)
    return ordered.reshape(*lead, tiles_n * TILE, groups).contiguous().view(dtype)


def run_length(bits: int, group: int) -> int | None:
    """Columns that `RunUnpacker` keeps together, such that a group of ``group`` is whole runs; None if none do."""
    return next((run for run in _RUNS[bits] if group % run == 0), None)


def run_columns(k_pad: int, bits: int, run: int) -> Tensor:  # (k_pad,) int64
    """Stored column of each column that `RunUnpacker` writes; it only changes places within a run."""
    digits = torch.arange(k_pad).view(-1, *_SPLIT_K)
    order = [_COLUMN_DIGITS.index(digit) for digit in _RUNS[bits][run]]
    return digits.permute(0, *(1 + digit for digit in order)).reshape(-1)


class RunUnpacker:
    """Unpacks the codes of T tiles of rows, with columns in the order of `run_columns`, in buffers of its own.

    Whole words are moved to their row, and codes are cut out of them afterwards, which costs a sixth of what
    `unpack_codes` does, whose columns are in the stored order. Buffers and the views of them are made once.

    Attributes:
        codes: (T * 64, K) int8 for 4 bits, int16 for 8: the unsigned codes, with room for a code less a zero point.
    """

    def __init__(self, bits: int, run: int, tiles_n: int, tiles_k: int) -> None:
        warps, row_halves, lane_rows = _SPLIT_N
        columns = tiles_k * TILE
        # A row finds the columns of the longest run in 64 bytes, 16 of each of 4 lanes; shorter runs are parts of it.
        longest = max(_RUNS[bits])
        parts = longest // run
        self._bits, self._element = bits, torch.int32 if parts == 4 else torch.int64
        each = 16 // parts // self._element.itemsize
        self._source = (tiles_n, columns // longest, warps * lane_rows, 4, parts, each)
        words = torch.empty(tiles_n * TILE * columns * bits // 64, dtype=torch.int64)
        moved = words.view(self._element).view(tiles_n, warps * lane_rows, columns // longest, parts, 4, each)
        self._moved = moved.unbind(3)
        self.codes = torch.empty(tiles_n * TILE, columns, dtype=CODE_DTYPES[bits])
        unit = _PAIR[bits]
        self._pairs = words.view(unit).view(tiles_n * warps, lane_rows, columns)
        self._low, self._high = self.codes.view(unit).view(tiles_n * warps, row_halves, lane_rows, columns).unbind(1)

    def __call__(
        self,
        qweight: Tensor,  # (T, K/64, 128*bits) int32, contiguous
    ) -> Tensor:  # (T * 64, K), `codes`
        """Unpack; overwritten by the next call."""
        source = qweight.view(self._element).view(self._source).transpose(1, 2)
        for moved, part in zip(self._moved, source.unbind(4), strict=True):
            moved.copy_(part)  # one copy of all parts would have an inner loop of 4 elements
        torch.bitwise_and(self._pairs, (1 << self._bits) - 1, out=self._low)
        torch.bitwise_right_shift(self._pairs, self._bits, out=self._high)
        if self._bits == 8:
            self._high.bitwise_and_(255)  # the shift of a signed integer brings its sign
        return self.codes
