"""The grouped GEMM of dense weights: each pair's row of x with its expert's weight.

The weight is the left operand (out^T = W x^T), so that rows of x stand in the columns of the matrix unit's result,
which may be as few as 16. On sm_90 the matrix unit reads both operands from shared memory, where asynchronous copies
put them.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import triton
import triton.language as tl

from quant_moelora.kernels.common.kernel import follow, swept


@triton.jit
def _tile_of_x(x, offsets, held, column, left, SPEC: tl.constexpr, BM: tl.constexpr):
    """BM rows of x, bk columns, of which ``left`` are there."""
    if SPEC.k % SPEC.tile.bk != 0:
        return tl.load(x + offsets, mask=held[:, None] & (column < left)[None, :], other=0.0)
    elif BM <= 32:  # where most of a tile may be empty: rows that are not there cost no traffic
        return tl.load(x + offsets, mask=held[:, None], other=0.0)
    else:
        return tl.load(x + offsets)


@triton.jit
def _tile_of_w(w, offsets, column, left, SPEC: tl.constexpr, BM: tl.constexpr):
    """bn rows of the weight, bk columns, of which ``left`` are there; 0 behind them, since NaN may stand there."""
    POLICY: tl.constexpr = "evict_first" if BM <= 32 else ""  # an expert with few rows is read once
    if SPEC.k % SPEC.tile.bk != 0:
        return tl.load(w + offsets, mask=(column < left)[None, :], other=0.0, eviction_policy=POLICY)
    else:
        return tl.load(w + offsets, eviction_policy=POLICY)


@triton.jit
def _multiply(problem, expert, begin, count, pn, BM: tl.constexpr, SPEC: tl.constexpr):
    """One tile: ``count`` sorted rows from ``begin`` on, at most BM."""
    x, w, bias, out, rows, top_k = problem
    BN: tl.constexpr = SPEC.tile.bn
    BK: tl.constexpr = SPEC.tile.bk
    n = pn * BN + tl.arange(0, BN)
    column = tl.arange(0, BK)
    row = tl.arange(0, BM)
    held = row < count
    # Past the last row it is read again, and what comes of it is not stored.
    weight_row = tl.minimum(n, SPEC.n - 1) if SPEC.n % BN != 0 else n
    w += expert * (SPEC.rows * SPEC.k_pad)
    stored_row = weight_row.to(tl.int64) if SPEC.wide else weight_row
    w_offsets = stored_row[:, None] * SPEC.k_pad + column[None, :]
    if SPEC.gather:
        source = tl.load(rows + begin + row, mask=held, other=0) // top_k
    else:
        source = tl.where(held, begin + row, 0)
    x_offsets = source.to(tl.int64)[:, None] * SPEC.k + column[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, (SPEC.k + BK - 1) // BK, num_stages=SPEC.tile.stages):
        left = SPEC.k - step * BK
        xt = _tile_of_x(x, x_offsets, held, column, left, SPEC, BM)
        wt = _tile_of_w(w, w_offsets, column, left, SPEC, BM)
        acc = tl.dot(wt, xt.T, acc)
        x += BK
        w += BK
    if SPEC.has_bias:
        acc += tl.load(bias + expert * SPEC.rows + weight_row)[:, None]
    to = out + (begin + row)[None, :].to(tl.int64) * SPEC.n + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=held[None, :] & (n < SPEC.n)[:, None])


@triton.jit
def _fitting(problem, expert, begin, count, pn, BM: tl.constexpr, SPEC: tl.constexpr):
    """`_multiply` with the least power of two from 16 to BM that holds ``count`` rows."""
    if BM == 16:
        _multiply(problem, expert, begin, count, pn, BM, SPEC)
    elif count <= BM // 2:
        _fitting(problem, expert, begin, count, pn, BM // 2, SPEC)
    else:
        _multiply(problem, expert, begin, count, pn, BM, SPEC)


@triton.jit
def dense_gemm_kernel(
    x,  # (M, k) if SPEC.gather, otherwise (P, k) in sorted order
    w,  # (E, rows, k_pad)
    bias,  # (E, rows) float32
    out,  # (P, n)
    rows,  # (P,) int32, pair of each sorted row
    tiles,  # (T, 4) int32: expert, first sorted row, rows
    num_tiles,  # T
    top_k,
    SPEC: tl.constexpr,
):
    """Each sorted row of x, or that of its token, times the weight of its expert."""
    follow(SPEC.overlap)
    nn: tl.constexpr = (SPEC.n + SPEC.tile.bn - 1) // SPEC.tile.bn
    pm, pn = swept(tl.program_id(0), num_tiles, nn, SPEC.tile.group_m)
    expert = tl.load(tiles + pm * 4).to(tl.int64)
    begin = tl.load(tiles + pm * 4 + 1)
    count = tl.load(tiles + pm * 4 + 2)
    if count > 0:
        _fitting((x, w, bias, out, rows, top_k), expert, begin, count, pn, SPEC.tile.bm, SPEC)
