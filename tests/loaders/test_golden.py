"""Checkpoints that the real tools wrote: every expert equals the tool's own dequantisation, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight, PackedWeight
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_experts, load_layer
from quant_moelora.loaders.families import build_skeleton, find_experts
from quant_moelora.loaders.layer_format import describe_layers
from quant_moelora.loaders.linears import describe_linears

LAYERS = {"awq-qwen3moe-int4-g128": (0,)}
TWO_LAYERS = (0, 1)
SCHEMES = {
    "awq-qwen3moe-int4-g128": "w4a16_g128_asym",
    "ct-mixtral-w4a16-g128-sym-rtn": "w4a16_g128_sym",
    "ct-old-mixtral-w4a16-g32-actorder-group": "w4a16_g32_sym",
    "ct-qwen3moe-w4a16-g32-asym-rtn": "w4a16_g32_asym",
    "gptq-mixtral-int4-g32-descact": "w4a16_g32_sym",
    "gptq_v2-qwen3moe-int4-g32-asym": "w4a16_g32_asym",
    "gptq-qwen3moe-int4-g32-asym": "w4a16_g32_asym",
}
DENSE = {
    "base-mixtral-h128-i128": ("block_sparse_moe", ("w1", "w3", "w2")),
    "base-qwen3moe-h128-i96": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
ACT_ORDER = {"ct-old-mixtral-w4a16-g32-actorder-group", "gptq-mixtral-int4-g32-descact"}
# Checkpoints whose four attention projections are quantised too.
QUANTIZED_ATTENTION = {
    "awq-qwen3moe-int4-g128",
    "ct-old-mixtral-w4a16-g32-actorder-group",
    "gptq-mixtral-int4-g32-descact",
    "gptq_v2-qwen3moe-int4-g32-asym",
    "gptq-qwen3moe-int4-g32-asym",
}
NAMES = (*SCHEMES, *DENSE)


def sha256(weight: Tensor) -> str:
    return hashlib.sha256((weight + 0.0).contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_every_golden_checkpoint_is_tested(golden: Path) -> None:
    assert {path.name for path in (golden / "checkpoints").iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_tool(golden: Path, name: str) -> None:
    folder = golden / "checkpoints" / name
    expected = json.loads((folder / "reference_sha256.json").read_text())
    found: dict[str, str] = {}
    for number in LAYERS.get(name, TWO_LAYERS):
        info = load_experts(folder, number)
        assert info.scheme_name == SCHEMES[name]
        check_act_order(info, expected=name in ACT_ORDER)
        gate, up, down = info.dequantize()
        assert gate is not None
        for projection, weights in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            for expert, weight in enumerate(weights):
                found[f"layers.{number}.experts.{expert}.{projection}"] = sha256(weight)
    assert found == expected


def check_act_order(info: MoEQuantInfo, *, expected: bool) -> None:
    assert isinstance(info.w13, PackedWeight)
    assert (info.inter_perm is not None) == expected
    assert (info.w13.k_perm is not None) == expected
    if info.inter_perm is not None and info.w13.k_perm is not None:
        # The tools gave every expert an order of its own. Gate and up, which see the same input, share theirs.
        assert not torch.equal(info.inter_perm[0], info.inter_perm[1])
        assert not torch.equal(info.w13.k_perm[0], info.w13.k_perm[1])


@pytest.mark.parametrize("name", DENSE)
def test_unquantised_weights_are_the_stored_values(golden: Path, name: str) -> None:
    folder = golden / "checkpoints" / name
    block, names = DENSE[name]
    for number in TWO_LAYERS:
        info = load_experts(folder, number)
        assert info.scheme_name == "none"
        assert info.inter_perm is None
        assert isinstance(info.w13, DenseWeight)
        assert info.w13.w.dtype == torch.bfloat16
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for projection, weights in zip(names, info.dequantize(), strict=True):
                assert weights is not None
                for expert, weight in enumerate(weights):
                    stored = file.get_tensor(f"model.layers.{number}.{block}.experts.{expert}.{projection}.weight")
                    assert torch.equal(weight, stored.to(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_meta_info_has_the_shapes_of_the_loaded_info(golden: Path, name: str) -> None:
    checkpoint = Checkpoint(golden / "checkpoints" / name)
    skeleton = build_skeleton(checkpoint)
    for layer in describe_layers(checkpoint, find_experts(skeleton), skeleton):
        meta, loaded = layer.meta_info(), load_layer(checkpoint, layer, "cpu")
        permutations = {"inter_perm", "w13.k_perm"}  # whether there are any is in the data
        assert all(tensor.is_meta for tensor in meta.tensors().values())
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in meta.tensors().items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in loaded.tensors().items() if key not in permutations
        }
        assert meta.scheme_name == loaded.scheme_name
        assert meta.activation == loaded.activation
        assert (meta.num_experts, meta.hidden_size, meta.intermediate_size, meta.inter_pad) == (
            loaded.num_experts,
            loaded.hidden_size,
            loaded.intermediate_size,
            loaded.inter_pad,
        )


@pytest.mark.parametrize("name", NAMES)
def test_quantised_linears_are_found(golden: Path, name: str) -> None:
    checkpoint = Checkpoint(golden / "checkpoints" / name)
    found = describe_linears(checkpoint, build_skeleton(checkpoint))
    expected = {
        f"model.layers.{number}.self_attn.{projection}_proj"
        for number in LAYERS.get(name, TWO_LAYERS)
        for projection in "qkvo"
        if name in QUANTIZED_ATTENTION
    }
    assert found.keys() == expected
