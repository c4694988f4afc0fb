"""PEFT's own calls, and the adapter methods of transformers' models, against stock PEFT on the dequantised twin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.integrations import peft as ours
from quant_moelora.integrations.adapters import adapters_of, attach_adapters, detach_adapters
from quant_moelora.integrations.parity import dense_twin
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import CONFIG, WEIGHTS, attention_lora, expert_lora, fused_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    FUSED,
    GPTQ,
    PROJECTIONS,
    QWEN,
    ROUNDING,
    Generated,
    difference,
    generate,
    load,
    logits,
    random_ids,
)

ATTENTION = {"q_proj": (128, 128), "v_proj": (64, 128)}
IDS = random_ids(3, 11)
# PEFT's own words on things that the calls of a user bring about.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "The following (rank|alpha)_pattern keys did not match",
        "Adapter .* was active which is now deleted",
        "Already found a `peft_config` attribute",
        "You are trying to modify a model with PEFT for a second time",
    )
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``a`` and ``b`` as PEFT writes them for fused experts and attention, ``experts`` on modules of single experts."""
    root = tmp_path_factory.mktemp("adapters")
    config: dict[str, Any] = {"target_modules": list(ATTENTION), "target_parameters": FUSED}
    made = {
        name: write_adapter(root / name, fused_lora(QWEN, seed=seed) | attention_lora(ATTENTION, seed=seed), **config)
        for name, seed in (("a", 3), ("b", 14))
    }
    tensors = expert_lora(QWEN, PROJECTIONS, seed=5) | attention_lora(ATTENTION, seed=6)
    made["experts"] = write_adapter(root / "e", tensors, target_modules=[*ATTENTION, *PROJECTIONS.values()], r=4)
    made["only_experts"] = write_adapter(root / "o", fused_lora(QWEN, seed=8), target_parameters=FUSED)
    gates = {k: t for n in range(2) for k, t in linear_lora(f"model.layers.{n}.mlp.gate", 8, 128, seed=n).items()}
    config["target_parameters"] = [*FUSED, "mlp.gate.weight"]
    for name, seed in (("router", 16), ("router2", 17)):
        scaled = {key: tensor * (seed - 15) for key, tensor in gates.items()}
        tensors = fused_lora(QWEN, seed=seed) | attention_lora(ATTENTION, seed=seed) | scaled
        made[name] = write_adapter(root / name, tensors, **config)
    made["attention"] = write_adapter(root / "t", attention_lora(ATTENTION, seed=9), target_modules=list(ATTENTION))
    return made


@dataclass
class Pair:
    """The packed model and stock PEFT's dense one, with the same calls behind them."""

    packed: Any
    stock: Any
    base: Tensor  # (rows, length, vocabulary), logits of the packed model without adapters

    def both(self) -> tuple[Any, Any]:
        return self.packed, self.stock

    def check(self, effect: float = EFFECT) -> Tensor:
        """Logits of the packed model, which must be stock's, and at least so far from the base's."""
        got = logits(self.packed, IDS)
        assert difference(got, logits(self.stock, IDS)) < ROUNDING
        assert difference(got, self.base) > effect
        return got


@pytest.fixture
def pair(folders: dict[str, Path]) -> Pair:
    """``a`` loaded by PeftModel.from_pretrained, and ``b`` by load_adapter."""
    model = load(GPTQ)
    base, dense = logits(model, IDS), dense_twin(model)
    packed, stock = (PeftModel.from_pretrained(m, str(folders["a"]), adapter_name="a") for m in (model, dense))
    for peft_model in (packed, stock):
        peft_model.load_adapter(str(folders["b"]), adapter_name="b")
    return Pair(packed, stock, base)


def test_the_first_adapter_is_active_and_others_when_they_are_set(pair: Pair) -> None:
    assert type(pair.packed) is type(pair.stock) and type(pair.stock.base_model) is LoraModel
    one = pair.check()
    for peft_model in pair.both():
        peft_model.set_adapter("b")
    assert difference(pair.check(), one) > EFFECT
    assert pair.packed.active_adapters == pair.stock.active_adapters == ["b"]


