"""The parity matrix: every kind of weight with every kind of adapter, on every backend, against float64."""

from __future__ import annotations

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
from quant_moelora.layer import MoEExperts
from tests.builders import Adapter, move, same_bits
from tests.experts.parity import FULL, Answer, Case, Cell, build, definition, matrix

NAMES = [backend.name for backend in BACKENDS]
ROUNDS_WEIGHTS = {"marlin"}  # holds (q - zero) * scale rounded once to the dtype; others have the exact product
# An output is a sum of many roundings, hence nearly normal: of a million elements 6 standard deviations miss none.
ELEMENT = 6.0
# The root of squares of a token's errors is about that of their variances; 3 for tokens whose roundings are few.
TOKEN = 3.0
# What a delta may be off by in all is so little of it that a wrong or missing adapter, off by all of it, must fail.
DISCERNING = 0.25

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


def run(case: Case, info: MoEQuantInfo, backend: str) -> tuple[Tensor, Tensor | None]:
    """What a backend makes of a case on the info's device: without adapters, and with them if it has some."""
    experts, routed = MoEExperts(info, backend), move(case.routing, info.device)
    given = (case.x.to(info.device), routed.topk_ids, routed.topk_weights)
    base = experts(*given)
    out = None
    if case.adapters:
        experts.attach(case.bank(info).contexts[0])
        out = experts(*given, routed.slots)
        assert same_bits(experts(*given, torch.full_like(routed.slots, -1)), base)
    assert experts.backend is not None and experts.backend.name == backend, "no other one in its place"
    for tensor in (base, out):
        assert tensor is None or (tensor.dtype, tensor.shape, tensor.device) == (
            case.dtype,
            case.x.shape,
            base.device,
        )
    return base.cpu(), None if out is None else out.cpu()


def faults(out: Tensor, want: Answer) -> list[str]:
    """Elements and tokens that are further off than roundings explain."""
    found = list[str]()
    error = (out.double() - want.out).abs()
    allowed = ELEMENT * want.variance.sqrt()
    if not (error <= allowed).all():
        found.append(f"an element is off by {float((error / allowed).max()):.2f} times the bound")
    allowed = TOKEN * want.variance.sum(1).sqrt()
    if not (error.norm(dim=1) <= allowed).all():
        found.append(f"a token is off by {float((error.norm(dim=1) / allowed).max()):.2f} times the bound")
    return found


def delta_faults(out: Tensor, base: Tensor, want: Answer, base_want: Answer) -> list[str]:
    """Where ``out`` - ``base`` is not the delta; where that is 0, ``out`` has the bits of ``base``."""
    change = want.out - base_want.out
    changed = change.any(1)
    found = [] if same_bits(out[~changed], base[~changed]) else ["rows without a delta are not the base's, bit for bit"]
    error = (out.double() - base.double() - change)[changed]
    variance = (want.variance + base_want.variance)[changed]
    allowed = TOKEN * variance.sum(1).sqrt()
    if not (error.norm(dim=1) <= allowed).all():
        found.append(f"a token's delta is off by {float((error.norm(dim=1) / allowed).max()):.2f} times the bound")
    return found


@pytest.mark.parametrize(("cell", "device"), all_cells())
def test_against_float64(cell: Cell, device: torch.device) -> None:
    case = build(cell)
    rounded = cell.backend in ROUNDS_WEIGHTS
    base, out = run(case, case.info.to(device), cell.backend)
    base_want = definition(replace(case, routing=replace(case.routing, slots=None)), rounded_weights=rounded)
    assert faults(base, base_want) == []
    assert (base[0] != 0).any(), "the first token has an expert"
    if out is None:
        return
    want = definition(case, rounded_weights=rounded)
    assert faults(out, want) + delta_faults(out, base, want, base_want) == []
    change = want.out - base_want.out
    assert change[0].any(), "the first token has a delta"
    variance = (want.variance + base_want.variance)[change.any(1)]
    assert TOKEN * float(variance.sum().sqrt()) <= DISCERNING * float(change.norm())


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
    for cell in cells[::7]:
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
    combinations = [tuple(getattr(cell, name) for name in FULL) for cell in found.cells]
    assert len(set(combinations)) == len(combinations), "each combination once"
    every = 1
    for values in FULL.values():
        every *= len(values)
    assert len(combinations) + found.left_out.total() == every
    for name, values in FULL.items():
        assert {getattr(cell, name) for cell in found.cells} == set(values)


def test_count(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Says how many cells there are, where anybody can read it."""
    found = matrix(device.type)
    backends = Counter(cell.backend for cell in found.cells)
    others = [name for name in NAMES if name not in backends]
    parts = [
        f"{len(found.cells) + found.left_out.total()} in full, {len(found.cells)} on {device.type} ("
        + ", ".join(f"{name} {backends[name]}" for name in NAMES if backends[name])
        + f"; not here: {', '.join(others) or 'none'})",
        *(f"{count} left out: {reason}" for reason, count in sorted(found.left_out.items())),
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
        want = definition(case, rounded_weights=True)
        both = replace(want, variance=2 * want.variance)
        answers = list[Tensor]()
        for name, info in (("marlin", case.info), ("unquantized", dequantised(case.info, case.dtype))):
            base, out = run(case, info.to("cuda"), name)
            answers.append(base if out is None else out)
        assert faults(answers[0], replace(both, out=answers[1].double())) == []
