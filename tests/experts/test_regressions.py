"""What the peers' first pull requests got wrong, and that each of the peers' faults has a test or cannot occur here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.backend import ExpertsBackend, Prepared
from quant_moelora.core.errors import AdapterError, BackendError
from quant_moelora.core.injection import Injection
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import ExpertWeight
from quant_moelora.core.workspace import Workspace
from quant_moelora.experts import registry
from quant_moelora.experts.base_injection import BaseInjection
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.layer import MoEExperts
from quant_moelora.lora.adapter_file import load_adapter
from quant_moelora.lora.bank import AdapterBank
from quant_moelora.probe import check_adapters
from tests.adapters import Dims, expert_lora, write_adapter
from tests.builders import adapter, context, move, same_bits, scheme
from tests.experts import test_regressions_sglang, test_regressions_vllm
from tests.experts.definition import check, run
from tests.experts.parity import serving
from tests.experts.regressions import (
    DTYPE,
    QUANTISED,
    RANKS,
    UNQUANTISED,
    factors_of,
    make_case,
    small,
    some_adapters,
    sort,
)

ROWS = {"vLLM": 16, "SGLang": 10}  # of the lists of faults
FIRST = (
    "each slot is filled once",
    "numbers of experts",
    "ids that there are not",
    "padded hidden size",
    "one folder, two names",
    "a replaced adapter in a graph",
    "closures ignored",
)
CANNOT = {
    "vLLM 15": "there is one injection, whose two callables an adapter wraps; no other hook could be left out of them",
    "SGLang 10": "it is only slow; here all experts of a layer are packed by one call (loaders/pack.py)",
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_fault_has_a_test_or_cannot_occur() -> None:
    modules = (globals(), vars(test_regressions_vllm), vars(test_regressions_sglang))
    documented = [
        value.__doc__ or ""
        for held in modules
        for name, value in held.items()
        if name.startswith("test_") and callable(value)
    ]
    tested = {row for text in documented for row in re.findall(r"\b(?:vLLM|SGLang) \d+\b", text)}
    every = {f"{peer} {row}" for peer, count in ROWS.items() for row in range(1, count + 1)}
    assert tested | CANNOT.keys() == every
    assert not tested & CANNOT.keys() and all(CANNOT.values())
    opening = {text.partition(": ")[2].partition(".")[0] for text in documented if text.startswith("First: ")}
    assert opening == set(FIRST)


def test_tokens_with_and_without_an_adapter_of_one_expert_took_each_others_slots(device: torch.device) -> None:
    """First: each slot is filled once. All tokens choose one expert; half of them, at times, have an adapter."""
    for tokens in (1, 2, 31, 32, 33, 64, 65, 300):
        for slots in (torch.arange(tokens) % 2 - 1, torch.arange(tokens) % 5 - 1, torch.full((tokens,), 3)):
            routed = Routing(torch.full((tokens, 2), 5), torch.ones(tokens, 2), slots.to(torch.int32), 4)
            rows, inverse, segments = sort(move(routed, device), 7)
            pairs = torch.arange(2 * tokens, dtype=torch.int32)
            assert torch.equal(rows.sort().values, pairs)
            assert torch.equal(inverse[rows.long()], pairs)
            filled = torch.zeros(2 * tokens, dtype=torch.int64)
            for expert, first, count, slot in segments[segments[:, 2] > 0].tolist():
                filled[first : first + count] += 1
                assert expert == 5 and (slots[rows[first : first + count].long() // 2] == slot).all()
            assert (filled == 1).all()


@QUANTISED
def test_an_expert_with_both_kinds_of_tokens(backend: str, device: torch.device) -> None:
    """First: each slot is filled once. Seen from outside: each token's output is its own."""
    info = small()
    slots = [0, -1, 1, -1, -1, 0, 1, 1, -1]
    check(make_case(info, some_adapters(info), ids=[[2]] * 9, slots=slots), device, backend)


@QUANTISED
@pytest.mark.parametrize("experts", [1, 7, 31, 33, 64, 65, 512])
def test_the_number_of_experts_was_a_power_of_two(experts: int, backend: str, device: torch.device) -> None:
    """First: numbers of experts. The last one and the first are among those chosen."""
    info = small(experts=experts, hidden=64)
    ids = [[experts - 1, 0], [0, experts - 1], *([token * 37 % experts, token * 11 % experts] for token in range(15))]
    check(make_case(info, [adapter(info, DTYPE, ranks=RANKS)], ids=ids), device, backend)


