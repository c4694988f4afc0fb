"""The grouped GEMM for many rows on sm_90, in Gluon: a block's warps have different programs.

A producer copies rows of x to a ring of stages. A consumer is a warpgroup with one unit of 64 rows of the weight (with
an activation 32 rows of gate and the same 32 of up), which it dequantises in registers and multiplies with each stage.
A block's consumers have adjacent units, read the same stages and do not wait for each other, so that one dequantises
while another multiplies. There is a block for each multiprocessor, which takes tile after tile: the producer already
reads the next one's x while the consumers store the results of the last.

Weights, sums and the order of both are those of `grouped_gemm.kernel`, and so are all bits of the output.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from quant_moelora.kernels.activation.kernel import gated
from quant_moelora.kernels.dequant.kernel import expanded
from quant_moelora.kernels.grouped_gemm.specialized import config

# Triton 3.9 has only the new name, 3.6 and 3.7 only the old one.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# Blocks by which the tiles of a round are dealt further than those of the round before: without it a block can get an
# expert's last and short tile in every round.
_TURN = gl.constexpr(5)


_heights = gluon.constexpr_function(config.heights)


@gluon.constexpr_function
def _power_below(height):
    """The largest power of two that is at most ``height``."""
    return 1 << (height.bit_length() - 1)


@gluon.constexpr_function
def _producer_registers(tile):
    """Of a thread of the producer, which has up to 8 or 12 addresses, and of which there are 4 warps."""
    return 56 if tile.bm > 128 else 32


@gluon.constexpr_function
def _consumer_registers(tile):
    """Of a consumer's thread: when the block starts, all threads have as many, and the producer gives some away."""
    return (tile.registers * (tile.consumers + 1) - _producer_registers(tile)) // tile.consumers // 8 * 8


@gluon.constexpr_function
def _ahead(height, spec):
    """Steps whose weights are on their way to registers, as many as there is room for.

    Beside them a thread has its sums, 16 words of weights to multiply and some 24 other values. Above 96 rows a step
    takes long enough for the next ones' weights to arrive, and with more of them registers were spilled (5909 us, and
    5220 without, for DeepSeek-V3's experts at 4096 tokens).
    """
    groups = max(1, 64 // spec.group)
    needed = spec.bits + groups * (1 + spec.zeros)
    if height > 96:
        return 2 if needed < 10 else 1
    room = (_consumer_registers(spec.tile) - height // 2 - 40) // needed
    return max(2 if needed < 10 else 1, min(8, room))


# ---- weights


@gluon.jit
def _unit_offsets(unit, SPEC: gl.constexpr):
    """Where a unit's first 64 columns are in an expert's words, [1 or 2, 128, 4], and pairs, [128, groups.., 1].

    64 x 64 weights are [warp 4][lane 32][4 words] in int4, and twice that in int8; a group's pairs [warp 4][g 8].
    Smaller groups than 64 are [kq 1 or 2, kr 1 or 2].
    """
    PIECES: gl.constexpr = SPEC.bits // 4
    TILE: gl.constexpr = SPEC.half_rows // 64
    GROUPS: gl.constexpr = SPEC.k // SPEC.group
    HQ: gl.constexpr = 2 if SPEC.group <= 32 else 1  # groups along kq and along kr
    HR: gl.constexpr = 2 if SPEC.group <= 16 else 1
    LW: gl.constexpr = gl.BlockedLayout([PIECES, 1, 4], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    LS: gl.constexpr = gl.BlockedLayout([1, HQ, HR, 1], [32, 1, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    thread = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, LW)))
    piece = gl.expand_dims(gl.arange(0, PIECES, gl.SliceLayout(1, gl.SliceLayout(2, LW))), 1)
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LW)))
    tile, lane = _place(unit, thread, SPEC.activation != "", TILE)
    q = gl.expand_dims(tile * (SPEC.k // 64 * 128 * SPEC.bits) + lane * 4, 0) + piece * 512
    q = gl.expand_dims(q, 2) + gl.expand_dims(gl.expand_dims(word, 0), 1)

    thread = gl.arange(0, 128, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LS))))
    tile, lane = _place(unit, thread, SPEC.activation != "", TILE)
    s = gl.expand_dims(tile * (GROUPS * 32) + lane // 4, 1)
    s += gl.expand_dims(gl.arange(0, HQ, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LS)))), 0) * (HR * 32)
    kr = gl.arange(0, HR, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LS))))
    s = gl.expand_dims(s, 2) + gl.expand_dims(gl.expand_dims(kr, 0), 1) * 32
    return q, gl.expand_dims(s, 3)


