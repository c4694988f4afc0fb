"""MoELoRAContext: all that a forward needs of the adapters of one layer, at addresses that do not change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core.checks import check_positive, check_same_device, check_tensor
from quant_moelora.core.errors import ShapeError
from quant_moelora.core.packing import round_up
from quant_moelora.core.shard import RankCollectives, Shard, Span

# Second index of `offsets`.
A13, B13, A2, B2 = range(4)
# Second index of `rank` and `scaling`.
GATE, UP, DOWN = range(3)
NO_FACTOR = -1  # offset of a factor that an (adapter, expert) does not have
ARENA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class MoELoRAContext:
    """Factors of all adapters in one arena, and the tables that find them.

    delta of a projection = scaling * B (A x). For adapter (slot) a and expert e, with r_g, r_u, r_d = rank[a, :, e]:

    * A13 is [rows, H]: the rows of gate's A, then those of up's A from row ``up_col[a, e]`` on. Gate and up share
      one A where up_col is 0 and both have a rank.
    * B13 is [r_g + r_u, inter_pad]: gate's B transposed, then up's, columns in the stored order of the intermediate
      (`MoEQuantInfo.inter_perm`), zero in the padding.
    * A2 is [r_d, inter_pad], columns in the stored order, zero in the padding.
    * B2 is [r_d, H], B transposed.

    All are row-major with a rank a row, and begin at a multiple of 16 bytes, so that kernels load 16 bytes at once
    whatever the rank. ``shard`` is that of the layer's info. Where LoRA is fully sharded, process t of T holds rows t,
    t + T, t + 2T.. of A13 and the columns `hidden_part` of B2; the tables are those of whole adapters nevertheless.

    Attributes:
        num_experts: E.
        hidden_size: H.
        inter_pad: padded intermediate size.
        arena: float [any], the factors.
        offsets: int64 [A, 4, E], first element of A13, B13, A2 and B2 in the arena, -1 where there is none.
        rank: int32 [A, 3, E], of gate, up and down; 0 where the adapter leaves the projection alone.
        up_col: int32 [A, E].
        scaling: float32 [A, 3, E].
        max_rank: at least the rank of any projection of any adapter that is ever here; buffers for v have room for it.
        shard: the part of the layer held here, or None.
        collectives: how fully sharded processes exchange v; None where LoRA is not, or until a layer is given it.

    Raises:
        ShapeError: a table does not have the shape that A, E demand, or tensors are on several devices.
    """

    num_experts: int
    hidden_size: int
    inter_pad: int
    arena: Tensor  # (any,) float
    offsets: Tensor  # (A, 4, E) int64
    rank: Tensor  # (A, 3, E) int32
    up_col: Tensor  # (A, E) int32
    scaling: Tensor  # (A, 3, E) float32
    max_rank: int
    shard: Shard | None = None
    collectives: RankCollectives | None = None

    def __post_init__(self) -> None:
        sizes = {"num_experts": self.num_experts, "hidden_size": self.hidden_size, "inter_pad": self.inter_pad}
        check_positive(**sizes, max_rank=self.max_rank)
        if self.arena.ndim != 1 or self.arena.dtype not in ARENA_DTYPES:
            raise ShapeError(
                "arena",
                got=f"shape {list(self.arena.shape)}, dtype {self.arena.dtype}",
                rule="one dimension of float32, bfloat16 or float16",
                remedy="let AdapterBank build it",
            )
        slots, experts = self.num_slots, self.num_experts
        why = f"A={slots} adapters, E={experts}"
        check_tensor("offsets", self.offsets, (slots, 4, experts), torch.int64, why=why)
        check_tensor("rank", self.rank, (slots, 3, experts), torch.int32, why=why)
        check_tensor("up_col", self.up_col, (slots, experts), torch.int32, why=why)
        check_tensor("scaling", self.scaling, (slots, 3, experts), torch.float32, why=why)
        check_same_device(self.tensors())

    @property
    def num_slots(self) -> int:
        """A."""
        return self.offsets.shape[0]

    @property
    def rank_shard(self) -> tuple[int, int]:
        """See `ParallelConfig.rank_shard`."""
        return (0, 1) if self.shard is None else self.shard.config.rank_shard

    @property
    def hidden_part(self) -> Span:
        """Columns of B2 held here."""
        return Span(0, self.hidden_size) if self.shard is None else self.shard.hidden(self.hidden_size)

    @property
    def v13_width(self) -> int:
        """Columns of v = A13 x: gate's rows and up's, and as many more as make the processes' parts equal."""
        return round_up(2 * self.max_rank, self.rank_shard[1])

    @property
    def v13_part(self) -> int:
        """Columns of v = A13 x that this process computes."""
        return self.v13_width // self.rank_shard[1]

    @property
    def v2_width(self) -> int:
        """Columns of v = A2 h."""
        return self.max_rank

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by field name."""
        names = ("arena", "offsets", "rank", "up_col", "scaling")
        return {name: getattr(self, name) for name in names}
