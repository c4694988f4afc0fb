"""DistributedExperts: MoEExperts of which each process of a mesh holds a part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from quant_moelora.core.backend import ExpertsBackend
from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.lora_context import MoELoRAContext
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.routing import BASE_SLOT
from quant_moelora.core.shard import split
from quant_moelora.core.workspace import Workspace
from quant_moelora.distributed.exchange import Tokens, Traffic, collect, deliver, owners
from quant_moelora.distributed.mesh import ExpertMesh, Group, TensorParallelRanks
from quant_moelora.experts.registry import AUTO
from quant_moelora.layer import MoEExperts

# What an H200 takes from others by NVLink during the 1.2 ms that an all-to-all needs on the host, at any size
# (benchmarks/NOTES.md, "Several GPUs"): 220 GB/s.
_SPARED_BYTES = 256 << 20
Exchange = Literal["none", "all_gather", "all_to_all", "auto"]


class DistributedExperts(MoEExperts):
    """The routed experts of one layer, shared by the processes of a mesh.

    Every process calls every forward, with or without tokens and adapters, since each takes part in all collectives.
    Ids are those of the whole layer; slots mean the same adapter on every process. Tokens are the same on all processes
    of a tensor parallel group. The sum of the parts is one collective, in the activation dtype.

    How tokens come to the processes of an expert parallel group:

    * ``none``: they are there already, the same on every process; outputs are all-reduced.
    * ``all_gather``: each process has its own; all get all, and outputs are reduced and scattered. With ``rows`` it
      has one shape and waits for nothing, so that CUDA graphs capture it and `torch.compile` makes one graph of it.
    * ``all_to_all``: each token goes only where it has an expert, which the host has to know.
    * ``auto``: ``all_gather``, unless ``all_to_all`` spares a process more than 256 MiB and ``rows`` is not given.

    With ``microbatch_rows`` a forward of twice as many tokens and more is computed piece by piece, and collectives of a
    piece run on the GPU beside the experts of another. Each piece reads all weights once more.

    Args:
        info: this process's part: of `load_experts(.., shard=mesh.config)` or `MoEQuantInfo.part(mesh.config)`.
        mesh: the processes.
        exchange: see above; without expert parallel it changes nothing.
        rows: tokens of a process in each forward, at most: there are always as many rows, the others without an expert.
            None for as many as there are.
        microbatch_rows: tokens of a process in each piece, at least; None for one piece.
        backend: as of `MoEExperts`.
        tuned_configs: as of `MoEExperts`.
        workspace: as of `MoEExperts`.

    Raises:
        ShapeError: the info is not the part that belongs to this process.
        UnsupportedError: an unknown exchange, or ``rows`` or ``microbatch_rows`` with one that has no use for them.
    """

    def __init__(
        self,
        info: MoEQuantInfo,
        mesh: ExpertMesh,
        *,
        exchange: Exchange = "auto",
        rows: int | None = None,
        microbatch_rows: int | None = None,
        backend: str | ExpertsBackend = AUTO,
        tuned_configs: str | os.PathLike[str] | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        if exchange not in get_args(Exchange) or (rows is not None and exchange in ("none", "all_to_all")):
            raise UnsupportedError(
                "exchange",
                got=f"{exchange}, rows={rows}",
                rule=f"one of {', '.join(get_args(Exchange))}, and rows only where tokens are gathered",
                remedy="leave rows away, or choose all_gather",
            )
        if microbatch_rows is not None and (microbatch_rows < 1 or exchange in ("auto", "all_to_all")):
            raise UnsupportedError(
                "microbatch_rows",
                got=f"{microbatch_rows} with exchange={exchange}",
                rule="1 or more, and only where tokens are gathered or there already",
                remedy="leave microbatch_rows away, or choose all_gather or none",
            )
        self._mesh_of_parts = mesh
        self._exchange: Exchange = "none" if mesh.ep.size == 1 else exchange
        self._rows, self._microbatch_rows = rows, microbatch_rows
        super().__init__(info, backend, tuned_configs, workspace)
        assert self.info.shard is not None  # _check_shard
        self._spans = split("experts", self.info.shard.num_experts, mesh.ep.size)

    @property
    def mesh(self) -> ExpertMesh:
        """The processes."""
        return self._mesh_of_parts

    def _check_shard(self, info: MoEQuantInfo) -> None:
        got, expected = None if info.shard is None else info.shard.config, self._mesh_of_parts.config
        if got != expected:
            raise ShapeError(
                "layer of experts",
                got=f"a part for {got}" if got else "a whole layer",
                rule=f"the part for {expected}",
                remedy="take the part with MoEQuantInfo.part(mesh.config), or load it with shard=mesh.config",
            )

    def attach(self, ctx: MoELoRAContext | None) -> None:
        """Serve the adapters of ``ctx`` from now on (None: none); see `MoEExperts.attach`. All processes do it."""
        if ctx is not None and ctx.rank_shard[1] > 1:
            ctx = replace(ctx, collectives=TensorParallelRanks(self._mesh_of_parts.tp))
        super().attach(ctx)

    def forward(
        self,
        x: Tensor,  # (M, H) float
        topk_ids: Tensor,  # (M, k) int, experts of the whole layer; ids outside 0..E-1 = none
        topk_weights: Tensor,  # (M, k) float
        adapter_ids: Tensor | None = None,  # (M,) int, slot of each token's adapter, -1 = base
    ) -> Tensor:  # (M, H) of x's dtype
        """Weighted sum of each token's experts on all processes, with each token's adapter.

        Raises:
            ShapeError: x is not [M, H], the routing is of other tokens, or there are more tokens than ``rows``.
            AdapterError: adapter ids are given and no adapter is attached.
            BackendError: no backend serves x's dtype.
        """
        self._check_tokens(x, topk_ids, adapter_ids)
        if adapter_ids is None:
            adapter_ids = torch.full((x.shape[0],), BASE_SLOT, dtype=torch.int32, device=x.device)
        ids, weights, slots = topk_ids.to(torch.int32), topk_weights.to(torch.float32), adapter_ids.to(torch.int32)
        tokens, mesh = Tokens(x, ids, weights, slots), self._mesh_of_parts
        if self._exchange != "none":
            return mesh.tp.all_reduce(self._exchanged(tokens))
        pieces = self._pieces(tokens)
        if mesh.ep.size == 1:
            return _joined(mesh.tp, [mesh.tp.start_all_reduce(self._compute(piece)) for piece in pieces])
        sums = [mesh.ep.start_all_reduce(mesh.tp.all_reduce(self._compute(piece))) for piece in pieces]
        return _joined(mesh.ep, sums)

    def _pieces(self, tokens: Tokens) -> list[Tokens]:
        """The microbatches; as many on every process, since they have as many tokens."""
        if self._microbatch_rows is None:
            return [tokens]
        return tokens.pieces(max(1, tokens.x.shape[0] // self._microbatch_rows))

    def _compute(self, tokens: Tokens) -> Tensor:  # (M, H)
        """This process's part of the output of any tokens."""
        assert self.info.shard is not None  # _check_shard
        # An id of somebody else's is outside of those here, below or above.
        ids = tokens.ids - self.info.shard.experts.begin
        # Processes of a group go one way, so that each meets the others' collectives.
        slots = None if self.injection.ctx is None else tokens.slots
        return super().forward(tokens.x, ids, tokens.weights, slots)

    def _exchanged(self, tokens: Tokens) -> Tensor:  # (M, H)
        """The output of this process's tokens, summed over the experts of all processes."""
        group, count = self._mesh_of_parts.ep, tokens.x.shape[0]
        if self._rows is not None:
            return self._gathered(tokens, self._rows)
        needed = owners(tokens.ids, self._spans)
        traffic = Traffic.of(group, needed)
        spared = (traffic.gathered_rows - traffic.exchanged_rows) * tokens.x.shape[1] * tokens.x.itemsize
        if self._exchange == "all_gather" or (self._exchange == "auto" and spared <= _SPARED_BYTES):
            return self._gathered(tokens, max(traffic.tokens))
        arrived, delivery = deliver(tokens, needed, traffic, group)
        out = collect(self._compute(arrived), delivery, group)
        assert out.shape[0] == count
        return out

    def _gathered(self, tokens: Tokens, rows: int) -> Tensor:  # (M, H)
        """`_exchanged` by all-gather, with as many rows of each process."""
        group = self._mesh_of_parts.ep
        coming = [group.start_all_gather(piece) for piece in self._pieces(tokens.padded(rows))]
        computed = (self._compute(Tokens(*map(group.arrived, piece))) for piece in coming)
        return _joined(group, [group.start_reduce_scatter(y) for y in computed])[: tokens.x.shape[0]]


def _joined(group: Group, parts: Sequence[Tensor]) -> Tensor:
    """Microbatches' outputs, whose collectives were started."""
    arrived = [group.arrived(part) for part in parts]
    return arrived[0] if len(arrived) == 1 else torch.cat(arrived)
