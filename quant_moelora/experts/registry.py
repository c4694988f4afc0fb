"""The registered backends, in the order in which `backend="auto"` tries them, and the choice among them.

No exception to that order is known; where one is measured, it belongs here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from quant_moelora.core.backend import ExpertsBackend, Verdict
from quant_moelora.core.errors import BackendError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.experts.cpu import CpuBackend
from quant_moelora.experts.marlin import MarlinBackend
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.experts.unquantized import UnquantizedBackend

AUTO = "auto"
VARIABLE = "QUANT_MOELORA_BACKEND"  # what auto stands for, if it is set
BACKENDS: tuple[ExpertsBackend, ...] = (MarlinBackend(), UnquantizedBackend(), CpuBackend(), ReferenceBackend())


@dataclass(frozen=True)
class Selection:
    """The backend chosen and what every registered one said."""

    backend: ExpertsBackend
    verdicts: dict[str, Verdict]

    @property
    def report(self) -> str:
        """One line: the choice, and the reasons against the others that were asked first, or that decline."""
        others = [f"{name}: {'; '.join(v.reasons)}" for name, v in self.verdicts.items() if not v.ok]
        return f"experts backend {self.backend.name}" + (f" (not {', not '.join(others)})" if others else "")


def judge(info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> dict[str, Verdict]:
    """What every registered backend says of a request; the info may be on the meta device."""
    return {backend.name: backend.supports(info, device, dtype, lora=lora) for backend in BACKENDS}


def select_backend(
    choice: str | ExpertsBackend, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool = True
) -> Selection:
    """The backend called ``choice``, or with ``auto`` the first registered one that serves.

    Args:
        choice: a name; ``auto``, which stands for what QUANT_MOELORA_BACKEND names, if that is set; or a backend that
            is not registered.
        info: the layer, which may be on the meta device.
        device: where it is to be computed.
        dtype: of the activations.
        lora: whether adapters have to be served.

    Raises:
        BackendError: the name is unknown, or the named backend (with ``auto``: every backend) declines.
    """
    verdicts = judge(info, device, dtype, lora=lora)
    by_name = {backend.name: backend for backend in BACKENDS}
    if isinstance(choice, str):
        named = os.environ.get(VARIABLE) if choice == AUTO else None
        what, name = (VARIABLE, named) if named else ("backend", choice)
    else:
        what, name = "backend", choice.name
        by_name[name], verdicts[name] = choice, choice.supports(info, device, dtype, lora=lora)
    if name != AUTO and name not in by_name:
        raise BackendError(what, got=repr(name), rule=f"auto or one of {', '.join(by_name)}", remedy="correct the name")
    wanted = list(by_name) if name == AUTO else [name]
    for candidate in wanted:
        if verdicts[candidate].ok:
            return Selection(by_name[candidate], verdicts)
    raise BackendError(
        f"backend {name} for {info.scheme_name} on {device} in {dtype}"
        + (f" ({VARIABLE})" if what == VARIABLE else ""),
        got="; ".join(f"{c}: {', '.join(verdicts[c].reasons)}" for c in wanted),
        rule="a backend that serves it",
        remedy="choose another dtype or device, or backend='auto'",
    )
