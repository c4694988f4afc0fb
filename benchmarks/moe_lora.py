"""Times of a layer of experts with LoRA, beside the same layer without, and beside one call an adapter.

`python -m benchmarks.moe_lora --out DIR` writes DIR/lora-h200.csv. Each token has a random adapter. A graph runs
several routings in turn, over as many copies of weights and adapters as it takes for these to come from memory; the
graphs of a case take turns, round by round. `loop` is what a library without mixed batches would do: tokens sorted by
adapter, and a call of the layer for each adapter that has any.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.lora_case import Adapters, active_pairs, floor_us
from benchmarks.moe_case import DTYPE, SHAPES, Case, Roofs, Shape, random_case, random_info
from benchmarks.record import provenance, write_rows
from benchmarks.roofs import measured_roofs
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts import marlin_op
from quant_moelora.kernels.common.sample import blank_prepared
from quant_moelora.kernels.common.timing import graph_of, quantile, take_turns
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.kernels.lora.launch import LoRATables
from quant_moelora.layer import MoEExperts

BITS = 4
BASE, LORA, LOOP = "base", "lora", "loop"
COLUMNS = (
    "shape bits m adapters rank who p20_us p50_us p80_us floor_us over_floor added_us added_part lora_floor_us "
    "active_experts active_pairs copies launches"
).split()


@dataclass(frozen=True)
class Job:
    """One case: a layer, a number of tokens, and adapters."""

    name: str
    tokens: int
    adapters: Adapters
    loop: bool

    def case(self) -> Case:
        """Its tokens and routings."""
        return random_case(SHAPES[self.name], BITS, self.tokens)


class Layers:
    """Copies of a layer, each with adapters of its own."""

    def __init__(self, info: MoEQuantInfo) -> None:
        self._info = info
        self._layers: list[MoEExperts] = []
        self._held: Adapters | None = None

    def take(self, copies: int, adapters: Adapters) -> list[MoEExperts]:
        """So many copies with such adapters."""
        info = self._info
        packed = [weight for weight in (info.w13, info.w2) if isinstance(weight, PackedWeight)]
        if self._held != adapters:
            for layer in self._layers:
                layer.attach(None)
        for copy in range(copies):
            if copy == len(self._layers):
                w13, w2 = (replace(w, qweight=w.qweight.clone(), scales=w.scales.clone()) for w in packed)
                self._layers.append(MoEExperts(replace(info, w13=w13, w2=w2), backend="marlin"))
            if self._layers[copy].injection.ctx is None:
                self._layers[copy].attach(adapters.context(info, "cuda"))
        self._held = adapters
        return self._layers[:copies]


def looped(layer: MoEExperts, case: Case, ids: Tensor, slots: Tensor, present: Sequence[int]) -> Callable[[], object]:
    """A forward that calls the layer once an adapter; which tokens are whose is known beforehand."""
    held = [(slots == slot).nonzero().flatten() for slot in present]
    own = [(case.x[t], ids[t], case.topk_weights[t], slots[t]) for t in held]

    def forward() -> None:
        for arguments in own:
            layer(*arguments)

    return forward


def forwards(
    job: Job, case: Case, layers: Sequence[MoEExperts], slots: Sequence[Tensor]
) -> dict[str, list[Callable[[], object]]]:
    """Calls of each candidate, one for each launch of a graph."""
    made: dict[str, list[Callable[[], object]]] = {BASE: [], LORA: [], LOOP: []}
    held = itertools.cycle(slots)
    for (copy, ids), own in zip(case.launches(len(layers)), held, strict=False):
        made[BASE].append(functools.partial(layers[copy], case.x, ids, case.topk_weights))
        made[LORA].append(functools.partial(layers[copy], case.x, ids, case.topk_weights, own))
        if job.loop:
            made[LOOP].append(looped(layers[copy], case, ids, own, own.unique().tolist()))
    return {who: calls for who, calls in made.items() if calls}


def launches(call: Callable[[], object]) -> int:
    """Kernels of a call that ran before, so that nothing compiles or grows in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    return sum(event.device_type == cuda for event in profile.events() or ())


def measure(job: Job, layers: Layers, rounds: int) -> list[dict[str, object]]:
    """Rows of a case."""
    case, cache = job.case(), torch.cuda.get_device_properties(0).L2_cache_size
    slots = job.adapters.slots(case)
    copies = max(case.copies(BITS, cache), job.adapters.copies(case.shape, cache))
    works = forwards(job, case, layers.take(copies, job.adapters), slots)
    graphs = {who: graph_of(calls) for who, calls in works.items()}
    times = take_turns([graph.replay for graph in graphs.values()], rounds)
    pairs = active_pairs(case.routings, slots)
    floor = floor_us(Roofs(), case, job.adapters, pairs)
    lora_floor = floor - Roofs().floor_us(case.shape, BITS, case.tokens, case.active)
    rows: list[dict[str, object]] = []
    base = 0.0
    for who, own in zip(works, times, strict=True):
        low, middle, high = (quantile(own, part) / len(works[who]) for part in (0.2, 0.5, 0.8))
        base, least = (middle, floor - lora_floor) if who == BASE else (base, floor)
        row: dict[str, object] = {"shape": job.name, "bits": BITS, "m": job.tokens, "who": who}
        row |= {"adapters": job.adapters.count, "rank": job.adapters.rank, "copies": copies}
        row |= {"p20_us": f"{low:.2f}", "p50_us": f"{middle:.2f}", "p80_us": f"{high:.2f}"}
        row |= {"floor_us": f"{least:.2f}", "over_floor": f"{middle / least:.3f}", "lora_floor_us": f"{lora_floor:.2f}"}
        row |= {"added_us": f"{middle - base:.2f}", "added_part": f"{middle / base - 1:.3f}"}
        row |= {"active_experts": f"{case.active:.1f}", "active_pairs": f"{pairs:.1f}"}
        row |= {"launches": launches(works[who][0])}
        rows.append(row)
        print(*(row.get(column, "") for column in COLUMNS), flush=True)
    return rows


