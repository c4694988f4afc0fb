"""align in Triton: a program an expert, and no program waits for another."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.common.kernel import follow


@triton.jit
def _experts(ids, first, num_pairs, num_experts, BLOCK: tl.constexpr):
    """BLOCK pairs from ``first`` on and their experts; num_experts for an id that is none, more past the last pair."""
    pair = first + tl.arange(0, BLOCK)
    there = pair < num_pairs
    expert = tl.load(ids + pair, mask=there, other=0)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return pair, tl.where(there, expert, num_experts + 1)


@triton.jit
def align_kernel(
    ids,  # (P,) int32 or int64
    rows,  # (P,) int32
    inverse,  # (P,) int32
    offsets,  # (E + 1,) int32
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Move the pairs of expert program_id(0), in their order, to where the lower experts' end.

    The last program has the pairs without an expert. Ids outside the experts are never used as an index.
    """
    follow(OVERLAP)
    own = tl.program_id(0)
    below = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, num_pairs, BLOCK):
        _, expert = _experts(ids, first, num_pairs, num_experts, BLOCK)
        below += (expert < own).to(tl.int32)
    begin = tl.sum(below, 0)
    tl.store(offsets + own, begin)
    for first in tl.range(0, num_pairs, BLOCK):
        pair, expert = _experts(ids, first, num_pairs, num_experts, BLOCK)
        mine = (expert == own).to(tl.int32)
        place = begin + tl.cumsum(mine, 0) - mine
        tl.store(rows + place, pair, mask=mine != 0)
        tl.store(inverse + pair, place, mask=mine != 0)
        begin += tl.sum(mine, 0)


@triton.jit
def tiles_kernel(
    offsets,  # (E + 1,) int32
    tiles,  # (T, 4) int32
    num_experts,
    num_tiles,
    BM: tl.constexpr,
    BINS: tl.constexpr,  # a power of two, at least E + 1
    OVERLAP: tl.constexpr,
):
    """The tiles of expert program_id(0); the last program lists those that nobody needs, which have no rows."""
    follow(OVERLAP)
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    held = bins < num_experts
    begins = tl.load(offsets + bins, mask=held, other=0)
    ends = tl.load(offsets + bins + 1, mask=held, other=0)
    before = tl.sum(tl.where(bins < own, (ends - begins + BM - 1) // BM, 0), 0)
    begin = tl.sum(tl.where(bins == own, begins, 0), 0)
    count = tl.sum(tl.where(bins == own, ends - begins, 0), 0)
    beyond = own == num_experts
    past = tl.where(beyond, num_tiles, before + (count + BM - 1) // BM)
    for first in tl.range(before, past, BINS):
        tile = first + bins
        row = (tile - before) * BM
        tl.store(tiles + tile * 4, tl.where(beyond, 0, own), mask=tile < past)
        tl.store(tiles + tile * 4 + 1, begin + row, mask=tile < past)
        tl.store(tiles + tile * 4 + 2, tl.where(beyond, 0, tl.minimum(count - row, BM)), mask=tile < past)
