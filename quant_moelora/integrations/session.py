"""AdapterSession: which adapter each row of the running forward uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.routing import BASE_SLOT

BASE_NAME = "__base__"  # PEFT's word for a row without an adapter
ADAPTER_NAMES = "adapter_names"  # PEFT's word for the argument that names each row's adapter


class AdapterSession:
    """Adapters of one model by name and slot, and the choice that a forward has made among them.

    Attributes:
        slots: slot of each attached adapter in the experts' bank, `BASE_SLOT` for one without factors of experts.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self._rows: tuple[str, ...] | None = None
        self._tokens: dict[str, Tensor] = {}  # (tokens,) int32, what `_per_token` has made in the running forward

    @contextmanager
    def choose(self, adapter_names: Sequence[str] | None, batch: int) -> Generator[None]:
        """Use ``adapter_names`` for the rows of a batch while the context lasts; None means the base for all.

        With fewer names than rows each name serves batch / len(names) consecutive rows, as beam search orders them.

        Raises:
            AdapterError: an unknown name, or a number of names that does not divide the batch.
        """
        outer = self._rows, self._tokens
        self._rows = None if adapter_names is None else self._check(tuple(adapter_names), batch)
        self._tokens = {}
        try:
            yield
        finally:
            self._rows, self._tokens = outer

    def _check(self, names: tuple[str, ...], batch: int) -> tuple[str, ...]:
        unknown = sorted(set(names) - {BASE_NAME, *self.slots})
        if unknown:
            raise AdapterError(
                "adapter_names",
                got=f"unknown {', '.join(unknown)}",
                rule=f"{BASE_NAME} or attached ones: {', '.join(self.slots) or 'none is'}",
                remedy="attach the adapter first, or correct the name",
            )
        if not names or batch % len(names):
            raise AdapterError(
                "adapter_names",
                got=f"{len(names)} names for {batch} rows",
                rule="one name a row, or one for every so many rows",
                remedy=f"give one name for each request, {BASE_NAME} for a request without an adapter",
            )
        return tuple(name for name in names for _ in range(batch // len(names)))

    @property
    def chosen(self) -> set[str]:
        """Adapters of the running forward's rows."""
        return set(self._rows or ()) - {BASE_NAME}

    def row_names(self, rows: int) -> list[str]:
        """Name of each of ``rows`` rows of a module's input: a batch, or a batch of flattened sequences.

        Raises:
            AdapterError: the rows are no multiple of the batch, so that they cannot be told apart.
        """
        if self._rows is None:
            return [BASE_NAME] * rows
        per_row = self._per_row(rows, len(self._rows))
        return [name for name in self._rows for _ in range(per_row)]

    def token_slots(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Slot of each token of a flattened batch; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        if self._rows is None:
            return None
        return self._per_token("slots", [self.slots.get(name, BASE_SLOT) for name in self._rows], tokens, device)

    def token_choices(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Place among `slots` of the adapter of each token, -1 for the base; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        if self._rows is None:
            return None
        place = {name: place for place, name in enumerate(self.slots)}
        return self._per_token("choices", [place.get(name, -1) for name in self._rows], tokens, device)

    def _per_token(self, key: str, by_row: list[int], tokens: int, device: torch.device) -> Tensor:  # (tokens,) int32
        """Numbers of the batch's rows, repeated for their tokens; made once a forward."""
        per_row = self._per_row(tokens, len(by_row))
        held = self._tokens.get(key)
        if held is None or held.numel() != tokens or held.device != device:
            held = torch.tensor(by_row, dtype=torch.int32).repeat_interleave(per_row).to(device)
            self._tokens[key] = held
        return held

    @staticmethod
    def _per_row(total: int, batch: int) -> int:
        if total % batch:
            raise AdapterError(
                "adapter_names",
                got=f"{total} tokens for a batch of {batch}",
                rule="the same number of tokens for every row",
                remedy="pad the batch; packed sequences need explicit adapter ids",
            )
        return total // batch


def with_adapter_names(forward: Callable[..., Any], session: AdapterSession) -> Callable[..., Any]:
    """``forward`` with ``adapter_names`` in its signature, which is where `generate` looks for it."""

    @functools.wraps(forward)
    def wrapper(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise AdapterError(
                "forward",
                got="neither input_ids nor inputs_embeds",
                rule="one of them, whose rows adapter_names names",
                remedy="pass the batch",
            )
        with session.choose(adapter_names, inputs.shape[0]):
            return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    names = inspect.Parameter(ADAPTER_NAMES, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(place, names)
    wrapper.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper
