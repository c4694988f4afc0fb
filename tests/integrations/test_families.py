"""Families of transformers: tiny random models in their own checkpoint's keys, unquantised and as GPTQ int4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.integrations.parity import dense_twin, relative_rms
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.integrations.verify import verify
from quant_moelora.loaders.expert_keys import parse_expert_module
from quant_moelora.loaders.experts import load_experts
from quant_moelora.loaders.families import find_experts
from tests.adapters import Tensors
from tests.checkpoints import ENCODERS, Linear, gptq_v2, quantization_config, write_checkpoint
from tests.integrations.models import EFFECT, HONEST, difference, load, logits

EXPERTS, HIDDEN, INTER, GROUP = 4, 64, 96, 32
# Every family takes what it knows of these and ignores the others; intermediate sizes differ, so that a mistaken one
# shows.
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "moe_intermediate_size": INTER,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Random weights in these widths reach the size that trained ones have with a deviation of about K**-0.5.
    "initializer_range": 0.1,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GROUPS = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "mixtral": {},
    "olmoe": {},
    "deepseek_v2": LATENT | GROUPS | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | GROUPS,
    "glm4_moe": GROUPS,
    "phimoe": {},
    "minimax_m2": {},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1},
    "granitemoe": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 0.5},
    "llama4_text": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128},
}
# Those whose checkpoints have one tensor for each expert and projection.
SEPARATE = [name for name in FAMILIES if name not in ("granitemoe", "gpt_oss", "llama4_text")]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def tiny_model(model_type: str) -> Any:
    """A random model of a family, in float32; also what its initialisation sets to 0 is random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | FAMILIES[model_type]))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):  # among them e_score_correction_bias, which changes who is chosen
                tensor.normal_(std=0.1)
    return model.float().eval()


def saved(folder: Path, model_type: str, fused: bool = False) -> tuple[Path, Any]:
    """A family's checkpoint, in its original keys unless the model's own are asked for, and its model."""
    model = tiny_model(model_type)
    model.save_pretrained(folder, save_original_format=not fused)
    return folder, model


