"""AdapterBank: the adapters of a model's layers, in one arena, behind tables whose addresses do not change."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from quant_moelora.lora.arena import Block, Blocks
from quant_moelora.lora.layout import ALIGNMENT, LayerLayout, Layers, Tables, check_factors, full_size, shard_of
from quant_moelora.lora.transfer import Transfer

Factors = Mapping[int, LayerFactors]  # an adapter's, by layer
Evict = Literal["never", "lru"]


@dataclass(frozen=True)
class AdapterReport:
    """What a bank holds of one adapter.

    Attributes:
        slot: what tokens choose it by.
        nbytes: bytes of its factors in the arena.
        ranks: those that occur here, ascending.
        enabled: whether its tokens get its deltas.
        pinned: whether it is kept from being evicted.
        digest: of the whole adapter, where several processes share the layers and have to hold the same; else "".
    """

    slot: int
    nbytes: int
    ranks: tuple[int, ...]
    enabled: bool
    pinned: bool
    digest: str = ""


@dataclass(frozen=True)
class BankReport:
    """What a bank holds.

    Attributes:
        adapters: by name, the least recently used first.
        capacity: bytes of the arena.
        used: bytes of all adapters.
        free: bytes of no adapter.
        largest_free: bytes of the largest free block; a layer of an adapter needs one block.
    """

    adapters: dict[str, AdapterReport]
    capacity: int
    used: int
    free: int
    largest_free: int


@dataclass(eq=False)
class _Held:
    """An adapter in the bank: its rows of the tables are (L, ...), in host memory that nobody writes to again."""

    slot: int
    rows: Tables
    blocks: list[Block]
    pinned: bool
    digest: str
    enabled: bool = True


class AdapterBank:
    """The adapters of a model's layers: added, replaced and removed while the layers' contexts keep their addresses.

    Each adapter takes its real rank, and only for the experts and projections that it touches. Methods change the
    tables on the device's current stream and wait for nothing: call them on the stream that serves, or let that one
    wait for it. Work that the stream was given before sees the bank as it was. On CUDA the factors are copied by a
    stream of the bank's own, and the current one waits for them; memory of an adapter that is gone is written to only
    after what the current stream had been given when it went. A bank is used by one thread at a time.

    Attributes:
        contexts: `MoELoRAContext` of each layer; their tensors are views of the bank's.

    Args:
        infos: the layers' experts, by layer, on one device and with one E.
        dtype: of the arena, the dtype the layers compute in.
        max_adapters: A, the slots.
        max_rank: the largest rank that is served.
        capacity_bytes: of the arena; None for A adapters of the largest rank on everything.
        evict: what happens to an adapter that does not fit. ``never``: it is an error. ``lru``: adapters that are not
            pinned go first, the one whose last use (`add`, `replace` or `slots`) is the longest ago before others.

    Where several processes share the layers, each has a bank of its own, is given whole adapters and keeps its part of
    them; all of them make the same calls in the same order, so that a slot means one adapter everywhere.

    Raises:
        AdapterError: no layer, layers on several devices or of other numbers of experts, a size below 1, or eviction
            where several processes share the layers.
    """

    def __init__(
        self,
        infos: Mapping[int, MoEQuantInfo],
        dtype: torch.dtype,
        *,
        max_adapters: int,
        max_rank: int,
        capacity_bytes: int | None = None,
        evict: Evict = "never",
    ) -> None:
        layers = self._layers = Layers(infos)
        if capacity_bytes is None:
            capacity_bytes = max_adapters * sum(full_size(info, max_rank) for info in infos.values()) * dtype.itemsize
        if evict != "never" and layers.config.world_size > 1:
            raise AdapterError(
                "evict",
                got=evict,
                rule="never, where several processes share the layers",
                remedy="remove adapters on all of them: each would evict for its own memory's sake, and slots differ",
            )
        if min(max_adapters, max_rank) < 1 or capacity_bytes < 0 or evict not in get_args(Evict):
            raise AdapterError(
                "adapter bank",
                got=f"max_adapters={max_adapters}, max_rank={max_rank}, capacity_bytes={capacity_bytes}, evict={evict}",
                rule=f"1 at least, no negative capacity, and evict one of {', '.join(get_args(Evict))}",
                remedy="give the bank room for the adapters that are to be served at one time",
            )
        self._max_adapters, self._max_rank, self._evict = max_adapters, max_rank, evict
        self._held: dict[str, _Held] = {}  # the least recently used first
        self._blocks = Blocks(capacity_bytes // dtype.itemsize // ALIGNMENT * ALIGNMENT)
        self._arena = torch.zeros(self._blocks.size, dtype=dtype, device=layers.device)
        self._tables = Tables.empty((len(infos), max_adapters), layers.experts, layers.device)
        self._transfer = Transfer(layers.device)
        self._transfer.lend(self._arena)
        self._transfer.hold()  # for the zeros
        self.contexts = {
            layer: MoELoRAContext(
                num_experts=layers.experts,
                hidden_size=info.hidden_size,
                inter_pad=info.inter_pad,
                arena=self._arena,
                **self._tables.at(place)._asdict(),
                max_rank=max_rank,
                shard=info.shard,
            )
            for place, (layer, info) in enumerate(infos.items())
        }

    @classmethod
    def sized_to(
        cls, infos: Mapping[int, MoEQuantInfo], adapters: Mapping[str, Factors], dtype: torch.dtype
    ) -> AdapterBank:
        """A bank with room for exactly these adapters; the one at position i has slot i.

        One without any factors is not in it, and its slot has no adapter.

        Raises:
            AdapterError: layers do not go together, or an adapter does not fit them.
        """
        factors = [f for held in adapters.values() for layer in held.values() for f in layer.values()]
        max_rank = max((factor.a.shape[0] for factor in factors), default=1)
        layers = Layers(infos)
        plans = {name: _Plan(name, layers, held, max_rank) for name, held in adapters.items() if any(held.values())}
        size = sum(sum(plan.sizes) for plan in plans.values()) * dtype.itemsize
        bank = cls(infos, dtype, max_adapters=max(len(adapters), 1), max_rank=max_rank, capacity_bytes=size)
        for slot, name in enumerate(adapters):
            if name in plans:
                bank._put(name, plans[name], slot, pinned=False)
        return bank

    def add(self, name: str, factors: Factors, *, pinned: bool = False) -> int:
        """Take an adapter in, and return its slot.

        Args:
            name: a new one.
            factors: in host memory, by layer of the bank, expert and projection.
            pinned: keep it from being evicted.

        Raises:
            AdapterError: the name is taken, the factors do not fit the layers or touch none of them, or there is not
                enough room; the bank is as it was.
        """
        if name in self._held:
            raise AdapterError(
                "adapter name", got=repr(name), rule="a new name", remedy="choose another name, or replace the adapter"
            )
        plan = _Plan(name, self._layers, factors, self._max_rank)
        self._make_room(name, plan.sizes)
        slot = min(set(range(self._max_adapters)) - self._taken())
        self._put(name, plan, slot, pinned=pinned)
        return slot

    def replace(self, name: str, factors: Factors) -> None:
        """Give an adapter other factors, in its slot. The old ones serve until then, so there must be room for both.

        Raises:
            AdapterError: there is no such adapter, or as `add`; the bank is as it was.
        """
        old = self._get(name)
        plan = _Plan(name, self._layers, factors, self._max_rank)
        self._make_room(name, plan.sizes)
        self._put(name, plan, old.slot, pinned=old.pinned, enabled=old.enabled)
        self._release(old.blocks)

    def add_dummy(
        self,
        name: str,
        rank: int,
        projections: Collection[Projection] | None = None,
        *,
        pinned: bool = False,
    ) -> int:
        """Add a random adapter of all experts, for warm-up, captures and measurements; return its slot.

        Args:
            name: a new one.
            rank: of every projection.
            projections: those that it has; None for all of the layers'.
            pinned: keep it from being evicted.

        Raises:
            AdapterError: as `add`.
        """
        return self.add(
            name, {n: _random(info, rank, projections) for n, info in self._layers.infos.items()}, pinned=pinned
        )

    def remove(self, name: str) -> None:
        """Take an adapter out. Its slot and memory are free, and tokens that still choose the slot use the base.

        Raises:
            AdapterError: there is no such adapter.
        """
        held = self._get(name)
        del self._held[name]
        self._tables.at(slice(None), held.slot).clear()
        self._release(held.blocks)

    def disable(self, name: str) -> None:
        """Let an adapter's tokens use the base, while its factors and its slot stay.

        Raises:
            AdapterError: there is no such adapter.
        """
        held = self._get(name)
        held.enabled = False
        self._show(held)

    def enable(self, name: str) -> None:
        """Undo `disable`.

        Raises:
            AdapterError: there is no such adapter.
        """
        held = self._get(name)
        held.enabled = True
        self._show(held)

    def pin(self, name: str) -> None:
        """Keep an adapter from being evicted.

        Raises:
            AdapterError: there is no such adapter.
        """
        self._get(name).pinned = True

    def unpin(self, name: str) -> None:
        """Undo `pin`.

        Raises:
            AdapterError: there is no such adapter.
        """
        self._get(name).pinned = False

    def slots(self, names: Sequence[str]) -> list[int]:
        """Slots of adapters, which are used by that, the last one last.

        Raises:
            AdapterError: there is no such adapter; then none counts as used.
        """
        found = [self._get(name).slot for name in names]
        for name in names:
            self._held[name] = self._held.pop(name)
        return found

    def report(self) -> BankReport:
        """What the bank holds; nothing counts as used."""
        unit = self._arena.itemsize
        adapters = {
            name: AdapterReport(
                slot=held.slot,
                nbytes=sum(block.size for block in held.blocks) * unit,
                ranks=tuple(rank for rank in held.rows.rank.unique().tolist() if rank),  # sorted
                enabled=held.enabled,
                pinned=held.pinned,
                digest=held.digest,
            )
            for name, held in self._held.items()
        }
        capacity, free = self._blocks.size * unit, self._blocks.free_size * unit
        return BankReport(adapters, capacity, capacity - free, free, self._blocks.largest * unit)

    def _get(self, name: str) -> _Held:
        if name not in self._held:
            raise AdapterError(
                "adapter name",
                got=f"unknown {name!r}",
                rule=f"one in the bank: {', '.join(self._held) or 'none is'}",
                remedy="add the adapter first, or correct the name",
            )
        return self._held[name]

    def _taken(self) -> set[int]:
        return {held.slot for held in self._held.values()}

    def _make_room(self, name: str, sizes: Sequence[int]) -> None:
        """Evict until ``sizes`` and, for a new name, a slot are free.

        Raises:
            AdapterError: they cannot be; nothing is evicted.
        """
        candidates = [other for other, held in self._held.items() if not held.pinned and other != name]
        blocks, slots = self._blocks.copy(), self._max_adapters - len(self._held) + (name in self._held)
        evicted: list[str] = []
        while slots < 1 or blocks.copy().allocate(sizes) is None:
            if self._evict == "never" or len(evicted) == len(candidates):
                raise self._no_room(name, sizes)
            evicted.append(candidates[len(evicted)])
            blocks.free(self._held[evicted[-1]].blocks)
            slots += 1
        for other in evicted:
            self.remove(other)

    def _no_room(self, name: str, sizes: Sequence[int]) -> AdapterError:
        unit, blocks, slots = self._arena.itemsize, self._blocks, self._max_adapters
        pinned = sum(held.pinned for held in self._held.values())
        return AdapterError(
            f"room for adapter {name}",
            got=f"{sum(sizes) * unit} bytes needed, {max(sizes, default=0) * unit} of them in one block; "
            f"{blocks.free_size * unit} bytes free, the largest free block {blocks.largest * unit}; "
            f"{len(self._held)} of {slots} slots taken, {pinned} of them pinned",
            rule=f"to fit into {blocks.size * unit} bytes"
            + (", at most all that is not pinned being evicted" if self._evict == "lru" else ", nothing being evicted"),
            remedy="remove or unpin an adapter, or make the bank larger or with evict='lru'",
        )

    def _put(self, name: str, plan: _Plan, slot: int, *, pinned: bool, enabled: bool = True) -> None:
        """Copy the factors to free blocks, of which there are enough, and then let the tables name them."""
        rows = Tables(*(self._transfer.staging(tuple(t.shape), t.dtype).copy_(t) for t in plan.rows))
        blocks = self._blocks.allocate(plan.sizes)
        assert blocks is not None  # _make_room, or sized_to
        try:
            for (place, layout), block in zip(plan.layouts.items(), blocks, strict=True):
                rows.offsets[place] += torch.where(rows.offsets[place] < 0, 0, block.begin)
                staged = self._transfer.staging((layout.size,), self._arena.dtype)
                layout.write(staged)
                self._transfer.send(staged, self._arena[block.begin : block.end])
        except BaseException:
            self._blocks.free(blocks)  # no table names them
            raise
        self._transfer.arrive()
        held = _Held(slot, rows, blocks, pinned, plan.digest, enabled)
        self._held.pop(name, None)
        self._held[name] = held
        self._show(held)

    def _show(self, held: _Held) -> None:
        """Make the tables say what they are to say of an adapter's slot."""
        tables = self._tables.at(slice(None), held.slot)
        if not held.enabled:
            tables.clear()
            return
        for table, row in zip(tables, held.rows, strict=True):
            table.copy_(row, non_blocking=True)

    def _release(self, blocks: Iterable[Block]) -> None:
        """Give blocks back that no table names any more; work given before may still read them."""
        self._transfer.hold()
        self._blocks.free(blocks)


