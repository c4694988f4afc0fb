"""LayerFormat: how the experts of one layer are stored, from headers and config alone.

Either each expert has linear layers in one of the registered formats, or the layer is of the packed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo, SourceOrder
from quant_moelora.core.scheme import QuantScheme, num_groups
from quant_moelora.core.weights import DENSE_DTYPES
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import LinearFormat, LinearSpec, check_header
from quant_moelora.loaders.expert_keys import LayerKeys, check_complete, expert_keys
from quant_moelora.loaders.families import ExpertsSpec, Stored
from quant_moelora.loaders.fused_keys import fused_keys
from quant_moelora.loaders.pack import Weight, build_info
from quant_moelora.loaders.packed_form import PackedFormat, describe_packed
from quant_moelora.loaders.promote import common_scheme
from quant_moelora.loaders.registry import StoredLinear, describe_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LinearsFormat:
    """The experts of one layer as linear layers: nothing of their data has been read.

    Attributes:
        spec: the layer's experts in the model.
        linears: what the checkpoint has of each expert, in the order of its files.
        biases: the biases that belong to them, if the model has biases.
        source_order: how the rows of gate and up stand in what is stored of them, one after the other: each its own
            linear layer, all of gate first, or by turns.
    """

    spec: ExpertsSpec
    linears: Mapping[tuple[int, Stored], StoredLinear]
    biases: Mapping[tuple[int, Stored], TensorHeader]
    source_order: SourceOrder

    @property
    def w13(self) -> tuple[Stored, ...]:
        """What gate and up are read from, in the order of the rows."""
        projections: tuple[Stored, ...] = ("gate_up", "gate", "up")
        return tuple(stored for stored in projections if (0, stored) in self.linears)

    def groups(self, stored: Stored, experts: Sequence[int]) -> list[tuple[list[int], StoredLinear]]:
        """Some of the experts in groups that are stored alike and can be decoded together; one linear layer of each."""
        found: dict[LinearFormat, list[int]] = {}
        for expert in experts:
            found.setdefault(self.linears[expert, stored].fmt, []).append(expert)
        return [(members, self.linears[members[0], stored]) for members in found.values()]

    def formats(self, stored: Stored) -> list[LinearFormat]:
        """The formats that the layer's experts are in."""
        return [linear.fmt for _, linear in self.groups(stored, range(self.spec.num_experts))]

    def headers(self) -> Iterator[TensorHeader]:
        """Every tensor of the layer's experts."""
        for linear in self.linears.values():
            yield from linear.headers.values()
        yield from self.biases.values()

    def scheme(self, stored: Stored) -> QuantScheme | None:
        """The scheme that a linear layer is promoted to, that of its weight; None if it is not quantised."""
        return self._schemes[stored == "down"]

    @cached_property
    def _schemes(self) -> tuple[QuantScheme | None, QuantScheme | None]:
        """Of w13, which gate and up of all experts share, and of w2."""
        parts: tuple[tuple[Stored, ...], ...] = (self.w13, ("down",))
        w13, w2 = ({fmt.scheme for stored in part for fmt in self.formats(stored)} for part in parts)
        return _common(w13), _common(w2)

    def meta_info(self) -> MoEQuantInfo:
        """An info without data, on the meta device, for asking backends whether they would serve it.

        Whether act-order permutes columns is in the data, so that it shows no permutation.
        """
        spec = self.spec
        hidden, inter = spec.hidden_size, spec.intermediate_size
        w13 = self._meta_weight(self.w13[0], spec.activation.halves, inter, hidden)
        w2, halves = self._meta_weight("down", 1, hidden, inter), spec.activation.halves
        shapes = ((spec.num_experts, halves, inter), (spec.num_experts, 1, hidden))
        biases = [torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes]
        info = build_info(w13, w2, spec.activation, *(biases if spec.has_bias else ()))
        return replace(info, source_order=self.source_order, router_weight=spec.router_weight)

    def _meta_weight(self, stored: Stored, halves: int, n: int, k: int) -> Weight:
        scheme, shape = self.scheme(stored), (self.spec.num_experts, halves, n)
        if scheme is None:
            return torch.empty(*shape, k, dtype=self.linears[0, stored].headers["weight"].dtype, device="meta")
        groups = num_groups(k, scheme.group_size)
        return CanonicalWeight(
            scheme=scheme,
            codes=torch.empty(*shape, k, dtype=torch.uint8, device="meta"),
            scales=torch.empty(*shape, groups, dtype=scheme.scale_dtype, device="meta"),
            zeros=None if scheme.symmetric else torch.empty(*shape, groups, dtype=torch.uint8, device="meta"),
            g_idx=None,
        )


LayerFormat = LinearsFormat | PackedFormat


def _common(schemes: set[QuantScheme | None]) -> QuantScheme | None:
    """What weights of one tensor are promoted to; None if they are not quantised."""
    quantised = [scheme for scheme in schemes if scheme is not None]
    assert not quantised or None not in schemes  # _check_promotable
    return common_scheme(*quantised) if quantised else None


