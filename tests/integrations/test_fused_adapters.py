"""Adapters on fused experts, however a family holds them, against PEFT on the family's own unquantised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.loaders.families import find_experts
from quant_moelora.lora.adapter_file import load_adapter
from quant_moelora.lora.export import export_adapter
from tests.integrations.models import EFFECT, ROUNDING, difference, load, logits
from tests.integrations.test_families import IDS, saved, tiny_model

# peft asks transformers by a name that transformers is about to drop

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def write_with_peft(model: Any, folder: Path, targets: list[str], seed: int) -> Tensor:
    """An adapter as PEFT makes and saves it, and the logits of the model with it; the model has it afterwards."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=3, lora_alpha=12, target_parameters=targets, target_modules=[], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(folder))
    return logits(adapted, IDS)


def with_peft(model_type: str, base: Path, folder: Path) -> Tensor:
    """Logits of the family's model with the adapter of a folder, as stock PEFT reads it."""
    model = tiny_model(model_type)
    model.load_state_dict(type(model).from_pretrained(base, dtype=torch.float32).state_dict())
    return logits(PeftModel.from_pretrained(model, str(folder)).eval(), IDS)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "llama4_text", "qwen3_moe"])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
def test_pefts_logits_and_back(tmp_path: Path, model_type: str, targets: list[str]) -> None:
    """gpt-oss: [E, K, N], gate and up by turns, biases and a clamp between them; granitemoe: [E, N, K] and renamed."""
    folder, original = saved(tmp_path / "m", model_type)
    specs = find_experts(original)
    expected = write_with_peft(original, tmp_path / "x", targets, seed=4)
    model = load(folder)
    before = logits(model, IDS)
    assert difference(before, expected) > EFFECT
    attach_adapters(model, {"x": tmp_path / "x"})
    assert difference(logits(model, IDS, ["x", "x"]), expected) < ROUNDING
    mixed = logits(model, IDS, [BASE_NAME, "x"])
    assert torch.equal(mixed[0], before[0])
    assert difference(mixed[1], expected[1]) < ROUNDING

    adapter = load_adapter(tmp_path / "x", specs)
    export_adapter(adapter, specs, tmp_path / "apart", "per_expert", model_type)
    export_adapter(load_adapter(tmp_path / "apart", specs), specs, tmp_path / "fused", "fused", model_type)
    assert torch.equal(with_peft(model_type, folder, tmp_path / "fused"), expected)
