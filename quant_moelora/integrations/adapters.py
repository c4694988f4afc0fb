"""attach_adapters, detach_adapters: LoRA on a loaded model, chosen row by row with ``adapter_names``.

Factors of routed experts go into a bank, those of routers into hooks behind them. PEFT serves the plain
linear layers (attention and others) with its own mixed-batch forward, which takes the same names.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.core.routing import BASE_SLOT
from quant_moelora.integrations.routers import attach_routers, detach_routers, on_device, routers_of
from quant_moelora.integrations.session import ADAPTER_NAMES, BASE_NAME, AdapterSession
from quant_moelora.integrations.transformers import FusedExperts, experts_of
from quant_moelora.layer import MoEExperts
from quant_moelora.loaders.checkpoint import resolve_checkpoint
from quant_moelora.loaders.names import model_names
from quant_moelora.lora.adapter_file import Adapter, Factor, LayerFactors, load_adapter
from quant_moelora.lora.bank import AdapterBank

_ATTACHED = "_quant_moelora_adapters"  # attribute of the model, its _Attached, and of PEFT layers with our hook


@dataclass(eq=False)
class _Attached:
    """What attach_adapters has put on a model.

    Attributes:
        bank: the experts' adapters; None if there are none.
        fixed: whether it was made for adapters to come, too; otherwise it is made anew whenever some are attached.
        factors: of all attached adapters, by name; empty ones if the bank is fixed.
    """

    bank: AdapterBank | None = None
    fixed: bool = False
    factors: dict[str, dict[int, LayerFactors]] = field(default_factory=dict)


def attach_adapters(
    model: PreTrainedModel,
    adapters: Mapping[str, str | Path],
    *,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    capacity_bytes: int | None = None,
) -> None:
    """Attach adapters to a model of `from_pretrained`, in addition to those it has.

    Afterwards ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one name a row,
    ``__base__`` for none. Without ``adapter_names`` every row uses the base model.

    The experts' adapters stand in an `AdapterBank`. It has just the room that they need, and others that are attached
    later get a new one; unless the first call, which may attach none, says how much room there is to be. Then what is
    attached and detached later changes no address, and a captured CUDA graph serves it.

    Args:
        model: the model; it must be where it is to stay.
        adapters: folder (or hub repository) of each adapter, by the name to give it.
        max_adapters: how many adapters may have factors of experts at one time.
        max_rank: the largest rank of these factors.
        capacity_bytes: of all these factors together; None for ``max_adapters`` of ``max_rank`` on everything.

    Raises:
        AdapterError: a name is taken, an adapter does not fit the model, or there is no room for it; then none of them
            is attached. Or the bank's size is given in part, or not by the first call.
        BackendError: a CUDA graph was captured without adapters; then none is attached either.
        UnsupportedError: the model is not one of `from_pretrained`.
    """
    experts = _experts(model)
    session = next(iter(experts.values())).session
    held: _Attached = getattr(model, _ATTACHED, None) or _Attached()
    size = _size(held, max_adapters, max_rank, capacity_bytes)
    specs = [module.spec for module in experts.values()]
    routers = routers_of(model, specs)
    loaded: dict[str, Adapter] = {}
    routed: dict[str, dict[str, Factor]] = {}
    for name, path in adapters.items():
        _check_name(name, session.slots)
        loaded[name] = _as_in_model(load_adapter(resolve_checkpoint(path), specs), model)
        _check_linears(model, loaded[name], routers)
        routed[name] = {n: on_device(f, routers[n]) for n, f in loaded[name].linears.items() if n in routers}
    factors = {name: adapter.layers for name, adapter in loaded.items()}
    with ExitStack() as undo:
        if held.fixed or size:
            held = _in_fixed_bank(held, experts, factors, model.dtype, size, undo)
        elif factors:
            held = _in_new_bank({**held.factors, **factors}, experts, model.dtype, undo)
        try:
            for name, adapter in loaded.items():
                undo.callback(_eject_linears, model, name)
                _inject_linears(model, name, adapter, {n: f for n, f in adapter.linears.items() if n not in routers})
        finally:
            # Without names a PEFT layer applies its newest adapter to every row, also after a failure in between.
            _hook_linears(model, session)
        undo.pop_all()
    attach_routers(routers, routed, session)
    session.slots = _slots(held)
    setattr(model, _ATTACHED, held)


def detach_adapters(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Detach adapters from a model. Their names and their room are free again; the addresses of others stay.

    Args:
        model: the model.
        names: attached adapters.

    Raises:
        AdapterError: one is not attached; then none of them is detached.
        UnsupportedError: the model is not one of `from_pretrained`.
    """
    experts, names = _experts(model), list(dict.fromkeys(names))
    session = next(iter(experts.values())).session
    unknown = [name for name in names if name not in session.slots]
    if unknown:
        raise AdapterError(
            "detaching adapters",
            got=f"unknown {', '.join(unknown)}",
            rule=f"attached ones: {', '.join(session.slots) or 'none is'}",
            remedy="correct the name",
        )
    held: _Attached = getattr(model, _ATTACHED, None) or _Attached()
    for name in names:
        if session.slots[name] != BASE_SLOT:
            assert held.bank is not None  # which gave the slot
            held.bank.remove(name)
        _eject_linears(model, name)
        del held.factors[name]
    detach_routers(routers_of(model, [module.spec for module in experts.values()]), names)
    session.slots = _slots(held)


