"""convert: what it writes loads as the checkpoint does, bit for bit; all of it appears, or nothing."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant_moelora as qm
from quant_moelora.cli.inspect import describe
from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.integrations import convert as module
from quant_moelora.integrations.convert import convert
from quant_moelora.integrations.transformers import experts_of, from_pretrained
from quant_moelora.integrations.verify import verify
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_experts
from tests.builders import same_bits
from tests.checkpoints import (
    gptq_v2,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    write_checkpoint,
)
from tests.integrations.models import GPTQ, copy_checkpoint, folder_of, logits, random_ids
from tests.integrations.test_families import beside, moved, quantise_experts, saved
from tests.integrations.test_tools import config_of, gptqmodel, halves
from tests.loaders.test_packed_form import assert_same, rewrite

SHARD = 150_000  # bytes of a file: less than a layer of the golden checkpoints, more than most of its tensors


def infos(model: Any) -> dict[int, MoEQuantInfo]:
    """Every layer's experts."""
    return {experts.spec.layer: experts.moe.info for experts in experts_of(model).values() if experts.moe}


def assert_same_model(got: Any, expected: Any) -> None:
    """Experts, parameters and buffers have the same names, dtypes and bits, and so have logits."""
    ours, theirs = infos(got), infos(expected)
    assert ours.keys() == theirs.keys() and ours
    for number, info in ours.items():
        assert_same(info, theirs[number])
    for kind in ("named_parameters", "named_buffers"):
        held, wanted = dict(getattr(got, kind)()), dict(getattr(expected, kind)())
        assert held.keys() == wanted.keys()
        for name, tensor in held.items():
            assert tensor.dtype == wanted[name].dtype and same_bits(tensor.data, wanted[name].data), name
    for model in (got, expected):  # a BLAS sums in an order that follows from where in a mapped file a weight begins
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    ids = random_ids(2, 11) % got.config.get_text_config().vocab_size
    assert torch.equal(logits(got, ids), logits(expected, ids))


GOLDEN = (
    "gptq-mixtral-int4-g32-descact",  # act-order of both weights
    "awq-qwen3moe-int4-g128",  # zero points
    "gptq_v2-qwen3moe-int4-g32-asym",  # attention quantised too
    "base-mixtral-h128-i128",  # not quantised
)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_converted_checkpoint_is_the_same_model(tmp_path: Path, name: str) -> None:
    """By the library, and by transformers alone, which finds the quantizer by config.json."""
    out = convert(folder_of(name), tmp_path / "out", max_shard_size=SHARD)
    expected = from_pretrained(folder_of(name))
    dtypes = {header.dtype for header in Checkpoint(out).headers.values()}
    assert torch.float32 not in dtypes, "what was dequantised is in the model's dtype"
    assert_same_model(from_pretrained(out), expected)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out), expected)
    again = convert(out, tmp_path / "again")
    assert_same_model(from_pretrained(again), expected)


def test_schemes_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    schemes: list[dict[str, Any]] = [
        {"bits": 4, "group_size": 32, "symmetric": False, "scale_dtype": torch.bfloat16},
        {"bits": 8, "group_size": None, "symmetric": True, "act_order": True},
        {"bits": 8, "group_size": 64, "symmetric": False, "act_order": True},
    ]
    tensors: dict[str, Tensor] = {}
    rules: dict[str, dict[str, Any]] = {}
    for number, scheme in enumerate(schemes):
        layer = random_layer(rng, 3, 64, 96, **scheme)
        tensors |= layer_tensors(layer, gptq_v2, parent=f"model.layers.{number}.mlp.experts")
        rule = {"bits": scheme["bits"], "group_size": scheme["group_size"] or -1, "sym": scheme["symmetric"]}
        rules[rf"+:.*layers\.{number}\..*"] = rule
    config = quantization_config("gptq_v2", random_linear(rng, 64, 96), dynamic=rules)
    folder = write_checkpoint(tmp_path / "in", tensors, qwen3_config(3, 64, 96, layers=len(schemes)), config)
    out = convert(folder, tmp_path / "out", max_shard_size=20_000)
    names: set[str] = set()
    for number in range(len(schemes)):
        info = load_experts(folder, number)
        assert_same(load_experts(out, number), info)
        names.add(info.scheme_name)
    assert names == {"w4a16_g32_asym", "w8a16_channel_sym", "w8a16_g64_asym"}


