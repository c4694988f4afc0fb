"""The grouped GEMM against float64, row by row: every way to read x, to cut the work and to end it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.grouped_gemm import launch
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import Tile
from tests import builders
from tests.builders import BuiltWeight, move, packed, roundoff, routing, scheme
from tests.launched.cases import (
    DEVICE,
    DTYPES,
    EACH_DTYPE,
    FROBENIUS,
    INTERPRETED,
    MARKS,
    crossed,
    held_values,
    label,
    pairwise,
    poison,
    prepared,
)

pytestmark = MARKS
EXPERTS = 3
# How x is read: rows of tokens, sorted rows, pairs as they come (of tokens or not), copies for each half.
Mode = Literal["gather", "sorted", "direct tokens", "direct pairs", "by half"]
MODES: tuple[Mode, ...] = ("gather", "sorted", "direct tokens", "direct pairs", "by half")
LOWEST = Tile(16, 64, 64, stages=2)


@dataclass(frozen=True)
class Product:
    """A launch's output, and which pair is in which of its rows."""

    out: Tensor  # (P, columns), parts summed in their order
    pairs: list[int]


def run(
    built: BuiltWeight,
    x: Tensor,  # (M, columns) in the dtype to compute in; (P, columns), by pair, where rows are not those of tokens
    case: Routing,
    mode: Mode,
    tile: Tile,
    *,
    columns: int | None = None,
    activation: Activation | None = None,
) -> Product:
    """Launch into a poisoned output with ``columns``, by default all that are stored."""
    weight, columns = built.weight, columns or built.weight.rows
    top_k = case.top_k if mode in ("gather", "direct tokens") else None
    plan, tiles = align(move(case, DEVICE), EXPERTS, tile.bm)
    rows: Tensor | None = plan.rows
    pairs = plan.rows.tolist()
    if mode in ("direct tokens", "direct pairs"):
        rows, tiles, pairs = None, case.topk_ids.flatten().to(DEVICE), list(range(case.num_pairs))
    elif mode == "sorted":
        x = x[pairs]
    elif mode == "by half":
        x = in_stored_order(built, x, case, pairs)
    shape = (case.num_pairs, columns)
    out = poison(*shape, dtype=x.dtype) if tile.split == 1 else poison(tile.split, *shape, dtype=torch.float32)
    made = prepared(weight.to(DEVICE), x.dtype)
    returned = grouped_gemm(x.to(DEVICE), made, tiles, rows, top_k, out, tile, activation, plain=INTERPRETED)
    assert returned is out
    return Product((out if tile.split == 1 else out.sum(0)).cpu(), pairs)


def in_stored_order(built: BuiltWeight, x: Tensor, case: Routing, pairs: list[int]) -> Tensor:  # (halves, P, k_pad)
    """Each row's columns where k_perm has them, and NaN for a row without an expert, which nobody writes."""
    weight = built.weight
    assert weight.k_perm is not None
    copies = torch.full((weight.halves, len(pairs), weight.k_pad), torch.nan, dtype=x.dtype)
    for row, pair in enumerate(pairs):
        expert = int(case.topk_ids.flatten()[pair])
        if 0 <= expert < EXPERTS:
            for half in range(weight.halves):
                source = weight.k_perm[expert, half].long()
                copies[half, row] = torch.where(source >= 0, x[pair, source.clamp(min=0)], 0)
    return copies


