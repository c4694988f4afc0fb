"""grouped_gemm in plain torch: one expert at a time, weights dequantised exactly, sums in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan
from quant_moelora.core.weights import ExpertWeight


def grouped_gemm(
    x: Tensor,  # (M, >= k) float, or (P, >= k) in sorted order
    weight: ExpertWeight,
    plan: Plan,
    top_k: int | None,
    out: Tensor,  # (P, halves*n_pad or n) float
) -> Tensor:
    """Multiply each sorted row with its expert's weight, add the bias, round once into ``out``.

    Sorted row i reads the row of x of its token, plan.rows[i] // top_k; without a top_k row i. Only rows with an expert
    are written. With halves * n_pad columns the padding is set to 0; with n columns there is none.
    """
    offsets = plan.expert_offsets.tolist()
    stride = out.shape[1] // weight.halves
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            continue
        # In the order of the batch, whatever the adapters, and in float64, rounded to float32: the bits of a float32
        # product's row depend on its place and on how many rows there are, which the adapters of other rows change.
        pairs, order = plan.rows[begin:end].to(torch.int64).sort()
        row = begin + order
        index = slice(expert, expert + 1)
        w, bias = weight.dequantize(index)[0], weight.logical_bias(index)
        rows = x[row if top_k is None else pairs // top_k, : weight.k].to(torch.float64)
        product = out.new_zeros(len(pairs), weight.halves, stride, dtype=torch.float32)
        product[..., : weight.n] = torch.einsum("pk,hnk->phn", rows, w.to(torch.float64)).to(torch.float32)
        if bias is not None:
            product[..., : weight.n] += bias[0]
        out[row] = product.flatten(1).to(out.dtype)
    return out
