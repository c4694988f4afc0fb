"""The cpu backend: packed experts on a CPU, dequantised in blocks that fit its caches, and never as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.errors import BackendError
from quant_moelora.core.injection import Injection
from quant_moelora.core.packing import CODE_DTYPES, run_columns, run_length, unpack_pairs
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import ExpertWeight, PackedWeight
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.steps import apply_by_steps
from quant_moelora.kernels.align.reference import align
from quant_moelora.kernels.cpu_gemm.product import grouped_gemm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuBackend:
    """int4 and int8 on a CPU: exact weights in float32, float32 sums, one rounding of each product.

    It holds nothing besides the packed weights; what a forward works in is freed when it ends.
    """

    name = "cpu"
    fuses: frozenset[str] = frozenset()
    capturable = False

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Serve packed weights on the CPU."""
        reasons: list[str] = []
        if device.type != "cpu":
            reasons.append(f"device {device} is not the CPU")
        if dtype not in _DTYPES:
            reasons.append(f"activation dtype {dtype} is not float32, bfloat16 or float16")
        for name, weight in (("w13", info.w13), ("w2", info.w2)):
            if not isinstance(weight, PackedWeight):
                reasons.append(f"{name} is not quantised")
            elif run_length(weight.scheme.bits, weight.group) is None:
                reasons.append(f"{name} has groups of {weight.group} columns, which is no multiple of 16")
        return Verdict(tuple(reasons))

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        """The order of columns in a block; there are no tiles to tune, and scales are used as they are, in float32.

        Raises:
            BackendError: codes less their zero points do not fit the integers that hold them.
        """
        for name, weight in (("w13", info.w13), ("w2", info.w2)):
            _check_zeros(name, _packed(weight))
        tensors = {"w13.columns": _columns(_packed(info.w13)), "w2.columns": _columns(_packed(info.w2))}
        return Prepared(info=info, dtype=dtype, tensors=tensors, lossy=None)

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        """Buffers on the CPU, for the injection: products make their own."""
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
        info, pairs, made = prepared.info, routing.num_pairs, prepared.tensors
        packed13, packed2 = _packed(info.w13), _packed(info.w2)
        plan = align(routing, info.num_experts)

        def w13(rows: Tensor) -> Tensor:
            """gate and up of each pair."""
            out = rows.new_empty(pairs, packed13.rows)
            return grouped_gemm(rows, packed13, made["w13.columns"], plan, routing.top_k, out)

        def w2(rows: Tensor) -> Tensor:
            """down of each pair."""
            out = rows.new_empty(pairs, info.hidden_size)
            return grouped_gemm(rows, packed2, made["w2.columns"], plan, None, out)

        return apply_by_steps(x, prepared, routing, plan, injection, workspace, w13, w2)


def _packed(weight: ExpertWeight) -> PackedWeight:
    assert isinstance(weight, PackedWeight)  # `supports`
    return weight


def _columns(weight: PackedWeight) -> Tensor:  # (k_pad,) int64
    run = run_length(weight.scheme.bits, weight.group)
    assert run is not None  # `supports`
    return run_columns(weight.k_pad, weight.scheme.bits, run)


def _check_zeros(name: str, weight: PackedWeight) -> None:
    """No tool writes such zero points of int4, but the type holds any of 16 bits."""
    if weight.zeros is None:
        return
    bits = weight.scheme.bits
    limits = torch.iinfo(CODE_DTYPES[bits])
    low, high = (int(value) for value in unpack_pairs(weight.zeros, torch.int16).aminmax())
    least, most = (1 << bits) - 1 - limits.max, -limits.min
    if low < least or high > most:
        raise BackendError(
            f"zero points of {name} on the cpu backend",
            got=f"{low} to {high}",
            rule=f"{least} to {most}, so that a code less its zero point fits {limits.bits} bits",
            remedy="use backend='reference', or correct the zero points",
        )
