"""The tables of docs/: what the registries, and transformers' families, answer when they are asked.

`python -m tests.docs.tables` writes them between their marks in the pages.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import QuantMoELoRAError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import SUPPORTED_BITS, QuantScheme
from quant_moelora.core.weights import DenseWeight
from quant_moelora.experts.registry import BACKENDS
from quant_moelora.kernels.common.sample import blank_info
from quant_moelora.loaders.codec import LinearSpec
from quant_moelora.loaders.families import ExpertsSpec, find_experts
from quant_moelora.loaders.registry import CODECS, find_codec
from quant_moelora.loaders.unserved import UNSERVED
from tests.checkpoints import BITS, ENCODERS, PLAIN_ORDER, awq_gemv, headers_of, quantization_config, random_linear
from tests.integrations.test_families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
GROUPS = (8, 16, 24, 32, 48, 64, 128, None)  # None is a group for all columns, per channel
N, K = 64, 384
MODULE = "model.layers.0.mlp.experts.0.up_proj"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Format:
    """A format of files: its name here and in `tests.checkpoints`, and the tools that write it."""

    title: str
    encoder: str
    tools: str


FORMATS = (
    Format("GPTQ v1", "gptq", "gptqmodel, AutoGPTQ, auto-round"),
    Format("GPTQ v2, planar", "gptq_v2", "gptqmodel, auto-round"),
    Format("AWQ GEMM", "awq", "AutoAWQ, gptqmodel"),
    Format("AWQ GEMV", "awq_gemv", "AutoAWQ"),
    Format("compressed-tensors pack-quantized", "compressed-tensors", "llm-compressor"),
    Format("compressed-tensors int-quantized, naive-quantized", "int-quantized", "llm-compressor"),
    Format("none", "", "transformers"),
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sizes(sizes: Iterable[int | None]) -> str:
    """Those of `GROUPS`, in words where there is a rule."""
    found = list(sizes)
    whole = [size for size in GROUPS if size is None or size % 16 == 0]
    if found == list(GROUPS):
        return "any, per channel"
    if found == whole:
        return "multiples of 16, per channel"
    return ", ".join("per channel" if size is None else str(size) for size in found)


# --- formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A quantised weight whose format is in question."""

    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool


def _accepted(fmt: Format, case: Case) -> str | None:
    """Name of the codec that reads a weight in a format, None if it is refused."""
    linear = random_linear(
        np.random.default_rng(0),
        N,
        K,
        bits=case.bits,
        group_size=case.group_size,
        symmetric=case.symmetric,
        act_order=case.act_order,
    )
    gemv = fmt.encoder == "awq_gemv"
    headers = headers_of((awq_gemv if gemv else ENCODERS[fmt.encoder])(linear), MODULE)
    changes: dict[str, Any] = {"version": "gemv"} if gemv else {}
    config = quantization_config("awq" if gemv else fmt.encoder, linear, **changes)
    spec = LinearSpec(MODULE, N, K)
    try:
        codec = find_codec(spec, headers, config)
        found = codec.describe(spec, headers, config)
    except QuantMoELoRAError:
        return None
    expected = (case.bits, case.group_size, case.symmetric)
    assert found.scheme is not None and (found.scheme.bits, found.scheme.group_size, found.scheme.symmetric) == expected
    return type(codec).__name__


def formats() -> str:
    """One row a format that a codec reads."""
    rows: list[Sequence[str]] = []
    used: set[str] = {"Dense"}
    for fmt in FORMATS:
        if not fmt.encoder:
            floats = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            rows.append((fmt.title, fmt.tools, floats, "", "", ""))
            continue
        own = fmt.encoder.removesuffix("_gemv")
        orders = (False,) if own in PLAIN_ORDER else (False, True)
        product = itertools.product(BITS.get(own, SUPPORTED_BITS), GROUPS, (True, False), orders)
        read = {case: codec for case in itertools.starmap(Case, product) if (codec := _accepted(fmt, case))}
        used |= set(read.values())
        rows.append(
            (
                fmt.title,
                fmt.tools,
                ", ".join(f"int{bits}" for bits in sorted({case.bits for case in read})),
                _sizes(size for size in GROUPS if any(case.group_size == size for case in read)),
                "yes" if any(not case.symmetric for case in read) else "no",
                "yes" if any(case.act_order for case in read) else "none in the format",
            )
        )
    assert used == {type(codec).__name__ for codec in CODECS}, "each codec has its row"
    return table(("format of the experts", "written by", "weights", "group size", "zero points", "act-order"), rows)


def unserved() -> str:
    """Formats that are refused by name."""
    return ", ".join(dict.fromkeys(format.name for format in UNSERVED)) + "."


# --- backends ---------------------------------------------------------------------------------------------------------


