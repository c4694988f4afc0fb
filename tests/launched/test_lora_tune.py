"""The tuner of LoRA: what it tries is launchable and says the same, and what it finds is read back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from quant_moelora.core.scheme import QuantScheme
from quant_moelora.experts import lora_tune
from quant_moelora.experts.lora_tune import ADAPTERS, LoRAPoint, LoRAProblem, tune_lora_point
from quant_moelora.kernels.common.sample import blank_info
from quant_moelora.kernels.common.timing import graph_medians
from quant_moelora.kernels.grouped_gemm import table, tune
from quant_moelora.kernels.grouped_gemm.config import choose_lora_cut, formula
from quant_moelora.kernels.grouped_gemm.table import Provenance, Table, tuned_tiles
from quant_moelora.kernels.lora.spec import cut_faults
from tests.launched.cases import DEVICE, DTYPES, INTERPRETED, MARKS, interpret, prepared

pytestmark = MARKS
DTYPE = DTYPES[0]
GPU = (9, 0)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        interpret(monkeypatch)
        monkeypatch.setattr(tune, "prepare", lambda weight, dtype: (prepared(weight, dtype), None))
    else:  # of a layer as small as these it would take thousands of copies, with adapters each, to fill a GPU's cache
        monkeypatch.setattr(tune.Weights, "copies", lambda *_: 2)
    with torch.inference_mode():
        yield


def problem(tokens: int, *, act_order: bool = False) -> LoRAProblem:
    layer = tune.Problem(blank_info(4, 320, 64, QuantScheme(4, 64, True, DTYPE)), 2, DTYPE)
    layer = layer.with_act_order() if act_order else layer
    return LoRAProblem(layer, tokens, 16, formula(layer.shape, tokens * 2, GPU))


@pytest.mark.parametrize("tokens", [5])
def test_all_cuts_say_the_same_and_one_is_found(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = problem(tokens)
    point = LoRAPoint(case, tune.Weights(case.problem, DEVICE))
    seen: list[int] = []

    def clock(works: Sequence[tune.Calls], rounds: int) -> list[float]:
        """Graphs where there are any; otherwise a work is the faster the later it stands."""
        seen.append(len(works))
        return [100.0 - n for n in range(len(works))] if INTERPRETED else graph_medians(works, rounds)

    entry = tune_lora_point(point, clock, 2)
    assert not caplog.records  # none gave other results
    tried = {cut for cuts in case.families() for cut in cuts}
    assert seen == [len(ADAPTERS) * len(tried), len(ADAPTERS) * (2 if entry.cut != case.formula or seen[1] > 2 else 1)]
    assert entry.num_pairs == 2 * tokens and not cut_faults(entry.cut) and 0 < entry.us <= entry.formula_us
    if INTERPRETED:  # of each number that one which was tried last
        assert entry.cut.parts13 == 2 != case.formula.parts13
    made = Table("G", GPU, "frag64.v1", case.problem.shape, Provenance("", "", "", "", "", ""), (), (entry,))
    written = made.write(tmp_path)
    assert table.parse(written.read_text(encoding="utf-8"), "t") == made
    tuned, shape = tuned_tiles(str(tmp_path), "G"), case.problem.shape
    assert choose_lora_cut(shape, 2 * tokens, 16, tuned) == entry.cut
    assert choose_lora_cut(shape, 2 * tokens, 5, tuned) == entry.cut  # of the same class
    assert choose_lora_cut(shape, 2 * tokens, 17, tuned) == choose_lora_cut(shape, 2 * tokens, 17)
    assert choose_lora_cut(shape, 5 * tokens, 16, tuned) == choose_lora_cut(shape, 5 * tokens, 16)


def _agrees(got: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> bool:
    return bool((got - expected).norm() <= 2e-2 * expected.norm())


def test_a_wrong_cut_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    case = problem(1)
    point = LoRAPoint(case, tune.Weights(case.problem, DEVICE))
    wrong = case.families()[0][1]
    result = point.result
    monkeypatch.setattr(point, "result", lambda cut: result(cut) * (1.5 if cut == wrong else 1))
    monkeypatch.setattr(lora_tune, "agrees", functools.partial(_agrees, exact=False))
    entry = tune_lora_point(point, lambda works, _: [1.0] * len(works), 1)
    assert entry.cut == case.formula and entry.us == entry.formula_us == 1.0
    assert [record.message.endswith("WRONG results") for record in caplog.records] == [True]
