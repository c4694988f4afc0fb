"""Plot and tables of benchmarks.moe_lora.

`python -m benchmarks.lora_report CSV [--plot FILE.png]` prints the tables for docs/performance.md and, with --plot,
draws the time that LoRA adds against the number of adapters, beside its floor and beside one call an adapter.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import figures

Row = Mapping[str, str]
Key = tuple[str, int, int, int, str]  # shape, tokens, adapters, rank, who
RANK = 16
# Not of the run: vLLM 0.33, its compiled Marlin and LoRA operators called directly with default tiles, whole layer,
# int4 g128 bf16, r = 16 on gate, up and down, one H200, CUDA graphs and routing drawn anew; microseconds.
VLLM = "vLLM 0.33 (measured earlier)"
VLLM_TOKENS = (1, 4, 16, 64, 256, 1024)
VLLM_LORA_US = {
    ("deepseek-v3", 1): (171, 345, 907, 1769, 2393, 4214),
    ("deepseek-v3", 8): (202, 376, 880, 1882, 3215, 5580),
    ("mixtral-8x7b", 1): (236, 334, 412, 562, 1213, 3094),
    ("mixtral-8x7b", 8): (298, 408, 469, 635, 1324, 3170),
    ("qwen3-30b-a3b", 1): (56.7, 87, 140, 193, 308, 615),
    ("qwen3-30b-a3b", 8): (68.9, 91, 140, 244, 500, 850),
}


def read(path: Path) -> dict[Key, Row]:
    """Rows by what was measured."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(r["shape"], int(r["m"]), int(r["adapters"]), int(r["rank"]), r["who"]): r for r in rows}


def vllm_us(shape: str, tokens: int, adapters: int) -> float | None:
    """vLLM's layer with LoRA, or None where there is no figure."""
    known = VLLM_LORA_US.get((shape, adapters))
    return known[VLLM_TOKENS.index(tokens)] if known and tokens in VLLM_TOKENS else None


def time_us(row: Row | None) -> float | None:
    """Median of a row."""
    return None if row is None else float(row["p50_us"])


def table(rows: Mapping[Key, Row], counts: Sequence[int] = (1, 8)) -> str:
    """The layer without and with LoRA of rank 16, as Markdown, with a line that says where it was taken."""
    some = next(iter(rows.values()))
    lines = [
        f"{some['gpu']}, torch {some['torch']}, Triton {some['triton']}, {some['date']}, commit {some['commit']}; "
        f"median microseconds; floor at 4.3 TB/s and 790 TFLOP/s (this run reads {some['read_tbps']} TB/s and "
        f"multiplies {some['matmul_tflops']} TFLOP/s).",
        "",
        f"| shape | M | adapters | layer | with LoRA | added | LoRA's floor | over floor | {VLLM} |",
        "|---" * 9 + "|",
    ]
    for shape, tokens, count, rank, who in sorted(rows):
        if who != "lora" or rank != RANK or count not in counts:
            continue
        lora, base = rows[shape, tokens, count, rank, who], rows[shape, tokens, count, rank, "base"]
        cells = (shape, tokens, count, _short(time_us(base)), _short(time_us(lora)), f"{float(lora['added_part']):.0%}")
        more = (_short(float(lora["lora_floor_us"])), f"{float(lora['over_floor']):.2f}")
        lines.append(f"| {' | '.join(map(str, (*cells, *more, _short(vllm_us(shape, tokens, count)))))} |")
    return "\n".join(lines)


def _short(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def against_vllm(rows: Mapping[Key, Row]) -> str:
    """How many times as fast as vLLM's: geometric mean and worst point."""
    ratios: list[tuple[float, str]] = []
    for (shape, tokens, count, rank, who), row in rows.items():
        known = vllm_us(shape, tokens, count)
        if who == "lora" and rank == RANK and known is not None:
            ratios.append((known / float(row["p50_us"]), f"{shape} M={tokens} A={count}"))
    if not ratios:
        return "no figure beside vLLM's"
    mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
    worst, where = min(ratios)
    return f"layer with LoRA against {VLLM}: {mean:.2f} times as fast, {worst:.2f} at the worst ({where})"


def others(rows: Mapping[Key, Row]) -> str:
    """Cases with a loop, and those of other ranks, as Markdown: added time, that of the loop, and LoRA's floor."""
    lines = [
        "| shape | M | adapters | rank | layer | added | a call an adapter adds | LoRA's floor |",
        "|---" * 8 + "|",
    ]
    for shape, tokens, count, rank, who in sorted(rows):
        loop = rows.get((shape, tokens, count, rank, "loop"))
        if who != "lora" or (loop is None and rank == RANK):
            continue
        lora, base = rows[shape, tokens, count, rank, who], rows[shape, tokens, count, rank, "base"]
        added = [None if row is None else float(row["added_us"]) for row in (lora, loop)]
        cells = (shape, tokens, count, rank, _short(time_us(base)), *map(_short, added))
        lines.append(f"| {' | '.join(map(str, (*cells, _short(float(lora['lora_floor_us'])))))} |")
    return "\n".join(lines)


def plot(rows: Mapping[Key, Row], path: Path) -> None:
    """Added time against the number of adapters: a row of panels for each number of tokens, a panel for each shape."""
    looped = [key for key in rows if key[4] == "loop"]
    shapes, sizes = sorted({key[0] for key in looped}), sorted({key[1] for key in looped})
    figure, panels = figures.panels(len(sizes), len(shapes), width=4.2)
    for line, tokens in zip(panels, sizes, strict=True):
        for panel, shape in zip(line, shapes, strict=True):
            counts = sorted({key[2] for key in looped if key[:2] == (shape, tokens)})
            held = [rows[shape, tokens, count, RANK, "lora"] for count in counts]
            loops = [rows[shape, tokens, count, RANK, "loop"] for count in counts]
            panel.plot(counts, [float(row["added_us"]) for row in held], marker="o", label="one batch")
            panel.plot(counts, [float(row["added_us"]) for row in loops], marker="s", label="a call an adapter")
            panel.plot(counts, [float(row["lora_floor_us"]) for row in held], linestyle="--", label="bytes of LoRA")
            panel.set_yscale("log")
            figures.name_axes(panel, f"{shape}, M = {tokens}", "adapters", "added time, us")
            panel.set_xticks(counts, [str(count) for count in counts])
    gpu = next(iter(rows.values()))["gpu"]
    figures.save(figure, f"{gpu}, int4 g128, bf16, LoRA r = {RANK} on gate, up and down", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = read(args.csv)
    print(table(rows), "", against_vllm(rows), "", others(rows), sep="\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
