"""grouped_query: the same attention as transformers' sdpa, in another order of sums."""

from __future__ import annotations

import torch

from quant_moelora.integrations.attention import GROUPED_QUERY, grouped_query_attention
from tests.integrations.models import EFFECT, GPTQ, ROUNDING, difference, generate, load, random_ids


def test_generate_as_with_sdpa() -> None:
    """Rows of other lengths, so that masks differ; two query heads share a head of keys."""
    model = load(GPTQ)
    config = model.config
    assert config.num_attention_heads > config.num_key_value_heads
    prompts = [random_ids(1, length, seed=length)[0] for length in (3, 7)]
    expected = generate(model, prompts, new=4, cache_implementation="static", disable_compile=True)
    model.set_attn_implementation(GROUPED_QUERY)
    got = generate(model, prompts, new=4, cache_implementation="static", disable_compile=True)
    assert torch.equal(got.tokens, expected.tokens)
    assert difference(got.logits, expected.logits) < ROUNDING


def test_one_token_of_grouped_heads() -> None:
    """Against each query head with its own copy of keys and values, in float64."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    got, _ = grouped_query_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.2)
    k, v = (t.double().repeat_interleave(2, dim=1) for t in (key, value))
    scores = (query.double() @ k.mT * 0.2).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert got.shape == expected.shape
    assert difference(got, expected) < 2**-24 * 16  # two products of at most 16 terms, and a softmax
    unmasked, _ = grouped_query_attention(torch.nn.Identity(), query, key, value, None, scaling=0.2)
    assert difference(unmasked, expected) > EFFECT