def _dense_info() -> MoEQuantInfo:
    def weight(halves: int, n: int, k: int) -> DenseWeight:
        tensor = torch.empty(4, halves * n, k, dtype=torch.bfloat16, device="meta")
        return DenseWeight(num_experts=4, halves=halves, n=n, n_pad=n, k=k, k_pad=k, bias=None, w=tensor)

    return MoEQuantInfo(w13=weight(2, 128, 384), w2=weight(1, 384, 128), activation=Activation("silu"))


def backends() -> str:
    """One row a registered backend, in the order of preference; GPUs are asked about as if there were one."""
    infos: dict[tuple[str, int | None], MoEQuantInfo] = {("unquantised", None): _dense_info()}
    for bits, size in itertools.product(SUPPORTED_BITS, GROUPS):
        infos[f"int{bits}", size] = blank_info(4, 384, 384, QuantScheme(bits, size, True, torch.float16))
    rows: list[Sequence[str]] = []
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.get_device_capability", lambda _: (9, 0)),
        patch("importlib.util.find_spec", lambda _: True),
    ):
        for backend in BACKENDS:
            served = [
                (device, dtype, kind, size)
                for device, dtype, (kind, size) in itertools.product(("cuda", "cpu"), DTYPES, infos)
                if backend.supports(infos[kind, size], torch.device(device), dtype, lora=True).ok
            ]
            devices, dtypes, kinds, sizes = (list(dict.fromkeys(values)) for values in zip(*served, strict=True))
            product = len(devices) * len(dtypes) * len({(kind, size) for *_, kind, size in served})
            assert len(served) == product, "devices, dtypes and experts are asked for apart from one another"
            rows.append(
                (
                    f"`{backend.name}`",
                    " and ".join("NVIDIA GPU" if device == "cuda" else "CPU" for device in devices),
                    ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
                    ", ".join(sorted(kinds)),
                    "" if kinds == ["unquantised"] else _sizes(size for size in GROUPS if size in sizes),
                )
            )
    return table(("backend", "device", "activations", "experts", "group size"), rows)


# --- families ---------------------------------------------------------------------------------------------------------

# What a config has to say where its defaults do not make a model; each family takes what it knows.
SMALL = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}


def _models() -> Iterator[tuple[str, Any]]:
    """Causal language models of transformers with experts, few layers of each and without data, by their type."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for changes in ({"num_hidden_layers": 4}, {}, SMALL):
            try:
                config = AutoConfig.for_model(model_type, **changes)
                if not any("expert" in name for name in config.get_text_config().to_dict()):
                    break
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
            except Exception:  # noqa: BLE001 - whatever a family says of a config that it cannot use
                continue
            if any(getattr(module, "down_proj", None) is not None for module in model.modules()):
                yield model_type, model
                break


def _traits(spec: ExpertsSpec) -> tuple[str, ...]:
    """What a row of the table says of an experts module."""
    activation = "clamped swiglu" if spec.activation.name == "swigluoai" else f"{spec.activation.name}(gate) * up"
    rows = "rows of gate and up in turns" if spec.interleaved else "gate above up"
    return (
        activation,
        f"{'[E, K, N]' if spec.transposed else '[E, N, K]'}, {rows}",
        "yes" if spec.has_bias else "no",
        spec.router_weight,
    )


def families() -> tuple[str, str]:
    """The table of what is served, a row for families alike, and a list of what is refused."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    refused: list[str] = []
    for model_type, model in _models():
        try:
            specs = find_experts(model)
        except QuantMoELoRAError as error:
            refused.append(f"- `{model_type}`: {error.got}")
            continue
        if specs:
            name = f"**{model_type}**" if model_type in FAMILIES else model_type
            alike[_traits(specs[0])].append(name)
    named = {name.strip("*") for names in alike.values() for name in names}
    assert named >= FAMILIES.keys(), "what is tested is served"
    rows = sorted(((", ".join(names), *traits) for traits, names in alike.items()), key=lambda row: -len(row[0]))
    header = ("model types", "experts compute", "parameters in transformers", "biases", "router's weight is on the")
    return table(header, rows), "\n".join(refused)


# --- pages ------------------------------------------------------------------------------------------------------------


def made() -> dict[str, str]:
    """Every table, by its name."""
    import transformers

    served, refused = families()
    return {
        "transformers version": f"Asked on transformers {transformers.__version__}.",
        "formats": formats(),
        "unserved": unserved(),
        "backends": backends(),
        "families": served,
        "refused families": refused,
    }


def marked(text: str) -> dict[str, str]:
    """What stands between the marks of a page, by name."""
    return dict(re.findall(r"<!-- made: (.+?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def write() -> None:
    """Put every table into the pages that have marks for it."""
    tables = made()
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, old in marked(text).items():
            marks = "<!-- made: " + name + " -->\n{}\n<!-- end -->"
            text = text.replace(marks.format(old), marks.format(tables[name]))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
