"""The int-quantized codec against the format's definition, its configs and its warning."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import FormatError, QuantMoELoRAError, UnsupportedError
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import build_skeleton, find_experts
from quant_moelora.loaders.layer_format import describe_layers
from quant_moelora.loaders.linears import dequantize_linear, describe_linears
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import (
    Linear,
    compressed_tensors,
    ct_config,
    definition,
    headers_of,
    int_quantized,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    write_checkpoint,
)

MODULE = "model.layers.0.mlp.experts.0.up_proj"
WIDE: dict[str, Any] = {"num_bits": 8}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def decode(tensors: dict[str, Tensor], n: int, k: int, config: dict[str, Any]) -> CanonicalWeight:
    """What the library makes of one layer's tensors."""
    spec, headers = LinearSpec(MODULE, n, k), headers_of(tensors, MODULE)
    codec = find_codec(spec, headers, config)
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight)
    return weight


def per_tensor(shape: tuple[int, ...], *, symmetric: bool, n: int = 24) -> tuple[Linear, dict[str, Tensor]]:
    """A weight with one scale and one zero point, which the file holds in the given shape."""
    linear = random_linear(np.random.default_rng(0), n, 40, bits=8, group_size=None, symmetric=symmetric)
    linear = replace(linear, scales=linear.scales[:1].repeat(n, 1), zeros=linear.zeros[:1].repeat(n, axis=0))
    tensors = int_quantized(linear)
    return linear, {s: t if s == "weight" else t[0].reshape(shape) for s, t in tensors.items()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (256, 128), (96, None), (96, 128), (160, 64), (75, 25)])
@pytest.mark.parametrize("n", [40, 33, 1])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_definition(symmetric: bool, k: int, group_size: int | None, n: int, scale_dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    linear = random_linear(rng, n, k, bits=8, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = decode(int_quantized(linear), n, k, quantization_config("int-quantized", linear))
    scheme = weight.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (8, group_size, symmetric)
    assert scheme.scale_dtype == scale_dtype
    assert np.array_equal(weight.codes.numpy(), linear.codes)
    assert torch.equal(weight.scales.view(torch.int16), linear.scales.view(torch.int16))
    assert torch.equal(weight.dequantize(), linear.weight)


def test_codes_are_the_signed_values_plus_128() -> None:
    signed = torch.arange(-128, 128, dtype=torch.int16)
    tensors = {
        "weight": signed.to(torch.int8)[None],
        "weight_scale": torch.tensor([[0.5]], dtype=torch.float16),
        "weight_zero_point": torch.tensor([[-100]], dtype=torch.int8),
    }
    weight = decode(tensors, 1, 256, {})
    assert weight.codes[0].tolist() == list(range(256))
    assert weight.zeros is not None
    assert weight.zeros.item() == 28
    assert torch.equal(weight.dequantize()[0], (signed.float() + 100) * 0.5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("config", [True, False])
def test_one_scale_of_the_whole_weight(shape: tuple[int, ...], symmetric: bool, config: bool) -> None:
    """Every channel gets it."""
    linear, tensors = per_tensor(shape, symmetric=symmetric)
    weights = {"num_bits": 8, "symmetric": symmetric, "strategy": "tensor"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    weight = decode(tensors, 24, 40, groups if config else {})
    assert weight.scheme.group_size is None
    assert weight.scales.shape == (24, 1)
    assert torch.equal(weight.dequantize(), linear.weight)


def test_scales_of_whole_weights_stack() -> None:
    linears, encoded = zip(*(per_tensor((1,), symmetric=False) for _ in range(2)), strict=True)
    stacked = {suffix: torch.stack([tensors[suffix] for tensors in encoded]) for suffix in encoded[0]}
    spec = LinearSpec(MODULE, 24, 40)
    codec = find_codec(spec, headers_of(encoded[0]), {})
    weight = codec.decode(stacked, spec, codec.describe(spec, headers_of(encoded[0]), {}))
    assert isinstance(weight, CanonicalWeight)
    assert torch.equal(weight.dequantize(), torch.stack([linear.weight for linear in linears]))


@pytest.mark.parametrize("fmt", ["int-quantized", "naive-quantized", "dense"])
def test_the_name_of_the_format_does_not_matter(fmt: str) -> None:
    """The tensors decide; newer files name it in the group only, and older ones call it naive-quantized."""
    linear = random_linear(np.random.default_rng(0), 16, 64, bits=8)
    config = {**quantization_config("int-quantized", linear), "format": fmt}
    assert torch.equal(decode(int_quantized(linear), 16, 64, config).dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"symmetric": False}, FormatError, "symmetric of .*up_proj: got True from the tensors' shapes, expected Fal"),
        ({"group_size": 64}, FormatError, r"weight_scale: got shape \[16, 4\], expected \[16, 2\].*group_size 64"),
        ({"num_bits": 4}, UnsupportedError, "weights of .*up_proj: got num_bits 4, not packed, expected num_bits 8"),
    ],
)
def test_config_against_tensors(weights: dict[str, Any], error: type[QuantMoELoRAError], message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, bits=8)
    with pytest.raises(error, match=message):
        decode(int_quantized(linear), 16, 128, ct_config(**{**WIDE, **weights}))


def test_strategy_against_tensors() -> None:
    _, tensors = per_tensor((1,), symmetric=True)
    with pytest.raises(FormatError, match=r"strategy of .*up_proj: got tensor from .*, expected channel"):
        decode(tensors, 24, 40, ct_config(num_bits=8, group_size=None))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight", torch.zeros(16, 127, dtype=torch.int8), r"got shape \[16, 127\], expected \[16, 128\]"),
        ("weight_scale", torch.zeros(4, 16).half(), r"got shape \[4, 16\], expected \[16, 4\]"),
        ("weight_scale", torch.zeros(16, 4), "got dtype torch.float32, expected torch.float16 or torch.bfloat16"),
        ("weight_zero_point", torch.zeros(16, 1, dtype=torch.int8), r"got shape \[16, 1\], expected \[16, 4\]"),
        ("weight_zero_point", torch.zeros(16, 4, dtype=torch.int32), "got dtype torch.int32, expected torch.int8"),
    ],
)
def test_tensors_of_another_shape_or_dtype(suffix: str, tensor: Tensor, message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, bits=8, symmetric=False)
    tensors = {**int_quantized(linear), suffix: tensor}
    with pytest.raises(FormatError, match=rf"{suffix}: {message}.*{MODULE}\.{suffix} in model.safetensors"):
        decode(tensors, 16, 128, quantization_config("int-quantized", linear))


