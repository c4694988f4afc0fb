"""The registered backends, in the order in which `backend="auto"` tries them, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_moelora.core.backend import ExpertsBackend, Verdict
from quant_moelora.core.errors import BackendError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.experts.cpu import CpuBackend
from quant_moelora.experts.marlin import MarlinBackend
from quant_moelora.experts.reference import ReferenceBackend

AUTO = "auto"
BACKENDS: tuple[ExpertsBackend, ...] = (MarlinBackend(), CpuBackend(), ReferenceBackend())


@dataclass(frozen=True)
class Selection:
    """The backend chosen and what every registered one said."""

    backend: ExpertsBackend
    verdicts: dict[str, Verdict]

    @property
    def report(self) -> str:
        """One line: the choice, and the reasons against the others."""
        others = [f"{name}: {'; '.join(v.reasons)}" for name, v in self.verdicts.items() if not v.ok]
        return f"experts backend {self.backend.name}" + (f" (not {', not '.join(others)})" if others else "")


def judge(info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> dict[str, Verdict]:
    """What every registered backend says of a request; the info may be on the meta device."""
    return {backend.name: backend.supports(info, device, dtype, lora=lora) for backend in BACKENDS}


def select_backend(
    name: str, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool = True
) -> Selection:
    """The backend called ``name``, or with ``auto`` the first registered one that serves.

    Raises:
        BackendError: the name is unknown, or the named backend (with ``auto``: every backend) declines.
    """
    by_name = {backend.name: backend for backend in BACKENDS}
    if name != AUTO and name not in by_name:
        raise BackendError(
            "backend", got=repr(name), rule=f"auto or one of {', '.join(by_name)}", remedy="correct the name"
        )
    verdicts = judge(info, device, dtype, lora=lora)
    wanted = list(by_name) if name == AUTO else [name]
    for candidate in wanted:
        if verdicts[candidate].ok:
            return Selection(by_name[candidate], verdicts)
    raise BackendError(
        f"backend {name} for {info.scheme_name} on {device} in {dtype}",
        got="; ".join(f"{c}: {', '.join(verdicts[c].reasons)}" for c in wanted),
        rule="a backend that serves it",
        remedy="choose another dtype or device, or backend='auto'",
    )
