"""verify: a checkpoint's experts as a table, and whether the packed model computes what they mean."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from quant_moelora.cli.options import JsonOption, PathArgument, ranges

if TYPE_CHECKING:
    from quant_moelora.integrations.verify import Verification

EXAMPLES = ("verify ./model", "verify ./model-int4 --against ./model --json")


def verify(
    path: PathArgument,
    against: Annotated[str | None, typer.Option(help="The model that the checkpoint was quantised from.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Dequantise all experts and check the model's logits.

    They are compared with those of the dequantised model in plain transformers, in float32 on the CPU.

    Exit code 1 if anything is missing, misshapen or not finite, or if the logits differ.
    """
    from quant_moelora.integrations.verify import verify

    found = verify(path, against)
    if as_json:
        typer.echo(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
    else:
        echo_verification(found)
    if not found.ok:
        raise typer.Exit(1)


def echo_verification(found: Verification) -> None:
    """Print a verification as a table and its verdicts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    headers = ("layer", "projection", "scheme", "min", "max", "rms", "zero scales", "end codes", "error to dense")
    for header in headers:
        table.add_column(header, no_wrap=True, justify="left" if header in ("projection", "scheme") else "right")
    for row in found.projections:
        values = (f"{value:.4g}" for value in (row.minimum, row.maximum, row.rms))
        shares = ("-" if value is None else f"{value:.2%}" for value in (row.zero_scales, row.end_codes))
        error = "-" if row.relative_error is None else f"{row.relative_error:.4f}"
        table.add_row(str(row.layer), row.projection, row.scheme, *values, *shares, error)
    typer.echo(f"{found.path}: {found.model_type}, {found.dtype}")
    Console(width=max(Console().width, 120)).print(table)  # a pipe has no width, and figures must not be cut
    losses: dict[str, list[int]] = {}
    for layer in found.backends:
        losses.setdefault(f"backend {layer.backend} in {found.dtype}: {layer.lossy or 'loses nothing'}", []).append(
            layer.layer
        )
    for loss, layers in losses.items():
        typer.echo(f"layers {ranges(layers)}: {loss}")
    verdict = "ok" if found.ok else "FAILED"
    typer.echo(
        f"{verdict}: logits differ from the dequantised model's by {found.parity:.1e} (relative RMS, float32, "
        f"allowed {found.parity_bound:.0e})"
    )
