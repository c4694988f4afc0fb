"""load_adapter: every form of PEFT's files against the form written out, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_moelora.core.errors import AdapterError
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors, load_adapter
from tests.adapters import (
    CONFIG,
    PROJECTIONS,
    WEIGHTS,
    Dims,
    Tensors,
    attention_lora,
    expert_lora,
    fused_lora,
    linear_lora,
    write_adapter,
)

DIMS = Dims(experts=3, hidden=8, inter=5)
SQUARE = Dims(experts=3, hidden=8, inter=4)  # gate_up is [8, 8]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
RANK = 4
EXPERTS = "model.layers.0.mlp.experts"


def delta(factor: Factor) -> torch.Tensor:  # (N, K)
    return factor.b @ factor.a


def pair(tensors: Tensors, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as the file has them."""
    return tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]


def check_fused(factors: LayerFactors, a: torch.Tensor, b: torch.Tensor, dims: Dims, *, down: bool) -> None:
    """A is expert-major, row e*r + i; B is rank-major, column i*E + e."""
    for expert in range(dims.experts):
        rows = [expert * RANK + i for i in range(RANK)]
        columns = [i * dims.experts + expert for i in range(RANK)]
        if down:
            torch.testing.assert_close(factors[expert, "down"].a, a[rows], rtol=0, atol=0)
            torch.testing.assert_close(factors[expert, "down"].b, b[:, columns], rtol=0, atol=0)
            continue
        halves: tuple[tuple[Projection, int], ...] = (("gate", 0), ("up", dims.inter))
        for projection, begin in halves:
            factor = factors[expert, projection]
            torch.testing.assert_close(factor.a, a[rows], rtol=0, atol=0)
            torch.testing.assert_close(factor.b, b[begin : begin + dims.inter][:, columns], rtol=0, atol=0)


def test_fused_form(tmp_path: Path) -> None:
    tensors = fused_lora(DIMS, rank=RANK)
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors, target_parameters=FUSED), DIMS.specs())
    assert not adapter.linears
    assert sorted(adapter.layers) == [0, 1]
    for layer, factors in adapter.layers.items():
        assert len(factors) == 3 * DIMS.experts
        assert {factor.scaling for factor in factors.values()} == {8 / 4}
        module = f"model.layers.{layer}.mlp.experts"
        check_fused(factors, *pair(tensors, f"{module}.base_layer"), DIMS, down=False)
        check_fused(factors, *pair(tensors, module), DIMS, down=True)
        for expert in range(DIMS.experts):
            assert factors[expert, "gate"].a is factors[expert, "up"].a, "one A, stored once"


@pytest.mark.parametrize("targets", [FUSED, FUSED[::-1], ["gate_up_proj", "down_proj"]])
def test_the_order_of_target_parameters_means_nothing(tmp_path: Path, targets: list[str]) -> None:
    """PEFT wraps the parameters in the order in which the module has them."""
    tensors = fused_lora(DIMS, rank=RANK)
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors, target_parameters=targets), DIMS.specs())
    check_fused(adapter.layers[0], *pair(tensors, f"{EXPERTS}.base_layer"), DIMS, down=False)
    check_fused(adapter.layers[0], *pair(tensors, EXPERTS), DIMS, down=True)


@pytest.mark.parametrize("parameter", ["gate_up", "down"])
def test_one_targeted_parameter_has_no_inner_name(tmp_path: Path, parameter: str) -> None:
    tensors = fused_lora(DIMS, [parameter], rank=RANK)
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=[f"mlp.experts.{parameter}_proj"])
    factors = load_adapter(folder, DIMS.specs()).layers[1]
    assert {p for _, p in factors} == ({"down"} if parameter == "down" else {"gate", "up"})
    check_fused(factors, *pair(tensors, "model.layers.1.mlp.experts"), DIMS, down=parameter == "down")


