"""tune: tiles of a layer, measured on this GPU and written as tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant_moelora.cli.options import DType, DTypeOption, JsonOption
from quant_moelora.core.errors import UnsupportedError

if TYPE_CHECKING:
    from quant_moelora.kernels.grouped_gemm.table import Table
    from quant_moelora.kernels.grouped_gemm.tune import Problem

EXAMPLES = (
    "tune --model ./model --out ./tuned",
    "tune --experts 128 --hidden 2048 --intermediate 768 --top-k 8 --out ./tuned",
)


def tune(
    out: Annotated[Path, typer.Option(help="Folder for the tables, one a layer; made if it is not there.")],
    model: Annotated[str | None, typer.Option(help="Folder of a checkpoint, or a repository of the hub.")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer, without a model.", min=1)] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.", min=1)] = None,
    intermediate: Annotated[int | None, typer.Option(help="Intermediate size.", min=1)] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token; of a model what its config says.")] = None,
    bits: Annotated[int, typer.Option(help="Bits of a code, without a model.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 for all.")] = 128,
    zeros: Annotated[bool, typer.Option(help="Whether there are zero points, without a model.")] = False,
    act_order: Annotated[bool, typer.Option(help="Whether gate and up have an act-order.")] = False,
    dtype: DTypeOption = DType.AUTO,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens in a forward.")] = "1,4,16,64,256,1024,4096",
    lora_ranks: Annotated[str, typer.Option(help="Ranks of adapters, powers of two from 16 on; none by default.")] = "",
    tiles: Annotated[bool, typer.Option(help="Whether to measure tiles, or keep those of the table there is.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds in which candidates take turns.", min=1)] = 11,
    processes: Annotated[int | None, typer.Option(help="Processes that compile; one a processor.", min=1)] = None,
    commit: Annotated[str, typer.Option(help="Commit of the code, for the table.")] = "unknown",
    as_json: JsonOption = False,
) -> None:
    """Measure tiles of a layer on this GPU; write a table.

    The layer has random weights; with --lora-ranks it is also measured how the work of its adapters is cut. The best
    that was tried serves all later loads that name the folder as --tuned-configs.
    """
    from quant_moelora.experts.lora_tune import with_lora
    from quant_moelora.kernels.grouped_gemm.tune import default_processes, tune, tuned_before

    given = {"--experts": experts, "--hidden": hidden, "--intermediate": intermediate, "--top-k": top_k}
    if model is None:
        problems = [_layer_problem(given, bits, None if group_size == -1 else group_size, zeros, dtype)]
    else:
        problems = _model_problems(model, top_k, dtype)
    numbers, count = _numbers("--tokens", tokens), processes or default_processes()
    ranks = _numbers("--lora-ranks", lora_ranks) if lora_ranks else []
    if out.exists() and not out.is_dir():
        raise UnsupportedError("--out", got=f"the file {out}", rule="a folder", remedy="name a folder for the tables")
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Table] = {}
    for problem in problems:
        one = problem.with_act_order() if act_order else problem
        table = tune(one, numbers, rounds=rounds, processes=count, commit=commit) if tiles else tuned_before(one, out)
        if ranks:
            table = with_lora(table, one, numbers, ranks, rounds=rounds, processes=count, commit=commit)
        made[str(table.write(out))] = table
    if as_json:
        typer.echo(json.dumps({path: asdict(table) for path, table in made.items()}, indent=2))
        return
    for path, table in made.items():
        typer.echo(path)
        for entry in table.entries:
            gain = f"{entry.formula_us / entry.us - 1:+.1%}" if entry.us < entry.formula_us else "the formula's tiles"
            typer.echo(f"  {entry.num_pairs} pairs: {entry.us:.1f} us, {gain}")
        for cut in table.lora:
            gain = f"{cut.formula_us / cut.us - 1:+.1%}" if cut.us < cut.formula_us else "the formula's cut"
            typer.echo(f"  {cut.num_pairs} pairs with adapters of rank {cut.rank}: {cut.us:.1f} us, {gain}")


def _layer_problem(
    given: dict[str, int | None], bits: int, group_size: int | None, zeros: bool, dtype: DType
) -> Problem:
    """The layer that the options describe."""
    import torch

    from quant_moelora.core.scheme import QuantScheme
    from quant_moelora.kernels.common.sample import blank_info
    from quant_moelora.kernels.grouped_gemm.tune import Problem

    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UnsupportedError(
            "tune",
            got=f"no {', '.join(missing)}",
            rule="--model, or all of a layer's sizes",
            remedy="add what is missing",
        )
    experts, hidden, inter, top_k = (value or 0 for value in given.values())
    own = torch.bfloat16 if dtype is DType.AUTO else getattr(torch, dtype.value)
    info = blank_info(experts, hidden, inter, QuantScheme(bits, group_size, not zeros, torch.bfloat16))
    return Problem(info, top_k, own)


def _model_problems(path: str, top_k: int | None, dtype: DType) -> list[Problem]:
    """The different layers of a checkpoint; only headers are read."""
    import torch

    from quant_moelora.core.weights import PackedWeight
    from quant_moelora.kernels.grouped_gemm.tune import Problem
    from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
    from quant_moelora.loaders.families import build_skeleton, find_experts
    from quant_moelora.loaders.layer_format import describe_layers

    checkpoint = Checkpoint(resolve_checkpoint(path))
    skeleton = build_skeleton(checkpoint)
    text = skeleton.config.get_text_config()
    chosen = top_k or getattr(text, "num_experts_per_tok", None)
    infos = [layer.meta_info() for layer in describe_layers(checkpoint, find_experts(skeleton), skeleton)]
    quantised = [i for i in infos if isinstance(i.w13, PackedWeight) and isinstance(i.w2, PackedWeight)]
    if not quantised or chosen is None:
        raise UnsupportedError(
            f"tune {path}",
            got="no quantised experts" if not quantised else "a config without num_experts_per_tok",
            rule="layers with int4 or int8 experts, and how many of them a token has",
            remedy="choose another model" if not quantised else "give --top-k",
        )
    own = skeleton.dtype if dtype is DType.AUTO else getattr(torch, dtype.value)
    problems = [Problem(info, int(chosen), own) for info in quantised]
    return list({problem.shape: problem for problem in problems}.values())


def _numbers(option: str, text: str) -> list[int]:
    """Positive numbers of a list with commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UnsupportedError(
            option,
            got=text,
            rule="positive numbers with commas between",
            remedy=f"write them as in {option} 1,16,256",
        )
    return sorted({int(part) for part in parts})
