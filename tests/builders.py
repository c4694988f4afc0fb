"""Random weights, layers, routings and adapters, with their meaning written out in float64 by plain indexing."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo, RouterWeight
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, PackedWeight

SILU = Activation("silu")


def scheme(bits: int = 4, group_size: int | None = 32, symmetric: bool = True, bf16: bool = False) -> QuantScheme:
    """A scheme with defaults."""
    return QuantScheme(bits, group_size, symmetric, torch.bfloat16 if bf16 else torch.float16)


@dataclass(frozen=True)
class BuiltDense:
    """An unquantised weight and its meaning."""

    weight: DenseWeight
    value: Tensor  # (E, halves, n, k) float64, columns in the order of x
    bias: Tensor  # (E, halves, n) float64, 0 without one


@dataclass(frozen=True)
class BuiltWeight:
    """A packed weight, its meaning and what went into it."""

    weight: PackedWeight
    value: Tensor  # (E, halves, n, k) float64, columns in the order of x
    bias: Tensor  # (E, halves, n) float64, 0 without one
    codes: Tensor  # (E, halves, n_pad, k_pad) uint8, as stored
    scales: Tensor  # (E, halves, n_pad, groups) scale dtype
    zeros: Tensor  # (E, halves, n_pad, groups) int16; the symmetric zero where there are none


def _dims(
    experts: int, halves: int, n: int, n_pad: int, k: int, k_pad: int, bias: bool
) -> tuple[dict[str, Any], Tensor]:
    """What any weight is made of besides its values, and its bias (E, halves, n) float64: random, or 0."""
    padded = torch.zeros(experts, halves, n_pad)
    if bias:
        padded[..., :n] = torch.randn(experts, halves, n)
    dims: dict[str, Any] = {"num_experts": experts, "halves": halves, "n": n, "n_pad": n_pad, "k": k, "k_pad": k_pad}
    return {**dims, "bias": padded.flatten(1) if bias else None}, padded[..., :n].double()


def packed(
    scheme: QuantScheme,
    *,
    experts: int = 2,
    halves: int = 1,
    n: int = 64,
    k: int = 64,
    n_pad: int | None = None,
    bias: bool = False,
    act_order: bool = False,
) -> BuiltWeight:
    """A random quantised weight whose rows have values of about 1 / sqrt(k); half of its scales are negative."""
    n_pad = n_pad or packing.padded_rows(n)
    k_pad = packing.padded_columns(k, scheme.group_size)
    group = scheme.group_size or k_pad
    groups, used = k_pad // group, -(-k // group)
    # The loader leaves code 0 in padded columns. It means -zero * scale in a short last group: nobody may read it.
    codes = torch.zeros(experts, halves, n_pad, k_pad, dtype=torch.uint8)
    codes[:, :, :n, :k] = torch.randint(0, 1 << scheme.bits, (experts, halves, n, k), dtype=torch.uint8)
    scales = torch.zeros(experts, halves, n_pad, groups, dtype=scheme.scale_dtype)
    size = (0.5 + torch.rand(experts, halves, n, used)) * 3.5 / ((1 << scheme.bits) * math.sqrt(k))
    scales[:, :, :n, :used] = (size * torch.sign(torch.randn_like(size))).to(scheme.scale_dtype)
    if scheme.symmetric:
        zeros = torch.full((experts, halves, n_pad, groups), {4: 8, 8: 128}[scheme.bits], dtype=torch.int16)
    else:
        zeros = torch.zeros(experts, halves, n_pad, groups, dtype=torch.int16)
        zeros[:, :, :n, :used] = torch.randint(0, 1 << scheme.bits, (experts, halves, n, used), dtype=torch.int16)
    k_perm = None
    if act_order:
        order = torch.stack([torch.randperm(k) for _ in range(experts * halves)]).view(experts, halves, k)
        k_perm = F.pad(order, (0, k_pad - k), value=-1).to(torch.int32)
    dims, biases = _dims(experts, halves, n, n_pad, k, k_pad, bias)
    weight = PackedWeight(
        **dims,
        scheme=scheme,
        qweight=packing.pack_codes(codes.flatten(1, 2), scheme.bits),
        scales=packing.pack_pairs(scales.flatten(1, 2)),
        zeros=None if scheme.symmetric else packing.pack_pairs(zeros.flatten(1, 2)),
        k_perm=k_perm,
    )
    of_column = torch.arange(k) // group
    stored = codes[:, :, :n, :k].double() - zeros[:, :, :n].double()[..., of_column]
    stored *= scales[:, :, :n].double()[..., of_column]
    value = stored.clone()
    if k_perm is not None:
        for expert in range(experts):
            for half in range(halves):
                value[expert, half][:, k_perm[expert, half, :k].long()] = stored[expert, half]
    return BuiltWeight(weight, value, biases, codes, scales, zeros)


def dense(
    dtype: torch.dtype = torch.float32,
    *,
    experts: int = 2,
    halves: int = 1,
    n: int = 64,
    k: int = 64,
    n_pad: int | None = None,
    k_pad: int | None = None,
    bias: bool = False,
) -> BuiltDense:
    """A random unquantised weight."""
    n_pad, k_pad = n_pad or n, k_pad or k
    w = torch.zeros(experts, halves, n_pad, k_pad, dtype=dtype)
    w[:, :, :n, :k] = (torch.randn(experts, halves, n, k) / math.sqrt(k)).to(dtype)
    dims, biases = _dims(experts, halves, n, n_pad, k, k_pad, bias)
    return BuiltDense(DenseWeight(**dims, w=w.flatten(1, 2)), w[:, :, :n, :k].double(), biases)


@dataclass(frozen=True)
class Layer:
    """An info and its meaning in float64, in the logical order of the intermediate."""

    info: MoEQuantInfo
    gate: Tensor | None  # (E, I, H)
    up: Tensor  # (E, I, H)
    down: Tensor  # (E, H, I)
    gate_bias: Tensor  # (E, I)
    up_bias: Tensor  # (E, I)
    down_bias: Tensor  # (E, H)


def layer(
    scheme: QuantScheme | torch.dtype,
    *,
    experts: int = 3,
    hidden: int = 64,
    inter: int = 64,
    activation: Activation = SILU,
    router_weight: RouterWeight = "output",
    act_order: bool = False,
    bias: bool = False,
) -> Layer:
    """A random layer, quantised by a scheme or (a dtype) not at all."""
    halves = activation.halves
    first: dict[str, Any] = {"experts": experts, "halves": halves, "n": inter, "k": hidden, "bias": bias}
    second: dict[str, Any] = {"experts": experts, "n": hidden, "k": inter, "bias": bias}
    if isinstance(scheme, QuantScheme):
        inter_pad = packing.padded_columns(inter, scheme.group_size)
        w13, w2 = packed(scheme, n_pad=inter_pad, act_order=act_order, **first), packed(scheme, **second)
    else:
        w13, w2 = dense(scheme, **first), dense(scheme, **second)
    inter_perm = torch.stack([torch.randperm(inter) for _ in range(experts)]).to(torch.int32) if act_order else None
    info = MoEQuantInfo(
        w13=w13.weight, w2=w2.weight, activation=activation, inter_perm=inter_perm, router_weight=router_weight
    )
    rows, columns, row_bias = w13.value, w2.value[:, 0], w13.bias
    if inter_perm is not None:
        rows, columns, row_bias = (torch.empty_like(t) for t in (rows, columns, row_bias))
        for expert in range(experts):
            logical = inter_perm[expert].long()  # of each stored position
            rows[expert][:, logical] = w13.value[expert]
            row_bias[expert][:, logical] = w13.bias[expert]
            columns[expert][:, logical] = w2.value[expert, 0]
    gate = rows[:, 0] if activation.gated else None
    return Layer(info, gate, rows[:, -1], columns, row_bias[:, 0], row_bias[:, -1], w2.bias[:, 0])


@dataclass(frozen=True)
class Lora:
    """delta W = scaling * b a of one projection of one expert."""

    a: Tensor  # (r, K)
    b: Tensor  # (N, r)
    scaling: float


Adapter = Mapping[tuple[int, str], Lora]  # (expert, "gate" | "up" | "down")


def adapter(
    info: MoEQuantInfo,
    dtype: torch.dtype,
    *,
    ranks: Mapping[str, int],
    scaling: float = 1.0,
    experts: Sequence[int] | None = None,
    shared: bool = False,
) -> dict[tuple[int, str], Lora]:
    """A random adapter whose deltas are about as large as the values they are added to.

    Args:
        info: the layer.
        dtype: the values are representable in it.
        ranks: rank of each projection that the adapter has.
        scaling: of gate; up has 1.5 times and down 0.5 times as much.
        experts: experts that it touches; None for all.
        shared: gate and up have one A.
    """
    hidden, inter = info.hidden_size, info.intermediate_size
    made: dict[tuple[int, str], Lora] = {}
    for expert in range(info.num_experts) if experts is None else experts:
        for name, rank in ranks.items():
            n, k = (hidden, inter) if name == "down" else (inter, hidden)
            a = (torch.randn(rank, k) / math.sqrt(k)).to(dtype)
            if shared and name == "up":
                a = made[expert, "gate"].a
            b = (torch.randn(n, rank) / math.sqrt(rank)).to(dtype)
            made[expert, name] = Lora(a, b, scaling * {"gate": 1.0, "up": 1.5, "down": 0.5}[name])
    return made


def context(
    info: MoEQuantInfo, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> MoELoRAContext:
    """The context of adapters, from the definition in MoELoRAContext; NaN stands between the arena's blocks."""
    slots, experts, pad = len(adapters), info.num_experts, info.inter_pad
    blocks: list[Tensor] = []
    offsets = torch.full((slots, 4, experts), -1, dtype=torch.int64)
    rank = torch.zeros(slots, 3, experts, dtype=torch.int32)
    up_col = torch.zeros(slots, experts, dtype=torch.int32)
    scaling = torch.zeros(slots, 3, experts)
    most = 1

    def add(slot: int, which: int, expert: int, parts: list[Tensor]) -> None:
        blocks.append(torch.full((8 + -sum(block.numel() for block in blocks) % 8,), torch.nan))
        offsets[slot, which, expert] = sum(block.numel() for block in blocks)
        blocks.append(torch.cat([part.float().flatten() for part in parts]))

    inter_perm = None if info.inter_perm is None else info.inter_perm.long().cpu()  # beside the factors

    def stored(expert: int, b: Tensor) -> Tensor:  # (I, r) -> (inter_pad, r)
        rows = torch.zeros(pad, b.shape[1])
        rows[: info.intermediate_size] = b if inter_perm is None else b[inter_perm[expert]]
        return rows

    for slot, held in enumerate(adapters):
        for expert in range(experts):
            gate, up, down = (held.get((expert, name)) for name in ("gate", "up", "down"))
            for projection, lora in enumerate((gate, up, down)):
                if lora is not None:
                    rank[slot, projection, expert] = lora.a.shape[0]
                    most = max(most, lora.a.shape[0])
                    scaling[slot, projection, expert] = lora.scaling
            first = [lora for lora in (gate, up) if lora is not None]
            if first:
                a = [first[0].a] if len(first) == 2 and first[0].a is first[1].a else [lora.a for lora in first]
                up_col[slot, expert] = first[0].a.shape[0] if len(a) == 2 else 0
                add(slot, 0, expert, a)
                add(slot, 1, expert, [stored(expert, lora.b).T for lora in first])
            if down is not None:
                add(slot, 2, expert, [stored(expert, down.a.T).T])
                add(slot, 3, expert, [down.b.T])
    return MoELoRAContext(
        num_experts=experts,
        hidden_size=info.hidden_size,
        inter_pad=pad,
        arena=torch.cat([*blocks, torch.full((8,), torch.nan)]).to(dtype).to(device),
        offsets=offsets.to(device),
        rank=rank.to(device),
        up_col=up_col.to(device),
        scaling=scaling.to(device),
        max_rank=most,
    )


