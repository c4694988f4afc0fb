"""grouped_query: transformers' sdpa attention that does not repeat keys and values for the heads that share them.

With a mask, as a static cache needs one, transformers repeats them before the product, which for one new token a row
reads and writes many times the cache. There the query heads of a group stand as so many queries of one head instead.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_QUERY = "grouped_query"  # the name for ``attn_implementation``


def grouped_query_attention(
    module: nn.Module,
    query: Tensor,  # (B, heads, S, d)
    key: Tensor,  # (B, kv_heads, T, d)
    value: Tensor,  # (B, kv_heads, T, dv)
    attention_mask: Tensor | None,  # (B, 1, S, T), True where a query sees a key, or what is added to its score
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (B, S, heads, dv)
    """Attention of one token a row to shared keys; anything else is transformers' own sdpa."""
    batch, heads, length, _ = query.shape
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if length != 1 or heads == key.shape[1] or not shared or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


def register_attention() -> None:
    """Let ``attn_implementation`` name it."""
    AttentionInterface.register(GROUPED_QUERY, grouped_query_attention)
    AttentionMaskInterface.register(GROUPED_QUERY, sdpa_mask)
