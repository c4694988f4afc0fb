"""PackedWeight and DenseWeight: the shapes they refuse, and dequantize against its definition."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, PackedWeight
from tests.builders import BuiltWeight, dense, packed, same_bits, scheme

SCHEMES = pytest.mark.parametrize(
    "quant",
    [
        scheme(4, 32),
        scheme(4, 128, symmetric=False),
        scheme(8, 64, bf16=True),
        scheme(8, 32, symmetric=False),
        scheme(4, None),
        scheme(8, None, symmetric=False, bf16=True),
        scheme(4, 16, symmetric=False),
        scheme(8, 16),
        scheme(4, 48, symmetric=False),
        scheme(4, 96, bf16=True),
        scheme(8, 96, symmetric=False),
    ],
    ids=lambda s: s.name,
)


def scalar_value(built: BuiltWeight, expert: int, half: int, row: int, column: int) -> float:
    """(q - zero) * scale of the weight that x's column meets, in double precision."""
    weight = built.weight
    stored = column
    if weight.k_perm is not None:
        (stored,) = (i for i, target in enumerate(weight.k_perm[expert, half].tolist()) if target == column)
    group = 0 if weight.scheme.group_size is None else stored // weight.scheme.group_size
    q, zero = int(built.codes[expert, half, row, stored]), int(built.zeros[expert, half, row, group])
    return (q - zero) * float(built.scales[expert, half, row, group])


