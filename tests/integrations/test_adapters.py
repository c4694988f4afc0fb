"""attach_adapters in one forward: PEFT's own logits, mixed batches against each request alone, merged weights."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.parity import dense_twin
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import PREFIX, attention_lora, expert_lora, fused_lora, write_adapter
from tests.integrations.models import (
    ACCEPTED,
    ACT_ORDER,
    EFFECT,
    FUSED,
    GOLDEN,
    GPTQ,
    HONEST,
    PROJECTIONS,
    QWEN,
    ROUNDING,
    A,
    B,
    attention_adapter,
    difference,
    golden_logits,
    load,
    logits,
    random_ids,
    session_names,
)

ADAPTERS = {
    "adapters/lora-tp-qwen3moe-r8": "base-qwen3moe-h128-i96",
    "adapters/lora-tp-peft018-qwen3moe-r8": "base-qwen3moe-h128-i96",
    "adapters/lora-tp-mixtral-r4": "base-mixtral-h128-i128",
    "adapters/lora-mod-mixtral-rankpattern": "base-mixtral-h128-i128",
    f"adapters/{A.name}": "base-qwen3moe-h128-i96",
    f"adapters/{B.name}": "base-qwen3moe-h128-i96",
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_own_logits(name: str, device: torch.device) -> None:
    model = load(ADAPTERS[name], device_map=device)
    ids, expected = golden_logits(name)
    base = logits(model, ids)
    attach_adapters(model, {"x": GOLDEN / name})
    got = logits(model, ids, ["x"] * len(ids))
    assert difference(got, expected) < ACCEPTED, "the accepted bound"
    assert difference(got, expected) < HONEST, "the bound that holds"
    assert difference(base, expected) > EFFECT, "the adapter does something"
    assert torch.equal(logits(model, ids), base)


def test_all_adapters_of_a_base_attached_together() -> None:
    for base in sorted(set(ADAPTERS.values())):
        model = load(base)
        names = [name for name in ADAPTERS if ADAPTERS[name] == base]
        attach_adapters(model, {name.replace(".", "-"): GOLDEN / name for name in names})
        assert session_names(model) == names
        for name in names:
            ids, expected = golden_logits(name)
            assert difference(logits(model, ids, [name] * len(ids)), expected) < HONEST, name


@dataclass(frozen=True)
class Served:
    """A model with adapters, and what it said before they were attached."""

    model: Any
    ids: Tensor
    before: Tensor
    adapters: dict[str, Path]


# More rows than adapters; no two rows that follow one another, the first after the last, are of one adapter.
MIXED = ["fused", BASE_NAME, "partial", "attention", "experts", BASE_NAME, "partial"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the Qwen3 models: fused, per-expert, on attention and experts together, and on some experts only."""
    folder = tmp_path_factory.mktemp("adapters")
    half = {"gate": "gate_proj", "down": "down_proj"}
    return {
        "fused": A,
        "experts": B,
        "attention": attention_adapter(folder / "attention", more=expert_lora(QWEN, PROJECTIONS, rank=3)),
        "partial": write_adapter(folder / "partial", expert_lora(QWEN, half, experts=range(0, 8, 2), layers=[1])),
    }


@pytest.fixture(scope="module", params=[GPTQ, "base-qwen3moe-h128-i96"])
def served(request: pytest.FixtureRequest, adapters: dict[str, Path]) -> Served:
    model, ids = load(request.param), random_ids(len(MIXED), 11)
    before = logits(model, ids)
    attach_adapters(model, adapters)
    return Served(model, ids, before, adapters)


def test_a_row_of_a_mixed_batch_is_the_request_alone(served: Served) -> None:
    mixed = logits(served.model, served.ids, MIXED)
    for row, name in enumerate(MIXED):
        ids = served.ids[row : row + 1]
        alone = logits(served.model, ids, [name])[0]
        assert difference(mixed[row], alone) < ROUNDING, name
        for other in {*served.adapters, BASE_NAME} - {name}:
            assert difference(logits(served.model, ids, [other])[0], mixed[row]) > EFFECT, f"{name} or {other}?"


def test_a_row_of_a_mixed_batch_is_that_of_a_model_with_this_adapter_only(
    served: Served, adapters: dict[str, Path]
) -> None:
    mixed = logits(served.model, served.ids, MIXED)
    source = served.model.config._name_or_path
    for name in served.adapters:
        model = load(Path(source))
        attach_adapters(model, {name: adapters[name]})
        row = MIXED.index(name)
        assert difference(mixed[row], logits(model, served.ids[row : row + 1], [name])[0]) < ROUNDING, name


def test_another_slot_gives_another_result(served: Served) -> None:
    mixed = logits(served.model, served.ids, MIXED)
    swapped = logits(served.model, served.ids, MIXED[1:] + MIXED[:1])
    for row in range(len(MIXED)):
        assert difference(swapped[row], mixed[row]) > EFFECT, row


