"""convert: a checkpoint of any served format as one of the packed form, which loads without packing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import convert_file_size_to_int

from quant_moelora.core.errors import FormatError
from quant_moelora.integrations.saving import named_tensors
from quant_moelora.loaders.checkpoint import (
    INDEX_FILE,
    QUANT_CONFIG_FILES,
    SINGLE_FILE,
    SMALL_FILES,
    Checkpoint,
    resolve_checkpoint,
)
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import build_skeleton, require_experts
from quant_moelora.loaders.layer_format import LayerFormat, describe_layers
from quant_moelora.loaders.linears import dequantize_linear, describe_linears
from quant_moelora.loaders.names import model_names
from quant_moelora.loaders.packed_form import METHOD, Facts, facts_of, file_metadata
from quant_moelora.loaders.registry import StoredLinear

logger = logging.getLogger(__name__)


def convert(
    path: str | Path,
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write the packed form of a checkpoint.

    It loads as the checkpoint does in its own dtype, bit for bit: experts as they are packed, quantised linear layers
    beside them dequantised to the model's dtype, and everything else as it is stored. What belongs to nothing in the
    model is left out. Tokenizer and other small files come along.

    ``out`` appears when it is whole, or not at all. Memory is needed for a layer's experts and one file.

    Args:
        path: folder of a checkpoint, or a repository of the hub.
        out: folder to write, which must not be there.
        max_shard_size: of a file, in bytes or as in "5GB"; a tensor that is larger has a file of its own.
        device: where the experts are decoded.
        revision: revision of a hub repository.
        token: token for a hub repository.

    Returns:
        ``out``.

    Raises:
        FormatError: there is something at ``out``, ``max_shard_size`` is no size, or as `load_experts`.
        UnsupportedError: as `load_experts`.
    """
    out, size = Path(out).expanduser(), _size(max_shard_size)
    _refuse_existing(out)
    checkpoint = Checkpoint(resolve_checkpoint(path, revision=revision, token=token))
    model = build_skeleton(checkpoint)
    layers = describe_layers(checkpoint, require_experts(model), model)
    linears = describe_linears(checkpoint, model, layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        folder = Path(work) / out.name  # a folder inside, since the temporary one is the owner's alone
        folder.mkdir()
        shards = _Shards(folder, size)
        for key, tensor in _beside_experts(checkpoint, model, layers, linears, torch.device(device)):
            shards.add(key, tensor)
        for layer in tqdm(layers, desc="Packing experts", unit="layer", disable=None):
            info = load_layer(checkpoint, layer, device)
            facts = {layer.spec.layer: facts_of(info)}
            for key, tensor in named_tensors(layer.spec.module, info).items():
                shards.add(key, tensor.to("cpu"), facts)
            del info  # before the next one is made
        shards.finish()
        _copy_small_files(checkpoint.path, folder)
        _write_configs(checkpoint, model, folder)
        _refuse_existing(out)
        folder.rename(out)
    return out


def _size(max_shard_size: int | str) -> int:
    try:
        return convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise FormatError(
            "max_shard_size", got=repr(max_shard_size), rule="bytes, or a size such as 5GB", remedy="write it so"
        ) from error


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise FormatError(f"folder {out}", got="something that is there", rule="a new folder", remedy="choose another")


def _beside_experts(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    layers: list[LayerFormat],
    linears: Mapping[str, StoredLinear],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Everything of the model but its experts, under the checkpoint's own keys, read one by one."""
    own, name_of = model.state_dict().keys(), model_names(model)
    read = {header.key for layer in layers for header in layer.headers()}
    for name, linear in linears.items():
        dtype = model.get_submodule(name).get_parameter("weight").dtype
        yield f"{linear.spec.module}.weight", dequantize_linear(checkpoint, linear, device).to("cpu", dtype)
        read |= {header.key for header in linear.headers.values()}
    rest = [key for key in checkpoint.headers if key not in read]
    kept = [key for key in rest if name_of(key)[0] in own]
    if len(kept) < len(rest):
        left_out = sorted(set(rest) - set(kept))
        message = "%d tensors of %s belong to nothing in the model and are left out: %s"
        logger.warning(message, len(left_out), checkpoint.path, left_out[:5])
    for key in kept:
        yield key, checkpoint.read(key)


class _Shards:
    """Safetensors files of a folder, written one after the other, with the index that transformers reads.

    Args:
        folder: the folder.
        max_bytes: of the tensors of a file, unless it has one alone.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._facts: dict[int, Facts] = {}  # of the layers with a tensor among those held
        self._files: list[list[str]] = []  # keys of the files written
        self._written_bytes = 0

    def add(self, key: str, tensor: Tensor, facts: Mapping[int, Facts] | None = None) -> None:
        """Take a tensor (any shape, in host memory), with the facts of its layer; they may fill a file."""
        if self._held and self._held_bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._held[key] = tensor.contiguous()
        self._held_bytes += tensor.nbytes
        self._facts |= facts or {}

    def finish(self) -> None:
        """Write what is held, give the files their names, and write the index if there are several."""
        self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._files):
            name = SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self._written_bytes}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"  # the final names say how many there are

    def _write(self) -> None:
        save_file(self._held, self._part(len(self._files)), file_metadata(self._facts))
        self._files.append(list(self._held))
        self._written_bytes += self._held_bytes
        self._held, self._held_bytes, self._facts = {}, 0, {}


def _copy_small_files(source: Path, folder: Path) -> None:
    """Copy all that belongs to a checkpoint but weights, their index and config.json, which others write."""
    for file in sorted({file for pattern in SMALL_FILES for file in source.glob(pattern)}):
        if file.name not in ("config.json", *QUANT_CONFIG_FILES) and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _write_configs(checkpoint: Checkpoint, model: PreTrainedModel, folder: Path) -> None:
    """config.json as transformers saves it; nothing loads without it, so that it comes last.

    What an old config.json says of generation has a file of its own today.
    """
    if not (folder / GENERATION_CONFIG_NAME).exists():
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)
    model.config.quantization_config = {"quant_method": METHOD}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
