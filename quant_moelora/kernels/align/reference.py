"""align in plain torch: the meaning of the Plan. No value is read on the host."""

from __future__ import annotations

import torch

from quant_moelora.core.routing import BASE_SLOT, NO_EXPERT, Plan, Routing

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
        slot = routing.slots.to(torch.int64).repeat_interleave(routing.top_k)
    key, rows = torch.sort(torch.where(valid, expert * _SLOT_RANGE + slot + 1, num_experts * _SLOT_RANGE), stable=True)
    inverse = torch.empty_like(rows).scatter_(0, rows, torch.arange(pairs, device=device))

    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(
        0, expert, torch.ones_like(ids)
    )
    expert_offsets = torch.cat((counts.new_zeros(1), counts[:num_experts].cumsum(0)))

    first = torch.ones(pairs, dtype=torch.bool, device=device)
    first[1:] = key[1:] != key[:-1]
    first &= valid[rows]
    opened = torch.cat((counts.new_zeros(1), first.cumsum(0)))  # segments that begin before each position
    begin = expert_offsets[expert[rows]]
    # Positions that begin no segment are written to a row past the end, which is dropped.
    target = torch.where(first, begin + opened[:-1] - opened[begin], pairs + 1)
    used = torch.stack((expert[rows], slot[rows], torch.arange(pairs, device=device)), dim=1)
    ends = expert_offsets[(expert[rows] + 1).clamp(max=num_experts)]
    empty = torch.cat((ends, expert_offsets[-1:].expand(2)))[:, None]
    segments = torch.cat((torch.full_like(empty, NO_EXPERT).expand(-1, 2), empty), dim=1).index_copy_(0, target, used)
    segments = segments[: pairs + 1]
    return Plan(*(t.to(torch.int32) for t in (rows, inverse, expert_offsets, segments)))
