"""The cost model against counts made by hand and by drawing, and the table in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import distributed_report
from benchmarks.distributed_cost import table
from quant_moelora.core.errors import ShapeError
from quant_moelora.distributed.cost import GPU, LayerCost, Links, active_experts, expected_targets, layer_cost

LAYER = LayerCost(experts=16, top_k=4, hidden=1000, inter=512)
TOKEN, OUT = 2000 + 4 * 8 + 4, 2000  # x, four pairs and a slot; an output
LINKS = Links(
    machine_gpus=4, inner_gbps=100.0, outer_gbps=10.0, latency_us=5.0, outer_latency_us=20.0, counting_us=70.0
)


def test_expected_numbers() -> None:
    """Against drawing with replacement, which is what even routing over many experts comes to."""
    torch.manual_seed(0)
    drawn = torch.randint(0, 8, (20000, 4))
    targets = torch.tensor([len(set(row)) for row in drawn.tolist()], dtype=torch.float64)
    # The mean of 20000 numbers within 1..4 deviates by 0.006 and less; five times that is beyond chance.
    assert abs(float(targets.mean()) - expected_targets(4, 8)) < 0.03
    assert expected_targets(1, 8) == pytest.approx(1) and expected_targets(8, 1) == 1
    assert active_experts(16, 1) == pytest.approx(1) and active_experts(16, 1e6) == pytest.approx(16)


def test_one_gpu_exchanges_nothing() -> None:
    cost = layer_cost(LAYER, 64, links=LINKS)
    assert (cost.sent_bytes, cost.exchange_us, cost.efficiency) == (0, 0, 1)
    weights = 16 * 3 * 1000 * 512 * (0.5 + 2 / 128)
    assert cost.compute_us == pytest.approx(max(weights / 4.3e6, 2 * 64 * 4 * 3 * 1000 * 512 / 790e6), rel=1e-6)


def test_tensor_parallel() -> None:
    """A ring all-reduce of the output; with fully sharded LoRA two collectives of v in float32."""
    plain = layer_cost(LAYER, 10, tp=4, links=LINKS)
    assert plain.sent_bytes == pytest.approx(2 * 3 / 4 * OUT)
    assert plain.exchange_us == pytest.approx(10 * 1.5 * OUT / 100e3 + 5)
    fully = layer_cost(LAYER, 10, tp=4, ranks=16, links=LINKS)
    gathered, summed = 3 / 4 * 2 * 16 * 4, 2 * 3 / 4 * 16 * 4  # of each pair
    assert fully.sent_bytes - plain.sent_bytes == pytest.approx(4 * (gathered + summed))
    assert fully.exchange_us - plain.exchange_us == pytest.approx(40 * (gathered + summed) / 100e3 + 10)


def test_expert_parallel_in_a_machine() -> None:
    gather = layer_cost(LAYER, 10, ep=4, exchange="all_gather", links=LINKS)
    assert gather.sent_bytes == pytest.approx(3 * (TOKEN + OUT))
    assert gather.exchange_us == pytest.approx(30 * (TOKEN + OUT) / 100e3 + 2 * 5)
    alike = layer_cost(LAYER, 10, ep=4, exchange="none", links=LINKS)
    assert alike.sent_bytes == pytest.approx(2 * 3 / 4 * OUT)
    routed = layer_cost(LAYER, 10, ep=4, exchange="all_to_all", links=LINKS)
    assert routed.sent_bytes == pytest.approx(3 / 4 * expected_targets(4, 4) * (TOKEN + OUT))


def test_what_leaves_a_machine_takes_the_slow_links() -> None:
    """Of 8 processes 4 are on other machines; of all-to-all only their rows, of a ring everything passes there."""
    routed = layer_cost(LAYER, 1000, ep=8, exchange="all_to_all", links=LINKS)
    rows = 1000 * expected_targets(4, 8) / 8
    assert routed.exchange_us == pytest.approx(4 * rows * (TOKEN + OUT) / 10e3 + 3 * 20 + 70)
    gather = layer_cost(LAYER, 1000, ep=8, exchange="all_gather", links=LINKS)
    assert gather.exchange_us == pytest.approx(7000 * (TOKEN + OUT) / 10e3 + 2 * 20)


def test_work_is_shared() -> None:
    """Weak scaling: with ep times the tokens and 1 / ep of the experts, the multiplications stay what they were."""
    slow = GPU(read_tbps=1e6, matmul_tflops=100.0)
    one = layer_cost(LAYER, 512, gpu=slow)
    assert layer_cost(LAYER, 512, ep=4, gpu=slow, links=LINKS).compute_us == pytest.approx(one.compute_us)
    assert layer_cost(LAYER, 512, tp=4, gpu=slow, links=LINKS).compute_us == pytest.approx(one.compute_us / 4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ShapeError, match="tokens: got 0"):
        layer_cost(LAYER, 0)


def test_the_tables_of_the_documentation() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in text, "python -m benchmarks.distributed_cost"
    found = distributed_report.read([root / "benchmarks" / "results" / "distributed-h200.csv"])
    assert distributed_report.table(found) in text, "python -m benchmarks.distributed_report"
