"""Parts of a layer: which sizes can be cut and how, and that parts hold exactly what the whole does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.shard import ParallelConfig, Span, split
from tests.builders import layer, scheme


@pytest.mark.parametrize(
    ("size", "parts", "unit", "sizes"),
    [
        (8, 2, 1, [4, 4]),
        (5, 4, 1, [2, 1, 1, 1]),
        (1408, 2, 64, [704, 704]),  # DeepSeek-V2-Lite, groups of 64 and fewer
        (1408, 2, 128, [768, 640]),  # with groups of 128, of which eleven cannot be halved
        (96, 2, 64, [64, 32]),
        (7, 1, 4, [7]),
    ],
)
def test_split(size: int, parts: int, unit: int, sizes: list[int]) -> None:
    spans = split("size", size, parts, unit)
    assert sorted(span.size for span in spans) == sorted(sizes)
    assert [span.begin for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == size and all(span.begin % unit == 0 for span in spans)


def test_a_group_is_not_cut() -> None:
    with pytest.raises(UnsupportedError, match=r"got 6 units of 128 .*expected 1 to 6 .*1, 2, 3, 6 get equal"):
        split("intermediate size", 768, 8, 128)


@pytest.mark.parametrize("config", [{"tp_rank": 2, "tp_size": 2}, {"ep_rank": -1}])
def test_a_rank_that_is_not_there(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="_rank: got"):
        ParallelConfig(**config)


def parts_of(info: MoEQuantInfo, tp: int, ep: int) -> list[MoEQuantInfo]:
    return [info.part(ParallelConfig(t, tp, e, ep)) for e in range(ep) for t in range(tp)]


def put_together(parts: list[MoEQuantInfo], whole: MoEQuantInfo) -> list[Tensor]:
    """Gate, up and down of all parts, each value where `Shard` says that it belongs; NaN where nobody has one."""
    experts, hidden, inter = whole.num_experts, whole.hidden_size, whole.intermediate_size
    made = [torch.full(shape, torch.nan) for shape in 2 * [(experts, inter, hidden)] + [(experts, hidden, inter)]]
    for part in parts:
        assert part.shard is not None
        positions = torch.arange(part.shard.inter.begin, part.shard.inter.end).expand(part.num_experts, -1)
        if part.inter_perm is not None:
            positions = part.inter_perm.long().sort(1).values
        for own, expert in enumerate(range(part.shard.experts.begin, part.shard.experts.end)):
            for value, to in zip(part.dequantize(), made, strict=True):
                assert value is not None
                place = to[expert] if to is not made[2] else to[expert].T
                held = value[own] if to is not made[2] else value[own].T
                assert place[positions[own]].isnan().all(), "held twice"
                place[positions[own]] = held
    return made


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "quant", [scheme(4, 32), scheme(4, 128, symmetric=False), scheme(8, None), scheme(8, 16), torch.bfloat16], ids=str
)
def test_parts_hold_what_the_whole_does(quant: QuantScheme | torch.dtype, act_order: bool) -> None:
    built = layer(quant, experts=3, hidden=96, inter=352, act_order=act_order, bias=True)
    parts = parts_of(built.info, tp=2, ep=2)
    for made, value in zip(put_together(parts, built.info), built.info.dequantize(), strict=True):
        assert value is not None and torch.equal(made, value)
    rows, columns = built.info.biases()
    assert rows is not None and columns is not None
    for part in parts:
        assert part.shard is not None
        _, bias = part.biases()
        if part.shard.config.tp_rank:
            assert bias is None, "the sum would add it once more"
        else:
            assert bias is not None and torch.equal(bias, columns[part.shard.experts.slice])


def test_a_part_keeps_nothing_of_the_whole_in_memory() -> None:
    info = layer(scheme(4, 32), experts=4, hidden=128, inter=256, act_order=True, bias=True).info
    part = info.part(ParallelConfig(1, 2, 0, 2))
    assert sum(tensor.untyped_storage().nbytes() for tensor in part.tensors().values()) == part.nbytes
    assert part.nbytes < info.nbytes / 4 + 1e4  # k_perm is not cut along the intermediate


def test_a_part_is_checked() -> None:
    info = layer(scheme(4, 32), experts=4, inter=128).info
    part = info.part(ParallelConfig(0, 2, 0, 2))
    with pytest.raises(UnsupportedError, match="expected a whole layer"):
        part.part(ParallelConfig(0, 2))
    with pytest.raises(ShapeError, match="shard: got 4 experts and an intermediate size of 128, expected 2 and 64"):
        MoEQuantInfo(w13=info.w13, w2=info.w2, activation=info.activation, shard=part.shard)


def test_columns_of_b2() -> None:
    info = layer(scheme(4, 32), experts=2, hidden=192, inter=128).info
    spans = [info.part(ParallelConfig(t, 2, fully_sharded_lora=True)).shard for t in range(2)]
    assert [shard.hidden(192) for shard in spans if shard] == [Span(0, 128), Span(128, 192)]
    plain = info.part(ParallelConfig(1, 2)).shard
    assert plain is not None and plain.hidden(192) == Span(0, 192)
