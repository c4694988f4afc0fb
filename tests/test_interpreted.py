"""The tests of tests/launched without a GPU: in other processes, since triton reads TRITON_INTERPRET on import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = {"test_compile.py", "test_dense_gemm.py", "test_lora.py", "test_marlin.py"}  # about half of the time


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def interpreted(files: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/launched/{name}" for name in files)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def test_kernels_interpreted() -> None:
    """Half of the files beside the other half: an interpreted program keeps one core busy."""
    pytest.importorskip("triton")
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 takes int() of arrays, which numpy 2.4 refuses")
    files = sorted(path.name for path in (ROOT / "tests/launched").glob("test_*.py"))
    halves = [name for name in files if name in SLOW], [name for name in files if name not in SLOW]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(interpreted, halves))
    total = 0
    for run in runs:
        assert run.returncode == 0, run.stdout + run.stderr
        passed = re.search(r"(\d+) passed", run.stdout)
        assert passed, run.stdout
        total += int(passed[1])
    assert total > 100, [run.stdout for run in runs]  # and not deselected
