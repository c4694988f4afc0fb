"""A random checkpoint in GPTQ int4, symmetric, group 128, of a Qwen3-MoE of any size: as fast as the disk takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 128
STD = 0.02  # of weights, so that activations and logits stay finite in bfloat16
_CODES_STD = math.sqrt((16**2 - 1) / 12)  # of uniform codes of 4 bits
_NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Size:
    """Dimensions of a model; the defaults are those of Qwen3-30B-A3B."""

    layers: int = 48
    hidden: int = 2048
    inter: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.inter,
            "intermediate_size": 8 * self.inter,
            "num_hidden_layers": self.layers,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": GROUP,
                "sym": True,
                "desc_act": False,
                "checkpoint_format": "gptq",
            },
        }


def write_checkpoint(folder: Path, size: Size, device: torch.device, threads: int = 4) -> int:
    """Write config.json and one file a layer into a folder; bytes in all."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(size.config()), encoding="utf-8")
    names = [f"layer-{layer}.safetensors" for layer in range(size.layers)]

    def write(layer: int) -> int:
        return _write(folder / names[layer], _layer(layer, size, device))

    with ThreadPoolExecutor(threads) as pool:  # drawing and writing both leave the interpreter alone
        written = sum(pool.map(write, range(size.layers)))
    written += _write(folder / "rest.safetensors", _rest(size, device))
    index = {name: file for file in (*names, "rest.safetensors") for name in _header(folder / file)}
    text = json.dumps({"metadata": {"total_size": written}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return written


def _layer(layer: int, size: Size, device: torch.device) -> Iterable[tuple[list[str], Tensor]]:
    """Names of equal tensors, and all of them along the first dimension."""
    block = f"model.layers.{layer}"
    hidden, inter, width = size.hidden, size.inter, size.heads * size.head_dim
    for projection, n, k in (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)):
        names = [f"{block}.mlp.experts.{expert}.{projection}_proj" for expert in range(size.experts)]
        e, groups = size.experts, k // GROUP
        scales = (torch.rand(e, groups, n, device=device) + 0.5) * (STD / _CODES_STD)
        zeros = torch.full((e, groups, n // 8), 0x77777777, dtype=torch.int32)  # 8, stored minus one
        g_idx = (torch.arange(k, dtype=torch.int32) // GROUP).expand(e, k).contiguous()
        words = torch.randint(-(2**31), 2**31, (e, k // 8, n), dtype=torch.int32, device=device)
        for suffix, held in (("qweight", words), ("qzeros", zeros), ("scales", scales.half()), ("g_idx", g_idx)):
            yield [f"{name}.{suffix}" for name in names], held
    kv = size.kv_heads * size.head_dim
    for name, n, k in (("q", width, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, width)):
        yield [f"{block}.self_attn.{name}_proj.weight"], _normal(n, k, device)
    yield [f"{block}.mlp.gate.weight"], _normal(size.experts, hidden, device)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield [f"{block}.{name}.weight"], torch.ones(1, hidden, dtype=torch.bfloat16)
    for name in ("q_norm", "k_norm"):
        yield [f"{block}.self_attn.{name}.weight"], torch.ones(1, size.head_dim, dtype=torch.bfloat16)


def _rest(size: Size, device: torch.device) -> Iterable[tuple[list[str], Tensor]]:
    yield ["model.embed_tokens.weight"], _normal(size.vocab, size.hidden, device)
    yield ["lm_head.weight"], _normal(size.vocab, size.hidden, device)
    yield ["model.norm.weight"], torch.ones(1, size.hidden, dtype=torch.bfloat16)


def _normal(n: int, k: int, device: torch.device) -> Tensor:  # (1, n, k)
    return (torch.randn(n, k, device=device) * STD).bfloat16()[None]


def _write(path: Path, tensors: Iterable[tuple[list[str], Tensor]]) -> int:
    """A safetensors file; its header says where each tensor stands behind it. Bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks: list[Tensor] = []
    begin = 0
    for names, held in tensors:
        step = held.nbytes // len(names)
        for name in names:
            shape = list(held.shape[1:])
            header[name] = {"dtype": _NAMES[held.dtype], "shape": shape, "data_offsets": [begin, begin + step]}
            begin += step
        blocks.append(held.cpu().contiguous())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            rest = memoryview(block.view(torch.uint8).numpy()).cast("B")
            while rest:  # one call writes 2 GiB at most
                rest = rest[file.write(rest) :]
    return begin


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        names: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names.pop("__metadata__")
    return names
