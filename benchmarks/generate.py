"""Tokens per second of `generate` with a model of Qwen3-30B-A3B's size in int4, with and without adapters.

    python -m benchmarks.generate --out DIR                     # writes DIR/generate-cuda.csv, in less than 5 minutes
    python -m benchmarks.generate --out DIR --device cpu        # the same of a tiny model, to try the script

The checkpoint is random and stands in a temporary folder. Two processes each load it, one to serve the base alone and
one with adapters on all experts, and compile what they need side by side; then they measure one after the other.
``--budget`` bounds all of it: a case that would end later is left out, and said to be. ``--all`` measures more cases.

Prefill is `generate` of one token. Decode is what every further token takes: the time of ``new`` tokens more, over
``new``. What experts take of either is what it takes less when their modules return their input; and what their
kernels take in a profile, which counts a kernel from when it waits for the one before. Memory counts tensors, as
torch's allocator does; `memory` compares its peak while generating with weights + adapters + cache.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CompileConfig, StaticCache

import quant_moelora as qm
from benchmarks.random_checkpoint import Size, write_checkpoint
from benchmarks.record import provenance, write_rows
from quant_moelora.integrations.adapters import adapters_of
from quant_moelora.integrations.attention import GROUPED_QUERY
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.integrations.transformers import experts_of

EXPERT_KERNELS = {
    "align_kernel",
    "compact_kernel",
    "grouped_gemm_kernel",
    "specialized_gemm_kernel",
    "activate_kernel",
    "moe_sum_kernel",
    "shrink13_kernel",
    "expand2_kernel",
}
TINY = Size(layers=2, hidden=128, inter=128, experts=8, top_k=2, heads=4, kv_heads=2, head_dim=32, vocab=512)
COLUMNS = (
    "layers batch prompt new adapters rank case attention steps phase seconds tokens_per_s ms ms_without_experts "
    "experts_of_time kernels_ms experts_ms experts_of_kernels bytes expected_bytes over_expected"
).split()
STEPS = {
    "graph": {},  # the library's: see `quant_moelora.integrations.decode_graphs`
    "eager": {"disable_compile": True},
    "compile": {"compile_config": CompileConfig()},  # transformers' own
}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    folder: str
    device: str
    size: Size
    batch: int
    prompt: int
    new: int
    adapters: int
    rank: int
    repeats: int
    every: bool
    compiled: bool
    deadline: float  # of time.monotonic, which processes share


class Turns(NamedTuple):
    """How processes take turns: both have compiled at ``ready``; ``base`` is set when the base has been measured."""

    ready: Any
    base: Any


class Case(NamedTuple):
    """One variant's steps: ``share`` also measures what experts take of them."""

    variant: str
    names: Sequence[str] | None
    steps: str = "graph"
    share: bool = True
    attention: str = GROUPED_QUERY


