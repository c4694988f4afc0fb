"""align in Triton: one launch, a program an expert, and a last one for the pairs without an expert.

Each program looks at all experts' ids, keeps its own pairs and sorts them by slot, so that the work does not depend on
how many slots there are; few pairs it compares each with each (`_place_few`). Where its tiles and segments stand
follows from how many pairs lower experts have: programs need nothing from one another.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.common.kernel import follow


@triton.jit
def _experts(ids, pair, there, num_experts):
    """Experts of pairs: num_experts for an id that is none, more for a pair that is not there."""
    expert = tl.load(ids + pair, mask=there, other=0)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return tl.where(there, expert, num_experts + 1)


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
            slot = tl.load(slots + pair // TOP_K, mask=mine, other=0)
            lowest = tl.minimum(lowest, tl.where(mine, slot, 2**31 - 1))
            highest = tl.maximum(highest, tl.where(mine, slot, -(2**31)))
    return tl.min(tl.min(lowest, 1), 0), tl.max(tl.max(highest, 1), 0)


@triton.jit
def _digits(source, slots, first, count, lowest, shift, TOP_K: tl.constexpr, SIZE: tl.constexpr):
    """SIZE pairs from ``first`` on, and for each a column with a one at the 4 bits of its slot from ``shift`` on."""
    i = first + tl.arange(0, SIZE)
    there = i < count
    pair = tl.load(source + i, mask=there, other=0)
    slot = tl.load(slots + pair // TOP_K, mask=there, other=0).to(tl.int64)
    digit = tl.where(there, ((slot - lowest) >> shift) & 15, 16).to(tl.int32)
    return pair, there, (digit[None, :] == tl.arange(0, 16)[:, None]).to(tl.int32)


@triton.jit
def _sort(order, slots, begin, count, lowest, highest, num_pairs, TOP_K: tl.constexpr, SIZE: tl.constexpr):
    """Sort the ``count`` pairs from ``begin`` on by slot, stably; return the row of ``order`` that holds the result.

    4 bits at a time, from the lowest up, from one row to the other and back. Slots that are all the same need no pass.
    """
    row = 0
    shift = 0
    span = highest.to(tl.int64) - lowest
    lowest = lowest.to(tl.int64)
    tl.debug_barrier()
    while (span >> shift) > 0:
        source = order + row * num_pairs + begin
        target = order + (1 - row) * num_pairs + begin
        sizes = tl.zeros((16,), tl.int32)
        for first in tl.range(0, count, SIZE):
            _, _, ones = _digits(source, slots, first, count, lowest, shift, TOP_K, SIZE)
            sizes += tl.sum(ones, 1)
        begins = tl.cumsum(sizes, 0) - sizes
        for first in tl.range(0, count, SIZE):
            pair, there, ones = _digits(source, slots, first, count, lowest, shift, TOP_K, SIZE)
            place = tl.sum(ones * (begins[:, None] + tl.cumsum(ones, 1)), 0) - 1
            tl.store(target + place, pair, mask=there)
            begins += tl.sum(ones, 1)
        tl.debug_barrier()
        row = 1 - row
        shift += 4
    return row


@triton.jit
def _opens(source, slots, first, count, sorts, TOP_K: tl.constexpr, SIZE: tl.constexpr):
    """SIZE sorted pairs from ``first`` on, their slots, and which open a segment: other slots than the one before.

    Without ``sorts`` none does.
    """
    i = first + tl.arange(0, SIZE)
    there = i < count
    pair = tl.load(source + i, mask=there, other=0)
    slot = tl.load(slots + pair // TOP_K, mask=there, other=0)
    pair_before = tl.load(source + i - 1, mask=there & (i > 0), other=0)
    slot_before = tl.load(slots + pair_before // TOP_K, mask=there & (i > 0), other=0)
    return i, pair, slot, there, there & sorts & ((i == 0) | (slot != slot_before))


@triton.jit
def _store_row(segments, opens, opened, place, begin, end, expert, slot, sorts, mask):
    """The row of the segments that a pair at a sorted place writes: that of the segment it opens, or an empty one.

    Of the expert's pairs before it ``opened`` opened a segment; the others have the rows from its last one down.
    """
    row = tl.where(opens, begin + opened, end - 1 - (place - begin - opened))
    tl.store(segments + row * 3, tl.where(opens, expert, -1), mask=mask)
    tl.store(segments + row * 3 + 1, tl.where(opens, slot, -1), mask=mask)
    tl.store(segments + row * 3 + 2, tl.where(opens, place, tl.where(sorts, end, begin)), mask=mask)


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
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Bring the sorted pairs into the first row of ``order``; write their inverse and their rows of the segments."""
    opened = 0
    for first in tl.range(0, count, SIZE):
        i, pair, slot, there, opens = _opens(order + row * num_pairs + begin, slots, first, count, sorts, TOP_K, SIZE)
        place = begin + i
        tl.store(order + place, pair, mask=there)
        tl.store(inverse + pair, place, mask=there)
        ones = opens.to(tl.int32)
        before = opened + tl.cumsum(ones, 0) - ones
        _store_row(segments, opens, before, place, begin, begin + count, own, slot, sorts, there)
        opened += tl.sum(ones, 0)