@gluon.jit
def _place(unit, thread, FUSED: gl.constexpr, TILE: gl.constexpr):
    """The tile of 64 rows that a thread reads a unit from, and as which of its threads."""
    if FUSED:  # warps 0 and 1 have gate, 2 and 3 up
        return unit // 2 + thread // 64 * TILE, unit % 2 * 64 + thread % 64
    else:
        return unit + thread * 0, thread


@gluon.jit
def _step(weight, offsets, step, SPEC: gl.constexpr):
    """Words and pairs of scales and zero points of the ``step``-th 64 columns; of the last, if there are fewer."""
    STEPS: gl.constexpr = SPEC.k // 64
    w, scales, zeros = weight
    step = gl.minimum(step, STEPS - 1)
    group = step * 64 // SPEC.group * 32
    q = gl.load(w + step * (128 * SPEC.bits) + offsets[0])
    s = gl.load(scales + group + offsets[1])
    z = gl.load(zeros + group + offsets[1]) if SPEC.zeros else zeros
    return q, s, z


@gluon.jit
def _after(coming, new, ODD: gl.constexpr, SPEC: gl.constexpr):
    """The steps less the first and with ``new``, which as the second of two has the scales of the one before."""
    if SPEC.group % 128 == 0 and ODD:
        new = (new[0], coming[len(coming) - 1][1], coming[len(coming) - 1][2])
    return coming[1:] + (new,)  # noqa: RUF005  # Gluon has no stars


