"""Parity: the packed model held against the same model with dequantised, unpacked weights in plain transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant_moelora.integrations.dequantize import dequantize


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The family's own model in float32, with the values that a packed model's codes mean."""
    return dequantize(model, torch.float32).eval()


def random_ids(model: PreTrainedModel, rows: int = 4, length: int = 32) -> Tensor:  # (rows, length) int64
    """The same random tokens each time; the first three, which often are special ones, are left out."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


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
