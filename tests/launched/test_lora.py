"""The LoRA kernels by themselves, each step against float64 of what the step before it stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align import reference
from quant_moelora.kernels.lora.launch import LayerFacts, LoRAForward, LoRATables, alone
from quant_moelora.kernels.lora.spec import Cut
from quant_moelora.kernels.moe_sum.launch import moe_sum
from tests.builders import Adapter, Lora, activate, adapter, context, delta, layer, roundoff, routing, scheme
from tests.launched.cases import DEVICE, DTYPES, EACH_DTYPE, INTERPRETED, MARKS, label, pairwise, poison
from tests.launched.test_elementwise import given

pytestmark = [*MARKS, pytest.mark.usefixtures("no_grad")]
# No multiples of the 128 columns that kernels take at once: a second block is short.
HIDDEN, INTER = (136, 72) if INTERPRETED else (584, 456)
EXPERTS = 5
LARGE = 40 if INTERPRETED else 256  # the largest rank: more than the 32 that kernels take at once
UNIT32 = roundoff(torch.float32)


def some_adapters(info: MoEQuantInfo, dtype: torch.dtype, count: int) -> list[Adapter]:
    """Adapters of all kinds, the first three of few ranks; from the ninth on they are of random ranks."""
    kinds: list[dict[str, Any]] = [
        {"ranks": {"gate": 4, "up": 3, "down": 5}, "scaling": 1.5},
        {"ranks": {"gate": 2, "up": 2}, "scaling": -2.0, "experts": [0, 3], "shared": True},
        {"ranks": {"down": 8}, "experts": [1, 4]},
        {"ranks": {"gate": LARGE, "up": 16, "down": 33}, "scaling": -1.0},
        {"ranks": {"gate": 17}, "experts": [0, 1, 2]},
        {"ranks": {"up": 1, "down": LARGE}},
        {"ranks": {}},
        {"ranks": {"gate": 33, "up": 33, "down": 1}, "shared": True},
    ]
    for _ in range(len(kinds), count):
        gate, up, down = torch.randint(1, 65, (3,)).tolist()
        kinds.append({"ranks": {"gate": gate, "up": up, "down": down}})
    if not info.activation.gated:
        for kind in kinds:
            kind["ranks"].pop("gate", None)
            kind["shared"] = False
    return [adapter(info, dtype, **kind) for kind in kinds[:count]]


@dataclass(frozen=True)
class Case:
    """A layer between its products, its adapters and a batch."""

    info: MoEQuantInfo
    adapters: Sequence[Adapter]
    ctx: MoELoRAContext  # on the device
    routed: Routing
    x: Tensor  # (M, H)
    gate_up: Tensor  # as the GEMM leaves it, NaN in the padding and in rows without an expert
    values: Tensor  # (P, halves * inter_pad) float64, what gate_up means
    y: Tensor  # (P, H), NaN in rows without an expert
    pairs: list[int]  # of each row
    direct: bool

    def of_row(self, row: int) -> tuple[int, int, int]:
        """Token, expert (-1: none) and slot."""
        assert self.routed.slots is not None
        token, expert = self.pairs[row] // self.routed.top_k, int(self.routed.topk_ids.flatten()[self.pairs[row]])
        return token, expert if 0 <= expert < EXPERTS else -1, int(self.routed.slots[token])

    def lora(self, row: int, projection: str) -> Lora | None:
        _, expert, slot = self.of_row(row)
        return self.adapters[slot].get((expert, projection)) if 0 <= slot < len(self.adapters) else None

    def stored(self, row: int, value: Tensor) -> Tensor:
        """A vector of the intermediate in the stored order of the row's expert."""
        perm = self.info.inter_perm
        return value if perm is None or not value.ndim else value[perm[self.of_row(row)[1]].long()]


