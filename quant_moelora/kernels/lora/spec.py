"""LoRASpec: everything that the LoRA kernels are specialised on, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from quant_moelora.core.routing import SEGMENT_ROWS

# Programs that run at a time, four on each of an H200's 132 multiprocessors; and those of the activation, twice as
# many, since fewer would leave some idle where there are few segments (benchmarks/NOTES.md, "LoRA").
_AT_A_TIME, _ACTIVATIONS = 528, 1056
_OF_AN_EXPERT = 2  # segments, as far as one can know without looking at the adapters, beside those that are full
# Columns of x that a program shrinks, below which what its part costs those that sum it up is more than it brings: with
# 512 instead of 256 Qwen3-30B-A3B at 8 tokens took 56.7 us, and 60.3.
_LEAST_COLUMNS = 512
# Columns of h at once, all of which each warp of the second shrink has in its registers, so that few are better; and
# columns of the second expand at once.
_ACTIVATION_BLOCK, EXPAND_BLOCK = 128, 128
# Pairs of an expert from which on the second expand is a launch of its own, and not beside a GEMM's low tiles, where
# fewer programs are better: two share the columns then (Qwen3-30B-A3B at 1024 tokens 308 us, and 319).
_ALONE = 64
_AHEAD_RANKS = 16  # most ranks whose factors of one block are loaded during the block before


@dataclass(frozen=True)
class Cut:
    """How the work on a segment is cut.

    Attributes:
        shrink_ranks: rows of A13 of a program of the first shrink.
        parts13: programs that share the columns of x.
        parts2: programs that share the columns of h, and parts of v = A2 h.
        expand_ranks: ranks that an expand, and the second shrink, take at once.
        activation_block: columns of h that are computed at once.
        expand_blocks: programs that share the columns of B2.
    """

    shrink_ranks: int
    parts13: int
    parts2: int
    expand_ranks: int
    activation_block: int
    expand_blocks: int


@dataclass(frozen=True)
class LoRASpec:
    """A layer, its adapters' bounds and how the work on a segment is cut. All members are compile-time constants.

    Attributes:
        num_experts: E.
        num_slots: slots of the context.
        top_k: k.
        direct: whether rows are pairs and each is a segment of its own.
        hidden: H, columns of A13.
        inter: I.
        inter_pad: columns of B13 and A2.
        gated: whether gate_up has a gate.
        activation: its name.
        alpha: of the activation, or 0.
        limit: of the activation, or 0.
        weighted: whether the router's weight multiplies gate_up.
        max_rank: columns of v = A2 h, and half of those of v = A13 x.
        own: place among the processes that share the rows of A13 and the columns of B2 (`MoELoRAContext`).
        sharers: how many these are.
        b2_columns: columns of B2 held here.
        cut: how the work is cut.
        gemm_parts: partial sums that gate_up is in.
        overlap: whether kernels may be launched while the one before still runs.
        plain: whether there is no inline assembly, for the interpreter, which knows none.
    """

    num_experts: int
    num_slots: int
    top_k: int
    direct: bool
    hidden: int
    inter: int
    inter_pad: int
    gated: bool
    activation: str
    alpha: float
    limit: float
    weighted: bool
    max_rank: int
    own: int
    sharers: int
    b2_columns: int
    cut: Cut
    gemm_parts: int
    overlap: bool
    plain: bool

    @property
    def v13_width(self) -> int:
        """Columns of v = A13 x."""
        return self.v13_part * self.sharers

    @property
    def v13_part(self) -> int:
        """Columns of v = A13 x that are computed here."""
        return -(-2 * self.max_rank // self.sharers)

    @property
    def rank_blocks13(self) -> int:
        """Programs that share the rows of A13."""
        return -(-self.v13_part // self.cut.shrink_ranks)

    @property
    def activation_steps(self) -> int:
        """Blocks of columns of a program of the activation."""
        return -(-self.inter_pad // (self.cut.activation_block * self.cut.parts2))


def choose_cut(num_pairs: int, num_experts: int, hidden: int, inter_pad: int, max_rank: int) -> Cut:
    """How to cut each segment: into about as many programs as a GPU runs at a time.

    Each program looks up its segment and its factors first, three loads one after the other, and what is cut has to be
    put together again. It must not depend on the batch's adapters: a row's bits are the same in any company. Numbers of
    pairs between two powers of two share a cut, and so the kernels that are compiled for it.

    Args:
        num_pairs: P, at least 1.
        num_experts: E.
        hidden: H.
        inter_pad: padded intermediate size.
        max_rank: of the context.
    """
    segments = min(num_pairs, _OF_AN_EXPERT * num_experts + num_pairs // SEGMENT_ROWS)
    segments = 1 << (segments - 1).bit_length()
    shrink_ranks = _power_of_two(2 * max_rank, 16, 32)
    expand_ranks = _power_of_two(max_rank, 16, 32)
    most13, blocks = most_parts(hidden, inter_pad)
    # A program with several blocks has the factors of the next one in registers, too, where more ranks have no room: of
    # 32 there were 102 loads and 158 stores of spills, and with one block 4 of each.
    parts2 = min(blocks, -(-_ACTIVATIONS // segments)) if max_rank <= _AHEAD_RANKS else blocks
    most2 = -(-hidden // EXPAND_BLOCK)
    least2 = min(most2, 2 if num_pairs >= _ALONE * num_experts else 1)
    return Cut(
        shrink_ranks=shrink_ranks,
        parts13=_parts(segments * -(-2 * max_rank // shrink_ranks), most13),
        parts2=-(-blocks // -(-blocks // parts2)),  # so that none is empty
        expand_ranks=expand_ranks,
        activation_block=_ACTIVATION_BLOCK,
        expand_blocks=max(least2, _parts(2 * segments, most2)),  # whose loads are ahead of their use
    )


def most_parts(hidden: int, inter_pad: int) -> tuple[int, int]:
    """Most parts of x, and of h, that `choose_cut` makes of these columns."""
    return max(1, hidden // _LEAST_COLUMNS), -(-inter_pad // _ACTIVATION_BLOCK)


def rank_class(max_rank: int) -> int:
    """The next power of two, at least 16: ranks that are cut alike."""
    return _power_of_two(max_rank, 16, 1 << 30)


def cut_faults(cut: Cut) -> list[str]:
    """Why a cut cannot be launched; empty if it can."""
    rules = {
        "shrink_ranks and expand_ranks are 16 or 32": {cut.shrink_ranks, cut.expand_ranks} <= {16, 32},
        "activation_block is 64 or 128": cut.activation_block in (64, 128),
        "parts13, parts2 and expand_blocks are at least 1": min(cut.parts13, cut.parts2, cut.expand_blocks) >= 1,
    }
    return [rule for rule, kept in rules.items() if not kept]


def _parts(programs: int, most: int) -> int:
    """Parts of each program, at most so many, that run at a time."""
    return max(1, min(most, _AT_A_TIME // programs))


def _power_of_two(size: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << (size - 1).bit_length()))
