"""PackedWeight and DenseWeight: one projection of all experts, with the dimensions it logically has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.checks import check_positive, check_same_device, check_tensor
from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.scheme import NONE_SCHEME, QuantScheme, num_groups
from quant_moelora.core.shard import Span

ExpertIndex = Tensor | slice  # which experts of a weight: an int64 tensor of ids, or a slice
ALL_EXPERTS = slice(None)
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class _ExpertWeight:
    """Dimensions common to packed and dense weights.

    Attributes:
        num_experts: E.
        halves: 2 for gate and up together, 1 for a single projection.
        n: logical rows (output features) of each half.
        n_pad: rows of each half as stored; rows n..n_pad-1 are zero.
        k: logical columns (input features).
        k_pad: columns as stored; columns k..k_pad-1 are zero.
        bias: float32 [E, halves * n_pad], zero in the padding, or None.
    """

    num_experts: int
    halves: int
    n: int
    n_pad: int
    k: int
    k_pad: int
    bias: Tensor | None  # (E, halves*n_pad) float32

    def _check_dims(self) -> None:
        check_positive(num_experts=self.num_experts, n=self.n, k=self.k)
        if self.halves not in (1, 2):
            raise ShapeError(
                "halves",
                got=self.halves,
                rule="2 (gate and up) or 1",
                remedy="n counts the rows of one half; w13 of a gated expert has halves=2",
            )
        if self.n_pad < self.n or self.k_pad < self.k:
            raise ShapeError(
                "padded dims",
                got=f"n_pad={self.n_pad}, k_pad={self.k_pad}",
                rule=f"at least n={self.n} and k={self.k}",
                remedy="compute them with core.packing.padded_rows and padded_columns",
            )
        if self.bias is not None:
            check_tensor("bias", self.bias, (self.num_experts, self.rows), torch.float32, why=self.dims)

    @property
    def rows(self) -> int:
        """Stored rows of all halves."""
        return self.halves * self.n_pad

    @property
    def dims(self) -> str:
        """The logical dimensions in words, for messages."""
        return f"E={self.num_experts}, {self.halves} x N={self.n} (padded {self.n_pad}), K={self.k} ({self.k_pad})"

    def to(self, device: torch.device | str) -> Self:
        """The same weight with every tensor on ``device``, bit for bit."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by field name."""
        held = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def part(
        self, experts: Span, *, rows: tuple[Span, int] | None = None, columns: tuple[Span, int] | None = None
    ) -> Self:
        """Copy some experts of the weight, and of these some rows of each half, or some columns, or all.

        Args:
            experts: which.
            rows: which rows of each half, and how many are stored of them, with the padding that they keep.
            columns: the same of columns.
        """
        of_rows, n_pad = rows or (Span(0, self.n), self.n_pad)
        of_columns, k_pad = columns or (Span(0, self.k), self.k_pad)
        stored = (Span(of_rows.begin, of_rows.begin + n_pad), Span(of_columns.begin, of_columns.begin + k_pad))
        dims = {"num_experts": experts.size, "n": of_rows.size, "n_pad": n_pad, "k": of_columns.size, "k_pad": k_pad}
        cut: dict[str, Any] = {
            name: self._cut(name, tensor[experts.slice], *stored).clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **dims, **cut)

    def _cut(
        self,
        name: str,
        tensor: Tensor,  # (e, ...), the field of this name
        rows: Span,
        columns: Span,
    ) -> Tensor:
        """Stored rows of each half and stored columns of a field."""
        raise NotImplementedError

    def _of_rows(
        self,
        tensor: Tensor,  # (e, halves*n_pad/unit, ...)
        rows: Span,
        unit: int = 1,
    ) -> Tensor:
        """Stored rows of each half of a tensor that counts them in units."""
        parted = tensor.unflatten(1, (self.halves, self.n_pad // unit))
        return parted[:, :, rows.begin // unit : rows.end // unit].flatten(1, 2)

    def logical_bias(self, experts: ExpertIndex = ALL_EXPERTS) -> Tensor | None:
        """Bias without padding, float32 [e, halves, n], or None."""
        if self.bias is None:
            return None
        return self.bias[experts].unflatten(1, (self.halves, self.n_pad))[..., : self.n]


@dataclass(frozen=True, eq=False)
class PackedWeight(_ExpertWeight):
    """A quantised weight in the packed layout (`core.packing` holds the formula).

    Attributes:
        scheme: how the codes mean numbers.
        qweight: codes, int32 [E, halves*n_pad/64, k_pad/64, 128*bits].
        scales: raw 16-bit scales as pairs, int32 [E, halves*n_pad/64, k_pad/group, 32]; 0 in the padding.
        zeros: exact integer zero points as pairs, the shape of ``scales``; None for a symmetric scheme.
        k_perm: stored column -> column of x, int32 [E, halves, k_pad], -1 in the padding; None where x is read in
            its own order. Gate and up each have their own.
        layout: version of the layout.

    Raises:
        ShapeError: a tensor's shape or dtype is not the one that the logical dimensions demand.
        UnsupportedError: another layout version.
    """

    scheme: QuantScheme
    qweight: Tensor  # (E, halves*n_pad/64, k_pad/64, 128*bits) int32
    scales: Tensor  # (E, halves*n_pad/64, k_pad/group, 32) int32
    zeros: Tensor | None  # as scales
    k_perm: Tensor | None  # (E, halves, k_pad) int32
    layout: str = packing.LAYOUT

    def __post_init__(self) -> None:
        if self.layout != packing.LAYOUT:
            raise UnsupportedError(
                "layout", got=self.layout, rule=packing.LAYOUT, remedy="repack the weight from its checkpoint"
            )
        self._check_dims()
        k_pad = packing.padded_columns(self.k, self.scheme.group_size)
        if self.n_pad % packing.TILE or self.k_pad != k_pad:
            raise ShapeError(
                "padded dims",
                got=f"n_pad={self.n_pad}, k_pad={self.k_pad}",
                rule=f"whole tiles of {packing.TILE} and whole groups of {self.scheme.group_size}, "
                f"as few columns as hold K={self.k}: k_pad={k_pad}",
                remedy="compute them with core.packing.padded_rows and padded_columns",
            )
        if (self.zeros is None) != self.scheme.symmetric:
            raise ShapeError(
                "zeros",
                got="None" if self.zeros is None else "a tensor",
                rule=f"{'none' if self.scheme.symmetric else 'a tensor'} for scheme {self.scheme.name}",
                remedy="declare the scheme symmetric exactly where there are no zero points",
            )
        why = f"{self.dims}, {self.scheme.name}"
        codes = packing.qweight_shape(self.num_experts, self.rows, self.k_pad, self.scheme.bits)
        pairs = packing.pairs_shape(self.num_experts, self.rows, self.k_pad // self.group)
        check_tensor("qweight", self.qweight, codes, torch.int32, why=why)
        check_tensor("scales", self.scales, pairs, torch.int32, why=why)
        if self.zeros is not None:
            check_tensor("zeros", self.zeros, pairs, torch.int32, why=why)
        if self.k_perm is not None:
            shape = (self.num_experts, self.halves, self.k_pad)
            check_tensor("k_perm", self.k_perm, shape, torch.int32, why=why)
        check_same_device(self.tensors())

    @property
    def group(self) -> int:
        """Stored columns that share a scale."""
        return self.k_pad if self.scheme.group_size is None else self.scheme.group_size

    @property
    def column_unit(self) -> int:
        """Stored columns that must stay together: whole tiles and whole groups."""
        return math.lcm(packing.TILE, self.scheme.group_size or 1)

    def _cut(self, name: str, tensor: Tensor, rows: Span, columns: Span) -> Tensor:
        if name == "bias":
            return self._of_rows(tensor, rows)
        if name == "k_perm":
            assert columns.size == self.k_pad  # only w13 has one, and is cut along its rows
            return tensor
        tensor = self._of_rows(tensor, rows, packing.TILE)
        if name != "qweight" and self.scheme.group_size is None:
            return tensor  # one group, of which each part has the scales
        unit = packing.TILE if name == "qweight" else self.group
        return tensor[:, :, columns.begin // unit : columns.end // unit]

    @property
    def scheme_name(self) -> str:
        """Name of the scheme."""
        return self.scheme.name

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:  # (E, halves, n, k) uint8, (E, halves, n, G) 16-bit float
        """What the checkpoint stored, without padding; columns in the stored order, those of one group together."""
        codes = packing.unpack_codes(self.qweight, self.scheme.bits)
        scales = packing.unpack_pairs(self.scales, self.scheme.scale_dtype)
        # Padded columns and groups stand behind all others, whatever k_perm says.
        halves = [values.unflatten(1, (self.halves, self.n_pad))[:, :, : self.n] for values in (codes, scales)]
        return halves[0][..., : self.k], halves[1][..., : num_groups(self.k, self.scheme.group_size)]

    def dequantize(self, experts: ExpertIndex = ALL_EXPERTS) -> Tensor:  # (e, halves, n, k) float32
        """Exact values (q - zero) * scale in float32, columns in the order of x, padding removed.

        A difference of two codes has at most 9 significant bits and a 16-bit float at most 11, so that the float32
        product is exact.
        """
        q = packing.unpack_codes(self.qweight[experts], self.scheme.bits).to(torch.float32)
        q = q.unflatten(-1, (-1, self.group))
        scales = packing.unpack_pairs(self.scales[experts], self.scheme.scale_dtype)
        if self.zeros is None:
            q = q - self.scheme.symmetric_zero
        else:
            q = q - packing.unpack_pairs(self.zeros[experts], torch.int16).unsqueeze(-1)
        w = (q * scales.to(torch.float32).unsqueeze(-1)).flatten(-2)
        w = w.unflatten(1, (self.halves, self.n_pad))[:, :, : self.n]
        if self.k_perm is None:
            return w[..., : self.k].contiguous()
        return _scatter_columns(w, self.k_perm[experts], self.k)


@dataclass(frozen=True, eq=False)
class DenseWeight(_ExpertWeight):
    """An unquantised weight (scheme ``none``).

    Attributes:
        w: float32, bfloat16 or float16 [E, halves*n_pad, k_pad].

    Raises:
        ShapeError: a tensor's shape or dtype is not the one that the logical dimensions demand.
    """

    w: Tensor  # (E, halves*n_pad, k_pad) float

    def __post_init__(self) -> None:
        self._check_dims()
        if self.w.dtype not in DENSE_DTYPES:
            raise ShapeError(
                "w",
                got=f"dtype {self.w.dtype}",
                rule="float32, bfloat16 or float16",
                remedy="load quantised tensors as a PackedWeight",
            )
        check_tensor("w", self.w, (self.num_experts, self.rows, self.k_pad), self.w.dtype, why=self.dims)
        check_same_device(self.tensors())

    @property
    def column_unit(self) -> int:
        """Columns that stay together, so that parts are as kernels like them; nothing else asks for it."""
        return packing.TILE

    def _cut(self, name: str, tensor: Tensor, rows: Span, columns: Span) -> Tensor:
        tensor = self._of_rows(tensor, rows)
        return tensor if name == "bias" else tensor[:, :, columns.slice]

    @property
    def scheme_name(self) -> str:
        """``none``."""
        return NONE_SCHEME

    def dequantize(self, experts: ExpertIndex = ALL_EXPERTS) -> Tensor:  # (e, halves, n, k) float32
        """The weight in float32 without its padding."""
        w = self.w[experts].unflatten(1, (self.halves, self.n_pad))
        return w[:, :, : self.n, : self.k].to(torch.float32)


ExpertWeight = PackedWeight | DenseWeight


def _scatter_columns(
    w: Tensor,  # (e, halves, n, k_pad) stored column order
    k_perm: Tensor,  # (e, halves, k_pad) int32, -1 = padding
    k: int,
) -> Tensor:  # (e, halves, n, k)
    """Put stored columns where x has them; padded columns are dropped."""
    target = torch.where(k_perm < 0, k, k_perm).to(torch.int64)[:, :, None, :].expand_as(w)
    out = torch.zeros(*w.shape[:-1], k + 1, dtype=w.dtype, device=w.device)
    return out.scatter_(-1, target, w)[..., :k].contiguous()
