"""Workspace: named buffers of one layer's forward, allocated once and reused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_moelora.core.errors import BackendError


class Workspace:
    """Buffers by name. A buffer grows when a forward needs more, and is reused otherwise.

    Forwards that share a workspace run one after the other: on one stream, or on streams that wait for each other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Tensors made in inference mode may not be written outside of it, so that each mode has its own.
        self._storage: dict[tuple[str, torch.dtype, bool], Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer ``name`` as a tensor of ``shape`` and ``dtype``, with whatever it last held.

        While autograd records, every call makes a new tensor: a reused one would carry the history of all forwards.

        Raises:
            BackendError: a CUDA graph is being captured and the buffer would have to grow, which would give the
                graph an address that is later freed.
        """
        if torch.is_grad_enabled():
            self._last[name] = torch.empty(shape, dtype=dtype, device=self.device)
            return self._last[name]
        numel = math.prod(shape)
        key = (name, dtype, torch.is_inference_mode_enabled())
        held = self._storage.get(key)
        if held is None or held.numel() < numel:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"workspace buffer {name}",
                    got=f"a request for {numel} elements while capturing a CUDA graph",
                    rule=f"at most the {0 if held is None else held.numel()} elements warmed up",
                    remedy="run one forward of the largest batch before the capture",
                )
            held = torch.empty(numel, dtype=dtype, device=self.device)
            self._storage[key] = held
        self._last[name] = held[:numel].view(shape)
        return self._last[name]

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Let `last` return a tensor that an operator has made, or is about to fill."""
        self._last[name] = tensor
        return tensor

    def last(self, name: str) -> Tensor:
        """What was last made or kept under this name: how one step of a forward hands over to a later one."""
        return self._last[name]

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self._storage.values())
