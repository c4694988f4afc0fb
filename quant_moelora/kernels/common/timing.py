"""Times on a CUDA device: graphs that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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
    torch.cuda._sleep(_SLEEP_CYCLES)  # pyright: ignore[reportPrivateUsage] - nothing public keeps a device busy
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


def graph_medians(works: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """Median time of one call of each work, in microseconds; each work is a graph, and all take turns."""
    graphs = [graph_of(calls) for calls in works]
    times = take_turns([graph.replay for graph in graphs], rounds)
    return [quantile(own, 0.5) / len(calls) for own, calls in zip(times, works, strict=True)]
