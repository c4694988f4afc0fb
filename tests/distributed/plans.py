"""What two processes do together by transformers' own parallel plans, each on its own, beside one process's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import quant_moelora as qm
from quant_moelora.core.errors import QuantMoELoRAError
from quant_moelora.integrations.transformers import experts_of
from tests.adapters import attention_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    GPTQ,
    A,
    B,
    attention_adapter,
    difference,
    folder_of,
    generate,
    load,
    logits,
)
from tests.integrations.test_deepseek import SMALL, make_adapter, make_checkpoint

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
    c, d, head = _attention_adapters(folder / str(rank))
    found["style"] = _said(lambda: qm.attach_adapters(shared, {"c": head}))
    found["afterwards"] = difference(logits(shared, IDS, NAMES), expected[1])
    expected = _with_attention(alone, c, d)
    found["attention"] = _differences(_with_attention(shared, c, d), expected)
    found["apart"] = [difference(expected[0][0], expected[0][1]), difference(expected[0][1], expected[1][1])]
    found["peft"] = [_by_peft(load(GPTQ, backend="reference", **TENSOR), c, folder / f"{rank}-saved", expected[1])]
    expected = _answers(load(GPTQ, backend="reference"))
    found["expert"] = _differences(_answers(load(GPTQ, backend="reference", **EXPERT)), expected)
    qm.install()
    installed: Any = AutoModelForCausalLM.from_pretrained(folder_of(GPTQ), dtype=torch.float32, **TENSOR)
    qm.uninstall()
    found["installed"] = [difference(logits(installed, IDS), expected[0])]
    rule = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    for what, given in (("rule", TENSOR | {"tp_plan": rule}), ("fsdp", {"distributed_config": {"fsdp_size": 2}})):
        found[what] = _said(lambda given=given: load(GPTQ, **given))
    found["deepseek"] = [_latent_attention(rank, folder)]
    dist.destroy_process_group()
    return found


def _answers(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without adapters and with two, and tokens."""
    base = logits(model, IDS)
    qm.attach_adapters(model, {"a": A, "b": B})
    return base, logits(model, IDS, NAMES), generate(model, list(IDS), NAMES).tokens


def _attention_adapters(folder: Path) -> tuple[Path, Path, Path]:
    """Two of all linear layers of attention, whose outputs or inputs the plan cuts, and one of lm_head."""
    output = {seed: attention_lora({"k_proj": (64, 128), "o_proj": (128, 128)}, seed=seed) for seed in (2, 3)}
    one, two = (attention_adapter(folder / str(seed), seed, more) for seed, more in output.items())
    return one, two, write_adapter(folder / "head", linear_lora("lm_head", 512, 128))


def _with_attention(model: Any, c: Path, d: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of rows with adapters of attention, of experts and with none, with one active and with two, and tokens."""
    model.load_adapter(c, "c")
    model.load_adapter(d, "d")
    named, tokens = logits(model, IDS, ["c", "__base__", "d"]), generate(model, list(IDS), ["d", "a", "c"]).tokens
    model.set_adapter(["c"])
    one = logits(model, IDS)
    model.set_adapter(["c", "d"])
    return named, one, logits(model, IDS), tokens


def _by_peft(model: Any, path: Path, folder: Path, expected: Tensor) -> float:
    """How far off logits are by PEFT's own calls; infinite unless what it saves is what it has read."""
    wrapped = PeftModel.from_pretrained(model, path)
    wrapped.save_pretrained(str(folder))
    read, saved = (load_file(where / "adapter_model.safetensors") for where in (path, folder))
    same = read.keys() == saved.keys() and all(torch.equal(read[key], saved[key]) for key in read)
    return difference(logits(wrapped, IDS), expected) if same else float("inf")


def _latent_attention(rank: int, folder: Path) -> float:
    """How far off logits are with an adapter of every linear layer: latent attention, a dense MLP, shared experts."""
    size, names = replace(SMALL, inter=2 * 64), ["x", "__base__", "y"]
    if rank == 0:
        linears = make_checkpoint(folder / "deepseek", size, torch.float32)
        for seed, name in enumerate("xy"):
            make_adapter(folder / name, size, linears, seed, torch.float32)
    dist.barrier()
    answers: list[Tensor] = []
    for given in ({}, TENSOR):
        model = load(folder / "deepseek", dtype=torch.float32, backend="reference", **given)
        qm.attach_adapters(model, {name: folder / name for name in "xy"})
        answers.append(logits(model, IDS, names))
    assert min(difference(answers[0][i], answers[0][j]) for i, j in ((0, 1), (1, 2), (2, 0))) > EFFECT
    return difference(answers[1], answers[0])


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
