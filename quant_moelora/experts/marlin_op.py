"""The operator `quant_moelora::marlin_experts`: a layer of experts without adapters.

Inside it are all that depends on the batch's size (whether pairs are sorted, tiles, the parts of a split GEMM) and on
the device, so that nothing of it is traced.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.kernels.activation.launch import activate
from quant_moelora.kernels.align.launch import align_tensors
from quant_moelora.kernels.common.library import define, fields
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.layer import LayerTiles
from quant_moelora.kernels.grouped_gemm.product import Product
from quant_moelora.kernels.moe_sum.launch import moe_sum

_WEIGHT_FIELDS = len(PreparedWeight._fields)


class MarlinLayer(NamedTuple):
    """What the operator needs of a layer.

    Attributes:
        w13: gate and up.
        w2: down.
        activation: what stands between them.
        weigh_input: whether the router's weight multiplies gate_up, and not the output.
        tiles: from what tiles are chosen.
    """

    w13: PreparedWeight
    w2: PreparedWeight
    activation: Activation
    weigh_input: bool
    tiles: TileSource

    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments behind x and the routing."""
        function = self.activation
        return (*self.w13, *self.w2, function.name, function.alpha, function.limit, self.weigh_input, *self.tiles)

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> MarlinLayer:
        """Inverse of `arguments`."""
        *weights, name, alpha, limit, weigh_input, shape, tuned_configs = arguments
        w13, w2 = PreparedWeight(*weights[:_WEIGHT_FIELDS]), PreparedWeight(*weights[_WEIGHT_FIELDS:])
        function = Activation(name, w13.halves == 2, alpha, limit)
        return MarlinLayer(w13, w2, function, weigh_input, TileSource(shape, tuned_configs))


def _results(
    x: Tensor,  # (M, H)
    *_: Any,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape), x.dtype)]


def write_layer(
    x: Tensor,  # (M, H) bfloat16 or float16
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor,  # (M, k) float32
    *arguments: Any,
) -> None:
    """Compute the layer into the last argument."""
    out: Tensor = arguments[-1]
    pairs = topk_ids.numel()
    if not pairs:
        out.zero_()
        return
    layer = MarlinLayer.of(arguments[:-1])
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
        tiles = layer.tiles.tiles(pairs, x.device)
        product, inverse = _sorted(topk_ids, layer.w13.num_experts, tiles)
        h = _activated(product, x, topk_weights, layer, tiles)
        y = product.of(h, layer.w2, tiles.w2, product.new(h, tiles.w2, layer.w2.n), gather=False)
        weights = None if layer.weigh_input else topk_weights
        moe_sum(y, topk_ids, weights, inverse, out, num_experts=layer.w13.num_experts)


def _sorted(
    topk_ids: Tensor,  # (M, k) int32 or int64
    num_experts: int,
    tiles: LayerTiles,
) -> tuple[Product, Tensor | None]:
    """The pairs sorted, if it pays, and the sorted row of each, int32 [P]."""
    if tiles.direct:
        return Product(topk_ids, None, topk_ids.view(-1)), None
    rows, inverse, _, _, listed = align_tensors(topk_ids, None, num_experts, tiles.bm)
    return Product(topk_ids, rows, listed), inverse


def _activated(
    product: Product,
    x: Tensor,  # (M, H)
    topk_weights: Tensor,  # (M, k) float32
    layer: MarlinLayer,
    tiles: LayerTiles,
) -> Tensor:  # (P, inter_pad)
    """The input of the second GEMM: the activation is part of the first one, if that is not split."""
    w13, function = layer.w13, layer.activation
    h = x.new_empty(product.topk_ids.numel(), w13.n_pad)
    if tiles.w13_fused is not None:
        return product.of(x, w13, tiles.w13_fused, h, gather=True, activation=function)
    gate_up = product.of(x, w13, tiles.w13, product.new(x, tiles.w13, w13.rows), gather=True)
    weights = topk_weights if layer.weigh_input else None
    ids, experts = product.topk_ids, w13.num_experts
    return activate(gate_up, function, ids, weights, product.rows, h, num_experts=experts, inter=w13.n)


_ARGUMENTS = ", ".join(
    (
        "Tensor x, Tensor topk_ids, Tensor topk_weights",
        fields(PreparedWeight, "w13_"),
        fields(PreparedWeight, "w2_"),
        "str activation, float? alpha, float? limit, bool weigh_input",
        fields(TileSource),
    )
)
marlin_experts, marlin_experts_out = define("marlin_experts", _ARGUMENTS, ("out",), _results, write_layer)
