"""verify: figures written out from the checkpoint's own tensors, and everything that has to make it fail."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_moelora.core.backend import Prepared
from quant_moelora.core.errors import FormatError, MissingTensorError
from quant_moelora.experts.cpu import CpuBackend
from quant_moelora.integrations import verify as module
from quant_moelora.integrations.verify import PARITY_BOUND, verify
from quant_moelora.loaders.experts import load_experts
from tests.adapters import Tensors
from tests.integrations.models import CHECKPOINTS, GPTQ, QUANTIZED, ROUNDING, copy_checkpoint, folder_of, without

QWEN_BASE, MIXTRAL_BASE = "base-qwen3moe-h128-i96", "base-mixtral-h128-i128"
CT_QWEN, CT_MIXTRAL = "ct-qwen3moe-w4a16-g32-asym-rtn", "ct-mixtral-w4a16-g128-sym-rtn"
UP = "model.layers.1.mlp.experts.6.up_proj"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_passes(name: str) -> None:
    found = verify(folder_of(name))
    assert found.ok and found.parity < ROUNDING
    layers = sorted({report.layer for report in found.projections})
    assert [(report.layer, report.projection) for report in found.projections] == [
        (layer, projection) for layer in layers for projection in ("gate", "up", "down")
    ]
    assert [(layer.layer, layer.backend, layer.lossy) for layer in found.backends] == [
        (layer, "cpu" if name in QUANTIZED else "reference", None) for layer in layers
    ]
    for report in found.projections:
        info = load_experts(folder_of(name), report.layer)
        weight = dict(zip(("gate", "up", "down"), info.dequantize(), strict=True))[report.projection]
        assert weight is not None
        assert (report.minimum, report.maximum) == (float(weight.min()), float(weight.max()))
        assert report.rms == pytest.approx(float(weight.double().square().mean().sqrt()), rel=1e-12)
        assert (report.zero_scales is None) == (report.end_codes is None) == (name not in QUANTIZED)
        assert report.relative_error is None


def test_shares_are_those_of_the_tools_tensors() -> None:
    """Of compressed-tensors' own codes: int4 in int32 words, 8 a word, row by row; 96 rows are padded to 128."""
    tensors = load_file(folder_of(CT_QWEN) / "model.safetensors")
    for report in verify(folder_of(CT_QWEN)).projections:
        prefix = f"model.layers.{report.layer}.mlp.experts."
        held = [
            tensors[f"{prefix}{expert}.{report.projection}_proj.weight_packed"].to(torch.int64) for expert in range(8)
        ]
        codes = torch.stack([torch.stack([words >> shift & 15 for shift in range(0, 32, 4)]) for words in held])
        assert codes.numel() == 8 * 96 * 128
        assert report.end_codes == int(((codes == 0) | (codes == 15)).sum()) / codes.numel()
        assert report.zero_scales == 0


def test_act_order_and_zero_scales(tmp_path: Path) -> None:
    """Columns and rows are stored in another order; the shares do not see it, and one row of one expert does."""

    def edit(tensors: Tensors) -> Tensors:
        scales = tensors["model.layers.1.mlp.experts.2.gate_proj.scales"]  # [G, N]
        scales[:, 5] = 0
        return tensors

    before = verify(folder_of("gptq-mixtral-int4-g32-descact"))
    after = verify(copy_checkpoint("gptq-mixtral-int4-g32-descact", tmp_path / "m", tensors=edit))
    assert after.ok
    for old, new in zip(before.projections, after.projections, strict=True):
        hit = (new.layer, new.projection) == (1, "gate")
        assert old.zero_scales == 0
        assert new.zero_scales == (pytest.approx(1 / (5 * 192)) if hit else 0)  # 5 experts of 192 rows
        assert new.end_codes == old.end_codes
        assert (new.rms < old.rms) if hit else (new.rms == old.rms)


