"""install, uninstall: transformers' own from_pretrained gives packed models; the only patch of other libraries' code.

transformers chooses a quantizer by the method that a config names, before there is a model, and its quantizers refuse
to be made where their own libraries are missing. Which models are ours is seen from the model and its files alone, so
that `AutoModelForCausalLM.from_pretrained` is where the two ways part.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quant_moelora.core.errors import QuantMoELoRAError, UnsupportedError
from quant_moelora.integrations import peft
from quant_moelora.integrations.transformers import HUB_ARGUMENTS, load_with_info
from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
from quant_moelora.loaders.families import build_skeleton, find_experts
from quant_moelora.loaders.layer_format import describe_layers
from quant_moelora.loaders.linears import describe_linears

logger = logging.getLogger(__name__)

METHODS = ("gptq", "awq", "compressed-tensors", "auto-round")  # quant_method of a config
_PATCHED = "from_pretrained"
_STOCK = "_quant_moelora_stock"  # attribute of our function: what it stands for
_LOCK = threading.Lock()


def install() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained`` load quantised Mixture-of-Experts checkpoints with packed experts.

    That are those whose config names one of `METHODS` and whose model and formats this library serves. All others load
    as before: models without experts, models that are not quantised (for those with experts, `from_pretrained` of this
    library is there), other quantisations, and what the caller quantises otherwise by ``quantization_config``. PEFT's
    calls serve adapters of experts on what is loaded. Calling it again does nothing.
    """
    with _LOCK:
        peft.register()
        held = AutoModelForCausalLM.__dict__[_PATCHED]
        if not hasattr(held.__func__, _STOCK):
            setattr(AutoModelForCausalLM, _PATCHED, classmethod(_instead_of(held)))


def uninstall() -> None:
    """Undo `install`; models that have been loaded stay what they are. Without `install` before it does nothing.

    Raises:
        UnsupportedError: another library has replaced the function since.
    """
    with _LOCK:
        held = AutoModelForCausalLM.__dict__[_PATCHED]
        stock = getattr(held.__func__, _STOCK, None)
        if stock is not None and getattr(held.__func__, "__module__", None) != __name__:
            raise UnsupportedError(
                "uninstall",
                got=f"AutoModelForCausalLM.from_pretrained of {held.__func__.__module__}",
                rule="the one that install put there",
                remedy="undo the other library's patch first",
            )
        if stock is not None:
            setattr(AutoModelForCausalLM, _PATCHED, stock)
        peft.unregister()


def _instead_of(stock: Any) -> Callable[..., Any]:
    """The function that takes the place of the class method ``stock``."""

    @functools.wraps(stock.__func__)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load by this library what it serves, and all else as before."""
        config = None if model_args else _config(pretrained_model_name_or_path, kwargs)
        if config is None or not _is_served(pretrained_model_name_or_path, config, kwargs):
            return stock.__func__(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("torch_dtype", None)  # its name in transformers 4
        model, info = load_with_info(pretrained_model_name_or_path, **({"dtype": dtype} if dtype else {}), **kwargs)
        return (model, info) if with_info else model

    from_pretrained.__module__ = __name__
    setattr(from_pretrained, _STOCK, stock)
    return from_pretrained


def _config(path: Any, kwargs: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config of a quantised model with experts; None for all others, and for what transformers has to refuse."""
    if kwargs.get("quantization_config") is not None or kwargs.get("state_dict") is not None:
        return None
    config: Any = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        names = (*HUB_ARGUMENTS, "trust_remote_code")
        try:
            config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in names if name in kwargs})
        except (OSError, ValueError, KeyError):
            return None
    text = config.get_text_config()
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if str(getattr(method, "value", method)) not in METHODS:
        return None
    return config if any("expert" in name for name in text.to_dict()) else None


def _is_served(path: Any, config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's model and formats are served; of one with experts that is not, the log says why."""
    try:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        checkpoint = Checkpoint(resolve_checkpoint(path, **hub))
        model: PreTrainedModel = build_skeleton(checkpoint)
        specs = find_experts(model)
        if not specs:
            return False
        describe_linears(checkpoint, model, describe_layers(checkpoint, specs, model))
    except QuantMoELoRAError as error:
        logger.warning("%s (%s) is left to transformers: %s", path, config.model_type, error)
        return False
    return True
