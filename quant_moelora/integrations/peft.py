"""PEFT on a model of ours: its own calls, whose adapters of experts and routers go where attach_adapters puts them.

PEFT makes LoRA layers around modules and parameters, and fills them from a file afterwards. Packed experts have
neither. So PEFT's table of tuners gets a `LoraModel` that lets the adapter be attached as a whole when its file has
been read; for any other model it gives PEFT's own. All that switches adapters goes through PEFT's layers, of which
`MoEAdapters` is one, so that the adapter methods of transformers' models follow too.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.integrations.adapters import MoEAdapters, adapters_of, detach_adapters
from quant_moelora.integrations.session import ADAPTER_NAMES, AdapterSession
from quant_moelora.loaders.checkpoint import resolve_checkpoint
from quant_moelora.lora.adapter_file import PREFIX, Adapter, load_adapter, parse_adapter
from quant_moelora.lora.combine import combine
from quant_moelora.lora.export import adapter_tensors

logger = logging.getLogger(__name__)


def prepare(model: PreTrainedModel, session: AdapterSession) -> None:
    """Let PEFT and the adapter methods of transformers serve a model whose experts have been loaded."""
    model.add_module("moe_adapters", MoEAdapters(model, session))
    own: Any = model  # whose methods are assigned
    own.load_adapter = functools.partial(load_into, model)
    model.register_load_state_dict_pre_hook(_refuse_unread)
    register()


def register() -> None:
    """Let PEFT use `MoELoraModel` for models of ours; `unregister` undoes it."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = MoELoraModel
    elif PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is not MoELoraModel:
        logger.warning(
            "PEFT's tuner of LoRA has been replaced by %s, and stays it: use quant_moelora.attach_adapters",
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA],
        )


def unregister() -> None:
    """Give PEFT its own tuner back."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is MoELoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


def _refuse_unread(module: nn.Module, state_dict: Mapping[str, Tensor], *_: Any) -> None:
    """Raise for LoRA of experts in a state dict: the model has no such parameters, and PEFT would not say so.

    Raises:
        AdapterError: there is some.
    """
    found = [key for key in state_dict if ".experts." in key and ".lora_" in key]
    if found:
        raise AdapterError(
            f"loading a state dict into {type(module).__name__}",
            got=f"LoRA of experts, such as {found[0]}",
            rule="an adapter given to quant_moelora.attach_adapters, to the model's load_adapter, or to PEFT",
            remedy="call quant_moelora.install() first, if it was PEFT, since its own tuner leaves experts out",
        )


class MoELoraModel(LoraModel):
    """PEFT's tuner of LoRA for a model of ours.

    Raises:
        UnsupportedError: an adapter is to be trained or merged.
        AdapterError: an adapter does not fit the model.
    """

    tuner_layer_cls = BaseTunerLayer  # MoEAdapters is one, and no LoraLayer

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own tuner for a model of somebody else's."""
        return super().__new__(cls) if _is_ours(model) else LoraModel(model, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wait for an adapter's file; until then it changes nothing, as a new adapter of PEFT does."""
        config, held = self.peft_config[adapter_name], adapters_of(model)
        if not config.inference_mode:
            raise UnsupportedError(
                f"adapter {adapter_name}",
                got="an adapter to be trained",
                rule="one that has been trained, with inference_mode=True in its config",
                remedy="train it on another copy of the model, and load it here with PeftModel.from_pretrained",
            )
        held.check_name(adapter_name)
        # The tensors will come as PEFT converts them for transformers 5; the config has to say the same.
        convert_peft_config_for_transformers(config, model=model, conversions=None)
        held.expected[adapter_name] = adapter_name in self.active_adapters

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Attach the adapter; what is left for PEFT to load are its own layers' parameters, as they are filled."""
        if not _is_ours(model):
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        held = adapters_of(model)
        tensors = {key: tensor.to("cpu") for key, tensor in state_dict.items()}
        path = Path(adapter_name)
        adapter = parse_adapter(config, tensors, held.specs, path, str(config.peft_version))
        held.attach({adapter_name: adapter})
        if held.expected.pop(adapter_name, False):
            _set_adapter(held, [adapter_name])
        layers = {name: held.model.get_submodule(name) for name in held.held[adapter_name].linears}
        return {
            f"{PREFIX}{name}.lora_{letter}.{adapter_name}.weight": own[adapter_name].get_parameter("weight").detach()
            for name, layer in layers.items()
            if isinstance(layer, LoraLayer)  # all but routers
            for letter, own in (("A", layer.lora_A), ("B", layer.lora_B))
        }

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors as they were read, bit for bit."""
        if not _is_ours(model):
            return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        held = adapters_of(model)
        held.check_attached("saving an adapter", [adapter_name])
        prefix = PREFIX if isinstance(model, PeftModel) else ""
        return {
            f"{prefix}{key.removeprefix(PREFIX).removesuffix('.weight')}.{adapter_name}.weight": tensor
            for key, tensor in held.held[adapter_name].tensors.items()
        }

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """Give the forwards within the context the names of their rows; fewer of them serve beams, as elsewhere."""
        names: Sequence[str] | None = kwargs.get(ADAPTER_NAMES)
        if names is None:
            yield
            return
        if self.training:
            raise AdapterError(
                ADAPTER_NAMES, got="a model in training mode", rule="one in evaluation mode", remedy="call model.eval()"
            )
        with adapters_of(self.model).session.use(names):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active, all of them at once for rows without a name."""
        # First where it can fail, so that all layers stay as they are if it does.
        adapters_of(self.model).set_adapter(adapter_name, inference_mode)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Detach an adapter."""
        held = adapters_of(self.model)
        super().delete_adapter(adapter_name)
        self.active_adapter = list(held.active_adapters)
        _set_adapter(held, self.active_adapter)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Attach the weighted sum of adapters as a new one, by ``cat`` or ``linear``; see `combine`.

        Raises:
            AdapterError: another combination, which is also PEFT's default; or an adapter that is not attached.
        """
        if adapter_name in self.peft_config:
            return
        held = adapters_of(self.model)
        held.check_attached("adapters to combine", adapters)
        chosen = {name: held.held[name] for name in adapters}
        combination_type = "linear" if len(adapters) == 1 else combination_type  # as PEFT
        layers, linears = combine(chosen, weights, combination_type)
        combined = Adapter(Path(adapter_name), chosen[adapters[0]].config, layers, linears)
        model_type = self.model.config.model_type
        try:
            config, tensors = adapter_tensors(combined, held.specs, "fused", model_type)
        except AdapterError:  # it is not on all experts
            config, tensors = adapter_tensors(combined, held.specs, "per_expert", model_type)
        held.attach({adapter_name: dataclasses.replace(combined, config=config, tensors=tensors)})
        self.peft_config[adapter_name] = config

    def unload(self) -> nn.Module:
        """The model without adapters."""
        held = adapters_of(self.model)
        detach_adapters(self.model, list(held.held))
        return super().unload()

    def _check_merge_allowed(self) -> None:
        adapters_of(self.model).merge()


def _is_ours(model: nn.Module) -> bool:
    return any(isinstance(module, MoEAdapters) for module in model.modules())


def _set_adapter(held: MoEAdapters, names: list[str]) -> None:
    """Make adapters active in every layer, experts first."""
    held.set_adapter(names, inference_mode=True)
    for module in held.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names, inference_mode=True)


