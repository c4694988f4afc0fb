"""The operators, and layers under torch.compile: one graph without breaks, few of them, and the bits of eager mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import ShapeError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts.marlin import MarlinPrepared
from quant_moelora.experts.marlin_op import (
    MarlinLayer,
    marlin_experts,
    marlin_experts_out,
    marlin_lora_experts,
    marlin_lora_experts_out,
)
from quant_moelora.kernels.activation.op import activation, activation_out
from quant_moelora.kernels.align.op import align, align_out
from quant_moelora.kernels.grouped_gemm.op import grouped_gemm, grouped_gemm_out
from quant_moelora.kernels.lora.launch import LayerFacts, LoRATables
from quant_moelora.kernels.lora.op import LoRALayer, lora_activate, lora_moe_sum, lora_moe_sum_out, lora_shrink13
from quant_moelora.kernels.moe_sum.op import moe_sum, moe_sum_out
from quant_moelora.layer import MoEExperts
from tests.builders import adapter, context, layer, routing, same_bits, scheme
from tests.kernels.test_align import slow_align
from tests.launched.cases import DEVICE, DTYPES, FROBENIUS, INTERPRETED, MARKS, Counting, held_values
from tests.launched.test_align import check_tiles

pytestmark = [*MARKS, pytest.mark.usefixtures("serving")]
EXPERTS, HIDDEN, INTER, TOP_K = (3, 40, 40, 2) if INTERPRETED else (4, 72, 40, 2)
SLOTS = 2  # of `two_adapters`
DTYPE = DTYPES[0]
# Tiles of 16 rows and of 32; interpreted, a program takes long.
SIZES = (7, 3, 1, 0) if INTERPRETED else (17, 3, 64, 200, 1, 0)
# Interpreted, every forward takes seconds, and whether sizes are marked is torch's business.
SIZED = pytest.mark.parametrize(
    ("mark", "act_order"),
    [pytest.param(True, True, id="marked"), *(() if INTERPRETED else (pytest.param(False, False, id="automatic"),))],
)


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(**options: Any) -> MoEExperts:
    built = layer(scheme(4, 32, symmetric=False), experts=EXPERTS, hidden=HIDDEN, inter=INTER, **options)
    return MoEExperts(built.info.to(DEVICE), "marlin")


def two_adapters(experts: MoEExperts) -> MoELoRAContext:
    info = experts.info
    held = [
        adapter(info, DTYPE, ranks={"gate": 4, "up": 3, "down": 5}),
        adapter(info, DTYPE, ranks={"down": 2}, experts=[0, 2]),
    ]
    return context(info, held, DTYPE, DEVICE)


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    case = routing(tokens, TOP_K, EXPERTS)
    x = torch.randn(tokens, HIDDEN, device=DEVICE).to(DTYPE)
    return x, case.topk_ids.to(DEVICE), case.topk_weights.to(DEVICE)


def check(compiled: Any, experts: MoEExperts, sizes: Iterable[int], *, mark: bool) -> None:
    for tokens in sizes:
        arguments = batch(tokens)
        if mark:
            for tensor in arguments:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        assert same_bits(compiled(*arguments), experts(*arguments)), tokens


@SIZED
def test_few_graphs_for_all_sizes(act_order: bool, mark: bool) -> None:
    """One for 2 tokens and more, one each for 1 and none; unmarked, the first size has one of its own."""
    experts, count = make(act_order=act_order, bias=True), Counting()
    experts.prepare(DTYPE)
    compiled = torch.compile(experts, fullgraph=True, backend=count)
    check(compiled, experts, SIZES[:-2], mark=mark)
    assert len(count.graphs) == (1 if mark else 2)
    check(compiled, experts, SIZES, mark=mark)
    assert len(count.graphs) == (3 if mark else 4)
    for called in count.operators():
        assert {name for name in called if "quant_moelora" in name} == {"quant_moelora.marlin_experts.default"}


@SIZED
def test_few_graphs_with_adapters(act_order: bool, mark: bool) -> None:
    """As many as without; the tables are inputs, in whose places other adapters follow without another graph."""
    experts, count = make(act_order=act_order), Counting()
    ctx = two_adapters(experts)
    experts.prepare(DTYPE)
    experts.attach(ctx)
    compiled = torch.compile(experts, fullgraph=True, backend=count)
    for tokens in SIZES[:-2]:
        slots = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 3 - 1
        arguments = (*batch(tokens), slots)
        if mark:
            for tensor in arguments:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        answer = compiled(*arguments)
        assert same_bits(answer, experts(*arguments)), tokens
        if not INTERPRETED or tokens == SIZES[0]:
            ctx.scaling.neg_()
            other = compiled(*arguments)
            assert same_bits(other, experts(*arguments)) and not torch.equal(other, answer), tokens
    assert len(count.graphs) == (1 if mark else 2)
    for called in count.operators():
        assert {name for name in called if "quant_moelora" in name} == {"quant_moelora.marlin_lora_experts.default"}


def test_one_graph_through_autograds_compiler() -> None:
    """Which runs the fake implementation with symbols for sizes, and plans memory by it."""
    experts = make(activation=Activation("swigluoai", alpha=1.702, limit=1.0), router_weight="input")
    experts.prepare(DTYPE)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    check(compiled, experts, SIZES[:-2], mark=True)


def test_weights_are_static() -> None:
    """Compiled CUDA graphs copy every input that is not, at each replay."""
    experts, count = make(bias=True, act_order=True), Counting()
    experts.prepare(DTYPE)
    torch.compile(experts, fullgraph=True, backend=count)(*batch(3))
    inputs = {str(node.target): node.meta for node in count.graphs[0].graph.nodes if node.op == "placeholder"}
    held = [meta["tensor_dict"] for name, meta in inputs.items() if "prepared" in name]
    assert len(held) == sum(isinstance(value, Tensor) for value in marlin_layer(experts).arguments())
    assert all("_dynamo_static_input_type" in facts for facts in held)


def test_the_first_forward_prepares_outside_of_the_graph() -> None:
    experts, count = make(), Counting()
    compiled = torch.compile(experts, backend=count)
    arguments = batch(3)
    first = compiled(*arguments)
    assert experts.backend is not None
    compiled(*arguments)  # compiled anew, now that there is something to run
    graphs = len(count.graphs)
    assert same_bits(compiled(*arguments), first) and len(count.graphs) == graphs
    assert "quant_moelora.marlin_experts.default" in count.operators()[-1]


def test_a_full_graph_has_to_be_prepared_for() -> None:
    compiled = torch.compile(make(), fullgraph=True, backend=Counting())
    with pytest.raises(Unsupported, match=r"call MoEExperts.prepare before compiling"):
        compiled(*batch(3))


def test_attached_adapters_are_served_by_compiled_layers() -> None:
    """And no longer, once they are detached."""
    experts = make()
    compiled = torch.compile(experts, backend=Counting())
    arguments, slots = batch(6), torch.tensor([0, -1, 0, 0, -1, 0], device=DEVICE)
    base = compiled(*arguments)
    ranks = {"gate": 4, "up": 4, "down": 4}
    experts.attach(context(experts.info, [adapter(experts.info, DTYPE, ranks=ranks)], DTYPE, DEVICE))
    adapted = compiled(*arguments, slots)
    assert same_bits(adapted, experts(*arguments, slots)) and not torch.equal(adapted, base)
    experts.attach(None)
    assert same_bits(compiled(*arguments), base)


def test_nothing_inside_an_operator_is_traced() -> None:
    """Even when the frame that calls it could not be compiled, so that torch tries the functions it calls."""
    count, arguments = Counting(), (*batch(3), *marlin_layer(make()).arguments())

    @contextlib.contextmanager
    def broken() -> Generator[None]:
        yield

    def outside() -> Tensor:
        with broken():
            torch._dynamo.graph_break()
            return marlin_experts(*arguments)

    assert same_bits(torch.compile(outside, backend=count)(), marlin_experts(*arguments))
    assert not count.graphs


def test_errors_are_those_of_eager_mode() -> None:
    experts = make()
    experts.prepare(DTYPE)
    x, ids, weights = batch(5)
    with pytest.raises(Unsupported, match=r"ShapeError"):
        torch.compile(experts, fullgraph=True, backend=Counting())(x, ids[:4], weights[:4])
    # torch 2.11's compiler fails where an error is raised behind a graph break, and names the line that raises it.
    raised = (ShapeError, Unsupported, AssertionError)
    with pytest.raises(raised, match=r"topk_ids: got 4 tokens, expected 5 tokens|raise ShapeError"):
        torch.compile(experts, backend=Counting())(x, ids[:4], weights[:4])


def marlin_layer(experts: MoEExperts) -> MarlinLayer:
    experts.prepare(DTYPE)
    assert isinstance(experts._prepared, MarlinPrepared)
    return experts._prepared.layer


@functools.cache
def calls(tokens: int, *, lora: bool, act_order: bool) -> dict[str, tuple[tuple[Any, Any], tuple[Any, ...]]]:
    """Each operator and its twin, with arguments; every pair has an expert, so that every row is written.

    Of LoRA's operators the last: the other two leave what belongs to no adapter as it was.
    """
    experts = make(act_order=act_order, bias=True)
    layer, ctx = marlin_layer(experts), two_adapters(experts)
    tables, info = LoRATables.of(ctx), experts.info
    x, ids, weights = batch(tokens)
    ids = ids.clamp(0, EXPERTS - 1)
    some = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 3 - 1
    slots = some if lora else None
    rows, inverse, _, _, tiles = align(ids, slots, EXPERTS, SLOTS, *layer.tiles)
    h = torch.randn(tokens * TOP_K, layer.w13.n_pad, device=DEVICE).to(DTYPE)
    product = (grouped_gemm, grouped_gemm_out)
    gate_up = torch.randn(tokens * TOP_K, layer.w13.rows, device=DEVICE)
    y = torch.randn(tokens * TOP_K, HIDDEN, device=DEVICE).to(DTYPE)
    routed = (ids, weights, some, *align(ids, some, EXPERTS, SLOTS, *layer.tiles)[:4:3])
    facts = LayerFacts(info.activation, INTER, info.inter_pad, weigh_input=False)
    lora_layer = LoRALayer(tables, facts, HIDDEN).arguments()
    v13 = lora_shrink13(x, *routed, *lora_layer)
    _, v2 = lora_activate(gate_up.to(DTYPE), v13, *routed, *lora_layer)
    silu = ("silu", True, None, None, EXPERTS, INTER, layer.w13.n_pad, DTYPE)
    return {
        "activation": ((activation, activation_out), (gate_up, ids, weights, rows, *silu)),
        "moe_sum": ((moe_sum, moe_sum_out), (y, ids, weights, inverse, EXPERTS, HIDDEN, DTYPE)),
        "marlin_experts": ((marlin_experts, marlin_experts_out), (x, ids, weights, *layer.arguments())),
        "marlin_lora_experts": (
            (marlin_lora_experts, marlin_lora_experts_out),
            (x, ids, weights, some, *layer.arguments(), *tables),
        ),
        "lora_moe_sum": ((lora_moe_sum, lora_moe_sum_out), (y, v2, inverse, *routed, *lora_layer)),
        "align": ((align, align_out), (ids, slots, EXPERTS, SLOTS, *layer.tiles)),
        "w13": (product, (x, ids, rows, tiles, True, layer.w13.rows, *layer.tiles, *layer.w13)),
        "w2": (product, (h, ids, rows, tiles, False, layer.w2.n, *layer.tiles, *layer.w2)),
    }


OPERATORS = ("marlin_experts", "marlin_lora_experts", "align", "w13", "activation", "w2", "moe_sum", "lora_moe_sum")
NAMES = pytest.mark.parametrize("name", OPERATORS)
FORMS = pytest.mark.parametrize(
    ("tokens", "lora", "act_order"), [(1, False, False), (9, True, True)], ids=["base", "lora"]
)


def results(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max)


@NAMES
@FORMS
def test_twins_write_what_operators_return(tokens: int, lora: bool, act_order: bool, name: str) -> None:
    (make_results, fill), arguments = calls(tokens, lora=lora, act_order=act_order)[name]
    made = results(make_results(*arguments))
    held = [poisoned(tensor) for tensor in made]
    assert fill(*arguments, *held) is None
    assert all(same_bits(one, two) for one, two in zip(held, made, strict=True))


@NAMES
def test_twins_refuse_other_tensors(name: str) -> None:
    (make_results, fill), arguments = calls(3, lora=True, act_order=False)[name]
    *others, last = results(make_results(*arguments))
    wrong = {
        r"got shape .*, expected \[": last.new_empty(last.shape[0] + 1, *last.shape[1:]),
        r"got dtype torch.float64, expected torch\.": last.double(),
        r"got strides .*, expected a contiguous tensor": last.new_empty(*last.shape[:-1], 2 * last.shape[-1])[..., ::2],
    }
    for message, tensor in wrong.items():
        with pytest.raises(ShapeError, match=message):
            fill(*arguments, *others, tensor)


@pytest.mark.parametrize(("name", "lora"), [*((name, True) for name in OPERATORS), ("align", False)])
def test_operators_are_what_they_say(name: str, lora: bool) -> None:
    """Their schemas (what is mutated, what aliases) and their fake implementations, also with symbols for sizes."""
    operators, arguments = calls(9, lora=lora, act_order=lora)[name]
    torch.library.opcheck(operators[0], arguments)
    given = [poisoned(tensor) for tensor in results(operators[0](*arguments))]  # so that writing to them shows
    torch.library.opcheck(operators[1], (*arguments, *given))


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_products_with_adapters_trace_for_all_sizes(lora: bool) -> None:
    """The steps between which adapters come in: one graph, and no size of theirs depends on the routing."""
    layer, count = marlin_layer(make(act_order=True)), Counting()

    def steps(x: Tensor, ids: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, _, _, segments, tiles = align(ids, slots, EXPERTS, SLOTS, *layer.tiles)
        return grouped_gemm(x, ids, rows, tiles, True, layer.w13.rows, *layer.tiles, *layer.w13), segments

    compiled = torch.compile(steps, fullgraph=True, backend=count, dynamic=True)
    for tokens in SIZES[:-2]:
        x, ids, _ = batch(tokens)
        slots = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 3 - 1 if lora else None
        got, want = compiled(x, ids, slots), steps(x, ids, slots)
        assert all(same_bits(one, two) for one, two in zip(got, want, strict=True))
    assert len(count.graphs) == 1


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 150])
def test_align_lists_every_row_once(tokens: int, lora: bool) -> None:
    case = routing(tokens, TOP_K, EXPERTS)
    slots = torch.arange(tokens, dtype=torch.int32) % 3 - 1 if lora else None
    source = marlin_layer(make()).tiles
    rows, inverse, offsets, segments, tiles = align(
        case.topk_ids.to(DEVICE), None if slots is None else slots.to(DEVICE), EXPERTS, SLOTS, *source
    )
    want = slow_align(replace(case, slots=slots, num_slots=SLOTS), EXPERTS)
    assert [rows.tolist(), inverse.tolist(), offsets.tolist()] == list(want[:3])
    pairs = case.num_pairs
    check_tiles(tiles, offsets.tolist(), source.tiles(max(1, pairs), DEVICE).bm, EXPERTS + pairs // 16)
    assert len(tiles) == EXPERTS + pairs // 16 and [tuple(row) for row in segments.tolist()] == (
        want[3] if lora else []
    )


@pytest.mark.parametrize("inter", [96, 1024], ids=["whole", "split"])
def test_a_product_against_float64(inter: int) -> None:
    """Of sorted rows, whose columns are divided among programs where they are many."""
    built = layer(scheme(4, 32, symmetric=False), experts=EXPERTS, hidden=72, inter=inter, bias=True)
    held = marlin_layer(MoEExperts(built.info.to(DEVICE), "marlin"))
    case = routing(9, TOP_K, EXPERTS)
    ids = case.topk_ids.to(DEVICE)
    rows, _, offsets, _, tiles = align(ids, None, EXPERTS, 0, *held.tiles)
    assert (held.tiles.tiles(case.num_pairs, DEVICE).w2.split > 1) == (inter == 1024)
    x = torch.randn(case.num_pairs, inter).to(DTYPE)
    out = grouped_gemm(x.to(DEVICE), ids, rows, tiles, False, 72, *held.tiles, *held.w2).cpu()
    w2 = built.info.w2
    assert isinstance(w2, PackedWeight) and w2.bias is not None
    values = held_values(w2, DTYPE)[:, 0]
    for row, pair in enumerate(rows.tolist()[: int(offsets[-1])]):
        expert = int(case.topk_ids.flatten()[pair])
        want = values[expert] @ x[row].double() + w2.bias[expert, :72]
        assert float((out[row].double() - want).norm()) <= FROBENIUS[DTYPE] * float(want.norm())


def test_a_gradient_is_not_passed_over_in_silence() -> None:
    experts = make()
    x, ids, weights = batch(3)
    with torch.enable_grad():
        out = experts(x.requires_grad_(), ids, weights)
        with pytest.warns(UserWarning, match="quant_moelora::marlin_experts: an autograd kernel was not registered"):
            out.sum().backward()
