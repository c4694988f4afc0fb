"""What the experts of one layer cost on many GPUs: bytes on the links against work on the GPUs, by arithmetic alone.

Times are those of a bandwidth model: the busiest link's bytes over its rate, and a latency for each collective. A ring
all-reduce of n bytes among T moves 2 (T - 1) / T n on each link, an all-gather or a reduce-scatter half of that
(Thakur, Rabenseifner, Gropp 2005, section 4). Routing is taken to be even, and nothing to overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quant_moelora.core.checks import check_positive

_ROUTED_BYTES = 8  # of a pair that travels with its token: an id and a weight
_SLOT_BYTES = 4


@dataclass(frozen=True)
class Links:
    """What connects GPUs. Inside a machine, what was measured between two H200s (benchmarks/NOTES.md, "Several GPUs").

    Attributes:
        machine_gpus: GPUs of one machine.
        inner_gbps: GB/s that a GPU sends, and takes at the same time, inside a machine.
        outer_gbps: the same between machines.
        latency_us: of a collective inside a machine.
        outer_latency_us: of a collective that leaves it.
        counting_us: what an all-to-all takes on the host, which counts its rows.
    """

    machine_gpus: int = 8
    inner_gbps: float = 230.0
    outer_gbps: float = 45.0
    latency_us: float = 15.0
    outer_latency_us: float = 40.0
    counting_us: float = 1200.0


@dataclass(frozen=True)
class LayerCost:
    """The experts of a layer, as work.

    Attributes:
        experts: E.
        top_k: k.
        hidden: H.
        inter: I.
        bits: of a weight.
        group: columns that share a 16-bit scale.
        itemsize: bytes of an activation.
    """

    experts: int
    top_k: int
    hidden: int
    inter: int
    bits: int = 4
    group: int = 128
    itemsize: int = 2

    @property
    def expert_bytes(self) -> float:
        """Of one expert's weights."""
        return 3 * self.hidden * self.inter * (self.bits / 8 + 2 / self.group)

    @property
    def token_flops(self) -> float:
        """Of one token."""
        return 2 * self.top_k * 3 * self.hidden * self.inter

    @property
    def token_bytes(self) -> int:
        """Of one token on its way to an expert: x, its experts, their weights and its adapter."""
        return self.hidden * self.itemsize + self.top_k * _ROUTED_BYTES + _SLOT_BYTES

    @property
    def output_bytes(self) -> int:
        """Of one token's output on its way back."""
        return self.hidden * self.itemsize


@dataclass(frozen=True)
class GPU:
    """What one GPU sustains: TB/s of reading, TFLOP/s of multiplying (an H200, benchmarks/NOTES.md)."""

    read_tbps: float = 4.3
    matmul_tflops: float = 790.0


Exchange = Literal["none", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class Cost:
    """What a layer costs one GPU.

    Attributes:
        sent_bytes: on its busiest link, for each of its tokens.
        exchange_us: time of all collectives.
        compute_us: least time of its own experts.
    """

    sent_bytes: float
    exchange_us: float
    compute_us: float

    @property
    def efficiency(self) -> float:
        """Part of the time that is spent on experts: weak scaling, if one GPU's time is all experts."""
        return self.compute_us / (self.compute_us + self.exchange_us)


def expected_targets(top_k: int, processes: int) -> float:
    """Processes that have an expert of a token, if each expert is on any of them alike."""
    check_positive(top_k=top_k, processes=processes)
    return processes * (1 - (1 - 1 / processes) ** top_k)


def active_experts(experts: float, pairs: float) -> float:
    """Experts with any of so many pairs, if each is as likely."""
    return experts * (1 - (1 - 1 / experts) ** pairs)


def layer_cost(
    layer: LayerCost,
    tokens: int,
    *,
    tp: int = 1,
    ep: int = 1,
    exchange: Exchange = "all_to_all",
    ranks: int = 0,
    links: Links | None = None,
    gpu: GPU | None = None,
) -> Cost:
    """Cost of one forward, of which each tensor parallel group has ``tokens`` tokens of its own.

    Processes of a tensor parallel group are on one machine; those of an expert parallel group fill machines.

    Args:
        layer: the layer.
        tokens: M of a group; with ``none`` all groups have the same ones.
        tp: processes that share each expert.
        ep: processes that share out the experts.
        exchange: as of `DistributedExperts`.
        ranks: r of fully sharded LoRA on gate, up and down of each token; 0 for none, or plain.
        links: what connects GPUs; None for `Links`.
        gpu: what a GPU does; None for `GPU`.

    Raises:
        ShapeError: a number below 1.
    """
    check_positive(tokens=tokens, tp=tp, ep=ep)
    links, gpu = links or Links(), gpu or GPU()
    everybody = tokens if exchange == "none" else tokens * ep
    pairs = everybody * layer.top_k / ep  # of one group
    # v travels in float32: gate's and up's ranks are gathered, down's are summed.
    fully = 4 * ranks * pairs * (2 * (tp - 1) / tp + 2 * (tp - 1) / tp)
    inner = 2 * (tp - 1) / tp * tokens * layer.output_bytes + fully
    collectives = (tp > 1) * (1 + 2 * (ranks > 0))
    inner_us = inner / links.inner_gbps / 1e3 + collectives * links.latency_us
    outer, outer_us = _exchange(layer, tokens, tp, ep, exchange, links)
    reading = active_experts(layer.experts / ep, pairs) * layer.expert_bytes / tp / gpu.read_tbps / 1e6
    multiplying = everybody * layer.token_flops / (tp * ep) / gpu.matmul_tflops / 1e6
    return Cost((inner + outer) / tokens, inner_us + outer_us, max(reading, multiplying))


def _exchange(layer: LayerCost, tokens: int, tp: int, ep: int, exchange: Exchange, links: Links) -> tuple[float, float]:
    """Bytes and time of what an expert parallel group exchanges, a member of which is on one GPU."""
    if ep == 1:
        return 0.0, 0.0
    near = min(ep, max(1, links.machine_gpus // tp))  # of the group, on one machine
    far = ep > near
    latency = links.outer_latency_us if far else links.latency_us
    both = layer.token_bytes + layer.output_bytes
    if exchange == "all_to_all":
        # Rows to oneself do not travel, and those inside a machine have links of their own.
        rows = tokens * expected_targets(layer.top_k, ep) / ep
        inside, outside = rows * (near - 1) * both, rows * (ep - near) * both
        time = max(inside / links.inner_gbps, outside / links.outer_gbps) / 1e3
        return inside + outside, time + 3 * latency + links.counting_us
    # A ring passes each link once, so that the slowest one counts.
    if exchange == "all_gather":
        moved, collectives = (ep - 1) * tokens * both, 2
    else:
        moved, collectives = 2 * (ep - 1) / ep * tokens * layer.output_bytes, 1
    return moved, moved / (links.outer_gbps if far else links.inner_gbps) / 1e3 + collectives * latency
