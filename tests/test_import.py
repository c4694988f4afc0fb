"""`import quant_moelora` is light, and every module of it imports by itself."""

import importlib
import importlib.util
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Heavy packages that modules may use, and what comes before each module of the package, imported once for all the
# processes that import a module each.
PRELOAD = ("torch", "transformers", "peft", "compressed_tensors", "typer", "quant_moelora")


def module_names() -> list[str]:
    """Every module of the package, found as files: pkgutil does not walk folders without __init__.py."""
    names: list[str] = []
    for path in sorted((ROOT / "quant_moelora").rglob("*.py")):
        if path.name == "kernel.py" and importlib.util.find_spec("triton") is None:
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.endswith("__main__")]  # importing it runs the command line


def import_one(name: str) -> str:
    """Import a module; answer with its name, since a module itself cannot be sent back."""
    return importlib.import_module(name).__name__


def test_importing_the_package_is_light() -> None:
    code = """
import sys
import quant_moelora, torch
heavy = sorted({"triton", "transformers", "peft"} & set(sys.modules))
assert not heavy, f"import quant_moelora brought {heavy}"
assert not torch.cuda.is_initialized(), "import quant_moelora started CUDA"
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_module_imports_by_itself() -> None:
    """Each in a process of its own, so that no module leans on what another one imported before it."""
    names = module_names()
    assert "quant_moelora" in names
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in PRELOAD if importlib.util.find_spec(name)])
    with context.Pool(2, maxtasksperchild=1) as pool:
        assert pool.map(import_one, names, chunksize=1) == names
