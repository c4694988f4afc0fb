"""Errors of the library, which say what is wrong, what was got, the rule it breaks and the remedy; and its warning."""

from __future__ import annotations


class QuantMoELoRAError(ValueError):
    """Base of all errors a caller can cause.

    The message is composed of four parts, so that none can be forgotten:
    ``{what}: got {got}, expected {rule}; {remedy}``.
    """

    def __init__(self, what: str, *, got: object, rule: str, remedy: str) -> None:
        super().__init__(f"{what}: got {got}, expected {rule}; {remedy}")
        self.what = what
        self.got = got
        self.rule = rule
        self.remedy = remedy


class ShapeError(QuantMoELoRAError):
    """A tensor's shape, dtype or device contradicts the logical dimensions it is declared with."""


class FormatError(QuantMoELoRAError):
    """A checkpoint's files contradict each other, their config or the format they claim."""


class MissingTensorError(FormatError):
    """A tensor that the model needs is not in the checkpoint."""


class UnsupportedError(QuantMoELoRAError):
    """The input is well formed, and the library does not serve it."""


class AdapterError(QuantMoELoRAError):
    """An adapter does not fit the model, or nothing of it applies."""


class BackendError(QuantMoELoRAError):
    """No registered backend, or not the one asked for, can serve the request."""


class DistributedError(QuantMoELoRAError):
    """Processes that share a model disagree, or one of them is gone."""


class PrecisionWarning(UserWarning):
    """A backend computes with values that a cast to its dtype has rounded."""
