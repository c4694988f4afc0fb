"""Formats that are known and not served are refused by their names, for experts and for other linear layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_experts
from quant_moelora.loaders.families import build_skeleton
from quant_moelora.loaders.linears import describe_linears
from tests.checkpoints import ENCODERS, layer_tensors, quantization_config, qwen3_config, random_layer, write_checkpoint

EXPERTS, HIDDEN, INTER = 2, 64, 64  # square, so that shapes tell nothing
PARENT = "model.layers.0.mlp.experts"
I32, I16, U8, F16, F32, F8 = (
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
)


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape).to(dtype)


# What a linear layer of 64 x 64 has in each format, by suffix; and the config where it tells.
LINEAR: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "FP8 in blocks (DeepSeek)": (
        {"weight": zeros(64, 64, dtype=F8), "weight_scale_inv": zeros(1, 1, dtype=F32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "FP8 with a scale for each block: weight_scale_inv",
    ),
    "FP8 (compressed-tensors)": (
        {"weight": zeros(64, 64, dtype=F8), "weight_scale": zeros(64, 1, dtype=F32)},
        {"quant_method": "compressed-tensors"},
        r"FP8: weight torch\.float8_e4m3fn \[64, 64\]",
    ),
    "NVFP4 (compressed-tensors)": (
        {
            "weight_packed": zeros(64, 32, dtype=U8),
            "weight_scale": zeros(64, 4, dtype=F8),
            "weight_global_scale": zeros(1, dtype=F32),
        },
        {"quant_method": "compressed-tensors"},
        "NVFP4: weight_global_scale",
    ),
    "NVFP4 (ModelOpt)": (
        {
            "weight": zeros(64, 32, dtype=U8),
            "weight_scale": zeros(64, 4, dtype=F8),
            "weight_scale_2": zeros(1, dtype=F32),
        },
        {"quant_method": "modelopt"},
        "NVFP4: weight_scale_2",
    ),
    "MXFP4 (compressed-tensors)": (
        {"weight_packed": zeros(64, 32, dtype=U8), "weight_scale": zeros(64, 2, dtype=U8)},
        {"quant_method": "compressed-tensors"},
        "MXFP4: weight_packed",
    ),
    "bitsandbytes 4-bit": (
        {
            "weight": zeros(2048, 1, dtype=U8),
            "weight.absmax": zeros(64, dtype=U8),
            "weight.quant_map": zeros(16, dtype=F32),
            "weight.quant_state.bitsandbytes__nf4": zeros(9, dtype=U8),
        },
        {"quant_method": "bitsandbytes"},
        "packed bytes, such as bitsandbytes 4-bit: weight torch.uint8",
    ),
    "bitsandbytes int8": (
        {"weight": zeros(64, 64, dtype=torch.int8), "SCB": zeros(64, dtype=F32), "weight_format": zeros(1, dtype=U8)},
        {"quant_method": "bitsandbytes"},
        "bitsandbytes int8: SCB",
    ),
    "AWQ GEMV_FAST": (
        {"qweight": zeros(16, 64, dtype=I16), "qzeros": zeros(8, 64, dtype=F16), "scales": zeros(8, 64, dtype=F16)},
        {"quant_method": "awq", "version": "gemv_fast"},
        "AWQ GEMV_FAST: qweight torch.int16",
    ),
    "llm-awq": (
        {
            "qweight": zeros(16, 64, dtype=I16),
            "scaled_zeros": zeros(8, 64, dtype=F16),
            "scales": zeros(8, 64, dtype=F16),
        },
        {},
        "llm-awq: scaled_zeros",
    ),
    "GGUF": (
        {"qweight": zeros(64, 36, dtype=U8), "qweight_type": zeros(1, dtype=U8)},
        {"quant_method": "gguf"},
        "GGUF: qweight_type",
    ),
    "Marlin": (
        {"B": zeros(4, 128, dtype=I32), "s": zeros(2, 64, dtype=F16), "workspace": zeros(8, dtype=I32)},
        {"quant_method": "marlin"},
        "Marlin: B torch.int32",
    ),
    "GPTQ Marlin 2:4": (
        {"B_24": zeros(2, 128, dtype=I32), "B_meta": zeros(8, 32, dtype=I16), "s": zeros(2, 64, dtype=F16)},
        {"quant_method": "gptq_marlin_24"},
        r"Marlin 2:4 \(marlin_24\): B_24",
    ),
    "compressed-tensors marlin-24": (
        {
            "weight_packed": zeros(2, 128, dtype=I32),
            "scale_packed": zeros(2, 64, dtype=F16),
            "meta": zeros(64, 4, dtype=I16),
        },
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        r"Marlin 2:4 \(marlin_24\): (scale_packed|meta)",
    ),
    "compressed-tensors sparse": (
        {"compressed": zeros(2048, dtype=F16), "bitmask": zeros(64, 8, dtype=U8)},
        {"quant_method": "compressed-tensors"},
        "sparse compressed-tensors: bitmask",
    ),
    "EXL2": (
        {"q_weight": zeros(8, 64, dtype=I32), "q_scale": zeros(2, 8, dtype=I32), "q_invperm": zeros(64, dtype=I16)},
        {"quant_method": "exl2"},
        "EXL2: q_",
    ),
    "EXL3": (
        {"trellis": zeros(4, 4, 64, dtype=I16), "suh": zeros(64, dtype=F16), "svh": zeros(64, dtype=F16)},
        {"quant_method": "exl3"},
        "EXL3: (trellis|suh|svh)",
    ),
    "HQQ": ({"W_q": zeros(32, 64, dtype=U8), "scale": zeros(1, 64, dtype=F16)}, {"quant_method": "hqq"}, "HQQ: W_q"),
    "AQLM": (
        {"codes": zeros(64, 8, 1, dtype=I16), "codebooks": zeros(1, 256, 1, 8, dtype=F16)},
        {"quant_method": "aqlm"},
        "AQLM: codebooks",
    ),
}


def at(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors."""
    return {f"{module}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()}


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_experts(tmp_path: Path, name: str, configured: bool) -> None:
    """The tensors tell, with the config that belongs to them and without one."""
    held, config, match = LINEAR[name]
    tensors: dict[str, Tensor] = {}
    for expert in range(EXPERTS):
        for projection in ("gate", "up", "down"):
            tensors |= at(f"{PARENT}.{expert}.{projection}_proj", held)
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config if configured else None)
    with pytest.raises(UnsupportedError, match=rf"format of {PARENT}\.0\.down_proj: got {match}.*not served"):
        load_experts(tmp_path, 0)