def definition(built: BuiltWeight) -> Tensor:
    """The weight, one element after the other."""
    w = built.weight
    return torch.tensor(
        [
            [
                [[scalar_value(built, e, half, n, k) for k in range(w.k)] for n in (0, w.n // 2, w.n - 1)]
                for half in range(w.halves)
            ]
            for e in range(w.num_experts)
        ],
        dtype=torch.float64,
    )


@SCHEMES
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act_order"])
def test_dequantize_is_the_definition(quant: QuantScheme, act_order: bool) -> None:
    """Bit-exact. k = 72 leaves the last group short and most columns of the last tile unused."""
    built = packed(quant, experts=2, halves=2, n=70, k=72, act_order=act_order)
    got = built.weight.dequantize()
    assert got.dtype == torch.float32 and got.shape == (2, 2, 70, 72) and got.is_contiguous()
    assert torch.equal(got.double(), built.value)
    assert torch.equal(got[:, :, [0, 35, 69]].double(), definition(built))


@pytest.mark.parametrize("experts", [slice(1, 3), slice(2, 2), slice(None), slice(3, None)], ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act_order"])
def test_some_experts_by_slice(experts: slice, act_order: bool) -> None:
    built = packed(scheme(4, 32, symmetric=False), experts=4, halves=2, k=80, bias=True, act_order=act_order)
    assert torch.equal(built.weight.dequantize(experts).double(), built.value[experts])
    bias = built.weight.logical_bias(experts)
    assert bias is not None and torch.equal(bias.double(), built.bias[experts])


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act_order"])
@pytest.mark.parametrize("experts", [[2, 0], [1, 1, 3], [3], []], ids=str)
def test_some_experts_by_tensor(experts: list[int], act_order: bool) -> None:
    built = packed(scheme(8, 32, symmetric=False), experts=4, halves=2, k=80, bias=True, act_order=act_order)
    index = torch.tensor(experts, dtype=torch.int64)
    assert torch.equal(built.weight.dequantize(index).double(), built.value[index])
    bias = built.weight.logical_bias(index)
    assert bias is not None and torch.equal(bias.double(), built.bias[index])


def test_zero_points_outside_the_codes() -> None:
    """They are 16-bit integers: 16 (from z + 1) and negative ones (from a re-centred domain) are exact too."""
    built = packed(scheme(4, 32, symmetric=False), k=64)
    zeros = torch.randint(-40, 300, built.zeros.shape, dtype=torch.int16)
    weight = replace(built.weight, zeros=packing.pack_pairs(zeros.flatten(1, 2)))
    q = built.codes.double().unflatten(-1, (-1, 32))
    want = (q - zeros.double().unsqueeze(-1)) * built.scales.double().unsqueeze(-1)
    assert torch.equal(weight.dequantize().double(), want.flatten(-2))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
def test_extreme_scales_are_exact(bf16: bool) -> None:
    """The largest, the smallest normal and (of float16) the smallest subnormal scale, both signs."""
    built = packed(scheme(8, 64, symmetric=False, bf16=bf16), experts=1, k=64)
    info = torch.finfo(built.scales.dtype)
    # 2^-100 for bfloat16: a product with a code must not itself be subnormal in float32.
    values = torch.tensor([info.max / 512, 2.0**-100 if bf16 else 2.0**-24, 0.75, 0.0]).to(built.scales.dtype)
    scales = torch.stack((values, -values)).flatten().repeat(8).view(1, 64, 1)
    weight = replace(built.weight, scales=packing.pack_pairs(scales))
    want = (built.codes.double() - built.zeros.double()) * scales.double().view(1, 1, 64, 1)
    assert torch.equal(weight.dequantize().double(), want)


def test_dequantize_on_the_meta_device() -> None:
    weight = packed(scheme(4, 32), experts=2, halves=2, n=70, k=72, act_order=True).weight.to("meta")
    assert weight.dequantize().shape == (2, 2, 70, 72) and weight.dequantize().is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense(dtype: torch.dtype) -> None:
    built = dense(dtype, experts=3, halves=2, n=5, k=7, n_pad=8, k_pad=12, bias=True)
    got = built.weight.dequantize()
    assert got.dtype == torch.float32 and torch.equal(got.double(), built.value)
    index = torch.tensor([2, 0])
    assert torch.equal(built.weight.dequantize(index).double(), built.value[index])
    assert torch.equal(built.weight.dequantize(slice(1, 2)).double(), built.value[1:2])
    bias = built.weight.logical_bias()
    assert bias is not None and torch.equal(bias.double(), built.bias)
    assert built.weight.scheme_name == "none"


def test_no_bias() -> None:
    assert packed(scheme()).weight.logical_bias() is None
    assert dense().weight.logical_bias() is None


@pytest.mark.parametrize(("quant", "group"), [(scheme(4, None), 128), (scheme(4, 32), 32), (scheme(4, 48), 48)])
def test_facts(quant: QuantScheme, group: int) -> None:
    weight = packed(quant, experts=3, halves=2, n=65, k=100).weight
    assert weight.group == group
    assert weight.rows == 256
    assert weight.scheme_name == quant.name
    assert weight.dims == f"E=3, 2 x N=65 (padded 128), K=100 ({weight.k_pad})"


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act_order"])
def test_to_keeps_every_bit(act_order: bool) -> None:
    weight = packed(scheme(4, 32, symmetric=False), halves=2, bias=True, act_order=act_order).weight
    moved = weight.to("cpu")
    names = {"qweight", "scales", "zeros", "bias"} | ({"k_perm"} if act_order else set())
    assert set(weight.tensors()) == set(moved.tensors()) == names
    for name, tensor in weight.tensors().items():
        assert same_bits(moved.tensors()[name], tensor)
    meta = weight.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in meta.tensors().values())
    for field in fields(weight):
        if not isinstance(getattr(weight, field.name), Tensor):
            assert getattr(meta, field.name) == getattr(weight, field.name)


def test_to_of_a_dense_weight() -> None:
    weight = dense(torch.bfloat16, bias=True).weight
    assert set(weight.tensors()) == {"w", "bias"}
    assert all(same_bits(weight.to("cpu").tensors()[name], tensor) for name, tensor in weight.tensors().items())
    assert weight.to("meta").w.is_meta


def change(weight: PackedWeight | DenseWeight, **changes: Any) -> Any:
    return replace(weight, **changes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (256, 512), (512, 256)], ids=["H=I", "2N=K", "N=2K"])
@pytest.mark.parametrize("experts", [1, 2])
class TestPackedDimsAreRefused:
    """Dimensions of a packed tensor in place of the logical ones, with the paddings that follow from them."""

    @pytest.fixture
    def weight(self, bits: int, n: int, k: int, experts: int) -> PackedWeight:
        """Of zeros: only the shapes matter."""
        return PackedWeight(
            num_experts=experts,
            halves=2,
            n=n,
            n_pad=n,
            k=k,
            k_pad=k,
            bias=None,
            scheme=scheme(bits, 32),
            qweight=torch.zeros(packing.qweight_shape(experts, 2 * n, k, bits), dtype=torch.int32),
            scales=torch.zeros(packing.pairs_shape(experts, 2 * n, k // 32), dtype=torch.int32),
            zeros=None,
            k_perm=None,
        )

    @pytest.mark.parametrize("divisor", [2, 4, 8])
    def test_k_divided(self, weight: PackedWeight, divisor: int) -> None:
        k = weight.k // divisor
        with pytest.raises(
            ShapeError, match=rf"qweight: got shape .* for E=\d, 2 x N=\d+ .*K={k} .*; give the logical"
        ):
            change(weight, k=k, k_pad=packing.padded_columns(k, 32))

    @pytest.mark.parametrize("divisor", [2, 4, 8])
    def test_n_divided(self, weight: PackedWeight, divisor: int) -> None:
        n = weight.n // divisor
        with pytest.raises(ShapeError, match=rf"qweight: got shape .* for E=\d, 2 x N={n} .*; give the logical"):
            change(weight, n=n, n_pad=packing.padded_rows(n))

    @pytest.mark.parametrize("dim", ["n", "k"])
    def test_multiplied(self, weight: PackedWeight, dim: str) -> None:
        size = getattr(weight, dim) * 8
        with pytest.raises(ShapeError, match=r"qweight: got shape"):
            change(weight, **{dim: size, f"{dim}_pad": size})

    def test_fused_rows_as_n_of_two_halves(self, weight: PackedWeight) -> None:
        with pytest.raises(ShapeError, match=r"qweight: got shape"):
            change(weight, n=2 * weight.n, n_pad=2 * weight.n)

    def test_one_half_of_two(self, weight: PackedWeight) -> None:
        with pytest.raises(ShapeError, match=r"qweight: got shape .* for E=., 1 x N="):
            change(weight, halves=1)

    def test_swapped(self, weight: PackedWeight) -> None:
        if weight.n == weight.k:
            assert change(weight, n=weight.k, k=weight.n) is not None
            return
        with pytest.raises(ShapeError, match=r"qweight: got shape"):
            change(weight, n=weight.k, n_pad=weight.k, k=weight.n, k_pad=weight.n)

    def test_other_bits(self, weight: PackedWeight, bits: int) -> None:
        with pytest.raises(ShapeError, match=r"qweight: got shape .* for .*, w\da16_g32_sym"):
            change(weight, scheme=scheme(12 - bits, 32))

    def test_other_experts(self, weight: PackedWeight) -> None:
        with pytest.raises(ShapeError, match=r"qweight: got shape .* for E=8"):
            change(weight, num_experts=8)

    def test_other_group(self, weight: PackedWeight) -> None:
        for group in (16, 64, None):
            with pytest.raises(ShapeError, match=r"scales: got shape .* for .*(w\da16_g16|g64|channel)"):
                change(weight, scheme=replace(weight.scheme, group_size=group))

    def test_the_checkpoints_own_words(self, weight: PackedWeight, bits: int) -> None:
        """GPTQ's and AWQ's shapes have as many elements; neither is taken."""
        e, rows, k = weight.num_experts, weight.rows, weight.k
        for shape in ((e, k * bits // 32, rows), (e, rows, k * bits // 32), (e, rows // 64, k // 64 * 128 * bits)):
            with pytest.raises(ShapeError, match=r"qweight: got shape"):
                change(weight, qweight=weight.qweight.reshape(shape))


@pytest.fixture
def good() -> PackedWeight:
    return packed(scheme(4, 32, symmetric=False), experts=2, halves=2, n=64, k=96, bias=True, act_order=True).weight


@pytest.mark.parametrize("field", ["qweight", "scales", "zeros", "k_perm"])
def test_integer_tensors_only(good: PackedWeight, field: str) -> None:
    for dtype in (torch.int64, torch.float32, torch.uint8):
        with pytest.raises(ShapeError, match=rf"{field}: got dtype {dtype}, expected torch.int32 .*\.to\(dtype\)"):
            change(good, **{field: getattr(good, field).to(dtype)})


@pytest.mark.parametrize("field", ["qweight", "scales", "zeros", "k_perm", "bias"])
def test_every_tensor_has_its_shape(good: PackedWeight, field: str) -> None:
    tensor = getattr(good, field)
    for wrong in (tensor[1:], tensor[..., :-1], tensor.unsqueeze(0), tensor.flatten(), tensor[:, :1]):
        with pytest.raises(ShapeError, match=rf"^{field}: got shape"):
            change(good, **{field: wrong})


@pytest.mark.parametrize("field", ["scales", "zeros", "k_perm", "bias"])
def test_one_device(good: PackedWeight, field: str) -> None:
    with pytest.raises(ShapeError, match=rf"devices: got .*{field} on meta.*expected one device"):
        change(good, **{field: getattr(good, field).to("meta")})


def test_scales_as_floats_are_refused(good: PackedWeight) -> None:
    """Scales that are not pairs, as checkpoints and .to(dtype) have them."""
    with pytest.raises(ShapeError, match=r"scales: got shape"):
        change(good, scales=torch.zeros(2, 128, 4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1; give the model's logical"),
        ({"n": 0}, "n: got 0, expected at least 1"),
        ({"k": -1}, "k: got -1, expected at least 1"),
        ({"halves": 3}, r"halves: got 3, expected 2 \(gate and up\) or 1; n counts the rows of one half"),
        ({"halves": 0}, "halves: got 0, expected 2"),
        ({"n": 65}, "padded dims: got n_pad=64, k_pad=128, expected at least n=65 and k=96; .*padded_rows"),
        ({"k": 129}, "padded dims: got n_pad=64, k_pad=128, expected at least n=64 and k=129"),
        (
            {"n_pad": 72, "bias": None},
            "padded dims: got n_pad=72, k_pad=128, expected whole tiles of 64 and whole groups of 32",
        ),
        ({"k_pad": 96}, "padded dims: got n_pad=64, k_pad=96, expected whole tiles of 64"),
        ({"scheme": scheme(4, 96, symmetric=False)}, "padded dims: got n_pad=64, k_pad=128, .* whole groups of 96"),
        ({"zeros": None}, "zeros: got None, expected a tensor for scheme w4a16_g32_asym; declare the scheme symmetric"),
        ({"scheme": scheme(4, 32)}, "zeros: got a tensor, expected none for scheme w4a16_g32_sym"),
    ],
)
def test_contradictions(good: PackedWeight, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        change(good, **changes)


def test_the_divided_k_with_the_right_padding() -> None:
    """K/8 with the k_pad of K agrees with every tensor; only that k_pad is not the least padding of k tells."""
    weight = packed(scheme(4, 32), k=512).weight
    with pytest.raises(ShapeError, match=r"k_pad"):
        change(weight, k=64)


def test_bias_is_float32(good: PackedWeight) -> None:
    assert good.bias is not None
    with pytest.raises(ShapeError, match=r"bias: got dtype torch.bfloat16, expected torch.float32"):
        change(good, bias=good.bias.to(torch.bfloat16))


def test_another_layout(good: PackedWeight) -> None:
    with pytest.raises(UnsupportedError, match=rf"layout: got marlin, expected {packing.LAYOUT}; repack"):
        change(good, layout="marlin")


def test_dense_contradictions() -> None:
    weight = dense(torch.bfloat16, experts=2, halves=2, n=8, k=16, bias=True).weight
    with pytest.raises(ShapeError, match=r"w: got shape \[2, 16, 16\], expected \[2, 16, 2\]"):
        change(weight, k=2, k_pad=2)
    with pytest.raises(ShapeError, match=r"bias: got shape \[2, 16\], expected \[2, 8\]"):
        change(weight, halves=1)
    with pytest.raises(ShapeError, match=r"w: got shape \[2, 16, 16\], expected \[2, 8, 16\] for E=2, 1 x N=8"):
        change(weight, halves=1, bias=None)
    with pytest.raises(ShapeError, match=r"w: got dtype torch.int8, expected float32, bfloat16 or float16; load quant"):
        change(weight, w=weight.w.to(torch.int8))
    with pytest.raises(ShapeError, match=r"w: got dtype torch.float64"):
        change(weight, w=weight.w.double())
    with pytest.raises(ShapeError, match=r"padded dims: got n_pad=8, k_pad=16, expected at least n=9"):
        change(weight, n=9)
    with pytest.raises(ShapeError, match=r"devices: got bias on cpu, w on meta"):
        change(weight, w=weight.w.to("meta"))
