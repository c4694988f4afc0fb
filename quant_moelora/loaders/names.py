"""What a model calls the tensors of a checkpoint: transformers' own renamings, in its order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_names(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """A function from a tensor's key in a checkpoint to its name in the model, and whether a converter changes it.

    Among the renamings is the prefix of a multimodal checkpoint whose language model is the whole of ``model``. A key
    that transformers does not know is its own name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    state = dict(model.state_dict())

    def name_of(key: str) -> tuple[str, bool]:
        """The model's name of a tensor, and whether tensors have to be converted for it."""
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as transformers does: some renamings also match the model's own names
            return key, False
        return name, pattern is not None

    return name_of
