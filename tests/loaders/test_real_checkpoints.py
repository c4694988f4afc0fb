"""What real checkpoints have besides plain tensors: odd packings, configs and names, and damage in every format."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import build_skeleton
from quant_moelora.loaders.layer_format import describe_layers
from quant_moelora.loaders.linears import dequantize_linear, describe_linears
from tests.checkpoints import (
    BITS,
    ENCODERS,
    PLAIN_ORDER,
    Encoder,
    Layer,
    Linear,
    awq,
    awq_gemv,
    compressed_tensors,
    ct_config,
    definition,
    experts_spec,
    gptq_v1,
    gptq_v2,
    int_quantized,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    skeleton,
    write_checkpoint,
)

EXPERTS, HIDDEN, INTER = 3, 64, 96
PARENT = "model.layers.0.mlp.experts"
Tensors = dict[str, Tensor]


def load(folder: Path, layer: Layer) -> MoEQuantInfo:
    """Layer 0, without building the model."""
    checkpoint = Checkpoint(folder)
    return load_layer(checkpoint, describe_layers(checkpoint, [experts_spec(layer)], skeleton())[0], "cpu")


def check(info: MoEQuantInfo, layer: Layer) -> None:
    for got, expected in zip(info.dequantize(), definition(layer), strict=True):
        assert got is not None
        assert torch.equal(got, expected)


def some_layer(**kwargs: Any) -> Layer:
    return random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER, **kwargs)


def without_g_idx(encode: Encoder) -> Encoder:
    return lambda linear: {suffix: tensor for suffix, tensor in encode(linear).items() if "g_idx" not in suffix}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("packing", "encode"),
    [
        ("auto_round:auto_gptq", gptq_v1),  # zero points less one
        ("auto_round", gptq_v2),
        ("auto_round:gptqmodel", gptq_v2),
        ("auto_round:auto_awq", awq),
        ("auto_round:llm_compressor", compressed_tensors),
    ],
)
def test_auto_round(tmp_path: Path, packing: str, encode: Encoder, symmetric: bool) -> None:
    """Every packing, beside attention that extra_config leaves in 16 bits and one projection of other groups."""
    layer = some_layer(symmetric=symmetric, group_size=64)
    for expert in range(EXPERTS):
        layer[expert, "down"] = some_layer(symmetric=symmetric, group_size=32)[expert, "down"]
    tensors = layer_tensors(layer, without_g_idx(encode))
    tensors |= {f"model.layers.0.self_attn.{p}_proj.weight": torch.ones(64, 64).half() for p in "qkvo"}
    extra = {
        "model.layers.0.self_attn.q_proj": {"bits": 16, "data_type": "float"},
        r".*self_attn\.[kvo]_proj": {"bits": 16, "data_type": "float"},
        r".*mlp\.experts\.\d+\.down_proj": {"group_size": 32},
    }
    config = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 64, "sym": symmetric}
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config | {"extra_config": extra})
    check(load(tmp_path, layer), layer)
    checkpoint = Checkpoint(tmp_path)
    assert not describe_linears(checkpoint, build_skeleton(checkpoint))


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_gemv(tmp_path: Path, symmetric: bool) -> None:
    layer = some_layer(symmetric=symmetric)
    config = quantization_config("awq", layer[0, "up"], version="gemv")
    write_checkpoint(tmp_path, layer_tensors(layer, awq_gemv), quantization=config)
    check(load(tmp_path, layer), layer)


def per_tensor(linear: Linear) -> Linear:
    """The same codes with one scale and one zero point for all of them."""
    n = linear.codes.shape[0]
    return replace(linear, scales=linear.scales[:1].repeat(n, 1), zeros=linear.zeros[:1].repeat(n, axis=0))


def scalar_scales(shape: tuple[int, ...]) -> Encoder:
    """int8 with the strategy "tensor": each expert has one scale, held in ``shape``."""

    def encode(linear: Linear) -> Tensors:
        return {s: t if s == "weight" else t[0].reshape(shape) for s, t in int_quantized(linear).items()}

    return encode


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_int8_scale_an_expert(tmp_path: Path, shape: tuple[int, ...], symmetric: bool) -> None:
    layer = {key: per_tensor(held) for key, held in some_layer(bits=8, group_size=None, symmetric=symmetric).items()}
    config = ct_config()
    config["config_groups"]["group_0"]["weights"] = {"num_bits": 8, "symmetric": symmetric, "strategy": "tensor"}
    write_checkpoint(tmp_path, layer_tensors(layer, scalar_scales(shape)), quantization=config)
    check(load(tmp_path, layer), layer)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("fmt", ["gptq_v2", "awq_gemv"])
def test_a_config_in_a_file_of_its_own(tmp_path: Path, name: str, fmt: str) -> None:
    """Without it, v2 zero points would count as v1's, and a square GEMV weight as GEMM."""
    layer = random_layer(np.random.default_rng(0), EXPERTS, 64, 64, symmetric=False)
    if fmt == "awq_gemv":
        encode, config = awq_gemv, quantization_config("awq", layer[0, "up"], version="gemv")
    else:
        encode, config = gptq_v2, quantization_config(fmt, layer[0, "up"])
    write_checkpoint(tmp_path, layer_tensors(layer, encode))
    (tmp_path / name).write_text(json.dumps(config))
    check(load(tmp_path, layer), layer)


