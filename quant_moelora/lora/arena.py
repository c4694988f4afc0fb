"""Blocks: which parts of an arena are taken. Numbers only; what stands there is the bank's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Block:
    """Part of an arena: ``size`` elements from element ``begin`` on."""

    begin: int
    size: int

    @property
    def end(self) -> int:
        """First element behind it."""
        return self.begin + self.size


class Blocks:
    """First fit among free blocks that are ordered by address; neighbours become one when they are freed.

    Attributes:
        size: elements of the arena.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [Block(0, size)] if size else []  # ascending; no two touch each other

    def copy(self) -> Blocks:
        """Another one with the same free blocks, to try things out."""
        other = Blocks(self.size)
        other._free = list(self._free)
        return other

    @property
    def free_size(self) -> int:
        """Elements that are free."""
        return sum(block.size for block in self._free)

    @property
    def largest(self) -> int:
        """Elements of the largest free block."""
        return max((block.size for block in self._free), default=0)

    def allocate(self, sizes: Sequence[int]) -> list[Block] | None:
        """A block for each size in elements, one at least; None, and nothing is taken, if not all of them fit."""
        left = list(self._free)
        taken: list[Block] = []
        for size in sizes:
            assert size > 0  # a block without elements would have no place of its own
            place = next((i for i, block in enumerate(left) if block.size >= size), None)
            if place is None:
                return None
            block = left[place]
            taken.append(Block(block.begin, size))
            left[place : place + 1] = [Block(block.begin + size, block.size - size)] if block.size > size else []
        self._free = left
        return taken

    def free(self, blocks: Iterable[Block]) -> None:
        """Give blocks of `allocate` back."""
        for block in blocks:
            place = bisect_left(self._free, block)
            begin, end = block.begin, block.end
            first, last = place, place
            if place and self._free[place - 1].end >= begin:
                assert self._free[place - 1].end == begin  # freed twice
                first, begin = place - 1, self._free[place - 1].begin
            if place < len(self._free) and self._free[place].begin <= end:
                assert self._free[place].begin == end  # freed twice
                last, end = place + 1, self._free[place].end
            self._free[first:last] = [Block(begin, end - begin)]