@pytest.mark.parametrize("name", ["experts", "only_experts", "attention", "router"])
def test_every_kind_of_adapter(folders: dict[str, Path], name: str) -> None:
    """Also what PEFT converts for transformers 5, and adapters without anything that PEFT could wrap."""
    model = load(GPTQ)
    pair = Pair(model, dense_twin(model), logits(model, IDS))
    pair.packed, pair.stock = (PeftModel.from_pretrained(m, str(folders[name])) for m in pair.both())
    pair.check()
    with pair.packed.disable_adapter():
        assert torch.equal(logits(pair.packed, IDS), pair.base)


def test_several_active_adapters_are_added_up(pair: Pair) -> None:
    alone = pair.check()
    for peft_model in pair.both():
        peft_model.base_model.set_adapter(["a", "b"])
    assert difference(pair.check(), alone) > EFFECT
    for peft_model in pair.both():  # the sum leaves the bank, and one of them changes
        peft_model.set_adapter("b")
    pair.check()
    assert not adapters_of(pair.packed).session.combined


def test_several_active_adapters_of_routers(folders: dict[str, Path]) -> None:
    model = load(GPTQ)
    pair = Pair(model, dense_twin(model), logits(model, IDS))
    pair.packed, pair.stock = (PeftModel.from_pretrained(m, str(folders["router"]), "one") for m in pair.both())
    for peft_model in pair.both():
        peft_model.load_adapter(str(folders["router2"]), "two")
        peft_model.base_model.set_adapter(["two", "one"])
    together = pair.check()
    mixed = logits(pair.packed, IDS, ["two", BASE_NAME, "one"])
    assert torch.equal(mixed[1], pair.base[1])
    for row, name in ((0, "two"), (2, "one")):
        pair.stock.set_adapter(name)
        assert difference(mixed[row], logits(pair.stock, IDS[row : row + 1])[0]) < ROUNDING
        assert difference(mixed[row], together[row]) > EFFECT


def test_disabled_adapters(pair: Pair) -> None:
    pair.check()
    with pair.packed.disable_adapter():
        assert torch.equal(logits(pair.packed, IDS), pair.base)
        assert torch.equal(logits(pair.packed, IDS, ["a", "b", "a"]), pair.base), "as in PEFT, names too"
    pair.check()


def test_deleted_adapters(pair: Pair) -> None:
    for peft_model in pair.both():
        peft_model.delete_adapter("a")
    pair.check()
    assert pair.packed.active_adapters == pair.stock.active_adapters == ["b"]
    with pytest.raises(ValueError, match="unknown a"):
        logits(pair.packed, IDS, ["a", "b", "b"])
    pair.packed.delete_adapter("b")
    assert torch.equal(logits(pair.packed.base_model.model, IDS), pair.base)


def test_a_mixed_batch_in_forward_and_generate(pair: Pair) -> None:
    names = ["b", BASE_NAME, "a"]
    mixed = logits(pair.packed, IDS, names)
    assert torch.equal(mixed[1], pair.base[1])
    for row, name in ((0, "b"), (2, "a")):
        pair.stock.set_adapter(name)
        assert difference(mixed[row], logits(pair.stock, IDS[row : row + 1])[0]) < ROUNDING
    requests = [IDS[0, :7], IDS[1, :4], IDS[2]]
    together = generate(pair.packed, requests, names)
    for row, name in enumerate(names):
        alone = generated_by_stock(pair.stock, requests[row], name)
        assert torch.equal(together.tokens[row], alone.tokens[0]), name
        assert difference(together.logits[row], alone.logits[0]) < ROUNDING
    beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    pair.stock.set_adapter("b")
    got = pair.packed.generate(input_ids=IDS, adapter_names=["b"] * 3, **beams)
    assert torch.equal(got, pair.stock.generate(input_ids=IDS, **beams))


def generated_by_stock(stock: Any, request: Tensor, name: str) -> Generated:
    if name == BASE_NAME:
        with stock.disable_adapter():
            return generate(stock, [request])
    stock.set_adapter(name)
    return generate(stock, [request])


