"""From canonical weights to MoEQuantInfo: act-order is folded, padding is shared and zero, values are kept."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.packing import unpack_codes, unpack_pairs
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, PackedWeight
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.pack import build_info
from tests.checkpoints import Linear, random_linear

SILU = Activation("silu")
EXPERTS, HIDDEN, INTER = 3, 64, 96


def canonical(rows: list[list[Linear]]) -> CanonicalWeight:
    """Experts of halves of linears as one weight [E, halves, N, K]."""

    def stacked(name: str) -> Tensor:
        arrays = [[torch.as_tensor(getattr(linear, name)) for linear in halves] for halves in rows]
        return torch.stack([torch.stack(halves) for halves in arrays])

    first = rows[0][0]
    return CanonicalWeight(
        scheme=QuantScheme(first.bits, first.group_size, first.symmetric, first.scales.dtype),
        codes=stacked("codes").to(torch.uint8),
        scales=stacked("scales"),
        zeros=None if first.symmetric else stacked("zeros").to(torch.uint8),
        g_idx=stacked("g_idx").to(torch.int32)
        if any(linear.act_order for halves in rows for linear in halves)
        else None,
    )


def values(rows: list[list[Linear]]) -> Tensor:  # (E, halves, N, K)
    return torch.stack([torch.stack([linear.weight for linear in halves]) for halves in rows])


def random_rows(n: int, k: int, halves: int, *, ordered: tuple[bool, ...] = (), **kwargs: Any) -> list[list[Linear]]:
    """Linears of all experts; ``ordered`` says which halves have an act-order."""
    rng = np.random.default_rng(n * k + halves)
    flags = ordered or (False,) * halves
    return [[random_linear(rng, n, k, act_order=flag, **kwargs) for flag in flags] for _ in range(EXPERTS)]


def check(info: MoEQuantInfo, w13: Tensor, w2: Tensor) -> None:
    """``info`` means the weights w13 [E, 2, I, H] and w2 [E, 1, H, I]."""
    gate, up, down = info.dequantize()
    assert gate is not None
    assert torch.equal(gate, w13[:, 0])
    assert torch.equal(up, w13[:, 1])
    assert torch.equal(down, w2[:, 0])


def check_folded(info: MoEQuantInfo, w13: Tensor, w2: Tensor, g_idx: Tensor) -> None:
    """Stored position p of expert e's intermediate is the logical one inter_perm[e, p], in w13 and w2 alike."""
    assert info.inter_perm is not None
    assert info.inter_perm.dtype == torch.int32
    order = info.inter_perm.long()
    for expert in range(EXPERTS):
        assert sorted(order[expert].tolist()) == list(range(INTER))
        groups = g_idx[expert, 0][order[expert]].tolist()
        assert groups == sorted(groups)
        assert torch.equal(info.w13.dequantize()[expert], w13[expert][:, order[expert]])
        assert torch.equal(info.w2.dequantize()[expert], w2[expert][..., order[expert]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, None, 24])