@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", None])
def test_swapped_roles_are_seen_by_shape(tmp_path: Path, version: str | None) -> None:
    """delta_e = (B_e A_e)^T with A_e [r, N] and B_e [K, r]."""
    tensors = fused_lora(DIMS, rank=RANK, swapped=True)
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=FUSED, peft_version=version)
    check_swapped(load_adapter(folder, DIMS.specs()).layers[0], tensors, DIMS)


Places = tuple[tuple[str, tuple[Projection, ...]], ...]  # inner name and projections of each targeted parameter
BOTH: Places = ((".base_layer", ("gate", "up")), ("", ("down",)))


def check_swapped(factors: LayerFactors, tensors: Tensors, dims: Dims, places: Places = BOTH) -> None:
    assert {p for _, p in factors} == {p for _, projections in places for p in projections}
    for inner, projections in places:
        a, b = pair(tensors, EXPERTS + inner)
        for expert in range(dims.experts):
            a_rows = torch.stack([a[expert * RANK + i] for i in range(RANK)])
            b_columns = torch.stack([b[:, i * dims.experts + expert] for i in range(RANK)], dim=1)
            whole = (b_columns @ a_rows).T
            parts = whole.split(dims.inter) if len(projections) == 2 else (whole,)
            for projection, part in zip(projections, parts, strict=True):
                torch.testing.assert_close(delta(factors[expert, projection]), part)


@pytest.mark.parametrize("projections", [("gate", "up"), ("down",)], ids=" ".join)
@pytest.mark.parametrize("dims", [DIMS, SQUARE, Dims(experts=3, hidden=8, inter=8)], ids=["none", "gate_up", "down"])
def test_one_targeted_parameter_of_an_old_peft(tmp_path: Path, projections: tuple[Projection, ...], dims: Dims) -> None:
    """Neither a name nor, where the parameter is square, a shape says what the tensors are."""
    parameter = "down" if projections == ("down",) else "gate_up"
    tensors = fused_lora(dims, [parameter], rank=RANK, swapped=True)
    targets = [f"mlp.experts.{parameter}_proj"]
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=targets, peft_version="0.17.1")
    check_swapped(load_adapter(folder, dims.specs()).layers[0], tensors, dims, (("", projections),))


@pytest.mark.parametrize("version", ["0.17.0", "0.18.1", "0.19.0"])
def test_square_parameter_of_an_old_peft_is_swapped(tmp_path: Path, version: str) -> None:
    tensors = fused_lora(SQUARE, ["gate_up"], rank=RANK, swapped=True)
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=FUSED[:1], peft_version=version)
    check_swapped(load_adapter(folder, SQUARE.specs()).layers[0], tensors, SQUARE, (("", ("gate", "up")),))


# A development version carries the commit, as PEFT's config.py writes it.
@pytest.mark.parametrize("version", ["0.19.1", "0.21.2", "1.0", "0.21.3.dev0@0f6c1d2", "0.22.0.dev0@UNKNOWN"])
def test_square_parameter_of_a_new_peft_is_not_swapped(tmp_path: Path, version: str) -> None:
    tensors = fused_lora(SQUARE, ["gate_up"], rank=RANK)
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=FUSED[:1], peft_version=version)
    factors = load_adapter(folder, SQUARE.specs()).layers[0]
    check_fused(factors, *pair(tensors, EXPERTS), SQUARE, down=False)


@pytest.mark.parametrize("version", [None, "unknown"])
def test_square_parameter_of_no_known_version_is_an_error(tmp_path: Path, version: str | None) -> None:
    """PEFT before 0.18 wrote no version, and PEFT fills its own in when it reads such a file."""
    tensors = fused_lora(SQUARE, ["gate_up"])
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=FUSED[:1], peft_version=version)
    match = rf"{EXPERTS}\.gate_up_proj.*square.*peft_version {version}.*0\.19\.1"
    with pytest.raises(AdapterError, match=match):
        load_adapter(folder, SQUARE.specs())


