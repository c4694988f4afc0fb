"""build_context: the arena and its tables against the statement in MoELoRAContext, one factor at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quant_moelora.core.lora_context import A2, A13, B2, B13, DOWN, GATE, NO_FACTOR, UP, MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.families import Projection
from quant_moelora.lora.adapter_file import LayerFactors
from quant_moelora.lora.bank import build_context
from tests.adapters import PROJECTIONS, dense_info, random_factors

ALIGNED = 8  # elements: 16 bytes of a 16-bit float


def adapters_of_every_kind(info: MoEQuantInfo) -> list[LayerFactors]:
    """Ranks are odd, so that hardly a block ends at a multiple of the alignment."""
    return [
        random_factors(info, {"gate": 3, "up": 3, "down": 3}, shared=True, seed=1),
        random_factors(info, {"gate": 3, "up": 5, "down": 7}, seed=2),
        {},
        random_factors(info, {"up": 1}, experts=[1], seed=3),
        random_factors(info, {"gate": 2}, experts=[0, 2], seed=4),
        random_factors(info, {"down": 9}, experts=[2], seed=5),
        random_factors(info, {"gate": 1, "up": 1}, experts=[0], shared=True, seed=6)
        | random_factors(info, {"up": 2, "down": 1}, experts=[1], seed=7),
    ]


def stored_rows(b: Tensor, info: MoEQuantInfo, expert: int) -> Tensor:
    """Row i of the stored intermediate is logical row inter_perm[i]; rows of the padding are 0."""
    rows = torch.zeros(info.inter_pad, b.shape[1])
    for stored in range(info.intermediate_size):
        logical = stored if info.inter_perm is None else int(info.inter_perm[expert, stored])
        rows[stored] = b[logical]
    return rows


def expected_blocks(info: MoEQuantInfo, factors: LayerFactors, expert: int) -> dict[int, Tensor | None]:
    """A13, B13, A2 and B2 of one (adapter, expert), flat in float32; None where the adapter has none."""
    gate, up, down = (factors.get((expert, projection)) for projection in PROJECTIONS)
    blocks: dict[int, Tensor | None] = dict.fromkeys((A13, B13, A2, B2))
    held = [factor for factor in (gate, up) if factor is not None]
    if held:
        shared = gate is not None and up is not None and gate.a is up.a
        blocks[A13] = torch.cat([factor.a.flatten() for factor in (held[:1] if shared else held)])
        blocks[B13] = torch.cat([stored_rows(factor.b, info, expert).flatten() for factor in held])
    if down is not None:
        blocks[A2] = stored_rows(down.a.T, info, expert).T.flatten()
        blocks[B2] = down.b.flatten()
    return blocks


def cells(ctx: MoELoRAContext) -> list[tuple[int, int]]:
    return list(itertools.product(range(ctx.num_slots), range(ctx.num_experts)))


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arena_and_offsets(dtype: torch.dtype, permuted: bool, device: torch.device) -> None:
    info = dense_info(permuted=permuted)
    adapters = adapters_of_every_kind(info)
    ctx = build_context(info.to(device), adapters, dtype)
    assert {tensor.device.type for tensor in ctx.tensors().values()} == {device.type}
    assert ctx.arena.dtype == dtype
    arena = ctx.arena.cpu()
    covered = torch.zeros(arena.numel(), dtype=torch.int32)
    sizes = 0
    for slot, expert in cells(ctx):
        for which, block in expected_blocks(info, adapters[slot], expert).items():
            offset = int(ctx.offsets[slot, which, expert])
            if block is None:
                assert offset == NO_FACTOR
                continue
            assert offset >= 0 and offset % ALIGNED == 0
            assert torch.equal(arena[offset : offset + block.numel()], block.to(dtype)), (slot, expert, which)
            covered[offset : offset + block.numel()] += 1
            sizes += -(-block.numel() // ALIGNED) * ALIGNED
    assert arena.numel() == sizes, "each block once, none larger than its alignment asks for"
    assert covered.max() == 1, "blocks overlap"
    assert not arena[covered == 0].any(), "the gaps are zero"


def test_ranks_columns_and_scaling() -> None:
    info = dense_info()
    adapters = adapters_of_every_kind(info)
    ctx = build_context(info, adapters, torch.float32)
    for slot, expert in cells(ctx):
        factors = adapters[slot]
        for row, projection in zip((GATE, UP, DOWN), PROJECTIONS, strict=True):
            factor = factors.get((expert, projection))
            assert int(ctx.rank[slot, row, expert]) == (0 if factor is None else factor.a.shape[0])
            assert float(ctx.scaling[slot, row, expert]) == (0 if factor is None else factor.scaling)
        gate, up = factors.get((expert, "gate")), factors.get((expert, "up"))
        separate = gate is not None and up is not None and gate.a is not up.a
        if up is not None:
            assert int(ctx.up_col[slot, expert]) == (gate.a.shape[0] if separate and gate is not None else 0)
    assert (ctx.num_experts, ctx.hidden_size, ctx.inter_pad) == (3, 16, 20)
    assert ctx.v13_width == 3 + 5, "gate and up of the second adapter"
    assert ctx.v2_width == 9


def test_the_factors_read_back_give_the_deltas_of_the_file() -> None:
    """Slicing by rank, up_col and offset, as the context's docstring says, gives scaling * B A of every projection."""
    info = dense_info()
    adapters = adapters_of_every_kind(info)
    ctx = build_context(info, adapters, torch.float32)
    assert info.inter_perm is not None
    pad, inter, hidden = info.inter_pad, info.intermediate_size, info.hidden_size
    for slot, expert in cells(ctx):
        gate_rank, up_rank, down_rank = ctx.rank[slot, :, expert].tolist()
        a13, b13, a2, b2 = ctx.offsets[slot, :, expert].tolist()
        logical = info.inter_perm[expert].tolist()
        place: tuple[tuple[Projection, int, int, int, int], ...] = (
            ("gate", GATE, gate_rank, 0, b13),
            ("up", UP, up_rank, int(ctx.up_col[slot, expert]), b13 + pad * gate_rank),
        )
        for projection, row, rank, first, b_offset in place:
            factor = adapters[slot].get((expert, projection))
            if factor is None:
                continue
            a = ctx.arena[a13 + first * hidden :][: rank * hidden].view(rank, hidden)
            b = ctx.arena[b_offset:][: pad * rank].view(pad, rank)
            got = float(ctx.scaling[slot, row, expert]) * (b @ a)
            torch.testing.assert_close(got[:inter], (factor.scaling * factor.b @ factor.a)[logical])
            assert not got[inter:].any()
        down = adapters[slot].get((expert, "down"))
        if down is not None:
            a = ctx.arena[a2:][: down_rank * pad].view(down_rank, pad)
            b = ctx.arena[b2:][: hidden * down_rank].view(hidden, down_rank)
            got = float(ctx.scaling[slot, DOWN, expert]) * (b @ a)
            torch.testing.assert_close(got[:, :inter], (down.scaling * down.b @ down.a)[:, logical])
            assert not got[:, inter:].any()