def _experts(model: nn.Module) -> dict[str, FusedExperts]:
    """The experts of a model of `from_pretrained`, by name; UnsupportedError if it is none."""
    experts = experts_of(model)
    if not experts:
        raise UnsupportedError(
            f"model {type(model).__name__}",
            got="no experts of this library",
            rule="a model loaded by quant_moelora.from_pretrained",
            remedy="load the model with it",
        )
    return experts


def _size(
    held: _Attached, max_adapters: int | None, max_rank: int | None, capacity_bytes: int | None
) -> dict[str, int | None]:
    """Arguments for a bank of the size that the caller asks for; none if no size is given.

    Raises:
        AdapterError: it is given in part, or the model has its bank.
    """
    given = {"max_adapters": max_adapters, "max_rank": max_rank, "capacity_bytes": capacity_bytes}
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if named and (max_adapters is None or max_rank is None or held.bank is not None):
        raise AdapterError(
            "size of the adapter bank",
            got=", ".join(named) + ("" if held.bank is None else " for a model that has its bank"),
            rule="max_adapters and max_rank, at the first attach_adapters of a model",
            remedy="give both at first, or neither",
        )
    return given if named else {}


def _in_fixed_bank(
    held: _Attached,
    experts: Mapping[str, FusedExperts],
    adapters: Mapping[str, dict[int, LayerFactors]],
    dtype: torch.dtype,
    size: Mapping[str, Any],
    undo: ExitStack,
) -> _Attached:
    """New adapters in the model's bank, which is made if it has none; with what undoes it."""
    bank = held.bank
    if bank is None:
        bank = AdapterBank({module.spec.layer: _moe(module).info for module in experts.values()}, dtype, **size)
        _attach_bank(bank, experts, undo)
    for name, factors in adapters.items():
        if any(factors.values()):
            bank.add(name, factors)
            undo.callback(bank.remove, name)
    return _Attached(bank, True, {**held.factors, **{name: {} for name in adapters}})


def _in_new_bank(
    adapters: dict[str, dict[int, LayerFactors]],
    experts: Mapping[str, FusedExperts],
    dtype: torch.dtype,
    undo: ExitStack,
) -> _Attached:
    """All adapters in a bank of just their size, for the layers that one of them touches; with what undoes it."""
    touched = {layer for factors in adapters.values() for layer, held in factors.items() if held}
    infos = {module.spec.layer: _moe(module).info for module in experts.values() if module.spec.layer in touched}
    bank = AdapterBank.sized_to(infos, adapters, dtype) if infos else None
    _attach_bank(bank, experts, undo)
    return _Attached(bank, False, adapters)


def _attach_bank(bank: AdapterBank | None, experts: Mapping[str, FusedExperts], undo: ExitStack) -> None:
    """Let every layer serve its context, or the base if it has none."""
    contexts = {} if bank is None else bank.contexts
    for module in experts.values():
        moe = _moe(module)
        before = moe.injection.ctx
        moe.attach(contexts.get(module.spec.layer))
        undo.callback(moe.attach, before)


def _moe(module: FusedExperts) -> MoEExperts:
    assert module.moe is not None  # from_pretrained
    return module.moe


def _slots(held: _Attached) -> dict[str, int]:
    """Slot of each attached adapter."""
    slots = {} if held.bank is None else {name: one.slot for name, one in held.bank.report().adapters.items()}
    return {name: slots.get(name, BASE_SLOT) for name in held.factors}


