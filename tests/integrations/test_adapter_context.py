"""adapter_context: sequences of other lengths packed into one row, each with its adapter, against each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import quant_moelora as qm
from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import attention_lora, fused_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    FUSED,
    GPTQ,
    QWEN,
    ROUNDING,
    difference,
    load,
    logits,
    random_ids,
)

NAMES = ["b", BASE_NAME, "a", "attention"]
LENGTHS = [5, 3, 9, 1]
SEQUENCES = [random_ids(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
ATTENTION = {"q_proj": (128, 128), "o_proj": (128, 128)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapters of experts, routers, attention and lm_head."""
    root = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        tensors = fused_lora(QWEN, seed=seed) | attention_lora(ATTENTION, seed=seed)
        for module in ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate"):
            tensors |= linear_lora(module, 8, 128, seed=40 + seed)
        folders[name] = write_adapter(root / name, tensors, target_parameters=[*FUSED, "mlp.gate.weight"])
    head = {key: 0.3 * tensor for key, tensor in linear_lora("lm_head", 256, 128, seed=9).items()}
    folders["attention"] = write_adapter(root / "attention", attention_lora(ATTENTION, seed=7) | head)
    loaded = load(GPTQ)
    qm.attach_adapters(loaded, folders)
    return loaded


def packed() -> dict[str, Any]:
    """One row of all sequences; without a cache, transformers keeps them apart by position ids that begin again."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": torch.cat(SEQUENCES)[None], "position_ids": positions[None], "use_cache": False}


def check(model: Any, got: Tensor) -> None:
    """Every sequence of the packed row as it is alone, and not as with another adapter."""
    for part, sequence, name in zip(got[0].split(LENGTHS), SEQUENCES, NAMES, strict=True):
        assert difference(part, logits(model, sequence[None], [name])[0]) < ROUNDING, name
        for other in {*NAMES} - {name}:
            assert difference(part, logits(model, sequence[None], [other])[0]) > EFFECT, (name, other)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_sequences(model: Any, as_tensor: bool) -> None:
    lengths = torch.tensor(LENGTHS) if as_tensor else LENGTHS
    with torch.no_grad(), qm.adapter_context(model, NAMES, lengths):
        got = model(**packed()).logits
    check(model, got)


def test_the_context_is_left_and_contexts_nest(model: Any) -> None:
    base = logits(model, SEQUENCES[2][None])
    with torch.no_grad(), qm.adapter_context(model, ["a"]):
        with qm.adapter_context(model, NAMES, LENGTHS):
            check_again = model(**packed()).logits
        assert difference(logits(model, SEQUENCES[2][None]), base) > EFFECT
    with pytest.raises(KeyError), qm.adapter_context(model, ["b"]):
        raise KeyError
    assert torch.equal(logits(model, SEQUENCES[2][None]), base)
    check(model, check_again)


def test_sequences_without_tokens_and_padding(model: Any) -> None:
    """An empty sequence is none, and padding is a sequence of the base model."""
    row = packed()
    row["input_ids"] = torch.cat((row["input_ids"], torch.zeros(1, 2, dtype=torch.int64)), 1)
    row["position_ids"] = torch.cat((row["position_ids"], torch.arange(2)[None]), 1)
    with torch.no_grad(), qm.adapter_context(model, ["a", *NAMES, BASE_NAME], [0, *LENGTHS, 2]):
        got = model(**row).logits
    check(model, got[:, :-2])


def test_names_for_the_rows_of_a_batch(model: Any) -> None:
    ids, names = random_ids(3, 6), ["a", BASE_NAME, "b"]
    with qm.adapter_context(model, names):
        got = logits(model, ids)
    assert torch.equal(got, logits(model, ids, names))


def test_what_does_not_go_together(model: Any) -> None:
    with pytest.raises(AdapterError, match="unknown c"), qm.adapter_context(model, ["c"]):
        pass
    for lengths in ([3, 4], [], [-1]):
        context = qm.adapter_context(model, ["a"], lengths)
        with pytest.raises(AdapterError, match="lengths of packed sequences"), context:
            pass
    with qm.adapter_context(model, ["a"], [4]):
        with pytest.raises(AdapterError, match="5 tokens for sequences of 4 together"):
            logits(model, random_ids(1, 5))
        with pytest.raises(AdapterError, match="names of a forward within a context"):
            logits(model, random_ids(1, 4), ["a"])
    alien = qm.adapter_context(torch.nn.Linear(1, 1), [])
    with pytest.raises(UnsupportedError, match="no experts of this library"), alien:
        pass


def test_around_pefts_model(tmp_path: Path) -> None:
    """Its active adapter serves what the context does not name, before and after."""
    folders = {
        name: write_adapter(tmp_path / name, fused_lora(QWEN, seed=seed), target_parameters=FUSED)
        for seed, name in enumerate("ab")
    }
    peft_model = PeftModel.from_pretrained(load(GPTQ), str(folders["a"]), adapter_name="a")
    peft_model.load_adapter(str(folders["b"]), "b")
    ids = random_ids(1, 8)
    active = logits(peft_model, ids)
    with torch.no_grad(), qm.adapter_context(peft_model, ["b", BASE_NAME], [3, 5]):
        got = peft_model(input_ids=ids, position_ids=torch.tensor([[*range(3), *range(5)]]), use_cache=False).logits
    assert difference(got[0, :3], logits(peft_model, ids[:, :3], ["b"])[0]) < ROUNDING
    assert difference(got[0, 3:], logits(peft_model, ids[:, 3:], [BASE_NAME])[0]) < ROUNDING
    assert torch.equal(logits(peft_model, ids), active)
