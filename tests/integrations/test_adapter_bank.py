"""attach_adapters with a bank of a given size, and detach_adapters: addresses, room, and what others then compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_moelora
from quant_moelora.core.errors import AdapterError, BackendError, UnsupportedError
from quant_moelora.integrations.adapters import attach_adapters, detach_adapters
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.layer import MoEExperts
from tests.adapters import expert_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    GPTQ,
    PROJECTIONS,
    QWEN,
    ROUNDING,
    A,
    B,
    attention_adapter,
    difference,
    load,
    logits,
    random_ids,
    session_names,
)

IDS = random_ids(3, 11)


def layers(model: Any) -> list[MoEExperts]:
    found = [module.moe for module in experts_of(model).values()]
    assert all(moe is not None for moe in found)
    return [moe for moe in found if moe is not None]


def addresses(model: Any) -> list[int]:
    contexts = [moe.injection.ctx for moe in layers(model)]
    return [tensor.data_ptr() for ctx in contexts if ctx is not None for tensor in ctx.tensors().values()]


def alone(folder: Path) -> Tensor:
    """Logits of a model with this adapter only, in a bank of its size."""
    model = load(GPTQ)
    attach_adapters(model, {"x": folder})
    return logits(model, IDS, ["x"] * 3)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An adapter on attention and some experts."""
    more = expert_lora(QWEN, {"up": "up_proj"}, experts=[1, 4, 6])
    router = linear_lora("model.layers.1.mlp.gate", 8, 128)
    return attention_adapter(tmp_path / "mixed", more=more | router)


def test_adapters_come_and_go_at_fixed_addresses(mixed: Path, device: torch.device) -> None:
    model = load(GPTQ, device_map=device)
    base = logits(model, IDS)
    attach_adapters(model, {}, max_adapters=2, max_rank=8)
    fixed = addresses(model)
    assert len(fixed) == 5 * 2 and session_names(model) == []
    assert torch.equal(logits(model, IDS), base)
    results = {"a": alone(A), "b": alone(B), "mixed": alone(mixed)}
    attach_adapters(model, {"a": A})
    attach_adapters(model, {"mixed": mixed})
    got = logits(model, IDS, ["mixed", BASE_NAME, "a"])
    assert difference(got[0], results["mixed"][0]) < ROUNDING
    assert torch.equal(got[1], base[1])
    assert difference(got[2], results["a"][2]) < ROUNDING
    detach_adapters(model, ["a"])
    assert session_names(model) == ["mixed"]
    attach_adapters(model, {"b": B})
    got = logits(model, IDS, ["b", "mixed", BASE_NAME])
    assert difference(got[0], results["b"][0]) < ROUNDING
    assert difference(got[1], results["mixed"][1]) < ROUNDING
    detach_adapters(model, ["mixed", "b"])
    attach_adapters(model, {"mixed": B})  # a name used again, for another one
    assert difference(logits(model, IDS, ["mixed"] * 3), results["b"]) < ROUNDING
    assert torch.equal(logits(model, IDS), base)
    assert addresses(model) == fixed


def test_a_detached_adapter_leaves_the_others_as_they_were(mixed: Path) -> None:
    """Also in a bank of just their size, and when another one is attached afterwards."""
    model = load(GPTQ)
    base = logits(model, IDS)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attach_adapters(model, {"a": A, "mixed": mixed, "more": mixed})
    before = logits(model, IDS, ["a", "more", BASE_NAME])
    detach_adapters(model, ["mixed"])
    assert session_names(model) == ["a", "more"]
    assert torch.equal(logits(model, IDS, ["a", "more", BASE_NAME]), before)
    with pytest.raises(AdapterError, match=r"unknown mixed, expected __base__ or attached ones: a, more"):
        logits(model, IDS, ["mixed"] * 3)
    attach_adapters(model, {"b": B})
    assert difference(logits(model, IDS, ["a", "more", BASE_NAME]), before) < ROUNDING
    assert difference(logits(model, IDS, ["b"] * 3), alone(B)) < ROUNDING
    detach_adapters(model, ["a", "more", "b"])
    assert torch.equal(logits(model, IDS), base)
    assert torch.equal(logits(model, IDS, [BASE_NAME] * 3), base)
    after = [name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad]
    assert after == trainable


def test_an_adapter_without_experts_takes_no_slot(tmp_path: Path) -> None:
    """Two of them with routers: neither gets the other's rows."""
    model = load(GPTQ)
    folders = {
        name: attention_adapter(tmp_path / name, seed, linear_lora("model.layers.0.mlp.gate", 8, 128, seed=seed))
        for name, seed in (("one", 5), ("two", 300))
    }
    attach_adapters(model, {"a": A}, max_adapters=1, max_rank=8)
    attach_adapters(model, folders)
    got = logits(model, IDS, ["two", "one", "a"])
    for row, folder in enumerate((folders["two"], folders["one"], A)):
        assert difference(got[row], alone(folder)[row]) < ROUNDING
    assert difference(alone(folders["one"]), alone(folders["two"])) > EFFECT


