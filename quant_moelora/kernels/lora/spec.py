"""LoRASpec: everything that the LoRA kernels are specialised on, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from quant_moelora.core.routing import SEGMENT_ROWS

# Programs that run at a time, four on each of an H200's 132 multiprocessors; and those of the activation, twice as
# many, since fewer would leave some idle where there are few segments (benchmarks/NOTES.md, "LoRA").
_AT_A_TIME, _ACTIVATIONS = 528, 1056
_OF_AN_EXPERT = 2  # segments, as far as one can know without looking at the adapters, beside those that are full
_LEAST_COLUMNS = 256  # of x that a program shrinks, below which reading its part costs more than it brings
# Columns of h at once, all of which each warp of the second shrink has in its registers, so that few are better; and
# columns of the second expand at once.
_ACTIVATION_BLOCK, EXPAND_BLOCK = 128, 128


@dataclass(frozen=True)
class LoRASpec:
    """A layer, its adapters' bounds and how the work on a segment is cut. All members are compile-time constants.

    Attributes:
        num_experts: E.
        num_slots: slots of the context.
        top_k: k.
        direct: whether rows are pairs and each is a segment of its own.
        hidden: H, columns of A13 and B2.
        inter: I.
        inter_pad: columns of B13 and A2.
        gated: whether gate_up has a gate.
        activation: its name.
        alpha: of the activation, or 0.
        limit: of the activation, or 0.
        weighted: whether the router's weight multiplies gate_up.
        max_rank: columns of v = A2 h, and half of those of v = A13 x.
        shrink_ranks: rows of A13 of a program of the first shrink.
        parts13: programs that share the columns of x.
        expand_ranks: ranks that an expand, and the second shrink, take at once.
        activation_block: columns of h that are computed at once.
        activation_steps: blocks of a program.
        expand_blocks: programs that share the columns of B2.
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
    shrink_ranks: int
    parts13: int
    expand_ranks: int
    activation_block: int
    activation_steps: int
    expand_blocks: int
    gemm_parts: int
    overlap: bool
    plain: bool

    @property
    def v13_width(self) -> int:
        """Columns of v = A13 x."""
        return 2 * self.max_rank

    @property
    def rank_blocks13(self) -> int:
        """Programs that share the rows of A13."""
        return -(-self.v13_width // self.shrink_ranks)

    @property
    def activation_parts(self) -> int:
        """Programs that share the columns of h, and parts of v = A2 h."""
        return -(-self.inter_pad // (self.activation_block * self.activation_steps))


@dataclass(frozen=True)
class Cut:
    """How the work on a segment is cut; members as of `LoRASpec`."""

    shrink_ranks: int
    parts13: int
    expand_ranks: int
    activation_block: int
    activation_steps: int
    expand_blocks: int


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
    programs = segments * -(-2 * max_rank // shrink_ranks)
    parts13 = _parts(programs, hidden // _LEAST_COLUMNS)
    blocks = -(-inter_pad // _ACTIVATION_BLOCK)
    expand_ranks = _power_of_two(max_rank, 16, 32)
    # A program sums up its blocks' parts of v in registers, of as many ranks as it takes at once.
    parts2 = min(blocks, -(-_ACTIVATIONS // segments)) if max_rank <= expand_ranks else blocks
    return Cut(
        shrink_ranks=shrink_ranks,
        parts13=parts13,
        expand_ranks=expand_ranks,
        activation_block=_ACTIVATION_BLOCK,
        activation_steps=-(-blocks // parts2),
        expand_blocks=_parts(2 * segments, -(-hidden // EXPAND_BLOCK)),  # whose loads are ahead of their use
    )


def _parts(programs: int, most: int) -> int:
    """Parts of each program, at most so many, that run at a time."""
    return max(1, min(most, _AT_A_TIME // programs))


def _power_of_two(size: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << (size - 1).bit_length()))
