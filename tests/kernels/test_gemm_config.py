"""Tiles of the grouped GEMM: whatever is asked, they cut the weight without a remainder."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest

from quant_moelora.kernels.grouped_gemm.config import choose_tile, expected_rows, is_direct, tile_rows
from quant_moelora.kernels.grouped_gemm.spec import Tile


class Model(NamedTuple):
    """Dimensions of a layer, as its weights are stored."""

    experts: int
    top_k: int
    hidden: int
    inter: int


MODELS = {
    "qwen3-30b": Model(128, 8, 2048, 768),
    "qwen3-next": Model(512, 10, 2048, 512),
    "mixtral": Model(8, 2, 4096, 14336),
    "deepseek-v3": Model(256, 8, 7168, 2048),
    "gpt-oss": Model(32, 4, 2880, 2880),  # 45 tiles: an odd number of steps of 64 columns, none of 128
    "llama4": Model(16, 1, 5120, 8192),
    "tiny": Model(4, 2, 128, 64),
    "one expert": Model(1, 1, 64, 64),
}
MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
HOPPER, ADA = (9, 0), (8, 9)  # the second has no room for the largest tiles
TOKENS = [*range(1, 130), *(m + d for m in (256, 512, 1024, 2048, 4096) for d in (-1, 0, 1))]


def tiles(model: Model, tokens: int) -> list[tuple[int, int, bool, bool, Tile]]:
    """Each tile that a layer can ask for, with what it was asked: n, k, fused, halves_apart."""
    pairs = tokens * model.top_k
    asked = [(2 * model.inter, model.hidden, fused, False) for fused in (False, True)]
    asked.append((2 * model.inter, model.hidden, False, True))
    asked += [(n, k, False, False) for n, k in ((model.inter, model.hidden), (model.hidden, model.inter))]
    return [
        (n, k, fused, apart, choose_tile(pairs, model.experts, n, k, bits, gpu, fused=fused, halves_apart=apart))
        for n, k, fused, apart in asked
        for bits in (4, 8)
        for gpu in (HOPPER, ADA)
    ]


@MODEL
def test_a_tile_cuts_the_weight(model: Model) -> None:
    for tokens in TOKENS:
        for n, k, fused, apart, tile in tiles(model, tokens):
            assert (n % tile.bn == 0 or tile.consumers) and k % tile.bk == 0 and tile.bk in (64, 128)
            assert tile.bn in ((64 * tile.consumers,) if tile.consumers else (64, 128, 256))
            assert not (tile.consumers and (apart or tile.split > 1)), "`specialized` has no loop for it"
            assert k // tile.bk % tile.split == 0 and tile.split >= 1
            assert not (fused and tile.split > 1), "partial sums of gate and up cannot be activated"
            as_many = tile.consumers or (n // 2 % (tile.bn // 2) == 0 and tile.bn >= 128)
            assert not fused or as_many, "as many rows of gate as of up"
            assert not apart or model.inter % tile.bn == 0, "a tile in both halves"
            assert tile.bm in (16, 32, 64, 128, 192)
            assert tile.stages >= 1 and tile.warps >= 1 and tile.group_m >= 1


@MODEL
def test_both_gemms_share_the_list_of_tiles(model: Model) -> None:
    for tokens in TOKENS:
        heights = {tile.bm for *_, tile in tiles(model, tokens)}
        assert heights == {tile_rows(tokens * model.top_k, model.experts, gpu) for gpu in (HOPPER, ADA)}


@MODEL
def test_the_activation_changes_no_sum(model: Model) -> None:
    """A row is bitwise the same with an adapter in the batch, when nothing is fused: sums may not be cut otherwise."""
    for tokens in TOKENS:
        pairs, n, k = tokens * model.top_k, 2 * model.inter, model.hidden
        plain, fused = (
            choose_tile(pairs, model.experts, n, k, 4, HOPPER, fused=fused, halves_apart=False)
            for fused in (False, True)
        )
        if plain.split == 1:  # otherwise the layer fuses nothing
            assert plain.split == fused.split and plain.bm == fused.bm


@MODEL
def test_the_same_question_has_the_same_answer(model: Model) -> None:
    for tokens in TOKENS[::7]:
        assert tiles(model, tokens) == tiles(model, tokens)


@MODEL
def test_more_pairs_never_get_lower_tiles(model: Model) -> None:
    heights = [tile_rows(pairs, model.experts, HOPPER) for pairs in range(1, 40000, 13)]
    assert all(a <= b or (a, b) == (192, 128) for a, b in itertools.pairwise(heights))
    assert heights[0] == 16 and (heights[-1] == 128 or model.experts > 250)


@MODEL
@pytest.mark.parametrize("gpu", [(8, 0), ADA, (10, 0), (12, 0)], ids=str)
def test_only_hopper_has_consumers(model: Model, gpu: tuple[int, int]) -> None:
    for tokens in TOKENS[::7]:
        pairs, n, k = tokens * model.top_k, 2 * model.inter, model.hidden
        for fused in (False, True):
            tile = choose_tile(pairs, model.experts, n, k, 4, gpu, fused=fused, halves_apart=False)
            assert not tile.consumers and tile.bm <= 128


@pytest.mark.parametrize(
    ("rows", "found"),
    [(64, (0, 128)), (96, (0, 128)), (97, (3, 192)), (192, (3, 192)), (193, (4, 128)), (4096, (4, 128))],
)
def test_who_multiplies_many_rows(rows: int, found: tuple[int, int]) -> None:
    tile = choose_tile(8 * rows, 8, 4096, 4096, 4, HOPPER, fused=True, halves_apart=False)
    assert (tile.consumers, tile.bm) == found


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (1, 128), (8, 128), (40, 8), (1000, 128), (4, 1)])
def test_expected_rows(pairs: int, experts: int) -> None:
    """Pairs over the experts that have any: each misses a pair with probability 1 - 1/E, independently."""
    active = sum(1.0 - ((experts - 1) / experts) ** pairs for _ in range(experts))
    assert math.isclose(expected_rows(pairs, experts), pairs / active, rel_tol=1e-12)
    assert expected_rows(1, experts) == pytest.approx(1.0)


def test_only_the_lowest_tiles_are_launched_during_the_kernel_before() -> None:
    assert [bm for bm in (16, 32, 64, 128) if Tile(bm, 128, 64).overlaps] == [16]


@pytest.mark.parametrize("experts", [1, 3, 4, 8, 128, 256, 512])
def test_few_pairs_are_taken_as_they_come(experts: int) -> None:
    direct = [pairs for pairs in range(1, 2 * experts) if is_direct(pairs, experts)]
    assert direct == [pairs for pairs in range(1, 2 * experts) if pairs <= experts // 4]
    # A tile of one pair each: the lowest there is.
    assert all(tile_rows(pairs, experts, HOPPER) == 16 for pairs in direct)
