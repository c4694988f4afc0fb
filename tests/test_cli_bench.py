"""`quant-moelora bench`, run in this process on a model whose time is known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant_moelora.cli import bench
from quant_moelora.integrations.transformers import FusedExperts
from tests.commands import Command
from tests.integrations.models import GPTQ, A, B, folder_of

MODEL = f"--model={folder_of(GPTQ)}"
ADAPTERS = [f"--adapter=a={A}", f"--adapter=b={B}"]
SIZES = ("--batch=3", "--prompt-tokens=5", "--new-tokens=2", "--dtype=float32")
FIELDS = {
    *("model", "device", "dtype", "torch", "threads", "backends"),
    *("batch", "prompt_tokens", "new_tokens", "rounds", "bytes_resident", "speeds"),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Any]]]:
    """A clock that only experts move, 1 s for each token of each layer; what they were called with."""
    calls: list[tuple[int, list[Any]]] = []
    now = 0.0
    forward: Callable[..., Any] = FusedExperts.forward

    def counted(self: FusedExperts, x: Any, *args: Any) -> Any:
        nonlocal now
        now += len(x)
        slots = self.session.token_slots(len(x), x.device)
        calls.append((len(x), [] if slots is None else slots.tolist()))
        return forward(self, x, *args)

    monkeypatch.setattr(FusedExperts, "forward", counted)
    monkeypatch.setattr(bench, "_now", lambda _: now)
    return calls


def test_json(command: Command, clock: list[tuple[int, list[Any]]]) -> None:
    run = command("bench", MODEL, *ADAPTERS, *SIZES, "--rounds=2", "--json")
    assert run.code == 0, run.err
    found = run.json
    assert found.keys() == FIELDS
    asked = {"batch": 3, "prompt_tokens": 5, "new_tokens": 2, "rounds": 2, "dtype": "float32", "device": "cpu"}
    assert found.items() >= asked.items()
    assert found["backends"] == ["cpu"] and found["torch"] == torch.__version__
    assert found["bytes_resident"].keys() == {"experts", "expert_adapters", "other"}
    assert found["bytes_resident"]["expert_adapters"] > 0
    # 15 tokens of the prompts in each of 2 layers, then 3 rows for each of 2 tokens
    prefill = {"seconds": 30.0, "tokens_per_second": 0.5, "experts_share": 1.0}
    decode = {"seconds": 12.0, "tokens_per_second": 0.5, "experts_share": 1.0}
    assert found["speeds"] == [
        {"adapters": [], "prefill": prefill, "decode": decode},
        {"adapters": ["a", "b"], "prefill": prefill, "decode": decode},
    ]
    one = [15, 15, 3, 3, 3, 3]
    assert [tokens for tokens, _ in clock] == one * 5 * 2, "one warm-up, two rounds, two of the experts alone"
    base, adapted = clock[: len(clock) // 2], clock[len(clock) // 2 :]
    assert all(not slots for _, slots in base), "no adapter at first"
    for tokens, slots in adapted:
        a, b = slots[0], slots[tokens // 3]
        assert a != b and slots == [slot for slot in (a, b, a) for _ in range(tokens // 3)], "rows take turns"


def test_text(command: Command, clock: list[tuple[int, list[Any]]]) -> None:
    run = command("bench", MODEL, ADAPTERS[0], *SIZES, "--rounds=1")
    lines = run.out.splitlines()
    assert lines[0].endswith("batch 3, 5 + 2 tokens, median of 1") and "on cpu, float32, backend cpu" in lines[0]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["prefill", "base"],
        ["prefill", "1"],
        ["decode", "base"],
        ["decode", "1"],
    ]
    assert lines[2].split(maxsplit=3)[3] == "0.5 tokens/s, 100% of base; 30000.0 ms, 100% of it in experts"
    assert lines[5].startswith("  bytes resident: experts ")


def test_real_time(command: Command) -> None:
    """The sum of what was timed fits into the command's own time, and all of it passed."""
    begin = time.perf_counter()
    run = command("bench", MODEL, *SIZES, "--rounds=1", "--json")
    passed = time.perf_counter() - begin
    (speed,) = json.loads(run.out)["speeds"]
    phases = (speed["prefill"], speed["decode"])
    assert 0 < sum(phase["seconds"] for phase in phases) < passed
    assert all(0 < phase["experts_share"] < 1 for phase in phases)
