"""The pages for users, and what stands in them: blocks of code and how to run them, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = "quant-moelora"
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: what stands behind its fence.
        code: its lines.
        line: number of its first line in the page.
        reason: why it is not run, or None.
    """

    language: str
    code: str
    line: int
    reason: str | None


@dataclass(frozen=True)
class CommandLine:
    """One command of a block: what it sets in the environment, the program and its arguments."""

    environment: Mapping[str, str]
    program: str
    arguments: list[str]


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page."""
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in _FENCE.finditer(text)
    ]


def command_lines(code: str, variables: dict[str, str]) -> Iterator[CommandLine]:
    """The commands of a block as a shell reads them; assignments on lines of their own are kept in ``variables``."""
    for line in code.replace("\\\n", " ").splitlines():
        words = [Template(word).substitute(variables) for word in shlex.split(line, comments=True)]
        environment: dict[str, str] = {}
        while words and (found := _ASSIGNMENT.fullmatch(words[0])):
            environment[found[1]] = found[2]
            words.pop(0)
        if words:
            yield CommandLine(environment, words[0], words[1:])
        else:
            variables |= environment


def run_page(text: str, name: str, run_command: Callable[[CommandLine], None]) -> int:
    """Run the blocks of a page in their order, those of Python in one namespace; return how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    variables: dict[str, str] = {}
    count = 0
    for block in blocks(text):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
        else:
            assert block.language == "bash", f"{name}:{block.line}: a block of {block.language or 'no language'}"
            for line in command_lines(block.code, variables):
                run_command(line)
        count += 1
    return count


def without_blocks(text: str) -> str:
    """A page's prose."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of a page's links and images that are no addresses of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))
    return [target for target in found if "://" not in target]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
