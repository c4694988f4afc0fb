"""What the tuner launches is the layer's own work, whatever the cut; and it measures and writes what it finds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.common.sample import blank_info
from quant_moelora.kernels.common.timing import graph_medians
from quant_moelora.kernels.dequant.prepare import PreparedWeight
from quant_moelora.kernels.grouped_gemm import table, tune
from quant_moelora.kernels.grouped_gemm.candidates import GEMMS, Cut, Gemm, candidates
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.table import Provenance, Table
from tests.launched.cases import DEVICE, DTYPES, FROBENIUS, INTERPRETED, MARKS, held_values, prepared

pytestmark = MARKS
EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 192, 96  # three steps of 64 columns, and two that are not full
DTYPE = DTYPES[0]
TOKENS = (1, 9)  # each pair a tile; sorted


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted, scales are as stored, and the bits of a row depend on its place in a tile (see test_marlin)."""
    prepare = prepared if INTERPRETED else lambda weight, dtype: tune_prepare(weight, dtype)[0]

    def remember(weight: PackedWeight, dtype: torch.dtype) -> tuple[PreparedWeight, None]:
        made = prepare(weight, dtype)
        PACKED[made.qweight.data_ptr()] = weight
        return made, None

    monkeypatch.setattr(tune, "prepare", remember)
    if INTERPRETED:
        monkeypatch.setattr(tune, "grouped_gemm", functools.partial(grouped_gemm, plain=True))
        monkeypatch.setattr(tune, "agrees", lambda a, b, **_: tune_agrees(a, b, exact=False))
    with torch.inference_mode():
        yield


tune_agrees, tune_prepare = tune.agrees, tune.prepare
PACKED: dict[int, PackedWeight] = {}  # what the tuner's weights were made from, by their codes' address


def make(tokens: int, *, symmetric: bool = True, act_order: bool = False) -> tune.Point:
    scheme = QuantScheme(4, 64, symmetric, DTYPE)
    experts = 3 if INTERPRETED and tokens > 1 else EXPERTS  # fewer tiles, but pairs fewer than experts are not sorted
    problem = tune.Problem(blank_info(experts, HIDDEN, INTER, scheme), TOP_K, DTYPE)
    return tune.Point(tune.Weights(problem.with_act_order() if act_order else problem, DEVICE), tokens)


def wanted(point: tune.Point, gemm: Gemm, number: int) -> Tensor:
    """The definition: each pair's product with its expert, silu(gate) * up of it or the weighted sum of a token."""
    ids = point.routings[number].topk_ids.cpu().flatten().long()
    weight = held_values(PACKED[point.weights.get(gemm, 0).qweight.data_ptr()], DTYPE).cpu()[ids]  # (P, halves, n, k)
    x = point.inputs[gemm].cpu().double()[..., : weight.shape[-1]]
    order = torch.arange(len(ids)) if point.direct else ids.argsort(stable=True)
    if gemm == "w13":
        rows = x.repeat_interleave(TOP_K, 0)[:, None] if x.ndim == 2 else x[:, order.argsort()].transpose(0, 1)
        gate, up = (weight[..., : rows.shape[-1]] @ rows.expand(-1, 2, -1)[..., None])[..., 0].to(DTYPE).unbind(1)
        return (torch.nn.functional.silu(gate.double()) * up.double())[order]
    y = (weight[:, 0] @ x[order.argsort()][..., None])[..., 0].to(DTYPE).double()
    return y.unflatten(0, (-1, TOP_K)).sum(1) / TOP_K


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("act_order", [False, True], ids=["", "act_order"])
def test_cuts_compute_the_layer(tokens: int, act_order: bool) -> None:
    point = make(tokens, symmetric=act_order, act_order=act_order)
    cuts: dict[Gemm, list[Cut]] = {
        "w13": [Cut(Tile(16, 64, 64)), Cut(Tile(16, 64, 64, split=3)), Cut(Tile(32, 128, 64), fused=not act_order)],
        "w2": [Cut(Tile(16, 64, 64, split=2)), Cut(Tile(32, 64, 128))],
    }
    for gemm in GEMMS:
        for cut in cuts[gemm]:
            want, got = wanted(point, gemm, 0), point.result(gemm, cut).cpu().double()
            assert got.shape == want.shape
            # Two GEMMs' outputs, the slope of the activation, and two roundings more: as LAYER of test_marlin.
            assert float((got - want).norm() / want.norm()) < 2.5 * FROBENIUS[DTYPE], cut
        assert point.usable(gemm, cuts[gemm]) == cuts[gemm]


def test_a_wrong_cut_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    point, right, wrong = make(9), Cut(Tile(16, 64, 64)), Cut(Tile(32, 64, 64))

    def broken(*arguments: object) -> Tensor:
        (tile,) = (value for value in arguments if isinstance(value, Tile))
        out = call(*arguments)
        return out.mul_(1.01) if tile == wrong.tile else out

    call: Callable[..., Tensor] = tune.grouped_gemm
    monkeypatch.setattr(tune, "grouped_gemm", broken)
    assert point.usable("w2", [right, wrong]) == [right]
    assert [record.message.endswith("WRONG results") for record in caplog.records] == [True]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_best_is_found_and_read_back(tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = make(tokens)
    shape, gpu = point.weights.problem.shape, (9, 0) if INTERPRETED else torch.cuda.get_device_capability()
    found = candidates(shape, point.pairs, gpu)
    height = found["w2"][0].tile.bm  # both GEMMs need the same
    few = {gemm: [cut for cut in cuts if cut.tile.bm == height][:3] for gemm, cuts in found.items()}
    monkeypatch.setattr(tune, "candidates", lambda *_: few)

    def clock(works: Sequence[tune.Calls], rounds: int) -> list[float]:
        """Graphs where there are any; otherwise a work is the faster the later it stands."""
        if not INTERPRETED:
            return graph_medians(works, rounds)
        for calls in works:
            calls[0]()
        return [10.0 - 3 * number for number in range(len(works))]

    entry = tune.tune_point(point, clock, 2)
    assert entry.num_pairs == point.pairs and 0 < entry.us <= entry.formula_us
    if INTERPRETED:
        assert Cut(entry.w2) == few["w2"][-1]
    made = Table("G", gpu, "frag64.v1", shape, Provenance("", "", "", "", "", ""), (entry,))
    assert table.parse(made.write(tmp_path).read_text(encoding="utf-8"), "t") == made
