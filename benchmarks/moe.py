"""Times of the experts of one layer, GEMMs alone and whole layer, beside the roofs of the device and beside rivals.

`python -m benchmarks.moe --out DIR` writes DIR/moe-h200.csv (or as --name says). A graph runs several routings in
turn, over as many copies of the weights as it takes for these to come from memory; graphs of all candidates take turns,
round by round. GEMMs are w13 and w2 as the layer launches them, without the sort of the pairs; with an activation
inside where the layer has it there. `python -m benchmarks.moe_report` makes the plot and the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import moe_ours, rivals
from benchmarks.moe_case import DENSE_BITS, SHAPES, Case, Roofs, random_case, random_info
from benchmarks.record import provenance, write_rows
from benchmarks.roofs import measured_roofs
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.kernels.common.timing import graph_of, quantile, take_turns

OURS, TORCH = "ours", "torch"
HUMMING = {"humming": "indexed", "humming-sorted": "grouped_contiguous"}
CANDIDATES = (OURS, *HUMMING, TORCH)
COLUMNS = (
    "shape bits m who what p20_us p50_us p80_us floor_us over_floor run_floor_us over_run_floor error active_experts "
    "copies detail failed"
).split()


@dataclass(frozen=True)
class Job:
    """What one process measures: a shape with one width of integers, at all numbers of tokens."""

    name: str
    bits: int
    tokens: tuple[int, ...]
    who: tuple[str, ...]
    rounds: int
    roofs: Roofs

    def row(self, tokens: int, who: str, what: str, **figures: object) -> dict[str, object]:
        """A row of the table."""
        return {"shape": self.name, "bits": self.bits, "m": tokens, "who": who, "what": what, **figures}

    def failed(self, tokens: int, who: str, reason: object) -> dict[str, object]:
        """The row of a candidate that gave no figure."""
        return self.row(tokens, who, "gemms", failed=f"failed: {reason}"[:300].replace("\n", " "))


def prepare(who: str, info: MoEQuantInfo, converted: list[list[Any]]) -> Any:
    """A candidate over the weights; both forms of Humming share the converted ones."""
    if who == OURS:
        return moe_ours.Ours(info)
    if who == TORCH:
        return rivals.Torch(info)
    if not converted:
        converted += rivals.Humming.convert(info)
    return rivals.Humming(info, HUMMING[who], converted)


def serves(who: str, bits: int) -> bool:
    """Whether a candidate takes weights of this width: Humming's are quantised."""
    return bits < DENSE_BITS or who not in HUMMING


def measure(job: Job) -> list[dict[str, object]]:
    """Rows of a job. A rival that raises gets a row that says so; we may raise."""
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        torch.manual_seed(0)
        info = random_info(SHAPES[job.name], job.bits, "cuda")
        candidates: dict[str, Any] = {}
        converted: list[list[Any]] = []
        why: dict[str, object] = {}
        for who in job.who:
            with unless_rival_fails(who, why):
                candidates[who] = prepare(who, info, converted)
        for tokens in job.tokens:
            rows += [job.failed(tokens, who, reason) for who, reason in why.items()]
            rows += measure_case(job, random_case(SHAPES[job.name], job.bits, tokens), candidates)
            torch.cuda.empty_cache()
    return rows


@contextmanager
def unless_rival_fails(who: str, why: dict[str, object]) -> Generator[None]:
    """Notes in ``why`` what a rival raises; lets through what we raise."""
    try:
        yield
    except Exception as error:
        if who == OURS:
            raise
        traceback.print_exception(error)
        why[who] = repr(error)


