"""align in Triton: one launch, a program an expert, and a last one for the pairs without an expert.

Each program looks at all experts' ids, keeps its own pairs and sorts them by slot, so that the work does not depend on
how many slots there are; few pairs it compares each with each (`_place_few`, `_compare_own`). Where its tiles and
segments stand follows from how many pairs lower experts have: programs need nothing from one another.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.core.routing import SEGMENT_ROWS
from quant_moelora.kernels.common.kernel import follow

SEGMENT = tl.constexpr(SEGMENT_ROWS)


@triton.jit
def _experts(ids, pair, there, num_experts):
    """Experts of pairs: num_experts for an id that is none, more for a pair that is not there."""
    expert = tl.load(ids + pair, mask=there, other=0)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return tl.where(there, expert, num_experts + 1)


@triton.jit
def _slots(slots, pair, there, num_slots, TOP_K: tl.constexpr):
    """Slots of pairs: num_slots for one that is none."""
    slot = tl.load(slots + pair // TOP_K, mask=there, other=0)
    return tl.where((slot >= -1) & (slot < num_slots), slot, num_slots)


@triton.jit
def _step(ids, step, chunk, num_pairs, num_experts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH pairs from ``step`` on in each of LANES chunks of neighbours, and their experts.

    So that what is added up over the pairs before is added up within chunks, step by step, and over all chunks once.
    """
    pair = tl.arange(0, LANES)[:, None] * chunk + step + tl.arange(0, WIDTH)[None, :]
    return pair, _experts(ids, pair, (pair < num_pairs) & (step < chunk), num_experts)


