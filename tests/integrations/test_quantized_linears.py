"""Models whose routers, attention, shared experts and lm_head are quantised, against plain transformers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import ENCODERS, Linear, quantization_config, random_linear, write_checkpoint
from tests.integrations.models import EFFECT, HONEST, difference, load, logits
from tests.integrations.test_families import FAMILIES, IDS, SMALL

EXPERTS = 8  # int32 words hold 8 codes of int4
ROUTER = re.compile(r"\.(gate|router|router\.layer|router_weights)\.weight$")
LINEAR = re.compile(r"\.(self_attn|linear_attn|shared_experts?)\.\w+\.weight$|^lm_head\.weight$")
# What is quantised of each family's checkpoint, whose keys are its own and not the model's.
QUANTISED = {
    "qwen3_moe": {"mlp.gate", "q_proj", "lm_head"},
    "qwen2_moe": {"mlp.gate", "shared_expert.up_proj", "lm_head"},
    "mixtral": {"block_sparse_moe.gate", "o_proj"},
    "granitemoe": {"block_sparse_moe.router.layer", "v_proj"},
    "deepseek_v3": {"mlp.gate", "kv_b_proj", "shared_experts.down_proj"},
    "qwen3_5_moe_text": {"mlp.gate", "in_proj_qkv", "shared_expert.gate_proj"},
}


def family(model_type: str) -> Any:
    """A random model with 8 experts, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {name: EXPERTS for name, value in SMALL.items() if name.endswith("experts") and value == 4}
    config = AutoConfig.for_model(model_type, **SMALL | FAMILIES[model_type] | experts)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                tensor.normal_(std=0.1)
    return model.float().eval()


def quantise(tensors: dict[str, Tensor], fmt: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Linear]:
    """A checkpoint with its linear layers quantised, and the same with the weights that they mean."""
    rng = np.random.default_rng(0)
    packed, meant = dict(tensors), dict(tensors)
    linear: Linear | None = None
    for key, tensor in tensors.items():
        if not (ROUTER.search(key) or LINEAR.search(key)) or tensor.ndim != 2 or tensor.shape[0] % 8:
            continue
        linear = random_linear(rng, *tensor.shape, act_order=fmt == "gptq", symmetric=fmt == "gptq")
        # Scales of 2**-9 to 2**-3 and int4 codes give weights of some tenths; attention would saturate with them.
        linear = replace(linear, scales=linear.scales / 4)
        meant[key] = linear.weight
        module = key.removesuffix(".weight")
        del packed[key]
        packed |= {f"{module}.{suffix}": held for suffix, held in ENCODERS[fmt](linear).items()}
    assert linear is not None
    return packed, meant, linear


@pytest.mark.parametrize("model_type", QUANTISED)
@pytest.mark.parametrize("fmt", ["gptq", "awq"])
def test_logits_are_those_of_the_dequantised_model(tmp_path: Path, model_type: str, fmt: str) -> None:
    from transformers import AutoModelForCausalLM

    original = family(model_type)
    original.save_pretrained(tmp_path)
    packed, meant, linear = quantise(load_file(tmp_path / "model.safetensors"), fmt)
    for name in QUANTISED[model_type]:
        assert any(key.endswith(f"{name}.qweight") for key in packed), name
    save_file(meant, tmp_path / "model.safetensors", {"format": "pt"})
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = logits(plain, IDS)
    assert difference(expected, logits(original, IDS)) > EFFECT

    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(tmp_path, packed, config, quantization_config(fmt, linear))
    model = load(tmp_path)
    assert difference(logits(model, IDS), expected) < HONEST
    held = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, held[name]), name