def measure_case(job: Job, case: Case, candidates: Mapping[str, Any]) -> list[dict[str, object]]:
    """Rows of all candidates at one number of tokens."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    graphs: list[Callable[[], object]] = []
    rows: list[dict[str, object]] = []
    counts: list[int] = []
    kept: list[object] = []  # a graph does not hold the tensors that it reads
    why: dict[str, object] = {}
    for who, candidate in candidates.items():
        copies = case.copies(DENSE_BITS if who == TORCH else job.bits, cache)
        common = {"copies": copies, "active_experts": f"{case.active:.1f}"}
        with unless_rival_fails(who, why):
            calls, error, detail = candidate.gemms(case, copies)
            found = {"error": "" if error is None else f"{error:.2e}", "detail": detail}
            kept.append(calls)
            graphs.append(graph_of(calls).replay)
            rows.append(job.row(case.tokens, who, "gemms", **common, **found))
            counts.append(len(case.launches(copies)))
            if who == OURS or (who == TORCH and job.bits == DENSE_BITS):
                graphs.append(graph_of(candidate.layer(case, copies)).replay)
                rows.append(job.row(case.tokens, who, "layer", **common))
                counts.append(len(case.launches(copies)))
    floors = [roofs.floor_us(case.shape, job.bits, case.tokens, case.active) for roofs in (Roofs(), job.roofs)]
    for row, times, count in zip(rows, take_turns(graphs, job.rounds), counts, strict=True):
        low, middle, high = (quantile(times, part) / count for part in (0.2, 0.5, 0.8))
        row |= {"p20_us": f"{low:.2f}", "p50_us": f"{middle:.2f}", "p80_us": f"{high:.2f}"}
        row |= {"floor_us": f"{floors[0]:.2f}", "over_floor": f"{middle / floors[0]:.3f}"}
        row |= {"run_floor_us": f"{floors[1]:.2f}", "over_run_floor": f"{middle / floors[1]:.3f}"}
        print(*(row.get(column, "") for column in COLUMNS), flush=True)
    return rows + [job.failed(case.tokens, who, reason) for who, reason in why.items()]


def in_own_process(job: Job) -> list[dict[str, object]]:
    """Rows of a job. Where a rival takes the process or its device down, we are measured again without rivals."""
    try:
        return _submit(measure, job)
    except (BrokenProcessPool, RuntimeError) as error:
        others = [who for who in job.who if who != OURS]
        if not others or OURS not in job.who:
            raise
        traceback.print_exception(error)
        rows = [job.failed(tokens, who, repr(error)) for tokens in job.tokens for who in others]
        return _submit(measure, replace(job, who=(OURS,))) + rows


def _submit(function: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def compile_all(jobs: Sequence[Job], processes: int) -> None:
    """Fill the compilers' caches in many processes; what fails here fails again, and is told, where it is measured."""
    os.environ.setdefault("HUMMING_MAX_PARALLEL_BUILD_WORKERS", "1")  # read by the processes
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        works: dict[Future[None], str] = {}
        for job in jobs:
            for tokens in sorted(job.tokens, reverse=True):
                for who in job.who:
                    if who == OURS:
                        work = pool.submit(moe_ours.compile_ahead, job.name, job.bits, tokens)
                    elif who in HUMMING:
                        work = pool.submit(rivals.compile_ahead, job.name, job.bits, tokens, HUMMING[who])
                    else:
                        continue
                    works[work] = f"{who} {job.name} int{job.bits} M={tokens}"
        for work in as_completed(works):
            if error := work.exception():
                print(f"not compiled ahead: {works[work]}: {error!r}"[:400], flush=True)


def versions(who: Sequence[str]) -> dict[str, str]:
    """Of what matters beside torch."""
    found = {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    try:
        found["humming"] = importlib.metadata.version("humming-kernels") if set(who) & set(HUMMING) else ""
    except importlib.metadata.PackageNotFoundError:
        found["humming"] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--m", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024, 4096], help="numbers of tokens")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8], choices=(4, 8, DENSE_BITS))
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--processes", type=int, default=14, help="that compile beforehand; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="moe-h200.csv")
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    roofs: Roofs = _submit(measured_roofs)
    jobs = [
        Job(name, bits, tuple(args.m), tuple(who for who in args.only if serves(who, bits)), args.rounds, roofs)
        for name in args.shapes
        for bits in args.bits
    ]
    if args.processes:
        compile_all(jobs, args.processes)
    fixed = provenance("cuda", args.commit, **versions(args.only)) | {
        "read_tbps": f"{roofs.read_tbps:.2f}",
        "matmul_tflops": f"{roofs.matmul_tflops:.0f}",
    }

    def rows() -> Iterator[dict[str, object]]:
        for job in jobs:
            yield from in_own_process(job)

    write_rows(args.out / args.name, fixed, COLUMNS, rows())


if __name__ == "__main__":
    main()