@dataclass
class Bench:
    """A loaded model, the prompts and the cache that all runs use."""

    plan: Plan
    model: Any
    ids: Tensor  # (batch, prompt)
    cache: Any  # StaticCache

    def run(self, new: int, names: Sequence[str] | None, steps: str) -> float:
        """Seconds of a batch."""
        self.cache.reset()
        chosen = {} if names is None else {"adapter_names": list(names)}
        self._wait()
        start = time.perf_counter()
        out = self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            past_key_values=self.cache,
            **STEPS[steps],
            **chosen,
        )
        self._wait()
        assert out.shape[1] == self.plan.prompt + new
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def warm_up(self, names: Sequence[str] | None, steps: str) -> None:
        """Compile and capture; say how long it took."""
        seconds = self.run(4, names, steps)
        print(f"  warm-up, {steps}, {names and len(set(names))} names: {seconds:.1f} s", flush=True)

    def timed(self, names: Sequence[str] | None, steps: str) -> tuple[float, float]:
        """Median seconds of the prefill and of a step after it."""
        new = self.plan.new
        repeat = [(self.run(1, names, steps), self.run(1 + new, names, steps)) for _ in range(self.plan.repeats)]
        return statistics.median(a for a, _ in repeat), statistics.median((b - a) / new for a, b in repeat)

    @contextmanager
    def without_experts(self) -> Generator[None]:
        """Blocks whose experts return their input; graphs are made anew."""
        modules = list(experts_of(self.model).values())
        try:
            for module in modules:
                replaced: Any = module
                replaced.forward = lambda hidden_states, *_: hidden_states
            modules[0].session.modules = object()
            yield
        finally:
            for module in modules:
                del module.forward
            modules[0].session.modules = object()

    def figures(self, names: Sequence[str] | None, steps: str, share: bool) -> Iterator[dict[str, Any]]:
        """Rows of prefill and decode."""
        plan = self.plan
        prefill, decode = self.timed(names, steps)
        few = min(16, plan.new)
        prefill_kernels = self.kernels(1, names, steps)
        both = self.kernels(1 + few, names, steps)
        decode_kernels = {name: (both[name] - prefill_kernels.get(name, 0.0)) / few for name in both}
        bare: tuple[float | None, float | None] = (None, None)
        if share:
            with self.without_experts():
                self.run(4, names, steps)
                bare = self.timed(names, steps)
            self.run(4, names, steps)
        phases = (
            ("prefill", prefill, plan.batch * plan.prompt / prefill, prefill_kernels, bare[0]),
            ("decode", decode, plan.batch / decode, decode_kernels, bare[1]),
        )
        for phase, seconds, rate, kernels, without in phases:
            total, ours = sum(kernels.values()), sum(ms for name, ms in kernels.items() if name in EXPERT_KERNELS)
            yield {
                "steps": steps,
                "phase": phase,
                "tokens_per_s": round(rate, 1),
                "ms": round(seconds * 1e3, 3),
                "ms_without_experts": "" if without is None else round(without * 1e3, 3),
                "experts_of_time": "" if without is None else round(1 - without / seconds, 3),
                "kernels_ms": round(total, 3),
                "experts_ms": round(ours, 3),
                "experts_of_kernels": round(ours / total, 3) if total else "",
            }
            for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:14]:
                print(f"    {phase} {ms:9.3f} ms  {ms / total:6.1%}  {name[:90]}", flush=True)

    def kernels(self, new: int, names: Sequence[str] | None, steps: str) -> dict[str, float]:
        """Milliseconds of each kernel of a run; nothing on a CPU."""
        if self.model.device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run(new, names, steps)
        return {event.key: event.self_device_time_total / 1e3 for event in profile.key_averages()}


def load(plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The model, and the row of how it was loaded."""
    start = time.perf_counter()
    model = qm.from_pretrained(plan.folder, device_map=plan.device, attn_implementation=GROUPED_QUERY)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else ""
    return model, {"phase": "load", "seconds": round(seconds, 2), "bytes": peak, "expected_bytes": weights(model)}


def weights(model: Any) -> int:
    """Bytes of the model: each storage once."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(held.values())


def attach_random(model: Any, plan: Plan) -> list[str]:
    """Random adapters of all experts, which no file holds; their names."""
    qm.attach_adapters(model, {}, max_adapters=plan.adapters, max_rank=plan.rank)
    held = adapters_of(model)
    assert held.bank is not None  # attach_adapters made it
    names = [f"adapter{i}" for i in range(plan.adapters)]
    held.session.slots = {name: held.bank.add_dummy(name, plan.rank) for name in names}
    return names


def arena(model: Any) -> int:
    """Bytes of the adapters."""
    bank = adapters_of(model).bank
    return 0 if bank is None else bank.report().capacity


def memory(bench: Bench, names: Sequence[str] | None) -> dict[str, Any]:
    """The row of what generating takes, at its peak."""
    if bench.model.device.type != "cuda":
        return {"phase": "memory"}
    torch.cuda.reset_peak_memory_stats()
    bench.run(1 + bench.plan.new, names, "graph")
    peak = torch.cuda.max_memory_allocated()
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in bench.cache.layers)
    parts = {"weights": weights(bench.model), "adapters": arena(bench.model), "cache": cache}
    print(f"  memory: {parts}, peak {peak}, reserved {torch.cuda.memory_reserved()}", flush=True)
    expected = sum(parts.values())
    return {"phase": "memory", "bytes": peak, "expected_bytes": expected, "over_expected": round(peak / expected, 4)}


def serve(case: str, plan: Plan, turns: Turns, out: Any) -> None:
    """Measure the base or adapters, in a process of its own; rows go to a queue, None is the end."""
    try:
        for row in rows(case, plan, turns):
            out.put({"case": case, "attention": GROUPED_QUERY, **row})
    finally:
        turns.ready.abort()  # of no effect unless another waits for this one in vain
        if case == "base":
            turns.base.set()
        out.put(None)


