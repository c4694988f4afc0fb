"""Activations against their formulas with Python's floats, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quant_moelora.core.activations import ACTIVATIONS, Activation
from quant_moelora.core.errors import ShapeError, UnsupportedError

# Zero, both signs, the flat ends of the functions, and values from which exp would overflow in float32.
POINTS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.25, -3.25, 12.0, -12.0, 89.0, -89.0]
GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def formula(name: str, x: float) -> float:
    """act(x) in double precision."""
    if name == "silu":
        return x * sigmoid(x)
    if name == "gelu":
        return x * 0.5 * math.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert name == "relu2"
    return max(x, 0.0) ** 2


def close(got: float, want: float, size: float) -> bool:
    """Within 8 float32 roundings of the size of the operands: some four operations, each of a few units."""
    return abs(got - want) <= 8 * 2.0**-24 * max(abs(want), size) + 1e-37


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "swigluoai"])
def test_gated(name: Any) -> None:
    ups = [1.0, -2.5, 0.0, 7.0]
    gate_up = torch.tensor([[g] * len(ups) + ups for g in POINTS])
    h = Activation(name)(gate_up)
    assert h.dtype == torch.float32 and h.shape == (len(POINTS), len(ups))
    for g, row in zip(POINTS, h.tolist(), strict=True):
        for up, value in zip(ups, row, strict=True):
            # gelu_tanh cancels 1 + tanh where x is large and negative: its error has the size of x.
            assert close(value, formula(name, g) * up, abs(g * up))


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "swigluoai"])
def test_without_a_gate(name: Any) -> None:
    h = Activation(name, gated=False)(torch.tensor([POINTS]))
    assert h.shape == (1, len(POINTS))
    for x, value in zip(POINTS, h[0].tolist(), strict=True):
        assert close(value, formula(name, x), abs(x))


def clamped(gate: float, up: float, alpha: float, limit: float) -> float:
    """The swiglu of gpt-oss in double precision."""
    gate, up = min(gate, limit), max(-limit, min(up, limit))
    return gate * sigmoid(alpha * gate) * (up + 1)


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (1.0, 2.5)])
def test_swigluoai_at_and_beyond_its_limits(alpha: float, limit: float) -> None:
    edges = [limit, -limit, limit + 0.5, -limit - 0.5, 100.0, -100.0, limit - 0.25, -limit + 0.25, 0.0, -1.0, 1.0]
    pairs = [(gate, up) for gate in edges for up in edges]
    h = Activation("swigluoai", alpha=alpha, limit=limit)(torch.tensor(pairs))
    for (gate, up), (value,) in zip(pairs, h.tolist(), strict=True):
        want = clamped(gate, up, alpha, limit)
        # alpha * gate is rounded before the exponential: its error grows with its size.
        assert abs(value - want) <= 8 * 2.0**-24 * (1 + abs(alpha * gate)) * abs(want) + 1e-37


def test_swigluoai_clamps_the_gate_from_above_only() -> None:
    swiglu = Activation("swigluoai", **GPT_OSS)
    high, limit, low, low_limit = swiglu(torch.tensor([[50.0, 1.0], [7.0, 1.0], [-7.5, 1.0], [-7.0, 1.0]])).flatten()
    assert high == limit
    assert low != low_limit
    below, above = swiglu(torch.tensor([[1.0, -50.0], [1.0, 50.0]])).flatten()
    assert below == swiglu(torch.tensor([[1.0, -7.0]])) and above == swiglu(torch.tensor([[1.0, 7.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_computed_in_float32_from_any_dtype(name: Any, dtype: torch.dtype) -> None:
    activation = Activation(name, **(GPT_OSS if name == "swigluoai" else {}))
    x = torch.randn(5, 12).to(dtype)
    h = activation(x)
    assert h.dtype == torch.float32
    assert torch.equal(h, activation(x.float()))


def test_leading_dims_and_no_rows() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(Activation("silu")(x)[1, 2], Activation("silu")(x[1, 2]))
    assert Activation("silu")(x[:0]).shape == (0, 3, 4)


def test_the_input_is_left_alone() -> None:
    x = torch.tensor([[9.0, 9.0]])
    Activation("swigluoai", **GPT_OSS)(x)
    assert x.tolist() == [[9.0, 9.0]]


@pytest.mark.parametrize(("gated", "halves"), [(True, 2), (False, 1)])
def test_halves(gated: bool, halves: int) -> None:
    assert Activation("relu2", gated=gated).halves == halves


def test_odd_columns() -> None:
    with pytest.raises(
        ShapeError, match=r"gate_up: got 7 columns, expected an even number, gate then up; .*gated=False"
    ):
        Activation("silu")(torch.zeros(2, 7))
    assert Activation("silu", gated=False)(torch.zeros(2, 7)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "swish"}, "activation: got swish, expected one of silu, gelu, gelu_tanh, relu2, swigluoai; add"),
        ({"name": "swigluoai"}, "activation swigluoai: got alpha=None, limit=None, gated=True, expected alpha, limit"),
        ({"name": "swigluoai", "alpha": 1.702}, "activation swigluoai: got alpha=1.702, limit=None"),
        ({"name": "swigluoai", "limit": 7.0}, "activation swigluoai: got alpha=None, limit=7.0"),
        ({"name": "swigluoai", "gated": False, **GPT_OSS}, "gated=False, expected alpha, limit and a gate"),
        ({"name": "silu", "limit": 7.0}, "activation silu: got alpha=None, limit=7.0, .*neither alpha nor limit"),
        ({"name": "gelu", "alpha": 1.0}, "activation gelu: got alpha=1.0, .*; take them from the model's config"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Activation(**arguments)
