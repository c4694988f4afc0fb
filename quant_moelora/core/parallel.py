"""Work on parts that fit a core's cache, by as many threads as there are cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Generator[Result]:
    """Results of ``function``, in order; no more than ``workers`` + 1 of them wait for whoever takes them.

    With more than one worker, torch uses one thread an operator until the iterator is closed: operators that divide
    small tensors between threads wait for the slowest of them each, and for long where other processes want the cores.

    Args:
        function: called in threads of its own, unless ``workers`` is 1.
        items: what it is called with.
        workers: threads.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that start from now on
    try:
        with ThreadPoolExecutor(workers) as pool:
            pending: deque[Future[Result]] = deque()
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)
