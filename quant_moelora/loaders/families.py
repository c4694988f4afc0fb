"""Families: what transformers says of a model's experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from quant_moelora.core.activations import Activation, ActivationName
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.codec import LinearSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Projection = Literal["gate", "up", "down"]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Names of transformers' activations and ours.
_ACTIVATIONS: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Parameters of an experts module, and the projections that stand one after the other in its rows.
PARAMETERS: dict[str, tuple[Projection, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts module of one layer, as transformers builds it.

    Attributes:
        module: its name in the model.
        layer: number of its layer.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: what stands between its projections.
        transposed: whether its parameters are [E, K, N].
        interleaved: whether its gate_up_proj has rows of gate and up in turns, and not all of gate first.
        has_bias: whether its projections have biases.
        declared_transposed: whether the module itself says that it is transposed, which is what PEFT goes by.
    """

    module: str
    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    declared_transposed: bool = False

    def linear(self, name: str, projection: Projection) -> LinearSpec:
        """One projection of one expert, called ``name`` in the checkpoint."""
        n, k = self.intermediate_size, self.hidden_size
        return LinearSpec(name, k, n) if projection == "down" else LinearSpec(name, n, k)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Projections that each expert has."""
        return ("gate", "up", "down") if self.activation.gated else ("up", "down")


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: shapes, no data.

    Raises:
        UnsupportedError: transformers does not know the model type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"model type {checkpoint.config.get('model_type')} of {checkpoint.path}",
            got=str(error).splitlines()[0],
            rule="a causal language model of the installed transformers",
            remedy="install a version of transformers that has it",
        ) from error


def find_experts(model: nn.Module) -> list[ExpertsSpec]:
    """Every fused experts module of a transformers model, in the order of its layers.

    Raises:
        UnsupportedError: an experts module that does something else than down(act(gate) * up).
    """
    return [_spec(name, module) for name, module in model.named_modules() if is_experts_module(module)]


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts: 3-D parameters, one slice an expert."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def _spec(name: str, module: nn.Module) -> ExpertsSpec:
    reasons = list(_refusals(module))
    layer = _LAYER.search(name)
    if layer is None:
        reasons.append("it is in no numbered layer")
    activation = _activation(module)
    if activation is None:
        act_fn = getattr(module, "act_fn", None)
        reasons.append(
            f"its activation {type(act_fn).__name__} is not known here"
            if _has_default_gate(module)
            else "it combines gate and up in its own way"
        )
    if reasons or layer is None or activation is None:
        raise UnsupportedError(
            f"experts module {name} ({type(module).__name__})",
            got="; ".join(reasons),
            rule="gate_up_proj and down_proj, perhaps biases, and act(gate) * up or the clamped swiglu of gpt-oss",
            remedy="this family is not served",
        )
    down = module.down_proj
    assert isinstance(down, nn.Parameter)  # is_experts_module
    flags = {
        ours: _flag(module, theirs) for ours, theirs in (("transposed", "is_transposed"), ("has_bias", "has_bias"))
    }
    num_experts, *dims = down.shape
    hidden_size, intermediate_size = reversed(dims) if flags["transposed"] else dims
    interleaved = not _flag(module, "is_concatenated")
    sizes = (num_experts, hidden_size, intermediate_size)
    declared = _flag(module, "is_transposed")
    return ExpertsSpec(
        name, int(layer[1]), *sizes, activation, interleaved=interleaved, declared_transposed=declared, **flags
    )


# Attributes that transformers' decorator of experts modules sets, and their defaults.
_FLAGS = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}


def _flag(module: nn.Module, name: str) -> bool:
    """A flag of an experts module."""
    return bool(getattr(module, name, _FLAGS[name]))


def _refusals(module: nn.Module) -> Iterator[str]:
    """Why an experts module cannot be served."""
    parameters = {name for name, _ in module.named_parameters()}
    biases = {f"{name}_bias" for name in PARAMETERS} if _flag(module, "has_bias") else set[str]()
    if parameters != PARAMETERS.keys() | biases:
        yield f"it has parameters {', '.join(sorted(parameters))}"
    if not _flag(module, "has_gate"):
        yield "has_gate is False"


def _activation(module: nn.Module) -> Activation | None:
    """Our name of what a module does between its projections; None for what is not known here."""
    from transformers.activations import ACT2FN

    if not _has_default_gate(module):
        return _clamped_swiglu(module)
    act_fn = getattr(module, "act_fn", None)
    for name, ours in _ACTIVATIONS.items():
        if type(act_fn) is type(ACT2FN[name]):
            return Activation(ours)
    return None


def _has_default_gate(module: nn.Module) -> bool:
    """Whether a module computes act_fn(gate) * up, with gate in the first half of the rows."""
    from transformers.integrations import moe

    usual = moe._default_apply_gate  # pyright: ignore[reportPrivateUsage] - transformers has no public name for it
    return getattr(type(module), "_apply_gate", None) is usual and _flag(module, "is_concatenated")


def _clamped_swiglu(module: nn.Module) -> Activation | None:
    """The clamped swiglu of gpt-oss, if that is what a module's own gate computes on a grid beyond its limit.

    Other families have an ``alpha`` and a ``limit`` too, and another formula.
    """
    alpha, limit, apply_gate = (getattr(module, name, None) for name in ("alpha", "limit", "_apply_gate"))
    if not isinstance(alpha, float) or not isinstance(limit, float) or not callable(apply_gate):
        return None
    activation = Activation("swigluoai", alpha=alpha, limit=limit)
    # While transformers loads a model, torch's default dtype is the model's.
    values = torch.linspace(-2 * limit, 2 * limit, 15, dtype=torch.float32, device="cpu")
    pairs = torch.cartesian_prod(values, values)  # (gate, up)
    got: Any = apply_gate(pairs)  # of two columns, gate is the first in both orders
    expected = activation(pairs)
    # float32 and a few products in another order: 2**-24 * 4, with room.
    return activation if torch.allclose(got, expected, rtol=2**-20, atol=2**-20) else None
