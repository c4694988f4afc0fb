"""What backends ask of a GPU."""

from __future__ import annotations

import importlib.util

import torch

_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # fma.rn.bf16x2 and cp.async


def kernel_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why Triton's kernels do not serve activations of this dtype on this device; empty if they do."""
    reasons: list[str] = []
    if device.type != "cuda":
        reasons.append(f"device {device} is no CUDA device")
    elif not torch.cuda.is_available():
        reasons.append(f"torch sees no CUDA device to be {device}")
    elif (found := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        reasons.append(f"{device} has compute capability {found[0]}.{found[1]}, below 8.0")
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if dtype not in _DTYPES:
        reasons.append(f"activation dtype {dtype} is not bfloat16 or float16")
    return reasons
