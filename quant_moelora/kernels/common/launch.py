"""What several launches share."""

from __future__ import annotations

import functools

import torch

_OVERLAPPING = (9, 0)  # compute capability with programmatic dependent launch


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before still runs."""
    return device.type == "cuda" and capability(device) >= _OVERLAPPING


def options(overlap: bool) -> dict[str, bool]:
    """What every launch says to the compiler.

    A product and a sum become one FMA wherever ptxas finds them, which Triton did without a word up to 3.9 and stops in
    3.10: said here, results are the same under all. The dequantisation's FMAs are instructions of their own.
    """
    return {"launch_pdl": overlap, "enable_fp_fusion": True}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, which decides on tiles; (9, 0) for other devices than CUDA's, where an interpreter runs."""
    return _capability(device.index or 0) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
