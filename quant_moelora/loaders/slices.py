"""Rows and columns of a stored linear layer: which parts of its tensors they are decoded from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quant_moelora.core.shard import Span
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import Axes, LinearSpec


@dataclass(frozen=True)
class Cut:
    """Which rows and columns of a linear layer [N, K] are wanted; None for all of them.

    Attributes:
        rows: spans of rows, one after the other.
        columns: a span of columns.
    """

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None

    def spec(self, whole: LinearSpec) -> LinearSpec:
        """The linear layer that is left."""
        n = whole.n if self.rows is None else sum(span.size for span in self.rows)
        return replace(whole, n=n, k=whole.k if self.columns is None else self.columns.size)

    def apply(
        self,
        weight: CanonicalWeight | Tensor,  # (..., N, K), without act-order if columns are cut
    ) -> CanonicalWeight | Tensor:
        """The same of a weight that was decoded whole; columns are whole groups."""
        if isinstance(weight, Tensor):
            return self._of(weight, 1)
        assert self.columns is None or weight.g_idx is None
        group = weight.scheme.group_size
        return CanonicalWeight(
            weight.scheme,
            self._of(weight.codes, 1),
            self._of(weight.scales, group),
            None if weight.zeros is None else self._of(weight.zeros, group),
            weight.g_idx,
        )

    def _of(
        self,
        tensor: Tensor,  # (..., N, X)
        unit: int | None,
    ) -> Tensor:
        """Rows of a tensor, and of its columns, which are ``unit`` of the weight's each; None for one of all."""
        if self.rows is not None:
            tensor = torch.cat([tensor[..., span.slice, :] for span in self.rows], -2)
        if self.columns is None or unit is None:
            return tensor
        return tensor[..., self.columns.begin // unit : -(-self.columns.end // unit)].contiguous()


def row_spans(
    inter: Span, size: int, stored: str, halves: int, order: Literal["separate", "concatenated", "interleaved"]
) -> tuple[Span, ...]:
    """Rows of what is stored of gate and up that belong to a span of the intermediate.

    Args:
        inter: the span.
        size: I of the whole layer.
        stored: ``gate``, ``up`` or both.
        halves: of w13.
        order: of the rows of both.
    """
    if stored != "gate_up":
        return (inter,)
    if order == "interleaved":
        return (Span(halves * inter.begin, halves * inter.end),)
    return tuple(Span(half * size + inter.begin, half * size + inter.end) for half in range(halves))


def windows(axes: Axes, header: TensorHeader, cut: Cut) -> list[list[slice]] | None:
    """The parts of a tensor to read, to be put together along its rows; None if an element would have to be cut."""
    made = [[slice(None)] * len(header.shape)]
    if cut.columns is not None and axes.columns is not None:
        axis, unit = axes.columns
        part = _elements(cut.columns, unit, header.shape[axis])
        if part is None:
            return None
        made[0][axis] = part
    if cut.rows is not None and axes.rows is not None:
        axis, unit = axes.rows
        parts = [_elements(span, unit, header.shape[axis]) for span in cut.rows]
        if None in parts:
            return None
        made = [[part if i == axis else held for i, held in enumerate(made[0])] for part in parts if part is not None]
    return made


def _elements(span: Span, unit: int, size: int) -> slice | None:
    """The elements of ``unit`` positions that make a span up; the last one of all may be short."""
    end = -(-span.end // unit)
    return None if span.begin % unit or (span.end % unit and end != size) else slice(span.begin // unit, end)


def read_windows(checkpoint: Checkpoint, header: TensorHeader, axes: Axes, parts: list[list[slice]]) -> Tensor:
    """The `windows` of a tensor, put together."""
    if parts == [[slice(None)] * len(header.shape)]:
        return checkpoint.read(header.key, header.part)
    tensors = [checkpoint.read(header.key, header.part, part) for part in parts]
    return tensors[0] if axes.rows is None or len(tensors) == 1 else torch.cat(tensors, axes.rows[0])
