"""The marlin backend: Triton grouped GEMMs that read the packed layout as it is."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.backend import Prepared, Verdict
from quant_moelora.core.injection import Injection
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import Plan, Routing
from quant_moelora.core.weights import PackedWeight
from quant_moelora.core.workspace import Workspace
from quant_moelora.kernels.activation.launch import activate
from quant_moelora.kernels.align.launch import align
from quant_moelora.kernels.by_half.launch import by_half
from quant_moelora.kernels.common.launch import capability, gpu_name
from quant_moelora.kernels.dequant.prepare import LEAST_GROUP, PreparedWeight, prepare, regrouped
from quant_moelora.kernels.grouped_gemm.config import Tuned, choose_tiles
from quant_moelora.kernels.grouped_gemm.launch import grouped_gemm
from quant_moelora.kernels.grouped_gemm.layer import LayerShape, LayerTiles
from quant_moelora.kernels.grouped_gemm.spec import Tile
from quant_moelora.kernels.grouped_gemm.table import tuned_tiles
from quant_moelora.kernels.moe_sum.launch import moe_sum

_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)  # fma.rn.bf16x2 and cp.async


@dataclass(frozen=True, eq=False)
class MarlinPrepared(Prepared):
    """`Prepared` with what the kernels read of each weight besides its codes, and a folder of tuned tiles, or None."""

    w13: PreparedWeight
    w2: PreparedWeight
    tuned_configs: str | None = None

    @functools.cached_property
    def shape(self) -> LayerShape:
        """What tiles are chosen from."""
        return LayerShape.of(self.info, self.dtype)

    @functools.cached_property
    def _target(self) -> tuple[tuple[int, int], Tuned]:
        """The GPU that tiles are chosen for, and what was measured there."""
        device = self.info.device
        return capability(device), tuned_tiles(self.tuned_configs, gpu_name(device))

    def choose_tiles(self, num_pairs: int) -> LayerTiles:
        """Tiles for a number of pairs on the info's device."""
        return choose_tiles(self.shape, num_pairs, *self._target)


