"""QuantScheme: its names, its facts and what it refuses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import QuantScheme, num_groups


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "name"),
    [
        (4, 128, True, "w4a16_g128_sym"),
        (4, 32, False, "w4a16_g32_asym"),
        (8, None, True, "w8a16_channel_sym"),
        (8, None, False, "w8a16_channel_asym"),
    ],
)
def test_name(bits: int, group: int | None, symmetric: bool, name: str) -> None:
    assert QuantScheme(bits, group, symmetric, torch.bfloat16).name == name


@pytest.mark.parametrize(("bits", "zero"), [(4, 8), (8, 128)])
def test_symmetric_zero(bits: int, zero: int) -> None:
    assert QuantScheme(bits, 32, True, torch.float16).symmetric_zero == zero


@pytest.mark.parametrize(
    ("k", "group", "groups"),
    [(128, 32, 4), (129, 32, 5), (127, 32, 4), (1, 128, 1), (4096, None, 1), (96, 48, 2)],
)
def test_num_groups(k: int, group: int | None, groups: int) -> None:
    assert num_groups(k, group) == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits: got 3, expected 4 or 8; requantise"),
        ({"bits": 16}, "bits: got 16, expected 4 or 8"),
        ({"bits": 0}, "bits: got 0, expected 4 or 8"),
        ({"group_size": -1}, "group_size: got -1, expected a positive number .* or None .*; pass None where .* -1"),
        ({"group_size": 0}, "group_size: got 0, expected a positive"),
        ({"scale_dtype": torch.float32}, "scale_dtype: got torch.float32, expected torch.float16 or torch.bfloat16"),
        ({"scale_dtype": torch.int16}, "scale_dtype: got torch.int16, .*; store the scales as 16-bit floats"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"bits": 4, "group_size": 128, "symmetric": True, "scale_dtype": torch.float16}
    QuantScheme(**good)
    with pytest.raises(UnsupportedError, match=message):
        QuantScheme(**(good | change))


def test_frozen_and_compared_by_value() -> None:
    one = QuantScheme(4, 128, True, torch.float16)
    assert one == QuantScheme(4, 128, True, torch.float16)
    assert one != QuantScheme(4, 128, True, torch.bfloat16)
    with pytest.raises(FrozenInstanceError):
        one.bits = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_every_fact_must_be_stated() -> None:
    """No default for anything that a checkpoint must state."""
    with pytest.raises(TypeError, match=r"missing 4 required positional arguments"):
        QuantScheme()  # pyright: ignore[reportCallIssue]
