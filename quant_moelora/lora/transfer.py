"""Transfer: copies to a device beside the stream that serves."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """Copies host memory to one device, on CUDA by a stream of its own; nothing here waits for the device.

    On any other device all of it is plain copies, in the order of the calls. "The caller's stream" is the device's
    current one at the time of a call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:  # any shape
        """Zeros in host memory, pinned for CUDA.

        It may be dropped as soon as it was sent: torch marks pinned memory with an event at every asynchronous copy
        from it, and gives it to nobody else before.
        """
        return torch.zeros(shape, dtype=dtype, pin_memory=self._copies is not None)

    def send(
        self,
        source: Tensor,  # any shape, of `staging`; not written to again
        target: Tensor,  # the same shape, contiguous, on the device
    ) -> None:
        """Copy, after earlier copies and whatever `hold` named."""
        with torch.cuda.stream(self._copies):  # None: no stream is changed
            target.copy_(source, non_blocking=True)

    def hold(self) -> None:
        """Let later copies wait for all that the caller's stream has been given so far."""
        if self._copies is not None:
            self._copies.wait_event(torch.cuda.current_stream(self._device).record_event())

    def arrive(self) -> None:
        """Let the caller's stream wait for the copies sent so far."""
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copies.record_event())

    def lend(
        self,
        tensor: Tensor,  # any shape, on the device
    ) -> None:
        """Let torch know that copies go to ``tensor``, so that its memory is not given away before their end."""
        if self._copies is not None:
            tensor.record_stream(self._copies)
