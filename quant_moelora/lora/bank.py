"""build_context: the arena and tables of one layer's adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_moelora.core.lora_context import A2, A13, B2, B13, DOWN, GATE, NO_FACTOR, UP, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.lora.adapter_file import LayerFactors

ALIGNMENT = 8  # elements; a factor of 16-bit floats begins at a multiple of 16 bytes, the widest load


class _Arena:
    """Collects blocks and says where each will stand."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.size = 0

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Append the tensors, flattened, as one block; return its first element."""
        offset = self.size
        block = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.blocks.append(F.pad(block, (0, -block.numel() % ALIGNMENT)))
        self.size += self.blocks[-1].numel()
        return offset


def build_context(info: MoEQuantInfo, adapters: Sequence[LayerFactors], dtype: torch.dtype) -> MoELoRAContext:
    """The context of one layer; the adapter at position i gets slot i.

    Every adapter takes its real rank, and only for the experts and projections it touches. The intermediate dimension
    of B13 and A2 is put into the order and padding of the stored weights.

    Args:
        info: the layer's experts.
        adapters: factors of each adapter in this layer; an empty dict for one that leaves it alone.
        dtype: of the arena, the dtype the layer computes in.
    """
    slots, experts, device = len(adapters), info.num_experts, info.device
    offsets = torch.full((slots, 4, experts), NO_FACTOR, dtype=torch.int64)
    rank = torch.zeros(slots, 3, experts, dtype=torch.int32)
    up_col = torch.zeros(slots, experts, dtype=torch.int32)
    scaling = torch.zeros(slots, 3, experts, dtype=torch.float32)
    arena, v13_width, v2_width = _Arena(), 1, 1
    inter_perm = None if info.inter_perm is None else info.inter_perm.to("cpu", torch.int64)
    for slot, factors in enumerate(adapters):
        for expert in sorted({expert for expert, _ in factors}):
            gate, up, down = (factors.get((expert, p)) for p in ("gate", "up", "down"))
            order = None if inter_perm is None else inter_perm[expert]
            for projection, factor in ((GATE, gate), (UP, up), (DOWN, down)):
                if factor is not None:
                    rank[slot, projection, expert] = factor.a.shape[0]
                    scaling[slot, projection, expert] = factor.scaling
            held = [factor for factor in (gate, up) if factor is not None]
            if held:
                shared = gate is not None and up is not None and gate.a is up.a  # as in a fused file
                a13 = [held[0].a] if shared else [factor.a for factor in held]
                up_col[slot, expert] = 0 if shared or gate is None else gate.a.shape[0]
                offsets[slot, A13, expert] = arena.add(a13)
                offsets[slot, B13, expert] = arena.add(_stored_rows(f.b, order, info.inter_pad) for f in held)
                v13_width = max(v13_width, sum(a.shape[0] for a in a13))
            if down is not None:
                offsets[slot, A2, expert] = arena.add([_stored_rows(down.a.T, order, info.inter_pad).T])
                offsets[slot, B2, expert] = arena.add([down.b])
                v2_width = max(v2_width, down.a.shape[0])
    blocks = [block.to(dtype) for block in arena.blocks]
    return MoELoRAContext(
        num_experts=experts,
        hidden_size=info.hidden_size,
        inter_pad=info.inter_pad,
        arena=(torch.cat(blocks) if blocks else torch.zeros(0, dtype=dtype)).to(device),
        offsets=offsets.to(device),
        rank=rank.to(device),
        up_col=up_col.to(device),
        scaling=scaling.to(device),
        v13_width=v13_width,
        v2_width=v2_width,
        shard=info.shard,
    )


def _stored_rows(
    b: Tensor,  # (I, r)
    order: Tensor | None,  # (I,) int64, stored position -> logical
    inter_pad: int,
) -> Tensor:  # (inter_pad, r)
    """Rows of the intermediate in the stored order, with zeros for the padding."""
    rows = b if order is None else b[order]
    return F.pad(rows, (0, 0, 0, inter_pad - b.shape[0]))
