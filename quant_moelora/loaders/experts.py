"""load_experts: the experts of one layer of a checkpoint as MoEQuantInfo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.parallel import in_parallel
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader, resolve_checkpoint
from quant_moelora.loaders.families import Stored, build_skeleton, find_experts
from quant_moelora.loaders.layer_format import LayerFormat, LinearsFormat, describe_layers
from quant_moelora.loaders.pack import Weight, build_info, join_experts
from quant_moelora.loaders.packed_form import PackedFormat
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

    A layer of the packed form is read as it is. For any other, besides the packed layer, memory is needed for the
    experts in work only: three bytes for each of their codes.

    Args:
        checkpoint: the checkpoint.
        layer: how it holds the layer.
        device: where tensors are decoded, and stay.
        codes_at_once: codes of the experts that are decoded together, though never less than one expert's; None for a
            number that suits the device.

    Raises:
        FormatError: the data contradicts the config, or is not finite.
        UnsupportedError: act-order that the weights cannot be put together or promoted with.
    """
    device, spec = torch.device(device), layer.spec
    on_cpu = device.type == "cpu"
    if isinstance(layer, PackedFormat):
        tensors = {name: _read(checkpoint, [header], device)[0] for name, header in layer.tensors.items()}
        # On the CPU these are the mapped files, which may be overwritten, by saving the model into its own folder.
        return layer.info({name: tensor.clone() for name, tensor in tensors.items()} if on_cpu else tensors)
    codes = spec.hidden_size * spec.intermediate_size * len(spec.projections)
    count = max(1, (codes_at_once or (CODES_IN_CACHE if on_cpu else CODES_IN_WORK)) // codes)
    experts = list(dict.fromkeys(expert for expert, _ in layer.linears))  # as the files have them
    chunks = [experts[first : first + count] for first in range(0, len(experts), count)]
    workers = min(torch.get_num_threads(), len(chunks), CODES_IN_WORK // (count * codes)) if on_cpu else 1

    def load(chunk: list[int]) -> tuple[list[int], MoEQuantInfo]:
        return chunk, _load_chunk(checkpoint, layer, chunk, device)

    with closing(in_parallel(load, chunks, workers)) as parts:
        info = join_experts(parts, spec.num_experts)
    return replace(info, source_order=layer.source_order, router_weight=spec.router_weight)


def _load_chunk(checkpoint: Checkpoint, layer: LinearsFormat, experts: list[int], device: torch.device) -> MoEQuantInfo:
    """Some experts of a layer, packed."""
    w13 = _halves([_read_linear(checkpoint, layer, stored, experts, device) for stored in layer.w13], layer)
    w2 = _side_by_side([_read_linear(checkpoint, layer, "down", experts, device)])
    biases: list[Tensor] = []
    if layer.spec.has_bias:
        gate_up = torch.cat([_read_bias(checkpoint, layer, stored, experts, device) for stored in layer.w13], dim=1)
        biases = [_split(gate_up, layer), _read_bias(checkpoint, layer, "down", experts, device)[:, None]]
    return build_info(w13, w2, layer.spec.activation, *biases)


def _read_bias(
    checkpoint: Checkpoint, layer: LinearsFormat, stored: Stored, experts: list[int], device: torch.device
) -> Tensor:  # (e, N) float32
    """Bias of one linear layer of some experts."""
    bias = _read(checkpoint, [layer.biases[expert, stored] for expert in experts], device)
    check_finite(bias, [layer.linears[expert, stored].spec.module for expert in experts])
    return bias.to(torch.float32)


def _read(checkpoint: Checkpoint, headers: list[TensorHeader], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype, stacked. One alone on the CPU is the mapped file itself, not to be written to."""
    tensors = [checkpoint.read(header.key, header.part) for header in headers]
    if device.type != "cuda":
        return (torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]).to(device)
    # Pinned memory is kept by torch's allocator and used again when its copy to the device is done.
    staging = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    return torch.stack(tensors, out=staging).to(device, non_blocking=True)


def _read_linear(
    checkpoint: Checkpoint, layer: LinearsFormat, stored: Stored, experts: list[int], device: torch.device
) -> Weight:
    """One linear layer of some experts, [e, N, K], in the scheme of its weight."""
    groups = layer.groups(stored, experts)
    parts: list[Any] = []
    for members, alike in groups:
        held = [layer.linears[expert, stored] for expert in members]
        tensors = {
            suffix: _read(checkpoint, [linear.headers[suffix] for linear in held], device)
            for suffix in alike.fmt.tensors
        }
        weight = alike.codec.decode(tensors, alike.spec, alike.fmt)
        check_finite(weight, [linear.spec.module for linear in held])
        scheme = layer.scheme(stored)
        if isinstance(weight, CanonicalWeight):
            assert scheme is not None  # it has codes
            weight = promote(weight, scheme, alike.spec.module)
        parts.append(weight)
    if len(parts) == 1:
        return parts[0]
    places = [experts.index(expert) for members, _ in groups for expert in members]
    order = torch.tensor(places, device=device).argsort()
    g_idx = None
    if any(part.g_idx is not None for part in parts):
        g_idx = torch.cat([_column_groups(part) for part in parts])[order]
    return _joined(parts, lambda tensors: torch.cat(tensors)[order], g_idx)


def _halves(parts: list[Any], layer: LinearsFormat) -> Weight:
    """What is stored of gate and up [E, N, K], with its rows one after the other, as halves [E, halves, I, K]."""
    if layer.source_order == "separate":
        return _side_by_side(parts)
    if isinstance(parts[0], Tensor):
        return _split(torch.cat(parts, dim=1), layer)
    g_idx = None
    if any(part.g_idx is not None for part in parts):
        maps = [_column_groups(part) for part in parts]
        if not all(torch.equal(maps[0], other) for other in maps):
            raise UnsupportedError(
                f"g_idx of {layer.spec.module}",
                got="two act-orders in the halves of the interleaved rows of gate and up",
                rule="one, since rows of both halves are the gate's",
                remedy="quantise the model without act-order, or with llm-compressor",
            )
        g_idx = maps[0][:, None].expand(-1, layer.spec.activation.halves, -1)
    return _joined(parts, lambda tensors: _split(torch.cat(tensors, dim=1), layer), g_idx)


def _split(
    rows: Tensor,  # (E, halves*I, ...)
    layer: LinearsFormat,
) -> Tensor:  # (E, halves, I, ...)
    """Rows of gate and up as halves."""
    halves = layer.spec.activation.halves
    if layer.source_order == "interleaved":
        return rows.unflatten(1, (-1, halves)).transpose(1, 2)
    return rows.unflatten(1, (halves, -1))


def _side_by_side(parts: list[Any]) -> Weight:
    """Linear layers [E, N, K] as halves [E, halves, N, K]."""

    def stack(tensors: list[Tensor]) -> Tensor:  # one alone is not copied
        return torch.stack(tensors, dim=1) if len(tensors) > 1 else tensors[0].unsqueeze(1)

    if isinstance(parts[0], Tensor):
        return stack(parts)
    g_idx = None
    if any(part.g_idx is not None for part in parts):
        g_idx = torch.stack([_column_groups(part) for part in parts], dim=1)
    return _joined(parts, stack, g_idx)


def _joined(
    parts: list[CanonicalWeight],
    join: Callable[[list[Tensor]], Tensor],
    g_idx: Tensor | None,  # (..., K)
) -> CanonicalWeight:
    """Weights of one scheme put together row by row, with the map of the whole."""

    def joined(name: str) -> Tensor | None:
        held = [getattr(part, name) for part in parts]
        return None if held[0] is None else join(held)

    codes, scales, zeros = (joined(name) for name in ("codes", "scales", "zeros"))
    assert codes is not None and scales is not None
    return CanonicalWeight(parts[0].scheme, codes, scales, zeros, g_idx)


def _column_groups(part: CanonicalWeight) -> Tensor:  # (E, K) int32
    """Group of each column of every expert, also where there is no map."""
    if part.g_idx is not None:
        return part.g_idx
    experts, _, k = part.codes.shape
    plain = torch.arange(k, dtype=torch.int32, device=part.codes.device) // (part.scheme.group_size or k)
    return plain.expand(experts, k)
