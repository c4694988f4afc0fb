"""The packed form: experts in a checkpoint as they lie in memory, and in the files' headers what they are.

A layer's tensors are those of its `MoEQuantInfo`, under names such as ``model.layers.0.mlp.experts.w13.qweight``; what
else the info says stands in the metadata of the safetensors files, as JSON under the key ``quant_moelora``:

    {"version": 1, "layers": {"0": {"w13": {...}, "w2": {...}, "activation": {...}, ..., "tensors": [...]}}}

Every file has at least the layers of which it holds a tensor. ``layers`` is the one source of what the tensors mean: it
is put together with them, checked by the types' own rules, and config.json only says that the form is this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight
from quant_moelora.loaders.checkpoint import Checkpoint, TensorHeader
from quant_moelora.loaders.codec import LinearFormat
from quant_moelora.loaders.expert_keys import EXPERTS_PREFIX
from quant_moelora.loaders.families import ExpertsSpec, Stored

METHOD = "quant_moelora"  # quant_method in config.json, and the key in the headers
VERSION = 1  # of what stands in the headers; that of the layout (`core.packing`) stands with each packed weight

_TENSOR = re.compile(rf"{EXPERTS_PREFIX}(?P<name>(?:w13|w2)\.\w+|inter_perm)")
_DIMS = ("num_experts", "halves", "n", "n_pad", "k", "k_pad")
_REMEDY = "convert the original checkpoint again with the installed version of quant_moelora"

Facts = dict[str, Any]  # a layer's info without its tensors, as JSON's types


def facts_of(info: MoEQuantInfo) -> Facts:
    """What an info says besides its tensors, and which these are.

    Raises:
        UnsupportedError: the info is a part of a layer.
    """
    if info.shard is not None:
        raise UnsupportedError(
            "packed experts to save", got=info.shard, rule="whole layers", remedy="save the model from one process"
        )
    return {
        "w13": _weight_facts(info.w13),
        "w2": _weight_facts(info.w2),
        "activation": asdict(info.activation),
        "router_weight": info.router_weight,
        "source_order": info.source_order,
        "tensors": list(info.tensors()),
    }


def file_metadata(layers: Mapping[int, Facts]) -> dict[str, str]:
    """Metadata of a safetensors file with tensors of these layers; transformers asks for its ``format``."""
    held = {"version": VERSION, "layers": {str(number): facts for number, facts in layers.items()}}
    return {"format": "pt", METHOD: json.dumps(held, separators=(",", ":"))}


@dataclass(frozen=True)
class PackedFormat:
    """The experts of one layer in the packed form: nothing of their data has been read.

    Attributes:
        spec: the layer's experts in the model.
        facts: what the headers say of them.
        tensors: headers by the tensors' names in the info.
    """

    spec: ExpertsSpec
    facts: Facts
    tensors: Mapping[str, TensorHeader]

    @property
    def w13(self) -> tuple[Stored, ...]:
        """Gate and up are one."""
        return ("gate_up",)

    def formats(self, stored: Stored) -> list[LinearFormat]:
        """The one format of gate and up, or of down."""
        weight = self._meta.w2 if stored == "down" else self._meta.w13
        scheme = weight.scheme if isinstance(weight, PackedWeight) else None
        return [LinearFormat("packed", scheme, tuple(weight.tensors()))]

    def headers(self) -> Iterator[TensorHeader]:
        """Every tensor of the layer's experts."""
        yield from self.tensors.values()

    def meta_info(self) -> MoEQuantInfo:
        """The info without data, on the meta device."""
        return self._meta

    @cached_property
    def _meta(self) -> MoEQuantInfo:
        # A dtype that torch does not have is none that an info's tensors may have.
        return self.info(
            {n: torch.empty(h.shape, dtype=h.dtype or torch.bool, device="meta") for n, h in self.tensors.items()}
        )

    def info(self, tensors: Mapping[str, Tensor]) -> MoEQuantInfo:
        """The facts and the tensors (by name, of the headers' shapes) put together.

        Raises:
            FormatError: they contradict each other.
            UnsupportedError: another version of the layout.
        """
        try:
            return _info(self.facts, tensors)
        except QuantMoELoRAError as error:
            kind = UnsupportedError if isinstance(error, UnsupportedError) else FormatError
            what = f"{error.what} of {self.spec.module} in {self.files}"
            raise kind(what, got=error.got, rule=error.rule, remedy=_REMEDY) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"metadata of {self.spec.module} in {self.files}",
                got=f"{type(error).__name__}: {error}",
                rule="the fields of an info and its tensors",
                remedy=_REMEDY,
            ) from error

    @property
    def files(self) -> str:
        """Names of the files that hold the layer, for messages."""
        return ", ".join(dict.fromkeys(header.file.name for header in self.tensors.values()))


def describe_packed(checkpoint: Checkpoint, specs: Iterable[ExpertsSpec]) -> list[PackedFormat] | None:
    """The layers' experts if the checkpoint is of the packed form, from headers and config alone; None if it is not.

    Raises:
        MissingTensorError: a layer, or a tensor of one, is not there.
        FormatError: headers, tensors and config.json contradict each other.
        UnsupportedError: the packed form of another version, or its layout is.
    """
    facts = _all_facts(checkpoint)
    if facts is None:
        return None
    found: dict[int, dict[str, TensorHeader]] = {}
    for key, header in checkpoint.headers.items():
        if match := _TENSOR.fullmatch(key):
            found.setdefault(int(match["layer"]), {})[match["name"]] = header
    return [_described(checkpoint, spec, facts.get(spec.layer), found.get(spec.layer, {})) for spec in specs]


