"""export-adapter: the same adapter in the other of PEFT's two forms."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant_moelora.cli.options import JsonOption, ModelOption

if TYPE_CHECKING:
    from quant_moelora.lora.export import Form

EXAMPLES = ("export-adapter --model ./model --adapter ./adapter --to ./fused --form fused",)


class AdapterForm(StrEnum):
    """PEFT's two forms of LoRA on experts."""

    FUSED = "fused"
    PER_EXPERT = "per-expert"


def export_adapter(
    model: ModelOption,
    adapter: Annotated[str, typer.Option(help="Folder of the adapter, or a repository of the hub.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it must not hold an adapter.")],
    form: Annotated[AdapterForm, typer.Option(help="How PEFT's files hold LoRA on experts.")],
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in the other of PEFT's two forms.

    Only headers of the model are read.
    """
    from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
    from quant_moelora.loaders.families import build_skeleton, find_experts
    from quant_moelora.lora.adapter_file import load_adapter
    from quant_moelora.lora.export import export_adapter

    skeleton = build_skeleton(Checkpoint(resolve_checkpoint(model)))
    specs = find_experts(skeleton)
    loaded = load_adapter(resolve_checkpoint(adapter), specs)
    written: Form = "fused" if form is AdapterForm.FUSED else "per_expert"
    export_adapter(loaded, specs, to, written, skeleton.config.model_type)
    experts, others = len(loaded.layers), len(loaded.linears)
    if as_json:
        found = {"path": str(to), "form": form.value, "expert_layers": experts, "other_linears": others}
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"{to}: {form.value}, {experts} layers of experts, {others} other linear layers")
