"""Where kernels are launched, and what they are given.

With TRITON_INTERPRET=1, which is read when triton is imported, they are interpreted on the CPU, in float16 (the
interpreter's bfloat16 is another number) and without inline assembly; otherwise these tests are GPU tests.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from quant_moelora.core import packing
from quant_moelora.core.backend import Verdict
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts import base_injection, marlin
from quant_moelora.kernels.dequant.prepare import PreparedWeight, prepare, prepared_weight, regrouped
from quant_moelora.kernels.grouped_gemm import product
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
DTYPES = (torch.float16,) if INTERPRETED else (torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Relative Frobenius error of a GEMM's output against float64. Its weights and its output are rounded to 8 or 11 bits,
# each by 0.4 units on the root mean square: sqrt(2) * 0.4 * 2**-8 = 2.2e-3, and 2.8e-4.
FROBENIUS = {torch.bfloat16: 3e-3, torch.float16: 6e-4}


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output in which a value that nobody wrote shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def cast_scales(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    """The weight with its scales in ``dtype``, as the kernels hold them."""
    scales = packing.unpack_pairs(weight.scales, weight.scheme.scale_dtype).to(dtype)
    return replace(weight, scales=packing.pack_pairs(scales), scheme=replace(weight.scheme, scale_dtype=dtype))


def held_values(weight: PackedWeight, dtype: torch.dtype) -> Tensor:  # (E, halves, n, k) float64
    """What the matrix unit multiplies: (q - zero) * scale rounded once to ``dtype``."""
    return cast_scales(weight, dtype).dequantize().to(dtype).double()


def prepared(weight: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """`prepare`; interpreted, the pairs as they are stored, each as often as `regrouped` divides its group."""
    if not INTERPRETED:
        return prepare(weight, dtype)[0]
    weight, repeat = cast_scales(weight, dtype), weight.group // regrouped(weight)
    zeros = None if weight.zeros is None else weight.zeros.repeat_interleave(repeat, 2)
    scales = weight.scales.repeat_interleave(repeat, 2)
    return prepared_weight(weight, scales=scales, zeros=zeros, zero=0, post=None, one_step=False)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the backend serve the CPU, with scales as they are stored, and nothing fall back to torch."""
    monkeypatch.setattr(marlin.MarlinBackend, "supports", lambda *_, **__: Verdict())
    monkeypatch.setattr(product, "grouped_gemm", functools.partial(grouped_gemm, plain=True))
    monkeypatch.setattr(marlin, "prepare", lambda weight, dtype: (prepared(weight, dtype), None))
    monkeypatch.setattr(base_injection.activation_reference, "activate", base_injection.launched_activation)
    monkeypatch.setattr(base_injection.moe_sum_reference, "moe_sum", base_injection.launched_moe_sum)


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few combinations in which every two values of two factors meet: the best of 100 random ones, until all have."""
    draw = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def covers(indices: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        return missing & set(itertools.combinations(indices.items(), 2))

    chosen: list[dict[str, Any]] = []
    while missing:
        wanted = dict(min(missing))  # so that each choice covers at least one pair
        candidates = [{n: wanted.get(n, draw.randrange(len(factors[n]))) for n in names} for _ in range(100)]
        best = max(candidates, key=lambda indices: len(covers(indices)))
        missing -= covers(best)
        chosen.append({name: factors[name][index] for name, index in best.items()})
    return chosen


def crossed(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """A test's parameters in all combinations; interpreted, where each takes seconds, in those of `pairwise`."""
    all_of_them = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    chosen = pairwise(factors) if INTERPRETED else all_of_them
    return pytest.mark.parametrize(list(factors), [pytest.param(*one.values(), id=label(one)) for one in chosen])


class Counting:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> list[set[str]]:
        """What each graph calls."""
        return [{str(node.target) for node in graph.graph.nodes if node.op == "call_function"} for graph in self.graphs]


def label(value: object) -> str:
    """Of one combination, for the name of its test."""
    assert isinstance(value, dict)
    return "-".join(str(getattr(v, "name", v)).removeprefix("torch.") for v in value.values())


def check_sanitized(tool: str, module: str, function: str) -> None:
    """Have compute-sanitizer watch a function of a test module in a process of its own, and find nothing."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    body = f"import torch; from {module} import {function} as run\nwith torch.no_grad(): run()"
    done = subprocess.run(
        [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", body],
        cwd=ROOT,
        # Without torch's pool each tensor is an allocation of its own, so that one row too far is an error.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    nothing = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}[tool]
    assert nothing in done.stdout, done.stdout[-2000:]