def check(built: BuiltWeight, x: Tensor, case: Routing, mode: Mode, product: Product) -> None:
    """Every row against float64; padding 0; rows without an expert as they were."""
    weight, out = built.weight, product.out
    values = held_values(weight, x.dtype)
    stride = weight.n_pad if out.shape[1] == weight.rows else out.shape[1]
    for row, pair in enumerate(product.pairs):
        expert = int(case.topk_ids.flatten()[pair])
        if not 0 <= expert < EXPERTS:
            assert out[row].isnan().all()
            continue
        source = x[pair // case.top_k if mode in ("gather", "direct tokens") else pair, : weight.k].double()
        for half in range(weight.halves):
            products = values[expert, half] * source
            want = products.sum(1) + built.bias[expert, half]
            # k + 1 float32 sums of partial sums below the sum of sizes (of a matrix unit, which may round them all in
            # one direction, so 2 units each), and the rounding of the output.
            size = products.abs().sum(1) + built.bias[expert, half].abs()
            bound = 2 * (weight.k + 1) * roundoff(torch.float32) * size + 1.01 * roundoff(out.dtype) * want.abs()
            found = out[row, half * stride : (half + 1) * stride].double()
            assert ((found[: weight.n] - want).abs() <= bound + 2.0**-25).all()
            assert (found[weight.n :] == 0).all()


def inputs(case: Routing, mode: Mode, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of tokens, or of pairs."""
    return torch.randn(case.num_tokens if mode in ("gather", "direct tokens") else case.num_pairs, k).to(dtype)


WEIGHTS = pairwise(
    {
        "bits": [4, 8],
        "symmetric": [True, False],
        "group": [16, 32, 48, 64, 128, 192, None],
        "k": [64, 72, 192],  # one tile, a short last group and padding, an odd number of tiles
        "bias": [False, True],
        "bn": [64, 128],
        "dtype": DTYPES,
    }
)


@pytest.mark.parametrize("chosen", WEIGHTS, ids=label)
def test_every_kind_of_weight(chosen: dict[str, Any]) -> None:
    quant = scheme(chosen["bits"], chosen["group"], chosen["symmetric"])
    built = packed(quant, experts=EXPERTS, halves=2, n=60, k=chosen["k"], bias=chosen["bias"])
    case = routing(11, 2, EXPERTS)
    x = inputs(case, "gather", chosen["k"], chosen["dtype"])
    step = 128 if built.weight.k_pad % 128 == 0 else 64
    check(built, x, case, "gather", run(built, x, case, "gather", Tile(16, chosen["bn"], step)))


@crossed(mode=MODES, ids=[torch.int32, torch.int64], bits=[4, 8], dtype=DTYPES)
def test_every_way_to_read_x(mode: Mode, ids: torch.dtype, bits: int, dtype: torch.dtype) -> None:
    built = packed(scheme(bits, 32), experts=EXPERTS, halves=2, n=40, k=100, act_order=mode == "by half", bias=True)
    case = routing(7, 2, EXPERTS)
    case = Routing(case.topk_ids.to(ids), case.topk_weights)
    x = inputs(case, mode, 100, dtype)
    check(built, x, case, mode, run(built, x, case, mode, LOWEST))


@EACH_DTYPE
@pytest.mark.parametrize("stored", [False, True], ids=["logical columns", "stored columns"])
def test_columns_of_x(stored: bool, dtype: torch.dtype) -> None:
    """x has the logical columns, or all stored ones with zeros; what stands behind its rows is not read."""
    built = packed(scheme(4, 32), experts=EXPERTS, k=72)
    case = routing(6, 2, EXPERTS)
    width = built.weight.k_pad if stored else 72
    x = torch.zeros(6, built.weight.k_pad, dtype=dtype)
    x[:, :72] = torch.randn(6, 72)
    x[:, width:] = torch.nan
    check(built, x, case, "gather", run(built, x[:, :width], case, "gather", LOWEST))


@EACH_DTYPE
@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("mode", ["sorted", "direct pairs"])
def test_an_output_without_padding(mode: Mode, bn: int, dtype: torch.dtype) -> None:
    """w2 writes into [P, H] with H no multiple of 64: past a row stands the next one."""
    built = packed(scheme(4, 64), experts=EXPERTS, n=72, k=64, n_pad=128, bias=True)
    case = routing(9, 2, EXPERTS)
    x = inputs(case, mode, 64, dtype)
    check(built, x, case, mode, run(built, x, case, mode, Tile(16, bn, 64), columns=72))


@EACH_DTYPE
@pytest.mark.parametrize("mode", ["gather", "direct pairs"])
@pytest.mark.parametrize("split", [2, 4])
def test_partial_sums(split: int, mode: Mode, dtype: torch.dtype) -> None:
    """Their sum is the product, and a bias is in it once."""
    built = packed(scheme(4, 64, symmetric=False), experts=EXPERTS, n=60, k=256, bias=True)
    case = routing(5, 2, EXPERTS)
    x = inputs(case, mode, 256, dtype)
    check(built, x, case, mode, run(built, x, case, mode, Tile(16, 64, 64, split=split)))


def with_counts(*counts: int) -> Routing:
    """A routing whose experts have so many pairs, in a random order."""
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    return Routing(ids[torch.randperm(len(ids))][:, None], torch.ones(len(ids), 1))


# Rows of an expert at both ends of every height that a tile can take: 16 to 128, with mixed ones, and 192.
HEIGHTS = [(1, 16, 17), (32, 33, 48), (49, 64, 65), (80, 81, 96), (97, 112, 113), (128, 129, 0), (160, 192, 193)]


@crossed(
    counts=HEIGHTS,
    bm_mixed=[(16, False), (32, False), (64, False), (64, True), (128, False), (128, True), (192, True)],
    mode=["gather", "sorted"],
    dtype=DTYPES,
)
def test_every_height(counts: tuple[int, ...], bm_mixed: tuple[int, bool], mode: Mode, dtype: torch.dtype) -> None:
    bm, mixed = bm_mixed
    built = packed(scheme(4, 64), experts=EXPERTS, n=64, k=72)
    case = with_counts(*counts)
    x = inputs(case, mode, 72, dtype)
    check(built, x, case, mode, run(built, x, case, mode, Tile(bm, 64, 64, mixed=mixed)))


@EACH_DTYPE
@pytest.mark.parametrize("bn", [64, 128])
@pytest.mark.parametrize("counts", [(17, 32, 33), (48, 49, 64)], ids=str)
def test_heights_in_two_products(
    counts: tuple[int, ...], bn: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU whose matrix instructions read x from registers gets it."""
    monkeypatch.setattr(launch, "capability", lambda _: (8, 0))
    built = packed(scheme(4, 64, symmetric=False), experts=EXPERTS, n=128, k=72)
    case = with_counts(*counts)
    x = inputs(case, "gather", 72, dtype)
    check(built, x, case, "gather", run(built, x, case, "gather", Tile(64, bn, 64, mixed=True, group_m=2)))


@EACH_DTYPE
@pytest.mark.parametrize("group_m", [1, 2, 4])
def test_every_tile_is_swept_once(group_m: int, dtype: torch.dtype) -> None:
    """Row tiles that are no multiple of the group, and several column tiles."""
    built = packed(scheme(4, 64), experts=EXPERTS, n=192, k=64)
    case = with_counts(20, 40, 10)
    x = inputs(case, "gather", 64, dtype)
    check(built, x, case, "gather", run(built, x, case, "gather", Tile(16, 64, 64, group_m=group_m)))


@crossed(
    activation=[
        Activation("silu"),
        Activation("gelu"),
        Activation("gelu_tanh"),
        Activation("relu2"),
        Activation("swigluoai", alpha=1.702, limit=1.0),
    ],
    bits=[4, 8],
    mode=["gather", "direct tokens"],
    dtype=DTYPES,
)
def test_the_activation_of_a_tile(activation: Activation, bits: int, mode: Mode, dtype: torch.dtype) -> None:
    """Two tiles of gate with their two of up; gate and up are rounded before, as if they had been stored."""
    built = packed(scheme(bits, 64), experts=EXPERTS, halves=2, n=100, k=64, bias=True)
    case = routing(9, 2, EXPERTS)
    x = inputs(case, mode, 64, dtype)
    product = run(built, x, case, mode, Tile(16, 128, 64), columns=128, activation=activation)
    values = held_values(built.weight, dtype)
    for row, pair in enumerate(product.pairs):
        expert = int(case.topk_ids.flatten()[pair])
        if not 0 <= expert < EXPERTS:
            assert product.out[row].isnan().all()
            continue
        gate, up = (values[expert] @ x[pair // 2].double() + built.bias[expert]).to(dtype).double()
        want = builders.activate(activation, gate, up)
        error = product.out[row, :100].double() - want
        # One rounding, and where a float32 sum fell to the other side, one of gate or up.
        assert float(error.norm()) <= FROBENIUS[dtype] * float(want.norm())
        # Weights and bias of padded rows are 0, and so is every activation of 0 but the clamped one: 0 * (0 + 1).
        assert (product.out[row, 100:] == 0).all()


@pytest.mark.gpu
@EACH_DTYPE
def test_rows_more_than_2_to_the_31_apart(dtype: torch.dtype) -> None:
    built = packed(scheme(4, 64), experts=EXPERTS, n=64, k=64)
    memory = torch.zeros(2**31 + 64, dtype=dtype, device=DEVICE)
    x = memory.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    case = routing(3, 2, EXPERTS, holes=False)
    plan, tiles = align(move(case, DEVICE), EXPERTS, 16)
    out, weight = poison(6, 64, dtype=dtype), built.weight.to(DEVICE)
    grouped_gemm(x, prepared(weight, dtype), tiles, plan.rows, 2, out, LOWEST)
    check(built, x.cpu(), case, "gather", Product(out.cpu(), plan.rows.tolist()))
