"""AdapterBank: what it holds of an adapter, read back, in how many bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import A13, NO_FACTOR, UP
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from quant_moelora.lora.bank import AdapterBank, build_context
from tests.adapters import dense_info, random_factors
from tests.lora.banks import ALIGNED, block_size, check, read, snapshot, two_layers

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def adapters_of_every_kind(info: MoEQuantInfo, seed: int = 0) -> list[LayerFactors]:
    """Ranks are odd, so that hardly a block ends at a multiple of the alignment."""
    seed *= 100
    return [
        random_factors(info, {"gate": 3, "up": 3, "down": 3}, shared=True, seed=seed + 1),
        random_factors(info, {"gate": 3, "up": 5, "down": 7}, seed=seed + 2),
        {},
        random_factors(info, {"up": 1}, experts=[1], seed=seed + 3),
        random_factors(info, {"gate": 2}, experts=[0, 2], seed=seed + 4),
        random_factors(info, {"down": 9}, experts=[2], seed=seed + 5),
        random_factors(info, {"gate": 1, "up": 1}, experts=[0], shared=True, seed=seed + 6)
        | random_factors(info, {"up": 2, "down": 1}, experts=[1], seed=seed + 7),
    ]


# --- build_context ----------------------------------------------------------------------------------------------------


@EACH_DTYPE
@pytest.mark.parametrize("permuted", [True, False])
def test_a_context_of_one_layer(dtype: torch.dtype, permuted: bool, device: torch.device) -> None:
    info = dense_info(permuted=permuted)
    adapters = adapters_of_every_kind(info)
    ctx = build_context(info.to(device), adapters, dtype)
    assert {tensor.device.type for tensor in ctx.tensors().values()} == {device.type}
    assert (ctx.arena.dtype, ctx.num_slots, ctx.max_rank, ctx.shard) == (dtype, len(adapters), 9, None)
    assert (ctx.num_experts, ctx.hidden_size, ctx.inter_pad) == (3, 16, 20)
    for slot, factors in enumerate(adapters):
        check(ctx, slot, info, factors)
    assert ctx.arena.numel() == sum(block_size(info, factors) for factors in adapters)
    size = sum(f.a.numel() + f.b.shape[1] * f.b.shape[0] for held in adapters for f in held.values())
    assert int(ctx.arena.count_nonzero()) <= size, "the padding and the gaps are zero"


def test_the_factors_read_back_give_the_deltas_of_the_file() -> None:
    info = dense_info()
    adapters = adapters_of_every_kind(info)
    ctx = build_context(info, adapters, torch.float32)
    for slot, factors in enumerate(adapters):
        for key, factor in read(ctx, slot, info).items():
            expected = factors[key].scaling * factors[key].b @ factors[key].a
            assert torch.equal(factor.scaling * factor.b @ factor.a, expected)


def test_a_shared_a_is_stored_once() -> None:
    info = dense_info()
    one = build_context(info, [random_factors(info, {"gate": 8, "up": 8}, shared=True)], torch.float32)
    two = build_context(info, [random_factors(info, {"gate": 8, "up": 8})], torch.float32)
    assert two.arena.numel() - one.arena.numel() == info.num_experts * 8 * info.hidden_size
    assert one.up_col.tolist() == [[0, 0, 0]] and two.up_col.tolist() == [[8, 8, 8]]


def test_up_alone_has_no_rows_before_it() -> None:
    info = dense_info()
    ctx = build_context(info, [random_factors(info, {"up": 2})], torch.float32)
    assert not ctx.up_col.any() and (ctx.rank[0, UP] == 2).all()


@pytest.mark.parametrize("count", [1, 2])
def test_adapters_that_touch_nothing(count: int) -> None:
    ctx = build_context(dense_info(), [{} for _ in range(count)], torch.bfloat16)
    assert ctx.num_slots == count and ctx.arena.shape == (0,)
    assert (ctx.offsets == NO_FACTOR).all() and not ctx.rank.any() and not ctx.scaling.any()


def test_one_rounding_to_the_arena() -> None:
    """Factors stay as the file has them until the arena's dtype rounds them; the scaling stays float32."""
    info = dense_info()
    factors = random_factors(info, {"gate": 4}, experts=[0])
    ctx = build_context(info, [factors], torch.bfloat16)
    held = ctx.arena[int(ctx.offsets[0, A13, 0]) :][: factors[0, "gate"].a.numel()]
    assert torch.equal(held, factors[0, "gate"].a.flatten().to(torch.bfloat16))
    assert ctx.scaling.dtype == torch.float32


# --- several layers ---------------------------------------------------------------------------------------------------


