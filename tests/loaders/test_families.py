"""What transformers says of a model's experts, and how checkpoints call them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.expert_keys import expert_keys, parse_expert_module
from quant_moelora.loaders.experts import load_experts
from quant_moelora.loaders.families import ExpertsSpec, build_skeleton, find_experts
from tests.checkpoints import mixtral_config, qwen3_config, write_checkpoint

SILU = Activation("silu")
GPT_OSS = {
    **qwen3_config(2, 64, 32),
    "model_type": "gpt_oss",
    "num_local_experts": 2,
    "layer_types": ["full_attention"],
}

LLAMA4 = {
    **mixtral_config(3, 64, 40, layers=4),
    "model_type": "llama4_text",
    "head_dim": 32,
    "intermediate_size_mlp": 72,
}


def specs(folder: Path, config: dict[str, Any]) -> list[ExpertsSpec]:
    """Experts of the model that a config describes."""
    write_checkpoint(folder, {"w": torch.zeros(1)}, config)
    return find_experts(build_skeleton(Checkpoint(folder)))


def test_qwen3_moe(tmp_path: Path) -> None:
    assert specs(tmp_path, qwen3_config(6, 64, 40, layers=3)) == [
        ExpertsSpec(f"model.layers.{number}.mlp.experts", number, 6, 64, 40, SILU) for number in range(3)
    ]


def test_mixtral(tmp_path: Path) -> None:
    assert specs(tmp_path, mixtral_config(3, 64, 96, layers=2)) == [
        ExpertsSpec(f"model.layers.{number}.mlp.experts", number, 3, 64, 96, SILU) for number in range(2)
    ]


@pytest.mark.parametrize(
    "changes", [{"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}], ids=["mlp_only_layers", "sparse_step"]
)
def test_layers_with_a_dense_mlp_have_no_experts(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = specs(tmp_path, qwen3_config(4, 64, 32, layers=4, **changes))
    assert [spec.layer for spec in found] == [1, 3]


def test_skeleton_holds_no_data_and_ignores_the_quantization_config(tmp_path: Path) -> None:
    config = {**qwen3_config(4, 64, 32), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, config)
    model = build_skeleton(Checkpoint(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("hidden_act", "name"), [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_activations(tmp_path: Path, hidden_act: str, name: Any) -> None:
    found = specs(tmp_path, qwen3_config(4, 64, 32, hidden_act=hidden_act))
    assert found[0].activation == Activation(name)
    assert found[0].projections == ("gate", "up", "down")


def test_unknown_activation_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts .*its activation ReLU6 is not known here"):
        specs(tmp_path, qwen3_config(4, 64, 32, hidden_act="relu6"))


def test_gpt_oss(tmp_path: Path) -> None:
    swiglu = Activation("swigluoai", alpha=1.702, limit=7.0)
    flags: dict[str, Any] = {"transposed": True, "interleaved": True, "has_bias": True, "declared_transposed": True}
    assert specs(tmp_path, GPT_OSS) == [ExpertsSpec("model.layers.0.mlp.experts", 0, 2, 64, 64, swiglu, **flags)]


def test_another_gate_than_that_of_gpt_oss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attributes and a formula without the 1 that gpt-oss adds to up."""

    def apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * up

    monkeypatch.setattr("transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate", apply_gate)
    with pytest.raises(UnsupportedError, match=r"experts \(GptOssExperts\).*it combines gate and up in its own way"):
        specs(tmp_path, GPT_OSS)


@pytest.mark.parametrize(
    ("changes", "layers"), [({"interleave_moe_layer_step": 2}, [1, 3]), ({"moe_layers": [0, 3]}, [0, 3])]
)
def test_llama4(tmp_path: Path, changes: dict[str, Any], layers: list[int]) -> None:
    """Its experts module has no flags: that it is transposed, and gets a scaled input, is in its code."""
    assert specs(tmp_path, LLAMA4 | changes) == [
        ExpertsSpec(
            f"model.layers.{n}.feed_forward.experts", n, 3, 64, 40, SILU, transposed=True, router_weight="input"
        )
        for n in layers
    ]


def _up_first(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    up, gate = torch.bmm(hidden_states.view(len(self.down_proj), -1, self.hidden_size), self.gate_up_proj).chunk(2, -1)
    return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, self.hidden_size)


