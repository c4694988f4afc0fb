"""compressed-tensors "int-quantized" and "naive-quantized" int8, as llm-compressor writes it.

Tensors (compressed_tensors, compressors/naive_quantized): weight int8 [N, K], the signed values themselves;
weight_scale [N, 1] of strategy "channel", [N, G] of "group", one value of "tensor"; weight_zero_point int8 of
asymmetric weights, signed too and of the shape of weight_scale. Code and zero point are the signed value plus 128.

W8A8 files have the same weights. Their activations stay unquantised here: a config group with input_activations is
served weight-only with a warning, and input_scale and input_zero_point of static activations are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import SCALE_DTYPES, QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight
from quant_moelora.loaders.codec import Axes, Headers, LinearFormat, LinearSpec, along, check_agrees, check_header
from quant_moelora.loaders.compressed_tensors import TENSOR, config_group, stored_group_size, weight_only

BITS = 8


class IntQuantized:
    """Codec of int8 weights that are not packed."""

    name = "compressed-tensors"
    required = frozenset({"weight", "weight_scale"})
    optional = frozenset({"weight_zero_point", "input_scale", "input_zero_point"})

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """int8, whatever the shape; the same names hold float8 weights in other formats of compressed-tensors."""
        return headers["weight"].dtype == torch.int8

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`. The tensors decide; a config group that targets the module must agree with them."""
        weight = headers["weight"]
        if weight.dtype != torch.int8:
            raise UnsupportedError(
                f"format of {spec.module}",
                got=f"weight {weight.dtype} {list(weight.shape)} with weight_scale ({weight.where})",
                rule="torch.int8, the dtype of compressed-tensors int-quantized",
                remedy="quantise the model to int8 or int4",
            )
        group = config_group(spec, config)
        args = None if group is None else group.weights
        if args is not None and args.num_bits != BITS:
            raise UnsupportedError(
                f"weights of {spec.module}",
                got=f"num_bits {args.num_bits}, not packed",
                rule=f"num_bits {BITS}",
                remedy="requantise the model, or compress it as pack-quantized",
            )
        symmetric = "weight_zero_point" not in headers
        if args is not None:
            check_agrees("symmetric", spec, symmetric, args.symmetric)
        check_header(weight, spec, (spec.n, spec.k), (torch.int8,), "int-quantized")
        shape = headers["weight_scale"].shape
        single = math.prod(shape) == 1 and shape != (spec.n, 1)  # (), (1,) or (1, 1)
        if single or (args is not None and args.strategy == TENSOR):
            check_agrees("strategy", spec, TENSOR, None if args is None else args.strategy)
            group_size, options, allowed = None, (TENSOR,), shape if single else (1,)
        else:
            group_size, options = stored_group_size(spec, headers, args), ()
            allowed = (spec.n, num_groups(spec.k, group_size))
        what = f"int-quantized {'strategy tensor' if options else f'group_size {group_size}'}"
        check_header(headers["weight_scale"], spec, allowed, SCALE_DTYPES, what)
        if not symmetric:
            check_header(headers["weight_zero_point"], spec, allowed, (torch.int8,), what)
        scale_dtype = headers["weight_scale"].dtype
        assert scale_dtype is not None  # check_header
        read = headers.keys() & {"weight", "weight_scale", "weight_zero_point"}
        scheme = QuantScheme(BITS, group_size, symmetric, scale_dtype)
        return LinearFormat(self.name, scheme, tuple(sorted(read)), options, weight_only(group))

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """See `Codec.axes`."""
        assert fmt.scheme is not None  # describe
        of_group = Axes(None if TENSOR in fmt.options else (0, 1), along(1, fmt.scheme.group_size))
        return {"weight": Axes((0, 1), (1, 1)), "weight_scale": of_group, "weight_zero_point": of_group}

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight:
        """See `Codec.decode`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        weight, scales, zeros = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
        if TENSOR in fmt.options:  # one value, once for every channel
            *lead, n, _ = weight.shape
            scales = scales.reshape(*lead, 1, 1).expand(*lead, n, 1).contiguous()
            zeros = None if zeros is None else zeros.reshape(*lead, 1, 1).expand(*lead, n, 1).contiguous()
        return CanonicalWeight(scheme, _codes(weight), scales, None if zeros is None else _codes(zeros), None)


def _codes(
    signed: Tensor,  # (...) int8
) -> Tensor:  # (...) uint8
    """The values plus 128: in two's complement that is the sign bit flipped."""
    return signed.view(torch.uint8) ^ 0x80
