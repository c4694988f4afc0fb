"""Fused parameters in every layout, held to PEFT's own ParamWrapper: the delta it adds, and the file it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.lora.adapter_file import Adapter, load_adapter
from quant_moelora.lora.export import export_adapter
from tests.adapters import PREFIX, WEIGHTS, write_adapter

EXPERTS, RANK = 3, 4
MODULE = "model.layers.0.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Layout:
    """How a family holds its experts, and whether its module says so."""

    transposed: bool
    declared: bool
    interleaved: bool
    inter: int
    hidden: int = 8

    def spec(self) -> ExpertsSpec:
        return ExpertsSpec(
            module=MODULE,
            layer=0,
            num_experts=EXPERTS,
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            activation=Activation("silu"),
            transposed=self.transposed,
            interleaved=self.interleaved,
            declared_transposed=self.declared,
        )

    def model(self) -> nn.Module:
        """Nested modules down to the experts, with parameters as the family has them."""
        root = nn.Module()
        experts: Any = nn.Module()
        for name, (n, k) in (("gate_up_proj", (2 * self.inter, self.hidden)), ("down_proj", (self.hidden, self.inter))):
            shape = (k, n) if self.transposed else (n, k)
            experts.register_parameter(name, nn.Parameter(torch.zeros(EXPERTS, *shape)))
        if self.declared:
            experts.is_transposed = True
        *path, last = MODULE.split(".")
        parent = root
        for name in path:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, experts)
        return root


# gpt-oss; transposed only; Llama4, whose module does not say that it is; all other families.
FLAGS = [(True, True, True), (True, True, False), (True, False, False), (False, False, False), (False, False, True)]
# inter 5: no square parameter; 8: down_proj is; 4: gate_up_proj is.
LAYOUTS = [Layout(*flags, inter) for flags in FLAGS for inter in (5, 8, 4)]


def written_by_peft(layout: Layout, folder: Path, targets: list[str]) -> dict[str, Tensor]:
    """An adapter folder with PEFT's own tensors; its deltas [E, N, K] by parameter."""
    model: Any = layout.model()
    config = LoraConfig(r=RANK, lora_alpha=6, target_parameters=targets, target_modules=[], init_lora_weights=False)
    torch.manual_seed(layout.inter)
    inject_adapter_in_model(config, model, "x")
    tensors = get_peft_model_state_dict(model, adapter_name="x")
    write_adapter(folder, tensors, target_parameters=targets, r=RANK, lora_alpha=6)
    wrapper = model.get_submodule(MODULE)
    deltas: dict[str, Tensor] = {}
    for _ in targets:
        delta = wrapper.get_delta_weight("x").detach()
        deltas[wrapper.parameter_name] = delta.transpose(1, 2) if layout.transposed else delta
        wrapper = wrapper.base_layer
    return deltas


def check(adapter: Adapter, layout: Layout, deltas: dict[str, Tensor]) -> None:
    halves = {"gate": slice(0, layout.inter), "up": slice(layout.inter, None)}
    if layout.interleaved:
        halves = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    factors = adapter.layers[0]
    assert len(factors) == EXPERTS * sum(2 if name == "gate_up_proj" else 1 for name in deltas)
    for (expert, projection), factor in factors.items():
        delta = deltas["down_proj"][expert] if projection == "down" else deltas["gate_up_proj"][expert]
        expected = delta if projection == "down" else delta[halves[projection]]
        # 4 products of factors of at most 1/2 (uniform in 1 / sqrt(fan-in)), scaled by 1.5, in float32.
        torch.testing.assert_close(factor.scaling * (factor.b @ factor.a), expected, rtol=0, atol=2**-24 * 8)


