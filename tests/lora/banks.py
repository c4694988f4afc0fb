"""What a bank's tables and arena say, read by the statement in MoELoRAContext."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.lora_context import A2, A13, B2, B13, DOWN, GATE, NO_FACTOR, UP, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from tests.adapters import PROJECTIONS, dense_info

ALIGNED = 8  # elements: 16 bytes of a 16-bit float


def two_layers(device: torch.device | str = "cpu") -> dict[int, MoEQuantInfo]:
    """Layers of other dimensions, one in an order of its own, with sizes off the alignment."""
    return {
        2: dense_info(device=device),
        5: dense_info(hidden=17, inter=7, inter_pad=9, permuted=False, device=device),
    }


def snapshot(ctx: MoELoRAContext) -> dict[str, Tensor]:
    """Copies of all tensors, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in ctx.tensors().items()}


def read(ctx: MoELoRAContext, slot: int, info: MoEQuantInfo) -> LayerFactors:
    """Factors of one slot in one layer, in the logical order; the padding is seen to be zero."""
    held = snapshot(ctx)
    perm = torch.arange(info.intermediate_size).expand(info.num_experts, -1)
    perm = perm if info.inter_perm is None else info.inter_perm.cpu().long()
    hidden, pad = info.hidden_size, info.inter_pad
    found: LayerFactors = {}

    def rows(which: int, expert: int, first: int, count: int, width: int) -> Tensor:
        offset = int(held["offsets"][slot, which, expert])
        assert offset != NO_FACTOR and offset % ALIGNED == 0
        return held["arena"][offset + first * width :][: count * width].view(count, width)

    def logical(stored: Tensor, expert: int) -> Tensor:  # (r, inter_pad) -> (r, I)
        assert not stored[:, info.intermediate_size :].any()
        columns = torch.empty(len(stored), info.intermediate_size, dtype=stored.dtype)
        columns[:, perm[expert]] = stored[:, : info.intermediate_size]
        return columns

    for expert in range(info.num_experts):
        ranks: list[int] = held["rank"][slot, :, expert].tolist()
        places: tuple[tuple[Projection, int, int, int], ...] = (
            ("gate", GATE, 0, 0),
            ("up", UP, int(held["up_col"][slot, expert]), ranks[GATE]),
        )
        for projection, index, a_row, b_row in places:
            if ranks[index]:
                a = rows(A13, expert, a_row, ranks[index], hidden)
                b = logical(rows(B13, expert, b_row, ranks[index], pad), expert).T
                found[expert, projection] = Factor(a, b, float(held["scaling"][slot, index, expert]))
        if ranks[DOWN]:
            a = logical(rows(A2, expert, 0, ranks[DOWN], pad), expert)
            b = rows(B2, expert, 0, ranks[DOWN], hidden).T
            found[expert, "down"] = Factor(a, b, float(held["scaling"][slot, DOWN, expert]))
        absent = {A13: not (ranks[GATE] or ranks[UP]), A2: not ranks[DOWN]}
        for first, second in ((A13, B13), (A2, B2)):
            offsets = held["offsets"][slot, [first, second], expert]
            assert bool((offsets == NO_FACTOR).all()) == absent[first]
        for index in (GATE, UP, DOWN):
            assert ranks[index] or float(held["scaling"][slot, index, expert]) == 0
    return found


def check(ctx: MoELoRAContext, slot: int, info: MoEQuantInfo, factors: LayerFactors) -> None:
    """The slot holds exactly these factors, rounded once to the arena's dtype."""
    got = read(ctx, slot, info)
    assert got.keys() == factors.keys()
    for key, factor in factors.items():
        assert torch.equal(got[key].a, factor.a.to(ctx.arena.dtype)), key
        assert torch.equal(got[key].b, factor.b.to(ctx.arena.dtype)), key
        assert got[key].scaling == factor.scaling, key


def block_size(info: MoEQuantInfo, factors: LayerFactors) -> int:
    """Elements that the factors take in one layer: each of A13, B13, A2, B2 up to the alignment, a shared A once."""
    total = 0
    for expert in {expert for expert, _ in factors}:
        gate, up, down = (factors.get((expert, projection)) for projection in PROJECTIONS)
        held = [factor for factor in (gate, up) if factor is not None]
        a_ranks = {id(factor.a): factor.a.shape[0] for factor in held}
        sizes = [sum(a_ranks.values()) * info.hidden_size, sum(f.a.shape[0] for f in held) * info.inter_pad]
        if down is not None:
            sizes += [down.a.shape[0] * info.inter_pad, down.a.shape[0] * info.hidden_size]
        total += sum(-(-size // ALIGNED) * ALIGNED for size in sizes)
    return total
