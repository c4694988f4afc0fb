"""The unquantized backend: Triton grouped GEMMs of weights that are not quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import DenseWeight
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.gpu import kernel_reasons
from quant_moelora.experts.steps import apply_by_steps
from quant_moelora.kernels.dense_gemm.op import dense_gemm, dense_plan
from quant_moelora.kernels.dense_gemm.prepare import cast_layer


class UnquantizedBackend:
    """bfloat16 and float16 on NVIDIA GPUs from sm_80 on: float32 sums, one rounding of each product."""

    name = "unquantized"
    fuses: frozenset[str] = frozenset()
    capturable = True

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Serve unquantised weights, of any dtype, on a CUDA device in bfloat16 or float16."""
        reasons = kernel_reasons(device, dtype)
        for name, weight in (("w13", info.w13), ("w2", info.w2)):
            if not isinstance(weight, DenseWeight):
                reasons.append(f"{name} is quantised")
        return Verdict(tuple(reasons))

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        """Cast the weights, unless they are of this dtype already; there are no tables of tiles.

        Raises:
            UnsupportedError: a weight is beyond the largest value of ``dtype``.
        """
        tensors, lossy = cast_layer(info, dtype)
        return Prepared(info=info, dtype=dtype, tensors=tensors, lossy=lossy)

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
        info, made, x = prepared.info, prepared.tensors, x.contiguous()
        plan, tiles = dense_plan(routing, info.num_experts)

        def w13(rows: Tensor) -> Tensor:
            """gate and up of each pair."""
            return dense_gemm(rows, plan.rows, tiles, made["w13.w"], info.w13.bias, routing.top_k, info.w13.rows)

        def w2(rows: Tensor) -> Tensor:
            """down of each pair."""
            return dense_gemm(rows, plan.rows, tiles, made["w2.w"], info.w2.bias, None, info.hidden_size)

        return apply_by_steps(x, prepared, routing, plan, injection, workspace, w13, w2)
