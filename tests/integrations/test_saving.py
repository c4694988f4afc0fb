"""save_pretrained of a packed model, and dequantize: what they write loads with the same bits, or logits."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import quant_moelora as qm
from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.integrations.adapters import attach_adapters, detach_adapters
from quant_moelora.integrations.parity import dense_twin
from quant_moelora.integrations.transformers import experts_of, from_pretrained
from quant_moelora.loaders.checkpoint import Checkpoint
from tests.builders import same_bits
from tests.integrations.models import (
    EFFECT,
    GPTQ,
    HONEST,
    ROUNDING,
    A,
    attention_adapter,
    difference,
    folder_of,
    golden_logits,
    load,
    logits,
    random_ids,
)
from tests.integrations.test_convert import assert_same_model, convert, keys
from tests.integrations.test_families import IDS, saved

ACT_ORDER = "ct-old-mixtral-w4a16-g32-actorder-group"


@pytest.mark.parametrize("original_format", [True, False])
def test_a_saved_model_is_the_same_model(tmp_path: Path, original_format: bool) -> None:
    """Mixtral's: in its original keys the experts stand in a block of another name."""
    expected: Any = from_pretrained(folder_of(ACT_ORDER), backend="reference", tuned_configs=str(tmp_path))
    folder = tmp_path / "saved"
    expected.save_pretrained(folder, max_shard_size="200KB", save_original_format=original_format)
    assert any("block_sparse_moe.experts.w13.qweight" in key for key in keys(folder)) == original_format
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {"quant_method": "quant_moelora"}  # neither backend nor a folder of here
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        with safe_open(file, "pt") as held:
            assert json.loads(held.metadata()["quant_moelora"])["layers"].keys() == {"0", "1"}
    for loaded in (from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert_same_model(loaded, expected)


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss", "llama4_text", "minimax_m2"])
def test_unquantised_families(tmp_path: Path, model_type: str) -> None:
    expected: Any = from_pretrained(saved(tmp_path / "in", model_type)[0])
    expected.save_pretrained(tmp_path / "out")
    assert_same_model(from_pretrained(tmp_path / "out"), expected)


def test_saving_is_that_of_a_converted_checkpoint(tmp_path: Path) -> None:
    load(GPTQ, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    convert(folder_of(GPTQ), tmp_path / "converted")
    ours, theirs = (Checkpoint(tmp_path / name) for name in ("saved", "converted"))
    assert list(ours.metadata.values()) == list(theirs.metadata.values())
    assert ours.headers.keys() == theirs.headers.keys()
    assert all(same_bits(ours.read(key), theirs.read(key)) for key in ours.headers)


def test_adapters_are_not_saved_with_the_base(tmp_path: Path) -> None:
    """PEFT's layers stand around those of attention, while adapters are attached and after."""
    model, expected = load(GPTQ), load(GPTQ)
    attention = attention_adapter(tmp_path / "attention")
    attach_adapters(model, {"a": A, "attention": attention})
    assert any("base_layer" in key for key in model.state_dict())
    for name, detached in (("attached", ()), ("detached", ("a", "attention"))):
        detach_adapters(model, detached)
        model.save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name)
        assert not any("lora" in key or "base_layer" in key for key in keys(tmp_path / name))
        assert_same_model(loaded, expected)
    inside: Any = PeftModel.from_pretrained(load(GPTQ), attention).get_base_model()
    inside.save_pretrained(tmp_path / "inside")
    assert_same_model(load(tmp_path / "inside"), expected)
    ids = random_ids(2, 9)
    attach_adapters(loaded, {"a": A})
    assert difference(logits(loaded, ids, ["a"] * 2), logits(expected, ids)) > EFFECT


# --- dequantize --------------------------------------------------------------------------------------------------


def stock(model: Any, folder: Path) -> Any:
    """The model, saved and loaded by transformers alone."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert not any("qweight" in key or ".w13" in key for key in keys(folder))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert not experts_of(loaded) and not hasattr(loaded, "hf_quantizer")
    return loaded


@pytest.mark.parametrize("name", [GPTQ, ACT_ORDER, "base-mixtral-h128-i128"])
def test_a_dequantised_model_is_stock(tmp_path: Path, name: str) -> None:
    ids, expected = golden_logits(name)
    model = load(name)
    before = logits(model, ids)
    dense: Any = qm.dequantize(model)
    assert type(dense) is type(model) and dense.dtype == torch.float32 and not dense.training
    assert difference(logits(dense, ids), expected) < HONEST
    assert difference(logits(stock(dense, tmp_path / "dense"), ids), logits(dense, ids)) < ROUNDING
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids), before), "the packed model is left alone"


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "qwen3_5_moe_text"])
def test_families_are_stock_again(tmp_path: Path, model_type: str) -> None:
    """Biases and rows by turns; a block that was replaced; buffers beside the parameters."""
    folder, original = saved(tmp_path / "in", model_type)
    model: Any = from_pretrained(folder)
    dense: Any = qm.dequantize(model)
    theirs = dict(original.named_parameters())
    ours = dict(dense.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(parameter, theirs[key]) for key, parameter in ours.items())
    assert [type(module) for module in dense.modules()] == [type(module) for module in original.modules()]
    assert difference(logits(dense, IDS), logits(original, IDS)) < ROUNDING
    model.dequantize()
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert difference(logits(stock(model, tmp_path / "out"), IDS), logits(original, IDS)) < ROUNDING


def test_dequantize_of_transformers_is_in_place(tmp_path: Path) -> None:
    """The object that the caller holds becomes stock, as with transformers' own quantizers."""
    model, ids = load(GPTQ), random_ids(3, 9)
    twin = dense_twin(model)
    assert model.dequantize() is model
    assert not experts_of(model) and not hasattr(model.config, "quantization_config") and not model.is_quantized
    assert "adapter_names" not in inspect.signature(model.forward).parameters
    assert torch.equal(logits(model, ids), logits(twin, ids))
    assert difference(logits(stock(model, tmp_path / "out"), ids), logits(twin, ids)) < ROUNDING


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_another_dtype(dtype: Any, in_place: bool) -> None:
    """The exact values, rounded once; everything else that was in the model's dtype too."""
    model = load(GPTQ)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    exact = dict(dense_twin(model).named_parameters())
    dense: Any = model.dequantize(dtype) if in_place else qm.dequantize(model, dtype)
    assert dense.dtype == dense.config.dtype == wanted
    held: dict[str, Tensor] = dict(dense.named_parameters())
    assert held.keys() == exact.keys()
    assert all(same_bits(parameter.data, exact[key].data.to(wanted)) for key, parameter in held.items())


def test_experts_are_of_the_models_dtype_after_it_was_saved(tmp_path: Path) -> None:
    """transformers leaves its config with the dtype as text."""
    model = load(GPTQ, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    assert {parameter.dtype for parameter in model.dequantize().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("in_place", [False, True])
def test_adapters_are_not_left_out_silently(in_place: bool) -> None:
    model = load(GPTQ)
    attach_adapters(model, {"a": A})
    with pytest.raises(AdapterError, match="adapters a attached"):
        model.dequantize() if in_place else qm.dequantize(model)
    detach_adapters(model, ["a"])
    ids = random_ids(2, 9)
    expected = logits(model, ids)
    assert difference(logits(qm.dequantize(model), ids), expected) < ROUNDING


@pytest.mark.parametrize("call", ["save_pretrained", "dequantize"])
def test_a_part_of_a_model_is_refused(tmp_path: Path, call: str) -> None:
    """As each of several processes has it."""
    model = load(GPTQ)
    for experts in experts_of(model).values():
        assert experts.moe is not None
        experts.moe.info = experts.moe.info.part(ParallelConfig(ep_size=2))
    with pytest.raises(UnsupportedError, match="whole layers"):
        model.save_pretrained(tmp_path) if call == "save_pretrained" else model.dequantize()
    assert not list(tmp_path.iterdir())


def test_a_model_without_packed_experts() -> None:
    with pytest.raises(UnsupportedError, match="no experts of this library"):
        qm.dequantize(dense_twin(load(GPTQ)))
