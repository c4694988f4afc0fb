"""Families: what transformers says of a model's experts, and where a checkpoint keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from quant_moelora.core.activations import Activation, ActivationName
from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint, Part, TensorHeader
from quant_moelora.loaders.codec import LinearSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Projection = Literal["gate", "up", "down"]
# Spellings of a projection in checkpoints. Mixtral, Phi-MoE and MiniMax say w1, w3, w2.
PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# model.layers.3.mlp.experts.17.gate_proj. Only the decoder's layers: other stacks, such as mtp.layers, have names of
# their own and count from 0 too.
_EXPERT_MODULE = re.compile(
    r"(?:(?:model|language_model|text_model|backbone)\.)*layers\.(?P<layer>\d+)\.(?:.*\.)?"
    rf"experts\.(?P<expert>\d+)\.(?P<projection>{'|'.join(PROJECTIONS)})"
)
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

    def linear(self, name: str, projection: Projection) -> LinearSpec:
        """One projection of one expert, called ``name`` in the checkpoint."""
        n, k = self.intermediate_size, self.hidden_size
        return LinearSpec(name, k, n) if projection == "down" else LinearSpec(name, n, k)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Projections that each expert has."""
        return ("gate", "up", "down") if self.activation.gated else ("up", "down")


@dataclass(frozen=True)
class ExpertKeys:
    """Tensors of one projection of one expert in a checkpoint: its module's name there, and headers by suffix."""

    module: str
    headers: Mapping[str, TensorHeader]


LayerKeys = dict[tuple[int, Projection], ExpertKeys]  # by expert and projection


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
    return ExpertsSpec(name, int(layer[1]), *sizes, activation, interleaved=interleaved, **flags)


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


def parse_expert_module(module: str) -> tuple[int, int, Projection] | None:
    """Layer, expert and projection that the name of a per-expert module means; None for any other module."""
    match = _EXPERT_MODULE.fullmatch(module)
    return match and (int(match["layer"]), int(match["expert"]), PROJECTIONS[match["projection"]])


