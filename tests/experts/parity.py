"""The parity matrix: its cells, and what a cell is made of."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.packing import padded_columns, padded_rows, pairs_shape, qweight_shape
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight
from quant_moelora.experts.registry import BACKENDS, judge
from tests.builders import Adapter, adapter, layer, routing, scheme
from tests.experts.definition import Case

EXPERTS, TOP_K = 5, 2
WEIGHTS: dict[str, tuple[int, bool] | None] = {  # bits, symmetric
    "int4": (4, True),
    "int4_zeros": (4, False),
    "int8": (8, True),
    "int8_zeros": (8, False),
    "unquantised": None,
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Group, H, I. Whole groups of all sizes, then H and I off the tiles of 64, with one group and with a short last one.
GROUPS: dict[str, tuple[int | None, int, int]] = {
    "g32": (32, 160, 96),
    "g64": (64, 192, 128),
    "g128": (128, 256, 128),
    "channel": (None, 208, 144),
    "short_last": (128, 208, 144),
}
ACTIVATIONS = {
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
    "clamped_swiglu": Activation("swigluoai", alpha=1.702, limit=1.0),
    "relu2": Activation("relu2", gated=False),
}
LORA = ("none", "one", "many", "partial")
# On a GPU the number of rows of an expert chooses among kernels: none sorted, tiles of 16 rows, tiles of more.
TOKENS = {"cpu": (5, 17), "cuda": (17, 1, 300)}
NO_ACT_ORDER = "unquantised weights have no act-order"
NO_GROUPS = "unquantised weights have no groups"
UNSERVED = "no backend serves it"


Values = tuple[tuple[str, Any], ...]  # of some factors: name and value
Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One combination: the first five factors in full, the others so that any two values of two factors meet."""

    weight: str
    dtype: str
    group: str
    act_order: bool
    lora: str
    activation: str
    absent: bool
    bias: bool
    tokens: int = 0
    backend: str = ""

    @property
    def name(self) -> str:
        """For the name of a test."""
        flags = [flag for flag in ("act_order", "absent", "bias") if getattr(self, flag)]
        held = (self.weight, self.dtype, self.group, f"lora_{self.lora}", self.activation, *flags)
        return "-".join((*held, f"{self.tokens}", self.backend))

    @property
    def pairs(self) -> set[Pair]:
        """Its values of any two factors that are not both crossed in full."""
        values = tuple(vars(self).items())
        return met(values[: len(FULL)], values[len(FULL) :])


FULL: dict[str, Sequence[Any]] = {
    "weight": tuple(WEIGHTS),
    "dtype": tuple(DTYPES),
    "group": tuple(GROUPS),
    "act_order": (False, True),
    "lora": LORA,
}


@dataclass(frozen=True)
class Matrix:
    """The cells of a kind of device.

    Attributes:
        full: one for each combination in full that means something and that some backend serves.
        more: other variants of some combinations, so that all pairs meet.
        left_out: how many combinations in full are none, by the reason.
        possible: all pairs of values that can meet at all.
    """

    full: list[Cell]
    more: list[Cell]
    left_out: Counter[str]
    possible: set[Pair]

    @property
    def cells(self) -> list[Cell]:
        """All of them."""
        return self.full + self.more


@contextmanager
def _some_gpu() -> Generator[None]:
    """Let backends believe in a GPU, so that every machine counts the cells of one."""
    if torch.cuda.is_available():
        yield
        return
    available = patch.object(torch.cuda, "is_available", lambda: True)
    with available, patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)):
        yield


def _scheme(weight: str, dtype: str, group: str) -> QuantScheme | None:
    """Scales have the dtype that the layer computes in, so that no backend has to round them."""
    quantised = WEIGHTS[weight]
    return quantised and scheme(quantised[0], GROUPS[group][0], quantised[1], dtype == "bfloat16")


