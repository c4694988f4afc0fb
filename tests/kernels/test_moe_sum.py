"""The weighted sum over a token's pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.moe_sum.reference import moe_sum
from tests.builders import Layer, layer, roundoff, routing, same_bits, scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EXPERTS, HIDDEN = 4, 72


def built(router_weight: Any = "output") -> Layer:
    return layer(scheme(), experts=EXPERTS, hidden=HIDDEN, router_weight=router_weight)


def run(router_weight: str, y: torch.Tensor, case: Routing, dtype: torch.dtype) -> torch.Tensor:
    """The output in a buffer that was poisoned before; y is by pair."""
    out = torch.full((case.num_tokens, HIDDEN), torch.nan, dtype=dtype)
    plan = align(case, EXPERTS)
    given = y[plan.rows.long()]
    before = given.clone()
    assert moe_sum(given, built(router_weight).info, case, plan, out) is out
    assert same_bits(given, before), "the input is left alone"
    return out


@DTYPES
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router_weight", ["output", "input"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_against_float64(router_weight: str, y_dtype: torch.dtype, dtype: torch.dtype, top_k: int) -> None:
    case = routing(13, top_k, EXPERTS)
    y = torch.randn(13 * top_k, HIDDEN).to(y_dtype)
    missing = (case.topk_ids < 0) | (case.topk_ids >= EXPERTS)
    y[missing.flatten()] = torch.nan  # nobody wrote these rows
    out = run(router_weight, y, case, dtype)
    for token in range(13):
        want, size = torch.zeros(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
        for j in range(top_k):
            if missing[token, j]:
                continue
            weight = 1.0 if router_weight == "input" else float(case.topk_weights[token, j])
            want += weight * y[token * top_k + j].double()
            size += abs(weight) * y[token * top_k + j].double().abs()
        # A product and a sum for each pair in float32, each one rounding of at most the sum of absolute values; one
        # rounding to the output's dtype.
        growth = 2 * top_k * roundoff(torch.float32) * size
        assert ((out[token].double() - want).abs() <= growth + roundoff(dtype) * (want.abs() + growth)).all()


@pytest.mark.parametrize("router_weight", ["output", "input"])
def test_a_token_without_any_expert_is_zero(router_weight: str) -> None:
    case = Routing(torch.tensor([[-1, EXPERTS], [0, 99]]), torch.ones(2, 2))
    y = torch.full((4, HIDDEN), torch.nan)
    y[2] = 3.0
    out = run(router_weight, y, case, torch.float32)
    assert (out[0] == 0).all() and (out[1] == 3.0).all()


@pytest.mark.parametrize("weight", [torch.nan, torch.inf, -torch.inf])
def test_the_weight_of_a_pair_without_an_expert_is_not_read(weight: float) -> None:
    """Left out by id: neither its row nor its router weight reaches the sum."""
    case = Routing(torch.tensor([[0, -1]]), torch.tensor([[2.0, weight]]))
    y = torch.ones(2, HIDDEN)
    assert (run("output", y, case, torch.float32) == 2.0).all()


@pytest.mark.parametrize("weight", [0.0, -1.5])
def test_zero_and_negative_weights_count(weight: float) -> None:
    """A weight of 0 is not a missing expert: NaN of a computed row shows."""
    case = Routing(torch.tensor([[0, 1]]), torch.tensor([[1.0, weight]]))
    y = torch.ones(2, HIDDEN)
    assert (run("output", y, case, torch.float32) == 1.0 + weight).all()
    y[1] = torch.nan
    assert run("output", y, case, torch.float32).isnan().all()


def test_the_weight_is_not_applied_twice() -> None:
    case = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.25, torch.nan]]))
    assert (run("input", torch.ones(2, HIDDEN), case, torch.float32) == 2.0).all()


def test_rounded_once() -> None:
    """1 + 2^-9 + 2^-9 in bfloat16: a sum rounded after each step stays at 1."""
    case = Routing(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4))
    y = torch.full((4, HIDDEN), 2.0**-9)
    y[0] = 1.0
    y[3] = 2.0**-7
    assert (run("output", y.to(torch.bfloat16), case, torch.bfloat16) == 1.0 + 2.0**-7 + 2.0**-7).all()


def test_no_tokens() -> None:
    case = Routing(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    assert run("output", torch.zeros(0, HIDDEN), case, torch.float32).shape == (0, HIDDEN)
