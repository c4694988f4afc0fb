"""Tables of measured tiles: JSON files, one a GPU and a layer; shipped in `tuned/`, or in a user's folder."""

from __future__ import annotations

import functools
import json
import logging
import os
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from quant_moelora.core import packing
from quant_moelora.core.errors import FormatError
from quant_moelora.kernels.grouped_gemm.config import Tuned
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles, layer_faults
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.lora.spec import Cut, cut_faults, rank_class

logger = logging.getLogger(__name__)

VARIABLE = "QUANT_MOELORA_TUNED_CONFIGS"
_REMEDY = "write the table again with quant-moelora tune, or remove the file"


@dataclass(frozen=True)
class Provenance:
    """With what a table was measured."""

    torch: str
    triton: str
    cuda: str
    quant_moelora: str
    commit: str
    date: str


@dataclass(frozen=True)
class Entry:
    """What was measured with one number of pairs.

    Attributes:
        num_pairs: P.
        w13: as of `LayerTiles`.
        w13_fused: as of `LayerTiles`.
        w2: as of `LayerTiles`.
        us: median of both GEMMs with the activation and the sum, microseconds.
        formula_us: the same with the formula's tiles.
    """

    num_pairs: int
    w13: Tile
    w13_fused: Tile | None
    w2: Tile
    us: float
    formula_us: float

    def tiles(self) -> LayerTiles:
        """The tiles; whether pairs are sorted is not the table's to say."""
        return LayerTiles(False, self.w13, self.w13_fused, self.w2)


@dataclass(frozen=True)
class LoRAEntry:
    """What was measured with adapters of one rank and one number of pairs.

    Attributes:
        num_pairs: P.
        rank: of all adapters, a power of two.
        cut: how LoRA is cut.
        us: geometric mean of the layer's medians with few and with many adapters, microseconds.
        formula_us: the same with the formula's cut.
    """

    num_pairs: int
    rank: int
    cut: Cut
    us: float
    formula_us: float


@dataclass(frozen=True)
class Table:
    """What was measured of one layer on one GPU.

    Attributes:
        gpu: name of the GPU, as torch gives it.
        capability: its compute capability.
        layout: version of the packed layout.
        shape: the layer.
        provenance: with what it was measured.
        entries: by number of pairs.
        lora: by number of pairs and rank; empty if it was measured without adapters.
        lora_provenance: with what those were measured.
    """

    gpu: str
    capability: tuple[int, int]
    layout: str
    shape: LayerShape
    provenance: Provenance
    entries: tuple[Entry, ...]
    lora: tuple[LoRAEntry, ...] = ()
    lora_provenance: Provenance | None = None

    @property
    def file_name(self) -> str:
        """Name of the file, the same whenever this layer is measured on this GPU."""
        return f"{self.gpu.replace(' ', '_').replace('/', '_')}-{self.shape.name}.json"

    def write(self, folder: Path) -> Path:
        """Write the file, in place of an earlier one."""
        path = folder / self.file_name
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


def tuned_folder(argument: str | os.PathLike[str] | None) -> str | None:
    """The user's folder of tables: the argument, or what the environment names; None if neither does.

    Raises:
        FormatError: there is no such folder.
    """
    named = os.environ.get(VARIABLE) or None
    what, value = ("tuned_configs", os.fspath(argument)) if argument is not None else (VARIABLE, named)
    if value is None:
        return None
    folder = os.path.abspath(value)
    if not os.path.isdir(folder):
        raise FormatError(
            what,
            got=value,
            rule="a folder with tables that quant-moelora tune wrote",
            remedy="correct the path, or leave it out for the shipped tables",
        )
    return folder


@functools.cache
def tuned_tiles(folder: str | None, gpu: str) -> Tuned:
    """What was measured on a GPU: of layers that the folder has, the folder's; of others what is shipped.

    Files are read once in a process. Tables of other GPUs are ignored, with one log line for the folder.

    Args:
        folder: as of `tuned_folder`.
        gpu: name of the GPU, as torch gives it.

    Raises:
        FormatError: a file is no table, or two of one GPU are of the same layer.
    """
    shipped = [(name, table) for name, table in shipped_tables() if table.gpu == gpu]
    own: list[tuple[str, Table]] = []
    if folder is not None:
        found = list(read_folder(Path(folder)))
        own = [(name, table) for name, table in found if table.gpu == gpu]
        others = [f"{name} (of {table.gpu})" for name, table in found if table.gpu != gpu]
        if others or not own:
            instead = "" if own else f"; it has none of {gpu}, which is served by shipped tables and by the formula"
            level = logging.INFO if own else logging.WARNING
            logger.log(level, "tuned tiles in %s: ignored %s%s", folder, ", ".join(others) or "nothing", instead)
    return Tuned(_by_layer(shipped) | _by_layer(own), _lora_by_layer(shipped) | _lora_by_layer(own))


