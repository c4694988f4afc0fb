"""Routing and Plan: what they hold and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant_moelora.core.errors import ShapeError
from quant_moelora.core.routing import Plan, Routing


def good_routing() -> dict[str, Any]:
    return {
        "topk_ids": torch.zeros(5, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(5, 2),
        "slots": torch.zeros(5, dtype=torch.int32),
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts(dtype: torch.dtype) -> None:
    routing = Routing(torch.zeros(5, 2, dtype=dtype), torch.zeros(5, 2))
    assert (routing.num_tokens, routing.top_k, routing.num_pairs) == (5, 2, 10)
    assert routing.slots is None
    empty = Routing(torch.zeros(0, 2, dtype=dtype), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int32))
    assert (empty.num_tokens, empty.top_k, empty.num_pairs) == (0, 2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.zeros(5, dtype=torch.int32)}, r"topk_ids: got shape \[5\], dtype torch.int32, expected \["),
        ({"topk_ids": torch.zeros(1, 5, 2, dtype=torch.int32)}, r"topk_ids: got shape \[1, 5, 2\]"),
        (
            {"topk_ids": torch.zeros(5, 2)},
            r"topk_ids: .* dtype torch.float32, expected \[tokens, k\] of int32 or int64",
        ),
        ({"topk_ids": torch.zeros(5, 2, dtype=torch.uint8)}, r"topk_ids: .* dtype torch.uint8"),
        (
            {"topk_weights": torch.zeros(2, 5)},
            r"topk_weights: got shape \[2, 5\], expected \[5, 2\] for one",
        ),
        ({"topk_weights": torch.zeros(5, 2, 1)}, r"topk_weights: got shape \[5, 2, 1\]"),
        ({"topk_weights": torch.zeros(5, 2, dtype=torch.bfloat16)}, "topk_weights: got dtype torch.bfloat16, expected"),
        (
            {"slots": torch.zeros(5, 2, dtype=torch.int32)},
            r"slots: got shape \[5, 2\], expected \[5\] for one",
        ),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, r"slots: got shape \[4\], expected \[5\]"),
        ({"slots": torch.zeros(5, dtype=torch.int64)}, "slots: got dtype torch.int64, expected torch.int32"),
        (
            {"topk_weights": torch.zeros(5, 2, device="meta")},
            "devices: got .*topk_weights on meta.*expected one device",
        ),
        ({"slots": torch.zeros(5, dtype=torch.int32, device="meta")}, "devices: got .*slots on meta"),
    ],
)
def test_routing_refuses(change: dict[str, Any], message: str) -> None:
    Routing(**good_routing())
    with pytest.raises(ShapeError, match=message):
        Routing(**(good_routing() | change))


def good_plan(pairs: int = 6, experts: int = 3) -> Plan:
    return Plan(
        rows=torch.zeros(pairs, dtype=torch.int32),
        inverse=torch.zeros(pairs, dtype=torch.int32),
        expert_offsets=torch.zeros(experts + 1, dtype=torch.int32),
        segments=torch.zeros(pairs, 4, dtype=torch.int32),
    )


@pytest.mark.parametrize("field", ["rows", "inverse", "expert_offsets", "segments"])
def test_plan_refuses_another_dtype(field: str) -> None:
    plan = good_plan()
    with pytest.raises(ShapeError, match=rf"{field}: got dtype torch.int64, expected torch.int32"):
        replace(plan, **{field: getattr(plan, field).to(torch.int64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inverse": torch.zeros(5, dtype=torch.int32)},
            r"inverse: got shape \[5\], expected \[6\] for one for each pair",
        ),
        ({"rows": torch.zeros(6, 1, dtype=torch.int32)}, r"rows: got shape \[6, 1\], expected \[6\]"),
        ({"segments": torch.zeros(6, 3, dtype=torch.int32)}, r"segments: got shape \[6, 3\], expected \[6, 4\]"),
        ({"segments": torch.zeros(24, dtype=torch.int32)}, r"segments: got shape \[24\], expected \[24, 4\]"),
        ({"expert_offsets": torch.zeros(4, 1, dtype=torch.int32)}, r"expert_offsets: got shape \[4, 1\]"),
    ],
)
def test_plan_refuses_another_shape(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(good_plan(), **change)


@pytest.mark.parametrize("field", ["rows", "inverse", "expert_offsets", "segments"])
def test_plan_refuses_several_devices(field: str) -> None:
    plan = good_plan()
    with pytest.raises(ShapeError, match=rf"devices: got .*{field} on meta"):
        replace(plan, **{field: getattr(plan, field).to("meta")})
