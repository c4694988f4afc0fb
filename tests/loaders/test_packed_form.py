"""The packed form: any layer goes through files bit for bit, and files that contradict themselves are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_moelora.core.activations import Activation
from quant_moelora.core.errors import FormatError, MissingTensorError, QuantMoELoRAError, UnsupportedError
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.shard import ParallelConfig
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.loaders.layer_format import describe_layers
from quant_moelora.loaders.packed_form import METHOD, PackedFormat, facts_of, file_metadata
from tests.builders import layer, same_bits, scheme
from tests.checkpoints import skeleton, write_checkpoint

MODULE = "model.layers.0.mlp.experts"
FILE = "model.safetensors"
CONFIG: dict[str, Any] = {"quant_method": METHOD}
OSS = Activation("swigluoai", alpha=1.702, limit=7.0)
LAYERS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": scheme()},
    "int4, zero points, one group": {"scheme": scheme(4, None, symmetric=False, bf16=True), "hidden": 72, "inter": 40},
    "int8, act-order": {"scheme": scheme(8, 64, symmetric=False), "inter": 96, "act_order": True},
    "short last group": {"scheme": scheme(4, 48, bf16=True), "hidden": 100, "inter": 72, "act_order": True},
    "gpt-oss": {"scheme": scheme(4, 32), "activation": OSS, "bias": True, "act_order": True},
    "Llama 4": {"scheme": scheme(), "router_weight": "input"},
    "without a gate": {"scheme": scheme(8, None), "activation": Activation("relu2", gated=False)},
    "float32": {"scheme": torch.float32, "activation": OSS, "bias": True},
    "bfloat16": {"scheme": torch.bfloat16},
    "float16": {"scheme": torch.float16},
}


def spec_of(info: MoEQuantInfo) -> ExpertsSpec:
    """What a model with these experts would say of them."""
    sizes = (info.num_experts, info.hidden_size, info.intermediate_size)
    biased = info.w13.bias is not None
    return ExpertsSpec(MODULE, 0, *sizes, info.activation, has_bias=biased, router_weight=info.router_weight)


def write(folder: Path, info: MoEQuantInfo, config: dict[str, Any] | None = CONFIG) -> Path:
    """A checkpoint of one layer."""
    write_checkpoint(folder, {"model.norm.weight": torch.zeros(1)}, quantization=config)
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in info.tensors().items()}
    save_file(tensors, folder / FILE, file_metadata({0: facts_of(info)}))
    return folder


def read(folder: Path, spec: ExpertsSpec) -> MoEQuantInfo:
    checkpoint = Checkpoint(folder)
    return load_layer(checkpoint, describe_layers(checkpoint, [spec], skeleton())[0], "cpu")


def said(info: MoEQuantInfo) -> dict[str, Any]:
    """All that is no tensor."""
    held = {f"{n}.{f}": getattr(w, f) for n, w in (("w13", info.w13), ("w2", info.w2)) for f in w.__dataclass_fields__}
    held |= {name: getattr(info, name) for name in info.__dataclass_fields__ if name not in ("w13", "w2")}
    return {name: value for name, value in held.items() if not isinstance(value, Tensor)}


def assert_same(got: MoEQuantInfo, expected: MoEQuantInfo) -> None:
    assert said(got) == said(expected)
    tensors = expected.tensors()
    assert got.tensors().keys() == tensors.keys()
    for name, tensor in got.tensors().items():
        assert tensor.dtype == tensors[name].dtype and same_bits(tensor, tensors[name]), name


@pytest.mark.parametrize("case", LAYERS)
def test_any_layer_is_read_as_it_was(tmp_path: Path, case: str) -> None:
    info = replace(layer(**LAYERS[case]).info, source_order="interleaved")
    write(tmp_path, info)
    checkpoint = Checkpoint(tmp_path)
    (described,) = describe_layers(checkpoint, [spec_of(info)], skeleton())
    assert isinstance(described, PackedFormat)
    meta = described.meta_info()
    assert meta.device.type == "meta" and said(meta) == said(info)
    assert {n: (t.shape, t.dtype) for n, t in meta.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in info.tensors().items()
    }
    assert {header.key for header in described.headers()} == checkpoint.headers.keys()
    assert [str(fmt) for stored in (*described.w13, "down") for fmt in described.formats(stored)] == [
        f"packed {weight.scheme_name}" for weight in (info.w13, info.w2)
    ]
    got = load_layer(checkpoint, described, "cpu")
    assert_same(got, info)
    (tmp_path / FILE).write_bytes(b"\0" * (tmp_path / FILE).stat().st_size)
    assert_same(got, info)  # its own, and not the mapped file


def test_the_header_says_what_the_format_is(tmp_path: Path) -> None:
    """The names and numbers that files have from now on."""
    write(tmp_path, layer(scheme(4, 48, symmetric=False), hidden=100, inter=72, experts=3).info)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    weight: dict[str, Any] = {"num_experts": 3, "layout": "frag64.v1"}
    weight["scheme"] = {"bits": 4, "group_size": 48, "symmetric": False, "scale_dtype": "float16"}
    tensors = ["qweight", "scales", "zeros"]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["quant_moelora"]) == {
        "version": 1,
        "layers": {
            "0": {
                "w13": {**weight, "halves": 2, "n": 72, "n_pad": 192, "k": 100, "k_pad": 192},
                "w2": {**weight, "halves": 1, "n": 100, "n_pad": 128, "k": 72, "k_pad": 192},
                "activation": {"name": "silu", "gated": True, "alpha": None, "limit": None},
                "router_weight": "output",
                "source_order": "separate",
                "tensors": [f"{part}.{name}" for part in ("w13", "w2") for name in tensors],
            }
        },
    }


def test_a_part_of_a_layer_is_not_saved() -> None:
    info = layer(scheme(), experts=4).info.part(ParallelConfig(ep_rank=0, ep_size=2))
    with pytest.raises(UnsupportedError, match="whole layers"):
        facts_of(info)


# --- what must not be read ---------------------------------------------------------------------------------------


@pytest.fixture
def info() -> MoEQuantInfo:
    """Act-order and zero points: every tensor that a layer without biases may have."""
    return layer(scheme(4, 32, symmetric=False), hidden=72, inter=100, act_order=True).info


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Let ``edit`` change the tensors by name, and what the header says; what it returns is written in its place."""
    with safe_open(folder / FILE, "pt") as file:
        held = json.loads(file.metadata()[METHOD])
    tensors = load_file(folder / FILE)
    text = edit(tensors, held) or json.dumps(held)
    save_file(tensors, folder / FILE, {"format": "pt", METHOD: text} if text != "none" else {"format": "pt"})


