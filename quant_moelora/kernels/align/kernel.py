"""align in Triton: one launch, a program an expert, and a last one for the pairs without an expert.

Each program looks at all experts' ids, keeps its own pairs and sorts them by slot, so that the work does not depend on
how many slots there are. Where its tiles and segments begin it learns from the programs before it (`_tell`, `_told`);
or, with few pairs, finds it out itself by comparing each pair with each (`_place_few`).
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
def _number(state, programs):
    """The expert of this program, and 1 in every other launch: what the one before left in ``state`` is told apart.

    Programs take numbers in the order in which they start: whoever waits for lower ones waits for running programs.
    ``state[0]`` counts them through two launches.
    """
    drawn = tl.atomic_add(state, 1, sem="relaxed")
    if drawn == 2 * programs - 1:  # nobody draws any more
        tl.store(state, 0)
    odd = (drawn >= programs).to(tl.int32)
    return drawn.to(tl.int32) - odd * programs, odd


@triton.jit
def _tell(state, own, odd, num_tiles, num_segments):
    """Tell the programs after this one how many tiles and segments it has.

    All is in one word, so that the order of several stores does not matter. Its last bit is 1 in even launches: words
    are 0 before the first one.
    """
    word = (num_tiles.to(tl.int64) << 32) | (num_segments.to(tl.int64) << 1) | (1 - odd).to(tl.int64)
    tl.atomic_xchg(state + 1 + own, word, sem="relaxed")


@triton.jit
def _told(state, own, odd, BINS: tl.constexpr):
    """Wait for the programs before this one, and count their tiles and segments."""
    bins = tl.arange(0, BINS)
    before = bins < own
    word = tl.load(state + 1 + bins, mask=before, other=0, volatile=True)
    while tl.max((before & ((word & 1) == odd)).to(tl.int32), 0) > 0:
        word = tl.load(state + 1 + bins, mask=before, other=0, volatile=True)
    num_tiles = tl.sum(tl.where(before, word >> 32, 0), 0)
    num_segments = tl.sum(tl.where(before, (word & 0xFFFFFFFF) >> 1, 0), 0)
    return num_tiles.to(tl.int32), num_segments.to(tl.int32)


@triton.jit
def _count(ids, own, ahead, chunk, num_pairs, num_experts, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Pairs of lower experts, of the own one in each chunk, and of all; ``ahead`` are the experts of the first step."""
    below = tl.zeros((LANES, WIDTH), tl.int32)
    mine = tl.zeros((LANES, WIDTH), tl.int32)
    held = tl.zeros((LANES, WIDTH), tl.int32)
    for step in tl.range(0, chunk, WIDTH):
        expert = ahead
        _, ahead = _step(ids, step + WIDTH, chunk, num_pairs, num_experts, LANES, WIDTH)  # while these are counted
        below += (expert < own).to(tl.int32)
        mine += (expert == own).to(tl.int32)
        held += (expert < num_experts).to(tl.int32)
    return tl.sum(tl.sum(below, 1), 0), tl.sum(mine, 1), tl.sum(tl.sum(held, 1), 0)


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
def _store_segment(segments, row, expert, slot, first, mask):
    tl.store(segments + row * 3, expert, mask=mask)
    tl.store(segments + row * 3 + 1, slot, mask=mask)
    tl.store(segments + row * 3 + 2, first, mask=mask)


@triton.jit
def _store_row(segments, opens, opened, place, expert, slot, held, num_pairs, mask):
    """The row of the segments that a pair at a sorted place writes: that of the segment it opens, or an unused one.

    Of the pairs before it ``opened`` opened a segment; the others have the rows from the last but one down.
    """
    row = tl.where(opens, opened, num_pairs - 1 - (place - opened))
    expert = tl.where(opens, expert, -1)
    _store_segment(segments, row, expert, tl.where(opens, slot, -1), tl.where(opens, place, held), mask)


@triton.jit
def _count_segments(
    order, slots, inverse, row, begin, count, sorts, num_pairs, TOP_K: tl.constexpr, SIZE: tl.constexpr
):
    """Bring the sorted pairs into the first row of ``order``, write their inverse, and count their segments."""
    num_segments = 0
    for first in tl.range(0, count, SIZE):
        i, pair, _, there, opens = _opens(order + row * num_pairs + begin, slots, first, count, sorts, TOP_K, SIZE)
        tl.store(order + begin + i, pair, mask=there)
        tl.store(inverse + pair, begin + i, mask=there)
        num_segments += tl.sum(opens.to(tl.int32), 0)
    tl.debug_barrier()
    return num_segments


