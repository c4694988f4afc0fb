"""Cases of the MoE benchmark: shapes, random weights and routings, their least cost, and how right a result is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, PackedWeight
from quant_moelora.kernels.common import sample
from quant_moelora.kernels.common.sample import active_experts, blank_info, random_routings, random_weight

GROUP = 128
DTYPE = torch.bfloat16
DENSE_BITS = 16  # the width that stands for weights that are not quantised
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
        return 3 * self.hidden * self.inter * (bits / 8 + (2 / GROUP if bits < DENSE_BITS else 0))


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


def random_info(shape: Shape, bits: int, device: str) -> MoEQuantInfo:
    """A layer with random weights, symmetric ones if quantised; without data on the meta device."""
    if bits == DENSE_BITS:
        w13 = _dense_weight(shape.experts, 2, shape.inter, shape.hidden, device)
        return MoEQuantInfo(w13, _dense_weight(shape.experts, 1, shape.hidden, shape.inter, device), Activation("silu"))
    info = blank_info(shape.experts, shape.hidden, shape.inter, QuantScheme(bits, GROUP, True, DTYPE))
    if device == "meta":
        return info
    w13, w2 = (random_weight(weight, device) for weight in (info.w13, info.w2) if isinstance(weight, PackedWeight))
    return replace(info, w13=w13, w2=w2)


def _dense_weight(experts: int, halves: int, n: int, k: int, device: str) -> DenseWeight:
    w = torch.empty(experts, halves * n, k, dtype=DTYPE, device=device)
    if not w.is_meta:
        w.normal_(std=k**-0.5)
    return DenseWeight(num_experts=experts, halves=halves, n=n, n_pad=n, k=k, k_pad=k, bias=None, w=w)


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
        return active_experts(self.routings)

    def copies(self, bits: int, cache_bytes: int) -> int:
        """Copies of all weights that take turns, so that 8 times the cache is read before a weight comes again."""
        return sample.copies(self.active * self.shape.expert_bytes(bits), cache_bytes)

    def launches(self, copies: int) -> list[tuple[int, Tensor]]:
        """Copy and routing of each launch of a graph: all of both, each copy equally often."""
        return sample.launches(self.routings, copies)


def random_case(shape: Shape, bits: int, tokens: int) -> Case:
    """Random tokens and routings."""
    routings = random_routings(shape.experts, shape.top_k, tokens, "cuda")
    x = torch.randn(tokens, shape.hidden, device="cuda").to(DTYPE)
    weights = torch.rand(tokens, shape.top_k, device="cuda").softmax(-1)
    return Case(shape, bits, x, tuple(routings), weights)


def relative_error(
    out: Tensor,  # (P, N)
    x: Tensor,  # (P, K)
    experts: Tensor,  # (P,) int
    weight: PackedWeight | DenseWeight,
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
