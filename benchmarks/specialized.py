"""Both GEMMs of a layer by the plain kernel and by the specialised one, on one sm_90.

    python -m benchmarks.specialized [--shapes mixtral-8x7b,..] [--tokens 1024,4096] [--bits 4,8]

One routing, weights from memory, the median of rounds in which all take turns; each result is compared bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from benchmarks.moe_case import SHAPES, Shape, random_info
from quant_moelora.core.activations import Activation
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.common.timing import graph_of, take_turns
from quant_moelora.kernels.dequant.prepare import prepare
from quant_moelora.kernels.grouped_gemm.config import choose_tile, tile_rows
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.specialized.config import specialized_tile

_PLAIN = (10, 0)  # a GPU with the same tiles, but without the specialised kernel


def tiles_of(shape: Shape, pairs: int, bits: int) -> dict[str, tuple[Tile, Tile]]:
    """Tiles of w13 with its activation and of w2, by what they are called."""

    def plain(n: int, k: int, fused: bool) -> Tile:
        tile = choose_tile(pairs, shape.experts, n, k, bits, _PLAIN, fused=fused, halves_apart=False)
        if tile.bm == tile_rows(pairs, shape.experts, _PLAIN) >= 64:
            return tile
        return Tile(128, 128, 64, stages=4, mixed=True, group_m=2)

    found = {"plain": (plain(2 * shape.inter, shape.hidden, True), plain(shape.hidden, shape.inter, False))}
    for bm in (128, 192):
        for group_m in (2, 6):
            tile = replace(specialized_tile(bm), group_m=group_m)
            found[f"{tile.consumers} x {bm}, group_m {group_m}"] = (tile, tile)
    return found


def compare(name: str, tokens: int, bits: int, rounds: int) -> None:
    """Print a line for each tile."""
    shape, silu = SHAPES[name], Activation("silu")
    pairs = tokens * shape.top_k
    info = random_info(shape, bits, "cuda")
    w13, w2 = info.w13, info.w2
    assert isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight)
    p13, p2 = prepare(w13, torch.bfloat16)[0], prepare(w2, torch.bfloat16)[0]
    x = torch.randn(tokens, shape.hidden, device="cuda").to(torch.bfloat16)
    h = torch.randn(pairs, shape.inter, device="cuda").to(torch.bfloat16)
    ids = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k).indices.to(torch.int32)
    routing = Routing(ids, torch.ones(tokens, shape.top_k, device="cuda"))
    outs = [torch.empty(pairs, n, dtype=torch.bfloat16, device="cuda") for n in (w13.n_pad, shape.hidden)]
    wants: list[torch.Tensor] = []
    calls: dict[str, list[Callable[[], object]]] = {}
    for what, (t13, t2) in tiles_of(shape, pairs, bits).items():
        plan, tiles = align(routing, shape.experts, t13.bm)
        one = (x, p13, tiles, plan.rows, shape.top_k, outs[0], t13, silu)
        two = (h, p2, tiles, plan.rows, None, outs[1], t2)
        calls[what] = [lambda a=one: grouped_gemm(*a), lambda a=two: grouped_gemm(*a)]
    with ThreadPoolExecutor() as pool:  # compiles side by side
        list(pool.map(lambda call: call(), [call for both in calls.values() for call in both]))
    torch.cuda.synchronize()
    for what, both in calls.items():
        for out, call in zip(outs, both, strict=True):
            out.fill_(torch.nan)
            call()
        wants = wants or [out.clone() for out in outs]
        assert all(map(torch.equal, outs, wants)), f"{what}: other bits than plain"
    graphs = [graph_of([call] * 2).replay for both in calls.values() for call in both]
    times = [statistics.median(own) / 2 for own in take_turns(graphs, rounds)]
    base = times[0] + times[1]
    for what, one_us, two_us in zip(calls, times[::2], times[1::2], strict=True):
        whole = one_us + two_us
        print(f"{name} M={tokens} int{bits} {what:18} {one_us:8.1f} + {two_us:8.1f} us, {base / whole:.2f} of plain")


def main() -> None:
    """Compare all that is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for bits in map(int, asked.bits.split(",")):
            for name in asked.shapes.split(","):
                for tokens in map(int, asked.tokens.split(",")):
                    compare(name, tokens, bits, asked.rounds)


if __name__ == "__main__":
    main()
