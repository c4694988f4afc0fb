"""LoRA in Triton: segment by segment, each at most `SEGMENT_ROWS` rows of one expert and one adapter.

A program reads the ranks of its own segment, so that adapters of different ranks share a launch and none is padded to
another's. v is kept in float32, in parts that are added in their order. B meets v as the sum of two values of the
activation dtype, which is v to 16 bits and more, so that deltas are those of float32 products.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.core import lora_context
from quant_moelora.kernels.activation.kernel import function, gated
from quant_moelora.kernels.common.kernel import follow
from quant_moelora.kernels.lora.spec import EXPAND_BLOCK

A13 = tl.constexpr(lora_context.A13)
B13 = tl.constexpr(lora_context.B13)
A2 = tl.constexpr(lora_context.A2)
B2 = tl.constexpr(lora_context.B2)
GATE = tl.constexpr(lora_context.GATE)
UP = tl.constexpr(lora_context.UP)
DOWN = tl.constexpr(lora_context.DOWN)
EXPAND = tl.constexpr(EXPAND_BLOCK)
ROWS = tl.constexpr(16)  # that meet B at once, as many as one matrix instruction has


@triton.jit
def _segment(index, held, SPEC: tl.constexpr):
    """Expert, first sorted row, rows and slot of a segment; where rows are pairs, each is one of its own."""
    segments, ids, slots = held
    if SPEC.direct:
        expert = tl.load(ids + index).to(tl.int64)
        slot = tl.load(slots + index // SPEC.top_k)
        rows = ((expert >= 0) & (expert < SPEC.num_experts)).to(tl.int32)
        slot = tl.where(slot < -1, SPEC.num_slots, slot)
        return expert, index, rows, slot
    else:
        at = segments + index * 4
        return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _has(count, slot, SPEC: tl.constexpr):
    """Whether a segment has rows, and they an adapter."""
    return (count > 0) & (slot >= 0) & (slot < SPEC.num_slots)


@triton.jit
def _factor(tables, slot, expert, has, SPEC: tl.constexpr, WHICH: tl.constexpr):
    """Where a factor begins in the arena, as a multiple of 8 that the compiler sees; ranks say whether there is one.

    All look-ups are masked loads next to one another, and none is behind a branch on another: they wait only once.
    """
    at = tables[1] + (slot.to(tl.int64) * 4 + WHICH) * SPEC.num_experts + expert
    return tables[0] + tl.load(at, mask=has, other=0) // 8 * 8


@triton.jit
def _of_projection(table, slot, expert, has, SPEC: tl.constexpr, PROJECTION: tl.constexpr):
    """Rank or scaling of a projection; 0 without an adapter."""
    return tl.load(table + (slot.to(tl.int64) * 3 + PROJECTION) * SPEC.num_experts + expert, mask=has, other=0)


@triton.jit
def _up_col(tables, slot, expert, has, SPEC: tl.constexpr):
    """Column of v at which that of up begins."""
    return tl.load(tables[3] + slot.to(tl.int64) * SPEC.num_experts + expert, mask=has, other=0)


@triton.jit
def _shrink13(x, stride_x, rows, v, segment, a13, ranks, rank_block, part, SPEC: tl.constexpr, BM: tl.constexpr):
    """A block of v's columns for the rows of a segment, summed over a part of the columns of x."""
    _, first, count, _ = segment
    BK: tl.constexpr = 128 if BM <= 16 else 64  # so that what is in flight fits beside a GEMM's blocks
    # A part is as wide for few rows as for many, which would otherwise sum up in another order.
    WIDTH: tl.constexpr = (SPEC.hidden + 128 * SPEC.cut.parts13 - 1) // (128 * SPEC.cut.parts13) * 128
    STEPS: tl.constexpr = WIDTH // BK
    i = tl.arange(0, BM)
    there = i < count
    if SPEC.direct:
        token = tl.where(there, first // SPEC.top_k, 0)
    else:
        token = tl.load(rows + first + i, mask=there, other=0) // SPEC.top_k
    R: tl.constexpr = SPEC.cut.shrink_ranks
    r = rank_block * R + tl.arange(0, R)
    a = a13 + r[:, None].to(tl.int64) * SPEC.hidden
    x += token[:, None].to(tl.int64) * stride_x
    total = tl.zeros((R, BM), tl.float32)
    for step in tl.range(0, STEPS, num_stages=3):
        k = part * WIDTH + step * BK + tl.arange(0, BK)
        real = (k < SPEC.hidden)[None, :]
        a_tile = tl.load(a + k[None, :], mask=(r < ranks)[:, None] & real, other=0.0)
        x_tile = tl.load(x + k[None, :], mask=there[:, None] & real, other=0.0)
        total = tl.dot(a_tile, x_tile.T, total)
    row = (first + i).to(tl.int64) * SPEC.cut.parts13 + part
    to = v + row[None, :] * SPEC.v13_part + r[:, None]
    tl.store(to, total, mask=there[None, :] & (r < ranks)[:, None])


@triton.jit
def shrink13(program, x, stride_x, rows, v, tables, held, SPEC: tl.constexpr):
    """v = A13 x of one segment, for one block of ranks and one part of the columns."""
    segment = _segment(program // (SPEC.rank_blocks13 * SPEC.cut.parts13), held, SPEC)
    expert, _, count, slot = segment
    has = _has(count, slot, SPEC)
    a13 = _factor(tables, slot, expert, has, SPEC, A13)
    gate = _of_projection(tables[2], slot, expert, has, SPEC, GATE)
    up = _of_projection(tables[2], slot, expert, has, SPEC, UP)
    ranks = tl.maximum(gate, up + _up_col(tables, slot, expert, has, SPEC))
    if SPEC.sharers > 1:
        ranks = (ranks - SPEC.own + SPEC.sharers - 1) // SPEC.sharers
    rank_block = program // SPEC.cut.parts13 % SPEC.rank_blocks13
    part = program % SPEC.cut.parts13
    if rank_block * SPEC.cut.shrink_ranks < ranks:
        if count <= 16:
            _shrink13(x, stride_x, rows, v, segment, a13, ranks, rank_block, part, SPEC, 16)
        else:
            _shrink13(x, stride_x, rows, v, segment, a13, ranks, rank_block, part, SPEC, 32)


@triton.jit
def _parts(v, first, ranks, count, part, PARTS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr):
    """Parts of v from ``part`` on, at most 16: (ROWS, parts, RANKS) of a segment's first rows and RANKS ranks."""
    SOME: tl.constexpr = 16 if PARTS > 8 else (8 if PARTS > 4 else (4 if PARTS > 2 else PARTS))
    i = tl.arange(0, ROWS)[:, None, None]
    k = part + tl.arange(0, SOME)[None, :, None]
    r = first + tl.arange(0, RANKS)[None, None, :]
    mask = (i < count) & (k < PARTS) & (r < ranks)
    return tl.load(v + i * (PARTS * WIDTH) + k * WIDTH + r, mask=mask, other=0.0)


@triton.jit
def _summed_parts(
    held,  # of `_parts`, the first ones
    v,
    first,
    ranks,
    count,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
):
    """v, the sum of all of its parts in an order that is fixed."""
    total = tl.sum(held, 1)
    if PARTS > 16:
        for part in tl.range(16, PARTS, 16, num_stages=1):
            total += tl.sum(_parts(v, first, ranks, count, part, PARTS, WIDTH, RANKS), 1)
    return total


@triton.jit
def _parted(v, first, ranks, count, PARTS: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr):
    """v of the first ROWS rows of a segment, RANKS ranks from ``first`` on, float32."""
    held = _parts(v, first, ranks, count, 0, PARTS, WIDTH, RANKS)
    return _summed_parts(held, v, first, ranks, count, PARTS, WIDTH, RANKS)


@triton.jit
def _rows_of_factor(factor, first, ranks, column, COLUMNS: tl.constexpr, RANKS: tl.constexpr):
    """RANKS ranks of a factor from ``first`` on, (RANKS, BN); 0 where it has none."""
    r = first + tl.arange(0, RANKS)
    mask = (r < ranks)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(factor + r[:, None].to(tl.int64) * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _landed(x, SPEC: tl.constexpr):
    """x itself, where loads before are not held up by what is done with it.

    Triton puts what brings a load's result into another layout, which goes through shared memory and its barriers,
    right behind the load, and no later load would be issued before that one has arrived.
    """
    if SPEC.plain:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, PACK)


@triton.jit
def _meet(v, b, total):
    """``total`` + v b, with v to twice the digits of b's dtype."""
    high = v.to(b.dtype)
    total = tl.dot(high, b, total)
    return tl.dot((v - high.to(tl.float32)).to(b.dtype), b, total)


@triton.jit
def _if(needed, factors):
    """Factors, of no ranks unless they are needed, so that none is loaded."""
    b_gate, b_up, a2, gate_rank, up_rank, down_rank = factors
    n = needed.to(tl.int32)
    return b_gate, b_up, a2, gate_rank * n, up_rank * n, down_rank * n


@triton.jit
def _tiles(factors, column, SPEC: tl.constexpr):
    """First ranks of gate's and up's B and of A2 in one block of columns."""
    b_gate, b_up, a2, gate_rank, up_rank, down_rank = factors
    N: tl.constexpr = SPEC.inter_pad
    R: tl.constexpr = SPEC.cut.expand_ranks
    up = _rows_of_factor(b_up, 0, up_rank, column, N, R)
    gate = _rows_of_factor(b_gate, 0, gate_rank, column, N, R) if SPEC.gated else up
    return gate, up, _rows_of_factor(a2, 0, down_rank, column, N, R)


@triton.jit
def _gate_and_up(gate_up, gemm_stride, first, count, column, SPEC: tl.constexpr):
    """Rows of gate and up in one block of columns, as the GEMM stored them, or the sum of its parts."""
    HALVES: tl.constexpr = 2 if SPEC.gated else 1
    N: tl.constexpr = SPEC.inter_pad
    PARTS: tl.constexpr = SPEC.gemm_parts
    i = tl.arange(0, ROWS)
    real = (i < count)[:, None] & (column < SPEC.inter)[None, :]
    at = gate_up + (first + i).to(tl.int64)[:, None] * (HALVES * N) + column[None, :]
    up = tl.load(at + (HALVES - 1) * N, mask=real, other=0.0)
    gate = tl.load(at, mask=real, other=0.0) if SPEC.gated else up
    for part in tl.static_range(1, PARTS):
        up += tl.load(at + (HALVES - 1) * N + part * gemm_stride, mask=real, other=0.0)
        if SPEC.gated:
            gate += tl.load(at + part * gemm_stride, mask=real, other=0.0)
    return gate, up


@triton.jit
def _delta(v, b, held, factor, ranks, count, column, SPEC: tl.constexpr):
    """v B of one block of columns, with the first ranks' ``held`` of v and ``factor`` of B at hand; float32."""
    N: tl.constexpr = SPEC.inter_pad
    R: tl.constexpr = SPEC.cut.expand_ranks
    BN: tl.constexpr = SPEC.cut.activation_block
    PARTS: tl.constexpr = SPEC.cut.parts13
    W: tl.constexpr = SPEC.v13_width
    delta = _meet(held, factor, tl.zeros((ROWS, BN), tl.float32))
    if SPEC.max_rank > R:
        for r in tl.range(R, ranks, R, num_stages=1):
            more = _rows_of_factor(b, r, ranks, column, N, R)
            delta = _meet(_parted(v, r, ranks, count, PARTS, W, R), more, delta)
    return delta


@triton.jit
def _activated(gate, up, h, rows, weights, segment, column, SPEC: tl.constexpr):
    """h of the first ROWS rows of a segment in one block of columns, stored and returned."""
    _, first, count, slot = segment
    N: tl.constexpr = SPEC.inter_pad
    ACTIVATION: tl.constexpr = SPEC.activation
    ALPHA: tl.constexpr = SPEC.alpha
    LIMIT: tl.constexpr = SPEC.limit
    i = tl.arange(0, ROWS)
    there = i < count
    row = (first + i).to(tl.int64)
    if SPEC.weighted:
        pair = first + i if SPEC.direct else tl.load(rows + row, mask=there, other=0)
        weight = tl.load(weights + pair, mask=there, other=0.0)[:, None]
        gate, up = gate * weight, up * weight
    value = gated(gate, up, ALPHA, LIMIT, ACTIVATION) if SPEC.gated else function(up, ACTIVATION)
    value = tl.where((column < SPEC.inter)[None, :], value, 0.0)  # not every activation is 0 at 0
    value = tl.where(slot < SPEC.num_slots, value, float("nan"))  # a slot that there is not must show
    value = value.to(h.dtype.element_ty)
    tl.store(h + row[:, None] * N + column[None, :], value, mask=there[:, None] & (column < N)[None, :])
    return value


@triton.jit
def activate_kernel(
    gate_up,  # (P, halves * inter_pad), or (gemm_parts, P, halves * inter_pad) float32
    gemm_stride,
    h,  # (P, inter_pad)
    v13,  # (P, parts13, v13_width) float32
    v2,  # (P, parts2, max_rank) float32
    rows,  # (P,) int32
    weights,  # (P,) float32
    tables,  # arena, offsets, rank, up_col, scaling of the LoRA context
    held,  # segments, ids, slots
    SPEC: tl.constexpr,
):
    """Expand of gate and up, activation, shrink of its result: a program is a segment and some blocks of columns.

    All that it reads is loaded before any of it is used (`_landed`), and factors of a step during the step before. What
    does not come from the launch before, it does not wait for: that one's programs have waited for all before them.
    """
    expert, first, count, slot = _segment(tl.program_id(0), held, SPEC)
    has = _has(count, slot, SPEC)
    gate_rank = _of_projection(tables[2], slot, expert, has, SPEC, GATE)
    up_rank = _of_projection(tables[2], slot, expert, has, SPEC, UP)
    ranks = _of_projection(tables[2], slot, expert, has, SPEC, DOWN)
    up_at = _up_col(tables, slot, expert, has, SPEC)
    gate_scaling = _of_projection(tables[4], slot, expert, has, SPEC, GATE)
    up_scaling = _of_projection(tables[4], slot, expert, has, SPEC, UP)
    b_gate = _factor(tables, slot, expert, has, SPEC, B13)
    b_up = b_gate + gate_rank.to(tl.int64) * SPEC.inter_pad
    a2 = _factor(tables, slot, expert, has, SPEC, A2)
    factors = (b_gate, b_up, a2, gate_rank, up_rank, ranks)
    N: tl.constexpr = SPEC.inter_pad
    BN: tl.constexpr = SPEC.cut.activation_block
    R: tl.constexpr = SPEC.cut.expand_ranks
    STEPS: tl.constexpr = SPEC.activation_steps
    PARTS: tl.constexpr = SPEC.cut.parts13
    W: tl.constexpr = SPEC.v13_width
    dtype: tl.constexpr = h.dtype.element_ty
    begin = tl.program_id(1) * STEPS * BN + tl.arange(0, BN)
    gate_b, up_b, a = _tiles(factors, begin, SPEC)
    follow(SPEC.overlap)
    if STEPS > 1:
        gate, up = _gate_and_up(gate_up, gemm_stride, first, count, begin, SPEC)
    for row in tl.range(0, count, ROWS, num_stages=1):
        segment = (expert, first + row, count - row, slot)
        v = v13 + (first + row).to(tl.int64) * (PARTS * W)
        up_v = _parts(v + up_at, 0, up_rank, count - row, 0, PARTS, W, R)
        gate_v = _parts(v, 0, gate_rank, count - row, 0, PARTS, W, R) if SPEC.gated else up_v
        if STEPS == 1:
            gate, up = _gate_and_up(gate_up, gemm_stride, first + row, count - row, begin, SPEC)
        up_v = _landed(up_v, SPEC)
        gate_v = _landed(gate_v, SPEC)
        up_v = _summed_parts(up_v, v + up_at, 0, up_rank, count - row, PARTS, W, R)
        gate_v = _summed_parts(gate_v, v, 0, gate_rank, count - row, PARTS, W, R) if SPEC.gated else up_v
        i = tl.arange(0, ROWS)
        there = i + row < count
        shrunk = tl.zeros((ROWS, R), tl.float32)
        to = v2 + ((first + row + i).to(tl.int64) * SPEC.cut.parts2 + tl.program_id(1))[:, None] * SPEC.max_rank
        for step in tl.range(0, STEPS, num_stages=1):
            column = begin + step * BN
            now_gate_b, now_up_b, now_a = gate_b, up_b, a
            now_gate, now_up = gate, up
            if STEPS > 1:
                following = begin + (step + 1) % STEPS * BN
                ahead = row + tl.where(step + 1 == STEPS, ROWS, 0)  # behind the last block come the next rows, if any
                gate_b, up_b, a = _tiles(_if(ahead < count, factors), following, SPEC)
                gate, up = _gate_and_up(gate_up, gemm_stride, first + ahead, count - ahead, following, SPEC)
            now_up = _landed(now_up, SPEC).to(dtype).to(tl.float32)
            delta = _delta(v + up_at, b_up, up_v, _landed(now_up_b, SPEC), up_rank, count - row, column, SPEC)
            now_up += delta * up_scaling
            if SPEC.gated:
                now_gate = _landed(now_gate, SPEC).to(dtype).to(tl.float32)
                delta = _delta(v, b_gate, gate_v, _landed(now_gate_b, SPEC), gate_rank, count - row, column, SPEC)
                now_gate += delta * gate_scaling
            else:
                now_gate = now_up
            value = _activated(now_gate, now_up, h, rows, weights, segment, column, SPEC)
            if ranks > 0:  # in a region of its own: Triton has all dots of one region split rows among warps
                shrunk = tl.dot(value, _landed(now_a, SPEC).T, shrunk)
                if SPEC.max_rank > R:  # then there is one step
                    for more in tl.range(R, ranks, R, num_stages=1):
                        r = more + tl.arange(0, R)
                        own = tl.dot(value, _rows_of_factor(a2, more, ranks, column, N, R).T)
                        tl.store(to + r[None, :], own, mask=there[:, None] & (r < ranks)[None, :])
        r = tl.arange(0, R)
        tl.store(to + r[None, :], shrunk, mask=there[:, None] & (r < ranks)[None, :])


@triton.jit
def _expand2(v, delta, b, ranks, scale, segment, block, SPEC: tl.constexpr, MORE: tl.constexpr):
    """delta of the first ROWS rows of a segment, in the columns of one program; MORE: of several blocks of ranks."""
    _, first, count, _ = segment
    N: tl.constexpr = SPEC.b2_columns
    BN: tl.constexpr = EXPAND
    STEPS: tl.constexpr = (N + BN * SPEC.cut.expand_blocks - 1) // (BN * SPEC.cut.expand_blocks)
    PARTS: tl.constexpr = SPEC.cut.parts2
    W: tl.constexpr = SPEC.max_rank
    R: tl.constexpr = SPEC.cut.expand_ranks
    dtype: tl.constexpr = delta.dtype.element_ty
    v += first.to(tl.int64) * (PARTS * W)
    held = _parted(v, 0, ranks, count, PARTS, W, R)
    i = tl.arange(0, ROWS)
    to = delta + (first + i)[:, None].to(tl.int64) * N
    for step in tl.range(0, STEPS, num_stages=1 if MORE else 3):
        column = (block * STEPS + step) * BN + tl.arange(0, BN)
        total = _meet(held, _rows_of_factor(b, 0, ranks, column, N, R), tl.zeros((ROWS, BN), tl.float32))
        if MORE:
            for r in tl.range(R, ranks, R, num_stages=1):
                more = _rows_of_factor(b, r, ranks, column, N, R)
                total = _meet(_parted(v, r, ranks, count, PARTS, W, R), more, total)
        mask = (i < count)[:, None] & (column < N)[None, :]
        tl.store(to + column[None, :], (total * scale).to(dtype), mask=mask)


@triton.jit
def expand2(program, v, delta, tables, held, SPEC: tl.constexpr):
    """delta = scaling * B2 v of one segment, for one block of columns."""
    expert, first, count, slot = _segment(program // SPEC.cut.expand_blocks, held, SPEC)
    has = _has(count, slot, SPEC)
    b2 = _factor(tables, slot, expert, has, SPEC, B2)
    ranks = _of_projection(tables[2], slot, expert, has, SPEC, DOWN)
    scale = _of_projection(tables[4], slot, expert, has, SPEC, DOWN)
    if ranks > 0:
        block = program % SPEC.cut.expand_blocks
        for row in tl.range(0, count, ROWS, num_stages=1):
            segment = (expert, first + row, count - row, slot)
            if SPEC.max_rank <= SPEC.cut.expand_ranks:
                _expand2(v, delta, b2, ranks, scale, segment, block, SPEC, False)
            else:
                _expand2(v, delta, b2, ranks, scale, segment, block, SPEC, True)


@triton.jit
def shrink13_kernel(x, stride_x, rows, v, tables, held, SPEC: tl.constexpr):
    """`shrink13`, one launch."""
    follow(SPEC.overlap)
    shrink13(tl.program_id(0), x, stride_x, rows, v, tables, held, SPEC)


@triton.jit
def expand2_kernel(v, delta, tables, held, SPEC: tl.constexpr):
    """`expand2`, one launch."""
    follow(SPEC.overlap)
    expand2(tl.program_id(0), v, delta, tables, held, SPEC)
