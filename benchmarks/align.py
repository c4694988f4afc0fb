"""Time of the sort of the pairs, beside torch's sorts.

`python -m benchmarks.align --out DIR` writes DIR/align-h200.csv (or as --name says). A graph goes through several
random routings, each aligned in its turn; graphs of all candidates take turns, round by round. Times are those of one
align in a graph of nothing else, p20, p50 and p80 of the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton

from benchmarks.record import provenance, write_rows
from quant_moelora.core.routing import Routing
from quant_moelora.kernels.align import launch, reference
from quant_moelora.kernels.common.timing import graph_of, quantile, take_turns
from quant_moelora.kernels.grouped_gemm.config import tile_rows

SHAPES = ((128, 8), (8, 2), (256, 8))  # experts, k
ROUTINGS = 16  # of one graph
COLUMNS = "experts top_k m slots tile_rows who p20_us p50_us p80_us".split()

Align = Callable[[Routing, int, int], object]
CANDIDATES: Mapping[str, Align] = {
    "ours": launch.align,
    "torch": lambda routing, experts, height: reference.align(routing, experts),
}


def random_routing(tokens: int, experts: int, top_k: int, slots: int) -> Routing:
    """Experts drawn evenly, without one twice for a token, as torch.topk gives them; adapters drawn evenly, if any."""
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    given = torch.randint(-1, slots, (tokens,), dtype=torch.int32, device="cuda") if slots else None
    return Routing(ids, torch.ones(ids.shape, device="cuda"), given)


def measure(
    experts: int, top_k: int, tokens: int, slots: int, rounds: int, candidates: Mapping[str, Align]
) -> Iterator[dict[str, object]]:
    """Rows of all candidates for one size."""
    height = tile_rows(tokens * top_k, experts, torch.cuda.get_device_capability())
    routings = [random_routing(tokens, experts, top_k, slots) for _ in range(ROUTINGS)]
    graphs = [
        graph_of([lambda align=align, routing=routing: align(routing, experts, height) for routing in routings])
        for align in candidates.values()
    ]
    for who, times in zip(candidates, take_turns([graph.replay for graph in graphs], rounds), strict=True):
        low, middle, high = (f"{quantile(times, part) / ROUTINGS:.2f}" for part in (0.2, 0.5, 0.8))
        row = (experts, top_k, tokens, slots, height, who, low, middle, high)
        print(*row, flush=True)
        yield dict(zip(COLUMNS, row, strict=True))


def main(arguments: Sequence[str] | None = None, candidates: Mapping[str, Align] = CANDIDATES) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, nargs="*", default=[1, 16, 256, 4096], help="numbers of tokens")
    parser.add_argument("--slots", type=int, nargs="*", default=[0, 8, 1024], help="adapters; 0 for no slots")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="align-h200.csv")
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    def rows() -> Iterator[dict[str, object]]:
        with torch.inference_mode():
            for experts, top_k in SHAPES:
                for tokens in args.m:
                    for slots in args.slots:
                        yield from measure(experts, top_k, tokens, slots, args.rounds, candidates)

    write_rows(args.out / args.name, provenance("cuda", args.commit, triton=triton.__version__), COLUMNS, rows())


if __name__ == "__main__":
    main()
