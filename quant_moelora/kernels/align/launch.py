"""align on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.common.launch import options, overlaps

_FEW = 64  # pairs, of which each program compares all with all
_BLOCK = 4096  # pairs that a program looks at together, at most


def align(routing: Routing, num_experts: int, tile_rows: int, workspace: Workspace) -> tuple[Plan, Tensor]:
    """The Plan of a routing, and its tiles of at most ``tile_rows`` rows: int32 [T, 4], T as `num_tiles`.

    A tile is (expert, first sorted row, rows, unused); tiles that no expert needs have no rows and come last. Nothing
    waits for the device. The Plan has segments if the routing has slots.

    Args:
        routing: what the router decided.
        num_experts: E.
        tile_rows: any number.
        workspace: holds what the programs of a launch tell one another; see `Workspace` on streams.

    Raises:
        BackendError: see `Workspace.zeros`.
    """
    state = workspace.zeros("align", (num_experts + 2,), torch.int64)
    rows, inverse, offsets, segments, tiles = align_tensors(
        routing.topk_ids, routing.slots, state, num_experts, tile_rows
    )
    return Plan(rows, inverse, offsets, segments), tiles


def align_tensors(
    topk_ids: Tensor,  # (M, k) int32 or int64
    slots: Tensor | None,  # (M,) int32
    state: Tensor,  # (E + 2,) int64, zero before the first launch and then left as it is
    num_experts: int,
    tile_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """rows, inverse, expert_offsets and segments of the Plan, and the tiles; see `align`."""
    pairs, device = topk_ids.numel(), topk_ids.device

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    order = new(1 if slots is None else 2, pairs)  # the second row is where pairs are put while they are sorted
    inverse, offsets = new(pairs), new(num_experts + 1)
    segments = None if slots is None else new(pairs + 1, 3)
    tiles = new(num_tiles(pairs, num_experts, tile_rows), 4)
    from quant_moelora.kernels.align.kernel import align_kernel

    kernel: Any = align_kernel  # Triton's launcher has no types
    block, size, warps = _blocks(pairs)
    overlap = overlaps(device)
    kernel[(num_experts + 1,)](
        topk_ids.contiguous(),
        None if slots is None else slots.contiguous(),
        order,
        inverse,
        offsets,
        segments,
        tiles,
        state,
        pairs,
        num_experts,
        len(tiles),
        TOP_K=topk_ids.shape[1],
        BM=tile_rows,
        BINS=1 << (num_experts - 1).bit_length(),
        BLOCK=block,
        SIZE=size,
        FEW=pairs <= _FEW,
        OVERLAP=overlap,
        **options(overlap),
        num_warps=warps,
    )
    return order[0], inverse, offsets, segments, tiles


def _blocks(pairs: int) -> tuple[int, int, int]:
    """Pairs that a program looks at together, own pairs that it sorts together, and warps."""
    block = max(16, 1 << (pairs - 1).bit_length())
    if pairs <= _FEW:
        return block, block, max(1, block * block // 1024)  # 32 comparisons a thread
    block = min(_BLOCK, block)
    warps = min(16, max(4, block // 128))
    return block, 32 * warps, warps  # 16 digits a thread


def num_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that a routing can need: each expert's last one may be short."""
    return min(num_pairs, num_experts) + num_pairs // tile_rows
