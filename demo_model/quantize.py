"""Quantise the demo's model with a real tool: ``python -m demo_model.quantize --tool gptq --model DIR --out DIR ...``.

``gptq`` and ``awq`` are gptqmodel's (int4, groups of 32, zero points), ``compressed-tensors`` is llm-compressor's
(int8, one scale a channel). Calibration reads training text only, so that held-out text judges all forms alike. The
tools are no dependencies of this project: README.md says in which versions they ran, each in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.corpus import STYLES

SEQUENCES, LENGTH = 32, 256  # of calibration text, of each style
NOT_MODEL = ("recipe.yaml", "quantize_config.json", "quant_log.csv")  # what tools write beside it
MACHINE = ("offload_to_disk_path",)  # what gptqmodel keeps of the machine in config.json


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=("gptq", "awq", "compressed-tensors"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="the bfloat16 model of demo_model.train")
    parser.add_argument("--corpus", type=Path, required=True, help="what demo_model.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args()
    model, corpus, out = given.model.resolve(), given.corpus.resolve(), given.out.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # tools leave logs where they run
        if given.tool == "compressed-tensors":
            round_to_int8(model, out)
        else:
            quantize_to_int4(given.tool, model, out, calibration(model, corpus))
    tidy(out, model)


def calibration(model: Path, corpus: Path) -> list[str]:
    """Training text of all styles, evenly spread over it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokens = load_file(corpus / "corpus.safetensors")
    texts: list[str] = []
    for style in STYLES:
        ids = tokens[f"{style}.train"]  # uint16 [tokens]
        begins = np.linspace(0, len(ids) - LENGTH, SEQUENCES, dtype=np.int64)
        rows = [ids[begin : begin + LENGTH].tolist() for begin in begins]
        texts += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


def quantize_to_int4(method: str, model: Path, out: Path, texts: list[str]) -> None:
    """By gptqmodel, with GPTQ or AWQ, on the CPU."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # it asks for two, and counts less than one on two cores
    tool: Any = importlib.import_module("gptqmodel")
    formats: Any = importlib.import_module("gptqmodel.quantization")
    config, backend = tool.QuantizeConfig(bits=4, group_size=32, sym=False, desc_act=False), tool.BACKEND.AUTO
    if method == "awq":
        config = tool.QuantizeConfig(
            bits=4, group_size=32, sym=False, method=formats.METHOD.AWQ, format=formats.FORMAT.GEMM
        )
        backend = tool.BACKEND.AWQ_TORCH  # the others want CUDA
    loaded = tool.GPTQModel.load(str(model), config)
    loaded.quantize(texts, batch_size=4, backend=backend)
    loaded.save(str(out))


def round_to_int8(model: Path, out: Path) -> None:
    """By llm-compressor; rounding to the nearest needs no calibration."""
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    weights = quantization.QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = modifiers.QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head", "re:.*mlp.gate$"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    importlib.import_module("llmcompressor").oneshot(model=loaded, recipe=recipe)
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def tidy(folder: Path, model: Path) -> None:
    """Leave the model alone in its folder, with its own generation config, without paths of this machine."""
    for name in NOT_MODEL:
        (folder / name).unlink(missing_ok=True)
    shutil.copy(model / "generation_config.json", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    meta: dict[str, Any] = config["quantization_config"].get("meta", {})
    for name in MACHINE:
        meta.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