@pytest.mark.parametrize(("block", "names"), [("mlp", NAMES), ("block_sparse_moe", MIXTRAL_NAMES)])
def test_per_expert_form(tmp_path: Path, block: str, names: dict[str, str]) -> None:
    dims = Dims(experts=3, hidden=8, inter=5, block=block)
    tensors = expert_lora(dims, names)
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors), dims.specs())
    for layer in dims.layers:
        assert len(adapter.layers[layer]) == 9
        for expert in range(dims.experts):
            for projection in PROJECTIONS:
                module = f"model.layers.{layer}.{block}.experts.{expert}.{names[projection]}"
                factor = adapter.layers[layer][expert, projection]
                assert torch.equal(factor.a, tensors[f"{module}.lora_A.weight"])
                assert torch.equal(factor.b, tensors[f"{module}.lora_B.weight"])
                assert factor.scaling == 8 / 4


def test_partial_experts_and_other_linears(tmp_path: Path) -> None:
    tensors = expert_lora(DIMS, {"down": "down_proj"}, experts=[2, 0], layers=[1])
    tensors |= attention_lora({"q_proj": (16, 8)}, layers=[0])
    adapter = load_adapter(write_adapter(tmp_path / "a", tensors), DIMS.specs())
    assert {layer: set(factors) for layer, factors in adapter.layers.items()} == {1: {(0, "down"), (2, "down")}}
    (name, factor) = next(iter(adapter.linears.items()))
    assert name == "model.layers.0.self_attn.q_proj" and len(adapter.linears) == 1
    assert torch.equal(factor.b, tensors[f"{name}.lora_B.weight"])
    assert adapter.path == tmp_path / "a"


def test_scaling_by_patterns(tmp_path: Path) -> None:
    """alpha / r: r is what the file holds, alpha the first pattern that ends the module's name, else lora_alpha."""
    tensors = expert_lora(DIMS, NAMES, rank=4) | linear_lora(f"{EXPERTS}.1.gate_proj", 5, 8, rank=16)
    folder = write_adapter(
        tmp_path / "a",
        tensors | attention_lora({"q_proj": (8, 8)}),
        r=4,
        lora_alpha=10,
        rank_pattern={"layers.0.mlp.experts.1.gate_proj": 16},
        alpha_pattern={r"layers\.1\..*\.down_proj": 3, "down_proj": 32, "own_proj": 7},
    )
    adapter = load_adapter(folder, DIMS.specs())
    assert adapter.layers[0][1, "gate"].a.shape == (16, 8)
    assert adapter.layers[0][1, "gate"].scaling == 10 / 16
    assert adapter.layers[0][0, "gate"].scaling == adapter.layers[0][1, "up"].scaling == 10 / 4
    assert adapter.layers[0][0, "down"].scaling == 32 / 4
    assert adapter.layers[1][0, "down"].scaling == 3 / 4
    assert adapter.linears["model.layers.0.self_attn.q_proj"].scaling == 10 / 4


def test_scaling_of_fused_parameters_by_pattern(tmp_path: Path) -> None:
    """As PEFT rewrites target_modules of experts: twice the rank and twice alpha for gate_up_proj."""
    tensors = fused_lora(DIMS, rank=4)
    wide = fused_lora(DIMS, rank=8)
    tensors |= {key: tensor for key, tensor in wide.items() if "base_layer" in key}
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 24}}
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=FUSED, lora_alpha=10, **patterns)
    factors = load_adapter(folder, DIMS.specs()).layers[0]
    assert factors[0, "up"].a.shape == (8, 8)
    assert factors[0, "gate"].scaling == factors[0, "up"].scaling == 24 / 8
    assert factors[0, "down"].scaling == 10 / 4


