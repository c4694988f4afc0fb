"""compressed-tensors "pack-quantized", as llm-compressor writes it.

Tensors (compressed_tensors, compressors/pack_quantized): weight_packed int32 [N, K*bits/32], packed along K from the
lowest bits up, each code offset by 2**(bits-1); weight_scale [N, G]; weight_zero_point int32 [N*bits/32, G] of
asymmetric weights, packed along N with the same offset; weight_g_idx int32 [K] of files with actorder "group", written
by versions before 0.19; weight_shape int64 [2], which repeats N and K.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError
from quant_moelora.core.scheme import SCALE_DTYPES, SUPPORTED_BITS, QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight, trivial_g_idx, unpack_words
from quant_moelora.loaders.codec import (
    COLUMN_GROUPS,
    Axes,
    Headers,
    LinearFormat,
    LinearSpec,
    along,
    check_agrees,
    check_header,
    normalise_group_size,
)
from quant_moelora.loaders.overrides import module_config

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

TENSOR = "tensor"  # the strategy of one scale for the whole weight
STRATEGIES = (TENSOR, "channel", "group")
_ACT_ORDER = ("group", "dynamic", True)  # spellings of an actorder whose groups are in weight_g_idx


@dataclass(frozen=True)
class ConfigGroup:
    """What a config says of the modules that one of its groups targets.

    Attributes:
        weights: their quantisation; None if the group does not quantise weights.
        activations: whether it quantises input activations.
        act_order: whether the group of a column is in weight_g_idx.
    """

    weights: QuantizationArgs | None
    activations: bool
    act_order: bool


class PackQuantized:
    """Codec of pack-quantized int4 and int8."""

    name = "compressed-tensors"
    required = frozenset({"weight_packed", "weight_scale"})
    optional = frozenset({"weight_zero_point", "weight_shape", "weight_g_idx"})

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """Packed along K: N rows of K*bits/32 words."""
        return any(headers["weight_packed"].shape == (spec.n, _words(spec.k, bits)) for bits in SUPPORTED_BITS)

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`. The tensors decide; a config group that targets the module must agree with them."""
        group = config_group(spec, config)
        args = None if group is None else group.weights
        found = [b for b in SUPPORTED_BITS if headers["weight_packed"].shape == (spec.n, _words(spec.k, b))]
        bits = found[0] if found else (args.num_bits if args else SUPPORTED_BITS[0])
        if bits not in SUPPORTED_BITS:
            raise UnsupportedError(
                f"num_bits of {spec.module}", got=bits, rule="4 or 8", remedy="requantise the model to int4 or int8"
            )
        what = f"pack-quantized int{bits}"
        check_header(headers["weight_packed"], spec, (spec.n, _words(spec.k, bits)), (torch.int32,), what)
        symmetric = "weight_zero_point" not in headers
        group_size = stored_group_size(spec, headers, args)
        if args is not None:
            check_agrees("num_bits", spec, bits, args.num_bits)
            check_agrees("symmetric", spec, symmetric, args.symmetric)
        groups = num_groups(spec.k, group_size)
        what = f"{what} group_size {group_size}"
        check_header(headers["weight_scale"], spec, (spec.n, groups), SCALE_DTYPES, what)
        if not symmetric:
            words = _words(spec.n, bits)
            check_header(headers["weight_zero_point"], spec, (words, groups), (torch.int32,), what)
        if "weight_g_idx" in headers:
            check_header(headers["weight_g_idx"], spec, (spec.k,), (torch.int32,), what)
        elif group is not None and group.act_order and groups > 1:
            raise MissingTensorError(
                f"weight_g_idx of {spec.module}",
                got=f"only {', '.join(sorted(headers))}",
                rule="the group of every column, since the config says actorder group",
                remedy="download the checkpoint again, or correct the config's actorder",
            )
        scale_dtype = headers["weight_scale"].dtype
        assert scale_dtype is not None  # check_header
        scheme = QuantScheme(bits, group_size, symmetric, scale_dtype)
        read = tuple(sorted(headers.keys() - {"weight_shape"}))
        return LinearFormat(self.name, scheme, read, warning=weight_only(group))

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """See `Codec.axes`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        per_word, groups = 32 // scheme.bits, along(1, scheme.group_size)
        return {
            "weight_packed": Axes((0, 1), (1, per_word)),
            "weight_scale": Axes((0, 1), groups),
            "weight_zero_point": Axes((0, per_word), groups),
            "weight_g_idx": COLUMN_GROUPS,
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight:
        """See `Codec.decode`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        zeros, g_idx = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
        if zeros is not None:
            zeros = unpack_words(zeros, scheme.bits, -2)[..., : spec.n, :].contiguous()
        if g_idx is not None and trivial_g_idx(g_idx, scheme.group_size):
            g_idx = None
        codes = unpack_words(tensors["weight_packed"], scheme.bits, -1)[..., : spec.k].contiguous()
        return CanonicalWeight(scheme, codes, tensors["weight_scale"], zeros, g_idx)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def stored_group_size(spec: LinearSpec, headers: Headers, args: QuantizationArgs | None) -> int | None:
    """From the config group; without one from the number of scales, if that divides K."""
    if args is not None:
        return normalise_group_size(args.group_size)
    groups = headers["weight_scale"].shape[-1]
    if groups == 1:
        return None
    if spec.k % groups:
        raise FormatError(
            f"group_size of {spec.module}",
            got=f"{groups} scales a row for K={spec.k} and no config group that targets it",
            rule="a group size in the config, or a number of scales that divides K",
            remedy="restore quantization_config.config_groups",
        )
    return spec.k // groups


