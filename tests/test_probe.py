"""A backend of one's own serves a layer, unless it leaves adapters out or puts them where they do not belong."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.errors import BackendError
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts.base_injection import BaseInjection
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.experts.registry import BACKENDS, select_backend
from quant_moelora.layer import MoEExperts
from quant_moelora.probe import check_adapters
from tests.builders import layer, scheme

CPU = torch.device("cpu")


@dataclass
class Own(ReferenceBackend):
    """The reference backend, with something wrong."""

    name = "own"
    wrong: str = ""

    def apply(
        self, x: Tensor, prepared: Prepared, routing: Routing, injection: Injection, workspace: Workspace
    ) -> Tensor:
        apply: Any = super().apply
        if self.wrong == "ignores":
            return apply(x, prepared, routing, BaseInjection(prepared.info), workspace)
        if self.wrong == "activation alone":
            injection = copy.copy(injection)
            injection.moe_sum = BaseInjection(prepared.info).moe_sum
        if self.wrong == "everywhere" and routing.slots is not None:
            routing = replace(routing, slots=torch.zeros_like(routing.slots))
        out = apply(x, prepared, routing, injection, workspace)
        return out * torch.nan if self.wrong == "NaN" else out


def infos() -> dict[str, MoEQuantInfo]:
    return {
        "int4": layer(scheme(4, 32), experts=2).info,
        "int8 with zero points, channels, act-order, relu2": layer(
            scheme(8, None, False), experts=2, act_order=True, activation=Activation("relu2", gated=False)
        ).info,
        "unquantised": layer(torch.bfloat16, experts=2).info,
    }


@pytest.mark.parametrize("kind", infos())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_that_serve_adapters(kind: str, dtype: torch.dtype) -> None:
    info = infos()[kind]
    check_adapters(Own(), info, dtype)
    served = [backend for backend in BACKENDS if backend.supports(info, CPU, dtype, lora=True).ok]
    assert served
    for backend in served:
        check_adapters(backend, info, dtype)


@pytest.mark.parametrize("wrong", ["ignores", "activation alone", "everywhere", "NaN"])
def test_others_are_refused_before_they_serve(wrong: str) -> None:
    own = Own(wrong)
    experts = MoEExperts(infos()["int4"], backend=own)
    with pytest.raises(BackendError, match="backend own with adapters: got"):
        experts(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_it_serves_a_layer_and_is_not_registered() -> None:
    info, x = infos()["int4"], torch.randn(3, 64)
    routing = torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
    experts = MoEExperts(info, backend=Own())
    assert torch.equal(experts(x, *routing), MoEExperts(info, backend="reference")(x, *routing))
    assert experts.backend is not None and experts.backend.name == "own"
    assert "own" not in {backend.name for backend in BACKENDS}


def test_it_may_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own()
    monkeypatch.setattr(own, "supports", lambda *_, **__: Verdict(("not today",)), raising=False)
    with pytest.raises(BackendError, match=r"backend own for .*: got own: not today"):
        select_backend(own, infos()["int4"], CPU, torch.float32)
