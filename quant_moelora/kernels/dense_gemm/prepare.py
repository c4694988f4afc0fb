"""Dense weights in the dtype that a backend computes in."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight


def cast(weight: DenseWeight, dtype: torch.dtype) -> tuple[Tensor, str | None]:  # (E, rows, k_pad) dtype
    """The weight's own tensor if it is of this dtype, otherwise a copy, and what that lost in words, or None.

    Raises:
        UnsupportedError: a value is beyond the largest one of ``dtype``.
    """
    w = weight.w.contiguous()
    if w.dtype == dtype:
        return w, None
    made = torch.empty_like(w, dtype=dtype)
    worst = torch.zeros((), device=w.device)
    most = torch.zeros_like(worst)
    for source, target in zip(w, made, strict=True):  # so that no copy of all experts in float32 is made
        target.copy_(source)
        exact = source.to(torch.float32)
        worst = torch.maximum(worst, (target.to(torch.float32) - exact).abs().max())
        most = torch.maximum(most, exact.abs().max())
    error, largest = float(worst), float(most)
    if error == float("inf"):
        raise UnsupportedError(
            "weights",
            got=f"up to {largest}",
            rule=f"at most {torch.finfo(dtype).max}, the largest {str(dtype).removeprefix('torch.')}",
            remedy="compute in bfloat16",
        )
    if not error:
        return made, None
    names = [str(d).removeprefix("torch.") for d in (w.dtype, dtype)]
    return made, f"weights rounded from {names[0]} to {names[1]}, by at most {error / largest:.1e} of the largest"


def cast_layer(info: MoEQuantInfo, dtype: torch.dtype) -> tuple[dict[str, Tensor], str | None]:
    """Both weights of a layer as ``w13.w`` and ``w2.w``; see `cast`.

    Raises:
        UnsupportedError: a value is beyond the largest one of ``dtype``.
    """
    tensors, losses = dict[str, Tensor](), list[str]()
    for name, weight in (("w13", info.w13), ("w2", info.w2)):
        assert isinstance(weight, DenseWeight)  # the backend's `supports`
        tensors[f"{name}.w"], loss = cast(weight, dtype)
        losses += [f"{name}: {loss}"] if loss else []
    return tensors, "; ".join(losses) or None