Attach = Callable[[Any], None]
REFUSED: dict[str, tuple[Attach, str]] = {
    "no slot": (lambda model: attach_adapters(model, {"b": B, "c": B}), r"room for adapter c: .*2 of 2 slots taken"),
    "rank": (
        lambda model: attach_adapters(model, {"b": B, "wide": GUEST[0]}),
        r"adapter wide, layer 0, up of expert 3: got rank 9, expected at most max_rank = 8",
    ),
    "size again": (
        lambda model: attach_adapters(model, {"b": B}, max_adapters=3, max_rank=8),
        r"size of the adapter bank: got max_adapters=3, max_rank=8 for a model that has its bank",
    ),
    "unknown": (lambda model: detach_adapters(model, ["a", "b"]), r"detaching adapters: got unknown b, .*ones: a"),
}
GUEST: list[Path] = []


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, case: str) -> None:
    call, match = REFUSED[case]
    GUEST[:] = [write_adapter(tmp_path / "wide", expert_lora(QWEN, {"up": "up_proj"}, experts=[3], rank=9))]
    model = load(GPTQ)
    attach_adapters(model, {"a": A}, max_adapters=2, max_rank=8)
    before, fixed = logits(model, IDS, ["a", BASE_NAME, "a"]), addresses(model)
    with pytest.raises(AdapterError, match=match):
        call(model)
    assert session_names(model) == ["a"] and addresses(model) == fixed
    assert torch.equal(logits(model, IDS, ["a", BASE_NAME, "a"]), before)
    attach_adapters(model, {"b": B})
    assert difference(logits(model, IDS, ["b"] * 3), alone(B)) < ROUNDING


@pytest.mark.parametrize("size", [{"max_adapters": 2}, {"max_rank": 2}, {"capacity_bytes": 2}])
def test_half_a_size(size: dict[str, int]) -> None:
    model = load(GPTQ)
    with pytest.raises(AdapterError, match=r"expected max_adapters and max_rank, at the first"):
        attach_adapters(model, {"a": A}, **size)
    assert session_names(model) == [] and layers(model)[0].injection.ctx is None


def test_too_small_a_bank_at_first_is_none() -> None:
    model = load(GPTQ)
    with pytest.raises(AdapterError, match=r"room for adapter a: .*expected to fit into 992 bytes"):
        attach_adapters(model, {"a": A}, max_adapters=2, max_rank=8, capacity_bytes=1000)
    assert session_names(model) == [] and all(moe.injection.ctx is None for moe in layers(model))
    attach_adapters(model, {"a": A}, max_adapters=1, max_rank=8)
    assert difference(logits(model, IDS, ["a"] * 3), alone(A)) < ROUNDING


@pytest.mark.parametrize("size", [{}, {"max_adapters": 2, "max_rank": 8}], ids=["own size", "fixed"])
def test_a_graph_captured_without_adapters(size: dict[str, int], mixed: Path) -> None:
    """Found at the second layer, when the first already has its context."""
    model = load(GPTQ)
    base = logits(model, IDS)
    layers(model)[1]._captured_without_lora = True
    with pytest.raises(BackendError, match="captured without LoRA"):
        attach_adapters(model, {"mixed": mixed}, **size)
    assert session_names(model) == [] and all(moe.injection.ctx is None for moe in layers(model))
    assert torch.equal(logits(model, IDS), base)
    layers(model)[1]._captured_without_lora = False
    attach_adapters(model, {"mixed": mixed}, **size)
    assert difference(logits(model, IDS, ["mixed"] * 3), alone(mixed)) < ROUNDING


def test_a_failure_inside_peft_takes_nothing_in(monkeypatch: pytest.MonkeyPatch, mixed: Path) -> None:
    import quant_moelora.integrations.linears as linears_module

    model = load(GPTQ)
    attach_adapters(model, {"a": A}, max_adapters=2, max_rank=8)
    before = logits(model, IDS, ["a"] * 3)

    def failing(model: Any, config: Any, name: str) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(linears_module, "LoraModel", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        attach_adapters(model, {"mixed": mixed})
    monkeypatch.undo()
    assert session_names(model) == ["a"]
    assert torch.equal(logits(model, IDS, ["a"] * 3), before)
    attach_adapters(model, {"mixed": mixed})
    assert difference(logits(model, IDS, ["mixed"] * 3), alone(mixed)) < ROUNDING


def test_detaching_from_a_model_of_another_origin() -> None:
    with pytest.raises(UnsupportedError, match="no experts of this library"):
        quant_moelora.detach_adapters(torch.nn.Linear(2, 2), ["a"])


def test_every_projection_counts(tmp_path: Path) -> None:
    """An adapter of all projections at the largest rank fits as often as max_adapters says."""
    folder = write_adapter(tmp_path / "x", expert_lora(QWEN, PROJECTIONS, rank=5))
    model = load(GPTQ)
    attach_adapters(model, {"x": folder, "y": folder}, max_adapters=2, max_rank=5)
    assert difference(logits(model, IDS, ["y"] * 3), logits(model, IDS, ["x"] * 3)) < ROUNDING
