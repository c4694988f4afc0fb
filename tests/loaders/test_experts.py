"""From a checkpoint to MoEQuantInfo: every format through files, and everything that must not load."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import PackedWeight
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_experts, load_layer
from quant_moelora.loaders.families import ExpertsSpec, Projection
from quant_moelora.loaders.layer_format import describe_layers
from tests.checkpoints import (
    BITS,
    ENCODERS,
    PLAIN_ORDER,
    W_NAMES,
    Layer,
    ct_config,
    definition,
    experts_spec,
    gptq_v1,
    gptq_v2,
    layer_tensors,
    mixtral_config,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    skeleton,
    write_checkpoint,
)

EXPERTS, HIDDEN, INTER = 3, 64, 96
PARENT = "model.layers.0.mlp.experts"
Tensors = dict[str, Tensor]


def load(folder: Path, spec: ExpertsSpec) -> MoEQuantInfo:
    """One layer, without building the model."""
    checkpoint = Checkpoint(folder)
    return load_layer(checkpoint, describe_layers(checkpoint, [spec], skeleton())[0], "cpu")


def check(info: MoEQuantInfo, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    for got, weight in zip(info.dequantize(), expected, strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        assert torch.equal(got, weight)


@pytest.fixture
def layer() -> Layer:
    return random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)


@pytest.fixture
def refuse(tmp_path: Path, layer: Layer) -> Callable[..., None]:
    """Load GPTQ tensors of ``layer`` after a change, and see what is raised."""

    def run(
        change: Callable[[Tensors], object],
        error: type[QuantMoELoRAError],
        message: str,
        **config: Any,
    ) -> None:
        tensors = layer_tensors(layer, gptq_v1)
        change(tensors)
        write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"], **config))
        with pytest.raises(error, match=message):
            load(tmp_path, experts_spec(layer))

    return run


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Layer]:
    """A format, and a layer that it can hold."""
    fmt = draw(st.sampled_from(sorted(ENCODERS)))
    bits = draw(st.sampled_from(BITS.get(fmt, (4, 8))))
    # Up to four columns, int4 and int8 of compressed-tensors take one word each; the other formats fill whole words.
    ragged = fmt in ("compressed-tensors", "int-quantized")
    dim = st.integers(5, 200) if ragged else st.integers(1, 25).map(lambda words: 8 * words)
    layer = random_layer(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.integers(1, 4)),
        draw(dim),
        draw(dim),
        bits=bits,
        group_size=draw(st.sampled_from((32, 64, 128, None, 16, 48))),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from((torch.float16, torch.bfloat16))),
        act_order=fmt not in PLAIN_ORDER and draw(st.booleans()),
    )
    return fmt, layer


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_layer_is_loaded_as_it_is_defined(case: tuple[str, Layer]) -> None:
    fmt, layer = case
    with tempfile.TemporaryDirectory() as folder:
        config = quantization_config(fmt, layer[0, "up"])
        write_checkpoint(Path(folder), layer_tensors(layer, ENCODERS[fmt]), quantization=config)
        check(load(Path(folder), experts_spec(layer)), definition(layer))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "mixtral by gate_proj", "mixtral in mlp"])
def test_load_experts_of_each_layer(tmp_path: Path, family: str) -> None:
    """Gate, up and down have their own values, so that w1, w3, w2 cannot be confused."""
    rng = np.random.default_rng(0)
    layers = {number: random_layer(rng, EXPERTS, HIDDEN, INTER, act_order=True) for number in (0, 1)}
    parent = "mlp" if family in ("qwen3_moe", "mixtral in mlp") else "block_sparse_moe"
    tensors: Tensors = {}
    for number, layer in layers.items():
        prefix = f"model.layers.{number}.{parent}.experts"
        names = {"names": W_NAMES} if family == "mixtral" else {}
        tensors |= layer_tensors(layer, gptq_v1, parent=prefix, **names)
    config = (qwen3_config if family == "qwen3_moe" else mixtral_config)(EXPERTS, HIDDEN, INTER, layers=2)
    write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", layers[0][0, "up"]))
    for number, layer in layers.items():
        info = load_experts(str(tmp_path), number, device="cpu")
        assert (info.num_experts, info.hidden_size, info.intermediate_size) == (EXPERTS, HIDDEN, INTER)
        assert info.scheme_name == "w4a16_g32_sym"
        check(info, definition(layer))


@pytest.mark.parametrize("ordered", [("gate",), ("up",), ("down",), ("gate", "down"), ("up", "down")], ids=" ".join)
@pytest.mark.parametrize("experts", [(0, 1, 2), (1,)], ids=["all", "one"])
def test_act_order_of_some(tmp_path: Path, layer: Layer, ordered: tuple[Projection, ...], experts: tuple[int]) -> None:
    """All have g_idx, and it says something for some projections or experts only."""
    rng = np.random.default_rng(1)
    for expert in experts:
        for projection in ordered:
            shape = layer[expert, projection].codes.shape
            layer[expert, projection] = random_linear(rng, *shape, act_order=True)
    write_checkpoint(tmp_path, layer_tensors(layer, gptq_v1), quantization=quantization_config("gptq", layer[0, "up"]))
    info = load(tmp_path, experts_spec(layer))
    assert (info.inter_perm is not None) == ("down" in ordered)
    check(info, definition(layer))


@pytest.mark.parametrize("number", [2, -1, 0])
def test_layer_out_of_range(tmp_path: Path, layer: Layer, number: int) -> None:
    config = qwen3_config(EXPERTS, HIDDEN, INTER, layers=2, mlp_only_layers=[0])
    write_checkpoint(tmp_path, layer_tensors(layer, gptq_v1), config)
    with pytest.raises(UnsupportedError, match=f"layer: got {number}, expected a layer with routed experts: 1; choose"):
        load_experts(tmp_path, number)


def test_layers_that_the_model_does_not_have_are_left_alone(tmp_path: Path, layer: Layer) -> None:
    """The experts of a multi-token-prediction layer follow the last one, and some are unquantised."""
    tensors = layer_tensors(layer, gptq_v1)
    tensors |= {f"model.layers.61.mlp.experts.{e}.up_proj.weight": torch.zeros(2, 2) for e in range(9)}
    config = qwen3_config(EXPERTS, HIDDEN, INTER)
    write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", layer[0, "up"]))
    check(load_experts(tmp_path, 0), definition(layer))


def test_mtp_experts_are_not_those_of_the_decoder(tmp_path: Path, layer: Layer) -> None:
    """Qwen3.5 has `mtp.layers.0` beside `model.language_model.layers.0`: another layer 0."""
    other = random_layer(np.random.default_rng(1), EXPERTS, HIDDEN, INTER)
    tensors = layer_tensors(other, gptq_v1, parent="mtp.layers.0.mlp.experts")
    tensors |= layer_tensors(layer, gptq_v1, parent="model.language_model.layers.0.mlp.experts")
    write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"]))
    check(load(tmp_path, experts_spec(layer)), definition(layer))


def test_mtp_experts_do_not_stand_in_for_missing_ones(tmp_path: Path, layer: Layer) -> None:
    tensors = layer_tensors(layer, gptq_v1, parent="mtp.layers.0.mlp.experts")
    write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"]))
    with pytest.raises(MissingTensorError):
        load(tmp_path, experts_spec(layer))


def test_down_may_have_another_scheme(tmp_path: Path) -> None:
    """As llm-compressor's mixed recipe writes it; one padding of the intermediate serves both."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, INTER, group_size=32)
    for expert in range(EXPERTS):
        layer[expert, "down"] = random_linear(rng, HIDDEN, INTER, bits=8, group_size=48, symmetric=False)
    write_checkpoint(tmp_path, layer_tensors(layer, ENCODERS["compressed-tensors"]))
    info = load(tmp_path, experts_spec(layer))
    assert info.scheme_name == "w4a16_g32_sym + w8a16_g48_asym"
    assert info.w13.n_pad == info.w2.k_pad == info.inter_pad == 192
    check(info, definition(layer))


