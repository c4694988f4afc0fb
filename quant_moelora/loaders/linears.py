"""Quantised linear layers beside the experts: attention, routers, dense MLPs, lm_head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.core.weights import DENSE_DTYPES
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.expert_keys import parse_expert_module
from quant_moelora.loaders.families import find_experts
from quant_moelora.loaders.layer_format import LayerFormat
from quant_moelora.loaders.names import model_names
from quant_moelora.loaders.registry import QUANTIZED_SUFFIXES, StoredLinear, describe_linear
from quant_moelora.loaders.routers import find_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize_linear(checkpoint: Checkpoint, linear: StoredLinear, device: torch.device) -> Tensor:  # (N, K) float32
    """Read a layer and evaluate its definition."""
    tensors = {suffix: checkpoint.read(linear.headers[suffix].key)[None].to(device) for suffix in linear.fmt.tensors}
    weight = linear.codec.decode(tensors, linear.spec, linear.fmt)
    check_finite(weight, [linear.spec.module])
    return (weight.dequantize() if isinstance(weight, CanonicalWeight) else weight.to(torch.float32))[0]


def describe_linears(
    checkpoint: Checkpoint, model: PreTrainedModel, layers: Iterable[LayerFormat] = ()
) -> dict[str, StoredLinear]:
    """Every quantised module of a checkpoint that belongs to the model and is no routed expert, by name in the model.

    Args:
        checkpoint: the checkpoint.
        model: the model.
        layers: the experts, whose tensors may be fused.

    Raises:
        UnsupportedError: such a module is no linear layer or router of the model, or transformers converts its weight.
        FormatError: its tensors contradict the model's dimensions or the config, or there are two of it.
    """
    modules, name_of = dict(model.named_modules()), model_names(model)
    routers = find_routers(model, find_experts(model))
    # Patterns of what a checkpoint holds beside the model, such as layers for multi-token prediction.
    beside: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    experts = {header.key for layer in layers for header in layer.headers()}
    found: dict[str, StoredLinear] = {}
    for stored, headers in checkpoint.modules().items():
        if parse_expert_module(stored) or not _is_quantized(headers):
            continue
        if any(header.key in experts for header in headers.values()):
            continue
        if any(re.search(pattern, f"{stored}.weight") for pattern in beside):
            continue
        key, converted = name_of(f"{stored}.weight")
        name = key.removesuffix(".weight")
        module = modules.get(name)
        if converted or module is None or not (isinstance(module, nn.Linear) or name in routers):
            held = f"{type(module).__name__} in the model" if module else "nothing of that name in the model"
            raise UnsupportedError(
                f"quantised module {stored}",
                got=f"a weight that transformers converts into {key}" if converted else held,
                rule="a linear layer or a router",
                remedy="quantise the model without it",
            )
        if key in tied:
            raise FormatError(
                f"quantised module {stored}",
                got=f"tied to {tied[key]}, as config.json says",
                rule="a weight of its own",
                remedy="set tie_word_embeddings to false in config.json if the embeddings stand beside it",
            )
        if name in found:
            raise FormatError(
                f"quantised module {stored}",
                got=f"{found[name].spec.module} too",
                rule=f"one set of tensors for {name}",
                remedy="remove one of the two from the checkpoint",
            )
        n, k = module.get_parameter("weight").shape
        spec = LinearSpec(stored, n, k)
        # What else the module has, a bias or a router's correction, no format changes and transformers loads.
        others = {"bias", *dict(module.named_parameters()), *dict(module.named_buffers())} - {"weight"}
        own = {suffix: header for suffix, header in headers.items() if suffix not in others}
        found[name] = describe_linear(checkpoint, spec, own)
    return found


def _is_quantized(headers: Mapping[str, TensorHeader]) -> bool:
    """Whether a module has tensors of a quantised format, or a weight that does not say itself what it means.

    transformers would cast a float8 weight and leave its scales out.
    """
    weight = headers.get("weight")
    packed = weight is not None and weight.dtype not in (*DENSE_DTYPES, torch.float64)
    return packed or bool(headers.keys() & QUANTIZED_SUFFIXES)