@EACH_DTYPE
def test_every_layer_of_every_adapter(dtype: torch.dtype, device: torch.device) -> None:
    infos = two_layers()
    kinds = {layer: adapters_of_every_kind(info, layer) for layer, info in infos.items()}
    bank = AdapterBank(two_layers(device), dtype, max_adapters=9, max_rank=9)
    adapters: list[dict[int, LayerFactors]] = [{2: kinds[2][i], 5: kinds[5][j]} for i, j in [(0, 1), (2, 3), (6, 5)]]
    adapters += [{5: kinds[5][4]}, {2: kinds[2][1]}]
    for slot, factors in enumerate(adapters):
        assert bank.add(f"x{slot}", factors) == slot
    assert list(bank.contexts) == list(infos)
    for layer, info in infos.items():
        ctx = bank.contexts[layer]
        assert (ctx.hidden_size, ctx.inter_pad) == (info.hidden_size, info.inter_pad)
        assert ctx.arena is bank.contexts[2].arena
        assert all(tensor.is_contiguous() for tensor in ctx.tensors().values())
        for slot in range(9):
            check(ctx, slot, info, adapters[slot].get(layer, {}) if slot < len(adapters) else {})
    ranks = [one.ranks for one in bank.report().adapters.values()]
    assert ranks == [(3, 5, 7), (1,), (1, 2, 9), (2,), (3, 5, 7)]


def test_the_default_capacity_is_what_the_largest_adapters_need() -> None:
    infos = two_layers()
    bank = AdapterBank(infos, torch.bfloat16, max_adapters=3, max_rank=5)
    for name in "abc":
        bank.add_dummy(name, 5)
    report = bank.report()
    assert report.used == report.capacity == sum(one.nbytes for one in report.adapters.values())
    full: dict[Projection, int] = {"gate": 5, "up": 5, "down": 5}
    assert report.capacity == 3 * 2 * sum(block_size(info, random_factors(info, full)) for info in infos.values())


def tensor_bytes(factors: LayerFactors, itemsize: int) -> int:
    tensors = {id(tensor): tensor for factor in factors.values() for tensor in (factor.a, factor.b)}
    return sum(tensor.numel() for tensor in tensors.values()) * itemsize


@pytest.mark.parametrize(("hidden", "inter"), [(64, 48), (51, 37)])
@pytest.mark.parametrize("shared", [True, False])
def test_adapters_take_the_bytes_of_their_tensors(hidden: int, inter: int, shared: bool) -> None:
    """Whatever the largest rank; 5 % for the alignment, where there is any."""
    info = dense_info(8, hidden, inter, inter)
    bank = AdapterBank({0: info}, torch.bfloat16, max_adapters=8, max_rank=64)
    total = 0
    for rank in (4, 8, 16, 64):
        whole = random_factors(info, {"gate": rank, "up": rank, "down": rank}, shared=shared)
        some = random_factors(info, {"down": rank}, experts=[3])
        for name, factors in ((f"whole {rank}", whole), (f"some {rank}", some)):
            bank.add(name, {0: factors})
            expected = tensor_bytes(factors, 2)
            assert expected <= bank.report().adapters[name].nbytes <= expected * 1.05
            total += expected
    assert bank.report().used <= total * 1.05


def test_a_dummy_is_a_random_adapter_of_everything() -> None:
    infos = two_layers()
    bank = AdapterBank(infos, torch.float32, max_adapters=2, max_rank=4)
    assert bank.add_dummy("all", 3, pinned=True) == 0 and bank.add_dummy("some", 4, ["down"]) == 1
    for layer, info in infos.items():
        everything, down = (read(bank.contexts[layer], slot, info) for slot in (0, 1))
        assert everything.keys() == {(e, p) for e in range(3) for p in ("gate", "up", "down")}
        assert down.keys() == {(e, "down") for e in range(3)}
        for factor in (*everything.values(), *down.values()):
            delta: Tensor = factor.scaling * factor.b @ factor.a
            assert factor.a.unique().numel() == factor.a.numel() and delta.abs().max() > 0.1
    assert bank.report().adapters["all"].pinned and not bank.report().adapters["some"].pinned


def without_gate() -> MoEQuantInfo:
    info = dense_info()
    w13 = dataclasses.replace(info.w13, halves=1, w=torch.zeros(3, 20, 16))
    return dataclasses.replace(info, w13=w13, activation=Activation("relu2", gated=False))


def test_a_layer_without_a_gate() -> None:
    info = without_gate()
    bank = AdapterBank({0: info}, torch.float32, max_adapters=1, max_rank=4)
    bank.add_dummy("a", 4)
    assert read(bank.contexts[0], 0, info).keys() == {(e, p) for e in range(3) for p in ("up", "down")}
    assert bank.report().free == 0
    bank.remove("a")
    with pytest.raises(AdapterError, match="factors of gate of expert 0, expected experts 0 to 2 and up, down"):
        bank.add_dummy("a", 4, ["gate"])


# --- refusals ---------------------------------------------------------------------------------------------------------


def factor(a: tuple[int, ...], b: tuple[int, ...]) -> Factor:
    return Factor(torch.ones(a), torch.ones(b), 1.0)


