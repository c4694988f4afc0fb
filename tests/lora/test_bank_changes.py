"""AdapterBank over time: random sequences of calls against a model of plain lists, and who is evicted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import LayerFactors
from quant_moelora.lora.bank import AdapterBank, Evict
from tests.adapters import PROJECTIONS, dense_info, random_factors
from tests.lora.banks import block_size, check, snapshot, two_layers

SLOTS, MAX_RANK, NAMES = 4, 5, "abcdef"
Factors = Mapping[int, LayerFactors]


def random_adapter(infos: Mapping[int, MoEQuantInfo], rng: random.Random) -> dict[int, LayerFactors]:
    """Some layers, experts and projections, at any rank."""
    factors: dict[int, LayerFactors] = {}
    for layer in rng.sample(sorted(infos), rng.randint(1, 2)):
        projections = rng.sample(PROJECTIONS, rng.randint(1, 3))
        ranks: dict[Projection, int] = {p: rng.randint(1, MAX_RANK) for p in PROJECTIONS if p in projections}
        shared = {"gate", "up"} <= ranks.keys() and rng.random() < 0.5
        if shared:
            ranks["up"] = ranks["gate"]
        experts = rng.sample(range(3), rng.randint(1, 3))
        factors[layer] = random_factors(infos[layer], ranks, experts=experts, shared=shared, seed=rng.randrange(10**6))
    return factors


@dataclass
class One:
    """An adapter of the model."""

    slot: int
    factors: Factors
    places: list[tuple[int, int]]
    pinned: bool
    enabled: bool = True


class Model:
    """The bank in plain terms: a map of the arena's units of 8 elements, and adapters, least recently used first."""

    def __init__(self, infos: Mapping[int, MoEQuantInfo], size: int, evict: Evict) -> None:
        self.infos, self.evict = infos, evict
        self.taken = bytearray(size // 8)
        self.held: dict[str, One] = {}
        self.evicted = 0

    def place(self, taken: bytearray, factors: Factors) -> list[tuple[int, int]] | None:
        places: list[tuple[int, int]] = []
        for layer, info in self.infos.items():
            if layer in factors:
                size = block_size(info, factors[layer]) // 8
                begin = taken.find(bytes(size))
                if begin < 0:
                    return None
                taken[begin : begin + size] = b"\1" * size
                places.append((begin, size))
        return places

    def clear(self, taken: bytearray, one: One) -> None:
        for begin, size in one.places:
            taken[begin : begin + size] = bytes(size)

    def put(self, name: str, factors: Factors, pinned: bool) -> bool:
        """Add or replace; False if there is no room."""
        old, taken, gone = self.held.get(name), bytearray(self.taken), list[str]()
        others = [n for n, one in self.held.items() if n != name and not one.pinned]
        while True:
            trial = bytearray(taken)
            places = self.place(trial, factors)
            if places is not None and (old or len(self.held) - len(gone) < SLOTS):
                break
            if self.evict == "never" or not others:
                return False
            gone.append(others.pop(0))
            self.clear(taken, self.held[gone[-1]])
        for other in gone:
            del self.held[other]
        self.evicted += len(gone)
        slot = old.slot if old else min(set(range(SLOTS)) - {one.slot for one in self.held.values()})
        if old:
            self.clear(trial, old)
            del self.held[name]
        self.taken = trial
        self.held[name] = One(slot, factors, places, old.pinned if old else pinned, old.enabled if old else True)
        return True

    def remove(self, name: str) -> None:
        self.clear(self.taken, self.held.pop(name))

    def use(self, names: list[str]) -> list[int]:
        for name in names:
            self.held[name] = self.held.pop(name)
        return [self.held[name].slot for name in names]


def bits(bank: AdapterBank) -> list[Tensor]:
    return [tensor for ctx in bank.contexts.values() for tensor in snapshot(ctx).values()]


def addresses(bank: AdapterBank) -> list[int]:
    return [tensor.data_ptr() for ctx in bank.contexts.values() for tensor in ctx.tensors().values()]


def check_bank(bank: AdapterBank, model: Model) -> None:
    report = bank.report()
    assert list(report.adapters) == list(model.held)
    for name, one in model.held.items():
        got = report.adapters[name]
        assert (got.slot, got.pinned, got.enabled) == (one.slot, one.pinned, one.enabled)
        assert got.nbytes == sum(size for _, size in one.places) * 8 * 2
        factors = [f for layer in one.factors.values() for f in layer.values()]
        assert got.ranks == tuple(sorted({f.a.shape[0] for f in factors}))
    assert report.used == sum(model.taken) * 8 * 2 and report.capacity == len(model.taken) * 8 * 2
    assert report.free == report.capacity - report.used
    assert report.largest_free == max((len(r) for r in bytes(model.taken).split(b"\1")), default=0) * 8 * 2
    shown = {one.slot: one.factors for one in model.held.values() if one.enabled}
    for layer, info in model.infos.items():
        for slot in range(SLOTS):
            check(bank.contexts[layer], slot, info, shown.get(slot, {}).get(layer, {}))


def step(bank: AdapterBank, model: Model, rng: random.Random) -> str:
    """One random call on both; what it was."""
    call = rng.choice(["add"] * 3 + ["replace"] * 2 + ["remove", "disable", "enable", "pin", "unpin", "slots"])
    known = call != "add" and model.held and rng.random() < 0.8
    name = rng.choice(list(model.held) if known else NAMES)
    if call in ("add", "replace"):
        factors, pinned = random_adapter(model.infos, rng), rng.random() < 0.2
        arguments = {"pinned": pinned} if call == "add" else {}
        right_name = (name in model.held) == (call == "replace")
        if not right_name or not model.put(name, factors, pinned):
            before, report = bits(bank), bank.report()
            with pytest.raises(AdapterError):
                getattr(bank, call)(name, factors, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(before, bits(bank), strict=True))
            assert bank.report() == report
            return f"{call}: no room" if right_name else "wrong name"
        slot = getattr(bank, call)(name, factors, **arguments)
        assert call == "replace" or slot == model.held[name].slot
    elif call == "slots":
        names = rng.choices(list(model.held), k=3) if model.held else []
        assert bank.slots(names) == model.use(names)
    elif name not in model.held:
        with pytest.raises(AdapterError):
            getattr(bank, call)(name)
        return "wrong name"
    else:
        getattr(bank, call)(name)
        if call == "remove":
            model.remove(name)
        elif call in ("enable", "disable"):
            model.held[name].enabled = call == "enable"
        else:
            model.held[name].pinned = call == "pin"
    return call


@pytest.mark.parametrize("evict", ["never", "lru"])
@pytest.mark.parametrize("seed", range(4))
def test_random_sequences(seed: int, evict: Evict, device: torch.device) -> None:
    rng = random.Random(seed)
    infos = two_layers()
    size = 3000  # elements: enough for two to four adapters
    bank = AdapterBank(
        two_layers(device),
        torch.bfloat16,
        max_adapters=SLOTS,
        max_rank=MAX_RANK,
        capacity_bytes=size * 2,
        evict=evict,
    )
    model, fixed, calls = Model(infos, size, evict), addresses(bank), set[str]()
    for _ in range(120):
        calls.add(step(bank, model, rng))
        check_bank(bank, model)
        assert addresses(bank) == fixed
    assert calls >= {"add", "add: no room", "replace", "wrong name", "remove", "disable", "slots"}
    assert (model.evicted > 0) == (evict == "lru")


def test_the_least_recently_used_goes_first() -> None:
    bank = AdapterBank(two_layers(), torch.float32, max_adapters=3, max_rank=4, capacity_bytes=2**16, evict="lru")
    for name in "abc":
        bank.add_dummy(name, 4)
    assert bank.slots(["a", "c", "a"]) == [0, 2, 0]
    assert bank.add_dummy("d", 4) == 1, "b went"
    bank.pin("c")
    assert bank.add_dummy("e", 4) == 0, "a went: c is pinned"
    bank.replace("d", {2: random_factors(dense_info(), {"up": 1})})
    assert list(bank.report().adapters) == ["c", "e", "d"], "a replaced adapter has been used"
    with pytest.raises(AdapterError, match="unknown 'b'"):
        bank.slots(["c", "b"])
    assert list(bank.report().adapters) == ["c", "e", "d"], "nothing was used"
    bank.unpin("c")
    bank.add_dummy("f", 4)
    assert list(bank.report().adapters) == ["e", "d", "f"]


def test_no_more_is_evicted_than_needed() -> None:
    small, large = (3 * rank * (20 + 16) * 4 + pad * 3 * 4 for rank, pad in ((1, 4), (8, 0)))  # bytes of an adapter
    bank = AdapterBank(
        {0: dense_info()}, torch.float32, max_adapters=9, max_rank=16, capacity_bytes=3 * small + large, evict="lru"
    )
    for name in "abcd":
        bank.add_dummy(name, 1, ["down"])
    assert bank.report().used == 4 * small
    bank.pin("b")
    bank.slots(["a", "b", "c"])
    with pytest.raises(AdapterError, match="all that is not pinned being evicted"):
        bank.add_dummy("e", 16, ["down"])
    assert list(bank.report().adapters) == list("dabc")
    bank.add_dummy("e", 8, ["down"])
    assert list(bank.report().adapters) == list("abce") and bank.report().free == 0


def test_a_replaced_adapter_is_not_evicted_for_itself() -> None:
    """The old factors serve until the new ones are there, so both need room."""
    bank = AdapterBank({0: dense_info()}, torch.float32, max_adapters=1, max_rank=4, evict="lru")
    bank.add_dummy("a", 4)
    before = bits(bank)
    with pytest.raises(AdapterError, match="room for adapter a"):
        bank.replace("a", {0: random_factors(dense_info(), {"up": 1})})
    assert all(torch.equal(a, b) for a, b in zip(before, bits(bank), strict=True))


def test_a_failure_while_copying_gives_the_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = AdapterBank(two_layers(), torch.float32, max_adapters=2, max_rank=4)
    bank.add_dummy("a", 2)
    report = bank.report()
    send = bank._transfer.send
    calls: list[Tensor] = []

    def failing(source: Tensor, target: Tensor) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise MemoryError("pinned memory")
        send(source, target)

    monkeypatch.setattr(bank._transfer, "send", failing)
    with pytest.raises(MemoryError):
        bank.add_dummy("b", 2)
    assert bank.report() == report
    monkeypatch.undo()
    assert bank.add_dummy("b", 4) == 1 and list(bank.report().adapters) == ["a", "b"]
