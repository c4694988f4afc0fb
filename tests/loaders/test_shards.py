"""A process's part of a layer: the bits of the part of a layer that was read whole, and little else is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.loaders.checkpoint import Checkpoint, Part
from quant_moelora.loaders.experts import load_experts, load_layer
from quant_moelora.loaders.layer_format import describe_layers
from tests.builders import same_bits
from tests.checkpoints import (
    ENCODERS,
    Encoder,
    awq_gemv,
    experts_spec,
    layer_tensors,
    quantization_config,
    qwen3_config,
    random_layer,
    random_linear,
    skeleton,
    write_checkpoint,
)

EXPERTS, HIDDEN, INTER = 3, 64, 160  # of 64, 64 and 32 positions; with groups of 128, of 128 and 32
CONFIGS = [ParallelConfig(t, 2, e, 2) for t in range(2) for e in range(2)]
FORMATS: dict[str, tuple[str, Encoder]] = {name: (name, encode) for name, encode in ENCODERS.items()}
FORMATS["awq-gemv"] = ("awq", awq_gemv)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all that is read from a checkpoint."""
    seen: list[int] = []
    original = Checkpoint.read

    def read(self: Checkpoint, key: str, part: Part | None = None, window: Sequence[slice] | None = None) -> Tensor:
        tensor = original(self, key, part, window)
        seen.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    return seen


def check_parts(load: Any, configs: Sequence[ParallelConfig] = tuple(CONFIGS)) -> MoEQuantInfo:
    """``load`` with each process's place against what it loads without one; returns the whole."""
    whole = load(None)
    for config in configs:
        part, expected = load(config), whole.part(config)
        assert part.shard == expected.shard
        for one, two in zip(part.dequantize(), expected.dequantize(), strict=True):
            assert one is not None and two is not None and torch.equal(one, two)
        names = part.tensors().keys()  # permutations that change nothing may be missing, if another part has others
        assert expected.tensors().keys() - names <= {"w13.k_perm", "inter_perm"}
        for name in names:
            assert same_bits(part.tensors()[name], expected.tensors()[name]), f"{name} of {config}"
    return whole


def loader(folder: Path, layer: Any, **options: Any) -> Any:
    checkpoint = Checkpoint(folder)
    (described,) = describe_layers(checkpoint, [experts_spec(layer)], skeleton())
    return lambda config: load_layer(checkpoint, described, "cpu", config, **options)


@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_separate_experts(tmp_path: Path, fmt: str, symmetric: bool, group: int | None, read_bytes: list[int]) -> None:
    name, encode = FORMATS[fmt]
    inter = 256 if fmt == "awq-gemv" else INTER  # whose groups divide K
    hidden = 128 if fmt == "awq-gemv" else HIDDEN
    bits = 8 if name == "int-quantized" else 4
    layer = random_layer(
        np.random.default_rng(0), EXPERTS, hidden, inter, bits=bits, symmetric=symmetric, group_size=group
    )
    changes: dict[str, Any] = {"version": "gemv"} if fmt == "awq-gemv" else {}
    write_checkpoint(
        tmp_path, layer_tensors(layer, encode), quantization=quantization_config(name, layer[0, "up"], **changes)
    )
    load = loader(tmp_path, layer, codes_at_once=1)
    check_parts(load)
    read_bytes.clear()
    load(None)
    whole = sum(read_bytes)
    read_bytes.clear()
    for config in CONFIGS:
        load(config)
    # Little is read twice: what has no rows or no columns to cut; and down of GEMV, a third of all, where a word holds
    # zero points of groups of two processes.
    assert sum(read_bytes) < (1.5 if fmt == "awq-gemv" else 1.15) * whole