DYNAMIC: dict[str, Any] = {  # of the Qwen3.5 checkpoints
    "lm_head": {},
    "model.language_model.embed_tokens": {},
    "-:.*attn.*": {},
    "-:.*shared_expert.*": {},
    "-:.*mtp.*": {},
    "-:.*visual.*": {},
}


@pytest.mark.parametrize("prefix", ["model", "model.language_model", "language_model.model"])
def test_prefixes_of_multimodal_models(tmp_path: Path, prefix: str) -> None:
    """Experts of Qwen3.5 and of Kimi K2.5; rules by name hold for the name in the checkpoint."""
    layer = some_layer()
    for expert in range(EXPERTS):
        layer[expert, "down"] = some_layer(bits=8)[expert, "down"]
    tensors = layer_tensors(layer, gptq_v1, parent=f"{prefix}.layers.0.mlp.experts")
    tensors |= layer_tensors(some_layer(), gptq_v1, parent="mtp.layers.0.mlp.experts")
    tensors |= layer_tensors(some_layer(), gptq_v1, parent="model.visual.layers.0.mlp.experts")
    tensors[f"{prefix}.layers.0.mlp.gate.weight"] = torch.zeros(EXPERTS, HIDDEN).bfloat16()
    rules = DYNAMIC | {rf"{prefix}\.layers\.0\..*\.down_proj": {"bits": 8}}
    config = quantization_config("gptq", layer[0, "up"], dynamic=rules)
    write_checkpoint(tmp_path, tensors, quantization=config)
    check(load(tmp_path, layer), layer)


# --- damage ---------------------------------------------------------------------------------------------------------


def full_layer(fmt: str) -> Layer:
    """Everything that a format can hold: zero points, and act-order if there is one."""
    return some_layer(bits=BITS.get(fmt, (4,))[0], symmetric=False, act_order=fmt not in PLAIN_ORDER)


def full_config(fmt: str, layer: Layer) -> dict[str, Any]:
    """A config that announces all of it."""
    config = quantization_config(fmt, layer[0, "up"], desc_act=fmt not in PLAIN_ORDER)
    if fmt == "compressed-tensors":
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return config


SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point"),
}
EVERY_TENSOR = [(fmt, suffix) for fmt, suffixes in SUFFIXES.items() for suffix in suffixes]


@pytest.mark.parametrize(("fmt", "suffix"), EVERY_TENSOR)
@pytest.mark.parametrize("where", [f"{PARENT}.1.up_proj.", ".down_proj.", ""], ids=["one", "projection", "all"])
def test_no_tensor_can_be_missing(tmp_path: Path, fmt: str, suffix: str, where: str) -> None:
    """Of one module, of a projection of all experts, or of everything: no other meaning fits what is left."""
    layer = full_layer(fmt)
    tensors = layer_tensors(layer, ENCODERS[fmt])
    assert {key.rpartition(".")[2] for key in tensors} - {"weight_shape"} == set(SUFFIXES[fmt])
    write_checkpoint(tmp_path / "whole", tensors, quantization=full_config(fmt, layer))
    check(load(tmp_path / "whole", layer), layer)
    kept = {key: t for key, t in tensors.items() if not (where in key and key.endswith(f".{suffix}"))}
    assert len(kept) < len(tensors)
    write_checkpoint(tmp_path / "cut", kept, quantization=full_config(fmt, layer))
    with pytest.raises(QuantMoELoRAError, match=r"experts\.\d"):
        load(tmp_path / "cut", layer)


