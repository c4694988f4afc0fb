"""Prepared scales and zero points, multiplied as the GPU does it, give round((q - zero) * scale) for every code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.dequant.prepare import PreparedWeight, prepare, regrouped
from tests.builders import packed, same_bits, scheme

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BITS = pytest.mark.parametrize("bits", [4, 8])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])

# Scales that sit at the edges: the least normal and subnormal ones of float16, 2**-5 (from which on one step needs
# `post` in bfloat16), 2**6 (float16's own limit), odd significands, and 0.
EDGES = (2.0**-24, 3 * 2.0**-24, 2.0**-14, 0.0123, 2.0**-5 - 2.0**-16, 2.0**-5, 0.05, 0.999, 3.7, 63.97, 64.0, 100.3)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to the nearest value of ``dtype``, ties to even, subnormals kept: by definition, not by a cast.

    torch's cast of float64 goes by way of float32 on some devices, which would round twice.
    """
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    exponent = torch.frexp(value)[1].clamp(min=round(math.log2(info.smallest_normal)) + 1)
    unit = torch.exp2((exponent - digits).double())
    result = torch.round(value / unit) * unit  # to even; both steps are exact
    assert (result.abs() <= info.max).all()
    return result


def fma(a: Tensor, b: Tensor | float, c: Tensor | float, dtype: torch.dtype) -> Tensor:
    """a * b + c, rounded once. Here every product has at most 19 bits and every sum at most 53: float64 is exact."""
    return rounded(a * b + c, dtype)


