"""Adapters of plain linear layers: PEFT's own layers around them, filled from files read here, led by the session.

PEFT's forward asks for each row's name. A step that is captured has none, and serves all of them: `_Stack`. It also
serves layers of which each process has a part by a plan of transformers, whose collectives have to come in one order on
all of them, while PEFT takes a batch's adapters in that of a set.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from quant_moelora.core.errors import AdapterError
from quant_moelora.distributed.mesh import Group, group_of
from quant_moelora.integrations.parallel_plan import check_linear_part, linear_part
from quant_moelora.integrations.session import ADAPTER_NAMES, AdapterSession
from quant_moelora.lora.adapter_file import Adapter, Factor

_LED = "_quant_moelora_session"  # attribute of PEFT's layers whose forward the session leads
_STACK = "_quant_moelora_stack"  # attribute of the same: the last `_Stack`


def check_linears(model: PreTrainedModel, adapter: Adapter, routers: Mapping[str, nn.Module]) -> None:
    """Raise unless every other module of the adapter is a linear layer or router of the model, of its dimensions.

    Raises:
        AdapterError: it is not, or it is a router that transformers has sharded.
        UnsupportedError: a linear layer as `check_linear_part`.
    """
    for name, factor in adapter.linears.items():
        module = routers.get(name) or _base_linear(model, name)
        if module is None:
            raise AdapterError(
                f"adapter {adapter.path}",
                got=f"LoRA on {name}, which is no linear layer, router or routed expert of the model",
                rule="modules of the model",
                remedy="attach the adapter to the model it was trained on; embeddings are not served",
            )
        if name not in routers:
            check_linear_part(model, name, module)
        elif isinstance(module.get_parameter("weight"), DTensor):
            raise AdapterError(
                f"adapter {adapter.path}",
                got=f"LoRA on router {name}, of which each process holds a part, by transformers' tensor parallel plan",
                rule="routers that every process holds whole",
                remedy="load the model with device_mesh= alone, which shares the experts and nothing else",
            )
        rank, (n, k) = factor.a.shape[0], module.get_parameter("weight").shape
        if (tuple(factor.a.shape), tuple(factor.b.shape)) != ((rank, k), (n, rank)):
            raise AdapterError(
                f"LoRA of {name} in {adapter.path}",
                got=f"A {list(factor.a.shape)}, B {list(factor.b.shape)}",
                rule=f"A [r, {k}] and B [{n}, r]",
                remedy="attach the adapter to the model it was trained on",
            )


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _base_linear(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer of that name, through PEFT's wrapper if it has one; None if there is none."""
    module = find_module(model, name)
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    return module if isinstance(module, nn.Linear) else None


class _Around(nn.Module):
    """What PEFT is given to put its layers into: a module around the model.

    Of a model it would rename targets that it takes for experts, such as shared experts' gate_proj, and keep our config
    of linear layers as that of the adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def inject_linears(model: nn.Module, name: str, adapter: Adapter, linears: Mapping[str, Factor]) -> None:
    """Let PEFT put its layers around the adapter's plain linears, and fill them; the new ones are frozen.

    Of a layer that processes share each holds its part of the factor that is cut with it.

    Afterwards every layer of PEFT in the model has this adapter as its active one; `lead` sets that right.
    """
    if not linears:
        return
    config = copy.deepcopy(adapter.config)
    targets = {f"model.{module}": factor for module, factor in linears.items()}
    config.target_modules = list(targets)
    config.target_parameters = None
    config.exclude_modules = None
    config.layers_to_transform = None
    config.inference_mode = True
    # The ranks of the file, exactly, and alphas that give its scalings without PEFT's patterns entering twice.
    config.use_rslora = False
    config.lora_dropout = 0.0  # of training; PEFT's new layers would start in training mode
    config.rank_pattern = {module: factor.a.shape[0] for module, factor in targets.items()}
    config.alpha_pattern = {module: f.scaling * f.a.shape[0] for module, f in targets.items()}
    # PEFT freezes the base. torch chooses between matrix products by requires_grad, which would change the base's bits.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert isinstance(config, LoraConfig)  # load_adapter
    LoraModel(_Around(model), config, name)
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module_name, factor in linears.items():
        module = model.get_submodule(module_name)
        assert isinstance(module, LoraLayer)  # LoraModel
        part = linear_part(module.get_base_layer())
        held = (factor.a, factor.b) if part is None else part.of_factors(factor.a, factor.b)
        for own, tensor in zip((module.lora_A[name], module.lora_B[name]), held, strict=True):
            weight = own.get_parameter("weight")
            own.register_parameter("weight", nn.Parameter(tensor.to(weight, copy=True), requires_grad=False))


def eject_linears(model: nn.Module, name: str) -> None:
    """Take an adapter out of PEFT's layers, which stay."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Otherwise PEFT would make another one active, and trainable, and say so.
            module.set_adapter([active for active in module.active_adapters if active != name], inference_mode=True)
            module.delete_adapter(name)


