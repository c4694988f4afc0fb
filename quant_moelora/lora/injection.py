"""LoRAInjection: the base injection with both of its callables wrapped by closures that add the adapters' deltas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.injection import ActivationCallable, Injection, MoeSumCallable
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.lora.launch import LayerFacts, LoRATables
from quant_moelora.kernels.lora.op import LoRALayer, lora_activate_out, lora_moe_sum_out, lora_shrink13
from quant_moelora.kernels.lora.reference import expand2, expand13, shrink2, shrink13

_V13 = "lora_v13"  # workspace buffer that carries v = x A13^T from `begin` to the activation
_V2 = "lora_v2"
_LAUNCHED = (torch.bfloat16, torch.float16)


class LoRAInjection:
    """Adds B13 (A13 x) to gate_up before the activation and B2 (A2 h) to y before the weighted sum.

    The deltas are added in float32 to the values that the GEMMs stored, so that a row without an adapter is bitwise
    the row of the base. Built when adapters are attached, never in a forward. On a GPU, in bfloat16 and float16, the
    closures call operators with fused kernels, which compute the base's activation and sum too; elsewhere they are
    plain torch around the base's own callables. Between shrink and expand stand the collectives of a context that is
    fully sharded.

    Raises:
        AdapterError: the context is fully sharded and has no collectives.
    """

    ctx: MoELoRAContext | None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def __init__(self, base: Injection, ctx: MoELoRAContext, info: MoEQuantInfo) -> None:
        facts = LayerFacts(info.activation, info.intermediate_size, info.inter_pad, info.router_weight == "input")
        if ctx.rank_shard[1] > 1 and ctx.collectives is None:
            raise AdapterError(
                "LoRA context",
                got="fully sharded factors and no collectives",
                rule="both or neither",
                remedy="attach it to a DistributedExperts, which knows the processes",
            )
        self.ctx = ctx
        self._layer = LoRALayer(LoRATables.of(ctx), facts, info.hidden_size).arguments()
        self.activation = _with_expand13(base.activation, ctx, self._layer)
        self.moe_sum = _with_expand2(base.moe_sum, ctx, self._layer)

    def begin(self, x: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> None:
        """Shrink x for gate and up together."""
        assert self.ctx is not None  # __init__
        if _asks_for_none(routing, plan):
            return
        if _on_gpu(x):
            v = lora_shrink13(x, *_routed(routing, plan), *self._layer)
        else:
            v = shrink13(x, self.ctx, plan, routing.top_k, _buffer(ws, _V13, plan, self.ctx.v13_part))
        ws.keep(_V13, v if self.ctx.collectives is None else self.ctx.collectives.gather(v))


def _asks_for_none(routing: Routing, plan: Plan) -> bool:
    """Whether no token can have an adapter."""
    return routing.slots is None or plan.segments is None or not routing.num_pairs


def _routed(routing: Routing, plan: Plan) -> tuple[Tensor, ...]:
    """What operators take of a forward."""
    assert routing.slots is not None and plan.segments is not None  # `_asks_for_none`
    return routing.topk_ids, routing.topk_weights, routing.slots, plan.rows, plan.segments


def _with_expand13(base: ActivationCallable, ctx: MoELoRAContext, layer: tuple[Any, ...]) -> ActivationCallable:
    """The base activation of gate_up + delta; ``layer`` is what operators take of it."""

    def activation(x: Tensor, gate_up: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        """See `ActivationCallable`."""
        if _asks_for_none(routing, plan):
            return base(x, gate_up, out, routing, plan, ws)
        if _on_gpu(x):
            v2 = ws.keep(_V2, gate_up.new_empty(routing.num_pairs, v2_width, dtype=torch.float32))
            lora_activate_out(gate_up, ws.last(_V13), *_routed(routing, plan), *layer, out, v2)
            return out
        return base(x, expand13(ws.last(_V13), ctx, plan, gate_up.to(torch.float32, copy=True)), out, routing, plan, ws)

    _, v2_width = LoRALayer.of(layer).v_widths()
    return activation


def _with_expand2(base: MoeSumCallable, ctx: MoELoRAContext, layer: tuple[Any, ...]) -> MoeSumCallable:
    """The base sum of y + delta."""

    def moe_sum(h: Tensor, y: Tensor, out: Tensor, routing: Routing, plan: Plan, ws: Workspace) -> Tensor:
        """See `MoeSumCallable`."""
        if _asks_for_none(routing, plan):
            return base(h, y, out, routing, plan, ws)
        if _on_gpu(out):
            v = whole(ws.last(_V2))
            lora_moe_sum_out(y, v, plan.inverse, *_routed(routing, plan), *layer, out)
            return out
        v = whole(shrink2(h, ctx, plan, _buffer(ws, _V2, plan, ctx.v2_width)))
        return base(h, expand2(v, ctx, plan, y.to(torch.float32, copy=True)), out, routing, plan, ws)

    def whole(v: Tensor) -> Tensor:
        """v of all columns of h."""
        return v if ctx.collectives is None else ctx.collectives.sum(v)

    return moe_sum


def _on_gpu(x: Tensor) -> bool:
    """Whether there are kernels for it."""
    return x.is_cuda and x.dtype in _LAUNCHED


def _buffer(ws: Workspace, name: str, plan: Plan, width: int) -> Tensor:
    """The float32 buffer [P, width] of a v."""
    return ws.buffer(name, (plan.rows.shape[0], width), torch.float32)
