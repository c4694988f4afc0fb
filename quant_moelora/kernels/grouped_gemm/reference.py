"""grouped_gemm in plain torch: one expert at a time, weights dequantised exactly, sums in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan
from quant_moelora.core.weights import ExpertWeight


def grouped_gemm(
    x: Tensor,  # (R, >= k) float: R = P // rows_per_input
    weight: ExpertWeight,
    plan: Plan,
    rows_per_input: int,
    out: Tensor,  # (P, halves*n_pad or n) float
) -> Tensor:
    """Multiply each pair's row of x with its expert's weight, add the bias, round once into ``out``.

    Pair p reads row p // rows_per_input of x (k for w13, 1 for w2). Only pairs with an expert are written. With
    halves * n_pad columns the padding is set to 0; with n columns there is none.
    """
    offsets = plan.expert_offsets.tolist()
    stride = out.shape[1] // weight.halves
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            continue
        # In the order of the batch, whatever the adapters, and in float64, rounded to float32: the bits of a float32
        # product's row depend on its place and on how many rows there are, which the adapters of other rows change.
        pairs = plan.rows[begin:end].to(torch.int64).sort().values
        index = slice(expert, expert + 1)
        w, bias = weight.dequantize(index)[0], weight.logical_bias(index)
        rows = x[pairs // rows_per_input, : weight.k].to(torch.float64)
        product = out.new_zeros(len(pairs), weight.halves, stride, dtype=torch.float32)
        product[..., : weight.n] = torch.einsum("pk,hnk->phn", rows, w.to(torch.float64)).to(torch.float32)
        if bias is not None:
            product[..., : weight.n] += bias[0]
        out[pairs] = product.flatten(1).to(out.dtype)
    return out
