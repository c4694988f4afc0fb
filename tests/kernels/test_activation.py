"""The activation step: which pairs, which columns, which weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_moelora.core.activations import ACTIVATIONS, Activation
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.activation.reference import activate
from quant_moelora.kernels.align.reference import align
from tests import builders
from tests.builders import layer, roundoff, routing, same_bits, scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
INTER, PAD = 40, 64


def run(built: builders.Layer, gate_up: torch.Tensor, case: Routing, dtype: torch.dtype) -> torch.Tensor:
    """The output by pair, in a buffer that was poisoned before; gate_up is by pair too."""
    out = torch.full((case.num_pairs, PAD), torch.nan, dtype=dtype)
    plan = align(case, built.info.num_experts)
    given = gate_up[plan.rows.long()]
    before = given.clone()
    assert activate(given, built.info, case, plan, out) is out
    assert same_bits(given, before), "the input is left alone"
    return out[plan.inverse.long()]


@DTYPES
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("router_weight", ["output", "input"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_against_float64(name: Any, router_weight: Any, gated: bool, dtype: torch.dtype) -> None:
    clamped = name == "swigluoai"
    if clamped and not gated:
        return
    activation = Activation(name, gated, **({"alpha": 1.702, "limit": 1.0} if clamped else {}))
    built = layer(scheme(), experts=4, hidden=64, inter=INTER, activation=activation, router_weight=router_weight)
    case = routing(11, 2, 4)
    gate_up = torch.randn(22, activation.halves * PAD)
    # What stands in the columns of the padding must come out as 0 whatever it is.
    gate_up[:, INTER:PAD] = torch.nan
    gate_up[:, PAD + INTER :] = torch.inf
    gate_up = gate_up.to(dtype)
    out = run(built, gate_up, case, dtype)
    for pair, expert in enumerate(case.topk_ids.flatten().tolist()):
        if not 0 <= expert < 4:
            assert out[pair].isnan().all()
            continue
        values = gate_up[pair].double()
        if router_weight == "input":
            values = values * case.topk_weights.flatten()[pair].double()
        gate, up = values[:INTER], values[-PAD:][:INTER]
        want = builders.activate(activation, gate if gated else None, up)
        # Computed in float32, in some ten operations on values of at most about the size of the factors (gelu
        # cancels), then rounded once.
        size = want.abs() + up.abs() * (gate.abs() if gated else 1)
        error = (out[pair, :INTER].double() - want).abs()
        assert (error <= 16 * roundoff(torch.float32) * size + roundoff(dtype) * 1.01 * want.abs() + 1e-7).all()
        assert (out[pair, INTER:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router_weight", ["output", "input"])
def test_float32_values_are_rounded_once(router_weight: Any, dtype: torch.dtype) -> None:
    """gate_up + delta comes in float32: rounded before the function, more than half of the results would differ."""
    built = layer(scheme(), experts=4, inter=INTER, router_weight=router_weight)
    case = routing(20, 2, 4, holes=False)
    gate_up = torch.randn(40, 2 * PAD)
    values = gate_up.double()
    if router_weight == "input":
        values = values * case.topk_weights.flatten().double()[:, None]
    want = builders.activate(built.info.activation, values[:, :INTER], values[:, PAD : PAD + INTER])
    error = (run(built, gate_up, case, dtype)[:, :INTER].double() - want).abs()
    # Half a unit, a hundredth more for float32's own roundings, and float16's subnormals.
    assert (error <= 1.01 * roundoff(dtype) * want.abs() + 2.0**-25).all()


def test_rows_without_an_expert_are_not_written() -> None:
    built = layer(scheme(), experts=2, inter=INTER)
    case = Routing(torch.tensor([[0, 2], [-1, 1]]), torch.ones(2, 2))
    out = run(built, torch.ones(4, 2 * PAD), case, torch.float32)
    assert out.isnan().all(1).tolist() == [False, True, True, False]


def test_the_weight_on_the_input_is_each_pairs_own() -> None:
    """And multiplies before the function: silu(2) * 2 is not 2 * silu(1) * 1."""
    built = layer(scheme(), experts=2, inter=INTER, router_weight="input")
    case = Routing(torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0]]))
    out = run(built, torch.ones(2, 2 * PAD), case, torch.float32)
    silu = Activation("silu")
    assert torch.equal(out[0, 0], silu(torch.tensor([1.0, 1.0]))[0])
    assert torch.equal(out[1, 0], silu(torch.tensor([2.0, 2.0]))[0])


def test_the_weight_on_the_output_is_not_applied_here() -> None:
    built = layer(scheme(), experts=2, inter=INTER)
    case = Routing(torch.tensor([[0, 1]]), torch.tensor([[torch.nan, 0.0]]))
    out = run(built, torch.ones(2, 2 * PAD), case, torch.float32)
    assert torch.equal(out[0], out[1]) and out.isfinite().all()


def test_no_tokens() -> None:
    built = layer(scheme(), experts=1, inter=INTER)
    case = Routing(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    assert run(built, torch.zeros(0, 2 * PAD), case, torch.float32).shape == (0, PAD)
