"""continuous_batching: requests that come and go in packed batches, each against itself alone in `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import quant_moelora as qm
from quant_moelora.core.errors import AdapterError, UnsupportedError
from quant_moelora.integrations.continuous import AdapterRequests, continuous_batching
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import attention_lora, fused_lora, linear_lora, write_adapter
from tests.integrations.models import FUSED, GPTQ, QWEN, finest, generate, load, random_ids

NEW = 5
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
# Room for few tokens, so that prompts are cut and requests wait for others to end.
SMALL: dict[str, Any] = {"num_blocks": 24, "max_batch_tokens": 12}
NAMES = ["a", BASE_NAME, "b", "a", "b", BASE_NAME]
PROMPT = random_ids(1, 9)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Any:
    """Adapters of experts, a router and attention."""
    root = tmp_path_factory.mktemp("adapters")
    folders: dict[str, Path] = {}
    for seed, name in enumerate("ab"):
        tensors = fused_lora(QWEN, seed=seed) | attention_lora({"q_proj": (128, 128), "v_proj": (64, 128)}, seed=seed)
        tensors |= linear_lora("model.layers.0.mlp.gate", 8, 128, seed=40 + seed)
        folders[name] = write_adapter(root / name, tensors, target_parameters=[*FUSED, "mlp.gate.weight"])
    loaded = load(GPTQ, device_map=device.type, dtype=finest(device))
    qm.attach_adapters(loaded, folders)
    return loaded


def finished(requests: AdapterRequests, ids: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of finished requests."""
    tokens: dict[str, list[int]] = {}
    while len(tokens) < len(ids):
        result = requests.manager.get_result(timeout=60)
        assert result is not None and result.error is None, result
        tokens[result.request_id] = result.generated_tokens
    return tokens


def test_every_request_is_as_alone(model: Any) -> None:
    """All have one prompt, so that a shared prefix or another's adapter would show."""
    alone = {name: generate(model, [PROMPT], [name], NEW).tokens[0].tolist() for name in NAMES}
    assert len({tuple(tokens) for tokens in alone.values()}) == 3, "adapters differ"
    mixed: list[tuple[int, int]] = []
    with continuous_batching(model, GREEDY, ContinuousBatchingConfig(**SMALL)) as requests:

        def watch(_: Any, __: Any, kwargs: Any) -> None:
            rows = kwargs["adapter_names"]
            mixed.append((len({*rows.names}), max(rows.lengths)))

        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        ids = [requests.add_request(PROMPT.tolist(), name) for name in NAMES]
        tokens = finished(requests, ids)
        hook.remove()
    assert {request: alone[name] for request, name in zip(ids, NAMES, strict=True)} == tokens
    assert any(names > 1 and longest > 1 for names, longest in mixed), "prompts and steps of others in one batch"
    assert torch.equal(generate(model, [PROMPT], ["a"], NEW).tokens[0], torch.tensor(alone["a"])), "the hook has gone"


def test_unknown_names_leave_the_others_alone(model: Any) -> None:
    with continuous_batching(model, GREEDY, ContinuousBatchingConfig(**SMALL)) as requests:
        with pytest.raises(AdapterError, match=r"unknown c.*__base__ or attached ones: a, b"):
            requests.add_request([3, 4], "c")
        ids = [requests.add_request([3, 4], "a")]
        assert len(finished(requests, ids)[ids[0]]) == NEW
    with pytest.raises(UnsupportedError, match="takes no more requests"):
        requests.add_request([3, 4], "a")


def test_an_adapter_of_the_head_is_refused(tmp_path: Path) -> None:
    """transformers computes logits of last tokens only, which do not say whose they are."""
    model = load(GPTQ)
    qm.attach_adapters(model, {"head": write_adapter(tmp_path / "head", linear_lora("lm_head", 256, 128))})
    with pytest.raises(UnsupportedError, match="head on the output embeddings"), continuous_batching(model):
        pass
    qm.detach_adapters(model, ["head"])
    with continuous_batching(model, GREEDY, ContinuousBatchingConfig(**SMALL)) as requests:
        assert len(finished(requests, [requests.add_request([3, 4])])) == 1


@pytest.mark.parametrize(
    ("generation", "config", "match"),
    [
        ({}, {"use_cuda_graph": (False, True)}, "got use_cuda_graph"),
        ({}, {"use_async_batching": True}, "got use_async_batching"),
        ({}, {"decode_compile_config": CompileConfig()}, "got decode_compile_config"),
        ({"num_return_sequences": 2, "do_sample": True}, {}, "got num_return_sequences"),
    ],
)
def test_what_names_could_not_follow_is_refused(
    model: Any, generation: dict[str, Any], config: dict[str, Any], match: str
) -> None:
    context = continuous_batching(model, GenerationConfig(**generation), ContinuousBatchingConfig(**config))
    with pytest.raises(UnsupportedError, match=match), context:
        pass
