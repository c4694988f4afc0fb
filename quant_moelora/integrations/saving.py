"""What ``save_pretrained`` of a model with packed experts writes: the packed form, without adapters."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.loaders.packed_form import facts_of, file_metadata


def packed_state(model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """The base model's tensors by name, and metadata for every file that holds some of them.

    Where transformers itself saves adapters, and nothing else, it is left to find them.

    Raises:
        UnsupportedError: the model is a part of one.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None, {}
    state, facts = base_state(model), {}
    for name, experts in experts_of(model).items():
        assert experts.moe is not None  # from_pretrained
        state |= named_tensors(name, experts.moe.info)
        facts[experts.spec.layer] = facts_of(experts.moe.info)
    return state, file_metadata(facts)


def base_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything but the experts, under the names it has without adapters.

    PEFT's layers, which stand around the linear ones, may still be there when all adapters are gone.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        layer = next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in layers), None)
        if layer is None:
            state[key] = tensor
        elif key.startswith(f"{layer}.base_layer."):
            state[layer + key.removeprefix(f"{layer}.base_layer")] = tensor
    return state


def named_tensors(module: str, info: MoEQuantInfo) -> dict[str, Tensor]:
    """A layer's tensors under their names in a checkpoint."""
    return {f"{module}.{name}": tensor for name, tensor in info.tensors().items()}
