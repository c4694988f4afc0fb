"""AWQ in the GEMM packing, as AutoAWQ and gptqmodel write it, and in AutoAWQ's GEMV packing.

GEMM (AutoAWQ, modules/linear/gemm.py): qweight int32 [K, N/8] and qzeros int32 [G, N/8], packed along N; scales
float16 or bfloat16 [G, N]. Nibble i of word c is output 8*c + order[i] with order 0, 2, 4, 6, 1, 3, 5, 7. Zero points
are stored as they are, also where the config says zero_point false (they are all 8 then).

GEMV (AutoAWQ, modules/linear/gemv.py): qweight int32 [N, K/8], packed along K; qzeros int32 [N, Z], packed along the
groups; scales [N, 8*Z]; both in natural order and padded with zeros. Z is the words that the groups fill, rounded up to
1, 2 or 4 for groups of 128 and more, of 64 and of 32 columns; smaller groups do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.core.scheme import SCALE_DTYPES, QuantScheme, num_groups
from quant_moelora.loaders.canonical import CanonicalWeight, contiguous_bytes, unpack_words
from quant_moelora.loaders.codec import (
    Axes,
    Headers,
    LinearFormat,
    LinearSpec,
    along,
    check_agrees,
    check_header,
    check_understood,
    check_whole_words,
    normalise_group_size,
)
from quant_moelora.loaders.gptq import check_symmetric
from quant_moelora.loaders.overrides import module_config

BITS = 4
PER_WORD = 32 // BITS
GEMM, GEMV = "gemm", "gemv"
_GEMV_WORDS = {64: 2, 32: 4}  # group size -> words of a row of zero points come in these multiples


class AWQ:
    """Codec of AWQ int4, GEMM and GEMV."""

    name = "awq"
    required = frozenset({"qweight", "qzeros", "scales"})
    optional: frozenset[str] = frozenset()

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """GEMM packs along N, so that qweight has K rows; GEMV packs along K, so that qweight has N rows."""
        layouts = _layouts(spec, headers)
        # GPTQ's qweight [K/8, N] has that shape too if N = K/8; its scales do not.
        return GEMM in layouts or (GEMV in layouts and headers["scales"].shape[:1] == (spec.n,))

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`."""
        config = module_config(spec.module, config)
        check_understood(spec, config)
        layouts = _layouts(spec, headers)
        declared = config.get("version") or config.get("format")
        version = str(declared or (layouts or [GEMM])[0]).lower()
        if version not in (GEMM, GEMV):
            raise UnsupportedError(
                f"AWQ version of {spec.module}",
                got=version,
                rule=f"{GEMM} or {GEMV}",
                remedy="convert the checkpoint with AutoAWQ",
            )
        if layouts and version not in layouts:
            check_agrees("AWQ version", spec, layouts[0], version)
        check_agrees("bits", spec, BITS, config.get("bits", config.get("w_bit")))
        group_size = normalise_group_size(config.get("group_size", config.get("q_group_size")))
        check_whole_words(spec, BITS, **({"N": spec.n} if version == GEMM else {"K": spec.k}))
        qweight, scales, qzeros = _SHAPES[version](spec, group_size)
        what = f"AWQ {version} int4 group_size {group_size}"
        check_header(headers["qweight"], spec, qweight, (torch.int32,), what)
        check_header(headers["scales"], spec, scales, SCALE_DTYPES, what)
        check_header(headers["qzeros"], spec, qzeros, (torch.int32,), what)
        scale_dtype = headers["scales"].dtype
        assert scale_dtype is not None  # check_header
        symmetric = not config.get("zero_point", not config.get("sym", False))  # AutoAWQ's word, then gptqmodel's
        return LinearFormat(
            self.name, QuantScheme(BITS, group_size, symmetric, scale_dtype), tuple(sorted(self.required)), (version,)
        )

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """See `Codec.axes`."""
        assert fmt.scheme is not None  # describe
        size = fmt.scheme.group_size
        if GEMV in fmt.options:
            return {
                "qweight": Axes((0, 1), (1, PER_WORD)),
                "qzeros": Axes((0, 1), along(1, size, PER_WORD)),
                "scales": Axes((0, 1), along(1, size)),
            }
        groups = along(0, size)
        return {
            "qweight": Axes((1, PER_WORD), (0, 1)),
            "qzeros": Axes((1, PER_WORD), groups),
            "scales": Axes((1, 1), groups),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight:
        """See `Codec.decode`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        if GEMV in fmt.options:
            groups = num_groups(spec.k, scheme.group_size)
            codes = unpack_words(tensors["qweight"], BITS, -1)
            zeros = unpack_words(tensors["qzeros"], BITS, -1)[..., :groups].contiguous()
            scales = tensors["scales"][..., :groups].contiguous()
        else:
            codes = _unpack_interleaved(tensors["qweight"])
            zeros = _unpack_interleaved(tensors["qzeros"])
            scales = tensors["scales"].transpose(-1, -2).contiguous()
        if scheme.symmetric:
            check_symmetric(zeros, spec, scheme)
        return CanonicalWeight(scheme, codes, scales, None if scheme.symmetric else zeros, None)


Shape = tuple[int, ...]


def _layouts(spec: LinearSpec, headers: Headers) -> list[str]:
    """The packings that a qweight of this shape can be of; both if N = K."""
    shape = headers["qweight"].shape
    found = {GEMM: (spec.k, spec.n // PER_WORD), GEMV: (spec.n, spec.k // PER_WORD)}
    return [version for version, expected in found.items() if shape == expected]


def _gemm_shapes(spec: LinearSpec, group_size: int | None) -> tuple[Shape, Shape, Shape]:
    """Of qweight, scales and qzeros."""
    groups, words = num_groups(spec.k, group_size), spec.n // PER_WORD
    return (spec.k, words), (groups, spec.n), (groups, words)


def _gemv_shapes(spec: LinearSpec, group_size: int | None) -> tuple[Shape, Shape, Shape]:
    """Of qweight, scales and qzeros.

    Raises:
        UnsupportedError: a group size that GEMV does not have.
    """
    size = group_size or spec.k
    if (size < 128 and size not in _GEMV_WORDS) or spec.k % size:
        raise UnsupportedError(
            f"group_size of {spec.module}",
            got=f"{group_size} for K={spec.k}",
            rule="32, 64, or 128 and more, and a divisor of K: AWQ GEMV has no other",
            remedy="requantise the model with version gemm",
        )
    multiple = PER_WORD * _GEMV_WORDS.get(size, 1)  # groups
    padded = -(-(spec.k // size) // multiple) * multiple
    return (spec.n, spec.k // PER_WORD), (spec.n, padded), (spec.n, padded // PER_WORD)


_SHAPES = {GEMM: _gemm_shapes, GEMV: _gemv_shapes}


def _unpack_interleaved(
    words: Tensor,  # (..., R, C) int32
) -> Tensor:  # (..., 8*C, R) uint8
    """Codes in the order of outputs, transposed.

    By the order above, output 4*i + 2*j + k of a word is nibble j of byte 2*k + i.
    """
    stored = contiguous_bytes(words.transpose(-1, -2)).unflatten(-1, (-1, 2, 2))  # (..., C, R, k, i)
    ordered = stored.movedim(-1, -3).transpose(-1, -2).contiguous()  # (..., C, i, k, R)
    return torch.stack((ordered & 0xF, ordered >> 4), dim=-3).flatten(-5, -2)  # (..., C, i, j, k, R)