@pytest.mark.parametrize(("fmt", "suffix"), EVERY_TENSOR)
@pytest.mark.parametrize("change", ["rows", "columns", "dtype"])
def test_every_tensor_has_one_shape_and_dtype(tmp_path: Path, fmt: str, suffix: str, change: str) -> None:
    layer = full_layer(fmt)
    tensors, key = layer_tensors(layer, ENCODERS[fmt]), f"{PARENT}.2.gate_proj.{suffix}"
    if change == "dtype":
        tensors[key] = tensors[key].to(torch.float64 if tensors[key].is_floating_point() else torch.int16)
    else:
        dim = 0 if change == "rows" else -1
        tensors[key] = tensors[key].narrow(dim, 0, tensors[key].shape[dim] - 1).contiguous()
    write_checkpoint(tmp_path, tensors, quantization=full_config(fmt, layer))
    with pytest.raises(QuantMoELoRAError, match=rf"{PARENT}\.2\.gate_proj"):
        load(tmp_path, layer)


@pytest.mark.parametrize("fmt", ENCODERS)
def test_experts_are_counted_in_every_format(tmp_path: Path, fmt: str) -> None:
    layer = full_layer(fmt)
    tensors = layer_tensors(layer, ENCODERS[fmt])
    fewer = {key: tensor for key, tensor in tensors.items() if f"{PARENT}.1." not in key}
    write_checkpoint(tmp_path / "fewer", fewer, quantization=full_config(fmt, layer))
    with pytest.raises(MissingTensorError, match=r"expert 1 in layer 0 .*3 of 9 projections missing"):
        load(tmp_path / "fewer", layer)
    more = tensors | {key.replace("experts.1.", "experts.3."): t.clone() for key, t in tensors.items()}
    write_checkpoint(tmp_path / "more", more, quantization=full_config(fmt, layer))
    with pytest.raises(FormatError, match=rf"got {PARENT}\.3\.\w+_proj .*expected experts 0 to 2"):
        load(tmp_path / "more", layer)


SCALES = {"compressed-tensors": "weight_scale", "int-quantized": "weight_scale"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fmt", ENCODERS)
def test_scales_are_finite_in_every_format(tmp_path: Path, fmt: str, value: float) -> None:
    layer = full_layer(fmt)
    tensors, module = layer_tensors(layer, ENCODERS[fmt]), f"{PARENT}.2.down_proj"
    tensors[f"{module}.{SCALES.get(fmt, 'scales')}"].flatten()[-1] = value
    write_checkpoint(tmp_path, tensors, quantization=full_config(fmt, layer))
    with pytest.raises(FormatError, match=rf"scales of {module}: got values that are not finite"):
        load(tmp_path, layer)


@pytest.mark.parametrize("encode", [awq_gemv, scalar_scales((1,))], ids=["gemv", "tensor"])
def test_scales_are_finite_in_odd_layouts(tmp_path: Path, encode: Encoder) -> None:
    tensor = encode is not awq_gemv
    layer = {k: per_tensor(held) for k, held in some_layer(bits=8, group_size=None).items()} if tensor else some_layer()
    config = None if tensor else quantization_config("awq", layer[0, "up"], version="gemv")
    tensors = layer_tensors(layer, encode)
    tensors[f"{PARENT}.0.up_proj.{'weight_scale' if tensor else 'scales'}"].flatten()[0] = torch.nan
    write_checkpoint(tmp_path, tensors, quantization=config)
    with pytest.raises(FormatError, match=rf"scales of {PARENT}\.0\.up_proj: got values that are not finite"):
        load(tmp_path, layer)


def test_scales_of_a_linear_are_finite(tmp_path: Path) -> None:
    layer = random_layer(np.random.default_rng(0), 1, 64, 64)
    module = "model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.{suffix}": tensor for suffix, tensor in gptq_v1(layer[0, "up"]).items()}
    tensors[f"{module}.scales"][0, 3] = torch.nan
    config = quantization_config("gptq", layer[0, "up"])
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, qwen3_config(2, 64, 32), config))
    (linear,) = describe_linears(checkpoint, build_skeleton(checkpoint)).values()
    with pytest.raises(FormatError, match=rf"scales of {module}: got values that are not finite"):
        dequantize_linear(checkpoint, linear, torch.device("cpu"))