def _check_name(name: str, attached: Iterable[str]) -> None:
    # PEFT holds adapters in ModuleDicts, which have attributes of their own.
    if name in attached or name == BASE_NAME or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            "adapter name",
            got=repr(name),
            rule=f"a new name without dots, other than {BASE_NAME} (attached: {', '.join(attached) or 'none'}) "
            "and the attributes of a torch module",
            remedy="choose another name",
        )


def _base_linear(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer of that name, through PEFT's wrapper if it has one; None if there is none."""
    module = _module(model, name)
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    return module if isinstance(module, nn.Linear) else None


def _as_in_model(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """The adapter with the model's own names of its linear layers and routers.

    Those of transformers 4, such as ``block_sparse_moe.gate``, go through transformers' renamings.

    Raises:
        AdapterError: two of its names mean one module.
    """
    name_of = model_names(model)
    linears: dict[str, Factor] = {}
    for name, factor in adapter.linears.items():
        key, converted = name_of(f"{name}.weight")
        own = name if converted or _module(model, name) is not None else key.removesuffix(".weight")
        if own in linears:
            raise AdapterError(
                f"adapter {adapter.path}",
                got=f"LoRA on {name} and under another name on {own}, which is the same module",
                rule="one pair of factors for a module",
                remedy="remove one of the two",
            )
        linears[own] = factor
    return replace(adapter, linears=linears)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _check_linears(model: nn.Module, adapter: Adapter, routers: Mapping[str, nn.Module]) -> None:
    """Raise unless every other module of the adapter is a linear layer or router of the model, of its dimensions.

    Raises:
        AdapterError: it is not.
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
        rank, (n, k) = factor.a.shape[0], module.get_parameter("weight").shape
        if (tuple(factor.a.shape), tuple(factor.b.shape)) != ((rank, k), (n, rank)):
            raise AdapterError(
                f"LoRA of {name} in {adapter.path}",
                got=f"A {list(factor.a.shape)}, B {list(factor.b.shape)}",
                rule=f"A [r, {k}] and B [{n}, r]",
                remedy="attach the adapter to the model it was trained on",
            )


def _inject_linears(model: PreTrainedModel, name: str, adapter: Adapter, linears: Mapping[str, Factor]) -> None:
    """Let PEFT put its layers around the adapter's plain linears, and fill them."""
    if not linears:
        return
    config = copy.deepcopy(adapter.config)
    config.target_modules = list(linears)
    config.target_parameters = None
    config.exclude_modules = None
    config.layers_to_transform = None
    # The ranks of the file, exactly, and alphas that give its scalings without PEFT's patterns entering twice.
    config.use_rslora = False
    config.lora_dropout = 0.0  # of training; PEFT's new layers would start in training mode
    config.rank_pattern = {module: factor.a.shape[0] for module, factor in linears.items()}
    config.alpha_pattern = {module: f.scaling * f.a.shape[0] for module, f in linears.items()}
    # PEFT freezes the base. torch chooses between matrix products by requires_grad, which would change the base's bits.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # which is what is wanted
        inject_adapter_in_model(config, model, name)
    for parameter in trainable:
        parameter.requires_grad_(True)
    with torch.no_grad():
        for module_name, factor in linears.items():
            module = model.get_submodule(module_name)
            assert isinstance(module, LoraLayer)  # inject_adapter_in_model
            for held, tensor in ((module.lora_A[name], factor.a), (module.lora_B[name], factor.b)):
                held.get_parameter("weight").copy_(tensor).requires_grad_(False)


def _eject_linears(model: nn.Module, name: str) -> None:
    """Take an adapter out of PEFT's layers, which stay."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Otherwise PEFT would make another one active, and trainable. Rows have names, so that none need be.
            module.set_adapter([])
            module.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)


def _hook_linears(model: nn.Module, session: AdapterSession) -> None:
    """Give every PEFT layer the names of its rows at each call; PEFT's model class would do it, ours is the model."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and not getattr(module, _ATTACHED, False):
            module.register_forward_pre_hook(functools.partial(_pass_names, session), with_kwargs=True)
            setattr(module, _ATTACHED, True)


def _pass_names(
    session: AdapterSession, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x: Tensor = args[0]
    return args, {**kwargs, ADAPTER_NAMES: session.row_names(x.shape[0])}
