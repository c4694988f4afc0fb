"""Shrink and expand against float64, with tolerances from the size of the delta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.lora.reference import expand2, expand13, shrink2, shrink13
from tests.builders import SILU, Adapter, Layer, adapter, context, delta, layer, roundoff, routing, same_bits, scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EXPERTS, HIDDEN, INTER, PAD = 3, 72, 40, 64


def built(*, gated: bool = True, act_order: bool = False) -> Layer:
    activation = SILU if gated else Activation("relu2", gated=False)
    return layer(scheme(), experts=EXPERTS, hidden=HIDDEN, inter=INTER, activation=activation, act_order=act_order)


def adapters(layer: Layer, dtype: torch.dtype) -> list[Adapter]:
    """Every form: ranks differ by adapter and projection; A of gate and up shared or not; experts missing."""
    both, info = {"gate": 4, "up": 4}, layer.info
    if not info.activation.gated:
        return [
            adapter(info, dtype, ranks={"up": 4, "down": 2}),
            adapter(info, dtype, ranks={"up": 3}, scaling=-2.0, experts=[1]),
            adapter(info, dtype, ranks={"down": 8}, scaling=0.5, experts=[0, 2]),
        ]
    mixed = adapter(info, dtype, ranks={"gate": 2, "up": 5, "down": 3}, scaling=-2.0, experts=[0])
    mixed |= adapter(info, dtype, ranks={"gate": 6}, scaling=3.0, experts=[1])
    return [
        adapter(info, dtype, ranks=both | {"down": 4}, shared=True),
        mixed,
        adapter(info, dtype, ranks={"gate": 3}, scaling=0.5, experts=[2, 0]),
        adapter(info, dtype, ranks={"up": 7}, scaling=1.25, experts=[1, 2]),
        adapter(info, dtype, ranks={"down": 9}, scaling=-0.75, experts=[1]),
        adapter(info, dtype, ranks=both, shared=False),
        {},
        adapter(info, dtype, ranks={"gate": 1, "up": 1, "down": 1}, scaling=0.0),
    ]


def some_routing(held: Sequence[Adapter], tokens: int = 40, top_k: int = 2) -> Routing:
    return routing(tokens, top_k, EXPERTS, slots=torch.randint(-1, len(held), (tokens,), dtype=torch.int32))


def pairs(case: Routing) -> list[tuple[int, int, int]]:
    """(pair, expert or -1, slot) of every pair."""
    assert case.slots is not None
    slots = case.slots.tolist()
    ids = case.topk_ids.flatten().tolist()
    return [(p, e if 0 <= e < EXPERTS else -1, slots[p // case.top_k]) for p, e in enumerate(ids)]


def assert_delta(got: Tensor, base: Tensor, want: Tensor, k: int) -> None:
    """``got`` is ``base`` (float32 both) plus the delta.

    Two float32 products of k and r terms bring errors of some sqrt(k) roundings of the delta's typical size; the sum is
    rounded once, at the size of base + delta. Both stay far below 1e-4 of the delta, so that no fault hides.
    """
    u, size = roundoff(torch.float32), float(want.norm() / math.sqrt(want.numel()))
    error = (got.double() - base.double() - want).abs()
    bound = 8 * math.sqrt(k) * u * (size + want.abs()) + 2 * u * base.double().abs()
    assert float(bound.max()) < 1e-4 * size, "the tolerance hides the delta"
    assert (error <= bound).all()


def run13(x: Tensor, ctx: MoELoRAContext, case: Routing, base: Tensor) -> Tensor:
    """gate_up by pair with the deltas, v having been poisoned before; base is by pair too."""
    plan = align(case, EXPERTS)
    v = torch.full((case.num_pairs, ctx.v13_width), torch.nan)
    assert shrink13(x, ctx, plan, case.top_k, v) is v
    gate_up = base[plan.rows.long()]
    assert expand13(v, ctx, plan, gate_up) is gate_up
    return gate_up[plan.inverse.long()]


def run2(h: Tensor, ctx: MoELoRAContext, case: Routing, base: Tensor) -> Tensor:
    """y by pair with the deltas, v having been poisoned before; h and base are by pair too."""
    plan = align(case, EXPERTS)
    v = torch.full((case.num_pairs, ctx.v2_width), torch.nan)
    assert shrink2(h[plan.rows.long()], ctx, plan, v) is v
    y = base[plan.rows.long()]
    assert expand2(v, ctx, plan, y) is y
    return y[plan.inverse.long()]


def stored(layer: Layer, expert: int, values: Tensor) -> Tensor:
    """Values of the logical intermediate in the stored order, without padding."""
    perm = layer.info.inter_perm
    return values if perm is None else values[perm[expert].long()]


@DTYPES
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_gate_and_up(dtype: torch.dtype, gated: bool, act_order: bool) -> None:
    layer = built(gated=gated, act_order=act_order)
    held = adapters(layer, dtype)
    case, x = some_routing(held), torch.randn(40, HIDDEN).to(dtype)
    halves = 2 if gated else 1
    base = torch.randn(case.num_pairs, halves * PAD)
    got = run13(x, context(layer.info, held, dtype), case, base)
    for pair, expert, slot in pairs(case):
        for half, name in enumerate(("gate", "up") if gated else ("up",)):
            lora = held[slot].get((expert, name)) if slot >= 0 else None
            columns = slice(half * PAD, half * PAD + INTER)
            if lora is None:
                assert torch.equal(got[pair, columns], base[pair, columns])
                continue
            want = stored(layer, expert, delta(lora, x[pair // 2].double()))
            if lora.scaling:
                assert_delta(got[pair, columns], base[pair, columns], want, HIDDEN)
            padding = slice(half * PAD + INTER, (half + 1) * PAD)
            assert torch.equal(got[pair, padding], base[pair, padding])


@DTYPES
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_down(dtype: torch.dtype, act_order: bool) -> None:
    layer = built(act_order=act_order)
    held = adapters(layer, dtype)
    case = some_routing(held)
    h = torch.zeros(case.num_pairs, PAD)
    logical = torch.randn(case.num_pairs, INTER).to(dtype)
    for pair, expert, _ in pairs(case):
        h[pair, :INTER] = stored(layer, max(expert, 0), logical[pair].float())
    base = torch.randn(case.num_pairs, HIDDEN)
    got = run2(h.to(dtype), context(layer.info, held, dtype), case, base)
    for pair, expert, slot in pairs(case):
        lora = held[slot].get((expert, "down")) if slot >= 0 else None
        if lora is None:
            assert same_bits(got[pair], base[pair])
        elif lora.scaling:
            assert_delta(got[pair], base[pair], delta(lora, logical[pair].double()), INTER)


@pytest.mark.parametrize("step", ["shrink13", "shrink2"])
def test_shrink_writes_v_where_there_is_a_factor(step: str) -> None:
    """Exactly the columns of the factor's rows: gate's, then up's from up_col on; nothing else."""
    layer = built()
    held = adapters(layer, torch.float32)
    ctx, case = context(layer.info, held, torch.float32), some_routing(held)
    plan = align(case, EXPERTS)
    v = torch.full((case.num_pairs, max(ctx.v13_width, ctx.v2_width)), torch.nan)
    if step == "shrink13":
        rows = torch.randn(40, HIDDEN)
        shrink13(rows, ctx, plan, 2, v)
        rows = rows.repeat_interleave(2, 0)
    else:
        rows = torch.randn(case.num_pairs, PAD)
        shrink2(rows[plan.rows.long()], ctx, plan, v)
    v = v[plan.inverse.long()]
    for pair, expert, slot in pairs(case):
        loras = held[slot] if slot >= 0 else {}
        names = ("gate", "up") if step == "shrink13" else ("down",)
        factors = [loras[expert, name].a for name in names if (expert, name) in loras]
        if len(factors) == 2 and factors[0] is factors[1]:
            factors.pop()
        a = torch.cat(factors) if factors else torch.zeros(0, 1)
        want = a.double() @ rows[pair, : a.shape[1]].double()
        size = a.double().abs() @ rows[pair, : a.shape[1]].double().abs()
        error = (v[pair, : len(want)].double() - want).abs()
        assert (error <= 4 * math.sqrt(HIDDEN) * roundoff(torch.float32) * size).all()
        assert v[pair, len(want) :].isnan().all()


