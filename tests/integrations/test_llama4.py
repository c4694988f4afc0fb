"""Llama 4: the router's weight on the input, MoE and dense layers in turns, multimodal checkpoints, adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quant_moelora.cli.inspect import describe
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.llama4 import route_in_block
from quant_moelora.integrations.parity import dense_twin, relative_rms
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.integrations.verify import verify
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_experts
from quant_moelora.loaders.families import build_skeleton, find_experts
from quant_moelora.loaders.layer_format import describe_layers
from tests.adapters import Dims, Tensors, expert_lora, linear_lora, write_adapter
from tests.checkpoints import ENCODERS, PLAIN_ORDER, Linear, quantization_config, write_checkpoint
from tests.integrations.models import EFFECT, HONEST, PROJECTIONS, ROUNDING, difference, generate, load, logits
from tests.integrations.test_families import EXPERTS, HIDDEN, IDS, INTER, quantise, saved

MODEL_TYPE = "llama4_text"
LAYERS = (1, 3)  # those with routed experts, of four
DIMS = Dims(EXPERTS, HIDDEN, INTER, LAYERS, "feed_forward")
SHARED = "model.layers.3.feed_forward.shared_expert.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def slices(original: Any, layer: int, expert: int) -> dict[str, Tensor]:
    """Views [N, K] of one expert's weights, by its definition: y = x W with [E, H, 2I], gate first, and [E, I, H]."""
    experts = original.model.layers[layer].feed_forward.experts
    gate, up = experts.gate_up_proj[expert].chunk(2, dim=1)
    return {"gate_proj": gate.T, "up_proj": up.T, "down_proj": experts.down_proj[expert].T}


def per_expert(folder: Path, original: Any, fmt: str, act_order: bool = False) -> tuple[Tensors, Linear]:
    """Tensors of a checkpoint with one module an expert and projection, as llm-compressor linearises the block.

    These and the MLPs are quantised, as in its recipe for this family; the original gets the weights that they mean.
    """
    held: Tensors = {}
    linears: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if "feed_forward." in key and key.endswith("_proj.weight"):
            linears[key.removesuffix(".weight")] = original.get_parameter(key)
        elif ".experts." not in key:
            held[key] = tensor
    for layer in LAYERS:
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.feed_forward.experts.{expert}"
            linears |= {f"{prefix}.{name}": view for name, view in slices(original, layer, expert).items()}
    linear = quantise(torch.ones(1, 32))
    with torch.no_grad():
        for module, weight in linears.items():
            if fmt == "dense":
                held[f"{module}.weight"] = weight.detach().clone(memory_format=torch.contiguous_format)
                continue
            linear = quantise(weight, act_order)
            held |= {f"{module}.{suffix}": tensor for suffix, tensor in ENCODERS[fmt](linear).items()}
            weight.copy_(linear.weight)
    return held, linear


