"""Layers in parallel under torch.compile(fullgraph=True): collectives are traced, and one graph serves all sizes.

The process group is torch's fake one, whose collectives return at once: what they are to return is tested with gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from quant_moelora.distributed.layer import DistributedExperts
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.lora import injection
from quant_moelora.lora.bank import AdapterBank
from tests.adapters import random_factors
from tests.builders import layer, same_bits, scheme
from tests.launched.cases import DEVICE, DTYPES, INTERPRETED, MARKS, Counting

pytestmark = [*MARKS, pytest.mark.usefixtures("serving")]
# DeepSeek-V2-Lite's sizes, of whose intermediate the half is no multiple of 128; interpreted, as small as that can be.
EXPERTS, HIDDEN, INTER, TOP_K, WORLD = (2, 128, 384, 2, 2) if INTERPRETED else (64, 2048, 1408, 6, 2)
DTYPE = DTYPES[-1]
SIZES = (5, 7)  # of no other dimension, which the compiler would take for the same one


@pytest.fixture
def two_processes() -> Iterator[None]:
    """This one, and one that is not there."""
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("fake", store=store, rank=1, world_size=WORLD)
    yield
    dist.destroy_process_group()


WAYS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tp": ("tp", {}, False),
    "tp-fully": ("tp", {}, True),
    "ep": ("ep", {"exchange": "all_gather", "rows": 8}, False),
}
if INTERPRETED:
    del WAYS["tp"]  # fully sharded, it has those collectives and two more


@pytest.mark.parametrize(("dims", "options", "fully"), WAYS.values(), ids=WAYS)
@pytest.mark.usefixtures("two_processes")
def test_one_graph(dims: str, options: dict[str, Any], fully: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "_on_gpu", lambda _: True)  # interpreted too
    mesh = ExpertMesh(init_device_mesh(DEVICE.type, (WORLD,), mesh_dim_names=(dims,)), fully_sharded_lora=fully)
    info = layer(scheme(4, 64), experts=EXPERTS, hidden=HIDDEN, inter=INTER).info.part(mesh.config).to(DEVICE)
    if dims == "tp":
        assert info.intermediate_size == INTER // 2 and info.intermediate_size % 128
    experts = DistributedExperts(info, mesh, backend="marlin", **options)
    bank = AdapterBank({0: info}, DTYPE, max_adapters=2, max_rank=8)
    whole = layer(torch.float32, experts=EXPERTS, hidden=HIDDEN, inter=INTER).info
    for seed, name in enumerate("ab"):
        bank.add(name, {0: random_factors(whole, {"gate": 8, "up": 4, "down": 8}, seed=seed)})
    experts.attach(bank.contexts[0])
    experts.prepare(DTYPE)
    count = Counting()
    compiled = torch.compile(experts, fullgraph=True, backend=count, dynamic=True)
    for tokens in SIZES:
        x = torch.randn(tokens, HIDDEN, device=DEVICE).to(DTYPE)
        ids = torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP_K).indices
        weights, slots = torch.rand(tokens, TOP_K, device=DEVICE), torch.arange(tokens, device=DEVICE) % 3 - 1
        expected = experts(x, ids, weights, slots)  # first, since compiled code depends on what a workspace has
        assert same_bits(compiled(x, ids, weights, slots), expected), tokens
    assert len(count.graphs) == 1
    called = {name.split(".")[1] for name in count.operators()[0] if "c10d" in name}
    gather = "all_gather_into_tensor_coalesced" if DEVICE.type == "cuda" else "all_gather_into_tensor"
    collectives = {"tp": {"all_reduce"}, "ep": {gather, "reduce_scatter_tensor"}}[dims]
    assert called == {*collectives, "wait_tensor", *({"all_gather_into_tensor"} if fully else ())}
