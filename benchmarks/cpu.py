"""Time and memory of the experts of one layer on a CPU: the cpu backend beside the reference.

`python -m benchmarks.cpu --out DIR` prints the rows and writes DIR/cpu.csv. Weights are random, int4 in groups of 128,
of the shape of Qwen3-30B-A3B with fewer experts. Backends take turns, so that a busy machine slows both.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.moe_case import SHAPES, random_info
from benchmarks.record import provenance, write_rows
from quant_moelora.layer import MoEExperts

BACKENDS = ("reference", "cpu")
COLUMNS = ("who", "dtype", "bits", "experts", "tokens", "ms_median", "packed_bytes", "resident_bytes", "speedup")


def resident_bytes(module: MoEExperts) -> int:
    """Of all tensors that stay between forwards: the weights, what was prepared, and the buffers."""
    prepared, workspace = module._prepared, module._workspace
    assert prepared is not None and workspace is not None  # a forward has been
    return module.info.nbytes + sum(tensor.nbytes for tensor in prepared.tensors.values()) + workspace.nbytes


def medians(
    modules: Sequence[MoEExperts],
    x: Tensor,  # (M, H)
    ids: Sequence[Tensor],  # of (M, k) int64, one for each turn
    weights: Tensor,  # (M, k) float32
) -> list[float]:
    """Median milliseconds of each module, after one forward that is not counted."""
    taken: list[list[float]] = [[] for _ in modules]
    for turn in ids:
        for module, times in zip(modules, taken, strict=True):
            start = time.perf_counter()
            module(x, turn, weights)
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times[1:]) for times in taken]


def measure(
    experts: int, bits: int, dtype: torch.dtype, tokens: Sequence[int], repeats: int
) -> Iterator[dict[str, object]]:
    """Rows of one layer."""
    shape = replace(SHAPES["qwen3-30b-a3b"], experts=experts)
    info = random_info(shape, bits, "cpu")
    modules = [MoEExperts(info, name) for name in BACKENDS]
    for count in tokens:
        x = torch.randn(count, shape.hidden).to(dtype)
        weights = torch.rand(count, shape.top_k)
        ids = [torch.rand(count, experts).topk(shape.top_k).indices for _ in range(repeats + 1)]
        times = medians(modules, x, ids, weights)
        for name, module, taken in zip(BACKENDS, modules, times, strict=True):
            facts = {"who": name, "dtype": str(dtype).removeprefix("torch."), "bits": bits, "experts": experts}
            held = {"packed_bytes": info.nbytes, "resident_bytes": resident_bytes(module)}
            speed = {"ms_median": f"{taken:.2f}", "speedup": f"{times[0] / taken:.2f}"}
            yield {**facts, "tokens": count, **speed, **held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(4, 8))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    def rows() -> Iterator[dict[str, object]]:
        print(",".join(COLUMNS))
        for bits in args.bits:
            for dtype in args.dtype:
                for row in measure(args.experts, bits, getattr(torch, dtype), args.tokens, args.repeats):
                    print(",".join(str(row[column]) for column in COLUMNS), flush=True)
                    yield row

    with torch.inference_mode():
        write_rows(args.out / "cpu.csv", provenance("cpu", args.commit), COLUMNS, rows())


if __name__ == "__main__":
    main()
