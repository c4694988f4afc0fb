"""Shape and dtype checks that every typed object of core makes of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.errors import ShapeError


def check_tensor(
    name: str,
    tensor: Tensor,  # any shape
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    why: str,
) -> None:
    """Raise unless ``tensor`` has exactly the shape and dtype that its logical dimensions demand.

    Args:
        name: the field, as the message names it.
        tensor: the tensor to look at.
        shape: expected shape, computed from logical dimensions.
        dtype: expected dtype.
        why: the logical dimensions in words, for the message.

    Raises:
        ShapeError: on any difference.
    """
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            name,
            got=f"shape {list(tensor.shape)}",
            rule=f"{list(shape)} for {why}",
            remedy="give the logical dimensions of the unpacked weight, never those of a packed tensor",
        )
    if tensor.dtype != dtype:
        raise ShapeError(
            name,
            got=f"dtype {tensor.dtype}",
            rule=f"{dtype} for {why}",
            remedy="keep packed tensors as their loader made them; .to(dtype) must not touch them",
        )


def check_same_device(tensors: dict[str, Tensor]) -> None:
    """Raise ShapeError unless all tensors (any shape, keyed by field) are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ShapeError(
            "devices",
            got=", ".join(f"{name} on {device}" for name, device in devices.items()),
            rule="one device for all tensors",
            remedy="move the whole object with .to(device)",
        )


def check_positive(**dims: int) -> None:
    """Raise ShapeError unless every named dimension is at least 1."""
    for name, value in dims.items():
        if value < 1:
            raise ShapeError(name, got=value, rule="at least 1", remedy="give the model's logical dimension")
