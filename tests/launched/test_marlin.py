"""The marlin backend as a layer: the matrix of what it serves, and which bits do not depend on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.layer import LayerTiles
from quant_moelora.layer import MoEExperts
from tests.builders import Layer, adapter, context, expected, layer, routing, same_bits, scheme
from tests.launched.cases import (
    DEVICE,
    DTYPES,
    EACH_DTYPE,
    FROBENIUS,
    INTERPRETED,
    MARKS,
    cast_scales,
    label,
    pairwise,
)

pytestmark = [*MARKS, pytest.mark.usefixtures("serving")]
# INTER is no whole number of tiles of 64, and interpreted neither is HIDDEN.
HIDDEN, INTER = (40, 72) if INTERPRETED else (8 * 72, 200)
EXPERTS = 8
# 1 token: each pair is a tile; then tiles of 16 and 32 rows, and mixed ones of 128.
TOKENS = (1, 3, 40) if INTERPRETED else (1, 3, 17, 64, 300)
# gate and up are two GEMMs' outputs, whose errors the slope of the activation takes up to 1 + |gate| times, and h, w2,
# y and the output are rounded once each: some ten independent roundings, where a GEMM has the two of FROBENIUS. That is
# sqrt(5) times its error, and few rows of one expert scatter around it.
LAYER = {dtype: 2.5 * bound for dtype, bound in FROBENIUS.items()}
EACH_SIZE = pytest.mark.parametrize("tokens", TOKENS)


@dataclass(frozen=True)
class Case:
    """A layer with the meaning of the scales that the kernels hold, and its module."""

    built: Layer
    experts: MoEExperts
    dtype: torch.dtype

    @property
    def info(self) -> MoEQuantInfo:
        return self.built.info

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.info.hidden_size).to(self.dtype)

    def run(self, x: Tensor, routed: Routing) -> Tensor:
        """The output, on the CPU."""
        arguments = (x, routed.topk_ids, routed.topk_weights)
        slots = None if routed.slots is None else routed.slots.to(DEVICE)
        out = self.experts(*(tensor.to(DEVICE) for tensor in arguments), slots)
        assert out.dtype == self.dtype and out.shape == x.shape and out.device.type == DEVICE.type
        return out.cpu()


def make(quant: QuantScheme, dtype: torch.dtype, **options: Any) -> Case:
    built = layer(quant, experts=EXPERTS, hidden=HIDDEN, inter=INTER, **options)
    assert isinstance(built.info.w13, PackedWeight) and isinstance(built.info.w2, PackedWeight)
    held = replace(built.info, w13=cast_scales(built.info.w13, dtype), w2=cast_scales(built.info.w2, dtype))
    gate, up, down = held.dequantize()
    built = replace(built, gate=None if gate is None else gate.double(), up=up.double(), down=down.double())
    return Case(built, MoEExperts(built.info.to(DEVICE), "marlin"), dtype)


def relative_error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def unchanged(out: Tensor, before: Tensor) -> bool:
    """The same bits; interpreted, few other ones: those of numpy's product depend on where in its tile a row stands."""
    return same_bits(out, before) or (INTERPRETED and relative_error(out, before.double()) < FROBENIUS[out.dtype])


MATRIX = pairwise(
    {
        "dtype": DTYPES,
        "bits": [4, 8],
        "symmetric": [True, False],
        "group": [32, 48, 64, 128, None],
        "scale_bf16": [False, True],
        "act_order": [False, True],
        "bias": [False, True],
        "activation": [
            Activation("silu"),
            Activation("gelu"),
            Activation("gelu_tanh"),
            Activation("relu2", gated=False),
            Activation("swigluoai", alpha=1.702, limit=1.0),
        ],
        "router_weight": ["output", "input"],
        "tokens": TOKENS,
    }
)


@pytest.mark.parametrize("chosen", MATRIX, ids=label)
def test_against_float64(chosen: dict[str, Any]) -> None:
    dtype, tokens = chosen["dtype"], chosen["tokens"]
    quant = scheme(chosen["bits"], chosen["group"], chosen["symmetric"], chosen["scale_bf16"])
    options = {name: chosen[name] for name in ("act_order", "bias", "activation", "router_weight")}
    case = make(quant, dtype, **options)
    x, routed = case.x(tokens), routing(tokens, 2, EXPERTS)
    routed.topk_ids[0] = torch.tensor([EXPERTS - 1, -1])  # so that some pair has an expert, and some has none
    want, _ = expected(case.built, x, routed)
    assert relative_error(case.run(x, routed), want) <= LAYER[dtype]


