"""Quantised linear layers beside the experts."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.families import build_skeleton
from quant_moelora.loaders.linears import dequantize_linear, describe_linears
from tests.checkpoints import (
    BITS,
    ENCODERS,
    PLAIN_ORDER,
    Linear,
    gptq_v1,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    write_checkpoint,
)

CPU = torch.device("cpu")
ATTENTION = "model.layers.0.self_attn"


def model(**shapes: tuple[int, int]) -> PreTrainedModel:
    """Linear layers of ``out, in`` on the meta device by name, where underscores stand for dots."""
    root = PreTrainedModel(PreTrainedConfig())
    for name, (n, k) in shapes.items():
        parent: nn.Module = root
        *path, last = name.split("__")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(k, n, device="meta"))
    return root


def encode(fmt: str, linears: dict[str, Linear]) -> dict[str, Tensor]:
    return {
        f"{name}.{suffix}": tensor
        for name, linear in linears.items()
        for suffix, tensor in ENCODERS[fmt](linear).items()
    }


@pytest.mark.parametrize("fmt", ENCODERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_described_and_dequantised(tmp_path: Path, fmt: str, symmetric: bool, act_order: bool) -> None:
    """Attention of a real family; what is unquantised, a bias and the experts are not among them."""
    rng = np.random.default_rng(0)
    kwargs: dict[str, Any] = {"symmetric": symmetric, "act_order": act_order and fmt not in PLAIN_ORDER}
    kwargs["bits"] = BITS.get(fmt, (4,))[0]
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64)}
    linears = {f"{ATTENTION}.{name}": random_linear(rng, *shape, **kwargs) for name, shape in shapes.items()}
    tensors = encode(fmt, linears) | layer_tensors(random_layer(rng, 2, 64, 32, **kwargs), ENCODERS[fmt])
    tensors |= {f"{ATTENTION}.v_proj.weight": torch.zeros(32, 64), f"{ATTENTION}.q_proj.bias": torch.zeros(64)}
    tensors |= {"model.layers.0.mlp.gate.weight": torch.zeros(2, 64), "lm_head.weight": torch.zeros(64, 64)}
    config = qwen3_config(2, 64, 32, num_key_value_heads=1, attention_bias=True)
    quantization = quantization_config(fmt, linears[f"{ATTENTION}.q_proj"])
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization))
    found = describe_linears(checkpoint, build_skeleton(checkpoint))
    assert found.keys() == linears.keys()
    for name, linear in linears.items():
        assert (found[name].spec.n, found[name].spec.k) == linear.codes.shape
        weight = dequantize_linear(checkpoint, found[name], CPU)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, linear.weight)


def test_each_layer_has_its_own_format(tmp_path: Path) -> None:
    """Outside the experts nothing is stacked, so that layers need not be alike."""
    rng = np.random.default_rng(0)
    linears = {"a": random_linear(rng, 16, 64), "b": random_linear(rng, 24, 32, bits=8, group_size=None)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, encode("compressed-tensors", linears)))
    found = describe_linears(checkpoint, model(a=(16, 64), b=(24, 32)))
    assert {name: linear.fmt.scheme and linear.fmt.scheme.name for name, linear in found.items()} == {
        "a": "w4a16_g32_sym",
        "b": "w8a16_channel_sym",
    }
    assert all(torch.equal(dequantize_linear(checkpoint, found[name], CPU), linears[name].weight) for name in linears)


def test_shared_experts_and_lm_head_are_linears(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    linears = {
        "model.layers.0.mlp.shared_expert.up_proj": random_linear(rng, 16, 32),
        "lm_head": random_linear(rng, 64, 32),
    }
    tensors, config = encode("gptq", linears), quantization_config("gptq", linears["lm_head"])
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, quantization=config))
    skeleton = model(model__layers__0__mlp__shared_expert__up_proj=(16, 32), lm_head=(64, 32))
    assert describe_linears(checkpoint, skeleton).keys() == linears.keys()


# A family, and what its own checkpoints and its model call a router or an attention layer.
RENAMED = [
    ("qwen3_moe", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    ("phimoe", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
    ("granitemoe", "model.layers.0.block_sparse_moe.router.layer", "model.layers.0.block_sparse_moe.router"),
    ("qwen3_5_moe_text", "model.language_model.layers.0.mlp.gate", "model.layers.0.mlp.gate"),
    ("qwen3_5_moe_text", "model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize("fmt", ENCODERS)
@pytest.mark.parametrize(("model_type", "stored", "name"), RENAMED)
def test_routers_and_renamed_modules(tmp_path: Path, fmt: str, model_type: str, stored: str, name: str) -> None:
    """gptqmodel 4.2.5 and AutoAWQ quantise the router if they are not told otherwise."""
    config = qwen3_config(8, 64, 32, model_type=model_type, num_local_experts=8)
    config |= {"layer_types": ["full_attention"]} if "qwen3_5" in model_type else {}
    rows = 128 if name.endswith("q_proj") else 8  # qwen3.5's q_proj has a gate of its own
    linear = random_linear(np.random.default_rng(0), rows, 64, bits=BITS.get(fmt, (4,))[0])
    tensors, quantization = encode(fmt, {stored: linear}), quantization_config(fmt, linear)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization))
    found = describe_linears(checkpoint, build_skeleton(checkpoint))
    assert {own: held.spec.module for own, held in found.items()} == {name: stored}
    assert torch.equal(dequantize_linear(checkpoint, found[name], CPU), linear.weight)


def test_one_module_under_two_names(tmp_path: Path) -> None:
    linear = random_linear(np.random.default_rng(0), 8, 64)
    names = ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate")
    config = qwen3_config(8, 64, 32, model_type="mixtral", num_local_experts=8)
    tensors = encode("gptq", dict.fromkeys(names, linear))
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", linear)))
    with pytest.raises(FormatError, match=rf"module {names[1]}: got {names[0]} too.*one set of tensors for {names[1]}"):
        describe_linears(checkpoint, build_skeleton(checkpoint))


def test_bias_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Older tools write zeros; transformers reports the tensor."""
    linear = random_linear(np.random.default_rng(0), 16, 64)
    tensors = encode("gptq", {"a": linear}) | {"a.bias": torch.zeros(16)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", linear)))
    skeleton = model()
    skeleton.add_module("a", nn.Linear(64, 16, bias=False, device="meta"))
    found = describe_linears(checkpoint, skeleton)
    assert torch.equal(dequantize_linear(checkpoint, found["a"], CPU), linear.weight)


def test_embedding_is_no_linear(tmp_path: Path) -> None:
    """Also where it has the shape of a router."""
    linear = random_linear(np.random.default_rng(0), 64, 64)
    tensors = encode("gptq", {"model.embed_tokens": linear})
    config = qwen3_config(64, 64, 32)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", linear)))
    message = r"quantised module model\.embed_tokens: got Embedding in the model, expected a linear layer or a router"
    with pytest.raises(UnsupportedError, match=message):
        describe_linears(checkpoint, build_skeleton(checkpoint))


def test_tied_lm_head_has_no_weight_of_its_own(tmp_path: Path) -> None:
    """To dequantise it would overwrite the embeddings."""
    linear = random_linear(np.random.default_rng(0), 64, 64)
    tensors, config = encode("gptq", {"lm_head": linear}), quantization_config("gptq", linear)
    for tied in (True, False):
        model = qwen3_config(4, 64, 32, tie_word_embeddings=tied)
        checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, model, config))
        if not tied:
            assert [*describe_linears(checkpoint, build_skeleton(checkpoint))] == ["lm_head"]
            continue
        with pytest.raises(FormatError, match=r"lm_head: got tied to model\.embed_tokens\.weight.*tie_word_embeddings"):
            describe_linears(checkpoint, build_skeleton(checkpoint))


