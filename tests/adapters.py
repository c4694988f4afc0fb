"""Synthetic adapters: files as PEFT writes them, and layers small enough to write their deltas out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight
from quant_moelora.loaders.families import ExpertsSpec, Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
Tensors = dict[str, Tensor]


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write an adapter folder; keys are given without PEFT's prefix.

    r = 4 and alpha = 8 unless ``config`` differs; what is None there is left out of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2"}
    held |= {"r": 4, "lora_alpha": 8, "target_modules": [], **config}
    held = {name: value for name, value in held.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(held), encoding="utf-8")
    save_file({PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def linear_lora(module: str, n: int, k: int, rank: int = 4, seed: int = 0) -> Tensors:
    """LoRA on one linear layer; B A x is about as large as x."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, k, generator=generator) / math.sqrt(k),
        f"{module}.lora_B.weight": torch.randn(n, rank, generator=generator) / math.sqrt(rank),
    }


def attention_lora(linears: Mapping[str, tuple[int, int]], layers: Iterable[int] = (0, 1), seed: int = 1) -> Tensors:
    """LoRA on the linears of attention, given as [N, K] by name, scaled to change a model's logits by some per cent."""
    tensors: Tensors = {}
    for layer in layers:
        for name, (n, k) in linears.items():
            tensors |= linear_lora(f"model.layers.{layer}.self_attn.{name}", n, k, seed=seed + 97 * len(tensors))
    return {key: tensor * 0.3 if ".lora_B." in key else tensor for key, tensor in tensors.items()}


@dataclass(frozen=True)
class Dims:
    """Experts of a model's layers, and how the model calls the block around them."""

    experts: int
    hidden: int
    inter: int
    layers: tuple[int, ...] = (0, 1)
    block: str = "mlp"

    def shape(self, projection: str) -> tuple[int, int]:
        """[N, K] of a projection or a fused parameter."""
        rows = {"gate_up": 2 * self.inter, "down": self.hidden}.get(projection, self.inter)
        return rows, self.inter if projection == "down" else self.hidden

    def specs(self) -> list[ExpertsSpec]:
        """What the library would find in such a model."""
        return [
            ExpertsSpec(
                f"model.layers.{n}.{self.block}.experts", n, self.experts, self.hidden, self.inter, Activation("silu")
            )
            for n in self.layers
        ]


def expert_lora(
    dims: Dims,
    names: Mapping[str, str],
    *,
    experts: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    rank: int = 4,
    seed: int = 2,
) -> Tensors:
    """LoRA on per-expert modules; ``names`` spells the projections: {"gate": "gate_proj"} or {"gate": "w1"}."""
    tensors: Tensors = {}
    for layer in dims.layers if layers is None else layers:
        for expert in range(dims.experts) if experts is None else experts:
            for projection, name in names.items():
                module = f"model.layers.{layer}.{dims.block}.experts.{expert}.{name}"
                tensors |= linear_lora(module, *dims.shape(projection), rank, seed + 89 * len(tensors))
    return tensors


def fused_lora(
    dims: Dims, parameters: Sequence[str] = ("gate_up", "down"), *, rank: int = 4, swapped: bool = False, seed: int = 3
) -> Tensors:
    """LoRA on fused parameters: A [E*r, K], B [N, r*E]; with ``swapped``, N and K change places."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for layer in dims.layers:
        for i, parameter in enumerate(parameters):
            n, k = reversed(dims.shape(parameter)) if swapped else dims.shape(parameter)
            inner = ".base_layer" if i + 1 < len(parameters) else ""
            module = f"model.layers.{layer}.{dims.block}.experts{inner}"
            folded = dims.experts * rank
            tensors[f"{module}.lora_A.weight"] = torch.randn(folded, k, generator=generator) / math.sqrt(k)
            tensors[f"{module}.lora_B.weight"] = torch.randn(n, folded, generator=generator) / math.sqrt(rank)
    return tensors


def random_factors(
    info: MoEQuantInfo,
    ranks: Mapping[Projection, int],
    *,
    experts: Iterable[int] | None = None,
    shared: bool = False,
    seed: int = 0,
) -> LayerFactors:
    """Factors in one layer, of other scalings for each; ``shared``: gate and up have one A, as in a fused file."""
    generator = torch.Generator().manual_seed(seed)
    factors: LayerFactors = {}
    for expert in range(info.num_experts) if experts is None else experts:
        for projection, rank in ranks.items():
            n, k = info.intermediate_size, info.hidden_size
            n, k = (k, n) if projection == "down" else (n, k)
            a = torch.randn(rank, k, generator=generator) / math.sqrt(k)
            if shared and projection == "up":
                a = factors[expert, "gate"].a
            b = torch.randn(n, rank, generator=generator) / math.sqrt(rank)
            factors[expert, projection] = Factor(a, b, 0.25 * (1 + len(factors) % 7))
    return factors


def dense_info(
    experts: int = 3,
    hidden: int = 16,
    inter: int = 12,
    inter_pad: int = 20,
    *,
    permuted: bool = True,
    device: torch.device | str = "cpu",
) -> MoEQuantInfo:
    """An unquantised layer whose stored intermediate is padded and, with ``permuted``, in another order per expert."""
    generator = torch.Generator().manual_seed(4)

    def weight(halves: int, n: int, n_pad: int, k: int, k_pad: int) -> DenseWeight:
        w = torch.zeros(experts, halves, n_pad, k_pad)
        w[:, :, :n, :k] = torch.randn(experts, halves, n, k, generator=generator) / math.sqrt(k)
        return DenseWeight(experts, halves, n, n_pad, k, k_pad, None, w.flatten(1, 2))

    perm = torch.stack([torch.randperm(inter, generator=generator) for _ in range(experts)]).to(torch.int32)
    info = MoEQuantInfo(
        w13=weight(2, inter, inter_pad, hidden, hidden),
        w2=weight(1, hidden, hidden, inter, inter_pad),
        activation=Activation("silu"),
        inter_perm=perm if permuted else None,
    )
    return info.to(device)