def test_rows_without_an_adapter_are_bitwise_the_model_without_adapters(served: Served) -> None:
    mixed = logits(served.model, served.ids, MIXED)
    for row, name in enumerate(MIXED):
        assert torch.equal(mixed[row], served.before[row]) == (name == BASE_NAME), row
    assert torch.equal(logits(served.model, served.ids, [BASE_NAME] * len(MIXED)), served.before)


def test_no_names_are_the_base_bitwise(served: Served) -> None:
    assert torch.equal(logits(served.model, served.ids), served.before)
    with torch.no_grad():
        assert torch.equal(served.model(served.ids, adapter_names=None).logits, served.before)


@pytest.mark.parametrize(("rows", "length"), [(2, 1), (3, 2), (4, 3), (5, 4), (6, 5), (8, 16)])
def test_rows_without_an_adapter_are_bitwise_at_any_size(served: Served, rows: int, length: int) -> None:
    """Whatever the other rows do: their routing changes with their adapter, and with it the size of every GEMM."""
    fresh = load(Path(served.model.config._name_or_path))
    for seed in range(3):
        ids = random_ids(rows, length, seed)
        names = [MIXED[(row + seed) % len(MIXED)] for row in range(rows)]
        kept = [row for row, name in enumerate(names) if name == BASE_NAME]
        assert torch.equal(logits(served.model, ids, names)[kept], logits(fresh, ids)[kept]), (seed, names)


def test_a_forward_leaves_nothing_behind(served: Served) -> None:
    """Names of one forward are not those of the next, also when it fails halfway."""
    logits(served.model, served.ids, ["fused"] * len(MIXED))
    assert torch.equal(logits(served.model, served.ids), served.before)
    with pytest.raises((IndexError, RuntimeError)):
        logits(served.model, served.ids + 10_000, ["fused"] * len(MIXED))
    assert torch.equal(logits(served.model, served.ids), served.before)


def test_fewer_names_serve_consecutive_rows(served: Served) -> None:
    ids = served.ids[:6]
    names = ["fused", "fused", BASE_NAME, BASE_NAME, "attention", "attention"]
    assert torch.equal(logits(served.model, ids, names[::2]), logits(served.model, ids, names))


def test_forward_names_its_argument_and_takes_its_inputs_any_way(served: Served) -> None:
    model, ids = served.model, served.ids
    parameters = inspect.signature(model.forward).parameters
    assert parameters["adapter_names"].default is None
    assert {"input_ids", "attention_mask", "inputs_embeds"} <= parameters.keys()
    expected = logits(model, ids, MIXED)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        ways = {
            "positional": model(ids, adapter_names=MIXED),
            "positional with mask": model(ids, torch.ones_like(ids), adapter_names=MIXED),
            "embeddings": model(inputs_embeds=embedded, adapter_names=MIXED),
            "tuple of names": model(ids, adapter_names=tuple(MIXED)),
        }
        for way, out in ways.items():
            assert difference(out.logits, expected) < ROUNDING, way
        assert len(model(ids, adapter_names=MIXED, return_dict=False)[0]) == len(ids)


def test_names_without_inputs(served: Served) -> None:
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        served.model(adapter_names=["fused"])


def test_mixed_batch_on_each_device(adapters: dict[str, Path], device: torch.device) -> None:
    model, ids = load(GPTQ, device_map=device), random_ids(len(MIXED), 11)
    before = logits(model, ids)
    attach_adapters(model, adapters)
    mixed = logits(model, ids, MIXED)
    kept = [row for row, name in enumerate(MIXED) if name == BASE_NAME]
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(mixed[kept], before[kept])
    for row, name in enumerate(MIXED):
        alone = logits(model, ids[row : row + 1], [name])[0]
        assert difference(mixed[row], alone) < ROUNDING, name


def test_mixed_batch_in_bfloat16(adapters: dict[str, Path]) -> None:
    model, ids = load(GPTQ, dtype=torch.bfloat16), random_ids(len(MIXED), 11)
    exact = load(GPTQ)
    attach_adapters(model, adapters)
    attach_adapters(exact, adapters)
    # 2**-9 a rounding, some 60 of them in sequence.
    assert difference(logits(model, ids, MIXED), logits(exact, ids, MIXED)) < 2**-9 * 60**0.5


# --- merged weights ---------------------------------------------------------------------------------------------------


