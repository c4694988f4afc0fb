"""The Plan and the tiles as kernels make them, against a slow statement of the Plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align import reference
from quant_moelora.kernels.align.launch import align, num_tiles
from tests.builders import move, routing
from tests.kernels.test_align import mixed_slots, slow_align
from tests.launched.cases import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS
HEIGHT = pytest.mark.parametrize("height", [16, 128])


def check_tiles(tiles: Tensor, offsets: list[int], height: int) -> None:
    """Every sorted row of an expert is in one tile of that expert, and in no second one."""
    tile_of: dict[int, int] = {}
    for number, (expert, begin, count, _) in enumerate(tiles.tolist()):
        assert 0 <= count <= height
        assert 0 <= expert < len(offsets) - 1, "also of an empty tile: it may be used as an index"
        if count:
            assert offsets[expert] <= begin and begin + count <= offsets[expert + 1]
            for row in range(begin, begin + count):
                assert row not in tile_of
                tile_of[row] = number
    assert sorted(tile_of) == list(range(offsets[-1]))
    # As few as there can be.
    used = [-(-(end - begin) // height) for begin, end in itertools.pairwise(offsets)]
    assert len(set(tile_of.values())) == sum(used)


def check(case: Routing, experts: int, height: int) -> None:
    plan, tiles = align(move(case, DEVICE), experts, height)
    rows, inverse, offsets, _ = slow_align(case, experts)
    for tensor in (plan.rows, plan.inverse, plan.expert_offsets, tiles):
        assert tensor.dtype == torch.int32 and tensor.device.type == DEVICE.type
    assert plan.rows.tolist() == rows
    assert plan.inverse.tolist() == inverse
    assert plan.expert_offsets.tolist() == offsets
    assert tiles.shape == (num_tiles(case.num_pairs, experts, height), 4)
    check_tiles(tiles, offsets, height)
    if case.slots is not None:
        segments = reference.align(case, experts).segments
        assert segments is not None and plan.segments is not None
        assert torch.equal(plan.segments.cpu(), segments)


@HEIGHT
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (1, 1, 5), (1, 8, 3), (9, 2, 1), (17, 3, 4), (40, 4, 64), (64, 2, 2), (150, 2, 3), (10, 2, 140)],
)
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_against_the_slow_statement(tokens: int, top_k: int, experts: int, lora: bool, height: int) -> None:
    check(routing(tokens, top_k, experts, slots=mixed_slots(tokens) if lora else None), experts, height)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 3, 6, 7, 14, 15, 126])
def test_ids_at_and_beyond_both_ends(experts: int, dtype: torch.dtype) -> None:
    """Also such that would be an expert's if only their low bits were looked at; powers of two and their neighbours."""
    limits = torch.iinfo(dtype)
    wrapping = [2**32, 2**32 + 1, -(2**32)] if dtype == torch.int64 else []
    ids = [0, experts - 1, experts, experts + 1, -1, -2, limits.min, limits.max, *wrapping] * 2
    case = Routing(torch.tensor(ids, dtype=dtype).view(-1, 2), torch.ones(len(ids) // 2, 2))
    check(case, experts, 16)
    slots = torch.arange(len(ids) // 2, dtype=torch.int32) % 3 - 1
    check(Routing(case.topk_ids, case.topk_weights, slots), experts, 16)


@HEIGHT
@pytest.mark.parametrize("counts", [(0, 33, 0, 17), (17, 17, 17, 17), (0, 0, 0, 1), (16, 32, 48, 64), (129, 0, 0, 0)])
def test_tiles_of_full_short_and_empty_experts(counts: tuple[int, ...], height: int) -> None:
    """With one row more than a tile in every expert, the list holds the most that it can need."""
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    check(Routing(ids[torch.randperm(len(ids))][:, None], torch.ones(len(ids), 1)), 4, height)


def test_nobody_has_an_expert() -> None:
    check(Routing(torch.full((9, 2), -1), torch.ones(9, 2)), 4, 16)


def test_more_pairs_than_a_program_takes_at_once() -> None:
    """Blocks of 4096 pairs; the last one is short."""
    check(routing(700, 6 if INTERPRETED else 25, 3), 3, 128)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_no_tokens(lora: bool) -> None:
    empty = torch.zeros(0, dtype=torch.int32) if lora else None
    plan, tiles = align(move(Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), empty), DEVICE), 3, 16)
    assert plan.rows.shape == plan.inverse.shape == (0,) and tiles.shape == (0, 4)
    assert plan.expert_offsets.tolist() == [0, 0, 0, 0]


def test_strided_ids() -> None:
    ids = torch.randint(0, 4, (2, 11)).to(DEVICE).T
    plan, _ = align(Routing(ids, torch.ones(11, 2, device=DEVICE)), 4, 16)
    assert plan.rows.tolist() == slow_align(Routing(ids.cpu(), torch.ones(11, 2)), 4)[0]


# Keys are experts times slots.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("experts", "slots"),
    [(341, 3), (512, 2), (1, 8191), (256, 32), (512, 64), (512, 256), (1023, 1), (1024, 1), (1023, 0), (1024, 0)],
)
def test_many_keys(experts: int, slots: int) -> None:
    given = torch.randint(-1, slots, (2000,), dtype=torch.int32) if slots else None
    case = routing(2000, 8, experts, slots=given)
    plan, tiles = align(move(case, DEVICE), experts, 16)
    want = reference.align(case, experts)
    for name in ("rows", "inverse", "expert_offsets"):
        assert torch.equal(getattr(plan, name).cpu(), getattr(want, name)), name
    check_tiles(tiles, want.expert_offsets.tolist(), 16)
