"""align in plain torch: the meaning of the Plan. No value is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.routing import BASE_SLOT, SEGMENT_ROWS, Plan, Routing, num_segments

_SLOT_RANGE = 1 << 32  # slots are int32, so that expert * _SLOT_RANGE + slot + 1 orders by (expert, slot)


def align(routing: Routing, num_experts: int) -> Plan:
    """Sort pairs by (expert, slot), stably; pairs whose id is outside 0..num_experts-1 go last."""
    device, pairs = routing.topk_ids.device, routing.num_pairs
    ids = routing.topk_ids.reshape(-1).to(torch.int64)
    valid = (ids >= 0) & (ids < num_experts)
    expert = torch.where(valid, ids, num_experts)
    if routing.slots is None:
        slot = torch.full_like(ids, BASE_SLOT)
    else:
        slot = routing.slots.to(torch.int64)
        known = (slot >= BASE_SLOT) & (slot < routing.num_slots)
        slot = torch.where(known, slot, routing.num_slots).repeat_interleave(routing.top_k)
    key = torch.where(valid, expert * _SLOT_RANGE + slot + 1, num_experts * _SLOT_RANGE)
    rows = torch.argsort(key, stable=True)
    inverse = torch.empty_like(rows).scatter_(0, rows, torch.arange(pairs, device=device))

    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(
        0, expert, torch.ones_like(ids)
    )
    expert_offsets = torch.cat((counts.new_zeros(1), counts[:num_experts].cumsum(0)))

    return Plan(
        *(t.to(torch.int32) for t in (rows, inverse, expert_offsets)),
        segments=_segments(expert[rows], slot[rows], expert_offsets, routing.num_slots),
    )


def _segments(
    expert: Tensor,  # (P,) int64 of sorted rows, E for none
    slot: Tensor,  # (P,) int64
    expert_offsets: Tensor,  # (E + 1,) int64
    num_slots: int,
) -> Tensor:  # (T, 4) int32
    """See `Plan.segments`."""
    pairs, num_experts = expert.numel(), expert_offsets.numel() - 1
    places = num_segments(pairs, num_experts, num_slots)
    row = torch.arange(pairs, device=expert.device)
    opens = torch.ones(pairs, dtype=torch.bool, device=expert.device)
    opens[1:] = (expert[1:] != expert[:-1]) | (slot[1:] != slot[:-1])
    within = row - torch.where(opens, row, 0).cummax(0).values
    first = (within % SEGMENT_ROWS == 0) & (expert < num_experts)
    begun = torch.cat((row.new_zeros(1), first.cumsum(0)))  # segments that begin before each row
    begin = expert_offsets[expert.clamp(max=num_experts)]
    place = torch.minimum(begin, expert * (num_slots + 2) + begin // SEGMENT_ROWS) + begun[:-1] - begun[begin]
    # Rows that begin no segment are written to a place past the end, which is dropped, and so is what ends there.
    place = torch.where(first, place, places)
    ends = torch.cat((opens | (within % SEGMENT_ROWS == 0), opens.new_ones(1)))
    end = torch.where(ends, torch.arange(pairs + 1, device=expert.device), pairs).flip(0).cummin(0).values.flip(0)[1:]
    held = torch.stack((expert, row, end - row, slot), 1)
    return held.new_zeros(places + 1, 4).index_copy_(0, place, held)[:places].to(torch.int32)
