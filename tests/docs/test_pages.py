"""The pages as a new user reads them: blocks run, tables are what the code says, messages exist, links lead on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Command
from tests.docs.pages import PAGES, PROGRAM, ROOT, CommandLine, anchors, blocks, links, run_page, without_blocks
from tests.docs.tables import made, marked

NOT_RUN = 7  # blocks that need a GPU, a network or an empty machine, or that serve until stopped


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder that holds the checkout's package, and nothing else of it."""
    (tmp_path / "quant_moelora").symlink_to(ROOT / "quant_moelora")
    monkeypatch.chdir(tmp_path)

    def run(line: CommandLine) -> None:
        assert line.program == PROGRAM, f"{line.program} is not run here: mark the block"
        with monkeypatch.context() as patch:
            for name, value in line.environment.items():
                patch.setenv(name, value)
            done = command(*line.arguments)
        assert done.code == 0, f"{line}: {done.err}"

    text = page.read_text(encoding="utf-8")
    ran = run_page(text, page.name, run)
    assert ran == sum(block.reason is None for block in blocks(text))


def test_few_blocks_are_not_run() -> None:
    reasons = [block.reason for page in PAGES for block in blocks(page.read_text(encoding="utf-8")) if block.reason]
    assert len(reasons) <= NOT_RUN, reasons


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_code_is_in_fences(page: Path) -> None:
    """An indented block would not be run; neither would one whose fence has spaces before it."""
    prose = without_blocks(page.read_text(encoding="utf-8"))
    assert "```" not in prose
    assert not re.search(r"\n\n {4}\S", prose)


def test_blocks_are_found_and_run() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- not run: why -->\n```bash\nfalse\n```\n"
    text += '```bash\nA="1 2"\nB=3 p $A \\\n  --o\n```\n'
    ran: list[CommandLine] = []
    assert run_page(text, "page", ran.append) == 2
    assert ran == [CommandLine({"B": "3"}, "p", ["1 2", "--o"])]
    assert [(block.line, block.reason) for block in blocks(text)] == [(3, None), (7, "why"), (10, None)]
    with pytest.raises(AssertionError, match="page:2: a block of no language"):
        run_page("```\nx\n```\n", "page", ran.append)
    with pytest.raises(NameError):
        run_page("```python\nx\n```\n", "page", ran.append)


def test_tables_are_what_the_code_says() -> None:
    """`python -m tests.docs.tables` writes them. Families are those of the transformers that the page names."""
    found: dict[str, str] = {}
    for page in PAGES:
        found |= marked(page.read_text(encoding="utf-8"))
    wanted = made()
    assert found.keys() == wanted.keys()
    version = "transformers version"
    same = found[version] == wanted[version]
    for name in wanted if same else wanted.keys() - {version, "families", "refused families"}:
        assert found[name] == wanted[name], name


def literals(tree: ast.AST) -> Iterator[str]:
    """Texts of a module that are no docstrings, those of f-strings with {} for what is filled in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | docs:
            yield node.value


def test_messages_exist() -> None:
    """Each heading of troubleshooting is part of a message in the source."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(quoted) == text.count("\n### ") > 20
    files = (ROOT / "quant_moelora").rglob("*.py")
    source = "\n".join(one for file in files for one in literals(ast.parse(file.read_text(encoding="utf-8"))))
    assert [message for message in quoted if message not in source] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target
