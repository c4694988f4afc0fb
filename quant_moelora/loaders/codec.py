"""Codec: one checkpoint format of a linear layer, from headers and config to canonical codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.checkpoint import TensorHeader

Headers = Mapping[str, TensorHeader]  # by suffix: the part of a key after the module's name


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer as the model has it.

    Attributes:
        module: its name in the checkpoint, for messages and for configs that match on names.
        n: output features.
        k: input features.
    """

    module: str
    n: int
    k: int


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is stored. Equal formats can be decoded together, stacked.

    Attributes:
        codec: name of the codec.
        scheme: what its codes mean, or None for an unquantised weight.
        tensors: suffixes to read.
        options: what else the codec needs to decode, from the config.
        warning: what the user has to know of a checkpoint in this format, or None.
    """

    codec: str
    scheme: QuantScheme | None
    tensors: tuple[str, ...]
    options: tuple[str, ...] = ()
    warning: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Codec and scheme."""
        return f"{self.codec} {self.scheme.name if self.scheme else 'none'}"


class Axes(NamedTuple):
    """Where the rows and the columns of a weight lie in a stored tensor: (axis, how many one element is of).

    None for what the tensor does not extend along, so that each part of the weight needs all of it.
    """

    rows: tuple[int, int] | None
    columns: tuple[int, int] | None


COLUMN_GROUPS = Axes(None, (0, 1))  # of a map of columns to groups (act-order)


def along(axis: int, group_size: int | None, groups: int = 1) -> tuple[int, int] | None:
    """Columns of a tensor that has elements for so many groups each along ``axis``; None for one group for all."""
    return None if group_size is None else (axis, group_size * groups)


class Codec(Protocol):
    """One checkpoint format.

    Attributes:
        name: its name.
        required: suffixes that a module of this format has.
        optional: suffixes that it may have besides.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """Whether the tensors' shapes and dtypes are those of this format, for telling formats of equal names apart."""
        ...

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """The format's parameters, from the headers first and the config second; no data is read.

        Raises:
            FormatError, ShapeError: headers and config contradict each other or the model's dimensions.
            UnsupportedError: a variant that is not served.
        """
        ...

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """How each tensor that is read can be cut, so that a part of the weight is decoded from parts of its tensors.

        A map of columns to groups (act-order) has columns alone.
        """
        ...

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight | Tensor:
        """Canonical codes, or the weight itself [..., N, K] if unquantised. All tensors may be stacked alike.

        They may be parts of stored tensors, as of `axes`, with ``spec`` of the part's dimensions.

        Raises:
            FormatError: the data contradicts the config.
        """
        ...


def check_header(
    header: TensorHeader,
    spec: LinearSpec,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    what: str,
) -> None:
    """Raise unless a header has the shape and one of the dtypes that the model's dimensions demand.

    Args:
        header: the tensor's header.
        spec: the linear layer.
        shape: expected shape.
        dtypes: allowed dtypes.
        what: the format in words, such as ``int4``.

    Raises:
        FormatError: on a difference.
    """
    place = f"{what} ({header.where})"
    suffix = header.key.rpartition(".")[2]
    if header.shape != shape:
        raise FormatError(
            suffix,
            got=f"shape {list(header.shape)}",
            rule=f"{list(shape)} for N={spec.n}, K={spec.k}, {place}",
            remedy="the shard is truncated, or config.json names other dimensions than the checkpoint has",
        )
    if header.dtype not in dtypes:
        raise FormatError(
            suffix,
            got=f"dtype {header.dtype}",
            rule=f"{' or '.join(str(d) for d in dtypes)} for {place}",
            remedy="convert the checkpoint with the tool that wrote it",
        )


def check_whole_words(spec: LinearSpec, bits: int, **dims: int) -> None:
    """Raise UnsupportedError unless ``bits``-bit codes along each of the named dimensions fill whole int32 words."""
    for name, size in dims.items():
        if size * bits % 32:
            raise UnsupportedError(
                f"{name} of {spec.module}",
                got=size,
                rule=f"a multiple of {32 // bits}, since int32 words hold {32 // bits} codes along it",
                remedy="requantise the model in a format that pads",
            )


def check_agrees(what: str, spec: LinearSpec, got: object, config: object) -> None:
    """Raise FormatError if the config states a value and the tensors another."""
    if config is not None and got != config:
        raise FormatError(
            f"{what} of {spec.module}",
            got=f"{got} from the tensors' shapes",
            rule=f"{config}, as the quantization_config says",
            remedy="correct the config: another checkpoint's config.json may lie beside these weights",
        )


def check_understood(spec: LinearSpec, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for settings of gptqmodel's configs that give the tensors another meaning."""
    found = [f"{name} {config[name]}" for name in ("is_marlin_format", "rotation", "adapter") if config.get(name)]
    if found:
        raise UnsupportedError(
            f"quantization_config of {spec.module}",
            got=", ".join(found),
            rule="weights as GPTQ or AWQ packs them, neither rotated nor with an adapter of their own",
            remedy="quantise the model without, or convert it back with the tool that wrote it",
        )


def normalise_group_size(value: int | None) -> int | None:
    """None for the ways in which configs write "one group per channel".

    Raises:
        FormatError: it is no whole number.
    """
    if value is not None and type(value) is not int:
        raise FormatError(
            "group_size of the quantization_config",
            got=repr(value),
            rule="a whole number",
            remedy="correct config.json",
        )
    return None if value is None or value <= 0 else value
