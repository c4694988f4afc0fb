"""dense_twin and relative_rms: the twin is the dequantised model, and the measure sees a small change of one expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_moelora.integrations.parity import dense_twin, relative_rms
from quant_moelora.integrations.transformers import experts_of
from tests.integrations.models import (
    CHECKPOINTS,
    GPTQ,
    HONEST,
    ROUNDING,
    difference,
    golden_logits,
    load,
    logits,
    random_ids,
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_twin_has_the_golden_logits(name: str) -> None:
    ids, expected = golden_logits(name)
    twin: Any = dense_twin(load(name))
    assert not experts_of(twin) and not twin.training
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    assert difference(logits(twin, ids), expected) < HONEST


@pytest.mark.parametrize("name", [GPTQ, "gptq-mixtral-int4-g32-descact"])
def test_a_model_and_its_twin_agree_to_rounding(name: str) -> None:
    model = load(name)
    assert relative_rms(model, dense_twin(model), random_ids(3, 20)) < ROUNDING


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_per_cent_of_one_expert_shows(parameter: str) -> None:
    model = load(GPTQ)
    twin: Any = dense_twin(model)
    ids = random_ids(4, 32)
    assert relative_rms(model, twin, ids) < ROUNDING
    experts: Any = twin.get_submodule("model.layers.1.mlp.experts").get_parameter(parameter)
    with torch.no_grad():
        experts[3] *= 1.01
    assert relative_rms(model, twin, ids) > 5 * ROUNDING
    with torch.no_grad():
        experts[3] /= 1.01
    assert relative_rms(model, twin, ids) < ROUNDING


def test_making_a_twin_leaves_the_model_alone() -> None:
    model = load(GPTQ)
    ids = random_ids(2, 9)
    before = logits(model, ids)
    twin: Any = dense_twin(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids), before)
    assert model.config.quantization_config is not None


def test_the_twin_of_a_bfloat16_model_has_the_same_values() -> None:
    """The experts' values are exact whatever the model computes in; the rest is what bfloat16 left of it."""
    small: Any = dense_twin(load(GPTQ, dtype=torch.bfloat16))
    full: Any = dense_twin(load(GPTQ))
    for name, parameter in full.named_parameters():
        other = small.get_parameter(name)
        expected = parameter if ".experts." in name else parameter.to(torch.bfloat16).to(torch.float32)
        assert torch.equal(other, expected), name


class Constant:
    """A model of one answer."""

    def __init__(self, value: float) -> None:
        self.logits = torch.full((1, 2, 3), value)

    def __call__(self, input_ids: torch.Tensor) -> Constant:
        return self


def test_relative_rms_is_relative_to_the_twin() -> None:
    ids = random_ids(1, 2)
    model: Any = Constant(3.0)
    twin: Any = Constant(2.0)
    assert relative_rms(model, twin, ids) == pytest.approx(0.5, rel=1e-12)
    assert relative_rms(twin, model, ids) == pytest.approx(1 / 3, rel=1e-12)
    assert relative_rms(model, model, ids) == 0
