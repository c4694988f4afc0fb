"""The parity matrix: its cells, what a cell is made of, and what it must answer in float64."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.experts.registry import BACKENDS, judge
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from quant_moelora.lora.bank import AdapterBank
from tests.builders import Adapter, Lora, activate, adapter, layer, roundoff, routing, scheme

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
    tokens: int
    backend: str

    @property
    def name(self) -> str:
        """For the name of a test."""
        flags = [flag for flag in ("act_order", "absent", "bias") if getattr(self, flag)]
        held = (self.weight, self.dtype, self.group, f"lora_{self.lora}", self.activation, *flags)
        return "-".join((*held, f"{self.tokens}", self.backend))

    @property
    def pairs(self) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
        """Its values of any two factors that are not both crossed in full."""
        values = list(asdict(self).items())
        return {(a, b) for a, b in itertools.combinations(values, 2) if b[0] not in FULL}


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
        cells: one for each combination in full that means something and that some backend serves.
        left_out: how many combinations in full are none, by the reason.
        possible: all pairs of values that can meet at all.
    """

    cells: list[Cell]
    left_out: Counter[str]
    possible: set[tuple[tuple[str, Any], tuple[str, Any]]]


@contextmanager
def _some_gpu() -> Iterator[None]:
    """Let backends believe in a GPU, so that every machine counts the cells of one."""
    if torch.cuda.is_available():
        yield
        return
    available = patch.object(torch.cuda, "is_available", lambda: True)
    with available, patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)):
        yield


@functools.cache
def _serving(
    weight: str, dtype: str, group: str, act_order: bool, activation: str, bias: bool, device: str
) -> list[str]:
    """Names of the backends that serve such a layer."""
    with torch.device("meta"):
        info = _layer(weight, dtype, group, act_order, activation, bias, experts=1)
    with _some_gpu():
        verdicts = judge(info, torch.device(device), DTYPES[dtype], lora=True)
    return [name for name, verdict in verdicts.items() if verdict.ok]


def _layer(
    weight: str, dtype: str, group: str, act_order: bool, activation: str, bias: bool, experts: int
) -> MoEQuantInfo:
    """A random layer. Scales have the dtype that it computes in, so that no backend has to round them."""
    size, hidden, inter = GROUPS[group]
    quantised = WEIGHTS[weight]
    quant = DTYPES[dtype] if quantised is None else scheme(quantised[0], size, quantised[1], dtype == "bfloat16")
    return layer(
        quant,
        experts=experts,
        hidden=hidden,
        inter=inter,
        activation=ACTIVATIONS[activation],
        act_order=act_order,
        bias=bias,
    ).info


def meaningless(weight: str, group: str, act_order: bool) -> str | None:
    """Why a combination is none, or None. An unquantised weight is once there, as one with a group a channel."""
    if WEIGHTS[weight] is not None:
        return None
    if act_order:
        return NO_ACT_ORDER
    return None if GROUPS[group][0] is None else NO_GROUPS


def _variants(full: dict[str, Any], device: str) -> list[Cell]:
    """All cells with these values of the factors in full; those of the backend that `auto` takes come first."""
    return [
        Cell(**full, activation=activation, absent=absent, bias=bias, tokens=tokens, backend=backend)
        for backend in (backend.name for backend in BACKENDS)
        for activation, absent, bias, tokens in itertools.product(
            ACTIVATIONS, (False, True), (False, True), TOKENS[device]
        )
        if backend in _serving(*(full[n] for n in ("weight", "dtype", "group", "act_order")), activation, bias, device)
    ]