class _Plan:
    """An adapter that fits the layers, laid out.

    Attributes:
        rows: of the tables, (L, ...) on the host, with offsets relative to each layer's block.
        layouts: by the layer's place in the bank, of those that the adapter touches.
        sizes: elements of each layer's block.
        digest: see `AdapterReport`.
    """

    def __init__(self, name: str, layers: Layers, factors: Factors, max_rank: int) -> None:
        unknown = sorted(factors.keys() - layers.infos.keys())
        if unknown or not any(factors.values()):
            raise AdapterError(
                f"adapter {name}",
                got=f"factors of layers {', '.join(map(str, unknown))}" if unknown else "no factor of any layer",
                rule=f"factors of one at least of the layers {', '.join(map(str, layers.infos))}, and of no other",
                remedy="give the adapter to the model it was trained on",
            )
        self.layouts: dict[int, LayerLayout] = {}
        self.rows = Tables.empty((len(layers.infos),), layers.experts, torch.device("cpu"))
        for place, (layer, info) in enumerate(layers.infos.items()):
            held = factors.get(layer)
            if held:
                check_factors(f"adapter {name}, layer {layer}", info, held, max_rank)
                layout = LayerLayout(info, layers.orders[layer], held, self.rows.at(place))
                if layout.size:
                    self.layouts[place] = layout
        self.sizes = [layout.size for layout in self.layouts.values()]
        self.digest = _digest(factors) if layers.config.world_size > 1 else ""