def describe_layers(checkpoint: Checkpoint, specs: list[ExpertsSpec], model: PreTrainedModel) -> list[LayerFormat]:
    """Find the tensors of the layers' experts and their formats, from headers and config alone.

    Args:
        checkpoint: the checkpoint.
        specs: the layers.
        model: their model, for its family's names of fused tensors; see `fused_keys`.

    Raises:
        MissingTensorError, FormatError, UnsupportedError: see `load_experts`.
    """
    found, fused = expert_keys(checkpoint), fused_keys(checkpoint, specs, model)
    keys = [_one_of(found.get(spec.layer, {}), fused[spec.layer], spec) for spec in specs]
    packed = describe_packed(checkpoint, specs)
    if packed is None:
        return [_describe_layer(checkpoint, spec, held) for spec, held in zip(specs, keys, strict=True)]
    for spec, held in zip(specs, keys, strict=True):
        if held:
            raise FormatError(
                f"experts {spec.module}",
                got=f"{next(iter(held.values())).module} beside packed ones",
                rule="one or the other",
                remedy="remove one of the two from the checkpoint",
            )
    return list(packed)


def _one_of(separate: LayerKeys, fused: LayerKeys, spec: ExpertsSpec) -> LayerKeys:
    """A layer's tensors, which are one per expert and projection, or fused.

    Raises:
        FormatError: both are there.
    """
    if separate and fused:
        raise FormatError(
            f"experts {spec.module}",
            got=f"{next(iter(separate.values())).module} and {next(iter(fused.values())).module}",
            rule="one tensor for each expert and projection, or fused ones, and not both",
            remedy="remove one of the two from the checkpoint",
        )
    return separate or fused


def _source_order(checkpoint: Checkpoint, spec: ExpertsSpec, keys: LayerKeys) -> SourceOrder:
    """How the rows of gate and up stand in what is stored.

    gptqmodel (seen in 7.6) cuts the interleaved gate_up of gpt-oss in the middle: its gate_proj is the first half of
    the rows, gate and up by turns, and its up_proj the second (its own forward puts them together again).
    """
    writers = str((checkpoint.quantization.get("meta") or {}).get("quantizer"))
    if (0, "gate_up") not in keys and not (spec.interleaved and "gptqmodel" in writers):
        return "separate"
    return "interleaved" if spec.interleaved else "concatenated"


def _describe_layer(checkpoint: Checkpoint, spec: ExpertsSpec, keys: LayerKeys) -> LinearsFormat:
    check_complete(spec, keys, checkpoint)
    linears: dict[tuple[int, Stored], StoredLinear] = {}
    biases: dict[tuple[int, Stored], TensorHeader] = {}
    for (expert, stored), held in sorted(keys.items()):
        linear, headers = spec.linear(held.module, stored), dict(held.headers)
        if spec.has_bias:
            biases[expert, stored] = _pop_bias(linear, headers)
        linears[expert, stored] = describe_linear(checkpoint, linear, headers)
    for down in (False, True):
        _check_promotable({key: linear for key, linear in linears.items() if (key[1] == "down") == down})
    linears = {key: linears[key] for key in keys}  # in the files' order
    return LinearsFormat(spec, linears, biases, _source_order(checkpoint, spec, keys))


def _pop_bias(linear: LinearSpec, headers: dict[str, TensorHeader]) -> TensorHeader:
    """Take the header of a bias, which no format changes, from those of its linear layer.

    Raises:
        MissingTensorError: there is no bias.
        FormatError: it has another shape or dtype than a bias.
    """
    bias = headers.pop("bias", None)
    if bias is None:
        raise MissingTensorError(
            f"bias of {linear.module}",
            got=f"only {', '.join(sorted(headers))}",
            rule="a bias for every expert's projection, as the model has one",
            remedy="download the checkpoint again",
        )
    check_header(bias, linear, (linear.n,), DENSE_DTYPES, "the bias")
    return bias


def _check_promotable(linears: Mapping[tuple[int, Stored], StoredLinear]) -> None:
    """Raise unless linear layers that share a weight are alike, or can be promoted to one scheme exactly.

    A tensor that only some experts' layers of one format have is missing from the others, as g_idx or zero points.

    Raises:
        UnsupportedError: they differ otherwise.
    """
    if len({linear.fmt for linear in linears.values()}) == 1:
        return
    smallest = min(linears.values(), key=_size_of_groups)  # what all must have a scheme in common with
    firsts: dict[Stored, StoredLinear] = {}
    for (_, stored), linear in linears.items():
        first = firsts.setdefault(stored, linear)
        if linear.codec is first.codec and linear.fmt.tensors != first.fmt.tensors:
            raise _mixed(linear, first)
        mine, common = linear.fmt.scheme, smallest.fmt.scheme
        if mine is None or common is None or common_scheme(mine, common) is None:
            raise _mixed(linear, smallest)


def _size_of_groups(linear: StoredLinear) -> float:
    scheme = linear.fmt.scheme
    return math.inf if scheme is None or scheme.group_size is None else scheme.group_size


def _mixed(linear: StoredLinear, other: StoredLinear) -> UnsupportedError:
    names = [f"{fmt} with {', '.join((*fmt.tensors, *fmt.options))}" for fmt in (linear.fmt, other.fmt)]
    return UnsupportedError(
        f"format of {linear.spec.module}",
        got=names[0],
        rule=f"{names[1]}, the format of {other.spec.module}, which shares a weight with it",
        remedy="quantise gate and up of all experts of a layer alike (they may differ in bits, in symmetry and in "
        "group sizes that the smallest divides), and leave no tensor of a format out",
    )
