"""What every registered backend must do: agree with float64, with and without adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.backend import ExpertsBackend
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, PackedWeight
from quant_moelora.experts.registry import BACKENDS
from quant_moelora.layer import MoEExperts
from tests.builders import (
    Adapter,
    Layer,
    activate,
    adapter,
    context,
    delta,
    expected,
    layer,
    roundoff,
    routing,
    same_bits,
    scheme,
    threads,
)

BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
ACTIVATION_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

QUANTISED = (
    scheme(4, 32),
    scheme(4, 128, symmetric=False),
    scheme(8, None, bf16=True),
    scheme(8, 48, symmetric=False),
)
SCHEME = pytest.mark.parametrize(
    ("quant", "act_order"),
    [
        *(pytest.param(quant, False, id=quant.name) for quant in QUANTISED),
        *(pytest.param(quant, True, id=f"{quant.name}_act") for quant in QUANTISED),
        *(pytest.param(dtype, False, id=str(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)

KIND = pytest.mark.parametrize("quant", [scheme(4, 32), torch.bfloat16], ids=["int4", "none"])

# E, H, I, tokens, k
DIMS = pytest.mark.parametrize(
    "dims",
    [(4, 128, 64, 9, 2), (3, 80, 96, 8, 3), (1, 64, 64, 5, 1), (2, 64, 32, 1, 2)],
    ids=["2I=H", "ragged", "one expert", "one token"],
)

pytestmark = pytest.mark.usefixtures("_one_thread", "_no_grad")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Case:
    """A layer on a device, its input and what it must answer."""

    built: Layer
    experts: MoEExperts
    x: Tensor
    routing: Routing
    device: torch.device

    def run(self, x: Tensor | None = None, slots: Tensor | None = None, tokens: slice = slice(None)) -> Tensor:
        """The layer's output on the CPU."""
        x = self.x if x is None else x
        arguments = (x[tokens], self.routing.topk_ids[tokens], self.routing.topk_weights[tokens])
        moved = [tensor.to(self.device) for tensor in arguments]
        ids = None if slots is None else slots[tokens].to(self.device)
        out = self.experts(*moved, adapter_ids=ids)
        assert out.device.type == self.device.type and out.dtype == x.dtype and out.shape == x[tokens].shape
        return out.cpu()

    def attach(self, adapters: Sequence[Adapter]) -> None:
        info = self.experts.info
        self.experts.attach(context(self.built.info, adapters, self.x.dtype, info.device))


def serve_or_skip(backend: ExpertsBackend, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype) -> None:
    """Skip with the backend's reasons; fail where a backend declines what it is there for."""
    verdict = backend.supports(info.to("meta"), device, dtype, lora=True)
    serves = {
        "reference": True,
        "cpu": device.type == "cpu" and isinstance(info.w13, PackedWeight),
        "unquantized": device.type == "cuda" and dtype != torch.float32 and isinstance(info.w13, DenseWeight),
        "marlin": device.type == "cuda" and dtype != torch.float32 and isinstance(info.w13, PackedWeight),
    }
    assert verdict.ok == serves.get(backend.name, verdict.ok), verdict.reasons
    if not verdict.ok:
        pytest.skip("; ".join(verdict.reasons))


def make(
    backend: ExpertsBackend,
    quant: QuantScheme | torch.dtype,
    dtype: torch.dtype,
    dims: tuple[int, int, int, int, int],
    device: torch.device,
    **options: Any,
) -> Case:
    """A case, or a skip with the backend's reasons if it declines what it may decline."""
    experts, hidden, inter, tokens, top_k = dims
    built = layer(quant, experts=experts, hidden=hidden, inter=inter, **options)
    serve_or_skip(backend, built.info, device, dtype)
    module = MoEExperts(built.info.to(device), backend.name)
    return Case(built, module, torch.randn(tokens, hidden).to(dtype), routing(tokens, top_k, experts), device)


def three_adapters(info: MoEQuantInfo, dtype: torch.dtype) -> list[Adapter]:
    """Of different ranks, scalings, projections and experts."""
    last = info.num_experts - 1
    all_of_it = adapter(info, dtype, ranks={"gate": 4, "up": 3, "down": 5}, scaling=1.5)
    fused = adapter(info, dtype, ranks={"gate": 2, "up": 2}, scaling=-2.0, experts=[0], shared=True)
    down = adapter(info, dtype, ranks={"down": 8}, scaling=3.0, experts=[last])
    if not info.activation.gated:
        all_of_it, fused = ({k: v for k, v in a.items() if k[1] != "gate"} for a in (all_of_it, fused))
    return [all_of_it, fused, down]


