"""transformers' own parallel plans, by which it shards a model, all but the routed experts, which this library shares.

A plan's rules for experts put an all-reduce behind the experts module, which ours does itself: they are taken out
before transformers applies the plan, and the same processes share the experts as an `ExpertMesh`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from transformers import PreTrainedModel

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.distributed.mesh import ExpertMesh
from quant_moelora.loaders.families import ExpertsSpec

# Sizes of a `DistributedConfig` that give processes tokens, layers or replicas of their own.
_OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size")
_ROUTER_STYLES = {"ep_router", "megamoe_router"}  # of transformers 5.17: hide experts of other processes
# A style of all versions that adds nothing to a module without parameters.
_NO_EFFECT = "replicated_with_grad_allreduce"
# Styles of linear layers whose adapters are served, and the dimension of a weight (N, K) that they cut.
_LINEAR_STYLES = {"colwise": 0, "rowwise": 1}


def leave_out_experts(model: PreTrainedModel, specs: Iterable[ExpertsSpec]) -> None:
    """Take what the model's plans say of its routed experts out of them, before they are applied.

    Raises:
        UnsupportedError: the model is to be spread otherwise too, or the caller's own rules are for experts.
    """
    config = _distributed_config(model)
    if config is None:
        return
    modules = {_as_in_plans(spec.module) for spec in specs}
    rules = re.compile(rf"({'|'.join(map(re.escape, modules))})(\..+)?")
    _check(config, rules)
    plans = _plans(model)
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


def _as_in_plans(module: str) -> str:
    """The name by which plans mean a module of every layer."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def _plans(model: PreTrainedModel) -> list[dict[str, str]]:
    """Of tensor and expert parallel; transformers 5.17 shows one alone, that which it will apply."""
    return [model.tp_plan, *([model.ep_plan] if hasattr(model, "ep_plan") else [])]


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
    return _distributed(value, parameter.device_mesh, parameter.placements)


class LinearPart(NamedTuple):
    """A process's part of a linear layer that a plan has sharded, as its adapters have to know it.

    Attributes:
        mesh: the processes that share the layer.
        dim: of its weight (N, K): with 0 each has some outputs, and B's rows of them; with 1 some inputs, and A's
            columns of them, so that v = x A^T has to be summed over all.
    """

    mesh: DeviceMesh
    dim: int

    def of_factors(
        self,
        a: Tensor,  # (r, K), the whole
        b: Tensor,  # (N, r), the whole
    ) -> tuple[Tensor, Tensor]:  # (r, K or a part of it), (N or a part of it, r)
        """This process's parts of an adapter's factors."""
        held = [b, a]
        held[self.dim] = _distributed(held[self.dim], self.mesh, (Shard(self.dim),)).to_local()
        return held[1], held[0]


def linear_part(linear: nn.Module) -> LinearPart | None:
    """This process's part of a linear layer that `check_linear_part` lets pass; None if every process has it whole."""
    weight = linear.get_parameter("weight")
    if not isinstance(weight, DTensor):
        return None
    (placement,) = weight.placements
    assert isinstance(placement, Shard)  # `check_linear_part`
    return LinearPart(weight.device_mesh, placement.dim)


def check_linear_part(model: PreTrainedModel, name: str, linear: nn.Module) -> None:
    """Raise if processes share the linear layer of that name in a way that adapters do not follow.

    Raises:
        UnsupportedError: the plan shards it by a style other than ``colwise`` and ``rowwise``, the two that PEFT knows.
    """
    weight = linear.get_parameter("weight")
    if not isinstance(weight, DTensor):
        return
    rule = _as_in_plans(name)
    styles = sorted({plan[rule] for plan in _plans(model) if rule in plan})
    dim = _LINEAR_STYLES.get(styles[0]) if len(styles) == 1 else None
    if dim is None or weight.placements != (Shard(dim),):
        raise UnsupportedError(
            f"LoRA on {name}",
            got=f"a layer that transformers' plan shards by {' or '.join(styles) or 'no rule of that name'}",
            rule=" or ".join(_LINEAR_STYLES),
            remedy="load the model with device_mesh= alone, which shares the experts and nothing else",
        )


def _distributed(value: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """A whole tensor that every process has, without asking another one."""
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _distributed_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "distributed_config", None)


def _is_expert_parallel(config: Any) -> bool:
    """Whether a `DistributedConfig` deals out experts; transformers 5.17 has only the flag."""
    return getattr(config, "enable_expert_parallel", False) or (getattr(config, "ep_size", None) or 1) > 1
