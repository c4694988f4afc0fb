"""Adapters of routers: rows with one are routed by W + delta, all others by the router as it is.

In transformers 5 a router is a module of its family that holds the weight [E, H] and chooses the experts too, so that
PEFT's layer around a linear one does not fit it, and PEFT's wrapper of parameters serves no mixed batch. A hook behind
the router's forward runs that forward again for each adapter of the batch, with W + scaling B A in the weight's dtype
(what PEFT's ``target_parameters`` mean), and takes from it the rows of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant_moelora.core.errors import AdapterError
from quant_moelora.integrations.session import AdapterSession
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.loaders.routers import find_routers
from quant_moelora.lora.adapter_file import Factor

_LORA = "_quant_moelora_router"  # attribute of a router: its RouterLoRA


def routers_of(model: nn.Module, specs: list[ExpertsSpec]) -> dict[str, nn.Module]:
    """Routers that are more than a linear layer, by name; PEFT serves the others as it does attention."""
    routers = find_routers(model, specs)
    return {name: module for name, module in routers.items() if type(module).forward is not nn.Linear.forward}


class RouterLoRA:
    """Adapters of one router, by name, and the hook that applies them.

    Attributes:
        factors: A [r, H] and B [E, r] in float32, and the scaling.
    """

    def __init__(self, name: str, router: nn.Module, session: AdapterSession) -> None:
        self.factors: dict[str, Factor] = {}
        self._name = name
        self._session = session
        self._bare = _Bare(router)
        # First of the hooks: those that record a router's logits see what the model goes on with.
        router.register_forward_hook(self._route, prepend=True, with_kwargs=True)

    def _route(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """``output`` with the rows of every adapter of the batch that has factors here."""
        places = self._session.places
        present = [name for name in places if name in self._session.chosen & self.factors.keys()]
        if not present:
            return output
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        tokens = x.numel() // x.shape[-1]
        numbers = self._session.token_places(tokens, x.device)
        assert numbers is not None  # rows were named
        whole: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        self._check(whole, tokens)
        weight = router.get_parameter("weight")
        for name in present:
            factor = self.factors[name]
            changed = weight + (factor.scaling * (factor.b @ factor.a)).to(weight.dtype)
            again: Any = functional_call(self._bare, {"router.weight": changed}, args, kwargs)
            mine = numbers == places[name]  # (tokens,)
            whole = tuple(
                torch.where(mine.view(-1, *[1] * (ours.ndim - 1)), theirs, ours)
                for ours, theirs in zip(whole, again if isinstance(output, tuple) else (again,), strict=True)
            )
        return whole if isinstance(output, tuple) else whole[0]

    def _check(self, output: tuple[Any, ...], tokens: int) -> None:
        """Raise AdapterError unless a router's outputs have a row for each token."""
        for held in output:
            shape = list(held.shape) if isinstance(held, Tensor) else type(held).__name__
            if not isinstance(held, Tensor) or held.shape[:1] != (tokens,):
                raise AdapterError(
                    f"adapter {', '.join(self.factors)} on router {self._name}",
                    got=f"{shape} among what the router gives",
                    rule=f"tensors with a row for each of the {tokens} tokens",
                    remedy="this family's router cannot have adapters; train the adapter without it",
                )


class _Bare(nn.Module):
    """The forward of a router without its hooks, which record its outputs, and of which one is ours."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own."""
        return type(self.router).forward(self.router, *args, **kwargs)


def on_device(factor: Factor, router: nn.Module) -> Factor:
    """Factors of a router in float32, where it is."""
    a, b = (t.to(router.get_parameter("weight").device, torch.float32) for t in (factor.a, factor.b))
    return Factor(a, b, factor.scaling)


def attach_routers(
    routers: Mapping[str, nn.Module], factors: Mapping[str, Mapping[str, Factor]], session: AdapterSession
) -> None:
    """Give routers the factors of new adapters.

    Args:
        routers: from `routers_of`.
        factors: of each adapter by router, from `on_device`, with checked shapes.
        session: whose rows they serve.
    """
    for adapter, held in factors.items():
        for name, factor in held.items():
            router: Any = routers[name]
            if not hasattr(router, _LORA):
                setattr(router, _LORA, RouterLoRA(name, router, session))
            getattr(router, _LORA).factors[adapter] = factor


def detach_routers(routers: Mapping[str, nn.Module], adapters: Iterable[str]) -> None:
    """Take adapters away from routers of `routers_of`, from those that have them."""
    for router in routers.values():
        held: RouterLoRA | None = getattr(router, _LORA, None)
        if held is not None:
            for adapter in adapters:
                held.factors.pop(adapter, None)
