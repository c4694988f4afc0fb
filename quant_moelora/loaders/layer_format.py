"""LayerFormat: how the experts of one layer are stored, from headers and config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo, SourceOrder
from quant_moelora.core.scheme import QuantScheme, num_groups
from quant_moelora.core.weights import DENSE_DTYPES
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import Codec, LinearFormat, LinearSpec, check_header
from quant_moelora.loaders.expert_keys import ExpertKeys, LayerKeys, check_complete, expert_keys, fused_keys
from quant_moelora.loaders.families import ExpertsSpec, Projection
from quant_moelora.loaders.pack import Weight, build_info
from quant_moelora.loaders.promote import common_scheme
from quant_moelora.loaders.registry import describe_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerFormat:
    """How the experts of one layer are stored: nothing of their data has been read.

    Attributes:
        spec: the layer's experts in the model.
        keys: their tensors in the checkpoint.
        formats: format of each projection, the same for all experts.
        codecs: the codec of each projection.
    """

    spec: ExpertsSpec
    keys: LayerKeys
    formats: dict[Projection, LinearFormat]
    codecs: dict[Projection, Codec]

    def scheme(self, projection: Projection) -> QuantScheme | None:
        """The scheme of the weight that a projection is part of; None if it is not quantised.

        Gate and up share a weight: theirs is the one that both are promoted to.
        """
        own = self.formats[projection].scheme
        if own is None or projection == "down" or "gate" not in self.formats:
            return own
        gate, up = self.formats["gate"].scheme, self.formats["up"].scheme
        assert gate is not None and up is not None  # _check_shared
        return common_scheme(gate, up)

    def meta_info(self) -> MoEQuantInfo:
        """An info without data, on the meta device, for asking backends whether they would serve it.

        Whether act-order permutes columns is in the data, so that it shows no permutation.
        """
        spec = self.spec
        hidden, inter = spec.hidden_size, spec.intermediate_size
        w13 = self._meta_weight("up", spec.activation.halves, inter, hidden)
        w2, halves = self._meta_weight("down", 1, hidden, inter), spec.activation.halves
        shapes = ((spec.num_experts, halves, inter), (spec.num_experts, 1, hidden))
        biases = [torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes]
        info = build_info(w13, w2, spec.activation, *(biases if spec.has_bias else ()))
        return replace(info, source_order=self.source_order, router_weight=spec.router_weight)

    @property
    def source_order(self) -> SourceOrder:
        """How the checkpoint holds gate and up."""
        part = next(iter(self.keys[0, "up"].headers.values())).part
        if part is None:
            return "separate"
        return "interleaved" if self.spec.interleaved else "concatenated"

    def _meta_weight(self, projection: Projection, halves: int, n: int, k: int) -> Weight:
        scheme, shape = self.scheme(projection), (self.spec.num_experts, halves, n)
        if scheme is None:
            return torch.empty(*shape, k, dtype=self.keys[0, projection].headers["weight"].dtype, device="meta")
        groups = num_groups(k, scheme.group_size)
        return CanonicalWeight(
            scheme=scheme,
            codes=torch.empty(*shape, k, dtype=torch.uint8, device="meta"),
            scales=torch.empty(*shape, groups, dtype=scheme.scale_dtype, device="meta"),
            zeros=None if scheme.symmetric else torch.empty(*shape, groups, dtype=torch.uint8, device="meta"),
            g_idx=None,
        )


def describe_layers(
    checkpoint: Checkpoint, specs: list[ExpertsSpec], model: PreTrainedModel | None = None
) -> list[LayerFormat]:
    """Find the tensors of the layers' experts and their formats, from headers and config alone.

    Args:
        checkpoint: the checkpoint.
        specs: the layers.
        model: their model, for its family's names of fused tensors; see `fused_keys`.

    Raises:
        MissingTensorError, FormatError, UnsupportedError: see `load_experts`.
    """
    found, fused = expert_keys(checkpoint), fused_keys(checkpoint, specs, model)
    return [
        _describe_layer(checkpoint, spec, _one_of(found.get(spec.layer, {}), fused[spec.layer], spec)) for spec in specs
    ]


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


def _check_halves(checkpoint: Checkpoint, spec: ExpertsSpec, keys: LayerKeys) -> None:
    """Raise UnsupportedError for files whose gate_proj and up_proj are no gate and up.

    gptqmodel 7.6 cuts the interleaved gate_up of gpt-oss in the middle: its gate_proj is the first half of the columns,
    gate and up by turns (its own forward puts them together again).
    """
    writers = str((checkpoint.quantization.get("meta") or {}).get("quantizer"))
    held = keys[0, "up"]
    if spec.interleaved and "gptqmodel" in writers and next(iter(held.headers.values())).part is None:
        raise UnsupportedError(
            f"gate and up of {spec.module}",
            got=f"{held.module} as {writers} writes it, half of the interleaved columns",
            rule="gate_proj and up_proj with the rows of gate and of up",
            remedy="quantise the model with llm-compressor",
        )


def _describe_layer(checkpoint: Checkpoint, spec: ExpertsSpec, keys: LayerKeys) -> LayerFormat:
    check_complete(spec, keys, checkpoint)
    _check_halves(checkpoint, spec, keys)
    formats: dict[Projection, LinearFormat] = {}
    codecs: dict[Projection, Codec] = {}
    for (_, projection), held in sorted(keys.items()):
        linear = spec.linear(held.module, projection)
        headers = _without_bias(linear, held) if spec.has_bias else held.headers
        codec, fmt = describe_linear(checkpoint, linear, headers)
        first = formats.setdefault(projection, fmt)
        codecs.setdefault(projection, codec)
        _check_same(fmt, first, held.module, f"the {projection} projection of the layer's other experts")
    if "gate" in formats:
        _check_shared(formats["gate"], formats["up"], f"{spec.module} gate")
    return LayerFormat(spec, keys, formats, codecs)


def _check_shared(gate: LinearFormat, up: LinearFormat, module: str) -> None:
    """Raise unless gate and up are alike, or can be promoted to one scheme."""
    if gate.scheme is None or up.scheme is None or common_scheme(gate.scheme, up.scheme) is None:
        _check_same(gate, up, module, "up, which shares a weight with it")


def _without_bias(linear: LinearSpec, held: ExpertKeys) -> dict[str, TensorHeader]:
    """Headers of a projection without that of its bias, which no format changes.

    Raises:
        MissingTensorError: there is no bias.
        FormatError: it has another shape or dtype than a bias.
    """
    bias = held.headers.get("bias")
    if bias is None:
        raise MissingTensorError(
            f"bias of {held.module}",
            got=f"only {', '.join(sorted(held.headers))}",
            rule="a bias for every expert's projection, as the model has one",
            remedy="download the checkpoint again",
        )
    check_header(bias, linear, (linear.n,), DENSE_DTYPES, "the bias")
    return {suffix: header for suffix, header in held.headers.items() if suffix != "bias"}


def _check_same(fmt: LinearFormat, other: LinearFormat, module: str, whose: str) -> None:
    if fmt != other:
        names = [f.scheme.name if f.scheme else "none" for f in (fmt, other)]
        raise UnsupportedError(
            f"format of {module}",
            got=f"{fmt.codec} {names[0]} with {', '.join(fmt.tensors)}",
            rule=f"{other.codec} {names[1]} with {', '.join(other.tensors)}, the format of {whose}",
            remedy="quantise gate and up of all experts of a layer alike (gate and up may differ in bits, in symmetry "
            "and in group sizes that divide each other)",
        )
