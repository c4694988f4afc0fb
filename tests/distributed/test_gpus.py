"""Layers and models shared by processes on GPUs: what `gpus.run` found on each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.distributed import gpus

Found = list[dict[str, str]]
WORLD = 4  # processes that share a GPU


def started(world: int, folder: Path, *, share: bool) -> Found:
    """What each of ``world`` processes found, by rank."""
    spawn(gpus.run, (world, str(folder), share), world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """With NCCL, a process a GPU."""
    return started(torch.cuda.device_count(), tmp_path_factory.mktemp("processes"), share=False)


@pytest.mark.gpu
def test_layers_whose_processes_share_a_gpu(tmp_path: Path) -> None:
    """With gloo, as NCCL wants a GPU for each: the kernels on four parts of a layer, where there is one GPU."""
    right = dict.fromkeys(gpus.SHARING, "")
    assert started(WORLD, tmp_path, share=True) == [right] * WORLD


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", gpus.CASES)
def test_a_layer_in_parallel_is_the_layer(name: str, found: Found) -> None:
    assert [of_rank[name] for of_rank in found] == [""] * len(found)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", gpus.REPLAYED)
def test_graphs_follow_tokens_and_adapters(name: str, found: Found) -> None:
    assert [of_rank[f"graph of {name}"] for of_rank in found] == [""] * len(found)


@pytest.mark.multi_gpu
def test_whole_models(found: Found) -> None:
    assert [of_rank["models"] for of_rank in found] == [""] * len(found)
