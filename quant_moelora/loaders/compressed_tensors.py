"""compressed-tensors "pack-quantized", as llm-compressor writes it.

Tensors (compressed_tensors, compressors/pack_quantized): weight_packed int32 [N, K*bits/32], packed along K from the
lowest bits up, each code offset by 2**(bits-1); weight_scale [N, G]; weight_zero_point int32 [N*bits/32, G] of
asymmetric weights, packed along N with the same offset; weight_g_idx int32 [K] of files with actorder "group", written
by versions before 0.19; weight_shape int64 [2], which repeats N and K.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.core.scheme import SCALE_DTYPES, SUPPORTED_BITS, QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight, trivial_g_idx, unpack_words
from quant_moelora.loaders.codec import (
    Headers,
    LinearFormat,
    LinearSpec,
    check_agrees,
    check_header,
    normalise_group_size,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme


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
        scale_dtype = headers["weight_scale"].dtype
        assert scale_dtype is not None  # check_header
        scheme = QuantScheme(bits, group_size, symmetric, scale_dtype)
        read = tuple(sorted(headers.keys() - {"weight_shape"}))
        return LinearFormat(self.name, scheme, read, warning=weight_only(group))

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


def config_group(spec: LinearSpec, config: Mapping[str, Any]) -> QuantizationScheme | None:
    """The first config group that targets a module; None if there is none."""
    if not config:
        return None
    from compressed_tensors.utils.match import is_match  # takes seconds

    parsed = _parse(json.dumps(dict(config), sort_keys=True))
    linear = _any_linear()
    for group in parsed.config_groups.values():
        if not isinstance(group, list) and is_match(spec.module, linear, group.targets, parsed.ignore or ()):
            return group
    return None


def weight_only(group: QuantizationScheme | None) -> str | None:
    """The warning that a config group's activations are not quantised here, if it wants them to be."""
    if group is None or group.input_activations is None:
        return None
    return (
        "the checkpoint quantises input activations too (such as W8A8): its weights are loaded as they are and "
        "activations stay unquantised, so that outputs differ a little from those of an engine that rounds both"
    )


@lru_cache(maxsize=4)  # a model has one config and tens of thousands of modules that match against it
def _parse(config: str) -> QuantizationConfig:
    """The raw config in the schema of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads(config)
    for group in raw.get("config_groups", {}).values():
        # The schema refuses actorder "group" since 0.19. The tensors say the same (weight_g_idx), so it is left out.
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            group["weights"].pop("actorder", None)
    try:
        return QuantizationConfig.model_validate(raw)
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