def expert_modules(spec: ExpertsSpec, model_type: str) -> dict[tuple[int, Projection], str]:
    """Names that a family's own checkpoints give the projections, such as ``block_sparse_moe.experts.0.w1``.

    They are found by going back through transformers' conversions.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    module = f"{spec.module}."
    names: dict[Projection, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        for source in conversion.source_patterns:
            block, expert, name = source.removesuffix(".weight").rpartition("experts.*.")
            if expert and name in PROJECTIONS:
                names[PROJECTIONS[name]] = name
            elif not expert and re.fullmatch(r"\.\w+\.", block or name):
                module = module.replace(conversion.target_patterns[0], source)
    return {(e, p): f"{module}{e}.{names[p]}" for e in range(spec.num_experts) for p in spec.projections}


def expert_keys(checkpoint: Checkpoint) -> dict[int, LayerKeys]:
    """Tensors of every expert, by layer.

    Raises:
        FormatError: two spellings of one projection.
    """
    layers: dict[int, LayerKeys] = {}
    for module, headers in checkpoint.modules().items():
        parsed = parse_expert_module(module)
        if parsed is None:
            continue
        number, expert, projection = parsed
        layer = layers.setdefault(number, {})
        if (expert, projection) in layer:
            raise FormatError(
                f"expert {expert} of layer {number}",
                got=f"{layer[expert, projection].module} and {module}",
                rule=f"one set of tensors for its {projection} projection",
                remedy="remove one of the two from the checkpoint",
            )
        layer[expert, projection] = ExpertKeys(module, headers)
    return layers


def fused_keys(
    checkpoint: Checkpoint, specs: list[ExpertsSpec], model: PreTrainedModel | None = None
) -> dict[int, LayerKeys]:
    """Rows of every expert in tensors [E, N, K] that are an experts module's own parameters, by layer.

    Args:
        checkpoint: the checkpoint.
        specs: the layers.
        model: whose family transformers may have other names for in checkpoints; None if there are none.

    Raises:
        UnsupportedError: the checkpoint's tensors are not the parameters, but converted into them by transformers.
    """
    names = _fused_names(
        checkpoint,
        {f"{spec.module}.{name}{bias}" for spec in specs for name in PARAMETERS for bias in ("", "_bias")},
        model,
    )
    layers: dict[int, LayerKeys] = {}
    for spec in specs:
        layer = layers.setdefault(spec.layer, {})
        for name, projections in PARAMETERS.items():
            header = names.get(f"{spec.module}.{name}")
            if header is None:
                continue
            held = {"weight": header, "bias": names.get(f"{spec.module}.{name}_bias")}
            for expert in range(max(whole.shape[0] for whole in held.values() if whole is not None)):
                for place, projection in enumerate(projections):
                    rows = _rows(header.shape[2 if spec.transposed else 1], place, len(projections), spec.interleaved)
                    layer[expert, projection] = ExpertKeys(
                        header.key,
                        {
                            suffix: whole.at(Part(expert, rows, spec.transposed and suffix == "weight"))
                            for suffix, whole in held.items()
                            if whole is not None and expert < whole.shape[0]
                        },
                    )
    return layers


def _rows(count: int, place: int, places: int, interleaved: bool) -> slice:
    """Rows of one of several projections that share a tensor of ``count`` rows."""
    if interleaved:
        return slice(place, count, places)
    return slice(count * place // places, count * (place + 1) // places)


def _fused_names(
    checkpoint: Checkpoint, parameters: set[str], model: PreTrainedModel | None
) -> dict[str, TensorHeader]:
    """Tensors with three dimensions, or biases with two, that are the ``parameters``, by the parameter's name."""
    solid = {
        key: header
        for key, header in checkpoint.headers.items()
        if len(header.shape) == (2 if key.endswith("_bias") else 3)
    }
    if model is None:
        return {key: header for key, header in solid.items() if key in parameters}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    state = dict(model.state_dict())
    found: dict[str, TensorHeader] = {}
    for key, header in solid.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as transformers does: some renamings also match the model's own names
            name, pattern = key, None
        if name in parameters and pattern is not None:
            raise UnsupportedError(
                key,
                got=f"a tensor that transformers converts into {name}",
                rule="the parameter itself, under its own or another name, or one tensor an expert and projection",
                remedy="this layout is not served; split the tensor by expert and projection",
            )
        if name in parameters:
            found[name] = header
    return found


def check_complete(spec: ExpertsSpec, found: LayerKeys, checkpoint: Checkpoint) -> None:
    """Raise unless ``found`` has every projection of every expert of a layer, and nothing else.

    Raises:
        MissingTensorError: an expert's projection is not in the checkpoint.
        FormatError: the checkpoint has more experts than the model.
    """
    wanted = {(expert, p) for expert in range(spec.num_experts) for p in spec.projections}
    missing = sorted(wanted - found.keys())
    if missing:
        expert, projection = missing[0]
        name = f"{spec.module}.{expert}.{projection}_proj"
        if found:
            name += f" or, as its other experts are called, like {next(iter(found.values())).module}"
        others = [key for key in checkpoint.headers if f"layers.{spec.layer}." in key and ".experts." in key]
        held = f", which has {others[0]} instead" if others and not found else ""
        raise MissingTensorError(
            f"{projection} projection of expert {expert} in layer {spec.layer} ({spec.module})",
            got=f"no tensors for it in {checkpoint.path}{held}: {len(missing)} of {len(wanted)} projections missing",
            rule=f"tensors of {name}",
            remedy="download the checkpoint again, or correct the number of experts in config.json",
        )
    surplus = sorted(found.keys() - wanted)
    if surplus:
        extra = found[surplus[0]]
        raise FormatError(
            f"experts of layer {spec.layer}",
            got=f"{extra.module} in {next(iter(extra.headers.values())).file.name}",
            rule=f"experts 0 to {spec.num_experts - 1}, as config.json says",
            remedy="correct the number of experts in config.json",
        )