def prepared_values(weight: PackedWeight, made: PreparedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points that the kernel loads, float64 [E, rows, groups]."""
    scales = packing.unpack_pairs(made.scales, dtype).double()
    if made.zeros is not None:
        return scales, packing.unpack_pairs(made.zeros, dtype).double()
    both = torch.tensor([made.zero], dtype=torch.int32).view(dtype).double()
    assert both[0] == both[1]
    return scales, both[0].expand_as(scales)


def decoded(weight: PackedWeight, made: PreparedWeight, dtype: torch.dtype) -> Tensor:  # (E, rows, k_pad) float64
    """What reaches the matrix unit, times `post`: codes as subnormal floats, then the FMAs of kernel.py.

    A float whose bits are those of an integer q below 2**7 (bfloat16) or 2**10 (float16), and with bfloat16's 8 bits of
    significand up to 2**8, is q times the least subnormal. The high row of an int4 pair is 4 bits higher.
    """
    codes = packing.unpack_codes(weight.qweight, weight.scheme.bits)
    high = torch.arange(codes.shape[1]) % 16 >= 8
    shift = torch.where(high, 16.0, 1.0)[:, None].double() if weight.scheme.bits == 4 else torch.ones(1, 1).double()
    raw = codes.to(torch.int32) * shift.to(torch.int32)
    code = raw.to(torch.int16).view(dtype).double()  # the bits as a float
    held = prepared_values(weight, made, dtype)
    scale, zero = (value.repeat_interleave(made.group, dim=-1) for value in held)
    if made.one_step:
        # kernel.dequantize makes the addend from the scale: -8 s = S * -2**-130 or -2**-126, -128 s = S * -2**-126
        to_addend = torch.where(high, -(2.0**-126), -(2.0**-130))[:, None].double()
        addend = fma(scale, to_addend if weight.scheme.bits == 4 else -(2.0**-126), -0.0, dtype)
        value = fma(code, scale, addend, dtype)
    else:
        exponent = {torch.bfloat16: 127, torch.float16: 15}[dtype]
        difference = fma(code, 2.0**exponent / shift, zero, dtype)
        value = fma(difference, scale, -0.0, dtype)
    return value if made.post is None else value * made.post.double()[:, None, None]


@dataclass(frozen=True)
class Built:
    """A weight in whose row r code c stands in column c, whatever the row; scales as given."""

    weight: PackedWeight
    codes: Tensor  # (E, 64, k) uint8
    scales: Tensor  # (E, 64, groups) float64
    zeros: Tensor  # (E, 64, groups) float64


def build(quant: QuantScheme, values: Tensor) -> Built:  # values (E, 64, groups) float64
    """Every code with every scale: each group holds all 16, or a part of all 256, codes."""
    experts, _, groups = values.shape
    built = packed(
        quant, experts=experts, n=64, k=groups * 64 if quant.group_size is None else groups * quant.group_size
    )
    k = built.weight.k_pad
    codes = torch.arange(k).remainder(1 << quant.bits).expand(experts, 64, k)
    shifted = (codes + 64 * torch.arange(64)[:, None]) % (1 << quant.bits)  # so that 4 rows have all codes of int8
    codes = shifted.to(torch.uint8)
    scales = values.to(quant.scale_dtype)
    weight = replace(built.weight, qweight=packing.pack_codes(codes, quant.bits), scales=packing.pack_pairs(scales))
    return Built(weight, codes, scales.double(), built.zeros.flatten(1, 2).double())


def choose(experts: int, groups: int) -> Tensor:
    """Scales [experts, 64, groups] from EDGES with random signs, up to 2**-5 in the first expert; some are 0."""
    values = torch.zeros(experts, 64, groups, dtype=torch.float64)
    for expert, most in zip(range(experts), (5, 10, len(EDGES)), strict=False):
        pool = torch.tensor([0.0, *EDGES[:most]], dtype=torch.float64)
        picked = pool[torch.randint(len(pool), (64, groups))]
        picked[0, 0] = pool[-1]  # so that the largest is there
        values[expert] = picked * torch.sign(torch.randn(64, groups))
    return values


def post_of(scales: Tensor, bound: int) -> Tensor:
    """By trial: the least power of two by which the largest scale of each expert falls below 2**bound."""
    posts: list[float] = []
    for largest in scales.abs().amax(dim=(1, 2)).tolist():
        post = 1.0
        while largest / post >= 2.0**bound:
            post *= 2
        posts.append(post)
    return torch.tensor(posts, dtype=torch.float64)


@DTYPES
@BITS
@SYMMETRIC
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 192, None])
@pytest.mark.parametrize("scale_bf16", [False, True], ids=["scales fp16", "scales bf16"])
def test_every_code_is_the_definition(
    group: int | None, bits: int, symmetric: bool, scale_bf16: bool, dtype: torch.dtype
) -> None:
    groups = {None: 1, 16: 16, 32: 8, 48: 4, 64: 4, 128: 2, 192: 1}[group]
    built = build(scheme(bits, group, symmetric, scale_bf16), choose(3, groups))
    made, _ = prepare(built.weight, dtype)
    # Above these a prepared scale would be no finite float: 2**133 * 2**-5 = 2**128 and 2**9 * 2**7 = 2**16.
    bound = 6 if dtype == torch.float16 else -5 if symmetric else 121
    post = post_of(rounded(built.scales, dtype), bound)
    assert (post > 1).any() == (bound < 121)
    assert (made.post is None) == (bound == 121)
    if made.post is not None:
        assert made.post.dtype == torch.float32 and torch.equal(made.post.double(), post)
    post = post[:, None, None]
    scales, zeros = (value.repeat_interleave(built.weight.group, dim=-1) for value in (built.scales, built.zeros))
    exact = (built.codes.double() - zeros) * rounded(scales, dtype)
    want = rounded(exact / post, dtype) * post  # only float16's subnormals see the division
    assert torch.equal(decoded(built.weight, made, dtype), want)
    normal = (exact / post).abs() >= torch.finfo(dtype).smallest_normal
    assert torch.equal(want[normal], rounded(exact, dtype)[normal])


def test_a_scale_near_the_largest_bfloat16() -> None:
    """2**122 * 2**6 would be no finite float."""
    weight = build(scheme(4, 64, False, bf16=True), torch.full((1, 64, 1), 2.0**122)).weight
    made, _ = prepare(weight, torch.bfloat16)
    assert made.post is not None and made.post.tolist() == [4.0]
    assert (packing.unpack_pairs(made.scales, torch.bfloat16) == 2.0**126).all()


@DTYPES
@pytest.mark.parametrize("quant", [scheme(4, 32), scheme(8, 64, symmetric=False)], ids=lambda s: s.name)
def test_prepared_shapes(quant: QuantScheme, dtype: torch.dtype) -> None:
    built = packed(quant, experts=3, halves=2, n=100, k=192)
    made, _ = prepare(built.weight, dtype)
    assert (made.num_experts, made.halves, made.n, made.n_pad, made.k_pad, made.bits) == (
        3,
        2,
        100,
        128,
        192,
        quant.bits,
    )
    assert made.qweight is built.weight.qweight and made.bias is None and made.k_perm is None
    assert made.group == quant.group_size
    assert made.scales.shape == built.weight.scales.shape and made.scales.dtype == torch.int32
    if quant.symmetric:
        assert made.zeros is None and made.tensors("w").keys() == {"w.scales"}
    else:
        assert made.zeros is not None and made.zeros.shape == made.scales.shape
        assert made.tensors("w").keys() == {"w.scales", "w.zeros"}
    assert made.post is None, "the builder's scales are as small as real ones"
    assert made.one_step == (quant.symmetric and dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("group", "k", "expected"),
    [
        (16, 64, 16),
        (24, 192, 8),
        (32, 64, 32),
        (48, 192, 16),
        (64, 64, 64),
        (96, 192, 32),
        (128, 128, 128),
        (192, 192, 64),
        (256, 256, 256),
        (None, 64, 64),
        (None, 192, 64),
        (None, 256, 256),
    ],
)
def test_regrouped(group: int | None, k: int, expected: int) -> None:
    """Steps are 64 or 128 columns wide: a group divides them, or is a whole number of the wider one."""
    assert regrouped(packed(scheme(4, group), experts=1, k=k).weight) == expected


def test_a_scale_serves_every_part_of_its_group() -> None:
    built = packed(scheme(8, 192, symmetric=False), experts=2, n=64, k=576)
    made, _ = prepare(built.weight, torch.float16)
    assert made.group == 64 and made.zeros is not None
    for stored, factor, found in ((built.scales, 2.0**9, made.scales), (built.zeros, -(2.0**-9), made.zeros)):
        parts = packing.unpack_pairs(found, torch.float16)  # (E, 64, 9)
        for part in range(9):
            assert torch.equal(parts[..., part].float(), stored.flatten(1, 2)[..., part // 3].float() * factor)


class TestLoss:
    """What is said of a cast of the scales."""

    def lossy(self, scale_bf16: bool, dtype: torch.dtype, value: float) -> str | None:
        return prepare(build(scheme(4, 64, bf16=scale_bf16), torch.full((1, 64, 1), value)).weight, dtype)[1]

    def test_no_cast(self) -> None:
        assert self.lossy(False, torch.float16, 1 + 2.0**-10) is None
        assert self.lossy(True, torch.bfloat16, 0.0123) is None

    def test_an_exact_cast(self) -> None:
        assert self.lossy(False, torch.bfloat16, 1 + 2.0**-7) is None
        assert self.lossy(True, torch.float16, 0.0123) is None

    def test_a_rounding(self) -> None:
        # 1 + 2**-10 becomes 1: 2**-10 / (1 + 2**-10) = 9.756e-4
        said = self.lossy(False, torch.bfloat16, 1 + 2.0**-10)
        assert said == "scales rounded from float16 to bfloat16, by at most 9.8e-04 of their value"

    def test_a_scale_too_small_for_float16(self) -> None:
        said = self.lossy(True, torch.float16, 2.0**-30)
        assert said == "scales rounded from bfloat16 to float16, by at most 1.0e+00 of their value"

    def test_a_scale_too_large_for_float16(self) -> None:
        with pytest.raises(UnsupportedError, match=r"scales: got up to 131072\.0, .* float16; compute in bfloat16"):
            self.lossy(True, torch.float16, 2.0**17)


def test_codes_are_left_alone() -> None:
    built = packed(scheme(4, 32), experts=2)
    before = {name: tensor.clone() for name, tensor in built.weight.tensors().items()}
    prepare(built.weight, torch.bfloat16)
    assert all(same_bits(before[name], tensor) for name, tensor in built.weight.tensors().items())