@triton.jit
def _list_segments(
    segments,
    order,
    slots,
    own,
    begin,
    count,
    sorts,
    opened,
    held,
    num_pairs,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A row of the segments for each of the own pairs; see `_store_row`. Programs before have ``opened`` segments."""
    for first in tl.range(0, count, SIZE):
        i, _, slot, there, opens = _opens(order + begin, slots, first, count, sorts, TOP_K, SIZE)
        ones = opens.to(tl.int32)
        _store_row(segments, opens, opened + tl.cumsum(ones, 0) - ones, begin + i, own, slot, held, num_pairs, there)
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
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of the own pairs, from how many pairs come before each; return `_count`'s numbers and tiles before."""
    pair = tl.arange(0, BLOCK)
    expert = _experts(ids, pair, pair < num_pairs, num_experts)
    same = expert[None, :] == expert[:, None]
    lower = expert[None, :] < expert[:, None]
    if slots is None:
        same_key = same
        before = lower
    else:
        slot = tl.load(slots + pair // TOP_K, mask=expert < num_experts, other=0)
        same_key = same & (slot[None, :] == slot[:, None])
        before = lower | (same & (slot[None, :] < slot[:, None]))
    same_before = same_key & (pair[None, :] < pair[:, None])
    before |= same_before
    place = tl.sum(before.to(tl.int32), 1)
    mine = expert == own
    held = tl.sum((expert < num_experts).to(tl.int32), 0)
    tl.store(rows + place, pair, mask=mine)
    tl.store(inverse + pair, place, mask=mine)
    if slots is not None:
        opens = (tl.max(same_before.to(tl.int32), 1) == 0) & (expert < num_experts)
        opened = tl.sum((tl.where(opens, place, BLOCK)[None, :] < place[:, None]).to(tl.int32), 1)
        _store_row(segments, opens, opened, place, expert, slot, held, num_pairs, mine)
    in_expert = place - tl.sum(lower.to(tl.int32), 1)
    tiles_before = tl.sum(((expert < own) & (in_expert % BM == 0)).to(tl.int32), 0)
    return tl.sum((expert < own).to(tl.int32), 0), tl.sum(mine.to(tl.int32), 0), held, tiles_before


@triton.jit
def _list_tiles(tiles, own, begin, count, before, num_experts, num_tiles, BM: tl.constexpr, SIZE: tl.constexpr):
    """The tiles of expert ``own``; the program without one lists those that nobody needs, which have no rows."""
    beyond = own == num_experts
    past = tl.where(beyond, num_tiles, before + (count + BM - 1) // BM)
    for first in tl.range(before, past, SIZE):
        tile = first + tl.arange(0, SIZE)
        row = (tile - before) * BM
        tl.store(tiles + tile * 4, tl.where(beyond, 0, own), mask=tile < past)
        tl.store(tiles + tile * 4 + 1, begin + row, mask=tile < past)
        tl.store(tiles + tile * 4 + 2, tl.where(beyond, 0, tl.minimum(count - row, BM)), mask=tile < past)


@triton.jit
def align_kernel(
    ids,  # (P,) int32 or int64
    slots,  # (M,) int32, or None
    order,  # (1, P) int32, with slots (2, P); the first row is the Plan's rows
    inverse,  # (P,) int32
    offsets,  # (E + 1,) int32
    segments,  # (P + 1, 3) int32, or None
    tiles,  # (T, 4) int32
    state,  # (E + 2,) int64, zero before the first launch
    num_pairs,
    num_experts,
    num_tiles,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BINS: tl.constexpr,  # a power of two, at least E
    BLOCK: tl.constexpr,  # pairs that a program looks at together
    SIZE: tl.constexpr,  # own pairs or tiles that it works on together
    FEW: tl.constexpr,  # BLOCK is at least P
    OVERLAP: tl.constexpr,
):
    """The Plan and its tiles. Ids outside the experts and slots are never used as an index."""
    follow(OVERLAP)
    if FEW:
        own = tl.program_id(0)
        begin, count, held, tiles_before = _place_few(
            ids, slots, order, inverse, segments, own, num_pairs, num_experts, TOP_K, BM, BLOCK
        )
    else:
        WIDTH: tl.constexpr = 16  # pairs that lie in a line of the cache
        LANES: tl.constexpr = BLOCK // WIDTH
        chunk = (num_pairs + BLOCK - 1) // BLOCK * WIDTH
        _, ahead = _step(ids, 0, chunk, num_pairs, num_experts, LANES, WIDTH)  # while the number is drawn
        own, odd = _number(state, num_experts + 1)
        begin, mine, held = _count(ids, own, ahead, chunk, num_pairs, num_experts, LANES, WIDTH)
        count = tl.sum(mine, 0)
        place = begin + tl.cumsum(mine, 0) - mine
        own_tiles = (count + BM - 1) // BM
        own_segments = 0
        if slots is None:
            _tell(state, own, odd, own_tiles, own_segments)  # it arrives while pairs are placed
        sorts = own < num_experts
        lowest, highest = _place(
            ids, slots, order, inverse, own, place, chunk, sorts, num_pairs, num_experts, TOP_K, LANES, WIDTH
        )
        if slots is not None:
            row = _sort(order, slots, begin, count, lowest, highest, num_pairs, TOP_K, SIZE)
            own_segments = _count_segments(order, slots, inverse, row, begin, count, sorts, num_pairs, TOP_K, SIZE)
            _tell(state, own, odd, own_tiles, own_segments)
        tiles_before, opened = _told(state, own, odd, BINS)
        if slots is not None:
            _list_segments(segments, order, slots, own, begin, count, sorts, opened, held, num_pairs, TOP_K, SIZE)
    tl.store(offsets + own, begin)
    _list_tiles(tiles, own, begin, count, tiles_before, num_experts, num_tiles, BM, SIZE)
    if slots is not None:  # the row that says where the last segment ends
        _store_segment(segments, num_pairs, -1, -1, held, own == num_experts)
