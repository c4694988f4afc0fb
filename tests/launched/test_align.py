"""The Plan and the tiles as kernels make them, against a slow statement of the Plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.kernels.align import reference
from quant_moelora.kernels.align.launch import COMPACT, align
from tests.builders import move, routing
from tests.kernels.test_align import mixed_slots, slow_align
from tests.launched.cases import DEVICE, INTERPRETED, MARKS, crossed

pytestmark = MARKS
HEIGHTS = (16, 48, 192)
# Each expert has a program, which knows nothing of how many others there are; interpreted, it takes 50 ms.
MANY = [(40, 4, 20), (10, 2, 40)] if INTERPRETED else [(40, 4, 64), (10, 2, 140)]
SIZES = [(1, 1, 1), (1, 1, 5), (1, 8, 3), (9, 2, 1), (17, 3, 4), (64, 2, 2), (150, 2, 3), *MANY]


def tile_list(offsets: list[int], height: int, length: int) -> list[tuple[int, int, int, int]]:
    """The list of tiles as `align` states it: every row of every expert, in order, and no place twice."""
    tiles: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * length
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        place = min(begin, expert + begin // height)
        assert not any(map(any, tiles[place:])), "lower experts' tiles come before"
        for row in range(begin, end, height):
            assert place < length
            tiles[place] = (expert, row, min(height, end - row), 0)
            place += 1
    if height >= COMPACT:  # those that have rows first
        tiles.sort(key=lambda tile: not tile[2])
    return tiles


def check_tiles(tiles: Tensor, offsets: list[int], height: int, length: int) -> None:
    assert [tuple(tile) for tile in tiles.tolist()] == tile_list(offsets, height, length)


def least_length(pairs: int, experts: int, height: int) -> int:
    """The place of the tiles of an expert after all others, if there were one more and all pairs had lower ones."""
    return min(pairs, experts + pairs // height)


def launched(case: Routing, experts: int, height: int, length: int | None = None) -> tuple[Plan, Tensor]:
    """`align` on the device."""
    return align(move(case, DEVICE), experts, height, length)


def check(case: Routing, experts: int, height: int, length: int | None = None) -> None:
    """Against the slow statement. Outputs are poisoned by `conftest`."""
    plan, tiles = launched(case, experts, height, length)
    rows, inverse, offsets, segments = slow_align(case, experts)
    for tensor in (plan.rows, plan.inverse, plan.expert_offsets, tiles):
        assert tensor.dtype == torch.int32 and tensor.device.type == DEVICE.type
    assert plan.rows.tolist() == rows
    assert plan.inverse.tolist() == inverse
    assert plan.expert_offsets.tolist() == offsets
    if length is None:
        length = least_length(case.num_pairs, experts, height)
    assert tiles.shape == (length, 4)
    check_tiles(tiles, offsets, height, length)
    if case.slots is None:
        assert plan.segments is None
        return
    assert plan.segments is not None
    assert plan.segments.dtype == torch.int32 and plan.segments.shape == (len(segments), 4)
    assert [tuple(row) for row in plan.segments.tolist()] == segments


def check_large(case: Routing, experts: int, height: int) -> None:
    """Against torch's sort, which is fast enough for many pairs."""
    check_plan(*launched(case, experts, height), case, experts, height)


def check_plan(plan: Plan, tiles: Tensor, case: Routing, experts: int, height: int) -> None:
    """What was made of ``case``, against torch's sort."""
    want = reference.align(case, experts)
    for name in ("rows", "inverse", "expert_offsets", *(() if case.slots is None else ("segments",))):
        assert torch.equal(getattr(plan, name).cpu(), getattr(want, name)), name
    check_tiles(tiles, want.expert_offsets.tolist(), height, least_length(case.num_pairs, experts, height))


def random_slots(tokens: int, slots: int) -> Tensor:
    """Slots from that of the base model on."""
    return torch.randint(-1, slots - 1, (tokens,), dtype=torch.int32)


@crossed(tokens_top_k_experts=SIZES, lora=[False, True], height=HEIGHTS)
def test_against_the_slow_statement(tokens_top_k_experts: tuple[int, int, int], lora: bool, height: int) -> None:
    tokens, top_k, experts = tokens_top_k_experts
    check(routing(tokens, top_k, experts, slots=mixed_slots(tokens) if lora else None), experts, height)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("experts", [1, 7, 31, 33] if INTERPRETED else [1, 7, 31, 33, 64, 65, 512])
def test_numbers_of_experts(experts: int, lora: bool) -> None:
    """Too many pairs to be compared each with each."""
    check(routing(35, 2, experts, slots=mixed_slots(35) if lora else None), experts, 16)


