"""Experts that a tool rewrote in its own way, held to plain transformers with the weights that are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant_moelora.core.errors import MissingTensorError, UnsupportedError
from quant_moelora.integrations.parity import dense_twin, relative_rms
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.loaders.experts import load_experts
from tests.adapters import Tensors
from tests.checkpoints import Linear, compressed_tensors, gptq_v1, quantization_config, random_linear, write_checkpoint
from tests.integrations.models import HONEST, difference, load, logits
from tests.integrations.test_families import EXPERTS, IDS, quantise, saved


def config_of(folder: Path) -> dict[str, Any]:
    """config.json as transformers wrote it."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- gpt-oss by gptqmodel: gate_proj and up_proj are halves of gate_up, whose rows are gate and up by turns -----------

# What differs between the two halves of an expert.
HALVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alike": ({}, {}),
    "another number of bits": ({}, {"bits": 8}),
    "other groups": ({}, {"group_size": 16}),
}


def halves(folder: Path, model: Any, act_order: bool, first: dict[str, Any], second: dict[str, Any]) -> Tensors:
    """The checkpoint's tensors; the model's experts become what they mean, in its own axes and order."""
    rng = np.random.default_rng(0)
    held = {key: t for key, t in load_file(folder / "model.safetensors").items() if ".experts." not in key}

    def put(module: str, kwargs: dict[str, Any], rows: Tensor, bias: Tensor, g_idx: Any = None) -> Any:
        """Store a linear layer of random codes and set ``rows`` [N, K] to them."""
        linear = random_linear(rng, *rows.shape, act_order=act_order, **kwargs)
        if g_idx is not None:
            linear.g_idx[:] = g_idx
        held.update({f"{module}.{suffix}": tensor for suffix, tensor in gptq_v1(linear).items()})
        held[f"{module}.bias"] = bias.clone()
        rows.copy_(linear.weight)
        return linear.g_idx

    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            for e in range(EXPERTS):
                module = f"model.layers.{number}.mlp.experts.{e}"
                rows, bias = experts.gate_up_proj[e].T, experts.gate_up_proj_bias[e]
                inter = len(rows) // 2
                order = put(f"{module}.gate_proj", first, rows[:inter], bias[:inter])
                shared = order if act_order else None  # both halves see the same inputs when they are quantised
                put(f"{module}.up_proj", second, rows[inter:], bias[inter:], shared)
                put(f"{module}.down_proj", {}, experts.down_proj[e].T, experts.down_proj_bias[e])
    return held