@functools.cache
def matrix(device: str) -> Matrix:
    """The cells of ``cpu`` or ``cuda``: of each combination in full the variant with the most pairs not yet met.

    Once all have met, the backend is that which `auto` takes. On a GPU the rest is then the same for all, since each
    variant has kernels of its own to be compiled; on a CPU the variants take turns.
    """
    combinations = [dict(zip(FULL, values, strict=True)) for values in itertools.product(*FULL.values())]
    left_out: Counter[str] = Counter()
    served: list[list[Cell]] = []
    for full in combinations:
        reason = meaningless(full["weight"], full["group"], full["act_order"])
        variants = [] if reason else _variants(full, device)
        if variants:
            served.append(variants)
        else:
            left_out[reason or UNSERVED] += 1
    possible = set[tuple[tuple[str, Any], tuple[str, Any]]]().union(*(c.pairs for v in served for c in v))
    missing, cells = set(possible), list[Cell]()
    for index, variants in enumerate(served):
        if device == "cpu":
            turn = index % sum(v.backend == variants[0].backend for v in variants)
            variants = variants[turn:] + variants[:turn]
        best = max(variants, key=lambda cell: len(missing & cell.pairs)) if missing else variants[0]
        missing -= best.pairs
        cells.append(best)
    return Matrix(cells, left_out, possible)


@dataclass(frozen=True)
class Case:
    """What a cell is made of, on the CPU."""

    cell: Cell
    info: MoEQuantInfo
    x: Tensor  # (M, H)
    routing: Routing  # with the slots of the adapters
    adapters: list[Adapter]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.cell.dtype]

    def bank(self, info: MoEQuantInfo) -> AdapterBank:
        """A bank that holds the adapters for ``info``, and has one slot more than there are adapters."""
        bank = AdapterBank({0: info}, self.dtype, max_adapters=len(self.adapters) + 1, max_rank=16)
        for slot, held in enumerate(self.adapters):
            factors: LayerFactors = {}
            for (expert, name), lora in held.items():
                assert name in ("gate", "up", "down")
                factors[expert, name] = Factor(lora.a, lora.b, lora.scaling)
            assert bank.add(f"adapter {slot}", {0: factors}) == slot
        return bank


def build(cell: Cell) -> Case:
    """Random weights, adapters, tokens and experts of a cell."""
    info = _layer(cell.weight, cell.dtype, cell.group, cell.act_order, cell.activation, cell.bias, experts=EXPERTS)
    dtype = DTYPES[cell.dtype]
    adapters = _adapters(cell.lora, info, dtype)
    slots = None
    if adapters:  # in turn, and then the base model; the first token has the first adapter
        slots = torch.arange(cell.tokens, dtype=torch.int32) % (len(adapters) + 1)
        slots = torch.where(slots == len(adapters), -1, slots).to(torch.int32)
    routed = routing(cell.tokens, TOP_K, EXPERTS, slots=slots, holes=cell.absent)
    routed.topk_ids[0] = torch.tensor([1, EXPERTS if cell.absent else 0])  # expert 1, which every first adapter has
    return Case(cell, info, torch.randn(cell.tokens, info.hidden_size).to(dtype), routed, adapters)


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


@dataclass(frozen=True)
class Answer:
    """The definition in float64, and the variance of what a right computation may be off by."""

    out: Tensor  # (M, H)
    variance: Tensor  # (M, H)


