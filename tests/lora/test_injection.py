"""LoRAInjection: when it is built, what the base's callables get from it, and that other rows stay as they were."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.injection import ActivationCallable, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.align.reference import align
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.experts import load_experts
from quant_moelora.lora.adapter_file import LayerFactors
from quant_moelora.lora.bank import build_context
from quant_moelora.lora.injection import LoRAInjection
from tests.adapters import PROJECTIONS, dense_info, random_factors

TOKENS, TOP_K = 9, 2


class RecordingBase:
    """A base injection that only notes what it is called with."""

    ctx: MoELoRAContext | None = None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self) -> None:
        self.calls: list[tuple[str, Tensor]] = []

        def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            self.calls.append(("activation", gate_up))
            return out

        def moe_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
            self.calls.append(("moe_sum", y))
            return out

        self.activation = activation
        self.moe_sum = moe_sum

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        self.calls.append(("begin", x))


def adapters_for(info: MoEQuantInfo) -> list[LayerFactors]:
    return [
        random_factors(info, {"gate": 3, "up": 5, "down": 2}, seed=1),
        random_factors(info, {"gate": 4, "up": 4, "down": 4}, shared=True, seed=2),
        random_factors(info, {"down": 3}, experts=[1], seed=3),
        random_factors(info, {"up": 2}, experts=[0, 1], seed=4),
    ]


def random_routing(experts: int, slots: int, tokens: int = TOKENS) -> Routing:
    ids = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)])
    chosen = torch.arange(tokens) % (slots + 1) - 1  # -1 is the base
    return Routing(ids, torch.rand(tokens, TOP_K), chosen.to(torch.int32))


def pair_deltas(info: MoEQuantInfo, adapters: list[LayerFactors], routing: Routing, x: Tensor, h: Tensor) -> Tensor:
    """float64 [P, 3 * inter_pad or hidden]: delta of gate and up in the stored order, then delta of down."""
    assert routing.slots is not None and info.inter_perm is not None
    pad, inter = info.inter_pad, info.intermediate_size
    deltas = torch.zeros(routing.num_pairs, 2 * pad + info.hidden_size, dtype=torch.float64)
    for token, column in itertools.product(range(routing.num_tokens), range(routing.top_k)):
        slot, expert = int(routing.slots[token]), int(routing.topk_ids[token, column])
        order = info.inter_perm[expert].long()
        pair = token * routing.top_k + column
        for projection, begin in zip(PROJECTIONS, (0, pad, 2 * pad), strict=True):
            factor = adapters[slot].get((expert, projection)) if slot >= 0 else None
            if factor is None:
                continue
            product = factor.scaling * factor.b.double() @ factor.a.double()
            if projection == "down":
                deltas[pair, begin:] = product[:, order] @ h[pair, :inter].double()
            else:
                deltas[pair, begin : begin + inter] = product[order] @ x[token].double()
    return deltas


def steps(info: MoEQuantInfo, dtype: torch.dtype) -> tuple[RecordingBase, list[tuple[Tensor, Tensor]], Tensor]:
    """One forward's calls on random intermediates: base, (before, given to the base) of gate_up and y, deltas.

    All of them, and the deltas, are in the plan's sorted order.
    """
    adapters = adapters_for(info)
    routing = random_routing(info.num_experts, len(adapters))
    plan, ws, base = align(routing, info.num_experts), Workspace(info.device), RecordingBase()
    injection = LoRAInjection(base, build_context(info, adapters, torch.float32), info)
    x = torch.randn(TOKENS, info.hidden_size).to(dtype)
    gate_up = torch.randn(routing.num_pairs, 2 * info.inter_pad).to(dtype)
    h = torch.randn(routing.num_pairs, info.inter_pad).to(dtype)
    h[:, info.intermediate_size :] = 0  # as the activation leaves them
    y = torch.randn(routing.num_pairs, info.hidden_size).to(dtype)
    before = (gate_up.clone(), y.clone())
    injection.begin(x, routing, plan, ws)
    injection.activation(x, gate_up, h, routing, plan, ws)
    injection.moe_sum(h, y, torch.empty_like(x), routing, plan, ws)
    assert torch.equal(gate_up, before[0]) and torch.equal(y, before[1]), "what the GEMMs stored is not written to"
    given = [tensor for _, tensor in base.calls]
    deltas = pair_deltas(info, adapters, routing, x, h[plan.inverse.long()])
    return base, list(zip(before, given, strict=True)), deltas[plan.rows.long()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_callables_get_float32_values_plus_delta_once(dtype: torch.dtype) -> None:
    info = dense_info()
    base, pairs, deltas = steps(info, dtype)
    assert [name for name, _ in base.calls] == ["activation", "moe_sum"]
    for (before, given), delta in zip(pairs, deltas.split([2 * info.inter_pad, info.hidden_size], dim=1), strict=True):
        assert given.dtype == torch.float32
        # Two products of at most 20 terms of about 1, accumulated in float32: 2**-24 * sqrt(20) * 2, rounded up.
        torch.testing.assert_close(given.double(), before.double() + delta, rtol=0, atol=2**-24 * 40)
        untouched = (delta == 0).all(1)
        assert untouched.any() and not untouched.all()
        assert torch.equal(given[untouched], before[untouched].to(torch.float32)), "a row without delta, bit for bit"


def test_closures_are_built_when_adapters_are_attached_and_never_in_a_forward() -> None:
    info = dense_info()
    moe = MoEExperts(info)
    base = moe.injection
    assert base.ctx is None
    ctx = build_context(info, adapters_for(info), torch.float32)
    moe.attach(ctx)
    injection = moe.injection
    activation, moe_sum = injection.activation, injection.moe_sum
    assert injection is not base and injection.ctx is ctx
    for tokens in (TOKENS, 1, TOKENS):
        routing = random_routing(info.num_experts, 4, tokens)
        moe(torch.randn(tokens, info.hidden_size), routing.topk_ids, routing.topk_weights, routing.slots)
        assert moe.injection is injection
        assert injection.activation is activation and injection.moe_sum is moe_sum and injection.ctx is ctx
    moe.attach(None)
    assert moe.injection is base
    with pytest.raises(AdapterError, match="no adapter is attached"):
        moe(torch.randn(1, info.hidden_size), torch.tensor([[0, 1]]), torch.rand(1, 2), torch.tensor([0]))


def test_the_base_callables_are_those_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closures wrap what they were given and call nothing else of it, whatever happens to the base later."""
    base = RecordingBase()
    info = dense_info()
    injection = LoRAInjection(base, build_context(info, adapters_for(info), torch.float32), info)
    other: Callable[..., Tensor] = lambda *args: pytest.fail("looked up in a forward")  # noqa: E731
    monkeypatch.setattr(base, "activation", other)
    monkeypatch.setattr(base, "moe_sum", other)
    routing = random_routing(info.num_experts, 4)
    plan, ws = align(routing, info.num_experts), Workspace(info.device)
    x = torch.randn(TOKENS, info.hidden_size)
    injection.begin(x, routing, plan, ws)
    injection.activation(x, torch.randn(18, 40), torch.randn(18, 20), routing, plan, ws)
    injection.moe_sum(torch.zeros(18, 20), torch.randn(18, 16), torch.empty_like(x), routing, plan, ws)
    assert [name for name, _ in base.calls] == ["activation", "moe_sum"]