def gptqmodel(**changes: Any) -> dict[str, Any]:
    """Its config."""
    linear = random_linear(np.random.default_rng(0), 8, 32)
    return quantization_config("gptq", linear, meta={"quantizer": ["gptqmodel:7.6.0"]}, **changes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("case", HALVES)
def test_gpt_oss_in_halves(tmp_path: Path, case: str, act_order: bool) -> None:
    if act_order and case == "other groups":
        pytest.skip("groups of different sizes have different maps")
    folder, original = saved(tmp_path, "gpt_oss")
    held = halves(folder, original, act_order, *HALVES[case])
    changes = HALVES[case][1]
    config = gptqmodel(dynamic={r"+:.*\.up_proj": changes} if changes else {})
    write_checkpoint(folder, held, config_of(folder), config)
    model = load(folder)
    assert difference(logits(model, IDS), logits(original, IDS)) < HONEST
    assert relative_rms(model, dense_twin(model), IDS) < HONEST

    info = load_experts(folder, 1)
    assert info.source_order == "interleaved"
    experts = original.model.layers[1].mlp.experts
    gate, up, down = info.dequantize()
    assert gate is not None
    for row in (0, 1, 47, 48, 95):  # on both sides of the cut
        assert torch.equal(gate[:, row], experts.gate_up_proj[:, :, 2 * row])
        assert torch.equal(up[:, row], experts.gate_up_proj[:, :, 2 * row + 1])
    assert torch.equal(down, experts.down_proj.transpose(1, 2))
    b13, b2 = info.biases()
    assert b13 is not None and b2 is not None
    assert torch.equal(b13, experts.gate_up_proj_bias.unflatten(1, (-1, 2)).transpose(1, 2))
    assert torch.equal(b2, experts.down_proj_bias)


def test_halves_with_different_act_orders_are_refused(tmp_path: Path) -> None:
    """A gate's rows would come from two orders of columns."""
    folder, original = saved(tmp_path, "gpt_oss")
    held = halves(folder, original, True, {}, {})
    key = "model.layers.1.mlp.experts.2.up_proj.g_idx"
    held[key] = held[key].flip(0).clone()
    write_checkpoint(folder, held, config_of(folder), gptqmodel())
    with pytest.raises(UnsupportedError, match=r"g_idx of model\.layers\.1\.mlp\.experts.*two act-orders in the"):
        load(folder)


# --- granite, one set of tensors for each expert and projection -------------------------------------------------------


def granite_tensors(folder: Path) -> tuple[Tensors, dict[str, Tensor]]:
    """The checkpoint without its experts, and each expert's projections by module."""
    held = load_file(folder / "model.safetensors")
    experts: dict[str, Tensor] = {}
    for number in range(2):
        block = f"model.layers.{number}.block_sparse_moe"
        gate_up, down = (held.pop(f"{block}.{name}_linear.weight") for name in ("input", "output"))
        for e in range(EXPERTS):
            gate, up = gate_up[e].chunk(2)
            for name, weight in (("gate", gate), ("up", up), ("down", down[e])):
                experts[f"{block}.experts.{e}.{name}_proj"] = weight.contiguous()
    return held, experts


def meant(folder: Path, held: Tensors, weights: dict[str, Tensor]) -> Any:
    """Plain transformers with these weights of the experts, from granite's own keys."""
    from transformers import AutoModelForCausalLM

    for number in range(2):
        block = f"model.layers.{number}.block_sparse_moe"
        parts = {
            name: torch.stack([weights[f"{block}.experts.{e}.{name}_proj"] for e in range(EXPERTS)])
            for name in ("gate", "up", "down")
        }
        held[f"{block}.input_linear.weight"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        held[f"{block}.output_linear.weight"] = parts["down"]
    write_checkpoint(folder, held, config_of(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def check_granite(folder: Path, plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The model, and its routers bit for bit."""
    model = load(folder)
    assert difference(logits(model, IDS), logits(plain, IDS)) < HONEST
    for number in range(2):
        name = f"model.layers.{number}.block_sparse_moe.router.weight"
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert "belong to nothing" not in caplog.text
    assert {m.moe.info.source_order for m in experts_of(model).values() if m.moe} == {"separate"}


def test_granite_by_gptqmodel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It quantises attention only, and writes the experts apart and the router under the model's name."""
    source, _ = saved(tmp_path / "source", "granitemoe")
    held, experts = granite_tensors(source)
    original = dict(held)
    linear: Linear | None = None
    for key in [key for key in held if ".self_attn." in key]:
        linear = quantise(held.pop(key))
        held |= {f"{key.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in gptq_v1(linear).items()}
        original[key] = linear.weight
    assert linear is not None
    for number in range(2):
        router = f"model.layers.{number}.block_sparse_moe.router"
        held[f"{router}.weight"] = held.pop(f"{router}.layer.weight")
    held |= {f"{module}.weight": weight for module, weight in experts.items()}
    config = quantization_config("gptq", linear, meta={"quantizer": ["gptqmodel:7.6.0"]})
    folder = write_checkpoint(tmp_path / "tool", held, config_of(source), config)
    check_granite(folder, meant(source, original, experts), caplog)

    lost = {key: tensor for key, tensor in held.items() if "layers.1.block_sparse_moe.router" not in key}
    write_checkpoint(folder, lost, config_of(folder))
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.block_sparse_moe\.router\.weight"):
        load(folder)


def test_granite_by_llm_compressor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It quantises the experts apart, and the router keeps granite's name."""
    source, _ = saved(tmp_path / "source", "granitemoe")
    held, experts = granite_tensors(source)
    linears = {module: quantise(weight) for module, weight in experts.items()}
    packed = {
        f"{module}.{suffix}": tensor
        for module, linear in linears.items()
        for suffix, tensor in compressed_tensors(linear).items()
    }
    config = quantization_config("compressed-tensors", next(iter(linears.values())))
    folder = write_checkpoint(tmp_path / "tool", held | packed, config_of(source), config)
    check_granite(folder, meant(source, held, {m: linear.weight for m, linear in linears.items()}), caplog)