def routing(tokens: int, top_k: int, experts: int, *, slots: Tensor | None = None, holes: bool = True) -> Routing:
    """A random routing; with holes, some pairs have no expert, by ids below and above the range."""
    ids = torch.randint(0, experts, (tokens, top_k))
    if holes:
        missing = torch.tensor([-1, experts, -7, experts + 1000])[torch.randint(0, 4, (tokens, top_k))]
        ids = torch.where(torch.rand(tokens, top_k) < 0.2, missing, ids)
    return Routing(ids.to(torch.int32), torch.rand(tokens, top_k) + 0.25, slots)


def move(routing: Routing, device: torch.device) -> Routing:
    """The same routing on a device."""
    slots = None if routing.slots is None else routing.slots.to(device)
    return replace(
        routing, topk_ids=routing.topk_ids.to(device), topk_weights=routing.topk_weights.to(device), slots=slots
    )


def activate(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """The activation, in the dtype of its operands (float64)."""
    x = up if gate is None else gate
    if activation.name == "swigluoai":
        assert gate is not None and activation.alpha is not None and activation.limit is not None
        g = torch.where(gate > activation.limit, activation.limit, gate)
        u = torch.where(up.abs() > activation.limit, activation.limit * torch.sign(up), up)
        return g / (1 + torch.exp(-activation.alpha * g)) * (u + 1)
    if activation.name == "silu":
        value = x / (1 + torch.exp(-x))
    elif activation.name == "gelu":
        value = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    elif activation.name == "gelu_tanh":
        value = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        value = torch.where(x > 0, x * x, torch.zeros_like(x))
    return value if gate is None else value * up


def expected(
    built: Layer,
    x: Tensor,  # (M, H)
    routing: Routing,
    adapters: Sequence[Adapter] = (),
    weights: Tensor | None = None,  # (M, k) in place of the routing's, for gradients
) -> tuple[Tensor, Tensor]:
    """The layer's output in float64, pair by pair, and the size of what is summed up in each of its elements.

    The size is the root of the sum of squares of all products with w2: what independent roundings of the
    intermediate are multiplied with.
    """
    rows, weights = x.double(), routing.topk_weights if weights is None else weights
    slots = [-1] * routing.num_tokens if routing.slots is None else routing.slots.tolist()
    outs: list[Tensor] = []
    squares: list[Tensor] = []
    for token in range(routing.num_tokens):
        total = torch.zeros(built.info.hidden_size, dtype=torch.float64)
        square = torch.zeros(built.info.hidden_size, dtype=torch.float64)
        held: Adapter = adapters[slots[token]] if slots[token] >= 0 else {}
        for j, expert in enumerate(routing.topk_ids[token].tolist()):
            if not 0 <= expert < built.info.num_experts:
                continue
            row, w = rows[token], weights[token, j].double()
            gate = None
            if built.gate is not None:
                gate = built.gate[expert] @ row + built.gate_bias[expert] + delta(held.get((expert, "gate")), row)
            up = built.up[expert] @ row + built.up_bias[expert] + delta(held.get((expert, "up")), row)
            if built.info.router_weight == "input":
                gate, up, w = None if gate is None else gate * w, up * w, torch.ones_like(w)
            h = activate(built.info.activation, gate, up)
            products = built.down[expert] * h
            y = products.sum(1) + built.down_bias[expert] + delta(held.get((expert, "down")), h)
            total = total + w * y
            square = square + (w * w * (products.square().sum(1) + y * y)).detach()
        outs.append(total)
        squares.append(square)
    if not outs:
        return rows, rows
    return torch.stack(outs), torch.stack(squares).sqrt()


def delta(lora: Lora | None, row: Tensor) -> Tensor:
    """scaling * b (a row) in float64, or 0."""
    if lora is None:
        return torch.zeros((), dtype=torch.float64)
    return lora.scaling * (lora.b.double() @ (lora.a.double() @ row))


@contextmanager
def threads(count: int) -> Generator[None]:
    """Let torch use this many threads. At the shapes of tests several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to dtype."""
    return torch.finfo(dtype).eps / 2


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a).cpu(), bits_of(b).cpu())