def definition(case: Case, adapters: Sequence[Adapter] | None = None, *, rounded_weights: bool = False) -> Answer:
    """What a layer computes, for the tokens of one expert and one adapter at a time.

    How far off a right answer may be, with u the unit roundoff of the dtype and U = 2**-24 that of float32:

    * A value v that is rounded to the dtype is off by at most u |v|, all sizes alike: variance (u v)**2 / 3. Rounded
      are gate, up, h, y, the delta of down (kernels store it) and the output.
    * A float32 sum of K products, root of squares s, is off by at most K U s: K roundings of partial sums, which are
      about as large as s. A matrix unit cuts off, so that all may have one sign.
    * v = A x meets B as two values of the dtype, which leaves u**2 of it.
    * What is off in an input is off by the weight times that in the output; through the activation by what
      four standard deviations to either side change, so that bends and limits count too.

    K of w13 is the hidden size, that of w2 the intermediate size. Variances of independent errors add.

    Args:
        case: the layer, its tokens and routing.
        adapters: in place of the case's own.
        rounded_weights: the backend holds (q - zero) * scale rounded once to the dtype.
    """
    adapters = case.adapters if adapters is None else adapters
    gate, up, down = (None if w is None else _held(w, case.dtype, rounded_weights) for w in case.info.dequantize())
    assert up is not None and down is not None
    bias13, bias2 = case.info.biases()
    x, routed, dtype = case.x.double(), case.routing, case.dtype
    out = torch.zeros_like(x)
    variance = torch.zeros_like(x)
    slots = torch.full((len(x),), -1) if routed.slots is None else routed.slots
    for expert, slot in itertools.product(range(EXPERTS), range(-1, len(adapters))):
        tokens, columns = torch.nonzero((routed.topk_ids == expert) & (slots[:, None] == slot), as_tuple=True)
        lora = adapters[slot] if slot >= 0 else {}
        rows, exact = x[tokens], torch.zeros_like(x[tokens])

        def of(rows: Tensor, off: Tensor, w: Tensor, b: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
            return linear(rows, off, w[expert], b, lora.get((expert, name)), dtype)

        first = [None if bias13 is None else b for b in ([None] * 2 if bias13 is None else bias13[expert].unbind(0))]
        g = None if gate is None else of(rows, exact, gate, first[0], "gate")
        h = activated(case.info.activation, g, of(rows, exact, up, first[-1], "up"), dtype)
        y, off = of(*h, down, None if bias2 is None else bias2[expert], "down")
        weights = routed.topk_weights[tokens, columns].double()[:, None]
        out.index_add_(0, tokens, weights * y)
        variance.index_add_(0, tokens, weights**2 * off)
    return Answer(out, variance + rounding(out, dtype))


def _held(w: Tensor, dtype: torch.dtype, rounded: bool) -> Tensor:
    return w.to(dtype).double() if rounded else w.double()


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of one rounding; below the smallest normal number the error grows no smaller."""
    return (roundoff(dtype) * value.abs().clamp(min=torch.finfo(dtype).smallest_normal)) ** 2 / 3


def linear(
    x: Tensor,  # (T, K)
    off: Tensor,  # (T, K) variance of x
    w: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    lora: Lora | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (T, N) value and variance
    """w x + bias, rounded, and the delta of an adapter, rounded too."""
    unit, columns = roundoff(torch.float32), w.shape[1]
    offset = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.double()
    y = x @ w.T + offset
    own = rounding(y, dtype) + (columns * unit) ** 2 * (x**2 @ (w**2).T + offset**2)
    if lora is None:
        return y, own + off @ (w**2).T
    a, b = lora.a.double(), lora.scaling * lora.b.double()
    v = x @ a.T
    off_v = (columns * unit) ** 2 * (x**2 @ (a**2).T) + roundoff(dtype) ** 4 * v**2
    delta = v @ b.T
    own += off_v @ (b**2).T + (len(a) * unit) ** 2 * (v**2 @ (b**2).T) + rounding(delta, dtype)
    return y + delta, own + off @ ((w + b @ a) ** 2).T


def activated(
    function: Activation, gate: tuple[Tensor, Tensor] | None, up: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The activation of (value, variance) pairs, rounded."""
    values = [up[0]] if gate is None else [gate[0], up[0]]
    reaches = [4 * off.sqrt() for off in ([up[1]] if gate is None else [gate[1], up[1]])]

    def of(*values: Tensor) -> Tensor:
        return activate(function, None if gate is None else values[0], values[-1])

    h = of(*values)
    variance = rounding(h, dtype)
    for i, reach in enumerate(reaches):
        moved = [[*values[:i], values[i] + sign * reach, *values[i + 1 :]] for sign in (-1, 1)]
        change = torch.maximum(*((of(*m) - h).abs() for m in moved))
        variance = variance + (change / 4) ** 2
    return h, variance
