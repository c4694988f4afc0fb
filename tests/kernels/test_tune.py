"""The tuner's decisions, with times that are made up: what is tried, who wins, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from quant_moelora.core.errors import BackendError, UnsupportedError
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.kernels.common.launch import capability
from quant_moelora.kernels.common.sample import blank_info, copies, launches
from quant_moelora.kernels.grouped_gemm import tune
from quant_moelora.kernels.grouped_gemm.candidates import GEMMS, Cut, Gemm, candidates, cuts_of, launchable, tiles_of
from quant_moelora.kernels.grouped_gemm.config import formula
from quant_moelora.kernels.grouped_gemm.layer import LayerTiles, layer_faults
from quant_moelora.kernels.grouped_gemm.table import Entry
from quant_moelora.kernels.grouped_gemm.tune import GAIN, Problem

HOPPER, ADA = (9, 0), (8, 9)
HERE = capability(torch.device("cpu"))  # for which a `FakePoint` asks
LAYERS = {"qwen3": (128, 2048, 768), "mixtral": (8, 4096, 14336), "gpt-oss": (32, 2880, 2880), "tiny": (4, 64, 64)}
PAIRS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
EACH_LAYER = pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)


def problem(sizes: tuple[int, int, int] = LAYERS["qwen3"], *, bits: int = 4, top_k: int = 1) -> Problem:
    scheme = QuantScheme(bits, 32 if sizes == LAYERS["tiny"] else 128, symmetric=False, scale_dtype=torch.bfloat16)
    return Problem(blank_info(*sizes, scheme), top_k, torch.bfloat16)


# --- what is tried ----------------------------------------------------------------------------------------------------


@EACH_LAYER
@pytest.mark.parametrize("gpu", [HOPPER, ADA])
def test_candidates(sizes: tuple[int, int, int], gpu: tuple[int, int]) -> None:
    for one in (problem(sizes), problem(sizes, bits=8), problem(sizes).with_act_order()):
        for pairs in PAIRS:
            shape, own = one.shape, formula(one.shape, pairs, gpu)
            found = candidates(shape, pairs, gpu)
            assert found == candidates(shape, pairs, gpu)
            assert {gemm: cuts[0] for gemm, cuts in found.items()} == cuts_of(own)
            for gemm, cuts in found.items():
                assert 1 <= len(cuts) <= 64 and len(set(cuts)) == len(cuts)
                assert all(launchable(cut, gemm, shape, gpu) for cut in cuts)
                heights = {cut.tile.bm for cut in cuts}
                assert (
                    heights == {own.bm}
                    if own.direct
                    else heights <= ({own.bm // 2, own.bm, own.bm * 2} | ({64, 128, 192} if own.bm >= 128 else set()))
                )
            # Any two of one height are a layer's tiles, with adapters and without.
            for w13 in found["w13"]:
                same = next((cut for cut in found["w2"] if cut.tile.bm == w13.tile.bm), None)
                if same is not None:
                    tiles = tiles_of(w13, same, own)
                    assert layer_faults(tiles, shape, gpu) == [] and cuts_of(tiles) == {"w13": w13, "w2": same}


def test_an_unfused_first_gemm_is_tried_split_only() -> None:
    cuts = candidates(problem().shape, 8, HOPPER)["w13"]
    assert {cut.fused for cut in cuts} == {True, False}
    assert all(cut.tile.split > 1 for cut in cuts if not cut.fused)
    assert not any(cut.fused for cut in candidates(problem().with_act_order().shape, 8, HOPPER)["w13"])


# --- who wins ---------------------------------------------------------------------------------------------------------

Price = Callable[[Gemm, Cut], float]


def noted(gemm: Gemm, cut: Cut) -> tuple[Gemm, Cut]:
    return gemm, cut


class FakePoint(tune.Point):
    """Launches that only say what they are."""

    def __init__(self, one: Problem, pairs: int, unusable: Sequence[Cut] = ()) -> None:
        self.weights = tune.Weights(one, torch.device("cpu"))
        self.pairs = pairs
        self._unusable = unusable

    def calls(self, gemm: Gemm, cut: Cut) -> list[Callable[[], object]]:
        return [partial(noted, gemm, cut)]

    def usable(self, gemm: Gemm, cuts: Sequence[Cut]) -> list[Cut]:
        return [cut for cut in cuts if cut not in self._unusable]


def tuned(
    one: Problem,
    pairs: int,
    price: Price,
    unusable: Sequence[Cut] = (),
    failed: frozenset[tuple[Gemm, Cut]] = frozenset(),
) -> tuple[Entry, list[int]]:
    """The entry, where a launch takes what ``price`` says; and the rounds of each measurement."""
    rounds: list[int] = []

    def clock(works: Sequence[tune.Calls], count: int) -> list[float]:
        rounds.append(count)
        found: list[float] = []
        for calls in works:
            launched = [call() for call in calls]
            found.append(sum(price(*cut) for cut in launched if isinstance(cut, tuple)) / len(launched))
        return found

    return tune.tune_point(FakePoint(one, pairs, unusable), clock, 5, failed), rounds


def cuts(entry: Entry) -> dict[Gemm, Cut]:
    return cuts_of(entry.tiles())


@pytest.mark.parametrize("pairs", PAIRS)
def test_the_cheapest_wins(pairs: int) -> None:
    one = problem()
    own, every = cuts_of(formula(one.shape, pairs, HERE)), candidates(one.shape, pairs, HERE)
    for gemm in GEMMS:
        for wanted in every[gemm][1::5]:
            height = wanted.tile.bm

            def price(g: Gemm, cut: Cut, gemm: Gemm = gemm, wanted: Cut = wanted, height: int = height) -> float:
                return 1.0 if (g, cut) == (gemm, wanted) else 10.0 if cut.tile.bm == height else 20.0

            entry, rounds = tuned(one, pairs, price)
            assert cuts(entry)[gemm] == wanted
            assert entry.num_pairs == pairs and entry.us == 11.0
            assert entry.formula_us == sum(price(g, cut) for g, cut in own.items())
            assert rounds == [5, 5, 11]


@pytest.mark.parametrize(("gain", "wins"), [(GAIN - 0.005, False), (2 * GAIN, True)])
@pytest.mark.parametrize("pairs", [8, 512], ids=["one height", "several"])
def test_the_formula_has_to_be_beaten_by_more_than_noise(gain: float, wins: bool, pairs: int) -> None:
    one = problem()
    own = formula(one.shape, pairs, HERE)
    entry, _ = tuned(one, pairs, lambda gemm, cut: 100.0 if cut == cuts_of(own)[gemm] else 100.0 * (1 - gain))
    assert (cuts(entry) != cuts_of(own)) == wins
    assert (entry.us, entry.formula_us) == ((192.0, 200.0) if wins else (200.0, 200.0))


def test_what_wins_the_heats_and_loses_the_final_is_not_taken() -> None:
    one, pairs = problem(), 512
    own = formula(one.shape, pairs, HERE)
    seen: set[tuple[Gemm, Cut]] = set()

    def price(gemm: Gemm, cut: Cut) -> float:
        again = (gemm, cut) in seen  # in the final
        seen.add((gemm, cut))
        return 100.0 if cut == cuts_of(own)[gemm] or again else 50.0

    entry, _ = tuned(one, pairs, price)
    assert entry.tiles() == own and entry.us == entry.formula_us == 200.0


def test_both_gemms_have_one_height() -> None:
    """The best of each alone have 16 and 32 rows; together 32 is best."""
    prices: dict[tuple[Gemm, int], float] = {("w13", 16): 10, ("w13", 32): 12, ("w2", 16): 20, ("w2", 32): 9}
    entry, _ = tuned(problem(), 512, lambda gemm, cut: prices[gemm, cut.tile.bm])
    assert entry.w13.bm == entry.w2.bm == 32 and (entry.us, entry.formula_us) == (21, 30)


def test_what_fails_is_out() -> None:
    one, pairs = problem(), 512
    every = candidates(one.shape, pairs, HERE)
    wrong, broken = every["w2"][3], every["w2"][5]

    def price(gemm: Gemm, cut: Cut) -> float:
        return 1.0 if cut == wrong else 2.0 if cut == broken else 3.0 if (gemm, cut) == ("w2", every["w2"][7]) else 9.0

    entry, _ = tuned(one, pairs, price, [wrong], failed=frozenset({("w2", broken)}))
    assert cuts(entry)["w2"] == every["w2"][7]


def test_with_adapters_the_formulas_unfused_tile_stays_where_it_fits() -> None:
    own = formula(problem().shape, 512, HERE)
    w13, w2 = cuts_of(own)["w13"], cuts_of(own)["w2"]
    assert tiles_of(w13, w2, own) == own
    tried = candidates(problem().shape, 512, HERE)["w13"][1:]
    low, high = (next(cut for cut in tried if cut.tile.bm == bm) for bm in (16, 32))
    assert low.fused and high.fused
    assert tiles_of(low, w2, own).w13 == own.w13
    other = next(cut for cut in candidates(problem().shape, 512, HERE)["w2"] if cut.tile.bm == 32)
    assert tiles_of(high, other, own) == LayerTiles(own.direct, high.tile, high.tile, other.tile)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_weights_come_from_memory() -> None:
    """Eight times the cache is read before a weight comes again, all routings occur, each copy equally often."""
    assert copies(bytes_read=10.0, cache_bytes=50) == 40 and copies(bytes_read=1e9, cache_bytes=50) == 1
    assert launches("abcd", 3) == [(0, "a"), (1, "b"), (2, "c"), (0, "d"), (1, "a"), (2, "b")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agreement(dtype: torch.dtype) -> None:
    value = torch.randn(50, 40).to(dtype)
    near = value.clone()
    near[::7] = (near[::7].float() * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert tune.agrees(value, value.clone(), exact=True) and not tune.agrees(near, value, exact=True)
    assert tune.agrees(near, value, exact=False)
    assert not tune.agrees(value * 1.02, value, exact=False)
    assert not tune.agrees(torch.where(value > 2, torch.nan, value), value, exact=False)


def test_refusals() -> None:
    info = problem().info
    with pytest.raises(UnsupportedError, match="top-k of 1 to 128"):
        Problem(info, 129, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16 or float16"):
        Problem(info, 8, torch.float32)
    scheme = QuantScheme(4, 8, symmetric=True, scale_dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="16 columns and more"):
        Problem(blank_info(4, 64, 64, scheme), 2, torch.float16)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA device"):
        tune.tune(problem(), [1], rounds=1, processes=1, commit="c")


def test_provenance() -> None:
    found = tune.provenance("abc")
    assert found.commit == "abc" and found.torch == torch.__version__ and found.triton != "unknown"
