"""The parity matrix: every kind of weight with every kind of adapter, on every backend, against float64."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import DenseWeight
from quant_moelora.experts.registry import BACKENDS
from tests.builders import Adapter
from tests.experts.definition import check, definition, delta_faults, faults, run
from tests.experts.parity import FULL, Cell, build, matrix

NAMES = [backend.name for backend in BACKENDS]

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def all_cells() -> list[object]:
    """Those of a CPU, and marked as such those of a GPU."""
    return [
        pytest.param(cell, torch.device(device), id=f"{device}-{cell.name}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for cell in matrix(device).cells
    ]


@pytest.mark.parametrize(("cell", "device"), all_cells())
def test_against_float64(cell: Cell, device: torch.device) -> None:
    base, out = check(build(cell), device, cell.backend)
    assert base[0].any(), "the first token has an expert"
    assert (cell.lora == "none") or not torch.equal(base[0], out[0]), "and a delta"


def altered(adapters: list[Adapter]) -> dict[str, list[Adapter]]:
    """What would be served in place of the adapters, if something were wrong."""
    first, *others = adapters
    shift = {(expert - 1, name): lora for (expert, name), lora in first.items()}
    wrong: dict[str, list[Adapter]] = {
        "no adapter": [{} for _ in adapters],
        "no scaling": [{k: replace(lora, scaling=1.0) for k, lora in held.items()} for held in adapters],
        "scaled twice": [{k: replace(lora, scaling=lora.scaling**2) for k, lora in held.items()} for held in adapters],
        "one expert left out": [{k: v for k, v in first.items() if k[0] != 1}, *others],
        "its neighbour's factors": [shift, *others],
        "without its last rank": [
            {k: replace(lora, a=lora.a[:-1], b=lora.b[:, :-1]) for k, lora in held.items()} for held in adapters
        ],
    }
    if others:
        wrong["the next slot's adapter"] = [*others, first]
    return wrong


@pytest.mark.parametrize("lora", [kind for kind in FULL["lora"] if kind != "none"])
@pytest.mark.parametrize("dtype", FULL["dtype"])
def test_the_bounds_tell_what_is_wrong(dtype: str, lora: str) -> None:
    """Whatever replaces the adapters fails, alone by its delta too."""
    cells = [cell for cell in matrix("cpu").cells if (cell.dtype, cell.lora) == (dtype, lora)]
    for cell in cells[::11]:
        case = build(cell)
        base_want, want = definition(replace(case, adapters=[]), []), definition(case)
        base, right = base_want.out.to(case.dtype), want.out.to(case.dtype)
        assert faults(right, want) + delta_faults(right, base, want, base_want) == []
        for what, adapters in altered(case.adapters).items():
            out = definition(case, adapters).out.to(case.dtype)
            assert faults(out, want), f"{what}: {cell.name}"
            assert delta_faults(out, base, want, base_want), f"{what}: {cell.name}"


def test_any_two_values_meet_and_none_is_lost(device: torch.device) -> None:
    """Those that can: a backend that serves no unquantised weight never meets one."""
    found = matrix(device.type)
    met = set[object]().union(*(cell.pairs for cell in found.cells))
    assert met == found.possible
    every = math.prod(len(values) for values in FULL.values())
    assert len(found.full) + found.left_out.total() == every
    combinations = [tuple(getattr(cell, name) for name in FULL) for cell in found.full]
    assert len(set(combinations)) == len(combinations), "each combination once"
    assert len(set(found.cells)) == len(found.cells)
    assert all(cell.backend in NAMES for cell in found.cells)


def test_count(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Says how many cells there are, where anybody can read it."""
    found = matrix(device.type)
    backends = Counter(cell.backend for cell in found.cells)
    others = [name for name in NAMES if name not in backends]
    parts = [
        f"{len(found.full) + found.left_out.total()} combinations in full",
        *(f"{count} left out: {reason}" for reason, count in sorted(found.left_out.items())),
        f"{len(found.more)} more so that all pairs meet",
        f"{len(found.cells)} cells on {device.type} ("
        + ", ".join(f"{name} {backends[name]}" for name in NAMES if backends[name])
        + f"; none for {', '.join(others) or 'nobody'})",
    ]
    with capsys.disabled():
        sys.stdout.write(f"\nparity matrix: {'; '.join(parts)}\n")
    assert found.cells


def dequantised(info: MoEQuantInfo, dtype: torch.dtype) -> MoEQuantInfo:
    """An unquantised layer of the same weights, each rounded once."""
    gate, up, down = info.dequantize()
    bias13, bias2 = info.biases()
    first = up if gate is None else torch.cat((gate, up), 1)
    experts, hidden, inter = down.shape
    halves = info.activation.halves
    flat = None if bias13 is None else bias13.flatten(1)
    w13 = DenseWeight(experts, halves, inter, inter, hidden, hidden, flat, first.to(dtype))
    w2 = DenseWeight(experts, 1, hidden, hidden, inter, inter, bias2, down.to(dtype))
    return MoEQuantInfo(w13, w2, info.activation)


if {"marlin", "unquantized"} <= set(NAMES):

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "cell",
        [
            pytest.param(cell, id=cell.name)
            for cell in matrix("cuda").cells
            if cell.backend == "marlin" and cell.lora in ("none", "many")
        ],
    )
    def test_marlin_is_unquantized_on_the_dequantised_weights(cell: Cell) -> None:
        """Two answers to one question, each off by its own roundings."""
        case = build(cell)
        want = definition(case, backend="marlin")
        both = replace(want, variance=2 * want.variance)
        answers = list[Tensor]()
        for name, info in (("marlin", case.info), ("unquantized", dequantised(case.info, case.dtype))):
            base, out = run(case, info.to("cuda"), name)
            answers.append(base if out is None else out)
        assert faults(answers[0], replace(both, out=answers[1].double())) == []
