"""The pack-quantized codec against the format's definition, and its configs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import Linear, compressed_tensors, ct_config, headers_of, quantization_config, random_linear

MODULE = "model.layers.0.mlp.experts.0.up_proj"


def decode(
    tensors: dict[str, torch.Tensor], linear: Linear, config: dict[str, Any], module: str = MODULE
) -> CanonicalWeight:
    """What the library makes of one layer's tensors."""
    spec = LinearSpec(module, *linear.codes.shape)
    headers = headers_of(tensors, module)
    codec = find_codec(spec, headers, config)
    assert codec.name == "compressed-tensors"
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight)
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("k", "group_size"), [(128, 32), (128, 64), (256, 128), (96, None), (96, 128), (160, 64), (75, 25)]
)
@pytest.mark.parametrize("n", [40, 33])  # 33 fills no whole words of zero points
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_definition(
    bits: int, symmetric: bool, k: int, group_size: int | None, n: int, act_order: bool, scale_dtype: torch.dtype
) -> None:
    linear = random_linear(
        np.random.default_rng(0),
        n,
        k,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        scale_dtype=scale_dtype,
    )
    weight = decode(compressed_tensors(linear), linear, quantization_config("compressed-tensors", linear))
    scheme = weight.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (bits, group_size, symmetric)
    assert scheme.scale_dtype == scale_dtype
    assert np.array_equal(weight.codes.numpy(), linear.codes)
    assert torch.equal(weight.scales.view(torch.int16), linear.scales.view(torch.int16))
    assert weight.zeros is None if symmetric else np.array_equal(np.asarray(weight.zeros), linear.zeros)
    plain = (linear.g_idx == np.arange(k) // (group_size or k)).all()
    assert (weight.g_idx is None) == plain
    assert torch.equal(weight.dequantize(), linear.weight)


def test_codes_are_offset_binary() -> None:
    """The signed values -8 .. 7 stand as 0 .. 15, and zero points likewise."""
    linear = random_linear(np.random.default_rng(0), 16, 16, group_size=16, symmetric=False)
    signed = np.arange(-8, 8)
    linear = replace(linear, codes=(signed + 8)[None].repeat(16, axis=0), zeros=(signed + 8)[:, None])
    tensors = compressed_tensors(linear)
    assert tensors["weight_packed"][0].tolist() == [0x76543210, 0xFEDCBA98 - 2**32]
    assert tensors["weight_zero_point"].tolist() == [[0x76543210], [0xFEDCBA98 - 2**32]]
    weight = decode(tensors, linear, quantization_config("compressed-tensors", linear)).dequantize()
    scale = linear.scales.to(torch.float32)
    expected = (torch.from_numpy(signed)[None, :] - torch.from_numpy(signed)[:, None]) * scale
    assert torch.equal(weight, expected)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    "targets",
    [("Linear",), (r"re:.*mlp\.experts\.\d+\.(gate|up)_proj$",), (MODULE,), ("re:nothing", "Linear")],
    ids=["class", "regex", "name", "several"],
)
def test_targets_that_match(targets: tuple[str, ...]) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 96, group_size=64)  # 96 / 2 groups = 48 without the config
    config = ct_config(targets, group_size=64)
    weight = decode(compressed_tensors(linear), linear, config)
    assert weight.scheme.group_size == 64
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ((r"re:.*self_attn.*",), ()),
        (("model.layers.1.mlp.experts.0.up_proj",), ()),
        (("Linear",), (MODULE,)),
        (("Linear",), (r"re:.*experts.*",)),
    ],
    ids=["regex", "name", "ignored", "ignored by regex"],
)
def test_without_a_group_that_targets_the_module_the_tensors_decide(
    targets: tuple[str, ...], ignore: tuple[str, ...]
) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, bits=8)
    config = ct_config(targets, ignore, group_size=64, num_bits=4, symmetric=False)
    weight = decode(compressed_tensors(linear), linear, config)
    assert weight.scheme.name == "w8a16_g32_sym"
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize("config", [{}, {"quant_method": "compressed-tensors", "config_groups": {}}])
@pytest.mark.parametrize(("group_size", "name"), [(32, "w4a16_g32_asym"), (None, "w4a16_channel_asym")])
def test_without_a_config_the_tensors_decide(config: dict[str, Any], group_size: int | None, name: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, group_size=group_size, symmetric=False)
    weight = decode(compressed_tensors(linear), linear, config)
    assert weight.scheme.name == name
    assert torch.equal(weight.dequantize(), linear.weight)


def test_short_last_group_needs_the_config() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 160, group_size=64)
    with pytest.raises(FormatError, match=r"group_size of .*up_proj: got 3 scales a row for K=160.*config_groups"):
        decode(compressed_tensors(linear), linear, {})


def test_the_first_group_that_targets_a_module_counts() -> None:
    """llm-compressor's mixed recipe: gate and up in 4 bits, down in 8."""
    config = ct_config((r"re:.*(gate|up)_proj$",))
    wide = {**GROUP, "num_bits": 8, "strategy": "channel", "group_size": None}
    config["config_groups"]["group_1"] = {"targets": [r"re:.*down_proj$"], "weights": wide}
    rng = np.random.default_rng(0)
    narrow, down = random_linear(rng, 16, 64), random_linear(rng, 64, 16, bits=8, group_size=None)
    assert decode(compressed_tensors(narrow), narrow, config).scheme.name == "w4a16_g32_sym"
    weight = decode(compressed_tensors(down), down, config, "model.layers.0.mlp.experts.0.down_proj")
    assert weight.scheme.name == "w8a16_channel_sym"
    assert torch.equal(weight.dequantize(), down.weight)


def test_preset_name_for_a_group() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 256, group_size=128)
    config = {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}
    assert decode(compressed_tensors(linear), linear, config).scheme.name == "w4a16_g128_sym"


