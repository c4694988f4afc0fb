"""load_experts: the experts of one layer of a checkpoint as MoEQuantInfo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite
from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
from quant_moelora.loaders.families import Projection, build_skeleton, find_experts
from quant_moelora.loaders.layer_format import LayerFormat, describe_layers
from quant_moelora.loaders.pack import Weight, build_info
from quant_moelora.loaders.promote import promote

if TYPE_CHECKING:
    pass


def load_experts(path: str | Path, layer: int, device: torch.device | str = "cpu") -> MoEQuantInfo:
    """The experts of one layer, packed.

    Args:
        path: folder of a checkpoint, or a repository of the hub.
        layer: number of the layer, as the checkpoint counts.
        device: where the packed tensors go.

    Raises:
        FormatError: a tensor is missing or misshapen, or the files contradict each other.
        UnsupportedError: a format or model family that is not served, or a layer without routed experts.
    """
    checkpoint = Checkpoint(resolve_checkpoint(path))
    model = build_skeleton(checkpoint)
    specs = {spec.layer: spec for spec in find_experts(model)}
    if layer not in specs:
        raise UnsupportedError(
            "layer",
            got=layer,
            rule=f"a layer with routed experts: {', '.join(map(str, specs)) or 'the model has none'}",
            remedy="choose one of them",
        )
    return load_layer(checkpoint, describe_layers(checkpoint, [specs[layer]], model)[0], device)


def load_layer(checkpoint: Checkpoint, layer: LayerFormat, device: torch.device | str) -> MoEQuantInfo:
    """Read, decode and pack one layer; peak extra memory is that of the layer.

    Raises:
        FormatError: the data contradicts the config, or is not finite.
    """
    halves: list[Projection] = [p for p in layer.spec.projections if p != "down"]
    w13 = _stack([_read_projection(checkpoint, layer, p, device) for p in halves])
    w2 = _stack([_read_projection(checkpoint, layer, "down", device)])
    biases: list[Tensor] = []
    if layer.spec.has_bias:
        down: list[Projection] = ["down"]
        biases = [
            torch.stack([_read_bias(checkpoint, layer, p, device) for p in projections], dim=1)
            for projections in (halves, down)
        ]
    info = build_info(w13, w2, layer.spec.activation, *biases)
    return replace(info, source_order=layer.source_order, router_weight=layer.spec.router_weight)


def _read_bias(
    checkpoint: Checkpoint, layer: LayerFormat, projection: Projection, device: torch.device | str
) -> Tensor:
    """Bias of one projection of all experts, float32 [E, N]."""
    bias = _read(checkpoint, layer, projection, "bias", device)
    check_finite(bias, [layer.keys[expert, projection].module for expert in range(layer.spec.num_experts)])
    return bias.to(torch.float32)


def _read(
    checkpoint: Checkpoint, layer: LayerFormat, projection: Projection, suffix: str, device: torch.device | str
) -> Tensor:
    """One tensor of a projection, of all experts, stacked."""
    headers = [layer.keys[expert, projection].headers[suffix] for expert in range(layer.spec.num_experts)]
    return torch.stack([checkpoint.read(header.key, header.part) for header in headers]).to(device)


def _read_projection(
    checkpoint: Checkpoint, layer: LayerFormat, projection: Projection, device: torch.device | str
) -> Weight:
    """One projection of all experts, [E, N, K]."""
    fmt = layer.formats[projection]
    held = [layer.keys[expert, projection] for expert in range(layer.spec.num_experts)]
    tensors = {suffix: _read(checkpoint, layer, projection, suffix, device) for suffix in fmt.tensors}
    linear = layer.spec.linear(f"{layer.spec.module} ({projection})", projection)
    weight = layer.codecs[projection].decode(tensors, linear, fmt)
    check_finite(weight, [h.module for h in held])
    scheme = layer.scheme(projection)
    if isinstance(weight, Tensor):
        return weight
    assert scheme is not None  # the weight has codes
    return promote(weight, scheme, linear.module)


def _stack(parts: list[Any]) -> Weight:
    """Projections [E, N, K] side by side as halves [E, halves, N, K]."""
    if isinstance(parts[0], Tensor):
        return torch.stack(parts, dim=1)

    def stacked(name: str) -> Tensor | None:
        held = [getattr(part, name) for part in parts]
        return None if held[0] is None else torch.stack(held, dim=1)

    codes, scales, zeros = (stacked(name) for name in ("codes", "scales", "zeros"))
    assert codes is not None and scales is not None
    return CanonicalWeight(parts[0].scheme, codes, scales, zeros, _stack_g_idx(parts))


def _stack_g_idx(parts: list[CanonicalWeight]) -> Tensor | None:
    """g_idx [E, halves, K]; None if no part has a map that says anything."""
    if all(part.g_idx is None for part in parts):
        return None
    experts, _, k = parts[0].codes.shape
    device = parts[0].codes.device
    plain = (torch.arange(k, dtype=torch.int32, device=device) // (parts[0].scheme.group_size or k)).expand(experts, k)
    return torch.stack([plain if part.g_idx is None else part.g_idx for part in parts], dim=1)
