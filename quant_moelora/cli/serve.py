"""serve: an HTTP server whose requests name the base model or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant_moelora.cli.options import (
    AdapterOption,
    BackendOption,
    DeviceOption,
    DType,
    DTypeOption,
    ModelOption,
    TunedOption,
    check_device,
    split_adapters,
)
from quant_moelora.core.errors import AdapterError, UnsupportedError

EXAMPLES = (
    "serve --model ./model --adapter a=./a --adapter b=./b --device cuda",
    "serve --model ./model --name my-model --port 8080",
)
_PAGE = 256  # tokens of a page of transformers' paged cache
_CPU_CACHE = 16384  # tokens; on a GPU transformers asks how much memory is free
_BATCH = 8192  # tokens of one forward at most, transformers' default; without it a given cache lets batches fill memory


def serve(
    model: ModelOption,
    adapter: AdapterOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the base model; its folder's if not given.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the cache of all requests; free memory decides on a GPU.", min=_PAGE)
    ] = None,
    dtype: DTypeOption = DType.AUTO,
    device: DeviceOption = "cpu",
    backend: BackendOption = "auto",
    tuned_configs: TunedOption = None,
) -> None:
    """Serve OpenAI's completions and chat completions, until stopped; requests of all adapters share batches.

    A request's model is the name of an adapter, or that of the base model.
    """
    try:
        import uvicorn

        from quant_moelora.cli.openai_api import Engine, create_app, sampling_config
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "serve",
            got=f"no package {error.name}",
            rule="the packages of the extra `serve`",
            remedy='pip install "quant-moelora[serve]"',
        ) from error
    from transformers import AutoTokenizer, ContinuousBatchingConfig

    from quant_moelora.integrations.adapters import attach_adapters
    from quant_moelora.integrations.continuous import continuous_batching
    from quant_moelora.integrations.transformers import from_pretrained
    from quant_moelora.loaders.checkpoint import resolve_checkpoint

    adapters, device = split_adapters(adapter), check_device(device)
    base = name or Path(model).resolve().name
    if base in adapters:
        raise AdapterError(
            "--adapter", got=base, rule="another name than the base model's", remedy="give the base model a --name"
        )
    folder = resolve_checkpoint(model)
    loaded = from_pretrained(folder, dtype=dtype.value, device_map=device, backend=backend, tuned_configs=tuned_configs)
    attach_adapters(loaded, adapters)
    tokens = cache_tokens or (_CPU_CACHE if loaded.device.type == "cpu" else None)
    config = ContinuousBatchingConfig()
    if tokens is not None:
        config = ContinuousBatchingConfig(num_blocks=-(-tokens // _PAGE), max_batch_tokens=min(tokens, _BATCH))
    with continuous_batching(loaded, sampling_config(loaded), config, per_request=True) as requests:
        engine = Engine(loaded, AutoTokenizer.from_pretrained(folder), base, requests)
        uvicorn.run(create_app(engine), host=host, port=port)
