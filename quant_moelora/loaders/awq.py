"""AWQ in the GEMM packing, as AutoAWQ and gptqmodel write it.

Tensors (AutoAWQ, modules/linear/gemm.py): qweight int32 [K, N/8] and qzeros int32 [G, N/8], packed along N; scales
float16 or bfloat16 [G, N]. Nibble i of word c is output 8*c + order[i] with order 0, 2, 4, 6, 1, 3, 5, 7. Zero points
are stored as they are, also where the config says zero_point false (they are all 8 then).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import SCALE_DTYPES, QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight, unpack_words
from quant_moelora.loaders.codec import (
    Headers,
    LinearFormat,
    LinearSpec,
    check_agrees,
    check_header,
    check_whole_words,
    normalise_group_size,
)
from quant_moelora.loaders.gptq import check_symmetric
from quant_moelora.loaders.overrides import module_config

BITS = 4
PER_WORD = 32 // BITS
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output within a word of its nibble i


class AWQ:
    """Codec of AWQ GEMM int4."""

    name = "awq"
    required = frozenset({"qweight", "qzeros", "scales"})
    optional: frozenset[str] = frozenset()

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """AWQ GEMM packs along N, so that qweight has K rows."""
        return headers["qweight"].shape == (spec.k, spec.n // PER_WORD)

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`."""
        config = module_config(spec.module, config)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise UnsupportedError(
                f"AWQ version of {spec.module}", got=version, rule="gemm", remedy="convert the checkpoint with AutoAWQ"
            )
        check_agrees("bits", spec, BITS, config.get("bits", config.get("w_bit")))
        group_size = normalise_group_size(config.get("group_size", config.get("q_group_size")))
        groups, words = num_groups(spec.k, group_size), spec.n // PER_WORD
        check_whole_words(spec, BITS, N=spec.n)
        what = f"AWQ int4 group_size {group_size}"
        check_header(headers["qweight"], spec, (spec.k, words), (torch.int32,), what)
        check_header(headers["scales"], spec, (groups, spec.n), SCALE_DTYPES, what)
        check_header(headers["qzeros"], spec, (groups, words), (torch.int32,), what)
        scale_dtype = headers["scales"].dtype
        assert scale_dtype is not None  # check_header
        symmetric = not config.get("zero_point", not config.get("sym", False))  # AutoAWQ's word, then gptqmodel's
        return LinearFormat(
            self.name, QuantScheme(BITS, group_size, symmetric, scale_dtype), tuple(sorted(self.required))
        )

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight:
        """See `Codec.decode`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        zeros = _unpack_interleaved(tensors["qzeros"])
        if scheme.symmetric:
            check_symmetric(zeros, spec, scheme)
        return CanonicalWeight(
            scheme=scheme,
            codes=_unpack_interleaved(tensors["qweight"]).transpose(-1, -2).contiguous(),
            scales=tensors["scales"].transpose(-1, -2).contiguous(),
            zeros=None if scheme.symmetric else zeros.transpose(-1, -2).contiguous(),
            g_idx=None,
        )


def _unpack_interleaved(
    words: Tensor,  # (..., C) int32
) -> Tensor:  # (..., 8*C) uint8
    """Codes in the order of outputs."""
    nibbles = unpack_words(words, BITS, -1).unflatten(-1, (-1, PER_WORD))
    place = torch.tensor(_ORDER, device=words.device).argsort()  # nibble of each output
    return nibbles[..., place].flatten(-2)
