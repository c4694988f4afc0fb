"""Blocks against a map with one entry for each element."""

from __future__ import annotations

import random

import pytest

from quant_moelora.lora.arena import Block, Blocks


class Map:
    """First fit by looking at every element."""

    def __init__(self, size: int) -> None:
        self.taken = bytearray(size)

    def allocate(self, sizes: list[int]) -> list[Block] | None:
        trial, found = bytearray(self.taken), list[Block]()
        for size in sizes:
            begin = trial.find(bytes(size))
            if begin < 0:
                return None
            trial[begin : begin + size] = b"\1" * size
            found.append(Block(begin, size))
        self.taken = trial
        return found

    def free(self, blocks: list[Block]) -> None:
        for block in blocks:
            assert self.taken[block.begin : block.end] == b"\1" * block.size
            self.taken[block.begin : block.end] = bytes(block.size)

    def runs(self) -> list[int]:
        return [len(run) for run in bytes(self.taken).split(b"\1") if run]


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences(seed: int) -> None:
    rng = random.Random(seed)
    blocks, expected = Blocks(300), Map(300)
    held: list[list[Block]] = []
    refused = 0
    for _ in range(200):
        if held and rng.random() < 0.4:
            gone = held.pop(rng.randrange(len(held)))
            blocks.free(gone)
            expected.free(gone)
        else:
            sizes = [rng.randint(1, 40) for _ in range(rng.randint(1, 3))]
            other = blocks.copy()
            got = blocks.allocate(sizes)
            assert got == other.allocate(sizes) == expected.allocate(sizes)
            refused += got is None
            held += [] if got is None else [got]
        assert blocks.free_size == sum(expected.runs())
        assert blocks.largest == max(expected.runs(), default=0)
    assert refused
    for gone in held:
        blocks.free(gone)
    assert blocks.allocate([300]) == [Block(0, 300)], "all free blocks have become one"
    assert blocks.largest == blocks.free_size == 0


def test_a_copy_is_another_one() -> None:
    blocks = Blocks(10)
    assert blocks.copy().allocate([10]) and blocks.free_size == 10


def test_nothing_is_taken_if_something_does_not_fit() -> None:
    blocks = Blocks(10)
    assert blocks.allocate([4, 7]) is None and blocks.largest == 10
    assert Blocks(0).allocate([1]) is None and Blocks(0).largest == 0


def test_what_is_free_cannot_be_freed() -> None:
    blocks = Blocks(10)
    (block,) = blocks.allocate([4]) or []
    blocks.free([block])
    with pytest.raises(AssertionError):
        blocks.free([block])
