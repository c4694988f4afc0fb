"""Which tiles a forward takes: the only place that decides, for operators of a whole layer and of one product alike.

It is asked inside operators: a choice in Python that `torch.compile` traces would be traced again for each batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quant_moelora.kernels.common.launch import capability
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm.config import choose_tile, is_direct, tile_rows
from quant_moelora.kernels.grouped_gemm.spec import Tile


class LayerTiles(NamedTuple):
    """How both GEMMs of a layer without adapters are cut.

    Attributes:
        direct: whether each pair is a tile of its own, so that nothing has to be sorted.
        w13: tile of the first GEMM.
        w13_fused: tile of the first GEMM with the activation in it; None where that is a launch of its own.
        w2: tile of the second GEMM.
    """

    direct: bool
    w13: Tile
    w13_fused: Tile | None
    w2: Tile


def layer_tiles(
    w13: PreparedWeight, w2: PreparedWeight, num_pairs: int, device: torch.device, *, fuses: bool
) -> LayerTiles:
    """Tiles of a layer with P pairs; ``fuses`` says whether the activation may be part of the first GEMM."""
    tile = weight_tile(w13, num_pairs, device)
    fused = weight_tile(w13, num_pairs, device, fused=True) if fuses and tile.split == 1 else None
    direct = w13.k_perm is None and is_direct(num_pairs, w13.num_experts)
    return LayerTiles(direct, tile, fused, weight_tile(w2, num_pairs, device))


def weight_tile(weight: PreparedWeight, num_pairs: int, device: torch.device, *, fused: bool = False) -> Tile:
    """Tile of a product, with adapters and without."""
    return choose_tile(
        num_pairs,
        weight.num_experts,
        weight.rows,
        weight.k_pad,
        weight.bits,
        capability(device),
        fused=fused,
        halves_apart=weight.halves_apart,
    )


def list_height(num_pairs: int, num_experts: int, device: torch.device) -> int:
    """Most rows of a tile in the list that both GEMMs share."""
    return tile_rows(num_pairs, num_experts, capability(device))
