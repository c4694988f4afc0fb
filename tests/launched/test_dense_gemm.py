"""The dense grouped GEMM against float64, row by row, and the unquantized backend as a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.backend import Verdict
from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import DenseWeight
from quant_moelora.experts import base_injection
from quant_moelora.experts.unquantized import UnquantizedBackend
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.dense_gemm import config, launch
from quant_moelora.kernels.dense_gemm.op import dense_align, dense_align_out, dense_gemm, dense_gemm_out, dense_plan
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.layer import MoEExperts
from quant_moelora.lora import injection
from tests.builders import (
    BuiltDense,
    Layer,
    adapter,
    context,
    dense,
    expected,
    layer,
    move,
    roundoff,
    routing,
    same_bits,
)
from tests.launched.cases import (
    DEVICE,
    DTYPES,
    EACH_DTYPE,
    FROBENIUS,
    INTERPRETED,
    MARKS,
    Counting,
    label,
    pairwise,
    poison,
)

pytestmark = [*MARKS, pytest.mark.usefixtures("no_grad")]
LOWEST = Tile(16, 64, 64, stages=2)
# As in test_marlin: some ten independent roundings, where a product's FROBENIUS has two.
LAYER = {dtype: 2.5 * bound for dtype, bound in FROBENIUS.items()}


def run(
    built: BuiltDense,
    x: Tensor,  # (M, k); (P, k) by pair if not gather
    case: Routing,
    tile: Tile | None,
    *,
    gather: bool,
    columns: int,
) -> Tensor:  # (P, columns) by pair
    """Launch into a poisoned output, with a tile or (None) as the operator does."""
    weight, top_k = built.weight, case.top_k if gather else None
    w, bias = weight.w.to(x.dtype).to(DEVICE), None if weight.bias is None else weight.bias.to(DEVICE)
    if tile is None:
        plan, tiles = dense_plan(move(case, DEVICE), weight.num_experts)
    else:
        plan, tiles = align(move(case, DEVICE), weight.num_experts, tile.bm)
    x = x.to(DEVICE) if gather else x.to(DEVICE)[plan.rows.long()]
    out = poison(case.num_pairs, columns, dtype=x.dtype)
    if tile is None:
        dense_gemm_out(x, plan.rows, tiles, w, bias, top_k, columns, out)
    else:
        assert launch.dense_gemm(x, w, bias, tiles, plan.rows, top_k, out, tile) is out
    return out[plan.inverse.long()].cpu()


def check(built: BuiltDense, x: Tensor, case: Routing, out: Tensor, *, gather: bool) -> None:
    """Every pair against float64; padding 0; pairs without an expert as they were."""
    weight, ids = built.weight, case.topk_ids.flatten().long()
    held = (ids >= 0) & (ids < weight.num_experts)
    assert out[~held].isnan().all()
    rows = (x.repeat_interleave(case.top_k, 0) if gather else x)[held, : weight.k].double()
    values = weight.dequantize().to(x.dtype).double()[ids[held]]  # (held, halves, n, k)
    bias = built.bias[ids[held]]
    want = torch.einsum("phnk,pk->phn", values, rows) + bias
    # k + 1 float32 sums of partial sums below the sum of sizes (of a matrix unit, which may round them all in one
    # direction, so 2 units each), and the rounding of the output.
    size = torch.einsum("phnk,pk->phn", values.abs(), rows.abs()) + bias.abs()
    bound = 2 * (weight.k + 1) * roundoff(torch.float32) * size + 1.01 * roundoff(out.dtype) * want.abs()
    found = out[held].double().unflatten(1, (weight.halves, -1))
    assert ((found[..., : weight.n] - want).abs() <= bound + 2.0**-25).all()
    assert (found[..., weight.n :] == 0).all()


def inputs(case: Routing, k: int, dtype: torch.dtype, *, gather: bool) -> Tensor:
    """Rows of tokens, or of pairs."""
    return torch.randn(case.num_tokens if gather else case.num_pairs, k).to(dtype)


PRODUCTS = pairwise(
    {
        "experts": [1, 7, 33, 64],
        "tokens": [1, 4] if INTERPRETED else [1, 4, 40, 300],
        "top_k": [1, 2, 3, 8, 10],
        "n": [64, 40, 72],
        "k": [128, 192, 72, 33],  # one step, three of 64, a short last one, and rows that begin anywhere
        "gather": [True, False],
        "halves": [1, 2],
        "bias": [False, True],
        "ids": [torch.int32, torch.int64],
        "dtype": DTYPES,
    }
)


@pytest.mark.parametrize("chosen", PRODUCTS, ids=label)
def test_products(chosen: dict[str, Any]) -> None:
    """As the operators cut them."""
    experts, halves, n, k, gather = (chosen[name] for name in ("experts", "halves", "n", "k", "gather"))
    n_pad = n + 8 if halves == 2 else n
    built = dense(torch.float32, experts=experts, halves=halves, n=n, k=k, n_pad=n_pad, bias=chosen["bias"])
    case = routing(chosen["tokens"], chosen["top_k"], experts)
    case = Routing(case.topk_ids.to(chosen["ids"]), case.topk_weights)
    x = inputs(case, k, chosen["dtype"], gather=gather)
    out = run(built, x, case, None, gather=gather, columns=halves * n_pad)
    check(built, x, case, out, gather=gather)


@EACH_DTYPE
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "sorted"])
def test_what_is_stored_besides_is_not_read(gather: bool, dtype: torch.dtype) -> None:
    """Rows and columns of padding hold NaN here, and are no part of the output."""
    built = dense(dtype, experts=3, n=72, k=72, n_pad=80, k_pad=88, bias=True)
    built.weight.w[:, 72:] = torch.nan
    built.weight.w[:, :, 72:] = torch.nan
    case = routing(9, 2, 3)
    x = inputs(case, 72, dtype, gather=gather)
    for tile in (LOWEST, Tile(16, 128, 128, stages=2)):
        check(built, x, case, run(built, x, case, tile, gather=gather, columns=72), gather=gather)


def with_counts(*counts: int) -> Routing:
    """A routing whose experts have so many pairs, in a random order."""
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    return Routing(ids[torch.randperm(len(ids))][:, None], torch.ones(len(ids), 1))


HEIGHTS = [(1, 16, 17), (0, 17, 32), (33, 33, 64), (65, 128, 129)]  # both ends of each
CUTS = [
    dict(zip(("counts", "bm"), chosen, strict=True))
    for chosen in (
        zip(HEIGHTS, (16, 32, 64, 128), strict=True)
        if INTERPRETED
        else ((counts, bm) for counts in HEIGHTS for bm in (16, 32, 64, 128))
    )
]


@EACH_DTYPE
@pytest.mark.parametrize("chosen", CUTS, ids=label)
def test_every_height(chosen: dict[str, Any], dtype: torch.dtype) -> None:
    built = dense(dtype, experts=3, n=64, k=72)
    case = with_counts(*chosen["counts"])
    x = inputs(case, 72, dtype, gather=True)
    check(built, x, case, run(built, x, case, Tile(chosen["bm"], 64, 64), gather=True, columns=64), gather=True)


@EACH_DTYPE
@pytest.mark.parametrize("group_m", [1, 2, 4])
def test_every_tile_is_swept_once(group_m: int, dtype: torch.dtype) -> None:
    """Row tiles that are no multiple of the group, and several column tiles, the last one short."""
    built = dense(dtype, experts=3, n=136, k=64)
    case = with_counts(20, 40, 10)
    x = inputs(case, 64, dtype, gather=False)
    check(
        built, x, case, run(built, x, case, replace(LOWEST, group_m=group_m), gather=False, columns=136), gather=False
    )


def relative_error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


def unchanged(out: Tensor, before: Tensor) -> bool:
    """The same bits; interpreted, few other ones: those of numpy's product depend on where in its tile a row stands."""
    return same_bits(out, before) or (INTERPRETED and relative_error(out, before) < FROBENIUS[out.dtype])