def quantise(
    weight: Tensor,  # (N, K)
    act_order: bool = False,
) -> Linear:
    """Codes and scales of a symmetric int4 weight, rounded to nearest; groups of scattered columns with act-order."""
    n, k = weight.shape
    g_idx = np.arange(k) // GROUP
    if act_order:
        g_idx = np.random.default_rng(k).permutation(g_idx)
    groups = torch.stack([weight.double()[:, g_idx == group].abs().amax(-1) for group in range(k // GROUP)], dim=1)
    scales = (groups / 7).to(torch.float16)
    codes = (weight.double() / scales.double()[:, g_idx]).round().clamp(-8, 7) + 8
    return Linear(
        bits=4,
        group_size=GROUP,
        symmetric=True,
        codes=codes.long().numpy(),
        zeros=np.full((n, k // GROUP), 8),
        scales=scales,
        g_idx=g_idx,
        act_order=act_order,
    )


def quantise_experts(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """A checkpoint with its experts in GPTQ int4, the same with the weights that they mean, and the config for it."""
    packed: Tensors = {}
    meant: Tensors = {}
    linear: Linear | None = None
    for key, tensor in load_file(folder / "model.safetensors").items():
        module = key.removesuffix(".weight")
        if parse_expert_module(module):
            linear = quantise(tensor)
            packed |= {f"{module}.{suffix}": held for suffix, held in gptq_v2(linear).items()}
            meant[key] = linear.weight
        else:
            packed[key] = meant[key] = tensor
    assert linear is not None, "the checkpoint has per-expert keys"
    return packed, meant, quantization_config("gptq_v2", linear)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_unquantised(tmp_path: Path, model_type: str) -> None:
    folder, original = saved(tmp_path, model_type)
    model = load(folder)
    assert difference(logits(model, IDS), logits(original, IDS)) < HONEST
    assert list(experts_of(model)) == [spec.module for spec in find_experts(original)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_but_the_experts_is_as_transformers_loads_it(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    """Bit for bit and in the same dtype: some families keep a router's correction in float32."""
    from transformers import AutoModelForCausalLM

    folder, _ = saved(tmp_path, model_type)
    model = load(folder, dtype=dtype)
    experts = tuple(f"{name}." for name in experts_of(model))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    held = model.state_dict()
    assert held.keys() == {name for name in plain if not name.startswith(experts)}
    for name, tensor in held.items():
        assert tensor.dtype == plain[name].dtype, name
        assert torch.equal(tensor, plain[name]), name


def plain_logits(folder: Path, meant: Tensors) -> Tensor:
    """What plain transformers makes of a checkpoint with these weights."""
    from transformers import AutoModelForCausalLM

    save_file(meant, folder / "model.safetensors", {"format": "pt"})
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS)


@pytest.mark.parametrize("model_type", SEPARATE)
def test_gptq(tmp_path: Path, model_type: str) -> None:
    """Held to plain transformers with the dequantised weights, in the checkpoint and in the loaded model."""
    folder, original = saved(tmp_path, model_type)
    packed, meant, config = quantise_experts(folder)
    expected = plain_logits(folder, meant)
    assert difference(expected, logits(original, IDS)) > EFFECT, "the experts count"

    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder, packed, held, config)
    model = load(folder)
    assert {m.moe.info.scheme_name for m in experts_of(model).values() if m.moe} == {"w4a16_g32_sym"}
    assert difference(logits(model, IDS), expected) < HONEST
    assert relative_rms(model, dense_twin(model), IDS) < HONEST


def beside(prefixes: tuple[str, ...]) -> Tensors:
    """Quantised and plain tensors of modules that the causal language model does not have."""
    linear = quantise(torch.randn(HIDDEN, HIDDEN))
    modules = [f"{prefix}.{name}" for prefix in prefixes for name in ("attn.qkv", "mlp.experts.0.up_proj")]
    quantised = {f"{module}.{s}": t for module in modules for s, t in gptq_v2(linear).items()}
    return quantised | {f"{prefix}.norm.weight": torch.zeros(3) for prefix in prefixes}


def moved(key: str) -> str:
    """A key of the text model in a multimodal one."""
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


@pytest.mark.parametrize("whole", [False, True])
def test_gptq_inside_a_multimodal_model(tmp_path: Path, whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen3.5 as it is published: a prefix, dynamic rules, mtp and visual beside; whole: with a multimodal config."""
    folder, _ = saved(tmp_path, "qwen3_5_moe_text")
    packed, meant, config = quantise_experts(folder)
    expected = plain_logits(folder, meant)
    packed = {moved(key): tensor for key, tensor in packed.items()}
    packed |= beside(("mtp.layers.0", "model.visual.blocks.0"))
    rules = ("-:.*attn.*", "-:.*shared_expert.*", "-:.*mtp.*", "-:.*visual.*")
    config["dynamic"] = {"lm_head": {}, "model.language_model.embed_tokens": {}} | {rule: {} for rule in rules}
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder, packed, {"model_type": "qwen3_5_moe", "text_config": text} if whole else text, config)
    assert difference(logits(load(folder), IDS), expected) < HONEST
    assert "experts" not in caplog.text


def test_gptq_of_deepseek_with_its_extra_layer(tmp_path: Path) -> None:
    """Layer 61 predicts further tokens, and transformers leaves it out."""
    folder, _ = saved(tmp_path, "deepseek_v3")
    packed, _, config = quantise_experts(folder)
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder, packed, held, config)
    expected = logits(load(folder), IDS)
    write_checkpoint(folder, packed | beside(("model.layers.61",)), held, config)
    assert torch.equal(logits(load(folder), IDS), expected)


# Fused experts: granitemoe's checkpoints have them under names of their own, the others under the model's.
FUSED = [("granitemoe", False), ("granitemoe", True), ("qwen3_moe", True), ("qwen3_5_moe_text", True)]


@pytest.mark.parametrize(("model_type", "own_keys"), FUSED)
def test_fused_experts(tmp_path: Path, model_type: str, own_keys: bool, caplog: pytest.LogCaptureFixture) -> None:
    folder, original = saved(tmp_path, model_type, own_keys)
    solid = {key for key, tensor in load_file(folder / "model.safetensors").items() if tensor.ndim == 3}
    assert any("experts.gate_up_proj" in key for key in solid) == own_keys
    model = load(folder)
    assert difference(logits(model, IDS), logits(original, IDS)) < HONEST
    assert {m.moe.info.source_order for m in experts_of(model).values() if m.moe} == {"concatenated"}
    assert "belong to nothing" not in caplog.text
    gate, up, down = load_experts(folder, 1).dequantize()
    experts = original.get_submodule(find_experts(original)[1].module)
    assert gate is not None
    assert torch.equal(torch.cat((gate, up), dim=1), experts.gate_up_proj)
    assert torch.equal(down, experts.down_proj)


# --- gpt-oss: transposed, interleaved, with biases -----------------------------------------------------------------


def gpt_oss_experts(original: Any, layer: int) -> dict[tuple[str, str], Tensor]:
    """Weights [E, N, K] and biases [E, N] of a layer, by its definition."""
    experts = original.model.layers[layer].mlp.experts
    return {
        ("gate_proj", "weight"): experts.gate_up_proj[:, :, 0::2].transpose(1, 2),
        ("up_proj", "weight"): experts.gate_up_proj[:, :, 1::2].transpose(1, 2),
        ("down_proj", "weight"): experts.down_proj.transpose(1, 2),
        ("gate_proj", "bias"): experts.gate_up_proj_bias[:, 0::2],
        ("up_proj", "bias"): experts.gate_up_proj_bias[:, 1::2],
        ("down_proj", "bias"): experts.down_proj_bias,
    }


def check_biases(folder: Path, original: Any) -> None:
    for layer in (0, 1):
        expected = gpt_oss_experts(original, layer)
        b13, b2 = load_experts(folder, layer).biases()
        assert b13 is not None and b2 is not None
        assert torch.equal(b13[:, 0], expected["gate_proj", "bias"])
        assert torch.equal(b13[:, 1], expected["up_proj", "bias"])
        assert torch.equal(b2, expected["down_proj", "bias"])


def test_gpt_oss_fused(tmp_path: Path) -> None:
    folder, original = saved(tmp_path, "gpt_oss")
    info = load_experts(folder, 1)
    expected = gpt_oss_experts(original, 1)
    for got, name in zip(info.dequantize(), ("gate_proj", "up_proj", "down_proj"), strict=True):
        assert got is not None
        assert torch.equal(got, expected[name, "weight"])
    assert info.source_order == "interleaved"
    check_biases(folder, original)
    model = load(folder)
    assert relative_rms(model, dense_twin(model), IDS) < HONEST


def test_verify_of_renamed_experts(tmp_path: Path) -> None:
    """Granite's tensors are found by transformers' renamings, in the model verified and in the dense one."""
    folder, _ = saved(tmp_path, "granitemoe")
    found = verify(folder, folder)
    assert found.ok and all(row.relative_error == 0 for row in found.projections)


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq_v2", "dense"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gpt_oss_per_expert(tmp_path: Path, fmt: str, act_order: bool) -> None:
    """One set of tensors for each expert and projection; the act-order of down moves the rows of w13's biases."""
    folder, original = saved(tmp_path, "gpt_oss")
    held = {k: t for k, t in load_file(folder / "model.safetensors").items() if ".experts." not in k}
    linear = quantise(torch.ones(1, GROUP))
    with torch.no_grad():
        for layer in (0, 1):
            for (name, suffix), tensors in gpt_oss_experts(original, layer).items():
                for expert, tensor in enumerate(tensors):
                    module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                    if suffix == "bias" or fmt == "dense":
                        held[f"{module}.{suffix}"] = tensor.detach().contiguous().clone()
                        continue
                    linear = quantise(tensor, act_order)
                    held |= {f"{module}.{key}": value for key, value in ENCODERS[fmt](linear).items()}
                    tensor.copy_(linear.weight)  # a view of the original's parameter
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_checkpoint(folder, held, config, None if fmt == "dense" else quantization_config(fmt, linear))
    model = load(folder)
    assert difference(logits(model, IDS), logits(original, IDS)) < HONEST
    assert relative_rms(model, dense_twin(model), IDS) < HONEST
    permuted = act_order and fmt != "dense"
    assert all((m.moe.info.inter_perm is not None) == permuted for m in experts_of(model).values() if m.moe)
    check_biases(folder, original)

    key = "model.layers.1.mlp.experts.2.up_proj.bias"
    write_checkpoint(
        folder, {k: t for k, t in held.items() if k != key}, json.loads((folder / "config.json").read_text())
    )
    with pytest.raises(MissingTensorError, match=r"bias of model\.layers\.1\.mlp\.experts\.2\.up_proj"):
        load(folder)


def stacked(tensors: Tensors, key: str, change: Any) -> Tensors:
    return tensors | {key: change(tensors[key]).contiguous()}


GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
BROKEN: dict[str, tuple[Any, type[FormatError], str]] = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != DOWN}, MissingTensorError, "down projection of expert 0"),
    "too few": (lambda t: stacked(t, DOWN, lambda w: w[:-1]), MissingTensorError, "down projection of expert 3"),
    "too many": (
        lambda t: stacked(t, GATE_UP, lambda w: w.repeat(2, 1, 1)),
        FormatError,
        r"experts of layer 1.*gate_up_proj.*experts 0 to 3",
    ),
    "rows missing": (
        lambda t: stacked(t, GATE_UP, lambda w: w[:, :-1]),
        FormatError,
        r"shape \[191, 64\].*expert 0 of model\.layers\.1",
    ),
    "transposed": (lambda t: stacked(t, DOWN, lambda w: w.transpose(1, 2)), FormatError, r"\[96, 64\].*\[64, 96\]"),
    "twice": (
        lambda t: t | {"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(INTER, HIDDEN)},
        FormatError,
        "experts.0.up_proj and .*gate_up_proj.* not both",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_fused_experts(tmp_path: Path, case: str) -> None:
    edit, error, match = BROKEN[case]
    folder, _ = saved(tmp_path, "qwen3_moe", True)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=match):
        load(folder)


def test_fused_experts_that_transformers_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter of tensors that have the parameter's own name, as for transposed ones, must not be overlooked."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", operations=[Transpose(1, 2)])
    folder, _ = saved(tmp_path, "qwen3_moe", True)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(UnsupportedError, match=r"experts\.down_proj: got a tensor that transformers converts into"):
        load_experts(folder, 1)
