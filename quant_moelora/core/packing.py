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
of leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAYOUT = "frag64.v1"  # written into saved headers; change it with any change of the formula above
TILE = 64  # rows and columns of a tile
WORD_BITS = 32
_SPLIT_N = (4, 2, 8)  # warp, rh, g
_SPLIT_K = (2, 2, 2, 4, 2)  # kq, kr, kh, t, e
# The digits of (n, k), most significant first, in the order in which they count words and, within a word, codes from
# the lowest bits up.
_ORDER: dict[int, tuple[str, ...]] = {
    4: ("warp", "g", "t", "kq", "kr", "e", "kh", "rh"),
    8: ("kq", "warp", "g", "t", "kr", "kh", "e", "rh"),
}
_NATURAL: tuple[str, ...] = ("tile_n", "warp", "rh", "g", "tile_k", "kq", "kr", "kh", "t", "e")  # of a weight [N, K]


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
    """Order unsigned codes as ``frag64.v1`` words."""
    *lead, n, k = codes.shape
    first = len(lead)
    tiles = codes.reshape(*lead, n // TILE, *_SPLIT_N, k // TILE, *_SPLIT_K)
    place = {digit: first + i for i, digit in enumerate(_NATURAL)}
    ordered = tiles.permute(*range(first), place["tile_n"], place["tile_k"], *(place[d] for d in _ORDER[bits]))
    slots = ordered.reshape(*lead, n // TILE, k // TILE, -1, WORD_BITS // bits)
    words = torch.zeros(slots.shape[:-1], dtype=torch.int32, device=codes.device)
    for slot in range(WORD_BITS // bits):
        words |= slots[..., slot].to(torch.int32) << (bits * slot)
    return words


def unpack_codes(
    qweight: Tensor,  # (..., N/64, K/64, 128*bits) int32
    bits: int,
) -> Tensor:  # (..., N, K) uint8
    """Inverse of `pack_codes`."""
    *lead, tiles_n, tiles_k, _ = qweight.shape
    first, mask = len(lead), (1 << bits) - 1
    slots = torch.stack([(qweight >> s & mask).to(torch.uint8) for s in range(0, WORD_BITS, bits)], dim=-1)
    sizes = dict(zip(_NATURAL, (tiles_n, *_SPLIT_N, tiles_k, *_SPLIT_K), strict=True))
    tiles = slots.reshape(*lead, tiles_n, tiles_k, *(sizes[digit] for digit in _ORDER[bits]))
    place = {digit: first + i for i, digit in enumerate(("tile_n", "tile_k", *_ORDER[bits]))}
    natural = tiles.permute(*range(first), *(place[digit] for digit in _NATURAL))
    return natural.reshape(*lead, tiles_n * TILE, tiles_k * TILE)


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
    halves = torch.stack((pairs << 16 >> 16, pairs >> 16), dim=-1).to(torch.int16)
    warps, row_halves, lane_rows = _SPLIT_N
    rows = halves.reshape(*lead, tiles_n, groups, warps, lane_rows, row_halves)
    first = len(lead)
    nt, group, warp, g, rh = range(first, first + 5)
    ordered = rows.permute(*range(first), nt, warp, rh, g, group)
    return ordered.reshape(*lead, tiles_n * TILE, groups).contiguous().view(dtype)
