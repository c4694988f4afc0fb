"""adapter_ids against a loop over the requests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import ShapeError
from quant_moelora.lora.requests import adapter_ids


def by_loop(seq_lens: Tensor, slots: Tensor, num_tokens: int) -> list[int]:
    ids = [slot for length, slot in zip(seq_lens.tolist(), slots.tolist(), strict=True) for _ in range(length)]
    return (ids + [-1] * num_tokens)[:num_tokens]


CASES = [([3, 1, 2], 6), ([3, 0, 0, 2, 0], 9), ([0, 0], 4), ([], 3), ([5, 7], 12), ([5, 7], 8), ([0, 4], 0)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("lengths", "num_tokens"), CASES, ids=str)
def test_ids(lengths: list[int], num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    seq_lens, slots = torch.tensor(lengths, dtype=dtype), torch.randint(-1, 5, (len(lengths),), dtype=dtype)
    got = adapter_ids(seq_lens.to(device), slots.to(device), num_tokens)
    assert got.dtype == torch.int32 and got.device.type == device.type
    assert got.tolist() == by_loop(seq_lens, slots, num_tokens)


def test_random_batches() -> None:
    for batch in range(1, 30):
        seq_lens, slots = torch.randint(0, 4, (batch,)), torch.randint(-1, 9, (batch,))
        num_tokens = int(seq_lens.sum()) + batch % 4
        assert adapter_ids(seq_lens, slots, num_tokens).tolist() == by_loop(seq_lens, slots, num_tokens)


@pytest.mark.parametrize(
    ("seq_lens", "slots"),
    [
        (torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)),
        (torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64)),
        (torch.ones(2), torch.ones(2, dtype=torch.int64)),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64, device="meta")),
    ],
)
def test_what_is_no_batch(seq_lens: Tensor, slots: Tensor) -> None:
    with pytest.raises(ShapeError):
        adapter_ids(seq_lens, slots, 4)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_batch() -> None:
    seq_lens, slots = (torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(2))
    adapter_ids(seq_lens, slots, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = adapter_ids(seq_lens, slots, 10)
    for lengths, chosen in (([2, 3, 1], [4, -1, 0]), ([0, 10, 0], [1, 2, 3]), ([1, 0, 7], [5, 5, 6])):
        seq_lens.copy_(torch.tensor(lengths))
        slots.copy_(torch.tensor(chosen))
        graph.replay()
        assert ids.tolist() == by_loop(torch.tensor(lengths), torch.tensor(chosen), 10)
