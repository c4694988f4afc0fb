"""The dependency rule and the size limits, read from the source with ast, and planted breaches."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# A module imports its own folder and those of earlier rows; __init__ and __main__ are the package's own.
ROWS = (
    {"core"},
    {"kernels", "loaders"},
    {"lora", "experts"},
    {"probe"},
    {"layer"},
    {"distributed"},
    {"integrations"},
    {"cli"},
    {"__init__", "__main__"},
)
USES_TRANSFORMERS = {"loaders", "integrations", "cli"}

MAX_FILE_LINES = 500
MAX_HOST_LINES = 60
MAX_KERNEL_LINES = 150
MAX_KERNEL_ARGS = 25


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.stmt, str, bool]]:
    """Each imported name as (statement, dotted name, whether importing the module leaves it alone)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node, f"{base}.{alias.name}", lazy) for alias in node.names)
        else:
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imports(node, lazy or for_types or isinstance(node, FUNCTIONS))


def import_fault(own: str, is_kernel: bool, name: str, lazy: bool) -> str | None:
    """Why the folder ``own`` must not import ``name``, or None."""
    top, *rest = name.split(".") if name != "quant_moelora" else (name, "__init__")
    allowed: set[str] = {own}.union(*ROWS[: next(i for i, row in enumerate(ROWS) if own in row)])
    if not top:
        return "relative import"
    if rest and rest[-1] == "*":
        return "star import"
    if top == "quant_moelora":
        if rest[0] not in allowed and own not in (
            "cli",
            "__main__",
        ):  # those two also see names of the package itself
            return f"{own} must not know {rest[0]}"
        if rest[0] == "kernels" and "kernel" in rest and not (lazy or is_kernel):
            return "a kernel.py imported at module level brings triton along"
    elif own == "core" and top not in {"torch", *sys.stdlib_module_names}:
        return f"core imports {top}: only torch and the standard library"
    elif top == "triton" and not (lazy or is_kernel):
        return "triton at module level outside kernels/**/kernel.py"
    elif top == "transformers" and own not in USES_TRANSFORMERS:
        return f"{own} must not know transformers"
    elif top == "transformers" and own == "loaders" and not lazy:
        return "loaders import transformers inside functions only"
    return None