def _other_attributes(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.clamp * hidden_states


def _other_layout(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.bmm(hidden_states[None], self.gate_up_proj.transpose(1, 2))


@pytest.mark.parametrize("forward", [_up_first, _other_attributes, _other_layout])
def test_other_code_than_that_of_llama4_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: Any
) -> None:
    monkeypatch.setattr("transformers.models.llama4.modeling_llama4.Llama4TextExperts.forward", forward)
    with pytest.raises(UnsupportedError, match=r"Llama4TextExperts.*it combines gate and up in its own way"):
        specs(tmp_path, LLAMA4)


def test_unknown_activation_of_llama4_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"Llama4TextExperts.*its activation ReLU6 is not known here"):
        specs(tmp_path, LLAMA4 | {"hidden_act": "relu6"})


def test_model_without_experts(tmp_path: Path) -> None:
    config = qwen3_config(4, 64, 32, model_type="qwen3")
    assert specs(tmp_path, config) == []
    with pytest.raises(
        UnsupportedError, match="layer: got 0, expected a layer with routed experts: the model has none"
    ):
        load_experts(tmp_path, 0)


@pytest.mark.parametrize("model_type", ["no_such_model", None])
def test_model_type_that_transformers_does_not_know(tmp_path: Path, model_type: str | None) -> None:
    with pytest.raises(UnsupportedError, match=f"model type {model_type} of .*install a version of transformers"):
        specs(tmp_path, {"model_type": model_type} if model_type else {"hidden_size": 3})


@pytest.mark.parametrize(
    ("module", "parsed"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", (3, 17, "gate")),
        ("model.layers.3.mlp.experts.17.up_proj", (3, 17, "up")),
        ("model.layers.12.mlp.experts.0.down_proj", (12, 0, "down")),
        ("model.layers.0.block_sparse_moe.experts.1.w1", (0, 1, "gate")),
        ("model.layers.0.block_sparse_moe.experts.1.w3", (0, 1, "up")),
        ("model.layers.0.block_sparse_moe.experts.1.w2", (0, 1, "down")),
        ("model.layers.0.block_sparse_moe.experts.1.gate_proj", (0, 1, "gate")),
        ("model.language_model.layers.5.mlp.experts.2.up_proj", (5, 2, "up")),
        ("language_model.model.layers.5.mlp.experts.2.up_proj", (5, 2, "up")),
        ("model.layers.5.feed_forward.experts.2.up_proj", (5, 2, "up")),
        ("layers.5.mlp.experts.2.up_proj", (5, 2, "up")),
        ("model.layers.5.experts.2.up_proj", (5, 2, "up")),
        ("model.layers.3.mlp.shared_experts.gate_proj", None),
        ("model.layers.3.mlp.shared_experts.0.gate_proj", None),
        ("model.layers.3.mlp.shared_expert.gate_proj", None),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.3.mlp.gate", None),
        ("model.layers.3.mlp.experts", None),
        ("model.layers.3.mlp.experts.gate_up_proj", None),
        ("model.layers.3.mlp.experts.1.gate_up_proj", None),
        ("model.layers.3.mlp.experts.1.w4", None),
        ("model.layers.3.mlp.experts.1.gate_proj.base_layer", None),
        ("model.layers.x.mlp.experts.1.gate_proj", None),
        ("model.experts.1.gate_proj", None),
        ("", None),
    ],
)
def test_names_of_expert_modules(module: str, parsed: tuple[int, int, str] | None) -> None:
    assert parse_expert_module(module) == parsed


def test_keys_by_layer_expert_and_projection(tmp_path: Path) -> None:
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj" for n in (0, 61) for e in (0, 1, 10, 2) for p in ("up", "down")
    ]
    tensors = {f"{name}.{suffix}": torch.zeros(1) for name in names for suffix in ("qweight", "scales")}
    tensors |= {"model.layers.0.mlp.shared_experts.up_proj.qweight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    layers = expert_keys(Checkpoint(write_checkpoint(tmp_path, tensors)))
    assert layers.keys() == {0, 61}
    for number, layer in layers.items():
        assert Counter(expert for expert, _ in layer) == {0: 2, 1: 2, 2: 2, 10: 2}
        for (expert, projection), keys in layer.items():
            assert keys.module == f"model.layers.{number}.mlp.experts.{expert}.{projection}_proj"
            assert keys.headers.keys() == {"qweight", "scales"}