def layer_by_definition(info: MoEQuantInfo, adapters: list[LayerFactors], routing: Routing, x: Tensor) -> Tensor:
    """The layer in float64 with each token's merged weights W + scaling * B A."""
    gate, up, down = info.dequantize()
    assert routing.slots is not None and gate is not None
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, column in itertools.product(range(routing.num_tokens), range(routing.top_k)):
        slot, expert = int(routing.slots[token]), int(routing.topk_ids[token, column])
        merged: list[Tensor] = []
        for projection, weight in zip(PROJECTIONS, (gate, up, down), strict=True):
            factor = adapters[slot].get((expert, projection)) if slot >= 0 else None
            delta = 0 if factor is None else factor.scaling * factor.b.double() @ factor.a.double()
            merged.append(weight[expert].double() + delta)
        row = x[token].double()
        hidden = torch.nn.functional.silu(merged[0] @ row) * (merged[1] @ row)
        out[token] += float(routing.topk_weights[token, column]) * (merged[2] @ hidden)
    return out


LAYERS = {"act-order": "gptq-mixtral-int4-g32-descact", "padded": "ct-qwen3moe-w4a16-g32-asym-rtn"}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantised_layer_equals_merged_weights(golden: Path, kind: str, device: torch.device) -> None:
    """Act-order permutes the intermediate (128); the other layer's is padded (96 to 128)."""
    info = load_experts(golden / "checkpoints" / LAYERS[kind], 1)
    assert (info.inter_perm is not None) == (kind == "act-order")
    assert (info.inter_pad > info.intermediate_size) == (kind == "padded")
    adapters = adapters_for(info)
    routing = random_routing(info.num_experts, len(adapters), 20)
    x = torch.randn(20, info.hidden_size)
    moe = MoEExperts(info.to(device))
    moe.attach(build_context(moe.info, adapters, torch.float32))
    assert routing.slots is not None
    got = moe(*(tensor.to(device) for tensor in (x, routing.topk_ids, routing.topk_weights, routing.slots)))
    expected = layer_by_definition(info, adapters, routing, x)
    # Two GEMMs in a row with K = 128, and LoRA's, each with a relative error of about 2**-24 * sqrt(128).
    bound = 2**-24 * math.sqrt(128) * 2
    assert float((got.cpu() - expected).norm() / expected.norm()) < bound
    base = layer_by_definition(info, [{} for _ in adapters], routing, x)
    assert float((base - expected).norm() / expected.norm()) > 0.1, "the adapters hardly matter here"


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_rows_without_an_adapter_are_bitwise_those_of_the_base(golden: Path, tokens: int, device: torch.device) -> None:
    info = load_experts(golden / "checkpoints" / LAYERS["padded"], 0)
    moe = MoEExperts(info.to(device))
    ctx = build_context(moe.info, adapters_for(info), torch.float32)
    for seed in range(5):
        torch.manual_seed(seed)
        routing = random_routing(info.num_experts, 4, tokens)
        assert routing.slots is not None
        shuffled = routing.slots[torch.randperm(tokens)]
        x = torch.randn(tokens, info.hidden_size)
        inputs = [tensor.to(device) for tensor in (x, routing.topk_ids, routing.topk_weights)]
        moe.attach(None)
        expected = moe(*inputs)
        moe.attach(ctx)
        got = moe(*inputs, shuffled.to(device))
        assert torch.equal(got[shuffled == -1], expected[shuffled == -1])
        assert torch.equal(moe(*inputs), expected), "no ids at all"
