"""GPTQ, as AutoGPTQ, gptqmodel and auto-round write it.

Tensors (gptqmodel, nn_modules/qlinear): qweight int32 [K*bits/32, N], packed along K; qzeros int32
[G, N*bits/32], packed along N; scales float16 or bfloat16 [G, N]; g_idx int32 [K], optional. Codes run from the lowest
bits up.

The "v1" files (checkpoint_format "gptq") hold zero points minus one, subtracted from whole words (0x11111111 for
int4), so that a zero point of 0 borrows from its neighbour: only adding the whole word back with wrap-around undoes it.
"gptq_v2" files hold the zero points themselves. So do "gptq_p" files: their
planar packing is the layout above for 4 and 8 bits (gptqmodel, utils/planar_packing.py).

gptqmodel 4.2.5 rounds N down to a multiple of 32 for qzeros, which are empty for a router of fewer experts: then only a
symmetric weight is determined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    check_understood,
    check_whole_words,
    normalise_group_size,
)
from quant_moelora.loaders.overrides import module_config

V1, V2, PLANAR = "gptq", "gptq_v2", "gptq_p"
# auto-round's names of its packings; "auto_gptq" subtracts one, the others do not
_VERSIONS = {"auto_round:auto_gptq": V1, "auto_round": V2, "auto_round:gptqmodel": V2}
_V1_OFFSET = {4: 0x11111111, 8: 0x01010101}


class GPTQ:
    """Codec of GPTQ v1, v2 and planar, int4 and int8."""

    name = "gptq"
    required = frozenset({"qweight", "qzeros", "scales"})
    optional = frozenset({"g_idx"})

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """GPTQ packs along K, so that qweight has N columns."""
        qweight = headers["qweight"]
        if qweight.dtype != torch.int32:  # AWQ GEMV_FAST's int16 [N/4, K] has the shape of int8 where N = K
            return False
        return any(qweight.shape == (spec.k * bits // 32, spec.n) for bits in SUPPORTED_BITS)

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`."""
        config = module_config(spec.module, config)
        check_understood(spec, config)
        names = [config[name] for name in ("checkpoint_format", "format") if config.get(name)]
        packing = config.get("packing_format") or "auto_round:auto_gptq"
        version = names[0] if names else _VERSIONS.get(packing, packing)
        if version not in (V1, V2, PLANAR):
            raise UnsupportedError(
                f"checkpoint_format of {spec.module}",
                got=version,
                rule=f"{V1}, {V2} or {PLANAR}",
                remedy="convert the checkpoint with gptqmodel",
            )
        declared_bits = config.get("bits")
        found = [bits for bits in SUPPORTED_BITS if headers["qweight"].shape == (spec.k * bits // 32, spec.n)]
        bits = found[0] if found else declared_bits
        if bits not in SUPPORTED_BITS:
            raise UnsupportedError(
                f"bits of {spec.module}", got=bits, rule="4 or 8", remedy="requantise the model to int4 or int8"
            )
        check_whole_words(spec, bits, N=spec.n, K=spec.k)
        what = f"GPTQ int{bits}"
        check_header(headers["qweight"], spec, (spec.k * bits // 32, spec.n), (torch.int32,), what)
        check_agrees("bits", spec, bits, declared_bits)
        group_size = normalise_group_size(config.get("group_size"))
        groups = num_groups(spec.k, group_size)
        what = f"{what} group_size {group_size}"
        check_header(headers["scales"], spec, (groups, spec.n), SCALE_DTYPES, what)
        symmetric = bool(config.get("sym", True))
        tensors = sorted(headers)
        if symmetric and spec.n < 32 and headers["qzeros"].shape == (groups, 0):
            tensors.remove("qzeros")
        else:
            check_header(headers["qzeros"], spec, (groups, spec.n * bits // 32), (torch.int32,), what)
        if "g_idx" in headers:
            check_header(headers["g_idx"], spec, (spec.k,), (torch.int32,), what)
        elif config.get("desc_act") and groups > 1:
            raise MissingTensorError(
                f"g_idx of {spec.module}",
                got=f"only {', '.join(sorted(headers))}",
                rule="the group of every column, since the config says desc_act",
                remedy="download the checkpoint again, or correct the config's desc_act",
            )
        scale_dtype = headers["scales"].dtype
        assert scale_dtype is not None  # check_header
        scheme = QuantScheme(bits, group_size, symmetric, scale_dtype)
        options = (V1 if version == V1 else V2,)
        return LinearFormat(self.name, scheme, tuple(tensors), options, _conflict(names))

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """See `Codec.axes`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        per_word, groups = 32 // scheme.bits, along(0, scheme.group_size)
        return {
            "qweight": Axes((1, 1), (0, per_word)),
            "qzeros": Axes((1, per_word), groups),
            "scales": Axes((1, 1), groups),
            "g_idx": COLUMN_GROUPS,
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> CanonicalWeight:
        """See `Codec.decode`."""
        scheme = fmt.scheme
        assert scheme is not None  # describe
        zeros = None
        if "qzeros" in tensors:
            stored = tensors["qzeros"]
            if V1 in fmt.options:
                stored = stored + _V1_OFFSET[scheme.bits]  # int32 addition wraps
            zeros = unpack_words(stored, scheme.bits, -1)
        if scheme.symmetric and zeros is not None:
            check_symmetric(zeros, spec, scheme)
        g_idx = tensors.get("g_idx")
        if g_idx is not None and trivial_g_idx(g_idx, scheme.group_size):
            g_idx = None
        return CanonicalWeight(
            scheme=scheme,
            codes=unpack_words(tensors["qweight"], scheme.bits, -2).transpose(-1, -2).contiguous(),
            scales=tensors["scales"].transpose(-1, -2).contiguous(),
            zeros=None if scheme.symmetric or zeros is None else zeros.transpose(-1, -2).contiguous(),
            g_idx=g_idx,
        )


def _conflict(names: list[str]) -> str | None:
    """The warning that a config names two versions: the older key's, which comes first, counts."""
    if len(set(names)) < 2:
        return None
    return f"the config says checkpoint_format {names[0]} and format {names[1]}: it is read as {names[0]}"


def check_symmetric(
    zeros: Tensor,  # (...) uint8
    spec: LinearSpec,
    scheme: QuantScheme,
) -> None:
    """Raise FormatError unless all zero points are those of a symmetric weight."""
    wrong = zeros[zeros != scheme.symmetric_zero]
    if wrong.numel():
        raise FormatError(
            f"qzeros of {spec.module}",
            got=f"zero point {int(wrong[0])}",
            rule=f"{scheme.symmetric_zero} everywhere, since the config says that the weights are symmetric",
            remedy="the config's sym, zero_point or checkpoint_format (gptq, gptq_v2) belongs to another checkpoint",
        )
