"""inspect: what a checkpoint holds, from its headers."""

from __future__ import annotations

import json
from typing import Any

import typer

from quant_moelora.cli.options import JsonOption, PathArgument, ranges

EXAMPLES = ("inspect ./model", "inspect Qwen/Qwen3-30B-A3B-GPTQ-Int4 --json")


def inspect(
    path: PathArgument,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint holds; only headers are read.

    That is formats, dimensions and bytes, and which backends would serve it here, or why not.
    """
    found = describe(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{found['path']}: {found['model_type']}, {found['bytes']:,} bytes on disk")
    for layer in found["experts"]:
        typer.echo(
            f"  layers {ranges(layer['layers'])}: {layer['num_experts']} experts, hidden {layer['hidden_size']}, "
            f"intermediate {layer['intermediate_size']} (padded {layer['inter_pad']}), {layer['activation']}"
        )
        formats = ", ".join(f"{name} {value}" for name, value in layer["formats"].items())
        typer.echo(f"    {formats}; packed {layer['packed_bytes']:,} bytes a layer")
        for name, reasons in layer["backends"].items():
            typer.echo(f"    backend {name}: {'; '.join(reasons) if reasons else 'serves it'}")
    typer.echo(f"  quantised linear layers beside the experts: {found['quantized_linears']}, dequantised when loaded")


def describe(path: str) -> dict[str, Any]:
    """What `inspect` prints, as JSON's types. Layers of one kind are one entry."""
    import torch

    from quant_moelora.experts.registry import judge
    from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
    from quant_moelora.loaders.families import build_skeleton, find_experts
    from quant_moelora.loaders.layer_format import describe_layers
    from quant_moelora.loaders.linears import describe_linears

    checkpoint = Checkpoint(resolve_checkpoint(path))
    skeleton = build_skeleton(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds: dict[str, dict[str, Any]] = {}
    layers = describe_layers(checkpoint, find_experts(skeleton), skeleton)
    for layer in layers:
        info = layer.meta_info()
        verdicts = judge(info, device, skeleton.dtype, lora=True)
        kind = {
            "num_experts": info.num_experts,
            "hidden_size": info.hidden_size,
            "intermediate_size": info.intermediate_size,
            "inter_pad": info.inter_pad,
            "activation": info.activation.name,
            "scheme": info.scheme_name,
            "formats": {
                stored: ", ".join(dict.fromkeys(map(str, layer.formats(stored)))) for stored in (*layer.w13, "down")
            },
            "packed_bytes": info.nbytes,
            "backends": {name: list(verdict.reasons) for name, verdict in verdicts.items()},
        }
        kinds.setdefault(json.dumps(kind), {"layers": [], **kind})["layers"].append(layer.spec.layer)
    return {
        "path": str(checkpoint.path),
        "model_type": skeleton.config.model_type,
        "bytes": checkpoint.nbytes,
        "quant_method": checkpoint.quantization.get("quant_method"),
        "experts": list(kinds.values()),
        "quantized_linears": len(describe_linears(checkpoint, skeleton, layers)),
    }