def same_file(folder: Path, other: Path) -> bool:
    got, expected = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    return got.keys() == expected.keys() and all(torch.equal(got[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_read_and_written_as_peft_does(tmp_path: Path, layout: Layout, targets: list[str]) -> None:
    """Also where a square parameter's shapes say nothing: then the version and the module's own word do."""
    deltas = written_by_peft(layout, tmp_path / "peft", targets)
    specs = [layout.spec()]
    adapter = load_adapter(tmp_path / "peft", specs)
    check(adapter, layout, deltas)
    export_adapter(adapter, specs, tmp_path / "apart", "per_expert", "qwen3_moe")
    apart = load_adapter(tmp_path / "apart", specs)
    check(apart, layout, deltas)
    export_adapter(apart, specs, tmp_path / "fused", "fused", "qwen3_moe")
    assert same_file(tmp_path / "fused", tmp_path / "peft")


def test_interleaved_gate_and_up_with_an_a_each(tmp_path: Path) -> None:
    """In the fused form gate stands in the even rows of B over the first columns, up in the odd ones over the rest."""
    layout = Layout(True, True, True, 5)
    written_by_peft(layout, tmp_path / "peft", BOTH)
    specs = [layout.spec()]
    apart = tmp_path / "apart"
    export_adapter(load_adapter(tmp_path / "peft", specs), specs, apart, "per_expert", "qwen3_moe")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(apart / WEIGHTS).items()}
    tensors = {key: t + 1 if "up_proj.lora_A" in key else t for key, t in tensors.items()}
    adapter = load_adapter(write_adapter(tmp_path / "two", tensors, r=RANK, lora_alpha=6), specs)
    export_adapter(adapter, specs, tmp_path / "fused", "fused", "qwen3_moe")
    fused = load_adapter(tmp_path / "fused", specs)
    for key, factor in adapter.layers[0].items():
        got = fused.layers[0][key]
        assert got.scaling == factor.scaling, "parted again when it is read"
        assert torch.equal(got.a, factor.a) and torch.equal(got.b, factor.b)
    key = next(k for k in load_file(tmp_path / "fused" / WEIGHTS) if k.endswith("base_layer.lora_B.weight"))
    b = load_file(tmp_path / "fused" / WEIGHTS)[key]
    assert torch.count_nonzero(b) == b.numel() // 2, "the other columns are 0"


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
def test_a_square_parameter_follows_another_one_of_the_file(tmp_path: Path, version: str | None) -> None:
    """gpt-oss has a square down_proj. Where its module said nothing (transformers 4), a newer PEFT swapped A and B."""
    silent, declared = Layout(True, False, True, 8), Layout(True, True, True, 8)
    deltas = written_by_peft(silent, tmp_path / "peft", BOTH)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(tmp_path / "peft" / WEIGHTS).items()}
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=BOTH, r=RANK, lora_alpha=6, peft_version=version)
    check(load_adapter(folder, [declared.spec()]), declared, deltas)


def test_a_square_parameter_that_every_peft_writes_alike(tmp_path: Path) -> None:
    """Transposed and said to be so: no version swaps, so that none has to be known."""
    layout = Layout(True, True, True, 8)
    deltas = written_by_peft(layout, tmp_path / "peft", BOTH[1:])
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(tmp_path / "peft" / WEIGHTS).items()}
    for version in ("0.17.1", "0.22.0.dev0@UNKNOWN", None):
        folder = tmp_path / str(version)
        write_adapter(folder, tensors, target_parameters=BOTH[1:], r=RANK, lora_alpha=6, peft_version=version)
        check(load_adapter(folder, [layout.spec()]), layout, deltas)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_a_square_transposed_parameter_of_an_old_peft_whose_module_says_nothing(tmp_path: Path, version: str) -> None:
    """It took every parameter for transposed, as a newer one does for a module that says so."""
    declared, silent = Layout(True, True, False, 8), Layout(True, False, False, 8)
    deltas = written_by_peft(declared, tmp_path / "peft", BOTH[1:])
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(tmp_path / "peft" / WEIGHTS).items()}
    config: dict[str, Any] = {"target_parameters": BOTH[1:], "r": RANK, "lora_alpha": 6}
    old = write_adapter(tmp_path / "old", tensors, peft_version=version, **config)
    check(load_adapter(old, [silent.spec()]), silent, deltas)
    unknown = write_adapter(tmp_path / "unknown", tensors, peft_version=None, **config)
    with pytest.raises(AdapterError, match=r"square parameter and peft_version None"):
        load_adapter(unknown, [silent.spec()])
