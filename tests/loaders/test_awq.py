"""The AWQ codec against the format's definition."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quant_moelora.core.errors import FormatError, QuantMoELoRAError, UnsupportedError
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import Linear, awq, awq_gemv, gptq_v1, headers_of, quantization_config, random_linear

MODULE = "model.layers.0.mlp.experts.0.up_proj"


def decode(tensors: dict[str, torch.Tensor], linear: Linear, config: dict[str, Any]) -> CanonicalWeight:
    """What the library makes of one layer's tensors."""
    spec = LinearSpec(MODULE, *linear.codes.shape)
    headers = headers_of(tensors, MODULE)
    codec = find_codec(spec, headers, config)
    assert codec.name == "awq"
    weight = codec.decode(tensors, spec, codec.describe(spec, headers, config))
    assert isinstance(weight, CanonicalWeight)
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (128, 64), (256, 128), (96, None), (96, 128), (160, 64)])
@pytest.mark.parametrize("n", [8, 40, 128])  # 128 x 128 has the most ambiguous shapes
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_definition(symmetric: bool, k: int, group_size: int | None, n: int, scale_dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    linear = random_linear(rng, n, k, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = decode(awq(linear), linear, quantization_config("awq", linear))
    scheme = weight.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (4, group_size, symmetric)
    assert scheme.scale_dtype == scale_dtype
    assert (weight.zeros is None) == symmetric
    assert weight.g_idx is None
    assert np.array_equal(weight.codes.numpy(), linear.codes)
    assert torch.equal(weight.scales.view(torch.int16), linear.scales.view(torch.int16))
    assert torch.equal(weight.dequantize(), linear.weight)


def test_the_order_of_a_word() -> None:
    # Outputs 0 to 7 hold codes 0 to 7: nibbles 0, 2, 4, 6, 1, 3, 5, 7 from the lowest up.
    linear = random_linear(np.random.default_rng(0), 8, 32, symmetric=False)
    ramp = np.arange(8)[:, None]
    linear = replace(linear, codes=ramp.repeat(32, axis=1), zeros=ramp)
    tensors = awq(linear)
    assert (tensors["qweight"] == 0x75316420).all()
    assert (tensors["qzeros"] == 0x75316420).all()
    weight = decode(tensors, linear, quantization_config("awq", linear))
    assert weight.codes[:, 0].tolist() == list(range(8))
    assert not weight.dequantize().any()


def test_zero_points_are_not_one_less() -> None:
    linear = random_linear(np.random.default_rng(0), 8, 32)
    assert (awq(linear)["qzeros"] == 0x88888888 - 2**32).all()
    assert torch.equal(decode(awq(linear), linear, quantization_config("awq", linear)).dequantize(), linear.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("k", "group_size"),
    [(128, 32), (1056, 32), (128, 64), (1088, 64), (256, 128), (1152, 128), (512, 256), (128, None), (136, None)],
)  # rows of zero points of one word, of several, and of one group more than fills them
@pytest.mark.parametrize("n", [33, 40, 128, 17])  # GEMV does not pack along N. 128 x 128 and 17 x 136 are ambiguous
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_definition_of_gemv(symmetric: bool, k: int, group_size: int | None, n: int, scale_dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    linear = random_linear(rng, n, k, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = decode(awq_gemv(linear), linear, quantization_config("awq", linear, version="gemv"))
    scheme = weight.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (4, group_size, symmetric)
    assert np.array_equal(weight.codes.numpy(), linear.codes)
    assert weight.zeros is None if symmetric else np.array_equal(np.asarray(weight.zeros), linear.zeros)
    assert torch.equal(weight.scales.view(torch.int16), linear.scales.view(torch.int16))
    assert torch.equal(weight.dequantize(), linear.weight)


@pytest.mark.parametrize(("group_size", "words", "columns"), [(128, 1, 8), (64, 2, 16), (32, 4, 32)])
def test_gemv_pads_to_whole_words(group_size: int, words: int, columns: int) -> None:
    """Widths of AutoAWQ for K = 256: 2, 4 and 8 groups."""
    tensors = awq_gemv(random_linear(np.random.default_rng(0), 16, 256, group_size=group_size))
    assert tensors["qzeros"].shape == (16, words)
    assert tensors["scales"].shape == (16, columns)


def test_the_shape_tells_gemv_without_a_version() -> None:
    linear = random_linear(np.random.default_rng(0), 40, 128, symmetric=False)
    config = quantization_config("awq", linear)
    del config["version"]
    assert torch.equal(decode(awq_gemv(linear), linear, config).dequantize(), linear.weight)


@pytest.mark.parametrize("method", [{}, {"quant_method": None}])
def test_gptq_of_the_same_shape(method: dict[str, Any]) -> None:
    """N = K/8: [K/8, N] and [N, K/8]."""
    linear = random_linear(np.random.default_rng(0), 16, 128)
    tensors = gptq_v1(linear)
    del tensors["g_idx"]
    headers, config = headers_of(tensors, MODULE), quantization_config("gptq", linear) | method
    assert find_codec(LinearSpec(MODULE, 16, 128), headers, config).name == "gptq"


def test_square_weights_are_gemm_unless_the_config_says_gemv() -> None:
    linear = random_linear(np.random.default_rng(0), 128, 128, symmetric=False)
    config = quantization_config("awq", linear)
    del config["version"]
    assert torch.equal(decode(awq(linear), linear, config).dequantize(), linear.weight)
    for version, tensors in ((None, awq_gemv(linear)), ("gemm", awq_gemv(linear)), ("gemv", awq(linear))):
        with pytest.raises(FormatError, match=r"scales: got shape \[\d+, \d+\], expected"):
            decode(tensors, linear, {**config, "version": version})


@pytest.mark.parametrize(("k", "group_size"), [(128, 16), (160, 64), (96, None)])
def test_groups_that_gemv_does_not_have(k: int, group_size: int | None) -> None:
    linear = random_linear(np.random.default_rng(0), 16, k, group_size=group_size)
    with pytest.raises(
        UnsupportedError, match=rf"group_size of .*up_proj: got {group_size} for K={k}, expected 32, 64"
    ):
        decode(awq_gemv(linear), linear, quantization_config("awq", linear, version="gemv"))


def test_config_as_gptqmodel_writes_it() -> None:
    """`format` and `sym` for `version` and `zero_point`: the values are the same whatever the scheme is called."""
    linear = random_linear(np.random.default_rng(0), 16, 64)
    config = {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": 32, "sym": True, "pack_dtype": "int32"}
    assert torch.equal(decode(awq(linear), linear, config).dequantize(), linear.weight)


def test_old_names_of_the_config() -> None:
    linear = random_linear(np.random.default_rng(0), 16, 64, symmetric=False)
    config = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 32, "zero_point": True}
    assert torch.equal(decode(awq(linear), linear, config).dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"version": "gemv"},
            FormatError,
            "AWQ version of .*up_proj: got gemm from the tensors.* shapes, expected gemv",
        ),
        ({"version": "gemv_fast"}, UnsupportedError, "AWQ version of .*up_proj: got gemv_fast, expected gemm or gemv"),
        ({"rotation": "random"}, UnsupportedError, "quantization_config of .*up_proj: got rotation random"),
        ({"bits": 8}, FormatError, "bits of .*up_proj: got 4 from the tensors' shapes, expected 8"),
        ({"group_size": 64}, FormatError, r"scales: got shape \[4, 16\], expected \[2, 16\].*group_size 64"),
        ({"zero_point": False}, FormatError, "qzeros of .*up_proj: got zero point .*, expected 8 everywhere"),
    ],
)
def test_config_against_tensors(changes: dict[str, Any], error: type[QuantMoELoRAError], message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128, symmetric=False)
    with pytest.raises(error, match=message):
        decode(awq(linear), linear, quantization_config("awq", linear, **changes))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("qweight", torch.zeros(127, 2, dtype=torch.int32), r"qweight: got shape \[127, 2\], expected \[128, 2\]"),
        ("qzeros", torch.zeros(4, 3, dtype=torch.int32), r"qzeros: got shape \[4, 3\], expected \[4, 2\]"),
        ("scales", torch.zeros(4, 16), "scales: got dtype torch.float32"),
        ("qzeros", torch.zeros(4, 2, dtype=torch.float16), "qzeros: got dtype torch.float16, expected torch.int32"),
    ],
)
def test_tensors_of_another_shape_or_dtype(suffix: str, tensor: torch.Tensor, message: str) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 128)
    with pytest.raises(FormatError, match=rf"{message}.*{MODULE}\.{suffix} in model.safetensors"):
        decode({**awq(linear), suffix: tensor}, linear, quantization_config("awq", linear))


def test_outputs_that_fill_no_whole_words_are_refused() -> None:
    linear = random_linear(np.random.default_rng(0), 20, 64, symmetric=False)
    padded = awq(linear)
    cut = {**padded, "qweight": padded["qweight"][:, :2], "qzeros": padded["qzeros"][:, :2]}
    for tensors in (padded, cut):
        with pytest.raises(QuantMoELoRAError, match=MODULE):
            decode(tensors, linear, quantization_config("awq", linear))
