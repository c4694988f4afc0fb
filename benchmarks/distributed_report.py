"""Plot and table of benchmarks.distributed.

`python -m benchmarks.distributed_report CSV.. [--plot FILE.png]` prints the table for docs/distributed.md and, with
--plot, draws the efficiency against the number of tokens: the time of one GPU with M tokens over that of several with M
tokens each.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures

Row = Mapping[str, str]
Key = tuple[str, int, str, int, int]  # shape, GPUs, way, tokens, adapters
ALONE = "one"


def read(paths: Sequence[Path]) -> dict[Key, Row]:
    """Rows by what was measured."""
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return {(r["shape"], int(r["gpus"]), r["way"], int(r["m"]), int(r["adapters"])): r for r in rows}


def table(rows: Mapping[Key, Row]) -> str:
    """Times without and with LoRA, as Markdown, with a line that says where they were taken."""
    some = next(iter(rows.values()))
    lines = [
        f"{some['gpu']}, torch {some['torch']}, NCCL {some['nccl']}, {some['date']}, commit {some['commit']}; median "
        "microseconds of the slowest GPU; in brackets the efficiency.",
        "",
        "| shape | M a GPU | GPUs | way | layer | communication alone | by the model | with LoRA |",
        "|---" * 8 + "|",
    ]
    order = {way: place for place, way in enumerate(dict.fromkeys(key[2] for key in rows))}
    for key in sorted({key[:4] for key in rows}, key=lambda key: (key[0], key[3], key[1], order[key[2]])):
        shape, gpus, way, tokens = key
        found = {adapters: row for (*others, adapters), row in rows.items() if tuple(others) == key}
        base, lora = found.get(0), next((row for adapters, row in found.items() if adapters), None)
        either = base or lora
        assert either is not None  # the key has a row
        cells = (shape, tokens, gpus, way, _cell(base), _short(either["comm_us"]), _short(either["model_comm_us"]))
        lines.append(f"| {' | '.join(map(str, (*cells, _cell(lora))))} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    """Time and efficiency."""
    if row is None:
        return "-"
    return _short(row["p50_us"]) + (f" ({float(row['efficiency']):.2f})" if row["efficiency"] else "")


def _short(us: str) -> str:
    return "-" if not us else f"{float(us):.1f}" if float(us) < 100 else f"{float(us):.0f}"


def plot(rows: Mapping[Key, Row], path: Path) -> None:
    """Efficiency against tokens: a panel for each shape, and one with LoRA."""
    shapes, counts = list(dict.fromkeys(key[0] for key in rows)), sorted({key[4] for key in rows})
    figure, panels = figures.panels(len(counts), len(shapes), width=5)
    for line, adapters in zip(panels, counts, strict=True):
        for panel, shape in zip(line, shapes, strict=True):
            _draw(panel, rows, shape, adapters)
    gpu = next(iter(rows.values()))["gpu"]
    figures.save(figure, f"{gpu}, int4 g128, bf16, LoRA r = 16: time of one GPU over that of several", path)


def _draw(panel: Any, rows: Mapping[Key, Row], shape: str, adapters: int) -> None:
    ways = dict.fromkeys((key[1], key[2]) for key in rows if key[2] != ALONE)
    for color, (gpus, way) in enumerate(ways):
        held = sorted((key[3], row) for key, row in rows.items() if key[:3] + key[4:] == (shape, gpus, way, adapters))
        if held:
            tokens, found = zip(*held, strict=True)
            times = [float(row["efficiency"]) for row in found]
            panel.plot(tokens, times, marker="o", color=f"C{color}", label=f"{way}, {gpus} GPUs")
    panel.axhline(1, color="grey", linewidth=0.8)
    title = f"{shape}, {f'{adapters} adapters' if adapters else 'no adapters'}"
    figures.name_axes(panel, title, "tokens of a GPU", "efficiency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = read(args.csv)
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
