"""load_experts: the experts of one layer of a checkpoint as MoEQuantInfo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.parallel import in_parallel
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig, Shard, Span
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite, trivial_g_idx
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader, resolve_checkpoint
from quant_moelora.loaders.codec import COLUMN_GROUPS, Axes
from quant_moelora.loaders.families import Stored, build_skeleton, find_experts
from quant_moelora.loaders.layer_format import LayerFormat, LinearsFormat, describe_layers
from quant_moelora.loaders.pack import Weight, build_info, join_experts
from quant_moelora.loaders.packed_form import PackedFormat
from quant_moelora.loaders.promote import promote
from quant_moelora.loaders.registry import StoredLinear
from quant_moelora.loaders.slices import Cut, read_windows, row_spans, windows

# Codes of the experts that are decoded together: on the CPU so few that they stay in a core's caches, on another device
# so many that launches do not matter. As many are in work by all threads of the CPU (benchmarks/NOTES.md).
CODES_IN_CACHE = 1 << 22
CODES_IN_WORK = 1 << 26


def load_experts(
    path: str | Path, layer: int, device: torch.device | str = "cpu", shard: ParallelConfig | None = None
) -> MoEQuantInfo:
    """The experts of one layer, packed, or one process's part of them.

    Args:
        path: folder of a checkpoint, or a repository of the hub.
        layer: number of the layer, as the checkpoint counts.
        device: where the packed tensors go.
        shard: this process's place among those that share the layer; it reads its part of the files alone, except
            where act-order of down spreads it over all of its experts' tensors.

    Raises:
        FormatError: a tensor is missing or misshapen, or the files contradict each other.
        UnsupportedError: a format or model family that is not served, a layer without routed experts, or more
            processes than can have a part.
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
    return load_layer(checkpoint, describe_layers(checkpoint, [specs[layer]], model)[0], device, shard)


