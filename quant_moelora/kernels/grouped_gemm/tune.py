"""The tuner: measures tiles of a layer's GEMMs and writes what was best into a table.

Each GEMM is measured with what follows it up to the next one, since a split or a fused activation changes that: w13
with the activation, w2 with the sum. Weights and routings change from launch to launch, so that weights come from
memory; all candidates of a number of tokens take turns, round by round.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quant_moelora.core import packing
from quant_moelora.core.errors import BackendError, FormatError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.activation.launch import activate
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.common.launch import capability, gpu_name
from quant_moelora.kernels.common.sample import (
    active_experts,
    blank_prepared,
    copies,
    launches,
    random_routings,
    random_weight,
)
from quant_moelora.kernels.common.timing import graph_medians
from quant_moelora.kernels.dequant.prepare import LEAST_GROUP, PreparedWeight, prepare, regrouped
from quant_moelora.kernels.grouped_gemm.candidates import GEMMS, Cut, Gemm, candidates, cuts_of, tiles_of
from quant_moelora.kernels.grouped_gemm.config import formula
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles
from quant_moelora.kernels.grouped_gemm.table import Entry, Provenance, Table, known_table
from quant_moelora.kernels.moe_sum.launch import moe_sum

logger = logging.getLogger(__name__)

Calls = Sequence[Callable[[], object]]
Clock = Callable[[Sequence[Calls], int], list[float]]  # medians of one call of each, microseconds, from some rounds
GAIN = 0.02  # by which the formula has to be beaten
_FREE = 0.8  # part of the free memory that copies of the weights may take


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer to be tuned.

    Attributes:
        info: the layer; only what it says of itself counts, and it may be on the meta device.
        top_k: k.
        dtype: of the activations.

    Raises:
        UnsupportedError: no backend with tiles serves it, or a token has more experts than there are.
    """

    info: MoEQuantInfo
    top_k: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        weights = (self.info.w13, self.info.w2)
        rules = {
            "packed weights": all(isinstance(weight, PackedWeight) for weight in weights),
            f"groups whose least common part with 128 is {LEAST_GROUP} columns and more": all(
                regrouped(weight) >= LEAST_GROUP for weight in weights if isinstance(weight, PackedWeight)
            ),
            "activations in bfloat16 or float16": self.dtype in (torch.bfloat16, torch.float16),
            f"top-k of 1 to {self.info.num_experts}, the experts": 1 <= self.top_k <= self.info.num_experts,
        }
        for rule, kept in rules.items():
            if not kept:
                got = f"{self.info.scheme_name}, {self.dtype}, top-k {self.top_k}"
                raise UnsupportedError("layer to tune", got=got, rule=rule, remedy="tune a layer that marlin serves")

    def with_act_order(self) -> Problem:
        """The same layer with columns of gate and up in orders of their own."""
        w13 = self.info.w13
        order = torch.empty(w13.num_experts, w13.halves, w13.k_pad, dtype=torch.int32, device=self.info.device)
        return Problem(replace(self.info, w13=replace(w13, k_perm=order)), self.top_k, self.dtype)

    @cached_property
    def shape(self) -> LayerShape:
        """What tiles are chosen from."""
        return LayerShape.of(self.info, self.dtype)

    def weight(self, gemm: Gemm) -> PackedWeight:
        """One of the two weights, without bias and column order: what a random one is like."""
        weight = self.info.w13 if gemm == "w13" else self.info.w2
        assert isinstance(weight, PackedWeight)  # LayerShape.of
        return replace(weight, bias=None, k_perm=None)


