"""The four parts of a message, the hierarchy, and the checks that raise."""

from __future__ import annotations

import pytest
import torch

from quant_moelora.core import errors
from quant_moelora.core.checks import check_positive, check_same_device, check_tensor

ALL = (
    errors.ShapeError,
    errors.FormatError,
    errors.MissingTensorError,
    errors.UnsupportedError,
    errors.AdapterError,
    errors.BackendError,
)


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_message_has_all_four_parts(error: type[errors.QuantMoELoRAError]) -> None:
    raised = error("bits", got=3, rule="4 or 8", remedy="requantise")
    assert str(raised) == "bits: got 3, expected 4 or 8; requantise"
    assert (raised.what, raised.got, raised.rule, raised.remedy) == ("bits", 3, "4 or 8", "requantise")
    assert isinstance(raised, errors.QuantMoELoRAError) and isinstance(raised, ValueError)


@pytest.mark.parametrize("part", ["got", "rule", "remedy"])
def test_no_part_can_be_forgotten(part: str) -> None:
    parts = {"got": "1", "rule": "2", "remedy": "3"}
    del parts[part]
    with pytest.raises(TypeError, match=part):
        errors.ShapeError("x", **parts)


def test_a_missing_tensor_is_a_format_error() -> None:
    assert issubclass(errors.MissingTensorError, errors.FormatError)


def test_check_tensor() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.int32)
    check_tensor("codes", tensor, (2, 3), torch.int32, why="E=2")
    with pytest.raises(errors.ShapeError, match=r"codes: got shape \[2, 3\], expected \[3, 2\] for E=3; .*unpacked"):
        check_tensor("codes", tensor, (3, 2), torch.int32, why="E=3")
    with pytest.raises(errors.ShapeError, match=r"codes: got shape \[2, 3\], expected \[2, 3, 1\] for E=2"):
        check_tensor("codes", tensor, (2, 3, 1), torch.int32, why="E=2")
    with pytest.raises(
        errors.ShapeError, match=r"codes: got dtype torch.int32, expected torch.int64 for E=2; .*\.to\(dtype\)"
    ):
        check_tensor("codes", tensor, (2, 3), torch.int64, why="E=2")


def test_check_same_device() -> None:
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    check_same_device({})
    check_same_device({"a": here, "b": here})
    with pytest.raises(
        errors.ShapeError, match=r"devices: got a on cpu, b on meta, expected one device .*\.to\(device"
    ):
        check_same_device({"a": here, "b": there})


def test_check_positive() -> None:
    check_positive(n=1, k=7)
    with pytest.raises(errors.ShapeError, match=r"k: got 0, expected at least 1"):
        check_positive(n=1, k=0)
    with pytest.raises(errors.ShapeError, match=r"n: got -4, expected at least 1"):
        check_positive(n=-4, k=1)
