"""DecodeGraphs: the decode step of a model with a static cache as a CUDA graph, which `generate` replays.

transformers compiles that step by torch.compile, which takes minutes for every size of batch; to capture it as it is
takes less than a second. `generate` asks for the forward of its steps by `get_compiled_call`, so that nothing changes
for its caller; whoever passes a ``compile_config`` gets torch.compile as always.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from quant_moelora.integrations.session import ADAPTER_NAMES, AdapterRows, AdapterSession
from quant_moelora.layer import MoEExperts

_CACHE = "past_key_values"
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Any]], tuple[Any, Replay]]


class CudaRecorder:
    """Captures work in CUDA graphs that share their memory: what one leaves behind is copied before the next runs.

    A pool of memory is gone with the last of its graphs, so that a recorder must not outlive those it has made.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Replay]:
        """Record ``work``, which does not run: what it returns, and what fills that."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            made = work()
        self._pool = graph.pool()
        return made, graph.replay


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured step.

    Attributes:
        inputs: tensors that it reads.
        outputs: what the model returned while it was captured, without the cache.
        replay: runs it.
    """

    inputs: list[Tensor]
    outputs: Any
    replay: Replay


@dataclass(eq=False)
class _InCache:
    """Graphs of one cache.

    Attributes:
        tensors: the cache's, whose addresses they hold.
        record: how they are captured.
        graphs: by what else they depend on; None for a step that has run once.
    """

    tensors: list[Tensor]
    record: Recorder
    graphs: dict[Hashable, _Graph | None] = field(default_factory=dict)


class DecodeGraphs:
    """Stands for a model's forward in the steps behind the prefill.

    The first step of a size runs as it is, which compiles kernels; the second one is captured, and it and all others
    are replayed. A graph belongs to a cache and to the shapes of its inputs. Which adapters the rows have is data to
    it, and so is what is attached and detached later in a bank of fixed size; otherwise graphs are made anew.

    A cache with other layers than static ones of the whole sequence counts on the host, which no graph sees: such a
    model is compiled by transformers.

    Args:
        model: the model, which is to hold this.
        layers: its experts.
        session: its adapters.
        compiled: transformers' own `get_compiled_call`.
        recorder: makes what captures the steps of one cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[MoEExperts],
        session: AdapterSession,
        compiled: Callable[[None], Callable[..., Any]],
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        self._model, self._layers, self._session, self._compiled = model, layers, session, compiled
        self._recorder = recorder
        self._caches: weakref.WeakKeyDictionary[Cache, _InCache] = weakref.WeakKeyDictionary()
        self._made_for: list[object] = []

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for one step of `generate`, in tensors of its own."""
        cache = inputs[_CACHE]
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            return self._compiled(None)(**inputs)
        rows = inputs.get(ADAPTER_NAMES)
        if rows is not None:
            assert isinstance(rows, AdapterRows)  # with_adapter_rows
            inputs[ADAPTER_NAMES] = rows.nameless()
        leaves, structure = tree_flatten({name: held for name, held in inputs.items() if name != _CACHE})
        held = self._graphs_of(cache)
        graphs = held.graphs
        config: Any = self._model.config
        modes = torch.is_inference_mode_enabled(), config._attn_implementation
        key = (str(structure), *modes, *(_described(leaf) for leaf in leaves))
        if key not in graphs:
            graphs[key] = None
            return self._model(**inputs)
        graph = graphs[key]
        if graph is None:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            graph = graphs[key] = self._capture(held.record, cache, leaves, tree_unflatten(leaves, structure))
        else:
            for own, new in zip(graph.inputs, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True):
                own.copy_(new)
        graph.replay()
        return replace(tree_map_only(Tensor, Tensor.clone, graph.outputs), past_key_values=cache)

    def _graphs_of(self, cache: Cache) -> _InCache:
        """Graphs that still hold: none do if a module, a bank of adapters or a tensor of the cache is another."""
        made_for = [self._session.modules, next(self._model.parameters()), *(layer.injection for layer in self._layers)]
        if not _same(made_for, self._made_for):
            self._caches.clear()
            self._made_for = made_for
        layers: list[Any] = cache.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        held = self._caches.get(cache)
        if held is None or not _same(tensors, held.tensors):
            held = self._caches[cache] = _InCache(tensors, self._recorder())
        return held

    def _capture(self, record: Recorder, cache: Cache, leaves: list[Any], inputs: dict[str, Any]) -> _Graph:
        made, replay = record(lambda: self._model(**inputs, past_key_values=cache))
        for layer in self._layers:
            layer.forget_captures()  # adapters that are attached later get graphs of their own
        outputs = replace(made, past_key_values=None)  # a graph must not keep its cache
        return _Graph([leaf for leaf in leaves if isinstance(leaf, Tensor)], outputs, replay)


def _described(leaf: Any) -> Hashable:
    """What of an input a graph depends on."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
