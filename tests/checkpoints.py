"""Small synthetic checkpoints: random codes, their definition, and every format's bit layout written out.

Nothing here uses the library's own packing: the encoders are what the decoders are held to.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.loaders.checkpoint import TensorHeader
from quant_moelora.loaders.families import ExpertsSpec, Projection

PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
PROJ_NAMES: dict[Projection, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W_NAMES: dict[Projection, str] = {"gate": "w1", "up": "w3", "down": "w2"}  # Mixtral: w2 is down
V1_OFFSET = {4: 0x11111111, 8: 0x01010101}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Linear:
    """Random codes of a weight [N, K], and what they mean: w = (code - zero) * scale of the column's group."""

    bits: int
    group_size: int | None
    symmetric: bool
    codes: NDArray[np.int64]  # (N, K)
    zeros: NDArray[np.int64]  # (N, G)
    scales: Tensor  # (N, G) float16 or bfloat16
    g_idx: NDArray[np.int64]  # (K,)
    act_order: bool  # whether it was quantised so; g_idx may be in order by chance

    @property
    def weight(self) -> Tensor:
        """The definition in float64, which float32 holds exactly: 9 bits times 11 bits."""
        scales = self.scales.to(torch.float64).numpy()
        exact = (self.codes - self.zeros[:, self.g_idx]) * scales[:, self.g_idx]
        return torch.from_numpy(exact).to(torch.float32)


