"""Product: a grouped GEMM of the pairs of a forward, with what goes before it and after it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.kernels.by_half.launch import by_half
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.lora.launch import Rider


@dataclass(frozen=True, eq=False)
class Product:
    """The pairs of a forward, to be multiplied with the weights of their experts.

    Attributes:
        topk_ids: of the router, contiguous.
        rows: pair of each sorted row; None where rows are pairs.
        tiles: those of `align`, or the router's ids where rows are pairs.
    """

    topk_ids: Tensor  # (M, k) int32 or int64
    rows: Tensor | None  # (P,) int32
    tiles: Tensor  # (T, 4) int32, or (P,)

    def new(
        self,
        x: Tensor,  # as of `of`
        tile: Tile,
        columns: int,
    ) -> Tensor:  # (P, columns) of x's dtype, or (parts, P, columns) float32
        """What `of` writes to: its result, or the parts of a split."""
        shape = (self.topk_ids.numel(), columns)
        return x.new_empty(shape) if tile.split == 1 else x.new_empty((tile.split, *shape), dtype=torch.float32)

    def of(
        self,
        x: Tensor,  # (M, columns) if gather, otherwise (P, columns) by row
        weight: PreparedWeight,
        tile: Tile,
        out: Tensor,  # of `new`
        *,
        gather: bool,
        activation: Activation | None = None,
        rider: Rider | None = None,
    ) -> Tensor:
        """Multiply each row with its expert's weight; see `grouped_gemm`."""
        top_k = self.topk_ids.shape[1] if gather else None
        if weight.k_perm is not None:
            assert self.rows is not None and gather  # only w13 has one, and its pairs are sorted (`formula`)
            copies = x.new_empty(weight.halves, self.topk_ids.numel(), weight.k_pad)
            x, top_k = by_half(x, weight, self.topk_ids, self.rows, copies), None
        return grouped_gemm(x, weight, self.tiles, self.rows, top_k, out, tile, activation, rider)


def summed(
    parts: Tensor,  # (parts, P, N) float32
) -> Tensor:  # (P, N) float32
    """Parts summed in their order, as the kernels that read parts do."""
    return functools.reduce(torch.add, parts.unbind())