def test_float8_is_refused_by_name() -> None:
    tensors = {"weight": torch.zeros(16, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(16, 1)}
    with pytest.raises(UnsupportedError, match=rf"format of {MODULE}: got FP8: weight torch.float8_e4m3fn"):
        decode(tensors, 16, 64, ct_config(num_bits=8, type="float", group_size=None))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("activations", [True, False])
def test_quantised_activations_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packed: bool, activations: bool
) -> None:
    """However many experts, layers and other linears; and again for another checkpoint."""
    rng, encode = np.random.default_rng(0), compressed_tensors if packed else int_quantized
    layers = [random_layer(rng, 2, 64, 32, bits=8, group_size=None) for _ in range(2)]
    query = random_linear(rng, 64, 64, bits=8, group_size=None)
    tensors = {f"model.layers.0.self_attn.q_proj.{suffix}": tensor for suffix, tensor in encode(query).items()}
    for number, layer in enumerate(layers):
        tensors |= layer_tensors(layer, encode, parent=f"model.layers.{number}.mlp.experts")
    if activations:  # static ones have a scale in the file
        tensors |= {} if packed else {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}
    config = ct_config(num_bits=8, group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = ACTIVATIONS if activations else None
    write_checkpoint(tmp_path, tensors, qwen3_config(2, 64, 32, layers=2), config)
    for count in (1, 2):
        checkpoint = Checkpoint(tmp_path)
        skeleton = build_skeleton(checkpoint)
        with caplog.at_level(logging.WARNING, logger="quant_moelora"):
            formats = describe_layers(checkpoint, find_experts(skeleton), skeleton)
            (linear,) = describe_linears(checkpoint, skeleton).values()
        assert [r.name for r in caplog.records] == ["quant_moelora.loaders.checkpoint"] * count * activations
        assert all("activations stay unquantised" in r.getMessage() for r in caplog.records)
        assert torch.equal(dequantize_linear(checkpoint, linear, torch.device("cpu")), query.weight)
        for fmt, layer in zip(formats, layers, strict=True):
            for got, expected in zip(load_layer(checkpoint, fmt, "cpu").dequantize(), definition(layer), strict=True):
                assert got is not None
                assert torch.equal(got, expected)
