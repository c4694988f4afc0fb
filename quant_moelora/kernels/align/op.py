"""The operator `quant_moelora::align`: the Plan of a routing and its list of tiles, whatever their height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan, Routing, num_segments
from quant_moelora.kernels.align.launch import align_tensors
from quant_moelora.kernels.common.library import define, fields
from quant_moelora.kernels.grouped_gemm.choice import TileSource

_LEAST_HEIGHT = 16  # of a tile with more rows, of which a routing needs the fewer


_OUTPUTS = ("rows", "inverse", "expert_offsets", "segments", "tiles")


def _results(
    topk_ids: Tensor,  # as of `compute` in `define_align`
    slots: Tensor | None,
    num_experts: int,
    num_slots: int,
    *_: Any,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    pairs = topk_ids.numel()
    segments = 0 if slots is None else num_segments(pairs, num_experts, num_slots)
    tiles = num_experts + pairs // _LEAST_HEIGHT
    shapes = ((pairs,), (pairs,), (num_experts + 1,), (segments, 4), (tiles, 4))
    return [(shape, torch.int32) for shape in shapes]


def define_align(name: str, source: str, height: Callable[..., int]) -> tuple[Any, Any]:
    """Register an operator that makes the Plan of a routing and its list of tiles, and its twin.

    Args:
        name: name of the operator.
        source: arguments from which the height of tiles follows, as a schema writes them; may be empty.
        height: rows of a tile, from P (at least 1), E, the device and those arguments; asked inside the operator.
    """

    def compute(
        topk_ids: Tensor,  # (M, k) int32 or int64
        slots: Tensor | None,  # (M,) int32
        num_experts: int,
        num_slots: int,
        *given: Any,
    ) -> Sequence[Tensor]:  # rows, inverse, expert_offsets, segments, tiles
        """See `Plan`; the list of tiles is as long as that of the lowest ones."""
        pairs = topk_ids.numel()
        with torch.cuda.device_of(topk_ids):  # Triton launches on the current device, whichever the tensors are on
            high = height(max(1, pairs), num_experts, topk_ids.device, *given)
            length = num_experts + pairs // _LEAST_HEIGHT
            rows, inverse, offsets, segments, tiles = align_tensors(
                topk_ids, slots, num_experts, num_slots, high, length
            )
        return rows, inverse, offsets, tiles.new_empty(0, 4) if segments is None else segments, tiles

    def write(*arguments: Any) -> None:
        """Compute into the outputs."""
        given, results = arguments[: -len(_OUTPUTS)], arguments[-len(_OUTPUTS) :]
        for held, made in zip(results, compute(*given), strict=True):
            held.copy_(made)

    arguments = "Tensor topk_ids, Tensor? slots, int num_experts, int num_slots"
    return define(name, f"{arguments}, {source}" if source else arguments, _OUTPUTS, _results, write, compute)


def _height(num_pairs: int, num_experts: int, device: torch.device, shape: str, tuned_configs: str) -> int:
    return TileSource(shape, tuned_configs).tiles(num_pairs, device).bm


align, align_out = define_align("align", fields(TileSource), _height)


def plan_of(routing: Routing, num_experts: int, source: TileSource) -> tuple[Plan, Tensor]:
    """The Plan of a routing, and its tiles for the operator `grouped_gemm`."""
    rows, inverse, offsets, segments, tiles = align(
        routing.topk_ids, routing.slots, num_experts, routing.num_slots, *source
    )
    return Plan(rows, inverse, offsets, None if routing.slots is None else segments), tiles
