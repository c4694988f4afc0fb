"""export_adapter: what is written is read back bit for bit, and stock PEFT computes the same with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.expert_keys import expert_modules
from quant_moelora.loaders.families import ExpertsSpec, build_skeleton, find_experts
from quant_moelora.lora.adapter_file import Adapter, Factor, load_adapter
from quant_moelora.lora.export import Form, export_adapter
from tests.adapters import CONFIG, PREFIX, WEIGHTS, Dims, Tensors, attention_lora, expert_lora, fused_lora
from tests.adapters import write_adapter as write

GOLDEN = Path(__file__).parents[1] / "golden"
FUSED_RSLORA = GOLDEN / "adapters" / "lora-tp-rslora-qwen3moe-r8"
MODULES = GOLDEN / "adapters" / "lora-mod-qwen3moe-r4"
BASES = {"qwen3_moe": "base-qwen3moe-h128-i96", "mixtral": "base-mixtral-h128-i128"}
DIMS = Dims(experts=3, hidden=8, inter=5)
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PER_EXPERT = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = "model.layers.0.mlp.experts"


def specs_of(model_type: str) -> list[ExpertsSpec]:
    return find_experts(build_skeleton(Checkpoint(GOLDEN / "checkpoints" / BASES[model_type])))


def same_factor(got: Factor, expected: Factor) -> bool:
    return torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b) and got.scaling == expected.scaling


def same(got: Adapter, expected: Adapter) -> bool:
    """All factors and scalings, bit for bit."""
    ours, theirs = ({(n, *key): f for n, held in x.layers.items() for key, f in held.items()} for x in (got, expected))
    return (
        (ours.keys(), got.linears.keys()) == (theirs.keys(), expected.linears.keys())
        and all(same_factor(ours[key], factor) for key, factor in theirs.items())
        and all(same_factor(got.linears[name], factor) for name, factor in expected.linears.items())
    )


def export(adapter: Adapter, folder: Path, form: Form, specs: list[ExpertsSpec] | None = None, **kw: str) -> Adapter:
    specs = DIMS.specs() if specs is None else specs
    export_adapter(adapter, specs, folder, form, kw.get("model_type", "qwen3_moe"))
    return load_adapter(folder, specs)


def load(folder: Path, tensors: Tensors, **config: Any) -> Adapter:
    return load_adapter(write(folder, tensors, **config), DIMS.specs())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


GOLDENS = {
    GOLDEN / "adapters" / "lora-tp-mixtral-r4": "mixtral",
    GOLDEN / "adapters" / "lora-tp-qwen3moe-r8": "qwen3_moe",
    GOLDEN / "adapters" / "lora-tp-peft018-qwen3moe-r8": "qwen3_moe",
    FUSED_RSLORA: "qwen3_moe",
}


@pytest.mark.parametrize("source", GOLDENS, ids=lambda source: source.name)
def test_fused_to_per_expert_and_back(source: Path, tmp_path: Path) -> None:
    model_type = GOLDENS[source]
    specs = specs_of(model_type)
    adapter = load_adapter(source, specs)
    apart = export(adapter, tmp_path / "apart", "per_expert", specs, model_type=model_type)
    assert same(apart, adapter)
    assert same(export(apart, tmp_path / "fused", "fused", specs, model_type=model_type), adapter)
    keys = load_file(tmp_path / "apart" / WEIGHTS)
    spelled = "block_sparse_moe.experts.3.w1" if model_type == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"{PREFIX}model.layers.1.{spelled}.lora_A.weight" in keys
    written, config, before = load_file(tmp_path / "fused" / WEIGHTS), config_of(tmp_path / "fused"), config_of(source)
    for name in ("r", "lora_alpha", "use_rslora", "target_parameters", "rank_pattern", "alpha_pattern"):
        assert config[name] == before[name], name
    if "018" not in source.name:  # whose file has A and B in each other's place
        original = load_file(source / WEIGHTS)
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize(
    ("source", "model_type"),
    [(GOLDEN / "adapters" / "lora-mod-mixtral-rankpattern", "mixtral"), (MODULES, "qwen3_moe")],
)
def test_per_expert_is_written_as_it_was_read(source: Path, model_type: str, tmp_path: Path) -> None:
    specs = specs_of(model_type)
    adapter = load_adapter(source, specs)
    assert same(export(adapter, tmp_path / "m", "per_expert", specs, model_type=model_type), adapter)
    written, original = load_file(tmp_path / "m" / WEIGHTS), load_file(source / WEIGHTS)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in original.items())
    config, before = config_of(tmp_path / "m"), config_of(source)
    assert (config["r"], config["lora_alpha"]) == (before["r"], before["lora_alpha"])
    assert config["alpha_pattern"] == before["alpha_pattern"]
    assert len(config["rank_pattern"]) == len(before["rank_pattern"])


def test_names_of_a_family() -> None:
    spec = specs_of("mixtral")[1]
    modules = expert_modules(spec, "mixtral")
    assert modules[2, "up"] == "model.layers.1.block_sparse_moe.experts.2.w3"
    assert len(modules) == 3 * spec.num_experts
    assert expert_modules(spec, "qwen3_moe")[2, "down"] == "model.layers.1.mlp.experts.2.down_proj"


def test_gate_and_up_with_an_a_each_become_one_of_twice_the_rank(tmp_path: Path) -> None:
    tensors = expert_lora(DIMS, NAMES)
    adapter = load(tmp_path / "a", tensors, target_modules=PER_EXPERT, r=4, lora_alpha=8)
    fused = export(adapter, tmp_path / "fused", "fused")
    config = config_of(tmp_path / "fused")
    facts = {(config["r"], config["lora_alpha"])}
    facts |= {(config["rank_pattern"].get(p), config["alpha_pattern"].get(p)) for p in ("gate_up_proj", "down_proj")}
    assert facts in ({(8, 16), (None, None), (4, 8)}, {(4, 8), (None, None), (8, 16)})
    assert config["target_parameters"] == FUSED
    written = load_file(tmp_path / "fused" / WEIGHTS)
    inner = f"{PREFIX}{EXPERTS}.base_layer"
    assert written[f"{inner}.lora_A.weight"].shape == (3 * 8, 8) and written[f"{inner}.lora_B.weight"].shape == (10, 24)
    for (expert, projection), factor in adapter.layers[1].items():
        got = fused.layers[1][expert, projection]
        assert got.scaling == factor.scaling == 2
        assert same_factor(got, factor), "parted again when it is read"
    b = written[f"{inner}.lora_B.weight"].view(2, 5, 8, 3)  # gate and up, rows, ranks, experts
    assert not b[0, :, 4:].any() and not b[1, :, :4].any(), "the other projection's A does nothing here"


def test_one_expert_with_two_a_among_experts_with_one(tmp_path: Path) -> None:
    """Those that share A get it twice, so that all have one rank."""
    tensors = expert_lora(DIMS, NAMES)
    for layer in (0, 1):
        for expert in (0, 2):
            module = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{module}.up_proj.lora_A.weight"] = tensors[f"{module}.gate_proj.lora_A.weight"]
    adapter = load(tmp_path / "a", {k: v.clone() for k, v in tensors.items()}, target_modules=PER_EXPERT)
    fused = export(adapter, tmp_path / "fused", "fused")
    for layer, factors in adapter.layers.items():
        for key, factor in factors.items():
            got = fused.layers[layer][key]
            assert same_factor(got, factor), (layer, key)
    shapes = {tuple(t.shape) for k, t in load_file(tmp_path / "fused" / WEIGHTS).items() if "base_layer.lora_A" in k}
    assert shapes == {(3 * 8, 8)}


@pytest.mark.parametrize("rslora", [False, True])
def test_attention_patterns_and_rslora(tmp_path: Path, rslora: bool) -> None:
    tensors = attention_lora({"q_proj": (8, 8), "v_proj": (4, 8)})
    tensors |= fused_lora(DIMS, ("gate_up",), rank=3)
    tensors = {k.replace(".experts.lora", ".experts.base_layer.lora"): v for k, v in tensors.items()}
    tensors |= fused_lora(DIMS, ("down",), rank=6, seed=8)
    patterns = {"gate_up_proj": 3, "down_proj": 6}
    adapter = load(
        tmp_path / "a",
        tensors,
        target_modules=["q_proj", "v_proj"],
        target_parameters=FUSED,
        use_rslora=rslora,
        rank_pattern=patterns,
        alpha_pattern={"gate_up_proj": 7, r"layers\.1\.self_attn\.q_proj": 13},
        lora_dropout=0.1,
    )
    up = adapter.layers[0][1, "up"]
    assert up.scaling == (7 / math.sqrt(3) if rslora else 7 / 3)
    apart = export(adapter, tmp_path / "apart", "per_expert")
    assert same(apart, adapter)
    fused = export(apart, tmp_path / "fused", "fused")
    assert same(fused, adapter)
    config = config_of(tmp_path / "fused")
    assert config["use_rslora"] is rslora and config["lora_dropout"] == 0
    assert config["rank_pattern"] == patterns
    assert config["alpha_pattern"] == {"gate_up_proj": 7, r"model\.layers\.1\.self_attn\.q_proj": 13}


def test_some_layers_and_one_parameter(tmp_path: Path) -> None:
    tensors = {k: v for k, v in fused_lora(DIMS, ("down",)).items() if "layers.1." in k}
    adapter = load(tmp_path / "a", tensors, target_parameters=["mlp.experts.down_proj"])
    apart = export(adapter, tmp_path / "apart", "per_expert")
    assert config_of(tmp_path / "apart")["target_modules"] == ["down_proj"]
    assert same(export(apart, tmp_path / "fused", "fused"), adapter)
    assert config_of(tmp_path / "fused")["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]


def test_attention_alone(tmp_path: Path) -> None:
    adapter = load(tmp_path / "a", attention_lora({"q_proj": (8, 8)}), target_modules=["q_proj"])
    assert same(export(adapter, tmp_path / "b", "fused"), adapter)
    assert same(export(adapter, tmp_path / "c", "per_expert"), adapter)


def refused(adapter: Adapter, folder: Path, *parts: str) -> None:
    with pytest.raises(AdapterError, match=r"in the fused form: got .*; export it in the per_expert form") as info:
        export_adapter(adapter, DIMS.specs(), folder, "fused", "qwen3_moe")
    assert all(part in str(info.value) for part in parts), info.value
    assert not folder.exists(), "nothing is written"
    assert same(export(adapter, folder, "per_expert"), adapter), "which does hold it"


def test_what_the_fused_form_cannot_hold(tmp_path: Path) -> None:
    tensors = expert_lora(DIMS, NAMES)
    some = load(tmp_path / "a", expert_lora(DIMS, NAMES, experts=[0, 2]), target_modules=PER_EXPERT)
    refused(some, tmp_path / "1", "expert 1", f"{EXPERTS}.gate_up_proj", "factors for every expert")
    no_up = load(tmp_path / "b", expert_lora(DIMS, {"gate": "gate_proj"}), target_modules=["gate_proj"])
    refused(no_up, tmp_path / "2", "expert 0", f"{EXPERTS}.gate_up_proj")
    wide = expert_lora(DIMS, {"gate": "gate_proj"}, rank=6)
    gate = load(tmp_path / "c", tensors | wide, target_modules=PER_EXPERT, rank_pattern={"gate_proj": 6})
    refused(gate, tmp_path / "3", "gate and up of expert 0", "rank 6", "rank 4")
    wide = expert_lora(DIMS, {"down": "down_proj"}, experts=[2], rank=6)
    down = load(tmp_path / "d", tensors | wide, target_modules=PER_EXPERT)
    refused(down, tmp_path / "4", f"{EXPERTS}.down_proj", "rank 4 scaling 2", "rank 6 scaling 1.33")
    loud = load(tmp_path / "e", tensors, target_modules=PER_EXPERT, alpha_pattern={r"experts\.1\.down_proj": 32})
    refused(loud, tmp_path / "5", f"{EXPERTS}.down_proj", "scaling 2", "scaling 8")
    mixed = expert_lora(DIMS, NAMES, layers=[0]) | expert_lora(DIMS, {"down": "down_proj"}, layers=[1])
    refused(load(tmp_path / "f", mixed, target_modules=PER_EXPERT), tmp_path / "6", "down_proj in layer 1")


@pytest.mark.parametrize(("rank", "alpha", "kept"), [(4, 8, False), (2, 8, True), (8, 16, True)])
def test_rslora_at_twice_the_rank(tmp_path: Path, rank: int, alpha: int, kept: bool) -> None:
    """alpha / sqrt(2r) hits the scaling if sqrt(2r) is whole; else alpha / r, of a power of two, does."""
    tensors = expert_lora(DIMS, NAMES, rank=rank)
    adapter = load(tmp_path / "a", tensors, r=rank, lora_alpha=alpha, use_rslora=True, target_modules=PER_EXPERT)
    fused = export(adapter, tmp_path / "fused", "fused")
    assert kept == (math.isqrt(2 * rank) ** 2 == 2 * rank)
    if kept:
        assert config_of(tmp_path / "fused")["use_rslora"]
    for layer, factors in adapter.layers.items():
        for key, factor in factors.items():
            assert fused.layers[layer][key].scaling == factor.scaling == alpha / math.sqrt(rank)


def test_a_scaling_that_no_alpha_gives(tmp_path: Path) -> None:
    """The doubles nearest to 14 * 35 / sqrt(7) and sqrt(14) * 35 / sqrt(7) all divide to a neighbour of the scaling."""
    tensors = expert_lora(DIMS, NAMES, rank=7)
    adapter = load(tmp_path / "a", tensors, r=7, lora_alpha=35, use_rslora=True, target_modules=PER_EXPERT)
    with pytest.raises(AdapterError, match=r"gate_up_proj, which no alpha gives at rank 14.*per_expert form"):
        export(adapter, tmp_path / "fused", "fused")
    assert not (tmp_path / "fused").exists()
    assert same(export(adapter, tmp_path / "apart", "per_expert"), adapter)


def test_a_folder_with_an_adapter_is_left_alone(tmp_path: Path) -> None:
    adapter = load(tmp_path / "a", fused_lora(DIMS), target_parameters=FUSED)
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match="choose another folder"):
        export(adapter, tmp_path / "a", "per_expert")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    wrong: Any = "2d"
    with pytest.raises(UnsupportedError, match="form: got '2d', expected fused or per_expert"):
        export(adapter, tmp_path / "b", wrong)


# Of PEFT itself: patterns of parameters, which it looks for among modules.
STOCK = [
    pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def stock(test: Any) -> Any:
    """Let PEFT's own warnings pass."""
    for mark in STOCK:
        test = mark(test)
    return test


