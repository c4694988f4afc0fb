"""What several launches share."""

from __future__ import annotations

import functools

import torch

_OVERLAPPING = (9, 0)  # compute capability with programmatic dependent launch


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before still runs."""
    return device.type == "cuda" and capability(device) >= _OVERLAPPING


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, which decides on tiles; (10, 0) for other devices than CUDA's, where an interpreter runs.

    That has the largest tiles, but not the specialised GEMM of (9, 0), for which there is no interpreter.
    """
    return _capability(device.index or 0) if device.type == "cuda" else (10, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return _multiprocessors(device.index or 0)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
