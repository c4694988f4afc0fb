"""What tests of the peers' regressions have in common: small layers, and the backends that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.kernels.align.launch import align_tensors
from quant_moelora.kernels.align.reference import align
from quant_moelora.lora.adapter_file import Factor, LayerFactors
from tests.builders import Adapter, adapter, layer, routing, scheme
from tests.experts.definition import Case
from tests.experts.parity import serving

DTYPE = torch.bfloat16
RANKS = {"gate": 4, "up": 3, "down": 5}


def each_backend(**kind: Any) -> pytest.MarkDecorator:
    """Each registered backend on each device where it serves layers of a kind; see `serving`."""
    found = [
        pytest.param(name, torch.device(device), id=f"{device}-{name}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for name in serving(device, **kind)
    ]
    return pytest.mark.parametrize(("backend", "device"), found)


QUANTISED = each_backend()
UNQUANTISED = each_backend(weight="unquantised", group="channel")


def small(quant: QuantScheme | torch.dtype | None = None, **options: Any) -> MoEQuantInfo:
    """A random layer of a few experts; int4 in groups of 64 unless another scheme is given."""
    dims: dict[str, Any] = {"experts": 4, "hidden": 128, "inter": 64, **options}
    return layer(scheme(4, 64, bf16=True) if quant is None else quant, **dims).info


def make_case(
    info: MoEQuantInfo,
    adapters: Sequence[Adapter] = (),
    *,
    tokens: int = 9,
    dtype: torch.dtype = DTYPE,
    top_k: int = 2,
    ids: Sequence[Sequence[int]] | None = None,
    slots: Sequence[int] | None = None,
) -> Case:
    """Random tokens; adapters in turn, the base model after the last, unless slots are given."""
    count = len(adapters)
    if ids is not None:
        tokens, top_k = len(ids), len(ids[0])
    if slots is None:
        slots = [-1 if token % (count + 1) == count else token % (count + 1) for token in range(tokens)]
    routed = routing(
        tokens,
        top_k,
        info.num_experts,
        slots=torch.tensor(slots[:tokens], dtype=torch.int32) if count else None,
        holes=False,
    )
    if ids is not None:
        routed = Routing(torch.tensor(ids, dtype=torch.int32), routed.topk_weights, routed.slots)
    return Case(info, torch.randn(tokens, info.hidden_size).to(dtype), routed, list(adapters))


def some_adapters(info: MoEQuantInfo, dtype: torch.dtype = DTYPE) -> list[Adapter]:
    """One of everything, and one of other ranks and another scaling."""
    gated = info.activation.gated
    kinds = ((RANKS, 1.5), ({"gate": 2, "up": 7, "down": 1}, -2.0))
    return [
        adapter(info, dtype, ranks={n: r for n, r in ranks.items() if gated or n != "gate"}, scaling=scaling)
        for ranks, scaling in kinds
    ]


def sort(routed: Routing, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows, inverse and segments of the Plan, on the CPU: by the kernels on a GPU, otherwise by their meaning."""
    if routed.topk_ids.is_cuda:
        made = align_tensors(routed.topk_ids, routed.slots, experts, routed.num_slots, 16)
        rows, inverse, segments = made[0], made[1], made[3]
    else:
        plan = align(routed, experts)
        rows, inverse, segments = plan.rows, plan.inverse, plan.segments
    assert segments is not None
    return rows.cpu(), inverse.cpu(), segments.cpu()


def factors_of(adapter: Adapter) -> LayerFactors:
    """As the bank takes them."""
    made: LayerFactors = {}
    for (expert, name), lora in adapter.items():
        assert name in ("gate", "up", "down")
        made[expert, name] = Factor(lora.a, lora.b, lora.scaling)
    return made
