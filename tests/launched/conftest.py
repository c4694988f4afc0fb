"""Fixtures of tests that launch kernels, for `pytest.mark.usefixtures`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from tests.launched.cases import INTERPRETED, interpret


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, no_grad: None) -> None:
    """The marlin backend serves `DEVICE`, without gradients; see `interpret`."""
    if INTERPRETED:
        interpret(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _language_replaced_once() -> Iterator[None]:
    """Triton's interpreter replaces the functions of its language at every call between kernels' functions.

    Looking for them takes half of its time; here they are replaced once for each module, and stay.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    replace: Any = interpreter._patch_lang
    done: dict[int, Any] = {}

    def once(function: Any) -> Any:
        if id(function.__globals__) not in done:
            done[id(function.__globals__)] = replace(function)
        return Mock()  # which restores nothing

    with patch.object(interpreter, "_patch_lang", once):
        yield
