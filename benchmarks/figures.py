"""What the plots of all reports have in common."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def panels(rows: int, columns: int, width: float, height: float = 3.2) -> tuple[Any, Any]:
    """A figure, and its panels [rows, columns], each of ``width`` by ``height`` inches."""
    plt: Any = importlib.import_module("matplotlib.pyplot")  # of the extra `bench`
    plt.switch_backend("Agg")
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharex=True)


def name_axes(panel: Any, title: str, x: str, y: str) -> None:
    """Title and axes of a panel, whose x counts something by powers of two."""
    panel.set_xscale("log", base=2)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.tick_params(labelsize=7)


def save(figure: Any, title: str, path: Path) -> None:
    """Write a figure with one legend for all panels, each label once."""
    drawn = [panel.get_legend_handles_labels() for panel in figure.axes]
    legend = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=min(4, len(legend)), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.02 + 0.03 * -(-len(legend) // 4), 1, 1))
    figure.savefig(path, dpi=120)
    importlib.import_module("matplotlib.pyplot").close(figure)