MISFITS: dict[str, tuple[Mapping[int, LayerFactors], str]] = {
    "no layer": ({}, r"adapter x: got no factor of any layer, expected .* layers 2, 5"),
    "empty layers": ({2: {}, 5: {}}, r"no factor of any layer"),
    "another layer": ({2: {(0, "up"): factor((1, 16), (12, 1))}, 3: {}, 4: {}}, r"factors of layers 3, 4, expected"),
    "an expert": ({2: {(3, "up"): factor((1, 16), (12, 1))}}, r"layer 2: got factors of up of expert 3.*0 to 2"),
    "below": ({2: {(-1, "up"): factor((1, 16), (12, 1))}}, r"factors of up of expert -1"),
    "A": ({2: {(0, "up"): factor((1, 15), (12, 1))}}, r"up of expert 0: got A \[1, 15\], B \[12, 1\].*A \[r, 16\]"),
    "B": ({2: {(0, "down"): factor((1, 12), (12, 1))}}, r"down of expert 0: got .*and B \[16, r\]"),
    "padded": ({2: {(0, "down"): factor((1, 20), (16, 1))}}, r"A \[1, 20\].*A \[r, 12\]"),
    "two ranks": ({2: {(0, "up"): factor((2, 16), (12, 3))}}, r"A \[2, 16\], B \[12, 3\]"),
    "rank 0": ({2: {(0, "up"): factor((0, 16), (12, 0))}}, r"A \[0, 16\]"),
    "dimensions": ({2: {(0, "up"): factor((16,), (12, 1))}}, r"A \[16\]"),
    "rank": (
        {5: {(1, "up"): factor((5, 17), (7, 5))}},
        r"layer 5, up of expert 1: got rank 5, expected at most max_rank = 4; make",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_factors_that_do_not_fit(case: str) -> None:
    """A good layer before the bad one is not taken either, and a replaced adapter stays."""
    factors, match = MISFITS[case]
    infos = two_layers()
    bank = AdapterBank(infos, torch.float32, max_adapters=2, max_rank=4, evict="lru")
    bank.add("kept", {2: random_factors(infos[2], {"up": 3})})
    before, report = [snapshot(ctx) for ctx in bank.contexts.values()], bank.report()
    with pytest.raises(AdapterError, match=match):
        bank.add("x", factors)
    with pytest.raises(AdapterError, match=match.replace("adapter x", "adapter kept")):
        bank.replace("kept", factors)
    after = [snapshot(ctx) for ctx in bank.contexts.values()]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)
    assert bank.report() == report


@pytest.mark.parametrize("call", ["remove", "replace", "disable", "enable", "pin", "unpin", "slots"])
def test_unknown_names(call: str) -> None:
    bank = AdapterBank(two_layers(), torch.float32, max_adapters=1, max_rank=4)
    arguments = {"replace": ("x", {}), "slots": (["x"],)}.get(call, ("x",))
    with pytest.raises(AdapterError, match=r"got unknown 'x', expected one in the bank: none is; add"):
        getattr(bank, call)(*arguments)
    bank.add_dummy("a", 1)
    with pytest.raises(AdapterError, match=r"got unknown 'x', expected one in the bank: a"):
        getattr(bank, call)(*arguments)
    with pytest.raises(AdapterError, match=r"got 'a', expected a new name"):
        bank.add_dummy("a", 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_adapters": 0}, "max_adapters=0"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"capacity_bytes": -1}, "capacity_bytes=-1"),
        ({"evict": "fifo"}, "evict=fifo, .*never, lru"),
        ({"infos": {}}, "layers of an adapter bank: got none"),
        ({"infos": {0: dense_info(), 1: dense_info(4)}}, "3 experts on cpu, 4 experts on cpu, expected one device"),
        ({"infos": {0: dense_info(), 1: dense_info(device="meta")}}, "3 experts on meta"),
    ],
)
def test_banks_that_cannot_be(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"infos": two_layers(), "dtype": torch.float32, "max_adapters": 1, "max_rank": 4}
    with pytest.raises(AdapterError, match=match):
        AdapterBank(**{**arguments, **change})


def test_an_odd_capacity_is_not_exceeded() -> None:
    bank = AdapterBank(two_layers(), torch.bfloat16, max_adapters=1, max_rank=4, capacity_bytes=1000)
    assert bank.report().capacity == 1000 // (2 * ALIGNED) * 2 * ALIGNED


def test_what_does_not_fit_says_what_would() -> None:
    infos = two_layers()
    one: Callable[[], Mapping[int, LayerFactors]] = lambda: {2: random_factors(infos[2], {"up": 4})}  # noqa: E731
    size = 3 * 4 * (16 + 20) * 4
    bank = AdapterBank(infos, torch.float32, max_adapters=4, max_rank=4, capacity_bytes=size * 5 // 2)
    bank.add("a", one())
    bank.add("b", one(), pinned=True)
    with pytest.raises(AdapterError) as caught:
        bank.add("c", one())
    free = size * 5 // 2 - 2 * size
    assert str(caught.value) == (
        f"room for adapter c: got {size} bytes needed, {size} of them in one block; {free} bytes free, the largest "
        f"free block {free}; 2 of 4 slots taken, 1 of them pinned, expected to fit into {size * 5 // 2} bytes, nothing "
        "being evicted; remove or unpin an adapter, or make the bank larger or with evict='lru'"
    )
