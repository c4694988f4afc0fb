"""Which tiles a forward takes: the only place that decides, for operators of a whole layer and of one product alike.

It is asked inside operators: a choice in Python that `torch.compile` traces would be traced again for each batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from quant_moelora.kernels.common.launch import capability, gpu_name
from quant_moelora.kernels.grouped_gemm.config import choose_lora_cut, choose_tiles
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles
from quant_moelora.kernels.grouped_gemm.table import tuned_tiles
from quant_moelora.kernels.lora.spec import Cut


class TileSource(NamedTuple):
    """From what the tiles of a layer are chosen, as operators take it.

    Attributes:
        shape: name of its `LayerShape`.
        tuned_configs: the user's folder of tables, or empty.
    """

    shape: str
    tuned_configs: str

    def tiles(self, num_pairs: int, device: torch.device) -> LayerTiles:
        """Tiles for P pairs, at least 1, on a GPU."""
        tuned = tuned_tiles(self.tuned_configs or None, gpu_name(device))
        return choose_tiles(LayerShape.parse(self.shape), num_pairs, capability(device), tuned)

    def lora_cut(self, num_pairs: int, max_rank: int, device: torch.device) -> Cut:
        """How LoRA is cut for P pairs, at least 1, on a GPU."""
        tuned = tuned_tiles(self.tuned_configs or None, gpu_name(device))
        return choose_lora_cut(LayerShape.parse(self.shape), num_pairs, max_rank, tuned)
