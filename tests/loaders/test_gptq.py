"""The GPTQ codec against the format's definition."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError, UnsupportedError
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.gptq import GPTQ
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import ENCODERS, Linear, gptq_v1, gptq_v2, headers_of, quantization_config, random_linear

MODULE = "model.layers.0.mlp.experts.0.up_proj"


def decode(tensors: dict[str, torch.Tensor], linear: Linear, config: dict[str, Any]) -> CanonicalWeight:
    """What the library makes of one layer's tensors."""
    spec = LinearSpec(MODULE, *linear.codes.shape)
    headers = headers_of(tensors, MODULE)
    codec = find_codec(spec, headers, config)
    assert codec.name == "gptq"
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight)
    return weight


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("k", "group_size"), [(128, 32), (128, 64), (256, 128), (96, None), (96, 128), (160, 64), (72, 24)]
)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_definition(
    version: str,
    bits: int,
    symmetric: bool,
    k: int,
    group_size: int | None,
    act_order: bool,
    scale_dtype: torch.dtype,
) -> None:
    linear = random_linear(
        np.random.default_rng(0),
        40,
        k,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        scale_dtype=scale_dtype,
    )
    weight = decode(ENCODERS[version](linear), linear, quantization_config(version, linear))
    scheme = weight.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (bits, group_size, symmetric)
    assert scheme.scale_dtype == scale_dtype
    assert (weight.zeros is None) == symmetric
    assert np.array_equal(weight.codes.numpy(), linear.codes)
    assert torch.equal(weight.dequantize(), linear.weight)
    plain = (linear.g_idx == np.arange(k) // (group_size or k)).all()
    assert (weight.g_idx is None) == plain


def test_a_zero_point_of_zero_borrows_from_the_next_code_in_v1() -> None:
    # True zero points 0, 5, 0, 0, 8, 15, 0, 1 from the lowest bits up. The subtraction is of the whole word.
    zeros = np.array([[0, 5, 0, 0, 8, 15, 0, 1]]).T
    linear = random_linear(np.random.default_rng(0), 8, 32, symmetric=False)
    linear = replace(linear, zeros=zeros)
    tensors = gptq_v1(linear)
    assert tensors["qzeros"].tolist() == [[0x10F80050 - 0x11111111]]
    stored = [int(tensors["qzeros"]) >> 4 * i & 0xF for i in range(8)]
    assert [(code + 1) & 15 for code in stored] != zeros.ravel().tolist()  # per code it would be wrong
    weight = decode(tensors, linear, quantization_config("gptq", linear))
    assert weight.zeros is not None
    assert weight.zeros.tolist() == zeros.tolist()
    assert torch.equal(weight.dequantize(), linear.weight)


def test_v1_int8_borrows_too() -> None:
    zeros = np.array([[0, 255, 0, 128]]).T
    linear = random_linear(np.random.default_rng(0), 4, 32, bits=8, symmetric=False)
    linear = replace(linear, zeros=zeros)
    weight = decode(gptq_v1(linear), linear, quantization_config("gptq", linear))
    assert weight.zeros is not None
    assert weight.zeros.tolist() == zeros.tolist()


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_v1_words_are_those_of_the_tools(bits: int, word: int) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, bits=bits)
    tensors = gptq_v1(linear)
    assert (tensors["qzeros"] == word).all()
    assert torch.equal(decode(tensors, linear, quantization_config("gptq", linear)).dequantize(), linear.weight)


def test_scales_are_kept_bit_for_bit() -> None:
    linear = random_linear(np.random.default_rng(0), 64, 256, scale_dtype=torch.float16)
    weight = decode(gptq_v2(linear), linear, quantization_config("gptq_v2", linear))
    assert weight.scales.dtype == torch.float16
    assert torch.equal(weight.scales.view(torch.int16), linear.scales.view(torch.int16))
    assert (linear.scales < 0).any()


def test_stacked_experts_decode_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    linears = [random_linear(rng, 24, 64, symmetric=False, act_order=order) for order in (False, True, False)]
    encoded = [gptq_v1(linear) for linear in linears]
    stacked = {suffix: torch.stack([tensors[suffix] for tensors in encoded]) for suffix in encoded[0]}
    spec, config = LinearSpec(MODULE, 24, 64), quantization_config("gptq", linears[0])
    codec = GPTQ()
    weight = codec.decode(stacked, spec, codec.describe(spec, headers_of(encoded[0]), config))
    assert torch.equal(weight.dequantize(), torch.stack([linear.weight for linear in linears]))


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_format": "gptq_v2", "format": "gptq"},  # the older name decides
        {"checkpoint_format": None, "format": "gptq_v2"},
    ],
)
def test_version_is_in_checkpoint_format_or_format(config: dict[str, Any]) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, symmetric=False)
    tensors, config = gptq_v2(linear), quantization_config("gptq", linear, **config)
    assert torch.equal(decode(tensors, linear, config).dequantize(), linear.weight)
    warning = GPTQ().describe(LinearSpec(MODULE, 16, 32), headers_of(tensors), config).warning
    both = config["checkpoint_format"] is not None
    assert warning == (
        "the config says checkpoint_format gptq_v2 and format gptq: it is read as gptq_v2" * both or None
    )