def test_module_that_the_model_does_not_have(tmp_path: Path) -> None:
    linear = random_linear(np.random.default_rng(0), 8, 64)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, encode("gptq", {"model.extra": linear})))
    with pytest.raises(UnsupportedError, match=r"quantised module model\.extra: got nothing of that name in the model"):
        describe_linears(checkpoint, model(a=(8, 64)))


@pytest.mark.parametrize(
    ("model_type", "prefix"), [("llama4", "language_model.model."), ("qwen3_5_moe", "model.language_model.")]
)
def test_names_of_a_multimodal_checkpoint(tmp_path: Path, model_type: str, prefix: str) -> None:
    """Found in the language model that AutoModelForCausalLM makes of it; the config speaks of the checkpoint's name."""
    linear = random_linear(np.random.default_rng(0), 64, 64)
    text = qwen3_config(4, 64, 32, layers=4, model_type=f"{model_type}_text", num_local_experts=4)
    quantization = quantization_config(
        "gptq", linear, bits=8, dynamic={rf"{re.escape(prefix)}layers\.3\.": {"bits": 4}}
    )
    tensors = encode("gptq", {f"{prefix}layers.3.self_attn.o_proj": linear})
    config = {"model_type": model_type, "text_config": text}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization))
    found = describe_linears(checkpoint, build_skeleton(checkpoint))
    assert found.keys() == {"model.layers.3.self_attn.o_proj"}
    weight = dequantize_linear(checkpoint, found["model.layers.3.self_attn.o_proj"], CPU)
    assert torch.equal(weight, linear.weight)
    tensors |= encode("gptq", {"model.layers.3.self_attn.o_proj": linear})
    write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", linear))
    with pytest.raises(
        FormatError, match=r"quantised module model\.layers\.3.*one set of tensors for model\.layers\.3"
    ):
        describe_linears(Checkpoint(tmp_path), build_skeleton(checkpoint))