@pytest.mark.parametrize(
    ("name", "base", "names"),
    [
        (CT_QWEN, QWEN_BASE, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
        (CT_MIXTRAL, MIXTRAL_BASE, {"gate": "w1", "up": "w3", "down": "w2"}),
    ],
)
def test_against_its_base(name: str, base: str, names: dict[str, str]) -> None:
    found = verify(folder_of(name), folder_of(base))
    assert found.ok and found.against == str(folder_of(base))
    tensors = load_file(folder_of(base) / "model.safetensors")
    for report in found.projections:
        info = load_experts(folder_of(name), report.layer)
        got = dict(zip(("gate", "up", "down"), info.dequantize(), strict=True))[report.projection]
        assert got is not None
        ending = re.compile(rf".*layers\.{report.layer}\..*experts\.(\d+)\.{names[report.projection]}\.weight")
        dense = {int(match[1]): value for key, value in tensors.items() if (match := ending.fullmatch(key))}
        assert sorted(dense) == list(range(len(got)))
        error = sum(float((got[e] - value.float()).double().square().sum()) for e, value in dense.items())
        power = sum(float(value.double().square().sum()) for value in dense.values())
        assert report.relative_error == pytest.approx((error / power) ** 0.5, rel=1e-9)
        if name == CT_QWEN:
            assert report.relative_error is not None
            # Rounding to steps of s errs by s / sqrt(12); 32 normal values span some 4.1 sigma, which 15 steps cut into
            # 0.27 sigma: 0.08, and more in the groups that hold one of the weights' outliers.
            assert 0.07 < report.relative_error < 0.12


def test_against_itself_and_twice_itself(tmp_path: Path) -> None:
    def double(tensors: Tensors) -> Tensors:
        return {key: 2 * value if ".experts." in key else value for key, value in tensors.items()}

    base = folder_of(QWEN_BASE)
    assert {report.relative_error for report in verify(base, base).projections} == {0.0}
    doubled = copy_checkpoint(QWEN_BASE, tmp_path / "m", tensors=double)
    assert {report.relative_error for report in verify(base, doubled).projections} == {0.5}


def test_against_another_model() -> None:
    with pytest.raises(FormatError, match=r"layer 0: got .*mlp.experts.*intermediate_size=128.*intermediate_size=96"):
        verify(folder_of(CT_QWEN), folder_of(MIXTRAL_BASE))
    with pytest.raises(FormatError, match="w4a16_g32_asym, expected experts that are not quantised"):
        verify(folder_of(CT_QWEN), folder_of(CT_QWEN))


def test_scales_that_are_not_numbers(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        tensors[f"{UP}.scales"][0, 3] = float("nan")
        return tensors

    with pytest.raises(FormatError, match=rf"scales of {UP}"):
        verify(copy_checkpoint(GPTQ, tmp_path / "m", tensors=edit))


def test_values_beyond_float32(tmp_path: Path) -> None:
    """A bfloat16 scale may be finite while code times scale is not."""

    def edit(tensors: Tensors) -> Tensors:
        scales = tensors[f"{UP}.weight_scale"]
        assert scales.dtype == torch.bfloat16
        scales[0] = torch.finfo(torch.bfloat16).max
        return tensors

    with pytest.raises(FormatError, match=r"up weights of model.layers.1.mlp.experts: got values from .*inf"):
        verify(copy_checkpoint(CT_QWEN, tmp_path / "m", tensors=edit))


def test_a_missing_tensor(tmp_path: Path) -> None:
    edit = without(*(f"{UP}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx")))
    with pytest.raises(MissingTensorError, match="up projection of expert 6 in layer 1"):
        verify(copy_checkpoint(GPTQ, tmp_path / "m", tensors=edit))
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight"):
        verify(copy_checkpoint(GPTQ, tmp_path / "n", tensors=without("model.norm.weight")))


def test_logits_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_twin(model: Any) -> Any:
        twin = twin_of(model)
        with torch.no_grad():
            twin.get_submodule("model.layers.1.mlp.experts").get_parameter("down_proj")[3] *= 1.5
        return twin

    twin_of = module.dense_twin
    monkeypatch.setattr(module, "dense_twin", wrong_twin)
    found = verify(folder_of(GPTQ))
    assert not found.ok and found.parity > PARITY_BOUND
    assert not dataclasses.replace(found, parity=float("nan")).ok


def test_what_the_backend_loses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked in the model's own dtype, and is no failure."""
    asked: list[torch.dtype] = []

    made = CpuBackend.prepare

    def prepare(self: CpuBackend, info: Any, dtype: torch.dtype, tuned_configs: str | None = None) -> Prepared:
        asked.append(dtype)
        return dataclasses.replace(made(self, info, dtype, tuned_configs), lossy="3 scales rounded")

    monkeypatch.setattr(CpuBackend, "prepare", prepare)
    found = verify(folder_of(GPTQ))
    assert found.ok and found.dtype == "bfloat16"
    assert asked[:2] == [torch.bfloat16] * 2
    assert [layer.lossy for layer in found.backends] == ["3 scales rounded"] * 2