def layering(root: Path) -> list[str]:
    """Breaches of the dependency rule in root/quant_moelora, as `file:line: why`."""
    package, found = root / "quant_moelora", list[str]()
    for folder in ("kernels", "loaders"):
        if (package / folder / "__init__.py").exists():
            found.append(f"{folder}/__init__.py: breaks `import transformers` when reached as {folder}/")
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if not any(parts[0] in row for row in ROWS):
            found.append(f"{path}:1: {parts[0]} has no row in the dependency rule")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_kernel = parts[0] == "kernels" and parts[-1] == "kernel"
        for node, name, lazy in imports(tree):
            if why := import_fault(parts[0], is_kernel, name, lazy):
                found.append(f"{path}:{node.lineno}: {name}: {why}")
        found += [f"{path}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    return found


def is_jit(function: FUNCTIONS) -> bool:
    """Whether a decorator is triton.jit, with arguments or without."""
    targets = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(ast.unparse(target).split(".")[-1] == "jit" for target in targets)


def size_faults(path: Path, host_lines: int | None) -> Iterator[str]:
    """Breaches of the size limits in a file, as `file:line: why`; host_lines None frees host functions."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        yield f"{path}:1: {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FUNCTIONS):
            continue
        assert node.end_lineno is not None  # ast.parse sets it
        lines, limit = node.end_lineno - node.lineno + 1, host_lines
        if is_jit(node):
            limit, arguments = MAX_KERNEL_LINES, ast.walk(node.args)
            if (count := sum(isinstance(arg, ast.arg) for arg in arguments)) > MAX_KERNEL_ARGS:
                yield f"{path}:{node.lineno}: {node.name} takes {count} arguments, at most {MAX_KERNEL_ARGS}"
        if limit is not None and lines > limit:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {limit}"


def sizes(root: Path) -> list[str]:
    """Breaches of the size limits; a test may be long, if it only states many facts."""
    limits = {"quant_moelora": MAX_HOST_LINES, "benchmarks": MAX_HOST_LINES, "tests": None}
    files = [(path, limit) for folder, limit in limits.items() for path in sorted((root / folder).rglob("*.py"))]
    return [fault for path, limit in files for fault in size_faults(path, limit)]


def test_dependency_rule() -> None:
    faults = layering(ROOT)
    assert not faults, "\n".join(faults)


def test_sizes() -> None:
    faults = sizes(ROOT)
    assert not faults, "\n".join(faults)


def test_links_show_the_two_parts_at_the_top() -> None:
    for folder in ("kernels", "loaders"):
        link = ROOT / folder
        assert link.is_symlink(), f"{folder} must be a link, not a second copy"
        assert link.readlink() == Path("quant_moelora") / folder


LAZY = "def f() -> None:\n    "


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("core/a.py", "import quant_moelora.kernels.align.launch", "core must not know kernels"),
        ("core/a.py", "import safetensors", "only torch and the standard library"),
        ("core/a.py", LAZY + "from quant_moelora.lora import bank", "core must not know lora"),
        (
            "kernels/align/launch.py",
            "from quant_moelora.loaders import gptq",
            "kernels must not know loaders",
        ),
        ("kernels/align/launch.py", "import triton", "triton at module level"),
        ("kernels/align/config.py", "if True:\n    import triton.language as tl", "triton at module level"),
        (
            "kernels/align/launch.py",
            "from quant_moelora.kernels.align.kernel import run",
            "brings triton along",
        ),
        (
            "loaders/gptq.py",
            "from quant_moelora.kernels.align import launch",
            "loaders must not know kernels",
        ),
        ("loaders/gptq.py", "import transformers", "inside functions only"),
        ("lora/bank.py", "from quant_moelora import experts", "lora must not know experts"),
        ("lora/bank.py", LAZY + "import transformers", "lora must not know transformers"),
        ("experts/cpu.py", "from quant_moelora.lora.bank import Bank", "experts must not know lora"),
        ("layer.py", "from quant_moelora.distributed import tp", "layer must not know distributed"),
        (
            "distributed/tp.py",
            "import quant_moelora.integrations.peft",
            "distributed must not know integrations",
        ),
        ("integrations/peft.py", "from quant_moelora.cli import main", "integrations must not know cli"),
        ("integrations/peft.py", "import quant_moelora", "integrations must not know __init__"),
        ("integrations/peft.py", "from quant_moelora import load", "integrations must not know load"),
        ("lora/bank.py", "from . import files", "relative import"),
        ("lora/bank.py", "from quant_moelora.lora.files import *", "star import"),
        ("lora/bank.py", LAZY + "global x", "global"),
        ("kernels/__init__.py", "", "breaks `import transformers`"),
        ("loaders/__init__.py", "", "breaks `import transformers`"),
        ("utils/a.py", "", "no row in the dependency rule"),
    ],
)
def test_breach_is_seen(tmp_path: Path, file: str, source: str, why: str) -> None:
    write(tmp_path, f"quant_moelora/{file}", source)
    (fault,) = layering(tmp_path)
    assert why in fault


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from quant_moelora.layer import MoEExperts as MoEExperts"),
        ("core/a.py", "import math\nimport torch.nn.functional as F\nfrom quant_moelora.core import packing"),
        ("kernels/align/kernel.py", "import triton\nfrom quant_moelora.kernels.common.kernel import dot"),
        ("kernels/align/launch.py", LAZY + "from quant_moelora.kernels.align.kernel import run"),
        ("loaders/families.py", LAZY + "import transformers"),
        ("loaders/families.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("layer.py", "from quant_moelora import experts, lora\nfrom quant_moelora.core import packing"),
        ("integrations/peft.py", "import transformers\nfrom quant_moelora.layer import MoEExperts"),
        ("cli/app.py", "from quant_moelora import __version__"),
    ],
)
def test_what_the_rule_allows(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, f"quant_moelora/{file}", source)
    assert layering(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("benchmarks/a.py", "x = 1\n" * 501, "501 lines, at most 500"),
        ("quant_moelora/core/a.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines, at most 60"),
        ("tests/a.py", "@triton.jit\ndef f():\n" + "    x = 1\n" * 150, "f has 151 lines, at most 150"),
        (
            "quant_moelora/kernels/a/kernel.py",
            f"@jit(noinline=True)\ndef f({', '.join(f'a{i}' for i in range(25))}, *, b):\n    pass\n",
            "f takes 26 arguments, at most 25",
        ),
    ],
)
def test_excess_is_seen(tmp_path: Path, file: str, source: str, why: str) -> None:
    write(tmp_path, file, source)
    (fault,) = sizes(tmp_path)
    assert why in fault


def test_long_tests_are_allowed(tmp_path: Path) -> None:
    write(tmp_path, "tests/test_a.py", "def test_a():\n" + "    x = 1\n" * 100)
    assert sizes(tmp_path) == []


def write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