def test_module_that_transformers_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a module of the model must not be taken for the whole of it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    converter = WeightConverter(["b.weight", "c.weight"], "a.weight", operations=[Concatenate(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    linear = random_linear(np.random.default_rng(0), 16, 64)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, encode("compressed-tensors", {"b": linear})))
    with pytest.raises(
        UnsupportedError, match=r"quantised module b: got a weight that transformers converts into a\.weight"
    ):
        describe_linears(checkpoint, model(a=(16, 64)))


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("deepseek_v3", "model.layers.61.self_attn.q_a_proj"), ("qwen3_next", "mtp.layers.0.self_attn.q_proj")],
)
def test_modules_that_transformers_ignores_are_left_alone(tmp_path: Path, model_type: str, module: str) -> None:
    """Multi-token-prediction layers, quantised like the others: transformers itself drops these keys when it loads."""
    linear = random_linear(np.random.default_rng(0), 64, 64)
    config = qwen3_config(4, 64, 32, model_type=model_type, n_routed_experts=4, n_group=1, topk_group=1)
    tensors = encode("gptq", {module: linear})
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, config, quantization_config("gptq", linear)))
    assert describe_linears(checkpoint, build_skeleton(checkpoint)) == {}


def test_weight_that_is_no_float_is_refused_by_name(tmp_path: Path) -> None:
    """It must never be read as one: int8 without a scale, and float8 with one."""
    for tensors in (
        {"a.weight": torch.zeros(16, 32, dtype=torch.int8)},
        {"a.weight": torch.zeros(16, 32).to(torch.float8_e4m3fn), "a.weight_scale": torch.zeros(16, 1)},
    ):
        checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors))
        with pytest.raises(UnsupportedError, match=r"format of a: got .*weight torch\.(int8|float8_e4m3fn) \[16, 32"):
            describe_linears(checkpoint, model(a=(16, 32)))


def test_misshapen_tensor(tmp_path: Path) -> None:
    linear = random_linear(np.random.default_rng(0), 16, 64)
    tensors = {f"a.{suffix}": tensor for suffix, tensor in gptq_v1(linear).items()}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", linear)))
    with pytest.raises(
        FormatError, match=r"qweight: got shape \[8, 16\], expected \[8, 24\] for N=24, K=64.*a\.qweight"
    ):
        describe_linears(checkpoint, model(a=(24, 64)))