def make(
    routed: Routing,
    dtype: torch.dtype,
    adapters: int,
    *,
    direct: bool = False,
    parts: int = 0,
    inter: int = INTER,
    hidden: int = HIDDEN,
    **options: Any,
) -> Case:
    """A case on a routing with slots."""
    info = layer(scheme(4, 32), experts=EXPERTS, hidden=hidden, inter=inter, **options).info
    held = some_adapters(info, dtype, adapters)
    gate_up, values = given((routed.num_pairs, info.activation.halves * info.inter_pad), parts, dtype)
    y = torch.randn(routed.num_pairs, hidden).to(dtype)
    routed = replace(routed, num_slots=adapters)
    pairs = list(range(routed.num_pairs)) if direct else reference.align(routed, EXPERTS).rows.tolist()
    x = torch.randn(routed.num_tokens, hidden).to(dtype)
    case = Case(
        info, held, context(info, held, dtype, DEVICE), routed, x, gate_up, values, y, pairs=pairs, direct=direct
    )
    for row in range(len(pairs)):
        if case.of_row(row)[1] < 0:
            gate_up[..., row, :] = y[row] = torch.nan
    for half in range(info.activation.halves):
        gate_up[..., half * info.inter_pad + inter : (half + 1) * info.inter_pad] = torch.nan
    return case


@dataclass(frozen=True)
class Done:
    """What the steps stored, on the CPU."""

    h: Tensor  # (P, inter_pad)
    delta: Tensor  # (P, H)
    out: Tensor  # (M, H)


