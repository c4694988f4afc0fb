"""Shrink and expand in plain torch: one (expert, adapter) segment at a time, float32 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import A2, A13, B2, B13, DOWN, GATE, NO_FACTOR, UP, MoELoRAContext
from quant_moelora.core.routing import BASE_SLOT, Plan


def shrink13(
    x: Tensor,  # (M, H) float
    ctx: MoELoRAContext,
    plan: Plan,
    top_k: int,
    v: Tensor,  # (P, v13_part) float32
) -> Tensor:
    """v[i] = A13 x[token of i] for sorted rows whose adapter has an A13 for their expert; others are not written."""
    own, of = ctx.rank_shard
    for expert, slot, held in _segments(plan, ctx):
        ranks = ctx.rank[slot, :, expert].tolist()
        rows = (max(ranks[GATE], int(ctx.up_col[slot, expert]) + ranks[UP]) - own + of - 1) // of
        a13 = _factor(ctx, slot, expert, A13, rows, ctx.hidden_size)
        if a13 is not None:
            tokens = plan.rows[held].to(torch.int64) // top_k
            v[held, :rows] = x[tokens].to(torch.float32) @ a13.T
    return v


def expand13(
    v: Tensor,  # (P, v13_width) float32
    ctx: MoELoRAContext,
    plan: Plan,
    gate_up: Tensor,  # (P, 2*inter_pad, or inter_pad without a gate) float32
) -> Tensor:
    """Add scaling * B13 v to gate and up, in place."""
    inter_pad = ctx.inter_pad
    for expert, slot, held in _segments(plan, ctx):
        gate_rank, up_rank, _ = ctx.rank[slot, :, expert].tolist()
        b13 = _factor(ctx, slot, expert, B13, gate_rank + up_rank, inter_pad)
        if b13 is None:
            continue
        b_gate, b_up = b13.split((gate_rank, up_rank))
        up_col = int(ctx.up_col[slot, expert])
        parts = ((GATE, b_gate, 0, gate_rank, 0), (UP, b_up, up_col, up_rank, gate_up.shape[1] - inter_pad))
        for projection, b, v_col, rank, column in parts:
            delta = v[held, v_col : v_col + rank] @ b
            gate_up[held, column : column + inter_pad] += ctx.scaling[slot, projection, expert] * delta
    return gate_up


def shrink2(
    h: Tensor,  # (P, inter_pad) float
    ctx: MoELoRAContext,
    plan: Plan,
    v: Tensor,  # (P, v2_width) float32
) -> Tensor:
    """v[i] = A2 h[i] for sorted rows whose adapter has an A2 for their expert; others are not written."""
    for expert, slot, held in _segments(plan, ctx):
        rank = int(ctx.rank[slot, DOWN, expert])
        a2 = _factor(ctx, slot, expert, A2, rank, ctx.inter_pad)
        if a2 is not None:
            v[held, :rank] = h[held].to(torch.float32) @ a2.T
    return v


def expand2(
    v: Tensor,  # (P, v2_width) float32
    ctx: MoELoRAContext,
    plan: Plan,
    y: Tensor,  # (P, H) float32
) -> Tensor:
    """Add scaling * B2 v to y, in place, in the columns that are held here."""
    part = ctx.hidden_part
    for expert, slot, held in _segments(plan, ctx):
        rank = int(ctx.rank[slot, DOWN, expert])
        b2 = _factor(ctx, slot, expert, B2, rank, part.size)
        if b2 is not None:
            y[held, part.slice] += ctx.scaling[slot, DOWN, expert] * (v[held, :rank] @ b2)
    return y


def _segments(plan: Plan, ctx: MoELoRAContext) -> Iterator[tuple[int, int, slice]]:
    """(expert, slot, sorted rows) of every segment that has an adapter.

    Raises:
        AdapterError: a slot that no adapter has.
    """
    table = [] if plan.segments is None else plan.segments.tolist()
    for expert, begin, rows, slot in table:
        if not rows or slot == BASE_SLOT:
            continue
        if not 0 <= slot < ctx.num_slots:
            raise AdapterError(
                "adapter_ids",
                got=slot,
                rule=f"{BASE_SLOT} for the base, or a slot from 0 to {ctx.num_slots - 1}",
                remedy="pass the slots of attached adapters",
            )
        yield expert, slot, slice(begin, begin + rows)


def _factor(ctx: MoELoRAContext, slot: int, expert: int, which: int, rows: int, columns: int) -> Tensor | None:
    """One factor in float32 [rows, columns], or None where the adapter has none."""
    offset = int(ctx.offsets[slot, which, expert])
    if offset == NO_FACTOR:
        return None
    return ctx.arena[offset : offset + rows * columns].view(rows, columns).to(torch.float32)