@triton.jit
def _count(ids, own, chunk, num_pairs, num_experts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Pairs of lower experts, and of the own one in each chunk."""
    below = tl.zeros((LANES, WIDTH), tl.int32)
    mine = tl.zeros((LANES, WIDTH), tl.int32)
    _, ahead = _step(ids, 0, chunk, num_pairs, num_experts, LANES, WIDTH)
    for step in tl.range(0, chunk, WIDTH):
        expert = ahead
        _, ahead = _step(ids, step + WIDTH, chunk, num_pairs, num_experts, LANES, WIDTH)  # while these are counted
        below += (expert < own).to(tl.int32)
        mine += (expert == own).to(tl.int32)
    return tl.sum(tl.sum(below, 1), 0), tl.sum(mine, 1)


@triton.jit
def _place(
    ids,
    slots,
    order,
    inverse,
    own,
    place,  # (LANES,) where the own pairs of each chunk begin
    chunk,
    sorts,
    num_pairs,
    num_experts,
    num_slots,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Move the own pairs together, in their order; return their lowest and highest slot, if it ``sorts`` them.

    Without slots this is where they stay, and the inverse is written too.
    """
    lowest = tl.full((LANES, WIDTH), 2**31 - 1, tl.int32)
    highest = tl.full((LANES, WIDTH), -(2**31), tl.int32)
    upcoming, ahead = _step(ids, 0, chunk, num_pairs, num_experts, LANES, WIDTH)
    for step in tl.range(0, chunk, WIDTH):
        pair = upcoming
        mine = ahead == own
        upcoming, ahead = _step(ids, step + WIDTH, chunk, num_pairs, num_experts, LANES, WIDTH)
        ones = mine.to(tl.int32)
        to = place[:, None] + tl.cumsum(ones, 1) - 1
        place += tl.sum(ones, 1)
        tl.store(order + to, pair, mask=mine)
        if slots is None:
            tl.store(inverse + pair, to, mask=mine)
        else:
            mine &= sorts
            slot = _slots(slots, pair, mine, num_slots, TOP_K)
            lowest = tl.minimum(lowest, tl.where(mine, slot, 2**31 - 1))
            highest = tl.maximum(highest, tl.where(mine, slot, -(2**31)))
    return tl.min(tl.min(lowest, 1), 0), tl.max(tl.max(highest, 1), 0)


@triton.jit
def _digits(source, slots, i, there, lowest, shift, num_slots, TOP_K: tl.constexpr):
    """Pairs at places i, and for each a row of 16 with a one at the 4 bits of its slot from ``shift`` on."""
    pair = tl.load(source + i, mask=there, other=0)
    slot = _slots(slots, pair, there, num_slots, TOP_K).to(tl.int64)
    digit = tl.where(there, ((slot - lowest) >> shift) & 15, 16).to(tl.int32)
    return pair, (digit[:, None] == tl.arange(0, 16)[None, :]).to(tl.int32)


@triton.jit
def _sort(order, slots, begin, count, lowest, highest, num_pairs, num_slots, TOP_K: tl.constexpr, LANES: tl.constexpr):
    """Sort the ``count`` pairs from ``begin`` on by slot, stably; return the row of ``order`` that holds the result.

    4 bits at a time, from the lowest up, from one row to the other and back. Slots that are all the same need no pass.
    Each lane counts and then moves pairs of its own, neighbours; lanes add up once a pass, and not in its loops.
    """
    chunk = (count + LANES - 1) // LANES
    lane = tl.arange(0, LANES) * chunk
    row = 0
    shift = 0
    span = highest.to(tl.int64) - lowest
    lowest = lowest.to(tl.int64)
    tl.debug_barrier()
    while (span >> shift) > 0:
        source = order + row * num_pairs + begin
        target = order + (1 - row) * num_pairs + begin
        held = tl.zeros((LANES, 16), tl.int32)
        for step in tl.range(0, chunk):
            _, ones = _digits(source, slots, lane + step, lane + step < count, lowest, shift, num_slots, TOP_K)
            held += ones
        sizes = tl.sum(held, 0)
        begins = (tl.cumsum(sizes, 0) - sizes)[None, :] + tl.cumsum(held, 0) - held
        for step in tl.range(0, chunk):
            there = lane + step < count
            pair, ones = _digits(source, slots, lane + step, there, lowest, shift, num_slots, TOP_K)
            tl.store(target + tl.sum(ones * begins, 1), pair, mask=there)
            begins += ones
        tl.debug_barrier()
        row = 1 - row
        shift += 4
    return row


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _store_segment(segments, at, expert, last_row, within, slot, mask):
    """The segment that ends with a row, of which ``within`` of its expert and slot come before."""
    before = within % SEGMENT
    tl.store(segments + at * 4, expert, mask=mask)
    tl.store(segments + at * 4 + 1, last_row - before, mask=mask)
    tl.store(segments + at * 4 + 2, before + 1, mask=mask)
    tl.store(segments + at * 4 + 3, slot, mask=mask)


@triton.jit
def _sorted_slots(source, slots, i, count, num_slots, TOP_K: tl.constexpr):
    """Pairs at sorted places i of the own ones, and their slots."""
    there = (i >= 0) & (i < count)
    pair = tl.load(source + i, mask=there, other=0)
    return pair, _slots(slots, pair, there, num_slots, TOP_K)


@triton.jit
def _write_sorted(
    order,
    slots,
    inverse,
    segments,
    own,
    row,
    begin,
    count,
    sorts,
    num_pairs,
    num_slots,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Bring the sorted pairs into the first row of ``order``, write their inverse and segments, and count these."""
    source = order + row * num_pairs + begin
    place = _first_segment(own, begin, num_pairs, num_slots)
    held = 0
    opened = 0  # place of the last row that has another slot than the one before
    for first in tl.range(0, count, SIZE):
        i = first + tl.arange(0, SIZE)
        there = i < count
        pair, slot = _sorted_slots(source, slots, i, count, num_slots, TOP_K)
        _, before = _sorted_slots(source, slots, i - 1, count, num_slots, TOP_K)
        _, after = _sorted_slots(source, slots, i + 1, count, num_slots, TOP_K)
        tl.store(order + begin + i, pair, mask=there)
        tl.store(inverse + pair, begin + i, mask=there)
        start = tl.where((i > 0) & (slot == before), 0, i)
        start = tl.maximum(tl.associative_scan(start, 0, _later), opened)
        opened = tl.max(tl.where(there, start, 0), 0)
        within = i - start
        ends = there & sorts & ((i == count - 1) | (slot != after) | (within % SEGMENT == SEGMENT - 1))
        ones = ends.to(tl.int32)
        at = place + held + tl.cumsum(ones, 0) - 1
        _store_segment(segments, at, own, begin + i, within, slot, ends)
        held += tl.sum(ones, 0)
    return held


@triton.jit
def _place_few(ids, rows, inverse, own, num_pairs, num_experts, BLOCK: tl.constexpr):
    """Everything of the own pairs, from how many pairs come before each; return where they begin and how many."""
    pair = tl.arange(0, BLOCK)
    expert = _experts(ids, pair, pair < num_pairs, num_experts)
    mine = expert == own
    begin = tl.sum((expert < own).to(tl.int32), 0)
    count = tl.sum(mine.to(tl.int32), 0)
    same_before = (expert[None, :] == expert[:, None]) & (pair[None, :] < pair[:, None])
    place = tl.sum(((expert[None, :] < expert[:, None]) | same_before).to(tl.int32), 1)
    tl.store(rows + place, pair, mask=mine)
    tl.store(inverse + pair, place, mask=mine)
    return begin, count


@triton.jit
def _compare_own(
    order, slots, inverse, segments, own, begin, count, place, num_slots, TOP_K: tl.constexpr, MOST: tl.constexpr
):
    """Sort the own pairs by slot, each compared with each; write all that is known of them; return their segments.

    Segments stand from ``place`` on. For few pairs this is faster than sorting them by digits.
    """
    i = tl.arange(0, MOST)
    pair, slot = _sorted_slots(order + begin, slots, i, count, num_slots, TOP_K)
    there = i < count
    both = there[None, :] & there[:, None]
    same = both & (slot[None, :] == slot[:, None])
    within = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
    to = within + tl.sum((both & (slot[None, :] < slot[:, None])).to(tl.int32), 1)
    after = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
    ends = there & ((after == 0) | (within % SEGMENT == SEGMENT - 1))
    earlier = tl.sum((ends[None, :] & (to[None, :] < to[:, None])).to(tl.int32), 1)
    tl.debug_barrier()  # all have read where they will write
    tl.store(order + begin + to, pair, mask=there)
    tl.store(inverse + pair, begin + to, mask=there)
    _store_segment(segments, place + earlier, own, begin + to, within, slot, ends)
    return tl.sum(ends.to(tl.int32), 0)


@triton.jit
def _first_segment(expert, begin, num_pairs, num_slots):
    """Where an expert's segments begin, if ``begin`` pairs have lower ones; see `Plan.segments`."""
    each = tl.minimum(num_slots, num_pairs) + 2  # with more of them the other place is the lower one
    return tl.minimum(begin, expert.to(tl.int64) * each + begin // SEGMENT).to(tl.int32)


@triton.jit
def _end_segments(segments, place, past, SIZE: tl.constexpr):
    """No rows in the places from ``place`` up to ``past``."""
    for first in tl.range(place * 4, past * 4, SIZE):
        word = first + tl.arange(0, SIZE)
        tl.store(segments + word, 0, mask=word < past * 4)


@triton.jit
def _first_tile(expert, begin, BM: tl.constexpr):
    """Where an expert's tiles stand in the list, if ``begin`` pairs have lower ones; see `launch.align`."""
    return tl.minimum(begin, expert + begin // BM)


@triton.jit
def _list_tiles(tiles, own, begin, count, num_experts, num_tiles, BM: tl.constexpr, SIZE: tl.constexpr):
    """The tiles from expert ``own``'s first one up to the next expert's; those that it does not need have no rows.

    The program without an expert needs none, up to the end of the list.
    """
    sorts = own < num_experts
    count = tl.where(sorts, count, 0)
    start = _first_tile(own, begin, BM)
    past = tl.where(sorts, _first_tile(own + 1, begin + count, BM), num_tiles)
    for first in tl.range(start, past, SIZE):
        tile = first + tl.arange(0, SIZE)
        row = (tile - start) * BM
        needed = row < count
        tl.store(tiles + tile * 4, tl.where(needed, own, 0), mask=tile < past)
        tl.store(tiles + tile * 4 + 1, tl.where(needed, begin + row, 0), mask=tile < past)
        tl.store(tiles + tile * 4 + 2, tl.where(needed, tl.minimum(count - row, BM), 0), mask=tile < past)
        tl.store(tiles + tile * 4 + 3, 0, mask=tile < past)


@triton.jit
def align_kernel(
    ids,  # (P,) int32 or int64
    slots,  # (M,) int32, or None
    order,  # (1, P) int32, with slots (2, P); the first row is the Plan's rows
    inverse,  # (P,) int32
    offsets,  # (E + 1,) int32
    segments,  # (T, 4) int32, or None
    tiles,  # (T, 4) int32
    num_pairs,
    num_experts,
    num_slots,
    num_segments,
    num_tiles,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,  # pairs that a program looks at together
    SIZE: tl.constexpr,  # own pairs or tiles that it works on together
    OWN: tl.constexpr,  # lanes that sort own pairs, each its neighbours
    FEW: tl.constexpr,  # without slots; BLOCK is at least P
    COMPARED: tl.constexpr,  # most own pairs of slots that are compared each with each
    OVERLAP: tl.constexpr,
):
    """The Plan and its tiles. Ids outside the experts and slots are never used as an index."""
    follow(OVERLAP)
    own = tl.program_id(0)
    sorts = own < num_experts
    held = 0
    if FEW:
        begin, count = _place_few(ids, order, inverse, own, num_pairs, num_experts, BLOCK)
    else:
        WIDTH: tl.constexpr = 16  # pairs that lie in a line of the cache
        LANES: tl.constexpr = BLOCK // WIDTH
        chunk = (num_pairs + BLOCK - 1) // BLOCK * WIDTH
        begin, mine = _count(ids, own, chunk, num_pairs, num_experts, LANES, WIDTH)
        count = tl.sum(mine, 0)
        to = begin + tl.cumsum(mine, 0) - mine
        lowest, highest = _place(
            ids, slots, order, inverse, own, to, chunk, sorts, num_pairs, num_experts, num_slots, TOP_K, LANES, WIDTH
        )
        if slots is not None:
            compared = 0
            if COMPARED > 0:
                compared = tl.where(sorts & (count <= COMPARED), count, 0)
                tl.debug_barrier()
                place = _first_segment(own, begin, num_pairs, num_slots)
                held = _compare_own(
                    order, slots, inverse, segments, own, begin, compared, place, num_slots, TOP_K, COMPARED
                )
            if count > compared:
                row = _sort(order, slots, begin, count, lowest, highest, num_pairs, num_slots, TOP_K, OWN)
                held = _write_sorted(
                    order, slots, inverse, segments, own, row, begin, count, sorts, num_pairs, num_slots, TOP_K, SIZE
                )
    tl.store(offsets + own, begin)
    _list_tiles(tiles, own, begin, count, num_experts, num_tiles, BM, SIZE)
    if slots is not None:
        place = _first_segment(own, begin, num_pairs, num_slots)
        past = tl.where(sorts, _first_segment(own + 1, begin + count, num_pairs, num_slots), num_segments)
        _end_segments(segments, place + held, past, SIZE)


@triton.jit
def compact_kernel(
    listed,  # (T, 4) int32
    tiles,  # (T, 4) int32
    num_tiles,
    SIZE: tl.constexpr,  # tiles that are looked at together
    OVERLAP: tl.constexpr,
):
    """The tiles that have rows, in their order, and then as many without; for one program."""
    follow(OVERLAP)
    held = 0
    for first in tl.range(0, num_tiles, SIZE):
        tile = first + tl.arange(0, SIZE)
        count = tl.load(listed + tile * 4 + 2, mask=tile < num_tiles, other=0)
        real = count > 0
        place = held + tl.cumsum(real.to(tl.int32), 0) - 1
        tl.store(tiles + place * 4, tl.load(listed + tile * 4, mask=real, other=0), mask=real)
        tl.store(tiles + place * 4 + 1, tl.load(listed + tile * 4 + 1, mask=real, other=0), mask=real)
        tl.store(tiles + place * 4 + 2, count, mask=real)
        tl.store(tiles + place * 4 + 3, 0, mask=real)
        held += tl.sum(real.to(tl.int32), 0)
    for first in tl.range(held * 4, num_tiles * 4, SIZE):
        word = first + tl.arange(0, SIZE)
        tl.store(tiles + word, 0, mask=word < num_tiles * 4)
