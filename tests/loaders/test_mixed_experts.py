"""Experts of one layer in several schemes: promoted where every value stays, refused where not."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from quant_moelora.cli import app
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.weights import PackedWeight
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.layer_format import LinearsFormat, describe_layers
from tests.checkpoints import (
    ENCODERS,
    PROJ_NAMES,
    PROJECTIONS,
    Layer,
    Linear,
    ct_config,
    definition,
    experts_spec,
    int_quantized,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    skeleton,
    write_checkpoint,
)

EXPERTS, HIDDEN, INTER = 4, 64, 96
PARENT = "model.layers.0.mlp.experts"


def gptq_config(layer: Layer, fmt: str) -> dict[str, Any]:
    """What gptqmodel writes: the config of the first, and overrides of those that differ."""
    rules = {
        rf"+:.*\.experts\.{expert}\.{PROJ_NAMES[projection]}$": {
            "bits": linear.bits,
            "group_size": linear.group_size or -1,
            "sym": linear.symmetric,
        }
        for (expert, projection), linear in layer.items()
    }
    return quantization_config(fmt, layer[0, "gate"], dynamic=rules)


def ct_groups(layer: Layer) -> dict[str, Any]:
    """What llm-compressor writes: one group for each."""
    groups: dict[str, Any] = {}
    for (expert, projection), linear in layer.items():
        target = rf"re:.*\.experts\.{expert}\.{PROJ_NAMES[projection]}$"
        args: dict[str, Any] = {"num_bits": linear.bits, "group_size": linear.group_size, "symmetric": linear.symmetric}
        groups[f"group_{len(groups)}"] = ct_config((target,), **args)["config_groups"]["group_0"]
    return {**ct_config(), "config_groups": groups}


def describe(folder: Path, layer: Layer) -> tuple[Checkpoint, LinearsFormat]:
    checkpoint = Checkpoint(folder)
    (fmt,) = describe_layers(checkpoint, [experts_spec(layer)], skeleton())
    assert isinstance(fmt, LinearsFormat)
    return checkpoint, fmt


def check(folder: Path, layer: Layer) -> LinearsFormat:
    """Every weight is as it is defined, and w13 and w2 have each the least scheme that holds all of theirs."""
    checkpoint, fmt = describe(folder, layer)
    info = load_layer(checkpoint, fmt, "cpu")
    for got, expected in zip(info.dequantize(), definition(layer), strict=True):
        assert got is not None
        assert torch.equal(got, expected)
    for weight, down in ((info.w13, False), (info.w2, True)):
        parts = [linear for (_, projection), linear in layer.items() if (projection == "down") == down]
        assert isinstance(weight, PackedWeight)
        assert weight.scheme.bits == max(part.bits for part in parts)
        assert weight.scheme.symmetric == all(part.symmetric for part in parts)
        assert weight.scheme.group_size == min((p.group_size for p in parts if p.group_size), default=None)
    assert fmt.meta_info().scheme_name == info.scheme_name
    return fmt


@st.composite
def mixed_layers(draw: st.DrawFn) -> tuple[str, Layer]:
    """Every projection of every expert in a scheme of its own."""
    fmt = draw(st.sampled_from(("gptq", "gptq_v2", "compressed-tensors")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layer = random_layer(rng, 3, 8 * draw(st.integers(1, 16)), 8 * draw(st.integers(1, 16)))
    # Zero points are tensors that compressed-tensors writes or not, and all layers of a projection must have the same.
    symmetric = {p: draw(st.booleans()) for p in PROJECTIONS}
    for (expert, projection), linear in layer.items():
        layer[expert, projection] = random_linear(
            rng,
            *linear.codes.shape,
            bits=draw(st.sampled_from((4, 8))),
            symmetric=symmetric[projection] if fmt == "compressed-tensors" else draw(st.booleans()),
            group_size=draw(st.sampled_from((16, 32, 64, None))),
        )
    return fmt, layer


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(mixed_layers())
def test_any_mixture_is_promoted_exactly(case: tuple[str, Layer]) -> None:
    fmt, layer = case
    config = ct_groups(layer) if fmt == "compressed-tensors" else gptq_config(layer, fmt)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), layer_tensors(layer, ENCODERS[fmt]), quantization=config)
        check(Path(folder), layer)


def test_one_expert_of_more_bits(tmp_path: Path) -> None:
    """With act-order everywhere; `inspect` shows both formats."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, INTER, act_order=True)
    for projection in PROJECTIONS:
        layer[2, projection] = random_linear(rng, *layer[2, projection].codes.shape, bits=8, act_order=True)
    tensors = layer_tensors(layer, ENCODERS["gptq"])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), gptq_config(layer, "gptq"))
    fmt = check(tmp_path, layer)
    assert [members for members, _ in fmt.groups("up", range(EXPERTS))] == [[0, 1, 3], [2]]
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert found["experts"][0]["formats"] == dict.fromkeys(PROJECTIONS, "gptq w4a16_g32_sym, gptq w8a16_g32_sym")


