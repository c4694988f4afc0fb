"""Adapters that target routers too, against PEFT on the family's own unquantised model, alone and in mixed batches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quant_moelora.core.errors import AdapterError
from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.loaders.families import find_experts
from quant_moelora.loaders.routers import find_routers
from quant_moelora.lora.adapter_file import load_adapter
from quant_moelora.lora.export import export_adapter
from tests.adapters import WEIGHTS, Dims, Tensors, linear_lora, write_adapter
from tests.integrations.models import EFFECT, ROUNDING, difference, generate, load, logits, session_names
from tests.integrations.test_families import EXPERTS, HIDDEN, INTER, saved, tiny_model

FAMILIES = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "granitemoe",
    "gpt_oss",
    "phimoe",
    "minimax_m2",
    "ernie4_5_moe",
    "llama4_text",
]
IDS = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(2))
# of the classical files: routers and experts are linear layers, under transformers 4's names
CLASSICAL = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def routers(model: Any) -> list[str]:
    return list(find_routers(model, find_experts(model)))


def write_with_peft(model: Any, folder: Path, targets: Iterable[str], seed: int) -> Tensor:
    """An adapter on parameters and o_proj as PEFT makes and saves it, and the logits of the model with it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=3,
        lora_alpha=12,
        target_parameters=list(targets),
        target_modules=["o_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(folder))
    return logits(adapted, IDS)


def classical(model_type: str, folder: Path, seed: int = 5, **config: Any) -> Path:
    """An adapter of transformers 4 on router, experts and attention, all of them linear layers then."""
    block, names = CLASSICAL[model_type]
    tensors: Tensors = {}
    for layer in (0, 1):
        module = f"model.layers.{layer}"
        linears = {f"{module}.{block}.gate": (EXPERTS, HIDDEN), f"{module}.self_attn.q_proj": (HIDDEN, HIDDEN)}
        for expert in range(EXPERTS):
            for name, shape in zip(names, ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)), strict=True):
                linears[f"{module}.{block}.experts.{expert}.{name}"] = shape
        for name, shape in linears.items():
            tensors |= linear_lora(name, *shape, seed=seed + 31 * len(tensors))
    # B is made small enough for the adapter to change the model and not to drown it.
    tensors = {key: tensor * 0.1 if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    return write_adapter(folder, tensors, target_modules=["gate", "q_proj", *names], **config)


def plain(folder: Path) -> Any:
    """The family's own model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_mixed(model: Any, alone: dict[str, Tensor], before: Tensor) -> None:
    """Each adapter's rows in batches of all of them are PEFT's, and the base's rows bitwise those without adapters."""
    names = [*alone, BASE_NAME]
    for shift in range(len(names)):
        chosen = [names[(row + shift) % len(names)] for row in range(len(IDS))]
        mixed = logits(model, IDS, chosen)
        for row, name in enumerate(chosen):
            if name == BASE_NAME:
                assert torch.equal(mixed[row], before[row])
            else:
                assert difference(mixed[row], alone[name][row]) < ROUNDING, name
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_target_parameters_on_routers(tmp_path: Path, model_type: str) -> None:
    """An adapter on routers, one on experts too, one on experts only: PEFT's logits, and back through an export."""
    folder, original = saved(tmp_path / "m", model_type)
    specs = find_experts(original)
    weights, experts = [f"{name}.weight" for name in routers(original)], ["experts.gate_up_proj", "experts.down_proj"]
    targets = {"router": weights, "both": weights + experts, "experts": experts}
    alone = {
        name: write_with_peft(plain(folder), tmp_path / name, held, seed)
        for seed, (name, held) in enumerate(targets.items())
    }
    model = load(folder)
    before = logits(model, IDS)
    attach_adapters(model, {name: tmp_path / name for name in ("router", "both")})
    attach_adapters(model, {"experts": tmp_path / "experts"})
    for name, expected in alone.items():
        assert difference(before, expected) > EFFECT
        assert difference(logits(model, IDS, [name] * len(IDS)), expected) < ROUNDING, name
    check_mixed(model, alone, before)

    adapter = load_adapter(tmp_path / "both", specs)
    export_adapter(adapter, specs, tmp_path / "apart", "per_expert", model_type)
    export_adapter(load_adapter(tmp_path / "apart", specs), specs, tmp_path / "fused", "fused", model_type)
    got = logits(PeftModel.from_pretrained(plain(folder), str(tmp_path / "fused")).eval(), IDS)
    assert torch.equal(got, alone["both"])


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("model_type", CLASSICAL)
def test_classical_modules(tmp_path: Path, model_type: str) -> None:
    """PEFT converts such files for transformers 5; Mixtral's block has another name in them than in the model."""
    folder, _ = saved(tmp_path / "m", model_type)
    adapter = classical(model_type, tmp_path / "x")
    expected = logits(PeftModel.from_pretrained(plain(folder), str(adapter)).eval(), IDS)
    model = load(folder)
    before = logits(model, IDS)
    attach_adapters(model, {"x": adapter})
    assert difference(before, expected) > EFFECT
    assert difference(logits(model, IDS, ["x"] * len(IDS)), expected) < ROUNDING
    check_mixed(model, {"x": expected}, before)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_export_of_a_classical_router(tmp_path: Path) -> None:
    """Fused: a parameter, as transformers 5 has it, if its name is the same there. Per expert: as it was read."""
    folder, original = saved(tmp_path / "m", "qwen3_moe")
    specs = find_experts(original)
    source = classical("qwen3_moe", tmp_path / "x", alpha_pattern={"gate": 20})
    adapter = load_adapter(source, specs)
    assert adapter.linears["model.layers.1.mlp.gate"].scaling == 20 / 4
    export_adapter(adapter, specs, tmp_path / "apart", "per_expert", "qwen3_moe")
    got, expected = load_file(tmp_path / "apart" / WEIGHTS), load_file(source / WEIGHTS)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    export_adapter(adapter, specs, tmp_path / "fused", "fused", "qwen3_moe")
    fused = load_adapter(tmp_path / "fused", specs)
    assert fused.config.target_parameters is not None and "mlp.gate.weight" in fused.config.target_parameters
    assert fused.linears["model.layers.1.mlp.gate"].scaling == 20 / 4
    model = load(folder)
    attach_adapters(model, {"x": source})
    theirs = logits(PeftModel.from_pretrained(plain(folder), str(tmp_path / "fused")).eval(), IDS)
    assert difference(logits(model, IDS, ["x"] * len(IDS)), theirs) < ROUNDING

    specs = find_experts(tiny_model("mixtral"))
    renamed = load_adapter(classical("mixtral", tmp_path / "y"), specs)
    message = r"a router under the name model\.layers\.0\.block_sparse_moe\.gate.*per_expert form"
    with pytest.raises(AdapterError, match=message):
        export_adapter(renamed, specs, tmp_path / "z", "fused", "mixtral")
    export_adapter(renamed, specs, tmp_path / "z", "per_expert", "mixtral")
    got, expected = load_file(tmp_path / "z" / WEIGHTS), load_file(tmp_path / "y" / WEIGHTS)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("pattern", ["mlp.gate.weight", r"layers\.1\.mlp\.gate\.weight", "gate"])
def test_patterns_match_the_parameters_name(tmp_path: Path, pattern: str) -> None:
    """``gate`` alone is the name of a module, and matches no parameter."""
    _, original = saved(tmp_path / "m", "qwen3_moe")
    config = LoraConfig(
        r=3, lora_alpha=6, alpha_pattern={pattern: 21}, target_parameters=["mlp.gate.weight"], target_modules=[]
    )
    adapted: Any = get_peft_model(original, config)
    adapted.save_pretrained(str(tmp_path / "x"))
    adapter = load_adapter(tmp_path / "x", Dims(EXPERTS, HIDDEN, INTER).specs())
    assert len(adapter.linears) == 2
    for name, factor in adapter.linears.items():
        wrapper = adapted.base_model.model.get_submodule(name)
        assert factor.scaling == wrapper.scaling["default"], name
    assert any(factor.scaling == 21 / 3 for factor in adapter.linears.values()) == (pattern != "gate")


def test_weight_and_delta_are_added_in_the_weights_dtype(tmp_path: Path) -> None:
    """Also the sum is rounded to bfloat16, as PEFT's parametrisation does it."""
    folder, original = saved(tmp_path / "m", "qwen3_moe")
    write_with_peft(original, tmp_path / "x", [f"{name}.weight" for name in routers(original)], 3)
    model = load(folder, dtype=torch.bfloat16)
    attach_adapters(model, {"x": tmp_path / "x"})
    name = "model.layers.1.mlp.gate"
    factor = load_adapter(tmp_path / "x", find_experts(original)).linears[name]
    gate, x = model.get_submodule(name), torch.randn(6, HIDDEN).bfloat16()
    weight = gate.weight + (factor.scaling * (factor.b @ factor.a)).bfloat16()
    session = model.get_submodule("model.layers.1.mlp.experts").session
    with torch.no_grad(), session.choose(["x", BASE_NAME], 2, torch.device("cpu")):
        got = gate(x)
    assert torch.equal(got[0][:3], nn.functional.linear(x, weight)[:3])
    assert torch.equal(got[0][3:], nn.functional.linear(x, gate.weight)[3:])
    assert torch.equal(got[2][:3].sort().values, got[0][:3].topk(2).indices.sort().values)


def test_generate(tmp_path: Path) -> None:
    folder, original = saved(tmp_path / "m", "deepseek_v3")
    write_with_peft(original, tmp_path / "x", [f"{name}.weight" for name in routers(original)], 3)
    model = load(folder)
    requests = [IDS[0, :5], IDS[1], IDS[2, :3]]
    before = generate(model, requests)
    attach_adapters(model, {"x": tmp_path / "x"})
    mixed = generate(model, requests, ["x", BASE_NAME, "x"])
    assert torch.equal(mixed.logits[1], before.logits[1])
    for row in (0, 2):
        alone = generate(model, requests[row : row + 1], ["x"])
        assert torch.equal(mixed.tokens[row], alone.tokens[0])
        assert difference(mixed.logits[row], alone.logits[0]) < ROUNDING
        assert difference(mixed.logits[row], before.logits[row]) > EFFECT


def test_recorded_router_logits_are_those_of_the_adapters(tmp_path: Path) -> None:
    """transformers records them by hooks of its own: one a layer, from what the model goes on with."""
    folder, original = saved(tmp_path / "m", "qwen3_moe")
    write_with_peft(original, tmp_path / "x", [f"{name}.weight" for name in routers(original)], 3)
    model, twin = load(folder), PeftModel.from_pretrained(plain(folder), str(tmp_path / "x")).eval()
    with torch.no_grad():
        base = model(IDS, output_router_logits=True).router_logits
        attach_adapters(model, {"x": tmp_path / "x"})
        got = model(IDS, output_router_logits=True, adapter_names=["x"] * len(IDS)).router_logits
        expected = twin(IDS, output_router_logits=True).router_logits
    assert len(got) == len(expected) == len(base) == 2
    for ours, theirs, without in zip(got, expected, base, strict=True):
        assert difference(ours, theirs) < ROUNDING
        assert difference(ours, without) > EFFECT


# --- refusals ---------------------------------------------------------------------------------------------------------

GATE = "model.layers.0.mlp.gate"
MISFITS: dict[str, tuple[Tensors, str]] = {
    "other experts": (linear_lora(GATE, EXPERTS + 1, HIDDEN), r"mlp\.gate in .*B \[5, 4\].*A \[r, 64\] and B \[4, r\]"),
    "other hidden size": (linear_lora(GATE, EXPERTS, HIDDEN + 1), r"mlp\.gate in .*A \[4, 65\].*A \[r, 64\]"),
    "embedding": (linear_lora("model.embed_tokens", 64, HIDDEN), r"LoRA on model\.embed_tokens, .*embeddings are not"),
    "layer without": (linear_lora("model.layers.7.mlp.gate", EXPERTS, HIDDEN), r"layers\.7\.mlp\.gate, which is no"),
    "two names": (
        linear_lora(GATE, EXPERTS, HIDDEN) | linear_lora("model.layers.0.block_sparse_moe.gate", EXPERTS, HIDDEN),
        r"under another name on model\.layers\.0\.mlp\.gate, which is the same module",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_nothing_is_attached_if_a_router_does_not_fit(tmp_path: Path, case: str) -> None:
    tensors, match = MISFITS[case]
    folder, _ = saved(tmp_path / "m", "mixtral")
    model = load(folder)
    before = logits(model, IDS)
    good = write_adapter(tmp_path / "good", linear_lora(GATE, EXPERTS, HIDDEN))
    with pytest.raises(AdapterError, match=match):
        attach_adapters(model, {"good": good, "x": write_adapter(tmp_path / "x", tensors)})
    assert session_names(model) == []
    assert torch.equal(logits(model, IDS), before)
    assert not model.get_submodule(GATE)._forward_hooks
    attach_adapters(model, {"good": good})
    assert difference(logits(model, IDS, ["good"] * len(IDS)), before) > EFFECT


@pytest.mark.parametrize("held", ["[1, 4]", "list"])
def test_a_router_whose_outputs_are_not_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    folder, _ = saved(tmp_path / "m", "mixtral")
    router = type(plain(folder).get_submodule(GATE))
    forward = router.forward

    def with_load(self: Any, hidden_states: Tensor) -> tuple[Any, ...]:
        out = forward(self, hidden_states)
        return (*out, out[0].sum(0, keepdim=True) if held == "[1, 4]" else [out[0]])

    monkeypatch.setattr(router, "forward", with_load)
    model = load(folder)
    attach_adapters(model, {"x": write_adapter(tmp_path / "x", linear_lora(GATE, EXPERTS, HIDDEN))})
    message = rf"adapter x on router {GATE}: got {held.replace('[', chr(92) + '[')} among .*each of the 28 tokens"
    with pytest.raises(AdapterError, match=message):
        logits(model, IDS, ["x"] * len(IDS))
