"""What only a GPU can show: bits across tiles, CUDA graphs, a second device, a sanitizer's view of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.routing import Routing
from quant_moelora.experts import marlin
from quant_moelora.experts.marlin_op import marlin_experts_out
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.layer import MoEExperts
from tests.builders import layer, move, packed, routing, same_bits, scheme
from tests.launched.cases import DEVICE, EACH_DTYPE, check_sanitized
from tests.launched.test_align import check_plan, random_slots
from tests.launched.test_grouped_gemm import HEIGHTS, LOWEST, inputs, run, with_counts

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]


@EACH_DTYPE
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("counts", HEIGHTS, ids=str)
def test_bits_do_not_depend_on_the_tile(
    counts: tuple[int, ...], symmetric: bool, bits: int, dtype: torch.dtype
) -> None:
    """Neither on its height, nor on its width, nor on how x is read: a sum runs over the columns in their order."""
    built = packed(scheme(bits, 64, symmetric), experts=3, halves=2, n=128, k=384, bias=True)
    case = with_counts(*counts)
    x = inputs(case, "gather", 384, dtype)  # top_k is 1: rows of tokens are rows of pairs
    first = run(built, x, case, "gather", LOWEST)
    by_pair = dict(zip(first.pairs, first.out, strict=True))
    for tile in (
        Tile(16, 128, 64),
        Tile(32, 64, 64),
        Tile(32, 128, 64, stages=3),
        Tile(64, 128, 64, mixed=True, group_m=2),
        Tile(64, 64, 64),
        Tile(64, 256, 64, mixed=True, group_m=2),
        Tile(128, 128, 64, mixed=True, group_m=4),
        Tile(128, 64, 64),
    ):
        for mode in ("gather", "sorted"):
            assert same_bits(run(built, x, case, mode, tile).out, first.out), (tile, mode)
    direct = run(built, x, case, "direct tokens", LOWEST)
    for pair, row in zip(direct.pairs, direct.out, strict=True):
        assert same_bits(row, by_pair[pair])


@EACH_DTYPE
@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("bm", [32, 128])
def test_a_fused_activation_has_the_bits_of_its_own_kernel(bm: int, bn: int, dtype: torch.dtype) -> None:
    built = packed(scheme(4, 64), experts=3, halves=2, n=128, k=192, bias=True)
    case = with_counts(20, 0, 77)
    x = inputs(case, "gather", 192, dtype)
    tile = Tile(bm, bn, 64, mixed=bm >= 64)
    gate_up = run(built, x, case, "gather", tile)
    fused = Tile(bm, 128, 64, mixed=bm >= 64)
    h = run(built, x, case, "gather", fused, columns=128, activation=Activation("silu"))
    from quant_moelora.kernels.activation.launch import activate

    out = torch.full_like(h.out, torch.nan).to(DEVICE)
    rows, ids = torch.tensor(gate_up.pairs, dtype=torch.int32, device=DEVICE), case.topk_ids.to(DEVICE)
    activate(gate_up.out.to(DEVICE), Activation("silu"), ids, None, rows, out, num_experts=3, inter=128)
    assert same_bits(out, h.out)


def on_device(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of a random batch with holes."""
    case = move(routing(tokens, 2, experts), DEVICE)
    return torch.randn(tokens, hidden).to(dtype).to(DEVICE), case.topk_ids, case.topk_weights


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 17, 200], ids=["direct", "sorted", "mixed heights"])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_a_cuda_graph_follows_its_inputs(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    """Captured once, replayed with other tokens, other experts and other weights."""
    built = layer(scheme(4, 64, symmetric=False), experts=8, hidden=192, inter=128, act_order=act_order, bias=True)
    captured, eager = (MoEExperts(built.info.to(DEVICE), "marlin") for _ in range(2))
    static = on_device(tokens, 192, 8, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured(*static)  # compiles, and allocates the buffers
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured(*static)
    answers: list[Tensor] = []
    for _ in range(4):
        batch = on_device(tokens, 192, 8, dtype)
        for held, new in zip(static, batch, strict=True):
            held.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, eager(*batch))
        answers.append(out.clone())
    assert not any(torch.equal(a, answers[0]) for a in answers[1:])


def test_a_cuda_graph_sorts_what_it_finds() -> None:
    """Replayed with other experts and slots."""
    experts = 33
    for tokens, lora in ((7, True), (300, False), (300, True)):
        cases = [routing(tokens, 8, experts, slots=random_slots(tokens, 9) if lora else None) for _ in range(5)]
        static = move(cases[0], DEVICE)
        align(static, experts, 16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan, tiles = align(static, experts, 16)
        for case in cases:
            static.topk_ids.copy_(case.topk_ids)
            if static.slots is not None and case.slots is not None:
                static.slots.copy_(case.slots)
            graph.replay()
            check_plan(plan, tiles, case, experts, 16)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of is not ours
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_compiled_code_has_the_bits_of_eager_mode(act_order: bool, mode: str) -> None:
    """With code that torch generates, and with CUDA graphs that it captures, one for each size."""
    torch.compiler.reset()
    built = layer(scheme(4, 64), experts=8, hidden=192, inter=128, act_order=act_order, bias=True)
    experts = MoEExperts(built.info.to(DEVICE), "marlin")
    experts.prepare(torch.bfloat16)

    def beside(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x + experts(x * 2, ids, weights)  # something to fuse, before and behind

    compiled = torch.compile(beside, fullgraph=True, mode=mode)
    for _ in range(3):  # run, captured, replayed
        for tokens in (17, 3, 64, 1, 200):
            batch = on_device(tokens, 192, 8, torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(compiled(*batch), beside(*batch)), tokens
    torch.compiler.reset()


@EACH_DTYPE
def test_a_captured_twin_writes_where_it_was_told(dtype: torch.dtype) -> None:
    built = layer(scheme(4, 64), experts=8, hidden=192, inter=128)
    experts = MoEExperts(built.info.to(DEVICE), "marlin")
    experts.prepare(dtype)
    assert isinstance(experts._prepared, marlin.MarlinPrepared)
    static = on_device(17, 192, 8, dtype)
    out = torch.full_like(static[0], torch.nan)
    arguments = (*static, *experts._prepared.layer.arguments(), out)
    marlin_experts_out(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        marlin_experts_out(*arguments)
    for held, new in zip(static, on_device(17, 192, 8, dtype), strict=True):
        held.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    assert same_bits(out, experts(*static))


def test_another_device_than_the_current_one() -> None:
    """Kernels run where the tensors are, and the current device stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    built = layer(scheme(4, 64), experts=8, hidden=192, inter=128)
    batch = on_device(17, 192, 8, torch.bfloat16)
    answers: list[Tensor] = []
    for number in range(2):
        experts = MoEExperts(built.info.to(f"cuda:{number}"), "marlin")
        answers.append(experts(*(tensor.to(f"cuda:{number}") for tensor in batch)))
        assert torch.cuda.current_device() == 0
    assert same_bits(*answers)


def test_auto_takes_marlin_where_it_serves() -> None:
    quantised = MoEExperts(layer(scheme(4, 64), experts=4).info.to(DEVICE))
    quantised(*on_device(3, 64, 4, torch.bfloat16))
    assert isinstance(quantised.backend, marlin.MarlinBackend)
    quantised(*on_device(3, 64, 4, torch.float32))
    assert quantised.backend is not None and quantised.backend.name == "reference"


def small_layers() -> None:
    """What the sanitizer watches: every path through the backend, on shapes off every tile."""
    torch.manual_seed(0)
    for bits, symmetric, act_order in ((4, True, False), (4, False, True), (8, False, False)):
        built = layer(scheme(bits, 32, symmetric), experts=8, hidden=72, inter=40, act_order=act_order, bias=act_order)
        experts = MoEExperts(built.info.to(DEVICE), "marlin")
        for tokens in (1, 9, 150):
            assert experts(*on_device(tokens, 72, 8, torch.bfloat16)).isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    check_sanitized(tool, "tests.launched.test_gpu_only", "small_layers")


def test_no_pair_is_routed_here() -> None:
    experts = MoEExperts(layer(scheme(4, 64), experts=4).info.to(DEVICE), "marlin")
    x = torch.full((5, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    nobody = Routing(torch.full((5, 2), -1, device=DEVICE), torch.ones(5, 2, device=DEVICE))
    assert (experts(x, nobody.topk_ids, nobody.topk_weights) == 0).all()
