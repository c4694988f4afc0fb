"""The operator `quant_moelora::activation`: the activation between the two GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation, ActivationName
from quant_moelora.kernels.activation.launch import activate
from quant_moelora.kernels.common.library import define

_ARGUMENTS = (
    "Tensor gate_up, Tensor topk_ids, Tensor? topk_weights, Tensor? rows, str name, bool gated, float? alpha, "
    "float? limit, int num_experts, int inter, int inter_pad, ScalarType dtype"
)


def _results(
    gate_up: Tensor,  # as of `_write`, and so the others
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    rows: Tensor | None,
    name: ActivationName,
    gated: bool,
    alpha: float | None,
    limit: float | None,
    num_experts: int,
    inter: int,
    inter_pad: int,
    dtype: torch.dtype,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((gate_up.shape[-2], inter_pad), dtype)]


def _write(
    gate_up: Tensor,  # (P, halves*inter_pad) float in sorted order, or (parts, P, halves*inter_pad) float32
    topk_ids: Tensor,  # (M, k) int32 or int64
    topk_weights: Tensor | None,  # (M, k) float32
    rows: Tensor | None,  # (P,) int32
    name: ActivationName,
    gated: bool,
    alpha: float | None,
    limit: float | None,
    num_experts: int,
    inter: int,
    inter_pad: int,
    dtype: torch.dtype,
    out: Tensor,  # (P, inter_pad) dtype
) -> None:
    """See `activate`."""
    weights = None if topk_weights is None else topk_weights.contiguous()
    function = Activation(name, gated, alpha, limit)
    with torch.cuda.device_of(gate_up):  # Triton launches on the current device, whichever the tensors are on
        ids, gate_up = topk_ids.contiguous(), gate_up.contiguous()
        activate(gate_up, function, ids, weights, rows, out, num_experts=num_experts, inter=inter)


activation, activation_out = define("activation", _ARGUMENTS, ("out",), _results, _write)
