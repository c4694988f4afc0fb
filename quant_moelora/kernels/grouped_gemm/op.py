"""The operator `quant_moelora::grouped_gemm`: a whole product, whatever its tiles and parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_moelora.kernels.align.launch import num_tiles
from quant_moelora.kernels.common.library import define, fields
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.product import Product, summed

_ARGUMENTS = ", ".join(
    (
        "Tensor x, Tensor topk_ids, Tensor rows, Tensor tiles, bool gather, int columns",
        fields(TileSource),
        fields(PreparedWeight),
    )
)


def _results(
    x: Tensor,  # as of `write_product`
    topk_ids: Tensor,
    rows: Tensor,
    tiles: Tensor,
    gather: bool,
    columns: int,
    *_: Any,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((rows.shape[0], columns), x.dtype)]


def write_product(
    x: Tensor,  # (M, any) if gather, otherwise (P, any) in sorted order
    topk_ids: Tensor,  # (M, k) int32 or int64
    rows: Tensor,  # (P,) int32, pair of each sorted row
    tiles: Tensor,  # (T, 4) int32, of the operator `align`
    gather: bool,
    columns: int,
    shape: str,
    tuned_configs: str,
    *arguments: Any,
) -> None:
    """Sorted rows, or those of their tokens, times their experts' weight; rows without an expert are not written.

    ``gather`` says that it is w13 of the layer whose `LayerShape` has the name ``shape``, and otherwise w2.
    """
    *fields, out = arguments
    weight, pairs = PreparedWeight(*fields), rows.shape[0]
    if not pairs:
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        chosen = TileSource(shape, tuned_configs).tiles(pairs, x.device)
        tile = chosen.w13 if gather else chosen.w2
        product = Product(topk_ids.contiguous(), rows, tiles[: num_tiles(pairs, weight.num_experts, tile.bm)])
        x = x.contiguous()
        written = product.of(x, weight, tile, out if tile.split == 1 else product.new(x, tile, columns), gather=gather)
        if tile.split > 1:
            out.copy_(summed(written))


grouped_gemm, grouped_gemm_out = define("grouped_gemm", _ARGUMENTS, ("out",), _results, write_product)