def run(case: Case, cut: Cut | None = None) -> Done:
    """All steps in poisoned buffers, cut as `choose_cut` does or otherwise."""
    info, routed, dtype = case.info, case.routed, case.x.dtype
    assert routed.slots is not None
    plan = None if case.direct else reference.align(routed, EXPERTS)
    held = (None, None, None) if plan is None else (plan.rows, plan.inverse, plan.segments)
    rows, inverse, segments = (None if tensor is None else tensor.to(DEVICE) for tensor in held)
    x, ids, weights, slots = (t.to(DEVICE) for t in (case.x, routed.topk_ids, routed.topk_weights, routed.slots))
    facts = LayerFacts(info.activation, info.intermediate_size, info.inter_pad, info.router_weight == "input")

    def buffer(_: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return poison(*shape, dtype=dtype)

    forward = LoRAForward.new(x, LoRATables.of(case.ctx), facts, ids, weights, slots, rows, segments, buffer)
    if cut is not None:
        spec = replace(forward.spec, cut=cut)
        v13 = poison(routed.num_pairs, spec.cut.parts13, spec.v13_width, dtype=torch.float32)
        v2 = poison(routed.num_pairs, spec.cut.parts2, spec.max_rank, dtype=torch.float32)
        forward = replace(forward, spec=spec, v13=v13, v2=v2)
    alone(forward.shrink_rider(x))
    h = forward.activate(case.gate_up.to(DEVICE), poison(routed.num_pairs, info.inter_pad, dtype=dtype))
    alone(forward.expand_rider())
    out = poison(routed.num_tokens, info.hidden_size, dtype=dtype)
    asked = None if info.router_weight == "input" else weights
    moe_sum(case.y.to(DEVICE), ids, asked, inverse, out, forward.deltas, num_experts=EXPERTS)
    return Done(h.cpu(), forward.delta.cpu(), out.cpu())


def delta_error(lora: Lora | None, row: Tensor) -> Tensor:
    """Error of a delta before it is rounded: of its products, two values of the dtype for v, and float32's sums.

    Their rounding errors are independent, so that sums of K and 2 r terms bring the root of that many units of what is
    summed up, 8 of them with 4 standard deviations and an accumulator that truncates. What float16 cannot hold of the
    second value is half of its least subnormal.
    """
    if lora is None:
        return torch.zeros((), dtype=torch.float64)
    rank, columns = lora.a.shape
    v = lora.a.double().abs() @ row.double().abs()
    relative = roundoff(lora.a.dtype) ** 2 + 8 * (columns + 2 * rank) ** 0.5 * UNIT32
    return abs(lora.scaling) * (lora.b.double().abs() @ (relative * v + 2.0**-25))


def check_h(case: Case, h: Tensor) -> None:
    """h is act(gate_up + delta) in float64, rounded once; rows without an expert are not written.

    The bound is a small part of what adapters change, or a missing, another's or a shortened delta would pass.
    """
    info, dtype = case.info, h.dtype
    inter, pad, function = info.intermediate_size, info.inter_pad, info.activation
    bounds: list[Tensor] = []
    changes: list[Tensor] = []
    for row in range(len(case.pairs)):
        token, expert, slot = case.of_row(row)
        if expert < 0 or slot < -1 or slot >= len(case.adapters):
            assert h[row].isnan().all()
            continue
        weight = float(case.routed.topk_weights.flatten()[case.pairs[row]]) if info.router_weight == "input" else 1.0
        base = [case.values[row, at : at + inter] for at in range(0, function.halves * pad, pad)]
        loras = [case.lora(row, name) for name in ("gate", "up")[-function.halves :]]
        deltas = [case.stored(row, delta(lora, case.x[token].double())) for lora in loras]
        errors = [weight * case.stored(row, delta_error(lora, case.x[token])) for lora in loras]
        gate, up = (weight * (base[i] + deltas[i]) for i in (0, -1))
        want = activate(function, gate if function.gated else None, up)
        unchanged = activate(function, weight * base[0] if function.gated else None, weight * base[-1])
        # The slopes of silu and of gate * sigmoid(1.7 gate) are at most 1.1, that of relu2 is 2 up. Then come some ten
        # operations in float32 and one rounding.
        slope = 2.1 * up.abs() * errors[0]
        if function.gated:
            slope = 1.2 * (up.abs() + 1) * errors[0] + gate.abs() * errors[-1]
        own = 32 * UNIT32 * (want.abs() + (gate.abs() * (up.abs() + 1) if function.gated else up * up))
        bound = slope + own + 1.01 * roundoff(dtype) * want.abs() + 2.0**-25
        assert ((h[row, :inter].double() - want).abs() <= bound).all(), (row, expert, slot)
        assert (h[row, inter:] == 0).all()
        if any(loras):
            bounds.append(bound)
            changes.append(want - unchanged)
    # 1/256 of h, which is as large as what adapters change, or some times as large; small in single rows by chance.
    assert not changes or float(torch.stack(bounds).norm()) <= 0.1 * float(torch.stack(changes).norm())


def check_delta(case: Case, done: Done) -> None:
    """delta is scaling * B2 (A2 h) in float64 of the h that was stored, rounded once; other rows are not written."""
    inter = case.info.intermediate_size
    errors: list[Tensor] = []
    wanted: list[Tensor] = []
    for row in range(len(case.pairs)):
        lora = case.lora(row, "down")
        if case.of_row(row)[1] < 0 or lora is None:
            assert done.delta[row].isnan().all()
            continue
        h = torch.empty(inter, dtype=torch.float64)
        h[case.stored(row, torch.arange(inter))] = done.h[row, :inter].double()  # in the logical order
        want = delta(lora, h)
        error = delta_error(lora, h)
        errors.append(error)
        wanted.append(want)
        bound = error + roundoff(done.delta.dtype) * (want.abs() + error) + 2.0**-25
        assert ((done.delta[row].double() - want).abs() <= bound).all(), row
    # 2**-16 of what is summed up, some ten times as much as its sum; small in single rows by chance.
    assert not errors or float(torch.stack(errors).norm()) <= 0.01 * float(torch.stack(wanted).norm())


def check_out(case: Case, done: Done) -> None:
    """The sum of weight * (y + delta) over the pairs of a token, of the deltas that were stored."""
    top_k, place = case.routed.top_k, {pair: row for row, pair in enumerate(case.pairs)}
    for token in range(case.routed.num_tokens):
        want, size = (torch.zeros(case.info.hidden_size, dtype=torch.float64) for _ in range(2))
        for pair in range(token * top_k, (token + 1) * top_k):
            row = place[pair]
            if case.of_row(row)[1] < 0:
                continue
            weight = float(case.routed.topk_weights.flatten()[pair]) if case.info.router_weight == "output" else 1.0
            value, added = case.y[row].double(), done.delta[row].double()
            lora = case.lora(row, "down")
            want += weight * (value if lora is None else value + added)
            size += abs(weight) * (value.abs() if lora is None else value.abs() + added.abs())
        # Two sums and a product for each pair in float32, then one rounding.
        growth = 3 * top_k * UNIT32 * size
        bound = growth + 1.01 * roundoff(done.out.dtype) * (want.abs() + growth) + 2.0**-25
        assert ((done.out[token].double() - want).abs() <= bound).all(), token


def check(case: Case, cut: Cut | None = None) -> Done:
    done = run(case, cut)
    check_h(case, done.h)
    check_delta(case, done)
    check_out(case, done)
    return done


def in_turn(tokens: int, top_k: int, experts: int, adapters: int) -> Routing:
    """The last token has slot 0, those before it 1, 2, ..., -1, 0 and so on; some pairs have no expert."""
    slots = torch.arange(tokens, 0, -1, dtype=torch.int32) % (adapters + 1) - 1
    routed = routing(tokens, top_k, experts, slots=slots)
    routed.topk_ids[:1, 0] = 0
    return routed


def mixed(tokens: int, top_k: int, adapters: int) -> Routing:
    """Every slot in turn, and with enough tokens some that there are not."""
    routed = in_turn(tokens, top_k, EXPERTS, adapters)
    assert routed.slots is not None
    routed.slots[4:9] = torch.tensor([adapters, -2, 2**31 - 1, -(2**31), adapters + 1])[: max(0, tokens - 4)]
    return routed


# Parts of x that a program more or less has, and one that has none; blocks of h, of which a program's last one may be
# beyond the end, and programs that have none.
BLOCK = 32 if INTERPRETED else 128
CUTS = {
    "": None,
    "parts": Cut(16, 3, 2, 16, BLOCK, expand_blocks=2),
    "more": Cut(32, 2, 5, 16, 2 * BLOCK if INTERPRETED else BLOCK, expand_blocks=1),
}
MATRIX = pairwise(
    {
        "dtype": DTYPES,
        "adapters": [1, 3, 8] if INTERPRETED else [1, 3, 8, 64],
        "tokens": [1, 3, 7] if INTERPRETED else [1, 7, 40, 300],
        "top_k": [1, 2],
        "direct": [False, True],
        "parts": [0, 2, 4],
        "act_order": [False, True],
        "activation": [
            Activation("silu"),
            Activation("swigluoai", alpha=1.702, limit=1.0),
            Activation("relu2", gated=False),
        ],
        "router_weight": ["output", "input"],
        "cut": list(CUTS),
    }
)


@pytest.mark.parametrize("chosen", MATRIX, ids=label)
def test_steps_against_float64(chosen: dict[str, Any]) -> None:
    options = {name: chosen[name] for name in ("direct", "parts", "act_order", "activation", "router_weight")}
    case = make(
        mixed(chosen["tokens"], chosen["top_k"], chosen["adapters"]), chosen["dtype"], chosen["adapters"], **options
    )
    cut = CUTS[chosen["cut"]]
    if cut is not None and case.ctx.max_rank > cut.expand_ranks:
        cut = replace(cut, parts2=-(-case.info.inter_pad // cut.activation_block))  # the only case that there is
    check(case, cut)


@EACH_DTYPE
@pytest.mark.parametrize(
    ("rows", "cut", "slot"),
    [(17, "parts", 0), (33, "", 3), *(() if INTERPRETED else ((16, "", 3), (32, "", 3), (70, "parts", 0)))],
)
def test_segments_of_several_blocks_of_rows(rows: int, cut: str, slot: int, dtype: torch.dtype) -> None:
    """One expert and one adapter have more rows than a matrix instruction, or than a segment; ids are 64 bits wide."""
    slots = torch.full((rows + 3,), slot, dtype=torch.int32)
    slots[-3:] = torch.tensor([-1, 0, 2])
    routed = Routing(torch.full((rows + 3, 1), 1), torch.ones(rows + 3, 1), slots)
    check(make(routed, dtype, 4 if slot == 3 else 3), CUTS[cut])


RANKS = (1, 2, 3, 4, 5, 8, 16, 17, 33, 40) + (() if INTERPRETED else (15, 31, 32, 64, 65, 100, 128, 255, 256))


@EACH_DTYPE
@pytest.mark.parametrize("direct", [False, True], ids=["alone, sorted", "beside a larger one, direct"])
def test_ranks(direct: bool, dtype: torch.dtype) -> None:
    """Each is the largest of its context once, so that it is the bound, and once beside the largest of all."""
    beside = direct
    for rank in RANKS:
        tokens = 1 if INTERPRETED else 4
        ids, slots = torch.full((tokens, 1), 2), torch.zeros(tokens, dtype=torch.int32)
        routed = Routing(ids, torch.ones(tokens, 1), slots)
        case = make(routed, dtype, 1, direct=direct)
        ranks = {"gate": rank, "up": max(1, rank - 3), "down": rank}
        held = [adapter(case.info, dtype, ranks=ranks, scaling=-0.5)]
        if beside:
            held += [adapter(case.info, dtype, ranks=dict.fromkeys(ranks, LARGE))]
        check(replace(case, adapters=held, ctx=context(case.info, held, dtype, DEVICE)))


@EACH_DTYPE
def test_more_parts_than_are_read_at_once(dtype: torch.dtype) -> None:
    """v is the sum of more than 16 parts, of 17 and of 20 or 18, in gate, up and down; none of them is empty."""
    hidden, inter = 16 * 128 + 40, 312 if INTERPRETED else 2200
    slots = torch.full((1 if INTERPRETED else 9,), 3, dtype=torch.int32)
    routed = Routing(torch.full((len(slots), 1), 2), torch.ones(len(slots), 1), slots)
    case = make(routed, dtype, 4, hidden=hidden, inter=inter, direct=True)
    check(case, Cut(32, 17, 20 if INTERPRETED else 18, 32, 16 if INTERPRETED else 128, expand_blocks=3))


@EACH_DTYPE
def test_experts_without_tokens_and_tokens_without_experts(dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, -1], [3, 3], [-1, EXPERTS], [2**31 - 1, 3], [-(2**31), 99]], dtype=torch.int32)
    slots = torch.tensor([0, 1, 0, -1, 9], dtype=torch.int32)
    for direct in (False, True):
        done = check(make(Routing(ids, torch.rand(5, 2) + 0.25, slots), dtype, 3, direct=direct))
        assert (done.out[[2, 4]] == 0).all()


@EACH_DTYPE
def test_a_table_is_read_when_a_kernel_runs(dtype: torch.dtype) -> None:
    """Other ranks, factors and scalings in the same tensors, as the bank leaves them, with a larger bound."""
    case = make(mixed(3, 1, 2), dtype, 2)
    other = [adapter(case.info, dtype, ranks={"gate": 3, "up": 5, "down": 2}, scaling=s) for s in (2.0, -0.25)]
    ctx = replace(context(case.info, other, dtype, DEVICE), max_rank=21)
    check(replace(case, adapters=other, ctx=ctx))
    factors = {"gate": -2.0, "up": 3.0, "down": 0.5}
    ctx.scaling.mul_(torch.tensor(list(factors.values()), device=DEVICE)[:, None])
    scaled = [
        {key: replace(lora, scaling=lora.scaling * factors[key[1]]) for key, lora in held.items()} for held in other
    ]
    check(replace(case, adapters=scaled, ctx=ctx))


def test_adapters_of_another_dtype() -> None:
    case = make(mixed(2, 1, 1), torch.float16, 1)
    with pytest.raises(AdapterError, match=r"adapters: got factors in torch.float32 for activations in torch.float16"):
        run(replace(case, ctx=replace(case.ctx, arena=case.ctx.arena.float())))
