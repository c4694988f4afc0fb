"""AdapterSession: which adapter each row of the running forward uses."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.core.routing import BASE_SLOT

BASE_NAME = "__base__"  # PEFT's word for a row without an adapter
ADAPTER_NAMES = "adapter_names"  # PEFT's word for the argument that names each row's adapter
_KEPT = 64  # batches whose rows are kept on the device
_BASE_PLACE = -1


class AdapterRows(NamedTuple):
    """What the rows of a forward use, on the device: what `adapter_names` of a forward may be too.

    A forward that is compiled or captured takes the tensors as data, so that other names need no other graph.

    Attributes:
        slots: int32 [rows], slot in the experts' bank, `BASE_SLOT` for none.
        places: int32 [rows], numbers of `AdapterSession.places`, -1 for the base.
        names: of each row's adapter, that of all active ones together where nobody named any; none where no code is to
            depend on them.
        lengths: tokens of each row where sequences are packed into one; None where all rows have equally many.
        active: whether these are the active adapters.
    """

    slots: Tensor  # (rows,) int32
    places: Tensor  # (rows,) int32
    names: tuple[str, ...]
    lengths: tuple[int, ...] | None = None
    active: bool = False

    @property
    def base(self) -> bool:
        """Whether it is known on the host that no row uses an adapter, so that none need be looked for."""
        return set(self.names) == {BASE_NAME}

    def nameless(self) -> AdapterRows:
        """The same rows for code that serves all names. That all are the base's or the active adapters' is no data."""
        return self if self.active or self.base else self._replace(names=())

    def repeats(self, total: int) -> list[int]:
        """How many of ``total`` rows of a module's input belong to each row.

        Raises:
            AdapterError: the rows cannot be told apart.
        """
        rows = self.slots.shape[0]
        if self.lengths is not None:
            if sum(self.lengths) == total:
                return list(self.lengths)
            raise AdapterError(
                "adapter_context",
                got=f"{total} tokens for sequences of {sum(self.lengths)} together",
                rule="one row that holds the packed sequences, every token of which belongs to one of them",
                remedy=f"give the lengths of all sequences, with {BASE_NAME} for padding, and one forward for all",
            )
        if total % rows:
            raise AdapterError(
                ADAPTER_NAMES,
                got=f"{total} tokens for a batch of {rows}",
                rule="the same number of tokens for every row",
                remedy="pad the batch; for packed sequences use quant_moelora.adapter_context with their lengths",
            )
        return [total // rows] * rows


class AdapterSession:
    """Adapters of one model by name and slot, and the choice that a forward has made among them.

    Attributes:
        active: adapters of a forward that names none, all of which every row uses.
        enabled: whether adapters are used at all.
        modules: another object whenever modules beside the experts have got or lost adapters.
        places: a number for each adapter and combination, which it keeps.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.modules = object()
        self.places: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._combined: dict[str, int] = {}
        self._made: dict[tuple[Any, ...], AdapterRows] = {}
        self._given: tuple[tuple[str, ...], tuple[int, ...] | None] | None = None  # by `use`
        self._rows: AdapterRows | None = None
        self._tokens: dict[str, Tensor] = {}  # (tokens,) int32, what `_per_token` has made in the running forward

    @property
    def slots(self) -> dict[str, int]:
        """Slot of each attached adapter in the experts' bank, `BASE_SLOT` for one without factors of experts."""
        return self._slots

    @slots.setter
    def slots(self, slots: dict[str, int]) -> None:
        """Number adapters that are new."""
        self._slots = slots
        self._changed()

    @property
    def combined(self) -> dict[str, int]:
        """The same of active adapters that are added up, under the names of all of them, joined by dots."""
        return self._combined

    @combined.setter
    def combined(self, combined: dict[str, int]) -> None:
        """Number combinations that are new."""
        self._combined = combined
        self._changed()

    def _changed(self) -> None:
        self._made = {}
        self.places = _numbered((*self._slots, *self._combined), self.places)

    @contextmanager
    def use(self, adapter_names: Sequence[str], lengths: Sequence[int] | None = None) -> Generator[None]:
        """Give all forwards within the context these names, and the lengths of packed sequences, if they are packed.

        Raises:
            AdapterError: an unknown name, or lengths that are not one of 0 or more for each name.
        """
        names = self.known(tuple(adapter_names))
        outer = self._given
        self._given = names, None if lengths is None else _for_sequences(names, lengths)
        try:
            yield
        finally:
            self._given = outer

    @contextmanager
    def choose(
        self, adapter_names: Sequence[str] | AdapterRows | None, batch: int, device: torch.device
    ) -> Generator[None]:
        """Use ``adapter_names`` for the rows of a batch while the context lasts; see `rows`.

        Raises:
            AdapterError: as `rows`; or rows of another batch.
        """
        outer = self._rows, self._tokens
        chosen = adapter_names
        if not isinstance(chosen, AdapterRows):
            chosen = self.rows(chosen, batch, device)
        elif chosen.lengths is None and not chosen.active and chosen.slots.shape[0] != batch:
            raise _wrong_number(chosen.slots.shape[0], batch)
        self._rows, self._tokens = chosen, {}
        try:
            yield
        finally:
            self._rows, self._tokens = outer

    def rows(self, adapter_names: Sequence[str] | None, batch: int, device: torch.device) -> AdapterRows | None:
        """``adapter_names`` for the rows of a batch, on a device; None means the base for all.

        Without names those of `use`, or else the active adapters for all rows, or else the base. With fewer names than
        rows each name serves batch / len(names) consecutive rows, as beam search orders them.

        Raises:
            AdapterError: an unknown name, or a number of names that does not divide the batch, or both these names and
                those of `use`.
        """
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
            return self._make((active,), None, True, device) if active and self.enabled else None
        names, lengths = (self.known(tuple(adapter_names or ())), None) if given is None else given
        if lengths is None:
            names = _for_batch(names, batch)
        return self._make(names, lengths, False, device) if self.enabled else None

    def packed_rows(
        self, adapter_names: Sequence[str], lengths: Sequence[int], device: torch.device
    ) -> AdapterRows | None:
        """The rows of one forward of packed sequences, as `use` gives them to all forwards; None where all are off."""
        names = self.known(tuple(adapter_names))
        made = self._make(names, _for_sequences(names, lengths), False, device)
        return made if self.enabled else None

    def _make(
        self, names: tuple[str, ...], lengths: tuple[int, ...] | None, active: bool, device: torch.device
    ) -> AdapterRows:
        """Those of the last batches are kept: each step of `generate` asks again, and copying waits for the device."""
        key = (names, lengths, active, device)
        made = None if torch.compiler.is_compiling() else self._made.get(key)
        if made is None:
            slots = {**self._combined, **self._slots}
            held = [slots.get(n, BASE_SLOT) for n in names], [self.places.get(n, _BASE_PLACE) for n in names]
            numbers = (torch.tensor(of_rows, dtype=torch.int32).to(device) for of_rows in held)
            made = AdapterRows(*numbers, names=names, lengths=lengths, active=active)
        if not torch.compiler.is_compiling() and key not in self._made:
            if len(self._made) == _KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = made
        return made

    def known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """``names``; AdapterError if one is unknown."""
        unknown = sorted(set(names) - {BASE_NAME, *self._slots})
        if unknown:
            raise AdapterError(
                ADAPTER_NAMES,
                got=f"unknown {', '.join(unknown)}",
                rule=f"{BASE_NAME} or attached ones: {', '.join(self._slots) or 'none is'}",
                remedy="attach the adapter first, or correct the name",
            )
        return names

    @property
    def chosen(self) -> set[str]:
        """Adapters that rows of the running forward may have."""
        if self._rows is None:
            return set()
        # Code that is compiled or captured serves all of them, unless they are the active ones.
        by_name = self._rows.active or (self._rows.names and not torch.compiler.is_compiling())
        return set(self._rows.names if by_name else self.places) - {BASE_NAME}

    @property
    def packed(self) -> bool:
        """Whether the running forward's sequences are packed into one row."""
        return self._rows is not None and self._rows.lengths is not None

    @property
    def nameless(self) -> bool:
        """Whether the running forward serves all names, so that only `token_slots` and `token_places` tell its rows."""
        return self._rows is not None and not self._rows.names

    @property
    def unnamed(self) -> bool:
        """Whether no row of the running forward was named, so that all use the active adapters or, disabled, none."""
        return bool(self.active) or not self.enabled if self._rows is None else self._rows.active

    def row_names(self, rows: int) -> list[str] | None:
        """Name of each of ``rows`` rows of a module's input: a batch, or a batch of flattened sequences.

        None where no row was named, and a layer of PEFT is to use its own active adapters or, disabled, none.

        Raises:
            AdapterError: the rows are no multiple of the batch, so that they cannot be told apart.
        """
        if self.unnamed:
            return None
        if self._rows is None:
            return [BASE_NAME] * rows
        repeats = self._rows.repeats(rows)
        return [name for name, times in zip(self._rows.names, repeats, strict=True) for _ in range(times)]

    def token_slots(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Slot of each token of a flattened batch; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        rows = self._rows
        return None if rows is None or rows.base else self._per_token("slots", rows.slots.to(device), tokens)

    def token_places(self, tokens: int, device: torch.device) -> Tensor | None:  # (tokens,) int32
        """Number among `places` of the adapter of each token, -1 for the base; None where all use the base.

        Raises:
            AdapterError: as `row_names`.
        """
        return None if self._rows is None else self._per_token("places", self._rows.places.to(device), tokens)

    def _per_token(self, key: str, by_row: Tensor, tokens: int) -> Tensor:  # (rows,) int32 -> (tokens,) int32
        """Numbers of the batch's rows, repeated for their tokens; made once a forward."""
        assert self._rows is not None
        repeats = self._rows.repeats(tokens)
        held = self._tokens.get(key)
        if held is None or held.shape[0] != tokens or held.device != by_row.device:
            if self._rows.lengths is None:
                held = by_row.repeat_interleave(repeats[0])
            else:  # by their sum the device need not be asked
                times = torch.tensor(repeats).to(by_row.device)
                held = by_row.repeat_interleave(times, output_size=tokens)
            self._tokens[key] = held
        return held


def _for_batch(names: tuple[str, ...], batch: int) -> tuple[str, ...]:
    if not names or batch % len(names):
        raise _wrong_number(len(names), batch)
    return tuple(name for name in names for _ in range(batch // len(names)))


def _for_sequences(names: tuple[str, ...], lengths: Sequence[int]) -> tuple[int, ...]:
    if len(lengths) != len(names) or min(lengths, default=-1) < 0:
        raise AdapterError(
            "lengths of packed sequences",
            got=f"{list(lengths)} for {len(names)} names",
            rule="the number of tokens of each sequence, and a name for each",
            remedy=f"give one name for each sequence, {BASE_NAME} for one without an adapter",
        )
    return tuple(lengths)


def _numbered(names: Iterable[str], before: dict[str, int]) -> dict[str, int]:
    """A number for each name; those that had one keep it, since graphs may have been captured with it."""
    numbers = {name: before[name] for name in names if name in before}
    taken = set(numbers.values())
    free = (number for number in itertools.count() if number not in taken)
    return numbers | {name: next(free) for name in names if name not in numbers}


def _wrong_number(names: int, batch: int) -> AdapterError:
    return AdapterError(
        ADAPTER_NAMES,
        got=f"{names} names for {batch} rows",
        rule="one name a row, or one for every so many rows",
        remedy=f"give one name for each request, {BASE_NAME} for a request without an adapter",
    )


def _rows_of(*held: Any) -> Tensor:
    """The first of a forward's possible inputs that there is; AdapterError if there is none."""
    for inputs in held:
        if inputs is not None:
            return inputs
    raise AdapterError(
        "forward",
        got="neither input_ids nor inputs_embeds",
        rule="one of them, whose rows adapter_names names",
        remedy="pass the batch",
    )


def with_adapter_names(forward: Callable[..., Any], session: AdapterSession) -> Callable[..., Any]:
    """``forward`` with ``adapter_names`` in its signature, which is where `generate` looks for it."""

    @functools.wraps(forward)
    def wrapper(*args: Any, adapter_names: Sequence[str] | AdapterRows | None = None, **kwargs: Any) -> Any:
        """The forward, whose rows have these names."""
        inputs = _rows_of(args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        with session.choose(adapter_names, inputs.shape[0], inputs.device):
            return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    names = inspect.Parameter(ADAPTER_NAMES, inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(place, names)
    wrapper.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper


def with_adapter_rows(prepare: Callable[..., dict[str, Any]], session: AdapterSession) -> Callable[..., dict[str, Any]]:
    """`prepare_inputs_for_generation` that puts ``adapter_names`` on the device, before compiled code sees them."""

    @functools.wraps(prepare)
    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs, names of rows among them."""
        inputs = prepare(*args, **kwargs)
        names = inputs.pop(ADAPTER_NAMES, None)
        if not isinstance(names, AdapterRows):
            batch = _rows_of(inputs.get("input_ids"), inputs.get("inputs_embeds"))
            names = session.rows(names, batch.shape[0], batch.device)
        return inputs if names is None else {**inputs, ADAPTER_NAMES: names}

    return wrapper
