"""Rows of a packed weight in float32, in buffers that are used again."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_moelora.core.packing import TILE, RunUnpacker, run_length
from quant_moelora.core.weights import PackedWeight


class BlockDequantizer:
    """Dequantises blocks of ``tiles`` tiles of 64 rows of a weight.

    Attributes:
        values: (tiles * 64, k_pad) float32, the last block.
    """

    def __init__(self, weight: PackedWeight, tiles: int) -> None:
        bits, rows = weight.scheme.bits, tiles * TILE
        run = run_length(bits, weight.group)
        assert run is not None  # the backend's `supports`
        self._unpack = RunUnpacker(bits, run, tiles, weight.k_pad // TILE)
        self.values = torch.empty(rows, weight.k_pad)
        # Groups are whole runs, so that one scale serves a row's neighbouring columns.
        self._codes = self._unpack.codes.view(rows, -1, weight.group)
        self._values = self.values.view(rows, -1, weight.group)

    def __call__(
        self,
        qweight: Tensor,  # (tiles, k_pad/64, 128*bits) int32, contiguous
        zeros: Tensor,  # (tiles * 64, k_pad/group, 1) or () of the codes' dtype
        scales: Tensor,  # (tiles * 64, k_pad/group, 1) float32
    ) -> Tensor:  # (tiles * 64, k_pad) float32
        """The exact weight, columns in the order of `packing.run_columns`; overwritten by the next call.

        A zero point is subtracted among integers: int8 holds the difference of two int4 codes, int16 that of int8's.
        """
        self._unpack(qweight)
        self._codes.sub_(zeros)
        self._values.copy_(self._codes)
        self._values.mul_(scales)
        return self.values
