"""LoRA whose ranks several processes share: their kernels, run one process after the other, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.core.workspace import Workspace
from quant_moelora.distributed.mesh import Group, TensorParallelRanks
from quant_moelora.experts.base_injection import BaseInjection
from quant_moelora.kernels.align.reference import align
from quant_moelora.layer import MoEExperts
from quant_moelora.lora import injection
from quant_moelora.lora.bank import AdapterBank
from quant_moelora.lora.injection import LoRAInjection
from tests.adapters import random_factors
from tests.builders import layer, move, routing, same_bits, scheme
from tests.launched.cases import DEVICE, DTYPES, INTERPRETED, MARKS

pytestmark = [*MARKS, pytest.mark.usefixtures("serving")]
EXPERTS, HIDDEN, INTER, OF = 3, 192, 128, 2
TOKENS = 5 if INTERPRETED else 70
RANKS = (3, 5, 2) if INTERPRETED else (17, 40, 33)  # above 32, v is put together of several parts


@dataclass
class Recorded:
    """Collectives of one of several processes whose parts of v are known; first they are told to it, then it is asked.

    Attributes:
        gathered: parts of v13 of all processes.
        summed: parts of v2 of all processes.
    """

    gathered: list[Tensor]
    summed: list[Tensor]
    own: list[Tensor]

    def gather(self, v: Tensor) -> Tensor:
        self.own.append(v)
        parts = self.gathered or [v] * OF
        return torch.stack(parts, -1).flatten(1)

    def sum(self, v: Tensor) -> Tensor:
        self.own.append(v)
        return torch.stack(self.summed or [v]).sum(0)


def contexts(info: MoEQuantInfo, dtype: torch.dtype) -> list[MoELoRAContext]:
    """Of each process, with an adapter of different ranks and one of down alone; the last one is the whole layer's."""
    gate, up, down = RANKS
    held = [random_factors(info, {"gate": gate, "up": up, "down": down}, seed=1)]
    held.append(random_factors(info, {"down": 1}, experts=[1], seed=2))
    configs = [ParallelConfig(t, OF, fully_sharded_lora=True) for t in range(OF)]
    made: list[MoELoRAContext] = []
    for part in (*(info.part(config) for config in configs), info):
        bank = AdapterBank({0: part.to(DEVICE)}, dtype, max_adapters=2, max_rank=max(RANKS))
        for name, factors in zip("ab", held, strict=True):
            bank.add(name, {0: factors})
        made.append(bank.contexts[0])
    return made


@dataclass
class Forward:
    """What one process, or one alone, does around its products."""

    x: Tensor
    routed: Routing
    plan: Plan

    def run(self, ctx: MoELoRAContext, info: MoEQuantInfo, gate_up: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """h and the layer's output, from products that are given."""
        ws, inject = Workspace(DEVICE), LoRAInjection(BaseInjection(info), ctx, info)
        inject.begin(self.x, self.routed, self.plan, ws)
        h = gate_up.new_zeros(len(gate_up), info.inter_pad)
        h = inject.activation(self.x, gate_up, h, self.routed, self.plan, ws)
        out = inject.moe_sum(h, y, torch.empty_like(self.x), self.routed, self.plan, ws)
        return h, out


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_ranks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes' h side by side are the whole layer's, and their outputs, summed up, too."""
    monkeypatch.setattr(injection, "_on_gpu", lambda _: True)
    info = layer(scheme(4, 32), experts=EXPERTS, hidden=HIDDEN, inter=INTER).info
    *parts, whole = contexts(info, dtype)
    slots = torch.tensor([0, 1, -1] * TOKENS)[:TOKENS].to(torch.int32)
    routed = replace(move(routing(TOKENS, 2, EXPERTS, slots=slots), DEVICE), num_slots=2)
    forward = Forward(torch.randn(TOKENS, HIDDEN).to(DEVICE, dtype), routed, align(routed, EXPERTS))
    pairs = routed.num_pairs
    gate_up, y = (torch.randn(pairs, n).to(DEVICE, dtype) for n in (2 * INTER, HIDDEN))
    h, out = forward.run(whole, info.to(DEVICE), gate_up, y)
    own_gate_up = [
        torch.cat([half.split(INTER // OF, 1)[t] for half in gate_up.split(INTER, 1)], 1).contiguous()
        for t in range(OF)
    ]
    own_info = [info.part(ParallelConfig(t, OF, fully_sharded_lora=True)).to(DEVICE) for t in range(OF)]
    ys = [y, torch.zeros_like(y)]
    told = Recorded([], [], [])
    for _ in range(2):  # the first time for v13, the second for v2; the third is right
        heard: list[list[Tensor]] = []
        for t in range(OF):
            told.own = []
            forward.run(replace(parts[t], collectives=told), own_info[t], own_gate_up[t], ys[t])
            heard.append(told.own)
        told = Recorded([own[0] for own in heard], [own[1] for own in heard], [])
    results = [forward.run(replace(parts[t], collectives=told), own_info[t], own_gate_up[t], ys[t]) for t in range(OF)]
    held = int(forward.plan.expert_offsets[-1])
    # h is the same sum in another order, rounded to dtype; what is summed up of it is rounded once more.
    step = torch.finfo(dtype).eps
    side_by_side = torch.cat([own for own, _ in results], 1)
    torch.testing.assert_close(side_by_side[:held], h[:held], rtol=2 * step, atol=step / 8)
    total = sum(made.float() for _, made in results)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, out.float(), rtol=4 * step, atol=4 * step * float(out.abs().max()))


def test_steps_are_the_one_operator() -> None:
    """marlin by steps, between which processes exchange v, has the bits of its one operator without an adapter."""
    dtype = DTYPES[-1]
    info = layer(scheme(4, 32), experts=EXPERTS, hidden=HIDDEN, inter=INTER, act_order=True, bias=True).info.to(DEVICE)
    bank = AdapterBank({0: info}, dtype, max_adapters=1, max_rank=max(RANKS))
    bank.add("a", {0: random_factors(info, {"gate": RANKS[0], "up": RANKS[1], "down": RANKS[2]})})
    ctx, slots = bank.contexts[0], torch.arange(TOKENS, dtype=torch.int32) % 2 - 1
    routed, x = move(routing(TOKENS, 2, EXPERTS, slots=slots), DEVICE), torch.randn(TOKENS, HIDDEN).to(DEVICE, dtype)
    outs: list[Tensor] = []
    for held in (ctx, replace(ctx, collectives=TensorParallelRanks(Group("", 0, 1)))):
        experts = MoEExperts(info, backend="marlin")
        experts.attach(held)
        outs.append(experts(x, routed.topk_ids, routed.topk_weights, routed.slots))
    assert same_bits(outs[0][slots < 0], outs[1][slots < 0])
    # y + delta: delta is rounded once in both, from sums in another order.
    torch.testing.assert_close(
        outs[1], outs[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-3 * float(outs[0].abs().max())
    )
