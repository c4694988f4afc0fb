"""Injection: what a layer does around its two GEMMs. LoRA enters here and nowhere else.

Row i of an intermediate (gate_up, h, y) is the pair plan.rows[i], so that the rows of an expert, and of an adapter
within it, are contiguous.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace


class ActivationCallable(Protocol):
    """From gate_up to the input of w2, for every row that has an expert."""

    def __call__(
        self,
        x: Tensor,  # (M, H) activation dtype, not gathered
        gate_up: Tensor,  # (P, halves*inter_pad) float, in sorted order
        out: Tensor,  # (P, inter_pad) activation dtype, in sorted order: all columns are written, the padding with 0
        routing: Routing,
        plan: Plan,
        ws: Workspace,
    ) -> Tensor:
        """Write h into ``out`` and return it."""
        ...


class MoeSumCallable(Protocol):
    """From the rows of w2's output to the layer's output."""

    def __call__(
        self,
        h: Tensor,  # (P, inter_pad) activation dtype, in sorted order, what `activation` returned
        y: Tensor,  # (P, H) float, in sorted order
        out: Tensor,  # (M, H) activation dtype
        routing: Routing,
        plan: Plan,
        ws: Workspace,
    ) -> Tensor:
        """Weight by the router, sum each token's pairs that have an expert, write into ``out`` and return it."""
        ...


class Injection(Protocol):
    """The callables of one layer.

    An injection is built once, never in a forward. Everything it needs of a forward arrives as arguments; everything
    it needs of the adapters is in ``ctx``, whose addresses do not change, so that a captured CUDA graph serves other
    adapters later. A backend that fuses LoRA into its GEMMs reads ``ctx`` and must agree with the callables.

    Attributes:
        ctx: the adapters, or None for the base model.
        activation: see `ActivationCallable`.
        moe_sum: see `MoeSumCallable`.
    """

    ctx: MoELoRAContext | None
    activation: ActivationCallable
    moe_sum: MoeSumCallable

    def begin(
        self,
        x: Tensor,  # (M, H) activation dtype
        routing: Routing,
        plan: Plan,
        ws: Workspace,
    ) -> None:
        """Start what needs x alone, such as the shrink of w13; it may overlap the first GEMM."""
        ...
