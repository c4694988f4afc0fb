"""The marlin backend: Triton grouped GEMMs that read the packed layout as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.gpu import kernel_reasons
from quant_moelora.experts.marlin_op import MarlinLayer, marlin_experts, marlin_lora_experts
from quant_moelora.experts.steps import apply_by_steps
from quant_moelora.kernels.align.op import plan_of
from quant_moelora.kernels.dequant.prepare import LEAST_GROUP, prepare, regrouped
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.kernels.grouped_gemm.op import grouped_gemm
from quant_moelora.kernels.lora.launch import LoRATables


@dataclass(frozen=True, eq=False)
class MarlinPrepared(Prepared):
    """`Prepared` with what the operators take."""

    layer: MarlinLayer


class MarlinBackend:
    """wNa16 on NVIDIA GPUs from sm_80 on: int4 and int8 codes are dequantised in registers."""

    name = "marlin"
    fuses: frozenset[str] = frozenset({"begin", "activation", "moe_sum"})
    capturable = True

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Serve packed weights on a CUDA device in bfloat16 or float16."""
        reasons = kernel_reasons(device, dtype)
        for name, weight in (("w13", info.w13), ("w2", info.w2)):
            if not isinstance(weight, PackedWeight):
                reasons.append(f"{name} is not quantised")
            elif regrouped(weight) < LEAST_GROUP:
                reasons.append(
                    f"{name} has groups of {weight.group} columns, whose least common part with 128 is below 16"
                )
        return Verdict(tuple(reasons))

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> MarlinPrepared:
        """Cast the scales and fold the dequantisation's powers of two into them."""
        (w13, loss13), (w2, loss2) = (prepare(_packed(weight), dtype) for weight in (info.w13, info.w2))
        lossy = "; ".join(f"{name}: {loss}" for name, loss in (("w13", loss13), ("w2", loss2)) if loss)
        tiles = TileSource(LayerShape.of(info, dtype).name, tuned_configs or "")
        layer = MarlinLayer(w13, w2, info.activation, info.router_weight == "input", tiles)
        return MarlinPrepared(info, dtype, w13.tensors("w13") | w2.tensors("w2"), lossy or None, layer)

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        """Buffers on the info's device, for the injection: operators make their own."""
        return Workspace(info.device)

    def apply(
        self,
        x: Tensor,  # (M, H) prepared.dtype
        prepared: Prepared,
        routing: Routing,
        injection: Injection,
        workspace: Workspace,
    ) -> Tensor:  # (M, H) prepared.dtype
        """Compute the layer; see `ExpertsBackend.apply`. It is one operator, with and without adapters.

        Where processes exchange v, which they do between operators, it is one for each step.
        """
        assert isinstance(prepared, MarlinPrepared)
        arguments = prepared.layer.arguments()
        ids, weights, slots = routing.topk_ids, routing.topk_weights, routing.slots
        if injection.ctx is None or slots is None:
            return marlin_experts(x, ids, weights, *arguments)
        if injection.ctx.collectives is not None:
            return _by_steps(x, prepared, routing, injection, workspace)
        return marlin_lora_experts(x, ids, weights, slots, *arguments, *LoRATables.of(injection.ctx))


def _by_steps(
    x: Tensor,  # (M, H) prepared.dtype
    prepared: MarlinPrepared,
    routing: Routing,
    injection: Injection,
    workspace: Workspace,
) -> Tensor:  # (M, H) prepared.dtype
    """The layer with the injection's own steps, whose products are cut as those of the one operator."""
    layer, ids = prepared.layer, routing.topk_ids
    plan, tiles = plan_of(routing, prepared.info.num_experts, layer.tiles)

    def w13(rows: Tensor) -> Tensor:
        """gate and up of each pair."""
        return grouped_gemm(rows, ids, plan.rows, tiles, True, layer.w13.rows, *layer.tiles, *layer.w13)

    def w2(rows: Tensor) -> Tensor:
        """down of each pair."""
        return grouped_gemm(rows, ids, plan.rows, tiles, False, layer.w2.n, *layer.tiles, *layer.w2)

    return apply_by_steps(x, prepared, routing, plan, injection, workspace, w13, w2)


def _packed(weight: object) -> PackedWeight:
    assert isinstance(weight, PackedWeight)  # `supports`
    return weight
