"""Cases of the MoE benchmark: shapes, random weights and routings, their least cost, and how right a result is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight

GROUP = 128
DTYPE = torch.bfloat16
# What one H200 was seen to sustain; the floors of all figures are counted with these, so that runs can be compared.
READ_TBPS, MATMUL_TFLOPS = 4.3, 790.0
CHECKED_TOKENS, CHECKED_EXPERTS = 256, 4  # float64 is slow: most tokens, and experts, whose rows are checked


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer of a model.

    Attributes:
        experts: E.
        top_k: k.
        hidden: H.
        inter: I.
    """

    experts: int
    top_k: int
    hidden: int
    inter: int

    def expert_bytes(self, bits: int) -> float:
        """Codes and 16-bit scales of one expert; without scales for 16 bits."""
        return 3 * self.hidden * self.inter * (bits / 8 + (2 / GROUP if bits < 16 else 0))


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Roofs:
    """Rates that bound a case: TB/s of reading, TFLOP/s of dense bfloat16."""

    read_tbps: float = READ_TBPS
    matmul_tflops: float = MATMUL_TFLOPS

    def floor_us(self, shape: Shape, bits: int, tokens: int, active: float) -> float:
        """Least time of both GEMMs: the weights of the active experts read once, or the multiplications."""
        flops = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.inter
        return max(active * shape.expert_bytes(bits) / self.read_tbps, flops / self.matmul_tflops) / 1e6


def random_weight(experts: int, halves: int, n: int, k: int, bits: int, device: str) -> PackedWeight:
    """A symmetric weight of random codes and random bfloat16 scales of both signs.

    The least code does not occur, as with tools that use a symmetric range of codes: a rival has a form for that.
    """
    rows, columns = halves * packing.padded_rows(n), packing.padded_columns(k, GROUP)
    qweight = torch.empty(packing.qweight_shape(experts, rows, columns, bits), dtype=torch.int32, device=device)
    if device != "meta":
        ones = sum(1 << low for low in range(0, packing.WORD_BITS, bits))
        for words in qweight.random_(-(2**31), 2**31 - 1).split(8):
            some = words.clone()
            for bit in range(1, bits):
                some |= words >> bit
            words |= ~some & ones  # codes 0 become 1
    scales = (torch.rand(experts, rows, columns // GROUP, device=device) * 0.028 + 1e-3) * 2.0 ** (4 - bits)
    signed = torch.where(torch.rand_like(scales) < 0.5, -scales, scales).to(DTYPE)
    return PackedWeight(
        num_experts=experts,
        halves=halves,
        n=n,
        n_pad=rows // halves,
        k=k,
        k_pad=columns,
        bias=None,
        scheme=QuantScheme(bits, GROUP, symmetric=True, scale_dtype=DTYPE),
        qweight=qweight,
        scales=packing.pack_pairs(signed),
        zeros=None,
        k_perm=None,
    )


def random_info(shape: Shape, bits: int, device: str) -> MoEQuantInfo:
    """A layer with random weights."""
    return MoEQuantInfo(
        w13=random_weight(shape.experts, 2, shape.inter, shape.hidden, bits, device),
        w2=random_weight(shape.experts, 1, shape.hidden, shape.inter, bits, device),
        activation=Activation("silu"),
    )


@dataclass(frozen=True, eq=False)
class Case:
    """Tokens and their routings.

    Attributes:
        x: activations of the tokens.
        routings: experts of each token; each routing is drawn anew.
        topk_weights: the router's weights, the same for all.
    """

    shape: Shape
    bits: int
    x: Tensor  # (M, H) bfloat16
    routings: tuple[Tensor, ...]  # of (M, k) int32
    topk_weights: Tensor  # (M, k) float32

    @property
    def tokens(self) -> int:
        """M."""
        return self.x.shape[0]

    @property
    def active(self) -> float:
        """Experts that have any token, on average."""
        return sum(ids.unique().numel() for ids in self.routings) / len(self.routings)

    def copies(self, bits: int, cache_bytes: int) -> int:
        """Copies of all weights that take turns, so that 8 times the cache is read before a weight comes again."""
        return max(1, math.ceil(8 * cache_bytes / (self.active * self.shape.expert_bytes(bits))))

    def launches(self, copies: int) -> list[tuple[int, Tensor]]:
        """Copy and routing of each launch of a graph: all of both, each copy equally often."""
        count = packing.round_up(len(self.routings), copies)
        return [(i % copies, self.routings[i % len(self.routings)]) for i in range(count)]


def random_case(shape: Shape, bits: int, tokens: int) -> Case:
    """Uniform routings without repeats, seeded by their number; more of them where a launch is short."""
    count = 16 if tokens <= 4 else 8 if tokens <= 256 else 4
    routings: list[Tensor] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
        routings.append(ids.to(torch.int32).cuda())
    x = torch.randn(tokens, shape.hidden, device="cuda").to(DTYPE)
    weights = torch.rand(tokens, shape.top_k, device="cuda").softmax(-1)
    return Case(shape, bits, x, tuple(routings), weights)


def relative_error(
    out: Tensor,  # (P, N)
    x: Tensor,  # (P, K)
    experts: Tensor,  # (P,) int
    weight: PackedWeight,
) -> float:
    """Relative Frobenius error of out = x W^T against float64, over the rows of a few experts."""
    error, size = 0.0, 0.0
    for expert in experts.unique()[:CHECKED_EXPERTS].tolist():
        rows = (experts == expert).nonzero().flatten()
        w = weight.dequantize(slice(expert, expert + 1))[0].flatten(0, 1).to(torch.float64)
        exact = x[rows].to(torch.float64) @ w.T
        error += float((out[rows].to(torch.float64) - exact).square().sum())
        size += float(exact.square().sum())
    return math.sqrt(error / size)
