"""align on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan, Routing
from quant_moelora.kernels.align import reference
from quant_moelora.kernels.common.launch import overlaps

_BLOCK = 4096  # pairs that a program looks at together, at most


def align(routing: Routing, num_experts: int, tile_rows: int) -> tuple[Plan, Tensor]:
    """The Plan of a routing, and its tiles of at most ``tile_rows`` rows: int32 [T, 4], T as `num_tiles`.

    A tile is (expert, first sorted row, rows, unused); tiles that no expert needs have no rows. Nothing waits for the
    device.
    """
    plan = _sorted_by_expert(routing, num_experts) if routing.slots is None else reference.align(routing, num_experts)
    device = routing.topk_ids.device
    tiles = torch.empty(num_tiles(routing.num_pairs, num_experts, tile_rows), 4, dtype=torch.int32, device=device)
    from quant_moelora.kernels.align.kernel import tiles_kernel

    kernel: Any = tiles_kernel  # Triton's launcher has no types
    overlap = overlaps(device)
    kernel[(num_experts + 1,)](
        plan.expert_offsets,
        tiles,
        num_experts,
        len(tiles),
        BM=tile_rows,
        BINS=1 << num_experts.bit_length(),
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
    return plan, tiles


def _sorted_by_expert(routing: Routing, num_experts: int) -> Plan:
    """The Plan of a routing without adapters, in one launch."""
    from quant_moelora.kernels.align.kernel import align_kernel

    kernel: Any = align_kernel  # Triton's launcher has no types
    pairs, device = routing.num_pairs, routing.topk_ids.device
    rows, inverse = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    overlap = overlaps(device)
    block = min(_BLOCK, max(128, 1 << (pairs - 1).bit_length()))
    kernel[(num_experts + 1,)](
        routing.topk_ids.contiguous(),
        rows,
        inverse,
        offsets,
        pairs,
        num_experts,
        BLOCK=block,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=max(4, block // 256),
    )
    return Plan(rows, inverse, offsets, None)


def num_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that a routing can need: each expert's last one may be short."""
    return min(num_pairs, num_experts) + num_pairs // tile_rows
