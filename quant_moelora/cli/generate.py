"""generate: completions of one batch whose rows use adapters of their own."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant_moelora.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    DType,
    DTypeOption,
    JsonOption,
    ModelOption,
    TunedOption,
    check_device,
    split_adapters,
)
from quant_moelora.core.errors import FormatError
from quant_moelora.integrations.session import BASE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = (
    'generate --model ./model --prompt "Once upon a time"',
    "generate --model ./model --adapter a=./a --adapter b=./b \\\n"
    '      --prompt "a=Once" --prompt "b=Once" --prompt Once',
)


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


def generate(
    model: ModelOption,
    prompt: Annotated[list[str], typer.Option(help="TEXT, or NAME=TEXT to use the adapter NAME. Repeat for a batch.")],
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.", min=1)] = 32,
    dtype: DTypeOption = DType.AUTO,
    device: DeviceOption = "cpu",
    backend: BackendOption = "auto",
    tuned_configs: TunedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete prompts in one batch, each with its adapter.

    A prompt that names no adapter uses the base model. Of all tokens the most likely one is taken.
    """
    from transformers import AutoTokenizer

    from quant_moelora.integrations.adapters import attach_adapters
    from quant_moelora.integrations.transformers import from_pretrained
    from quant_moelora.loaders.checkpoint import resolve_checkpoint

    adapters, device = split_adapters(adapter), check_device(device)
    folder = resolve_checkpoint(model)
    loaded = from_pretrained(folder, dtype=dtype.value, device_map=device, backend=backend, tuned_configs=tuned_configs)
    if adapters:
        attach_adapters(loaded, adapters)
    requests = [_split_prompt(text, adapters) for text in prompt]
    report = complete(loaded, AutoTokenizer.from_pretrained(folder), requests, max_new_tokens)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        echo_report(report)


def _split_prompt(text: str, adapters: dict[str, str]) -> tuple[str, str]:
    """(adapter, prompt): the part before the first ``=`` names an adapter only if there is one of that name."""
    name, separator, rest = text.partition("=")
    return (name, rest) if separator and name in (*adapters, BASE_NAME) else (BASE_NAME, text)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[tuple[str, str]], max_new_tokens: int
) -> Report:
    """Greedy completions of (adapter, prompt) requests in one batch.

    Raises:
        FormatError: a prompt has no tokens.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer([prompt for _, prompt in requests], return_tensors="pt", padding=True).to(model.device)
    for (_, prompt), tokens in zip(requests, batch["attention_mask"].sum(-1).tolist(), strict=True):
        if not tokens:  # transformers makes an empty tokenizer where the checkpoint's files are missing
            raise FormatError(
                f"prompt {prompt!r}",
                got=f"no token from the tokenizer of {tokenizer.name_or_path}",
                rule="at least one",
                remedy="write a longer prompt; if none serves, tokenizer.json is missing beside the weights",
            )
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
    held = {tensor.data_ptr(): tensor for ctx in contexts for tensor in ctx.tensors().values()}  # layers share an arena
    return {
        "experts": sum(moe.info.nbytes for moe in layers),
        "expert_adapters": sum(tensor.nbytes for tensor in held.values()),
        "other": sum(parameter.nbytes for parameter in model.parameters()),
    }


def echo_report(report: Report) -> None:
    """Print a report as text."""
    for completion in report.completions:
        typer.echo(f"[{completion.adapter}] {completion.prompt} -> {completion.text}")
    resident = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in report.bytes_resident.items())
    typer.echo(f"{report.tokens_per_second:.0f} tokens/s; bytes resident: {resident}")
