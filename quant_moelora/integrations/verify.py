"""verify: what a checkpoint's experts hold, and whether the packed model computes what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quant_moelora.core.errors import FormatError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.weights import ExpertWeight, PackedWeight
from quant_moelora.experts.registry import AUTO, select_backend
from quant_moelora.integrations.parity import dense_twin, random_ids, relative_rms
from quant_moelora.integrations.transformers import from_pretrained
from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import Projection, build_skeleton, find_experts
from quant_moelora.loaders.layer_format import LayerFormat, describe_layers

# Relative RMS of the logits; two float32 evaluations of one model differ by less than 1e-5.
PARITY_BOUND = 1e-4


@dataclass(frozen=True)
class ProjectionReport:
    """One projection of all experts of a layer.

    Attributes:
        layer: number of the layer.
        projection: gate, up or down.
        scheme: its scheme, ``none`` if it is not quantised.
        minimum: smallest weight, dequantised.
        maximum: largest weight.
        rms: root mean square of the weights.
        zero_scales: share of the scales that are 0; None if it is not quantised.
        end_codes: share of the codes that are the least or the greatest of their range; None if it is not quantised.
        relative_error: root mean square of the difference to the dense weights over that of the dense weights; None
            without a dense checkpoint.
    """

    layer: int
    projection: Projection
    scheme: str
    minimum: float
    maximum: float
    rms: float
    zero_scales: float | None
    end_codes: float | None
    relative_error: float | None


@dataclass(frozen=True)
class LayerBackend:
    """Backend that serves a layer in the model's dtype, and what its casts lose, in words (None: nothing)."""

    layer: int
    backend: str
    lossy: str | None


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        path: the checkpoint's folder.
        model_type: as transformers calls it.
        dtype: the model's own, in which the backends were asked.
        against: folder of the dense checkpoint, or None.
        projections: layer by layer.
        backends: layer by layer.
        parity: relative RMS of the packed model's logits to those of the dequantised model in plain transformers.
        parity_bound: what parity has to stay below.
    """

    path: str
    model_type: str
    dtype: str
    against: str | None
    projections: list[ProjectionReport]
    backends: list[LayerBackend]
    parity: float
    parity_bound: float = PARITY_BOUND

    @property
    def ok(self) -> bool:
        """Whether the logits agree (a NaN does not); everything else that could be wrong raised."""
        return self.parity < self.parity_bound


def verify(path: str | Path, against: str | Path | None = None) -> Verification:
    """Read, pack and dequantise every layer's experts, one layer at a time, then compare logits in float32.

    The logits are those of random tokens, on the CPU; for them the model and its dequantised float32 twin are held in
    memory together.

    Args:
        path: folder of a checkpoint, or a repository of the hub.
        against: the same for the model that the checkpoint was quantised from.

    Raises:
        FormatError: a tensor is missing, misshapen or not finite, or the dense checkpoint is of another model.
        UnsupportedError: a format or model family that is not served.
        BackendError: no backend serves the model.
    """
    checkpoint = Checkpoint(resolve_checkpoint(path))
    skeleton = build_skeleton(checkpoint)
    layers = describe_layers(checkpoint, find_experts(skeleton), skeleton)
    dense = None if against is None else Checkpoint(resolve_checkpoint(against))
    dense_layers = {} if dense is None else _dense_layers(dense, layers)
    projections: list[ProjectionReport] = []
    backends: list[LayerBackend] = []
    for layer in tqdm(layers, desc="Dequantising experts", unit="layer", disable=None):
        info = load_layer(checkpoint, layer, "cpu")
        number = layer.spec.layer
        expected = None if dense is None else _dequantized(load_layer(dense, dense_layers[number], "cpu"))
        projections += _report(layer, info, expected)
        backend = select_backend(AUTO, info, info.device, skeleton.dtype).backend
        backends.append(LayerBackend(number, backend.name, backend.prepare(info, skeleton.dtype).lossy))
    model = from_pretrained(checkpoint.path, dtype=torch.float32)
    return Verification(
        path=str(checkpoint.path),
        model_type=skeleton.config.model_type,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        against=None if dense is None else str(dense.path),
        projections=projections,
        backends=backends,
        parity=relative_rms(model, dense_twin(model), random_ids(model)),
    )


def _dense_layers(dense: Checkpoint, layers: list[LayerFormat]) -> dict[int, LayerFormat]:
    """The layers of the dense checkpoint, by number.

    Raises:
        FormatError: its experts are quantised or of other dimensions.
    """
    skeleton = build_skeleton(dense)
    found = {layer.spec.layer: layer for layer in describe_layers(dense, find_experts(skeleton), skeleton)}
    ours = {layer.spec.layer: layer.spec for layer in layers}
    theirs = {number: layer.spec for number, layer in found.items()}
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) == theirs.get(number):
            continue
        raise FormatError(
            f"dense checkpoint {dense.path}, layer {number}",
            got=theirs.get(number, "no routed experts"),
            rule=f"{ours.get(number, 'no routed experts')}, as in the quantised checkpoint",
            remedy="name the model that the checkpoint was quantised from",
        )
    for number, layer in found.items():
        for stored in (*layer.w13, "down"):
            for fmt in layer.formats(stored):
                if fmt.scheme is None:
                    continue
                raise FormatError(
                    f"dense checkpoint {dense.path}",
                    got=f"{stored} of the experts of layer {number} in {fmt}",
                    rule="experts that are not quantised",
                    remedy="name the model that the checkpoint was quantised from",
                )
    return found


def _dequantized(info: MoEQuantInfo) -> dict[Projection, Tensor]:
    """Float32 weights [E, N, K] by projection."""
    gate, up, down = info.dequantize()
    return {"up": up, "down": down} if gate is None else {"gate": gate, "up": up, "down": down}


def _report(
    layer: LayerFormat, info: MoEQuantInfo, expected: Mapping[Projection, Tensor] | None
) -> list[ProjectionReport]:
    """Reports of a layer's projections, with the error to the ``expected`` weights if there are any."""
    stored: dict[Projection, tuple[ExpertWeight, int]] = {
        "gate": (info.w13, 0),
        "up": (info.w13, info.w13.halves - 1),
        "down": (info.w2, 0),
    }
    reports: list[ProjectionReport] = []
    for projection, weight in _dequantized(info).items():
        low, high = (float(value) for value in weight.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):  # a NaN is both
            raise FormatError(
                f"{projection} weights of {layer.spec.module}",
                got=f"values from {low} to {high} when dequantised to float32",
                rule="finite values",
                remedy="the checkpoint is damaged, or the quantisation failed: download or quantise again",
            )
        zero_scales, end_codes = _shares(*stored[projection])
        error = None if expected is None else float(_norm(weight - expected[projection]) / _norm(expected[projection]))
        rms = float(_norm(weight)) / weight.numel() ** 0.5
        name = stored[projection][0].scheme_name
        reports.append(
            ProjectionReport(layer.spec.layer, projection, name, low, high, rms, zero_scales, end_codes, error)
        )
    return reports


def _norm(weight: Tensor) -> Tensor:  # any shape
    return torch.linalg.vector_norm(weight, dtype=torch.float64)


def _shares(weight: ExpertWeight, half: int) -> tuple[float | None, float | None]:
    """Shares of zero scales and of codes at the ends of their range in one half; None if it is not quantised."""
    if not isinstance(weight, PackedWeight):
        return None, None
    codes, scales = (values[:, half] for values in weight.codes_and_scales())
    ends = (codes == 0) | (codes == 2**weight.scheme.bits - 1)
    return _share(scales == 0), _share(ends)


def _share(flags: Tensor) -> float:  # bool, any shape
    return int(flags.sum()) / flags.numel()
