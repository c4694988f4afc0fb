"""The reference backend: plain torch on any device, float32 results of float64 sums; the oracle of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.steps import apply_by_steps
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.grouped_gemm.reference import grouped_gemm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ReferenceBackend:
    """Dequantises one active expert at a time, exactly, and multiplies in float64."""

    name = "reference"
    fuses: frozenset[str] = frozenset()
    capturable = False

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Serve everything but dtypes that no model computes in."""
        reasons: list[str] = []
        if dtype not in _DTYPES:
            reasons.append(f"activation dtype {dtype} is not float32, bfloat16 or float16")
        return Verdict(tuple(reasons))

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        """Nothing to convert, and no tiles: scales are used as the checkpoint stores them, in float32."""
        return Prepared(info=info, dtype=dtype, tensors={}, lossy=None)

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        """Buffers on the info's device, for the injection: products make their own."""
        return Workspace(info.device)

    def apply(
        self,
        x: Tensor,  # (M, H) prepared.dtype
        prepared: Prepared,
        routing: Routing,
        injection: Injection,
        workspace: Workspace,
    ) -> Tensor:  # (M, H) prepared.dtype
        """Compute the layer; see `ExpertsBackend.apply`."""
        info, pairs = prepared.info, routing.num_pairs
        plan = align(routing, info.num_experts)

        def w13(rows: Tensor) -> Tensor:
            """gate and up of each pair."""
            return grouped_gemm(rows, info.w13, plan, routing.top_k, rows.new_empty(pairs, info.w13.rows))

        def w2(rows: Tensor) -> Tensor:
            """down of each pair."""
            return grouped_gemm(rows, info.w2, plan, None, rows.new_empty(pairs, info.hidden_size))

        return apply_by_steps(x, prepared, routing, plan, injection, workspace, w13, w2)