@pytest.mark.parametrize("fused", [True, False])
def test_scaling_of_rslora(tmp_path: Path, fused: bool) -> None:
    tensors = fused_lora(DIMS) if fused else expert_lora(DIMS, NAMES)
    config = {"target_parameters": FUSED} if fused else {}
    tensors |= attention_lora({"q_proj": (8, 8)})
    adapter = load_adapter(
        write_adapter(tmp_path / "a", tensors, use_rslora=True, lora_alpha=6, **config), DIMS.specs()
    )
    assert adapter.layers[1][2, "down"].scaling == adapter.layers[1][2, "up"].scaling == 6 / math.sqrt(4)
    assert adapter.linears["model.layers.1.self_attn.q_proj"].scaling == 6 / math.sqrt(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_factors_of_16_bits_are_kept(tmp_path: Path, dtype: torch.dtype, fused: bool) -> None:
    tensors = fused_lora(DIMS) if fused else expert_lora(DIMS, NAMES)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    config = {"target_parameters": FUSED} if fused else {}
    factors = load_adapter(write_adapter(tmp_path / "a", tensors, **config), DIMS.specs()).layers[0]
    assert {tensor.dtype for factor in factors.values() for tensor in (factor.a, factor.b)} == {dtype}
    if fused:
        check_fused(factors, *pair(tensors, EXPERTS), DIMS, down=True)
    else:
        assert torch.equal(factors[2, "up"].b, tensors[f"{EXPERTS}.2.up_proj.lora_B.weight"])


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_what_only_training_looks_at_is_accepted(tmp_path: Path, init: bool | str) -> None:
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES), lora_dropout=0.1, init_lora_weights=init)
    assert load_adapter(folder, DIMS.specs()).layers


REFUSED: list[tuple[str, Any]] = [
    ("use_dora", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("alora_invocation_tokens", [1, 2]),
    ("trainable_token_indices", [3]),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("fan_in_fan_out", True),
    # These change the base weights on which the factors stand.
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    # These give A and B another meaning.
    ("arrow_config", {"top_k": 2}),
    ("use_bdlora", {"target_modules_bd_a": ["q_proj"], "nblocks": 2}),
    ("kasa_config", {}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}-{value}" for name, value in REFUSED])
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES), **{name: value})
    with pytest.raises(AdapterError, match=rf"got .*{name}=.*plain LoRA or rsLoRA"):
        load_adapter(folder, DIMS.specs())


def test_everything_refused_is_named_at_once(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES), use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"use_dora=True") as caught:
        load_adapter(folder, DIMS.specs())
    caught.match(r"modules_to_save=\['lm_head'\]")


def misshapen(module: str, a: tuple[int, int], b: tuple[int, int]) -> Tensors:
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


