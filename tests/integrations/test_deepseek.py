"""The shape of DeepSeek-V2-Lite (64 experts of which 6 are chosen, 2 shared ones, latent attention) and 6 adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.parity import dense_twin
from quant_moelora.integrations.transformers import experts_of
from tests.adapters import PREFIX, WEIGHTS, Dims, Tensors, expert_lora, linear_lora, write_adapter
from tests.checkpoints import write_checkpoint
from tests.integrations.models import ROUNDING, difference, load, logits

EXPERTS, TOP_K, SHARED, RANK, ADAPTERS = 64, 6, 2, 64, 6
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Size:
    """Dimensions; the numbers of experts are always the true ones. Layer 0 has a dense MLP, layer 1 experts."""

    hidden: int
    inter: int
    dense: int
    heads: int
    latent: int
    head: int
    rope: int
    group: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.dense,
            "moe_intermediate_size": self.inter,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_shared_experts": SHARED,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.latent,
            "qk_nope_head_dim": self.head,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.head,
            "head_dim": self.rope,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "vocab_size": 256,
            "initializer_range": self.hidden**-0.5,
        }


SMALL = Size(hidden=64, inter=32, dense=96, heads=2, latent=32, head=16, rope=8, group=32)
FULL = Size(hidden=2048, inter=1408, dense=10944, heads=16, latent=512, head=128, rope=64, group=128)


def make_checkpoint(folder: Path, size: Size, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """A random model with random int4 experts in GPTQ's layout; return [N, K] of linear layers, without the head's."""
    config = AutoConfig.for_model("deepseek_v2", **size.config)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.experts." not in name}
    generator = torch.Generator().manual_seed(0)
    for expert in range(EXPERTS):
        for name in NAMES.values():
            n, k = (size.hidden, size.inter) if name == "down_proj" else (size.inter, size.hidden)
            module = f"model.layers.1.mlp.experts.{expert}.{name}"
            words = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int64, generator=generator)
            tensors[f"{module}.qweight"] = words.to(torch.int32)  # 8 codes each, all of them valid
            # Codes are -8 to 7, 4.6 in RMS.
            spread = torch.rand(k // size.group, n, generator=generator) + 0.5
            tensors[f"{module}.scales"] = (spread / (4.6 * k**0.5)).half()
            tensors[f"{module}.qzeros"] = torch.full((k // size.group, n // 8), 0x77777777, dtype=torch.int32)
    config.dtype = dtype
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": size.group, "sym": True, "desc_act": False}
    write_checkpoint(folder, {k: t.contiguous() for k, t in tensors.items()}, config.to_dict(), quantization)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: (m.out_features, m.in_features) for name, m in linears.items() if name != "lm_head"}


def make_adapter(folder: Path, size: Size, linears: dict[str, tuple[int, int]], seed: int, dtype: torch.dtype) -> Path:
    """LoRA of rank 64 on every linear layer, those of all routed experts among them."""
    tensors = expert_lora(Dims(EXPERTS, size.hidden, size.inter, layers=(1,)), NAMES, rank=RANK, seed=1000 * seed)
    for place, (name, (n, k)) in enumerate(linears.items()):
        tensors |= linear_lora(name, n, k, RANK, seed=1000 * seed + 7 * place + 1)
    tensors = {key: (tensor * 0.2 if ".lora_B." in key else tensor).to(dtype) for key, tensor in tensors.items()}
    return write_adapter(folder, tensors, r=RANK, lora_alpha=RANK)


def merge(twin: Any, adapter: Tensors) -> None:
    """Add an adapter, of scaling 1, to the weights of a dense model."""
    inter = twin.config.moe_intermediate_size
    rows = {"gate_proj": slice(0, inter), "up_proj": slice(inter, None)}
    for key, a in adapter.items():
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if key.endswith(".lora_A.weight"):
            delta = adapter[key.replace(".lora_A.", ".lora_B.")] @ a
            block, routed, place = module.partition(".experts.")
            if not routed:
                twin.get_parameter(f"{module}.weight").add_(delta)
                continue
            expert, _, name = place.partition(".")
            parameter = twin.get_parameter(f"{block}.experts.{'down_proj' if name == 'down_proj' else 'gate_up_proj'}")
            parameter[int(expert)][rows.get(name, slice(None))].add_(delta)


def served(tmp_path: Path, size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, dict[str, Path]]:
    """The model with all adapters, its dense twin, and the adapters' folders."""
    linears = make_checkpoint(tmp_path / "model", size, dtype)
    model = load(tmp_path / "model", dtype=dtype, device_map=device)
    assert len(linears) == 2 * 4 + 3 + 3, "q, kv_a, kv_b and o twice, a dense MLP, the shared experts"
    assert [m.spec.num_experts for m in experts_of(model).values()] == [EXPERTS]
    twin = dense_twin(model) if size is SMALL else None
    folders = {f"a{i}": make_adapter(tmp_path / f"a{i}", size, linears, i, dtype) for i in range(ADAPTERS)}
    attach_adapters(model, folders)
    return model, twin, folders


def rows_against_each_alone(model: Any, ids: Tensor, names: list[str], same: float, other: float) -> None:
    """Each row of a mixed batch is that of a batch in which all have its adapter, and not that of another adapter."""
    mixed = logits(model, ids, names)
    alone = {name: logits(model, ids, [name] * len(ids)) for name in names}
    for row, name in enumerate(names):
        for candidate, expected in alone.items():
            apart = difference(mixed[row], expected[row])
            assert apart < same if candidate == name else apart > other, (row, name, candidate, apart)


def test_six_adapters_on_all_linear_layers(tmp_path: Path) -> None:
    """Against each alone, and against weights into which the adapter is merged."""
    model, twin, folders = served(tmp_path, SMALL, torch.float32, torch.device("cpu"))
    ids = torch.randint(3, 256, (ADAPTERS + 1, 7), generator=torch.Generator().manual_seed(1))
    names = [*folders, "__base__"]
    rows_against_each_alone(model, ids, names, ROUNDING, 0.05)
    for name in ("a0", "a5"):
        changed: Any = AutoModelForCausalLM.from_config(twin.config, dtype=torch.float32).eval()
        changed.load_state_dict(twin.state_dict())
        with torch.no_grad():
            merge(changed, load_file(folders[name] / WEIGHTS))
        assert difference(logits(model, ids, [name] * len(ids)), logits(changed, ids)) < ROUNDING, name


@pytest.mark.gpu
def test_six_adapters_at_full_size(tmp_path: Path) -> None:
    """In bfloat16, where a rounding may also choose another expert for a token: 2**-9 * 60**0.5 for the roundings."""
    model, _, folders = served(tmp_path, FULL, torch.bfloat16, torch.device("cuda"))
    ids = torch.randint(3, 256, (ADAPTERS + 1, 16), generator=torch.Generator().manual_seed(1))
    rows_against_each_alone(model, ids, [*folders, "__base__"], 8 * 2**-9 * 60**0.5, 0.25)
