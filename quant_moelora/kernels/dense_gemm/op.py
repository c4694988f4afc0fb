"""The operators `quant_moelora::dense_gemm`, a product, and `dense_align`, which sorts the pairs for it."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan, Routing
from quant_moelora.kernels.align.launch import num_tiles
from quant_moelora.kernels.align.op import define_align
from quant_moelora.kernels.common.launch import capability
from quant_moelora.kernels.common.library import define
from quant_moelora.kernels.dense_gemm import launch
from quant_moelora.kernels.dense_gemm.config import choose_tile, tile_rows


def _results(
    x: Tensor,  # as of `_write`, and so the others
    rows: Tensor,
    tiles: Tensor,
    w: Tensor,
    bias: Tensor | None,
    top_k: int | None,
    columns: int,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((rows.shape[0], columns), x.dtype)]


def _write(
    x: Tensor,  # (M, k) with a top_k, otherwise (P, k) in sorted order; bfloat16 or float16
    rows: Tensor,  # (P,) int32, pair of each sorted row
    tiles: Tensor,  # (T, 4) int32, of the operator `dense_align`
    w: Tensor,  # (E, any >= columns, any >= k) of x's dtype
    bias: Tensor | None,  # (E, as w) float32
    top_k: int | None,
    columns: int,
    out: Tensor,  # (P, columns) of x's dtype
) -> None:
    """See `launch.dense_gemm`."""
    pairs, experts = rows.shape[0], w.shape[0]
    if not pairs:
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        tile = choose_tile(pairs, experts, columns, x.shape[1], capability(x.device))
        listed = tiles[: num_tiles(pairs, experts, tile.bm)]
        launch.dense_gemm(x.contiguous(), w.contiguous(), bias, listed, rows, top_k, out, tile)


dense_gemm, dense_gemm_out = define(
    "dense_gemm",
    "Tensor x, Tensor rows, Tensor tiles, Tensor w, Tensor? bias, int? top_k, int columns",
    ("out",),
    _results,
    _write,
)


def _height(num_pairs: int, num_experts: int, device: torch.device) -> int:
    return tile_rows(num_pairs, num_experts)


dense_align, dense_align_out = define_align("dense_align", "", _height)


def dense_plan(routing: Routing, num_experts: int) -> tuple[Plan, Tensor]:
    """The Plan of a routing, and its tiles for the operator `dense_gemm`, int32 (T, 4)."""
    rows, inverse, offsets, segments, tiles = dense_align(
        routing.topk_ids, routing.slots, num_experts, routing.num_slots
    )
    return Plan(rows, inverse, offsets, None if routing.slots is None else segments), tiles
