"""Random layers and routings to measure with, and how often weights have to change to come from memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.lora_context import NO_FACTOR, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme, num_groups
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.dequant.prepare import PreparedWeight, prepare

T = TypeVar("T")
_TIMES_CACHE = 8  # what is read before a weight comes again


def blank_weight(num_experts: int, halves: int, n: int, k: int, n_pad: int, scheme: QuantScheme) -> PackedWeight:
    """A packed weight on the meta device."""
    k_pad = packing.padded_columns(k, scheme.group_size)
    groups = num_groups(k_pad, scheme.group_size)
    pairs = torch.empty(packing.pairs_shape(num_experts, halves * n_pad, groups), dtype=torch.int32, device="meta")
    codes = packing.qweight_shape(num_experts, halves * n_pad, k_pad, scheme.bits)
    return PackedWeight(
        num_experts=num_experts,
        halves=halves,
        n=n,
        n_pad=n_pad,
        k=k,
        k_pad=k_pad,
        bias=None,
        scheme=scheme,
        qweight=torch.empty(codes, dtype=torch.int32, device="meta"),
        scales=pairs,
        zeros=None if scheme.symmetric else pairs,
        k_perm=None,
    )


def blank_info(num_experts: int, hidden: int, inter: int, scheme: QuantScheme) -> MoEQuantInfo:
    """A gated layer with silu on the meta device."""
    inter_pad = packing.padded_columns(inter, scheme.group_size)
    return MoEQuantInfo(
        w13=blank_weight(num_experts, 2, inter, hidden, inter_pad, scheme),
        w2=blank_weight(num_experts, 1, hidden, inter, packing.padded_rows(hidden), scheme),
        activation=Activation("silu"),
    )


def random_weight(blank: PackedWeight, device: torch.device | str) -> PackedWeight:
    """The weight with random codes, zero points and scales of both signs, without bias and without a column order.

    The least code does not occur, as with tools that use a symmetric range of codes: some kernels have a form for that.
    """
    scheme, bits = blank.scheme, blank.scheme.bits
    qweight = torch.empty(blank.qweight.shape, dtype=torch.int32, device=device)
    ones = sum(1 << low for low in range(0, packing.WORD_BITS, bits))
    for words in qweight.random_(-(2**31), 2**31 - 1).split(8):
        some = words.clone()
        for bit in range(1, bits):
            some |= words >> bit
        words |= ~some & ones  # codes 0 become 1
    shape = (blank.num_experts, blank.rows, blank.k_pad // blank.group)
    scales = (torch.rand(shape, device=device) * 0.028 + 1e-3) * 2.0 ** (4 - bits)
    signed = torch.where(torch.rand_like(scales) < 0.5, -scales, scales).to(scheme.scale_dtype)
    zeros = None
    if blank.zeros is not None:
        zeros = packing.pack_pairs(torch.randint(0, 2**bits + 1, shape, dtype=torch.int16, device=device))
    return replace(blank, qweight=qweight, scales=packing.pack_pairs(signed), zeros=zeros, bias=None, k_perm=None)


def blank_prepared(weight: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """`prepare` of random values, on the meta device."""

    def all_experts(tensor: Tensor | None) -> Tensor | None:  # (1, ..) of any dtype -> (E, ..) without data
        """The same of as many experts as the weight has."""
        if tensor is None:
            return None
        return torch.empty(weight.num_experts, *tensor.shape[1:], dtype=tensor.dtype, device="meta")

    n_pad, scheme = weight.rows // weight.halves, weight.scheme
    one, _ = prepare(random_weight(blank_weight(1, weight.halves, weight.n, weight.k, n_pad, scheme), "cpu"), dtype)
    held = {name: all_experts(getattr(one, name)) for name in ("scales", "zeros", "post")}
    return one._replace(qweight=weight.qweight, num_experts=weight.num_experts, **held)


def random_adapters(
    info: MoEQuantInfo, dtype: torch.dtype, adapters: int, rank: int, slots: int, device: torch.device | str
) -> MoELoRAContext:
    """One layer's adapters of one rank on gate, up and down of every expert, random, in the first slots.

    Without data on the meta device.

    Args:
        info: the layer, which may be on the meta device.
        dtype: of the activations.
        adapters: how many.
        rank: of each projection.
        slots: of the context, at least as many as adapters.
        device: of the context.
    """
    hidden, inter, experts = info.hidden_size, info.inter_pad, info.num_experts
    sizes = torch.tensor([2 * rank * hidden, 2 * rank * inter, rank * inter, rank * hidden])
    ends = sizes.repeat(adapters * experts).cumsum(0).view(adapters, experts, 4)
    arena = torch.empty(int(ends[-1, -1, -1]), dtype=dtype, device=device)
    if arena.device.type != "meta":
        arena.normal_(std=0.02)
    offsets = torch.full((slots, 4, experts), NO_FACTOR, dtype=torch.int64)
    offsets[:adapters] = (ends - sizes).transpose(1, 2)
    ranks = torch.where(torch.arange(slots) < adapters, rank, 0).to(dtype=torch.int32, device=device)
    return MoELoRAContext(
        num_experts=experts,
        hidden_size=hidden,
        inter_pad=inter,
        arena=arena,
        offsets=offsets.to(device),
        rank=ranks[:, None, None].expand(-1, 3, experts).contiguous(),
        up_col=ranks[:, None].expand(-1, experts).contiguous(),
        scaling=torch.full((slots, 3, experts), 2.0, device=device),
        max_rank=rank,
    )


def random_slots(adapters: int, tokens: int, count: int, device: torch.device | str) -> list[Tensor]:  # of (M,) int32
    """A random adapter for each token, so many times."""
    generator = torch.Generator().manual_seed(1)
    draw = (torch.randint(0, adapters, (tokens,), generator=generator) for _ in range(count))
    return [slots.to(torch.int32).to(device) for slots in draw]


def random_routings(num_experts: int, top_k: int, tokens: int, device: torch.device | str) -> list[Tensor]:
    """Uniform routings int32 (M, k) without repeats, seeded by their number; more of them where a launch is short."""
    count = 16 if tokens <= 4 else 8 if tokens <= 256 else 4
    routings: list[Tensor] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        routings.append(ids.to(torch.int32).to(device))
    return routings


def active_experts(routings: Sequence[Tensor]) -> float:
    """Experts that have any token, on average."""
    return sum(ids.unique().numel() for ids in routings) / len(routings)


def copies(bytes_read: float, cache_bytes: int) -> int:
    """Copies of weights that take turns, if a launch reads so much of one, so that no weight is still in the cache."""
    return max(1, math.ceil(_TIMES_CACHE * cache_bytes / bytes_read))


def launches(routings: Sequence[T], copies: int) -> list[tuple[int, T]]:
    """Copy and routing of each launch of a graph: all of both, each copy equally often."""
    count = packing.round_up(len(routings), copies)
    return [(i % copies, routings[i % len(routings)]) for i in range(count)]