class MarlinBackend:
    """wNa16 on NVIDIA GPUs from sm_80 on: int4 and int8 codes are dequantised in registers."""

    name = "marlin"
    fuses: frozenset[str] = frozenset({"activation", "moe_sum"})  # of the base model

    def supports(self, info: MoEQuantInfo, device: torch.device, dtype: torch.dtype, *, lora: bool) -> Verdict:
        """Serve packed weights on a CUDA device in bfloat16 or float16."""
        reasons: list[str] = []
        if device.type != "cuda":
            reasons.append(f"device {device} is no CUDA device")
        elif not torch.cuda.is_available():
            reasons.append(f"torch sees no CUDA device to be {device}")
        elif (found := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
            reasons.append(f"{device} has compute capability {found[0]}.{found[1]}, below 8.0")
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if dtype not in _DTYPES:
            reasons.append(f"activation dtype {dtype} is not bfloat16 or float16")
        for name, weight in (("w13", info.w13), ("w2", info.w2)):
            if not isinstance(weight, PackedWeight):
                reasons.append(f"{name} is not quantised")
            elif regrouped(weight) < LEAST_GROUP:
                reasons.append(
                    f"{name} has groups of {weight.group} columns, whose least common part with 128 is below 16"
                )
        if info.shard is not None and info.shard.world_size > 1:
            reasons.append(f"the layer is shard {info.shard.rank} of {info.shard.world_size}")
        return Verdict(tuple(reasons))

    def prepare(self, info: MoEQuantInfo, dtype: torch.dtype, tuned_configs: str | None = None) -> MarlinPrepared:
        """Cast the scales and fold the dequantisation's powers of two into them."""
        w13, w2 = (prepare(_packed(weight), dtype) for weight in (info.w13, info.w2))
        lossy = "; ".join(f"{name}: {w.lossy}" for name, w in (("w13", w13), ("w2", w2)) if w.lossy)
        tensors = w13.tensors("w13") | w2.tensors("w2")
        return MarlinPrepared(info, dtype, tensors, lossy or None, w13, w2, tuned_configs)

    def workspace(self, info: MoEQuantInfo) -> Workspace:
        """Buffers on the info's device."""
        return Workspace(info.device)

    def apply(
        self,
        x: Tensor,  # (M, H) prepared.dtype
        prepared: Prepared,
        routing: Routing,
        injection: Injection,
        workspace: Workspace,
    ) -> Tensor:  # (M, H) prepared.dtype
        """Compute the layer; see `ExpertsBackend.apply`."""
        with torch.cuda.device_of(x):  # Triton launches on the current device, whichever the tensors are on
            return self._apply(x, prepared, routing, injection, workspace)

    def _apply(
        self,
        x: Tensor,  # (M, H) prepared.dtype
        prepared: Prepared,
        routing: Routing,
        injection: Injection,
        workspace: Workspace,
    ) -> Tensor:  # (M, H) prepared.dtype
        assert isinstance(prepared, MarlinPrepared)
        if not routing.num_pairs:
            return torch.zeros_like(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        if injection.ctx is None:
            forward = _Forward.of(prepared, routing, workspace, sort=False)
            inverse = None if forward.plan is None else forward.plan.inverse
            return moe_sum(forward.down(forward.activated(x)), prepared.info, routing, inverse, out)
        forward = _Forward.of(prepared, routing, workspace, sort=True)
        plan = forward.plan
        assert plan is not None  # sort
        injection.begin(x, routing, plan, workspace)
        gate_up = _whole(forward.gate_up(x), prepared.dtype)
        h = injection.activation(x, gate_up, forward.new_h(), routing, plan, workspace)
        return injection.moe_sum(h, _whole(forward.down(h), prepared.dtype), out, routing, plan, workspace)


@dataclass(frozen=True, eq=False)
class _Forward:
    """The GEMMs of one forward.

    Attributes:
        prepared: the weights.
        routing: the pairs.
        workspace: the buffers.
        chosen: how the GEMMs are cut.
        plan: their order; None where pairs are taken as they come.
        tiles: tiles of that order, int32 [T, 4], or the router's ids [P].
    """

    prepared: MarlinPrepared
    routing: Routing
    workspace: Workspace
    chosen: LayerTiles
    plan: Plan | None
    tiles: Tensor

    @staticmethod
    def of(prepared: MarlinPrepared, routing: Routing, workspace: Workspace, *, sort: bool) -> _Forward:
        """Sort the pairs, if they have to be or if it pays."""
        chosen = prepared.choose_tiles(routing.num_pairs)
        if sort or prepared.shape.act_order or not chosen.direct:
            plan, tiles = align(routing, prepared.info.num_experts, chosen.bm)
            return _Forward(prepared, routing, workspace, chosen, plan, tiles)
        return _Forward(prepared, routing, workspace, chosen, None, routing.topk_ids.reshape(-1))

    @property
    def rows(self) -> Tensor | None:  # (P,) int32
        """Pair of each sorted row; None where rows are pairs."""
        return None if self.plan is None else self.plan.rows

    def new_h(self) -> Tensor:  # (P, inter_pad)
        """A buffer for what goes into the second GEMM."""
        shape = (self.routing.num_pairs, self.prepared.info.inter_pad)
        return self.workspace.buffer("h", shape, self.prepared.dtype)

    def activated(self, x: Tensor) -> Tensor:  # (M, H) -> (P, inter_pad)
        """The base model's input of the second GEMM: the activation is part of the first one, if that is not split."""
        info = self.prepared.info
        if self.chosen.w13_fused is not None:
            return self._gemm13(x, self.new_h(), self.chosen.w13_fused, info.activation)
        return activate(self.gate_up(x), info, self.routing, self.rows, self.new_h())

    def gate_up(self, x: Tensor) -> Tensor:  # (M, H) -> (P, rows of w13), or (parts, P, rows) float32
        """Product with w13."""
        tile = self.chosen.w13
        return self._gemm13(x, self._output("gate_up", _packed(self.prepared.info.w13).rows, tile), tile)

    def down(self, h: Tensor) -> Tensor:  # (P, inter_pad) -> (P, H), or (parts, P, H) float32
        """Product with w2."""
        info, w2 = self.prepared.info, _packed(self.prepared.info.w2)
        y = self._output("y", info.hidden_size, self.chosen.w2)
        return grouped_gemm(h, w2, self.prepared.w2, self.tiles, self.rows, None, y, self.chosen.w2)

    def _gemm13(self, x: Tensor, out: Tensor, tile: Tile, activation: Activation | None = None) -> Tensor:
        w13, top_k = _packed(self.prepared.info.w13), self.routing.top_k
        if w13.k_perm is None:
            return grouped_gemm(x, w13, self.prepared.w13, self.tiles, self.rows, top_k, out, tile, activation)
        assert self.plan is not None  # of
        shape = (w13.halves, self.routing.num_pairs, w13.k_pad)
        source = self.workspace.buffer("x_by_half", shape, x.dtype)
        by_half(x, w13, self.routing, self.plan, source)
        return grouped_gemm(source, w13, self.prepared.w13, self.tiles, self.rows, None, out, tile)

    def _output(self, name: str, columns: int, tile: Tile) -> Tensor:
        """The output of a GEMM, or its partial sums."""
        shape = (self.routing.num_pairs, columns)
        if tile.split == 1:
            return self.workspace.buffer(name, shape, self.prepared.dtype)
        return self.workspace.buffer(f"{name}_parts", (tile.split, *shape), torch.float32)


def _packed(weight: object) -> PackedWeight:
    assert isinstance(weight, PackedWeight)  # `supports`
    return weight


def _whole(
    output: Tensor,  # (P, N), or (parts, P, N) float32
    dtype: torch.dtype,
) -> Tensor:  # (P, N)
    """Parts summed in their order and rounded, as the kernels that read parts do."""
    if output.ndim == 2:
        return output
    return functools.reduce(torch.add, output.unbind()).to(dtype)
