"""AdapterBank beside a stream that serves: nothing waits on the host, and nothing is overwritten while it is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_moelora.core.lora_context import A13, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from quant_moelora.lora.bank import AdapterBank
from tests.adapters import dense_info

pytestmark = pytest.mark.gpu
RANK, HIDDEN = 8, 4096
PAUSE = 20_000_000  # cycles of a GPU's clock, some 10 ms: many times what a copy, or a call on the host, takes


def constant(value: float) -> LayerFactors:
    """An adapter of one expert whose A says who it is."""
    return {(0, "up"): Factor(torch.full((RANK, HIDDEN), value), torch.ones(8, RANK), value)}


def make_bank(slots: int) -> AdapterBank:
    return AdapterBank({0: info()}, torch.float32, max_adapters=slots, max_rank=RANK, capacity_bytes=slots * size())


def info() -> MoEQuantInfo:
    return dense_info(experts=1, hidden=HIDDEN, inter=8, inter_pad=8, device="cuda")


def size() -> int:
    return RANK * (HIDDEN + 8) * 4


def serve(
    ctx: MoELoRAContext,
    slot: Tensor,  # (1,) int64
) -> Tensor:  # (4,)
    """Smallest and largest element of the slot's A, its scaling and its rank, as a kernel finds them; 0 without one."""
    offset = ctx.offsets[slot, A13, 0]
    a = ctx.arena[offset.clamp(min=0) + torch.arange(RANK * HIDDEN, device="cuda")]
    there = (offset >= 0)[0]
    found = torch.stack((a.min(), a.max(), ctx.scaling[slot, 1, 0][0], ctx.rank[slot, 1, 0][0].float()))
    return torch.where(there, found, 0)


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("change", ["remove", "replace", "evict", "disable"])
def test_a_stream_serves_what_the_bank_held_when_it_was_called(change: str, own_stream: bool) -> None:
    """Each result is that of its moment, though the device is far behind the host, and memory is used again at once."""
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    bank = make_bank(2 if change == "replace" else 1)
    bank._evict = "lru" if change == "evict" else "never"
    slot = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    got: list[Tensor] = []
    expected: list[float] = []
    waited: list[bool] = []
    with torch.cuda.stream(stream):
        paused = stream.record_event()
        for i in range(1, 30):
            name = "x" if change == "replace" else str(i)
            (bank.replace if change == "replace" and i > 1 else bank.add)(name, {0: constant(i)})
            slot.fill_(bank.slots([name])[0])
            waited.append(paused.query())
            torch.cuda._sleep(PAUSE)
            paused = stream.record_event()
            got.append(serve(bank.contexts[0], slot))
            expected.append(i)
            if change == "disable":
                bank.disable(name)
                got.append(serve(bank.contexts[0], slot))
                expected.append(0)
            if change in ("remove", "disable"):
                bank.remove(name)
                got.append(serve(bank.contexts[0], slot))
                expected.append(0)
            waited.append(paused.query())
    torch.cuda.synchronize()
    rows = [[value, value, value, RANK if value else 0] for value in expected]
    assert torch.stack(got).tolist() == rows
    # The first calls load kernels and pin memory, for which CUDA itself may wait.
    assert not any(waited[10:]), "the host has waited for the device"


def test_a_stream_waits_for_the_factors() -> None:
    bank = make_bank(2)
    copies = bank._transfer._copies
    assert copies is not None
    slot = torch.zeros(1, dtype=torch.int64, device="cuda")
    serve(bank.contexts[0], slot)
    torch.cuda.synchronize()
    for value in (1, 2):
        with torch.cuda.stream(copies):
            torch.cuda._sleep(PAUSE)
        if value == 1:
            bank.add("x", {0: constant(value)})
        else:
            bank.replace("x", {0: constant(value)})
        assert serve(bank.contexts[0], slot).tolist() == [value, value, value, RANK]


def test_a_captured_graph_serves_adapters_that_come_later() -> None:
    bank = make_bank(3)
    slot = torch.zeros(1, dtype=torch.int64, device="cuda")
    bank.add("first", {0: constant(1)})
    serve(bank.contexts[0], slot)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = serve(bank.contexts[0], slot)
    assert bank.add("second", {0: constant(2)}) == 1
    for value, chosen in ((2, 1), (1, 0)):
        slot.fill_(chosen)
        graph.replay()
        assert out.tolist() == [value, value, value, RANK]
    bank.replace("first", {0: constant(3)})
    graph.replay()
    assert out.tolist() == [3, 3, 3, RANK]
    bank.remove("first")
    graph.replay()
    assert not out.any()


def test_staging_is_pinned() -> None:
    """From other memory CUDA copies by way of its own, and waits where that is full."""
    assert make_bank(1)._transfer.staging((4,), torch.float32).is_pinned()
