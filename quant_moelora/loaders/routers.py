"""Routers: the modules beside a layer's experts that map hidden states to one logit an expert."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from quant_moelora.loaders.families import ExpertsSpec


def find_routers(model: nn.Module, specs: Iterable[ExpertsSpec]) -> dict[str, nn.Module]:
    """Modules of the experts' blocks with a weight [E, H] of their own, by name.

    In transformers 5 most are no ``nn.Linear``, but hold the weight and choose the experts too.
    """
    found: dict[str, nn.Module] = {}
    for spec in specs:
        block = spec.module.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.shape == (spec.num_experts, spec.hidden_size):
                found[name] = module
    return found
