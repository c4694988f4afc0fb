"""DecodeGraphs: what `generate` gets from replayed steps against what it computes step by step.

A CUDA graph is played by a recorder that keeps its rules: what is recorded does not run, a replay reads the recorded
inputs and the cache where they stand, and fills the recorded outputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from quant_moelora.integrations.adapters import attach_adapters, detach_adapters
from quant_moelora.integrations.decode_graphs import DecodeGraphs
from quant_moelora.integrations.session import BASE_NAME
from quant_moelora.integrations.transformers import experts_of
from quant_moelora.layer import MoEExperts
from tests.adapters import attention_lora, fused_lora, linear_lora, write_adapter
from tests.integrations.models import (
    EFFECT,
    FUSED,
    GPTQ,
    QWEN,
    ROUNDING,
    A,
    B,
    Generated,
    difference,
    generate,
    load,
    random_ids,
)

NEW = 4
BOTH = {"a": A, "b": B}
NAMES = ["a", BASE_NAME, "b"]
EVERYWHERE: Any = CompileConfig()
EVERYWHERE._compile_all_devices = True  # `generate` then asks for its steps on a CPU too


class Recorder:
    """Plays CUDA graphs that decode into ``cache``."""

    cache: Any

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]
        before = [tensor.clone() for tensor in tensors]
        made = work()
        for tensor, held in zip(tensors, before, strict=True):
            tensor.copy_(held)
        outputs = [leaf.fill_(torch.nan) for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]

        def replay() -> None:
            self.replayed += 1
            for held, new in zip(outputs, (t for t in tree_leaves(work()) if isinstance(t, Tensor)), strict=True):
                held.copy_(new)

        return made, replay


class Served:
    """A model whose `generate` replays its steps."""

    def __init__(self, adapters: Mapping[str, str | Path] = BOTH, **room: int) -> None:
        self.model, self.record, self.recorders = load(GPTQ), Recorder(), 0
        self.model.hf_quantizer.compileable = True  # what the backends of a GPU are
        attach_adapters(self.model, adapters, **room)
        modules = list(experts_of(self.model).values())
        layers = [module.moe for module in modules if module.moe is not None]
        self.compiled: list[Any] = []
        graphs = DecodeGraphs(self.model, layers, modules[0].session, self._compile, self._recorder)
        self.model.get_compiled_call = lambda config: graphs
        self.graphs = graphs

    def _compile(self, config: None) -> Callable[..., Any]:
        return lambda **inputs: self.compiled.append(config) or self.model(**inputs)

    def _recorder(self) -> Recorder:
        self.recorders += 1
        return self.record

    def cache(self, length: int = 16) -> Any:
        self.record.cache = StaticCache(config=self.model.config, max_cache_len=length)
        return self.record.cache

    def generate(self, requests: Sequence[Tensor], names: Sequence[str] | None, cache: Any) -> Generated:
        cache.reset()
        return generate(self.model, requests, names, NEW, past_key_values=cache, compile_config=EVERYWHERE)


def prompts(rows: int = 3) -> list[Tensor]:
    return [random_ids(1, 4 + row, seed=row)[0] for row in range(rows)]


def check(served: Served, names: Sequence[str] | None, cache: Any, rows: int = 3, tolerance: float = 0.0) -> Generated:
    """What is replayed has the bits of each step computed as it is, in a cache of the same length, or nearly so."""
    got = served.generate(prompts(rows), names, cache)
    own = StaticCache(config=served.model.config, max_cache_len=cache.layers[0].max_cache_len)
    expected = generate(served.model, prompts(rows), names, NEW, past_key_values=own, disable_compile=True)
    assert torch.equal(got.tokens, expected.tokens)
    assert difference(got.logits, expected.logits) <= tolerance
    return got


def test_one_graph_serves_all_names() -> None:
    served = Served()
    cache = served.cache()
    first = check(served, NAMES, cache)
    assert (served.record.recorded, served.record.replayed) == (1, NEW - 2), "prefill and a first step run as they are"
    second = check(served, NAMES[::-1], cache)
    assert difference(second.logits[0], first.logits[0]) > EFFECT
    check(served, ["a", BASE_NAME, BASE_NAME], cache)
    assert (served.record.recorded, served.record.replayed) == (1, NEW - 2 + 2 * (NEW - 1))


@pytest.mark.parametrize("names", [None, [BASE_NAME] * 3])
def test_the_base_alone_has_no_kernels_of_adapters(names: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    cache = served.cache()
    check(served, NAMES, cache)
    given: list[Any] = []
    forward = MoEExperts.forward

    def watched(self: MoEExperts, x: Any, ids: Any, weights: Any, slots: Any = None) -> Any:
        given.append(slots)
        return forward(self, x, ids, weights, slots)

    monkeypatch.setattr(MoEExperts, "forward", watched)
    check(served, names, cache)
    assert given and all(slots is None for slots in given)
    assert served.record.recorded == 2


def test_other_sizes_and_other_caches_have_graphs_of_their_own() -> None:
    served = Served()
    cache = served.cache()
    check(served, NAMES, cache)
    check(served, NAMES[:2], cache := served.cache(), rows=2)
    check(served, NAMES, cache := served.cache(24))
    assert served.record.recorded == 3
    check(served, NAMES, cache)
    assert served.record.recorded == 3
    assert served.recorders == 3, "memory that graphs share goes with the last of them, and so with their cache"


def test_graphs_are_made_anew_for_another_bank() -> None:
    served = Served({"a": A})
    cache = served.cache()
    check(served, ["a", BASE_NAME, "a"], cache)
    attach_adapters(served.model, {"b": B})
    check(served, NAMES, cache)
    assert served.record.recorded == 2


def test_graphs_stay_in_a_bank_of_fixed_size() -> None:
    served = Served({"a": A}, max_adapters=2, max_rank=16)
    cache = served.cache()
    check(served, ["a", BASE_NAME, "a"], cache)
    attach_adapters(served.model, {"b": B})
    check(served, NAMES, cache)
    detach_adapters(served.model, ["a"])
    check(served, ["b", BASE_NAME, "b"], cache)
    assert served.record.recorded == 1


def test_moved_tensors_of_a_cache_are_noticed() -> None:
    served = Served()
    cache = served.cache()
    check(served, NAMES, cache)
    cache.layers[0].keys = cache.layers[0].keys.clone()  # as reordering beams does
    check(served, NAMES, cache)
    assert served.record.recorded == 2


def test_a_cache_that_counts_on_the_host_is_transformers_to_compile() -> None:
    served = Served()
    cache = served.cache()
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = StaticSlidingWindowLayer(layer.max_cache_len, sliding_window=8)
    served.generate(prompts(), NAMES, cache)
    assert len(served.compiled) == NEW - 1 and not served.record.recorded


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters a and b of experts, routers and attention, of different ranks."""
    root = tmp_path_factory.mktemp("adapters")
    return [everywhere_adapter(root / name, seed) for seed, name in enumerate("ab")]


