"""The kernels between and behind the GEMMs: activation, weighted sum, x in the order of an act-ordered weight."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation, ActivationName
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.activation.launch import activate
from quant_moelora.kernels.align import reference
from quant_moelora.kernels.by_half.launch import by_half
from quant_moelora.kernels.moe_sum.launch import moe_sum
from tests import builders
from tests.builders import packed, roundoff, routing, scheme
from tests.launched.cases import DEVICE, DTYPES, EACH_DTYPE, MARKS, crossed, poison, prepared

pytestmark = MARKS
EXPERTS = 4
ROUTER_WEIGHT = ("output", "input")
PARTS = (0, 1, 2, 4)  # 0 is a GEMM's output, 1 the same in float32 (with an adapter's delta), more are partial sums
NAMES = [name for name in get_args(ActivationName) if name != "swigluoai"]
FUNCTIONS = [Activation(name, gated) for name in NAMES for gated in (True, False)]
FUNCTIONS.append(Activation("swigluoai", alpha=1.702, limit=1.0))


def given(shape: tuple[int, int], parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a kernel reads, in ``dtype`` or float32 parts, and the values it means, float64."""
    if not parts:
        whole = torch.randn(shape).to(dtype)
        return whole, whole.double()
    values = torch.randn(parts, *shape)
    total = values[0]
    for part in values[1:]:
        total = total + part
    return (values[0], total.double()) if parts == 1 else (values, total.to(dtype).double())


def on_device(case: Routing, weighted: bool) -> tuple[Tensor, Tensor | None]:
    """Ids, and weights for a kernel that has to apply them."""
    return case.topk_ids.to(DEVICE), case.topk_weights.to(DEVICE) if weighted else None


def order(case: Routing, in_order: bool) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """Pair of each row and row of each pair as the launch takes them, and the pair of each row."""
    if not in_order:
        return None, None, list(range(case.num_pairs))
    plan = reference.align(case, EXPERTS)
    return plan.rows.to(DEVICE), plan.inverse.to(DEVICE), plan.rows.tolist()


@crossed(
    inter=[40, 1060],
    activation=FUNCTIONS,
    router_weight=ROUTER_WEIGHT,
    in_order=[False, True],
    parts=PARTS,
    dtype=DTYPES,
)
def test_activation(
    inter: int, activation: Activation, router_weight: str, in_order: bool, parts: int, dtype: torch.dtype
) -> None:
    pad, gated = packing.padded_columns(inter, 64), activation.gated
    case = routing(5, 2, EXPERTS)
    gate_up, values = given((10, activation.halves * pad), parts, dtype)
    rows, _, pairs = order(case, in_order)
    for columns in range(inter, activation.halves * pad, pad):  # what stands in the padding must not matter
        gate_up[..., columns : columns + pad - inter] = torch.nan
    out = poison(10, pad, dtype=dtype)
    ids, weights = on_device(case, router_weight == "input")
    dims = {"num_experts": EXPERTS, "inter": inter}
    assert activate(gate_up.to(DEVICE), activation, ids, weights, rows, out, **dims) is out
    out = out.cpu()
    for row, pair in enumerate(pairs):
        if not 0 <= int(case.topk_ids.flatten()[pair]) < EXPERTS:
            assert out[row].isnan().all()
            continue
        weight = float(case.topk_weights.flatten()[pair]) if router_weight == "input" else 1.0
        gate, up = (values[row] * weight)[:inter], (values[row] * weight)[-pad:][:inter]
        want = builders.activate(activation, gate if gated else None, up)
        # Some ten operations in float32 on values of about the size of the factors (gelu cancels), one rounding.
        size = want.abs() + up.abs() * (gate.abs() if gated else 1)
        bound = 32 * roundoff(torch.float32) * size + 1.01 * roundoff(dtype) * want.abs() + 1e-7
        assert ((out[row, :inter].double() - want).abs() <= bound).all()
        assert (out[row, inter:] == 0).all()


