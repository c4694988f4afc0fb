"""Fused quantised experts: an expert's slice of a tensor is a linear layer, whose rows are all of gate, then of up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError, UnsupportedError
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.loaders.experts import load_experts
from tests.adapters import Tensors
from tests.checkpoints import (
    ENCODERS,
    PLAIN_ORDER,
    Encoder,
    Linear,
    awq_gemv,
    compressed_tensors,
    gptq_v2,
    quantization_config,
    qwen3_config,
    random_linear,
    write_checkpoint,
)
from tests.integrations.models import HONEST, difference, load, logits
from tests.integrations.test_families import IDS, quantise, saved

EXPERTS, HIDDEN, INTER = 3, 64, 40  # int4 words hold 8 rows: gate ends in the middle of none, nor on a tile
PARENT = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{PARENT}.gate_up_proj", f"{PARENT}.down_proj"
Layer = dict[str, list[Linear]]


def random_fused(inter: int = INTER, **kwargs: Any) -> Layer:
    """gate_up and down of every expert."""
    rng = np.random.default_rng(0)
    shapes = {GATE_UP: (2 * inter, HIDDEN), DOWN: (HIDDEN, inter)}
    return {name: [random_linear(rng, *shape, **kwargs) for _ in range(EXPERTS)] for name, shape in shapes.items()}


def dotted(name: str, suffix: str) -> str:
    """As the tensors of a module: gate_up_proj.qweight."""
    return f"{name}.{suffix}"


def underscored(name: str, suffix: str) -> str:
    """compressed-tensors' names on an experts module: gate_up_proj_packed, gate_up_proj_scale."""
    return name if suffix == "weight" else f"{name}_{suffix.removeprefix('weight_')}"


def stacked(layer: Layer, encode: Encoder, join: Callable[[str, str], str] = dotted) -> Tensors:
    """One tensor for each suffix and parameter, over all experts."""
    tensors: Tensors = {}
    for name, linears in layer.items():
        encoded = [encode(linear) for linear in linears]
        tensors |= {join(name, suffix): torch.stack([e[suffix] for e in encoded]) for suffix in encoded[0]}
    return tensors


def check(folder: Path, layer: Layer, inter: int = INTER) -> None:
    """Every weight is as it is defined."""
    info = load_experts(folder, 0)
    gate, up, down = info.dequantize()
    assert gate is not None
    expected = torch.stack([linear.weight for linear in layer[GATE_UP]])
    assert torch.equal(gate, expected[:, :inter])
    assert torch.equal(up, expected[:, inter:])
    assert torch.equal(down, torch.stack([linear.weight for linear in layer[DOWN]]))
    assert info.source_order == "concatenated"


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fmt", ENCODERS)
def test_fused_in_any_format(tmp_path: Path, fmt: str, symmetric: bool, act_order: bool) -> None:
    if act_order and fmt in PLAIN_ORDER:
        pytest.skip("the format has no act-order")
    bits = 8 if fmt == "int-quantized" else 4
    layer = random_fused(bits=bits, symmetric=symmetric, group_size=8, act_order=act_order)
    config = quantization_config(fmt, layer[DOWN][0])
    write_checkpoint(tmp_path, stacked(layer, ENCODERS[fmt]), qwen3_config(EXPERTS, HIDDEN, INTER), config)
    check(tmp_path, layer)


@pytest.mark.parametrize("inter", [40, 3], ids=["whole words", "a word of gate and up"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fmt", ["compressed-tensors", "int-quantized"])
def test_underscored_names(tmp_path: Path, fmt: str, symmetric: bool, inter: int) -> None:
    """As llm-compressor's repack_moe; gate may end within a word of zero points."""
    bits = 8 if fmt == "int-quantized" else 4
    layer = random_fused(inter, bits=bits, symmetric=symmetric, group_size=None)
    tensors = stacked(layer, ENCODERS[fmt], underscored)
    assert (GATE_UP if bits == 8 else f"{GATE_UP}_packed") in tensors
    config = quantization_config(fmt, layer[DOWN][0])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, inter), config)
    check(tmp_path, layer, inter)