def load_layer(
    checkpoint: Checkpoint,
    layer: LayerFormat,
    device: torch.device | str,
    shard: ParallelConfig | None = None,
    *,
    codes_at_once: int | None = None,
) -> MoEQuantInfo:
    """Read, decode and pack one layer, some experts at a time and in the order in which they lie in the files.

    A layer of the packed form is read as it is. For any other, besides the packed layer, memory is needed for the
    experts in work only: three bytes for each of their codes.

    Args:
        checkpoint: the checkpoint.
        layer: how it holds the layer.
        device: where tensors are decoded, and stay.
        shard: as of `load_experts`.
        codes_at_once: codes of the experts that are decoded together, though never less than one expert's; None for a
            number that suits the device.

    Raises:
        FormatError: the data contradicts the config, or is not finite.
        UnsupportedError: act-order that the weights cannot be put together or promoted with.
    """
    device, spec = torch.device(device), layer.spec
    on_cpu = device.type == "cpu"
    if isinstance(layer, PackedFormat):
        return _read_packed(checkpoint, layer, device, shard)
    unit = 1 if shard is None else layer.meta_info().inter_unit
    held = (shard or ParallelConfig()).shard(spec.num_experts, spec.intermediate_size, unit)
    codes = spec.hidden_size * held.inter.size * len(spec.projections)
    count = max(1, (codes_at_once or (CODES_IN_CACHE if on_cpu else CODES_IN_WORK)) // codes)
    own = range(held.experts.begin, held.experts.end)
    in_files = dict.fromkeys(expert for expert, _ in layer.linears)
    experts = [expert for expert in in_files if expert in own]
    chunks = [experts[first : first + count] for first in range(0, len(experts), count)]
    workers = min(torch.get_num_threads(), len(chunks), CODES_IN_WORK // (count * codes)) if on_cpu else 1

    def load(chunk: list[int]) -> tuple[list[int], MoEQuantInfo]:
        """Places among this process's experts, and the experts."""
        return [expert - own.start for expert in chunk], _load_chunk(_Reader(checkpoint, layer, chunk, device), held)

    with closing(in_parallel(load, chunks, workers)) as parts:
        info = join_experts(parts, held.experts.size, held.inter.begin)
    shared = held if held.config.world_size > 1 else None
    return replace(info, source_order=layer.source_order, router_weight=spec.router_weight, shard=shared)


def _read_packed(
    checkpoint: Checkpoint, layer: PackedFormat, device: torch.device, shard: ParallelConfig | None
) -> MoEQuantInfo:
    """A layer of the packed form as it is, or a process's part of it."""
    mapped = {name: checkpoint.read(h.key, h.part) for name, h in layer.tensors.items()}
    if shard is not None:  # copies, so that nothing else is read
        return layer.info(mapped).part(shard).to(device)
    if device.type == "cpu":  # what is mapped may be overwritten, by saving the model into its own folder
        return layer.info({name: tensor.clone() for name, tensor in mapped.items()})
    return layer.info({name: tensor.to(device) for name, tensor in mapped.items()})


class _Reader(NamedTuple):
    """Some experts of a layer, to be read."""

    checkpoint: Checkpoint
    layer: LinearsFormat
    experts: list[int]
    device: torch.device


def _load_chunk(reader: _Reader, held: Shard) -> MoEQuantInfo:
    """Some experts of a layer, or what is held of each of them, packed."""
    config = held.config
    if config.tp_size == 1:
        return _build(reader, reader.layer.spec.intermediate_size, None)
    if _has_act_order(reader):  # then a span of the stored order is anywhere in the file's
        whole = _build(reader, reader.layer.spec.intermediate_size, None)
        return replace(whole.part(ParallelConfig(config.tp_rank, config.tp_size)), shard=None)
    info = _build(reader, reader.layer.spec.intermediate_size, held.inter)
    return info if config.tp_rank == 0 else replace(info, w2=replace(info.w2, bias=None))


def _build(reader: _Reader, size: int, inter: Span | None) -> MoEQuantInfo:
    """Some experts, with a span of the intermediate of ``size``, or all of it."""
    layer, halves = reader.layer, reader.layer.spec.activation.halves

    def rows(stored: Stored) -> Cut:
        """The span's rows of a linear layer as it is stored."""
        return Cut() if inter is None else Cut(row_spans(inter, size, stored, halves, layer.source_order))

    w13 = _halves([_read_linear(reader, stored, rows(stored)) for stored in layer.w13], layer)
    w2 = _side_by_side([_read_linear(reader, "down", Cut(columns=inter))])
    biases: list[Tensor] = []
    if layer.spec.has_bias:
        gate_up = torch.cat([_read_bias(reader, stored, rows(stored)) for stored in layer.w13], dim=1)
        biases = [_split(gate_up, layer), _read_bias(reader, "down", Cut())[:, None]]
    return build_info(w13, w2, layer.spec.activation, *biases)


def _has_act_order(reader: _Reader) -> bool:
    """Whether the columns of down stand in an order of their own in any of the experts."""
    for expert in reader.experts:
        linear = reader.layer.linears[expert, "down"]
        for suffix in linear.fmt.tensors:
            if linear.codec.axes(linear.fmt)[suffix] == COLUMN_GROUPS:
                header, scheme = linear.headers[suffix], linear.fmt.scheme
                assert scheme is not None  # it has groups
                if not trivial_g_idx(reader.checkpoint.read(header.key, header.part), scheme.group_size):
                    return True
    return False


def _read_bias(reader: _Reader, stored: Stored, cut: Cut) -> Tensor:  # (e, N) float32
    """Bias of one linear layer of some experts."""
    layer, experts = reader.layer, reader.experts
    bias = _read(reader, [layer.biases[expert, stored] for expert in experts], Axes((0, 1), None), cut)
    assert bias is not None  # an element is of one row
    check_finite(bias, [layer.linears[expert, stored].spec.module for expert in experts])
    return bias.to(torch.float32)


def _read(reader: _Reader, headers: list[TensorHeader], axes: Axes, cut: Cut) -> Tensor | None:
    """Tensors of one shape and dtype, cut and stacked; None if an element would have to be cut.

    One alone on the CPU is the mapped file itself, not to be written to.
    """
    parts = windows(axes, headers[0], cut)
    if parts is None:
        return None
    return _to_device([read_windows(reader.checkpoint, header, axes, parts) for header in headers], reader.device)


def _to_device(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype, stacked; one alone on the CPU is itself."""
    if device.type == "cpu":
        return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
    # One by one, from where the files are mapped. Stacked on the host first, in pinned memory, they took 25 of the 29 s
    # of 8 layers of Qwen3-30B-A3B beside an H200: torch divides each small copy between all of the host's 32 cores.
    out = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, device=device)
    for place, tensor in zip(out, tensors, strict=True):
        place.copy_(tensor)
    return out


def _read_linear(reader: _Reader, stored: Stored, cut: Cut) -> Weight:
    """What is wanted of one linear layer of some experts, [e, N, K], in the scheme of its weight."""
    layer, experts = reader.layer, reader.experts
    groups = layer.groups(stored, experts)
    parts: list[Any] = []
    for members, alike in groups:
        held = [layer.linears[expert, stored] for expert in members]
        before, after = cut, Cut()  # decoding
        tensors = _tensors(reader, held, before)
        if tensors is None:
            before, after = after, before
            tensors = _tensors(reader, held, before)
            assert tensors is not None  # nothing is cut
        weight = alike.codec.decode(tensors, before.spec(alike.spec), alike.fmt)
        check_finite(weight, [linear.spec.module for linear in held])
        scheme = layer.scheme(stored)
        if isinstance(weight, CanonicalWeight):
            assert scheme is not None  # it has codes
            weight = promote(weight, scheme, alike.spec.module)
        parts.append(after.apply(weight))
    if len(parts) == 1:
        return parts[0]
    places = [experts.index(expert) for members, _ in groups for expert in members]
    order = torch.tensor(places, device=reader.device).argsort()
    g_idx = None
    if any(part.g_idx is not None for part in parts):
        g_idx = torch.cat([_column_groups(part) for part in parts])[order]
    return _joined(parts, lambda tensors: torch.cat(tensors)[order], g_idx)


def _tensors(reader: _Reader, linears: list[StoredLinear], cut: Cut) -> dict[str, Tensor] | None:
    """The stored tensors that linear layers of one format are decoded from; None if an element would have to be cut.

    Where columns are cut, what says their groups is left out: it says nothing (`_has_act_order`).
    """
    codec, fmt = linears[0].codec, linears[0].fmt
    axes = codec.axes(fmt)
    tensors: dict[str, Tensor] = {}
    for suffix in fmt.tensors:
        if cut.columns is not None and axes[suffix] == COLUMN_GROUPS:
            continue
        read = _read(reader, [linear.headers[suffix] for linear in linears], axes[suffix], cut)
        if read is None:
            return None
        tensors[suffix] = read
    return tensors


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
        """Halves beside each other."""
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
        """One of the weights' tensors, if they have it."""
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
