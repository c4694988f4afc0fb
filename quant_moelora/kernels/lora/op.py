"""The operators of LoRA beside any backend's products: `lora_shrink13`, `lora_activate` and `lora_moe_sum`.

They are what the injection's closures call on a GPU. v goes from one to the next in memory for the most parts that
there may be, since how many there are depends on the number of pairs, which `torch.compile` leaves open. Where several
processes share it (`LoRATables`), it is summed up to one part, which they exchange between two operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.kernels.common.library import define, fields
from quant_moelora.kernels.lora.launch import LayerFacts, LoRAForward, LoRATables, alone
from quant_moelora.kernels.lora.spec import choose_cut, most_parts
from quant_moelora.kernels.moe_sum.launch import moe_sum


class LoRALayer(NamedTuple):
    """What the operators need of a layer and its adapters.

    Attributes:
        tables: of the context.
        facts: of the layer.
        hidden: H.
    """

    tables: LoRATables
    facts: LayerFacts
    hidden: int

    def arguments(self) -> tuple[Any, ...]:
        """The operators' last arguments."""
        function, inter, inter_pad, weigh_input = self.facts
        name, gated, alpha, limit = function.name, function.gated, function.alpha, function.limit
        return (*self.tables, name, gated, alpha, limit, inter, inter_pad, weigh_input, self.hidden)

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> LoRALayer:
        """Inverse of `arguments`."""
        count = len(LoRATables._fields)
        name, gated, alpha, limit, inter, inter_pad, weigh_input, hidden = arguments[count:]
        facts = LayerFacts(Activation(name, gated, alpha, limit), inter, inter_pad, weigh_input)
        return LoRALayer(LoRATables(*arguments[:count]), facts, hidden)

    def v_widths(self) -> tuple[int, int]:
        """Elements of a row of v13 as it is shrunk, and of v2, for the most parts."""
        if self.tables.sharers > 1:
            return -(-2 * self.tables.max_rank // self.tables.sharers), self.tables.max_rank
        parts13, parts2 = most_parts(self.hidden, self.facts.inter_pad)
        return parts13 * 2 * self.tables.max_rank, parts2 * self.tables.max_rank


_FACTS = (
    "str activation, bool gated, float? alpha, float? limit, int inter, int inter_pad, bool weigh_input, int hidden"
)
_LAYER = f"{fields(LoRATables)}, {_FACTS}"
_ROUTED = "Tensor topk_ids, Tensor topk_weights, Tensor slots, Tensor rows, Tensor segments"
_V13, _V2 = "lora_v13", "lora_v2"


def _forward(
    given: Tensor,  # any shape, of the activation dtype
    arguments: Sequence[Any],  # _ROUTED, as of `LoRAForward`, and _LAYER
    held: dict[str, Tensor],  # (P, of `v_widths`) float32, by name
    **read: int,
) -> LoRAForward:
    """The launches of a forward with at least one pair.

    Args:
        given: anything of the activation dtype.
        arguments: of the operator.
        held: where v is read and written. Parts that are to be summed up, if there are several, are elsewhere.
        read: how many parts of a v that processes have exchanged are read.

    Raises:
        AdapterError: the adapters are of another dtype than ``given``.
    """
    ids, weights, slots, rows, segments, *layer = arguments
    lora = LoRALayer.of(tuple(layer))
    like = given.new_empty(0, lora.hidden)

    def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of its own under any name."""
        if name in (_V13, _V2) and name not in held:  # a step that neither reads nor writes it needs none
            return like
        if name in held and held[name].numel() >= math.prod(shape):
            return held[name].view(-1)[: math.prod(shape)].view(shape)
        return like.new_empty(shape, dtype=dtype)

    cut = None
    if lora.tables.sharers > 1:
        sizes = (lora.tables.rank.shape[2], lora.hidden, lora.facts.inter_pad, lora.tables.max_rank)
        cut = replace(choose_cut(ids.numel(), *sizes), **read)

    return LoRAForward.new(
        like,
        lora.tables,
        lora.facts,
        ids.contiguous(),
        weights.contiguous(),
        slots.contiguous(),
        rows,
        segments,
        buffer,
        cut,
    )


def _sum_up(
    parts: Tensor,  # (P, parts, W) float32
    v: Tensor,  # (P, any) float32
) -> None:
    """Write the sum of parts to ``v``, unless it is what they were written to."""
    if parts.data_ptr() != v.data_ptr():
        torch.sum(parts, 1, out=v)


def _shrink_results(x: Tensor, ids: Tensor, *rest: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    lora = LoRALayer.of(rest[4:])
    return [((ids.numel(), lora.v_widths()[0]), torch.float32)]


def _shrink(
    x: Tensor,  # (M, H) of the arena's dtype
    *arguments: Any,  # _ROUTED, _LAYER, and v13 to fill
) -> None:
    """Parts of A13 x, by sorted row."""
    *rest, v13 = arguments
    if rest[0].numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
            forward = _forward(x, rest, {_V13: v13})
            alone(forward.shrink_rider(x.contiguous()))
            _sum_up(forward.v13, v13)


def _activate_results(
    gate_up: Tensor, v13: Tensor, ids: Tensor, *rest: Any
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    lora, pairs = LoRALayer.of(rest[4:]), ids.numel()
    return [((pairs, lora.facts.inter_pad), lora.tables.arena.dtype), ((pairs, lora.v_widths()[1]), torch.float32)]


def _activate(
    gate_up: Tensor,  # (P, halves*inter_pad) of the arena's dtype, in sorted order
    v13: Tensor,  # of `lora_shrink13`
    *arguments: Any,  # _ROUTED, _LAYER, and h (P, inter_pad) and v2 to fill
) -> None:
    """h = act(gate_up + scaling * B13 v13), and parts of A2 h."""
    *rest, h, v2 = arguments
    if rest[0].numel():
        with torch.cuda.device_of(gate_up):
            forward = _forward(gate_up, rest, {_V13: v13, _V2: v2}, parts13=1)
            forward.activate(gate_up.contiguous(), h)
            _sum_up(forward.v2, v2)


def _sum_results(
    y: Tensor, v2: Tensor, inverse: Tensor, ids: Tensor, *rest: Any
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((ids.shape[0], LoRALayer.of(rest[4:]).hidden), y.dtype)]


def _sum(
    y: Tensor,  # (P, H) of the arena's dtype, in sorted order
    v2: Tensor,  # of `lora_activate`
    inverse: Tensor,  # (P,) int32, of the plan
    *arguments: Any,  # _ROUTED, _LAYER, and out (M, H) to fill
) -> None:
    """Weighted sum of y + scaling * B2 v2 over the pairs of each token."""
    *rest, out = arguments
    if not rest[0].numel():
        out.zero_()
        return
    with torch.cuda.device_of(y):
        forward = _forward(y, rest, {_V2: v2}, parts2=1)
        alone(forward.expand_rider())
        spec, ids = forward.spec, forward.topk_ids
        weights = None if spec.weighted else forward.topk_weights
        moe_sum(y.contiguous(), ids, weights, inverse, out, forward.deltas, num_experts=spec.num_experts)


lora_shrink13, lora_shrink13_out = define(
    "lora_shrink13", f"Tensor x, {_ROUTED}, {_LAYER}", ("v13",), _shrink_results, _shrink
)
lora_activate, lora_activate_out = define(
    "lora_activate", f"Tensor gate_up, Tensor v13, {_ROUTED}, {_LAYER}", ("h", "v2"), _activate_results, _activate
)
lora_moe_sum, lora_moe_sum_out = define(
    "lora_moe_sum", f"Tensor y, Tensor v2, Tensor inverse, {_ROUTED}, {_LAYER}", ("out",), _sum_results, _sum
)
