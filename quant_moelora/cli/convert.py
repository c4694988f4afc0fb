"""convert: a checkpoint in the packed form, which loads without packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quant_moelora.cli.options import DeviceOption, JsonOption, PathArgument, check_device

EXAMPLES = ("convert ./model ./packed", "convert Qwen/Qwen3-30B-A3B-GPTQ-Int4 ./packed --max-shard-size 2GB")


def convert(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not be there.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "5GB",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in the packed form.

    It loads as the checkpoint does, bit for bit, without being packed again. The folder appears when it is whole, or
    not at all.
    """
    from quant_moelora.integrations.convert import convert

    folder = convert(path, out, max_shard_size=max_shard_size, device=check_device(device))
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    if as_json:
        typer.echo(json.dumps({"path": str(folder), "bytes": sum(sizes.values()), "files": sizes}, indent=2))
    else:
        typer.echo(f"{folder}: {sum(sizes.values()):,} bytes in {len(sizes)} files")
