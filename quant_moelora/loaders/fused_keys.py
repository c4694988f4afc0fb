"""Fused tensors of a checkpoint, in which one tensor holds something of every expert.

The experts module's own parameters, unquantised and under transformers' names for them: ``experts.gate_up_proj``
[E, 2I, H] and ``gate_up_proj_bias`` [E, 2I]. Or what a format has in their place, stacked over the experts, so that an
expert's slice is that of a linear layer of N = 2I: ``experts.gate_up_proj.qweight`` [E, H/8, 2I], as any codec's
suffixes, and ``experts.gate_up_proj_packed`` [E, 2I, H/8], ``_scale``, ``_zero_point``, compressed-tensors' names for
them in llm-compressor's repack_moe, which are the codec's without ``weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quant_moelora.core.errors import FormatError, UnsupportedError
from quant_moelora.loaders.checkpoint import Checkpoint, Part, TensorHeader
from quant_moelora.loaders.expert_keys import ExpertKeys, LayerKeys, parse_expert_module
from quant_moelora.loaders.families import PARAMETERS, ExpertsSpec
from quant_moelora.loaders.names import model_names
from quant_moelora.loaders.unserved import refuse_unserved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Suffixes of a plain parameter, which stands in the model's own axes and order.
_PLAIN = {"weight", "bias"}


def fused_keys(checkpoint: Checkpoint, specs: list[ExpertsSpec], model: PreTrainedModel) -> dict[int, LayerKeys]:
    """What every expert has in the fused tensors of the layers, by layer.

    Args:
        checkpoint: the checkpoint.
        specs: the layers.
        model: their model: transformers may have other names for its parameters in checkpoints.

    Raises:
        FormatError: two tensors for one parameter.
        UnsupportedError: tensors that transformers converts into the parameters, or whose order of rows is not known.
    """
    found = _by_parameter(checkpoint, {f"{spec.module}.{name}" for spec in specs for name in PARAMETERS}, model)
    layers: dict[int, LayerKeys] = {}
    for spec in specs:
        layer = layers.setdefault(spec.layer, {})
        for name, stored in PARAMETERS.items():
            parameter = f"{spec.module}.{name}"
            held = found.get(parameter, {})
            if stored == "gate_up" and spec.interleaved:
                _check_order(parameter, held)
            transposed = spec.transposed and held.keys() <= _PLAIN
            for expert in range(max((h.shape[0] for h in held.values() if len(h.shape) == 3), default=0)):
                headers = {
                    suffix: whole.at(Part(expert, transposed and suffix == "weight"))
                    for suffix, whole in held.items()
                    if whole.shape and expert < whole.shape[0]
                }
                layer[expert, stored] = ExpertKeys(parameter, headers)
    return layers


def _check_order(parameter: str, held: dict[str, TensorHeader]) -> None:
    """Raise UnsupportedError for a quantised gate_up_proj of a model that has gate and up by turns.

    Tools that quantise gate and up each by itself would put one after the other; no file says which it is.
    """
    if held.keys() - _PLAIN:
        refuse_unserved(parameter, held.values())
        raise UnsupportedError(
            f"gate and up of {parameter}",
            got=f"fused quantised tensors: {', '.join(sorted(held))}",
            rule="one set of tensors for each expert's gate_proj and up_proj: this model has the rows of gate and up "
            "by turns, and nothing says whether a fused quantised tensor has them so too",
            remedy="quantise the model with llm-compressor, which writes one set for each expert and projection",
        )


def _by_parameter(
    checkpoint: Checkpoint, parameters: set[str], model: PreTrainedModel
) -> dict[str, dict[str, TensorHeader]]:
    """Headers by parameter and suffix; a tensor that is the parameter itself has the suffix ``weight``.

    Tensors with three dimensions say which stems mean a parameter; those with fewer, such as scales of a whole weight,
    follow.
    """
    names = _Names(model, parameters)
    stems: dict[str, str] = {}  # as the checkpoint spells it -> parameter
    for key, header in checkpoint.headers.items():
        if len(header.shape) == 3:
            stems |= {stem: name for stem, _ in _splits(key) if (name := names.parameter(stem))}
    found: dict[str, dict[str, TensorHeader]] = {}
    for key, header in checkpoint.headers.items() if stems else ():
        for stem, suffix in _splits(key):
            if stem not in stems:
                continue
            held = found.setdefault(stems[stem], {})
            if suffix in held:
                raise FormatError(
                    stems[stem],
                    got=f"{held[suffix].where} and {header.where}",
                    rule=f"one {suffix}",
                    remedy="remove one of the two from the checkpoint",
                )
            held[suffix] = header
    return found


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Ways to read a key as that of a parameter and a suffix, among them the right one if there is one."""
    yield key, "weight"
    module, _, suffix = key.rpartition(".")
    if parse_expert_module(module):
        return
    yield module, suffix
    if suffix != "weight":
        yield f"{module}.weight", suffix  # transformers may call the weight of a linear layer a parameter
    for name in PARAMETERS:
        if suffix.startswith(f"{name}_"):
            rest = suffix.removeprefix(f"{name}_")
            yield f"{module}.{name}", rest if rest in _PLAIN else f"weight_{rest}"


class _Names:
    """Which tensors of a checkpoint are parameters of a model, by transformers' own renamings."""

    def __init__(self, model: PreTrainedModel, parameters: set[str]) -> None:
        self._name_of = model_names(model)
        self._parameters = parameters

    def parameter(self, key: str) -> str | None:
        """The parameter that a tensor called ``key`` is; None if it is none of those that are looked for.

        Raises:
            UnsupportedError: transformers would convert it into the parameter.
        """
        name, converted = self._name_of(key)
        if name in self._parameters and converted:
            raise UnsupportedError(
                key,
                got=f"a tensor that transformers converts into {name}",
                rule="the parameter itself, under its own or another name, or one tensor an expert and projection",
                remedy="this layout is not served; split the tensor by expert and projection",
            )
        return name if name in self._parameters else None