class Weights:
    """Copies of a problem's weights with random values, made when they are asked for; without data on meta."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self._held: dict[Gemm, list[PreparedWeight]] = {"w13": [], "w2": []}

    def get(self, gemm: Gemm, copy: int) -> PreparedWeight:
        """A copy of a weight."""
        held, blank = self._held[gemm], self.problem.weight(gemm)
        while len(held) <= copy:
            if self.device.type == "meta":
                held.append(blank_prepared(blank, self.problem.dtype))
            elif held:
                own = {name: getattr(held[0], name) for name in ("qweight", "scales", "zeros")}
                held.append(held[0]._replace(**{name: t if t is None else t.clone() for name, t in own.items()}))
            else:
                held.append(prepare(random_weight(blank, self.device), self.problem.dtype)[0])
        return held[copy]

    def copies(self, gemm: Gemm, active: float) -> int:
        """Copies to go through, if a launch reads so many experts: as many as it takes, and as fit the memory."""
        if self.device.type != "cuda":
            return 1
        codes, held = self.problem.weight(gemm).qweight.nbytes, len(self._held[gemm])
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        wanted = copies(codes / self.problem.info.num_experts * active, cache)
        free = torch.cuda.mem_get_info(self.device)[0] * _FREE / 2  # the other GEMM's weights need some too
        return max(1, min(wanted, held + int(free / codes)))


class Point:
    """A layer with some number of tokens: launches of its GEMMs with any cut."""

    def __init__(self, weights: Weights, tokens: int) -> None:
        problem, device = weights.problem, weights.device
        self.weights = weights
        self.tokens = tokens
        self.pairs = tokens * problem.top_k
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._plans: dict[tuple[int, int], tuple[Plan, Tensor]] = {}
        if device.type == "meta":
            ids = [torch.empty(tokens, problem.top_k, dtype=torch.int32, device=device)]
        else:
            ids = random_routings(problem.info.num_experts, problem.top_k, tokens, device)
        topk_weights = torch.full((tokens, problem.top_k), 1.0 / problem.top_k, device=device)
        self.routings = [Routing(one, topk_weights) for one in ids]
        self.direct = formula(problem.shape, self.pairs, capability(device)).direct
        w13 = problem.weight("w13")
        rows = (w13.halves, self.pairs, w13.k_pad) if problem.shape.act_order else (tokens, w13.k)
        h = self._random((self.pairs, w13.n_pad))
        h[:, w13.n :] = 0
        self.inputs: dict[Gemm, Tensor] = {"w13": self._random(rows), "w2": h}

    @cached_property
    def active(self) -> float:
        """Experts that a launch reads, on average."""
        return active_experts([routing.topk_ids for routing in self.routings])

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.weights.device).to(self.weights.problem.dtype)

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor that all launches with this shape write."""
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = torch.empty(shape, dtype=dtype, device=self.weights.device)
        return self._buffers[name, shape]

    def calls(self, gemm: Gemm, cut: Cut) -> list[Callable[[], object]]:
        """Launches of a GEMM, and of what follows it, for each routing with weights from memory."""
        numbered = launches(range(len(self.routings)), self.weights.copies(gemm, self.active))
        return [self.call(gemm, cut, copy, number) for copy, number in numbered]

    def call(self, gemm: Gemm, cut: Cut, copy: int = 0, number: int = 0) -> Callable[[], Tensor]:
        """One launch, with one of the routings: ``h`` of w13 or the layer's output of w2."""
        info, routing, x = self.weights.problem.info, self.routings[number], self.inputs[gemm]
        weight, experts = self.weights.get(gemm, copy), info.num_experts
        plan, tiles = self._plan(number, cut.tile.bm)
        rows, inverse = (None, None) if plan is None else (plan.rows, plan.inverse)
        columns = info.hidden_size if gemm == "w2" else weight.n_pad if cut.fused else weight.rows
        top_k = routing.top_k if gemm == "w13" and x.ndim == 2 else None
        product = self._output(gemm, columns, cut)
        activation = info.activation if cut.fused else None
        shape = (self.pairs, weight.n_pad) if gemm == "w13" else (self.tokens, info.hidden_size)
        out = self._buffer("h" if gemm == "w13" else "out", *shape, dtype=x.dtype)

        def launch() -> Tensor:
            """The product and what follows it."""
            grouped_gemm(x, weight, tiles, rows, top_k, product, cut.tile, activation)
            if cut.fused:
                return product
            ids, weights = routing.topk_ids, routing.topk_weights
            if gemm == "w13":
                weigh = weights if info.router_weight == "input" else None
                return activate(
                    product, info.activation, ids, weigh, rows, out, num_experts=experts, inter=info.intermediate_size
                )
            weigh = weights if info.router_weight == "output" else None
            return moe_sum(product, ids, weigh, inverse, out, num_experts=experts)

        return launch

    def _output(self, gemm: Gemm, columns: int, cut: Cut) -> Tensor:
        """What a GEMM writes: h if it is fused, its product, or the parts of that."""
        dtype = self.weights.problem.dtype
        if cut.tile.split > 1:
            return self._buffer(f"{gemm}_parts", cut.tile.split, self.pairs, columns, dtype=torch.float32)
        return self._buffer("h" if cut.fused else gemm, self.pairs, columns, dtype=dtype)

    def _plan(self, number: int, bm: int) -> tuple[Plan | None, Tensor]:
        """Order of the pairs and list of tiles."""
        routing = self.routings[number]
        if self.direct:
            return None, routing.topk_ids.reshape(-1)
        if (number, bm) not in self._plans:
            self._plans[number, bm] = align(routing, self.weights.problem.info.num_experts, bm)
        return self._plans[number, bm]

    def result(self, gemm: Gemm, cut: Cut) -> Tensor:
        """What one launch gives, without the padding of h: rows of random weights there are not 0."""
        call = self.call(gemm, cut)
        for buffer in self._buffers.values():
            buffer.fill_(math.nan)
        given = call()
        return given[:, : self.weights.problem.weight(gemm).n].clone()

    def usable(self, gemm: Gemm, cuts: Sequence[Cut]) -> list[Cut]:
        """The cuts that give what the first one gives, which has to be launchable; others are logged and left out."""
        from triton.runtime.errors import OutOfResources

        expected, kept = self.result(gemm, cuts[0]), [cuts[0]]
        for cut in cuts[1:]:
            try:
                same = agrees(self.result(gemm, cut), expected, exact=cut.tile.split == cuts[0].tile.split)
            except OutOfResources as error:
                logger.warning("%s %s with %d tokens is left out: %s", gemm, cut, self.tokens, error)
                continue
            if same:
                kept.append(cut)
            else:
                logger.warning("%s %s with %d tokens is left out: WRONG results", gemm, cut, self.tokens)
        return kept


