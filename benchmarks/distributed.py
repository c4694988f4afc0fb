"""Times of a layer of experts on several GPUs, beside the same layer on one.

`torchrun --standalone --nproc-per-node 2 -m benchmarks.distributed --out DIR` writes DIR/distributed-h200.csv. Weak
scaling: M tokens a GPU, so that one GPU alone has M and all together have M times as many. Tensor parallel GPUs all
have all tokens. With CUDA graphs, but for all-to-all, which asks the host how many rows there are. `comm_us` is the
same without experts: packing, collectives, and nothing between, hence without those of fully sharded LoRA.
`--device cpu --tiny` tries it out with gloo.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.lora_case import Adapters
from benchmarks.moe_case import DTYPE, GROUP, SHAPES, Shape, random_info
from benchmarks.moe_lora import compile_layer
from benchmarks.record import provenance, write_rows
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig, Shard
from quant_moelora.core.weights import PackedWeight
from quant_moelora.distributed.cost import LayerCost, expected_targets, layer_cost
from quant_moelora.distributed.exchange import Tokens
from quant_moelora.distributed.layer import DistributedExperts, Exchange
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.kernels.common import sample
from quant_moelora.kernels.common.sample import random_adapters, random_slots
from quant_moelora.kernels.common.timing import graph_of, quantile, take_turns
from quant_moelora.layer import MoEExperts

BITS = 4
LEAST = 1024  # tokens of a piece
TINY = {"tiny": Shape(8, 2, 256, 640)}
TIMEOUT = timedelta(minutes=8)  # of a collective: one process compiles for all
COLUMNS = (
    "shape bits gpus way m adapters rank p20_us p50_us p80_us comm_us one_us efficiency model_comm_us copies launches"
).split()


@dataclass(frozen=True)
class Way:
    """A way to be parallel.

    Attributes:
        dim: ``tp`` or ``ep``.
        exchange: as of `DistributedExperts`.
        fully: whether LoRA is fully sharded.
        pieces: that a forward is computed in.
    """

    dim: str
    exchange: Exchange = "none"
    fully: bool = False
    pieces: int = 1

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs capture it."""
        return self.exchange != "all_to_all"

    def parts(self, shape: Shape, processes: int) -> list[Shape]:
        """What the processes hold."""
        sizes = {f"{self.dim}_size": processes}
        configs = [ParallelConfig(**sizes, **{f"{self.dim}_rank": rank}) for rank in range(processes)]
        return [held_of(shape, config)[1] for config in configs]

    def rows(self, tokens: int, processes: int, top_k: int) -> int:
        """Tokens that one process computes, of ``tokens`` of each."""
        if self.exchange == "all_to_all":
            return math.ceil(tokens * expected_targets(top_k, processes))
        return tokens * processes


def held_of(shape: Shape, config: ParallelConfig) -> tuple[Shard, Shape]:
    """What a process holds of a layer."""
    held = config.shard(shape.experts, shape.inter, GROUP)
    return held, replace(shape, experts=held.experts.size, inter=held.inter.size)


WAYS = {
    "tp": Way("tp"),
    "tp-fully": Way("tp", fully=True),
    "tp-pieces": Way("tp", pieces=2),
    "ep-gather": Way("ep", "all_gather"),
    "ep-gather-pieces": Way("ep", "all_gather", pieces=2),
    "ep-all-to-all": Way("ep", "all_to_all"),
}


class Exchanging(DistributedExperts):
    """The layer without its experts: what is left is communication."""

    def _compute(self, tokens: Tokens) -> Tensor:  # (M, H)
        return tokens.x


