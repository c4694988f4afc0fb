"""AdapterSession: which adapter each row of the running forward uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.routing import BASE_SLOT

BASE_NAME = "__base__"  # PEFT's word for a row without an adapter
ADAPTER_NAMES = "adapter_names"  # PEFT's word for the argument that names each row's adapter


@dataclass(frozen=True)
class _Rows:
    """What the rows of a forward use.

    Attributes:
        names: of each row's adapter; one for all of them where adapters are active.
        lengths: tokens of each row where sequences are packed into one; None where all rows have equally many.
        active: whether these are the active adapters, and nobody named any.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...] | None = None
    active: bool = False

    def repeats(self, total: int) -> int | Tensor:  # (rows,) int64, or one for all
        """How many of ``total`` rows of a module's input belong to each row.

        Raises:
            AdapterError: the rows cannot be told apart.
        """
        if self.lengths is not None:
            if sum(self.lengths) == total:
                return torch.tensor(self.lengths)
            raise AdapterError(
                "adapter_context",
                got=f"{total} tokens for sequences of {sum(self.lengths)} together",
                rule="one row that holds the packed sequences, every token of which belongs to one of them",
                remedy=f"give the lengths of all sequences, with {BASE_NAME} for padding, and one forward for all",
            )
        if total % len(self.names):
            raise AdapterError(
                ADAPTER_NAMES,
                got=f"{total} tokens for a batch of {len(self.names)}",
                rule="the same number of tokens for every row",
                remedy="pad the batch; for packed sequences use quant_moelora.adapter_context with their lengths",
            )
        return total // len(self.names)


class AdapterSession:
    """Adapters of one model by name and slot, and the choice that a forward has made among them.

    Attributes:
        slots: slot of each attached adapter in the experts' bank, `BASE_SLOT` for one without factors of experts.
        combined: the same of active adapters that are added up, under the names of all of them, joined by dots.
        active: adapters of a forward that names none, all of which every row uses.
        enabled: whether adapters are used at all.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.combined: dict[str, int] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self._given: _Rows | None = None  # by `use`, for the forwards within it
        self._rows: _Rows | None = None
        self._tokens: dict[str, Tensor] = {}  # (tokens,) int32, what `_per_token` has made in the running forward

    @contextmanager
    def use(self, adapter_names: Sequence[str], lengths: Sequence[int] | None = None) -> Generator[None]:
        """Give all forwards within the context these names, and the lengths of packed sequences, if they are packed.

        Raises:
            AdapterError: an unknown name, or lengths that are not one of 0 or more for each name.
        """
        names = self._known(tuple(adapter_names))
        if lengths is not None and (len(lengths) != len(names) or min(lengths, default=-1) < 0):
            raise AdapterError(
                "lengths of packed sequences",
                got=f"{list(lengths)} for {len(names)} names",
                rule="the number of tokens of each sequence, and a name for each",
                remedy=f"give one name for each sequence, {BASE_NAME} for one without an adapter",
            )
        outer = self._given
        self._given = _Rows(names, None if lengths is None else tuple(lengths))
        try:
            yield
        finally:
            self._given = outer

    @contextmanager
    def choose(self, adapter_names: Sequence[str] | None, batch: int) -> Generator[None]:
        """Use ``adapter_names`` for the rows of a batch while the context lasts.

        None means the names of `use`, or else the active adapters for all rows, or else the base. With fewer names than
        rows each name serves batch / len(names) consecutive rows, as beam search orders them.

        Raises:
            AdapterError: an unknown name, or a number of names that does not divide the batch, or both these names and
                those of `use`.
        """
        outer = self._rows, self._tokens
        self._rows = self._chosen_rows(adapter_names, batch)
        self._tokens = {}
        try:
            yield
        finally:
            self._rows, self._tokens = outer

    def _chosen_rows(self, adapter_names: Sequence[str] | None, batch: int) -> _Rows | None:
        given = self._given
        if adapter_names is not None and given is not None:
            raise AdapterError(
                ADAPTER_NAMES,
                got="names of a forward within a context that names adapters",
                rule="names in one of the two places",
                remedy="leave the argument out, or the context",
            )
        if adapter_names is None and given is None:
            active = ".".join(self.active)
            return _Rows((active,), active=True) if active and self.enabled else None
        names = self._known(tuple(adapter_names or ())) if given is None else given.names
        lengths = None if given is None else given.lengths
        if lengths is None:
            names = self._for_batch(names, batch)
        return _Rows(names, lengths) if self.enabled else None

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - {BASE_NAME, *self.slots})
        if unknown:
            raise AdapterError(
                ADAPTER_NAMES,
                got=f"unknown {', '.join(unknown)}",
                rule=f"{BASE_NAME} or attached ones: {', '.join(self.slots) or 'none is'}",
                remedy="attach the adapter first, or correct the name",
            )
        return names

    def _for_batch(self, names: tuple[str, ...], batch: int) -> tuple[str, ...]:
        if not names or batch % len(names):
            raise AdapterError(
                ADAPTER_NAMES,
                got=f"{len(names)} names for {batch} rows",
                rule="one name a row, or one for every so many rows",
                remedy=f"give one name for each request, {BASE_NAME} for a request without an adapter",
            )
        return tuple(name for name in names for _ in range(batch // len(names)))

    @property
    def chosen(self) -> set[str]:
        """Adapters of the running forward's rows."""
        return set() if self._rows is None else set(self._rows.names) - {BASE_NAME}

    @property
    def packed(self) -> bool:
        """Whether the running forward's sequences are packed into one row."""
        return self._rows is not None and self._rows.lengths is not None

    @property
    def places(self) -> dict[str, int]:
        """A number for each adapter and combination, for `token_choices`."""
        return {name: place for place, name in enumerate((*self.slots, *self.combined))}

    def row_names(self, rows: int) -> list[str] | None:
        """Name of each of ``rows`` rows of a module's input: a batch, or a batch of flattened sequences.

        None where no row was named, and a layer of PEFT is to use its own active adapters or, disabled, none.

        Raises:
            AdapterError: the rows are no multiple of the batch, so that they cannot be told apart.
        """
        if self._rows is None:
            return None if self.active or not self.enabled else [BASE_NAME] * rows
        if self._rows.active:
            return None
        repeats = self._rows.repeats(rows)
        each = [repeats] * len(self._rows.names) if isinstance(repeats, int) else repeats.tolist()
        return [name for name, times in zip(self._rows.names, each, strict=True) for _ in range(times)]

    def token_slots(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Slot of each token of a flattened batch; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        return self._per_token("slots", {**self.combined, **self.slots}, tokens, device)

    def token_choices(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Number among `places` of the adapter of each token, -1 for the base; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        return self._per_token("choices", self.places, tokens, device)

    def _per_token(
        self, key: str, numbers: dict[str, int], tokens: int, device: torch.device
    ) -> Tensor | None:  # (tokens,) int32
        """Numbers of the rows' adapters, -1 for the base, repeated for the rows' tokens; made once a forward."""
        if self._rows is None:
            return None
        repeats = self._rows.repeats(tokens)
        held = self._tokens.get(key)
        if held is None or held.numel() != tokens or held.device != device:
            by_row = [numbers.get(name, BASE_SLOT) for name in self._rows.names]
            held = torch.tensor(by_row, dtype=torch.int32).repeat_interleave(repeats).to(device)
            self._tokens[key] = held
        return held


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