def agrees(got: Tensor, expected: Tensor, *, exact: bool) -> bool:
    """Whether two results of any equal shape are the same; where columns were split otherwise, but for roundings.

    Then float32 sums differ by some 2**-20 of their terms, which flips the rounding of few elements, by one unit each:
    at most eps of the result, and far less in the norm.
    """
    if exact:
        return torch.equal(got, expected)
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) <= torch.finfo(expected.dtype).eps  # false for NaN


def tune_point(point: Point, clock: Clock, rounds: int, failed: frozenset[tuple[Gemm, Cut]] = frozenset()) -> Entry:
    """The best tiles for one number of tokens, or the formula's, unless these are beaten by more than `GAIN`.

    Args:
        point: the layer and the tokens.
        clock: gives times.
        rounds: in which candidates take turns; twice as many in the final.
        failed: what does not compile.
    """
    shape, gpu = point.weights.problem.shape, capability(point.weights.device)
    own = formula(shape, point.pairs, gpu)
    best: dict[Gemm, dict[int, tuple[float, Cut]]] = {"w13": {}, "w2": {}}  # by height
    for gemm, cuts in candidates(shape, point.pairs, gpu).items():
        usable = point.usable(gemm, [cut for cut in cuts if (gemm, cut) not in failed])
        times = clock([point.calls(gemm, cut) for cut in usable], rounds)
        for number, (us, cut) in enumerate(zip(times, usable, strict=True)):
            # The formula's cut comes first, and has the advantage that it need not win by anything.
            held, handicap = best[gemm].get(cut.tile.bm), 1.0 if number == 0 else 1.0 + GAIN
            if held is None or us * handicap < held[0]:
                best[gemm][cut.tile.bm] = (us * handicap, cut)
    heights = best["w13"].keys() & best["w2"].keys()
    bm = min(heights, key=lambda bm: (best["w13"][bm][0] + best["w2"][bm][0], bm))
    found = tiles_of(best["w13"][bm][1], best["w2"][bm][1], own)
    return _final(point, own, found, clock, 2 * rounds + 1)


def _final(point: Point, own: LayerTiles, found: LayerTiles, clock: Clock, rounds: int) -> Entry:
    """The formula's tiles against those that were found, once more, both GEMMs in turn as a layer launches them.

    What a kernel leaves to the next one counts here: 5 stages made DeepSeek-V3's layer 4 us slower at one token, where
    w13 and w2 by themselves had become 5 us faster (benchmarks/NOTES.md).
    """
    teams = [cuts_of(tiles) for tiles in dict.fromkeys((own, found))]
    times = clock([_in_turn(*(point.calls(gemm, team[gemm]) for gemm in GEMMS)) for team in teams], rounds)
    own_us, found_us = len(GEMMS) * times[0], len(GEMMS) * times[-1]
    better = found_us < own_us * (1.0 - GAIN)
    tiles, us = (found, found_us) if better else (own, own_us)
    return Entry(point.pairs, tiles.w13, tiles.w13_fused, tiles.w2, round(us, 2), round(own_us, 2))