def _digest(factors: Factors) -> str:
    """A checksum of all factors, fast enough for gigabytes; it is to find mistakes, not malice."""
    total = 0
    for layer, held in sorted(factors.items()):
        for (expert, projection), factor in sorted(held.items()):
            text = f"{layer} {expert} {projection} {factor.scaling} {list(factor.a.shape)} {list(factor.b.shape)}"
            total = zlib.crc32(text.encode(), total)
            for tensor in (factor.a, factor.b):
                data: Any = tensor.contiguous().view(torch.uint8).numpy()
                total = zlib.crc32(data, total)
    return f"{total:08x}"


def build_context(info: MoEQuantInfo, adapters: Sequence[LayerFactors], dtype: torch.dtype) -> MoELoRAContext:
    """The context of one layer with exactly these adapters; the one at position i has slot i.

    Args:
        info: the layer's experts.
        adapters: factors of each adapter; an empty dict for one that leaves the layer alone.
        dtype: of the arena, the dtype the layer computes in.

    Raises:
        AdapterError: an adapter does not fit the layer.
    """
    return AdapterBank.sized_to({0: info}, {str(i): {0: f} for i, f in enumerate(adapters)}, dtype).contexts[0]


def _random(info: MoEQuantInfo, rank: int, projections: Collection[Projection] | None) -> LayerFactors:
    """Random factors whose deltas are about as large as what they are added to; all experts have the same values.

    Not the same tensors, which would be held once: a dummy takes the room of an adapter that shares nothing.
    """
    generator, shard = torch.Generator().manual_seed(0), shard_of(info)
    if projections is None:
        projections = ("gate", "up", "down") if info.activation.gated else ("up", "down")
    made: LayerFactors = {}
    for projection in projections:
        n, k = shard.intermediate_size, info.hidden_size
        n, k = (k, n) if projection == "down" else (n, k)
        a = torch.randn(max(rank, 0), k, generator=generator) / math.sqrt(k)
        b = torch.randn(n, max(rank, 0), generator=generator) / math.sqrt(max(rank, 1))
        made |= {(e, projection): Factor(a.view_as(a), b.view_as(b), 1.0) for e in range(shard.num_experts)}
    return made
