"""generate with adapters: each row of a batch against the same request alone, through prefill, decode and beams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import AdapterError
from quant_moelora.integrations.adapters import attach_adapters
from quant_moelora.integrations.session import BASE_NAME
from tests.adapters import expert_lora
from tests.integrations.models import (
    EFFECT,
    GPTQ,
    PROJECTIONS,
    QWEN,
    ROUNDING,
    A,
    B,
    Generated,
    attention_adapter,
    difference,
    generate,
    load,
    logits,
    random_ids,
)

NEW = 6
NAMES = ["b", BASE_NAME, "attention", "a", BASE_NAME]


@dataclass(frozen=True)
class Served:
    """A model with adapters, and what it generated for the requests before they were attached."""

    model: Any
    requests: list[Tensor]  # of different lengths
    before: list[Generated]  # each alone


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mixed = attention_adapter(
        tmp_path_factory.mktemp("adapters") / "attention", more=expert_lora(QWEN, PROJECTIONS, layers=[1])
    )
    return {"a": A, "attention": mixed, "b": B}


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path]) -> Served:
    model = load(GPTQ)
    requests = [random_ids(1, length, seed=length)[0] for length in (3, 8, 5, 8, 1)]
    before = [generate(model, [request], new=NEW) for request in requests]
    attach_adapters(model, adapters)
    return Served(model, requests, before)


def alone(served: Served, row: int, name: str, **kwargs: Any) -> Generated:
    return generate(served.model, [served.requests[row]], [name], NEW, **kwargs)


def test_rows_of_other_lengths_and_adapters_are_the_requests_alone(served: Served) -> None:
    """Rows are padded on the left; alone they are not."""
    mixed = generate(served.model, served.requests, NAMES, NEW)
    for row, name in enumerate(NAMES):
        expected = alone(served, row, name)
        assert torch.equal(mixed.tokens[row], expected.tokens[0]), row
        assert difference(mixed.logits[row], expected.logits[0]) < ROUNDING, row
        if name == BASE_NAME:
            assert torch.equal(expected.tokens, served.before[row].tokens)
        else:
            assert difference(mixed.logits[row, 0], served.before[row].logits[0, 0]) > EFFECT, "the prefill's adapter"


def test_prefill_and_decode_use_the_same_adapter(served: Served) -> None:
    """Logits of every step against one forward over the finished sequence, with the same names."""
    prompts = random_ids(5, 7)
    made = generate(served.model, list(prompts), NAMES, NEW)
    whole = logits(served.model, torch.cat((prompts, made.tokens), dim=1), NAMES)[:, 6:-1]
    for row in range(5):
        assert difference(made.logits[row], whole[row]) < ROUNDING, row
    without = generate(served.model, list(prompts), None, NEW)
    assert difference(without.logits[0, -1], made.logits[0, -1]) > EFFECT


def test_names_in_another_order_give_other_results(served: Served) -> None:
    prompts = [served.requests[1]] * 5
    names = NAMES[1:] + NAMES[:1]
    one, two = generate(served.model, prompts, NAMES, NEW), generate(served.model, prompts, names, NEW)
    for row, name in enumerate(NAMES):
        other = names.index(name)
        assert difference(two.logits[other, 0], one.logits[row, 0]) < ROUNDING
        assert difference(two.logits[row, 0], one.logits[row, 0]) > EFFECT


def test_rows_without_an_adapter_are_bitwise_those_of_the_model_without_adapters(
    served: Served, adapters: dict[str, Path]
) -> None:
    fresh = load(GPTQ)
    for rows in ([1], [0, 1, 2, 3, 4]):
        requests = [served.requests[row] for row in rows]
        expected = generate(fresh, requests, None, NEW)
        for names in (None, [BASE_NAME] * len(rows)):
            got = generate(served.model, requests, names, NEW)
            assert torch.equal(got.logits, expected.logits) and torch.equal(got.tokens, expected.tokens)
    mixed, expected = generate(served.model, served.requests, NAMES, NEW), generate(fresh, served.requests, None, NEW)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed.logits[row], expected.logits[row]) == (name == BASE_NAME), row


@pytest.mark.parametrize("beams", [2, 3])
def test_beams(served: Served, beams: int) -> None:
    """Beams of one request lie side by side, so that a name serves as many rows in a row."""
    mixed = beam_search(served.model, served.requests, NAMES, beams)
    for row, name in enumerate(NAMES):
        expected = beam_search(served.model, served.requests[row : row + 1], [name], beams)
        assert torch.equal(mixed[0][row], expected[0][0]), row
        torch.testing.assert_close(mixed[1][row], expected[1][0], rtol=1e-5, atol=1e-5)
    plain = beam_search(served.model, served.requests, None, beams)
    changed = [row for row in range(5) if abs(float(plain[1][row] - mixed[1][row])) > 1e-4]
    assert changed == [row for row, name in enumerate(NAMES) if name != BASE_NAME]


def beam_search(
    model: Any, requests: list[Tensor], names: list[str] | None, beams: int, returned: int = 1
) -> tuple[Tensor, Tensor]:
    """New tokens and scores of the best ``returned`` beams of each request."""
    width = max(len(ids) for ids in requests)
    ids = torch.stack([torch.nn.functional.pad(ids, (width - len(ids), 0)) for ids in requests])
    mask = torch.stack([torch.arange(width) >= width - len(ids) for ids in requests]).long()
    chosen = {} if names is None else {"adapter_names": names}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=returned,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **chosen,
    )
    return out.sequences[:, width:], out.sequences_scores


def test_several_sequences_for_each_request(served: Served) -> None:
    tokens, scores = beam_search(served.model, served.requests, NAMES, 3, returned=2)
    for row, name in enumerate(NAMES):
        expected = beam_search(served.model, served.requests[row : row + 1], [name], 3, returned=2)
        assert torch.equal(tokens[2 * row : 2 * row + 2], expected[0]), row
        torch.testing.assert_close(scores[2 * row : 2 * row + 2], expected[1], rtol=1e-5, atol=1e-5)


def test_sampled_sequences_repeat_each_request(served: Served) -> None:
    """Only the candidate of rank 1 can be sampled, so that both sequences of a request are the greedy one."""
    prompts = random_ids(5, 7)
    out = served.model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        adapter_names=NAMES,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    greedy = generate(served.model, list(prompts), NAMES, NEW).tokens
    assert torch.equal(out[:, 7:], greedy.repeat_interleave(2, dim=0))


def test_without_a_cache(served: Served) -> None:
    """Every step then forwards the whole sequence."""
    mixed = generate(served.model, served.requests, NAMES, NEW)
    again = generate(served.model, served.requests, NAMES, NEW, use_cache=False)
    assert torch.equal(again.tokens, mixed.tokens)
    assert difference(again.logits, mixed.logits) < ROUNDING


def test_one_name_serves_the_whole_batch(served: Served) -> None:
    prompts = list(random_ids(4, 7))
    one, four = generate(served.model, prompts, ["a"], NEW), generate(served.model, prompts, ["a"] * 4, NEW)
    assert torch.equal(one.logits, four.logits)


def test_wrong_names_generate_nothing(served: Served) -> None:
    prompts = list(random_ids(3, 7))
    for names, match in ((["a", "nobody", "b"], "unknown nobody"), (["a", "b"], "2 names for 3 rows")):
        with pytest.raises(AdapterError, match=match):
            generate(served.model, prompts, names, NEW)
    assert torch.equal(
        generate(served.model, prompts, None, NEW).logits, generate(load(GPTQ), prompts, None, NEW).logits
    )


def test_each_device_generates_a_mixed_batch(adapters: dict[str, Path], device: torch.device) -> None:
    model = load(GPTQ, device_map=device)
    attach_adapters(model, adapters)
    requests = [random_ids(1, length, seed=length)[0] for length in (3, 8, 5, 8, 1)]
    mixed = generate(model, requests, NAMES, NEW)
    for row, name in enumerate(NAMES):
        expected = generate(model, [requests[row]], [name], NEW)
        assert torch.equal(mixed.tokens[row], expected.tokens[0]), row
        assert difference(mixed.logits[row], expected.logits[0]) < ROUNDING, row
