"""MoEQuantInfo: the experts of one layer, packed, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.checks import check_same_device, check_tensor
from quant_moelora.core.errors import ShapeError, UnsupportedError
from quant_moelora.core.shard import ParallelConfig, Shard
from quant_moelora.core.weights import ExpertWeight

RouterWeight = Literal["output", "input"]
SourceOrder = Literal["separate", "concatenated", "interleaved"]


@dataclass(frozen=True, eq=False)
class MoEQuantInfo:
    """Gate, up and down projections of all experts of one layer.

    Attributes:
        w13: gate and up (halves = 2, gate first) or up alone (halves = 1); [E, halves*inter_pad, H].
        w2: down; [E, H, inter_pad].
        activation: what stands between them.
        inter_perm: stored intermediate position -> logical one (of the whole layer), int32 [E, I]; the act-order of w2,
            already applied to the rows and bias of w13 and the columns of w2. None where the order is the logical one.
        router_weight: whether the router's weight multiplies the expert's output, or base + delta of its gate_up
            before the activation (Llama4).
        source_order: how the checkpoint held gate and up; a record, since stored tensors are always gate then up.
        shard: the part held, or None for a whole layer.

    Raises:
        ShapeError: the two weights do not belong to one layer.
    """

    w13: ExpertWeight
    w2: ExpertWeight
    activation: Activation
    inter_perm: Tensor | None = None  # (E, I) int32
    router_weight: RouterWeight = "output"
    source_order: SourceOrder = "separate"
    shard: Shard | None = None

    def __post_init__(self) -> None:
        pairs = (
            ("w13.halves", self.w13.halves, "2 with a gate, 1 without", self.activation.halves),
            ("w2.halves", self.w2.halves, "1", 1),
            ("w2.num_experts", self.w2.num_experts, "w13.num_experts", self.w13.num_experts),
            ("w2.n", self.w2.n, "w13.k, the hidden size", self.w13.k),
            ("w2.k", self.w2.k, "w13.n, the intermediate size", self.w13.n),
            ("w2.k_pad", self.w2.k_pad, "w13.n_pad, the padded intermediate size", self.w13.n_pad),
        )
        for name, got, rule, value in pairs:
            if got != value:
                raise ShapeError(
                    name,
                    got=got,
                    rule=f"{rule} = {value} (w13: {self.w13.dims}; w2: {self.w2.dims})",
                    remedy="build both weights from the same layer's logical dimensions",
                )
        if getattr(self.w2, "k_perm", None) is not None:
            raise ShapeError(
                "w2.k_perm",
                got="a permutation",
                rule="None",
                remedy="fold w2's act-order into inter_perm, the rows of w13 and the columns of w2",
            )
        if self.inter_perm is not None:
            shape = (self.num_experts, self.intermediate_size)
            check_tensor("inter_perm", self.inter_perm, shape, torch.int32, why=self.w2.dims)
        for name, value, allowed in (
            ("router_weight", self.router_weight, ("output", "input")),
            ("source_order", self.source_order, ("separate", "concatenated", "interleaved")),
        ):
            if value not in allowed:
                raise UnsupportedError(name, got=value, rule=f"one of {allowed}", remedy="correct the caller")
        if self.shard is not None:
            self.shard.check(self.num_experts, self.intermediate_size)
        check_same_device(self.tensors())

    @property
    def num_experts(self) -> int:
        """E, the experts held here."""
        return self.w13.num_experts

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w13.k

    @property
    def intermediate_size(self) -> int:
        """I, without padding."""
        return self.w13.n

    @property
    def inter_pad(self) -> int:
        """I with padding: the columns of h, and half (or all, without a gate) of those of gate_up."""
        return self.w13.n_pad

    @property
    def inter_unit(self) -> int:
        """Stored positions of the intermediate that tensor parallel must not part: whole tiles and groups of w2."""
        return self.w2.column_unit

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return next(iter(self.w13.tensors().values())).device

    @property
    def scheme_name(self) -> str:
        """Name of the scheme, ``w13 + w2`` where they differ, ``none`` for an unquantised layer."""
        names = (self.w13.scheme_name, self.w2.scheme_name)
        return names[0] if names[0] == names[1] else " + ".join(names)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, keyed ``w13.qweight``, ``w2.scales``, ``inter_perm`` and so on."""
        held = {f"w13.{name}": tensor for name, tensor in self.w13.tensors().items()}
        held |= {f"w2.{name}": tensor for name, tensor in self.w2.tensors().items()}
        if self.inter_perm is not None:
            held["inter_perm"] = self.inter_perm
        return held

    def to(self, device: torch.device | str) -> MoEQuantInfo:
        """The same info with every tensor on ``device``, bit for bit."""
        inter_perm = None if self.inter_perm is None else self.inter_perm.to(device)
        return replace(self, w13=self.w13.to(device), w2=self.w2.to(device), inter_perm=inter_perm)

    def part(self, config: ParallelConfig) -> MoEQuantInfo:
        """What one process holds of this whole layer; tensors are copies, so that those of the whole can be freed.

        Codes are moved and not packed anew. The bias of w2 is of the first process that shares an expert alone.

        Raises:
            UnsupportedError: there are more processes than can have a part, or this is a part already.
        """
        if self.shard is not None:
            raise UnsupportedError("layer to part", got=self.shard, rule="a whole layer", remedy="part it once")
        shard = config.shard(self.num_experts, self.intermediate_size, self.inter_unit)
        span, last = shard.inter, config.tp_rank == config.tp_size - 1
        pad = (self.inter_pad if last else span.end) - span.begin
        w2 = self.w2.part(shard.experts, columns=(span, pad))
        order = self.inter_perm
        return replace(
            self,
            w13=self.w13.part(shard.experts, rows=(span, pad)),
            w2=w2 if config.tp_rank == 0 else replace(w2, bias=None),
            inter_perm=None if order is None else order[shard.experts.slice, span.slice].clone(),
            shard=shard,
        )

    def dequantize(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate, up and down in float32: [E, I, H] (None without a gate), [E, I, H], [E, H, I].

        The values are exact, in the logical order of the intermediate, whatever the order in the checkpoint. Of a
        shard they are those of its own experts and positions.
        """
        w13, down = self.w13.dequantize(), self.w2.dequantize()[:, 0]
        if self.inter_perm is not None:
            order = self._stored_positions(self.inter_perm)
            w13 = w13.gather(2, order[:, None, :, None].expand_as(w13))
            down = down.gather(2, order[:, None, :].expand_as(down))
        gate = w13[:, 0] if self.activation.gated else None
        return gate, w13[:, -1], down

    @staticmethod
    def _stored_positions(inter_perm: Tensor) -> Tensor:
        """Logical intermediate position -> stored one, int64 [E, I]: the inverse of inter_perm [E, I]."""
        return inter_perm.to(torch.int64).argsort(dim=1)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Biases of w13, float32 [E, halves, I], and of w2, [E, H], in the logical order; None where there are none."""
        w13, w2 = self.w13.logical_bias(), self.w2.logical_bias()
        if w13 is not None and self.inter_perm is not None:
            order = self._stored_positions(self.inter_perm)
            w13 = w13.gather(2, order[:, None, :].expand_as(w13))
        return w13, None if w2 is None else w2[:, 0]