@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("where", ["down", "gate"])
def test_act_order(tmp_path: Path, fmt: str, where: Any) -> None:
    """Of one expert, where the format allows it, so that other chunks have none; that of down spreads columns."""
    rng = np.random.default_rng(0)
    layer: Any = random_layer(rng, EXPERTS, HIDDEN, INTER)
    shape = (HIDDEN, INTER) if where == "down" else (INTER, HIDDEN)
    alike: tuple[Any, ...] = ("down",) if where == "down" else ("gate", "up")
    for expert, projection in [(1, where)] if fmt == "gptq" else [(e, p) for e in range(EXPERTS) for p in alike]:
        layer[expert, projection] = random_linear(rng, *shape, act_order=True)
    write_checkpoint(
        tmp_path, layer_tensors(layer, ENCODERS[fmt]), quantization=quantization_config(fmt, layer[1, where])
    )
    whole = check_parts(loader(tmp_path, layer, codes_at_once=1))
    assert (whole.inter_perm is not None) == (where == "down")


def test_groups_that_are_promoted(tmp_path: Path) -> None:
    """One expert's groups of 128 become four each, as others have; a part may begin inside one of them."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, 192)
    layer[0, "down"] = random_linear(rng, HIDDEN, 192, group_size=128)
    tensors = layer_tensors(layer, ENCODERS["compressed-tensors"])
    config = quantization_config("compressed-tensors", layer[1, "up"])
    groups = config["config_groups"]
    coarse = quantization_config("compressed-tensors", layer[0, "down"])["config_groups"]["group_0"]
    config["config_groups"] = {"first": {**coarse, "targets": ["re:.*experts.0.down_proj"]}, **groups}
    write_checkpoint(tmp_path, tensors, quantization=config)
    check_parts(loader(tmp_path, layer), [ParallelConfig(t, 3) for t in range(3)])


@pytest.mark.parametrize("fmt", ["gptq_v2", "awq", "compressed-tensors", "int-quantized"])
def test_fused_experts(tmp_path: Path, fmt: str) -> None:
    """Rows of gate and up in one tensor."""
    rng, bits = np.random.default_rng(0), 8 if fmt == "int-quantized" else 4
    shapes = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
    linears = {name: [random_linear(rng, *shape, bits=bits) for _ in range(EXPERTS)] for name, shape in shapes.items()}
    tensors: dict[str, Tensor] = {}
    for name, held in linears.items():
        encoded = [ENCODERS[fmt](linear) for linear in held]
        keys = {suffix: f"model.layers.0.mlp.experts.{name}.{suffix}" for suffix in encoded[0]}
        tensors |= {key: torch.stack([one[suffix] for one in encoded]) for suffix, key in keys.items()}
    config = quantization_config(fmt, linears["down_proj"][0])
    write_checkpoint(tmp_path, tensors, qwen3_config(EXPERTS, HIDDEN, INTER), config)
    assert check_parts(lambda config: load_experts(tmp_path, 0, shard=config)).source_order == "concatenated"


def test_interleaved_rows_with_biases(tmp_path: Path) -> None:
    """gpt-oss: gate and up by turns in transposed tensors, unquantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dims = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": 1}
    rest = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 16}
    config = AutoConfig.for_model("gpt_oss", **dims, **rest, layer_types=["full_attention"], num_experts_per_tok=2)
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.model.layers[0].mlp.experts.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    whole = check_parts(lambda config: load_experts(tmp_path, 0, shard=config))
    assert whole.source_order == "interleaved" and whole.w2.bias is not None


def test_a_tensor_of_each_part(tmp_path: Path, read_bytes: list[int]) -> None:
    """Unquantised: the parts' bytes are those of the files, no more and no less."""
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    tensors = {f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": layer[e, p].weight for e, p in layer}
    write_checkpoint(tmp_path, tensors)
    load = loader(tmp_path, layer)
    check_parts(load)
    read_bytes.clear()
    for config in CONFIGS:
        load(config)
    assert (
        sum(read_bytes)
        == sum(tensor.nbytes for tensor in tensors.values())
        == 4 * 3 * math.prod((EXPERTS, HIDDEN, INTER))
    )