def compile_ahead(job: Job) -> None:
    """Compile what a case launches into Triton's cache, without tensors: for several processes at once."""
    compile_layer(SHAPES[job.name], job.tokens, job.adapters)


def compile_layer(shape: Shape, tokens: int, adapters: Adapters) -> None:
    """Compile a layer of any shape, with and without adapters."""
    info = random_info(shape, BITS, "meta")
    w13, w2 = (blank_prepared(w, DTYPE) for w in (info.w13, info.w2) if isinstance(w, PackedWeight))
    source = TileSource(LayerShape.of(info, DTYPE).name, "")
    layer = marlin_op.MarlinLayer(w13, w2, info.activation, weigh_input=False, tiles=source)
    tables = LoRATables.of(adapters.context(info, "meta"))
    x = torch.empty(tokens, shape.hidden, dtype=DTYPE, device="meta")
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta")
    given = (x, ids, torch.empty(tokens, shape.top_k, device="meta"))
    with torch.inference_mode():
        marlin_op.write_layer(*given, *layer.arguments(), torch.empty_like(x))
        marlin_op.write_lora_layer(*given, ids[:, 0], *layer.arguments(), *tables, torch.empty_like(x))


def compiled_jobs(jobs: Sequence[Job]) -> list[Job]:
    """One job of each kind that is compiled for itself, the longest first; a loop has calls of all smaller sizes."""
    kinds: dict[tuple[str, int, int, int], Job] = {}
    for job in jobs:
        sizes = [job.tokens, *(1 << n for n in range((job.tokens - 1).bit_length()))] if job.loop else [job.tokens]
        for tokens in sizes:
            kinds.setdefault((job.name, tokens, job.adapters.num_slots, job.adapters.rank), replace(job, tokens=tokens))
    return sorted(kinds.values(), key=lambda job: -job.tokens)


def compile_all(jobs: Sequence[Job], processes: int) -> None:
    """Fill the compiler's cache in many processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        works = {pool.submit(compile_ahead, job): job for job in compiled_jobs(jobs)}
        for work in as_completed(works):
            if error := work.exception():
                print(f"not compiled ahead: {works[work]}: {error!r}"[:400], flush=True)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The cases that were asked for, those of one shape together."""
    few = list(itertools.product(args.m, args.adapters, args.ranks))
    many = list(itertools.product(args.many_m, args.many, (16,)))
    deep = list(itertools.product(args.deep_m, (8,), args.deep))
    return [
        Job(name, tokens, Adapters(count, rank), loop=(tokens, count, rank) in many)
        for name in args.shapes
        for tokens, count, rank in dict.fromkeys((*few, *many, *deep))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--m", type=int, nargs="*", default=[1, 4, 8, 16, 64, 256, 1024], help="numbers of tokens")
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8], help="numbers of adapters, at each M")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16], help="ranks, at each M")
    parser.add_argument("--many-m", type=int, nargs="*", default=[64, 256], help="M of --many")
    parser.add_argument("--many", type=int, nargs="*", default=[1, 8, 32, 128], help="adapters of rank 16, with a loop")
    parser.add_argument("--deep-m", type=int, nargs="*", default=[64], help="M of --deep")
    parser.add_argument("--deep", type=int, nargs="*", default=[8, 32, 64, 128], help="ranks of 8 adapters")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--processes", type=int, default=14, help="that compile beforehand; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="lora-h200.csv")
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(args)
    if args.processes:
        compile_all(jobs, args.processes)
    roofs = measured_roofs()
    fixed = provenance("cuda", args.commit, triton=triton.__version__, cuda=str(torch.version.cuda))
    fixed |= {"read_tbps": f"{roofs.read_tbps:.2f}", "matmul_tflops": f"{roofs.matmul_tflops:.0f}"}

    def rows() -> Iterator[dict[str, object]]:
        for name, own in itertools.groupby(jobs, lambda job: job.name):
            torch.manual_seed(0)
            layers = Layers(random_info(SHAPES[name], BITS, "cuda"))
            for job in sorted(own, key=lambda job: (job.adapters.rank, job.adapters.count, job.tokens)):
                yield from measure(job, layers, args.rounds)
                torch.cuda.empty_cache()

    with torch.inference_mode():
        write_rows(args.out / args.name, fixed, COLUMNS, rows())


if __name__ == "__main__":
    main()
