"""CanonicalWeight: what every format decodes to, before packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core.errors import FormatError
from quant_moelora.core.scheme import QuantScheme


@dataclass(frozen=True, eq=False)
class CanonicalWeight:
    """Codes, scales and zero points of a weight [N, K] in the checkpoint's own column order.

    Any number of leading dimensions (experts) may stand in front. w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]
    with g = g_idx[k], or k // group_size without one; zeros are 2**(bits-1) for a symmetric scheme.

    Attributes:
        scheme: what the codes mean.
        codes: uint8 [..., N, K].
        scales: scheme.scale_dtype [..., N, G].
        zeros: uint8 [..., N, G], or None for a symmetric scheme.
        g_idx: int32 [..., K], group of each column; None where it is k // group_size.
    """

    scheme: QuantScheme
    codes: Tensor  # (..., N, K) uint8
    scales: Tensor  # (..., N, G) scheme.scale_dtype
    zeros: Tensor | None  # (..., N, G) uint8
    g_idx: Tensor | None  # (..., K) int32

    def dequantize(self) -> Tensor:  # (..., N, K) float32
        """The definition above, evaluated in float32."""
        k = self.codes.shape[-1]
        if self.g_idx is None:
            size = k if self.scheme.group_size is None else self.scheme.group_size
            group = torch.arange(k, device=self.codes.device) // size
        else:
            group = self.g_idx.to(torch.int64)
        index = group.unsqueeze(-2).expand(self.codes.shape)
        zero = self.scheme.symmetric_zero if self.zeros is None else self.zeros.to(torch.float32).gather(-1, index)
        return (self.codes.to(torch.float32) - zero) * self.scales.to(torch.float32).gather(-1, index)


def check_finite(
    weight: CanonicalWeight | Tensor,  # (E, N, K), quantised or not
    modules: Sequence[str],
) -> None:
    """Raise FormatError unless the scales of every module (the values, if unquantised) are finite."""
    what, values = ("scales", weight.scales) if isinstance(weight, CanonicalWeight) else ("weight", weight)
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        raise FormatError(
            f"{what} of {modules[int(finite.logical_not().nonzero()[0])]}",
            got="values that are not finite",
            rule="finite values",
            remedy="the checkpoint is damaged, or the quantisation failed: download or quantise again",
        )


def trivial_g_idx(
    g_idx: Tensor,  # (..., K) integer
    group_size: int | None,
) -> bool:
    """Whether every column k belongs to group k // group_size, so that the map says nothing."""
    k = g_idx.shape[-1]
    plain = torch.arange(k, device=g_idx.device) // (k if group_size is None else group_size)
    return bool((g_idx == plain).all())


def unpack_words(
    words: Tensor,  # (...) int32
    bits: int,
    dim: int,
) -> Tensor:  # uint8, 32/bits times as long along dim
    """Split int32 words along ``dim`` into their codes, lowest bits first.

    Words that are packed along another dimension than the last are transposed while they are words: the codes are the
    transposed view of a contiguous tensor.
    """
    codes = contiguous_bytes(words.transpose(dim, -1))
    if bits == 4:
        wide = codes.to(torch.int16)  # one byte and an empty one, for its two codes
        codes = (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)
    return codes.transpose(dim, -1)


def contiguous_bytes(
    words: Tensor,  # (..., C) int32
) -> Tensor:  # (..., 4*C) uint8
    """The bytes of a copy of int32 words, lowest first (`core.packing` is sure of the byte order).

    `Tensor.contiguous` would leave a dimension of one element its stride, which cannot be viewed as bytes.
    """
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
