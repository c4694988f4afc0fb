"""The marlin backend with adapters as a layer: against float64, and which bits an adapter leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.routing import Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.marlin import MarlinPrepared
from quant_moelora.kernels.align.op import plan_of
from quant_moelora.kernels.grouped_gemm.op import grouped_gemm
from tests.builders import Adapter, context, expected, move, same_bits, scheme
from tests.launched.cases import DEVICE, DTYPES, EACH_DTYPE, FROBENIUS, INTERPRETED, MARKS, label, pairwise
from tests.launched.test_lora import in_turn, some_adapters
from tests.launched.test_marlin import EXPERTS, LAYER, Case, make, relative_error, unchanged

pytestmark = [*MARKS, pytest.mark.usefixtures("serving")]
# 1 token: each pair is a tile. On a GPU, LoRA rides beside tiles of 16 and 32 rows, and is alone beside those of 128.
TOKENS = (1, 4) if INTERPRETED else (1, 3, 17, 64, 300)
MORE = TOKENS[1:] if INTERPRETED else TOKENS
MIXED = 2 if INTERPRETED else 4  # adapters of a mixed batch, whose ranks are 8 or 256 at most
EACH_SIZE = pytest.mark.parametrize("tokens", TOKENS)


def attached(case: Case, count: int) -> list[Adapter]:
    """Attach some adapters, and return them."""
    adapters = some_adapters(case.info, case.dtype, count)
    case.experts.attach(context(case.info, adapters, case.dtype, DEVICE))
    return adapters


MATRIX = pairwise(
    {
        "dtype": DTYPES,
        "adapters": [1, 3] if INTERPRETED else [1, 3, 8, 64],
        "tokens": TOKENS,
        "top_k": [1, 2],
        "bits": [4, 8],
        "act_order": [False, True],
        "activation": [
            Activation("silu"),
            Activation("swigluoai", alpha=1.702, limit=1.0),
            Activation("relu2", gated=False),
        ],
        "router_weight": ["output", "input"],
    }
)


@pytest.mark.parametrize("chosen", MATRIX, ids=label)
def test_against_float64(chosen: dict[str, Any]) -> None:
    """Each token has its own adapter's delta: the bound is a small part of what that changes."""
    options = {name: chosen[name] for name in ("act_order", "activation", "router_weight")}
    case = make(scheme(chosen["bits"], 32), chosen["dtype"], bias=True, **options)
    adapters = attached(case, chosen["adapters"])
    routed = in_turn(chosen["tokens"], chosen["top_k"], EXPERTS, chosen["adapters"])
    x = case.x(chosen["tokens"])
    out = case.run(x, routed)
    want, size = expected(case.built, x, routed, adapters)
    base, base_size = expected(case.built, x, replace(routed, slots=None))
    bounds = changes = 0.0
    for token in range(len(x)):
        # Errors are those of `LAYER`, of what is summed up; twice, since a token's scatter more than a layer's.
        bound = 2 * LAYER[case.dtype] * float(torch.maximum(size, base_size)[token].norm())
        assert float((out[token].double() - want[token]).norm()) <= bound, token
        change = float((want[token] - base[token]).norm())
        if change:
            bounds += bound**2
            changes += change**2
    assert bounds <= 0.35**2 * changes  # of single tokens by chance not; another adapter would be off by all of it