def lead(model: nn.Module, session: AdapterSession) -> None:
    """Let the session say which adapters the rows of PEFT's layers use, and which are active where no row is named."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(session.enabled)
            module.set_adapter(list(session.active), inference_mode=True)
            if getattr(module, _LED, None) is not session:
                module.forward = functools.partial(_forward, session, module, module.forward)
                setattr(module, _LED, session)


def _forward(
    session: AdapterSession, layer: LoraLayer, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The forward of a layer of PEFT with the names of its rows, which are tokens where sequences are packed.

    PEFT's model class would give them the names; ours is the model.
    """
    base = layer.get_base_layer()
    if not layer.lora_A:  # all have been detached
        return base(x, *args, **kwargs)
    if session.nameless or isinstance(base.weight, DTensor):
        y: Tensor = base(x, *args, **kwargs)
        stack = _stack(session, layer)
        mine = _mine(session, stack, x)
        return y if mine is None else y + stack.delta(x, mine).to(y.dtype)
    rows = x.flatten(0, -2) if session.packed else x
    names = session.row_names(rows.shape[0])
    if names is None:
        return forward(x, *args, **kwargs)
    y = forward(rows, *args, **{**kwargs, ADAPTER_NAMES: names})
    return y.unflatten(0, x.shape[:-1]) if session.packed else y


@dataclass(frozen=True)
class _Stack:
    """Factors of a layer's adapters, one behind the other, so that two products serve rows of all of them.

    Which adapter a row has decides which part of v = x A^T is kept; no shape and no launch depends on it.

    Attributes:
        modules: of the session, for which it was made.
        a: A of all adapters.
        b: B of all adapters.
        owners: place of the adapter that a rank belongs to.
        scalings: of that adapter.
        sharers: processes that have some columns of x and of A each; None where each has all.
    """

    modules: object
    a: Tensor  # (R, K)
    b: Tensor  # (N, R)
    owners: Tensor  # (R,) int32
    scalings: Tensor  # (R,) of A's dtype
    sharers: Group | None

    def delta(self, x: Tensor, mine: Tensor) -> Tensor:  # (..., K), (..., R) bool -> (..., N)
        """What adapters add to the layer's output, each row's being ``mine``; exactly zero for the base."""
        v = linear(x.to(self.a.dtype), self.a)
        v = (v if self.sharers is None else self.sharers.all_reduce(v)) * self.scalings
        return linear(torch.where(mine, v, torch.zeros_like(v)), self.b)


def _mine(session: AdapterSession, stack: _Stack, x: Tensor) -> Tensor | None:  # (..., K) -> (..., R) bool
    """Which ranks each row uses; None where no row uses any, as every process knows that shares the layer."""
    if session.unnamed:
        active = [stack.owners == session.places[name] for name in session.active] if session.enabled else []
        return functools.reduce(torch.logical_or, active) if active else None
    places = session.token_places(x.numel() // x.shape[-1], x.device)
    return None if places is None else places.view(*x.shape[:-1], 1) == stack.owners


def _stack(session: AdapterSession, layer: LoraLayer) -> _Stack:
    """The layer's stack. The step before a capture makes it, so that graphs read it where it stands."""
    held: _Stack | None = getattr(layer, _STACK, None)
    if held is None or held.modules is not session.modules:
        names = [name for name in session.places if name in layer.lora_A]
        a: list[Tensor] = [layer.lora_A[name].get_parameter("weight") for name in names]
        b: list[Tensor] = [layer.lora_B[name].get_parameter("weight") for name in names]
        assert names  # else `_forward` needs none
        ranks = [part.shape[0] for part in a]
        owners = torch.tensor([session.places[n] for n, r in zip(names, ranks, strict=True) for _ in range(r)])
        scalings = torch.tensor([layer.scaling[n] for n, r in zip(names, ranks, strict=True) for _ in range(r)])
        stacked_a, stacked_b = torch.cat(a).detach(), torch.cat(b, dim=1).detach()
        part = linear_part(layer.get_base_layer())
        sharers = group_of(part.mesh) if part is not None and part.dim == 1 else None
        owners = owners.int().to(stacked_a.device)
        held = _Stack(session.modules, stacked_a, stacked_b, owners, scalings.to(stacked_a), sharers)
        setattr(layer, _STACK, held)
    return held
