"""dequantize: a packed model as its family's own, with the weights that its codes mean."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.integrations.adapters import adapters_of
from quant_moelora.integrations.saving import base_state
from quant_moelora.integrations.transformers import FusedExperts, experts_of
from quant_moelora.loaders.families import ExpertsSpec


def dequantize(model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """A model of its family's own class, where the packed one is, which is left as it is.

    The values of the experts are exact in float32 and rounded to other dtypes.

    Args:
        model: a model of `from_pretrained`, without adapters.
        dtype: of the experts, and of everything else that is in the model's dtype; None for the model's.

    Raises:
        UnsupportedError: the model has no packed experts, or parts of layers.
        AdapterError: adapters are attached.
    """
    return _stock_model(model, dtype, copied=True)


def dequantize_in_place(model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """Let the packed model become what `dequantize` makes of it; all that loading has put on it goes."""
    model.__dict__ = _stock_model(model, dtype, copied=False).__dict__
    return model


def _stock_model(model: PreTrainedModel, dtype: torch.dtype | str | None, *, copied: bool) -> PreTrainedModel:
    """The family's model; what need not be cast is the packed model's own unless it is to be ``copied``."""
    experts, own = _whole_experts(model), model.dtype
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or own

    def cast(tensor: Tensor) -> Tensor:
        """What is of the model's dtype in the wanted one."""
        return tensor.to(wanted if tensor.dtype == own else tensor.dtype, copy=copied)

    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_is_quantized"):
        config.__dict__.pop(name, None)
    config.dtype = wanted
    with torch.device("meta"):
        stock: Any = type(model)(config)
    state = {name: cast(tensor) for name, tensor in base_state(model).items()}
    for name, module in experts.items():
        assert module.moe is not None  # from_pretrained
        held = _parameters(module.spec, module.moe.info)
        state |= {f"{name}.{key}": tensor.to(wanted) for key, tensor in held.items()}
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    _take_buffers(stock, model, copied)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def _whole_experts(model: PreTrainedModel) -> dict[str, FusedExperts]:
    """The experts of a model that can be dequantised, by name; raises as `dequantize`."""
    attached, experts = adapters_of(model).session.slots, experts_of(model)
    if attached:
        raise AdapterError(
            "dequantising a model",
            got=f"adapters {', '.join(attached)} attached",
            rule="none, since they would be left out",
            remedy="detach them first",
        )
    for name, module in experts.items():
        assert module.moe is not None  # from_pretrained
        if module.moe.info.shard is not None:
            raise UnsupportedError(
                f"dequantising {name}",
                got=module.moe.info.shard,
                rule="whole layers",
                remedy="load the model in one process",
            )
    return experts


def _take_buffers(stock: nn.Module, model: nn.Module, copied: bool) -> None:
    """Give ``stock`` the buffers that no state dict holds, such as those of rotary embeddings."""
    for name, buffer in list(stock.named_buffers()):
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            held = model.get_buffer(name)
            setattr(stock.get_submodule(module), leaf, held.clone() if copied else held)


def _parameters(spec: ExpertsSpec, info: MoEQuantInfo) -> dict[str, Tensor]:
    """The parameters of a family's experts module, float32."""
    gate, up, down = info.dequantize()
    halves = (up,) if gate is None else (gate, up)
    held = {"gate_up_proj": torch.stack(halves, dim=2 if spec.interleaved else 1).flatten(1, 2), "down_proj": down}
    if spec.transposed:
        held = {name: weight.transpose(1, 2).contiguous() for name, weight in held.items()}
    b13, b2 = info.biases()
    if b13 is not None and b2 is not None:
        held["gate_up_proj_bias"] = (b13.transpose(1, 2) if spec.interleaved else b13).flatten(1)
        held["down_proj_bias"] = b2
    return held