def write(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None, wrapped: bool) -> None:
    """A checkpoint of the text model alone, or inside a multimodal one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if wrapped:
        config = {"model_type": "llama4", "text_config": config}
        tensors = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(HIDDEN, 8)
    write_checkpoint(folder, tensors, config, quantization)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("fmt", "act_order"),
    [(fmt, act_order) for fmt in ("compressed-tensors", "gptq_v2", "awq") for act_order in (False, True)]
    + [("dense", False)],
)
def test_per_expert(tmp_path: Path, fmt: str, act_order: bool, wrapped: bool) -> None:
    """Held to plain transformers with the dequantised weights."""
    folder, original = saved(tmp_path, MODEL_TYPE)
    before = logits(original, IDS)
    act_order = act_order and fmt not in PLAIN_ORDER
    tensors, linear = per_expert(folder, original, fmt, act_order)
    write(folder, tensors, None if fmt == "dense" else quantization_config(fmt, linear), wrapped)
    model = load(folder)
    expected = logits(original, IDS)
    assert (difference(expected, before) > EFFECT) == (fmt != "dense"), "the experts count"
    assert difference(logits(model, IDS), expected) < HONEST
    assert relative_rms(model, dense_twin(model), IDS) < HONEST
    infos = [module.moe.info for module in experts_of(model).values() if module.moe]
    assert [module.spec.layer for module in experts_of(model).values()] == list(LAYERS)
    assert {info.scheme_name for info in infos} == {"none" if fmt == "dense" else "w4a16_g32_sym"}
    assert all((info.inter_perm is not None) == act_order for info in infos)


@pytest.mark.parametrize("wrapped", [False, True])
def test_fused(tmp_path: Path, wrapped: bool) -> None:
    folder, original = saved(tmp_path, MODEL_TYPE)
    write(folder, load_file(folder / "model.safetensors"), None, wrapped)
    model = load(folder)
    assert difference(logits(model, IDS), logits(original, IDS)) < HONEST
    assert relative_rms(model, dense_twin(model), IDS) < HONEST
    found = verify(folder, folder)
    assert found.ok
    assert [(row.layer, row.relative_error) for row in found.projections] == [(n, 0) for n in LAYERS for _ in range(3)]
    (kind,) = describe(str(folder))["experts"]
    assert (kind["layers"], kind["num_experts"], kind["intermediate_size"]) == (list(LAYERS), EXPERTS, INTER)


def test_one_layer(tmp_path: Path) -> None:
    """load_experts and MoEExperts against the definition: each chosen expert of the scaled token."""
    folder, original = saved(tmp_path, MODEL_TYPE)
    info = load_experts(folder, 3)
    assert (info.router_weight, info.source_order) == ("input", "concatenated")
    checkpoint = Checkpoint(folder)
    skeleton = build_skeleton(checkpoint)
    (layer,) = describe_layers(checkpoint, find_experts(skeleton)[1:], skeleton)
    assert (layer.spec.layer, layer.meta_info().router_weight) == (3, "input")
    for got, name in zip(info.dequantize(), ("gate_proj", "up_proj", "down_proj"), strict=True):
        assert got is not None
        assert all(torch.equal(got[expert], slices(original, 3, expert)[name]) for expert in range(EXPERTS))
    x, ids, weights = torch.randn(5, HIDDEN), torch.rand(5, EXPERTS).topk(2).indices, torch.rand(5, 2)
    expected = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for token in range(5):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            held = {name: view.detach().double() for name, view in slices(original, 3, expert).items()}
            scaled = weight * x[token].double()
            h = nn.functional.silu(held["gate_proj"] @ scaled) * (held["up_proj"] @ scaled)
            expected[token] += held["down_proj"] @ h
    # float32 after each of two products, which are summed in float64, in the activation and in the sum.
    assert difference(MoEExperts(info)(x, ids, weights), expected) < 2**-24 * 8
    with pytest.raises(UnsupportedError, match=r"layer: got 2, expected a layer with routed experts: 1, 3"):
        load_experts(folder, 2)


@torch.no_grad()
def test_router_logits(tmp_path: Path) -> None:
    """Recorded as in the family's model, which names either the block or its router as their source."""
    folder, original = saved(tmp_path, MODEL_TYPE)
    expected, got = (m.model(IDS, output_router_logits=True).router_logits for m in (original, load(folder)))
    assert len(expected) == len(got) == len(LAYERS)
    assert all(difference(mine, theirs) < HONEST for mine, theirs in zip(got, expected, strict=True))


