"""bench: how fast a model prefills and decodes on this machine, and what of that are its experts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from quant_moelora.cli.generate import bytes_resident
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = (
    "bench --model ./model",
    "bench --model ./model --adapter a=./a --adapter b=./b --batch 32 --device cuda --json",
)


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding of one batch.

    Attributes:
        seconds: median of the rounds.
        tokens_per_second: of the whole batch.
        experts_share: part of the time that the experts of all layers take. It is of rounds of their own, in which the
            device is idle before and after each call of the experts.
    """

    seconds: float
    tokens_per_second: float
    experts_share: float


@dataclass(frozen=True)
class Speed:
    """One way of running the batch.

    Attributes:
        adapters: of its rows, in turns; empty for the base model.
        prefill: all tokens of the prompts at once.
        decode: the new tokens, one of each row at a time.
    """

    adapters: list[str]
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class Bench:
    """Outcome: what was run, where, and how fast."""

    model: str
    device: str
    dtype: str
    torch: str
    threads: int
    backends: list[str]
    batch: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    bytes_resident: dict[str, int]
    speeds: list[Speed]


def bench(
    model: ModelOption,
    adapter: AdapterOption = None,
    batch: Annotated[int, typer.Option(help="Rows of the batch.", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, which are random.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode for each prompt.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of, after one to warm up.", min=1)] = 5,
    dtype: DTypeOption = DType.AUTO,
    device: DeviceOption = "cpu",
    backend: BackendOption = "auto",
    tuned_configs: TunedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time prefill and decode, with and without adapters.

    Rows of the batch use the adapters in turns. What is timed are plain forwards with a key-value cache, without CUDA
    graphs.
    """
    from quant_moelora.integrations.adapters import attach_adapters
    from quant_moelora.integrations.transformers import from_pretrained

    adapters, device = split_adapters(adapter), check_device(device)
    loaded = from_pretrained(model, dtype=dtype.value, device_map=device, backend=backend, tuned_configs=tuned_configs)
    vocabulary = loaded.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(loaded.device)
    speeds = [_speed(loaded, ids, [], new_tokens, rounds)]
    if adapters:
        attach_adapters(loaded, adapters)
        speeds.append(_speed(loaded, ids, list(adapters), new_tokens, rounds))
    found = Bench(
        model=model,
        device=torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        backends=_backends(loaded),
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        bytes_resident=bytes_resident(loaded),
        speeds=speeds,
    )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _echo(found)


def _backends(model: PreTrainedModel) -> list[str]:
    """Names of the backends that served the layers."""
    from quant_moelora.integrations.transformers import experts_of

    chosen = [experts.moe.backend for experts in experts_of(model).values() if experts.moe is not None]
    return sorted({backend.name for backend in chosen if backend is not None})


@torch.inference_mode()
def _speed(
    model: PreTrainedModel,
    ids: Tensor,  # (batch, prompt tokens) int64
    adapters: list[str],
    new_tokens: int,
    rounds: int,
) -> Speed:
    """Medians over the rounds, after one that compiles and warms up; the experts' are of rounds of their own."""
    names = [adapters[row % len(adapters)] for row in range(len(ids))] if adapters else None
    chosen = {"adapter_names": names} if names else {}

    def once() -> tuple[float, float]:
        """Seconds of a prefill and of decoding what follows it, greedily."""
        begin = _now(ids.device)
        out: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1, **chosen)
        between = _now(ids.device)
        for _ in range(new_tokens):
            last = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True, **chosen)
        return between - begin, _now(ids.device) - between

    once()
    whole = [once() for _ in range(rounds)]
    shares: list[tuple[float, float]] = []
    for _ in range(rounds):
        with _experts_clock(model) as spent:
            prefill, decode = once()
        calls = len(spent) // (new_tokens + 1)  # layers with experts
        shares.append((sum(spent[:calls]) / prefill, sum(spent[calls:]) / decode))
    phases: list[Phase] = []
    for place, tokens in enumerate((ids.numel(), len(ids) * new_tokens)):
        seconds, share = (statistics.median(values[place] for values in taken) for taken in (whole, shares))
        phases.append(Phase(seconds, tokens / seconds, share))
    return Speed(adapters, *phases)


@contextmanager
def _experts_clock(model: PreTrainedModel) -> Generator[list[float]]:
    """Seconds of each call of the experts while the context lasts, with the device idle before and after it."""
    from quant_moelora.integrations.transformers import experts_of

    spent: list[float] = []

    def start(*_: Any) -> None:
        """Begin a span of time."""
        spent.append(-_now(model.device))

    def stop(*_: Any) -> None:
        """End the span."""
        spent[-1] += _now(model.device)

    handles = [
        handle
        for experts in experts_of(model).values()
        for handle in (experts.register_forward_pre_hook(start), experts.register_forward_hook(stop))
    ]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    """Time when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _echo(found: Bench) -> None:
    """Print the outcome as text."""
    typer.echo(
        f"{found.model} on {found.device}, {found.dtype}, backend {', '.join(found.backends)}, torch {found.torch}, "
        f"{found.threads} threads; batch {found.batch}, {found.prompt_tokens} + {found.new_tokens} tokens, "
        f"median of {found.rounds}"
    )
    for name in ("prefill", "decode"):
        base: Phase = getattr(found.speeds[0], name)
        for speed in found.speeds:
            phase: Phase = getattr(speed, name)
            which = f"{len(speed.adapters)} adapters" if speed.adapters else "base"
            against = f", {phase.tokens_per_second / base.tokens_per_second:.0%} of base" if speed.adapters else ""
            typer.echo(
                f"  {name:7} {which:12} {phase.tokens_per_second:10.1f} tokens/s{against}; "
                f"{phase.seconds * 1e3:.1f} ms, {phase.experts_share:.0%} of it in experts"
            )
    resident = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in found.bytes_resident.items())
    typer.echo(f"  bytes resident: {resident}")
