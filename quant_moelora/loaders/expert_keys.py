"""Where a checkpoint keeps the experts: names of the tensors of each expert and projection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quant_moelora.core.errors import FormatError, MissingTensorError
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.families import ExpertsSpec, Projection, Stored
from quant_moelora.loaders.unserved import refuse_unserved

# Spellings of a projection in checkpoints. Mixtral, Phi-MoE and MiniMax say w1, w3, w2.
PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
# model.layers.3.mlp.experts. Only the decoder's layers: other stacks, such as mtp.layers, have names of their own and
# count from 0 too.
EXPERTS_PREFIX = r"(?:(?:model|language_model|text_model|backbone)\.)*layers\.(?P<layer>\d+)\.(?:.*\.)?experts\."
# model.layers.3.mlp.experts.17.gate_proj
_EXPERT_MODULE = re.compile(rf"{EXPERTS_PREFIX}(?P<expert>\d+)\.(?P<projection>{'|'.join(PROJECTIONS)})")


@dataclass(frozen=True)
class ExpertKeys:
    """Tensors of one linear layer of one expert in a checkpoint: its name there, and headers by suffix."""

    module: str
    headers: Mapping[str, TensorHeader]


LayerKeys = dict[tuple[int, Stored], ExpertKeys]  # by expert and what it holds


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


def check_complete(spec: ExpertsSpec, found: LayerKeys, checkpoint: Checkpoint) -> None:
    """Raise unless ``found`` has every projection of every expert of a layer, and nothing else.

    Raises:
        UnsupportedError: the experts are there in a format that is known and not served.
        MissingTensorError: an expert's projection is not in the checkpoint.
        FormatError: the checkpoint has more experts than the model.
    """
    fused = any(stored == "gate_up" for _, stored in found)
    projections: tuple[Stored, ...] = ("gate_up", "down") if fused else spec.projections
    wanted = {(expert, stored) for expert in range(spec.num_experts) for stored in projections}
    missing = sorted(wanted - found.keys())
    if missing:
        expert, projection = missing[0]
        name = f"{spec.module}.{expert}.{projection}_proj"
        if found:
            name += f" or, as its other experts are called, like {next(iter(found.values())).module}"
        others = [key for key in checkpoint.headers if f"layers.{spec.layer}." in key and ".experts." in key]
        refuse_unserved(f"experts of {spec.module}", [checkpoint.headers[key] for key in others])
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
