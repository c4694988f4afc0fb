"""Tables of measured tiles: who is asked first, what is refused, and that what is shipped can be launched."""

from __future__ import annotations

import itertools
import json
import logging
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_moelora.core.errors import FormatError
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.integrations.transformers import from_pretrained
from quant_moelora.kernels.common.sample import blank_info
from quant_moelora.kernels.grouped_gemm import table
from quant_moelora.kernels.grouped_gemm.config import NOTHING_TUNED, Tuned, choose_tiles, formula, is_direct
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles, layer_faults
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.table import Entry, Provenance, Table, parse, tuned_folder, tuned_tiles
from quant_moelora.layer import MoEExperts
from tests.builders import layer, scheme

HOPPER, ADA, GPU, OTHER = (9, 0), (8, 9), "NVIDIA H200", "NVIDIA L40S"
MODEL = Path(__file__).parents[1] / "golden" / "checkpoints" / "gptq-qwen3moe-int4-g32-asym"
SHAPES = {
    (experts, hidden, inter, bits, group, symmetric, dtype): LayerShape.of(
        blank_info(experts, hidden, inter, QuantScheme(bits, group, symmetric, torch.bfloat16)), dtype
    )
    for (experts, hidden, inter), bits, group, symmetric, dtype in itertools.product(
        [(128, 2048, 768), (8, 4096, 14336), (256, 7168, 2048), (32, 2880, 2880), (512, 2048, 512), (1, 64, 64)],
        (4, 8),
        (32, 128, None),
        (True, False),
        (torch.bfloat16, torch.float16),
    )
}
SHAPE = SHAPES[128, 2048, 768, 4, 128, True, torch.bfloat16]
PAIRS = [*range(1, 70), *(2**power + odd for power in range(7, 17) for odd in (-1, 0, 3))]
# Nothing that the formula gives, fused and split.
FOUND = LayerTiles(False, Tile(32, 64, 64), Tile(32, 128, 64, stages=5), Tile(32, 64, 64, stages=5))
SPLIT = LayerTiles(False, Tile(16, 64, 64, split=4), None, Tile(16, 64, 64, split=2))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files are read anew, and the environment names no folder."""
    monkeypatch.delenv(table.VARIABLE, raising=False)
    tuned_tiles.cache_clear()
    yield
    tuned_tiles.cache_clear()


def made(*tiles: tuple[int, LayerTiles], gpu: str = GPU, shape: LayerShape = SHAPE) -> Table:
    entries = tuple(Entry(pairs, one.w13, one.w13_fused, one.w2, 1.0, 2.0) for pairs, one in tiles)
    what = Provenance("2.11.0", "3.6.0", "13.0", "0.1.0", "abc", "2026-01-01")
    return Table(gpu, HOPPER, "frag64.v1", shape, what, entries)


def folder(path: Path, *tables: Table) -> Path:
    path.mkdir()
    for one in tables:
        one.write(path)
    return path


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [HOPPER, ADA])
def test_the_formula_can_be_launched_and_has_no_adapters(gpu: tuple[int, int]) -> None:
    for shape in SHAPES.values():
        for act_order, fuses, pairs in itertools.product((False, True), (False, True), PAIRS[::9]):
            asked = replace(shape, act_order=act_order, fuses=fuses and not act_order)
            tiles = choose_tiles(asked, pairs, gpu)
            assert layer_faults(tiles, asked, gpu) == []
            assert tiles == formula(asked, pairs, gpu) and tiles.direct == (
                not asked.act_order and is_direct(pairs, shape.num_experts)
            )
            assert (tiles.w13_fused is not None) == (asked.fuses and tiles.w13.split == 1)


def test_measured_tiles_serve_about_as_many_pairs() -> None:
    """Up to twice as many and half as many; nearest by factor, not by difference."""
    tuned = Tuned({SHAPE: {512: FOUND, 2048: SPLIT}})
    at = {pairs: choose_tiles(SHAPE, pairs, HOPPER, tuned) for pairs in (255, 256, 512, 1023, 1025, 4096, 4097)}
    assert [pairs for pairs, tiles in at.items() if tiles == FOUND] == [256, 512, 1023]
    assert [pairs for pairs, tiles in at.items() if tiles == SPLIT] == [1025, 4096]
    assert all(at[pairs] == formula(SHAPE, pairs, HOPPER) for pairs in (255, 4097))
    assert choose_tiles(SHAPE, 512, HOPPER, NOTHING_TUNED) == formula(SHAPE, 512, HOPPER)


def test_another_layer_has_no_measured_tiles() -> None:
    tuned = Tuned({SHAPE: {512: FOUND}})
    for field, value in (
        ("num_experts", 64),
        ("dtype", "float16"),
        ("act_order", True),
        ("fuses", False),
        ("w13", replace(SHAPE.w13, zeros=True)),
        ("w2", replace(SHAPE.w2, group=64)),
    ):
        other = replace(SHAPE, **{field: value})
        assert choose_tiles(other, 512, HOPPER, tuned) == formula(other, 512, HOPPER), field


def test_where_the_formula_was_best_it_goes_on_deciding() -> None:
    """Its tiles with 24 rows an expert and with 12 differ; the table says only that it was right with 24."""
    own = formula(SHAPE, 2048, HOPPER)
    tuned = Tuned({SHAPE: {2048: replace(own, direct=False)}})
    assert formula(SHAPE, 1024, HOPPER) != own
    for pairs in (1024, 1500, 2048, 4096):
        assert choose_tiles(SHAPE, pairs, HOPPER, tuned) == formula(SHAPE, pairs, HOPPER)


def test_whether_pairs_are_sorted_is_the_formulas_to_say() -> None:
    tuned = Tuned({SHAPE: {32: SPLIT}})
    found = [choose_tiles(SHAPE, pairs, HOPPER, tuned) for pairs in (16, 32, 33, 64)]
    assert [tiles.direct for tiles in found] == [True, True, False, False]
    assert {tiles.w13 for tiles in found} == {SPLIT.w13}


def test_a_forward_has_time_for_it(tmp_path: Path) -> None:
    own = str(folder(tmp_path / "t", made((512, FOUND))))

    def ask() -> LayerTiles:
        return choose_tiles(SHAPE, 512, HOPPER, tuned_tiles(own, GPU))

    assert ask() == FOUND
    assert min(timeit.repeat(ask, number=1000, repeat=20)) / 1000 < 5e-6  # 1 us was measured


# --- tables -----------------------------------------------------------------------------------------------------------


def test_written_and_read(tmp_path: Path) -> None:
    one = made((8, SPLIT), (512, FOUND))
    path = one.write(tmp_path)
    assert path.name == "NVIDIA_H200-E128-1536x2048-int4-g128-2048x768-int4-g128-bfloat16.json"
    assert parse(path.read_text(encoding="utf-8"), "t") == one


def drop(*keys: Any) -> Callable[[Any], None]:
    def edit(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return edit


def put(value: object, *keys: Any) -> Callable[[Any], None]:
    def edit(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return edit


TILE = ("entries", 0, "w13")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("gpu"), "exactly the keys gpu, capability"),
        (put(1, "extra"), "extra"),
        (drop("provenance", "commit"), "provenance"),
        (put("frag64.v0", "layout"), "layout: got frag64.v0, expected frag64.v1"),
        (put([9], "capability"), "capability"),
        (put("128", "shape", "num_experts"), "shape: num_experts"),
        (put(True, *TILE, "bm"), "bm: got True, expected int"),
        (put(None, *TILE), "w13"),
        (put("fast", "entries", 0, "us"), "us"),
        (put({}, "entries"), "entries"),
        (put(0, "entries", 0, "num_pairs"), "num_pairs"),
        (put(512, "entries", 0, "num_pairs"), "each once"),
        (put(24, *TILE, "bm"), "bm"),
        (put(48, *TILE, "bk"), "bk is 64 or 128"),
        (put(True, *TILE, "mixed"), "mixed needs 64 rows"),
        (put(3, *TILE, "split"), "bk and split divide the columns"),
        (put(90, "entries", 0, "w2", "stages"), "bytes of shared memory fit"),
        (put(0, *TILE, "stages"), "at least 1"),
        (put(64, "entries", 1, "w13_fused", "bn"), "of gate and of up"),
        (put(2, "entries", 1, "w13_fused", "split"), "split"),
        (put(64, "entries", 1, "w2", "bm"), "bm: all GEMMs have the same"),
        (put(False, "shape", "fuses"), "a launch of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_tables_are_refused(edit: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    path = made((8, SPLIT), (512, FOUND)).write(tmp_path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    edit(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(FormatError) as error:
        tuned_tiles(str(tmp_path), GPU)
    assert path.name in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_no_table_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=r"a\.json"):
        tuned_tiles(str(tmp_path), GPU)


def test_two_tables_of_one_layer(tmp_path: Path) -> None:
    made((8, SPLIT)).write(tmp_path).rename(tmp_path / "a.json")
    made((512, FOUND)).write(tmp_path)
    with pytest.raises(FormatError, match=r"a\.json: got the layer of .*NVIDIA_H200"):
        tuned_tiles(str(tmp_path), GPU)


# --- whose table ------------------------------------------------------------------------------------------------------


def shipped(monkeypatch: pytest.MonkeyPatch, *tables: Table) -> None:
    monkeypatch.setattr(table, "shipped_tables", lambda: iter([(f"{n}.json", one) for n, one in enumerate(tables)]))


def test_argument_before_environment_before_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = replace(FOUND, w2=Tile(32, 128, 64, stages=5))
    argument, environment = folder(tmp_path / "a", made((512, FOUND))), folder(tmp_path / "e", made((512, SPLIT)))
    shipped(monkeypatch, made((512, third)))

    def choice(given: Path | None) -> LayerTiles:
        return choose_tiles(SHAPE, 512, HOPPER, tuned_tiles(tuned_folder(given), GPU))

    assert choice(None) == third
    monkeypatch.setenv(table.VARIABLE, str(environment))
    assert choice(None) == SPLIT
    assert choice(argument) == FOUND
    monkeypatch.setenv(table.VARIABLE, "")
    assert tuned_folder(None) is None


def test_layers_that_a_folder_does_not_have_are_served_by_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SHAPES[8, 4096, 14336, 4, 128, True, torch.bfloat16]
    shipped(monkeypatch, made((512, SPLIT)), made((512, SPLIT), shape=other))
    own = str(folder(tmp_path / "t", made((64, FOUND))))
    assert tuned_tiles(own, GPU).layers == {SHAPE: {64: FOUND}, other: {512: SPLIT}}
    assert not tuned_tiles(own, OTHER).layers


def test_a_table_of_another_gpu_is_ignored_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped(monkeypatch, made((512, SPLIT)))
    foreign = made((512, FOUND), gpu=OTHER)
    path = str(folder(tmp_path / "foreign", foreign))
    for _ in range(3):
        assert choose_tiles(SHAPE, 512, HOPPER, tuned_tiles(path, GPU)) == SPLIT
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    for part in (path, foreign.file_name, OTHER, f"none of {GPU}"):
        assert part in line.message


def test_a_folder_for_several_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(folder(tmp_path / "both", made((512, SPLIT), gpu=OTHER), made((512, FOUND))))
    with caplog.at_level(logging.INFO):
        assert choose_tiles(SHAPE, 512, HOPPER, tuned_tiles(path, GPU)) == FOUND
    (line,) = caplog.records
    assert line.levelno == logging.INFO and OTHER in line.message and "none of" not in line.message


def test_an_empty_folder_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned_tiles(str(tmp_path), GPU)
    (line,) = caplog.records
    assert f"none of {GPU}" in line.message


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = layer(scheme(4, 32), experts=4, hidden=64, inter=64).info
    missing = tmp_path / "missing"
    for refused in (
        lambda: MoEExperts(info, tuned_configs=missing),
        lambda: from_pretrained(MODEL, tuned_configs=missing),
    ):
        with pytest.raises(FormatError, match=r"tuned_configs: got .*missing"):
            refused()
    monkeypatch.setenv(table.VARIABLE, str(missing))
    with pytest.raises(FormatError, match=f"{table.VARIABLE}: got .*missing"):
        MoEExperts(info)


def test_the_folder_reaches_every_layer(tmp_path: Path) -> None:
    from quant_moelora.integrations.transformers import experts_of

    model = from_pretrained(MODEL, tuned_configs=tmp_path)
    layers = [experts.moe for experts in experts_of(model).values()]
    assert layers and all(moe is not None and moe.tuned_configs == str(tmp_path) for moe in layers)


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_shipped_tables_are_used_and_can_be_launched() -> None:
    for name, one in table.shipped_tables():
        assert Path(name).name == one.file_name
        for entry in one.entries:
            assert entry.us <= entry.formula_us
            tiles = choose_tiles(one.shape, entry.num_pairs, one.capability, tuned_tiles(None, one.gpu))
            assert layer_faults(tiles, one.shape, one.capability) == []
            assert replace(tiles, direct=False) == entry.tiles()
