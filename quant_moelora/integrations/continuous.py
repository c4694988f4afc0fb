"""continuous_batching: transformers' continuous batching with an adapter for each request.

Its forwards take one row of packed tokens, some of each request that runs. The manager knows which: a hook in front of
the model's forward gives the names of their adapters along with it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from quant_moelora.core.errors import UnsupportedError
from quant_moelora.integrations.adapters import adapters_of
from quant_moelora.integrations.session import ADAPTER_NAMES, BASE_NAME, AdapterSession


class AdapterRequests:
    """A manager of transformers that runs, and the adapters of its requests.

    Attributes:
        manager: transformers' own, which gives results, cancels and counts; its `add_request` knows no adapters.
    """

    def __init__(self, manager: Any, session: AdapterSession) -> None:
        self.manager = manager
        self._session = session
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()

    def new_id(self) -> str:
        """An identifier that no other request has."""
        return f"request-{next(self._numbers)}"

    def add_request(
        self, input_ids: Sequence[int], adapter_name: str = BASE_NAME, request_id: str | None = None, **kwargs: Any
    ) -> str:
        """Let a request run beside the others.

        Args:
            input_ids: its prompt.
            adapter_name: an attached adapter; ``__base__`` for none.
            request_id: from `new_id`, or made here.
            kwargs: other arguments of the manager's `add_request`, such as ``max_new_tokens`` and ``streaming``.

        Returns:
            The request's identifier, under which the manager gives its results.

        Raises:
            AdapterError: an unknown name.
            UnsupportedError: the manager has stopped, for instance after an error in a forward.
        """
        self._session.known((adapter_name,))
        request_id = request_id or self.new_id()
        self._names[request_id] = adapter_name
        if self.manager.add_request(list(input_ids), request_id=request_id, **kwargs) is None:
            self.forget(request_id)
            raise UnsupportedError(
                "a request of continuous batching",
                got="a manager that takes no more requests",
                rule="one that runs",
                remedy="see the error of the requests before, and start anew",
            )
        return request_id

    def forget(self, request_id: str) -> None:
        """Forget a request that has finished."""
        self._names.pop(request_id, None)

    def name_tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: the adapters of the manager's packed tokens."""
        if "cu_seq_lens_q" not in kwargs:
            return None  # a forward of somebody else's
        requests = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        # Those that came by the manager's own `add_request` name none.
        names = [self._names.get(request.state.request_id, BASE_NAME) for request in requests]
        lengths = [request.query_length for request in requests]
        input_ids: Tensor = kwargs["input_ids"]
        return args, {**kwargs, ADAPTER_NAMES: self._session.packed_rows(names, lengths, input_ids.device)}


@contextmanager
def continuous_batching(
    model: Any,
    generation_config: GenerationConfig | None = None,
    config: ContinuousBatchingConfig | None = None,
    *,
    per_request: bool = False,
) -> Generator[AdapterRequests]:
    """Run transformers' continuous batching while the context lasts, with an adapter for each request.

    Prefixes are not shared between requests, since keys and values of another adapter are others; nothing is captured
    or compiled, and batches follow one another, since what runs is read on the host. Other forwards of the model have
    to wait until the context ends.

    Args:
        model: a model of `from_pretrained`, with ``sdpa`` or flash attention.
        generation_config: of all requests; the model's own if there is none.
        config: size of the cache and of batches.
        per_request: whether a request may have its own ``temperature``, ``top_k`` and ``top_p``, of those that
            ``generation_config`` sets.

    Raises:
        UnsupportedError: the model is not one of `from_pretrained`; or ``config`` asks for CUDA graphs, compilation or
            asynchronous batches, or ``generation_config`` for several sequences a request; or an adapter is on the
            output embeddings.
    """
    session = adapters_of(model).session
    head: Any = model.get_output_embeddings()
    if isinstance(head, LoraLayer) and head.lora_A:
        raise UnsupportedError(
            "continuous batching with adapters",
            got=f"{', '.join(head.lora_A)} on the output embeddings",
            rule="adapters of other layers, since transformers computes logits of some tokens only",
            remedy="detach the adapter, or use generate",
        )
    config = copy.copy(config or ContinuousBatchingConfig())
    _check(config, generation_config or model.generation_config)
    config.per_request_processors = per_request or config.per_request_processors
    config.use_cuda_graph = config.use_async_batching = config.allow_block_sharing = False
    manager = model.init_continuous_batching(generation_config=generation_config, continuous_batching_config=config)
    requests = AdapterRequests(manager, session)
    hook = model.register_forward_pre_hook(requests.name_tokens, with_kwargs=True)
    try:
        manager.start()
        yield requests
    finally:
        manager.stop(block=True)
        manager.destroy()
        hook.remove()


def _check(config: ContinuousBatchingConfig, generation: GenerationConfig) -> None:
    graphs: Any = config.use_cuda_graph
    asked = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "use_async_batching": config.use_async_batching,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": getattr(config, "default_compile_level", None),
        "compile_config": generation.compile_config,
        "num_return_sequences": (generation.num_return_sequences or 1) > 1,
    }
    found = [name for name, value in asked.items() if value]
    if found:
        raise UnsupportedError(
            "continuous batching with adapters",
            got=", ".join(found),
            rule="requests of one sequence, in batches that are neither captured, compiled nor asynchronous",
            remedy="leave these arguments out; generate with a static cache replays CUDA graphs",
        )
