"""MoEQuantInfo: two weights that belong to one layer, and what the whole means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from tests.builders import SILU, dense, layer, packed, same_bits, scheme

RELU2 = Activation("relu2", gated=False)
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.mark.parametrize(
    "quant",
    [
        scheme(4, 32),
        scheme(4, 48, symmetric=False),
        scheme(8, None, bf16=True),
        scheme(8, 16, symmetric=False),
        torch.float32,
        torch.bfloat16,
    ],
    ids=lambda s: getattr(s, "name", str(s)),
)
@pytest.mark.parametrize("activation", [SILU, RELU2], ids=["gated", "plain"])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_dequantize_is_the_definition(
    quant: QuantScheme | torch.dtype, activation: Activation, act_order: bool
) -> None:
    """Bit-exact, in the logical order, gate and up apart."""
    built = layer(quant, experts=2, hidden=72, inter=40, activation=activation, act_order=act_order)
    gate, up, down = built.info.dequantize()
    assert (gate is None) == (not activation.gated)
    assert up.shape == (2, 40, 72) and down.shape == (2, 72, 40)
    assert up.dtype == down.dtype == torch.float32
    if gate is not None and built.gate is not None:
        assert gate.dtype == torch.float32 and torch.equal(gate.double(), built.gate)
        assert not torch.equal(gate, up)
    assert torch.equal(up.double(), built.up)
    assert torch.equal(down.double(), built.down)


def test_inter_perm_scalar_by_scalar() -> None:
    """Stored position s of the intermediate is logical inter_perm[e, s]; each expert has its own order."""
    built = layer(scheme(4, 32), experts=2, hidden=64, inter=40, act_order=True)
    info = built.info
    assert info.inter_perm is not None
    assert not torch.equal(info.inter_perm[0], info.inter_perm[1])
    gate, up, down = info.dequantize()
    stored13, stored2 = info.w13.dequantize(), info.w2.dequantize()
    assert gate is not None
    for expert in range(2):
        for position, logical in enumerate(info.inter_perm[expert].tolist()):
            assert torch.equal(gate[expert, logical], stored13[expert, 0, position])
            assert torch.equal(up[expert, logical], stored13[expert, 1, position])
            assert torch.equal(down[expert, :, logical], stored2[expert, 0, :, position])


def test_facts() -> None:
    info = layer(scheme(4, 48, symmetric=False), experts=3, hidden=72, inter=40, bias=True, act_order=True).info
    assert (info.num_experts, info.hidden_size, info.intermediate_size) == (3, 72, 40)
    assert info.inter_pad == 192 == info.w13.n_pad == info.w2.k_pad
    assert info.device == torch.device("cpu")
    assert info.scheme_name == "w4a16_g48_asym"
    names = {f"w13.{name}" for name in ("qweight", "scales", "zeros", "bias", "k_perm")}
    names |= {f"w2.{name}" for name in ("qweight", "scales", "zeros", "bias")} | {"inter_perm"}
    assert set(info.tensors()) == names
    assert info.nbytes == sum(tensor.numel() * 4 for tensor in info.tensors().values())
    assert layer(torch.float16).info.scheme_name == "none"


def test_different_schemes_are_both_named() -> None:
    w13 = packed(scheme(4, 32), halves=2).weight
    assert MoEQuantInfo(w13, packed(scheme(8, 64)).weight, SILU).scheme_name == "w4a16_g32_sym + w8a16_g64_sym"
    assert MoEQuantInfo(w13, dense().weight, SILU).scheme_name == "w4a16_g32_sym + none"


@pytest.mark.parametrize("quant", [scheme(4, 32, symmetric=False), torch.bfloat16], ids=["int4", "none"])
def test_to_keeps_every_bit(quant: QuantScheme | torch.dtype) -> None:
    info = layer(quant, bias=True, act_order=isinstance(quant, QuantScheme), router_weight="input").info
    moved, meta = info.to("cpu"), info.to(torch.device("meta"))
    assert meta.device == torch.device("meta") and meta.w13.dims == info.w13.dims
    for name, tensor in info.tensors().items():
        assert same_bits(moved.tensors()[name], tensor)
        assert meta.tensors()[name].is_meta
    assert meta.router_weight == "input" and meta.activation == info.activation


def parts(bits: int, hidden: int, inter: int, experts: int = 2) -> dict[str, Any]:
    """Arguments of an info."""
    w13 = packed(scheme(bits, 32), experts=experts, halves=2, n=inter, k=hidden).weight
    w2 = packed(scheme(bits, 32), experts=experts, n=hidden, k=inter).weight
    return {"w13": w13, "w2": w2, "activation": SILU}


def build(good: dict[str, Any], **changes: Any) -> MoEQuantInfo:
    """The info of these arguments, some of them changed."""
    return MoEQuantInfo(**{**good, **changes})


SHAPES = pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (128, 64), (64, 128)], ids=["H=I", "2I=H", "2H=I"])


@BITS
@SHAPES
@pytest.mark.parametrize("experts", [1, 2])
def test_the_wrong_weight_in_a_place(bits: int, hidden: int, inter: int, experts: int) -> None:
    good = parts(bits, hidden, inter, experts)
    MoEQuantInfo(**good)
    with pytest.raises(ShapeError, match=r"w2.halves: got 2, expected 1"):
        build(good, w2=good["w13"])
    with pytest.raises(
        ShapeError, match=r"w13.halves: got 1, expected 2 with a gate, 1 without = 2 \(w13: E=.*; w2: E="
    ):
        build(good, w13=good["w2"])
    with pytest.raises(ShapeError, match=r"w13.halves: got 1"):
        build(good, w13=good["w2"], w2=good["w13"])
    with pytest.raises(ShapeError, match=r"w13.halves: got 2, expected .* = 1"):
        build(good, activation=RELU2)


@BITS
@SHAPES
def test_fused_rows_as_one_half(bits: int, hidden: int, inter: int) -> None:
    """2I rows with halves=1: the bits are those of gate and up, the declaration is not."""
    good = parts(bits, hidden, inter)
    fused = replace(good["w13"], halves=1, n=2 * inter, n_pad=2 * inter)
    with pytest.raises(ShapeError, match=r"w13.halves: got 1"):
        build(good, w13=fused)
    with pytest.raises(ShapeError, match=rf"w2.k: got {inter}, expected w13.n, the intermediate size = {2 * inter}"):
        build(good, w13=fused, activation=RELU2)


@BITS
@pytest.mark.parametrize(("hidden", "inter"), [(128, 64), (64, 128), (256, 128)])
def test_swapped_dims(bits: int, hidden: int, inter: int) -> None:
    good, swapped = parts(bits, hidden, inter), parts(bits, inter, hidden)
    with pytest.raises(ShapeError, match=rf"w2.n: got {inter}, expected w13.k, the hidden size = {hidden}"):
        build(good, w2=swapped["w2"])
    with pytest.raises(ShapeError, match=rf"w2.n: got {hidden}, expected w13.k, the hidden size = {inter}"):
        build(good, w13=swapped["w13"])


@BITS
@SHAPES
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_packed_dims(bits: int, hidden: int, inter: int, divisor: int) -> None:
    """One weight built with a dimension that a packed tensor has; each is sound by itself."""
    good = parts(bits, hidden, inter)
    for wrong in (
        packed(scheme(bits, 32), halves=2, n=inter // divisor, k=hidden).weight,
        packed(scheme(bits, 32), halves=2, n=inter, k=hidden // divisor).weight,
    ):
        with pytest.raises(ShapeError, match=r"w2\.(n|k): got \d+, expected w13\.(n|k).*; build both weights from the"):
            build(good, w13=wrong)
    for n, k in ((hidden // divisor, inter), (hidden, inter // divisor)):
        with pytest.raises(ShapeError, match=r"w2\.(n|k): got \d+, expected w13\.(n|k)"):
            build(good, w2=packed(scheme(bits, 32), n=n, k=k).weight)


def test_all_dims_divided_with_the_right_paddings() -> None:
    """Both weights agree with each other and with their tensors; only the amount of padding tells."""
    good = parts(4, 512, 512)
    with pytest.raises(ShapeError, match=r"pad"):
        MoEQuantInfo(
            w13=replace(good["w13"], n=64, k=64),
            w2=replace(good["w2"], n=64, k=64),
            activation=SILU,
        )


def test_other_experts() -> None:
    good, other = parts(4, 64, 64), parts(4, 64, 64, experts=3)
    with pytest.raises(ShapeError, match=r"w2.num_experts: got 3, expected w13.num_experts = 2"):
        build(good, w2=other["w2"])


def test_one_padded_intermediate() -> None:
    """w2's group of 48 pads the intermediate to 192; a w13 padded to 64 rows does not fit."""
    w13 = packed(scheme(4, 48), halves=2, n=40, k=64).weight
    w2 = packed(scheme(4, 48), n=64, k=40).weight
    with pytest.raises(ShapeError, match=r"w2.k_pad: got 192, expected w13.n_pad, the padded intermediate size = 64"):
        MoEQuantInfo(w13, w2, SILU)


