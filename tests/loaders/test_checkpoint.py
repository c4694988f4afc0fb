"""Checkpoint folders: files, shards, index, configs, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_moelora.core.errors import FormatError, MissingTensorError
from quant_moelora.loaders.checkpoint import Checkpoint, resolve_checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.layer_format import describe_layers
from tests.checkpoints import (
    definition,
    experts_spec,
    gptq_v1,
    layer_tensors,
    quantization_config,
    random_layer,
    skeleton,
    write_checkpoint,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {f"a.{i}.weight": torch.full((2, i + 1), float(i)) for i in range(4)}


def test_single_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(str(write_checkpoint(tmp_path, tensors, {"model_type": "x"})))
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.quantization == {}
    assert checkpoint.headers.keys() == tensors.keys()
    header = checkpoint.headers["a.2.weight"]
    assert (header.dtype, header.shape, header.file.name) == (torch.float32, (2, 3), "model.safetensors")
    assert header.where == "a.2.weight in model.safetensors"
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())
    assert checkpoint.modules()["a.3"].keys() == {"weight"}
    assert checkpoint.nbytes == (tmp_path / "model.safetensors").stat().st_size


def test_key_that_is_not_there(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(MissingTensorError, match=r"a\.9\.weight: got no such tensor"):
        Checkpoint(write_checkpoint(tmp_path, tensors)).read("a.9.weight")


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
)
def test_dtypes_of_headers(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {"w": torch.zeros(3).to(dtype)}))
    assert checkpoint.headers["w"].dtype == dtype


def test_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    """MXFP4 files have such tensors: they must not hinder the others."""
    header = json.dumps({"odd": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    write_checkpoint(tmp_path, {"w": torch.zeros(1)})
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert Checkpoint(tmp_path).headers["odd"].dtype is None


def test_shards(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, tensors, shard=lambda key: int(key[2]) % 2))
    assert {key: header.file.name for key, header in checkpoint.headers.items()} == {
        key: f"model-0000{int(key[2]) % 2}.safetensors" for key in tensors
    }
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())
    assert checkpoint.nbytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("expert_order", ["0 1 10 11 2 3 4 5 6 7 8 9", "11 3 0 7 9 1 10 2 8 6 5 4"])
def test_experts_of_one_layer_over_two_shards_in_any_order(tmp_path: Path, sharded: bool, expert_order: str) -> None:
    layer = random_layer(np.random.default_rng(0), 12, 32, 64)
    order = {int(number): place for place, number in enumerate(expert_order.split())}
    tensors = layer_tensors(layer, gptq_v1)
    tensors = dict(sorted(tensors.items(), key=lambda item: order[int(item[0].split(".")[5])]))

    def shard(key: str) -> int:  # even an expert's own tensors lie in two files
        return hash_of(key) % 2

    config = quantization_config("gptq", layer[0, "up"])
    checkpoint = Checkpoint(
        write_checkpoint(tmp_path, tensors, quantization=config, shard=shard if sharded else None),
    )
    assert len({header.file for header in checkpoint.headers.values()}) == 1 + sharded
    info = load_layer(checkpoint, describe_layers(checkpoint, [experts_spec(layer)], skeleton())[0], "cpu")
    for got, expected in zip(info.dequantize(), definition(layer), strict=True):
        assert got is not None
        assert torch.equal(got, expected)


def hash_of(key: str) -> int:
    """A number of a key that is the same in every run."""
    return sum(key.encode()) // 7


def edit_index(folder: Path, **changes: str) -> None:
    """Name other files for keys of the index; underscores stand for dots."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update({key.replace("_", "."): value for key, value in changes.items()})
    file.write_text(json.dumps(index))


def test_index_that_names_a_missing_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, tensors, shard=lambda key: int(key[2]) % 2)
    edit_index(tmp_path, a_3_weight="model-00007.safetensors")
    with pytest.raises(FormatError, match=r"model-00007\.safetensors.*got FileNotFoundError.*download it again"):
        Checkpoint(tmp_path)


def test_index_that_names_another_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, tensors, shard=lambda key: int(key[2]) % 2)
    edit_index(tmp_path, a_3_weight="model-00000.safetensors")
    with pytest.raises(FormatError, match=r"a\.3\.weight of .*index.*no such tensor in model-00000\.safetensors"):
        Checkpoint(tmp_path)


def test_index_with_a_key_that_no_file_has(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_checkpoint(tmp_path, tensors, shard=lambda key: int(key[2]) % 2)
    edit_index(tmp_path, a_9_weight="model-00001.safetensors")
    with pytest.raises(FormatError, match=r"a\.9\.weight of .*index.*no such tensor in model-00001\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": ["a"]}'])
def test_index_without_a_map(tmp_path: Path, tensors: dict[str, Tensor], index: str) -> None:
    write_checkpoint(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match=r"index\.json: got no weight_map"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("left", [-5, 40, 4, 0])
def test_truncated_file(tmp_path: Path, tensors: dict[str, Tensor], left: int) -> None:
    file = write_checkpoint(tmp_path, tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(FormatError, match=r"weights file model\.safetensors in .*expected a whole safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("left", [-5, 0])
def test_truncated_shard(tmp_path: Path, tensors: dict[str, Tensor], left: int) -> None:
    """The error names the one that is damaged."""
    file = write_checkpoint(tmp_path, tensors, shard=lambda key: int(key[2]) % 2) / "model-00001.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(FormatError, match=r"weights file model-00001\.safetensors in .*expected a whole safetensors"):
        Checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FormatError, match=r"got no weights, expected model\.safetensors or .*save the model as safeten"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "FileNotFoundError"),
        (b"{", "JSONDecodeError"),
        (b"", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[1]", "list"),
        (b'"gptq"', "str"),
    ],
)
def test_config_that_is_none(tmp_path: Path, content: bytes | None, got: str) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(1)})
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=rf"config\.json: got {got}.*expected a JSON object; download it again"):
        Checkpoint(tmp_path)


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*attn.*": {}}}


@pytest.mark.parametrize(
    ("config", "beside", "expected"),
    [
        ({"quantization_config": GPTQ}, {}, GPTQ),
        ({"text_config": {"quantization_config": GPTQ}}, {}, GPTQ),
        ({"text_config": None}, {}, {}),
        ({}, {"quantize_config.json": GPTQ}, GPTQ),
        ({}, {"quant_config.json": GPTQ}, GPTQ),
        ({"quantization_config": GPTQ}, {"quantize_config.json": {"bits": 8}}, GPTQ),
        ({"quantization_config": None}, {"quantize_config.json": GPTQ}, GPTQ),
    ],
)
def test_where_the_quantization_config_stands(
    tmp_path: Path, config: dict[str, Any], beside: dict[str, Any], expected: dict[str, Any]
) -> None:
    """It is the raw dict: no field is dropped."""
    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"model_type": "x", **config})
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Checkpoint(tmp_path).quantization == expected


def test_quantization_config_that_is_no_object(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"quantization_config": "gptq"})
    with pytest.raises(FormatError, match="quantization_config"):
        Checkpoint(tmp_path)


def test_folder_is_its_own_answer(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder", "no such name"])
def test_neither_folder_nor_repository(name: str) -> None:
    """Offline, as all tests run."""
    with pytest.raises(FormatError, match=rf"checkpoint {name}: got .*expected a folder with .*; check the path; off"):
        resolve_checkpoint(name)


def test_file_for_a_folder(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, {"w": torch.zeros(1)}) / "model.safetensors"
    with pytest.raises(FormatError, match="check the path"):
        resolve_checkpoint(file)