@EACH_DTYPE
@pytest.mark.parametrize("tokens", MORE)
@pytest.mark.parametrize("act_order", [True] if INTERPRETED else [False, True], ids=str)
def test_a_mixed_batch_is_its_adapters_one_by_one(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    """Rows have the bits that they have where all other tokens ask for the base model."""
    case = make(scheme(4, 32, symmetric=False), dtype, act_order=act_order)
    x, routed = case.x(tokens), in_turn(tokens, 2, EXPERTS, MIXED)
    base = case.run(x, replace(routed, slots=None))
    attached(case, MIXED)
    mixed, slots = case.run(x, routed), routed.slots
    assert slots is not None
    assert unchanged(mixed[slots < 0], base[slots < 0])
    for slot in (0,) if INTERPRETED else range(-1, MIXED):
        alone = case.run(x, replace(routed, slots=torch.where(slots == slot, slots, -1).to(torch.int32)))
        assert unchanged(alone[slots == slot], mixed[slots == slot]), slot
        assert unchanged(alone[slots != slot], base[slots != slot]), slot


@EACH_DTYPE
@pytest.mark.parametrize("tokens", MORE)
@pytest.mark.parametrize("crowded", [False, True], ids=["", "one expert and adapter"])
def test_a_permutation_of_the_tokens(crowded: bool, tokens: int, dtype: torch.dtype) -> None:
    """It permutes the output; also where segments are full, so that it moves rows from one to another."""
    case = make(scheme(4, 64), dtype)
    x, routed = case.x(tokens), in_turn(tokens, 2, EXPERTS, MIXED)
    if crowded:
        routed.topk_ids[:] = torch.tensor([3, 5], dtype=torch.int32)
        routed = replace(routed, slots=torch.zeros(tokens, dtype=torch.int32))
    assert routed.slots is not None
    attached(case, MIXED)
    out, order = case.run(x, routed), torch.randperm(tokens)
    moved = Routing(routed.topk_ids[order], routed.topk_weights[order], routed.slots[order])
    assert unchanged(case.run(x[order], moved), out[order])


@EACH_DTYPE
@pytest.mark.parametrize("tokens", TOKENS[:1] if INTERPRETED else TOKENS)
@pytest.mark.parametrize("zero", ["b", "scaling"])
def test_an_adapter_that_changes_nothing(zero: str, tokens: int, dtype: torch.dtype) -> None:
    """With B of zeros, as training starts with, or a scaling of 0 the layer's bits are those of the base model."""
    case = make(scheme(4, 64), dtype, bias=True)
    x, routed = case.x(tokens), in_turn(tokens, 2, EXPERTS, 1)
    base = case.run(x, replace(routed, slots=None))
    ranks = some_adapters(case.info, dtype, 1)[0]
    held = {
        key: replace(lora, b=torch.zeros_like(lora.b)) if zero == "b" else replace(lora, scaling=0.0)
        for key, lora in ranks.items()
    }
    case.experts.attach(context(case.info, [held], dtype, DEVICE))
    assert unchanged(case.run(x, routed), base)
    case.experts.attach(context(case.info, [ranks], dtype, DEVICE))
    assert not unchanged(case.run(x, routed), base)


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [4] if INTERPRETED else [1, 6, 40, 300])
def test_slots_that_there_are_not(tokens: int, dtype: torch.dtype) -> None:
    """Nothing on a device can raise: such tokens are NaN, so that they show, and disturb nobody."""
    case = make(scheme(4, 32), dtype)
    x, routed = case.x(tokens), in_turn(tokens, 2, EXPERTS, 3)
    routed.topk_ids.remainder_(EXPERTS)  # every token has an expert
    attached(case, 3)
    clean, slots = case.run(x, routed), routed.slots
    assert slots is not None and clean.isfinite().all()
    wrong = torch.zeros(tokens, dtype=torch.bool)
    wrong[::2] = True
    values = torch.tensor([3, 4, -2, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(tokens)
    given = torch.where(wrong, values[:tokens], slots)
    for bad in (given, torch.where(wrong, 2**31 - 1, slots).to(torch.int32)):
        out = case.run(x, replace(routed, slots=bad))
        assert out[wrong].isnan().all()
        assert unchanged(out[~wrong], clean[~wrong])


@EACH_DTYPE
@EACH_SIZE
@pytest.mark.parametrize("act_order", [True] if INTERPRETED else [False, True], ids=str)
def test_the_closures_say_the_same(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    """What other backends call around their products, here around those of this one: on a CPU it is plain torch.

    They differ by where float32's sums are cut, hence where a value is rounded up or down to the dtype.
    """
    case = make(scheme(4, 32), dtype, act_order=act_order, bias=True)
    routed = move(in_turn(tokens, 2, EXPERTS, MIXED), DEVICE)
    attached(case, MIXED)
    x = case.x(tokens)
    want = case.run(x, routed)
    prepared, injection, ws = case.experts._prepared, case.experts.injection, Workspace(DEVICE)
    assert isinstance(prepared, MarlinPrepared)
    w13, w2, source = prepared.layer.w13, prepared.layer.w2, prepared.layer.tiles
    routed, x = replace(routed, num_slots=MIXED), x.to(DEVICE)
    plan, tiles = plan_of(routed, EXPERTS, source)
    injection.begin(x, routed, plan, ws)
    gate_up = grouped_gemm(x, routed.topk_ids, plan.rows, tiles, True, w13.rows, *source, *w13)
    h = injection.activation(x, gate_up, x.new_empty(routed.num_pairs, w13.n_pad), routed, plan, ws)
    y = grouped_gemm(h, routed.topk_ids, plan.rows, tiles, False, w2.n, *source, *w2)
    out = injection.moe_sum(h, y, torch.empty_like(x), routed, plan, ws)
    assert relative_error(out.cpu(), want.double()) <= FROBENIUS[dtype]


@EACH_DTYPE
def test_few_tokens_and_none(dtype: torch.dtype) -> None:
    """None, one with one expert, and one with none; ids and slots of 64 bits."""
    case = make(scheme(4, 64), dtype)
    adapters = attached(case, 1)
    for tokens, expert in ((0, 0), (1, 2), (1, -1)):
        ids, slots = torch.full((tokens, 1), expert), torch.zeros(tokens, dtype=torch.int64)
        x, weights = case.x(tokens), torch.rand(tokens, 1) + 0.5
        out = case.experts(*(t.to(DEVICE) for t in (x, ids, weights, slots))).cpu()
        want, _ = expected(case.built, x, Routing(ids, weights, slots.to(torch.int32)), adapters)
        if tokens and expert >= 0:
            assert relative_error(out, want) <= LAYER[dtype]
        else:
            assert out.shape == x.shape and (out == 0).all()


@EACH_DTYPE
def test_strided_inputs(dtype: torch.dtype) -> None:
    """x, ids, weights and slots with gaps, which stay as they are."""
    case = make(scheme(4, 64), dtype)
    attached(case, 3)
    x, routed = case.x(5), in_turn(5, 2, EXPERTS, 3)
    assert routed.slots is not None

    def apart(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, 99)], -1).to(DEVICE)[..., 0]

    given = [apart(t) for t in (x, routed.topk_ids, routed.topk_weights, routed.slots)]
    assert same_bits(case.experts(*given).cpu(), case.run(x, routed))
    for tensor, own in zip(given, (x, routed.topk_ids, routed.topk_weights, routed.slots), strict=True):
        assert torch.equal(tensor.cpu(), own)
