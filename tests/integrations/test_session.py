"""AdapterSession: names of rows and slots of tokens, and only while a forward lasts."""

from __future__ import annotations

import pytest
import torch

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.routing import BASE_SLOT
from quant_moelora.integrations.session import BASE_NAME, AdapterSession

CPU = torch.device("cpu")


def make_session(*names: str) -> AdapterSession:
    session = AdapterSession()
    session.slots = {name: slot for slot, name in enumerate(names)}
    return session


def slots_of(session: AdapterSession, tokens: int) -> list[int] | None:
    slots = session.token_slots(tokens, CPU)
    if slots is None:
        return None
    assert slots.dtype == torch.int32 and slots.shape == (tokens,)
    return slots.tolist()


def test_the_base_name_is_pefts() -> None:
    assert BASE_NAME == "__base__"


def test_without_a_choice_every_row_is_the_base() -> None:
    session = make_session("a")
    assert slots_of(session, 6) is None
    assert session.row_names(3) == [BASE_NAME] * 3
    with session.choose(None, 2, CPU):
        assert slots_of(session, 6) is None
        assert session.row_names(4) == [BASE_NAME] * 4


def test_slots_are_positions_of_the_names() -> None:
    session = make_session("a", "b", "c")
    with session.choose(["c", BASE_NAME, "a", "b"], 4, CPU):
        assert slots_of(session, 4) == [2, BASE_SLOT, 0, 1]
        assert session.row_names(4) == ["c", BASE_NAME, "a", "b"]


def test_a_row_has_consecutive_tokens() -> None:
    session = make_session("a", "b")
    with session.choose(("b", BASE_NAME), 2, CPU):
        assert slots_of(session, 6) == [1, 1, 1, -1, -1, -1]
        assert session.row_names(6) == ["b"] * 3 + [BASE_NAME] * 3


def test_fewer_names_serve_consecutive_rows() -> None:
    """Beams of one request lie side by side."""
    session = make_session("a", "b")
    with session.choose(["a", "b"], 6, CPU):
        assert session.row_names(6) == ["a", "a", "a", "b", "b", "b"]
        assert slots_of(session, 12) == [0] * 6 + [1] * 6


def test_the_choice_ends_with_the_forward() -> None:
    session = make_session("a")
    with session.choose(["a"], 1, CPU):
        assert slots_of(session, 2) == [0, 0]
    assert slots_of(session, 2) is None
    assert session.row_names(2) == [BASE_NAME] * 2


def test_the_choice_ends_when_the_forward_fails() -> None:
    session = make_session("a")
    with pytest.raises(RuntimeError, match="inside"), session.choose(["a"], 1, CPU):
        raise RuntimeError("inside")
    assert slots_of(session, 1) is None


def test_a_refused_choice_changes_nothing() -> None:
    session = make_session("a")
    with session.choose(["a"], 2, CPU):
        with pytest.raises(AdapterError), session.choose(["b"], 2, CPU):
            pass
        assert slots_of(session, 2) == [0, 0]


def test_a_choice_inside_another_hides_it_for_its_time() -> None:
    session = make_session("a", "b")
    with session.choose(["a", "b"], 2, CPU):
        assert slots_of(session, 2) == [0, 1]
        with session.choose(["b", "a"], 2, CPU):
            assert slots_of(session, 2) == [1, 0]
        assert slots_of(session, 2) == [0, 1]
        with session.choose(None, 2, CPU):
            assert slots_of(session, 2) is None
        assert slots_of(session, 2) == [0, 1]


def test_slots_of_one_forward_are_made_once() -> None:
    session = make_session("a", "b")
    with session.choose(["a", "b"], 2, CPU):
        first = session.token_slots(4, CPU)
        assert session.token_slots(4, CPU) is first
        assert slots_of(session, 8) == [0] * 4 + [1] * 4, "another length in the same forward"
        assert slots_of(session, 4) == [0, 0, 1, 1]
    with session.choose(["b", "a"], 2, CPU):
        assert slots_of(session, 4) == [1, 1, 0, 0]


def test_slots_are_on_the_device_asked_for(device: torch.device) -> None:
    session = make_session("a")
    with session.choose(["a"], 1, CPU):
        assert slots_of(session, 3) == [0, 0, 0]
        there = session.token_slots(3, device)
        assert there is not None and there.device.type == device.type and there.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("names", "batch", "match"),
    [
        (["a", "x", "y"], 3, r"unknown x, y.*__base__ or attached ones: a, b.*attach the adapter"),
        (["a", "b"], 3, r"2 names for 3 rows.*one name a row"),
        (["a", "b", "a"], 2, r"3 names for 2 rows"),
        ([], 2, r"0 names for 2 rows"),
    ],
)
def test_wrong_names(names: list[str], batch: int, match: str) -> None:
    session = make_session("a", "b")
    with pytest.raises(AdapterError, match=match), session.choose(names, batch, CPU):
        pass


def test_unknown_name_without_any_adapter() -> None:
    with pytest.raises(AdapterError, match=r"unknown a.*none is"), AdapterSession().choose(["a"], 1, CPU):
        pass


def test_tokens_that_cannot_be_told_apart() -> None:
    """Packed sequences: T is no multiple of the batch."""
    session = make_session("a")
    with session.choose(["a", BASE_NAME, "a"], 3, CPU):
        with pytest.raises(AdapterError, match="7 tokens for a batch of 3"):
            session.token_slots(7, CPU)
        with pytest.raises(AdapterError, match="7 tokens for a batch of 3"):
            session.row_names(7)