def _in_turn(first: Calls, second: Calls) -> Calls:
    """A call of one after a call of the other; the shorter one is gone through again."""
    count = max(len(first), len(second))
    return [calls[i % len(calls)] for i in range(count) for calls in (first, second)]


def tune(
    problem: Problem, tokens: Sequence[int], *, rounds: int, processes: int, commit: str, clock: Clock = graph_medians
) -> Table:
    """Measure a layer with some numbers of tokens on the current CUDA device.

    Args:
        problem: the layer.
        tokens: numbers of tokens, each once.
        rounds: in which candidates take turns.
        processes: that compile beforehand.
        commit: of the code, for the table.
        clock: gives times.

    Raises:
        BackendError: there is no CUDA device, or the formula's own tiles do not compile.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            "tune", got="no CUDA device", rule="a GPU to measure", remedy="run it on the GPU to tune for"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    failed = compile_candidates(problem, tokens, capability(device), processes)
    entries: list[Entry] = []
    with torch.inference_mode():
        weights = Weights(problem, device)
        for number in tqdm(sorted(tokens), desc="Measuring", unit="point", disable=None):
            entries.append(tune_point(Point(weights, number), clock, rounds, failed[number]))
            torch.cuda.empty_cache()
    return Table(
        gpu=gpu_name(device),
        capability=capability(device),
        layout=packing.LAYOUT,
        shape=problem.shape,
        provenance=provenance(commit),
        entries=tuple(entries),
    )


def tuned_before(problem: Problem, folder: Path) -> Table:
    """The table of a layer on the current CUDA device, from a folder or as it is shipped.

    Raises:
        BackendError: there is no CUDA device.
        FormatError: there is no such table.
    """
    if not torch.cuda.is_available():
        raise BackendError("tune", got="no CUDA device", rule="a GPU", remedy="run it on the GPU to tune for")
    gpu = gpu_name(torch.device("cuda", torch.cuda.current_device()))
    table = known_table(folder, gpu, problem.shape)
    if table is None:
        raise FormatError(
            f"{folder}", got=f"no table of {problem.shape.name} on {gpu}", rule="one", remedy="measure the tiles too"
        )
    return table


def compile_candidates(
    problem: Problem, tokens: Sequence[int], gpu: tuple[int, int], processes: int
) -> dict[int, frozenset[tuple[Gemm, Cut]]]:
    """Put everything that will be measured into Triton's cache, in many processes; what failed, by tokens.

    Raises:
        BackendError: the formula's own tiles do not compile.
    """
    failed: dict[int, set[tuple[Gemm, Cut]]] = {number: set() for number in tokens}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs: dict[Future[None], tuple[int, Gemm, Cut, bool]] = {}
        for number in sorted(tokens, reverse=True):  # the largest kernels first
            for gemm, cuts in candidates(problem.shape, number * problem.top_k, gpu).items():
                for place, cut in enumerate(cuts):
                    job = pool.submit(compile_cut, problem, number, gemm, cut)
                    jobs[job] = (number, gemm, cut, place == 0)
        for job in tqdm(as_completed(jobs), desc="Compiling", unit="kernel", total=len(jobs), disable=None):
            error, (number, gemm, cut, own) = job.exception(), jobs[job]
            if error is not None and own:
                pool.shutdown(wait=False, cancel_futures=True)
                raise BackendError(
                    f"{gemm} {cut}", got=repr(error), rule="that the formula's tiles compile", remedy="report it"
                ) from error
            if error is not None:
                logger.warning("%s %s with %d tokens is left out: %r", gemm, cut, number, error)
                failed[number].add((gemm, cut))
    return {number: frozenset(cuts) for number, cuts in failed.items()}


def compile_cut(problem: Problem, tokens: int, gemm: Gemm, cut: Cut) -> None:
    """Compile what one cut launches; run in a process of its own."""
    try:
        with torch.inference_mode():
            Point(Weights(problem, torch.device("meta")), tokens).call(gemm, cut)()
    except Exception as error:  # those of the compiler do not travel between processes
        raise RuntimeError(f"{type(error).__name__}: {error}"[:500]) from error


def provenance(commit: str) -> Provenance:
    """With what this process measures."""

    def installed(package: str) -> str:
        """Version of a package, if there is one."""
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    return Provenance(
        torch=torch.__version__,
        triton=installed("triton"),
        cuda=str(torch.version.cuda),
        quant_moelora=installed("quant-moelora"),
        commit=commit,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def default_processes() -> int:
    """Processes that compile: one for each processor, up to what GPUs have memory for."""
    return min(os.cpu_count() or 1, 16)
