"""Perplexities of the demo's model in every form, with every adapter: ``python -m demo_model.perplexity``.

Prints README.md's table: quant_moelora on each checkpoint, beside transformers and PEFT without it on the bfloat16 one,
in float32 on the CPU. The text is ``passages/``, held out of training and calibration.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant_moelora as qm
from demo_model.corpus import PASSAGES, STYLES

HERE = Path(__file__).parent
BASE = "__base__"  # no adapter
DEMO = Path(str(resources.files("quant_moelora"))) / "data" / "demo"  # shipped: one form, and the adapters
ADAPTERS = {name: DEMO / "adapters" / name for name in ("scripture", "novel")}
WAYS = (BASE, *ADAPTERS)
BFLOAT16 = HERE / "checkpoints" / "bf16"
FORMS = {
    "bfloat16": BFLOAT16,
    "compressed-tensors int8": HERE / "checkpoints" / "compressed-tensors-int8",
    "AWQ int4": HERE / "checkpoints" / "awq-int4",
    "GPTQ int4": DEMO / "model",
}


def read(style: str) -> list[str]:
    """A style's passages."""
    return (HERE / "passages" / f"{style}.txt").read_text().removesuffix("\n").split("\n\n")


@torch.inference_mode()
def text_losses(model: Any, texts: list[str], **chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each text in nats, float32 [texts], and its number of tokens, int64 [texts]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(BFLOAT16)
    texts = [tokenizer.eos_token + text for text in texts]  # as in training, where another document ended before it
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    logits = model(**batch, use_cache=False, **chosen).logits  # [texts, tokens, words]
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    counted = batch.attention_mask[:, 1:]
    return (nats * counted).sum(1), counted.sum(1)


def print_row(form: str, adapter: str, model: Any, **chosen: Any) -> None:
    """Print a line of the table: the perplexity of each style."""
    cells: list[str] = []
    for style in STYLES:
        nats, tokens = text_losses(model, read(style), **chosen)
        cells.append(f"{math.exp(nats.sum() / tokens.sum()):.2f}")
    print(f"| {form} | {'none' if adapter == BASE else adapter} | {' | '.join(cells)} |", flush=True)


def served(folder: Path) -> Any:
    """A checkpoint in quant_moelora, with all adapters."""
    model = qm.from_pretrained(folder, dtype=torch.float32)
    qm.attach_adapters(model, ADAPTERS)
    return model


def stock(adapter: str) -> Any:
    """The bfloat16 checkpoint in transformers and PEFT alone, with one adapter or none."""
    model: Any = AutoModelForCausalLM.from_pretrained(BFLOAT16, dtype=torch.float32)
    return model if adapter == BASE else PeftModel.from_pretrained(model, str(ADAPTERS[adapter]))


def main() -> None:
    """Print the table."""
    print(f"| checkpoint | adapter | {' | '.join(STYLES)} |")
    print("|---|---" + "|---" * len(STYLES) + "|")
    for adapter in WAYS:
        print_row("bfloat16, transformers and PEFT alone", adapter, stock(adapter))
    for form, folder in FORMS.items():
        model = served(folder)
        for adapter in WAYS:
            print_row(form, adapter, model, adapter_names=[adapter] * PASSAGES)


if __name__ == "__main__":
    main()
