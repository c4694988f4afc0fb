"""MoELoRAContext: the tables it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_moelora.core.errors import ShapeError
from quant_moelora.core.lora_context import MoELoRAContext
from tests.builders import adapter, context, layer, scheme

A, E = 3, 4


def good() -> dict[str, Any]:
    return {
        "num_experts": E,
        "hidden_size": 64,
        "inter_pad": 128,
        "arena": torch.zeros(32, dtype=torch.bfloat16),
        "offsets": torch.full((A, 4, E), -1),
        "rank": torch.zeros(A, 3, E, dtype=torch.int32),
        "up_col": torch.zeros(A, E, dtype=torch.int32),
        "scaling": torch.zeros(A, 3, E),
        "max_rank": 3,
    }


def build(**changes: Any) -> MoELoRAContext:
    """A sound context, with some of its arguments changed."""
    return MoELoRAContext(**{**good(), **changes})


def test_facts() -> None:
    ctx = MoELoRAContext(**good())
    assert (ctx.num_slots, ctx.v13_width, ctx.v2_width) == (A, 6, 3)
    assert set(ctx.tensors()) == {"arena", "offsets", "rank", "up_col", "scaling"}
    assert ctx.shard is None


def test_no_adapters_at_all() -> None:
    tables = {name: tensor[:0] for name, tensor in good().items() if name in ("offsets", "rank", "up_col", "scaling")}
    assert build(arena=torch.zeros(0), **tables).num_slots == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arena_dtypes(dtype: torch.dtype) -> None:
    info = layer(scheme()).info
    ctx = context(info, [adapter(info, dtype, ranks={"gate": 2, "up": 3, "down": 1})], dtype)
    assert ctx.arena.dtype == dtype and ctx.num_slots == 1
    assert ctx.rank[0, :, 0].tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"inter_pad": -64}, "inter_pad: got -64"),
        ({"num_experts": 5}, r"offsets: got shape \[3, 4, 4\], expected \[3, 4, 5\] for A=3 adapters, E=5"),
        ({"arena": torch.zeros(4, 8)}, r"arena: got shape \[4, 8\], .*, expected one dimension of float32, bfloat16"),
        ({"arena": torch.zeros(32, dtype=torch.float64)}, "arena: got .* dtype torch.float64"),
        ({"arena": torch.zeros(32, dtype=torch.int32)}, "arena: .* dtype torch.int32, .*; let AdapterBank build it"),
        ({"offsets": torch.zeros(A, 3, E, dtype=torch.int64)}, r"offsets: got shape \[3, 3, 4\], expected \[3, 4, 4\]"),
        ({"offsets": torch.zeros(A, 4, E, dtype=torch.int32)}, "offsets: got dtype torch.int32, expected torch.int64"),
        ({"rank": torch.zeros(A, 4, E, dtype=torch.int32)}, r"rank: got shape \[3, 4, 4\], expected \[3, 3, 4\]"),
        ({"rank": torch.zeros(A, E, 3, dtype=torch.int32)}, r"rank: got shape \[3, 4, 3\], expected \[3, 3, 4\]"),
        ({"rank": torch.zeros(A, 3, E)}, "rank: got dtype torch.float32, expected torch.int32"),
        ({"up_col": torch.zeros(E, A, dtype=torch.int32)}, r"up_col: got shape \[4, 3\], expected \[3, 4\]"),
        ({"up_col": torch.zeros(A, E)}, "up_col: got dtype torch.float32"),
        ({"scaling": torch.zeros(A, E)}, r"scaling: got shape \[3, 4\], expected \[3, 3, 4\]"),
        (
            {"scaling": torch.zeros(A, 3, E, dtype=torch.bfloat16)},
            "scaling: got dtype torch.bfloat16, expected torch.fl",
        ),
        ({"scaling": torch.zeros(2, 3, E)}, r"scaling: got shape \[2, 3, 4\]"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    MoELoRAContext(**good())
    with pytest.raises(ShapeError, match=message):
        build(**change)


@pytest.mark.parametrize("field", ["arena", "offsets", "rank", "up_col", "scaling"])
def test_one_device(field: str) -> None:
    with pytest.raises(ShapeError, match=rf"devices: got .*{field} on meta"):
        build(**{field: good()[field].to("meta")})
