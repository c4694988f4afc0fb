"""load_experts: the experts of one layer of a checkpoint as MoEQuantInfo."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader, resolve_checkpoint
from quant_moelora.loaders.families import Projection, build_skeleton, find_experts
from quant_moelora.loaders.layer_format import LayerFormat, describe_layers
from quant_moelora.loaders.pack import Weight, build_info, join_experts
from quant_moelora.loaders.parallel import in_parallel
from quant_moelora.loaders.promote import promote

# Codes of the experts that are decoded together: on the CPU so few that they stay in a core's caches, on another device
# so many that launches do not matter. As many are in work by all threads of the CPU (benchmarks/NOTES.md).
CODES_IN_CACHE = 1 << 22
CODES_IN_WORK = 1 << 26


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


def load_layer(
    checkpoint: Checkpoint, layer: LayerFormat, device: torch.device | str, *, codes_at_once: int | None = None
) -> MoEQuantInfo:
    """Read, decode and pack one layer, some experts at a time and in the order in which they lie in the files.

    Besides the packed layer, memory is needed for the experts in work only: three bytes for each of their codes.

    Args:
        checkpoint: the checkpoint.
        layer: how it holds the layer.
        device: where tensors are decoded, and stay.
        codes_at_once: codes of the experts that are decoded together, though never less than one expert's; None for a
            number that suits the device.

    Raises:
        FormatError: the data contradicts the config, or is not finite.
    """
    device, spec = torch.device(device), layer.spec
    on_cpu = device.type == "cpu"
    codes = spec.hidden_size * spec.intermediate_size * len(spec.projections)
    count = max(1, (codes_at_once or (CODES_IN_CACHE if on_cpu else CODES_IN_WORK)) // codes)
    experts = list(dict.fromkeys(expert for expert, _ in layer.keys))  # headers, and so keys, are in the files' order
    chunks = [experts[first : first + count] for first in range(0, len(experts), count)]
    workers = min(torch.get_num_threads(), len(chunks), CODES_IN_WORK // (count * codes)) if on_cpu else 1

    def load(chunk: list[int]) -> tuple[list[int], MoEQuantInfo]:
        return chunk, _load_chunk(checkpoint, layer, chunk, device)

    with closing(in_parallel(load, chunks, workers)) as parts:
        return replace(join_experts(parts, spec.num_experts), source_order=layer.source_order)


def _load_chunk(checkpoint: Checkpoint, layer: LayerFormat, experts: list[int], device: torch.device) -> MoEQuantInfo:
    """Some experts of a layer, packed."""
    halves: list[Projection] = [p for p in layer.spec.projections if p != "down"]
    w13 = _stack([_read_projection(checkpoint, layer, p, experts, device) for p in halves])
    w2 = _stack([_read_projection(checkpoint, layer, "down", experts, device)])
    biases: list[Tensor] = []
    if layer.spec.has_bias:
        down: list[Projection] = ["down"]
        biases = [
            torch.stack([_read_bias(checkpoint, layer, p, experts, device) for p in projections], dim=1)
            for projections in (halves, down)
        ]
    return build_info(w13, w2, layer.spec.activation, *biases)


def _read_bias(
    checkpoint: Checkpoint, layer: LayerFormat, projection: Projection, experts: list[int], device: torch.device
) -> Tensor:
    """Bias of one projection of some experts, float32 [e, N]."""
    held = [layer.keys[expert, projection] for expert in experts]
    bias = _read(checkpoint, [h.headers["bias"] for h in held], device)
    check_finite(bias, [h.module for h in held])
    return bias.to(torch.float32)


def _read(checkpoint: Checkpoint, headers: list[TensorHeader], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype, stacked. One alone on the CPU is the mapped file itself, not to be written to."""
    tensors = [checkpoint.read(header.key, header.part) for header in headers]
    if device.type != "cuda":
        return (torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]).to(device)
    # Pinned memory is kept by torch's allocator and used again when its copy to the device is done.
    staging = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(tensors, out=staging).to(device, non_blocking=True)


def _read_projection(
    checkpoint: Checkpoint, layer: LayerFormat, projection: Projection, experts: list[int], device: torch.device
) -> Weight:
    """One projection of some experts, [e, N, K]."""
    fmt = layer.formats[projection]
    held = [layer.keys[expert, projection] for expert in experts]
    tensors = {suffix: _read(checkpoint, [h.headers[suffix] for h in held], device) for suffix in fmt.tensors}
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

    def side_by_side(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, dim=1) if len(tensors) > 1 else tensors[0].unsqueeze(1)

    if isinstance(parts[0], Tensor):
        return side_by_side(parts)

    def stacked(name: str) -> Tensor | None:
        held = [getattr(part, name) for part in parts]
        return None if held[0] is None else side_by_side(held)

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
