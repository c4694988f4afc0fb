"""combine: factors of several adapters as those of one, as PEFT's add_weighted_adapter makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.lora.adapter_file import Adapter, Factor, LayerFactors

Combination = Literal["cat", "linear"]
Key = TypeVar("Key")


def combine(
    adapters: Mapping[str, Adapter], weights: Sequence[float], combination: Combination
) -> tuple[dict[int, LayerFactors], dict[str, Factor]]:
    """Factors of the experts, by layer, and of other modules, of the weighted sum of adapters.

    ``cat`` is that sum exactly, its rank the sum of the ranks: weight * scaling * A of all, one below the other, and B
    of all side by side. ``linear`` adds up A and B, each times the square root of weight * scaling, which is
    another matrix than the sum of the products (PEFT's words: a very rough approximation). A module that some of the
    adapters leave alone is combined from the others. Factors are float32, their scaling is 1.

    Args:
        adapters: one at least, by name.
        weights: of each, of any sign.
        combination: ``cat`` or ``linear``.

    Raises:
        AdapterError: another combination, not one weight for each adapter, or ``linear`` of factors of other ranks.
    """
    if combination not in get_args(Combination) or len(weights) != len(adapters) or not adapters:
        raise AdapterError(
            f"combination of adapters {', '.join(adapters)}",
            got=f"{combination!r} with {len(weights)} weights",
            rule=f"{' or '.join(get_args(Combination))}, and a weight for each adapter",
            remedy="others, such as svd and ties, need all experts' deltas in full: combine the adapters elsewhere",
        )
    sums = _Sums(combination)
    held = list(zip(adapters.items(), weights, strict=True))
    layers = {
        number: sums.of([(name, adapter.layers.get(number, {}), weight) for (name, adapter), weight in held])
        for number in sorted({number for adapter in adapters.values() for number in adapter.layers})
    }
    return layers, sums.of([(name, adapter.linears, weight) for (name, adapter), weight in held])


class _Sums:
    """Makes sums of factors; what several modules share, such as A of gate and up, they share in the sums too."""

    def __init__(self, combination: Combination) -> None:
        self._combination = combination
        self._made: dict[tuple[tuple[int, float], ...], Tensor] = {}

    def of(self, held: Sequence[tuple[str, Mapping[Key, Factor], float]]) -> dict[Key, Factor]:
        """Sums of what adapters, given by name, factors by module, and weight, have for the same modules."""
        modules = dict.fromkeys(module for _, factors, _ in held for module in factors)
        return {
            module: self._sum(
                str(module), {name: (factors[module], weight) for name, factors, weight in held if module in factors}
            )
            for module in modules
        }

    def _sum(self, module: str, held: Mapping[str, tuple[Factor, float]]) -> Factor:
        products = [(factor, weight * factor.scaling) for factor, weight in held.values()]
        if self._combination == "cat":
            a = self._made_of([(factor.a, product) for factor, product in products], 0)
            return Factor(a, self._made_of([(factor.b, 1.0) for factor, _ in products], 1), 1.0)
        ranks = {name: factor.a.shape[0] for name, (factor, _) in held.items()}
        if len(set(ranks.values())) > 1:
            raise AdapterError(
                f"linear combination of LoRA on {module}",
                got=", ".join(f"rank {rank} of {name}" for name, rank in ranks.items()),
                rule="one rank",
                remedy="combine them by cat",
            )
        roots = [(factor, math.copysign(math.sqrt(abs(product)), product)) for factor, product in products]
        a = self._made_of([(factor.a, root) for factor, root in roots], None)
        return Factor(a, self._made_of([(factor.b, abs(root)) for factor, root in roots], None), 1.0)

    def _made_of(self, terms: Sequence[tuple[Tensor, float]], dim: int | None) -> Tensor:
        """Tensors times numbers, side by side along ``dim``, or added up."""
        key = tuple((id(tensor), number) for tensor, number in terms)  # the adapters keep the tensors alive
        if key not in self._made:
            scaled = [tensor.float() * number for tensor, number in terms]
            self._made[key] = torch.stack(scaled).sum(0) if dim is None else torch.cat(scaled, dim)
        return self._made[key]