def test_fused_awq_gemv(tmp_path: Path) -> None:
    layer = random_fused(96, group_size=32, symmetric=False)
    config = quantization_config("awq", layer[DOWN][0], version="gemv")
    write_checkpoint(tmp_path, stacked(layer, awq_gemv), qwen3_config(EXPERTS, HIDDEN, 96), config)
    check(tmp_path, layer, 96)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_scale_for_each_expert(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Strategy "tensor" over a fused weight: gate and up of an expert share its scale."""
    layer = random_fused(bits=8, group_size=None)
    for linears in layer.values():
        for linear in linears:
            linear.scales[:] = linear.scales[0, 0].clone()
    tensors = stacked(layer, ENCODERS["int-quantized"])
    for name in layer:
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:, 0, 0].reshape(EXPERTS, *shape).clone()
    config = quantization_config("int-quantized", layer[DOWN][0])
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    check(tmp_path, layer)


@pytest.mark.parametrize("shape", [[2], [EXPERTS + 1], [EXPERTS, 2]], ids=str)
def test_weight_shape_is_not_read(tmp_path: Path, shape: list[int]) -> None:
    """Nobody agrees on what it says of a fused tensor."""
    layer = random_fused(group_size=8)
    tensors = stacked(layer, compressed_tensors, underscored)
    tensors |= {f"{name}_shape": torch.ones(shape, dtype=torch.int64) for name in layer}
    config = quantization_config("compressed-tensors", layer[DOWN][0])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    check(tmp_path, layer)


def test_fused_gate_up_beside_an_unquantised_down(tmp_path: Path) -> None:
    layer = random_fused(group_size=8)
    tensors = {key: t for key, t in stacked(layer, gptq_v2).items() if not key.startswith(DOWN)}
    tensors[DOWN] = torch.randn(EXPERTS, HIDDEN, INTER, generator=torch.Generator().manual_seed(1)).bfloat16()
    config = quantization_config("gptq_v2", layer[DOWN][0])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    info = load_experts(tmp_path, 0)
    assert info.scheme_name == "w4a16_g8_sym + none"
    assert torch.equal(info.dequantize()[2], tensors[DOWN].float())


WHOLE = [
    ("qwen3_moe", "gptq_v2", dotted),
    ("qwen3_moe", "compressed-tensors", underscored),
    ("granitemoe", "compressed-tensors", dotted),
]


@pytest.mark.parametrize(("model_type", "fmt", "join"), WHOLE)
def test_whole_model(
    tmp_path: Path, model_type: str, fmt: str, join: Callable[[str, str], str], caplog: pytest.LogCaptureFixture
) -> None:
    """Held to plain transformers with the weights that are meant; granite's checkpoints rename the parameters."""
    from transformers import AutoModelForCausalLM

    folder, _ = saved(tmp_path, model_type, fused=model_type == "qwen3_moe")
    held: Tensors = {}
    meant: Tensors = {}
    config: dict[str, Any] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        held[key] = meant[key] = tensor
        if tensor.ndim == 3:
            linears = [quantise(matrix) for matrix in tensor]
            held |= stacked({key.removesuffix(".weight"): linears}, ENCODERS[fmt], join)
            meant[key] = torch.stack([linear.weight for linear in linears])
            del held[key]
            config = quantization_config(fmt, linears[0])
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder, held, own, config)
    model = load(folder)
    assert {m.moe.info.scheme_name for m in experts_of(model).values() if m.moe} == {"w4a16_g32_sym"}
    write_checkpoint(folder, meant, own)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert difference(logits(model, IDS), logits(plain, IDS)) < HONEST
    assert "belong to nothing" not in caplog.text


# --- what must not load -------------------------------------------------------------------------------------------


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


BROKEN: dict[str, tuple[Callable[[Tensors], object], type[QuantMoELoRAError], str]] = {
    "no scales": (lambda t: t.pop(f"{DOWN}.scales"), MissingTensorError, r"scales of .*experts\.down_proj"),
    "no down": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(DOWN)],
        MissingTensorError,
        "down projection of expert 0",
    ),
    "scales of two": (
        lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][:2].clone()}),
        MissingTensorError,
        r"scales of .*experts\.down_proj",
    ),
    "an expert too many": (
        lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][[0, 1, 2, 0]].clone()}),
        FormatError,
        "experts 0 to 2",
    ),
    "rows missing": (
        lambda t: t.update({f"{GATE_UP}.qweight": t[f"{GATE_UP}.qweight"][..., :-8].clone()}),
        FormatError,
        r"qweight: got shape \[8, 72\], expected \[8, 80\] .*expert 0 of .*gate_up_proj\.qweight",
    ),
    "twice": (
        lambda t: t.update({f"{GATE_UP}{rest}": torch.ones(EXPERTS, 8, 80) for rest in ("_scales", ".weight_scales")}),
        FormatError,
        "gate_up_proj: got .*gate_up_proj.*scales .*and .*scales.* one weight_scales",
    ),
    "one beside": (
        lambda t: t.update({GATE_UP: torch.zeros(EXPERTS, 2 * INTER, HIDDEN)}),
        UnsupportedError,
        r"format of .*gate_up_proj: got .*qweight.*weight torch\.float32",
    ),
    "another name": (
        lambda t: rename(t, f"{GATE_UP}.qzeros", f"{GATE_UP}_qzeros"),
        UnsupportedError,
        r"format of .*gate_up_proj: got .*weight_qzeros",
    ),
    "both forms": (
        lambda t: t.update({f"{PARENT}.0.up_proj.qweight": torch.zeros(8, INTER, dtype=torch.int32)}),
        FormatError,
        r"experts\.0\.up_proj and .*gate_up_proj.* not both",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path: Path, case: str) -> None:
    edit, error, match = BROKEN[case]
    layer = random_fused(group_size=8)
    tensors = stacked(layer, gptq_v2)
    edit(tensors)
    config = quantization_config("gptq_v2", layer[DOWN][0])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    with pytest.raises(error, match=match):
        load_experts(tmp_path, 0)


@pytest.mark.parametrize("join", [dotted, underscored])
def test_interleaved_families_are_refused(tmp_path: Path, join: Callable[[str, str], str]) -> None:
    """Nothing says whether gate and up of gpt-oss stand by turns in a fused quantised tensor too."""
    folder, model = saved(tmp_path, "gpt_oss")
    held: Tensors = {}
    for key, tensor in model.state_dict().items():
        held[key] = tensor
        if tensor.ndim == 3:
            linears = [random_linear(np.random.default_rng(0), *matrix.T.shape) for matrix in tensor]
            held |= stacked({key: linears}, compressed_tensors, join)
            del held[key]
    write_checkpoint(folder, held, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with pytest.raises(UnsupportedError, match=r"gate and up of .*gate_up_proj: got fused quantised .*by turns"):
        load_experts(folder, 0)