@torch.no_grad()
def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of stock PEFT on the unquantised model in plain transformers."""
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "checkpoints" / BASES["qwen3_moe"], dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder))
    return model.eval()(input_ids=ids).logits


@stock
@pytest.mark.parametrize("name", ["lora-tp-qwen3moe-r8", "lora-tp-peft018-qwen3moe-r8"])
def test_stock_peft_has_the_golden_logits(name: str, tmp_path: Path) -> None:
    """Also of a file by PEFT 0.18, whose roles of A and B today's PEFT does not know."""
    source, specs = GOLDEN / "adapters" / name, specs_of("qwen3_moe")
    golden = load_file(source / "logits.safetensors")
    apart = export(load_adapter(source, specs), tmp_path / "apart", "per_expert", specs)
    export(apart, tmp_path / "fused", "fused", specs)
    got = stock_logits(tmp_path / "fused", golden["input_ids"])
    assert float((got - golden["logits"]).norm() / golden["logits"].norm()) < 1e-5  # two orders of float32 sums


@stock
def test_stock_peft_converts_the_per_expert_form_to_the_fused_one(tmp_path: Path) -> None:
    """Its own conversion and ours give one model, for gate and up with an A each."""
    specs, ids = specs_of("qwen3_moe"), torch.arange(3, 35).view(2, 16)
    export(load_adapter(MODULES, specs), tmp_path / "fused", "fused", specs)
    export(load_adapter(MODULES, specs), tmp_path / "apart", "per_expert", specs)
    expected = stock_logits(MODULES, ids)
    for form in ("fused", "apart"):
        got = stock_logits(tmp_path / form, ids)
        assert float((got - expected).norm() / expected.norm()) < 1e-5  # two orders of float32 sums
