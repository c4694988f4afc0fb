"""Unquantised weights."""

import pytest
import torch

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.registry import find_codec
from tests.checkpoints import headers_of

SPEC = LinearSpec("model.layers.0.mlp.experts.0.up_proj", 24, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [{}, {"quant_method": "gptq", "bits": 4}])
def test_the_weight_itself(dtype: torch.dtype, config: dict[str, object]) -> None:
    """Whatever the config says: a router or an attention that was left out has a plain weight."""
    tensors = {"weight": torch.randn(24, 40).to(dtype)}
    codec = find_codec(SPEC, headers_of(tensors), config)
    assert codec.name == "dense"
    fmt = codec.describe(SPEC, headers_of(tensors), config)
    assert fmt.scheme is None
    assert codec.decode(tensors, SPEC, fmt) is tensors["weight"]


def test_formats_of_different_dtypes_differ() -> None:
    def describe(dtype: torch.dtype) -> object:
        headers = headers_of({"weight": torch.zeros(24, 40, dtype=dtype)})
        return find_codec(SPEC, headers, {}).describe(SPEC, headers, {})

    assert describe(torch.float16) == describe(torch.float16)
    assert describe(torch.float16) != describe(torch.bfloat16)


def test_misshapen_weight() -> None:
    headers = headers_of({"weight": torch.zeros(40, 24)}, SPEC.module)
    message = r"weight: got shape \[40, 24\], expected \[24, 40\] for N=24, K=40, unquantised .*up_proj.weight in model"
    with pytest.raises(FormatError, match=message):
        find_codec(SPEC, headers, {}).describe(SPEC, headers, {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    headers = headers_of({"weight": torch.zeros(24, 40).to(dtype)}, SPEC.module)
    with pytest.raises(UnsupportedError, match=rf"format of {SPEC.module}: got (.*: )?weight {dtype} \[24, 40\]"):
        find_codec(SPEC, headers, {})
