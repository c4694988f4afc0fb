"""From canonical weights to MoEQuantInfo: act-order, padding, packing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight
from quant_moelora.loaders.canonical import CanonicalWeight

Weight = CanonicalWeight | Tensor  # one projection of all experts: quantised, or [E, N, K]

_PERMUTATIONS = ("w13.k_perm", "inter_perm")  # tensors of an info that some experts may have and others not


def build_info(
    w13: Weight,  # gate and up as halves: (E, halves, I, H)
    w2: Weight,  # (E, 1, H, I)
    activation: Activation,
    b13: Tensor | None = None,  # (E, halves, I) float32
    b2: Tensor | None = None,  # (E, 1, H) float32
) -> MoEQuantInfo:
    """Pack the two weights of a layer.

    The act-order of w2 (its g_idx) becomes `MoEQuantInfo.inter_perm` and is applied to the rows of w13; that of w13
    becomes its k_perm.

    Raises:
        UnsupportedError: an act-order whose groups are not of the scheme's size.
    """
    inter_perm: Tensor | None = None
    if isinstance(w2, CanonicalWeight) and w2.g_idx is not None:
        w2, inter_perm = _sort_columns(w2)
        w13 = _permute_rows(w13, inter_perm)
        b13 = None if b13 is None else b13.gather(2, inter_perm.expand_as(b13))
        inter_perm = inter_perm[:, 0].to(torch.int32)
    inter = _shape(w13)[2]
    if isinstance(w2, CanonicalWeight):
        inter_pad = packing.padded_columns(inter, w2.scheme.group_size)
    else:
        inter_pad = packing.padded_rows(inter) if isinstance(w13, CanonicalWeight) else inter
    return MoEQuantInfo(
        w13=_expert_weight(w13, b13, n_pad=inter_pad, k_pad=None),
        w2=_expert_weight(w2, b2, n_pad=None, k_pad=inter_pad),
        activation=activation,
        inter_perm=inter_perm,
    )


def join_experts(parts: Iterable[tuple[Sequence[int], MoEQuantInfo]], num_experts: int, first: int = 0) -> MoEQuantInfo:
    """A layer from infos of some of its experts each.

    The parts are taken one by one and their tensors copied, so that no two parts need to exist at the same time.

    Args:
        parts: which experts, and their info; each expert in one part, and at least one part.
        num_experts: E of the layer.
        first: stored position of the intermediate that the parts begin at.
    """
    joined: dict[str, Tensor] = {}
    info: MoEQuantInfo | None = None
    for experts, info in parts:
        index = torch.tensor(experts, device=info.device)
        for name, tensor in info.tensors().items():
            if name not in joined:
                whole = (num_experts, *tensor.shape[1:])
                begin = first if name == "inter_perm" else 0
                joined[name] = _identity(tensor, whole, begin) if name in _PERMUTATIONS else tensor.new_empty(whole)
            joined[name].index_copy_(0, index, tensor)
    assert info is not None

    def weight(part: ExpertWeight, name: str) -> ExpertWeight:
        """A weight with the joined tensors of its name."""
        held: dict[str, Any] = {key.removeprefix(name): joined[key] for key in joined if key.startswith(name)}
        return replace(part, num_experts=num_experts, **held)

    w13, w2 = weight(info.w13, "w13."), weight(info.w2, "w2.")
    return replace(info, w13=w13, w2=w2, inter_perm=joined.get("inter_perm"))


def _identity(
    permutation: Tensor,  # (e, ..., K) int32, -1 in the padding
    shape: tuple[int, ...],
    first: int,
) -> Tensor:  # (E, ..., K) int32
    """Permutations that leave everything where it is, as parts of a layer without act-order have none."""
    plain = torch.arange(first, first + shape[-1], dtype=permutation.dtype, device=permutation.device)
    return plain.where(permutation[:1] >= 0, -1).expand(shape).contiguous()


def _shape(weight: Weight) -> torch.Size:
    return weight.codes.shape if isinstance(weight, CanonicalWeight) else weight.shape


def _sort_columns(weight: CanonicalWeight) -> tuple[CanonicalWeight, Tensor]:
    """Columns ordered by group, and the order: int64 [E, halves, K], stored column -> original column."""
    assert weight.g_idx is not None
    order = weight.g_idx.to(torch.int64).argsort(dim=-1, stable=True)
    sorted_groups = weight.g_idx.to(torch.int64).gather(-1, order)
    k = order.shape[-1]
    plain = torch.arange(k, device=order.device) // (weight.scheme.group_size or k)
    if not bool((sorted_groups == plain).all()):
        raise UnsupportedError(
            "g_idx",
            got="groups of unequal size",
            rule=f"{weight.scheme.group_size} columns in every group but the last",
            remedy="requantise with static_groups off",
        )
    index = order.unsqueeze(-2).expand(weight.codes.shape)
    codes = weight.codes.gather(-1, index)
    return CanonicalWeight(weight.scheme, codes, weight.scales, weight.zeros, None), order


def _permute_rows(weight: Weight, order: Tensor) -> Weight:
    """Rows of every half in ``order``, int64 [E, 1, N]."""

    def rows(tensor: Tensor) -> Tensor:  # (E, halves, N, X)
        """The rows in their new order."""
        return tensor.gather(2, order.unsqueeze(-1).expand(tensor.shape))

    if isinstance(weight, Tensor):
        return rows(weight)
    zeros = None if weight.zeros is None else rows(weight.zeros)
    return CanonicalWeight(weight.scheme, rows(weight.codes), rows(weight.scales), zeros, weight.g_idx)


def _pad(
    tensor: Tensor,  # (..., N, X)
    columns: int,
    rows: int = 0,
    value: int = 0,
) -> Tensor:  # (..., N + rows, X + columns)
    """Add columns and rows of one value; the tensor itself, and no copy as of torch, if there are none to add."""
    return F.pad(tensor, (0, columns, 0, rows), value=value) if columns or rows else tensor


def _pad_columns(weight: CanonicalWeight, k_pad: int) -> Tensor:
    """Codes [E, halves, N, k_pad]: a padded column holds its group's zero point, so that its value is 0."""
    *lead, k = weight.codes.shape
    if weight.zeros is None or k == k_pad:
        return _pad(weight.codes, k_pad - k, value=weight.scheme.symmetric_zero)
    # Only the last group can reach into the padding; groups behind it have scale and zero point 0.
    rest = min(k_pad - k, -k % (weight.scheme.group_size or k_pad))
    fill = weight.zeros[..., -1:].expand(*lead, rest)
    return _pad(torch.cat((weight.codes, fill), dim=-1), k_pad - k - rest)


