"""What transformers calls a checkpoint's tensors in the model: its own renamings of keys."""

from __future__ import annotations

from torch import nn


class Renamings:
    """The renamings that transformers makes when it loads a model; none for a module that it does not load."""

    def __init__(self, model: nn.Module | None) -> None:
        from transformers import PreTrainedModel

        self._model = model if isinstance(model, PreTrainedModel) else None
        if self._model is None:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self._model)
        self._renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
        self._state = dict(self._model.state_dict())

    def name(self, key: str) -> tuple[str, bool]:
        """Name in the model of a checkpoint's key, and whether transformers does not only rename the tensor."""
        if self._model is None:
            return key, False
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            return key, False  # as transformers does: some renamings also match the model's own names
        return name, pattern is not None
