"""Layers and models shared by all GPUs of this machine with NCCL: what `nccl.run` found on each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.distributed import nccl

pytestmark = pytest.mark.multi_gpu
Found = list[dict[str, str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By rank."""
    folder, world = tmp_path_factory.mktemp("processes"), torch.cuda.device_count()
    spawn(nccl.run, (world, str(folder)), world)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", nccl.CASES)
def test_a_layer_in_parallel_is_the_layer(name: str, found: Found) -> None:
    assert [of_rank[name] for of_rank in found] == [""] * len(found)


@pytest.mark.parametrize("name", nccl.REPLAYED)
def test_graphs_follow_tokens_and_adapters(name: str, found: Found) -> None:
    assert [of_rank[f"graph of {name}"] for of_rank in found] == [""] * len(found)


def test_whole_models(found: Found) -> None:
    assert [of_rank["models"] for of_rank in found] == [""] * len(found)