def test_a_name_that_is_not_there_and_training_mode(pair: Pair) -> None:
    with pytest.raises(ValueError, match="unknown c"):
        logits(pair.packed, IDS, ["c"] * 3)
    pair.packed.train()
    with pytest.raises(AdapterError, match="model in training mode"):
        logits(pair.packed, IDS, ["a"] * 3)
    with pytest.raises(UnsupportedError, match=r"training: got a forward of packed experts"):
        pair.packed(input_ids=IDS)


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_weighted_adapters(pair: Pair, tmp_path: Path, folders: dict[str, Path], combination: Any) -> None:
    """Stock PEFT does this for linear layers alone, so that it gets the same sums of the files' tensors."""
    weights = [0.8, -0.5]
    pair.packed.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=combination)
    assert pair.packed.active_adapters == ["a"]
    pair.packed.set_adapter("sum")
    pair.stock.load_adapter(str(combined(folders, weights, combination, tmp_path)), "sum")
    pair.stock.set_adapter("sum")
    got = pair.check()
    pair.packed.save_pretrained(str(tmp_path / "saved"), selected_adapters=["sum"])
    again = PeftModel.from_pretrained(dense_twin(load(GPTQ)), str(tmp_path / "saved" / "sum"))
    assert difference(logits(again, IDS), got) < ROUNDING


def combined(folders: dict[str, Path], weights: list[float], combination: str, folder: Path) -> Path:
    """The weighted sum of ``a`` and ``b``, whose scalings are 2, by the files' own layout."""
    one, other = (load_file(folders[name] / WEIGHTS) for name in "ab")
    tensors: dict[str, Tensor] = {}
    roots = [(2 * abs(weight)) ** 0.5 for weight in weights]
    signs = [1 if weight > 0 else -1 for weight in weights]
    for key in one:
        is_a = ".lora_A." in key
        if combination == "linear":
            factors = [root * sign if is_a else root for root, sign in zip(roots, signs, strict=True)]
            tensors[key] = factors[0] * one[key] + factors[1] * other[key]
            continue
        factors = [2 * weight if is_a else 1.0 for weight in weights]
        parts = [factors[0] * one[key], factors[1] * other[key]]
        if ".experts." not in key:
            tensors[key] = torch.cat(parts, 0 if is_a else 1)
        elif is_a:  # (E*r, K), an expert's ranks together
            tensors[key] = torch.cat([part.view(8, 4, -1) for part in parts], 1).flatten(0, 1)
        else:  # (N, r*E), an expert's ranks apart
            tensors[key] = torch.cat([part.view(len(part), 4, 8) for part in parts], 1).flatten(1)
    rank = 4 if combination == "linear" else 8
    made = write_adapter(
        folder / "by hand", {}, r=rank, lora_alpha=rank, target_modules=list(ATTENTION), target_parameters=FUSED
    )
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, made / WEIGHTS)
    return made


def test_combinations_that_are_not_served(pair: Pair, folders: dict[str, Path]) -> None:
    for combination in ("svd", "ties", "dare_linear_svd"):
        with pytest.raises(AdapterError, match=f"{combination}.*expected cat or linear"):
            pair.packed.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type=combination)
    with pytest.raises(AdapterError, match="svd"):
        pair.packed.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="unknown c"):
        pair.packed.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum", combination_type="cat")
    pair.check()


def test_merging_is_refused_before_anything_is_merged(pair: Pair) -> None:
    for call in (pair.packed.merge_and_unload, pair.packed.merge_adapter):
        with pytest.raises(UnsupportedError, match="merging adapters: got packed experts"):
            call()
    pair.check()


def test_unload_gives_the_base_model(pair: Pair, folders: dict[str, Path]) -> None:
    model = pair.packed.unload()
    assert torch.equal(logits(model, IDS), pair.base)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    attach_adapters(model, {"a": folders["a"]})
    pair.stock.set_adapter("a")
    assert difference(logits(model, IDS, ["a"] * 3), logits(pair.stock, IDS)) < ROUNDING


def test_saved_adapters_are_the_loaded_ones_bit_for_bit(pair: Pair, tmp_path: Path, folders: dict[str, Path]) -> None:
    pair.packed.save_pretrained(str(tmp_path / "saved"))
    for name in "ab":
        saved = tmp_path / "saved" / name
        got, expected = load_file(saved / WEIGHTS), load_file(folders[name] / WEIGHTS)
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
        held = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
        assert (held["r"], held["lora_alpha"], sorted(held["target_parameters"])) == (4, 8, sorted(FUSED))
        again = PeftModel.from_pretrained(dense_twin(load(GPTQ)), str(saved))
        pair.packed.set_adapter(name)
        assert difference(logits(again, IDS), logits(pair.packed, IDS)) < ROUNDING


