"""Commands run in this process: their outcome, and what a refusal looks like."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Run:
    """Outcome of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Command = Callable[..., Run]


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Run:
    """Run `quant-moelora ARGS` in this process."""
    from quant_moelora.cli import main

    monkeypatch.setattr(sys, "argv", ["quant-moelora", *args])
    with pytest.raises(SystemExit) as exit_info:
        main()
    code = exit_info.value.code
    captured = capsys.readouterr()
    assert code is None or isinstance(code, int)
    return Run(code or 0, captured.out, captured.err)


def error_line(run: Run) -> str:
    """The one line on stderr of a refused command."""
    assert run.code == 2
    assert not run.out
    lines = [line for line in run.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), run.err
    assert re.fullmatch(r"error: .+: got .+, expected .+; .+", lines[0]), "what, got, rule, remedy"
    return lines[0]