def _skeleton(cell: Cell) -> MoEQuantInfo:
    """A layer of the cell's kind without values, for backends to judge."""
    quant, function = _scheme(cell.weight, cell.dtype, cell.group), ACTIVATIONS[cell.activation]
    _, hidden, inter = GROUPS[cell.group]
    inter_pad = inter if quant is None else padded_columns(inter, quant.group_size)

    def weight(halves: int, n: int, n_pad: int, k: int, k_perm: bool) -> ExpertWeight:
        rows = halves * n_pad
        empty = functools.partial(torch.empty, dtype=torch.int32, device="meta")
        bias = empty(1, rows, dtype=torch.float32) if cell.bias else None
        if quant is None:
            return DenseWeight(1, halves, n, n_pad, k, k, bias, empty(1, rows, k, dtype=DTYPES[cell.dtype]))
        k_pad = padded_columns(k, quant.group_size)
        pairs = empty(pairs_shape(1, rows, k_pad // (quant.group_size or k_pad)))
        codes = empty(qweight_shape(1, rows, k_pad, quant.bits))
        perm = empty(1, halves, k_pad) if k_perm else None
        zeros = None if quant.symmetric else pairs
        return PackedWeight(1, halves, n, n_pad, k, k_pad, bias, quant, codes, pairs, zeros, perm)

    hidden_pad = hidden if quant is None else padded_rows(hidden)
    return MoEQuantInfo(
        w13=weight(function.halves, inter, inter_pad, hidden, cell.act_order),
        w2=weight(1, hidden, hidden_pad, inter, False),
        activation=function,
        inter_perm=torch.empty(1, inter, dtype=torch.int32, device="meta") if cell.act_order else None,
    )


def meaningless(full: Mapping[str, Any]) -> str | None:
    """Why a combination is none, or None. An unquantised weight is once there, as one with a group a channel."""
    if WEIGHTS[full["weight"]] is not None:
        return None
    if full["act_order"]:
        return NO_ACT_ORDER
    return None if GROUPS[full["group"]][0] is None else NO_GROUPS


@functools.cache
def _variants(device: str, **full: Any) -> tuple[Values, ...]:
    """The other factors' values that some backend serves; those of the backend that `auto` takes come first."""
    found: list[Values] = []
    for activation, absent, bias, tokens in itertools.product(
        ACTIVATIONS, (False, True), (False, True), TOKENS[device]
    ):
        first = {"activation": activation, "absent": absent, "bias": bias, "tokens": tokens}
        for backend in serving(device, **full, activation=activation, bias=bias):
            found.append((*first.items(), ("backend", backend)))
    order = [backend.name for backend in BACKENDS]
    return tuple(sorted(found, key=lambda values: order.index(values[-1][1])))


@functools.cache
def serving(
    device: str,
    weight: str = "int4",
    dtype: str = "bfloat16",
    group: str = "g64",
    act_order: bool = False,
    activation: str = "silu",
    bias: bool = False,
) -> tuple[str, ...]:
    """Names of the backends that serve such a layer on such a device, in the order of `auto`."""
    cell = Cell(weight, dtype, group, act_order, "none", activation, False, bias)
    with _some_gpu():
        verdicts = judge(_skeleton(cell), torch.device(device), DTYPES[dtype], lora=True)
    return tuple(name for name, verdict in verdicts.items() if verdict.ok)


@functools.cache
def matrix(device: str) -> Matrix:
    """The cells of ``cpu`` or ``cuda``: of each combination in full the variant with the most pairs not yet met.

    Once all have met, the backend is that which `auto` takes. On a GPU the rest is then the same for all, since each
    variant has kernels of its own to be compiled; on a CPU the variants take turns.
    """
    left_out = Counter[str]()
    served: list[tuple[dict[str, Any], tuple[Values, ...]]] = []
    for values in itertools.product(*FULL.values()):
        full = dict(zip(FULL, values, strict=True))
        reason = meaningless(full)
        variants = () if reason else _variants(device, **{n: v for n, v in full.items() if n != "lora"})
        if variants:
            served.append((full, variants))
        else:
            left_out[reason or UNSERVED] += 1
    possible = set[Pair]().union(*(_possible(tuple(full.items()), variants) for full, variants in served))
    missing, cells = set(possible), list[Cell]()
    for index, (full, variants) in enumerate(served):
        turn = index % sum(v[-1] == variants[0][-1] for v in variants) if device == "cpu" else 0
        turned = variants[turn:] + variants[:turn]
        held = tuple(full.items())
        best = max(turned, key=lambda values: len(missing & met(held, values))) if missing else turned[0]
        missing -= met(held, best)
        cells.append(Cell(**full, **dict(best)))
    return Matrix(cells, _more(served, missing), left_out, possible)


def _more(served: Sequence[tuple[dict[str, Any], tuple[Values, ...]]], missing: set[Pair]) -> list[Cell]:
    """Further variants, until all pairs have met: unquantised weights have fewer cells than their backends need."""
    cells: list[Cell] = []
    while missing:
        wanted = dict(min(missing))
        candidates = [
            Cell(**full, **dict(values))
            for full, variants in served
            for values in variants
            if wanted.items() <= {**full, **dict(values)}.items()
        ]
        best = max(candidates, key=lambda cell: len(missing & cell.pairs))
        missing = missing - best.pairs
        cells.append(best)
    return cells


def met(full: Values, others: Values) -> set[Pair]:
    """The pairs of values in one cell, but for those of two factors that are both crossed in full."""
    return {*itertools.product(full, others), *itertools.combinations(others, 2)}


def _possible(full: Values, variants: tuple[Values, ...]) -> set[Pair]:
    values, pairs = _among(variants)
    return pairs | set(itertools.product(full, values))


@functools.cache
def _among(variants: tuple[Values, ...]) -> tuple[set[tuple[str, Any]], set[Pair]]:
    return set(itertools.chain(*variants)), set(itertools.chain(*(itertools.combinations(v, 2) for v in variants)))


def build(cell: Cell) -> Case:
    """Random weights, adapters, tokens and experts of a cell."""
    dtype, (_, hidden, inter) = DTYPES[cell.dtype], GROUPS[cell.group]
    info = layer(
        _scheme(cell.weight, cell.dtype, cell.group) or dtype,
        experts=EXPERTS,
        hidden=hidden,
        inter=inter,
        activation=ACTIVATIONS[cell.activation],
        act_order=cell.act_order,
        bias=cell.bias,
    ).info
    adapters = _adapters(cell.lora, info, dtype)
    slots = None
    if adapters:  # in turn, and then the base model; the first token has the first adapter
        slots = torch.arange(cell.tokens, dtype=torch.int32) % (len(adapters) + 1)
        slots = torch.where(slots == len(adapters), -1, slots).to(torch.int32)
    routed = routing(cell.tokens, TOP_K, EXPERTS, slots=slots, holes=cell.absent)
    routed.topk_ids[0] = torch.tensor([1, EXPERTS if cell.absent else 0])  # expert 1, which every first adapter has
    return Case(info, torch.randn(cell.tokens, info.hidden_size).to(dtype), routed, adapters)


def _adapters(kind: str, info: MoEQuantInfo, dtype: torch.dtype) -> list[Adapter]:
    make = functools.partial(adapter, info, dtype)
    made: dict[str, list[Adapter]] = {
        "none": [],
        "one": [make(ranks={"gate": 4, "up": 3, "down": 5}, scaling=1.5)],
        "many": [
            make(ranks={"gate": 16, "up": 16, "down": 16}, scaling=2.0, shared=info.activation.gated),
            make(ranks={"gate": 1, "up": 1, "down": 1}, scaling=-1.0),
            make(ranks={"gate": 8, "up": 2, "down": 7}),
            make(ranks={"gate": 4, "up": 4, "down": 3}, scaling=0.75, shared=info.activation.gated),
        ],
        "partial": [
            make(ranks={"down": 8}, scaling=3.0, experts=[1]),
            make(ranks={"gate": 2, "up": 2}, scaling=-2.0, experts=[0, 3]),
            make(ranks={"up": 5}, scaling=1.5, experts=[0, 2, 4]),
            make(ranks={"gate": 3, "down": 4}, scaling=1.5, experts=[1, 4]),
        ],
    }
    if info.activation.gated:
        return made[kind]
    return [{key: lora for key, lora in held.items() if key[1] != "gate"} for held in made[kind]]
