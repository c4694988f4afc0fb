"""What the LoRA benchmark says of its figures: bytes, pairs, floors, the adapters it makes, the table."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import lora_report
from benchmarks.lora_case import Adapters, active_pairs, floor_us
from benchmarks.moe_case import SHAPES, Case, Roofs, Shape, random_info
from quant_moelora.core.lora_context import A2, A13, B2, B13

SMALL = Shape(experts=8, top_k=2, hidden=256, inter=128)


def test_bytes_of_a_pair() -> None:
    """6 r (H + I): A and B of gate, up and down, two bytes each."""
    by_hand = 2 * 16 * (2 * (2048 + 768) + (768 + 2048))
    assert Adapters(1, 16).pair_bytes(SHAPES["qwen3-30b-a3b"]) == by_hand == 6 * 16 * (2048 + 768)


def test_adapters_stand_one_after_the_other() -> None:
    """Every factor has its place, none overlaps another, and nothing is left over."""
    ctx = Adapters(3, 4).context(random_info(SMALL, 4, "cpu"), "cpu")
    sizes = {A13: 2 * 4 * 256, B13: 2 * 4 * 128, A2: 4 * 128, B2: 4 * 256}
    places = sorted(
        (int(ctx.offsets[slot, which, expert]), size)
        for slot in range(3)
        for expert in range(8)
        for which, size in sizes.items()
    )
    ends = [0, *(begin + size for begin, size in places)]
    assert [begin for begin, _ in places] == ends[:-1] and ends[-1] == ctx.arena.numel()
    assert ctx.arena.numel() * ctx.arena.itemsize == 3 * 8 * Adapters(3, 4).pair_bytes(SMALL)
    assert ctx.arena.count_nonzero() > 0.99 * ctx.arena.numel() and ctx.max_rank == 4
    assert ctx.rank[:, 0, 0].tolist() == [4] * 3 + [0] * 5 and (ctx.offsets[3:] == -1).all()


def test_active_pairs_and_the_floor() -> None:
    routings = [torch.tensor([[0, 1], [0, 2], [1, 0]]), torch.tensor([[3, 4], [3, 4], [3, 4]])]
    slots = [torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])]
    assert active_pairs(routings, slots) == (4 + 4) / 2
    case = Case(SMALL, 4, torch.zeros(3, 256), tuple(routings), torch.ones(3, 2))
    base = Roofs().floor_us(SMALL, 4, 3, case.active)
    assert floor_us(Roofs(), case, Adapters(2, 16), 4) - base == pytest.approx(4 * 6 * 16 * (256 + 128) / 4.3e6)


def test_table(tmp_path: Path) -> None:
    some = {"gpu": "G", "torch": "2", "triton": "3", "date": "d", "commit": "c", "read_tbps": "4"}
    some |= {"matmul_tflops": "800", "shape": "qwen3-30b-a3b", "m": "16", "adapters": "8", "rank": "16"}
    rows = [
        some
        | {"who": who, "p50_us": us, "added_us": added, "added_part": part, "lora_floor_us": "7.5", "over_floor": o}
        for who, us, added, part, o in (("base", "64.0", "0", "0", "1.4"), ("lora", "80.0", "16.0", "0.25", "1.5"))
    ]
    path = tmp_path / "lora.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = lora_report.read(path)
    assert (
        lora_report.table(found).splitlines()[-1] == "| qwen3-30b-a3b | 16 | 8 | 64.0 | 80.0 | 25% | 7.5 | 1.50 | 140 |"
    )
    assert lora_report.against_vllm(found).endswith("1.75 times as fast, 1.75 at the worst (qwen3-30b-a3b M=16 A=8)")