@triton.jit
def _place_few(
    ids,
    slots,
    rows,
    inverse,
    segments,
    own,
    num_pairs,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of the own pairs, from how many pairs come before each; return where they begin and how many."""
    pair = tl.arange(0, BLOCK)
    expert = _experts(ids, pair, pair < num_pairs, num_experts)
    mine = expert == own
    begin = tl.sum((expert < own).to(tl.int32), 0)
    count = tl.sum(mine.to(tl.int32), 0)
    same_key = expert[None, :] == expert[:, None]
    before = expert[None, :] < expert[:, None]
    if slots is not None:
        slot = tl.load(slots + pair // TOP_K, mask=expert < num_experts, other=0)
        before |= same_key & (slot[None, :] < slot[:, None])
        same_key &= slot[None, :] == slot[:, None]
    same_before = same_key & (pair[None, :] < pair[:, None])
    place = tl.sum((before | same_before).to(tl.int32), 1)
    tl.store(rows + place, pair, mask=mine)
    tl.store(inverse + pair, place, mask=mine)
    if slots is not None:
        sorts = own < num_experts
        opens = (tl.max(same_before.to(tl.int32), 1) == 0) & mine & sorts
        opened = tl.sum((tl.where(opens, place, BLOCK)[None, :] < place[:, None]).to(tl.int32), 1)
        _store_row(segments, opens, opened, place, begin, begin + count, own, slot, sorts, mine)
    return begin, count


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
    segments,  # (P + 1, 3) int32, or None
    tiles,  # (T, 4) int32
    num_pairs,
    num_experts,
    num_tiles,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,  # pairs that a program looks at together
    SIZE: tl.constexpr,  # own pairs or tiles that it works on together
    FEW: tl.constexpr,  # BLOCK is at least P
    OVERLAP: tl.constexpr,
):
    """The Plan and its tiles. Ids outside the experts and slots are never used as an index."""
    follow(OVERLAP)
    own = tl.program_id(0)
    sorts = own < num_experts
    if FEW:
        begin, count = _place_few(ids, slots, order, inverse, segments, own, num_pairs, num_experts, TOP_K, BLOCK)
    else:
        WIDTH: tl.constexpr = 16  # pairs that lie in a line of the cache
        LANES: tl.constexpr = BLOCK // WIDTH
        chunk = (num_pairs + BLOCK - 1) // BLOCK * WIDTH
        begin, mine = _count(ids, own, chunk, num_pairs, num_experts, LANES, WIDTH)
        count = tl.sum(mine, 0)
        place = begin + tl.cumsum(mine, 0) - mine
        lowest, highest = _place(
            ids, slots, order, inverse, own, place, chunk, sorts, num_pairs, num_experts, TOP_K, LANES, WIDTH
        )
        if slots is not None:
            row = _sort(order, slots, begin, count, lowest, highest, num_pairs, TOP_K, SIZE)
            _write_sorted(order, slots, inverse, segments, own, row, begin, count, sorts, num_pairs, TOP_K, SIZE)
    tl.store(offsets + own, begin)
    _list_tiles(tiles, own, begin, count, num_experts, num_tiles, BM, SIZE)
    if slots is not None:  # the row that says where the last segment ends
        last = tl.arange(0, 4)
        tl.store(segments + num_pairs * 3 + last, tl.where(last < 2, -1, begin), mask=(last < 3) & (own == num_experts))


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
