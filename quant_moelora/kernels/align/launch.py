"""align on the GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import Plan, Routing, num_segments
from quant_moelora.kernels.common.launch import launch, overlaps

COMPACT = 128  # rows of a tile, from which on the list has no gaps
_FEW = 64  # pairs, of which each program compares all with all
_COMPARED = 32  # own pairs that a program compares each with each, before it sorts them by digits
_BLOCK = 4096  # pairs that a program looks at together, at most


def align(routing: Routing, num_experts: int, tile_rows: int, length: int | None = None) -> tuple[Plan, Tensor]:
    """The Plan of a routing, and its list of tiles: int32 [length, 4]. Nothing waits for the device.

    A tile is (expert, first sorted row, rows, 0), and expert e's tiles stand in their order from place
    min(b, e + b // tile_rows) on, with b = plan.expert_offsets[e]: from e to e + 1 each of the two grows by at least
    the tiles that e needs, so that the lower one does. Places between and after are tiles without rows, (0, 0, 0, 0).
    With `COMPACT` rows a tile and more, a second launch moves those behind all others: then a GPU has few blocks, each
    of which takes tile after tile, and they share the work evenly only if every tile has rows.
    The Plan has segments if the routing has slots.

    Args:
        routing: what the router decided.
        num_experts: E.
        tile_rows: the most rows of a tile; not only powers of two.
        length: of the list; by default the least, `num_tiles`. What is more has no rows.

    Raises:
        ShapeError: a list shorter than that.
    """
    rows, inverse, offsets, segments, tiles = align_tensors(
        routing.topk_ids, routing.slots, num_experts, routing.num_slots, tile_rows, length
    )
    return Plan(rows, inverse, offsets, segments), tiles


def align_tensors(
    topk_ids: Tensor,  # (M, k) int32 or int64
    slots: Tensor | None,  # (M,) int32
    num_experts: int,
    num_slots: int,
    tile_rows: int,
    length: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """rows, inverse, expert_offsets and segments of the Plan, and the tiles; see `align`."""
    pairs, device = topk_ids.numel(), topk_ids.device
    least = num_tiles(pairs, num_experts, tile_rows)
    if length is not None and length < least:
        raise ShapeError(
            "list of tiles",
            got=f"{length} tiles of {tile_rows} rows for {pairs} pairs and {num_experts} experts",
            rule=f"at least {least}",
            remedy="leave the length out, or pass num_tiles(...) or more",
        )
    new = functools.partial(torch.empty, dtype=torch.int32, device=device)
    order = new(1 if slots is None else 2, pairs)  # the second row is where pairs are put while they are sorted
    inverse, offsets = new(pairs), new(num_experts + 1)
    segments = None if slots is None else new(num_segments(pairs, num_experts, num_slots), 4)
    tiles = new(least if length is None else length, 4)
    from quant_moelora.kernels.align.kernel import align_kernel

    few = pairs <= _FEW and slots is None
    block, size, warps = _blocks(pairs, few=few, slots=slots is not None)
    lanes, compared = _sorting(pairs, num_experts, block, warps)
    overlap = overlaps(device)
    launch(
        align_kernel,
        (num_experts + 1,),
        tiles,
        topk_ids.contiguous(),
        None if slots is None else slots.contiguous(),
        order,
        inverse,
        offsets,
        segments,
        tiles,
        pairs,
        num_experts,
        num_slots,
        0 if segments is None else len(segments),
        len(tiles),
        TOP_K=topk_ids.shape[1],
        BM=tile_rows,
        BLOCK=block,
        SIZE=size,
        OWN=lanes,
        FEW=few,
        COMPARED=compared,
        OVERLAP=overlap,
        overlap=overlap,
        num_warps=warps,
    )
    return order[0], inverse, offsets, segments, _compact(tiles) if tile_rows >= COMPACT else tiles


def _compact(
    listed: Tensor,  # (T, 4) int32
) -> Tensor:  # (T, 4) int32
    """The list with all tiles that have rows first."""
    from quant_moelora.kernels.align.kernel import compact_kernel

    tiles = torch.empty_like(listed)
    if not len(listed):
        return tiles
    overlap = overlaps(listed.device)
    launch(compact_kernel, (1,), tiles, listed, tiles, len(listed), SIZE=1024, OVERLAP=overlap, overlap=overlap)
    return tiles


def _blocks(pairs: int, *, few: bool, slots: bool) -> tuple[int, int, int]:
    """Pairs that a program looks at together, own pairs or tiles likewise, and warps."""
    block = max(16, 1 << (pairs - 1).bit_length())
    if few:
        return block, block, max(1, block * block // 1024)  # 32 comparisons a thread
    block = min(_BLOCK, block)
    warps = min(16, max(4, block // (64 if slots else 128)))
    return block, (64 if pairs > _BLOCK else 32) * warps, warps


def _sorting(pairs: int, num_experts: int, block: int, warps: int) -> tuple[int, int]:
    """Lanes that sort own pairs by slot, and most own pairs that are compared each with each instead.

    Lanes have to be added up, so that they are fewer where an expert has fewer pairs (`align-lanes-h200.csv`).
    """
    if pairs <= _BLOCK:
        return max(64, 512 // warps), min(_COMPARED, block)
    return (128, _COMPARED) if pairs < 128 * num_experts else (32 * warps, 0)


def num_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Length of the list of tiles: the place of an expert E's, if all pairs had lower ones; see `align`."""
    return min(num_pairs, num_experts + num_pairs // tile_rows)