def _expert_weight(
    weight: Weight,
    bias: Tensor | None,  # (E, halves, N) float32
    *,
    n_pad: int | None,
    k_pad: int | None,
) -> ExpertWeight:
    """Pad and pack; dimensions that are not given are padded as little as the layout allows."""

    def padded_bias(n_pad: int) -> Tensor | None:
        """The bias with zeros for padded rows."""
        return None if bias is None else F.pad(bias, (0, n_pad - n)).flatten(1, 2)

    experts, halves, n, k = _shape(weight)
    if isinstance(weight, Tensor):
        n_pad, k_pad = n_pad or n, k_pad or k
        w = _pad(weight, k_pad - k, n_pad - n).flatten(1, 2)
        dims = {"num_experts": experts, "halves": halves, "n": n, "n_pad": n_pad, "k": k, "k_pad": k_pad}
        return DenseWeight(**dims, bias=padded_bias(n_pad), w=w)
    scheme = weight.scheme
    n_pad = n_pad or packing.padded_rows(n)
    k_pad = k_pad or packing.padded_columns(k, scheme.group_size)
    k_perm = None
    if weight.g_idx is not None:
        weight, order = _sort_columns(weight)
        k_perm = F.pad(order, (0, k_pad - k), value=-1).to(torch.int32)
    groups = k_pad // (scheme.group_size or k_pad)

    def pairs(values: Tensor) -> Tensor:  # (E, halves, N, G)
        """Values of groups, padded and two in a word."""
        return packing.pack_pairs(_pad(values, groups - values.shape[-1], n_pad - n).flatten(1, 2))

    codes = _pad(_pad_columns(weight, k_pad), 0, n_pad - n).flatten(1, 2)
    return PackedWeight(
        num_experts=experts,
        halves=halves,
        n=n,
        n_pad=n_pad,
        k=k,
        k_pad=k_pad,
        bias=padded_bias(n_pad),
        scheme=scheme,
        qweight=packing.pack_codes(codes, scheme.bits),
        scales=pairs(weight.scales),
        zeros=None if weight.zeros is None else pairs(weight.zeros.to(torch.int16)),
        k_perm=k_perm,
    )