def everywhere_adapter(folder: Path, seed: int) -> Path:
    attention = attention_lora({"q_proj": (128, 128), "v_proj": (64, 128), "o_proj": (128, 128)}, seed=seed)
    router = linear_lora("model.layers.1.mlp.gate", 8, 128, seed=40 + seed)
    tensors = fused_lora(QWEN, seed=seed) | attention | router
    return write_adapter(folder, tensors, target_parameters=[*FUSED, "mlp.gate.weight"])


def test_adapters_of_attention_and_routers(everywhere: list[Path]) -> None:
    """What PEFT computes name by name, up to the order of its sums, and for base rows to the bit."""
    served = Served(dict(zip("ab", everywhere, strict=True)))
    cache = served.cache()
    first = check(served, NAMES, cache, tolerance=ROUNDING)
    second = check(served, NAMES[::-1], cache, tolerance=ROUNDING)
    assert served.record.recorded == 1
    assert difference(second.logits[0], first.logits[0]) > EFFECT
    check(served, [BASE_NAME] * 3, cache)
    detach_adapters(served.model, ["a"])
    check(served, ["b", BASE_NAME, "b"], cache, tolerance=ROUNDING)
    assert served.record.recorded == 3, "the base alone, and other modules"


def test_numbers_of_adapters_outlast_others(everywhere: list[Path]) -> None:
    """Router and attention of b have been captured with b's number, which detaching a must not change."""
    served = Served({"a": A, "b": everywhere[1]}, max_adapters=3, max_rank=16)
    cache = served.cache()
    check(served, ["b", BASE_NAME, "a"], cache, tolerance=ROUNDING)
    detach_adapters(served.model, ["a"])
    check(served, ["b", BASE_NAME, "b"], cache, tolerance=ROUNDING)
    attach_adapters(served.model, {"c": A})
    check(served, ["c", "b", BASE_NAME], cache, tolerance=ROUNDING)
    assert served.record.recorded == 1


def test_active_adapters_are_no_data(everywhere: list[Path]) -> None:
    served = Served({})
    for folder in everywhere:
        served.model.load_adapter(folder, folder.name)
    cache = served.cache()
    for active in ("a", "b", ["a", "b"]):
        served.model.set_adapter(active)
        check(served, None, cache)
    assert served.record.recorded == 3
    check(served, NAMES, cache, tolerance=ROUNDING)
    served.model.disable_adapters()
    off = check(served, None, cache)
    served.model.enable_adapters()
    assert difference(check(served, None, cache).logits, off.logits) > EFFECT


@pytest.mark.gpu
def test_generate_replays_cuda_graphs() -> None:
    """With transformers' own static cache, of which every `generate` makes a new one, and with one that is kept."""
    model = load(GPTQ, device_map="cuda", dtype=torch.bfloat16)
    before = generate(model, prompts(), None, NEW, cache_implementation="static")
    attach_adapters(model, BOTH)
    graphs = model.get_compiled_call(None)
    assert isinstance(graphs, DecodeGraphs)
    kept = StaticCache(config=model.config, max_cache_len=16)
    for names in (NAMES, NAMES[::-1], [BASE_NAME] * 3):
        expected = generate(model, prompts(), names, NEW, cache_implementation="static", disable_compile=True)
        kept.reset()
        for options in ({"cache_implementation": "static"}, {"past_key_values": kept}):
            got = generate(model, prompts(), names, NEW, **options)
            assert torch.equal(got.tokens, expected.tokens), options
            assert difference(got.logits, expected.logits) < 2**-8, options  # of bfloat16: caches differ in length
    assert torch.equal(got.tokens, before.tokens)
    del kept, options
    gc.collect()
    assert not graphs._caches, "graphs go with their caches"