QUANTISED_ATTENTION = [name for name in LINEAR if name.startswith(("FP8", "NVFP4", "MXFP4", "bits", "AWQ", "llm"))]


@pytest.mark.parametrize("name", QUANTISED_ATTENTION)
def test_other_linear_layers(tmp_path: Path, name: str) -> None:
    held, config, match = LINEAR[name]
    module = "model.layers.0.self_attn.q_proj"
    write_checkpoint(tmp_path, at(module, held), qwen3_config(EXPERTS, HIDDEN, INTER), config)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"format of {module}: got {match}"):
        describe_linears(checkpoint, build_skeleton(checkpoint))


FUSED = {
    "MXFP4 of gpt-oss": (
        {
            "gate_up_proj_blocks": zeros(EXPERTS, 128, 2, 16, dtype=U8),
            "gate_up_proj_scales": zeros(EXPERTS, 128, 2, dtype=U8),
            "down_proj_blocks": zeros(EXPERTS, 64, 2, 16, dtype=U8),
            "down_proj_scales": zeros(EXPERTS, 64, 2, dtype=U8),
        },
        "MXFP4: down_proj_blocks",
    ),
    "FP8 in blocks": (
        {
            "gate_up_proj": zeros(EXPERTS, 128, 64, dtype=F8),
            "gate_up_proj_scale_inv": zeros(EXPERTS, 1, 1, dtype=F32),
            "down_proj": zeros(EXPERTS, 64, 64, dtype=F8),
            "down_proj_scale_inv": zeros(EXPERTS, 1, 1, dtype=F32),
        },
        "FP8 with a scale for each block: down_proj_scale_inv",
    ),
    "FP8": (
        {"gate_up_proj": zeros(EXPERTS, 128, 64, dtype=F8), "down_proj": zeros(EXPERTS, 64, 64, dtype=F8)},
        "FP8: down_proj",
    ),
    "NVFP4": (
        {
            "gate_up_proj_packed": zeros(EXPERTS, 128, 32, dtype=U8),
            "gate_up_proj_global_scale": zeros(EXPERTS, dtype=F32),
            "down_proj_packed": zeros(EXPERTS, 64, 32, dtype=U8),
            "down_proj_global_scale": zeros(EXPERTS, dtype=F32),
        },
        "NVFP4: down_proj_global_scale",
    ),
    "bitsandbytes experts": (
        {
            "gate_up_proj": zeros(EXPERTS, 4096, 1, dtype=U8),
            "down_proj": zeros(EXPERTS, 2048, 1, dtype=U8),
            "down_proj.absmax": zeros(EXPERTS, 32, dtype=F32),
        },
        "bitsandbytes 4-bit",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts(tmp_path: Path, name: str) -> None:
    held, match = FUSED[name]
    write_checkpoint(tmp_path, at(PARENT, held), qwen3_config(EXPERTS, HIDDEN, INTER))
    with pytest.raises(UnsupportedError, match=rf"format of .*experts.*: got {match}"):
        load_experts(tmp_path, 0)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """As OpenAI published it: with biases, and a config that names the method."""
    held = FUSED["MXFP4 of gpt-oss"][0] | {
        "gate_up_proj_bias": zeros(EXPERTS, 128, dtype=torch.bfloat16),
        "down_proj_bias": zeros(EXPERTS, 64, dtype=torch.bfloat16),
    }
    config = {
        **qwen3_config(EXPERTS, HIDDEN, INTER),
        "model_type": "gpt_oss",
        "num_local_experts": EXPERTS,
        "intermediate_size": INTER,
        "layer_types": ["full_attention"],
    }
    write_checkpoint(tmp_path, at(PARENT, held), config, {"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedError, match=r"format of .*experts.*: got MXFP4: gate_up_proj_blocks torch\.uint8"):
        load_experts(tmp_path, 0)


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_of_fewer_bits(tmp_path: Path, bits: int) -> None:
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    tensors = layer_tensors(layer, ENCODERS["gptq"])
    for key in [key for key in tensors if key.endswith(".qweight")]:
        tensors[key] = zeros(HIDDEN * bits // 32, INTER, dtype=I32)
    config = quantization_config("gptq", layer[0, "up"], bits=bits)
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    with pytest.raises(UnsupportedError, match=rf"bits of {PARENT}\.0\.down_proj: got {bits}, expected 4 or 8"):
        load_experts(tmp_path, 0)


@pytest.mark.parametrize(("file", "name"), [("model-Q4_K_M.gguf", "GGUF"), ("pytorch_model.bin", "PyTorch pickle")])
def test_other_files(tmp_path: Path, file: str, name: str) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(1)})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UnsupportedError, match=rf"got {name} \({file}\), expected model\.safetensors"):
        Checkpoint(tmp_path)
