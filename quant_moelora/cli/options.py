"""What several commands take and print."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import typer

from quant_moelora.core.errors import AdapterError, UnsupportedError


class DType(StrEnum):
    """Activation dtypes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


PathArgument = Annotated[str, typer.Argument(help="Folder of a checkpoint, or a repository of the hub.")]
ModelOption = Annotated[str, typer.Option(help="Folder of a checkpoint, or a repository of the hub.")]
AdapterOption = Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of an adapter. Repeatable.")]
DTypeOption = Annotated[DType, typer.Option(help="Activation dtype; auto takes the checkpoint's.")]
DeviceOption = Annotated[str, typer.Option(help="Device to work on, such as cpu or cuda.")]
BackendOption = Annotated[str, typer.Option(help="Experts backend.")]
TunedOption = Annotated[str | None, typer.Option(help="Folder of tables that tune wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def split_adapters(texts: Iterable[str] | None) -> dict[str, str]:
    """Folders of NAME=FOLDER texts, by name.

    Raises:
        AdapterError: another form, or a name given twice.
    """
    adapters: dict[str, str] = {}
    for text in texts or ():
        name, separator, folder = text.partition("=")
        if not separator or not name or not folder or name in adapters:
            raise AdapterError(
                "--adapter",
                got=text,
                rule="NAME=FOLDER, each name once",
                remedy="give the adapter a name of its own, as in --adapter a=./adapter",
            )
        adapters[name] = folder
    return adapters


def check_device(device: str) -> str:
    """``device``, if torch has it: transformers would find out after minutes of loading.

    Raises:
        UnsupportedError: a CUDA device that torch does not see. Words that are no device are left to `from_pretrained`.
    """
    import torch

    kind, _, number = device.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(number if number.isdecimal() else 0) >= count:
        raise UnsupportedError(
            "--device",
            got=device,
            rule=f"a device of this machine, where torch {torch.__version__} sees {count or 'no'} CUDA devices",
            remedy="use --device cpu, or install a torch that fits the GPU's driver",
        )
    return device


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