@pytest.mark.parametrize("w13_order", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("w2_order", [True, False])
def test_act_order_is_folded(
    bits: int, symmetric: bool, group_size: int | None, w13_order: tuple[bool, bool], w2_order: bool
) -> None:
    kwargs: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
    w13 = random_rows(INTER, HIDDEN, 2, ordered=w13_order, **kwargs)
    w2 = random_rows(HIDDEN, INTER, 1, ordered=(w2_order,), **kwargs)
    packed = canonical(w2)
    info = build_info(canonical(w13), packed, SILU)
    check(info, values(w13), values(w2))
    assert isinstance(info.w13, PackedWeight)
    assert isinstance(info.w2, PackedWeight)
    assert info.w2.k_perm is None
    assert (info.inter_perm is not None) == w2_order
    if packed.g_idx is not None:
        check_folded(info, values(w13), values(w2), packed.g_idx)
    assert (info.w13.k_perm is not None) == any(w13_order)
    if info.w13.k_perm is not None:
        check_k_perm(info.w13.k_perm, info.w13.k_pad)


def check_k_perm(k_perm: Tensor, k_pad: int) -> None:
    """Each expert and each of gate and up has every column of x once, and -1 in the padding."""
    assert k_perm.shape == (EXPERTS, 2, k_pad)
    for columns in k_perm.flatten(0, 1).tolist():
        assert sorted(columns[:HIDDEN]) == list(range(HIDDEN))
        assert set(columns[HIDDEN:]) <= {-1}


def test_k_perm_says_which_column_of_x_a_stored_column_is() -> None:
    w13 = canonical(random_rows(INTER, HIDDEN, 2, ordered=(True, True)))
    info = build_info(w13, canonical(random_rows(HIDDEN, INTER, 1)), SILU)
    packed = info.w13
    assert isinstance(packed, PackedWeight)
    assert packed.k_perm is not None
    assert w13.g_idx is not None
    codes = unpack_codes(packed.qweight, 4).unflatten(1, (2, packed.n_pad))[:, :, :INTER, :HIDDEN]
    index = packed.k_perm[..., :HIDDEN].long()
    assert torch.equal(codes, w13.codes.gather(-1, index[:, :, None].expand_as(w13.codes)))
    assert torch.equal(w13.g_idx.long().gather(-1, index), (torch.arange(HIDDEN) // 32).expand_as(index))
    assert not torch.equal(index[:, 0], index[:, 1])
    assert not torch.equal(index[0], index[1])


def test_w13_unquantised_and_w2_in_act_order() -> None:
    dense = torch.randn(EXPERTS, 2, INTER, HIDDEN).bfloat16()
    w2 = random_rows(HIDDEN, INTER, 1, ordered=(True,))
    packed = canonical(w2)
    info = build_info(dense, packed, SILU)
    assert isinstance(info.w13, DenseWeight)
    assert info.w13.w.dtype == torch.bfloat16
    assert info.w13.n_pad == info.w2.k_pad == 128
    assert packed.g_idx is not None
    check(info, dense.float(), values(w2))
    check_folded(info, dense.float(), values(w2), packed.g_idx)


@pytest.mark.parametrize("ordered", [(True, True), (False, False)])
def test_w13_quantised_and_w2_unquantised(ordered: tuple[bool, bool]) -> None:
    w13 = random_rows(INTER, HIDDEN, 2, ordered=ordered, symmetric=False)
    dense = torch.randn(EXPERTS, 1, HIDDEN, INTER).half()
    info = build_info(canonical(w13), dense, SILU)
    assert isinstance(info.w2, DenseWeight)
    assert info.w13.n_pad == info.w2.k_pad == 128
    assert info.inter_perm is None
    check(info, values(w13), dense.float())


def test_nothing_quantised() -> None:
    w13, w2 = torch.randn(EXPERTS, 2, 33, 20), torch.randn(EXPERTS, 1, 20, 33)
    info = build_info(w13, w2, SILU)
    assert info.inter_pad == 33
    assert info.scheme_name == "none"
    check(info, w13, w2)


def test_without_a_gate() -> None:
    w13, w2 = random_rows(INTER, HIDDEN, 1), random_rows(HIDDEN, INTER, 1, ordered=(True,))
    info = build_info(canonical(w13), canonical(w2), Activation("relu2", gated=False))
    gate, up, down = info.dequantize()
    assert gate is None
    assert torch.equal(up, values(w13)[:, 0])
    assert torch.equal(down, values(w2)[:, 0])


@pytest.mark.parametrize(
    ("inter", "w13_group", "w2_group", "pad"),
    [
        (96, 32, 32, 128),
        (96, 32, 128, 128),
        (96, 32, 48, 192),
        (192, 64, 128, 256),
        (200, None, None, 256),
        (64, 128, 64, 64),
    ],
)
def test_one_padding_of_the_intermediate(inter: int, w13_group: int | None, w2_group: int | None, pad: int) -> None:
    w13 = random_rows(inter, HIDDEN, 2, group_size=w13_group)
    w2 = random_rows(HIDDEN, inter, 1, group_size=w2_group)
    info = build_info(canonical(w13), canonical(w2), SILU)
    assert info.inter_pad == info.w13.n_pad == info.w2.k_pad == pad
    assert info.intermediate_size == info.w13.n == info.w2.k == inter
    check(info, values(w13), values(w2))


def everything(weight: PackedWeight) -> Tensor:
    """Values with padding, [E, rows, k_pad]."""
    codes = unpack_codes(weight.qweight, weight.scheme.bits).to(torch.float32)
    scales = unpack_pairs(weight.scales, weight.scheme.scale_dtype).to(torch.float32)
    zeros: Tensor | float = weight.scheme.symmetric_zero
    if weight.zeros is not None:
        zeros = unpack_pairs(weight.zeros, torch.int16).repeat_interleave(weight.group, dim=-1)
    return (codes - zeros) * scales.repeat_interleave(weight.group, dim=-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_padded_rows_are_zero(symmetric: bool, group_size: int | None) -> None:
    """Whatever x is, the padding of gate_up is exactly 0."""
    w13 = random_rows(INTER, 80, 2, symmetric=symmetric, group_size=group_size)
    w2 = random_rows(80, INTER, 1, symmetric=symmetric, group_size=group_size)
    info = build_info(canonical(w13), canonical(w2), SILU)
    for weight, logical in ((info.w13, values(w13)), (info.w2, values(w2))):
        assert isinstance(weight, PackedWeight)
        held = everything(weight).unflatten(1, (weight.halves, weight.n_pad))
        assert torch.equal(held[:, :, : weight.n, : weight.k], logical)
        assert not held[:, :, weight.n :].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 48, 24, 128, None])
def test_padded_columns_are_zero(symmetric: bool, group_size: int | None) -> None:
    """`core.weights` says so of columns k to k_pad - 1; those of a short last group have a scale."""
    w13 = random_rows(INTER, 80, 2, symmetric=symmetric, group_size=group_size)
    w2 = random_rows(80, INTER, 1, symmetric=symmetric, group_size=group_size)
    info = build_info(canonical(w13), canonical(w2), SILU)
    for weight in (info.w13, info.w2):
        assert isinstance(weight, PackedWeight)
        assert not everything(weight)[..., weight.k :].any()


@pytest.mark.parametrize("where", ["w13", "w2"])
def test_unequal_groups_are_refused(where: str) -> None:
    w13 = canonical(random_rows(INTER, HIDDEN, 2, ordered=(True, True)))
    w2 = canonical(random_rows(HIDDEN, INTER, 1, ordered=(True,)))
    g_idx = {"w13": w13, "w2": w2}[where].g_idx
    assert g_idx is not None
    g_idx[1, 0, 0] = 1 - g_idx[1, 0, 0].clamp(max=1)  # one column more in one group, one less in another
    with pytest.raises(UnsupportedError, match="g_idx: got groups of unequal size, expected 32 columns in every group"):
        build_info(w13, w2, SILU)


def test_scales_are_kept_bit_for_bit() -> None:
    """Stored pairs hold the raw 16 bits: the smallest float16 and negative ones too."""
    rows = random_rows(INTER, HIDDEN, 2)
    w13 = canonical(rows)
    w13.scales[0, 0, 0, 0] = 2.0**-24
    w13.scales[0, 0, 0, 1] = -65504.0
    info = build_info(w13, canonical(random_rows(HIDDEN, INTER, 1)), SILU)
    assert isinstance(info.w13, PackedWeight)
    scales = unpack_pairs(info.w13.scales, torch.float16).unflatten(1, (2, -1))[:, :, :INTER]
    assert torch.equal(scales.view(torch.int16), w13.scales.view(torch.int16))


def test_device_of_the_info_is_that_of_its_weights() -> None:
    def meta(weight: CanonicalWeight) -> CanonicalWeight:
        return CanonicalWeight(weight.scheme, weight.codes.to("meta"), weight.scales.to("meta"), None, None)

    w13, w2 = canonical(random_rows(INTER, HIDDEN, 2)), canonical(random_rows(HIDDEN, INTER, 1))
    assert build_info(meta(w13), meta(w2), SILU).device.type == "meta"
