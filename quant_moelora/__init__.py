"""LoRA on quantised Mixture-of-Experts models."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from quant_moelora.core.errors import QuantMoELoRAError as QuantMoELoRAError
from quant_moelora.core.quant_info import MoEQuantInfo as MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme as QuantScheme
from quant_moelora.layer import MoEExperts as MoEExperts
from quant_moelora.loaders.experts import load_experts as load_experts
from quant_moelora.lora.bank import AdapterBank as AdapterBank
from quant_moelora.lora.requests import adapter_ids as adapter_ids

if TYPE_CHECKING:
    from quant_moelora.integrations.adapters import attach_adapters as attach_adapters
    from quant_moelora.integrations.adapters import detach_adapters as detach_adapters
    from quant_moelora.integrations.transformers import from_pretrained as from_pretrained

try:
    __version__ = version("quant-moelora")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterBank",
    "MoEExperts",
    "MoEQuantInfo",
    "QuantMoELoRAError",
    "QuantScheme",
    "__version__",
    "adapter_ids",
    "attach_adapters",
    "detach_adapters",
    "from_pretrained",
    "load_experts",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first asked for: it takes seconds."""
    if name == "from_pretrained":
        from quant_moelora.integrations.transformers import from_pretrained

        return from_pretrained
    if name in ("attach_adapters", "detach_adapters"):
        from quant_moelora.integrations import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
