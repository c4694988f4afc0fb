"""LoRA on the GPU: the kernels of one forward, each a launch of its own or riding along with a GEMM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.shard import hidden_part
from quant_moelora.kernels.common.launch import is_interpreted, launch, overlaps
from quant_moelora.kernels.lora.spec import Cut, LoRASpec, choose_cut
from quant_moelora.kernels.moe_sum.launch import Deltas

Buffers = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
_REGISTERS = 128  # of a thread of `activate_kernel`, so that four blocks fit a multiprocessor


class LoRATables(NamedTuple):
    """The tensors and the largest rank of a `MoELoRAContext`, as operators take them.

    ``own`` and ``sharers`` are its ``rank_shard``.
    """

    arena: Tensor  # (any,) of the activation dtype
    offsets: Tensor  # (slots, 4, E) int64
    rank: Tensor  # (slots, 3, E) int32
    up_col: Tensor  # (slots, E) int32
    scaling: Tensor  # (slots, 3, E) float32
    max_rank: int
    own: int = 0
    sharers: int = 1

    @staticmethod
    def of(ctx: MoELoRAContext) -> LoRATables:
        """Those of a context."""
        own, sharers = ctx.rank_shard
        return LoRATables(**ctx.tensors(), max_rank=ctx.max_rank, own=own, sharers=sharers)


class LayerFacts(NamedTuple):
    """What LoRA has to know of the layer between its two products.

    Attributes:
        activation: the activation.
        inter: I.
        inter_pad: padded intermediate size.
        weigh_input: whether the router's weight multiplies gate_up, and not the output.
    """

    activation: Activation
    inter: int
    inter_pad: int
    weigh_input: bool


class Rider(NamedTuple):
    """Work that a GEMM's launch does beside its product.

    Attributes:
        shrinks: whether it is the shrink of w13; otherwise it is the expand of w2.
        programs: how many programs it takes.
        spec: what it is compiled for.
        arguments: of the kernel.
    """

    shrinks: bool
    programs: int
    spec: LoRASpec
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class LoRAForward:
    """The adapters' part of one forward: shrink of x, then `activate`, then expand of what that shrank.

    Attributes:
        spec: what its kernels are compiled for, but for `LoRASpec.gemm_parts`.
        tables: of the context.
        topk_ids: of the router, contiguous.
        topk_weights: of the router, contiguous.
        slots: adapter of each token, contiguous.
        rows: pair of each sorted row; None where rows are pairs.
        segments: of the plan; None where rows are pairs.
        v13: parts of A13 x.
        v2: parts of A2 h.
        delta: scaling * B2 (A2 h), of the activation dtype, in the columns of B2 that are held here.
    """

    spec: LoRASpec
    tables: LoRATables
    topk_ids: Tensor  # (M, k) int32 or int64
    topk_weights: Tensor  # (M, k) float32
    slots: Tensor  # (M,) int32
    rows: Tensor | None  # (P,) int32
    segments: Tensor | None  # (T, 4) int32
    v13: Tensor  # (P, parts13, v13_part) float32, or (P, 1, v13_width) once gathered
    v2: Tensor  # (P, parts2, max_rank) float32
    delta: Tensor  # (P, b2_columns)

    @staticmethod
    def new(
        x: Tensor,  # (M, H) bfloat16 or float16
        tables: LoRATables,
        facts: LayerFacts,
        topk_ids: Tensor,  # (M, k) int32 or int64, contiguous
        topk_weights: Tensor,  # (M, k) float32, contiguous
        slots: Tensor,  # (M,) int32, contiguous
        rows: Tensor | None,  # (P,) int32, pair of each sorted row; None where rows are pairs
        segments: Tensor | None,  # (T, 4) int32 of the plan; None where rows are pairs
        buffers: Buffers,
        cut: Cut | None = None,
    ) -> LoRAForward:
        """A forward with at least one pair; ``buffers`` makes a tensor by name, shape and dtype, as `Workspace` does.

        Args:
            cut: how the work is cut; None for what `choose_cut` makes of it.

        Raises:
            AdapterError: the adapters are of another dtype than x.
        """
        if tables.arena.dtype != x.dtype:
            raise AdapterError(
                "adapters",
                got=f"factors in {tables.arena.dtype} for activations in {x.dtype}",
                rule="one dtype",
                remedy="attach the adapters in the dtype that the model computes in",
            )
        pairs, hidden = topk_ids.numel(), x.shape[1]
        slots_of, _, experts = tables.rank.shape
        sizes = (experts, slots_of, topk_ids.shape[1], hidden, tables.max_rank, tables.own, tables.sharers)
        cut = cut or choose_cut(pairs, experts, hidden, facts.inter_pad, tables.max_rank)
        spec = _spec(cut, segments is None, sizes, facts, overlaps(x.device), is_interpreted(x.device))
        return LoRAForward(
            spec,
            tables,
            topk_ids,
            topk_weights,
            slots,
            rows,
            segments,
            v13=buffers("lora_v13", (pairs, spec.cut.parts13, spec.v13_part), torch.float32),
            v2=buffers("lora_v2", (pairs, spec.cut.parts2, spec.max_rank), torch.float32),
            delta=buffers("lora_delta", (pairs, spec.b2_columns), x.dtype),
        )

    @property
    def _places(self) -> int:
        return self.topk_ids.numel() if self.segments is None else len(self.segments)

    @property
    def _held(self) -> tuple[Any, ...]:
        return self.segments, self.topk_ids, self.slots

    def shrink_rider(
        self,
        x: Tensor,  # (M, H) activation dtype
    ) -> Rider:
        """v13 = A13 x."""
        spec = self.spec
        programs = self._places * spec.rank_blocks13 * spec.cut.parts13
        return Rider(True, programs, spec, (x, x.stride(0), self.rows, self.v13, self.tables[:5], self._held))

    def expand_rider(self) -> Rider:
        """delta = scaling * B2 v2."""
        programs = self._places * self.spec.cut.expand_blocks
        return Rider(False, programs, self.spec, (self.v2, self.delta, self.tables[:5], self._held))

    def activate(
        self,
        gate_up: Tensor,  # (P, halves*inter_pad), or (parts, P, halves*inter_pad) float32
        h: Tensor,  # (P, inter_pad) activation dtype
    ) -> Tensor:
        """Write h = act(gate_up + scaling * B13 v13) of every row that has an expert, and v2 = A2 h."""
        from quant_moelora.kernels.lora.kernel import activate_kernel

        parts = gate_up.shape[0] if gate_up.ndim == 3 else 1
        spec = replace(self.spec, gemm_parts=parts)
        launch(
            activate_kernel,
            (self._places, spec.cut.parts2),
            h,
            gate_up,
            gate_up.stride(0) if parts > 1 else 0,
            h,
            self.v13,
            self.v2,
            self.rows,
            self.topk_weights,
            self.tables[:5],
            self._held,
            SPEC=spec,
            maxnreg=_REGISTERS,
            overlap=spec.overlap,
        )
        return h

    @property
    def deltas(self) -> Deltas:
        """What `moe_sum` adds."""
        begin = hidden_part(self.spec.hidden, self.spec.own, self.spec.sharers).begin
        return Deltas(self.delta, self.slots, self.tables.rank, begin)


@functools.lru_cache(maxsize=1 << 12)  # a forward asks, and has no time for it
def _spec(cut: Cut, direct: bool, sizes: tuple[int, ...], facts: LayerFacts, overlap: bool, plain: bool) -> LoRASpec:
    """The spec of forwards that are cut alike; sizes are E, slots, k, H, largest rank, own and sharers."""
    num_experts, num_slots, top_k, hidden, max_rank, own, sharers = sizes
    function = facts.activation
    return LoRASpec(
        num_experts=num_experts,
        num_slots=num_slots,
        top_k=top_k,
        direct=direct,
        hidden=hidden,
        inter=facts.inter,
        inter_pad=facts.inter_pad,
        gated=function.gated,
        activation=function.name,
        alpha=function.alpha or 0.0,
        limit=function.limit or 0.0,
        weighted=facts.weigh_input,
        max_rank=max_rank,
        own=own,
        sharers=sharers,
        b2_columns=hidden_part(hidden, own, sharers).size,
        cut=cut,
        gemm_parts=1,
        overlap=overlap,
        plain=plain,
    )


def alone(rider: Rider) -> None:
    """Do a rider's work in a launch of its own."""
    from quant_moelora.kernels.lora.kernel import expand2_kernel, shrink13_kernel

    kernel, out = (shrink13_kernel, rider.arguments[3]) if rider.shrinks else (expand2_kernel, rider.arguments[1])
    launch(kernel, (rider.programs,), out, *rider.arguments, SPEC=rider.spec, overlap=rider.spec.overlap)