def test_down_may_be_unquantised(tmp_path: Path, layer: Layer) -> None:
    tensors = {key: t for key, t in layer_tensors(layer, gptq_v1).items() if "down_proj" not in key}
    down = torch.randn(EXPERTS, HIDDEN, INTER).bfloat16()
    tensors |= {f"{PARENT}.{e}.down_proj.weight": down[e] for e in range(EXPERTS)}
    write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"]))
    info = load(tmp_path, experts_spec(layer))
    assert info.scheme_name == "w4a16_g32_sym + none"
    gate, up, _ = definition(layer)
    check(info, (gate, up, down.float()))


# What must not load.


def drop(tensors: Tensors, *parts: str) -> None:
    """Remove the tensors whose keys have all the parts."""
    for key in [key for key in tensors if all(part in key for part in parts)]:
        del tensors[key]


def test_missing_expert(refuse: Callable[..., None]) -> None:
    message = r"down projection of expert 1 in layer 0 .*3 of 9 projections.*tensors of .*experts\.1\.down_proj"
    refuse(lambda tensors: drop(tensors, "experts.1."), MissingTensorError, message)


def test_missing_projection(refuse: Callable[..., None]) -> None:
    message = r"down projection of expert 2 in layer 0 .*1 of 9 projections.*experts\.2\.down_proj"
    refuse(lambda tensors: drop(tensors, "experts.2.down_proj"), MissingTensorError, message)


