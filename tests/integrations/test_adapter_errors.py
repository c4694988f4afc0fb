"""attach_adapters refuses what does not fit, says why, and then leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_moelora.integrations.linears as linears_module
from quant_moelora.core.errors import AdapterError, FormatError, UnsupportedError
from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import Tensors, expert_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    GOLDEN,
    GPTQ,
    PROJECTIONS,
    QWEN,
    A,
    B,
    attention_adapter,
    difference,
    folder_of,
    load,
    logits,
    random_ids,
    session_names,
)

LAYER = "model.layers.0"


class Watched:
    """A model with one adapter, and what it computes; no failure may change it."""

    def __init__(self) -> None:
        self.model: Any = load(GPTQ)
        self.ids = random_ids(2, 9)
        self.base = logits(self.model, self.ids)
        attach_adapters(self.model, {"kept": A})
        self.kept = logits(self.model, self.ids, ["kept"] * 2)

    def check(self) -> None:
        assert session_names(self.model) == ["kept"]
        assert torch.equal(logits(self.model, self.ids), self.base)
        assert torch.equal(logits(self.model, self.ids, ["kept", BASE_NAME])[1], self.base[1])
        assert torch.equal(logits(self.model, self.ids, ["kept"] * 2), self.kept)


@pytest.fixture(scope="module")
def shared() -> Watched:
    return Watched()


@pytest.fixture
def watched(shared: Watched) -> Iterator[Watched]:
    """The module's model, held against what it computed before after each test."""
    yield shared
    shared.check()


@pytest.mark.parametrize("name", ["kept", BASE_NAME, "", "a.b"])
def test_names_that_cannot_be_given(watched: Watched, name: str) -> None:
    with pytest.raises(AdapterError, match=rf"got '{name}'.*without dots, other than __base__ \(attached: kept\)"):
        attach_adapters(watched.model, {"fresh": B, name: B})


