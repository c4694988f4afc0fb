"""grouped_gemm on a CPU: blocks of a weight are dequantised in float32, and multiplied with one row after another."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.parallel import in_parallel
from quant_moelora.core.routing import Plan
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.cpu_gemm.dequant import BlockDequantizer

_BLOCK = 1 << 19  # weights of a block, about: few enough for a cache, and enough to be worth ten calls of torch
_BLOCKS = 4  # of a part, at most: what is prepared for a part is not for every block, and every thread gets some


class _Part(NamedTuple):
    """Some blocks of one half of an expert's rows."""

    expert: int
    half: int
    first: int  # tile within the half
    tiles: int
    begin: int  # sorted rows begin..end-1
    end: int


@dataclass(frozen=True, eq=False)
class _Product:
    """What all parts of a product share.

    Attributes:
        weight: the packed weight.
        columns: order of the columns of a dequantised block.
        x: the input; columns in that order, or with a k_perm in x's own, and a column of zeros behind them.
        rows: row of x for each sorted row.
        out: the result.
    """

    weight: PackedWeight
    columns: Tensor  # (k_pad,) int64
    x: Tensor  # (R, k_pad or k + 1) float32
    rows: list[int]
    out: Tensor  # (P, halves, n_pad or n) float

    @staticmethod
    def new(
        x: Tensor,  # (R, >= k) float
        weight: PackedWeight,
        columns: Tensor,  # (k_pad,) int64
        plan: Plan,
        top_k: int | None,
        out: Tensor,  # (P, halves * n_pad or n) float
    ) -> _Product:
        """See `grouped_gemm`."""
        wide = x.new_zeros(len(x), weight.k_pad + 1, dtype=torch.float32)
        wide[:, : weight.k] = x[:, : weight.k]
        if weight.k_perm is None:
            # Rows begin at multiples of 256 bytes, so that BLAS treats them all alike.
            wide = wide.index_select(1, columns)
        rows = list(range(len(plan.rows))) if top_k is None else (plan.rows // top_k).tolist()
        halves = out.unflatten(1, (weight.halves, -1))
        halves[: int(plan.expert_offsets[-1]), :, weight.n :] = 0
        return _Product(weight, columns, wide, rows, halves)

    def run(self, part: _Part, dequantizers: dict[int, BlockDequantizer]) -> None:
        """Multiply the part's rows: each by itself, so that its bits depend on no other one."""
        weight, step = self.weight, _block_tiles(self.weight)
        first = part.half * weight.n_pad // packing.TILE + part.first
        qweight = weight.qweight[part.expert, first : first + part.tiles]
        scales, zeros = _scales_and_zeros(weight, part.expert, slice(first, first + part.tiles))
        inputs = self._inputs(part)
        y = torch.empty(len(inputs), part.tiles * packing.TILE)
        for tile in range(0, part.tiles, step):
            tiles = min(step, part.tiles - tile)
            if tiles not in dequantizers:
                dequantizers[tiles] = BlockDequantizer(weight, tiles)
            rows = slice(tile * packing.TILE, (tile + tiles) * packing.TILE)
            block_zeros = zeros[rows] if zeros.ndim else zeros
            w = dequantizers[tiles](qweight[tile : tile + tiles], block_zeros, scales[rows])
            for row, result in zip(inputs, y[:, rows].unbind(), strict=True):
                torch.mv(w, row, out=result)
        if weight.bias is not None:
            y += weight.bias[part.expert, first * packing.TILE :][: y.shape[1]]
        start = part.first * packing.TILE
        stop = min(start + y.shape[1], weight.n)
        self.out[part.begin : part.end, part.half, start:stop] = y[:, : stop - start]

    def _inputs(self, part: _Part) -> tuple[Tensor, ...]:  # of (k_pad,) float32
        """The part's rows of x, columns in the order of its block."""
        rows = torch.tensor(self.rows[part.begin : part.end])
        if self.weight.k_perm is None:
            return self.x.index_select(0, rows).unbind()
        # -1, the padding, becomes the last column, which is 0.
        order = self.weight.k_perm[part.expert, part.half].to(torch.int64)[self.columns] % self.x.shape[1]
        return self.x.index_select(0, rows).index_select(1, order).unbind()


def _scales_and_zeros(
    weight: PackedWeight, expert: int, tiles: slice
) -> tuple[Tensor, Tensor]:  # (T * 64, groups, 1) float32; the same of the codes' dtype, or ()
    """Of some tiles' rows, as a `BlockDequantizer` takes them."""
    dtype = packing.CODE_DTYPES[weight.scheme.bits]
    scales = packing.unpack_pairs(weight.scales[expert, tiles], weight.scheme.scale_dtype)
    scales = scales.to(torch.float32).unsqueeze(-1)
    if weight.zeros is None:
        return scales, torch.tensor(weight.scheme.symmetric_zero, dtype=dtype)
    return scales, packing.unpack_pairs(weight.zeros[expert, tiles], torch.int16).to(dtype).unsqueeze(-1)


def _block_tiles(weight: PackedWeight) -> int:
    """Tiles of 64 rows that a block has, at most."""
    return max(1, _BLOCK // (packing.TILE * weight.k_pad))


def _parts(weight: PackedWeight, plan: Plan) -> list[_Part]:
    """All parts of all experts that have rows; how an expert is cut depends on the weight alone."""
    tiles, step = weight.n_pad // packing.TILE, _BLOCKS * _block_tiles(weight)
    parts: list[_Part] = []
    for expert, (begin, end) in enumerate(itertools.pairwise(plan.expert_offsets.tolist())):
        if begin < end:
            for half, first in itertools.product(range(weight.halves), range(0, tiles, step)):
                parts.append(_Part(expert, half, first, min(step, tiles - first), begin, end))
    return parts


def grouped_gemm(
    x: Tensor,  # (M, >= k) float, or (P, >= k) in sorted order
    weight: PackedWeight,
    columns: Tensor,  # (k_pad,) int64, `packing.run_columns`
    plan: Plan,
    top_k: int | None,
    out: Tensor,  # (P, halves*n_pad or n) float
) -> Tensor:
    """`kernels.grouped_gemm.reference.grouped_gemm` in float32, on as many threads as torch uses.

    A row's bits depend neither on the other rows nor on the number of threads: each is a product of its own with
    blocks that the weight alone defines, computed by one thread. Autograd records it, with ``out`` as what it returns.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Differentiable.apply(x, weight, columns, plan, top_k, out))
    return _write(x, weight, columns, plan, top_k, out)


def _write(
    x: Tensor,  # see `grouped_gemm`
    weight: PackedWeight,
    columns: Tensor,
    plan: Plan,
    top_k: int | None,
    out: Tensor,
) -> Tensor:
    # Also where tensors are made in inference mode: only there may their memory be written.
    with torch.inference_mode():
        product = _Product.new(x, weight, columns, plan, top_k, out)
        parts = deque(_parts(weight, plan))

        def work(_: int) -> None:
            """Take part after part until there is none."""
            with torch.inference_mode():  # of this thread
                dequantizers: dict[int, BlockDequantizer] = {}
                while parts:
                    try:
                        part = parts.popleft()
                    except IndexError:  # another thread was faster
                        return
                    product.run(part, dequantizers)

        workers = min(torch.get_num_threads(), len(parts))
        for _ in in_parallel(work, range(workers), workers):
            pass
    return out


class _Differentiable(torch.autograd.Function):
    """The product, with a gradient for x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # see `grouped_gemm`
        weight: PackedWeight,
        columns: Tensor,
        plan: Plan,
        top_k: int | None,
        out: Tensor,
    ) -> Tensor:
        """The product."""
        ctx.mark_dirty(out)
        ctx.facts = weight, plan, top_k, x.shape, x.dtype
        return _write(x, weight, columns, plan, top_k, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """x's gradient, float32 sums over an expert's rows."""
        weight, plan, top_k, shape, dtype = ctx.facts
        grad = grads[0].unflatten(1, (weight.halves, -1))[..., : weight.n].to(torch.float32)
        x_grad = torch.zeros(shape)
        for expert, (begin, end) in enumerate(itertools.pairwise(plan.expert_offsets.tolist())):
            if begin == end:
                continue
            w = weight.dequantize(slice(expert, expert + 1))[0]
            pairs = plan.rows[begin:end].to(torch.int64)
            rows = torch.arange(begin, end) if top_k is None else pairs // top_k
            x_grad[:, : weight.k].index_add_(0, rows, torch.einsum("phn,hnk->pk", grad[begin:end], w))
        return x_grad.to(dtype), None, None, None, None, None
