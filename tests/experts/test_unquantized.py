"""The unquantized backend: what it serves and what it holds; tests/launched has what it computes."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from quant_moelora.experts.registry import select_backend
from quant_moelora.experts.unquantized import UnquantizedBackend
from tests.builders import layer, scheme

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of compute capability 9.0, as far as a backend asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_who_serves_on_a_gpu(stored: torch.dtype) -> None:
    info = layer(stored, hidden=40, inter=72).info.to("meta")
    for dtype in (torch.bfloat16, torch.float16):
        assert select_backend("auto", info, CUDA, dtype).backend.name == "unquantized"
    assert select_backend("auto", info, CUDA, torch.float32).backend.name == "reference"


@pytest.mark.usefixtures("hopper")
def test_unquantized_declines_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    info = layer(scheme(4, 32)).info
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert UnquantizedBackend().supports(info, CPU, torch.float32, lora=True).reasons == (
        "device cpu is no CUDA device",
        "triton is not installed",
        "activation dtype torch.float32 is not bfloat16 or float16",
        "w13 is quantised",
        "w2 is quantised",
    )


@pytest.mark.usefixtures("hopper")
def test_it_declines_an_old_or_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    info = layer(torch.bfloat16).info
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reasons = UnquantizedBackend().supports(info, CUDA, torch.bfloat16, lora=True).reasons
    assert reasons == ("cuda has compute capability 7.5, below 8.0",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = UnquantizedBackend().supports(info, CUDA, torch.bfloat16, lora=True).reasons
    assert reasons == ("torch sees no CUDA device to be cuda",)


def test_weights_are_shared_unless_they_are_cast() -> None:
    backend, info = UnquantizedBackend(), layer(torch.bfloat16).info
    prepared = backend.prepare(info, torch.bfloat16)
    held = {name: tensor.data_ptr() for name, tensor in prepared.tensors.items()}
    own = info.tensors()
    assert held == {"w13.w": own["w13.w"].data_ptr(), "w2.w": own["w2.w"].data_ptr()}
    assert prepared.lossy is None and prepared.dtype == torch.bfloat16 and prepared.info is info
    other = backend.prepare(info, torch.float16)
    assert {name: tensor.dtype for name, tensor in other.tensors.items()} == dict.fromkeys(held, torch.float16)