@crossed(
    tokens_top_k_hidden=[(5, 1, 72), (7, 2, 200), (3, 5, 64)],
    router_weight=ROUTER_WEIGHT,
    in_order=[False, True],
    parts=PARTS,
    dtype=DTYPES,
)
def test_moe_sum(
    tokens_top_k_hidden: tuple[int, int, int], router_weight: str, in_order: bool, parts: int, dtype: torch.dtype
) -> None:
    tokens, top_k, hidden = tokens_top_k_hidden
    case = routing(tokens, top_k, EXPERTS)
    case.topk_ids[0] = torch.tensor([-1, EXPERTS, 99, -7, EXPERTS])[:top_k]  # a token without any expert
    held = (case.topk_ids >= 0) & (case.topk_ids < EXPERTS)
    case.topk_weights[~held] = torch.nan  # which nobody may read, nor the rows
    y, values = given((tokens * top_k, hidden), parts, dtype)
    _, inverse, pairs = order(case, in_order)
    for row, pair in enumerate(pairs):
        if not held.flatten()[pair]:
            y[..., row, :] = torch.nan
    out = poison(tokens, hidden, dtype=dtype)
    ids, weights = on_device(case, router_weight == "output")
    assert moe_sum(y.to(DEVICE), ids, weights, inverse, out, num_experts=EXPERTS) is out
    out = out.cpu()
    assert (out[0] == 0).all()
    for token in range(tokens):
        want, size = torch.zeros(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)
        for j in range(top_k):
            pair = token * top_k + j
            if held[token, j]:
                weight = float(case.topk_weights[token, j]) if router_weight == "output" else 1.0
                want += weight * values[pairs.index(pair)]
                size += abs(weight) * values[pairs.index(pair)].abs()
        # A product and a sum for each pair in float32, then one rounding.
        growth = 2 * top_k * roundoff(torch.float32) * size
        bound = growth + 1.01 * roundoff(dtype) * (want.abs() + growth) + 2.0**-25  # half of float16's least subnormal
        assert ((out[token].double() - want).abs() <= bound).all()


@EACH_DTYPE
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("k", "top_k"), [(64, 2), (72, 1), (1096, 3)], ids=str)
def test_by_half(k: int, top_k: int, halves: int, dtype: torch.dtype) -> None:
    weight = packed(scheme(4, 64), experts=EXPERTS, halves=halves, k=k, act_order=True).weight
    assert weight.k_perm is not None
    case = routing(6, top_k, EXPERTS)
    plan = reference.align(case, EXPERTS)
    x = torch.randn(6, k).to(dtype)
    out = poison(halves, case.num_pairs, weight.k_pad, dtype=dtype)
    ids, rows = case.topk_ids.to(DEVICE), plan.rows.to(DEVICE)
    assert by_half(x.to(DEVICE), prepared(weight.to(DEVICE), dtype), ids, rows, out) is out
    for row, pair in enumerate(plan.rows.tolist()):
        expert = int(case.topk_ids.flatten()[pair])
        for half in range(halves):
            if not 0 <= expert < EXPERTS:
                assert out[half, row].isnan().all()
                continue
            columns = weight.k_perm[expert, half].tolist()
            want = torch.tensor([float(x[pair // top_k, c]) if c >= 0 else 0.0 for c in columns]).to(dtype)
            assert torch.equal(out[half, row].cpu(), want)


def test_no_tokens() -> None:
    ids, weights, rows = (torch.zeros(shape, device=DEVICE) for shape in ((0, 2), (0, 2), (0,)))
    ids, rows = ids.int(), rows.int()
    nothing = torch.zeros(0, 128, dtype=torch.float16, device=DEVICE)
    silu, dims = Activation("silu"), {"num_experts": EXPERTS, "inter": 40}
    assert activate(nothing, silu, ids, weights, rows, nothing[:, :64], **dims).shape == (0, 64)
    assert moe_sum(nothing[:, :64], ids, weights, rows, nothing[:, :64], num_experts=EXPERTS).shape == (0, 64)
    weight = packed(scheme(4, 64), experts=EXPERTS, act_order=True).weight.to(DEVICE)
    out = torch.zeros(1, 0, 64, dtype=torch.float16, device=DEVICE)
    assert by_half(nothing[:, :64], prepared(weight, torch.float16), ids, rows, out) is out