def test_act_order_of_one_scheme_only(tmp_path: Path) -> None:
    """Experts whose map says nothing stand beside others that have one."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, INTER)
    for projection in PROJECTIONS:
        layer[1, projection] = random_linear(rng, *layer[1, projection].codes.shape, bits=8, act_order=True)
    write_checkpoint(tmp_path, layer_tensors(layer, ENCODERS["gptq_v2"]), quantization=gptq_config(layer, "gptq_v2"))
    check(tmp_path, layer)


def test_two_codecs(tmp_path: Path) -> None:
    """llm-compressor's mixed-precision: int8 is not packed, int4 is."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, INTER)
    for projection in PROJECTIONS:
        layer[3, projection] = random_linear(rng, *layer[3, projection].codes.shape, bits=8, group_size=None)

    def encode(linear: Linear) -> dict[str, Tensor]:
        return int_quantized(linear) if linear.bits == 8 else ENCODERS["compressed-tensors"](linear)

    write_checkpoint(tmp_path, layer_tensors(layer, encode), quantization=ct_groups(layer))
    check(tmp_path, layer)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("change", [{"group_size": 48}, {"scale_dtype": torch.bfloat16}], ids=str)
def test_schemes_without_a_common_one(tmp_path: Path, projection: Any, change: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, 96, 96)
    layer[2, projection] = random_linear(rng, 96, 96, **change)
    write_checkpoint(tmp_path, layer_tensors(layer, ENCODERS["gptq"]), quantization=gptq_config(layer, "gptq"))
    module = re.escape(f"{PARENT}.2.{PROJ_NAMES[projection]}")
    with pytest.raises(UnsupportedError, match=rf"format of {module}: got gptq .*expected gptq w4a16_g32_sym.* shares"):
        describe(tmp_path, layer)


@pytest.mark.parametrize(
    ("sizes", "served"), [((64, 96, 32), True), ((None, 32, 48), False), ((96, 64, None), False)], ids=str
)
def test_the_smallest_groups_divide_all(tmp_path: Path, sizes: tuple[int | None, ...], served: bool) -> None:
    """Whatever the order: 96 and 64 have only 32 in common."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, 3, 192, 192)
    for expert, size in enumerate(sizes):
        for projection in PROJECTIONS:
            layer[expert, projection] = random_linear(rng, 192, 192, group_size=size)
    write_checkpoint(tmp_path, layer_tensors(layer, ENCODERS["gptq"]), quantization=gptq_config(layer, "gptq"))
    if served:
        check(tmp_path, layer)
        return
    with pytest.raises(UnsupportedError, match=rf"format of {PARENT}\.\d\.\w+: .* sizes that the smallest divides"):
        describe(tmp_path, layer)


@pytest.mark.parametrize("dense", [(1,), (0, 1, 2)], ids=["one", "all but one"])
def test_unquantised_beside_quantised_experts(tmp_path: Path, dense: tuple[int, ...]) -> None:
    """16-bit floats are no integers times a scale."""
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    modules = [f"{PARENT}.{expert}.down_proj" for expert in dense]
    tensors = layer_tensors(layer, ENCODERS["gptq"])
    tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] not in modules}
    tensors |= {f"{module}.weight": torch.zeros(HIDDEN, INTER).half() for module in modules}
    write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"]))
    with pytest.raises(UnsupportedError, match=rf"format of {PARENT}\.\d\.down_proj: got dense none with weight"):
        describe(tmp_path, layer)


def test_dense_experts_of_different_dtypes(tmp_path: Path) -> None:
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    tensors = layer_tensors(layer, lambda linear: {"weight": linear.weight.bfloat16()})
    key = f"{PARENT}.1.up_proj.weight"
    write_checkpoint(tmp_path, tensors | {key: tensors[key].half()})
    with pytest.raises(UnsupportedError, match=rf"format of {PARENT}\.\d\.\w+_proj: got dense none .*float16.*float16"):
        describe(tmp_path, layer)
