"""What two processes do together by transformers' own parallel plans, each on its own, beside one process's model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import quant_moelora as qm
from quant_moelora.core.errors import QuantMoELoRAError
from quant_moelora.integrations.transformers import experts_of
from tests.integrations.models import GPTQ, A, B, attention_adapter, difference, folder_of, generate, load, logits

PROCESSES = 2
TENSOR: dict[str, Any] = {"tp_plan": "auto", "tp_size": PROCESSES}
EXPERT: dict[str, Any] = {"distributed_config": TENSOR | {"enable_expert_parallel": True}}
NAMES = ["a", "__base__", "b"]
IDS = torch.arange(3, 15).expand(len(NAMES), -1)  # alike, so that only adapters tell rows apart


def run(rank: int, folder: Path, timeout: timedelta) -> dict[str, Any]:
    """What was found on one of the processes: differences from one process's model, and messages of errors."""
    store = dist.FileStore(f"{folder}/pair", PROCESSES)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timeout)
    alone = load(GPTQ, backend="reference")
    expected = _answers(alone)
    # Quantised linear layers are among those that the plan shards.
    shared = load(GPTQ, backend="reference", **TENSOR)
    found: dict[str, Any] = {"tensor": _differences(_answers(shared), expected), "sharded": _sharded(shared)}
    found["adapters"] = [difference(expected[1][i], expected[1][j]) for i, j in ((0, 1), (1, 2), (2, 0))]
    found["attention adapter"] = _said(
        lambda: qm.attach_adapters(shared, {"c": attention_adapter(folder / f"attention-{rank}")})
    )
    found["afterwards"] = difference(logits(shared, IDS, NAMES), expected[1])
    found["expert"] = _differences(_answers(load(GPTQ, backend="reference", **EXPERT)), expected)
    qm.install()
    installed: Any = AutoModelForCausalLM.from_pretrained(folder_of(GPTQ), dtype=torch.float32, **TENSOR)
    qm.uninstall()
    found["installed"] = [difference(logits(installed, IDS), expected[0])]
    rule = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    for what, given in (("rule", TENSOR | {"tp_plan": rule}), ("fsdp", {"distributed_config": {"fsdp_size": 2}})):
        found[what] = _said(lambda given=given: load(GPTQ, **given))
    dist.destroy_process_group()
    return found


def _answers(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without adapters and with two, and tokens."""
    base = logits(model, IDS)
    qm.attach_adapters(model, {"a": A, "b": B})
    return base, logits(model, IDS, NAMES), generate(model, list(IDS), NAMES).tokens


def _differences(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Of logits; those of tokens are infinite."""
    same = torch.equal(got[-1], expected[-1])
    return [difference(one, two) if same else float("inf") for one, two in zip(got[:-1], expected[:-1], strict=True)]


def _sharded(model: Any) -> list[str]:
    """What of the first layer each process has a part of."""
    held = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    experts = [name for name, module in experts_of(model).items() if module.moe is not None and module.moe.info.shard]
    return [name for name in held + experts if "layers.0" in name]


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except QuantMoELoRAError as error:
        return f"{type(error).__name__}: {error}"
    return ""
