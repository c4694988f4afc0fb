"""Workspace: buffers that are reused, and when they must not be."""

from __future__ import annotations

import pytest
import torch

from quant_moelora.core.errors import BackendError
from quant_moelora.core.workspace import Workspace

CPU = torch.device("cpu")


@torch.no_grad()
def test_a_buffer_is_reused_while_it_suffices() -> None:
    ws = Workspace(CPU)
    first = ws.buffer("y", (4, 6), torch.float32)
    first.fill_(3)
    smaller = ws.buffer("y", (2, 6), torch.float32)
    assert smaller.data_ptr() == first.data_ptr()
    assert smaller.tolist() == [[3.0] * 6] * 2
    again = ws.buffer("y", (6, 4), torch.float32)
    assert again.shape == (6, 4) and again.is_contiguous() and again.data_ptr() == first.data_ptr()
    assert ws.nbytes == 24 * 4


@torch.no_grad()
def test_a_buffer_grows() -> None:
    ws = Workspace(CPU)
    small = ws.buffer("y", (2, 3), torch.float32).fill_(1)
    large = ws.buffer("y", (5, 3), torch.float32)
    assert large.data_ptr() != small.data_ptr()
    assert ws.nbytes == 15 * 4
    assert ws.buffer("y", (2, 3), torch.float32).data_ptr() == large.data_ptr()


@torch.no_grad()
def test_names_and_dtypes_are_kept_apart() -> None:
    ws = Workspace(CPU)
    places = {
        ws.buffer(name, (8,), dtype).data_ptr() for name in ("h", "y") for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(places) == 4
    assert ws.nbytes == 2 * 8 * 4 + 2 * 8 * 2


@torch.no_grad()
def test_last() -> None:
    ws = Workspace(CPU)
    with pytest.raises(KeyError, match=r"v"):
        ws.last("v")
    ws.buffer("v", (8,), torch.float32)
    latest = ws.buffer("v", (2, 2), torch.float32)
    ws.buffer("w", (3,), torch.float32)
    assert ws.last("v") is latest


@torch.no_grad()
def test_an_empty_buffer() -> None:
    assert Workspace(CPU).buffer("y", (0, 64), torch.float32).shape == (0, 64)


def test_every_call_makes_a_new_tensor_while_autograd_records() -> None:
    ws = Workspace(CPU)
    first = ws.buffer("y", (4,), torch.float32)
    second = ws.buffer("y", (4,), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    assert ws.last("y") is second
    with torch.no_grad():
        assert ws.buffer("y", (4,), torch.float32).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_inference_mode_and_no_grad_take_turns() -> None:
    """A buffer first made under inference_mode is still written to under no_grad, and the other way about."""
    ws = Workspace(CPU)
    with torch.inference_mode():
        ws.buffer("y", (4,), torch.float32).fill_(1)
    with torch.no_grad():
        ws.buffer("y", (4,), torch.float32).fill_(2)
    with torch.inference_mode():
        assert ws.buffer("y", (4,), torch.float32).fill_(3).tolist() == [3.0] * 4


@torch.no_grad()
def test_growing_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check stands before any allocation, so that it can be met without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ws = Workspace(CPU)
    warm = ws.buffer("y", (6,), torch.float32)
    ws.device = torch.device("cuda")
    with pytest.raises(BackendError, match=r"workspace buffer y: got a request for 12 elements while capturing a CUDA"):
        ws.buffer("y", (3, 4), torch.float32)
    with pytest.raises(
        BackendError, match=r"expected at most the 6 elements warmed up; run one forward of the largest"
    ):
        ws.buffer("y", (3, 4), torch.float32)
    with pytest.raises(BackendError, match=r"buffer h: .*expected at most the 0 elements warmed up"):
        ws.buffer("h", (1,), torch.float32)
    assert ws.buffer("y", (2, 3), torch.float32).data_ptr() == warm.data_ptr()  # what was warmed up serves
