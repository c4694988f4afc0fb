"""Times on a CUDA device: graphs that take turns, and the roofs that a figure is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from benchmarks.moe_case import Roofs

_SLEEP_CYCLES = 400_000  # some 0.2 ms, in which the graph is handed over


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls as one graph; each runs once before, so that nothing grows or compiles during the capture."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def elapsed_us(work: Callable[[], object]) -> float:
    """Time of ``work`` on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def take_turns(work: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Times of each, in microseconds, sorted; a round runs all of them, and a first round does not count."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(rounds + 1):
        for own, one in zip(times, work, strict=True):
            own.append(elapsed_us(one))
    return [sorted(own[1:]) for own in times]


def quantile(times: Sequence[float], part: float) -> float:
    """The time below which ``part`` of the sorted times lie."""
    return times[round(part * (len(times) - 1))]


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    values = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + pid, tl.sum(values, 0))


def measured_roofs(rounds: int = 20) -> Roofs:
    """Rates of reading 4 GiB and of a dense bfloat16 product of 8192 x 8192 x 8192 random values."""
    x = torch.zeros(2**30, dtype=torch.int32, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    blocks = (4096, 8192)
    out = torch.empty(x.numel() // min(blocks), dtype=torch.int32, device="cuda")
    work: list[Callable[[], object]] = [
        lambda size=size: _read_kernel[(x.numel() // size,)](x, out, BLOCK=size) for size in blocks
    ]
    *reads, product = take_turns([*work, lambda: a @ b], rounds)
    read_us, product_us = min(map(statistics.median, reads)), statistics.median(product)
    return Roofs(x.nbytes / read_us / 1e6, 2 * 8192**3 / product_us / 1e6)
