"""align against a slow statement of the Plan, and the promises of its docstring one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_moelora.core.routing import Plan, Routing
from quant_moelora.kernels.align.reference import align
from tests.builders import move, routing

Segment = tuple[int, int, int, int]  # expert, first sorted row, rows, slot
NONE: Segment = (0, 0, 0, 0)
MOST = 32  # rows of a segment


def slow_align(routing: Routing, num_experts: int) -> tuple[list[int], list[int], list[int], list[Segment]]:
    """rows, inverse, expert_offsets and segments, by hand."""
    ids, known = routing.topk_ids.flatten().tolist(), range(-1, routing.num_slots)
    slots = [-1] * routing.num_tokens if routing.slots is None else routing.slots.tolist()
    slots = [slot if slot in known else routing.num_slots for slot in slots]
    rows: list[int] = []
    offsets = [0]
    places = min(len(ids), num_experts * (routing.num_slots + 2) + len(ids) // MOST)
    segments = [NONE] * places
    for expert in range(num_experts):
        mine = [pair for pair, chosen in enumerate(ids) if chosen == expert]
        place = min(len(rows), expert * (routing.num_slots + 2) + len(rows) // MOST)
        assert segments[place:] == [NONE] * (places - place), "lower experts' segments come before"
        for slot in sorted({slots[pair // routing.top_k] for pair in mine}):
            held = [pair for pair in mine if slots[pair // routing.top_k] == slot]
            for first in range(0, len(held), MOST):
                assert place < places
                segments[place] = (expert, len(rows) + first, len(held[first : first + MOST]), slot)
                place += 1
            rows += held
        offsets.append(len(rows))
    rows += [pair for pair, chosen in enumerate(ids) if not 0 <= chosen < num_experts]
    inverse = [rows.index(pair) for pair in range(len(ids))]
    return rows, inverse, offsets, segments


def segments_of(plan: Plan) -> Tensor:
    assert plan.segments is not None  # only a plan that can have no adapter is without
    return plan.segments


def check(plan: Plan, routing: Routing, num_experts: int) -> None:
    rows, inverse, offsets, segments = slow_align(routing, num_experts)
    for tensor in (plan.rows, plan.inverse, plan.expert_offsets, segments_of(plan)):
        assert tensor.dtype == torch.int32 and tensor.device == routing.topk_ids.device
    assert plan.rows.tolist() == rows
    assert plan.inverse.tolist() == inverse
    assert plan.expert_offsets.tolist() == offsets
    assert segments_of(plan).shape == (len(segments), 4)
    assert [tuple(row) for row in segments_of(plan).tolist()] == segments


def mixed_slots(tokens: int) -> Tensor:
    return torch.randint(-1, 3, (tokens,), dtype=torch.int32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 1, 1), (0, 8, 4), (1, 1, 1), (1, 1, 5), (1, 8, 3), (5, 1, 4), (9, 2, 1), (17, 3, 4), (40, 4, 64), (64, 2, 2)],
)
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("holes", [False, True], ids=["full", "holes"])
def test_against_the_slow_statement(
    device: torch.device, tokens: int, top_k: int, experts: int, lora: bool, holes: bool
) -> None:
    case = routing(tokens, top_k, experts, slots=mixed_slots(tokens) if lora else None, holes=holes)
    case = move(case, device)
    check(align(case, experts), case, experts)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    tokens, top_k, experts = (data.draw(st.integers(low, high)) for low, high in ((0, 12), (1, 4), (1, 6)))
    # Ids at and about both ends of the range, and the largest of the dtype.
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    extremes = [torch.iinfo(dtype).min, -2, -1, experts, experts + 1, torch.iinfo(dtype).max]
    one_id = st.one_of(st.integers(0, experts - 1), st.sampled_from(extremes))
    one_slot = st.one_of(st.integers(-1, 3), st.just(2**31 - 2))
    ids = data.draw(st.lists(st.lists(one_id, min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens))
    slots = data.draw(st.none() | st.lists(one_slot, min_size=tokens, max_size=tokens))
    case = Routing(
        torch.tensor(ids, dtype=dtype).view(tokens, top_k),
        torch.ones(tokens, top_k),
        None if slots is None else torch.tensor(slots, dtype=torch.int32),
        data.draw(st.sampled_from([0, 1, 3, 2**31 - 1])),
    )
    check(align(case, experts), case, experts)


def test_stable_within_a_segment() -> None:
    """All pairs of one expert and slot: they stay in the order of the pairs."""
    case = Routing(torch.zeros(50, 2, dtype=torch.int32), torch.ones(50, 2), torch.full((50,), 2, dtype=torch.int32))
    plan = align(case, 3)
    assert plan.rows.tolist() == list(range(100))
    assert segments_of(plan)[:5].tolist() == [[0, 0, 32, 2], [0, 32, 32, 2], [0, 64, 32, 2], [0, 96, 4, 2], [*NONE]]


def test_slots_order_within_an_expert_and_base_goes_first() -> None:
    case = Routing(
        torch.tensor([[1], [0], [1], [1], [0]]), torch.ones(5, 1), torch.tensor([2, 1, -1, 0, -1], dtype=torch.int32)
    )
    plan = align(case, 2)
    assert plan.rows.tolist() == [4, 1, 2, 3, 0]
    assert segments_of(plan).tolist() == [[0, 0, 1, -1], [0, 1, 1, 1], [1, 2, 1, -1], [1, 3, 1, 0], [1, 4, 1, 2]]


def test_where_segments_of_an_expert_begin() -> None:
    """At its first row, or where all slots of lower experts would end, whichever is lower."""
    ids = torch.tensor([[3], [0], [0], [0], [3], [5], [1], [1]])
    slots = torch.tensor([1, 2, -1, 2, 1, 0, 4, 3], dtype=torch.int32)
    case = Routing(ids, torch.ones(8, 1), slots)
    plan = align(case, 5)
    assert plan.expert_offsets.tolist() == [0, 3, 5, 5, 7, 7]
    first, second, fourth = [[0, 0, 1, -1], [0, 1, 2, 2]], [[1, 3, 1, 3], [1, 4, 1, 4]], [[3, 5, 2, 1]]
    assert segments_of(plan).tolist() == [*first, [*NONE], *second, *fourth, [*NONE], [*NONE]]
    few = Routing(torch.zeros(500, 1, dtype=torch.int64), torch.ones(500, 1), torch.zeros(500, dtype=torch.int32), 2)
    assert len(segments_of(align(few, 3))) == 3 * 4 + 500 // MOST


def test_slots_that_there_are_not_are_one() -> None:
    slots = torch.tensor([2, -2, 3, 1, 2**31 - 1, -1], dtype=torch.int32)
    plan = align(Routing(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), slots, num_slots=3), 1)
    assert plan.rows.tolist() == [5, 3, 0, 1, 2, 4]
    assert segments_of(plan).tolist()[:4] == [[0, 0, 1, -1], [0, 1, 1, 1], [0, 2, 1, 2], [0, 3, 3, 3]]


def test_the_last_slot_of_an_expert_stays_with_it() -> None:
    """The largest slot of expert 0 and the base of expert 1 are neighbours in the order, and not mixed up."""
    top = 2**31 - 1
    case = Routing(torch.tensor([[1], [0], [0]]), torch.ones(3, 1), torch.tensor([-1, top, -1], dtype=torch.int32))
    plan = align(case, 2)
    assert segments_of(plan).tolist() == [[0, 0, 1, -1], [0, 1, 1, top], [1, 2, 1, -1]]
    assert plan.rows.tolist() == [2, 1, 0]


@pytest.mark.parametrize("missing", [-1, -(2**31), 4, 5, 2**31 - 1])
def test_ids_out_of_range_come_last_and_in_no_segment(missing: int) -> None:
    ids = torch.tensor([[missing, 3], [0, missing], [missing, missing]], dtype=torch.int32)
    plan = align(Routing(ids, torch.ones(3, 2), torch.tensor([1, 0, 2], dtype=torch.int32)), 4)
    assert plan.rows.tolist() == [2, 1, 0, 3, 4, 5]
    assert plan.expert_offsets.tolist() == [0, 1, 1, 1, 2]
    assert segments_of(plan).tolist() == [[0, 0, 1, 0], [3, 1, 1, 1], *[[*NONE]] * 4]


def test_no_pair_has_an_expert() -> None:
    plan = align(Routing(torch.full((3, 2), -1), torch.ones(3, 2)), 4)
    assert plan.rows.tolist() == list(range(6))
    assert plan.expert_offsets.tolist() == [0] * 5
    assert segments_of(plan).tolist() == [[*NONE]] * 6


def test_no_tokens() -> None:
    plan = align(Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)), 3)
    assert plan.rows.shape == plan.inverse.shape == (0,)
    assert plan.expert_offsets.tolist() == [0, 0, 0, 0]
    assert segments_of(plan).tolist() == []


def test_no_slots_and_all_base_slots_are_the_same() -> None:
    case = routing(23, 3, 4)
    base = Routing(case.topk_ids, case.topk_weights, torch.full((23,), -1, dtype=torch.int32))
    for name in ("rows", "inverse", "expert_offsets", "segments"):
        assert torch.equal(getattr(align(case, 4), name), getattr(align(base, 4), name))


def test_every_pair_has_a_segment_of_its_own() -> None:
    """The most segments there can be."""
    case = Routing(torch.arange(6).view(6, 1), torch.ones(6, 1), torch.arange(6, dtype=torch.int32))
    plan = align(case, 6)
    assert segments_of(plan).tolist() == [[i, i, 1, i] for i in range(6)]


def test_router_weights_are_not_looked_at() -> None:
    case = routing(9, 2, 4)
    other = Routing(case.topk_ids, torch.full((9, 2), torch.nan))
    assert torch.equal(align(case, 4).rows, align(other, 4).rows)


def test_strided_ids() -> None:
    ids = torch.randint(0, 4, (2, 11)).T
    case, packed = Routing(ids, torch.ones(11, 2)), Routing(ids.contiguous(), torch.ones(11, 2))
    assert torch.equal(align(case, 4).rows, align(packed, 4).rows)
