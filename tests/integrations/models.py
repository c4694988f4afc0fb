"""Golden models, loaded, and the questions that the tests ask of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_moelora.integrations.transformers import experts_of, from_pretrained
from tests.adapters import Dims, Tensors, attention_lora, write_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = ("base-mixtral-h128-i128", "base-qwen3moe-h128-i96")
GPTQ = "gptq-qwen3moe-int4-g32-asym"
QUANTIZED = (
    "awq-qwen3moe-int4-g128",
    "ct-mixtral-w4a16-g128-sym-rtn",
    "ct-old-mixtral-w4a16-g32-actorder-group",
    "ct-qwen3moe-w4a16-g32-asym-rtn",
    "gptq-mixtral-int4-g32-descact",
    "gptq_v2-qwen3moe-int4-g32-asym",
    GPTQ,
)
CHECKPOINTS = (*BASES, *QUANTIZED)
# Adapters of the Qwen3 models on all experts: fused, rank 8, rsLoRA; per-expert modules, rank 4.
A, B = (GOLDEN / "adapters" / name for name in ("lora-tp-rslora-qwen3moe-r8", "lora-mod-qwen3moe-r4"))
QWEN = Dims(experts=8, hidden=128, inter=96)
ACT_ORDER = Dims(experts=5, hidden=128, inter=192, block="block_sparse_moe")  # gptq-mixtral-int4-g32-descact
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

# Relative RMS between two orders of evaluation in float32. These models have some 16 matrix products in sequence
# (q, k, v, scores, values, o, router, experts twice, in each of 2 layers; lm_head) with K <= 256; each errs by
# 2**-24 * sqrt(K), independently of the others.
ROUNDING = 2**-24 * 16 * 16**0.5
# The accepted bound to logits of other software, and the one that holds.
ACCEPTED, HONEST = 1e-4, 1e-5
# What an adapter of the tests moves the logits by, at least; the goldens' move them by 1 to 13 %.
EFFECT = 5e-3


def folder_of(name: str) -> Path:
    """Folder of a golden checkpoint."""
    return GOLDEN / "checkpoints" / name


def finest(device: torch.device) -> torch.dtype:
    """The finest dtype that the backends of a device take which serve in earnest."""
    return torch.float16 if device.type == "cuda" else torch.float32


def golden_logits(name: str) -> tuple[Tensor, Tensor]:
    """input_ids and float32 logits of a checkpoint, or of an adapter given as ``adapters/NAME``."""
    below = GOLDEN if name.startswith("adapters/") else GOLDEN / "checkpoints"
    held = load_file(below / name / "logits.safetensors")
    return held["input_ids"], held["logits"]


def load(name: str | Path, **kwargs: Any) -> Any:
    """A model in float32 unless a dtype is given."""
    kwargs.setdefault("dtype", torch.float32)
    return from_pretrained(name if isinstance(name, Path) else folder_of(name), **kwargs)


@torch.no_grad()
def logits(model: Any, ids: Tensor, names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
    """Logits on the CPU; ``adapter_names`` is passed only if there are names."""
    chosen = {} if names is None else {"adapter_names": list(names)}
    return model(input_ids=ids.to(model.device), **chosen, **kwargs).logits.cpu()


def difference(got: Tensor, expected: Tensor) -> float:
    """Relative RMS."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Tokens other than the special ones 0, 1 and 2."""
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Generated:
    """What `generate` made of a batch, without its prompt."""

    tokens: Tensor  # (rows, new)
    logits: Tensor  # (rows, new, vocabulary)


def generate(
    model: Any, requests: Sequence[Tensor], names: Sequence[str] | None = None, new: int = 5, **kwargs: Any
) -> Generated:
    """Greedy generation of requests of any lengths in one batch, padded on the left; no row ends early."""
    width = max(len(ids) for ids in requests)
    ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in requests])
    mask = torch.stack([torch.arange(width) >= width - len(ids) for ids in requests]).long()
    chosen = {} if names is None else {"adapter_names": list(names)}
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **chosen,
        **kwargs,
    )
    return Generated(out.sequences[:, width:].cpu(), torch.stack(out.logits, dim=1).cpu())


def copy_checkpoint(
    name: str,
    folder: Path,
    *,
    tensors: Callable[[Tensors], Tensors] | None = None,
    config: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A copy of a golden checkpoint with edited tensors or config."""
    source = folder_of(name)
    folder.mkdir()
    held = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config is not None:
        config(held)
    (folder / "config.json").write_text(json.dumps(held), encoding="utf-8")
    if tensors is None:
        shutil.copy(source / "model.safetensors", folder)
    else:
        save_file(tensors(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    """Leave tensors out."""

    def edit(tensors: Tensors) -> Tensors:
        assert set(keys) <= tensors.keys()
        return {key: tensor for key, tensor in tensors.items() if key not in keys}

    return edit


def attention_adapter(folder: Path, seed: int = 1, more: Tensors | None = None, **config: Any) -> Path:
    """An adapter of the Qwen3 models on q_proj and v_proj, and on whatever else is given."""
    tensors = attention_lora({"q_proj": (128, 128), "v_proj": (64, 128)}, seed=seed)
    return write_adapter(folder, tensors | (more or {}), **config)


def session_names(model: Any) -> list[str]:
    """Names that the model knows, in the order in which they were attached."""
    sessions = {id(module.session): module.session for module in experts_of(model).values()}
    assert len(sessions) == 1, "one session a model"
    return list(next(iter(sessions.values())).slots)
