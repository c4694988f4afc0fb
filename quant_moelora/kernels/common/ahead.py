"""Compiling kernels ahead of their use."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiling_only() -> Generator[None]:
    """Meanwhile, launches put what they would run into Triton's cache on disk, and run nothing.

    They compile for the current CUDA device, also for tensors without data on the meta device.
    """
    from triton.runtime.jit import JITFunction

    kind: Any = JITFunction
    run = kind.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> object:
        return run(self, *args, **(kwargs | {"warmup": True}))

    kind.run = compile_only
    try:
        yield
    finally:
        kind.run = run
