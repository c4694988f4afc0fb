"""Tiles of the dense grouped GEMM, and what becomes of a weight in another dtype."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.kernels.dense_gemm.config import choose_tile, shared_bytes, tile_rows
from quant_moelora.kernels.dense_gemm.prepare import cast, cast_layer
from tests.builders import dense, layer, roundoff, same_bits, scheme

GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SHARED = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}  # of a block; 99 KB of all others
PAIRS = (*range(1, 300), 1000, 8192, 32768, 10**6)
WEIGHTS = ((1536, 2048), (2048, 768), (28672, 4096), (5760, 2880), (2880, 2880), (40, 72), (72, 33))


@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize("experts", [1, 8, 33, 256])
def test_tiles(experts: int, gpu: tuple[int, int]) -> None:
    """Each fits the GPU, both products of a layer share the height, and more pairs never have lower tiles."""
    before = 16
    for pairs in PAIRS:
        bm = tile_rows(pairs, experts)
        assert before <= bm <= 128
        before = bm
        for n, k in WEIGHTS:
            tile = choose_tile(pairs, experts, n, k, gpu)
            assert tile.bm == bm and tile.bn in (64, 128, 256) and tile.bk in (64, 128)
            assert shared_bytes(tile) <= SHARED.get(gpu, 99 << 10)
            assert tile.bm * tile.bn <= 128 * 32 * tile.warps, "sums fit 128 registers of a thread"
            assert tile.bn // 64 * 4 >= tile.warps, "each warpgroup has rows of the weight of its own"
            assert not (tile.mixed or tile.consumers or tile.registers) and tile.split == 1, "`DenseSpec.tile`"
    assert before == 128


STORED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("stored", "dtype"), [*itertools.product(STORED, STORED)], ids=str)
def test_a_cast(stored: torch.dtype, dtype: torch.dtype) -> None:
    """None where there is nothing to cast; otherwise torch's, with what it loses in words."""
    weight = dense(stored, experts=3, halves=2, n=5, k=7).weight
    made, loss = cast(weight, dtype)
    assert same_bits(made, weight.w.to(dtype))
    assert (made.data_ptr() == weight.w.data_ptr()) == (stored == dtype)
    if dtype in (stored, torch.float32) or torch.equal(
        made.double(), weight.w.double()
    ):  # none is below float16's range
        assert loss is None
        return
    assert loss is not None
    words, _, error = loss.partition(", by at most ")
    names = [str(d).removeprefix("torch.") for d in (stored, dtype)]
    assert words == f"weights rounded from {names[0]} to {names[1]}" and error.endswith(" of the largest")
    worst = (made.double() - weight.w.double()).abs().max() / weight.w.abs().max().double()
    assert float(error.split()[0]) == pytest.approx(float(worst), rel=0.06) and worst <= roundoff(dtype)


def test_a_cast_that_loses_nothing_says_nothing() -> None:
    weight = dense(torch.bfloat16).weight
    wide = replace(weight, w=weight.w.to(torch.float32))
    assert cast(wide, torch.bfloat16)[1] is None


def test_a_cast_beyond_the_range() -> None:
    weight = dense(torch.bfloat16).weight
    weight.w[1, 2, 3] = 70000.0
    with pytest.raises(
        UnsupportedError, match=r"weights: got up to 70144.0, expected at most 65504.0, the largest float16"
    ):
        cast(weight, torch.float16)


def test_both_weights_of_a_layer() -> None:
    info = layer(torch.float32, experts=2).info
    tensors, loss = cast_layer(info, torch.bfloat16)
    assert set(tensors) == {"w13.w", "w2.w"} and loss is not None
    assert [part.split(":")[0] for part in loss.split("; ")] == ["w13", "w2"]
    assert cast_layer(info, torch.float32)[1] is None
    with pytest.raises(AssertionError):
        cast_layer(layer(scheme(4, 32)).info, torch.bfloat16)
