"""The program: its commands, what all of them take, and what becomes of errors."""

from __future__ import annotations

import logging
from typing import Annotated, NoReturn

import torch
import typer

import quant_moelora
from quant_moelora.cli import bench, convert, demo, export_adapter, generate, inspect, serve, tune, verify
from quant_moelora.core.errors import QuantMoELoRAError

logger = logging.getLogger(__name__)

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed (verify); 2 refused, with one line on stderr: a wrong option, an input that "
    "is damaged or not served, no memory or no access. What else goes wrong is a bug, and shows a traceback."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would break the lines of examples
    epilog=EXIT_CODES,
    help="LoRA on quantised Mixture-of-Experts models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quant-moelora {quant_moelora.__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is chosen and why.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA on quantised Mixture-of-Experts models."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


for _command, _examples in (
    (inspect.inspect, inspect.EXAMPLES),
    (verify.verify, verify.EXAMPLES),
    (convert.convert, convert.EXAMPLES),
    (generate.generate, generate.EXAMPLES),
    (serve.serve, serve.EXAMPLES),
    (export_adapter.export_adapter, export_adapter.EXAMPLES),
    (bench.bench, bench.EXAMPLES),
    (tune.tune, tune.EXAMPLES),
    (demo.demo, demo.EXAMPLES),
):
    app.command(epilog="\n".join(("\b", "Examples:", *(f"  quant-moelora {line}" for line in _examples))))(_command)


def main() -> None:
    """Entry point: what a caller can cause is one line on stderr and exit code 2."""
    try:
        app()
    except QuantMoELoRAError as error:
        _refuse(error, str(error))
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # of files, the hub and tokenizers
        _refuse(error, f"{type(error).__name__}: {error}")


def _refuse(error: Exception, message: str) -> NoReturn:
    logger.info("traceback", exc_info=error)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(2)