def known_table(folder: Path, gpu: str, shape: LayerShape) -> Table | None:
    """What was measured of a layer on a GPU: the folder's table, or the one that is shipped; None if there is none.

    Raises:
        FormatError: a file is no table.
    """
    found = (*shipped_tables(), *read_folder(folder))
    return next((table for _, table in reversed(found) if (table.gpu, table.shape) == (gpu, shape)), None)


def shipped_tables() -> Iterator[tuple[str, Table]]:
    """Name and content of each table of the package."""
    return read_folder(resources.files("quant_moelora.kernels.grouped_gemm") / "tuned")


def read_folder(folder: Traversable) -> Iterator[tuple[str, Table]]:
    """Name and content of each table of a folder, in the order of their names; none if there is no such folder.

    Raises:
        FormatError: a file is no table.
    """
    if folder.is_dir():
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".json"):
                yield str(file), parse(file.read_text(encoding="utf-8"), str(file))


def _by_layer(tables: Iterable[tuple[str, Table]]) -> dict[LayerShape, dict[int, LayerTiles]]:
    found: dict[LayerShape, dict[int, LayerTiles]] = {}
    names: dict[LayerShape, str] = {}
    for name, table in tables:
        if table.shape in found:
            raise FormatError(
                name, got=f"the layer of {names[table.shape]}", rule="one table a layer and GPU", remedy="remove one"
            )
        names[table.shape] = name
        found[table.shape] = {entry.num_pairs: entry.tiles() for entry in table.entries}
    return found


def _lora_by_layer(tables: Iterable[tuple[str, Table]]) -> dict[LayerShape, dict[tuple[int, int], Cut]]:
    """Of those whose formula was not the best."""
    return {
        table.shape: {(entry.num_pairs, entry.rank): entry.cut for entry in table.lora}
        for _, table in tables
        if table.lora
    }


def parse(text: str, name: str) -> Table:
    """A table from the text of its file; nothing may be missing, unknown or impossible to launch.

    Args:
        text: JSON.
        name: of the file, for messages.

    Raises:
        FormatError: it is no table.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(name, got=str(error), rule="JSON", remedy=_REMEDY) from None
    if isinstance(raw, dict) and raw.get("layout", packing.LAYOUT) != packing.LAYOUT:
        raise FormatError(f"{name}: layout", got=raw["layout"], rule=packing.LAYOUT, remedy="tune again")
    table = _typed(Table, raw, name)
    numbers = [entry.num_pairs for entry in table.entries]
    if len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise FormatError(
            f"{name}: num_pairs", got=numbers, rule="positive numbers, each once", remedy="remove the others"
        )
    for entry in table.entries:
        _check(entry, table, f"{name}: num_pairs {entry.num_pairs}")
    for entry in table.lora:
        where = f"{name}: lora: num_pairs {entry.num_pairs}, rank {entry.rank}"
        wrong = cut_faults(entry.cut)
        if entry.rank != rank_class(entry.rank):
            wrong.append("rank is a power of two, from 16 on")
        if wrong:
            raise FormatError(where, got="a cut that cannot be launched", rule="; ".join(wrong), remedy=_REMEDY)
    return table


def _check(entry: Entry, table: Table, where: str) -> None:
    """Raise unless an entry can be launched."""
    plain, fused = entry.w13, entry.w13_fused
    wrong = [] if len({tile.bm for tile in (plain, fused, entry.w2) if tile}) == 1 else ["bm: all GEMMs have the same"]
    if fused is not None and not fused.split == plain.split == 1:
        wrong.append("split: w13 has none where there is a fused one")
    wrong = wrong or layer_faults(entry.tiles(), table.shape, table.capability)
    if wrong:
        raise FormatError(where, got="tiles that cannot be launched", rule="; ".join(wrong), remedy=_REMEDY)


def _typed(kind: Any, raw: Any, where: str) -> Any:
    """A value of a type, or a dataclass of such values, from what JSON gave."""
    if is_dataclass(kind):
        assert isinstance(kind, type)
        names = [field.name for field in fields(kind)]
        if not isinstance(raw, dict) or raw.keys() != set(names):
            got = ", ".join(map(str, raw)) if isinstance(raw, dict) else repr(raw)
            raise FormatError(where, got=got, rule=f"exactly the keys {', '.join(names)}", remedy=_REMEDY)
        hints = typing.get_type_hints(kind)
        return kind(**{name: _typed(hints[name], raw[name], f"{where}: {name}") for name in names})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # of something and None
        return None if raw is None else _typed(arguments[0], raw, where)
    if origin is tuple and isinstance(raw, list) and (arguments[-1] is ... or len(raw) == len(arguments)):
        return tuple(_typed(arguments[0], value, where) for value in raw)
    if type(raw) is kind:  # and not an instance of it: True is no number
        return raw
    if kind is float and type(raw) is int:
        return float(int(raw))
    raise FormatError(where, got=repr(raw), rule=getattr(kind, "__name__", str(kind)), remedy=_REMEDY)
