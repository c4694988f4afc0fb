"""Plot and table of benchmarks.distributed.

`python -m benchmarks.distributed_report CSV.. [--plot FILE.png]` prints the table for docs/distributed.md and, with
--plot, draws the efficiency against the number of tokens: the time of one GPU with M tokens over that of several with M
tokens each.
"""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    plt: Any = importlib.import_module("matplotlib.pyplot")  # of the extra `bench`
    plt.switch_backend("Agg")
    shapes = list(dict.fromkeys(key[0] for key in rows))
    counts = sorted({key[4] for key in rows})
    ways = list(dict.fromkeys((key[1], key[2]) for key in rows if key[2] != ALONE))
    figure, panels = plt.subplots(
        len(counts), len(shapes), figsize=(5 * len(shapes), 3.2 * len(counts)), squeeze=False, sharex=True
    )
    for line, adapters in zip(panels, counts, strict=True):
        for panel, shape in zip(line, shapes, strict=True):
            for color, (gpus, way) in enumerate(ways):
                held = sorted(
                    (key[3], row) for key, row in rows.items() if key[:3] + key[4:] == (shape, gpus, way, adapters)
                )
                if held:
                    times = [float(row["efficiency"]) for _, row in held]
                    panel.plot(
                        [tokens for tokens, _ in held],
                        times,
                        marker="o",
                        color=f"C{color}",
                        label=f"{way}, {gpus} GPUs",
                    )
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{shape}, {f'{adapters} adapters' if adapters else 'no adapters'}", fontsize=9)
            panel.set_xlabel("tokens of a GPU", fontsize=8)
            panel.set_ylabel("efficiency", fontsize=8)
            panel.tick_params(labelsize=7)
    handles = {
        label: handle
        for line in panels
        for panel in line
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), fontsize=8)
    some = next(iter(rows.values()))
    figure.suptitle(f"{some['gpu']}, int4 g128, bf16, LoRA r = 16: time of one GPU over that of several", fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