def load_into(
    model: Any,
    peft_model_id: str | Path | None = None,
    adapter_name: str | None = None,
    peft_config: LoraConfig | None = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    adapter_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LoadStateDictInfo:
    """``load_adapter`` of a transformers model: attach an adapter and make it the active one.

    Args:
        model: a model of `from_pretrained`.
        peft_model_id: folder or hub repository of the adapter.
        adapter_name: the name to give it; "default" if there is none.
        peft_config: its config, if it is given by tensors.
        adapter_state_dict: its tensors.
        low_cpu_mem_usage: means nothing here.
        is_trainable: must be False.
        hotswap: must not be True.
        adapter_kwargs: of the hub: revision, token, cache_dir, local_files_only, subfolder.
        kwargs: the same; others mean nothing here.

    Raises:
        AdapterError: neither a file nor config and tensors, or as `attach_adapters`.
        UnsupportedError: it is to be trained, or to take the place of another one.
    """
    name, held = adapter_name or "default", adapters_of(model)
    if is_trainable or hotswap is True:
        raise UnsupportedError(
            f"adapter {name}",
            got=f"is_trainable={is_trainable}, hotswap={hotswap}",
            rule="a trained adapter of a new name",
            remedy="leave the arguments out, and detach the adapter whose place it is to take",
        )
    if peft_model_id is not None:
        given = {**kwargs, **(adapter_kwargs or {})}
        names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        folder = resolve_checkpoint(peft_model_id, **{n: given[n] for n in names if given.get(n) is not None})
        adapter = load_adapter(folder, held.specs)
    elif peft_config is not None and adapter_state_dict is not None:
        tensors = {key: tensor.to("cpu") for key, tensor in adapter_state_dict.items()}
        adapter = parse_adapter(peft_config, tensors, held.specs, Path(name), str(peft_config.peft_version))
    else:
        raise AdapterError(
            f"adapter {name}",
            got="neither a folder nor config and tensors",
            rule="peft_model_id, or peft_config and adapter_state_dict",
            remedy="give one of the two",
        )
    held.attach({name: adapter})
    _set_adapter(held, [name])
    model.peft_config = {**getattr(model, "peft_config", {}), name: adapter.config}
    model._hf_peft_config_loaded = True  # by which transformers knows
    empty = {f.name: [] if f.name == "error_msgs" else set[Any]() for f in dataclasses.fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**{**empty, "conversion_errors": {}})  # pyright: ignore[reportArgumentType]