def config_group(spec: LinearSpec, config: Mapping[str, Any]) -> ConfigGroup | None:
    """The first config group that targets a module; None if there is none.

    Raises:
        FormatError: the config is none of compressed-tensors' schema.
        UnsupportedError: its weights are no stored integers, or are transformed.
    """
    if not config:
        return None
    from compressed_tensors.utils.match import is_match  # takes seconds

    parsed, act_order = _parse(json.dumps(_in_schema(spec.module, config), sort_keys=True))
    linear = _any_linear()
    for name, group in parsed.config_groups.items():
        if isinstance(group, list) or not is_match(spec.module, linear, group.targets, parsed.ignore or ()):
            continue
        weights = group.weights
        if weights is not None and (weights.type != "int" or weights.dynamic or weights.strategy not in STRATEGIES):
            raise UnsupportedError(
                f"weights of {spec.module}",
                got=f"type {weights.type}, strategy {weights.strategy}, dynamic {weights.dynamic}",
                rule=f"type int, strategy {', '.join(STRATEGIES)}, dynamic False",
                remedy="requantise the model to int4 or int8",
            )
        return ConfigGroup(weights, group.input_activations is not None, name in act_order)
    return None


def _in_schema(module: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in compressed-tensors' schema; that of auto-round's own format says the same in GPTQ's words."""
    if config.get("quant_method") != "auto-round" or "config_groups" in config:
        return dict(config)
    own = module_config(module, config)
    weights = {"num_bits": own.get("bits"), "symmetric": own.get("sym", True), "group_size": own.get("group_size")}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def weight_only(group: ConfigGroup | None) -> str | None:
    """The warning that a config group's activations are not quantised here, if it wants them to be."""
    if group is None or not group.activations:
        return None
    return (
        "the checkpoint quantises input activations too (such as W8A8): its weights are loaded as they are and "
        "activations stay unquantised, so that outputs differ a little from those of an engine that rounds both"
    )


@lru_cache(maxsize=4)  # a model has one config and tens of thousands of modules that match against it
def _parse(config: str) -> tuple[QuantizationConfig, frozenset[str]]:
    """The raw config in the schema of compressed-tensors, and the names of its groups with act-order."""
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads(config)
    if raw.get("transform_config"):
        raise UnsupportedError(
            "transform_config of the quantization_config",
            got=str(raw["transform_config"]),
            rule="none, since the weights of a transformed model need transformed activations",
            remedy="quantise the model without transforms",
        )
    held = {
        name: group["weights"]
        for name, group in raw.get("config_groups", {}).items()
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    }
    # The schema refuses actorder "group" since 0.19.
    act_order = frozenset(name for name, weights in held.items() if weights.pop("actorder", None) in _ACT_ORDER)
    try:
        return QuantizationConfig.model_validate(raw), act_order
    except ValueError as error:
        raise FormatError(
            "quantization_config",
            got=str(error),
            rule="the schema of compressed-tensors",
            remedy="correct config.json, or install the version of compressed-tensors that wrote it",
        ) from error


@lru_cache(maxsize=1)
def _any_linear() -> nn.Linear:
    """A linear layer for targets that name the class ``Linear``; its sizes do not matter."""
    return nn.Linear(1, 1, device="meta")
