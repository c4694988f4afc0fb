"""Whether a backend that nobody here has tested serves adapters: a small layer, computed with and without one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_moelora.core.backend import ExpertsBackend
from quant_moelora.core.errors import BackendError
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Routing
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight
from quant_moelora.experts.base_injection import BaseInjection
from quant_moelora.experts.reference import ReferenceBackend
from quant_moelora.kernels.common.sample import blank_weight, random_adapters, random_weight
from quant_moelora.lora.injection import LoRAInjection

_EXPERTS, _SIZE, _TOKENS, _RANK = 4, 128, 6, 8
_TOLERANCE = 0.1  # of the delta's norm: what bfloat16's roundings of a layer bring is less, another adapter's far more


def check_adapters(backend: ExpertsBackend, info: MoEQuantInfo, dtype: torch.dtype) -> None:
    """Have a backend compute a small layer like ``info`` with an adapter, and compare what that changes.

    Args:
        backend: any that serves the layer.
        info: the layer, whose kind of weights, activation and device the small one has.
        dtype: of the activations.

    Raises:
        BackendError: the adapter's delta is not that of the reference backend, or rows without an adapter are not
            bitwise those of the base model.
    """
    small = _like(info)
    ctx = random_adapters(small, dtype, 1, _RANK, 1, info.device)
    base = BaseInjection(small)
    lora = LoRAInjection(base, ctx, small)
    slots = torch.arange(_TOKENS, dtype=torch.int32, device=info.device) % 2 - 1  # none, the adapter, none, ..
    x = torch.randn(_TOKENS, small.hidden_size, device=info.device).to(dtype)
    found, plain = (_run(backend, small, x, slots, injection) for injection in (lora, base))
    right, without = (_run(ReferenceBackend(), small, x, slots, injection) for injection in (lora, base))
    wanted = (right.double() - without.double())[slots == 0]
    error = float(((found.double() - plain.double())[slots == 0] - wanted).norm() / wanted.norm())
    kept = torch.equal(found[slots < 0], plain[slots < 0])
    if not (kept and error <= _TOLERANCE):  # a NaN fails
        raise BackendError(
            f"backend {backend.name} with adapters",
            got=f"a delta that is off by {error:.0%} of its norm"
            if kept
            else "other bits in rows that have no adapter",
            rule="the delta of the reference backend, and rows without an adapter as without any",
            remedy="call begin, activation and moe_sum of the injection, each once",
        )


def _run(
    backend: ExpertsBackend,
    info: MoEQuantInfo,
    x: Tensor,  # (M, H) dtype
    slots: Tensor,  # (M,) int32
    injection: Injection,
) -> Tensor:  # (M, H) dtype
    token = torch.arange(len(x), device=x.device)
    ids = torch.stack([token % _EXPERTS, (token + 1) % _EXPERTS], 1).to(torch.int32)
    routing = Routing(ids, torch.full(ids.shape, 0.5, device=x.device))
    if injection.ctx is not None:
        routing = replace(routing, slots=slots, num_slots=injection.ctx.num_slots)
    with torch.no_grad():
        prepared = backend.prepare(info, x.dtype)
        return backend.apply(x, prepared, routing, injection, backend.workspace(info)).clone()


def _like(info: MoEQuantInfo) -> MoEQuantInfo:
    """A small random layer with weights of the same kind."""
    halves = info.activation.halves
    w13, w2 = (_weight(weight, halves if weight is info.w13 else 1) for weight in (info.w13, info.w2))
    return replace(info, w13=w13, w2=w2, inter_perm=None, shard=None)


def _weight(weight: ExpertWeight, halves: int) -> ExpertWeight:
    if isinstance(weight, PackedWeight):
        blank = blank_weight(_EXPERTS, halves, _SIZE, _SIZE, _SIZE, weight.scheme)
        return random_weight(blank, weight.qweight.device)
    values = torch.randn(_EXPERTS, halves * _SIZE, _SIZE, device=weight.w.device) * _SIZE**-0.5
    return DenseWeight(_EXPERTS, halves, _SIZE, _SIZE, _SIZE, _SIZE, None, values.to(weight.w.dtype))