@dataclass(frozen=True)
class Bench:
    """What is measured where.

    Attributes:
        device: this process's.
        rank: this process's.
        processes: how many there are.
        rounds: of each measurement.
        shapes: by name.
    """

    device: torch.device
    rank: int
    processes: int
    rounds: int
    shapes: dict[str, Shape]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return DTYPE if self.device.type == "cuda" else torch.float32

    def copies(self, shape: Shape, tokens: int) -> int:
        """Copies of weights that take turns, so that they come from memory."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        active = sample.active_experts(self.routings(shape, tokens))
        return min(24, sample.copies(active * shape.expert_bytes(BITS), cache))

    def routings(self, shape: Shape, tokens: int) -> list[Tensor]:
        """Of this process's tokens."""
        return [
            ids.roll(self.rank, 1) for ids in sample.random_routings(shape.experts, shape.top_k, tokens, self.device)
        ]

    def times(self, works: Sequence[list[Callable[[], object]]], graphs: bool) -> list[list[float]]:
        """Sorted times of a call of each, in microseconds; the slowest process counts, round by round."""
        if self.device.type != "cuda":
            found = [[_host_us(calls) for _ in range(self.rounds)] for calls in works]
        elif graphs:
            found = take_turns([graph_of(calls).replay for calls in works], self.rounds)
        else:
            found = take_turns([functools.partial(_all, calls) for calls in works], self.rounds)
        table = torch.tensor(found, device=self.device) / torch.tensor([[len(c)] for c in works], device=self.device)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        return table.tolist()


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _host_us(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    _all(calls)
    return (time.perf_counter() - start) * 1e6


def copied(info: MoEQuantInfo) -> MoEQuantInfo:
    """The same with codes and scales of its own."""
    packed = [weight for weight in (info.w13, info.w2) if isinstance(weight, PackedWeight)]
    w13, w2 = (replace(weight, qweight=weight.qweight.clone(), scales=weight.scales.clone()) for weight in packed)
    return replace(info, w13=w13, w2=w2)


def attach(layer: MoEExperts, adapters: Adapters, bench: Bench) -> None:
    """Random adapters; those of a part are as large as its share."""
    info = layer.info
    held = random_adapters(info, bench.dtype, adapters.count, adapters.rank, adapters.num_slots, bench.device)
    layer.attach(replace(held, shard=info.shard))


def calls_of(
    layers: Sequence[MoEExperts], shape: Shape, tokens: int, adapters: Adapters | None, bench: Bench, *, alike: bool
) -> list[Callable[[], object]]:
    """Forwards over all layers and routings; alike: all processes have all processes' tokens."""
    count = tokens * bench.processes if alike else tokens
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, shape.hidden, generator=generator).to(bench.device, bench.dtype)
    weights = torch.full((count, shape.top_k), 1 / shape.top_k, device=bench.device)
    routings = bench.routings(shape, tokens)
    if alike:
        routings = sample.random_routings(shape.experts, shape.top_k, count, bench.device)
    slots = random_slots(adapters.count, count, len(routings), bench.device) if adapters else [None] * len(routings)
    works = sample.launches(list(zip(routings, slots, strict=True)), len(layers))
    return [functools.partial(layers[copy], x, ids, weights, own) for copy, (ids, own) in works]


def measure_one(name: str, tokens: int, adapters: Adapters | None, bench: Bench) -> tuple[list[float], int]:
    """Times of the whole layer on one GPU, and its copies."""
    shape = bench.shapes[name]
    info, copies = _random(shape, str(bench.device)), bench.copies(shape, tokens)
    layers = [MoEExperts(info if copy == 0 else copied(info)) for copy in range(copies)]
    for layer in layers if adapters else ():
        assert adapters is not None
        attach(layer, adapters, bench)
    (times,) = bench.times([calls_of(layers, shape, tokens, adapters, bench, alike=False)], graphs=True)
    return times, copies


@functools.lru_cache(maxsize=3)  # the whole of a shape, and its parts by both dimensions
def _random(shape: Shape, device: str) -> MoEQuantInfo:
    return random_info(shape, BITS, device)


def measure(
    name: str, way: Way, tokens: int, adapters: Adapters | None, bench: Bench, mesh: ExpertMesh
) -> dict[str, Any]:
    """Times of a way, with and without its experts."""
    shape, tp = bench.shapes[name], way.dim == "tp"
    held, part = held_of(shape, mesh.config)
    info = replace(_random(part, str(bench.device)), shard=held)
    first = way.parts(shape, bench.processes)[0]  # so that all make as many copies
    copies = bench.copies(first, way.rows(tokens, bench.processes, 1))
    rows = tokens if way.exchange == "all_gather" else None
    own = tokens * (bench.processes if tp else 1)
    options: dict[str, Any] = {"exchange": way.exchange, "rows": rows}
    options["microbatch_rows"] = own // way.pieces if way.pieces > 1 else None
    layers = [DistributedExperts(info if copy == 0 else copied(info), mesh, **options) for copy in range(copies)]
    idle = Exchanging(info, mesh, **options)
    for layer in (*layers, idle) if adapters else ():
        assert adapters is not None
        attach(layer, adapters, bench)
    works = [calls_of(group, shape, tokens, adapters, bench, alike=tp) for group in (layers, [idle])]
    times, comm = bench.times(works, way.graphs)
    cost = LayerCost(shape.experts, shape.top_k, shape.hidden, shape.inter, itemsize=bench.dtype.itemsize)
    sizes = {"tp": bench.processes} if tp else {"ep": bench.processes}
    ranks = adapters.rank if adapters and way.fully else 0
    model = layer_cost(cost, own, exchange=way.exchange, ranks=ranks, **sizes)
    row = _quantiles(times) | {"comm_us": f"{quantile(comm, 0.5):.2f}", "model_comm_us": f"{model.exchange_us:.2f}"}
    return row | {"copies": copies, "launches": len(works[0])}