def _all_facts(checkpoint: Checkpoint) -> dict[int, Facts] | None:
    """Facts of all layers, from the headers of all files; None if the checkpoint is not of the packed form."""
    texts = {file: held[METHOD] for file, held in checkpoint.metadata.items() if METHOD in held}
    method = checkpoint.quantization.get("quant_method")
    if not texts and method != METHOD:
        return None
    if not texts or method != METHOD:
        raise FormatError(
            f"checkpoint {checkpoint.path}",
            got=f"quant_method {method} in config.json, and {'' if texts else 'no '}{METHOD} in its files' headers",
            rule="both, or neither",
            remedy="put config.json and the files of one checkpoint together; other tools that save them leave "
            "the headers out",
        )
    layers: dict[int, Facts] = {}
    for file, text in texts.items():
        for number, facts in _parse(file, text).items():
            if layers.setdefault(number, facts) != facts:
                raise FormatError(
                    f"metadata of layer {number} in {file.name}",
                    got="another than in a file before it",
                    rule="one and the same in all files",
                    remedy="take all files from one conversion",
                )
    return layers


def _parse(file: Path, text: str) -> dict[int, Facts]:
    """Facts by layer from one file's metadata.

    Raises:
        FormatError: it is not what `file_metadata` writes.
        UnsupportedError: it is of another version.
    """
    try:
        held = json.loads(text)
        version = held["version"]
        if version == VERSION:
            return {int(number): facts for number, facts in held["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"metadata {METHOD} of {file.name}",
            got=f"{type(error).__name__}: {error}",
            rule="a JSON object with version and layers",
            remedy=_REMEDY,
        ) from error
    raise UnsupportedError(
        f"version of the packed form of {file.name}", got=repr(version), rule=str(VERSION), remedy=_REMEDY
    )


def _described(
    checkpoint: Checkpoint, spec: ExpertsSpec, facts: Facts | None, held: Mapping[str, TensorHeader]
) -> PackedFormat:
    """One layer, checked against its facts and the model."""
    if not isinstance(facts, dict) or not isinstance(facts.get("tensors"), list):
        raise MissingTensorError(
            f"experts {spec.module}",
            got=f"no metadata of layer {spec.layer} in the headers of {checkpoint.path}",
            rule="that of every layer with experts, as config.json says",
            remedy="correct config.json, or " + _REMEDY,
        )
    missing, surplus = set(facts["tensors"]) - held.keys(), held.keys() - set(facts["tensors"])
    if missing or surplus:
        raise (MissingTensorError if missing else FormatError)(
            f"{', '.join(sorted(missing or surplus))} of {spec.module}",
            got=f"{'no such tensors' if missing else 'tensors'} in {checkpoint.path}",
            rule=f"those of the layer's metadata: {', '.join(facts['tensors'])}",
            remedy="download the checkpoint again, or " + _REMEDY,
        )
    layer = PackedFormat(spec, facts, held)
    info = layer.meta_info()
    pairs = {
        "experts": (info.num_experts, spec.num_experts),
        "hidden size": (info.hidden_size, spec.hidden_size),
        "intermediate size": (info.intermediate_size, spec.intermediate_size),
        "activation": (info.activation, spec.activation),
        "router weight": (info.router_weight, spec.router_weight),
        "biases": ((info.w13.bias is not None, info.w2.bias is not None), (spec.has_bias, spec.has_bias)),
    }
    for name, (got, expected) in pairs.items():
        if got != expected:
            raise FormatError(
                f"{name} of {spec.module} in {layer.files}",
                got=got,
                rule=f"{expected}, as config.json says",
                remedy="use the config.json that belongs to the checkpoint",
            )
    return layer


def _weight_facts(weight: ExpertWeight) -> Facts:
    facts: Facts = {name: getattr(weight, name) for name in _DIMS}
    if isinstance(weight, PackedWeight):
        scale_dtype = str(weight.scheme.scale_dtype).removeprefix("torch.")
        facts |= {"scheme": {**asdict(weight.scheme), "scale_dtype": scale_dtype}, "layout": weight.layout}
    return facts


def _info(facts: Facts, tensors: Mapping[str, Tensor]) -> MoEQuantInfo:
    """The inverse of `facts_of` and `MoEQuantInfo.tensors`; errors are those of the types, or of missing fields."""
    return MoEQuantInfo(
        w13=_weight(facts["w13"], _below("w13.", tensors)),
        w2=_weight(facts["w2"], _below("w2.", tensors)),
        activation=Activation(**facts["activation"]),
        inter_perm=tensors.get("inter_perm"),
        router_weight=facts["router_weight"],
        source_order=facts["source_order"],
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _weight(facts: Facts, tensors: dict[str, Any]) -> ExpertWeight:
    dims = {name: facts[name] for name in _DIMS}
    scheme = facts.get("scheme")
    bias: Tensor | None = tensors.pop("bias", None)
    if scheme is None:
        return DenseWeight(**dims, bias=bias, **tensors)
    fields: dict[str, Any] = {"zeros": None, "k_perm": None, **tensors}
    said: dict[str, Any] = {**scheme, "scale_dtype": getattr(torch, scheme["scale_dtype"])}
    return PackedWeight(**dims, bias=bias, scheme=QuantScheme(**said), layout=facts["layout"], **fields)
