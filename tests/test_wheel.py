"""The wheel holds each file of the package once and nothing else, and runs away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quant_moelora.core.packing import LAYOUT
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, WeightShape
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.table import Entry, Provenance, Table

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "quant_moelora")
NOT_SHIPPED = ("kernels", "loaders", "tests", "benchmarks")
# A table of tiles that the build gets beside those that are shipped.
TABLE = "quant_moelora/kernels/grouped_gemm/tuned/Some_GPU.json"
# Commands as `python -m quant_moelora.cli` runs them, all in one process, since imports take longer than they do.
RUN_COMMANDS = """
import contextlib, io, json, runpy, sys
import quant_moelora
from quant_moelora.kernels.grouped_gemm.table import tuned_tiles
((shape, tiles),) = tuned_tiles(None, "Some GPU").layers.items()
said = {"file": quant_moelora.__file__, "table": [shape.num_experts, tiles[8].w2.bn]}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module("quant_moelora.cli", run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, end.code)
    said[name] = out.getvalue()
print(json.dumps(said))
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves a folder whose files the next build packs again."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*SHIPPED, *NOT_SHIPPED):
        path = ROOT / name
        if path.is_symlink():
            (source / name).symlink_to(path.readlink())
        elif path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    (source / TABLE).parent.mkdir(exist_ok=True)
    (source / TABLE).write_text(json.dumps(asdict(some_table())), encoding="utf-8")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (built,) = out.iterdir()
    return built


def some_table() -> Table:
    """Tiles of one layer."""
    w13, w2 = WeightShape(256, 128, 4, 32, False), WeightShape(128, 128, 4, 32, False)
    shape = LayerShape(4, w13, w2, "bfloat16", act_order=False, fuses=True)
    entry = Entry(8, Tile(16, 128, 64), Tile(16, 128, 64), Tile(16, 64, 128), 1.0, 2.0)
    return Table("Some GPU", (9, 0), LAYOUT, shape, Provenance("", "", "", "", "", ""), (entry,))


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the wheel, without its dependencies: the running interpreter has them."""
    target = tmp_path_factory.mktemp("target")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def said(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed package says in an empty folder, found before the checkout, without a network."""
    demo = target / "quant_moelora" / "data" / "demo"
    adapter, model = f"a={demo / 'adapters' / 'novel'}", str(demo / "model")
    commands = {
        "help": ["--help"],
        "inspect": ["inspect", model, "--json"],
        "generate": ["generate", "--model", model, "--adapter", adapter, "--prompt", "a=It is"],
        "demo": ["demo"],
    }
    env = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return json.loads(run("-c", RUN_COMMANDS, json.dumps(commands), cwd=elsewhere, env=env))


def test_wheel_holds_each_file_once(wheel: Path) -> None:
    package = ROOT / "quant_moelora"
    files = {
        *package.rglob("*.py"),
        *(package / "kernels").rglob("*.json"),
        *(path for path in (package / "data").rglob("*") if path.is_file() and "__pycache__" not in path.parts),
        package / "py.typed",
    }
    expected = sorted([*(path.relative_to(ROOT).as_posix() for path in files), TABLE])
    with zipfile.ZipFile(wheel) as archive:
        packed = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    assert packed == expected


def test_it_runs_elsewhere(said: dict[str, Any], target: Path) -> None:
    """One test: tests are shared out among processes, each of which would install the wheel and run it."""
    assert Path(said["file"]) == target / "quant_moelora" / "__init__.py"
    assert said["table"] == [4, 64]
    assert "demo" in said["help"]
    json.loads(said["inspect"])
    assert "[a] It is -> " in said["generate"]
    assert said["demo"].strip()