@EACH_DTYPE
def test_neither_tile_nor_company_changes_a_bit(dtype: torch.dtype) -> None:
    """A row alone, and among others in every tile that is chosen somewhere."""
    n, k = (72, 136) if INTERPRETED else (768, 1032)
    built = dense(dtype, experts=2, n=n, k=k, bias=True)
    case = with_counts(9, 3) if INTERPRETED else with_counts(150, 30)
    x = inputs(case, k, dtype, gather=True)
    tiles = {
        config.choose_tile(pairs, 2, n, columns, gpu)
        for pairs in ((1, 150) if INTERPRETED else (1, 30, 60, 150, 4000))
        for columns in (k, 1024)
        for gpu in ((9, 0), (8, 0))
        if not (INTERPRETED and gpu == (9, 0) and pairs > 1)
    }
    alone = torch.cat(
        [
            run(
                built, x[i : i + 1], Routing(case.topk_ids[i : i + 1], torch.ones(1, 1)), LOWEST, gather=True, columns=n
            )
            for i in range(3)
        ]
    )
    for tile in tiles:
        if not INTERPRETED:
            room: int = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
            if config.shared_bytes(tile) > room:
                continue
        out = run(built, x, case, tile, gather=True, columns=n)
        assert unchanged(out[:3], alone), tile


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend serves `DEVICE`, with launched closures around its products."""
    if INTERPRETED:
        monkeypatch.setattr(UnquantizedBackend, "supports", lambda *_, **__: Verdict())
        monkeypatch.setattr(base_injection.activation_reference, "activate", base_injection.launched_activation)
        monkeypatch.setattr(base_injection.moe_sum_reference, "moe_sum", base_injection.launched_moe_sum)
        monkeypatch.setattr(injection, "_on_gpu", lambda _: True)


@dataclass(frozen=True)
class Case:
    """A layer with the meaning of its cast weights, and its module."""

    built: Layer
    experts: MoEExperts
    dtype: torch.dtype

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.built.info.hidden_size).to(self.dtype)

    def run(self, x: Tensor, routed: Routing) -> Tensor:
        """The output, on the CPU."""
        slots = None if routed.slots is None else routed.slots.to(DEVICE)
        out = self.experts(x.to(DEVICE), routed.topk_ids.to(DEVICE), routed.topk_weights.to(DEVICE), slots)
        assert out.dtype == self.dtype and out.shape == x.shape and out.device.type == DEVICE.type
        return out.cpu()


def make(stored: torch.dtype, dtype: torch.dtype, experts: int, **options: Any) -> Case:
    hidden, inter = (40, 72) if INTERPRETED else (8 * 72, 200)
    built = layer(stored, experts=experts, hidden=hidden, inter=inter, **options)
    gate, up, down = (None if w is None else w.to(dtype).double() for w in (built.gate, built.up, built.down))
    assert up is not None and down is not None
    built = replace(built, gate=gate, up=up, down=down)
    return Case(built, MoEExperts(built.info.to(DEVICE), "unquantized"), dtype)


LAYERS = pairwise(
    {
        "stored": [torch.float32, torch.bfloat16, torch.float16],
        "dtype": DTYPES,
        "experts": [1, 3] if INTERPRETED else [1, 7, 33, 64],
        "tokens": [1, 3] if INTERPRETED else [1, 3, 17, 64, 300],
        "top_k": [1, 2] if INTERPRETED else [1, 3, 10],
        "act_order": [False, True],
        "bias": [False, True],
        "activation": [
            Activation("silu"),
            Activation("gelu_tanh"),
            Activation("relu2", gated=False),
            Activation("swigluoai", alpha=1.702, limit=1.0),
        ],
        "router_weight": ["output", "input"],
    }
)


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("chosen", LAYERS, ids=label)
def test_layers_with_and_without_adapters(chosen: dict[str, Any]) -> None:
    """Both against float64; rows without an adapter keep their bits; a second run gives the same."""
    options = {name: chosen[name] for name in ("act_order", "bias", "activation", "router_weight")}
    dtype, tokens, experts = chosen["dtype"], chosen["tokens"], chosen["experts"]
    case = make(chosen["stored"], dtype, experts, **options)
    x, routed = case.x(tokens), routing(tokens, chosen["top_k"], experts)
    routed.topk_ids[0, 0] = experts - 1  # so that some pair has an expert
    want, _ = expected(case.built, x, routed)
    base = case.run(x, routed)
    assert relative_error(base, want) <= LAYER[dtype]
    gated = chosen["activation"].gated
    adapters = [
        adapter(case.built.info, dtype, ranks={"gate": 4, "up": 3, "down": 5} if gated else {"up": 3, "down": 5}),
        adapter(case.built.info, dtype, ranks={"down": 8}, experts=[0]),
    ]
    case.experts.attach(context(case.built.info, adapters, dtype, DEVICE))
    if not INTERPRETED:  # where a run takes a second
        assert same_bits(case.run(x, routed), base), "attached, and nobody asks for one"
    slots = (torch.arange(tokens) % 3).to(torch.int32) - (1 if tokens > 1 else 0)
    mixed = replace(routed, slots=slots)
    out = case.run(x, mixed)
    assert unchanged(out[slots < 0], base[slots < 0]) or not (slots < 0).any()
    want, _ = expected(case.built, x, mixed, adapters)
    assert relative_error(out, want) <= LAYER[dtype]
    if not INTERPRETED:
        assert same_bits(case.run(x, mixed), out)


@EACH_DTYPE
@pytest.mark.usefixtures("serving")
def test_no_tokens_and_tokens_without_an_expert(dtype: torch.dtype) -> None:
    """NaN in their rows of x disturbs nobody, and x may be strided."""
    case = make(dtype, dtype, 3)
    case.experts.attach(context(case.built.info, [adapter(case.built.info, dtype, ranks={"down": 2})], dtype, DEVICE))
    hidden = case.built.info.hidden_size
    none = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.empty(0, dtype=torch.int32))
    for slots in (None, none.slots):
        assert case.run(case.x(0), replace(none, slots=slots)).shape == (0, hidden)
    routed = Routing(torch.tensor([[0, 1], [-1, 3], [2, -5], [2**31 - 1, -(2**31)]]), torch.rand(4, 2) + 0.25)
    x = case.x(4)
    clean = case.run(x, routed)
    x[[1, 3]] = torch.nan
    wide = torch.full((4, hidden + 8), torch.nan, dtype=dtype)
    wide[:, :hidden] = x
    assert same_bits(case.run(wide[:, :hidden], routed), clean)
    assert (clean[[1, 3]] == 0).all() and (clean[[0, 2]] != 0).any(1).all()


@pytest.fixture
def _new_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("serving", "_new_compiler")
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_one_graph_for_all_sizes(lora: bool) -> None:
    """Without a break, through the injection's callables."""
    dtype = DTYPES[0]
    case, count = make(dtype, dtype, 3, bias=True), Counting()
    held = [adapter(case.built.info, dtype, ranks={"gate": 4, "up": 3, "down": 5}) for _ in range(2)]
    if lora:
        case.experts.attach(context(case.built.info, held, dtype, DEVICE))
    case.experts.prepare(dtype)
    compiled = torch.compile(case.experts, fullgraph=True, backend=count)
    for tokens in (3, 6) if INTERPRETED else (3, 17, 64, 200):
        routed = move(routing(tokens, 2, 3), DEVICE)
        arguments = [case.x(tokens).to(DEVICE), routed.topk_ids, routed.topk_weights]
        arguments += [torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 3 - 1] if lora else []
        for tensor in arguments:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        # First eagerly: to a workspace in which nothing was kept yet, a graph of its own belongs.
        answer = case.experts(*arguments)
        assert same_bits(compiled(*arguments), answer), tokens
    assert len(count.graphs) == 1


