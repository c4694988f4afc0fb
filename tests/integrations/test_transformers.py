"""from_pretrained: golden logits of every checkpoint, dtypes, and everything that must not load."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor, nn

from quant_moelora.core.errors import (
    BackendError,
    FormatError,
    MissingTensorError,
    QuantMoELoRAError,
    UnsupportedError,
)
from quant_moelora.core.packing import unpack_pairs
from quant_moelora.core.weights import PackedWeight
from quant_moelora.integrations import transformers as transformers_module
from quant_moelora.integrations.transformers import FusedExperts, experts_of, from_pretrained
from quant_moelora.loaders.experts import load_experts
from tests.adapters import Tensors
from tests.checkpoints import ct_config, int_quantized, random_linear
from tests.integrations.models import (
    ACCEPTED,
    BASES,
    CHECKPOINTS,
    GPTQ,
    HONEST,
    ROUNDING,
    copy_checkpoint,
    difference,
    folder_of,
    generate,
    golden_logits,
    load,
    logits,
    random_ids,
    without,
)

# Every op rounds to bfloat16, by 2**-9 at most, and some 60 of them follow one another; their errors are independent.
BF16_NOISE = 2**-9 * 60**0.5
GPTQ_V2 = "gptq_v2-qwen3moe-int4-g32-asym"
CT = "ct-qwen3moe-w4a16-g32-asym-rtn"
AWQ = "awq-qwen3moe-int4-g128"
EXPERT = "model.layers.1.mlp.experts.5.down_proj"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_logits(name: str, device: torch.device) -> None:
    ids, expected = golden_logits(name)
    model = load(name, device_map=device)
    got = difference(logits(model, ids), expected)
    assert got < ACCEPTED, "the accepted bound"
    assert got < HONEST, "the bound that holds"
    assert not model.training
    for module in experts_of(model).values():
        assert module.moe is not None and module.moe.info.device.type == device.type
        assert (module.moe.info.scheme_name == "none") == (name in BASES)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}


def checkpoint_dtype(name: str) -> torch.dtype:
    config = json.loads((folder_of(name) / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, config.get("dtype") or config["torch_dtype"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_checkpoints_dtype_is_the_default(name: str) -> None:
    expected = checkpoint_dtype(name)
    model: Any = from_pretrained(folder_of(name))
    assert model.dtype == model.config.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert logits(model, random_ids(1, 4)).dtype == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16(name: str, device: torch.device) -> None:
    """All of the model in bfloat16, renamed tensors (Mixtral's router) and dequantised ones too."""
    ids, expected = golden_logits(name)
    model = load(name, dtype=torch.bfloat16, device_map=device)
    dtypes = {key: p.dtype for key, p in model.named_parameters() if p.dtype != torch.bfloat16}
    assert not dtypes
    got = logits(model, ids)
    assert got.dtype == torch.bfloat16
    assert difference(got, expected) < BF16_NOISE


@pytest.mark.parametrize("name", [GPTQ, "gptq-mixtral-int4-g32-descact", AWQ])
def test_scales_of_another_dtype_than_the_models_are_kept(name: str) -> None:
    """float16 scales in a bfloat16 model: a cast would lose three bits of each."""
    model = load(name, dtype=torch.bfloat16)
    for module in experts_of(model).values():
        assert module.moe is not None
        stored, held = load_experts(folder_of(name), module.spec.layer).w2, module.moe.info.w2
        assert isinstance(held, PackedWeight) and isinstance(stored, PackedWeight)
        assert held.scheme.scale_dtype == torch.float16
        assert torch.equal(held.scales, stored.scales)
        scales = unpack_pairs(held.scales, torch.float16)
        assert (scales != scales.bfloat16()).any()


@pytest.mark.parametrize("dtype", ["float32", "auto", torch.float16])
def test_ways_to_say_a_dtype(dtype: torch.dtype | str) -> None:
    expected = {"float32": torch.float32, "auto": torch.bfloat16}.get(str(dtype), torch.float16)
    model: Any = from_pretrained(folder_of(GPTQ), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_a_path_may_be_a_string() -> None:
    ids, expected = golden_logits(GPTQ)
    assert difference(logits(load(GPTQ), ids), expected) < HONEST
    model = from_pretrained(str(folder_of(GPTQ)), dtype=torch.float32, device_map="cpu", backend="reference")
    assert difference(logits(model, ids), expected) < HONEST


def nibbles(words: Tensor) -> Tensor:  # (X, Y) int32 -> (X, Y, 8), lowest bits first
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15


def gptq_v2_by_definition(held: Tensors) -> Tensor:
    """w[n, k] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]; eight k in a word of q, eight n in one of z."""
    codes = nibbles(held["qweight"]).permute(0, 2, 1).flatten(0, 1)  # (K, N)
    groups = held["g_idx"].long()
    zeros = nibbles(held["qzeros"]).flatten(1)[groups]
    return ((codes - zeros).float() * held["scales"].float()[groups]).T


def awq_by_definition(held: Tensors) -> Tensor:
    """w[n, k] = (q[k, n] - z[k // 128, n]) * s[k // 128, n]; a word's nibbles are n = 0, 2, 4, 6, 1, 3, 5, 7."""
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # nibble of n
    codes = nibbles(held["qweight"])[..., place].flatten(1)  # (K, N)
    groups = torch.arange(codes.shape[0]) // 128
    zeros = nibbles(held["qzeros"])[..., place].flatten(1)[groups]
    return ((codes - zeros).float() * held["scales"].float()[groups]).T


@pytest.mark.parametrize(("name", "definition"), [(GPTQ_V2, gptq_v2_by_definition), (AWQ, awq_by_definition)])
def test_quantised_attention_is_dequantised_by_its_definition(name: str, definition: Any) -> None:
    from safetensors.torch import load_file

    held = load_file(folder_of(name) / "model.safetensors")
    model = load(name)
    seen = 0
    for module, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and f"{module}.qweight" in held:
            tensors = {s: held.get(f"{module}.{s}", torch.empty(0)) for s in ("qweight", "qzeros", "scales", "g_idx")}
            assert torch.equal(linear.weight.detach(), definition(tensors)), module
            seen += 1
    assert seen >= 4, "q, k, v and o of each layer"


def test_experts_stand_where_the_familys_stood() -> None:
    model = load("gptq-mixtral-int4-g32-descact")
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for name, module in experts_of(model).items():
        assert model.get_submodule(name) is module
        assert isinstance(module, FusedExperts) and not list(module.parameters())
    assert not [key for key in model.state_dict() if ".experts." in key]


def test_transformers_reports_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Expert tensors are read by this library's loader; a report of them as unexpected would only alarm."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        for name in CHECKPOINTS:
            load(name)
    finally:
        logger.removeHandler(caplog.handler)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned
    assert "expert" not in capsys.readouterr().out


def test_tensors_of_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"model.layers.0.mystery.weight": torch.zeros(3)}
    load(copy_checkpoint(GPTQ, tmp_path / "m", tensors=lambda tensors: tensors | extra))
    assert any("model.layers.0.mystery.weight" in record.getMessage() for record in caplog.records)


def test_generate_decodes_what_a_forward_computes(device: torch.device) -> None:
    """Prefill and decode through the cache give the logits of one forward over the whole sequence."""
    for name in (GPTQ, "gptq-mixtral-int4-g32-descact"):
        model = load(name, device_map=device)
        prompts = random_ids(2, 7)
        made = generate(model, list(prompts), new=6)
        whole = logits(model, torch.cat((prompts, made.tokens), dim=1))
        assert difference(made.logits, whole[:, 6:-1]) < ROUNDING
        assert torch.equal(made.tokens, whole[:, 6:-1].argmax(-1))


# --- what must not load -------------------------------------------------------------------------------------------


def renamed(tensors: Tensors, suffix: str, other: str) -> Tensors:
    return {key.replace(suffix, other) if ".experts." in key else key: tensor for key, tensor in tensors.items()}


def misshapen(key: str) -> Any:
    return lambda tensors: tensors | {key: tensors[key][:-1].clone()}


BROKEN: dict[str, tuple[str, Any, type[QuantMoELoRAError], str]] = {
    "expert tensor missing": (
        GPTQ_V2,
        without(f"{EXPERT}.qweight"),
        QuantMoELoRAError,
        r"experts\.5\.down_proj",
    ),
    "expert missing": (
        GPTQ_V2,
        without(*(f"{EXPERT}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx"))),
        MissingTensorError,
        r"down projection of expert 5 in layer 1.*1 of 24 projections missing",
    ),
    "unquantised expert missing": (
        "base-qwen3moe-h128-i96",
        without(f"{EXPERT}.weight"),
        MissingTensorError,
        r"down projection of expert 5 in layer 1",
    ),
    "expert misshapen": (GPTQ_V2, misshapen(f"{EXPERT}.qweight"), FormatError, r"\[11, 128\].*experts\.5\.down_proj"),
    "scales misshapen": (CT, misshapen(f"{EXPERT}.weight_scale"), FormatError, r"weight_scale.*experts\.5\.down_proj"),
    "unknown format": (
        CT,
        lambda tensors: renamed(tensors, "weight_packed", "weight_mystery"),
        UnsupportedError,
        r"format of model\.layers\.0\.mlp\.experts\.0.*weight_mystery",
    ),
    "norm missing": (
        "base-qwen3moe-h128-i96",
        without("model.norm.weight"),
        MissingTensorError,
        r"1 missing keys .*model\.norm\.weight",
    ),
    "router missing": (GPTQ_V2, without("model.layers.1.mlp.gate.weight"), MissingTensorError, r"layers\.1\.mlp\.gate"),
    "renamed router missing": (
        "ct-mixtral-w4a16-g128-sym-rtn",
        without("model.layers.1.block_sparse_moe.gate.weight"),
        MissingTensorError,
        r"layers\.1\.mlp\.gate",
    ),
    "attention missing": (
        CT,
        without("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
        MissingTensorError,
        r"2 missing keys .*lm_head\.weight, model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "quantised attention missing": (
        GPTQ_V2,
        without(*(f"model.layers.0.self_attn.q_proj.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx"))),
        MissingTensorError,
        r"model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "quantised attention incomplete": (
        GPTQ_V2,
        without("model.layers.0.self_attn.q_proj.scales"),
        QuantMoELoRAError,
        r"model\.layers\.0\.self_attn\.q_proj",
    ),
    # It would route to seven experts.
    "router misshapen": (GPTQ_V2, misshapen("model.layers.1.mlp.gate.weight"), FormatError, r"layers\.1\.mlp\.gate"),
    "norm misshapen": (GPTQ_V2, misshapen("model.norm.weight"), FormatError, r"model\.norm\.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(tmp_path: Path, case: str) -> None:
    name, edit, error, match = BROKEN[case]
    folder = copy_checkpoint(name, tmp_path / "m", tensors=edit)
    with pytest.raises(error, match=match):
        load(folder)


@pytest.mark.parametrize("experts", [6, 10])
def test_another_number_of_experts_than_config_says(tmp_path: Path, experts: int) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["num_local_experts"] = config["num_experts"] = experts

    folder = copy_checkpoint(GPTQ, tmp_path / "m", config=edit)
    with pytest.raises(FormatError, match=r"experts? .*config\.json"):
        load(folder)


def test_truncated_file(tmp_path: Path) -> None:
    folder = copy_checkpoint(GPTQ, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"model\.safetensors .*whole safetensors file; download it again"):
        load(folder)


def test_a_model_without_experts(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = Qwen3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    small.vocab_size, small.head_dim = 16, 16
    Qwen3ForCausalLM(small).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM: got no fused experts.*Mixture-of-Experts"):
        load(tmp_path / "m")


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "meta"}, {"": "disk"}, "nowhere"])
def test_device_maps_of_several_devices_or_none(device_map: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"device_map: got .*one device: .*; name the device"):
        load(GPTQ, device_map=device_map)


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_strategies_of_accelerate(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """The GPU if there is one; several are not chosen among."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for strategy in ("auto", "balanced", "balanced_low_0", "sequential"):
        if gpus < 2:
            expected = torch.device("cuda", 0) if gpus else torch.device("cpu")
            assert transformers_module._single_device(strategy) == {"": expected}
            continue
        with pytest.raises(UnsupportedError, match=f"device_map: got '{strategy}' and 2 GPUs.*CUDA_VISIBLE_DEVICES"):
            load(GPTQ, device_map=strategy)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, None, "auto"])
def test_device_maps_of_one_device(device_map: Any) -> None:
    ids, expected = golden_logits(GPTQ)
    assert difference(logits(load(GPTQ, device_map=device_map), ids), expected) < HONEST


def hub_cache(root: Path, repository: str, folder: Path, subfolder: str = "") -> str:
    """A cache as huggingface_hub keeps it, with one snapshot; return its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    held = root / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, held / "snapshots" / commit / subfolder)
    (held / "refs").mkdir()
    for name in ("main", "v1"):
        (held / "refs" / name).write_text(commit, encoding="utf-8")
    return commit


