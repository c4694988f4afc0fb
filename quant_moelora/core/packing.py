"""The packed layout ``frag64.v1``: the only place that knows where a weight's code lies.

A weight [N, K] of int4 or int8 codes is cut into tiles of 64 rows by 64 columns. A tile is 128 * bits
consecutive int32 words, and tiles run along K first: ``qweight[tile_n, tile_k, word]``.

Inside a tile, row n (0..63) and column k (0..63) split into

    n = 16 * warp + 8 * rh + g        warp 0..3, rh 0..1, g 0..7
    k = 16 * kk + 8 * kh + 2 * t + e  kk 0..3, kh 0..1, t 0..3, e 0..1

and the code of (n, k) stands in

    int4: word ((warp * 8 + g) * 4 + t) * 4 + kk            bits 16 * e + 8 * kh + 4 * rh  .. + 3
    int8: word ((warp * 8 + g) * 4 + t) * 8 + 2 * kk + kh   bits 16 * e + 8 * rh           .. + 7

so that lane 4 * g + t of a warp finds its m64k16 left operand of four steps of 16 columns in 16 (int4) or 32
(int8) consecutive bytes (the register fragment of wgmma and of mma.m16n8k16: PTX ISA, "Register Fragments").

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
_WARPS, _ROW_HALVES, _LANE_ROWS = 4, 2, 8  # n = 16 * warp + 8 * rh + g
_STEPS, _K_HALVES, _LANE_COLS, _PARITY = 4, 2, 4, 2  # k = 16 * kk + 8 * kh + 2 * t + e


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


def _split_tiles(codes: Tensor) -> Tensor:
    """View [..., N, K] as [..., N/64, warp, rh, g, K/64, kk, kh, t, e]."""
    *lead, n, k = codes.shape
    return codes.reshape(
        *lead, n // TILE, _WARPS, _ROW_HALVES, _LANE_ROWS, k // TILE, _STEPS, _K_HALVES, _LANE_COLS, _PARITY
    )


def _word_slots(tiles: Tensor, bits: int) -> Tensor:
    """Order a tile view as [..., N/64, K/64, words, codes of a word from its lowest bit up]."""
    lead = tiles.ndim - 9
    nt, warp, rh, g, kt, kk, kh, t, e = range(lead, lead + 9)
    tail = (kk, e, kh, rh) if bits == 4 else (kk, kh, e, rh)
    ordered = tiles.permute(*range(lead), nt, kt, warp, g, t, *tail)
    return ordered.reshape(*ordered.shape[: lead + 2], -1, WORD_BITS // bits)


def pack_codes(
    codes: Tensor,  # (..., N, K) uint8, N and K multiples of 64
    bits: int,
) -> Tensor:  # (..., N/64, K/64, 128*bits) int32
    """Order unsigned codes as ``frag64.v1`` words."""
    slots = _word_slots(_split_tiles(codes), bits)
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
    mask = (1 << bits) - 1
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=qweight.device)
    unpacked = ((qweight.unsqueeze(-1) >> shifts) & mask).to(torch.uint8)
    tail = (_STEPS, _PARITY, _K_HALVES, _ROW_HALVES) if bits == 4 else (_STEPS, _K_HALVES, _PARITY, _ROW_HALVES)
    tiles = unpacked.reshape(*lead, tiles_n, tiles_k, _WARPS, _LANE_ROWS, _LANE_COLS, *tail)
    first = len(lead)
    nt, kt, warp, g, t, kk, x, y, rh = range(first, first + 9)
    e, kh = (x, y) if bits == 4 else (y, x)
    ordered = tiles.permute(*range(first), nt, warp, rh, g, kt, kk, kh, t, e)
    return ordered.reshape(*lead, tiles_n * TILE, tiles_k * TILE)


def pack_pairs(
    values: Tensor,  # (..., N, G) of a 16-bit dtype, N a multiple of 64
) -> Tensor:  # (..., N/64, G, 32) int32
    """Put the raw bits of rows n and n + 8 of each group into one int32."""
    *lead, n, groups = values.shape
    raw = values.contiguous().view(torch.int16).to(torch.int32)
    rows = raw.reshape(*lead, n // TILE, _WARPS, _ROW_HALVES, _LANE_ROWS, groups)
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
    rows = halves.reshape(*lead, tiles_n, groups, _WARPS, _LANE_ROWS, _ROW_HALVES)
    first = len(lead)
    nt, group, warp, g, rh = range(first, first + 5)
    ordered = rows.permute(*range(first), nt, warp, rh, g, group)
    return ordered.reshape(*lead, tiles_n * TILE, groups).contiguous().view(dtype)
