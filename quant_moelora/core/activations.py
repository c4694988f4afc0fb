"""Activations between w13 and w2, in plain torch: they are the meaning that fused kernels must match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core.errors import ShapeError, UnsupportedError

ActivationName = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"]

_GATE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
ACTIVATIONS = (*_GATE_FUNCTIONS, "swigluoai")


@dataclass(frozen=True)
class Activation:
    """The function from gate and up to the input of w2.

    Attributes:
        name: ``silu``, ``gelu``, ``gelu_tanh`` and ``relu2`` mean act(gate) * up, or act(up) without a gate.
            ``swigluoai`` is the clamped swiglu of gpt-oss:
            g = min(gate, limit), u = clamp(up, -limit, limit), g * sigmoid(alpha * g) * (u + 1).
        gated: whether there is a gate (halves = 2).
        alpha: only of ``swigluoai`` (1.702 in gpt-oss).
        limit: only of ``swigluoai`` (7.0 in gpt-oss).

    Raises:
        UnsupportedError: an unknown name, or parameters that the name does not take.
    """

    name: ActivationName
    gated: bool = True
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise UnsupportedError(
                "activation",
                got=self.name,
                rule=f"one of {', '.join(ACTIVATIONS)}",
                remedy="add it to core.activations",
            )
        clamped = self.name == "swigluoai"
        if clamped != (self.alpha is not None) or clamped != (self.limit is not None) or (clamped and not self.gated):
            raise UnsupportedError(
                f"activation {self.name}",
                got=f"alpha={self.alpha}, limit={self.limit}, gated={self.gated}",
                rule="alpha, limit and a gate for swigluoai, neither alpha nor limit for the others",
                remedy="take them from the model's config",
            )

    @property
    def halves(self) -> int:
        """Halves of w13: 2 with a gate, 1 without."""
        return 2 if self.gated else 1

    def __call__(
        self,
        gate_up: Tensor,  # (..., halves * I), gate first
    ) -> Tensor:  # (..., I) float32
        """Apply to gate_up of any float dtype; computed in float32, and not rounded to another dtype here.

        Raises:
            ShapeError: the last dimension does not split into the halves.
        """
        x = gate_up.to(torch.float32)
        if not self.gated:
            return _GATE_FUNCTIONS[self.name](x)
        if x.shape[-1] % 2:
            raise ShapeError(
                "gate_up",
                got=f"{x.shape[-1]} columns",
                rule="an even number, gate then up",
                remedy="pass gated=False for experts without a gate",
            )
        gate, up = x.chunk(2, dim=-1)
        if self.name == "swigluoai":
            assert self.alpha is not None and self.limit is not None  # __post_init__
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(self.alpha * gate) * (up + 1.0)
        return _GATE_FUNCTIONS[self.name](gate) * up