def merge_a(twin: Any) -> None:
    """Adapter A: fused, rank 8, alpha 16, rsLoRA; A [E*r, K] expert-major, B [N, r*E] rank-major."""
    held = load_file(A / "adapter_model.safetensors")
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        for inner, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            a, b = (held[f"{PREFIX}{module}{inner}.lora_{factor}.weight"].double() for factor in "AB")
            weight = twin.get_parameter(f"{module}.{parameter}")
            for expert in range(8):
                rows, columns = range(expert * 8, expert * 8 + 8), range(expert, 64, 8)
                delta = 16 / math.sqrt(8) * b[:, list(columns)] @ a[list(rows)]
                weight[expert] = (weight[expert].double() + delta).float()


def merge_b(twin: Any) -> None:
    """Adapter B: per-expert modules, rank 4, alpha 8."""
    held = load_file(B / "adapter_model.safetensors")
    places = (("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 96), ("down_proj", "down_proj", 0))
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        for parameter, projection, row in places:
            weight = twin.get_parameter(f"{module}.{parameter}")
            for expert in range(8):
                key = f"{PREFIX}{module}.{expert}.{projection}.lora_{{}}.weight"
                delta = 8 / 4 * held[key.format("B")].double() @ held[key.format("A")].double()
                part = weight[expert, row : row + len(delta)]
                part.copy_((part.double() + delta).float())


def test_adapters_on_the_quantised_model_equal_merged_dense_weights() -> None:
    model, ids = load(GPTQ), random_ids(3, 19)
    twins: dict[str, Any] = {name: dense_twin(model) for name in ("a", "b")}
    with torch.no_grad():
        merge_a(twins["a"])
        merge_b(twins["b"])
    attach_adapters(model, {"a": A, "b": B})
    mixed = logits(model, torch.cat((ids, ids)), ["a"] * 3 + ["b"] * 3)
    assert difference(mixed[:3], logits(twins["a"], ids)) < ROUNDING
    assert difference(mixed[3:], logits(twins["b"], ids)) < ROUNDING


@pytest.mark.parametrize("form", ["fused", "per expert"])
def test_act_order_and_adapters_equal_merged_dense_weights(tmp_path: Path, form: str) -> None:
    """w2's act-order permutes the intermediate, hence rows of B13 and columns of A2; B is not small here."""
    tensors = (
        fused_lora(ACT_ORDER) if form == "fused" else expert_lora(ACT_ORDER, {"gate": "w1", "up": "w3", "down": "w2"})
    )
    config = {"target_parameters": FUSED} if form == "fused" else {}
    folder = write_adapter(tmp_path / "x", tensors, **config)
    model, ids = load("gptq-mixtral-int4-g32-descact"), random_ids(3, 19)
    twin: Any = dense_twin(model)
    with torch.no_grad():
        for layer in range(2):
            for parameter in ("gate_up_proj", "down_proj"):
                weight = twin.get_parameter(f"model.layers.{layer}.mlp.experts.{parameter}")
                for expert in range(ACT_ORDER.experts):
                    weight[expert] += 8 / 4 * mixtral_delta(tensors, form, layer, parameter, expert)
    attach_adapters(model, {"x": folder})
    assert difference(logits(model, ids, ["x"] * 3), logits(twin, ids)) < ROUNDING
    assert difference(logits(model, ids), logits(twin, ids)) > EFFECT


def mixtral_delta(tensors: dict[str, Tensor], form: str, layer: int, parameter: str, expert: int) -> Tensor:
    module = f"model.layers.{layer}.block_sparse_moe.experts"
    if form == "fused":
        inner = ".base_layer" if parameter == "gate_up_proj" else ""
        a, b = (tensors[f"{module}{inner}.lora_{factor}.weight"] for factor in "AB")
        return b[:, expert :: ACT_ORDER.experts] @ a[4 * expert : 4 * expert + 4]
    names = ("w1", "w3") if parameter == "gate_up_proj" else ("w2",)
    factors = [[tensors[f"{module}.{expert}.{name}.lora_{factor}.weight"] for factor in "AB"] for name in names]
    return torch.cat([b @ a for a, b in factors])


# --- attaching in steps -----------------------------------------------------------------------------------------------


def test_a_second_call_adds_to_the_first(tmp_path: Path, adapters: dict[str, Path]) -> None:
    """Experts only first, then attention and experts: earlier adapters keep their slots and their results."""
    model, ids = load(GPTQ), random_ids(3, 11)
    before = logits(model, ids)
    attach_adapters(model, {"one": adapters["fused"]})
    one = logits(model, ids, ["one"] * 3)
    attach_adapters(model, {"two": adapters["attention"]})
    assert session_names(model) == ["one", "two"]
    assert difference(logits(model, ids, ["one"] * 3), one) < ROUNDING
    two = logits(model, ids, ["two"] * 3)
    attach_adapters(model, {"three": adapters["partial"]})
    mixed = logits(model, ids, ["two", BASE_NAME, "one"])
    assert difference(mixed[0], two[0]) < ROUNDING
    assert torch.equal(mixed[1], before[1])
    assert difference(mixed[2], one[2]) < ROUNDING
    other = load(GPTQ)
    attach_adapters(other, {"two": adapters["attention"]})
    assert difference(two, logits(other, ids, ["two"] * 3)) < ROUNDING
    assert list(inspect.signature(model.forward).parameters).count("adapter_names") == 1


@pytest.mark.parametrize("form", ["fused", "per expert"])
def test_factors_in_bfloat16_are_their_values(tmp_path: Path, form: str) -> None:
    """An adapter saved in bfloat16, on experts and on attention, and its values in float32."""
    tensors = fused_lora(QWEN) if form == "fused" else expert_lora(QWEN, PROJECTIONS)
    narrow = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    config = {"target_parameters": FUSED} if form == "fused" else {}
    attention = attention_lora({"q_proj": (128, 128)})
    narrow |= {key: tensor.bfloat16() for key, tensor in attention.items()}
    folders = {
        "narrow": write_adapter(tmp_path / "narrow", narrow, **config),
        "wide": write_adapter(tmp_path / "wide", {k: t.float() for k, t in narrow.items()}, **config),
        "unrounded": write_adapter(tmp_path / "unrounded", tensors | attention, **config),
    }
    model, ids = load(GPTQ), random_ids(3, 11)
    attach_adapters(model, folders)
    got = {name: logits(model, ids, [name] * 3) for name in folders}
    assert torch.equal(got["narrow"], got["wide"])
    # Each factor was rounded by 2**-9 at most.
    assert ROUNDING < difference(got["narrow"], got["unrounded"]) < 2**-9 * 60**0.5


def test_two_adapters_on_attention(tmp_path: Path) -> None:
    """Of other targets and seeds, in one call and in two; nothing warns."""
    one = attention_adapter(tmp_path / "one")
    more = fused_lora(QWEN, ["down"], seed=9)
    two = attention_adapter(tmp_path / "two", seed=5, more=more, target_parameters=["experts.down_proj"], lora_alpha=4)
    ids = random_ids(3, 11)
    names = ["two", BASE_NAME, "one"]
    alone: dict[str, Tensor] = {}
    for name, folder in (("one", one), ("two", two)):
        model = load(GPTQ)
        alone[BASE_NAME] = logits(model, ids)
        attach_adapters(model, {name: folder})
        alone[name] = logits(model, ids, [name] * 3)
    together, stepwise = load(GPTQ), load(GPTQ)
    attach_adapters(together, {"one": one, "two": two})
    attach_adapters(stepwise, {"one": one})
    attach_adapters(stepwise, {"two": two})
    for model in (together, stepwise):
        mixed = logits(model, ids, names)
        for row, name in enumerate(names):
            assert difference(mixed[row], alone[name][row]) < ROUNDING, name
        assert torch.equal(logits(model, ids), alone[BASE_NAME])


def test_one_folder_under_two_names(adapters: dict[str, Path]) -> None:
    model, ids = load(GPTQ), random_ids(1, 11).expand(4, 11)
    attach_adapters(model, {"x": adapters["attention"], "z": adapters["fused"]})
    attach_adapters(model, {"y": adapters["fused"]})
    mixed = logits(model, ids, ["z", "y", "x", BASE_NAME])
    assert difference(mixed[0], mixed[1]) < ROUNDING
    assert difference(mixed[0], mixed[2]) > EFFECT


def test_dropout_of_the_config_is_not_applied(tmp_path: Path) -> None:
    model, ids = load(GPTQ), random_ids(2, 11)
    attach_adapters(model, {"with": attention_adapter(tmp_path / "with", lora_dropout=0.5)})
    other = load(GPTQ)
    attach_adapters(other, {"without": attention_adapter(tmp_path / "without")})
    assert torch.equal(logits(model, ids, ["with"] * 2), logits(other, ids, ["without"] * 2))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_the_way_an_adapter_was_initialised_means_nothing(tmp_path: Path, init: bool | str) -> None:
    model, ids = load(GPTQ), random_ids(2, 11)
    before = logits(model, ids)
    attach_adapters(model, {"x": attention_adapter(tmp_path / "x", init_lora_weights=init)})
    plain = load(GPTQ)
    attach_adapters(plain, {"x": attention_adapter(tmp_path / "y")})
    assert torch.equal(logits(model, ids, ["x"] * 2), logits(plain, ids, ["x"] * 2))
    assert torch.equal(logits(model, ids), before)


def test_attached_adapters_are_frozen(adapters: dict[str, Path]) -> None:
    model = load(GPTQ)
    attach_adapters(model, adapters)
    assert not [name for name, parameter in model.named_parameters() if "lora_" in name and parameter.requires_grad]