def test_all_experts_missing(refuse: Callable[..., None]) -> None:
    def fuse(tensors: Tensors) -> None:
        tensors.clear()
        tensors[f"{PARENT}.all.qweight"] = torch.zeros(EXPERTS, 8, 192, dtype=torch.int32)

    refuse(fuse, MissingTensorError, r"which has .*experts\.all\.qweight instead: 9 of 9 projections")


@pytest.mark.parametrize("suffix", ["scales", "qweight", "qzeros"])
def test_missing_tensor_of_one_expert(refuse: Callable[..., None], suffix: str) -> None:
    message = rf"(?s){PARENT}\.1\.up_proj.*{suffix}"
    refuse(lambda tensors: drop(tensors, "experts.1.up_proj", suffix), FormatError, message)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
@pytest.mark.parametrize("config", [True, False])
def test_missing_packed_tensor_of_one_expert(tmp_path: Path, suffix: str, config: bool) -> None:
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER, symmetric=False)
    tensors = layer_tensors(layer, ENCODERS["compressed-tensors"])
    drop(tensors, "experts.1.up_proj", suffix)
    quantization = quantization_config("compressed-tensors", layer[0, "up"]) if config else None
    write_checkpoint(tmp_path, tensors, quantization=quantization)
    with pytest.raises(QuantMoELoRAError, match=rf"{PARENT}\.1\.up_proj"):
        load(tmp_path, experts_spec(layer))


def test_missing_g_idx_of_one_expert(refuse: Callable[..., None]) -> None:
    message = rf"format of {PARENT}\.1\.up_proj: got gptq w4a16_g32_sym with qweight, qzeros, scales, gptq, .*g_idx"
    refuse(lambda tensors: drop(tensors, "experts.1.up_proj.g_idx"), QuantMoELoRAError, message)


def test_surplus_expert(refuse: Callable[..., None]) -> None:
    def add(tensors: Tensors) -> None:
        tensors |= {k.replace("experts.2.", "experts.3."): t.clone() for k, t in tensors.items() if "experts.2." in k}

    message = rf"experts of layer 0: got {PARENT}\.3\.\w+_proj in model\.safetensors, expected experts 0 to 2"
    refuse(add, FormatError, message)


def test_misshapen_tensor_names_tensor_file_rule_and_remedy(refuse: Callable[..., None]) -> None:
    def cut(tensors: Tensors) -> None:
        key = f"{PARENT}.1.gate_proj.qweight"
        tensors[key] = tensors[key][:, :88].contiguous()

    message = (
        r"qweight: got shape \[8, 88\], expected \[8, 96\] for N=96, K=64, GPTQ int4 "
        rf"\({PARENT}\.1\.gate_proj\.qweight in model\.safetensors\); the shard is truncated, or config\.json"
    )
    refuse(cut, FormatError, message)


def test_model_of_another_size(tmp_path: Path, layer: Layer) -> None:
    write_checkpoint(tmp_path, layer_tensors(layer, gptq_v1), quantization=quantization_config("gptq", layer[0, "up"]))
    spec = experts_spec(layer)
    other = ExpertsSpec(spec.module, 0, EXPERTS, HIDDEN, 2 * INTER, spec.activation)
    with pytest.raises(FormatError, match=r"expected \[24, 64\] for N=64, K=192.*config\.json names other dimensions"):
        load(tmp_path, other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 64}, r"scales: got shape \[\d, \d+\], expected"),
        ({"bits": 8}, r"bits of .*experts\.0\.\w+_proj: got 4 from the tensors' shapes, expected 8, as the quant"),
        ({"checkpoint_format": "gptq_v2"}, "zero point 7, expected 8 everywhere.*checkpoint_format"),
    ],
)
def test_config_against_tensors(refuse: Callable[..., None], config: dict[str, Any], message: str) -> None:
    refuse(lambda _: None, FormatError, message, **config)


