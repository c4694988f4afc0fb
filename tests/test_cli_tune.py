"""`quant-moelora tune`, run in this process, with the measuring itself put aside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_moelora.experts import lora_tune
from quant_moelora.kernels.common import launch
from quant_moelora.kernels.grouped_gemm import tune
from quant_moelora.kernels.grouped_gemm.config import formula
from quant_moelora.kernels.grouped_gemm.table import Entry, LoRAEntry, tuned_tiles
from tests.commands import Command, error_line
from tests.integrations.models import GPTQ, folder_of

MODEL = str(folder_of(GPTQ))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU on which five stages of the second GEMM are always best."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("current_device", 0), ("get_device_capability", (9, 0)), ("get_device_name", "Some GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    caches = (launch._capability, launch._gpu_name, tuned_tiles)
    for cached in caches:
        cached.cache_clear()

    def tune_point(point: Any, *_: object) -> Entry:
        own = formula(point.weights.problem.shape, point.pairs, (9, 0))
        return Entry(point.pairs, own.w13, own.w13_fused, replace(own.w2, stages=5), 2.0, 3.0)

    monkeypatch.setattr(tune, "compile_candidates", lambda _, tokens, *__: dict.fromkeys(tokens, frozenset[Any]()))
    weights = tune.Weights
    monkeypatch.setattr(tune, "Weights", lambda problem, _: weights(problem, torch.device("meta")))
    monkeypatch.setattr(tune, "tune_point", tune_point)
    monkeypatch.setattr(lora_tune, "compile_cuts", lambda *_: None)
    monkeypatch.setattr(lora_tune, "LoRAPoint", lambda case, _: case)
    monkeypatch.setattr(lora_tune, "tune_lora_point", lambda case, *_: LoRAEntry(8, case.rank, case.formula, 2.0, 2.5))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_tune_writes_what_is_read_back(command: Command, tmp_path: Path) -> None:
    sizes = ("--experts=8", "--hidden=256", "--intermediate=128", "--top-k=2", "--bits=8", "--group-size=64")
    run = command("tune", *sizes, "--tokens=64,1,64", "--commit=abc", f"--out={tmp_path / 'new'}", "--json")
    assert run.code == 0
    ((path, written),) = run.json.items()
    assert written == json.loads(Path(path).read_text(encoding="utf-8")) and written["gpu"] == "Some GPU"
    assert [entry["num_pairs"] for entry in written["entries"]] == [2, 128]
    assert written["provenance"]["commit"] == "abc"
    ((shape, tiles),) = tuned_tiles(str(tmp_path / "new"), "Some GPU").layers.items()
    assert (shape.num_experts, shape.w13.bits, shape.w2.group, shape.dtype) == (8, 8, 64, "bfloat16")
    assert {pairs: one.w2.stages for pairs, one in tiles.items()} == {2: 5, 128: 5}


@pytest.mark.usefixtures("gpu")
def test_tune_the_layers_of_a_model(command: Command, tmp_path: Path) -> None:
    run = command("tune", "--model", MODEL, "--tokens=4", "--out", str(tmp_path))
    assert run.code == 0
    first, second = run.out.splitlines()
    assert Path(first).parent == tmp_path and Path(first).is_file()
    assert second == "  16 pairs: 2.0 us, +50.0%"
    (shape,) = tuned_tiles(str(tmp_path), "Some GPU").layers
    assert (shape.num_experts, shape.w13.group, shape.w13.zeros, shape.act_order) == (8, 32, True, False)
    again = command("tune", "--model", MODEL, "--tokens=4", "--no-tiles", "--lora-ranks=16", "--out", str(tmp_path))
    assert again.out.splitlines() == [first, second, "  8 pairs with adapters of rank 16: 2.0 us, +25.0%"]
    assert command("tune", "--model", MODEL, "--tokens=4", "--act-order", f"--out={tmp_path}").code == 0
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_tune_refuses_in_one_line(command: Command, tmp_path: Path) -> None:
    sizes = ("--experts=8", "--hidden=256", "--intermediate=128", "--top-k=2")
    out = f"--out={tmp_path / 'new'}"
    if not torch.cuda.is_available():
        assert "no CUDA device" in error_line(command("tune", *sizes, out))
    assert "no --hidden, --top-k" in error_line(command("tune", sizes[0], sizes[2], out))
    assert "--tokens: got 1,x" in error_line(command("tune", *sizes, out, "--tokens=1,x"))
    assert "got 3" in error_line(command("tune", *sizes, out, "--bits=3"))
    assert "bfloat16 or float16" in error_line(command("tune", *sizes, out, "--dtype=float32"))
    (tmp_path / "file").touch()
    assert "a folder" in error_line(command("tune", *sizes, f"--out={tmp_path / 'file'}"))
    assert command("tune", *sizes).code == 2
