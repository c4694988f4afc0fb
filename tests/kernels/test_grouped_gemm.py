"""grouped_gemm against float64, one pair after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.grouped_gemm.reference import grouped_gemm
from tests.builders import BuiltDense, BuiltWeight, dense, packed, roundoff, routing, same_bits, scheme, threads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Large and with a bit pattern of its own, so that a row that was not to be written is known again.
POISON = torch.nan


def run(
    built: BuiltWeight | BuiltDense, x: Tensor, case: Routing, top_k: int | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """The output by pair, in a buffer that was poisoned before; without a top_k x is by pair too."""
    plan = align(case, built.weight.num_experts)
    out = torch.full((case.num_pairs, columns), POISON, dtype=dtype)
    returned = grouped_gemm(x[plan.rows.long()] if top_k is None else x, built.weight, plan, top_k, out)
    assert returned is out
    return out[plan.inverse.long()]


def check(built: BuiltWeight | BuiltDense, x: Tensor, case: Routing, top_k: int | None, out: Tensor) -> None:
    """Every row against float64; padding 0; rows without an expert as they were."""
    weight = built.weight
    stride = out.shape[1] // weight.halves
    # Products and sums are taken in float32: k roundings of the sum of the absolute products bound the error, and
    # independent roundings stay within 4 sqrt(k). Then the sum is rounded once to the output's dtype.
    growth = 4 * math.sqrt(weight.k) * roundoff(torch.float32)
    for pair, expert in enumerate(case.topk_ids.flatten().tolist()):
        if not 0 <= expert < weight.num_experts:
            assert out[pair].isnan().all()
            continue
        row = x[pair // (top_k or 1), : weight.k].double()
        for half in range(weight.halves):
            terms = built.value[expert, half] * row
            want = terms.sum(1) + built.bias[expert, half]
            size = terms.abs().sum(1) + built.bias[expert, half].abs()
            got = out[pair, half * stride : (half + 1) * stride]
            error = (got[: weight.n].double() - want).abs()
            assert (error <= growth * size + roundoff(out.dtype) * (want.abs() + growth * size)).all()
            assert (got[weight.n :] == 0).all()


@DTYPES
@pytest.mark.parametrize(
    "quant",
    [
        scheme(4, 32),
        scheme(4, 128, symmetric=False),
        scheme(8, None, bf16=True),
        scheme(8, 48, symmetric=False),
        torch.float32,
        torch.bfloat16,
    ],
    ids=lambda s: getattr(s, "name", str(s)),
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gate_and_up(quant: QuantScheme | torch.dtype, dtype: torch.dtype, bias: bool) -> None:
    """As w13: each token's row serves its k pairs; the padding between gate and up and after up is 0."""
    if isinstance(quant, QuantScheme):
        built = packed(quant, experts=4, halves=2, n=40, k=72, bias=bias, act_order=not quant.symmetric)
    else:
        built = dense(quant, experts=4, halves=2, n=40, k=72, n_pad=48, k_pad=80, bias=bias)
    case = routing(9, 3, 4)
    x = torch.randn(9, 72).to(dtype)
    out = run(built, x, case, 3, built.weight.rows, dtype)
    check(built, x, case, 3, out)


@DTYPES
@pytest.mark.parametrize("quant", [scheme(4, 32, symmetric=False), torch.float16], ids=["int4", "none"])
def test_down(quant: QuantScheme | torch.dtype, dtype: torch.dtype) -> None:
    """As w2: a row of its own for each pair, as wide as the padded intermediate, and n columns without padding."""
    if isinstance(quant, QuantScheme):
        built = packed(quant, experts=3, n=72, k=40, bias=True)
    else:
        built = dense(quant, experts=3, n=72, k=40, k_pad=64, bias=True)
    case = routing(7, 2, 3)
    h = torch.zeros(14, built.weight.k_pad)
    h[:, :40] = torch.randn(14, 40)
    out = run(built, h.to(dtype), case, None, 72, dtype)
    check(built, h.to(dtype), case, None, out)


def test_columns_of_x_beyond_k_are_not_read() -> None:
    """Codes in the padding are 0, which is not the zero point: what stands in x there must not come in."""
    built = packed(scheme(4, None), experts=2, n=64, k=40)
    case = routing(5, 1, 2, holes=False)
    x = torch.randn(5, 64)
    x[:, 40:] = torch.nan
    out = run(built, x, case, 1, 64, torch.float32)
    assert out.isfinite().all()
    check(built, x, case, 1, out)


@pytest.mark.parametrize("experts", [1, 5])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (1, 4), (33, 1)])
def test_few_and_no_rows(experts: int, tokens: int, top_k: int) -> None:
    built = packed(scheme(8, 32, symmetric=False), experts=experts, halves=2, n=64, k=64)
    case = routing(tokens, top_k, experts, holes=False)
    x = torch.randn(tokens, 64)
    out = run(built, x, case, top_k, 128, torch.float32)
    assert out.shape == (tokens * top_k, 128)
    check(built, x, case, top_k, out)


def test_no_pair_has_an_expert() -> None:
    built = packed(scheme(4, 32), experts=2)
    case = Routing(torch.tensor([[-1], [2]]), torch.ones(2, 1))
    assert run(built, torch.randn(2, 64), case, 1, 64, torch.float32).isnan().all()


def test_inputs_without_an_expert_are_not_read() -> None:
    built = packed(scheme(4, 32), experts=2)
    case = Routing(torch.tensor([[0], [-1], [1], [5]]), torch.ones(4, 1))
    x = torch.randn(4, 64)
    clean = run(built, x, case, 1, 64, torch.float32)
    x[[1, 3]] = torch.nan
    assert same_bits(run(built, x, case, 1, 64, torch.float32)[::2], clean[::2])


@DTYPES
@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
def test_adapters_change_no_bit(dtype: torch.dtype, count: int) -> None:
    """Slots order the plan otherwise; the rows of an expert come out the same, whichever are the last of the GEMM."""
    for _ in range(5):
        built = packed(scheme(4, 32), experts=4, halves=2, n=64, k=128)
        case, x = routing(9, 2, 4), torch.randn(9, 128).to(dtype)
        slots = torch.randint(-1, 3, (9,), dtype=torch.int32)
        with threads(count):
            base = run(built, x, case, 2, 128, dtype)
            assert same_bits(run(built, x, replace(case, slots=slots), 2, 128, dtype), base)


def test_each_half_has_its_own_column_order() -> None:
    """One-hot inputs read single columns: exact, and told apart for gate and up."""
    built = packed(scheme(4, 32), experts=2, halves=2, n=64, k=64, act_order=True)
    weight = built.weight
    assert isinstance(weight, PackedWeight) and weight.k_perm is not None
    assert not torch.equal(weight.k_perm[0, 0], weight.k_perm[0, 1])
    case = Routing(torch.tensor([[0, 1]] * 64), torch.ones(64, 2))
    out = run(built, torch.eye(64), case, 2, 128, torch.float32)
    for pair in range(128):
        for half in range(2):
            want = built.value[pair % 2, half, :, pair // 2]
            assert torch.equal(out[pair, 64 * half : 64 * (half + 1)].double(), want)