def test_v2_file_declared_v1(tmp_path: Path, layer: Layer) -> None:
    write_checkpoint(tmp_path, layer_tensors(layer, gptq_v2), quantization=quantization_config("gptq", layer[0, "up"]))
    with pytest.raises(FormatError, match=f"qzeros of {PARENT}.* zero point 9, expected 8 everywhere, since"):
        load(tmp_path, experts_spec(layer))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("module", [f"{PARENT}.2.up_proj", f"{PARENT}.0.gate_proj", f"{PARENT}.1.down_proj"])
def test_scales_that_are_not_finite(refuse: Callable[..., None], value: float, module: str) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{module}.scales"][1, 5] = value

    refuse(damage, FormatError, rf"scales of {module}: got values that are not finite")


def test_dense_weight_that_is_not_finite(tmp_path: Path, layer: Layer) -> None:
    tensors = layer_tensors(layer, lambda linear: {"weight": linear.weight.bfloat16()})
    tensors[f"{PARENT}.1.down_proj.weight"][3, 3] = torch.nan
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(FormatError, match=rf"weight of {PARENT}\.1\.down_proj: got values that are not finite"):
        load(tmp_path, experts_spec(layer))


def test_scales_of_another_dtype(refuse: Callable[..., None]) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[f"{PARENT}.0.up_proj.scales"] = tensors[f"{PARENT}.0.up_proj.scales"].float()

    message = rf"scales: got dtype torch.float32, expected torch.float16 or torch.bfloat16 .*{PARENT}\.0\.up_proj\.sca"
    refuse(widen, FormatError, message)


def test_one_expert_of_another_scale_dtype(refuse: Callable[..., None]) -> None:
    def cast(tensors: Tensors) -> None:
        tensors[f"{PARENT}.1.up_proj.scales"] = tensors[f"{PARENT}.1.up_proj.scales"].bfloat16()

    refuse(cast, UnsupportedError, rf"format of {PARENT}\.1\.up_proj: got gptq .* the format of {PARENT}\.0\.gate_proj")


def test_unknown_format(refuse: Callable[..., None]) -> None:
    def rename(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(".qweight")]:
            tensors[key.replace("qweight", "numbers")] = tensors.pop(key)

    message = rf"format of {PARENT}\.0\.down_proj: got .*numbers torch.int32 .*expected one of gptq .*awq .*compressed"
    refuse(rename, UnsupportedError, message)


def test_bias_is_not_dropped(refuse: Callable[..., None]) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{PARENT}.0.up_proj.bias"] = torch.zeros(INTER).half()

    refuse(add, UnsupportedError, rf"format of {PARENT}\.0\.up_proj: got bias torch\.float16 \[96\]")


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_experts_of_different_formats(refuse: Callable[..., None], projection: Projection) -> None:
    def unquantise(tensors: Tensors) -> None:
        module = f"{PARENT}.1.{projection}_proj"
        drop(tensors, module)
        tensors[f"{module}.weight"] = torch.zeros((HIDDEN, INTER) if projection == "down" else (INTER, HIDDEN)).half()

    message = rf"format of {PARENT}\.1\.{projection}_proj: got dense none with weight, .*expected gptq w4a16_g32_sym"
    refuse(unquantise, UnsupportedError, message)