def test_stock_saves_what_is_served_here(pair: Pair, tmp_path: Path) -> None:
    pair.stock.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(load(GPTQ), str(tmp_path / "saved" / "b"))
    pair.stock.set_adapter("b")
    assert difference(logits(again, IDS), logits(pair.stock, IDS)) < ROUNDING


def test_a_converted_adapter_is_saved_as_pefts_own(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Per-expert modules become fused parameters, in PEFT's own way, and the saved file is one of these."""
    packed = PeftModel.from_pretrained(load(GPTQ), str(folders["experts"]))
    packed.save_pretrained(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(dense_twin(load(GPTQ)), str(tmp_path / "saved"))
    assert difference(logits(again, IDS), logits(packed, IDS)) < ROUNDING
    held = adapters_of(packed)
    assert {factor.a.shape[0] for factor in held.held["default"].layers[0].values()} == {4}, "an A for each projection"


def test_adapters_to_be_trained_are_refused(folders: dict[str, Path]) -> None:
    model = load(GPTQ)
    with pytest.raises(UnsupportedError, match="an adapter to be trained"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="an adapter to be trained"):
        PeftModel.from_pretrained(model, str(folders["a"]), is_trainable=True)
    with pytest.raises(UnsupportedError, match="is_trainable=True"):
        model.load_adapter(str(folders["a"]), is_trainable=True)


@pytest.mark.parametrize("missing", [(3,), (0, 1, 4, 5)])
def test_per_expert_lora_of_some_experts_is_no_other_rank(tmp_path: Path, missing: tuple[int, ...]) -> None:
    """PEFT stacks the experts that are there: of half of them it would make all, of half the rank."""
    kept = [expert for expert in range(8) if expert not in missing]
    folder = write_adapter(tmp_path / "x", expert_lora(QWEN, PROJECTIONS, experts=kept), target_modules=["gate_proj"])
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"target_modules": list(PROJECTIONS.values())}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    model = load(GPTQ)
    with pytest.raises(AdapterError, match="experts"):
        PeftModel.from_pretrained(model, str(folder))
    attach_adapters(load(GPTQ), {"x": folder})


def test_an_adapter_that_does_not_fit_is_not_left_half_there(pair: Pair, tmp_path: Path) -> None:
    alien = linear_lora("model.layers.0.self_attn.q_proj", 64, 128)
    folder = write_adapter(tmp_path / "x", fused_lora(QWEN) | alien, target_modules=["q_proj"], target_parameters=FUSED)
    with pytest.raises(AdapterError, match=r"LoRA of model.layers.0.self_attn.q_proj"):
        pair.packed.load_adapter(str(folder), "x")
    assert list(adapters_of(pair.packed).held) == ["a", "b"]
    pair.check()


@pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter was matched")
def test_stock_tuner_does_not_leave_experts_out_in_silence(folders: dict[str, Path]) -> None:
    """Without our entry in its table, PEFT would load attention alone."""
    model = load(GPTQ)
    ours.unregister()
    try:
        with pytest.raises(AdapterError, match=r"LoRA of experts.*quant_moelora.install\(\)"):
            PeftModel.from_pretrained(model, str(folders["a"]))
    finally:
        ours.register()


def test_other_models_get_pefts_own_tuner() -> None:
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is ours.MoELoraModel
    twin = dense_twin(load(GPTQ))
    wrapped: Any = get_peft_model(twin, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(wrapped.base_model) is LoraModel


def test_a_tuner_of_somebody_else_stays() -> None:
    class Other(LoraModel):
        pass

    ours.unregister()
    try:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Other
        ours.register()
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is Other
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
        ours.register()


# --- the adapter methods of transformers' models ----------------------------------------------------------------------


def test_methods_of_the_model(folders: dict[str, Path]) -> None:
    model = load(GPTQ)
    pair = Pair(model, dense_twin(model), logits(model, IDS))
    for each in pair.both():
        each.load_adapter(str(folders["a"]), adapter_name="a")
        each.load_adapter(str(folders["b"]), adapter_name="b")
    assert model.active_adapters() == pair.stock.active_adapters() == ["b"]
    both = pair.check()
    for each in pair.both():
        each.set_adapter("a")
    assert difference(pair.check(), both) > EFFECT
    for each in pair.both():
        each.set_adapter(["b", "a"])
    pair.check()
    model.disable_adapters()
    assert torch.equal(logits(model, IDS), pair.base)
    model.enable_adapters()
    pair.check()
    mixed = logits(model, IDS, ["a", BASE_NAME, "b"])
    assert torch.equal(mixed[1], pair.base[1])
    for each in pair.both():
        each.set_adapter("b")
        each.delete_adapter("a")
    assert difference(mixed[2], pair.check()[2]) < ROUNDING
    state = model.get_adapter_state_dict("b")
    expected = load_file(folders["b"] / WEIGHTS)
    assert {f"base_model.model.{key}" for key in state} == expected.keys()
    model.delete_adapter("b")
    assert torch.equal(logits(model, IDS), pair.base)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.set_adapter("b")


def test_load_adapter_of_the_model_takes_tensors(folders: dict[str, Path]) -> None:
    model, other = load(GPTQ), load(GPTQ)
    tensors = load_file(folders["a"] / WEIGHTS)
    config = LoraConfig.from_pretrained(str(folders["a"]))
    model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    other.load_adapter(str(folders["a"]))
    assert model.active_adapters() == ["default"]
    assert torch.equal(logits(model, IDS), logits(other, IDS))
    with pytest.raises(AdapterError, match="neither a folder nor config and tensors"):
        model.load_adapter(adapter_name="x")
    with pytest.raises(AdapterError, match="adapter name: got 'default'"):
        model.load_adapter(str(folders["b"]))


def test_attached_adapters_are_not_active_until_they_are_set(folders: dict[str, Path]) -> None:
    model = load(GPTQ)
    base = logits(model, IDS)
    attach_adapters(model, {name: folders[name] for name in "ab"})
    assert torch.equal(logits(model, IDS), base)
    model.load_adapter(str(folders["attention"]), adapter_name="c")
    named, active = logits(model, IDS, ["c"] * 3), logits(model, IDS)
    assert difference(named, active) < ROUNDING and difference(active, base) > EFFECT
    detach_adapters(model, ["c"])
    assert torch.equal(logits(model, IDS), base)


def test_active_adapters_in_a_bank_of_fixed_size(folders: dict[str, Path]) -> None:
    """The sum takes a slot and its rank; without room for it nothing changes."""
    model, free = load(GPTQ), load(GPTQ)
    attach_adapters(model, {}, max_adapters=3, max_rank=8)
    for each in (model, free):
        each.load_adapter(str(folders["a"]), adapter_name="a")
        each.load_adapter(str(folders["b"]), adapter_name="b")
        each.set_adapter(["a", "b"])
    assert difference(logits(model, IDS), logits(free, IDS)) < ROUNDING
    model.set_adapter("a")
    attach_adapters(model, {"third": folders["experts"]})
    with pytest.raises(AdapterError, match=r"room for adapter a\.b"):
        adapters_of(model).set_adapter(["a", "b"])
    assert adapters_of(model).active_adapters == model.active_adapters() == ["a"]


def test_a_sum_that_does_not_fit_leaves_the_one_before(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(GPTQ)
    attach_adapters(model, {}, max_adapters=4, max_rank=8)
    wide = write_adapter(tmp_path / "wide", fused_lora(QWEN, rank=6, seed=4), r=6, target_parameters=FUSED)
    attach_adapters(model, {"a": folders["a"], "b": folders["b"], "wide": wide})
    held = adapters_of(model)
    held.set_adapter(["a", "b"])
    before = logits(model, IDS)
    with pytest.raises(AdapterError, match=r"a\.wide.*rank 10, expected at most max_rank = 8"):
        held.set_adapter(["a", "wide"])
    with pytest.raises(AdapterError, match="active adapters: got unknown c"):
        held.set_adapter(["a", "c"])
    assert torch.equal(logits(model, IDS), before) and held.active_adapters == ["a", "b"]