def test_versions_that_agree_give_no_warning() -> None:
    """As gptqmodel 7 writes them."""
    linear = random_linear(np.random.default_rng(0), 16, 32)
    config = quantization_config("gptq", linear, format="gptq")
    assert GPTQ().describe(LinearSpec(MODULE, 16, 32), headers_of(gptq_v1(linear)), config).warning is None


@pytest.mark.parametrize("bits", [4, 8])
def test_planar_is_v2_for_four_and_eight_bits(bits: int) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, bits=bits, symmetric=False)
    config = quantization_config("gptq", linear, checkpoint_format="gptq_p")
    assert torch.equal(decode(gptq_v2(linear), linear, config).dequantize(), linear.weight)


def test_without_a_version_the_file_is_v1() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, symmetric=False)
    config = quantization_config("gptq", linear)
    del config["checkpoint_format"]
    assert torch.equal(decode(gptq_v1(linear), linear, config).dequantize(), linear.weight)


def test_without_g_idx_groups_are_in_order() -> None:  # auto-round writes none
    linear = random_linear(np.random.default_rng(0), 16, 64)
    tensors = gptq_v1(linear)
    del tensors["g_idx"]
    weight = decode(tensors, linear, quantization_config("gptq", linear, quant_method="auto-round"))
    assert weight.g_idx is None
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize("act_order", [True, False])
def test_act_order_without_g_idx_is_refused(act_order: bool) -> None:
    """The config says that the file lacks something, whatever the groups were."""
    linear = random_linear(np.random.default_rng(0), 16, 64, act_order=act_order)
    tensors, config = gptq_v1(linear), quantization_config("gptq", linear, desc_act=True)
    assert torch.equal(decode(tensors, linear, config).dequantize(), linear.weight)
    del tensors["g_idx"]
    with pytest.raises(MissingTensorError, match=rf"g_idx of {MODULE}: got only qweight, .*config says desc_act"):
        decode(tensors, linear, config)


@pytest.mark.parametrize(("k", "group_size"), [(64, None), (96, 128)])
def test_act_order_of_one_group_needs_no_g_idx(k: int, group_size: int | None) -> None:
    linear = random_linear(np.random.default_rng(0), 16, k, group_size=group_size)
    tensors = gptq_v1(linear)
    del tensors["g_idx"]
    weight = decode(tensors, linear, quantization_config("gptq", linear, desc_act=True))
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("packing_format", "version"),
    [("auto_round:auto_gptq", "gptq"), ("auto_round", "gptq_v2"), ("auto_round:gptqmodel", "gptq_v2")],
)
def test_packings_of_auto_round(packing_format: str, version: str) -> None:
    """Its own ones hold zero points as they are."""
    linear = random_linear(np.random.default_rng(0), 16, 64, symmetric=False)
    tensors = ENCODERS[version](linear)
    del tensors["g_idx"]
    config = {"quant_method": "auto-round", "packing_format": packing_format, "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(decode(tensors, linear, config).dequantize(), linear.weight)


def test_a_packing_of_auto_round_that_is_not_known() -> None:
    """Whether it subtracts one from zero points is not known either."""
    linear = random_linear(np.random.default_rng(0), 16, 64)
    config = quantization_config("gptq", linear, checkpoint_format=None, packing_format="auto_round:marlin")
    with pytest.raises(UnsupportedError, match=r"checkpoint_format of .*up_proj: got auto_round:marlin, expected gptq"):
        decode(gptq_v1(linear), linear, config)


@pytest.mark.parametrize("bits", [4, 8])
def test_v2_file_declared_v1_is_refused_if_symmetric(bits: int) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, bits=bits)
    wrong = {4: 9, 8: 129}[bits]
    with pytest.raises(
        FormatError, match=f"got zero point {wrong}, expected {wrong - 1} everywhere.*checkpoint_format"
    ):
        decode(gptq_v2(linear), linear, quantization_config("gptq", linear))


