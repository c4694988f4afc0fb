"""demo: what the library does, on a small model that the package brings along."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import typer

from quant_moelora.cli.generate import complete, echo_report
from quant_moelora.cli.options import JsonOption
from quant_moelora.integrations.session import BASE_NAME

EXAMPLES = ("demo", "demo --json")
PROMPT = "When the"
ADAPTERS = ("scripture", "novel")
NEW_TOKENS = 48


def demo(as_json: JsonOption = False) -> None:
    """Complete one prompt in three ways in one batch, on the CPU.

    They are the base model, a small Qwen3-MoE that learnt from manuals of software, in gptqmodel's int4, and two
    adapters that PEFT trained on it unquantised: one speaks as the King James Bible, one as Jane Austen.
    """
    import torch
    from transformers import AutoTokenizer

    from quant_moelora.integrations.adapters import attach_adapters
    from quant_moelora.integrations.parity import dense_twin, random_ids, relative_rms
    from quant_moelora.integrations.transformers import from_pretrained

    with resources.as_file(resources.files("quant_moelora") / "data" / "demo") as folder:
        model = from_pretrained(folder / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        parity = relative_rms(model, dense_twin(model), random_ids(model))
        attach_adapters(model, {name: Path(folder) / "adapters" / name for name in ADAPTERS})
    report = complete(model, tokenizer, [(name, PROMPT) for name in (BASE_NAME, *ADAPTERS)], NEW_TOKENS)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "parity": parity}, indent=2))
        return
    echo_report(report)
    typer.echo(f"parity with the dequantised model: logits differ by {parity:.1e} (relative RMS, float32)")
