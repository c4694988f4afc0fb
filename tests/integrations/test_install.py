"""install: stock scripts get packed models, everything else loads as before, and uninstall leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import quant_moelora as qm
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.transformers import experts_of
from tests.integrations.models import (
    EFFECT,
    GPTQ,
    HONEST,
    QUANTIZED,
    ROUNDING,
    A,
    B,
    copy_checkpoint,
    difference,
    folder_of,
    golden_logits,
    load,
    logits,
    random_ids,
)


@pytest.fixture
def installed() -> Any:
    qm.install()
    yield
    qm.uninstall()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [name for name in QUANTIZED if "old" not in name])
def test_quantised_models_with_experts_are_packed(name: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32, device_map="auto")
    assert experts_of(model)
    ids, expected = golden_logits(name)
    assert difference(logits(model, ids), expected) < HONEST


@pytest.mark.usefixtures("installed")
def test_the_usual_arguments_arrive() -> None:
    result: Any = AutoModelForCausalLM.from_pretrained(
        str(folder_of(GPTQ)), torch_dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    model, info = result
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert not info["missing_keys"] and experts_of(model)
    config = AutoConfig.from_pretrained(folder_of(GPTQ))
    config.use_cache = False
    again: Any = AutoModelForCausalLM.from_pretrained(folder_of(GPTQ).parent, config=config, subfolder=GPTQ)
    assert again.config.use_cache is False and experts_of(again)
    assert isinstance(config.quantization_config, dict), "the caller's config stays as it was"
    assert config.quantization_config["quant_method"] != "quant_moelora"


def test_what_is_not_ours_loads_as_before(tmp_path: Path, installed: None, caplog: pytest.LogCaptureFixture) -> None:
    """Dense, without quantisation, quantised without experts, and experts in a format that is not served."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).__name__ == "LlamaForCausalLM"
    plain: Any = AutoModelForCausalLM.from_pretrained(folder_of("base-qwen3moe-h128-i96"))
    assert not experts_of(plain) and plain.model.layers[0].mlp.experts.gate_up_proj.ndim == 3
    held = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    held["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(ImportError, match="optimum"):  # transformers' own word for its quantizer
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not caplog.records

    def other_bits(config: dict[str, Any]) -> None:
        config["quantization_config"] |= {"bits": 3}

    folder = copy_checkpoint("gptq_v2-qwen3moe-int4-g32-asym", tmp_path / "three", config=other_bits)
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "is left to transformers" in caplog.text
    with pytest.raises(OSError, match="couldn't connect"):
        AutoModelForCausalLM.from_pretrained("nobody/nothing")


def test_installing_twice_and_uninstalling() -> None:
    stock, tuner = AutoModelForCausalLM.__dict__["from_pretrained"], PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    qm.install()
    patched = AutoModelForCausalLM.__dict__["from_pretrained"]
    assert patched is not stock and patched.__func__.__doc__ == stock.__func__.__doc__
    qm.install()
    assert AutoModelForCausalLM.__dict__["from_pretrained"] is patched
    qm.uninstall()
    assert AutoModelForCausalLM.__dict__["from_pretrained"] is stock
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
    qm.uninstall()
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(folder_of("gptq_v2-qwen3moe-int4-g32-asym"))
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = tuner


def test_somebody_elses_patch_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    qm.install()
    held = AutoModelForCausalLM.__dict__["from_pretrained"]

    def theirs(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return held.__func__(cls, *args, **kwargs)

    theirs.__dict__.update(held.__func__.__dict__)  # what functools.wraps does
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(theirs))
        with pytest.raises(UnsupportedError, match=r"uninstall: got AutoModelForCausalLM.from_pretrained of tests"):
            qm.uninstall()
    monkeypatch.undo()
    AutoModelForCausalLM.from_pretrained = held  # monkeypatch puts a bound method there
    qm.uninstall()


@pytest.mark.usefixtures("installed")
def test_a_pipeline_generates() -> None:
    path = str(folder_of(GPTQ))
    generator: Any = pipeline("text-generation", model=path, dtype=torch.float32)
    assert experts_of(generator.model)
    prompt = "t69 t250 t133"
    got = generator(prompt, max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(GPTQ)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert list(got) == ids[0].tolist()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("adapter", [False, True])
def test_trainer_evaluates_and_does_not_train(tmp_path: Path, adapter: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder_of(GPTQ), dtype=torch.float32)
    if adapter:
        model.load_adapter(str(A), adapter_name="a")
    ids = random_ids(4, 9)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(model=model, args=arguments, eval_dataset=data, train_dataset=data)
    got = trainer.evaluate()["eval_loss"]
    expected = torch.nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(got - float(expected)) < 1e-4 * float(expected)
    with pytest.raises(UnsupportedError, match="training: got a forward of packed experts in training mode"):
        trainer.train()


STOCK_SCRIPT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="auto")
model = PeftModel.from_pretrained(model, a, adapter_name="a")
model.load_adapter(b, adapter_name="b")
inputs = tokenizer(["t69 t250 t133", "t3 t4", "t5"], return_tensors="pt", padding=True).to(model.device)
ids = model.generate(**inputs, adapter_names=["a", "__base__", "b"], max_new_tokens=4, do_sample=False)
model.set_adapter("b")
with torch.no_grad():
    logits = model(**inputs).logits
"""


@pytest.mark.usefixtures("installed")
def test_a_stock_script_runs_unchanged() -> None:
    """Nothing in it is of this library; the same with its own calls gives the same."""
    done: dict[str, Any] = {"path": str(folder_of(GPTQ)), "a": str(A), "b": str(B)}
    exec(STOCK_SCRIPT, done)
    model, inputs = load(GPTQ, device_map="auto"), done["inputs"]
    assert experts_of(done["model"])
    attach_adapters(model, {"a": A, "b": B})
    names = ["a", "__base__", "b"]
    ids = model.generate(**inputs, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert torch.equal(done["ids"], ids)
    with torch.no_grad():
        assert difference(done["logits"], model(**inputs, adapter_names=["b"] * 3).logits) < ROUNDING
        assert difference(done["logits"], model(**inputs).logits) > EFFECT
