"""What the benchmark of the experts says of its figures: floors, errors, the rival's input, the table."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import moe_ours, moe_report, rivals
from benchmarks.moe_case import DENSE_BITS, SHAPES, Case, Roofs, Shape, random_info, relative_error
from quant_moelora.core.weights import DenseWeight, PackedWeight
from quant_moelora.kernels.grouped_gemm.spec import Tile

SMALL = Shape(experts=8, top_k=2, hidden=256, inter=128)


def small_weight(bits: int) -> PackedWeight:
    weight = random_info(SMALL, bits, "cpu").w2
    assert isinstance(weight, PackedWeight)
    return weight


def small_routing(tokens: int) -> torch.Tensor:
    return torch.stack([torch.randperm(8)[:2] for _ in range(tokens)]).to(torch.int32)


# Bytes of an expert by hand: 3 H I (1/2 + 2/128) at 4.3 TB/s; 2 M k 3 H I at 790 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "tokens", "active", "floor"),
    [
        ("mixtral-8x7b", 1, 2, 2 * 3 * 4096 * 14336 * 0.515625 / 4.3e6),
        ("mixtral-8x7b", 4096, 8, 2 * 4096 * 2 * 3 * 4096 * 14336 / 790e6),
    ],
)
def test_floor(name: str, tokens: int, active: int, floor: float) -> None:
    assert Roofs().floor_us(SHAPES[name], 4, tokens, active) == pytest.approx(floor)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_use_all_codes_but_the_least(bits: int) -> None:
    codes, _ = small_weight(bits).codes_and_scales()
    assert codes.unique().tolist() == list(range(1, 2**bits))


def test_every_copy_is_launched_equally_often_and_every_routing_occurs() -> None:
    routings = tuple(small_routing(3) for _ in range(4))
    case = Case(SMALL, 4, torch.zeros(3, 256), routings, torch.ones(3, 2))
    launches = case.launches(3)
    assert [copy for copy, _ in launches] == [0, 1, 2, 0, 1, 2]
    assert {id(ids) for _, ids in launches} == {id(ids) for ids in routings}


def test_error_is_zero_for_the_product_and_one_for_nothing() -> None:
    weight, experts = small_weight(4), torch.tensor([1, 5, 1])
    x = torch.randn(3, 128)
    exact = torch.einsum("pk,pnk->pn", x.double(), weight.dequantize()[:, 0][experts].double())
    assert relative_error(exact, x, experts, weight) < 1e-12  # float64 sums of 128 in another order
    assert relative_error(torch.zeros_like(exact), x, experts, weight) == pytest.approx(1.0)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("bits", [8, DENSE_BITS])
def test_a_recorded_launch_knows_its_rows(bits: int, sort: bool, gather: bool) -> None:
    weight, ids = random_info(SMALL, bits, "cpu").w2, small_routing(5)
    order = ids.flatten().argsort(stable=True).to(torch.int32) if sort else torch.arange(10, dtype=torch.int32)
    x = torch.randn(5 if gather else 10, 128)
    rows = x[order.long() // 2] if gather else x
    exact = torch.einsum("pk,pnk->pn", rows, weight.dequantize()[:, 0][ids.flatten()[order.long()].long()])
    tiles, sorted_rows = (torch.zeros(9, 4, dtype=torch.int32), order) if sort else (ids.flatten(), None)
    out = torch.empty(10, 256)
    held = weight.w if isinstance(weight, DenseWeight) else None
    arguments = (x, held, tiles, sorted_rows, 2 if gather else None, out, Tile(16, 128, 64))
    launch = moe_ours.Launch(lambda *given: given[-2].copy_(exact), weight, arguments)
    assert launch.error(ids) < 1e-5  # float32 sums of 128


def test_blocks_hold_every_pair_once_with_its_expert() -> None:
    ids = small_routing(7)
    blocks = rivals._blocks(ids, 8, 4)
    filled = blocks["sorted_ids"].view(-1, 4)
    for row, expert in zip(filled.tolist(), blocks["expert_ids"].tolist(), strict=True):
        assert {int(ids.flatten()[pair]) for pair in row if pair < 14} == {expert}
    assert sorted(pair for pair in filled.flatten().tolist() if pair < 14) == list(range(14))
    assert int(blocks["num_tokens_padded"]) == filled.numel()


def test_table_takes_the_faster_form_and_leaves_failures_out(tmp_path: Path) -> None:
    some = {"gpu": "G", "torch": "2", "triton": "3", "humming": "1", "date": "d", "commit": "c", "read_tbps": "4"}
    some |= {"matmul_tflops": "800", "shape": "mixtral-8x7b", "bits": "4", "m": "16", "what": "gemms", "failed": ""}
    rows = [
        some | {"who": who, "p50_us": us, "floor_us": "100.0", "over_floor": "1.5", "failed": failed}
        for who, us, failed in (
            ("ours", "150.0", ""),
            ("humming", "220.0", ""),
            ("humming-sorted", "210.0", ""),
            ("torch", "", "failed: it did"),
        )
    ]
    path = tmp_path / "moe.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = moe_report.read([path])
    assert moe_report.table(found).splitlines()[-1] == "| mixtral-8x7b | 4 | 16 | 100 | 150 | 210 | 1.50 | 241 |"
    assert moe_report.speedups(found, 4) == [
        "int4 g128 against Humming GEMMs: 1.40 times as fast, 1.40 at the worst (mixtral-8x7b M=16)"
    ]
