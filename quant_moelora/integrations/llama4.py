"""Llama 4: a block that routes to experts which want the tokens and their routing.

The family's block (transformers' modeling_llama4.py, the same in 5.17 and 5.23) repeats the tokens for every expert,
scales them by the router's weights, which are 0 where an expert is not chosen, and lets the experts compute all of
them. Here the tokens stay as they are: the weights go to the experts, whose info says that they belong to the input
(`MoEQuantInfo.router_weight`).
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from quant_moelora.core.errors import UnsupportedError


class RoutedLlama4Moe(Llama4TextMoe):
    """Stands where a `Llama4TextMoe` stood, with its modules; a subclass, so that router logits are recorded as before.

    Args:
        block: the family's block, with experts that take (hidden_states, top_k_index, top_k_weights).
    """

    def __init__(self, block: Llama4TextMoe) -> None:
        nn.Module.__init__(self)  # the family's would make parameters
        self.top_k = block.top_k
        self.hidden_dim = block.hidden_dim
        self.num_experts = block.num_experts
        self.experts = block.experts
        self.router = block.router
        self.shared_expert = block.shared_expert

    def forward(
        self,
        hidden_states: Tensor,  # (batch, sequence, H)
    ) -> tuple[Tensor, Tensor]:  # (batch * sequence, H), (batch * sequence, E)
        """Sum of the shared expert and the chosen ones, and the router's logits."""
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)
        weights, chosen = scores.topk(self.top_k, dim=1)  # no other expert has a weight
        return self.shared_expert(tokens) + self.experts(tokens, chosen, weights), logits


def route_in_block(model: PreTrainedModel, name: str) -> None:
    """Replace the block ``name``, whose experts have been replaced by ones that take the routing.

    Raises:
        UnsupportedError: it is not Llama 4's.
    """
    block = model.get_submodule(name)
    if type(block) is not Llama4TextMoe:
        raise UnsupportedError(
            f"block {name} ({type(block).__name__})",
            got="experts without routing, for whose input the block cares in its own way",
            rule="the block of Llama 4, or experts that get the router's choice",
            remedy="this family is not served",
        )
    model.set_submodule(name, RoutedLlama4Moe(block))