def test_act_order_of_w2_is_folded() -> None:
    w13, w2 = packed(scheme(4, 32), halves=2).weight, packed(scheme(4, 32), act_order=True).weight
    with pytest.raises(ShapeError, match=r"w2.k_perm: got a permutation, expected None; fold .* into inter_perm"):
        MoEQuantInfo(w13, w2, SILU)


@pytest.mark.parametrize(
    ("inter_perm", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.int32), r"inter_perm: got shape \[2, 64\], expected \[2, 40\]"),
        (torch.zeros(40, dtype=torch.int32), r"inter_perm: got shape \[40\]"),
        (torch.zeros(2, 40, dtype=torch.int64), "inter_perm: got dtype torch.int64, expected torch.int32"),
        (torch.zeros(2, 40, dtype=torch.int32, device="meta"), "devices: got .*inter_perm on meta"),
    ],
    ids=["padded", "of one expert", "dtype", "device"],
)
def test_inter_perm_is_checked(inter_perm: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(layer(scheme(4, 32), experts=2, inter=40).info, inter_perm=inter_perm)


def test_weights_on_two_devices() -> None:
    good = parts(4, 64, 64)
    with pytest.raises(ShapeError, match=r"devices: got w13.qweight on cpu.*w2.qweight on meta"):
        build(good, w2=good["w2"].to("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_weight": "both"}, r"router_weight: got both, expected one of \('output', 'input'\)"),
        ({"source_order": "mixed"}, "source_order: got mixed, expected one of .*'interleaved'"),
    ],
)
def test_unknown_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build(parts(4, 64, 64), **change)


@pytest.mark.parametrize("order", ["separate", "concatenated", "interleaved"])
def test_the_order_in_the_source_changes_nothing(order: Any) -> None:
    info = layer(scheme(4, 32)).info
    other = replace(info, source_order=order)
    for one, two in zip(info.dequantize(), other.dequantize(), strict=True):
        assert one is not None and two is not None and torch.equal(one, two)
