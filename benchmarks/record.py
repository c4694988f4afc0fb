"""Figures as CSV: each row says where, when and with what it was measured."""

import csv
import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch


def provenance(device: str, commit: str, **versions: str) -> dict[str, str]:
    """The first columns of every row: hardware, versions, commit, date.

    Args:
        device: ``cpu`` or ``cuda``.
        commit: the commit that runs.
        versions: of what else matters, such as ``triton``.
    """
    if device == "cpu":
        hardware = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads"}
    else:
        hardware = {"gpu": torch.cuda.get_device_name()}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {**hardware, "torch": torch.__version__, **versions, "commit": commit, "date": date}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_rows(
    path: Path, fixed: Mapping[str, object], columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write ``rows``, each behind the ``fixed`` columns, as they come."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*fixed, *columns])
        writer.writeheader()
        for row in rows:
            writer.writerow({**fixed, **row})
            file.flush()
