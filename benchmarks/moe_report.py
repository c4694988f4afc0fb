"""Plot and table of benchmarks.moe.

`python -m benchmarks.moe_report CSV.. [--plot FILE.png]` prints the table for docs/performance.md and, with --plot,
draws time over floor against the number of tokens.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.moe_case import DENSE_BITS

Row = Mapping[str, str]
Key = tuple[str, int, int, str, str]  # shape, bits, tokens, who, what
LABELS = {
    ("ours", "gemms"): "our GEMMs",
    ("ours", "layer"): "our layer",
    ("humming", "gemms"): "Humming GEMMs",  # the faster of its two forms, at each point
    ("torch", "gemms"): "torch bf16 GEMMs",
    ("torch", "layer"): "transformers bf16 layer",
}
# Not of the run: vLLM 0.33, its compiled Marlin operators called directly, whole layer, int4 g128 bf16, one H200 with
# the same shapes, CUDA graphs and routing drawn anew; microseconds at these numbers of tokens.
VLLM = "vLLM 0.33 layer (measured earlier)"
VLLM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
VLLM_LAYER_US = {
    "qwen3-30b-a3b": (28.5, 46, 91, 129, 204, 475, 1414),
    "mixtral-8x7b": (79, 169, 241, 369, 907, 2655, 9949),
    "deepseek-v3": (81, 241, 751, 1601, 2158, 3923, 12353),
}


def read(paths: Sequence[Path]) -> dict[Key, Row]:
    """Rows that hold a figure; of a candidate with several forms (NAME, NAME-FORM) the fastest."""
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if not row["failed"]]
    found: dict[Key, Row] = {}
    for row in sorted(rows, key=lambda row: float(row["p50_us"]), reverse=True):
        who = row["who"].partition("-")[0]
        found[row["shape"], int(row["bits"]), int(row["m"]), who, row["what"]] = row
    return found


def cases(rows: Mapping[Key, Row]) -> list[tuple[str, int, int]]:
    """Shape, bits and tokens of each case, int4 first."""
    return sorted({key[:3] for key in rows}, key=lambda case: (case[1], case[0], case[2]))


def width_name(bits: int) -> str:
    """Of the weights: 16 bits are bfloat16, all others integers in groups of 128."""
    return "bf16" if bits == DENSE_BITS else f"int{bits} g128"


def vllm_us(shape: str, bits: int, tokens: int) -> float | None:
    """vLLM's layer, or None where there is no figure."""
    if bits != 4 or shape not in VLLM_LAYER_US or tokens not in VLLM_TOKENS:
        return None
    return VLLM_LAYER_US[shape][VLLM_TOKENS.index(tokens)]


def table(rows: Mapping[Key, Row]) -> str:
    """Medians in microseconds, as Markdown, with a line that says where they were taken."""
    shown = [label for label in LABELS if any(key[3:] == label for key in rows)]
    some = next(iter(rows.values()))
    lines = [
        f"{some['gpu']}, torch {some['torch']}, Triton {some['triton']}, Humming {some['humming'] or '-'}, "
        f"{some['date']}, commit {some['commit']}; median microseconds; floor at 4.3 TB/s and 790 TFLOP/s "
        f"(this run reads {some['read_tbps']} TB/s and multiplies {some['matmul_tflops']} TFLOP/s).",
        "",
        "| shape | bits | M | floor | " + " | ".join(LABELS[label] for label in shown) + f" | over floor | {VLLM} |",
        "|---" * (len(shown) + 6) + "|",
    ]
    for shape, bits, tokens in cases(rows):
        found = {label: rows.get((shape, bits, tokens, *label)) for label in shown}
        floor = next(row["floor_us"] for row in found.values() if row is not None)
        ours = found.get(("ours", "gemms"))
        cells = [
            *(_short(None if row is None else float(row["p50_us"])) for row in found.values()),
            "-" if ours is None else f"{float(ours['over_floor']):.2f}",
            _short(vllm_us(shape, bits, tokens)),
        ]
        lines.append(f"| {shape} | {bits} | {tokens} | {_short(float(floor))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def speedups(rows: Mapping[Key, Row], bits: int) -> list[str]:
    """Of our GEMMs over each rival's, and of our layer over vLLM's: geometric mean and worst point."""
    lines: list[str] = []
    rivals: dict[str, list[tuple[float, str]]] = {}
    for shape, width, tokens in cases(rows):
        if width != bits:
            continue
        layer = rows.get((shape, bits, tokens, "ours", "layer"))
        for (who, what), label in LABELS.items():
            row, ours = (rows.get((shape, bits, tokens, one, what)) for one in (who, "ours"))
            if who != "ours" and row is not None and ours is not None:
                ratio = float(row["p50_us"]) / float(ours["p50_us"])
                rivals.setdefault(label, []).append((ratio, f"{shape} M={tokens}"))
        known = vllm_us(shape, bits, tokens)
        if layer is not None and known is not None:
            rivals.setdefault(VLLM, []).append((known / float(layer["p50_us"]), f"{shape} M={tokens}"))
    for label, ratios in rivals.items():
        mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
        worst, where = min(ratios)
        lines.append(
            f"{width_name(bits)} against {label}: {mean:.2f} times as fast, {worst:.2f} at the worst ({where})"
        )
    return lines


def plot(rows: Mapping[Key, Row], path: Path) -> None:
    """Time over floor against tokens: a row of panels for each width, a panel for each shape."""
    shapes, widths = sorted({key[0] for key in rows}), sorted({key[1] for key in rows})
    figure, panels = figures.panels(len(widths), len(shapes), width=4.2)
    for line, bits in zip(panels, widths, strict=True):
        for panel, shape in zip(line, shapes, strict=True):
            _draw(panel, rows, shape, bits)
    gpu, names = next(iter(rows.values()))["gpu"], ", ".join(map(width_name, widths))
    figures.save(figure, f"{gpu}, {names}; floor at 4.3 TB/s and 790 TFLOP/s", path)


def _draw(panel: Any, rows: Mapping[Key, Row], shape: str, bits: int) -> None:
    tokens = sorted({key[2] for key in rows if key[:2] == (shape, bits)})
    for (who, what), label in LABELS.items():
        _curve(panel, label, tokens, [_over_floor(rows.get((shape, bits, m, who, what))) for m in tokens])
    floors = {key[2]: float(row["floor_us"]) for key, row in rows.items() if key[:2] == (shape, bits)}
    known = [vllm_us(shape, bits, m) for m in tokens]
    _curve(panel, VLLM, tokens, [None if us is None else us / floors[m] for us, m in zip(known, tokens, strict=True)])
    panel.axhline(1.0, color="black", linewidth=0.6)
    panel.set_yscale("log", base=2)
    figures.name_axes(panel, f"{shape}, {width_name(bits)}", "tokens M", "time over floor")
    panel.set_xticks(tokens, [str(m) for m in tokens])
    panel.set_yticks([1, 1.5, 2, 3, 4, 6, 8, 12], ["1", "1.5", "2", "3", "4", "6", "8", "12"])


def _curve(panel: Any, label: str, tokens: Sequence[int], values: Sequence[float | None]) -> None:
    points = [(m, value) for m, value in zip(tokens, values, strict=True) if value is not None]
    if points:
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)


def _over_floor(row: Row | None) -> float | None:
    return None if row is None else float(row["over_floor"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = read(args.csv)
    print(table(rows), "", sep="\n")
    print(*(line for bits in sorted({key[1] for key in rows}) for line in speedups(rows, bits)), sep="\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
