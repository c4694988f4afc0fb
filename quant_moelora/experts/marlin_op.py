"""The operators `quant_moelora::marlin_experts` and `marlin_lora_experts`: a layer of experts, and one with adapters.

Inside them are all that depends on the batch's size (whether pairs are sorted, tiles, the parts of a split GEMM) and on
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
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.lora.launch import LayerFacts, LoRAForward, LoRATables, Rider, alone
from quant_moelora.kernels.lora.spec import Cut
from quant_moelora.kernels.moe_sum.launch import moe_sum

_WEIGHT_FIELDS = len(PreparedWeight._fields)
_RIDING = 32  # rows of the highest tiles beside which LoRA rides, which leave room for other blocks
_TABLE_FIELDS = len(LoRATables._fields) + 1  # and the output


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
        product, inverse, _ = _sorted(topk_ids, None, 0, layer.w13.num_experts, tiles)
        h = _activated(product, x, topk_weights, layer, tiles)
        y = product.of(h, layer.w2, tiles.w2, product.new(h, tiles.w2, layer.w2.n), gather=False)
        weights = None if layer.weigh_input else topk_weights
        moe_sum(y, topk_ids, weights, inverse, out, num_experts=layer.w13.num_experts)


def write_lora_layer(
    x: Tensor,  # (M, H) bfloat16 or float16
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor,  # (M, k) float32
    slots: Tensor,  # (M,) int32
    *arguments: Any,
) -> None:
    """Compute the layer with each token's adapter into the last argument.

    Its products are cut as those of the base model, whatever the adapters, so that rows without one have the same bits.
    """
    out: Tensor = arguments[-1]
    pairs = topk_ids.numel()
    if not pairs:
        out.zero_()
        return
    layer, tables = MarlinLayer.of(arguments[:-_TABLE_FIELDS]), LoRATables(*arguments[-_TABLE_FIELDS:-1])
    tiles = layer.tiles.tiles(pairs, x.device)
    cut = layer.tiles.lora_cut(pairs, tables.max_rank, x.device)
    run_lora_layer(x, topk_ids, topk_weights, slots, layer, tables, out, tiles, cut)


def run_lora_layer(
    x: Tensor,  # (M, H) bfloat16 or float16
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor,  # (M, k) float32
    slots: Tensor,  # (M,) int32
    layer: MarlinLayer,
    tables: LoRATables,
    out: Tensor,  # (M, H) of x's dtype
    tiles: LayerTiles,
    cut: Cut,
) -> None:
    """Compute a layer of at least one pair with each token's adapter into ``out``, with these tiles and this cut."""
    w13, w2, ids = layer.w13, layer.w2, topk_ids.contiguous()
    x, topk_weights, slots = x.contiguous(), topk_weights.contiguous(), slots.contiguous()
    facts = LayerFacts(layer.activation, w13.n, w13.n_pad, layer.weigh_input)
    with torch.cuda.device_of(x):
        product, inverse, segments = _sorted(ids, slots, tables.rank.shape[0], w13.num_experts, tiles)

        def buffer(_: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            """A tensor of its own under any name."""
            return x.new_empty(shape, dtype=dtype)

        lora = LoRAForward.new(x, tables, facts, ids, topk_weights, slots, product.rows, segments, buffer, cut)
        gate_up = _beside(product, x, w13, tiles.w13, w13.rows, lora.shrink_rider(x), gather=True)
        h = lora.activate(gate_up, x.new_empty(ids.numel(), w13.n_pad))
        y = _beside(product, h, w2, tiles.w2, w2.n, lora.expand_rider(), gather=False)
        weights = None if layer.weigh_input else topk_weights
        moe_sum(y, ids, weights, inverse, out, lora.deltas, num_experts=w13.num_experts)


def _beside(
    product: Product,
    x: Tensor,  # as of `Product.of`
    weight: PreparedWeight,
    tile: Tile,
    columns: int,
    rider: Rider,
    *,
    gather: bool,
) -> Tensor:  # of `Product.new`
    """A product, and LoRA's work that does not need it: in one launch where tiles are low."""
    out = product.new(x, tile, columns)
    if tile.bm <= _RIDING:
        return product.of(x, weight, tile, out, gather=gather, rider=rider)
    alone(rider)
    return product.of(x, weight, tile, out, gather=gather)


def _sorted(
    topk_ids: Tensor,  # (M, k) int32 or int64
    slots: Tensor | None,  # (M,) int32
    num_slots: int,
    num_experts: int,
    tiles: LayerTiles,
) -> tuple[Product, Tensor | None, Tensor | None]:
    """The pairs sorted, if it pays; the sorted row of each, int32 [P], and the plan's segments."""
    if tiles.direct:
        return Product(topk_ids, None, topk_ids.view(-1)), None, None
    rows, inverse, _, segments, listed = align_tensors(topk_ids, slots, num_experts, num_slots, tiles.bm)
    return Product(topk_ids, rows, listed), inverse, segments


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


_LAYER = ", ".join(
    (
        fields(PreparedWeight, "w13_"),
        fields(PreparedWeight, "w2_"),
        "str activation, float? alpha, float? limit, bool weigh_input",
        fields(TileSource),
    )
)
_ROUTED = "Tensor x, Tensor topk_ids, Tensor topk_weights"
marlin_experts, marlin_experts_out = define("marlin_experts", f"{_ROUTED}, {_LAYER}", ("out",), _results, write_layer)
marlin_lora_experts, marlin_lora_experts_out = define(
    "marlin_lora_experts",
    f"{_ROUTED}, Tensor slots, {_LAYER}, {fields(LoRATables)}",
    ("out",),
    _results,
    write_lora_layer,
)
