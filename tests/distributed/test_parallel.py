"""Layers in parallel on four processes with gloo: what `processes.run` found on each of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from tests.distributed import processes
from tests.distributed.processes import CASES, WORLD
from tests.integrations.models import EFFECT, ROUNDING

Found = list[dict[str, Any]]
DEAD = 1  # the rank that ends first


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By rank."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(processes.run, (str(folder),), WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_a_layer_in_parallel_is_the_layer(name: str, found: Found) -> None:
    assert [of_rank[name] for of_rank in found] == [""] * WORLD


def test_auto_takes_what_all_processes_gain_by(found: Found) -> None:
    """Also the process without tokens."""
    assert [of_rank["auto"] for of_rank in found] == [[("", True), ("", False)]] * WORLD


def test_tensors_of_several_dtypes_are_gathered_at_once(found: Found) -> None:
    assert [of_rank["gathered"] for of_rank in found] == [[True] * 3] * WORLD


def test_other_adapters_are_seen(found: Found) -> None:
    """The bounds tell another adapter apart, on the process whose tokens use it."""
    assert "outputs are off" in found[0]["wrong"]["ep4-gather"]
    assert all("outputs are off" in of_rank["wrong"]["tp2-plain"] for of_rank in found)


def test_a_model_that_two_processes_loaded(found: Found) -> None:
    """Base rows and an adapter's, of files that transformers and PEFT wrote."""
    assert [of_rank["models"] for of_rank in found[:2]] == [{"off": "", "changed": ""}] * 2


@pytest.mark.parametrize("plan", ["tensor", "expert", "installed", "attention", "peft", "deepseek"])
def test_a_model_under_a_plan_of_transformers(plan: str, found: Found) -> None:
    """Logits, and tokens that are the same on both processes, with and without adapters that differ."""
    for of_rank in found[:2]:
        assert max(of_rank["plans"][plan]) < ROUNDING
        assert min(of_rank["plans"]["adapters"] + of_rank["plans"]["apart"]) > EFFECT


def test_a_plan_shards_what_it_says_and_we_the_experts(found: Found) -> None:
    attention = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    assert [of_rank["plans"]["sharded"] for of_rank in found[:2]] == [[*attention, "model.layers.0.mlp.experts"]] * 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("style", r"UnsupportedError: LoRA on lm_head: got .* shards by colwise_\w+, .* device_mesh= alone"),
        ("rule", r"UnsupportedError: tp_plan .*routed experts: model.layers.\*.mlp.experts,"),
        ("fsdp", r"UnsupportedError: distributed_config: got fsdp_size=2,"),
    ],
)
def test_what_a_plan_does_not_allow_is_refused(what: str, said: str, found: Found) -> None:
    assert all(re.match(said, of_rank["plans"][what]) for of_rank in found[:2])
    assert all(of_rank["plans"]["afterwards"] < ROUNDING for of_rank in found[:2]), "nothing was attached"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layer", "rank 2 has layer 0: .*router weight on the input, and not .*on the output, expected what rank 0"),
        ("mesh", "rank 1 has mesh: ep=4, tp=1, fully sharded LoRA, and not ep=4, tp=1, plain LoRA"),
        ("missing adapter", "rank 3 has adapter c: none, and not slot 1, enabled, factors"),
        ("other factors", r"rank 3 has adapter c: slot 1, enabled, factors (\w{8}), and not .*factors (?!\1)"),
    ],
)
def test_who_disagrees_is_named_on_every_rank(what: str, said: str, found: Found) -> None:
    assert all(re.search(said, of_rank["disagreements"][what]) for of_rank in found)


def test_processes_that_agree_go_on(found: Found) -> None:
    assert {of_rank["disagreements"][what] for of_rank in found for what in ("none", "same adapters", "again")} == {""}


def test_a_process_that_is_gone_is_an_error_on_all_others(found: Found) -> None:
    """Within the time that was given, and not that of collectives."""
    for rank, of_rank in enumerate(found):
        if rank != DEAD:
            assert f"got nothing from rank {DEAD} in 2 s" in of_rank["deaths"]["agree"]
            assert of_rank["deaths"]["forward"].startswith("RuntimeError"), "torch's own, since its peer is gone"
    assert "deaths" not in found[DEAD]
