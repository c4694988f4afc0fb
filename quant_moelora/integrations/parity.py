"""Parity: the packed model held against the same model with dequantised, unpacked weights in plain transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.loaders.families import ExpertsSpec


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The family's own model in float32, with the values that a packed model's codes mean.

    Call it before adapters are attached: PEFT renames the linear layers it wraps.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.__dict__.pop("quantization_config", None)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()}
    for name, experts in experts_of(model).items():
        assert experts.moe is not None  # from_pretrained
        state |= {f"{name}.{key}": tensor for key, tensor in _parameters(experts.spec, experts.moe.info).items()}
    twin.load_state_dict(state)
    return twin.eval()


def random_ids(model: PreTrainedModel, rows: int = 4, length: int = 32) -> Tensor:  # (rows, length) int64
    """The same random tokens each time; the first three, which often are special ones, are left out."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _parameters(spec: ExpertsSpec, info: MoEQuantInfo) -> dict[str, Tensor]:
    """The parameters of a family's experts module, float32."""
    gate, up, down = info.dequantize()
    halves = (up,) if gate is None else (gate, up)
    held = {"gate_up_proj": torch.stack(halves, dim=2 if spec.interleaved else 1).flatten(1, 2), "down_proj": down}
    if spec.transposed:
        held = {name: weight.transpose(1, 2) for name, weight in held.items()}
    b13, b2 = info.biases()
    if b13 is not None and b2 is not None:
        held["gate_up_proj_bias"] = (b13.transpose(1, 2) if spec.interleaved else b13).flatten(1)
        held["down_proj_bias"] = b2
    return held


@torch.no_grad()
def relative_rms(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    input_ids: Tensor,  # (batch, sequence) int64
) -> float:
    """Root mean square of the difference of both models' logits over that of the twin's."""
    expected = twin(input_ids=input_ids).logits.to(torch.float64)
    got = model(input_ids=input_ids).logits.to(torch.float64)
    return float((got - expected).norm() / expected.norm())
