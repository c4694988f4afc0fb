"""Which backend serves, and what is said of those that do not."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from quant_moelora.core.backend import ExpertsBackend, Prepared, Verdict
from quant_moelora.core.errors import BackendError, PrecisionWarning
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts import registry
from quant_moelora.experts.marlin import MarlinBackend
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.experts.registry import BACKENDS, Selection, judge, select_backend
from quant_moelora.layer import MoEExperts
from tests.builders import layer, scheme

CPU = torch.device("cpu")


@dataclass
class FakeBackend:
    """Serves nothing, for the reasons given; records what it was asked."""

    name: str
    reasons: tuple[str, ...] = ()
    fuses: frozenset[str] = frozenset()
    capturable: bool = False
    asked: list[tuple[torch.device, torch.dtype, bool]] = field(
        default_factory=list[tuple[torch.device, torch.dtype, bool]]
    )

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        self.asked.append((device, dtype, lora))
        return Verdict(self.reasons)

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        return Prepared(info, dtype, {}, "3 scales were rounded")

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        return Workspace(info.device)

    def apply(
        self, x: Tensor, prepared: Prepared, routing: Routing, injection: Injection, workspace: Workspace
    ) -> Tensor:
        return torch.full_like(x, 7)


@pytest.fixture
def info() -> MoEQuantInfo:
    return layer(scheme(4, 32), experts=2).info


def register(monkeypatch: pytest.MonkeyPatch, *backends: ExpertsBackend) -> None:
    monkeypatch.setattr(registry, "BACKENDS", backends)


def test_every_name_is_registered_once() -> None:
    names = [backend.name for backend in BACKENDS]
    assert len(set(names)) == len(names) and registry.AUTO not in names
    assert names[-2:] == ["cpu", "reference"]


def test_auto_takes_the_first_that_serves(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    declining, serving, last = FakeBackend("a", ("no GPU",)), FakeBackend("b"), FakeBackend("c")
    register(monkeypatch, declining, serving, last)
    selection = select_backend("auto", info, CPU, torch.bfloat16)
    assert selection.backend is serving
    assert selection.verdicts == {"a": Verdict(("no GPU",)), "b": Verdict(), "c": Verdict()}


def test_a_name_takes_that_one(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeBackend("a"), FakeBackend("b")
    register(monkeypatch, first, second)
    assert select_backend("b", info, CPU, torch.bfloat16).backend is second


def test_every_backend_is_asked_the_same(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = FakeBackend("a"), FakeBackend("b")
    register(monkeypatch, *backends)
    judge(info, CPU, torch.float16, lora=False)
    select_backend("b", info, CPU, torch.bfloat16)
    for backend in backends:
        assert backend.asked == [(CPU, torch.float16, False), (CPU, torch.bfloat16, True)]


@pytest.mark.parametrize("name", ["marlni", "Reference", "", "AUTO"])
def test_an_unknown_name(name: str, info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FakeBackend("a"), FakeBackend("b"))
    with pytest.raises(BackendError, match=rf"backend: got '{name}', expected auto or one of a, b; correct the name"):
        select_backend(name, info, CPU, torch.bfloat16)


def test_auto_fails_with_every_reason_of_everyone(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FakeBackend("a", ("no GPU", "no act-order")), FakeBackend("b", ("group 48",)))
    with pytest.raises(BackendError) as caught:
        select_backend("auto", info, CPU, torch.bfloat16)
    assert str(caught.value) == (
        "backend auto for w4a16_g32_sym on cpu in torch.bfloat16: got a: no GPU, no act-order; b: group 48, "
        "expected a backend that serves it; choose another dtype or device, or backend='auto'"
    )


def test_a_name_fails_without_a_silent_fallback(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FakeBackend("a", ("no GPU",)), FakeBackend("b"))
    with pytest.raises(BackendError, match=r"backend a for w4a16_g32_sym on cpu .*: got a: no GPU, expected"):
        select_backend("a", info, CPU, torch.bfloat16)


def test_no_backend_registered_but_declining_ones_are_asked_with_a_meta_info(info: MoEQuantInfo) -> None:
    """Before anything is loaded."""
    verdicts = judge(info.to("meta"), torch.device("cuda"), torch.bfloat16, lora=True)
    assert set(verdicts) == {backend.name for backend in BACKENDS}
    assert verdicts["reference"].ok and verdicts["cpu"].reasons == ("device cuda is not the CPU",)
    assert verdicts["marlin"].ok or not torch.cuda.is_available()


def test_report() -> None:
    chosen = FakeBackend("b")
    verdicts = {"a": Verdict(("no GPU", "no act-order")), "b": Verdict(), "c": Verdict(("group 48",)), "d": Verdict()}
    report = Selection(chosen, verdicts).report
    assert report == "experts backend b (not a: no GPU; no act-order, not c: group 48)"
    assert Selection(chosen, {"b": Verdict()}).report == "experts backend b"


def test_the_environment_names_what_auto_stands_for(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FakeBackend("a"), FakeBackend("b"), FakeBackend("c", ("no GPU",)))
    monkeypatch.setenv("QUANT_MOELORA_BACKEND", "b")
    assert select_backend("auto", info, CPU, torch.bfloat16).backend.name == "b"
    assert select_backend("a", info, CPU, torch.bfloat16).backend.name == "a", "an argument says more"
    monkeypatch.setenv("QUANT_MOELORA_BACKEND", "c")
    with pytest.raises(BackendError, match=r"\(QUANT_MOELORA_BACKEND\): got c: no GPU"):
        select_backend("auto", info, CPU, torch.bfloat16)
    monkeypatch.setenv("QUANT_MOELORA_BACKEND", "marlni")
    with pytest.raises(BackendError, match="QUANT_MOELORA_BACKEND: got 'marlni', expected auto or one of a, b, c"):
        select_backend("auto", info, CPU, torch.bfloat16)
    monkeypatch.setenv("QUANT_MOELORA_BACKEND", "")
    assert select_backend("auto", info, CPU, torch.bfloat16).backend.name == "a"


def test_verdict() -> None:
    assert Verdict().ok
    assert not Verdict(("no GPU",)).ok


def test_the_layer_says_the_choice_and_what_a_cast_loses(
    info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(monkeypatch, FakeBackend("a", ("no GPU",)), FakeBackend("b"))
    experts = MoEExperts(info)
    assert experts.backend is None
    x = torch.zeros(1, 64)
    loses = pytest.warns(PrecisionWarning, match=r"^experts in torch\.float32: 3 scales were rounded$")
    with caplog.at_level(logging.INFO, "quant_moelora.layer"), loses as said:
        out = experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert (out == 7).all() and experts.backend is registry.BACKENDS[1]
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert messages == [("INFO", "experts backend b (not a: no GPU)")] and len(said) == 1


def test_layers_that_lose_the_same_warn_once(info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FakeBackend("a"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            MoEExperts(info)(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert [str(warning.message) for warning in caught] == ["experts in torch.float32: 3 scales were rounded"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_serves(info: MoEQuantInfo, dtype: torch.dtype) -> None:
    backend = ReferenceBackend()
    assert backend.supports(info, CPU, dtype, lora=True).ok
    assert backend.supports(info.part(ParallelConfig(0, 1)), CPU, dtype, lora=True).ok
    prepared = backend.prepare(info, dtype)
    assert prepared.info is info and prepared.dtype == dtype and prepared.lossy is None and not prepared.tensors
    assert backend.workspace(info).device == CPU


def test_reference_declines_a_dtype(info: MoEQuantInfo) -> None:
    verdict = ReferenceBackend().supports(info, CPU, torch.float64, lora=True)
    assert verdict.reasons == ("activation dtype torch.float64 is not float32, bfloat16 or float16",)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device of compute capability 9.0, as far as a backend asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 192, 256, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_marlin_serves(group: int | None, dtype: torch.dtype, hopper: torch.device) -> None:
    for bits, symmetric in ((4, True), (4, False), (8, True), (8, False)):
        info = layer(scheme(bits, group, symmetric), experts=1).info.to("meta")
        assert MarlinBackend().supports(info, hopper, dtype, lora=True) == Verdict()


def test_marlin_declines_with_every_reason(hopper: torch.device) -> None:
    info = layer(scheme(4, 24), experts=1).info
    assert MarlinBackend().supports(info, CPU, torch.float32, lora=True).reasons == (
        "device cpu is no CUDA device",
        "activation dtype torch.float32 is not bfloat16 or float16",
        "w13 has groups of 24 columns, whose least common part with 128 is below 16",
        "w2 has groups of 24 columns, whose least common part with 128 is below 16",
    )
    unquantised = layer(torch.bfloat16, experts=1).info
    reasons = ("w13 is not quantised", "w2 is not quantised")
    assert MarlinBackend().supports(unquantised, hopper, torch.bfloat16, lora=False).reasons == reasons


def test_marlin_declines_an_old_or_absent_gpu(
    info: MoEQuantInfo, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reasons = ("cuda has compute capability 7.5, below 8.0",)
    assert MarlinBackend().supports(info, hopper, torch.float16, lora=True).reasons == reasons
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = ("torch sees no CUDA device to be cuda",)
    assert MarlinBackend().supports(info, hopper, torch.float16, lora=True).reasons == reasons
