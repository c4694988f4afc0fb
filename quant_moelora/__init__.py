"""LoRA on quantised Mixture-of-Experts models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from quant_moelora.core.errors import PrecisionWarning as PrecisionWarning
from quant_moelora.core.errors import QuantMoELoRAError as QuantMoELoRAError
from quant_moelora.core.quant_info import MoEQuantInfo as MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme as QuantScheme
from quant_moelora.layer import MoEExperts as MoEExperts
from quant_moelora.loaders.experts import load_experts as load_experts
from quant_moelora.lora.bank import AdapterBank as AdapterBank
from quant_moelora.lora.requests import adapter_ids as adapter_ids

if TYPE_CHECKING:
    from quant_moelora.integrations.adapters import adapter_context as adapter_context
    from quant_moelora.integrations.adapters import attach_adapters as attach_adapters
    from quant_moelora.integrations.adapters import detach_adapters as detach_adapters
    from quant_moelora.integrations.convert import convert as convert
    from quant_moelora.integrations.dequantize import dequantize as dequantize
    from quant_moelora.integrations.install import install as install
    from quant_moelora.integrations.install import uninstall as uninstall
    from quant_moelora.integrations.transformers import from_pretrained as from_pretrained

try:
    __version__ = version("quant-moelora")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterBank",
    "MoEExperts",
    "MoEQuantInfo",
    "PrecisionWarning",
    "QuantMoELoRAError",
    "QuantScheme",
    "__version__",
    "adapter_context",
    "adapter_ids",
    "attach_adapters",
    "convert",
    "dequantize",
    "detach_adapters",
    "from_pretrained",
    "install",
    "load_experts",
    "uninstall",
]

# What needs transformers, by module.
_INTEGRATIONS = {
    "adapter_context": "adapters",
    "attach_adapters": "adapters",
    "convert": "convert",
    "dequantize": "dequantize",
    "detach_adapters": "adapters",
    "from_pretrained": "transformers",
    "install": "install",
    "uninstall": "install",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first asked for: it takes seconds."""
    if name in _INTEGRATIONS:
        return getattr(import_module(f"quant_moelora.integrations.{_INTEGRATIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