@UNQUANTISED
@pytest.mark.parametrize("experts", [1, 7, 31, 33, 64, 65, 512])
def test_the_number_of_unquantised_experts_was_a_power_of_two(experts: int, backend: str, device: torch.device) -> None:
    """First: numbers of experts."""
    info = small(DTYPE, experts=experts, hidden=64)
    ids = [[experts - 1, 0], [0, experts - 1], *([token * 37 % experts, token * 11 % experts] for token in range(15))]
    check(make_case(info, [adapter(info, DTYPE, ranks=RANKS)], ids=ids), device, backend)


@QUANTISED
def test_an_expert_bound_let_the_next_one_in(backend: str, device: torch.device) -> None:
    """First: ids that there are not. Expert E - 1 is one, E and E + 1 are none, and what stands behind is not read.

    The experts are the first of a larger layer, whose other scales are not finite.
    """
    info, more = small(experts=4), small(experts=6).to(device)
    case = make_case(info, some_adapters(info), ids=[[3, 4], [5, 3], [4, 5], [0, 3]])
    check(case, device, backend)

    def beginning(weight: ExpertWeight, larger: ExpertWeight) -> ExpertWeight:
        held: dict[str, Any] = {}
        for name, tensor in larger.tensors().items():
            tensor[:4], tensor[4:] = getattr(weight, name), -1  # as a scale, two times NaN
            held[name] = tensor[:4]
        return replace(weight, **held)

    inside = replace(info, w13=beginning(info.w13, more.w13), w2=beginning(info.w2, more.w2))
    for out, want in zip(run(case, inside, backend), run(case, info.to(device), backend), strict=True):
        assert out is not None and want is not None and same_bits(out, want)
        assert (out[2] == 0).all() and out[[0, 1, 3]].any(1).all()


@QUANTISED
@pytest.mark.parametrize("slot", [2, 3, 2**31 - 1, -2, -(2**31)])
def test_a_slot_that_there_is_not_was_dereferenced(slot: int, backend: str, device: torch.device) -> None:
    """First: ids that there are not. A CPU raises; on a GPU nothing can, and the token is NaN, and no other one."""
    info = small()
    adapters = some_adapters(info)
    experts = MoEExperts(info.to(device), backend)
    experts.attach(context(info, adapters, DTYPE, device))  # exactly two slots, and NaN behind the last factor
    case = make_case(info, adapters, tokens=6)
    routed = move(case.routing, device)
    given = (case.x.to(device), routed.topk_ids, routed.topk_weights)
    assert routed.slots is not None
    clean, wrong = experts(*given, routed.slots), routed.slots.clone()
    wrong[3] = slot
    if device.type == "cpu":
        with pytest.raises(AdapterError, match=r"adapter_ids: got .*slot from 0 to 1"):
            experts(*given, wrong)
        return
    out = experts(*given, wrong)
    others = [0, 1, 2, 4, 5]
    assert out[3].isnan().all() and same_bits(out[others], clean[others])


@QUANTISED
@pytest.mark.parametrize("hidden", [40, 72, 120])
def test_a_padded_hidden_size_was_cut_before_the_sum(hidden: int, backend: str, device: torch.device) -> None:
    """First: padded hidden size. Rows of w2 and columns of w13 are padded to 64; x, deltas and outputs are not."""
    info = small(scheme(4, 32, bf16=True), hidden=hidden)
    assert info.w2.n_pad > hidden and info.w13.k_pad > hidden
    check(make_case(info, some_adapters(info), top_k=3), device, backend)


@QUANTISED
def test_one_folder_under_two_names_was_one_adapter(tmp_path: Path, backend: str, device: torch.device) -> None:
    """First: one folder, two names. Each has a slot and factors of its own, and outlives the other."""
    dims = Dims(experts=4, hidden=128, inter=64, layers=(0,))
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    folder = write_adapter(tmp_path / "a", expert_lora(dims, names))
    info = small().to(device)
    bank = AdapterBank({0: info}, DTYPE, max_adapters=3, max_rank=4)
    first, second = (bank.add(name, load_adapter(folder, dims.specs()).layers) for name in ("x", "y"))
    assert first != second
    experts = MoEExperts(info, backend)
    experts.attach(bank.contexts[0])
    case = make_case(info, tokens=5)
    given = [t.to(device) for t in (case.x, case.routing.topk_ids, case.routing.topk_weights)]

    def out(slot: int) -> Tensor:
        return experts(*given, torch.full((5,), slot, dtype=torch.int32, device=device))

    both, base = out(first), experts(*given)
    assert same_bits(out(second), both) and not same_bits(both, base)
    bank.remove("x")
    assert same_bits(out(first), base) and same_bits(out(second), both)
    assert bank.report().adapters.keys() == {"y"}


