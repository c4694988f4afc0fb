"""Command line: inspect and verify a checkpoint, generate with adapters, export them, tune tiles, run the demo."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant_moelora.core.errors import AdapterError, QuantMoELoRAError, UnsupportedError
from quant_moelora.integrations.session import BASE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quant_moelora.integrations.verify import Verification
    from quant_moelora.kernels.grouped_gemm.table import Table
    from quant_moelora.kernels.grouped_gemm.tune import Problem
    from quant_moelora.lora.export import Form

app = typer.Typer(no_args_is_help=True, add_completion=False, help="LoRA on quantised Mixture-of-Experts models.")

_DEMO_PROMPT = "t69 t250 t133"  # the demo's model is random and its vocabulary is t0 to t255


class DType(StrEnum):
    """Activation dtypes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class AdapterForm(StrEnum):
    """PEFT's two forms of LoRA on experts."""

    FUSED = "fused"
    PER_EXPERT = "per-expert"


@dataclass(frozen=True)
class Completion:
    """One request's outcome."""

    adapter: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Report:
    """Outcome of a batch: completions, speed and what the model holds in memory."""

    completions: list[Completion]
    tokens_per_second: float
    bytes_resident: dict[str, int]


def main() -> None:
    """Entry point: errors a caller can cause are one line on stderr and exit code 1."""
    try:
        app()
    except QuantMoELoRAError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


