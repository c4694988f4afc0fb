"""The `marlin` backend under measurement: its layer, and the GEMMs that the layer launches, by themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.moe_case import CHECKED_TOKENS, DTYPE, SHAPES, Case, random_info, relative_error
from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts import marlin_op
from quant_moelora.kernels.common.sample import blank_prepared
from quant_moelora.kernels.grouped_gemm import product
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.layer import MoEExperts


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of `grouped_gemm`, to be made again, and its weight. Arguments are told apart by what they are."""

    weight: PackedWeight
    arguments: tuple[Any, ...]

    def __call__(self) -> Tensor:
        """Launch it."""
        return grouped_gemm(*self.arguments)

    def _first(self, kind: type[Any]) -> Any:
        return next((value for value in self.arguments if isinstance(value, kind)), None)

    def _tensors(self, *, floats: bool) -> list[Tensor]:
        return [t for t in self.arguments if isinstance(t, Tensor) and t.is_floating_point() == floats]

    @property
    def detail(self) -> str:
        """The tile and what is done with it, in words."""
        tile, activation = self._first(Tile), self._first(Activation)
        split = f" split {tile.split}" if tile.split > 1 else ""
        fused = f" + {activation.name}" if activation else ""
        return f"{tile.bm}x{tile.bn}x{tile.bk} w{tile.warps} s{tile.stages}{split}{fused}"

    def plain(self) -> Launch:
        """The same product without the activation, to be checked against the definition."""
        if self._first(Activation) is None:
            return self
        x, out = self._tensors(floats=True)
        whole = torch.empty(out.shape[0], self.weight.rows, dtype=x.dtype, device=x.device)
        put = {id(out): whole, id(self._first(Activation)): None}
        return Launch(self.weight, tuple(put.get(id(argument), argument) for argument in self.arguments))

    def error(self, ids: Tensor) -> float:  # ids (M, k)
        """Relative error of what it computes from its x; see `relative_error`."""
        x, out = self._tensors(floats=True)
        out.fill_(float("nan"))
        self()
        out = out.sum(0) if out.ndim == 3 else out  # partial sums
        pairs = torch.arange(ids.numel(), device=ids.device)
        integers = self._tensors(floats=False)
        if any(t.ndim == 2 for t in integers):  # a table of tiles: rows are sorted
            pairs = next(t for t in integers if t.shape == pairs.shape).to(torch.int64)
        if x.shape[0] != ids.numel():
            x = x[pairs // ids.shape[1]]
        return relative_error(out, x, ids.flatten()[pairs], self.weight)


def record(forward: Callable[[], object], info: MoEQuantInfo) -> list[Launch]:
    """The calls of `grouped_gemm` that a forward of the backend makes: w13 and w2."""
    calls: list[tuple[Any, ...]] = []

    def take(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return grouped_gemm(*arguments)

    with mock.patch.object(product, "grouped_gemm", take):
        forward()
    return [Launch(weight, arguments) for weight, arguments in zip(_packed(info), calls, strict=True)]


class Ours:
    """Copies of a layer of MoEExperts."""

    def __init__(self, info: MoEQuantInfo) -> None:
        self._info = info
        self._layers: list[MoEExperts] = []

    def _layer(self, copy: int) -> MoEExperts:
        while len(self._layers) <= copy:
            info = self._info
            if self._layers:
                w13, w2 = (replace(w, qweight=w.qweight.clone(), scales=w.scales.clone()) for w in _packed(info))
                info = replace(info, w13=w13, w2=w2)
            self._layers.append(MoEExperts(info, backend="marlin"))
        return self._layers[copy]

    def layer(self, case: Case, copies: int) -> list[Callable[[], object]]:
        """Forwards of the whole layer."""
        return [
            functools.partial(self._layer(copy), case.x, ids, case.topk_weights) for copy, ids in case.launches(copies)
        ]

    def gemms(self, case: Case, copies: int) -> tuple[list[Callable[[], object]], float | None, str]:
        """The GEMMs of these forwards; their error, and the tiles in words."""
        calls: list[Callable[[], object]] = []
        error, detail = None, ""
        for forward, (_, ids) in zip(self.layer(case, copies), case.launches(copies), strict=True):
            launches = record(forward, self._info)
            if not calls:
                detail = "; ".join(f"{name} {call.detail}" for name, call in zip(("w13", "w2"), launches, strict=True))
                if case.tokens <= CHECKED_TOKENS:
                    error = max(launch.plain().error(ids) for launch in launches)
            calls += launches
        return calls, error, detail


def _packed(info: MoEQuantInfo) -> tuple[PackedWeight, PackedWeight]:
    assert isinstance(info.w13, PackedWeight) and isinstance(info.w2, PackedWeight)
    return info.w13, info.w2


def compile_ahead(name: str, bits: int, tokens: int) -> None:
    """Compile what a case launches into Triton's cache, without tensors: for several processes at once."""
    shape = SHAPES[name]
    info = random_info(shape, bits, "meta")
    w13, w2 = (blank_prepared(weight, DTYPE) for weight in _packed(info))
    source = TileSource(LayerShape.of(info, DTYPE).name, "")
    layer = marlin_op.MarlinLayer(w13, w2, info.activation, weigh_input=False, tiles=source)
    x = torch.empty(tokens, shape.hidden, dtype=DTYPE, device="meta")
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta")
    weights = torch.empty(tokens, shape.top_k, device="meta")

    def forward() -> None:
        marlin_op.write_layer(x, ids, weights, *layer.arguments(), torch.empty_like(x))

    with torch.inference_mode():
        for launch in record(forward, info):
            launch.plain()()