def tolerance(dtype: torch.dtype, hidden: int, size: Tensor) -> Tensor:
    """Error of an output whose products with w2 have the root of squares ``size``.

    gate, up, h and y are each rounded once to dtype, and the roundings are independent, so that they add up as the
    root of squares. One of gate is multiplied by the slope of the activation, at most (1 + |gate|) times relative:
    4 of them with 4 standard deviations. float32 sums of K terms bring sqrt(K) roundings of their own.
    """
    return 16 * (roundoff(dtype) + hidden**0.5 * roundoff(torch.float32)) * size


@BACKEND
@DIMS
@ACTIVATION_DTYPES
@SCHEME
def test_base_is_the_definition(
    backend: ExpertsBackend,
    quant: QuantScheme | torch.dtype,
    act_order: bool,
    dtype: torch.dtype,
    dims: tuple[int, int, int, int, int],
    device: torch.device,
) -> None:
    case = make(backend, quant, dtype, dims, device, act_order=act_order)
    out = case.run()
    want, size = expected(case.built, case.x, case.routing)
    assert ((out.double() - want).abs() <= tolerance(dtype, dims[1], size)).all()
    assert same_bits(case.run(), out), "not the same bits in a second run"


@BACKEND
@DIMS
@ACTIVATION_DTYPES
@SCHEME
def test_an_adapter_adds_its_delta(
    backend: ExpertsBackend,
    quant: QuantScheme | torch.dtype,
    act_order: bool,
    dtype: torch.dtype,
    dims: tuple[int, int, int, int, int],
    device: torch.device,
) -> None:
    """Each adapter on all tokens: the output differs from the base's by the delta, and where that is 0 by no bit."""
    case = make(backend, quant, dtype, dims, device, act_order=act_order)
    adapters = three_adapters(case.built.info, dtype)
    base, (base_want, base_size) = case.run(), expected(case.built, case.x, case.routing)
    case.attach(adapters)
    for slot in range(len(adapters)):
        slots = torch.full((dims[3],), slot, dtype=torch.int32)
        routed = Routing(case.routing.topk_ids, case.routing.topk_weights, slots)
        want, size = expected(case.built, case.x, routed, adapters)
        check_delta(case.run(slots=slots), base, want - base_want, size + base_size, dtype, dims[1])


def check_delta(out: Tensor, base: Tensor, change: Tensor, size: Tensor, dtype: torch.dtype, hidden: int) -> None:
    """``out`` - ``base`` is the delta, token by token.

    Both outputs carry the roundings of `tolerance`; over the elements of a token these average out. The deltas are made
    as large as the output, so that the bound is a small part of the delta: 1/10 in bfloat16, 1e-5 in float32.
    """
    for token in range(len(change)):
        if not change[token].any():
            assert same_bits(out[token], base[token])
            continue
        error = out[token].double() - base[token].double() - change[token]
        bound = float(tolerance(dtype, hidden, size[token]).norm()) / 4
        part = {torch.bfloat16: 0.1, torch.float16: 0.0125, torch.float32: 2e-5}[dtype]
        assert float(error.norm()) <= min(bound, part * float(change[token].norm()))


@BACKEND
@DIMS
@ACTIVATION_DTYPES
@SCHEME
def test_a_mixed_batch(
    backend: ExpertsBackend,
    quant: QuantScheme | torch.dtype,
    act_order: bool,
    dtype: torch.dtype,
    dims: tuple[int, int, int, int, int],
    device: torch.device,
) -> None:
    """Base tokens are bitwise those of the base model; each of the others has its own adapter's delta."""
    case = make(backend, quant, dtype, dims, device, act_order=act_order)
    adapters = three_adapters(case.built.info, dtype)
    base = case.run()
    case.attach(adapters)
    slots = (torch.arange(dims[3], dtype=torch.int32) % 4) - 1
    mixed = case.run(slots=slots)
    assert same_bits(mixed[slots < 0], base[slots < 0])
    assert same_bits(case.run(slots=torch.full_like(slots, -1)), base)
    assert same_bits(case.run(), base)
    want, size = expected(
        case.built, case.x, Routing(case.routing.topk_ids, case.routing.topk_weights, slots), adapters
    )
    base_want, base_size = expected(case.built, case.x, case.routing)
    check_delta(mixed, base, want - base_want, size + base_size, dtype, dims[1])
    case.experts.attach(None)
    assert same_bits(case.run(), base)


