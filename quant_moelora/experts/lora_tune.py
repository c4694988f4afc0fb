"""The tuner of LoRA: measures how a layer's adapters are cut, and writes what was best into the layer's table.

A cut is measured in the whole layer, since its shrink and its expand share launches with the products. It has to be
good with one adapter and with many, of which a forward knows nothing: what counts is the geometric mean of both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.experts.marlin_op import MarlinLayer, run_lora_layer
from quant_moelora.kernels.common.sample import launches, random_adapters, random_slots
from quant_moelora.kernels.common.timing import graph_medians
from quant_moelora.kernels.grouped_gemm.candidates import GEMMS
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.config import Tuned, choose_tiles
from quant_moelora.kernels.grouped_gemm.layer import LayerTiles
from quant_moelora.kernels.grouped_gemm.table import LoRAEntry, Table
from quant_moelora.kernels.grouped_gemm.tune import GAIN, Clock, Point, Problem, Weights, agrees, provenance
from quant_moelora.kernels.lora.launch import LoRATables
from quant_moelora.kernels.lora.spec import EXPAND_BLOCK, Cut, choose_cut, rank_class

logger = logging.getLogger(__name__)

ADAPTERS = (1, 8)  # in a batch
_TIMES = (0.5, 2, 4)  # what is tried of each number in a cut


@dataclass(frozen=True)
class LoRAProblem:
    """A layer with adapters, and one number of tokens.

    Attributes:
        problem: the layer.
        tokens: M.
        rank: of all adapters, a power of two from 16 on.
        tiles: of the products.
    """

    problem: Problem
    tokens: int
    rank: int
    tiles: LayerTiles

    @property
    def formula(self) -> Cut:
        """What nobody measured."""
        shape, pairs = self.problem.shape, self.tokens * self.problem.top_k
        return choose_cut(pairs, shape.num_experts, shape.w13.columns, shape.w2.columns, self.rank)

    def families(self) -> list[list[Cut]]:
        """What is tried: for each number of a cut, the formula's and cuts that differ from it in that number alone."""
        own, shape = self.formula, self.problem.shape
        most = {"parts13": shape.w13.columns // 128, "parts2": shape.w2.columns // 128}
        most["expand_blocks"] = -(-self.problem.info.hidden_size // EXPAND_BLOCK)
        if self.rank > own.expand_ranks:
            del most["parts2"]  # there is one block of columns for each part
        return [[own, *_others(own, name, limit)] for name, limit in most.items()]


def _others(cut: Cut, name: str, most: int) -> Iterator[Cut]:
    own = getattr(cut, name)
    numbers = dict.fromkeys(max(1, min(most, int(own * times))) for times in _TIMES)
    return (replace(cut, **{name: number}) for number in numbers if number != own)


class LoRAPoint:
    """Launches of the layer with any cut."""

    def __init__(self, case: LoRAProblem, weights: Weights) -> None:
        self.case = case
        self._point = Point(weights, case.tokens)
        self._weights = weights
        problem = case.problem
        count = max(ADAPTERS)
        device, info = weights.device, problem.info
        compiles = device.type == "meta"  # where nobody can count experts
        self._copies = 1 if compiles else max(weights.copies(gemm, self._point.active) for gemm in GEMMS)
        self._tables = [
            LoRATables.of(random_adapters(info, problem.dtype, count, case.rank, count, device))
            for _ in range(self._copies)
        ]
        self._out = torch.empty(case.tokens, info.hidden_size, dtype=problem.dtype, device=device)
        self._x = self._point.inputs["w13"]
        if self._x.ndim == 3:  # a copy for each half, of which the layer makes its own
            self._x = self._x[0, : case.tokens, : info.hidden_size].contiguous()

    def calls(self, cut: Cut, adapters: int) -> list[Callable[[], object]]:
        """A launch for each routing, with weights and adapters from memory."""
        routings = self._point.routings
        slots = random_slots(adapters, self.case.tokens, len(routings), self._weights.device)
        return [self._call(cut, copy, slots, number) for copy, number in launches(range(len(routings)), self._copies)]

    def _call(self, cut: Cut, copy: int, slots: Sequence[Tensor], number: int) -> Callable[[], Tensor]:
        info, routing = self.case.problem.info, self._point.routings[number]
        w13, w2 = self._weights.get("w13", copy), self._weights.get("w2", copy)
        source = TileSource(self.case.problem.shape.name, "")
        layer = MarlinLayer(w13, w2, info.activation, info.router_weight == "input", source)
        ids, weights, tables, tiles = routing.topk_ids, routing.topk_weights, self._tables[copy], self.case.tiles

        def run() -> Tensor:
            """One launch of the layer."""
            run_lora_layer(self._x, ids, weights, slots[number], layer, tables, self._out, tiles, cut)
            return self._out

        return run

    def result(self, cut: Cut) -> Tensor:  # (M, H)
        """What one launch gives with many adapters."""
        self._out.fill_(math.nan)
        self.calls(cut, max(ADAPTERS))[0]()
        return self._out.clone()

    def usable(self, cuts: Sequence[Cut]) -> list[Cut]:
        """The cuts that give what the first one gives; others are logged and left out."""
        expected, kept = self.result(cuts[0]), [cuts[0]]
        for cut in cuts[1:]:
            if agrees(self.result(cut), expected, exact=False):
                kept.append(cut)
            else:
                logger.warning("%s with %d tokens is left out: WRONG results", cut, self.case.tokens)
        return kept

    def scores(self, cuts: Sequence[Cut], clock: Clock, rounds: int) -> list[float]:
        """Geometric mean of the times with few and many adapters, of each cut; all take turns."""
        works = [self.calls(cut, adapters) for cut in cuts for adapters in ADAPTERS]
        times = clock(works, rounds)
        each = len(ADAPTERS)
        return [math.prod(times[i : i + each]) ** (1 / each) for i in range(0, len(times), each)]


def tune_lora_point(point: LoRAPoint, clock: Clock, rounds: int) -> LoRAEntry:
    """The best cut of one case, or the formula's, unless that is beaten by more than `GAIN`.

    Each number of a cut is varied by itself; the best ones together are measured once more against the formula's.
    """
    case = point.case
    own, families = case.formula, case.families()
    tried = list(dict.fromkeys(cut for cuts in families for cut in cuts))
    usable = point.usable(tried)
    scores = dict(zip(usable, point.scores(usable, clock, rounds), strict=True))
    found = own
    for cuts in families:
        best = min((cut for cut in cuts if cut in scores), key=lambda cut: scores[cut])
        found = replace(found, **{name: value for name, value in vars(best).items() if value != getattr(own, name)})
    finalists = point.usable(list(dict.fromkeys((own, found))))
    final = point.scores(finalists, clock, 2 * rounds + 1)
    better = final[-1] < final[0] * (1.0 - GAIN)
    cut, us = (finalists[-1], final[-1]) if better else (own, final[0])
    return LoRAEntry(case.tokens * case.problem.top_k, case.rank, cut, round(us, 2), round(final[0], 2))


def with_lora(
    table: Table,
    problem: Problem,
    tokens: Sequence[int],
    ranks: Sequence[int],
    *,
    rounds: int,
    processes: int,
    commit: str,
    clock: Clock = graph_medians,
) -> Table:
    """The table, and how the layer's adapters are best cut on the current CUDA device, beside the table's tiles.

    Args:
        table: of the layer on this device.
        problem: the layer.
        tokens: numbers of tokens, each once.
        ranks: powers of two from 16 on, each once.
        rounds: in which candidates take turns.
        processes: that compile beforehand.
        commit: of the code, for the table.
        clock: gives times.

    Raises:
        UnsupportedError: a rank is no power of two from 16 on.
    """
    if wrong := [rank for rank in ranks if rank != rank_class(rank)]:
        raise UnsupportedError(
            "ranks to tune", got=wrong, rule="powers of two, from 16 on", remedy="round up: they serve lower ranks too"
        )
    tuned = Tuned({table.shape: {entry.num_pairs: entry.tiles() for entry in table.entries}})
    cases = [
        LoRAProblem(problem, number, rank, choose_tiles(table.shape, number * problem.top_k, table.capability, tuned))
        for rank in ranks
        for number in sorted(tokens)
    ]
    compile_cuts(cases, processes)
    entries: list[LoRAEntry] = []
    with torch.inference_mode():
        weights = Weights(problem, torch.device("cuda", torch.cuda.current_device()))
        for case in tqdm(cases, desc="Measuring adapters", unit="point", disable=None):
            entries.append(tune_lora_point(LoRAPoint(case, weights), clock, rounds))
            torch.cuda.empty_cache()
    return replace(table, lora=tuple(entries), lora_provenance=provenance(commit))


def compile_cuts(cases: Sequence[LoRAProblem], processes: int) -> None:
    """Put what will be measured into Triton's cache, in many processes. What fails there fails again when measured."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_compile, case, cut)
            for case in sorted(cases, key=lambda case: -case.tokens)  # the largest kernels first
            for cut in dict.fromkeys(cut for cuts in case.families() for cut in cuts)
        ]
        for job in tqdm(as_completed(jobs), desc="Compiling", unit="cut", total=len(jobs), disable=None):
            if error := job.exception():
                logger.warning("not compiled ahead: %s", error)


def _compile(case: LoRAProblem, cut: Cut) -> None:
    """Compile what one cut launches; run in a process of its own."""
    try:
        with torch.inference_mode():
            LoRAPoint(case, Weights(case.problem, torch.device("meta"))).calls(cut, max(ADAPTERS))[0]()
    except Exception as error:  # those of the compiler do not travel between processes
        raise RuntimeError(f"{cut} with {case.tokens} tokens: {type(error).__name__}: {error}"[:500]) from error
