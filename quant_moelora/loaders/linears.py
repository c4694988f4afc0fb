"""Quantised linear layers beside the experts: attention, routers, dense MLPs, lm_head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.loaders.canonical import CanonicalWeight, check_finite
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import Codec, LinearFormat, LinearSpec
from quant_moelora.loaders.expert_keys import parse_expert_module
from quant_moelora.loaders.families import find_experts
from quant_moelora.loaders.registry import QUANTIZED_SUFFIXES, describe_linear
from quant_moelora.loaders.renamings import Renamings
from quant_moelora.loaders.routers import find_routers


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantised linear layer of a checkpoint: nothing of its data has been read.

    Attributes:
        module: its name in the model.
        spec: its dimensions, and its name in the checkpoint.
        codec: the codec that reads it.
        fmt: how it is stored.
        headers: its tensors.
    """

    module: str
    spec: LinearSpec
    codec: Codec
    fmt: LinearFormat
    headers: Mapping[str, TensorHeader]

    def dequantize(self, checkpoint: Checkpoint, device: torch.device) -> Tensor:  # (N, K) float32
        """Read the layer and evaluate its definition."""
        tensors = {suffix: checkpoint.read(self.headers[suffix].key)[None].to(device) for suffix in self.fmt.tensors}
        weight = self.codec.decode(tensors, self.spec, self.fmt)
        check_finite(weight, [self.spec.module])
        return (weight.dequantize() if isinstance(weight, CanonicalWeight) else weight.to(torch.float32))[0]


def describe_linears(checkpoint: Checkpoint, model: nn.Module) -> list[QuantizedLinear]:
    """Every quantised module of a checkpoint that belongs to the model and is no routed expert.

    Raises:
        UnsupportedError: such a module is no linear layer or router of the model, or transformers converts its weight.
        FormatError: its tensors contradict the model's dimensions or the config, or there are two of it.
    """
    modules, renamings = dict(model.named_modules()), Renamings(model)
    routers = find_routers(model, find_experts(model))
    # Patterns of what a checkpoint holds beside the model, such as layers for multi-token prediction.
    beside: Iterable[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, QuantizedLinear] = {}
    for stored, headers in checkpoint.modules().items():
        if parse_expert_module(stored) or not _is_quantized(headers):
            continue
        if any(re.search(pattern, f"{stored}.weight") for pattern in beside):
            continue
        key, converted = renamings.name(f"{stored}.weight")
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
        found[name] = QuantizedLinear(name, spec, *describe_linear(checkpoint, spec, own), own)
    return list(found.values())


def _is_quantized(headers: Mapping[str, TensorHeader]) -> bool:
    """Whether a module has tensors of a quantised format, or a weight that is no float."""
    weight = headers.get("weight")
    packed = weight is not None and weight.dtype is not None and not weight.dtype.is_floating_point
    return packed or bool(headers.keys() & QUANTIZED_SUFFIXES)
