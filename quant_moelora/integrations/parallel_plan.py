"""transformers' own parallel plans, by which it shards a model, all but the routed experts, which this library shares.

A plan's rules for experts put an all-reduce behind the experts module, which ours does itself: they are taken out
before transformers applies the plan, and the same processes share the experts as an `ExpertMesh`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.loaders.families import ExpertsSpec

# Sizes of a `DistributedConfig` that give processes tokens, layers or replicas of their own.
_OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size")
_ROUTER_STYLES = {"ep_router", "megamoe_router"}  # of transformers 5.17: hide experts of other processes
# A style of all versions that adds nothing to a module without parameters.
_NO_EFFECT = "replicated_with_grad_allreduce"


def leave_out_experts(model: PreTrainedModel, specs: Iterable[ExpertsSpec]) -> None:
    """Take what the model's plans say of its routed experts out of them, before they are applied.

    Raises:
        UnsupportedError: the model is to be spread otherwise too, or the caller's own rules are for experts.
    """
    config = _distributed_config(model)
    if config is None:
        return
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", spec.module) for spec in specs}  # as plans name them
    rules = re.compile(rf"({'|'.join(map(re.escape, modules))})(\..+)?")
    _check(config, rules)
    # transformers 5.17 shows one plan alone, that which it will apply.
    plans: list[dict[str, str]] = [model.tp_plan, *([model.ep_plan] if hasattr(model, "ep_plan") else [])]
    for plan in plans:
        for rule in [rule for rule, style in plan.items() if rules.fullmatch(rule) or style in _ROUTER_STYLES]:
            del plan[rule]
    if _is_expert_parallel(config):
        plans[-1].update(dict.fromkeys(modules, _NO_EFFECT))  # transformers refuses an empty plan


def _check(config: Any, rules: re.Pattern[str]) -> None:
    """Raise as `leave_out_experts`; ``rules`` match names of routed experts and of what is in them."""
    sizes = [f"{name}={size}" for name in _OTHER_SIZES if (size := getattr(config, name, None) or 1) > 1]
    if sizes:
        raise UnsupportedError(
            "distributed_config",
            got=", ".join(sizes),
            rule="tensor and expert parallel: all processes have the same tokens and all layers",
            remedy="set tp_size (and ep_size) alone, or start one model for each replica",
        )
    for name in ("tp_plan", "ep_plan"):
        given = getattr(config, name, None)
        own = sorted(filter(rules.fullmatch, given)) if isinstance(given, dict) else []
        if own:
            raise UnsupportedError(
                f"{name} of the caller",
                got=f"rules for routed experts: {', '.join(own)}",
                rule="rules for other modules; this library shares the experts itself",
                remedy="leave these rules out; to share the experts otherwise, pass device_mesh too",
            )


def mesh_of_plan(model: PreTrainedModel) -> ExpertMesh | None:
    """The processes that transformers has spread the model over, which share its experts too; None if it has not."""
    config = _distributed_config(model)
    if config is None or (config.tp_size or 1) == 1:
        return None
    name = "ep" if _is_expert_parallel(config) else "tp"
    return ExpertMesh(init_device_mesh(model.device.type, (config.tp_size,), mesh_dim_names=(name,)))


def part_of(
    value: Tensor,  # (N, K), the whole
    parameter: Tensor,  # (N, K), of which this process holds a part if it is a DTensor
) -> Tensor:  # (N, K) as the parameter
    """A whole tensor in the form of a parameter that a plan may have sharded; every process has the whole."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _distributed_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "distributed_config", None)


def _is_expert_parallel(config: Any) -> bool:
    """Whether a `DistributedConfig` deals out experts; transformers 5.17 has only the flag."""
    return getattr(config, "enable_expert_parallel", False) or (getattr(config, "ep_size", None) or 1) > 1