def rows(case: str, plan: Plan, turns: Turns) -> Iterator[dict[str, Any]]:
    """Rows of one process."""
    print(f"{case}: loading", flush=True)
    model, loaded = load(plan)
    yield loaded
    print(f"{case}: {loaded}", flush=True)
    ids = torch.randint(plan.size.vocab, (plan.batch, plan.prompt), generator=torch.Generator().manual_seed(0))
    cache = StaticCache(config=model.config, max_cache_len=plan.prompt + plan.new + 8)
    bench = Bench(plan, model, ids.to(model.device), cache)
    names: list[str] = []
    if case == "adapters":
        start = time.perf_counter()
        names = attach_random(model, plan)
        yield {"phase": "attach", "seconds": round(time.perf_counter() - start, 2), "bytes": arena(model)}
    cases = cases_of(plan, names)
    for each in cases:
        if each.steps == "graph" and each.attention == GROUPED_QUERY:
            bench.warm_up(each.names, each.steps)
    turns.ready.wait(timeout=400)
    if case == "adapters":
        turns.base.wait(timeout=400)
    yield memory(bench, cases[0].names)
    longest = 0.0
    for each in cases:
        start = time.monotonic()
        if start + longest > plan.deadline:
            print(f"left out for want of time: {each.variant}, {each.steps}, {each.attention}", flush=True)
            continue
        yield from ({"case": each.variant, **row} for row in measured(bench, each))
        longest = max(longest, time.monotonic() - start)


def cases_of(plan: Plan, names: Sequence[str]) -> list[Case]:
    """What a process measures, the most telling first: of the base alone if there are no names."""
    if not names:
        more = [Case("base", None, "eager", share=False), Case("base", None, attention="sdpa")]
        return [Case("base", None), *(more if plan.every else [])]
    mixed, base = [names[row % len(names)] for row in range(plan.batch)], [BASE_NAME] * plan.batch
    cases = [Case("adapters", mixed), Case("base rows", base, share=False), Case("adapters", mixed, "eager", False)]
    if plan.every:
        cases.append(Case("base rows", base, "eager", share=False))
    if plan.compiled and plan.device == "cuda":
        cases.append(Case("adapters", mixed, "compile", share=False))
    return cases


def measured(bench: Bench, case: Case) -> Iterator[dict[str, Any]]:
    """Rows of a case; eager steps are slow and few."""
    plan = bench.plan
    if case.steps == "eager":
        bench = replace(bench, plan=replace(plan, new=min(16, plan.new), repeats=plan.repeats if plan.every else 1))
    if case.attention != GROUPED_QUERY:
        bench.model.set_attn_implementation(case.attention)
    if case.attention != GROUPED_QUERY or case.steps == "compile":
        bench.warm_up(case.names, case.steps)
    yield from ({"attention": case.attention, **row} for row in bench.figures(case.names, case.steps, case.share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=280, help="seconds for everything")
    parser.add_argument("--all", action="store_true", help="also steps without graphs, and sdpa attention")
    parser.add_argument("--compiled", action="store_true", help="also transformers' torch.compile, minutes more")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes; a temporary folder")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    real = args.device == "cuda"
    size = Size() if real else TINY
    size = replace(size, layers=args.layers or size.layers)
    batch, prompt, new = (
        args.batch or (32 if real else 4),
        args.prompt or (512 if real else 8),
        args.new or (128 if real else 4),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "checkpoint"
        if not (folder / "model.safetensors.index.json").is_file():
            start = time.perf_counter()
            written = write_checkpoint(folder, size, torch.device(args.device))
            print(f"wrote {written} bytes in {time.perf_counter() - start:.1f} s", flush=True)
            if real:
                torch.cuda.empty_cache()
        counts = batch, prompt, new, args.adapters, args.rank, args.repeats
        plan = Plan(str(folder), args.device, size, *counts, args.all, args.compiled, deadline)
        fixed = provenance(args.device, args.commit, transformers=transformers.__version__)
        shape = {"layers": size.layers, "batch": batch, "prompt": prompt, "new": new}
        shape |= {"adapters": args.adapters, "rank": args.rank}
        table = ({**shape, **row} for row in measure(plan))
        write_rows(args.out / f"generate-{args.device}.csv", fixed, COLUMNS, table)


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows of all cases, as they come."""
    spawn = get_context("spawn")
    queue, turns = spawn.Queue(), Turns(spawn.Barrier(2), spawn.Event())
    workers = [spawn.Process(target=serve, args=(case, plan, turns, queue)) for case in ("base", "adapters")]
    for worker in workers:
        worker.start()
    ended = 0
    while ended < len(workers):
        row = queue.get()
        if row is None:
            ended += 1
            continue
        print({name: value for name, value in row.items() if value != ""}, flush=True)
        yield row
    for worker in workers:
        worker.join()
    assert not any(worker.exitcode for worker in workers), "a case failed"


if __name__ == "__main__":
    main()