def test_rows_without_an_adapter_keep_their_bits() -> None:
    """NaN with a payload, -0.0 and infinities included: such rows are not touched at all."""
    layer = built()
    held = [adapter(layer.info, torch.float32, ranks={"gate": 2, "up": 3, "down": 4}, experts=[0])]
    ctx = context(layer.info, held, torch.float32)
    case = replace(some_routing(held), slots=torch.tensor([-1, 0] * 20, dtype=torch.int32))
    odd = torch.tensor([0x7FC12345, -(2**31), 0x7F800000, 1], dtype=torch.int32)
    gate_up, y = odd.repeat(80, 2 * PAD // 4).view(torch.float32), odd.repeat(80, HIDDEN // 4).view(torch.float32)
    x, h = torch.full((40, HIDDEN), torch.nan), torch.full((80, PAD), torch.nan)
    untouched = [pair for pair, expert, slot in pairs(case) if slot < 0 or expert != 0]
    assert 40 < len(untouched) < 80
    assert same_bits(run13(x, ctx, case, gate_up)[untouched], gate_up[untouched])
    assert same_bits(run2(h, ctx, case, y)[untouched], y[untouched])


def test_no_adapter_in_the_batch() -> None:
    layer = built()
    ctx = context(layer.info, adapters(layer, torch.float32), torch.float32)
    for slots in (None, torch.full((8,), -1, dtype=torch.int32)):
        case = routing(8, 2, EXPERTS, slots=slots)
        base = torch.randn(16, 2 * PAD)
        assert same_bits(run13(torch.randn(8, HIDDEN), ctx, case, base), base)


def test_shared_and_separate_a_mean_the_same() -> None:
    """The fused form holds one A; written out twice it gives the same deltas."""
    layer = built()
    shared = adapter(layer.info, torch.float32, ranks={"gate": 4, "up": 4}, shared=True)
    separate = {key: replace(lora, a=lora.a.clone()) for key, lora in shared.items()}
    case = routing(12, 2, EXPERTS, slots=torch.zeros(12, dtype=torch.int32))
    x, base = torch.randn(12, HIDDEN), torch.zeros(24, 2 * PAD)
    one, two = (context(layer.info, [held], torch.float32) for held in (shared, separate))
    assert one.up_col.tolist() == [[0] * EXPERTS] and two.up_col.tolist() == [[4] * EXPERTS]
    assert one.max_rank == two.max_rank == 4
    torch.testing.assert_close(run13(x, one, case, base), run13(x, two, case, base), rtol=1e-5, atol=1e-6)


def test_the_order_of_the_slots_is_the_adapters_own() -> None:
    """The same adapters in other slots, with the tokens following: not a bit differs."""
    layer = built()
    held = adapters(layer, torch.float32)
    case, x = some_routing(held), torch.randn(40, HIDDEN)
    assert case.slots is not None
    order = torch.randperm(len(held))
    inverse = order.argsort()
    moved = torch.where(case.slots < 0, -1, inverse[case.slots.clamp(min=0).long()]).to(torch.int32)
    base = torch.randn(case.num_pairs, 2 * PAD)
    got = run13(x, context(layer.info, held, torch.float32), case, base)
    other = context(layer.info, [held[int(i)] for i in order], torch.float32)
    assert same_bits(run13(x, other, replace(case, slots=moved), base), got)


def test_scaling_is_linear_and_read_from_the_table() -> None:
    """Only the scaling table differs; gate, up and down each have their own entry."""
    layer = built()
    held = [adapter(layer.info, torch.float32, ranks={"gate": 2, "up": 3, "down": 4})]
    ctx = context(layer.info, held, torch.float32)
    case = routing(12, 2, EXPERTS, slots=torch.zeros(12, dtype=torch.int32), holes=False)
    x, h = torch.randn(12, HIDDEN), torch.randn(24, PAD)
    base13, base2 = torch.zeros(24, 2 * PAD), torch.zeros(24, HIDDEN)
    factor = torch.tensor([2.0, -4.0, 0.5])
    other = replace(ctx, scaling=ctx.scaling * factor[:, None])
    before, after = run13(x, ctx, case, base13), run13(x, other, case, base13)
    assert torch.equal(after[:, :PAD], 2 * before[:, :PAD]) and torch.equal(after[:, PAD:], -4 * before[:, PAD:])
    assert torch.equal(run2(h, other, case, base2), 0.5 * run2(h, ctx, case, base2))


def test_no_tokens() -> None:
    layer = built()
    ctx = context(layer.info, adapters(layer, torch.float32), torch.float32)
    case = routing(0, 2, EXPERTS, slots=torch.zeros(0, dtype=torch.int32))
    assert run13(torch.zeros(0, HIDDEN), ctx, case, torch.zeros(0, 2 * PAD)).shape == (0, 2 * PAD)
    assert run2(torch.zeros(0, PAD), ctx, case, torch.zeros(0, HIDDEN)).shape == (0, HIDDEN)


@pytest.mark.parametrize("slot", [2, 1 << 20, 2**31 - 1])
def test_slots_that_no_adapter_has(slot: int) -> None:
    """A negative one would find the last adapter, one past the end the memory behind the tables."""
    info = built().info
    ctx = context(info, [adapter(info, torch.float32, ranks={"gate": 2, "up": 2, "down": 2})] * 2, torch.float32)
    case = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.tensor([slot], dtype=torch.int32))
    plan, v = align(case, EXPERTS), torch.zeros(1, max(ctx.v13_width, ctx.v2_width))
    for run in (
        lambda: shrink13(torch.ones(1, HIDDEN), ctx, plan, 1, v),
        lambda: expand13(v, ctx, plan, torch.zeros(1, 2 * PAD)),
        lambda: shrink2(torch.ones(1, PAD), ctx, plan, v),
        lambda: expand2(v, ctx, plan, torch.zeros(1, HIDDEN)),
    ):
        with pytest.raises(AdapterError, match=rf"adapter_ids: got {slot}, expected -1 for the base, or a slot from 0"):
            run()