def calls(*, lora: bool) -> dict[str, tuple[Any, Any, tuple[Any, ...]]]:
    """Each operator and its twin, with arguments; every pair has an expert, so that every row is written."""
    dtype = DTYPES[0]
    weight = dense(dtype, experts=3, n=40, k=40, bias=lora).weight
    assert isinstance(weight, DenseWeight)
    bias = None if weight.bias is None else weight.bias.to(DEVICE)
    ids = torch.randint(0, 3, (5, 2), device=DEVICE)
    slots = (torch.arange(5, dtype=torch.int32, device=DEVICE) % 3 - 1) if lora else None
    rows, _, _, _, tiles = dense_align(ids, slots, 3, 2)
    x = torch.randn(5 if lora else 10, 40, device=DEVICE).to(dtype)
    product = (x, rows, tiles, weight.w.to(DEVICE), bias, 2 if lora else None, 40)
    return {
        "dense_align": (dense_align, dense_align_out, (ids, slots, 3, 2)),
        "dense_gemm": (dense_gemm, dense_gemm_out, product),
    }


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ["dense_align", "dense_gemm"])
def test_operators_are_what_they_say(name: str, lora: bool) -> None:
    """Schema, fake implementation, and a twin that writes what the operator returns and refuses other tensors."""
    operator, twin, arguments = calls(lora=lora)[name]
    torch.library.opcheck(operator, arguments)
    made = operator(*arguments)
    results = [made] if isinstance(made, Tensor) else list(made)
    given = [torch.full_like(t, torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max) for t in results]
    torch.library.opcheck(twin, (*arguments, *given))
    assert twin(*arguments, *given) is None
    assert all(same_bits(one, two) for one, two in zip(given, results, strict=True))
    with pytest.raises(ShapeError, match=r"got shape .*, expected \["):
        twin(*arguments, *given[:-1], given[-1].new_empty(given[-1].shape[0] + 1, *given[-1].shape[1:]))


@pytest.mark.gpu
@EACH_DTYPE
def test_rows_of_a_weight_more_than_2_to_the_31_apart(dtype: torch.dtype) -> None:
    """The last rows of an expert's weight stand behind its first 2**31 elements."""
    experts, n, k = 2, 2**15, 2**16 + 64
    w = torch.zeros(experts, n, k, dtype=dtype, device=DEVICE)
    w[1, -1] = torch.randn(k, device=DEVICE).to(dtype) / 256
    x = torch.randn(3, k, device=DEVICE).to(dtype)
    case = Routing(torch.tensor([[1], [0], [1]], device=DEVICE), torch.ones(3, 1, device=DEVICE))
    plan, tiles = dense_plan(case, experts)
    out = dense_gemm(x, plan.rows, tiles, w, None, 1, n)[plan.inverse.long()]
    want = w[1, -1].double() @ x[[0, 2]].double().T
    assert float((out[[0, 2], -1].double() - want).norm()) <= FROBENIUS[dtype] * float(want.norm())
    assert (out[:, :-1] == 0).all() and (out[1] == 0).all()