@EACH_DTYPE
@EACH_SIZE
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_the_same_bits_every_time(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    case = make(scheme(4, 32), dtype, act_order=act_order)
    x, routed = case.x(tokens), routing(tokens, 2, EXPERTS)
    first = case.run(x, routed)
    for _ in range(1 if INTERPRETED else 20):
        assert same_bits(case.run(x, routed), first)


@EACH_DTYPE
@EACH_SIZE
def test_experts_without_tokens(tokens: int, dtype: torch.dtype) -> None:
    """All tokens choose expert 5, some nothing: other experts' weights are not in the result."""
    case = make(scheme(8, 64, symmetric=False), dtype)
    ids = torch.full((tokens, 2), 5)
    ids[:, 1] = torch.tensor([-1, EXPERTS, 2**31 - 1, -(2**31)]).repeat(tokens)[:tokens]
    routed = Routing(ids, torch.rand(tokens, 2) + 0.25)
    x = case.x(tokens)
    want, _ = expected(case.built, x, routed)
    assert relative_error(case.run(x, routed), want) <= LAYER[dtype]


def three_adapters(case: Case) -> list[dict[tuple[int, str], Any]]:
    """Of different ranks, projections and experts."""
    return [
        adapter(case.info, case.dtype, ranks={"gate": 4, "up": 3, "down": 5}),
        adapter(case.info, case.dtype, ranks={"gate": 2, "up": 2}, experts=[0, 3], shared=True),
        adapter(case.info, case.dtype, ranks={"down": 8}, experts=[1]),
    ]


@EACH_DTYPE
@EACH_SIZE
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_rows_without_an_adapter(act_order: bool, tokens: int, dtype: torch.dtype) -> None:
    """They have the bits of the base model, whose activation is fused and whose few pairs are not sorted."""
    case = make(scheme(4, 32, symmetric=False), dtype, act_order=act_order, bias=True)
    x, routed = case.x(tokens), routing(tokens, 2, EXPERTS)
    base = case.run(x, routed)
    adapters = three_adapters(case)
    case.experts.attach(context(case.info, adapters, dtype, DEVICE))
    assert unchanged(case.run(x, routed), base), "attached, and nobody asks for one"
    slots = torch.arange(tokens, dtype=torch.int32) % 4 - 1
    mixed = replace(routed, slots=slots)
    out = case.run(x, mixed)
    assert unchanged(out[slots < 0], base[slots < 0])
    want, _ = expected(case.built, x, mixed, adapters)
    assert relative_error(out, want) <= LAYER[dtype]  # a delta is added before gate, up and y are rounded


@EACH_DTYPE
@EACH_SIZE
def test_a_fused_activation_changes_no_bit(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(scheme(4, 64), dtype, bias=True)
    x, routed = case.x(tokens), routing(tokens, 2, EXPERTS)
    out = case.run(x, routed)
    monkeypatch.setattr(TileSource, "tiles", changed(w13_fused=None))  # a launch of its own, as with adapters
    assert unchanged(case.run(x, routed), out)


def changed(**changes: Any) -> Callable[..., LayerTiles]:
    """`TileSource.tiles` with changes."""
    own = TileSource.tiles
    return lambda *asked: replace(own(*asked), **changes)


@EACH_DTYPE
def test_sorting_few_pairs_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(scheme(4, 64), dtype)
    for _ in range(3):
        x, routed = case.x(1), routing(1, 2, EXPERTS)
        answers: list[Tensor] = []
        for direct in (False, True):
            with monkeypatch.context() as patched:
                patched.setattr(TileSource, "tiles", changed(direct=direct))
                answers.append(case.run(x, routed))
        assert unchanged(*answers)


@EACH_DTYPE
def test_inputs_are_left_alone_and_may_be_strided(dtype: torch.dtype) -> None:
    case = make(scheme(4, 64), dtype)
    x, routed = case.x(5), routing(5, 2, EXPERTS)
    wide = torch.full((5, HIDDEN + 8), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, :HIDDEN] = x.to(DEVICE)
    ids, weights = (t.to(DEVICE).T.contiguous().T for t in (routed.topk_ids, routed.topk_weights))
    out = case.experts(wide[:, :HIDDEN], ids, weights)
    assert same_bits(out, case.run(x, routed))
    assert same_bits(wide[:, :HIDDEN], x) and wide[:, HIDDEN:].isnan().all()
    assert torch.equal(ids.cpu(), routed.topk_ids) and torch.equal(weights.cpu(), routed.topk_weights)