def test_biases_and_interleaved_rows(tmp_path: Path) -> None:
    """gpt-oss by gptqmodel, with act-order, gate and up of different bits."""
    folder, original = saved(tmp_path / "in", "gpt_oss")
    held = halves(folder, original, True, {}, {"bits": 8})
    write_checkpoint(folder, held, config_of(folder), gptqmodel(dynamic={r"+:.*\.up_proj": {"bits": 8}}))
    expected = from_pretrained(folder)
    info = infos(expected)[0]
    assert info.w13.bias is not None and info.inter_perm is not None and info.source_order == "interleaved"
    assert_same_model(from_pretrained(convert(folder, tmp_path / "out")), expected)


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_unquantised_families(tmp_path: Path, model_type: str) -> None:
    """Those whose tensors transformers converts, transposes or keeps in float32."""
    folder, _ = saved(tmp_path / "in", model_type)
    out = convert(folder, tmp_path / "out")
    assert_same_model(from_pretrained(out), from_pretrained(folder))


def test_what_belongs_to_nothing_in_the_model_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a multimodal checkpoint the language model is converted; mtp and vision would need their quantised formats."""
    folder, _ = saved(tmp_path / "in", "qwen3_5_moe_text")
    packed, _, config = quantise_experts(folder)
    packed = {moved(key): tensor for key, tensor in packed.items()}
    others = beside(("mtp.layers.0", "model.visual.blocks.0"))
    config["dynamic"] = {f"-:.*{name}.*": {} for name in ("attn", "shared_expert", "mtp", "visual")}
    text = config_of(folder)
    write_checkpoint(folder, packed | others, {"model_type": "qwen3_5_moe", "text_config": text}, config)
    out = convert(folder, tmp_path / "out")
    assert f"{len(others)} tensors of {folder} belong to nothing in the model and are left out" in caplog.text
    assert not set(others) & keys(out)
    expected = from_pretrained(folder)
    assert_same_model(from_pretrained(out), expected)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out), expected)


# --- the files ---------------------------------------------------------------------------------------------------


def keys(folder: Path) -> set[str]:
    """Tensors of all files."""
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            found |= set(held.keys())
    return found


def test_files_index_and_headers(tmp_path: Path) -> None:
    """Files of at most the size, or of one tensor; an index of them; each names the layers it has a part of."""
    out = convert(folder_of(GPTQ), tmp_path / "out", max_shard_size=SHARD)
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert index["weight_map"].keys() == keys(out)
    total = 0
    for file in files:
        with safe_open(file, "pt") as held:
            names, metadata = set(held.keys()), held.metadata()
            size = sum(held.get_tensor(name).nbytes for name in names)
        assert names == {key for key, name in index["weight_map"].items() if name == file.name}
        assert size <= SHARD or len(names) == 1
        facts = json.loads(metadata["quant_moelora"])
        assert (metadata["format"], facts["version"]) == ("pt", 1)
        assert set(facts["layers"]) == {m[1] for name in names if (m := re.search(r"(\d)\.mlp\.experts\.", name))}
        assert {facts["layers"][n][w]["layout"] for n in facts["layers"] for w in ("w13", "w2")} <= {"frag64.v1"}
        total += size
    assert index["metadata"]["total_size"] == total


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    out = convert(folder_of(GPTQ), tmp_path / "out")
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_small_files_come_along(tmp_path: Path) -> None:
    folder = copy_checkpoint(GPTQ, tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((folder_of(GPTQ) / name).read_bytes())
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "quantize_config.json").write_text('{"bits": 4, "quant_method": "gptq"}', encoding="utf-8")
    (folder / "consolidated.pth").write_bytes(b"weights")
    out = convert(folder, tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {file.name for file in out.iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in copied)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {"quant_method": "quant_moelora"}
    assert (config["architectures"], config["dtype"]) == (["Qwen3MoeForCausalLM"], "bfloat16")
    assert AutoTokenizer.from_pretrained(out)("t69 t250")["input_ids"]


def test_generation_settings_of_an_old_config(tmp_path: Path) -> None:
    folder = copy_checkpoint(GPTQ, tmp_path / "in", config=lambda held: held.update(do_sample=True, top_k=7))
    out = convert(folder, tmp_path / "out")
    loaded: list[Any] = [from_pretrained(path).generation_config for path in (folder, out)]
    assert [(config.do_sample, config.top_k) for config in loaded] == [(True, 7)] * 2


def test_inspect_and_verify(tmp_path: Path) -> None:
    out = convert(folder_of(GPTQ), tmp_path / "out", max_shard_size=SHARD)
    found, before = describe(str(out)), describe(str(folder_of(GPTQ)))
    assert found["quant_method"] == "quant_moelora" and found["quantized_linears"] == 0
    (ours,), (theirs,) = found["experts"], before["experts"]
    assert ours["formats"] == {"gate_up": "packed w4a16_g32_asym", "down": "packed w4a16_g32_asym"}
    assert {k: v for k, v in ours.items() if k != "formats"} == {k: v for k, v in theirs.items() if k != "formats"}
    assert verify(out).ok
    with pytest.raises(FormatError, match="gate_up of the experts of layer 0 in packed w4a16_g32_asym"):
        verify(folder_of(GPTQ), out)


# --- all or nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no space left on device"), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_nothing(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second layer fails, files have been written; none is at the target or beside it afterwards."""
    target, seen = tmp_path / "below" / "out", list[int]()

    def fail(*args: Any) -> MoEQuantInfo:
        seen.append(len(list(tmp_path.rglob("part-*"))))
        assert not target.exists() and not list(tmp_path.rglob("config.json"))  # without which nothing loads
        if len(seen) == 2:
            raise error
        return load(*args)

    load = module.load_layer
    monkeypatch.setattr(module, "load_layer", fail)
    with pytest.raises(type(error)):
        convert(folder_of(GPTQ), target, max_shard_size=SHARD)
    assert seen[1] > seen[0] > 0
    assert not list((tmp_path / "below").iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_target_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine", encoding="utf-8")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="a new folder"):
        convert(folder_of(GPTQ), target)
    assert list(tmp_path.iterdir()) == [target] and (kind != "file" or target.read_text(encoding="utf-8") == "mine")


def test_a_size_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="max_shard_size"):
        convert(folder_of(GPTQ), tmp_path / "out", max_shard_size="five")


