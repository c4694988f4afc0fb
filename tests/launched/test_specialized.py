"""The grouped GEMM for many rows: the bits of the plain kernel, whatever it is given. It has no interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.specialized.config import serves, specialized_tile
from tests.builders import BuiltWeight, packed, routing, same_bits, scheme
from tests.launched.cases import DEVICE, DTYPES, check_sanitized, label, pairwise, poison, prepared
from tests.launched.test_grouped_gemm import EXPERTS, Mode, inputs, run, with_counts

pytestmark = pytest.mark.gpu
# Rows of an expert at both ends of every height, none, and more than a tile.
COUNTS = (
    (0, 1, 15),
    (16, 17, 31),
    (32, 33, 63),
    (64, 65, 95),
    (96, 97, 127),
    (128, 129, 143),
    (144, 145, 159),
    (160, 161, 191),
    (192, 193, 0),
    (450, 0, 31),
)


@pytest.fixture(autouse=True)
def _on_hopper() -> Iterator[None]:
    if not serves(torch.cuda.get_device_capability(), halves_apart=False):
        pytest.skip("the kernel is for sm_90, and for Triton 3.6 to 3.9")
    with torch.no_grad():
        yield


def check(
    built: BuiltWeight,
    counts: tuple[int, ...],
    mode: Mode,
    dtype: torch.dtype,
    bm: int = 192,
    activation: Activation | None = None,
) -> None:
    """Compare with the plain kernel, whose tests compare it with float64."""
    weight = built.weight
    case = with_counts(*counts)
    x = inputs(case, mode, weight.k, dtype)
    columns = weight.rows if activation is None else weight.n_pad
    plain = Tile(64, 64 if activation is None else 128, 64, mixed=True)
    want = run(built, x, case, mode, plain, columns=columns, activation=activation)
    found = run(built, x, case, mode, specialized_tile(bm), columns=columns, activation=activation)
    assert found.pairs == want.pairs
    assert same_bits(found.out, want.out), (counts, (found.out != want.out).nonzero()[:4].tolist())


KINDS = pairwise(
    {
        "bits": [4, 8],
        "symmetric": [True, False],
        "group": [16, 32, 64, 128, 256, None],
        "activation": [None, Activation("silu"), Activation("swigluoai", alpha=1.702, limit=1.0)],
        "dtype": DTYPES,
        "mode": ["gather", "sorted"],
        "bias": [False, True],
        "bm": [128, 192],
        # One step; an odd number of them, with columns that x does not have; many.
        "k": [64, 312, 512],
    }
)


@pytest.mark.parametrize("chosen", KINDS, ids=label)
def test_every_kind_of_weight(chosen: dict[str, Any]) -> None:
    """4 units for 3 consumers, and 6 for 4."""
    quant = scheme(chosen["bits"], chosen["group"], chosen["symmetric"])
    built = packed(
        quant, experts=EXPERTS, halves=2, n=190 if chosen["bm"] == 128 else 100, k=chosen["k"], bias=chosen["bias"]
    )
    for counts in COUNTS:
        check(built, counts, chosen["mode"], chosen["dtype"], chosen["bm"], chosen["activation"])


@pytest.mark.parametrize("units", [1, 2, 3, 5, 6, 7])
def test_every_number_of_units(units: int) -> None:
    built = packed(scheme(4, 32), experts=EXPERTS, n=64 * units, k=128)
    check(built, (20, 0, 300), "sorted", torch.bfloat16)


def test_scales_of_which_a_power_of_two_is_put_off() -> None:
    built = packed(scheme(4, 32), experts=EXPERTS, n=64, k=64)
    scales = packing.unpack_pairs(built.weight.scales, torch.float16)
    built = replace(built, weight=replace(built.weight, scales=packing.pack_pairs(scales * 64)))
    assert prepared(built.weight, torch.bfloat16).post is not None
    check(built, (20, 0, 300), "gather", torch.bfloat16)


@pytest.mark.parametrize("columns", [70, 72])
def test_rows_that_begin_anywhere(columns: int) -> None:
    """What stands beside x's columns is not read."""
    built = packed(scheme(4, 32), experts=EXPERTS, n=64, k=columns)
    case = with_counts(20, 0, 300)
    memory = torch.full((320, 150), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    x = memory[:, 3 : 3 + columns]
    x.copy_(torch.randn(320, columns))
    plan, tiles = align(Routing(case.topk_ids.to(DEVICE), case.topk_weights.to(DEVICE)), EXPERTS, 192)
    out, weight = poison(320, 64, dtype=x.dtype), built.weight.to(DEVICE)
    grouped_gemm(x, prepared(weight, x.dtype), tiles, plan.rows, 1, out, specialized_tile(192))
    want = run(built, x.cpu(), case, "gather", Tile(64, 64, 64))
    assert same_bits(out, want.out)


def test_an_output_without_padding() -> None:
    """w2 writes into [P, H] with H no multiple of 64: past a row stands the next one."""
    built = packed(scheme(4, 64), experts=EXPERTS, n=100, k=128)
    case = with_counts(20, 0, 300)
    x = inputs(case, "sorted", 128, torch.bfloat16)
    found, want = (
        run(built, x, case, "sorted", tile, columns=100) for tile in (specialized_tile(192), Tile(64, 64, 64))
    )
    assert same_bits(found.out, want.out)


def test_pairs_without_an_expert_are_not_written() -> None:
    built = packed(scheme(4, 64), experts=EXPERTS, n=64, k=64)
    case = routing(300, 2, EXPERTS)
    x = inputs(case, "gather", 64, torch.bfloat16)
    found, want = (run(built, x, case, "gather", tile) for tile in (specialized_tile(192), Tile(64, 64, 64)))
    assert found.out.isnan().any() and same_bits(found.out, want.out)


def test_rows_more_than_2_to_the_31_apart() -> None:
    built = packed(scheme(4, 64), experts=EXPERTS, n=64, k=64)
    memory = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    case = Routing(torch.tensor([[0, 1], [2, 1], [2, 0]], device=DEVICE), torch.ones(3, 2, device=DEVICE))
    weight = built.weight.to(DEVICE)
    outs = [poison(6, 64, dtype=x.dtype) for _ in range(2)]
    for out, tile in zip(outs, (specialized_tile(192), Tile(16, 64, 64)), strict=True):
        plan, tiles = align(case, EXPERTS, tile.bm)
        grouped_gemm(x, prepared(weight, x.dtype), tiles, plan.rows, 2, out, tile)
    assert not outs[0].isnan().any() and same_bits(*outs)


@pytest.mark.parametrize("activation", [None, Activation("silu")], ids=["", "silu"])
@pytest.mark.parametrize("bm", [128, 192])
def test_the_same_bits_each_time(bm: int, activation: Activation | None) -> None:
    """More tiles than blocks, steps than stages, and heights in one launch, so that every wait has to be right."""
    built = packed(scheme(4, 128), experts=16, halves=2, n=640, k=1024)
    weight = built.weight.to(DEVICE)
    made = prepared(weight, torch.bfloat16)
    ids = (torch.randn(6000, 1, device=DEVICE).abs() * 6).to(torch.int32).clamp(max=15)
    x = torch.randn(6000, 1024, device=DEVICE).to(torch.bfloat16)
    columns = weight.rows if activation is None else weight.n_pad

    def product(tile: Tile) -> torch.Tensor:
        plan, tiles = align(Routing(ids, torch.ones(6000, 1, device=DEVICE)), 16, tile.bm)
        out = poison(6000, columns, dtype=x.dtype)
        return grouped_gemm(x, made, tiles, plan.rows, 1, out, tile, activation)

    want = product(Tile(128, 128, 64, mixed=True))
    assert not want.isnan().any()
    for _ in range(20):
        assert same_bits(product(specialized_tile(bm)), want)


def test_a_cuda_graph_follows_the_routing() -> None:
    """Captured once, with the list of its tiles, and replayed with other experts."""
    built = packed(scheme(4, 64), experts=8, n=320, k=256)
    weight = built.weight.to(DEVICE)
    made = prepared(weight, torch.bfloat16)
    x = torch.randn(900, 256, device=DEVICE).to(torch.bfloat16)
    ids, weights = torch.zeros(900, 2, dtype=torch.int32, device=DEVICE), torch.ones(900, 2, device=DEVICE)

    def product(tile: Tile) -> torch.Tensor:
        plan, tiles = align(Routing(ids, weights), 8, tile.bm)
        out = poison(1800, 320, dtype=x.dtype)
        return grouped_gemm(x, made, tiles, plan.rows, 2, out, tile)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        product(specialized_tile(192))  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(specialized_tile(192))
    for skew in (1, 2, 4, 8):
        ids.copy_(torch.randint(0, 8, (900, 2)) // skew * skew)
        graph.replay()
        assert same_bits(out, product(Tile(64, 64, 64)))


def small_products() -> None:
    """What the sanitizer watches."""
    torch.manual_seed(0)
    for bits, symmetric, activation in ((4, True, Activation("silu")), (8, False, None)):
        built = packed(scheme(bits, 32, symmetric), experts=EXPERTS, halves=2, n=100, k=312, bias=True)
        for counts in ((0, 17, 450), (97, 129, 145)):
            check(built, counts, "gather", torch.bfloat16, activation=activation)
    torch.cuda.synchronize()


@pytest.mark.slow
def test_the_sanitizer_finds_nothing() -> None:
    check_sanitized("memcheck", "tests.launched.test_specialized", "small_products")