def refused(folder: Path, info: MoEQuantInfo, error: type[QuantMoELoRAError], match: str) -> None:
    with pytest.raises(QuantMoELoRAError, match=match) as caught:
        read(folder, spec_of(info))
    assert type(caught.value) is error, caught.value


def test_another_version_is_refused(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda _, held: held.update(version=2))
    refused(tmp_path, info, UnsupportedError, r"version of the packed form of model.safetensors: got 2, expected 1")


@pytest.mark.parametrize("weight", ["w13", "w2"])
def test_another_layout_is_refused(tmp_path: Path, info: MoEQuantInfo, weight: str) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda _, held: held["layers"]["0"][weight].update(layout="frag64.v2"))
    refused(tmp_path, info, UnsupportedError, r"layout of .* got frag64.v2, expected frag64.v1; convert the original")


def test_a_layout_of_another_library_version_is_refused(
    tmp_path: Path, info: MoEQuantInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the files of today, when the layout has changed."""
    write(tmp_path, info)
    monkeypatch.setattr("quant_moelora.core.packing.LAYOUT", "frag64.v2")
    refused(tmp_path, info, UnsupportedError, "got frag64.v1, expected frag64.v2")


Edit = Callable[[dict[str, Any]], Any]
CONTRADICTIONS: dict[str, Edit] = {
    "experts": lambda f: f["w13"].update(num_experts=2),
    "one half": lambda f: f["w13"].update(halves=1),
    "rows": lambda f: f["w13"].update(n=99),
    "too many rows": lambda f: f["w13"].update(n=129),
    "padded rows": lambda f: f["w13"].update(n_pad=192),
    "columns": lambda f: f["w13"].update(k=71),
    "padded columns": lambda f: f["w2"].update(k_pad=192),
    "bits": lambda f: f["w13"]["scheme"].update(bits=8),
    "no such bits": lambda f: f["w13"]["scheme"].update(bits=3),
    "groups": lambda f: f["w2"]["scheme"].update(group_size=64),
    "one group": lambda f: f["w2"]["scheme"].update(group_size=None),
    "symmetric": lambda f: f["w13"]["scheme"].update(symmetric=True),
    "scale dtype": lambda f: f["w13"]["scheme"].update(scale_dtype="float32"),
    "no scale dtype": lambda f: f["w13"]["scheme"].update(scale_dtype="half precision"),
    "not quantised": lambda f: f["w13"].pop("scheme"),
    "no layout": lambda f: f["w13"].pop("layout"),
    "no dimension": lambda f: f["w2"].pop("k_pad"),
    "text": lambda f: f["w2"].update(k="100"),
    "activation": lambda f: f["activation"].update(name="gelu"),
    "no activation": lambda f: f["activation"].update(name="swish"),
    "gate": lambda f: f["activation"].update(gated=False),
    "router weight": lambda f: f.update(router_weight="input"),
    "source order": lambda f: f.update(source_order="shuffled"),
    "no weight": lambda f: f.pop("w2"),
    "a list": lambda f: f.update(w2=[]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_facts_that_contradict_the_tensors_or_the_model(tmp_path: Path, info: MoEQuantInfo, case: str) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda _, held: CONTRADICTIONS[case](held["layers"]["0"]) and None)
    with pytest.raises(QuantMoELoRAError, match=r"model\.safetensors") as caught:
        read(tmp_path, spec_of(info))
    assert isinstance(caught.value, FormatError | UnsupportedError)


@pytest.mark.parametrize("change", [{"num_experts": 4}, {"hidden_size": 64}, {"intermediate_size": 96}])
def test_a_model_of_other_dimensions(tmp_path: Path, info: MoEQuantInfo, change: dict[str, int]) -> None:
    write(tmp_path, info)
    with pytest.raises(FormatError, match=rf"expected {next(iter(change.values()))}, as config\.json says"):
        read(tmp_path, replace(spec_of(info), **change))


def test_a_model_with_biases(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    with pytest.raises(FormatError, match="biases"):
        read(tmp_path, replace(spec_of(info), has_bias=True))


NAMES = ("w13.qweight", "w13.scales", "w13.zeros", "w13.k_perm", "w2.qweight", "w2.scales", "w2.zeros", "inter_perm")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor(tmp_path: Path, info: MoEQuantInfo, name: str) -> None:
    """Also one without which the others would be a layer, of another order."""
    assert set(NAMES) == info.tensors().keys()
    write(tmp_path, info)
    rewrite(tmp_path, lambda tensors, _: tensors.pop(f"{MODULE}.{name}") is None)
    refused(tmp_path, info, MissingTensorError, rf"{name} of {MODULE}")


def test_a_tensor_too_many(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    bias = torch.zeros(info.num_experts, info.w2.rows)
    rewrite(tmp_path, lambda tensors, _: tensors.update({f"{MODULE}.w2.bias": bias}))
    refused(tmp_path, info, FormatError, rf"w2\.bias of {MODULE}")


@pytest.mark.parametrize("change", ["shape", "dtype"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_or_dtype(tmp_path: Path, info: MoEQuantInfo, name: str, change: str) -> None:
    write(tmp_path, info)
    tensor = info.tensors()[name]
    other = tensor[:, :1].contiguous() if change == "shape" else tensor.to(torch.int64)
    rewrite(tmp_path, lambda tensors, _: tensors.update({f"{MODULE}.{name}": other}))
    refused(tmp_path, info, FormatError, rf"{name.rpartition('.')[2]} of {MODULE} in {FILE}")


def test_a_layer_without_facts(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda _, held: held["layers"].clear())
    refused(tmp_path, info, MissingTensorError, "no metadata of layer 0")


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"version": 1}', '{"version": 1, "layers": []}', '{"layers": {}}']
)
def test_a_header_that_is_none(tmp_path: Path, info: MoEQuantInfo, text: str) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda *_: text)
    refused(tmp_path, info, FormatError, f"metadata {METHOD} of {FILE}")


def test_headers_that_another_tool_dropped(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda *_: "none")
    refused(tmp_path, info, FormatError, "no quant_moelora in its files' headers, expected both, or neither")


@pytest.mark.parametrize("config", [None, {"quant_method": "gptq", "bits": 4, "group_size": 32}])
def test_the_config_of_another_checkpoint(tmp_path: Path, info: MoEQuantInfo, config: dict[str, Any] | None) -> None:
    write(tmp_path, info, config)
    refused(tmp_path, info, FormatError, "expected both, or neither")


def test_files_of_two_conversions(tmp_path: Path, info: MoEQuantInfo) -> None:
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in info.tensors().items()}
    write_checkpoint(tmp_path, tensors, quantization=CONFIG, shard=lambda key: int(".w2." in key))
    facts = facts_of(info)
    other = {**facts, "source_order": "interleaved"}
    for number, held in ((0, facts), (1, other)):
        file = tmp_path / f"model-{number:05d}.safetensors"
        save_file(load_file(file), file, file_metadata({0: held}))
    refused(tmp_path, info, FormatError, "one and the same in all files")
    save_file(load_file(file), file, file_metadata({0: facts}))
    assert_same(read(tmp_path, spec_of(info)), info)


def test_experts_that_are_not_packed_beside(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    rewrite(tmp_path, lambda tensors, _: tensors.update({f"{MODULE}.1.up_proj.weight": torch.zeros(100, 72)}))
    refused(tmp_path, info, FormatError, rf"{MODULE}\.1\.up_proj beside packed ones")


def test_truncated(tmp_path: Path, info: MoEQuantInfo) -> None:
    write(tmp_path, info)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-1])
    refused(tmp_path, info, FormatError, "a whole safetensors file")