def random_linear(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    act_order: bool = False,
) -> Linear:
    """Codes over the whole range, scales of both signs, zero points that include 0."""
    size = group_size or k
    groups = -(-k // size)
    scales = rng.uniform(2.0**-9, 2.0**-3, (n, groups)) * rng.choice((-1.0, 1.0), (n, groups))
    zeros = np.full((n, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = rng.integers(0, 2**bits, (n, groups))
        zeros[rng.random((n, groups)) < 0.25] = 0
    plain = np.arange(k) // size
    return Linear(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        codes=rng.integers(0, 2**bits, (n, k)),
        zeros=zeros,
        scales=torch.from_numpy(scales).to(scale_dtype),
        g_idx=rng.permutation(plain) if act_order else plain,
        act_order=act_order,
    )


def pack(codes: NDArray[np.int64], bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words along ``axis``: place i of word c, from the lowest bits up, holds code ``order[i]`` of its run."""
    per_word = 32 // bits
    runs = np.moveaxis(codes, axis, -1)
    runs = np.pad(runs, (*[(0, 0)] * (runs.ndim - 1), (0, -runs.shape[-1] % per_word)))
    words = np.zeros((*runs.shape[:-1], runs.shape[-1] // per_word), dtype=np.uint64)
    for place in range(per_word):
        held = place if order is None else order[place]
        words |= runs[..., held::per_word].astype(np.uint64) << np.uint64(bits * place)
    return _int32(np.moveaxis(words, -1, axis))


def _int32(words: NDArray[np.uint64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words.astype(np.uint32)).view(np.int32))


Encoder = Callable[[Linear], dict[str, Tensor]]


def gptq_v2(linear: Linear) -> dict[str, Tensor]:
    """Everything [K or G, N]: codes along K, zero points along N, as they are."""
    return {
        "qweight": pack(linear.codes.T, linear.bits, 0),
        "qzeros": pack(linear.zeros.T, linear.bits, 1),
        "scales": linear.scales.T.contiguous(),
        "g_idx": torch.from_numpy(linear.g_idx.astype(np.int32)),
    }


def gptq_v1(linear: Linear) -> dict[str, Tensor]:
    """As v2, but each word of zero points less 1 for every code in it, as one 32-bit number."""
    tensors = gptq_v2(linear)
    whole = tensors["qzeros"].numpy().astype(np.int64) % 2**32
    tensors["qzeros"] = _int32(((whole - V1_OFFSET[linear.bits]) % 2**32).astype(np.uint64))
    return tensors


def awq(linear: Linear) -> dict[str, Tensor]:
    """GEMM: codes and zero points along N, interleaved within each word."""
    return {
        "qweight": pack(linear.codes.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(linear.zeros.T, 4, 1, AWQ_ORDER),
        "scales": linear.scales.T.contiguous(),
    }


def awq_gemv(linear: Linear) -> dict[str, Tensor]:
    """GEMV: codes along K, zero points along the groups, padded by whole words."""
    size = linear.group_size or linear.codes.shape[1]
    to_words = {32: 4, 64: 2}.get(size, 1)
    padding = (0, -linear.zeros.shape[1] % (8 * to_words))
    return {
        "qweight": pack(linear.codes, 4, 1),
        "qzeros": pack(np.pad(linear.zeros, ((0, 0), padding)), 4, 1),
        "scales": torch.nn.functional.pad(linear.scales, padding),
    }


def compressed_tensors(linear: Linear) -> dict[str, Tensor]:
    """Signed values offset by 2**(bits-1): codes along K, zero points along N; the last word of each may be short."""
    tensors = {
        "weight_packed": pack(linear.codes, linear.bits, 1),
        "weight_scale": linear.scales,
        "weight_shape": torch.tensor(linear.codes.shape),
    }
    if not linear.symmetric:
        tensors["weight_zero_point"] = pack(linear.zeros, linear.bits, 0)
    if linear.act_order:
        tensors["weight_g_idx"] = torch.from_numpy(linear.g_idx.astype(np.int32))
    return tensors


def int_quantized(linear: Linear) -> dict[str, Tensor]:
    """Signed int8 values, one each, and zero points alike."""
    tensors = {"weight": torch.from_numpy(linear.codes - 128).to(torch.int8), "weight_scale": linear.scales}
    if not linear.symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(linear.zeros - 128).to(torch.int8)
    return tensors


ENCODERS: dict[str, Encoder] = {
    "gptq": gptq_v1,
    "gptq_v2": gptq_v2,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "int-quantized": int_quantized,
}
BITS = {"awq": (4,), "int-quantized": (8,)}  # of formats that do not hold both 4 and 8
PLAIN_ORDER = ("awq", "int-quantized")  # formats without act-order


def quantization_config(fmt: str, linear: Linear, **changes: Any) -> dict[str, Any]:
    """The config that a tool writes beside tensors like those of ``linear``."""
    size = linear.group_size or -1
    if fmt == "awq":
        config: dict[str, Any] = {"bits": 4, "group_size": size, "version": "gemm", "zero_point": not linear.symmetric}
    elif fmt in ("compressed-tensors", "int-quantized"):
        config = ct_config(num_bits=linear.bits, group_size=linear.group_size, symmetric=linear.symmetric)
        return {**config, "format": fmt if fmt == "int-quantized" else "pack-quantized", **changes}
    else:
        config = {"bits": linear.bits, "group_size": size, "sym": linear.symmetric, "checkpoint_format": fmt}
    return {"quant_method": "gptq" if fmt.startswith("gptq") else fmt, **config, **changes}


def ct_config(
    targets: tuple[str, ...] = ("Linear",), ignore: tuple[str, ...] = ("lm_head",), **weights: Any
) -> dict[str, Any]:
    """A quantization_config of llm-compressor with one group."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "dynamic": False, **weights}
    weights["strategy"] = "channel" if weights["group_size"] is None else "group"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": list(targets), "weights": weights}},
        "ignore": list(ignore),
    }


Layer = dict[tuple[int, Projection], Linear]  # by expert and projection


def random_layer(rng: np.random.Generator, experts: int, hidden: int, inter: int, **kwargs: Any) -> Layer:
    """Gate, up and down of every expert; ``kwargs`` of `random_linear`."""
    shapes: dict[Projection, tuple[int, int]] = {
        "gate": (inter, hidden),
        "up": (inter, hidden),
        "down": (hidden, inter),
    }
    return {(e, p): random_linear(rng, *shapes[p], **kwargs) for e in range(experts) for p in PROJECTIONS}


def definition(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of all experts, float32 [E, N, K]."""
    experts = 1 + max(expert for expert, _ in layer)
    gate, up, down = (torch.stack([layer[e, p].weight for e in range(experts)]) for p in PROJECTIONS)
    return gate, up, down


def layer_tensors(
    layer: Layer,
    encode: Encoder,
    *,
    parent: str = "model.layers.0.mlp.experts",
    names: Mapping[Projection, str] = PROJ_NAMES,
) -> dict[str, Tensor]:
    """Checkpoint tensors of a layer's experts."""
    return {
        f"{parent}.{expert}.{names[projection]}.{suffix}": tensor
        for (expert, projection), linear in layer.items()
        for suffix, tensor in encode(linear).items()
    }


def headers_of(tensors: Mapping[str, Tensor], module: str = "model.layers.0.mlp.experts.0.up_proj") -> dict[str, Any]:
    """Headers by suffix, as a file with these tensors has them."""
    file = Path("model.safetensors")
    return {
        suffix: TensorHeader(f"{module}.{suffix}", tensor.dtype, tuple(tensor.shape), file)
        for suffix, tensor in tensors.items()
    }


def experts_spec(layer: Layer, number: int = 0) -> ExpertsSpec:
    """What transformers would say of a layer."""
    hidden, inter = layer[0, "down"].codes.shape
    experts = 1 + max(expert for expert, _ in layer)
    module = f"model.layers.{number}.mlp.experts"
    return ExpertsSpec(module, number, experts, hidden, inter, Activation("silu"))


@lru_cache(maxsize=1)
def skeleton() -> Any:
    """A model without data that has the names of `experts_spec`, whatever its dimensions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**qwen3_config(2, 64, 32)))


def qwen3_config(experts: int, hidden: int, inter: int, *, layers: int = 1, **changes: Any) -> dict[str, Any]:
    """config.json of a small Qwen3-MoE."""
    return {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "moe_intermediate_size": inter,
        "intermediate_size": 2 * inter,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2,
        "vocab_size": 64,
        **changes,
    }


def mixtral_config(experts: int, hidden: int, inter: int, *, layers: int = 1, **changes: Any) -> dict[str, Any]:
    """config.json of a small Mixtral."""
    return {
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        **changes,
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    *,
    shard: Callable[[str], int] | None = None,
) -> Path:
    """Write config.json and one file, or as many shards as ``shard`` numbers keys into, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = dict(config or {"model_type": "qwen3_moe"})
    if quantization:
        whole["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(whole))
    if shard is None:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {key: f"model-{shard(key):05d}.safetensors" for key in tensors}
    for file in set(weight_map.values()):
        save_file({key: tensor for key, tensor in tensors.items() if weight_map[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