@st.composite
def mixed_layers(draw: st.DrawFn) -> Layer:
    """Gate and up that differ in bits, symmetry and group size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layer = random_layer(rng, 2, draw(st.integers(5, 200)), 24)
    for projection in ("gate", "up"):
        bits, symmetric = draw(st.sampled_from((4, 8))), draw(st.booleans())
        size = draw(st.sampled_from((16, 32, 64, 128, None)))
        for expert in range(2):
            shape = layer[expert, projection].codes.shape
            layer[expert, projection] = random_linear(rng, *shape, bits=bits, group_size=size, symmetric=symmetric)
    return layer


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(mixed_layers())
def test_gate_and_up_of_different_schemes_are_promoted_exactly(layer: Layer) -> None:
    parts = (layer[0, "gate"], layer[0, "up"])
    with tempfile.TemporaryDirectory() as folder:
        # A short last group cannot be told from the number of scales.
        configs = [
            ct_config((rf"re:.*{p}_proj$",), num_bits=x.bits, group_size=x.group_size, symmetric=x.symmetric)
            for p, x in (("gate", parts[0]), ("up", parts[1]), ("down", layer[0, "down"]))
        ]
        groups = {f"group_{i}": c["config_groups"]["group_0"] for i, c in enumerate(configs)}
        tensors = layer_tensors(layer, ENCODERS["compressed-tensors"])
        write_checkpoint(Path(folder), tensors, quantization={**configs[0], "config_groups": groups})
        checkpoint = Checkpoint(folder)
        (fmt,) = describe_layers(checkpoint, [experts_spec(layer)], skeleton())
        info = load_layer(checkpoint, fmt, "cpu")
    check(info, definition(layer))
    assert isinstance(info.w13, PackedWeight)
    scheme = info.w13.scheme
    assert scheme.bits == max(part.bits for part in parts)
    assert scheme.symmetric == all(part.symmetric for part in parts)
    assert scheme.group_size == min((part.group_size for part in parts if part.group_size), default=None)
    meta = fmt.meta_info()
    assert meta.scheme_name == info.scheme_name
    assert {n: t.shape for n, t in meta.tensors().items()} == {n: t.shape for n, t in info.tensors().items()}


def test_act_order_cannot_be_promoted_to_smaller_groups(tmp_path: Path, layer: Layer) -> None:
    rng = np.random.default_rng(1)
    for expert in range(EXPERTS):
        layer[expert, "up"] = random_linear(rng, INTER, HIDDEN, group_size=None, bits=8)
        layer[expert, "gate"] = random_linear(rng, INTER, HIDDEN, act_order=True)
    encode = ENCODERS["compressed-tensors"]
    write_checkpoint(tmp_path, layer_tensors(layer, encode))
    check(load(tmp_path, experts_spec(layer)), definition(layer))  # groups that stay as they are
    for expert in range(EXPERTS):
        layer[expert, "up"] = random_linear(rng, INTER, HIDDEN, group_size=16)
    write_checkpoint(tmp_path, layer_tensors(layer, encode))
    with pytest.raises(
        UnsupportedError, match=r"g_idx of .*gate.*: got act-order in groups of 32, expected groups of 16"
    ):
        load(tmp_path, experts_spec(layer))


@pytest.mark.parametrize("change", [{"group_size": 48}, {"scale_dtype": torch.bfloat16}], ids=str)
def test_gate_and_up_of_schemes_that_have_none_in_common(tmp_path: Path, layer: Layer, change: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    for expert in range(EXPERTS):
        layer[expert, "up"] = random_linear(rng, INTER, HIDDEN, **change)
    config = None
    if "group_size" in change:  # short last groups need one
        config = ct_config((r"re:.*up_proj$",), group_size=48)
        config["config_groups"]["group_1"] = ct_config()["config_groups"]["group_0"]
    write_checkpoint(tmp_path, layer_tensors(layer, ENCODERS["compressed-tensors"]), quantization=config)
    with pytest.raises(
        UnsupportedError,
        match=rf"format of {PARENT}\.0\.up_proj: .*expected.*w4a16_g32_sym.*0\.gate_proj, which shares",
    ):
        load(tmp_path, experts_spec(layer))


def test_two_spellings_of_one_projection(refuse: Callable[..., None]) -> None:
    def add(tensors: Tensors) -> None:
        tensors |= {k.replace("gate_proj", "w1"): t.clone() for k, t in tensors.items() if "1.gate_proj" in k}

    message = (
        r"expert 1 of layer 0: got .*experts\.1\.(gate_proj|w1) and .*experts\.1\.(gate_proj|w1), expected one set"
    )
    refuse(add, FormatError, message)


def test_g_idx_outside_the_groups(refuse: Callable[..., None]) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{PARENT}.1.up_proj.g_idx"][-1] = 7

    refuse(damage, UnsupportedError, "g_idx: got groups of unequal size")
