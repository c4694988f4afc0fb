"""The registered codecs, and which of them a module's tensors are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_moelora.core.errors import MissingTensorError, UnsupportedError
from quant_moelora.loaders.awq import AWQ
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.codec import Codec, Headers, LinearFormat, LinearSpec
from quant_moelora.loaders.compressed_tensors import PackQuantized
from quant_moelora.loaders.dense import Dense
from quant_moelora.loaders.gptq import GPTQ
from quant_moelora.loaders.int_quantized import IntQuantized
from quant_moelora.loaders.unserved import refuse_unserved

CODECS: tuple[Codec, ...] = (GPTQ(), AWQ(), PackQuantized(), IntQuantized(), Dense())
QUANTIZED_SUFFIXES = frozenset().union(*(c.required | c.optional for c in CODECS)) - Dense.required


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer of a checkpoint: nothing of its data has been read.

    Attributes:
        spec: its name there and its dimensions.
        codec: the codec that reads it.
        fmt: how it is stored.
        headers: its tensors, by suffix, without a bias.
    """

    spec: LinearSpec
    codec: Codec
    fmt: LinearFormat
    headers: Headers


def describe_linear(checkpoint: Checkpoint, spec: LinearSpec, headers: Headers) -> StoredLinear:
    """How a module is stored; what the user has to know of that is logged once a checkpoint.

    Raises:
        MissingTensorError, FormatError, UnsupportedError: see `find_codec` and `Codec.describe`.
    """
    codec = find_codec(spec, headers, checkpoint.quantization)
    fmt = codec.describe(spec, headers, checkpoint.quantization)
    if fmt.warning:
        checkpoint.warn_once(fmt.warning)
    return StoredLinear(spec, codec, fmt, headers)


def find_codec(spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> Codec:
    """The codec of a module, from its tensors' names, then from their shapes, then from the config's quant_method.

    Raises:
        MissingTensorError: some tensors of a format are there and others are not.
        UnsupportedError: no codec reads tensors of these names and dtypes.
    """
    suffixes = headers.keys()
    named = [c for c in CODECS if c.required <= suffixes <= c.required | c.optional]
    fitting = [c for c in named if c.fits(spec, headers)]
    if len(fitting) == 1:
        return fitting[0]
    refuse_unserved(spec.module, headers.values())
    quantized = [c for c in named if c.name == config.get("quant_method")]
    if quantized:
        return quantized[0]  # its describe says which shape is wrong
    if len(named) == 1 and named[0].name != Dense.name:
        return named[0]
    file = next(iter(headers.values())).file.name
    partial = [
        c for c in CODECS if c.required & suffixes and c.required - suffixes and suffixes <= c.required | c.optional
    ]
    if partial and not named:  # a lone weight of a dtype that is not served is not half of a format
        codec = next((c for c in partial if c.name == config.get("quant_method")), partial[0])
        absent = ", ".join(sorted(codec.required - suffixes))
        raise MissingTensorError(
            f"{absent} of {spec.module}",
            got=f"only {', '.join(sorted(suffixes))} ({file})",
            rule=f"{', '.join(sorted(codec.required))}, the tensors of {codec.name}",
            remedy="download the checkpoint again",
        )
    known = [f"{codec.name} ({', '.join(sorted(codec.required))})" for codec in CODECS]
    raise UnsupportedError(
        f"format of {spec.module}",
        got=", ".join(f"{s} {headers[s].dtype} {list(headers[s].shape)}" for s in sorted(suffixes)) + f" ({file})",
        rule=f"one of {'; '.join(known)} for N={spec.n}, K={spec.k}",
        remedy="convert the checkpoint to one of these formats",
    )