@crossed(times=[2, 10], experts=[1, 2, 3, 7, 8, 15, 16], dtype=[torch.int32, torch.int64])
def test_ids_at_and_beyond_both_ends(times: int, experts: int, dtype: torch.dtype) -> None:
    """Also such that would be an expert's if only their low bits were looked at; powers of two and their neighbours."""
    limits = torch.iinfo(dtype)
    wrapping = [2**32, 2**32 + 1, -(2**32)] if dtype == torch.int64 else []
    ids = [0, experts - 1, experts, experts + 1, -1, -2, limits.min, limits.max, *wrapping] * times
    case = Routing(torch.tensor(ids, dtype=dtype).view(-1, 2), torch.ones(len(ids) // 2, 2))
    check(case, experts, 16)
    slots = torch.arange(len(ids) // 2, dtype=torch.int32) % 3 - 1
    check(Routing(case.topk_ids, case.topk_weights, slots), experts, 16)


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("counts", [(0, 33, 0, 17), (17, 17, 17, 17), (0, 0, 0, 1), (16, 32, 48, 64), (129, 0, 0, 0)])
def test_tiles_of_full_short_and_empty_experts(counts: tuple[int, ...], height: int) -> None:
    """With one row more than a tile in every expert, the list holds the most that it can need."""
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    check(Routing(ids[torch.randperm(len(ids))][:, None], torch.ones(len(ids), 1)), 4, height)


@crossed(experts=[1, 6, 9], pairs=[1, 5, 49, 70], lora=[False, True], height=HEIGHTS)
def test_all_pairs_have_one_expert_or_none(experts: int, pairs: int, lora: bool, height: int) -> None:
    """The first or the last expert, so that all gaps come after or before it; also fewer pairs than experts."""
    slots = mixed_slots(pairs) if lora else None
    for expert in (0, experts - 1, experts):
        check(Routing(torch.full((pairs, 1), expert), torch.ones(pairs, 1), slots), experts, height)


@crossed(lora=[False, True], pairs=[0, 1, 5, 64, 66, 130], height=[16, 192])
def test_a_list_as_long_as_asked_for(lora: bool, pairs: int, height: int) -> None:
    """Of one length whatever the height of tiles, and by one tile longer than the least."""
    case = routing(pairs, 1, 7, slots=mixed_slots(pairs) if lora else None)
    for length in (least_length(pairs, 7, height) + 1, 7 + pairs // 16):
        check(case, 7, height, length)


def test_a_list_that_is_too_short() -> None:
    case = routing(100, 1, 3)
    with pytest.raises(
        ShapeError, match=r"list of tiles: got 8 tiles of 16 rows for 100 pairs and 3 experts, expected"
    ):
        launched(case, 3, 16, 8)
    launched(case, 3, 16, 9)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_more_pairs_than_a_program_takes_at_once(lora: bool) -> None:
    """Blocks of 4096 pairs; the last one is short."""
    tokens = 700 if INTERPRETED else 25_000
    check_large(routing(tokens, 6, 3, slots=mixed_slots(tokens) if lora else None), 3, 128)


@pytest.mark.parametrize("pairs", [60, 65, 300 if INTERPRETED else 20_000])
@pytest.mark.parametrize("slots", [1, 2, 40, 5000])
def test_one_expert_has_all_pairs(slots: int, pairs: int) -> None:
    """More than a program sorts at once; slots of no, one and several digits; and as many without an expert."""
    given = random_slots(pairs, slots)
    ids = torch.full((pairs, 1), 2)
    check_large(Routing(ids, torch.ones(pairs, 1), given), 4, 16)
    ids[torch.rand(pairs) < 0.5] = 9
    check_large(Routing(ids, torch.ones(pairs, 1), given), 4, 16)


@pytest.mark.parametrize("tokens", [20, 60])
def test_slots_are_values_and_never_an_index(tokens: int) -> None:
    """Any int32, in the order of the numbers; also such that differ in their highest digit only.

    Those that the context does not have are one.
    """
    limits = torch.iinfo(torch.int32)
    values = torch.tensor([limits.min, limits.min + 1, -(2**28), -2, -1, 0, 2**28, limits.max], dtype=torch.int32)
    slots = values[torch.randint(0, len(values), (tokens,))]
    for num_slots in (2**31 - 1, 2**28, 1, 0):
        check(replace(routing(tokens, 2, 3, slots=slots), num_slots=num_slots), 3, 16)


@crossed(tokens=[30, 200], slots=[1, 2, 5], experts=[1, 2, 5])
def test_segments_of_several_blocks_of_rows(tokens: int, slots: int, experts: int) -> None:
    """Experts of 32 rows and more: full, short and next to full segments; places fewer than pairs."""
    case = replace(routing(tokens, 2, experts, slots=random_slots(tokens, slots)), num_slots=slots)
    check(case, experts, 16)
    check(replace(case, slots=torch.zeros(tokens, dtype=torch.int32)), experts, 16)


# Keys are experts times slots, the base model's among them. Interpreted, with few experts.
@pytest.mark.parametrize("tokens", [8, 40] if INTERPRETED else [8, 40, 2000, 16_384])
@pytest.mark.parametrize("keys", [1023, 1024, 8191, 8192, 32_768, 131_072])
@pytest.mark.parametrize("most", [4] if INTERPRETED else [16, 512])
def test_many_keys(most: int, keys: int, tokens: int) -> None:
    experts = max(divisor for divisor in range(1, most + 1) if keys % divisor == 0)
    given = random_slots(tokens, keys // experts)
    check_large(routing(tokens, 8 if tokens > 40 else 2, experts, slots=given), experts, 16)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_no_tokens(lora: bool) -> None:
    empty = torch.zeros(0, dtype=torch.int32) if lora else None
    plan, tiles = launched(Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), empty), 3, 16)
    assert plan.rows.shape == plan.inverse.shape == (0,) and tiles.shape == (0, 4)
    assert plan.expert_offsets.tolist() == [0, 0, 0, 0]


def test_strided_ids() -> None:
    check(Routing(torch.randint(0, 4, (2, 11)).T, torch.ones(11, 2)), 4, 16)
