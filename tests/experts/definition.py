"""What a layer must answer, in float64 and with how far a right answer may be off, and whether it does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.layer import MoEExperts
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from quant_moelora.lora.bank import AdapterBank
from tests.builders import Adapter, Lora, activate, move, roundoff, same_bits

ROUNDS_WEIGHTS = {"marlin"}  # holds (q - zero) * scale rounded once to the dtype; others have the exact product
MAX_RANK = 16
# An output is a sum of many roundings, hence nearly normal: of a million elements 6 standard deviations miss none.
ELEMENT = 6.0
# The root of squares of a token's errors is about that of their variances; 3 for tokens whose roundings are few.
TOKEN = 3.0
# What a delta may be off by in all is so little of it that a wrong or missing adapter, off by all of it, must fail.
DISCERNING = 0.25


@dataclass(frozen=True)
class Case:
    """A layer, what it is given, and its adapters, on the CPU."""

    info: MoEQuantInfo
    x: Tensor  # (M, H)
    routing: Routing  # with the slots of the adapters
    adapters: list[Adapter]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def bank(self, info: MoEQuantInfo) -> AdapterBank:
        """A bank that holds the adapters for ``info``, and has one slot more than there are adapters."""
        bank = AdapterBank({0: info}, self.dtype, max_adapters=len(self.adapters) + 1, max_rank=MAX_RANK)
        for slot, held in enumerate(self.adapters):
            factors: LayerFactors = {}
            for (expert, name), lora in held.items():
                assert name in ("gate", "up", "down")
                factors[expert, name] = Factor(lora.a, lora.b, lora.scaling)
            assert bank.add(f"adapter {slot}", {0: factors}) == slot
        return bank


@dataclass(frozen=True)
class Answer:
    """The definition in float64, and the variance of what a right computation may be off by."""

    out: Tensor  # (M, H)
    variance: Tensor  # (M, H)


def definition(case: Case, adapters: Sequence[Adapter] | None = None, backend: str = "") -> Answer:
    """What a layer computes, for the tokens of one expert and one adapter at a time.

    How far off a right answer may be, with u the unit roundoff of the dtype and U = 2**-24 that of float32:

    * A value v that is rounded to the dtype is off by at most u |v|, all sizes alike: variance (u v)**2 / 3. Rounded
      are gate, up, h, y, the output and the deltas (only that of down is stored, but then a matrix unit gets the
      others' factors in the dtype).
    * A float32 sum of K products, root of squares s, is off by at most K U s: K roundings of partial sums, which are
      about as large as s. A matrix unit cuts off, so that all may have one sign.
    * v = A x meets B as two values of the dtype, which leaves u**2 of it.
    * Some backends round more, see `ROUNDS_WEIGHTS`.
    * What is off in an input is off by the weight times that in the output; through the activation by what
      four standard deviations to either side change, so that bends and limits count too.

    K of w13 is the hidden size, that of w2 the intermediate size. Variances of independent errors add.

    Args:
        case: the layer, its tokens and routing.
        adapters: in place of the case's own.
        backend: what it is allowed is allowed here.
    """
    adapters = case.adapters if adapters is None else adapters
    info = case.info
    weights = _held(info, case.dtype, backend in ROUNDS_WEIGHTS)
    x, routed, dtype = case.x.double(), case.routing, case.dtype
    out, variance = torch.zeros_like(x), torch.zeros_like(x)
    slots = torch.full((len(x),), -1) if routed.slots is None else routed.slots
    for expert, slot in itertools.product(range(info.num_experts), range(-1, len(adapters))):
        tokens, columns = torch.nonzero((routed.topk_ids == expert) & (slots[:, None] == slot), as_tuple=True)
        held = adapters[slot] if slot >= 0 else {}
        rows = (x[tokens], torch.zeros_like(x[tokens]))  # x itself is exact
        first = [
            linear(*rows, w[expert], b[expert], held.get((expert, name)), dtype)
            for name, (w, b) in weights.items()
            if name != "down"
        ]
        w, b, lora = weights["down"][0][expert], weights["down"][1][expert], held.get((expert, "down"))
        chosen = routed.topk_weights[tokens, columns].double()[:, None]
        if info.router_weight == "input":
            first, chosen = [(chosen * value, chosen**2 * off) for value, off in first], torch.ones_like(chosen)
        y, off = linear(*activated(info.activation, first, dtype), w, b, lora, dtype)
        out.index_add_(0, tokens, chosen * y)
        variance.index_add_(0, tokens, chosen**2 * off)
    return Answer(out, variance + rounding(out, dtype))


@functools.lru_cache(maxsize=1)  # a case is asked several times
def _held(info: MoEQuantInfo, dtype: torch.dtype, rounded: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (E, N, K) and bias (E, N) of each projection, gate first; a bias that there is not is 0."""
    weights, (bias13, bias2) = info.dequantize(), info.biases()
    gate_up = (None, None) if bias13 is None else (bias13[:, 0], bias13[:, -1])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, w, b in zip(("gate", "up", "down"), weights, (*gate_up, bias2), strict=True):
        if w is not None:
            value = w.to(dtype).double() if rounded else w.double()
            found[name] = (value, value.new_zeros(value.shape[:2]) if b is None else b.double())
    return found


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of one rounding; below the smallest normal number the error grows no smaller."""
    return (roundoff(dtype) * value.abs().clamp(min=torch.finfo(dtype).smallest_normal)) ** 2 / 3


def linear(
    x: Tensor,  # (T, K)
    off: Tensor,  # (T, K) variance of x
    w: Tensor,  # (N, K)
    bias: Tensor,  # (N,)
    lora: Lora | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (T, N) value and variance
    """w x + bias, rounded, and the delta of an adapter, rounded too."""
    unit, columns = roundoff(torch.float32), w.shape[1]
    y = x @ w.T + bias
    own = rounding(y, dtype) + (columns * unit) ** 2 * (x**2 @ (w**2).T + bias**2)
    if lora is None:
        return y, own + off @ (w**2).T
    a, b = lora.a.double(), lora.scaling * lora.b.double()
    v = x @ a.T
    off_v = (columns * unit) ** 2 * (x**2 @ (a**2).T) + roundoff(dtype) ** 4 * v**2
    delta = v @ b.T
    own += off_v @ (b**2).T + (len(a) * unit) ** 2 * (v**2 @ (b**2).T) + rounding(delta, dtype)
    return y + delta, own + off @ ((w + b @ a) ** 2).T


def activated(
    function: Activation,
    inputs: Sequence[tuple[Tensor, Tensor]],  # gate, if there is one, and up: (T, I) value and variance
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (T, I) value and variance
    """The activation, rounded."""
    values = [value for value, _ in inputs]

    def of(*values: Tensor) -> Tensor:
        return activate(function, values[0] if function.gated else None, values[-1])

    h = of(*values)
    variance = rounding(h, dtype)
    for i, (value, off) in enumerate(inputs):
        reach = 4 * off.sqrt()
        ends = [of(*values[:i], end, *values[i + 1 :]) for end in (value - reach, value + reach)]
        variance = variance + torch.maximum(*((end - h).abs() for end in ends)) ** 2 / 16
    return h, variance


def run(case: Case, info: MoEQuantInfo, backend: str) -> tuple[Tensor, Tensor | None]:
    """What a backend makes of a case on the info's device: without adapters, and with them if it has some."""
    experts, routed = MoEExperts(info, backend), move(case.routing, info.device)
    given = (case.x.to(info.device), routed.topk_ids, routed.topk_weights)
    base = experts(*given)
    out = None
    if case.adapters:
        experts.attach(case.bank(info).contexts[0])
        out = experts(*given, routed.slots)
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


def check(case: Case, device: torch.device, backend: str) -> tuple[Tensor, Tensor]:
    """A backend answers as the definition does, and its deltas are those of the adapters.

    The definition's output without adapters and with them, for what else there is to see.
    """
    base, out = run(case, case.info.to(device), backend)
    base_want = definition(replace(case, routing=replace(case.routing, slots=None)), backend=backend)
    found = faults(base, base_want)
    assert not found, found
    if out is None:
        return base_want.out, base_want.out
    want = definition(case, backend=backend)
    found = faults(out, want) + delta_faults(out, base, want, base_want)
    assert not found, found
    change = want.out - base_want.out
    variance = (want.variance + base_want.variance)[change.any(1)]
    assert TOKEN * float(variance.sum().sqrt()) <= DISCERNING * float(change.norm()), "the bounds tell nothing"
    return base_want.out, want.out