def test_a_block_of_another_family_is_refused() -> None:
    model = PreTrainedModel(PreTrainedConfig())
    model.add_module("block", nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match=r"block block \(Linear\): got experts without routing"):
        route_in_block(model, "block")


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """One on some experts of all layers, one on all of the last one and on layers beside them."""
    scale = {"A": 1.0, "B": 0.3}
    some = expert_lora(DIMS, PROJECTIONS, experts=[0, 2], seed=5)
    more = expert_lora(DIMS, PROJECTIONS, layers=[3], rank=3, seed=6)
    more |= linear_lora(SHARED, INTER, HIDDEN, seed=7) | linear_lora(QUERY, HIDDEN, HIDDEN, seed=8)
    return {
        name: write_adapter(tmp_path / name, {key: t * scale[key.split(".lora_")[1][0]] for key, t in tensors.items()})
        for name, tensors in (("some", some), ("more", more))
    }


def merged(original: Any, adapter: Path) -> Any:
    """The family's own model with an adapter in its weights: W + scaling * B A."""
    model = copy.deepcopy(original)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            module, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
            if not is_a:
                continue
            delta = 8 / len(a) * tensors[key.replace(".lora_A.", ".lora_B.")] @ a  # lora_alpha is 8
            block, experts, name = module.partition(".experts.")
            if experts:
                expert, projection = name.split(".")
                slices(model, int(block.split(".")[2]), int(expert))[projection].add_(delta)
            else:
                model.get_submodule(module).weight.add_(delta)
    return model


@pytest.mark.parametrize("fmt", ["compressed-tensors", "fused"])
def test_adapters(tmp_path: Path, adapters: dict[str, Path], fmt: str) -> None:
    """A mixed batch, row by row, against plain transformers with merged weights."""
    folder, original = saved(tmp_path / "m", MODEL_TYPE)
    if fmt != "fused":
        tensors, linear = per_expert(folder, original, fmt)
        write(folder, tensors, quantization_config(fmt, linear), wrapped=False)
    model = load(folder)
    names = ["some", BASE_NAME, "more"]
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(2))
    base = logits(model, ids)
    attach_adapters(model, adapters)
    got = logits(model, ids, names)
    assert torch.equal(got[1], base[1]), "a row without an adapter is bitwise the base's"
    assert torch.equal(logits(model, ids), base)
    for row, name in ((0, "some"), (2, "more")):
        expected = logits(merged(original, adapters[name]), ids[row : row + 1])
        assert difference(got[row : row + 1], expected) < HONEST, name
        assert difference(got[row], base[row]) > EFFECT, name


def test_generation_of_a_mixed_batch(tmp_path: Path, adapters: dict[str, Path]) -> None:
    """Requests of other lengths, padded on the left: each row is the request alone, and a base row is bitwise so."""
    folder, original = saved(tmp_path / "m", MODEL_TYPE)
    tensors, linear = per_expert(folder, original, "compressed-tensors")
    write(folder, tensors, quantization_config("compressed-tensors", linear), wrapped=False)
    model, names = load(folder), ["more", BASE_NAME, "some", BASE_NAME]
    generator = torch.Generator().manual_seed(3)
    requests = [torch.randint(3, 64, (length,), generator=generator) for length in (3, 8, 5, 1)]
    before = generate(model, requests)
    attach_adapters(model, adapters)
    mixed = generate(model, requests, names)
    for row, name in enumerate(names):
        alone = generate(model, requests[row : row + 1], [name])
        assert torch.equal(mixed.tokens[row], alone.tokens[0]), row
        # Twice the layers of the models that the bound is for.
        assert difference(mixed.logits[row], alone.logits[0]) < 2 * ROUNDING, row
        assert torch.equal(mixed.logits[row], before.logits[row]) == (name == BASE_NAME), row
        assert (difference(mixed.logits[row, 0], before.logits[row, 0]) > EFFECT) == (name != BASE_NAME), row


def test_bfloat16(tmp_path: Path) -> None:
    """As near to float32 as the family's own model in bfloat16 is."""
    folder, original = saved(tmp_path, MODEL_TYPE)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = logits(original, IDS)
    theirs = difference(logits(plain, IDS), expected)
    assert difference(logits(load(folder, dtype=torch.bfloat16), IDS), expected) < 1.5 * theirs
