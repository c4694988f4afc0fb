"""GemmSpec: everything that a compiled grouped GEMM is specialised on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a grouped GEMM is cut.

    Attributes:
        bm: most rows of x in a tile, a power of two from 16 on, or 192. A tile with fewer rows takes the least height
            that holds them: bm, bm/2, .. 16, and with ``mixed`` also one of these and a smaller one together.
        bn: rows of the weight in a tile, 64, 128 or 256; 64 a consumer.
        bk: columns of the weight in a step, 64 or 128.
        warps: warps of a program; of one consumer.
        stages: steps whose loads are in flight.
        mixed: whether there are heights between powers of two (48 of 64; 80 and 96 of 128).
        split: programs that share the columns of a tile; more than one leave partial sums.
        registers: most registers of a thread, so that more programs fit; None for what the compiler takes.
        group_m: row tiles that sweep over the weight together, so that they find it in L2.
        consumers: warpgroups that multiply in a block of the kernel in `specialized`, which has its own heights and a
            bm of 32, 64, 128 or 192; 0 for the plain kernel.
    """

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 4
    mixed: bool = False
    split: int = 1
    registers: int | None = None
    group_m: int = 1
    consumers: int = 0

    @property
    def overlaps(self) -> bool:
        """Whether a launch during the kernel before pays: with 32 rows 10 % was lost (benchmarks/NOTES.md)."""
        return self.bm == 16


def uses_mma_sync(capability: tuple[int, int]) -> bool:
    """Whether Triton multiplies by mma.sync, from registers: on all but sm_90 (wgmma) and sm_100 (tcgen05)."""
    return capability[0] not in {9, 10}


@dataclass(frozen=True)
class GemmSpec:
    """A tile and a weight, as the kernel sees them. All members are compile-time constants of the kernel.

    Attributes:
        tile: how it is cut.
        n: stored rows of the weight, all halves.
        k: stored columns.
        x_columns: columns that x has, at most k.
        n_out: columns of the output that are written: n, or fewer for a weight whose output has no padding.
        half_rows: stored rows of one half.
        bits: 4 or 8.
        group: stored columns that share a scale: 16, 32, 64, a multiple of 128, or k.
        zeros: whether there are zero points.
        one_step: whether a weight is one FMA of its code (symmetric, bfloat16), and not a difference and a product.
        fp16: whether x and the output are float16, and not bfloat16.
        has_bias: whether there is a bias.
        has_post: whether the sums are multiplied with a power of two of the expert.
        by_half: whether x has a copy of its sorted rows for each half, in the order of that half's columns (act-order).
        gather: whether rows of x are those of the tokens, and not in sorted order.
        direct: whether each pair is a tile of its own, with its expert read from the router's ids.
        activation: name of the activation that is applied to the tile of gate and up; empty for none.
        alpha: of the activation, if it has one.
        limit: of the activation, if it has one.
        wide: whether offsets into x need 64 bits.
        mma_sync: whether matrix instructions read x from registers; see `uses_mma_sync`.
        overlap: whether the kernel may be launched while the one before still runs.
        plain: whether codes are converted by plain arithmetic, for the interpreter, which knows no inline assembly.
    """

    tile: Tile
    n: int
    k: int
    x_columns: int
    n_out: int
    half_rows: int
    bits: int
    group: int
    zeros: bool
    one_step: bool
    fp16: bool
    has_bias: bool
    has_post: bool
    by_half: bool
    gather: bool
    direct: bool
    activation: str
    alpha: float
    limit: float
    wide: bool
    mma_sync: bool
    overlap: bool
    plain: bool