def test_a_model_without_experts(tmp_path: Path) -> None:
    config = {k: v for k, v in qwen3_config(2, 64, 32).items() if "expert" not in k}
    folder = write_checkpoint(tmp_path / "in", {"model.norm.weight": torch.ones(64)}, {**config, "model_type": "qwen3"})
    with pytest.raises(UnsupportedError, match="no fused experts module"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_layer_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is read, what is left of those before fits in a file."""
    held: list[tuple[weakref.ref[Tensor], int]] = []
    left: list[int] = []

    def watch(*args: Any) -> MoEQuantInfo:
        left.append(sum(size for tensor, size in held if tensor() is not None))
        info = load(*args)
        held.extend((weakref.ref(tensor), tensor.nbytes) for tensor in info.tensors().values())
        return info

    load = module.load_layer
    monkeypatch.setattr(module, "load_layer", watch)
    convert(folder_of(GPTQ), tmp_path / "out", max_shard_size=30_000)
    assert len(left) == 2 and left[1] <= 30_000 < sum(size for _, size in held) / 4


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in several files."""
    return convert(folder_of(GPTQ), tmp_path_factory.mktemp("converted") / "out", max_shard_size=SHARD)


@pytest.fixture
def damaged(converted: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def last_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def test_another_version_in_any_file_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.loaders.test_packed_form.FILE", last_file(damaged).name)
    rewrite(damaged, lambda _, held: held.update(version=2))
    for load in (lambda: from_pretrained(damaged), lambda: AutoModelForCausalLM.from_pretrained(damaged)):
        with pytest.raises(UnsupportedError, match="version of the packed form"):
            load()
    with pytest.raises(UnsupportedError, match="version of the packed form"):
        qm.load_experts(damaged, 0)


def test_a_missing_file(damaged: Path) -> None:
    last_file(damaged).unlink()
    with pytest.raises(FormatError, match="a whole safetensors file"):
        from_pretrained(damaged)


def test_a_truncated_file(damaged: Path) -> None:
    whole = last_file(damaged).read_bytes()
    last_file(damaged).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="a whole safetensors file"):
        from_pretrained(damaged)


def test_a_file_that_the_index_forgot(damaged: Path) -> None:
    index = damaged / "model.safetensors.index.json"
    held = json.loads(index.read_text(encoding="utf-8"))
    forgotten = last_file(damaged).name
    held["weight_map"] = {key: name for key, name in held["weight_map"].items() if name != forgotten}
    index.write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.mlp\.experts"):
        from_pretrained(damaged)