@pytest.mark.parametrize("name", ["keys", "training", "type"])
def test_names_that_torch_keeps_for_itself(tmp_path: Path, name: str) -> None:
    """PEFT holds adapters in ModuleDicts, where these are taken: either served, or refused as the names above."""
    model, ids = load(GPTQ), random_ids(2, 9)
    base = logits(model, ids)
    try:
        attach_adapters(model, {name: attention_adapter(tmp_path / "x")})
    except AdapterError:
        assert session_names(model) == []
    else:
        assert difference(logits(model, ids, [name] * 2), base) > EFFECT
    assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["nobody", "kept"], r"unknown nobody, expected __base__ or attached ones: kept; attach"),
        (["kept"] * 3, r"3 names for 2 rows, expected one name a row"),
        ([], r"0 names for 2 rows"),
    ],
)
def test_names_in_a_forward(watched: Watched, names: list[str], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        logits(watched.model, watched.ids, names)


Writer = Callable[[Path], Path]


def writer(tensors: Tensors, **config: Any) -> Writer:
    return lambda folder: write_adapter(folder, tensors, **config)


MISFITS: dict[str, tuple[Writer, str]] = {
    "nothing applies": (
        writer(linear_lora("transformer.h.0.attn.c_attn", 8, 8)),
        r"transformer\.h\.0\.attn\.c_attn, which is no linear layer, router or routed expert",
    ),
    "router of another K": (
        writer(linear_lora(f"{LAYER}.mlp.gate", 8, 64)),
        r"mlp\.gate in .*A \[4, 64\].*A \[r, 128\]",
    ),
    "embedding": (writer(linear_lora("model.embed_tokens", 256, 128)), r"LoRA on model\.embed_tokens"),
    "dense MLP of a MoE layer": (writer(linear_lora(f"{LAYER}.mlp.up_proj", 96, 128)), r"mlp\.up_proj, which is no"),
    "some of it unknown": (
        writer(expert_lora(QWEN, PROJECTIONS) | linear_lora(f"{LAYER}.self_attn.qkv", 8, 128)),
        r"self_attn\.qkv, which is no linear",
    ),
    "attention of another K": (
        writer(linear_lora(f"{LAYER}.self_attn.q_proj", 128, 64)),
        r"q_proj in .*A \[4, 64\].*A \[r, 128\] and B \[128, r\]",
    ),
    "attention of another N": (
        writer(linear_lora(f"{LAYER}.self_attn.v_proj", 128, 128)),
        r"v_proj in .*B \[128, 4\].*B \[64, r\]",
    ),
    "attention of two ranks": (
        writer(
            {
                f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.ones(4, 128),
                f"{LAYER}.self_attn.q_proj.lora_B.weight": torch.ones(128, 3),
            }
        ),
        r"q_proj in .*A \[4, 128\], B \[128, 3\]",
    ),
    "another model's experts": (lambda _: GOLDEN / "adapters" / "lora-tp-mixtral-r4", r"experts\.gate_up_proj.*A \["),
    "another model's per-expert modules": (
        lambda _: GOLDEN / "adapters" / "lora-mod-mixtral-rankpattern",
        r"experts\.\d+\.w[123] in .*attach the adapter to the model it was trained on",
    ),
    "more layers than the model": (writer(linear_lora("model.layers.2.self_attn.q_proj", 128, 128)), r"layers\.2\."),
    "a checkpoint instead of an adapter": (lambda _: folder_of(GPTQ), r"no adapter_config\.json"),
    "dora": (writer(expert_lora(QWEN, PROJECTIONS), use_dora=True), r"use_dora=True"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_adapters_that_do_not_fit(watched: Watched, tmp_path: Path, case: str) -> None:
    """A good adapter in the same call is not attached either."""
    make, match = MISFITS[case]
    with pytest.raises(AdapterError, match=match):
        attach_adapters(watched.model, {"good": attention_adapter(tmp_path / "good"), "x": make(tmp_path / "x")})


def test_no_such_folder(watched: Watched) -> None:
    with pytest.raises((AdapterError, FormatError), match="nowhere/at-all"):
        attach_adapters(watched.model, {"x": "nowhere/at-all"})


def test_after_a_failure_the_same_name_can_be_attached(tmp_path: Path) -> None:
    model, ids = load(GPTQ), random_ids(2, 9)
    good = attention_adapter(tmp_path / "good")
    with pytest.raises(AdapterError):
        attach_adapters(model, {"x": good, "y": writer(linear_lora("lm_tail", 8, 8))(tmp_path / "y")})
    attach_adapters(model, {"x": good})
    other = load(GPTQ)
    attach_adapters(other, {"x": good})
    assert torch.equal(logits(model, ids, ["x", BASE_NAME]), logits(other, ids, ["x", BASE_NAME]))


def test_a_failure_inside_peft_attaches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PEFT fails at the second adapter, when the first already stands in the attention layers."""
    model, ids = load(GPTQ), random_ids(2, 9)
    base = logits(model, ids)
    inject = linears_module.LoraModel

    def failing(target: nn.Module, config: Any, name: str) -> nn.Module:
        if name == "second":
            raise RuntimeError("out of memory")
        return inject(target, config, name)

    monkeypatch.setattr(linears_module, "LoraModel", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        attach_adapters(
            model,
            {
                "first": attention_adapter(tmp_path / "1", more=expert_lora(QWEN, PROJECTIONS)),
                "second": attention_adapter(tmp_path / "2"),
            },
        )
    assert session_names(model) == []
    assert torch.equal(logits(model, ids), base)


def test_a_model_of_another_origin() -> None:
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(GOLDEN / "checkpoints" / "base-qwen3moe-h128-i96")
    with pytest.raises(UnsupportedError, match=r"Qwen3MoeForCausalLM: got no experts of this library.*from_pretrained"):
        attach_adapters(stock, {"a": A})


def test_attaching_nothing_changes_nothing(watched: Watched) -> None:
    attach_adapters(watched.model, {})


def test_packed_sequences_are_refused_rather_than_mixed_up(watched: Watched) -> None:
    """Tokens of a batch whose number does not tell the rows apart."""
    experts: Any = watched.model.get_submodule("model.layers.0.mlp.experts")
    x: Tensor = torch.randn(7, 128)
    with (
        experts.session.choose(["kept", BASE_NAME], 2, torch.device("cpu")),
        pytest.raises(AdapterError, match="7 tokens for a batch of 2"),
    ):
        experts(x, torch.zeros(7, 4, dtype=torch.int64), torch.rand(7, 4))
