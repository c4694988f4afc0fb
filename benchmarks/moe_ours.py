"""Our backends under measurement: `marlin`, or `unquantized` with 16 bits; a layer, and the GEMMs that it launches."""

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
from quant_moelora.core.weights import DenseWeight, ExpertWeight, PackedWeight
from quant_moelora.experts import marlin_op
from quant_moelora.kernels.common.launch import capability
from quant_moelora.kernels.common.sample import blank_prepared
from quant_moelora.kernels.dense_gemm import launch as dense_launch
from quant_moelora.kernels.dense_gemm.config import choose_tile
from quant_moelora.kernels.grouped_gemm import product
from quant_moelora.kernels.grouped_gemm.choice import TileSource
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.layer import MoEExperts


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a grouped GEMM, to be made again, and its weight. Arguments are told apart by what they are."""

    gemm: Callable[..., Tensor]  # `grouped_gemm`, or that of dense weights
    weight: ExpertWeight
    arguments: tuple[Any, ...]

    def __call__(self) -> Tensor:
        """Launch it."""
        return self.gemm(*self.arguments)

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
        x, *_, out = self._tensors(floats=True)
        whole = torch.empty(out.shape[0], self.weight.rows, dtype=x.dtype, device=x.device)
        put = {id(out): whole, id(self._first(Activation)): None}
        return replace(self, arguments=tuple(put.get(id(argument), argument) for argument in self.arguments))

    def error(self, ids: Tensor) -> float:  # ids (M, k)
        """Relative error of what it computes from its x; see `relative_error`."""
        x, *_, out = self._tensors(floats=True)
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
    """The GEMMs that a forward of the backend launches: w13 and w2."""
    calls: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []

    def taken(gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def take(*arguments: Any) -> Tensor:
            calls.append((gemm, arguments))
            return gemm(*arguments)

        return take

    with (
        mock.patch.object(product, "grouped_gemm", taken(grouped_gemm)),
        mock.patch.object(dense_launch, "dense_gemm", taken(dense_launch.dense_gemm)),
    ):
        forward()
    weights = (info.w13, info.w2)
    return [Launch(gemm, weight, arguments) for weight, (gemm, arguments) in zip(weights, calls, strict=True)]


class Ours:
    """Copies of a layer of MoEExperts."""

    def __init__(self, info: MoEQuantInfo) -> None:
        self._info = info
        self._layers: list[MoEExperts] = []

    def _layer(self, copy: int) -> MoEExperts:
        while len(self._layers) <= copy:
            info = self._info
            if self._layers:
                info = replace(info, w13=_copied(info.w13), w2=_copied(info.w2))
            self._layers.append(MoEExperts(info, backend="marlin" if _is_packed(info) else "unquantized"))
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


def _copied(weight: ExpertWeight) -> ExpertWeight:
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    return replace(weight, **copies)


def _is_packed(info: MoEQuantInfo) -> bool:
    return isinstance(info.w13, PackedWeight)


def compile_ahead(name: str, bits: int, tokens: int) -> None:
    """Compile what a case launches into Triton's cache, without tensors: for several processes at once."""
    shape = SHAPES[name]
    info = random_info(shape, bits, "meta")
    x = torch.empty(tokens, shape.hidden, dtype=DTYPE, device="meta")
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta")
    with torch.inference_mode():
        for launch in record(_forward(info, x, ids), info):
            launch.plain()()


def _forward(info: MoEQuantInfo, x: Tensor, ids: Tensor) -> Callable[[], object]:
    """The GEMMs of a layer without data."""
    w13, w2 = info.w13, info.w2
    if isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight):
        source = TileSource(LayerShape.of(info, DTYPE).name, "")
        prepared = (blank_prepared(w13, DTYPE), blank_prepared(w2, DTYPE))
        layer = marlin_op.MarlinLayer(*prepared, info.activation, weigh_input=False, tiles=source)
        weights = torch.empty(ids.shape, device="meta")
        return lambda: marlin_op.write_layer(x, ids, weights, *layer.arguments(), torch.empty_like(x))
    assert isinstance(w13, DenseWeight) and isinstance(w2, DenseWeight)
    rows, made = ids.flatten(), capability(x.device)
    tiles = torch.empty(1, 4, dtype=torch.int32, device="meta")

    def forward() -> None:
        for source, weight, top_k in ((x, w13, ids.shape[1]), (x.new_empty(len(rows), w2.k), w2, None)):
            tile = choose_tile(len(rows), info.num_experts, weight.rows, weight.k, made)
            out = x.new_empty(len(rows), weight.rows)
            dense_launch.dense_gemm(source, weight.w, None, tiles, rows, top_k, out, tile)

    return forward
