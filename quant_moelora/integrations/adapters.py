"""attach_adapters: LoRA adapters on a loaded model, chosen row by row with ``adapter_names``.

Factors of routed experts go into the experts' contexts, those of routers into hooks behind them. PEFT serves the plain
linear layers (attention and others) with its own mixed-batch forward, which takes the same names.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.integrations.routers import attach_routers, on_device, routers_of
from quant_moelora.integrations.session import ADAPTER_NAMES, BASE_NAME, AdapterSession
from quant_moelora.integrations.transformers import FusedExperts, experts_of
from quant_moelora.loaders.checkpoint import resolve_checkpoint
from quant_moelora.loaders.names import model_names
from quant_moelora.lora.adapter_file import Adapter, Factor, load_adapter
from quant_moelora.lora.bank import build_context

_ATTACHED = "_quant_moelora_adapters"  # attribute of the model: what attach_adapters has put on it, by name


def attach_adapters(model: PreTrainedModel, adapters: Mapping[str, str | Path]) -> None:
    """Attach adapters to a model of `from_pretrained`, in addition to those it has.

    Afterwards ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one name a row,
    ``__base__`` for none. Without ``adapter_names`` every row uses the base model.

    Args:
        model: the model; it must be where it is to stay.
        adapters: folder (or hub repository) of each adapter, by the name to give it.

    Raises:
        AdapterError: a name is taken, or an adapter does not fit the model; then none of them is attached.
        UnsupportedError: the model is not one of `from_pretrained`.
    """
    experts = experts_of(model)
    if not experts:
        raise UnsupportedError(
            f"model {type(model).__name__}",
            got="no experts of this library",
            rule="a model loaded by quant_moelora.from_pretrained",
            remedy="load the model with it",
        )
    session = next(iter(experts.values())).session
    attached: dict[str, Adapter] = dict(getattr(model, _ATTACHED, {}))
    specs = [module.spec for module in experts.values()]
    routers = routers_of(model, specs)
    loaded: dict[str, Adapter] = {}
    routed: dict[str, dict[str, Factor]] = {}
    for name, path in adapters.items():
        _check_name(name, attached)
        loaded[name] = _as_in_model(load_adapter(resolve_checkpoint(path), specs), model)
        _check_linears(model, loaded[name], routers)
        routed[name] = {n: on_device(f, routers[n]) for n, f in loaded[name].linears.items() if n in routers}
    everything = {**attached, **loaded}
    contexts = _contexts(experts, everything, model.dtype)
    try:
        for name, adapter in loaded.items():
            _inject_linears(model, name, adapter, {n: f for n, f in adapter.linears.items() if n not in routers})
    finally:
        # Without names a PEFT layer applies its newest adapter to every row, also after a failure in between.
        _hook_linears(model, session)
    for module_name, ctx in contexts.items():
        moe = experts[module_name].moe
        assert moe is not None  # from_pretrained
        moe.attach(ctx)
    attach_routers(routers, routed, session)
    session.names = list(everything)
    setattr(model, _ATTACHED, everything)


def _check_name(name: str, attached: Mapping[str, Adapter]) -> None:
    # PEFT holds adapters in ModuleDicts, which have attributes of their own.
    if name in attached or name == BASE_NAME or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            "adapter name",
            got=repr(name),
            rule=f"a new name without dots, other than {BASE_NAME} (attached: {', '.join(attached) or 'none'}) "
            "and the attributes of a torch module",
            remedy="choose another name",
        )


def _contexts(
    experts: Mapping[str, FusedExperts], adapters: Mapping[str, Adapter], dtype: torch.dtype
) -> dict[str, Any]:
    """Context of every layer that an adapter touches; None for the others."""
    contexts: dict[str, Any] = {}
    for name, module in experts.items():
        assert module.moe is not None  # from_pretrained
        factors = [adapter.layers.get(module.spec.layer, {}) for adapter in adapters.values()]
        contexts[name] = build_context(module.moe.info, factors, dtype) if any(factors) else None
    return contexts


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
