"""The roofs that a figure is held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.moe_case import Roofs
from quant_moelora.kernels.common.timing import take_turns


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    values = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + pid, tl.sum(values, 0))


def measured_roofs(rounds: int = 20) -> Roofs:
    """Rates of reading 4 GiB and of a dense bfloat16 product of 8192 x 8192 x 8192 random values."""
    x = torch.zeros(2**30, dtype=torch.int32, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    blocks = (4096, 8192)
    out = torch.empty(x.numel() // min(blocks), dtype=torch.int32, device="cuda")
    work: list[Callable[[], object]] = [
        lambda size=size: _read_kernel[(x.numel() // size,)](x, out, BLOCK=size) for size in blocks
    ]
    *reads, product = take_turns([*work, lambda: a @ b], rounds)
    read_us, product_us = min(map(statistics.median, reads)), statistics.median(product)
    return Roofs(x.nbytes / read_us / 1e6, 2 * 8192**3 / product_us / 1e6)