@gluon.jit
def _dequantize(step, MMA: gl.constexpr, SPEC: gl.constexpr):
    """What `_step` loaded to weights [64, 64], as the left operand of MMA."""
    q, s, z = step
    KH: gl.constexpr = SPEC.bits // 4
    L: gl.constexpr = gl.BlockedLayout([1, 2, 2, KH], [32, 1, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    words = gl.convert_layout(q.permute([1, 0, 2]).reshape([128, 2, 2, KH]), L, assert_trivial=True)
    s = gl.convert_layout(s, L, assert_trivial=True)
    if SPEC.zeros:
        z = gl.convert_layout(z, L, assert_trivial=True)
    f = expanded(words, s, z, SPEC).reshape([4, 8, 4, 4, 2, 2, 2])  # warp, g, t, (kq, kr), kh, rh, e
    f = f.permute([0, 5, 1, 3, 4, 2, 6]).reshape([64, 64])
    return gl.convert_layout(f, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


# ---- which tile when


@gluon.jit
def _across(SPEC: gl.constexpr):
    """Tiles beside each other; of the last, some consumers may have no unit."""
    CONSUMERS: gl.constexpr = SPEC.tile.consumers
    ACROSS: gl.constexpr = (SPEC.n // 64 + CONSUMERS - 1) // CONSUMERS
    return ACROSS


@gluon.jit
def _rounds(num_tiles, SPEC: gl.constexpr):
    return (num_tiles * _across(SPEC) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _tile_of(round, tiles, num_tiles, SPEC: gl.constexpr):
    """The block's tile of a round: expert, first sorted row, rows (0 for none), and which units."""
    GROUP: gl.constexpr = SPEC.tile.group_m
    blocks = gl.num_programs(0)
    own = round * blocks + (gl.program_id(0) + round * _TURN) % blocks
    real = own < num_tiles * _across(SPEC)
    own = gl.where(real, own, 0)
    first = own // (GROUP * _across(SPEC)) * GROUP
    high = gl.minimum(num_tiles - first, GROUP)
    within = own % (GROUP * _across(SPEC))
    tile = tiles + (first + within % high) * 4
    return gl.load(tile).to(gl.int64), gl.load(tile + 1), gl.where(real, gl.load(tile + 2), 0), within // high


@gluon.jit
def _advance(index, phase, SPEC: gl.constexpr):
    """The stage after ``index``, and its phase: how often, modulo 2, the ring has been gone round."""
    wrap = index + 1 == SPEC.tile.stages
    return gl.where(wrap, 0, index + 1), gl.where(wrap, phase ^ 1, phase)


# ---- producer


@gluon.jit
def _rows_of_x(source, begin, count, row, column, SPEC: gl.constexpr):
    """Offsets of rows of x, and which are there."""
    _, stride_x, rows, top_k = source
    held = row < count
    if SPEC.gather:
        index = gl.load(rows + begin + row, mask=held, other=0) // top_k
    else:
        index = gl.where(held, begin + row, begin)
    if SPEC.wide:
        index = index.to(gl.int64)
    offsets = gl.multiple_of(index[:, None] * stride_x, [1, 8])
    return offsets + column[None, :], held[:, None] & (column < 64)[None, :]


@gluon.jit
def _fetch(stage, x, offsets, held, column, step, SPEC: gl.constexpr):
    """Begin to copy one step of rows of x; what is not there becomes 0."""
    if SPEC.x_columns < SPEC.k:
        held = held & (column < SPEC.x_columns - step * 64)[None, :]
    _copy(stage, x + offsets, mask=held)


@gluon.jit
def _produce(source, tiles, num_tiles, ring, SPEC: gl.constexpr):
    """Copy x to the stages, step after step of each tile; rows from 128 on to those of their own."""
    BM: gl.constexpr = SPEC.tile.bm
    FIRST: gl.constexpr = 128 if BM > 128 else BM
    STEPS: gl.constexpr = SPEC.k // 64
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    stages, stages2, full, empty = ring
    row = gl.arange(0, FIRST, gl.SliceLayout(1, L))
    column = gl.arange(0, 64, gl.SliceLayout(0, L))
    index = 0
    phase = 0
    for round in range(_rounds(num_tiles, SPEC)):
        _, begin, count, _ = _tile_of(round, tiles, num_tiles, SPEC)
        if count > 0:
            offsets, held = _rows_of_x(source, begin, count, row, column, SPEC)
            if BM > FIRST:
                row2 = FIRST + gl.arange(0, BM - FIRST, gl.SliceLayout(1, L))
                offsets2, held2 = _rows_of_x(source, begin, count, row2, column, SPEC)
            x = source[0]
            for step in range(STEPS):
                mbarrier.wait(empty.index(index), phase ^ 1)
                _fetch(stages.index(index), x, offsets, held, column, step, SPEC)
                if BM > FIRST:
                    if count > FIRST:
                        _fetch(stages2.index(index), x, offsets2, held2, column, step, SPEC)
                async_copy.mbarrier_arrive(full.index(index), increment_count=False)
                x += 64
                index, phase = _advance(index, phase, SPEC)


# ---- consumers


@gluon.jit
def _issue(f, acc, acc2, index, phase, ring, BM: gl.constexpr, BM2: gl.constexpr):
    """Wait for a step of x, and begin its products."""
    stages, stages2, full, _ = ring
    mbarrier.wait(full.index(index), phase)
    acc = warpgroup_mma(f, stages.index(index).slice(0, BM).permute((1, 0)), acc, is_async=True)
    if BM2 > 0:
        rest = stages2.index(index) if BM == 128 else stages.index(index).slice(BM, BM2)
        acc2 = warpgroup_mma(f, rest.slice(0, BM2).permute((1, 0)), acc2, is_async=True)
    return acc, acc2


@gluon.jit
def _retire(f, acc, acc2, index, phase, ring, BM2: gl.constexpr, SPEC: gl.constexpr):
    """Wait for the products of a step, and hand its stage back."""
    _, _, _, empty = ring
    if BM2 > 0:
        acc, acc2, f = warpgroup_mma_wait(0, deps=[acc, acc2, f])
    else:
        acc, f = warpgroup_mma_wait(0, deps=[acc, f])
    mbarrier.arrive(empty.index(index), count=1)
    index, phase = _advance(index, phase, SPEC)
    return acc, acc2, index, phase


@gluon.jit
def _finish(acc, problem, expert, unit, begin, count, scratch, BM: gl.constexpr, SPEC: gl.constexpr):
    """Scale, bias, rounding, activation and store of the sums [64, BM] of a unit; ``count`` of its columns are rows."""
    post, bias, out, stride_out = problem
    FUSED: gl.constexpr = SPEC.activation != ""
    COLUMNS: gl.constexpr = 32 if FUSED else 64
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    ALPHA: gl.constexpr = SPEC.alpha
    LIMIT: gl.constexpr = SPEC.limit
    ACTIVATION: gl.constexpr = SPEC.activation
    if SPEC.has_post:
        acc *= gl.load(post + expert)
    if SPEC.has_bias:
        row = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        n = unit * 32 + row % 32 + row // 32 * SPEC.half_rows if FUSED else unit * 64 + row
        acc += gl.load(bias + expert * SPEC.n + n)[:, None]
    part = scratch.slice(0, BM)
    part.permute((1, 0)).store(acc.to(out.dtype.element_ty))
    y = part.load(L)
    if FUSED:
        gate, up = gl.split(y.reshape([BM, 2, 32]).permute([0, 2, 1]))
        y = gated(gate, up, ALPHA, LIMIT, ACTIVATION).to(out.dtype.element_ty)
        y = gl.convert_layout(y, L, assert_trivial=True)
    n = unit * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, L))
    m = gl.arange(0, BM, gl.SliceLayout(1, L))
    to = out + (begin + m)[:, None].to(gl.int64) * stride_out + n[None, :]
    gl.store(to, y, mask=(m < count)[:, None] & (n < SPEC.n_out)[None, :])


@gluon.jit
def _multiply(
    weight, problem, expert, unit, begin, count, index, phase, ring, scratch,
    BM: gl.constexpr, BM2: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """A unit by the rows of a tile, at most BM + BM2. ``weight``: the expert's words and pairs; ``count``: to store."""
    STEPS: gl.constexpr = SPEC.k // 64
    AHEAD: gl.constexpr = _ahead(BM + BM2, SPEC)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    acc = gl.zeros([64, BM], gl.float32, MMA)
    acc2 = acc
    if BM2 > 0:
        MMA2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM2, 16])
        acc2 = gl.zeros([64, BM2], gl.float32, MMA2)
    offsets = _unit_offsets(unit, SPEC)
    coming = (_step(weight, offsets, 0, SPEC),)
    for i in gl.static_range(1, AHEAD):
        coming = coming + (_step(weight, offsets, i, SPEC),)  # noqa: RUF005
    for two in range(STEPS // 2):
        for i in gl.static_range(2):
            f = _dequantize(coming[0], MMA, SPEC)
            acc, acc2 = _issue(f, acc, acc2, index, phase, ring, BM, BM2)
            new = _step(weight, offsets, 2 * two + i + AHEAD, SPEC)
            coming = _after(coming, new, (i + AHEAD) % 2 == 1, SPEC)
            acc, acc2, index, phase = _retire(f, acc, acc2, index, phase, ring, BM2, SPEC)
    if STEPS % 2 == 1:
        f = _dequantize(coming[0], MMA, SPEC)
        acc, acc2 = _issue(f, acc, acc2, index, phase, ring, BM, BM2)
        acc, acc2, index, phase = _retire(f, acc, acc2, index, phase, ring, BM2, SPEC)
    _finish(acc, problem, expert, unit, begin, count, scratch, BM, SPEC)
    if BM2 > 0:
        _finish(acc2, problem, expert, unit, begin + BM, count - BM, scratch, BM2, SPEC)
    return index, phase


@gluon.jit
def _fitting(
    weight, problem, expert, unit, begin, count, kept, index, phase, ring, scratch,
    H: gl.constexpr, SPEC: gl.constexpr,
):  # fmt: skip
    """`_multiply` with the least height, from the H-th on, that holds ``count`` rows."""
    HEIGHTS: gl.constexpr = _heights(SPEC.tile.bm)
    HEIGHT: gl.constexpr = HEIGHTS[H]
    BM: gl.constexpr = _power_below(HEIGHT)
    if H + 1 == len(HEIGHTS):
        index, phase = _multiply(
            weight, problem, expert, unit, begin, kept, index, phase, ring, scratch, BM, HEIGHT - BM, SPEC
        )
    elif count <= HEIGHT:
        index, phase = _multiply(
            weight, problem, expert, unit, begin, kept, index, phase, ring, scratch, BM, HEIGHT - BM, SPEC
        )
    else:
        index, phase = _fitting(
            weight, problem, expert, unit, begin, count, kept, index, phase, ring, scratch, H + 1, SPEC
        )
    return index, phase


@gluon.jit
def _consume(weight, problem, tiles, num_tiles, ring, scratches, C: gl.constexpr, SPEC: gl.constexpr):
    """Unit C of each of the block's tiles, by the loop for the tile's height."""
    UNITS: gl.constexpr = SPEC.n // 64
    w, scales, zeros = weight
    index = 0
    phase = 0
    for round in range(_rounds(num_tiles, SPEC)):
        expert, begin, count, across = _tile_of(round, tiles, num_tiles, SPEC)
        unit = across * SPEC.tile.consumers + C
        kept = gl.where(unit < UNITS, count, 0)  # without a unit it only takes its part in the barriers
        unit = gl.minimum(unit, UNITS - 1)
        pairs = expert * (UNITS * (SPEC.k // SPEC.group * 32))
        own = (
            w + expert * (UNITS * (SPEC.k // 64 * 128 * SPEC.bits)),
            scales + pairs,
            zeros + pairs if SPEC.zeros else zeros,
        )
        if count > 0:
            index, phase = _fitting(
                own, problem, expert, unit, begin, count, kept, index, phase, ring, scratches.index(C), 0, SPEC
            )


@gluon.jit(do_not_specialize=["num_tiles", "num_experts"])
def specialized_gemm_kernel(  # the arguments of `grouped_gemm_kernel`
    x,  # (M, x_columns) if SPEC.gather, otherwise (P, x_columns) in sorted order; each row on 16 bytes
    stride_x,
    half_stride,  # not read
    w,  # (E, n/64, k/64, 128 * bits) int32
    scales,  # (E, n/64, k/group, 32) int32, prepared
    zeros,  # the same, or the addend of every code
    post,  # (E,) float32
    bias,  # (E, n) float32
    out,  # (P, >= n_out)
    stride_out,
    slice_stride,  # not read
    rows,  # (P,) int32, pair of each sorted row
    tiles,  # (T, 4) int32: expert, first sorted row, rows
    num_tiles,  # T
    num_experts,  # not read
    top_k,
    SPEC: gl.constexpr,
):
    """Each sorted row of x, or that of its token, times the weight of its expert."""
    STAGES: gl.constexpr = SPEC.tile.stages
    CONSUMERS: gl.constexpr = SPEC.tile.consumers
    BM: gl.constexpr = SPEC.tile.bm
    FIRST: gl.constexpr = 128 if BM > 128 else BM
    X: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    stages = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, FIRST, 64], X)
    stages2 = stages
    if BM > FIRST:
        stages2 = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, BM - FIRST, 64], X)
    scratches = gl.allocate_shared_memory(x.dtype.element_ty, [CONSUMERS, FIRST, 64], X)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    source = (x, stride_x, rows, top_k)
    ring = (stages, stages2, full, empty)
    weight = (w, scales, zeros)
    problem = (post, bias, out, stride_out)
    C: gl.constexpr = _consumer_registers(SPEC.tile)
    P: gl.constexpr = _producer_registers(SPEC.tile)
    gl.static_assert(CONSUMERS == 3 or CONSUMERS == 4)  # noqa: PLR1714
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 0, SPEC)),
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 1, SPEC)),
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 2, SPEC)),
                (_produce, (source, tiles, num_tiles, ring, SPEC)),
            ],
            [4, 4, 4],
            [C, C, P],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 0, SPEC)),
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 1, SPEC)),
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 2, SPEC)),
                (_consume, (weight, problem, tiles, num_tiles, ring, scratches, 3, SPEC)),
                (_produce, (source, tiles, num_tiles, ring, SPEC)),
            ],
            [4, 4, 4, 4],
            [C, C, C, P],
        )
