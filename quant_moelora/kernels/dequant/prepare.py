"""Scales and zero points of a packed weight as the dequantisation wants them, for one compute dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.weights import PackedWeight

# Columns of the widest step of a kernel; a group is a whole number of them or divides them.
_STEP = 128
LEAST_GROUP = 16  # columns of one matrix instruction, which share a register


@dataclass(frozen=True)
class Recipe:
    """How one dtype turns codes into weights; see `kernel`.

    Attributes:
        one_step: whether a symmetric weight is one FMA.
        scale: factors of the scales of rows in the low and in the high half of a pair.
        zero: factor of the zero points.
        bound: scales have to be below 2**bound; larger ones are halved until they are, and the sums doubled again.
    """

    one_step: bool
    scale: tuple[float, float]
    zero: float
    bound: int


def recipe(dtype: torch.dtype, bits: int, symmetric: bool) -> Recipe:
    """The recipe for a compute dtype, bfloat16 or float16.

    int4 codes of the high row of a pair stand at bit 4, 16 times as large, which one step takes back from the scale.
    """
    if dtype == torch.float16:
        return Recipe(False, (2.0**9, 2.0**9), -(2.0**-9), bound=6)  # 2**15 is float16's largest power
    if symmetric:
        return Recipe(True, (2.0**133, 2.0**129 if bits == 4 else 2.0**133), 0.0, bound=-5)  # 2**127 is bfloat16's
    return Recipe(False, (2.0**6, 2.0**6), -(2.0**-6), bound=121)


class PreparedWeight(NamedTuple):
    """All that kernels read of a weight, checked when it was made: an operator takes it apart and puts it together.

    Attributes:
        qweight: as of `PackedWeight`, shared with it, and so are ``bias`` and ``k_perm``.
        scales: pairs of the dtype that is computed in.
        zeros: the same for zero points; None for a symmetric weight.
        post: powers of two that the sums of each expert are multiplied with; None if all are 1.
        group: columns that share a scale, after `regrouped`.
        zero: the int32 that serves every code of a symmetric weight.
        one_step: see `Recipe`.
    """

    qweight: Tensor  # (E, rows/64, k_pad/64, 128*bits) int32
    scales: Tensor  # (E, rows/64, k_pad/group, 32) int32
    zeros: Tensor | None  # as scales
    post: Tensor | None  # (E,) float32
    bias: Tensor | None  # (E, rows) float32
    k_perm: Tensor | None  # (E, halves, k_pad) int32
    num_experts: int
    halves: int
    n: int
    n_pad: int
    k_pad: int
    bits: int
    group: int
    zero: int
    one_step: bool

    @property
    def rows(self) -> int:
        """Stored rows of all halves."""
        return self.halves * self.n_pad

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that are not the weight's own, as ``name.field``."""
        held = {"scales": self.scales, "zeros": self.zeros, "post": self.post}
        return {f"{name}.{field}": value for field, value in held.items() if value is not None}


def regrouped(weight: PackedWeight) -> int:
    """Group size that the kernels serve and that divides the weight's own."""
    return weight.group if weight.group % _STEP == 0 else math.gcd(weight.group, _STEP)


