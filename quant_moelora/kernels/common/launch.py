"""What several launches share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_OVERLAPPING = (9, 0)  # compute capability with programmatic dependent launch


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before still runs."""
    return _on_gpu(device) and capability(device) >= _OVERLAPPING


def options(overlap: bool) -> dict[str, bool]:
    """What every launch says to the compiler.

    A product and a sum become one FMA wherever ptxas finds them, which Triton did without a word up to 3.9 and stops in
    3.10: said here, results are the same under all. The dequantisation's FMAs are instructions of their own.
    """
    return {"launch_pdl": overlap, "enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, overlap: bool, **constants: Any) -> None:
    """Launch a Triton kernel; where ``out``, any tensor of it, has no data, only compile it into Triton's cache.

    Args:
        kernel: of `triton.jit`, whose launcher has no types.
        grid: programs.
        out: which the kernel writes.
        arguments: of the kernel.
        overlap: whether it may be launched while the kernel before still runs; see `overlaps`.
        constants: compile-time constants of the kernel and options of the compiler.
    """
    run = functools.partial(kernel.warmup, grid=grid) if out.is_meta else kernel[grid]
    run(*arguments, **constants, **options(overlap))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, which decides on tiles; (10, 0) for other devices than CUDA's, where an interpreter runs.

    That has the largest tiles, but not the specialised GEMM of (9, 0), for which there is no interpreter.
    """
    return _capability(device.index or 0) if _on_gpu(device) else (10, 0)


def is_interpreted(device: torch.device) -> bool:
    """Whether kernels are interpreted there: Triton runs on no other device than a GPU."""
    return not _on_gpu(device)


def gpu_name(device: torch.device) -> str:
    """Name of the GPU, by which tables of tiles are found; the device's type where there is none."""
    return _gpu_name(device.index or 0) if _on_gpu(device) else device.type


def _on_gpu(device: torch.device) -> bool:
    """Whether it is a GPU, or stands for the first one: what has no data is compiled for that, ahead of its use."""
    return device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available())


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return _multiprocessors(device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
