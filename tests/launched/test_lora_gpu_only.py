"""Adapters as only a GPU can show them: CUDA graphs, torch's compiler, a sanitizer's view of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.layer import MoEExperts
from tests.builders import adapter, context, layer, same_bits, scheme
from tests.launched.cases import DEVICE, EACH_DTYPE, check_sanitized
from tests.launched.test_lora import in_turn, some_adapters

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]
EXPERTS, HIDDEN, INTER, SLOTS, LARGEST = 8, 576, 200, 3, 40


def batch(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ids, weights and slots, the base model's, and one that there is not, among them."""
    routed = in_turn(tokens, 2, EXPERTS, SLOTS + 1)
    assert routed.slots is not None
    slots = routed.slots[torch.randperm(tokens)].to(DEVICE)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    return x.to(DEVICE), routed.topk_ids.to(DEVICE), routed.topk_weights.to(DEVICE), slots


def random_context(info: MoEQuantInfo, dtype: torch.dtype) -> MoELoRAContext:
    """As many adapters of other ranks, experts and scalings, in an arena of one size."""
    held = [
        adapter(
            info,
            dtype,
            ranks=dict(zip(("gate", "up", "down"), torch.randint(1, LARGEST + 1, (3,)).tolist(), strict=True)),
            scaling=float(torch.randn(())),
            experts=torch.randperm(EXPERTS)[:6].tolist(),
        )
        for _ in range(SLOTS)
    ]
    ctx = context(info, held, dtype, DEVICE)
    size = SLOTS * EXPERTS * LARGEST * (3 * HIDDEN + 3 * info.inter_pad)
    arena = F.pad(ctx.arena, (0, size + 64 * 4 * SLOTS * EXPERTS - ctx.arena.numel()), value=torch.nan)
    return replace(ctx, arena=arena, max_rank=LARGEST)


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 17, 200, 3000], ids=["direct", "riding", "alone", "large tiles"])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_a_cuda_graph_follows_its_adapters(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    """Captured once; replayed with other adapters in the context's tensors, other slots, experts and tokens."""
    built = layer(
        scheme(4, 64, symmetric=False), experts=EXPERTS, hidden=HIDDEN, inter=INTER, act_order=act_order, bias=True
    )
    info = built.info.to(DEVICE)
    captured, eager = (MoEExperts(info, "marlin") for _ in range(2))
    static, ctx = batch(tokens, dtype), random_context(built.info, dtype)
    captured.attach(ctx)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured(*static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured(*static)
    answers: list[Tensor] = []
    for _ in range(4):
        given, other = batch(tokens, dtype), random_context(built.info, dtype)
        for held, new in zip((*static, *ctx.tensors().values()), (*given, *other.tensors().values()), strict=True):
            held.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        eager.attach(other)
        assert same_bits(out, eager(*given))
        answers.append(out.clone())
    assert not any(same_bits(a, answers[0]) for a in answers[1:])


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_the_same_bits_every_time(tokens: int, dtype: torch.dtype) -> None:
    """Nothing is read before it is written: a race would show in one of the runs."""
    built = layer(scheme(4, 64), experts=EXPERTS, hidden=HIDDEN, inter=INTER)
    experts = MoEExperts(built.info.to(DEVICE), "marlin")
    experts.attach(random_context(built.info, dtype))
    given = batch(tokens, dtype)
    first = experts(*given)
    answers = [experts(*given) for _ in range(50)]  # one behind the other, so that launches overlap
    assert all(same_bits(answer, first) for answer in answers)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of is not ours
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code_has_the_bits_of_eager_mode(mode: str) -> None:
    """With code that torch generates, and with CUDA graphs that it captures; the tables change in between."""
    torch.compiler.reset()
    built = layer(scheme(4, 64), experts=EXPERTS, hidden=HIDDEN, inter=INTER)
    experts = MoEExperts(built.info.to(DEVICE), "marlin")
    experts.prepare(torch.bfloat16)
    ctx = random_context(built.info, torch.bfloat16)
    experts.attach(ctx)

    def beside(x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        return x + experts(x * 2, ids, weights, slots)  # something to fuse, before and behind

    compiled = torch.compile(beside, fullgraph=True, mode=mode)
    for _ in range(3):  # run, captured, replayed
        for tokens in (17, 64, 200):
            given = batch(tokens, torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(compiled(*given), beside(*given)), tokens
        ctx.scaling.neg_()
    torch.compiler.reset()


def small_layers() -> None:
    """What the sanitizer watches: every path of LoRA, with slots and ids that there are not, on shapes off every tile.

    The arena ends with the last factor.
    """
    torch.manual_seed(0)
    gated = Activation("silu")
    for act_order, function in ((False, gated), (True, gated), (False, Activation("relu2", gated=False))):
        built = layer(scheme(4, 32), experts=8, hidden=72, inter=40, act_order=act_order, activation=function)
        experts = MoEExperts(built.info.to(DEVICE), "marlin")
        for count in (1, 8):
            held = some_adapters(built.info, torch.bfloat16, count)
            ctx = context(built.info, held, torch.bfloat16, DEVICE)
            experts.attach(replace(ctx, arena=ctx.arena[:-8].clone()))
            for tokens in (1, 9, 150):
                routed = in_turn(tokens, 2, 8, count)
                assert routed.slots is not None
                slots = routed.slots.clone()
                slots[1::3] = torch.tensor([count, 2**31 - 1, -(2**31), -2]).repeat(tokens)[: len(slots[1::3])].int()
                routed.topk_ids[2::5, 0] = 2**31 - 1
                routed.topk_ids[3::5, 0] = -(2**31)
                x = torch.randn(tokens, 72).to(torch.bfloat16)
                out = experts(*(t.to(DEVICE) for t in (x, routed.topk_ids, routed.topk_weights, slots))).cpu()
                assert out[(slots >= -1) & (slots < count)].isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    check_sanitized(tool, "tests.launched.test_lora_gpu_only", "small_layers")