@app.callback()
def options(verbose: Annotated[bool, typer.Option(help="Log what is chosen and why.")] = False) -> None:
    """LoRA on quantised Mixture-of-Experts models."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a repository of the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint holds and which backend would serve it; only headers are read."""
    found = describe(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{found['path']}: {found['model_type']}, {found['bytes']:,} bytes on disk")
    for layer in found["experts"]:
        typer.echo(
            f"  layers {_ranges(layer['layers'])}: {layer['num_experts']} experts, hidden {layer['hidden_size']}, "
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


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or a repository of the hub.")],
    against: Annotated[str | None, typer.Option(help="The model that the checkpoint was quantised from.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Dequantise all experts and compare the packed model's logits with those of the dequantised model.

    Exit code 1 if anything is missing, misshapen or not finite, or if the logits differ.
    """
    from quant_moelora.integrations.verify import verify

    found = verify(path, against)
    if as_json:
        typer.echo(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
    else:
        echo_verification(found)
    if not found.ok:
        raise typer.Exit(1)


def echo_verification(found: Verification) -> None:
    """Print a verification as a table and its verdicts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    headers = ("layer", "projection", "scheme", "min", "max", "rms", "zero scales", "end codes", "error to dense")
    for header in headers:
        table.add_column(header, no_wrap=True, justify="left" if header in ("projection", "scheme") else "right")
    for row in found.projections:
        values = (f"{value:.4g}" for value in (row.minimum, row.maximum, row.rms))
        shares = ("-" if value is None else f"{value:.2%}" for value in (row.zero_scales, row.end_codes))
        error = "-" if row.relative_error is None else f"{row.relative_error:.4f}"
        table.add_row(str(row.layer), row.projection, row.scheme, *values, *shares, error)
    typer.echo(f"{found.path}: {found.model_type}, {found.dtype}")
    Console(width=max(Console().width, 120)).print(table)  # a pipe has no width, and figures must not be cut
    losses: dict[str, list[int]] = {}
    for layer in found.backends:
        losses.setdefault(f"backend {layer.backend} in {found.dtype}: {layer.lossy or 'loses nothing'}", []).append(
            layer.layer
        )
    for loss, layers in losses.items():
        typer.echo(f"layers {_ranges(layers)}: {loss}")
    verdict = "ok" if found.ok else "FAILED"
    typer.echo(
        f"{verdict}: logits differ from the dequantised model's by {found.parity:.1e} (relative RMS, float32, "
        f"allowed {found.parity_bound:.0e})"
    )


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a repository of the hub.")],
    prompt: Annotated[list[str], typer.Option(help="TEXT, or NAME=TEXT to use the adapter NAME. Repeat for a batch.")],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of an adapter. Repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.", min=1)] = 32,
    dtype: Annotated[DType, typer.Option(help="Activation dtype; auto takes the checkpoint's.")] = DType.AUTO,
    device: Annotated[str, typer.Option(help="Where the model goes, such as cpu or cuda.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Experts backend.")] = "auto",
    tuned_configs: Annotated[str | None, typer.Option(help="Folder of tables that tune wrote.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Complete the prompts in one batch, each with its adapter or with the base model."""
    from transformers import AutoTokenizer

    from quant_moelora.integrations.adapters import attach_adapters
    from quant_moelora.integrations.transformers import from_pretrained
    from quant_moelora.loaders.checkpoint import resolve_checkpoint

    folder = resolve_checkpoint(model)
    adapters = _split_adapters(adapter or [])
    loaded = from_pretrained(folder, dtype=dtype.value, device_map=device, backend=backend, tuned_configs=tuned_configs)
    if adapters:
        attach_adapters(loaded, adapters)
    requests = [_split_prompt(text, adapters) for text in prompt]
    report = complete(loaded, AutoTokenizer.from_pretrained(folder), requests, max_new_tokens)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        echo_report(report)


def _split_adapters(texts: list[str]) -> dict[str, str]:
    """Folders of NAME=FOLDER texts, by name."""
    adapters: dict[str, str] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or not folder or name in adapters:
            raise AdapterError(
                "--adapter",
                got=text,
                rule="NAME=FOLDER, each name once",
                remedy="give the adapter a name of its own, as in --adapter a=./adapter",
            )
        adapters[name] = folder
    return adapters


def _split_prompt(text: str, adapters: dict[str, str]) -> tuple[str, str]:
    """(adapter, prompt): the part before the first ``=`` names an adapter only if there is one of that name."""
    name, separator, rest = text.partition("=")
    return (name, rest) if separator and name in (*adapters, BASE_NAME) else (BASE_NAME, text)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[tuple[str, str]], max_new_tokens: int
) -> Report:
    """Greedy completions of (adapter, prompt) requests in one batch."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer([prompt for _, prompt in requests], return_tensors="pt", padding=True).to(model.device)
    names = [adapter for adapter, _ in requests]
    chosen = {"adapter_names": names} if set(names) != {BASE_NAME} else {}
    begin = time.perf_counter()
    generate_ids: Any = model.generate
    ids = generate_ids(**batch, **chosen, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - begin
    new = ids[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    completions = [Completion(a, p, text) for (a, p), text in zip(requests, texts, strict=True)]
    return Report(completions, new.numel() / seconds, bytes_resident(model))


def bytes_resident(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the packed experts, of their adapters, and of everything else."""
    from quant_moelora.integrations.transformers import experts_of

    layers = [experts.moe for experts in experts_of(model).values() if experts.moe is not None]
    contexts = [moe.injection.ctx for moe in layers if moe.injection.ctx is not None]
    return {
        "experts": sum(moe.info.nbytes for moe in layers),
        "expert_adapters": sum(tensor.nbytes for ctx in contexts for tensor in ctx.tensors().values()),
        "other": sum(parameter.nbytes for parameter in model.parameters()),
    }


def echo_report(report: Report) -> None:
    """Print a report as text."""
    for completion in report.completions:
        typer.echo(f"[{completion.adapter}] {completion.prompt} -> {completion.text}")
    resident = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in report.bytes_resident.items())
    typer.echo(f"{report.tokens_per_second:.0f} tokens/s; bytes resident: {resident}")


@app.command()
def export_adapter(
    model: Annotated[str, typer.Option(help="Folder of the adapter's model, or a repository of the hub.")],
    adapter: Annotated[str, typer.Option(help="Folder of the adapter, or a repository of the hub.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it must not hold an adapter.")],
    form: Annotated[AdapterForm, typer.Option(help="How PEFT's files hold LoRA on experts.")],
) -> None:
    """Write an adapter in the other of PEFT's forms; only headers of the model are read."""
    from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
    from quant_moelora.loaders.families import build_skeleton, find_experts
    from quant_moelora.lora.adapter_file import load_adapter
    from quant_moelora.lora.export import export_adapter

    skeleton = build_skeleton(Checkpoint(resolve_checkpoint(model)))
    specs = find_experts(skeleton)
    loaded = load_adapter(resolve_checkpoint(adapter), specs)
    written: Form = "fused" if form is AdapterForm.FUSED else "per_expert"
    export_adapter(loaded, specs, to, written, skeleton.config.model_type)
    typer.echo(f"{to}: {form.value}, {len(loaded.layers)} layers of experts, {len(loaded.linears)} other linear layers")


@app.command()
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
    dtype: Annotated[DType, typer.Option(help="Activation dtype; auto takes the checkpoint's.")] = DType.AUTO,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens in a forward.")] = "1,4,16,64,256,1024,4096",
    lora_ranks: Annotated[str, typer.Option(help="Ranks of adapters, powers of two from 16 on; none by default.")] = "",
    tiles: Annotated[bool, typer.Option(help="Whether to measure tiles, or keep those of the table there is.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds in which candidates take turns.", min=1)] = 11,
    processes: Annotated[int | None, typer.Option(help="Processes that compile; one a processor.", min=1)] = None,
    commit: Annotated[str, typer.Option(help="Commit of the code, for the table.")] = "unknown",
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Measure tiles of a layer's GEMMs on this GPU, and how its adapters are cut, with random weights; write a table.

    The best of what was tried serves all later loads that name the folder as --tuned-configs.
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


@app.command()
def demo() -> None:
    """Complete one prompt with the base model and two adapters in one batch, on the CPU.

    The model is a small random Qwen3-MoE that gptqmodel quantised to int4, so that its words mean nothing; the adapters
    are one on fused experts and one on per-expert modules, as PEFT wrote them.
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
        attach_adapters(model, {name: Path(folder) / "adapters" / name for name in ("a", "b")})
    report = complete(model, tokenizer, [(name, _DEMO_PROMPT) for name in (BASE_NAME, "a", "b")], 16)
    echo_report(report)
    typer.echo(f"parity with the dequantised model: logits differ by {parity:.1e} (relative RMS, float32)")


if __name__ == "__main__":
    main()