@pytest.mark.parametrize("actorder", ["group", "weight", "dynamic", "static", True, None])
def test_act_order_of_old_configs(actorder: object) -> None:
    """Versions since 0.19 refuse "group"; the tensors say the same."""
    linear = random_linear(np.random.default_rng(0), 16, 128, act_order=True)
    tensors = compressed_tensors(linear)
    weight = decode(tensors, linear, ct_config(actorder=actorder))
    assert weight.g_idx is not None
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_act_order_without_g_idx_is_refused(actorder: object) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, act_order=True)
    tensors = compressed_tensors(linear)
    del tensors["weight_g_idx"]
    with pytest.raises(MissingTensorError, match=rf"weight_g_idx of {MODULE}: got only .*config says actorder group"):
        decode(tensors, linear, ct_config(actorder=actorder))


@pytest.mark.parametrize("actorder", ["weight", "static", False, None])
def test_other_act_orders_need_no_g_idx(actorder: object) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    weight = decode(compressed_tensors(linear), linear, ct_config(actorder=actorder))
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_rounds_own_config(bits: int, symmetric: bool) -> None:
    """Its packing `auto_round:llm_compressor` has these tensors, and no config group that tells a short last group."""
    linear = random_linear(np.random.default_rng(0), 16, 160, bits=bits, group_size=64, symmetric=symmetric)
    config = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}
    own = {"bits": bits, "group_size": 64, "sym": symmetric}
    tensors = compressed_tensors(linear)
    assert torch.equal(decode(tensors, linear, {**config, **own}).dequantize(), linear.weight)
    other = {"bits": 12 - bits, "group_size": 32, "sym": not symmetric, "extra_config": {MODULE: own}}
    assert torch.equal(decode(tensors, linear, {**config, **other}).dequantize(), linear.weight)
    with pytest.raises(FormatError, match=rf"{MODULE}: got {bits} from the tensors' shapes, expected {12 - bits}"):
        decode(tensors, linear, {**config, **own, "bits": 12 - bits})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"type": "float"}, "type float, strategy group, dynamic False"),
        ({"dynamic": True}, "type int, strategy group, dynamic True"),
        ({"strategy": "block", "block_structure": [16, 32], "group_size": None}, "type int, strategy block"),
    ],
)
def test_weights_that_are_no_stored_integers(weights: dict[str, Any], message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    config = ct_config()
    config["config_groups"]["group_0"]["weights"] |= weights
    with pytest.raises(UnsupportedError, match=rf"weights of {MODULE}: got {message}.*expected type int"):
        decode(compressed_tensors(linear), linear, config)


def test_transformed_weights_are_refused() -> None:
    """Hadamard transforms and the like: the model's activations would need the inverse."""
    linear = random_linear(np.random.default_rng(0), 16, 128)
    apply = [{"targets": ["Linear"], "location": "weight_input"}]
    config = {**ct_config(), "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}}
    with pytest.raises(UnsupportedError, match=r"transform_config of the quantization_config: got .*hadamard"):
        decode(compressed_tensors(linear), linear, config)
    weight = decode(compressed_tensors(linear), linear, {**ct_config(), "transform_config": {}})  # as most files say
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 8}, "num_bits of .*up_proj: got 4 from the tensors' shapes, expected 8"),
        ({"symmetric": False}, "symmetric of .*up_proj: got True from the tensors' shapes, expected False"),
        ({"group_size": 64}, r"weight_scale: got shape \[16, 4\], expected \[16, 2\].*group_size 64"),
        ({"group_size": None}, r"weight_scale: got shape \[16, 4\], expected \[16, 1\].*group_size None"),
    ],
)
def test_config_against_tensors(weights: dict[str, Any], message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    with pytest.raises(FormatError, match=message):
        decode(compressed_tensors(linear), linear, ct_config(**weights))


def test_config_that_is_none_of_the_schema() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    with pytest.raises(FormatError, match=r"(?s)quantization_config: got .*strategy.*correct config\.json"):
        decode(
            compressed_tensors(linear), linear, {"config_groups": {"g": {"targets": [], "weights": {"strategy": 3}}}}
        )


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_packed", torch.zeros(16, 15, dtype=torch.int32), r"got shape \[16, 15\], expected \[16, 16\]"),
        ("weight_scale", torch.zeros(4, 16).half(), r"got shape \[4, 16\], expected \[16, 4\]"),
        ("weight_zero_point", torch.zeros(16, 4, dtype=torch.int32), r"got shape \[16, 4\], expected \[2, 4\]"),
        ("weight_g_idx", torch.zeros(4, dtype=torch.int32), r"got shape \[4\], expected \[128\]"),
        ("weight_scale", torch.zeros(16, 4), "got dtype torch.float32, expected torch.float16 or torch.bfloat16"),
        ("weight_zero_point", torch.zeros(2, 4, dtype=torch.int8), "got dtype torch.int8, expected torch.int32"),
    ],
)
def test_tensors_of_another_shape_or_dtype(suffix: str, tensor: torch.Tensor, message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, symmetric=False)
    tensors = {**compressed_tensors(linear), suffix: tensor}
    with pytest.raises(FormatError, match=rf"{suffix}: {message}.*{MODULE}\.{suffix} in model.safetensors"):
        decode(tensors, linear, quantization_config("compressed-tensors", linear))


def test_other_bits_are_refused_by_number() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    tensors = {**compressed_tensors(linear), "weight_packed": torch.zeros(16, 12, dtype=torch.int32)}
    with pytest.raises(UnsupportedError, match=r"num_bits of .*up_proj: got 3, expected 4 or 8"):
        decode(tensors, linear, ct_config(num_bits=3))