def test_a_shared_a_is_stored_once() -> None:
    info = dense_info()
    one = build_context(info, [random_factors(info, {"gate": 8, "up": 8}, shared=True)], torch.float32)
    two = build_context(info, [random_factors(info, {"gate": 8, "up": 8})], torch.float32)
    assert two.arena.numel() - one.arena.numel() == info.num_experts * 8 * info.hidden_size
    assert one.up_col.tolist() == [[0, 0, 0]] and two.up_col.tolist() == [[8, 8, 8]]
    assert (one.v13_width, two.v13_width) == (8, 16)


def test_only_touched_experts_take_room() -> None:
    info = dense_info()
    ctx = build_context(info, [random_factors(info, {"down": 8}, experts=[1])], torch.float32)
    assert ctx.arena.numel() == 8 * (info.inter_pad + info.hidden_size)
    assert (ctx.offsets[0, :, [0, 2]] == NO_FACTOR).all()
    assert ctx.offsets[0, :2, 1].tolist() == [NO_FACTOR, NO_FACTOR]


@pytest.mark.parametrize("count", [0, 2])
def test_adapters_that_touch_nothing(count: int) -> None:
    ctx = build_context(dense_info(), [{} for _ in range(count)], torch.bfloat16)
    assert ctx.num_slots == count
    assert ctx.arena.shape == (0,) and ctx.arena.dtype == torch.bfloat16
    assert (ctx.offsets == NO_FACTOR).all() and not ctx.rank.any() and not ctx.scaling.any()
    assert ctx.v13_width >= 1 and ctx.v2_width >= 1


def test_one_rounding_to_the_arena() -> None:
    """Factors stay as the file has them until the arena's dtype rounds them; the scaling stays float32."""
    info = dense_info()
    factors = random_factors(info, {"gate": 4}, experts=[0])
    ctx = build_context(info, [factors], torch.bfloat16)
    offset = int(ctx.offsets[0, A13, 0])
    held = ctx.arena[offset : offset + factors[0, "gate"].a.numel()]
    assert torch.equal(held, factors[0, "gate"].a.flatten().to(torch.bfloat16))
    assert ctx.scaling.dtype == torch.float32
