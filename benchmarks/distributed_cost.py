"""The cost model's table of docs/distributed.md: `python -m benchmarks.distributed_cost` prints it."""

from __future__ import annotations

from collections.abc import Iterator

from quant_moelora.distributed.cost import Exchange, LayerCost, layer_cost

LAYERS = {"qwen3-30b-a3b": LayerCost(128, 8, 2048, 768), "deepseek-v3": LayerCost(256, 8, 7168, 2048)}
GPUS, TOKENS = (8, 64, 512), (16, 256, 4096)
EXCHANGES: tuple[Exchange, ...] = ("all_gather", "all_to_all")
HEADER = "| layer | GPUs | ep x tp | M a GPU | exchange | KB a token | exchange us | experts us | efficiency |"


def table() -> Iterator[str]:
    """Lines of the table; tensor parallel where there are more GPUs than experts."""
    yield HEADER
    yield "|" + HEADER.count(" | ") * "---|" + "---|"
    for name, layer in LAYERS.items():
        for gpus in GPUS:
            tp = max(1, gpus // layer.experts)
            for tokens in TOKENS:
                for exchange in EXCHANGES:
                    # A group of tp GPUs has tp times a GPU's tokens, each of which all of its GPUs compute a part of.
                    cost = layer_cost(layer, tokens * tp, tp=tp, ep=gpus // tp, exchange=exchange)
                    times = f"{cost.exchange_us:.0f} | {cost.compute_us:.0f} | {cost.efficiency:.2f}"
                    sent = f"{cost.sent_bytes / 1e3:.0f}"
                    yield f"| {name} | {gpus} | {gpus // tp} x {tp} | {tokens} | {exchange} | {sent} | {times} |"


if __name__ == "__main__":
    print("\n".join(table()))