@BACKEND
@ACTIVATION_DTYPES
@KIND
@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
def test_a_row_does_not_depend_on_its_place(
    backend: ExpertsBackend, quant: QuantScheme | torch.dtype, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    """Adapters order the pairs of an expert otherwise, and a GEMM may sum up its last rows in another way.

    MKL does with two threads: without the sort in the reference, two of three such batches differ.
    """
    for _ in range(5):
        case = make(backend, quant, dtype, (4, 128, 64, 9, 2), device)
        slots = torch.randint(-1, 3, (9,), dtype=torch.int32)
        with threads(count):
            base = case.run()
            case.attach(three_adapters(case.built.info, dtype))
            assert same_bits(case.run(slots=slots)[slots < 0], base[slots < 0])


@BACKEND
@ACTIVATION_DTYPES
@pytest.mark.parametrize("quant", [scheme(4, 32, symmetric=False), torch.bfloat16], ids=["int4", "none"])
@pytest.mark.parametrize("router_weight", ["output", "input"])
@pytest.mark.parametrize(
    "activation",
    [
        Activation("silu"),
        Activation("gelu"),
        Activation("gelu_tanh"),
        Activation("relu2", gated=False),
        Activation("swigluoai", alpha=1.702, limit=1.0),
    ],
    ids=lambda a: a.name,
)
def test_activations_biases_and_the_place_of_the_router_weight(
    backend: ExpertsBackend,
    quant: QuantScheme | torch.dtype,
    activation: Activation,
    router_weight: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    dims = (3, 96, 40, 6, 2)
    options: dict[str, Any] = {"activation": activation, "router_weight": router_weight, "bias": True}
    case = make(backend, quant, dtype, dims, device, act_order=isinstance(quant, QuantScheme), **options)
    adapters = three_adapters(case.built.info, dtype)
    base, (base_want, base_size) = case.run(), expected(case.built, case.x, case.routing)
    assert ((base.double() - base_want).abs() <= tolerance(dtype, 96, base_size)).all()
    case.attach(adapters)
    slots = torch.zeros(6, dtype=torch.int32)
    routed = Routing(case.routing.topk_ids, case.routing.topk_weights, slots)
    want, size = expected(case.built, case.x, routed, adapters)
    out = case.run(slots=slots)
    assert ((out.double() - want).abs() <= tolerance(dtype, 96, size)).all()
    check_delta(out, base, want - base_want, size + base_size, dtype, 96)


def plain_layer() -> tuple[MoEQuantInfo, Tensor]:
    """Weights whose products with a one-hot row are exact in every dtype: w2 is the identity, w13 eighths.

    So gate, up and h can be told from outside; returned with gate and up (E, 2, I, H) in float64.
    """
    codes = torch.randint(0, 16, (2, 128, 64), dtype=torch.uint8)
    info = layer(scheme(4, 32), experts=2).info
    identity = (torch.eye(64, dtype=torch.uint8) + 8).expand(2, 64, 64)
    assert isinstance(info.w13, PackedWeight) and isinstance(info.w2, PackedWeight)
    eighths = torch.full((2, 128, 2), 0.125, dtype=torch.float16)
    w13 = replace(info.w13, qweight=packing.pack_codes(codes, 4), scales=packing.pack_pairs(eighths))
    w2 = replace(info.w2, qweight=packing.pack_codes(identity, 4), scales=packing.pack_pairs(8 * eighths[:, :64]))
    return replace(info, w13=w13, w2=w2), (codes.double() - 8).view(2, 2, 64, 64) / 8


@BACKEND
@ACTIVATION_DTYPES
def test_deltas_are_added_in_float32(backend: ExpertsBackend, dtype: torch.dtype, device: torch.device) -> None:
    """Base + delta is not rounded before the activation, nor before the router's weight.

    Each result is one rounding away from the exact one, with a hundredth more for float32's own roundings (in
    float32 itself these are as large as the bound: 16 of them). A second rounding would show in every other element.
    Only the delta of down is rounded once by itself on a GPU, since kernels store it between two launches.
    """
    info, values = plain_layer()
    serve_or_skip(backend, info, device, dtype)
    up_to_w13 = adapter(info, dtype, ranks={"gate": 3, "up": 4}, scaling=0.1)
    down_only = adapter(info, dtype, ranks={"down": 5}, scaling=0.1)
    experts = MoEExperts(info.to(device), backend.name)
    x, ids = torch.eye(64, dtype=dtype, device=device), torch.tensor([[0], [1]] * 32, device=device)
    one, weight = torch.ones(64, 1, device=device), torch.rand(64, 1, device=device) + 0.5
    h = experts(x, ids, one).cpu().double()  # w2 is the identity
    experts.attach(context(info, [up_to_w13, down_only], dtype, experts.info.device))
    slots = torch.zeros(64, dtype=torch.int32, device=device)
    first, second = experts(x, ids, one, slots).cpu(), experts(x, ids, weight, slots + 1).cpu()
    u = roundoff(dtype) * (16 if dtype == torch.float32 else 1.01)
    stored = u if device.type == "cuda" and dtype != torch.float32 else 0.0
    for token in range(64):
        expert, row = token % 2, torch.eye(64, dtype=torch.float64)[token]
        gate = values[expert, 0, :, token] + delta(up_to_w13[expert, "gate"], row)
        up = values[expert, 1, :, token] + delta(up_to_w13[expert, "up"], row)
        want = activate(info.activation, gate, up)
        # A delta's own float32 error is that of its size, some tenth; float16 has subnormals.
        assert ((first[token].double() - want).abs() <= u * want.abs() + 1e-7).all()
        change = float(weight[token]) * delta(down_only[expert, "down"], h[token])
        want = float(weight[token]) * h[token] + change
        assert ((second[token].double() - want).abs() <= u * want.abs() + stored * change.abs() + 1e-7).all()


@BACKEND
@KIND
def test_tokens_without_an_expert(
    backend: ExpertsBackend, quant: QuantScheme | torch.dtype, device: torch.device
) -> None:
    """They are 0, NaN in x or not, with and without an adapter, and disturb nobody."""
    case = make(backend, quant, torch.bfloat16, (3, 64, 64, 6, 2), device)
    case.routing.topk_ids[:] = torch.tensor([[0, 1], [-1, 3], [2, -1], [99, -5], [3, 0], [-1, -1]])
    clean = case.run()
    x = case.x.clone()
    x[[1, 3, 5]] = torch.nan
    assert same_bits(case.run(x), clean)
    assert (clean[[1, 3, 5]] == 0).all() and (clean[[0, 2, 4]] != 0).any(1).all()
    case.attach(three_adapters(case.built.info, torch.bfloat16))
    lora = case.run(x, slots=torch.tensor([0, 0, -1, 1, -1, 2]))
    assert (lora[[1, 3, 5]] == 0).all() and same_bits(lora[[2, 4]], clean[[2, 4]])


@BACKEND
@KIND
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_no_tokens(backend: ExpertsBackend, quant: QuantScheme | torch.dtype, lora: bool, device: torch.device) -> None:
    case = make(backend, quant, torch.bfloat16, (3, 64, 64, 6, 2), device)
    case.attach(three_adapters(case.built.info, torch.bfloat16))
    slots = torch.zeros(6, dtype=torch.int32) if lora else None
    assert case.run(slots=slots, tokens=slice(0)).shape == (0, 64)


@BACKEND
def test_a_declined_request_is_an_error(backend: ExpertsBackend, device: torch.device) -> None:
    """Every backend has reasons against float64, and the layer does not turn to another one."""
    info = layer(scheme(4, 32)).info
    verdict = backend.supports(info, device, torch.float64, lora=True)
    assert not verdict.ok and all(verdict.reasons)
    with pytest.raises(ValueError, match=rf"backend {backend.name} for .* in torch.float64: got {backend.name}: "):
        MoEExperts(info.to(device), backend.name)(
            torch.zeros(1, 64, dtype=torch.float64, device=device),
            torch.zeros(1, 1, dtype=torch.int64, device=device),
            torch.ones(1, 1, device=device),
        )
