"""Where a checkpoint keeps the experts: tensors for each expert and projection, or fused ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint, Part, TensorHeader
from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec, Projection
from quant_moelora.loaders.renamings import Renamings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Spellings of a projection in checkpoints. Mixtral, Phi-MoE and MiniMax say w1, w3, w2.
PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
# model.layers.3.mlp.experts.17.gate_proj. Only the decoder's layers: other stacks, such as mtp.layers, have names of
# their own and count from 0 too.
_EXPERT_MODULE = re.compile(
    r"(?:(?:model|language_model|text_model|backbone)\.)*layers\.(?P<layer>\d+)\.(?:.*\.)?"
    rf"experts\.(?P<expert>\d+)\.(?P<projection>{'|'.join(PROJECTIONS)})"
)


@dataclass(frozen=True)
class ExpertKeys:
    """Tensors of one projection of one expert in a checkpoint: its module's name there, and headers by suffix."""

    module: str
    headers: Mapping[str, TensorHeader]


LayerKeys = dict[tuple[int, Projection], ExpertKeys]  # by expert and projection


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
                    rows = projection_rows(
                        header.shape[2 if spec.transposed else 1], place, len(projections), spec.interleaved
                    )
                    layer[expert, projection] = ExpertKeys(
                        header.key,
                        {
                            suffix: whole.at(Part(expert, rows, spec.transposed and suffix == "weight"))
                            for suffix, whole in held.items()
                            if whole is not None and expert < whole.shape[0]
                        },
                    )
    return layers


def projection_rows(count: int, place: int, places: int, interleaved: bool) -> slice:
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
    renamings = Renamings(model)
    found: dict[str, TensorHeader] = {}
    for key, header in solid.items():
        name, converted = renamings.name(key)
        if name in parameters and converted:
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