WRONG: dict[str, tuple[Tensors, str]] = {
    "no tensor": ({}, "no LoRA tensor"),
    "unknown tensor": ({f"{EXPERTS}.0.up_proj.scale": torch.ones(1)}, r"experts\.0\.up_proj\.scale in adapter_model"),
    "magnitude": ({f"{EXPERTS}.0.up_proj.lora_magnitude_vector": torch.ones(5)}, "magnitude_vector .*not a lora_A"),
    "embedding": ({"model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}, "lora_embedding_A .*not a lora_A"),
    "A without B": (
        {f"{EXPERTS}.0.up_proj.lora_A.weight": torch.ones(4, 8)},
        r"0\.up_proj\.lora_A\.weight .*counterpart",
    ),
    "B without A": ({f"{EXPERTS}.lora_B.weight": torch.ones(8, 12)}, r"experts\.lora_B\.weight .*counterpart"),
    "no such layer": (linear_lora("model.layers.7.mlp.experts.0.up_proj", 5, 8), "no routed experts in layer 7"),
    "no such layer, fused": (misshapen("model.layers.7.mlp.experts", (12, 5), (8, 12)), "no routed experts in layer 7"),
    "no such expert": (linear_lora(f"{EXPERTS}.3.up_proj", 5, 8), r"experts\.3\.up_proj .*experts 0 to 2"),
    "A of another K": (linear_lora(f"{EXPERTS}.1.up_proj", 5, 9), r"1\.up_proj in .*A \[4, 9\].*A \[r, 8\] and B \[5"),
    "B of another N": (linear_lora(f"{EXPERTS}.1.down_proj", 9, 5), r"1\.down_proj in .*B \[9, 4\].*B \[8, r\]"),
    "ranks that differ": (misshapen(f"{EXPERTS}.1.up_proj", (4, 8), (5, 3)), r"A \[4, 8\], B \[5, 3\]"),
    "fused of another K": (misshapen(EXPERTS, (12, 6), (8, 12)), r"down_proj in .*A \[12, 6\].*A \[3\*r, 5\]"),
    "fused of another N": (misshapen(EXPERTS, (12, 5), (9, 12)), r"down_proj in .*B \[9, 12\].*B \[8, r\*3\]"),
    "fused of other experts": (misshapen(EXPERTS, (16, 5), (8, 16)), r"down_proj in .*A \[16, 5\].*A \[3\*r, 5\]"),
    "fused of two ranks": (misshapen(EXPERTS, (12, 5), (8, 6)), r"down_proj in .*B \[8, 6\]"),
    "fused of no rank": (misshapen(EXPERTS, (2, 5), (8, 2)), r"down_proj in .*A \[2, 5\]"),
    "no rank": (linear_lora(f"{EXPERTS}.1.up_proj", 5, 8, rank=0), r"1\.up_proj\.lora_A.* got torch.float32 \[0, 8\]"),
    "no matrix": (
        {f"{EXPERTS}.1.up_proj.lora_{name}.weight": torch.ones(()) for name in "AB"},
        r"1\.up_proj\.lora_A.* got torch.float32 \[\], expected a matrix",
    ),
    "fused of three dimensions": (
        {f"{EXPERTS}.lora_A.weight": torch.ones(12, 5, 1), f"{EXPERTS}.lora_B.weight": torch.ones(8, 12, 1)},
        r"experts\.lora_A.* got torch.float32 \[12, 5, 1\]",
    ),
    "integers": (
        {key: tensor.int() for key, tensor in linear_lora(f"{EXPERTS}.1.up_proj", 5, 8).items()},
        r"1\.up_proj\.lora_A.* got torch.int32 \[4, 8\], expected .*float",
    ),
    "float8": (
        {key: tensor.to(torch.float8_e4m3fn) for key, tensor in linear_lora(f"{EXPERTS}.1.up_proj", 5, 8).items()},
        r"1\.up_proj\.lora_A.* got torch.float8_e4m3fn \[4, 8\]",
    ),
    **{
        f"{value} in {factor} of {module}": (
            {key: t * value if f"lora_{factor}" in key else t for key, t in linear_lora(name, n, 8).items()},
            rf"{module}\.lora_{factor}.* got values that are not finite",
        )
        for value, factor, module, name, n in (
            (math.nan, "A", "up_proj", f"{EXPERTS}.1.up_proj", 5),
            (math.inf, "B", "q_proj", "model.layers.0.self_attn.q_proj", 16),
        )
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(tmp_path: Path, case: str) -> None:
    tensors, match = WRONG[case]
    good = {} if case == "no tensor" else linear_lora("model.layers.1.mlp.experts.0.up_proj", 5, 8)
    folder = write_adapter(tmp_path / "a", good | tensors, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(AdapterError, match=match):
        load_adapter(folder, DIMS.specs())


@pytest.mark.parametrize("targets", [None, [], ["mlp.experts.other"]])
def test_fused_tensors_that_no_target_names(tmp_path: Path, targets: list[str] | None) -> None:
    folder = write_adapter(tmp_path / "a", fused_lora(DIMS), target_parameters=targets)
    with pytest.raises(AdapterError, match=r"target_parameters .*gate_up_proj, down_proj or both.*adapter_config"):
        load_adapter(folder, DIMS.specs())


def test_an_inner_wrapper_needs_two_targets(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", fused_lora(DIMS), target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(AdapterError, match=r"experts\.base_layer with target_parameters"):
        load_adapter(folder, DIMS.specs())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(AdapterError, match=rf"{tmp_path / 'a'}: got .*{CONFIG} and {WEIGHTS}"):
        load_adapter(folder, DIMS.specs())


def test_another_method_than_lora(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", expert_lora(DIMS, NAMES))
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["x"]}))
    with pytest.raises(AdapterError, match="LOHA"):
        load_adapter(folder, DIMS.specs())
