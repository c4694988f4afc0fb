"""MoEExperts: what it refuses, what moving and casting do to it, gradients, buffers that are reused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError, BackendError, ShapeError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts import registry
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.layer import MoEExperts
from tests.builders import Adapter, Layer, adapter, context, expected, layer, routing, same_bits, scheme, threads

E, H, I, M, K = 3, 64, 40, 7, 2  # noqa: E741
ASYM = scheme(4, 32, symmetric=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def build(quant: QuantScheme | torch.dtype = ASYM, **options: Any) -> Layer:
    act_order = isinstance(quant, QuantScheme)
    return layer(quant, experts=E, hidden=H, inter=I, act_order=act_order, **options)


def two_adapters(info: MoEQuantInfo, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    return [
        adapter(info, dtype, ranks={"gate": 3, "up": 2, "down": 4}),
        adapter(info, dtype, ranks={"gate": 2, "up": 2}, scaling=-2.0, experts=[0, 2], shared=True),
    ]


def tokens(count: int = M, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights, some pairs without an expert."""
    case = routing(count, K, E)
    return torch.randn(count, H).to(dtype), case.topk_ids, case.topk_weights


SLOTS = torch.tensor([0, -1, 1, 0, 1, -1, 0])


class TestRefusals:
    @pytest.mark.parametrize("shape", [(M, H + 1), (M, H // 8), (1, M, H), (H,), (H, M)])
    def test_x(self, shape: tuple[int, ...]) -> None:
        _, ids, weights = tokens()
        with pytest.raises(
            ShapeError, match=rf"x: got shape \[{', '.join(map(str, shape))}\], expected \[tokens, {H}\]"
        ):
            MoEExperts(build().info)(torch.zeros(shape), ids, weights)

    def test_adapter_ids_without_adapters(self) -> None:
        experts = MoEExperts(build().info)
        message = r"adapter_ids: got ids, expected None while no adapter is attached; attach the adapters first"
        with pytest.raises(AdapterError, match=message):
            experts(*tokens(), adapter_ids=SLOTS)
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        experts(*tokens(), adapter_ids=SLOTS)
        experts.attach(None)
        with pytest.raises(AdapterError, match=message):
            experts(*tokens(), adapter_ids=SLOTS)

    @pytest.mark.parametrize("wrong", [SLOTS[:-1], SLOTS[:, None], SLOTS.repeat(2)], ids=["fewer", "2-D", "of pairs"])
    def test_adapter_ids_of_another_shape(self, wrong: Tensor) -> None:
        experts = MoEExperts(build().info)
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        with pytest.raises(ShapeError, match=r"slots: got shape .*, expected \[7\] for one for each token"):
            experts(*tokens(), adapter_ids=wrong)

    def test_routing_of_another_shape(self) -> None:
        x, ids, weights = tokens()
        with pytest.raises(ShapeError, match=r"topk_weights: got shape \[7, 1\], expected \[7, 2\]"):
            MoEExperts(build().info)(x, ids, weights[:, :1])
        with pytest.raises(ShapeError, match=r"topk_ids: .*dtype torch.float32"):
            MoEExperts(build().info)(x, ids.float(), weights)

    def test_routing_of_other_tokens(self) -> None:
        """1, 5 and 9 rows of routing for 7 tokens: none may be computed with whatever rows there are."""
        x, ids, weights = tokens(9)
        experts = MoEExperts(build().info)
        for rows in (1, 5, 9):
            with pytest.raises(ShapeError, match=r"tokens"):
                experts(x[:7], ids[:rows], weights[:rows])

    @pytest.mark.parametrize(
        ("dims", "device"),
        [((4, H, I), "cpu"), ((E, 128, I), "cpu"), ((E, H, 104), "cpu"), ((E, H, I), "meta")],
        ids=["E", "H", "inter_pad", "device"],
    )
    def test_a_context_of_another_layer(self, dims: tuple[int, int, int], device: str) -> None:
        other = layer(ASYM, experts=dims[0], hidden=dims[1], inter=dims[2]).info
        ctx = context(other, two_adapters(other), torch.float32, device)
        experts = MoEExperts(build().info)
        with pytest.raises(
            AdapterError, match=r"LoRA context \(E, H, inter_pad, shard, device\): got \(.*expected the layer's"
        ):
            experts.attach(ctx)
        assert experts.injection.ctx is None

    def test_a_dtype_that_nobody_serves(self) -> None:
        experts = MoEExperts(build().info)
        x, ids, weights = tokens()
        with pytest.raises(
            BackendError, match=r"backend auto for w4a16_g32_asym on cpu in torch.float64: got .*; reference: "
        ):
            experts(x.double(), ids, weights)
        assert experts(x, ids, weights).dtype == torch.float32

    def test_an_unknown_backend(self) -> None:
        with pytest.raises(BackendError, match=r"backend: got 'turbo', expected auto or one of .*reference"):
            MoEExperts(build().info, "turbo")(*tokens())

    def test_attaching_after_a_capture_without_lora(self) -> None:
        experts = MoEExperts(build().info)
        experts._captured_without_lora = True
        ctx = context(experts.info, two_adapters(experts.info), torch.float32)
        with pytest.raises(BackendError, match=r"got a CUDA graph captured without LoRA, .*; attach an adapter first"):
            experts.attach(ctx)
        experts.attach(None)


class TestMoving:
    def test_not_with_adapters(self) -> None:
        experts = MoEExperts(build().info)
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        with pytest.raises(
            AdapterError, match=r"moving experts: got adapters attached, expected none, .*; move the model"
        ):
            experts.to("meta")
        assert experts.info.device == torch.device("cpu")
        experts.to("cpu")  # no move
        experts.to(torch.bfloat16)
        experts.attach(None)
        assert experts.to("meta").info.device == torch.device("meta")

    def test_rebuilds_the_info(self) -> None:
        experts = MoEExperts(build(bias=True).info)
        experts(*tokens())
        experts.to("meta")
        assert all(tensor.is_meta for tensor in experts.info.tensors().values())
        assert all(buffer.is_meta for buffer in experts.buffers())
        assert experts._prepared is None and experts._workspace is None and experts.backend is None

    def test_inside_a_model(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), MoEExperts(build().info)).to("meta")
        assert isinstance(model[1], MoEExperts)
        assert model[1].info.device == torch.device("meta")

    def test_there_and_back_is_bitwise(self, device: torch.device) -> None:
        experts = MoEExperts(build(bias=True).info)
        before, arguments = experts.info, tokens()
        base = experts(*arguments)
        experts.to(device)
        experts(*(tensor.to(device) for tensor in arguments))
        experts.to("cpu")
        assert all(same_bits(experts.info.tensors()[name], tensor) for name, tensor in before.tensors().items())
        assert same_bits(experts(*arguments), base)

    @pytest.mark.parametrize("quant", [ASYM, scheme(8, None, bf16=True), torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "cast",
        [
            lambda m: m.to(torch.bfloat16),
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.double(),
            lambda m: m.float(),
            lambda m: m.to("cpu", torch.float16),
            lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
        ],
        ids=["to", "half", "bfloat16", "double", "float", "to both", "to like"],
    )
    def test_casts_leave_every_bit(self, quant: QuantScheme | torch.dtype, cast: Any) -> None:
        experts = MoEExperts(build(quant, bias=True).info)
        model = nn.Sequential(nn.Linear(2, 2), experts)
        before = {name: tensor.clone() for name, tensor in experts.info.tensors().items()}
        arguments = tokens()
        base = experts(*arguments)
        cast(model)
        held, buffers = experts.info.tensors(), dict(experts.named_buffers())
        for name, tensor in before.items():
            assert same_bits(held[name], tensor)
            assert buffers[name.replace(".", "_")] is held[name]
        assert same_bits(experts(*arguments), base)

    def test_buffers_are_not_saved(self) -> None:
        experts = MoEExperts(build(bias=True).info)
        names = {name.replace(".", "_") for name in experts.info.tensors()}
        assert set(dict(experts.named_buffers())) == names
        assert not experts.state_dict() and not list(experts.parameters())
        experts.load_state_dict({})
        experts(*tokens())
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        assert not experts.state_dict() and set(dict(experts.named_buffers())) == names

    def test_a_deep_copy_is_a_layer_of_its_own(self) -> None:
        experts, arguments = MoEExperts(build().info), tokens()
        base = experts(*arguments)
        twin = copy.deepcopy(experts)
        assert same_bits(twin(*arguments), base)
        twin.attach(context(twin.info, two_adapters(twin.info), torch.float32))
        assert not torch.equal(twin(*arguments, adapter_ids=SLOTS), base)
        assert same_bits(experts(*arguments), base) and experts.injection.ctx is None


class TestForward:
    def test_a_dtype_switch_prepares_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[torch.dtype] = []

        class Counting(ReferenceBackend):
            def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Any:
                seen.append(dtype)
                return super().prepare(info, dtype, tuned_configs)

        monkeypatch.setattr(registry, "BACKENDS", (Counting(),))
        experts = MoEExperts(build().info)
        x, ids, weights = tokens()
        for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32):
            assert experts(x.to(dtype), ids, weights).dtype == dtype
        assert seen == [torch.float32, torch.bfloat16, torch.float32]
        assert isinstance(experts.backend, Counting)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
    def test_no_tokens(self, dtype: torch.dtype, lora: bool) -> None:
        experts = MoEExperts(build().info)
        if lora:
            experts.attach(context(experts.info, two_adapters(experts.info, dtype), dtype))
        x, ids, weights = tokens(0, dtype)
        out = experts(x, ids, weights, adapter_ids=SLOTS[:0] if lora else None)
        assert out.shape == (0, H) and out.dtype == dtype

    def test_weights_and_ids_of_other_dtypes(self) -> None:
        """Routers give bfloat16 weights and int64 ids, callers int64 adapter ids."""
        experts = MoEExperts(build().info)
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        x, ids, weights = tokens()
        weights = weights.to(torch.bfloat16)
        out = experts(x, ids.long(), weights, adapter_ids=SLOTS)
        assert same_bits(out, experts(x, ids, weights.float(), adapter_ids=SLOTS.int()))

    def test_attach_none_is_the_base_bitwise(self) -> None:
        experts, arguments = MoEExperts(build().info), tokens()
        base = experts(*arguments)
        for _ in range(2):
            experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
            assert not torch.equal(experts(*arguments, adapter_ids=SLOTS), base)
            assert same_bits(experts(*arguments), base)
            experts.attach(None)
            assert experts.injection.ctx is None and same_bits(experts(*arguments), base)

    def test_another_context_takes_the_place_of_the_first(self) -> None:
        experts, arguments = MoEExperts(build().info), tokens()
        one, two = (context(experts.info, [a], torch.float32) for a in two_adapters(experts.info))
        slots = torch.zeros(M, dtype=torch.int32)
        alone = MoEExperts(experts.info)
        alone.attach(two)
        experts.attach(one)
        experts(*arguments, adapter_ids=slots)
        experts.attach(two)
        assert same_bits(experts(*arguments, adapter_ids=slots), alone(*arguments, adapter_ids=slots))

    def test_the_injection_is_built_when_attached(self) -> None:
        experts = MoEExperts(build().info)
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        injection = experts.injection
        experts(*tokens(), adapter_ids=SLOTS)
        assert experts.injection is injection

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
    def test_batches_of_other_sizes_reuse_the_workspace(self, mode: Any, lora: bool) -> None:
        """Larger, smaller, none and again: each answer is that of a fresh module, and stays what it was."""
        experts = MoEExperts(build().info)
        ctx = context(experts.info, two_adapters(experts.info), torch.float32)
        answers: list[tuple[Tensor, Tensor]] = []
        with mode():
            for count in (5, 17, 3, 0, 17, 1, 40, 5):
                arguments = tokens(count)
                slots = torch.randint(-1, 2, (count,)) if lora else None
                fresh = MoEExperts(experts.info)
                for module in (experts, fresh):
                    module.attach(ctx if lora else None)
                out = experts(*arguments, adapter_ids=slots)
                answers.append((out, fresh(*arguments, adapter_ids=slots)))
        assert all(same_bits(got, want) for got, want in answers)
        assert all(got.isfinite().all() for got, _ in answers)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_layers_share_a_workspace(self, mode: Any) -> None:
        """One after the other, with adapters and batches of their own, in the memory of the largest."""
        shared = Workspace(torch.device("cpu"))
        layers = [MoEExperts(build().info, workspace=shared) for _ in range(2)]
        apart = [MoEExperts(experts.info) for experts in layers]
        for pair in zip(layers, apart, strict=True):
            ctx = context(pair[0].info, two_adapters(pair[0].info), torch.float32)
            for experts in pair:
                experts.attach(ctx)
        with mode():
            for count in (5, 9, 4):
                for experts, own in zip(layers, apart, strict=True):
                    arguments, slots = tokens(count), torch.randint(-1, 2, (count,))
                    assert same_bits(experts(*arguments, adapter_ids=slots), own(*arguments, adapter_ids=slots))
        held = [experts._workspace for experts in (*layers, *apart)]
        assert held[0] is held[1] is shared and held[2] is not None and held[2] is not held[3]
        assert shared.nbytes == held[2].nbytes

    def test_modes_take_turns(self) -> None:
        """A first forward under inference_mode (generate) must not spoil later ones under no_grad, nor training."""
        experts, arguments = MoEExperts(build().info), tokens()
        with torch.inference_mode():
            base = experts(*arguments)
        with torch.no_grad():
            assert same_bits(experts(*arguments), base)
        assert same_bits(experts(*arguments), base)
        with torch.inference_mode():
            assert same_bits(experts(*arguments), base)

    def test_the_answer_is_not_a_buffer(self) -> None:
        experts = MoEExperts(build().info)
        with torch.no_grad():
            first = experts(*tokens())
            kept = first.clone()
            experts(*tokens())
        assert same_bits(first, kept)

    def test_inputs_are_left_alone(self) -> None:
        experts, arguments = MoEExperts(build(router_weight="input").info), tokens()
        experts.attach(context(experts.info, two_adapters(experts.info), torch.float32))
        before = [tensor.clone() for tensor in arguments]
        experts(*arguments, adapter_ids=SLOTS)
        assert all(torch.equal(one, two) for one, two in zip(arguments, before, strict=True))

    def test_extra_repr(self) -> None:
        text = repr(MoEExperts(build().info))
        assert text == "MoEExperts(experts=3, hidden=64, intermediate=40, scheme=w4a16_g32_asym, activation=silu)"


def gradients(
    built: Layer,
    adapters: Sequence[Adapter],
    arguments: tuple[Tensor, Tensor, Tensor],
    slots: Tensor | None,
    up: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of x and the router weights for the output's gradient ``up``, from the float64 definition."""
    x, ids, weights = arguments
    x64, weights64 = x.double().requires_grad_(), weights.double().requires_grad_()
    case = Routing(ids, weights, None if slots is None else slots.to(torch.int32))
    out, _ = expected(built, x64, case, adapters, weights64)
    out.backward(up.double())
    assert x64.grad is not None and weights64.grad is not None
    return x64.grad, weights64.grad


ACTIVATIONS = [Activation("silu"), Activation("relu2", gated=False), Activation("swigluoai", alpha=1.702, limit=1.0)]


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("router_weight", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_gradients(lora: bool, router_weight: Any, activation: Activation) -> None:
    """Of x and the router weights, against float64; float32 sums of some 100 terms stay within 1e-4."""
    built = build(activation=activation, router_weight=router_weight, bias=True)
    adapters = two_adapters(built.info)
    if not activation.gated:
        adapters = [{key: value for key, value in a.items() if key[1] != "gate"} for a in adapters]
    experts = MoEExperts(built.info)
    if lora:
        experts.attach(context(built.info, adapters, torch.float32))
    x, ids, weights = tokens()
    slots = SLOTS if lora else None
    x.requires_grad_()
    weights.requires_grad_()
    out = experts(x, ids, weights, adapter_ids=slots)
    up = torch.randn_like(out)
    x_grad, weights_grad = torch.autograd.grad(out, (x, weights), up)
    want_x, want_weights = gradients(built, adapters, (x.detach(), ids, weights.detach()), slots, up)
    for got, want in ((x_grad, want_x), (weights_grad, want_weights)):
        assert got.isfinite().all() and want.any()
        assert float((got.double() - want).norm()) <= 1e-4 * float(want.norm())
        assert ((got.double() - want).abs() <= 1e-4 * want.abs().max()).all()
    missing = (ids < 0) | (ids >= E)
    assert (weights_grad[missing] == 0).all()


def test_backward_again_and_again() -> None:
    """Through one graph twice, through new forwards, and with another forward in between."""
    built = build()
    experts = MoEExperts(built.info)
    experts.attach(context(built.info, two_adapters(built.info), torch.float32))
    x, ids, weights = tokens()
    x.requires_grad_()

    def forward() -> Tensor:
        return experts(x, ids, weights, adapter_ids=SLOTS).square().sum()

    first = forward()
    (want,) = torch.autograd.grad(first, x, retain_graph=True)
    with torch.no_grad():
        forward()
    second = forward()
    (again,) = torch.autograd.grad(first, x)
    assert same_bits(again, want)
    assert same_bits(torch.autograd.grad(second, x)[0], want)
    for _ in range(3):
        forward().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * want)


def test_gradients_in_bfloat16() -> None:
    """One rounding of each intermediate, both ways: some hundredths of the gradient."""
    built = build()
    experts = MoEExperts(built.info)
    x, ids, weights = tokens(dtype=torch.bfloat16)
    x.requires_grad_()
    out = experts(x, ids, weights)
    up = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, up)
    want, _ = gradients(built, [], (x.detach(), ids, weights), None, up)
    assert grad.dtype == torch.bfloat16
    assert float((grad.double() - want).norm()) <= 0.03 * float(want.norm())