def test_asymmetric_file_declared_symmetric_is_refused() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 32, symmetric=False)
    with pytest.raises(FormatError, match=r"qzeros of .*up_proj: got zero point"):
        decode(gptq_v1(linear), linear, quantization_config("gptq", linear, sym=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            UnsupportedError,
            "checkpoint_format.*got marlin, expected gptq, gptq_v2 or gptq_p",
        ),
        ({"bits": 8}, FormatError, "bits of .*up_proj: got 4 from the tensors' shapes, expected 8"),
        ({"bits": 3}, FormatError, "bits of .*up_proj: got 4 from the tensors' shapes, expected 3"),
        ({"group_size": 64}, FormatError, r"scales: got shape \[4, 16\], expected \[2, 16\].*group_size 64"),
        ({"group_size": -1}, FormatError, r"scales: got shape \[4, 16\], expected \[1, 16\]"),
        ({"group_size": "32"}, FormatError, "group_size .*: got '32', expected a whole number"),
        ({"is_marlin_format": True}, UnsupportedError, "quantization_config of .*up_proj: got is_marlin_format True"),
        ({"rotation": "hadamard"}, UnsupportedError, "quantization_config of .*up_proj: got rotation hadamard"),
        ({"adapter": {"rank": 8}}, UnsupportedError, "quantization_config of .*up_proj: got adapter {'rank': 8}"),
    ],
)
def test_config_against_tensors(changes: dict[str, Any], error: type[QuantMoELoRAError], message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    with pytest.raises(error, match=message):
        decode(gptq_v1(linear), linear, quantization_config("gptq", linear, **changes))


def test_three_bits_are_refused_by_number() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    tensors = {**gptq_v1(linear), "qweight": torch.zeros(12, 16, dtype=torch.int32)}
    with pytest.raises(UnsupportedError, match=r"bits of .*up_proj: got 3, expected 4 or 8"):
        decode(tensors, linear, quantization_config("gptq", linear, bits=3))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("qweight", torch.zeros(15, 16, dtype=torch.int32), r"qweight: got shape \[15, 16\], expected \[16, 16\]"),
        ("qzeros", torch.zeros(4, 1, dtype=torch.int32), r"qzeros: got shape \[4, 1\], expected \[4, 2\]"),
        ("g_idx", torch.zeros(127, dtype=torch.int32), r"g_idx: got shape \[127\], expected \[128\]"),
        ("scales", torch.zeros(4, 16), "scales: got dtype torch.float32, expected torch.float16 or torch.bfloat16"),
        ("qweight", torch.zeros(16, 16, dtype=torch.int64), "qweight: got dtype torch.int64, expected torch.int32"),
        ("g_idx", torch.zeros(128, dtype=torch.int64), "g_idx: got dtype torch.int64, expected torch.int32"),
    ],
)
def test_tensors_of_another_shape_or_dtype(suffix: str, tensor: torch.Tensor, message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    with pytest.raises(FormatError, match=rf"{message}.*{MODULE}\.{suffix} in model.safetensors"):
        decode({**gptq_v1(linear), suffix: tensor}, linear, quantization_config("gptq", linear))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_empty_zero_points_of_a_symmetric_router(version: str, bits: int) -> None:
    """gptqmodel 4.2.5 makes room for N // 32 * bits words a group, and so for none with 8 experts."""
    linear = random_linear(np.random.default_rng(0), 8, 128, bits=bits, act_order=True)
    tensors = {**ENCODERS[version](linear), "qzeros": torch.zeros(4, 0, dtype=torch.int32)}
    weight = decode(tensors, linear, quantization_config(version, linear))
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize(("n", "symmetric"), [(8, False), (32, True), (40, False)])
def test_empty_zero_points_elsewhere(n: int, symmetric: bool) -> None:
    """They say nothing of an asymmetric weight, and nobody writes them for 32 outputs and more."""
    linear = random_linear(np.random.default_rng(0), n, 128, symmetric=symmetric)
    tensors = {**gptq_v1(linear), "qzeros": torch.zeros(4, 0, dtype=torch.int32)}
    with pytest.raises(FormatError, match=rf"qzeros: got shape \[4, 0\], expected \[4, {n // 8}\]"):
        decode(tensors, linear, quantization_config("gptq", linear))


@pytest.mark.parametrize(("n", "k"), [(20, 64), (16, 60)])
def test_dimensions_that_fill_no_whole_words_are_refused(n: int, k: int) -> None:
    linear = random_linear(np.random.default_rng(0), n, k, symmetric=False)
    config = quantization_config("gptq_v2", linear)
    padded = gptq_v2(linear)
    cut = {**padded, "qweight": padded["qweight"][: k // 8], "qzeros": padded["qzeros"][:, : n // 8].contiguous()}
    for tensors in (padded, cut):
        with pytest.raises(QuantMoELoRAError, match=MODULE):
            decode(tensors, linear, config)
