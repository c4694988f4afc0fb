"""Stacked experts in adapter files: each expert has its own, or all share a factor, which the bank then holds once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import AdapterError
from quant_moelora.core.lora_context import A2, A13, B2, B13
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.lora.adapter_file import load_adapter
from quant_moelora.lora.bank import AdapterBank, build_context
from tests.adapters import dense_info, write_adapter
from tests.lora.banks import check

EXPERTS, HIDDEN, INTER, RANK = 3, 64, 64, 4
MODULE = "model.layers.0.mlp.experts"
SPEC = ExpertsSpec(
    module=MODULE,
    layer=0,
    num_experts=EXPERTS,
    hidden_size=HIDDEN,
    intermediate_size=INTER,
    activation=Activation("silu"),
)
SHAPES = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}
PER_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
OUTER = {"w1.lora_A", "w3.lora_A", "w2.lora_B"}


def stacked(*, outer: bool) -> dict[str, Tensor]:
    """Tensors of a file, by key without prefix."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, (n, k) in SHAPES.items():
        for factor, shape in (("A", (RANK, k)), ("B", (n, RANK))):
            experts = 1 if outer and f"{name}.lora_{factor}" in OUTER else EXPERTS
            made[f"{MODULE}.{name}.lora_{factor}.weight"] = torch.randn(experts, *shape, generator=generator)
    return made


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_adapter(folder, tensors, r=RANK, lora_alpha=6)


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with a module for each expert, as PEFT writes it."""
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        _, name, factor, _ = key.rsplit(".", 3)
        for expert in range(EXPERTS):
            value = tensor[expert % len(tensor)].clone()
            made[f"{MODULE}.{expert}.{PER_EXPERT[name]}.{factor}.weight"] = value
    return made


@pytest.mark.parametrize("names", [{}, PER_EXPERT], ids=["w123", "projections"])
@pytest.mark.parametrize("outer", [False, True])
def test_it_is_the_adapter_with_a_module_for_each_expert(tmp_path: Path, outer: bool, names: dict[str, str]) -> None:
    tensors = stacked(outer=outer)
    own = {
        key.replace(f".{n}.", f".{names.get(n, n)}."): t
        for key, t in tensors.items()
        for n in SHAPES
        if f".{n}." in key
    }
    found = load_adapter(written(tmp_path / "stacked", own), [SPEC])
    wanted = load_adapter(written(tmp_path / "own", one_by_one(tensors)), [SPEC])
    assert not found.linears and found.layers.keys() == wanted.layers.keys() == {0}
    assert found.layers[0].keys() == wanted.layers[0].keys()
    for key, factor in wanted.layers[0].items():
        other = found.layers[0][key]
        assert torch.equal(other.a, factor.a) and torch.equal(other.b, factor.b) and other.scaling == factor.scaling


def test_what_experts_share_is_held_once(tmp_path: Path) -> None:
    info = dense_info(EXPERTS, HIDDEN, INTER, INTER, permuted=False)
    tensors = stacked(outer=True)
    layers = load_adapter(written(tmp_path / "x", tensors), [SPEC]).layers
    ctx = build_context(info, [layers[0]], torch.float32)
    check(ctx, 0, info, layers[0])
    assert len(ctx.offsets[0, A13].unique()) == len(ctx.offsets[0, B2].unique()) == 1
    assert len(ctx.offsets[0, B13].unique()) == len(ctx.offsets[0, A2].unique()) == EXPERTS
    assert ctx.arena.numel() == sum(t.numel() for t in tensors.values())
    # A dummy is for an adapter that shares nothing.
    bank = AdapterBank({0: info}, torch.float32, max_adapters=1, max_rank=RANK)
    bank.add_dummy("x", RANK)
    assert bank.report().used == sum(t.numel() for t in stacked(outer=False).values()) * 4


WRONG = {
    "experts": (f"{MODULE}.w1.lora_A.weight", (2, RANK, HIDDEN)),
    "columns": (f"{MODULE}.w1.lora_A.weight", (1, RANK, HIDDEN - 1)),
    "rank": (f"{MODULE}.w2.lora_B.weight", (1, HIDDEN, RANK + 1)),
    "no stack": (f"{MODULE}.w3.lora_A.weight", (RANK, HIDDEN)),
    "layer": ("model.layers.7.mlp.experts.w3.lora_A.weight", (1, RANK, HIDDEN)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(tmp_path: Path, case: str) -> None:
    key, shape = WRONG[case]
    tensors = stacked(outer=True) | {key: torch.randn(shape)}
    with pytest.raises(AdapterError, match=r"layers\.\d\.mlp\.experts\.w"):
        load_adapter(written(tmp_path / "x", tensors), [SPEC])
