"""QuantScheme: the only source of quantisation facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant_moelora.core.errors import UnsupportedError

SUPPORTED_BITS = (4, 8)
SCALE_DTYPES = (torch.float16, torch.bfloat16)
NONE_SCHEME = "none"  # name under which unquantised weights are reported


def num_groups(k: int, group_size: int | None) -> int:
    """Groups that a row of k columns has; the last one may be short."""
    return 1 if group_size is None else -(-k // group_size)


@dataclass(frozen=True)
class QuantScheme:
    """How a weight [N, K] is quantised along K.

    Attributes:
        bits: 4 or 8.
        group_size: columns of K that share a scale; None means one group for all of K (per channel).
        symmetric: True means w = (q - 2**(bits-1)) * scale, False means w = (q - zero) * scale.
        scale_dtype: torch.float16 or torch.bfloat16, as the checkpoint stores the scales.

    Raises:
        UnsupportedError: on any other value.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UnsupportedError("bits", got=self.bits, rule="4 or 8", remedy="requantise the model to int4 or int8")
        if self.group_size is not None and self.group_size <= 0:
            raise UnsupportedError(
                "group_size",
                got=self.group_size,
                rule="a positive number of columns, or None for one group per channel",
                remedy="pass None where a checkpoint writes -1",
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise UnsupportedError(
                "scale_dtype",
                got=self.scale_dtype,
                rule="torch.float16 or torch.bfloat16",
                remedy="store the scales as 16-bit floats",
            )

    @property
    def name(self) -> str:
        """Short name such as ``w4a16_g128_sym`` or ``w8a16_channel_asym``."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}a16_{group}_{'sym' if self.symmetric else 'asym'}"

    @property
    def symmetric_zero(self) -> int:
        """The zero point of a symmetric weight in the code's domain: 8 for int4, 128 for int8."""
        return 1 << (self.bits - 1)
