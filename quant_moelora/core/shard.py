"""Shard: the part of a layer that one of several processes holds.

Tensor parallel: the processes of a group share each expert. w13 is cut along the rows of gate and up and w2 along its
columns, at the same stored positions of the intermediate, so that each computes a layer with a smaller intermediate,
and the layer's output is the sum of theirs. Expert parallel: the experts are dealt out, whole.

An adapter follows the weights: B of gate and up, and A of down, are cut along the intermediate. The other two factors
are either whole on each process ("plain"), or fully sharded: A of gate and up is cut along its rank, B of down along
the hidden size, and v is gathered between shrink and expand of w13, summed between those of w2 (S-LoRA, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from quant_moelora.core.errors import ShapeError, UnsupportedError

# Columns of B2 that fully sharded ranks hold are multiples of this, so that its rows begin at multiples of 16 bytes.
HIDDEN_UNIT = 64


@dataclass(frozen=True)
class Span:
    """Positions begin..end-1."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many positions."""
        return self.end - self.begin

    @property
    def slice(self) -> slice:
        """The span as an index."""
        return slice(self.begin, self.end)


def split(what: str, size: int, parts: int, unit: int = 1) -> list[Span]:
    """Cut 0..size-1 into consecutive spans of whole units, whose numbers of units differ by one at most.

    The last unit may be short. A part that is larger than the others by a unit costs nothing over cutting that unit in
    two: whoever holds a piece of a quantisation group computes with all of it.

    Args:
        what: the dimension in words, for the message.
        size: positions.
        parts: spans.
        unit: positions that must stay together.

    Raises:
        UnsupportedError: there are fewer units than parts.
    """
    units = -(-size // unit)
    if not 1 <= parts <= units:
        raise UnsupportedError(
            f"{what} of {size} over {parts} processes",
            got=f"{units} units of {unit} that cannot be cut",
            rule=f"1 to {units} processes, of which {_even(units)} get equal parts",
            remedy="use fewer processes for it, or another way to be parallel beside it",
        )
    ends = [min(size, -(-units * part // parts) * unit) for part in range(parts + 1)]
    return [Span(begin, end) for begin, end in pairwise(ends)]


def hidden_part(hidden_size: int, own: int, of: int) -> Span:
    """Columns of B of down that process ``own`` holds, of ``of`` that share them."""
    return Span(0, hidden_size) if of == 1 else split("hidden size", hidden_size, of, HIDDEN_UNIT)[own]


def _even(units: int) -> str:
    return ", ".join(str(parts) for parts in range(1, units + 1) if units % parts == 0)


@dataclass(frozen=True)
class ParallelConfig:
    """A process's place among those that share a layer, whatever the layer's sizes.

    Attributes:
        tp_rank: place among the processes that share each expert (tensor parallel).
        tp_size: how many these are.
        ep_rank: place among those that share out the experts (expert parallel).
        ep_size: how many these are.
        fully_sharded_lora: whether tensor parallel cuts A of gate and up and B of down too.

    Raises:
        UnsupportedError: a rank outside its size.
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    fully_sharded_lora: bool = False

    def __post_init__(self) -> None:
        for name, rank, size in (("tp", self.tp_rank, self.tp_size), ("ep", self.ep_rank, self.ep_size)):
            if not 0 <= rank < size:
                raise UnsupportedError(
                    f"{name}_rank", got=rank, rule=f"0 to {size - 1}, one of {size}", remedy="take it from the mesh"
                )

    @property
    def world_size(self) -> int:
        """Processes that share a layer."""
        return self.tp_size * self.ep_size

    @property
    def rank_shard(self) -> tuple[int, int]:
        """(t, T): place among the processes that share the rows of A13, and how many they are; (0, 1) if none do."""
        return (self.tp_rank, self.tp_size) if self.fully_sharded_lora else (0, 1)

    def shard(self, num_experts: int, intermediate_size: int, unit: int) -> Shard:
        """What this process holds of a layer.

        Args:
            num_experts: E of the whole layer.
            intermediate_size: I of the whole layer.
            unit: stored positions of the intermediate that must stay together (`MoEQuantInfo.inter_unit`).

        Raises:
            UnsupportedError: there are more processes than can have a part.
        """
        experts = split("experts", num_experts, self.ep_size)[self.ep_rank]
        inter = split("intermediate size", intermediate_size, self.tp_size, unit)[self.tp_rank]
        return Shard(self, num_experts, intermediate_size, experts, inter)


@dataclass(frozen=True)
class Shard:
    """What one process holds of a layer.

    Attributes:
        config: the process.
        num_experts: E of the whole layer.
        intermediate_size: I of the whole layer, without padding.
        experts: those held here; expert ``experts.begin`` of the layer is expert 0 here.
        inter: stored positions of the intermediate held here.
    """

    config: ParallelConfig
    num_experts: int
    intermediate_size: int
    experts: Span
    inter: Span

    def check(self, num_experts: int, intermediate_size: int) -> None:
        """Raise ShapeError unless a part has so many experts and so large an intermediate."""
        got, expected = (num_experts, intermediate_size), (self.experts.size, self.inter.size)
        if got != expected:
            raise ShapeError(
                "shard",
                got=f"{got[0]} experts and an intermediate size of {got[1]}",
                rule=f"{expected[0]} and {expected[1]}, as {self} says",
                remedy="make the part with MoEQuantInfo.part or load_experts(.., shard=..)",
            )

    def hidden(self, hidden_size: int) -> Span:
        """Columns of B of down that are held here."""
        return hidden_part(hidden_size, *self.config.rank_shard)


class RankCollectives(Protocol):
    """What fully sharded processes say to one another about v; each must call both in each forward with adapters."""

    def gather(
        self,
        v: Tensor,  # (P, W) float32: row t + j * tp_size of A13 is row j of process t
    ) -> Tensor:  # (P, W * tp_size)
        """The columns of all processes, in the order of the rows of A13."""
        ...

    def sum(
        self,
        v: Tensor,  # (P, W) float32
    ) -> Tensor:  # (P, W)
        """The sum over all processes."""
        ...