GRAPHS = [
    pytest.param(name, kind, id=f"{kind}-{name}")
    for kind in ("int4", "unquantised")
    for name in serving("cuda", kind, group="channel")
    if name in ("marlin", "unquantized")  # the others ask the device for numbers
]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "kind"), GRAPHS)
def test_a_graph_served_an_adapter_that_had_been_replaced(backend: str, kind: str) -> None:
    """First: a replaced adapter in a graph. Captured once; then replaced, removed, added again and disabled."""
    info = small(DTYPE if kind == "unquantised" else None).to("cuda")
    held = [factors_of(adapter(info.to("cpu"), DTYPE, ranks=RANKS, scaling=scaling)) for scaling in (1.0, -2.0, 3.0)]
    bank = AdapterBank({0: info}, DTYPE, max_adapters=2, max_rank=8)
    slot = bank.add("a", {0: held[0]})
    experts = MoEExperts(info, backend)
    experts.attach(bank.contexts[0])
    case = make_case(info)
    given = [t.to("cuda") for t in (case.x, case.routing.topk_ids, case.routing.topk_weights)]
    given.append(torch.full((9,), slot, dtype=torch.int32, device="cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts(*given)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*given)
    answers: list[Tensor] = []

    def replay() -> None:
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, experts(*given))
        answers.append(out.clone())

    replay()
    bank.replace("a", {0: held[1]})
    replay()
    bank.remove("a")
    replay()
    assert bank.add("b", {0: held[2]}) == slot
    replay()
    assert not any(same_bits(a, b) for i, a in enumerate(answers) for b in answers[:i])
    bank.disable("b")
    replay()
    assert same_bits(answers[-1], answers[2])


class Ignoring(ReferenceBackend):
    """Computes the base model, whatever is attached, and says that it serves adapters."""

    name = "ignoring"

    def apply(
        self, x: Tensor, prepared: Prepared, routing: Routing, injection: Injection, workspace: Workspace
    ) -> Tensor:
        return super().apply(x, prepared, routing, BaseInjection(prepared.info), workspace)


class HalfIgnoring(ReferenceBackend):
    """Leaves the sum's closure out."""

    name = "half ignoring"

    def apply(
        self, x: Tensor, prepared: Prepared, routing: Routing, injection: Injection, workspace: Workspace
    ) -> Tensor:
        base = BaseInjection(prepared.info)
        base.begin, base.activation = injection.begin, injection.activation
        return super().apply(x, prepared, routing, base, workspace)


REGISTERED = [
    pytest.param(backend, quant, torch.device(device), id=f"{device}-{kind}-{backend.name}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for kind, quant in (("int4", None), ("unquantised", DTYPE))
    for backend in registry.BACKENDS
    if backend.name in serving(device, kind, group="channel")
]


@pytest.mark.parametrize(("backend", "quant", "device"), REGISTERED)
def test_a_registered_backend_ignored_the_closures(
    backend: ExpertsBackend, quant: torch.dtype | None, device: torch.device
) -> None:
    """First: closures ignored. None of those that are registered: neither that of w13 nor that of w2."""
    info = small(quant)
    for ranks in ({"gate": 2, "up": 2}, {"down": 2}):
        check(make_case(info, [adapter(info, DTYPE, ranks=ranks)]), device, backend.name)
    check_adapters(backend, info.to(device), DTYPE)


@pytest.mark.parametrize("backend", [Ignoring(), HalfIgnoring()], ids=lambda backend: backend.name)
def test_a_backend_that_ignored_the_closures_was_taken(backend: ExpertsBackend) -> None:
    """First: closures ignored. One's own, which says that it serves adapters, is refused before it serves anything."""
    case = make_case(small())
    experts = MoEExperts(case.info, backend)
    with pytest.raises(BackendError, match=f"backend {backend.name} with adapters: got a delta that is off"):
        experts(case.x, case.routing.topk_ids, case.routing.topk_weights)
