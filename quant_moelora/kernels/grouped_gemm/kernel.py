"""The grouped GEMM: each pair's row of x with its expert's packed weight.

The weight is the left operand (out^T = W x^T), so that its dequantised tile stays in registers, and rows of x stand in
the columns of the matrix unit's result, which may be as few as 16.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.activation.kernel import gated
from quant_moelora.kernels.common.kernel import follow, swept
from quant_moelora.kernels.dequant.kernel import dequantize
from quant_moelora.kernels.lora.kernel import expand2, shrink13


@triton.jit
def _tile_of_x(x, offsets, held, column, step, SPEC: tl.constexpr, BM: tl.constexpr):
    """BM rows of x, bk columns."""
    if SPEC.x_columns < SPEC.k:
        real = held[:, None] & (column[None, :] < SPEC.x_columns - step * SPEC.tile.bk)
        return tl.load(x + offsets, mask=real, other=0.0)
    elif BM <= 32:  # where most of a tile may be empty: rows that are not there cost no traffic
        return tl.load(x + offsets, mask=held[:, None], other=0.0)
    else:
        return tl.load(x + offsets)


@triton.jit
def _rows_of_x(rows, begin, row, held, stride_x, top_k, SPEC: tl.constexpr):
    """Offsets of the rows of x that the sorted rows from ``begin`` on read."""
    if SPEC.direct:
        source = tl.where(held, begin // top_k, 0)
    elif SPEC.gather:
        source = tl.load(rows + begin + row, mask=held, other=0) // top_k
    else:
        source = tl.where(held, begin + row, 0)
    if SPEC.wide:
        source = source.to(tl.int64)
    return source[:, None] * stride_x


@triton.jit
def _fence(acc, SPEC: tl.constexpr):
    """An opaque identity: without it Triton below 3.9 overwrites operand registers of matrix instructions in flight.

    benchmarks/NOTES.md, "The fence is not optional".
    """
    if SPEC.plain:
        return acc
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, False, 1)


@triton.jit
def _finish(acc, problem, expert, begin, row, held, pn, nt, BM: tl.constexpr, SPEC: tl.constexpr):
    """Scale, bias, rounding, activation and store of a tile."""
    post, bias, out, stride_out, slice_stride = problem
    BN: tl.constexpr = SPEC.tile.bn
    ACTIVATION: tl.constexpr = SPEC.activation
    ALPHA: tl.constexpr = SPEC.alpha
    LIMIT: tl.constexpr = SPEC.limit
    if SPEC.has_post:
        acc *= tl.load(post + expert)
    if SPEC.has_bias:
        n = (nt[:, None] * 64 + tl.arange(0, 64)[None, :]).reshape(BN)
        b = tl.load(bias + expert * SPEC.n + n)
        acc += (tl.where(tl.program_id(1) == 0, b, 0.0) if SPEC.tile.split > 1 else b)[:, None]
    y = acc.to(out.dtype.element_ty)
    to = out + (begin + row)[None, :].to(tl.int64) * stride_out + tl.program_id(1) * slice_stride
    if ACTIVATION != "":
        gate, up = tl.split(y.reshape(2, BN // 2, BM).permute(1, 2, 0))
        h = gated(gate, up, ALPHA, LIMIT, ACTIVATION)
        n = pn * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(to + n[:, None], h.to(out.dtype.element_ty), mask=held[None, :])
    else:
        n = pn * BN + tl.arange(0, BN)
        tl.store(to + n[:, None], y, mask=held[None, :] & (n < SPEC.n_out)[:, None])


@triton.jit
def _multiply(problem, expert, begin, count, pn, BM: tl.constexpr, BM2: tl.constexpr, SPEC: tl.constexpr):
    """One tile: ``count`` sorted rows from ``begin`` on, at most BM and then BM2 (or none) more."""
    x, stride_x, half_stride, w, scales, zeros, post, bias, out, stride_out, slice_stride, rows, top_k = problem
    TILE: tl.constexpr = SPEC.tile
    BN: tl.constexpr = TILE.bn
    BK: tl.constexpr = TILE.bk
    NT: tl.constexpr = BN // 64
    KT: tl.constexpr = BK // 64
    WORDS: tl.constexpr = 128 * SPEC.bits  # of a tile
    NG: tl.constexpr = BK // SPEC.group if SPEC.group < BK else 1
    GROUPS: tl.constexpr = SPEC.k // SPEC.group

    nt = pn * NT + tl.arange(0, NT)
    if SPEC.activation != "":  # the same tiles of gate and of up
        place = tl.arange(0, NT)
        nt = pn * (NT // 2) + place % (NT // 2) + place // (NT // 2) * (SPEC.half_rows // 64)
    w += expert * (SPEC.n // 64 * (SPEC.k // 64) * WORDS)
    w_offsets = nt[:, None] * (SPEC.k // 64 * WORDS) + tl.arange(0, KT * WORDS)[None, :]
    s_offsets = nt[:, None] * (GROUPS * 32) + tl.arange(0, NG * 32)[None, :]
    s_base = expert * (SPEC.n // 64 * GROUPS * 32)
    if SPEC.by_half:
        x += (pn * BN // SPEC.half_rows).to(tl.int64) * half_stride
    column = tl.arange(0, BK)
    row = tl.arange(0, BM)
    held = row < count
    x_offsets = _rows_of_x(rows, begin, row, held, stride_x, top_k, SPEC) + column[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    if BM2 > 0:
        row2 = BM + tl.arange(0, BM2)
        held2 = row2 < count
        x_offsets2 = _rows_of_x(rows, begin, row2, held2, stride_x, top_k, SPEC) + column[None, :]
        acc2 = tl.zeros((BN, BM2), tl.float32)
    STEPS: tl.constexpr = SPEC.k // BK // TILE.split
    first = tl.program_id(1) * STEPS
    w += first * (KT * WORDS)
    x += first * BK
    for step in tl.range(0, STEPS, num_stages=TILE.stages):
        xt = _tile_of_x(x, x_offsets, held, column, first + step, SPEC, BM)
        group = (first + step) * BK // SPEC.group * 32
        sc = tl.load(scales + s_base + s_offsets + group)
        zc = tl.load(zeros + s_base + s_offsets + group) if SPEC.zeros else zeros
        # The last load: from the last one on, Triton spreads a layout to what the loads meet in (see `_opaque`).
        q = tl.load(w + w_offsets, eviction_policy="evict_first")
        f = dequantize(q, sc, zc, NT, KT, SPEC)
        acc = tl.dot(f, xt.T, acc)
        if BM2 > 0:
            xt2 = _tile_of_x(x, x_offsets2, held2, column, first + step, SPEC, BM2)
            acc2 = tl.dot(f, xt2.T, acc2)
            acc2 = _fence(acc2, SPEC)
        acc = _fence(acc, SPEC)
        w += KT * WORDS
        x += BK
    finish = (post, bias, out, stride_out, slice_stride)
    _finish(acc, finish, expert, begin, row, held, pn, nt, BM, SPEC)
    if BM2 > 0:
        _finish(acc2, finish, expert, begin, row2, held2, pn, nt, BM2, SPEC)


@triton.jit
def _whole(problem, expert, begin, count, pn, BM: tl.constexpr, SPEC: tl.constexpr):
    """`_multiply` with BM rows, of mma.sync in two products where its warps would share the rows of the weight."""
    if SPEC.mma_sync and 4 * BM > SPEC.tile.bn:
        _multiply(problem, expert, begin, count, pn, BM // 2, BM // 2, SPEC)
    else:
        _multiply(problem, expert, begin, count, pn, BM, 0, SPEC)


@triton.jit
def _fitting(problem, expert, begin, count, pn, BM: tl.constexpr, SPEC: tl.constexpr):
    """`_multiply` with the least height that holds ``count`` rows, of those that `Tile.bm` and `Tile.mixed` allow."""
    HALF: tl.constexpr = BM // 2
    QUARTER: tl.constexpr = BM // 4 if SPEC.tile.mixed and BM >= 64 else 0
    EIGHTH: tl.constexpr = BM // 8 if SPEC.tile.mixed and BM >= 128 else 0
    if BM == 192:
        if count <= 128:
            _fitting(problem, expert, begin, count, pn, 128, SPEC)
        else:
            _multiply(problem, expert, begin, count, pn, 128, 64, SPEC)
    elif BM == 16:
        _multiply(problem, expert, begin, count, pn, BM, 0, SPEC)
    elif count <= HALF:
        _fitting(problem, expert, begin, count, pn, HALF, SPEC)
    elif EIGHTH > 0:
        if count <= HALF + EIGHTH:
            _multiply(problem, expert, begin, count, pn, HALF, EIGHTH, SPEC)
        elif count <= HALF + QUARTER:
            _multiply(problem, expert, begin, count, pn, HALF, QUARTER, SPEC)
        else:
            _whole(problem, expert, begin, count, pn, BM, SPEC)
    elif QUARTER > 0:
        if count <= HALF + QUARTER:
            _multiply(problem, expert, begin, count, pn, HALF, QUARTER, SPEC)
        else:
            _whole(problem, expert, begin, count, pn, BM, SPEC)
    else:
        _whole(problem, expert, begin, count, pn, BM, SPEC)


@triton.jit
def _tile(problem, pid, tiles, num_tiles, num_experts, SPEC: tl.constexpr):
    """The tile of a program."""
    BM: tl.constexpr = SPEC.tile.bm
    nn: tl.constexpr = SPEC.n // SPEC.tile.bn
    pm, pn = swept(pid, num_tiles, nn, SPEC.tile.group_m)
    if SPEC.direct:
        expert = tl.load(tiles + pm).to(tl.int64)
        if (expert >= 0) & (expert < num_experts):
            _fitting(problem, expert, pm, 1, pn, BM, SPEC)
    else:
        expert = tl.load(tiles + pm * 4).to(tl.int64)
        begin = tl.load(tiles + pm * 4 + 1)
        count = tl.load(tiles + pm * 4 + 2)
        if count > 0:
            _fitting(problem, expert, begin, count, pn, BM, SPEC)


@triton.jit
def _ride(program, rider, RIDER: tl.constexpr, SHRINKS: tl.constexpr):
    """A program of LoRA."""
    if SHRINKS:
        x, stride_x, rows, v, tables, held = rider
        shrink13(program, x, stride_x, rows, v, tables, held, RIDER)
    else:
        v, delta, tables, held = rider
        expand2(program, v, delta, tables, held, RIDER)


@triton.jit
def grouped_gemm_kernel(
    x,  # (M, x_columns) if SPEC.gather, otherwise (P, x_columns) in sorted order, (halves, P, k) if SPEC.by_half
    stride_x,
    half_stride,  # between the halves' copies of x
    w,  # (E, n/64, k/64, 128 * bits) int32
    scales,  # (E, n/64, k/group, 32) int32, prepared
    zeros,  # the same, or the addend of every code
    post,  # (E,) float32
    bias,  # (E, n) float32
    out,  # (P, >= n_out), (split, P, n_out) float32 if split
    stride_out,
    slice_stride,  # between partial sums, if the columns are split
    rows,  # (P,) int32, pair of each sorted row
    tiles,  # (T, 4) int32: expert, first sorted row, rows; or the router's ids if direct
    num_tiles,  # T
    num_experts,
    top_k,
    rider,  # arguments of LoRA's kernel, or None
    riding,  # its programs
    SPEC: tl.constexpr,
    RIDER: tl.constexpr = None,  # its LoRASpec
    SHRINKS: tl.constexpr = False,  # whether it is `shrink13`, or `expand2`
):
    """Each sorted row of x, or that of its token, times the weight of its expert.

    Programs of LoRA, which need as little of a multiprocessor as a tile of few rows, may ride along in front of these.
    """
    follow(SPEC.overlap)
    pid = tl.program_id(0)
    problem = (
        x,
        stride_x,
        half_stride,
        w,
        scales,
        zeros,
        post,
        bias,
        out,
        stride_out,
        slice_stride,
        rows,
        top_k,
    )
    if RIDER is None:
        _tile(problem, pid, tiles, num_tiles, num_experts, SPEC)
    else:
        SPLIT: tl.constexpr = SPEC.tile.split
        ahead = (riding + SPLIT - 1) // SPLIT
        program = pid * SPLIT + tl.program_id(1)
        if pid >= ahead:
            _tile(problem, pid - ahead, tiles, num_tiles, num_experts, SPEC)
        elif program < riding:
            _ride(program, rider, RIDER, SHRINKS)