def _quantiles(times: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(times)
    return {f"p{part}_us": f"{quantile(ordered, part / 100):.2f}" for part in (20, 50, 80)}


def compile_all(args: argparse.Namespace, bench: Bench, adapters: Adapters) -> None:
    """Fill the compiler's cache in many processes, for all parts and the whole."""
    kinds: dict[tuple[Shape, int], None] = {}
    for name, tokens in itertools.product(args.shapes, args.tokens):
        shape = bench.shapes[name]
        kinds[shape, tokens] = None
        for way in (WAYS[name] for name in args.ways):
            rows = way.rows(tokens, bench.processes, shape.top_k) // way.pieces
            kinds.update(dict.fromkeys((part, rows) for part in way.parts(shape, bench.processes)))
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        ordered = sorted(kinds, key=lambda kind: -kind[1])
        works = {pool.submit(compile_layer, *kind, adapters): kind for kind in ordered}
        for work in as_completed(works):
            if error := work.exception():
                print(f"not compiled ahead: {works[work]}: {error!r}"[:400], flush=True)


def rows(args: argparse.Namespace, bench: Bench) -> Iterator[dict[str, object]]:
    """All measurements; every process makes all of them."""
    meshes = {
        name: ExpertMesh(
            init_device_mesh(bench.device.type, (bench.processes,), mesh_dim_names=(way.dim,)),
            fully_sharded_lora=way.fully,
        )
        for name, way in WAYS.items()
        if name in args.ways
    }
    some = Adapters(args.adapters, args.rank)
    for name, tokens, adapters in itertools.product(args.shapes, args.tokens, (None, some)):
        fixed: dict[str, object] = {"shape": name, "bits": BITS, "gpus": bench.processes, "m": tokens}
        fixed |= {"adapters": adapters.count if adapters else 0, "rank": adapters.rank if adapters else 0}
        alone, copies = measure_one(name, tokens, adapters, bench)
        one = quantile(sorted(alone), 0.5)
        yield fixed | _quantiles(alone) | {"way": "one", "gpus": 1, "copies": copies}
        for label, mesh in meshes.items():
            way = WAYS[label]
            if way.fully and adapters is None:
                continue  # the same as without
            if way.pieces > 1 and tokens * bench.processes < LEAST * way.pieces:
                continue
            row = fixed | {"way": label} | measure(name, way, tokens, adapters, bench, mesh)
            # Weak scaling: as many times the tokens in the time of one. Tensor parallel counts alike.
            yield row | {"one_us": f"{one:.2f}", "efficiency": f"{one / float(str(row['p50_us'])):.3f}"}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def shown(found: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
    """The rows, printed as they come."""
    for row in found:
        print(*(row.get(column, "") for column in COLUMNS), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=["qwen3-30b-a3b", "deepseek-v3"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 1024, 4096], help="M of a GPU")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=24, help="that compile beforehand; 0 for none")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape to try it out with")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="distributed-h200.csv")
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    rank, device = dist.get_rank(), torch.device(args.device)
    if cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if args.tiny:
        args.shapes = list(TINY)
    bench = Bench(device, rank, dist.get_world_size(), args.rounds, SHAPES | TINY)
    if cuda and args.processes and rank == 0:
        compile_all(args, bench, Adapters(args.adapters, args.rank))
    dist.barrier()
    torch.manual_seed(rank)
    with torch.inference_mode():
        found = rows(args, bench)
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            from torch.cuda import nccl as library

            nccl = ".".join(map(str, library.version())) if cuda else "none"
            write_rows(args.out / args.name, provenance(args.device, args.commit, nccl=nccl), COLUMNS, shown(found))
        else:
            list(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
