"""Families: what transformers says of a model's experts."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quant_moelora.core.activations import Activation, ActivationName
from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.quant_info import RouterWeight
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.codec import LinearSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Projection = Literal["gate", "up", "down"]
# What one linear layer of a checkpoint holds: a projection, or the rows of gate and of up together.
Stored = Literal["gate", "up", "gate_up", "down"]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Names of transformers' activations and ours.
_ACTIVATIONS: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Parameters of an experts module, and what their rows are.
PARAMETERS: dict[str, Stored] = {"gate_up_proj": "gate_up", "down_proj": "down"}


def projections_of(stored: Stored) -> tuple[Projection, ...]:
    """Projections whose rows a linear layer of a checkpoint, or a parameter, holds."""
    return ("gate", "up") if stored == "gate_up" else (stored,)


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
        router_weight: what the router's weight multiplies; see `MoEQuantInfo`.
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
    router_weight: RouterWeight = "output"
    declared_transposed: bool = False

    def linear(self, name: str, stored: Stored) -> LinearSpec:
        """One linear layer of one expert, called ``name`` in the checkpoint."""
        n, k = self.intermediate_size, self.hidden_size
        if stored == "down":
            return LinearSpec(name, k, n)
        return LinearSpec(name, 2 * n if stored == "gate_up" else n, k)

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


def require_experts(model: nn.Module) -> list[ExpertsSpec]:
    """`find_experts` of a model that has some.

    Raises:
        UnsupportedError: it has none, or as `find_experts`.
    """
    specs = find_experts(model)
    if not specs:
        raise UnsupportedError(
            f"model {type(model).__name__}",
            got="no fused experts module",
            rule="a Mixture-of-Experts model whose experts are [E, out, in] parameters",
            remedy="load it with transformers",
        )
    return specs


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
        usual = _has_default_gate(module) or _has_sorted_input(module)
        reasons.append(
            f"its activation {type(getattr(module, 'act_fn', None)).__name__} is not known here"
            if usual and _named_activation(module) is None
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
    sorted_input = _has_sorted_input(module)
    flags["transposed"] |= sorted_input
    num_experts, *dims = down.shape
    hidden_size, intermediate_size = reversed(dims) if flags["transposed"] else dims
    interleaved = not _flag(module, "is_concatenated")
    sizes = (num_experts, hidden_size, intermediate_size)
    weight: RouterWeight = "input" if sorted_input else "output"
    declared = _flag(module, "is_transposed")
    return ExpertsSpec(
        name,
        int(layer[1]),
        *sizes,
        activation,
        interleaved=interleaved,
        router_weight=weight,
        declared_transposed=declared,
        **flags,
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
    if _has_sorted_input(module):
        return _activation_of_sorted(module)
    if not _has_default_gate(module):
        return _clamped_swiglu(module)
    return _named_activation(module)


def _named_activation(module: nn.Module) -> Activation | None:
    """Our name of a module's act_fn; None if there is none."""
    from transformers.activations import ACT2FN

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


def _has_sorted_input(module: nn.Module) -> bool:
    """Whether a module gets no routing but an input [E * tokens, H], the tokens of the first expert first.

    Then its block has scaled each expert's tokens by the router's weights, with 0 where it is not chosen (Llama 4).
    """
    return list(inspect.signature(module.forward).parameters) == ["hidden_states"]


def _activation_of_sorted(module: nn.Module) -> Activation | None:
    """The activation of a module with sorted input, if its own code is that of Llama 4 when evaluated on small numbers.

    Each expert computes down(act(gate) * up) from [E, K, N] parameters, with gate in the first half of the columns.
    """
    activation = _named_activation(module)
    if activation is None:
        return None

    def numbers(*shape: int) -> Tensor:  # of both signs; torch's default dtype and device may be others here
        """Values that differ."""
        return torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").sin().view(shape)

    experts, hidden, inter = 2, 4, 3
    x, gate_up, down = numbers(experts, 5, hidden), numbers(experts, hidden, 2 * inter), numbers(experts, inter, hidden)
    small = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, hidden_size=hidden, act_fn=module.act_fn)
    try:
        got: Tensor = type(module).forward(small, x.flatten(0, 1))
    except (AttributeError, RuntimeError):  # another code than the known one, which needs other numbers
        return None
    expected = activation(x @ gate_up) @ down
    # float32 and sums of at most 4 products in another order, twice: 2**-24 * 8, with room.
    fits = got.shape == (x.shape[0] * x.shape[1], hidden)
    return activation if fits and torch.allclose(got.view_as(x), expected, rtol=2**-19, atol=2**-19) else None


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