def test_a_repository_of_the_hub_from_its_cache(tmp_path: Path) -> None:
    """Offline, as all tests run: HF_HUB_OFFLINE is set, and ``local_files_only`` says the same."""
    commit = hub_cache(tmp_path, "somebody/some-moe", folder_of(GPTQ))
    ids, expected = golden_logits(GPTQ)
    ways: list[dict[str, Any]] = [
        {},
        {"revision": "v1"},
        {"revision": commit},
        {"local_files_only": True, "token": "no"},
    ]
    for arguments in ways:
        model = from_pretrained("somebody/some-moe", cache_dir=tmp_path, dtype=torch.float32, **arguments)
        assert difference(logits(model, ids), expected) < HONEST
    for repository, revision in (("somebody/some-moe", "v2"), ("somebody/other", None)):
        with pytest.raises(FormatError, match=rf"checkpoint {repository}: got .*offline, download"):
            from_pretrained(repository, cache_dir=tmp_path, revision=revision)


def test_a_subfolder(tmp_path: Path) -> None:
    hub_cache(tmp_path, "somebody/some-moe", folder_of(GPTQ), "int4/g32")
    ids, expected = golden_logits(GPTQ)
    model = from_pretrained("somebody/some-moe", cache_dir=tmp_path, subfolder="int4/g32", dtype=torch.float32)
    assert difference(logits(model, ids), expected) < HONEST
    model = from_pretrained(folder_of(GPTQ).parent, subfolder=GPTQ, dtype=torch.float32)
    assert difference(logits(model, ids), expected) < HONEST
    with pytest.raises(FormatError, match=r"subfolder of .*: got 'int8', expected a folder in it"):
        from_pretrained("somebody/some-moe", cache_dir=tmp_path, subfolder="int8")


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arguments arrive, and of the files only what a checkpoint needs is asked for."""
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **arguments: Any) -> str:
        asked.update(arguments, repository=repository)
        return str(folder_of(GPTQ).parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub: dict[str, Any] = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": True}
    from_pretrained("somebody/some-moe", subfolder=GPTQ, **hub)
    assert asked.items() >= {**hub, "repository": "somebody/some-moe"}.items()
    wanted = filter_repo_objects(
        [f"{GPTQ}/{name}" for name in ("config.json", "a.safetensors", "consolidated.safetensors", "x.bin")]
        + ["config.json", "other/a.safetensors"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert set(wanted) == {f"{GPTQ}/config.json", f"{GPTQ}/a.safetensors"}


def test_unknown_backend() -> None:
    with pytest.raises(
        BackendError, match=r"backend: got 'merlin', expected auto or one of marlin, unquantized, cpu, reference;"
    ):
        load(GPTQ, backend="merlin")


def test_a_dtype_that_no_backend_serves() -> None:
    with pytest.raises(BackendError, match=r"float64"):
        load(GPTQ, dtype=torch.float64)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no/such-model: got .*a folder with config\.json"):
        load(Path("no/such-model"))
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_int8_attention_is_dequantised(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Its key is that of an unquantised weight, which transformers must not read it as."""
    rng, expected = np.random.default_rng(0), dict[str, Tensor]()

    def quantise(tensors: Tensors) -> Tensors:
        for key in [key for key in tensors if "self_attn" in key and key.endswith("_proj.weight")]:
            linear = random_linear(rng, *tensors[key].shape, bits=8, group_size=None, scale_dtype=torch.bfloat16)
            expected[key] = linear.weight
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in int_quantized(linear).items()}
        return tensors

    def declare(config: dict[str, Any]) -> None:
        config["quantization_config"] = ct_config(num_bits=8, group_size=None)

    folder = copy_checkpoint("base-qwen3moe-h128-i96", tmp_path / "model", tensors=quantise, config=declare)
    model = load(folder, dtype=dtype)
    assert len(expected) == 8
    for key, weight in expected.items():
        parameter = model.get_parameter(key)
        assert parameter.dtype == (dtype or torch.bfloat16)
        assert torch.equal(parameter.cpu(), weight.to(parameter.dtype))