def prepare(weight: PackedWeight, dtype: torch.dtype) -> tuple[PreparedWeight, str | None]:
    """Cast scales to ``dtype`` and fold the powers of two of the dequantisation into them.

    Exact but for the cast; the second result says in words what that lost, or is None if nothing.

    Raises:
        UnsupportedError: a scale is beyond the largest value of ``dtype``.
    """
    how = recipe(dtype, weight.scheme.bits, weight.scheme.symmetric)
    group = regrouped(weight)
    stored = packing.unpack_pairs(weight.scales, weight.scheme.scale_dtype).to(torch.float32)  # (E, rows, groups)
    cast = stored if weight.scheme.scale_dtype == dtype else stored.to(dtype).to(torch.float32)
    least, most = cast.flatten(1).aminmax(dim=1)
    largest = torch.maximum(-least, most)  # (E,), not finite if any scale is not
    if not bool(largest.isfinite().all()) and bool((cast.isinf() & stored.isfinite()).any()):
        raise UnsupportedError(
            "scales",
            got=f"up to {float(stored.abs().max())}",
            rule=f"at most {torch.finfo(dtype).max}, the largest {str(dtype).removeprefix('torch.')}",
            remedy="compute in bfloat16",
        )
    # The largest is below 2**(excess + bound).
    excess = (torch.frexp(largest)[1] - how.bound).clamp(min=0).to(torch.float64)
    power = torch.frexp(_by_row(cast.shape[1], how.scale, cast.device))[1] - 1 - excess[:, None, None]
    # In two steps, since 2**133 is beyond float32. Both are exact, and so is what stands between them: it is no larger
    # than the larger of the two ends, and no smaller than the smaller one.
    first, second = (torch.exp2(p).to(torch.float32) for p in ((power / 2).floor(), power - (power / 2).floor()))
    scaled = (cast * first).mul_(second)
    repeat = weight.group // group
    zeros, zero = None, 0
    if weight.zeros is not None:
        integers = packing.unpack_pairs(weight.zeros, torch.int16).to(torch.float32)
        zeros = _pairs(integers * how.zero, repeat, dtype)
    elif not how.one_step:
        addend = torch.full((2,), weight.scheme.symmetric_zero * how.zero, dtype=dtype)
        zero = int(addend.view(torch.int32))
    made = prepared_weight(
        weight,
        scales=_pairs(scaled, repeat, dtype),
        zeros=zeros,
        zero=zero,
        post=torch.exp2(excess).to(torch.float32) if bool(excess.any()) else None,
        one_step=how.one_step,
    )
    return made, _loss(stored, cast, weight.scheme.scale_dtype, dtype)


def prepared_weight(
    weight: PackedWeight,
    *,
    scales: Tensor,  # (E, rows/64, k_pad/group, 32) int32
    zeros: Tensor | None,  # as scales
    zero: int,
    post: Tensor | None,  # (E,) float32
    one_step: bool,
) -> PreparedWeight:
    """The weight with these scales and zero points."""
    return PreparedWeight(
        qweight=weight.qweight,
        scales=scales,
        zeros=zeros,
        post=post,
        bias=weight.bias,
        k_perm=weight.k_perm,
        num_experts=weight.num_experts,
        halves=weight.halves,
        n=weight.n,
        n_pad=weight.n_pad,
        k_pad=weight.k_pad,
        bits=weight.scheme.bits,
        group=regrouped(weight),
        zero=zero,
        one_step=one_step,
    )


def _by_row(rows: int, factors: tuple[float, float], device: torch.device) -> Tensor:  # (rows, 1) float64
    """Factor of each row: rows n and n + 8 of 16 share a pair."""
    low, high = (torch.full((8,), factor, dtype=torch.float64, device=device) for factor in factors)
    return torch.cat((low, high)).repeat(rows // 16)[:, None]


def _pairs(values: Tensor, repeat: int, dtype: torch.dtype) -> Tensor:  # values (E, rows, groups) float32
    held = values.to(dtype)
    return packing.pack_pairs(held if repeat == 1 else held.repeat_interleave(repeat, dim=-1))


def _loss(stored: Tensor, cast: Tensor, source: torch.dtype, dtype: torch.dtype) -> str | None:
    """The loss of a cast of scales, both float32 [E, rows, groups], in words."""
    if source == dtype or torch.equal(stored, cast):
        return None
    worst = float(((cast - stored).abs() / stored.abs().clamp(min=torch.finfo(torch.float32).tiny)).max())
    names = [str(d).removeprefix("torch.") for d in (source, dtype)]
    return f"scales rounded from {names[0]} to {names[1]}, by at most {worst:.1e} of their value"
