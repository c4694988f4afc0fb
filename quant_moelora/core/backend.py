"""ExpertsBackend: who computes a layer, and what it says about what it can serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.workspace import Workspace


@dataclass(frozen=True)
class Verdict:
    """Whether a backend serves a request, and why not.

    Attributes:
        reasons: every reason against it; empty means that it serves.
    """

    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if there is no reason against it."""
        return not self.reasons


@dataclass(frozen=True, eq=False)
class Prepared:
    """A backend's view of an info for one compute dtype.

    Attributes:
        info: the weights; their codes are shared, not copied.
        dtype: activation dtype.
        tensors: what the backend made for itself, such as converted scales.
        lossy: what a cast lost, in words, or None if nothing.
    """

    info: MoEQuantInfo
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    lossy: str | None


class ExpertsBackend(Protocol):
    """Computes a layer of experts, or one process's part of it, which is a smaller layer (`core.shard`).

    Attributes:
        name: name in the registry.
        fuses: names of the injection's parts that the backend computes itself inside its GEMMs.
        capturable: whether `apply` never waits for the device and asks it nothing, so that CUDA graphs capture it.
    """

    name: str
    fuses: frozenset[str]
    capturable: bool

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Whether the backend serves this info (which may be on the meta device), with every reason against it."""
        ...

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        """Make the backend's view, once; a backend with tuned tiles looks for them in the folder first."""
        ...

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        """Make the buffers that `apply` works in."""
        ...

    def apply(
        self,
        x: Tensor,  # (M, H) prepared.dtype
        prepared: Prepared,
        routing: Routing,
        injection: Injection,
        workspace: Workspace,
    ) -> Tensor:  # (M, H) prepared.dtype
        """Compute the layer."""
        ...
