"""Unquantised linear layers: weight [N, K] in float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quant_moelora.core.weights import DENSE_DTYPES
from quant_moelora.loaders.codec import Axes, Headers, LinearFormat, LinearSpec, check_header


class Dense:
    """Codec of plain weights."""

    name = "dense"
    required = frozenset({"weight"})
    optional: frozenset[str] = frozenset()

    def fits(self, spec: LinearSpec, headers: Headers) -> bool:
        """Any floating-point weight."""
        return headers["weight"].dtype in DENSE_DTYPES

    def describe(self, spec: LinearSpec, headers: Headers, config: Mapping[str, Any]) -> LinearFormat:
        """See `Codec.describe`; the config says nothing of an unquantised weight."""
        check_header(headers["weight"], spec, (spec.n, spec.k), DENSE_DTYPES, "unquantised")
        return LinearFormat(self.name, None, ("weight",), (str(headers["weight"].dtype),))

    def axes(self, fmt: LinearFormat) -> Mapping[str, Axes]:
        """See `Codec.axes`."""
        return {"weight": Axes((0, 1), (1, 1))}

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec, fmt: LinearFormat) -> Tensor:  # (..., N, K)
        """The weight itself."""
        return tensors["weight"]
