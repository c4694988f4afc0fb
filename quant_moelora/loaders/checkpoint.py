"""Checkpoint: the safetensors files of a model, read lazily, with headers and raw configs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant_moelora.core.errors import FormatError, MissingTensorError, UnsupportedError

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Where a quantisation config may stand beside config.json (gptqmodel writes the first, AutoAWQ the second).
QUANT_CONFIG_FILES = ("quantize_config.json", "quant_config.json")

# What belongs to a checkpoint besides: configs, tokenizer and templates.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")

# Weight files that are not read, to be refused by name.
OTHER_FILES = {"*.gguf": "GGUF", "*.bin": "PyTorch pickle", "*.pt": "PyTorch pickle"}

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Part:
    """One expert of a fused tensor, whose first dimension counts experts.

    Attributes:
        expert: the expert.
        transposed: whether its matrix is [K, N] where [N, K] is wanted.
    """

    expert: int
    transposed: bool = False


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of a tensor: no data is read.

    Attributes:
        key: name in the checkpoint.
        dtype: torch dtype, or None for one that torch does not have.
        shape: its shape.
        file: the file it is in.
        part: where this is one expert of a fused tensor.
    """

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    part: Part | None = None

    @property
    def where(self) -> str:
        """``key in file``, for messages."""
        if self.part is None:
            return f"{self.key} in {self.file.name}"
        return f"expert {self.part.expert} of {self.key} in {self.file.name}"

    def at(self, part: Part) -> TensorHeader:
        """Header of a part of this tensor."""
        return replace(self, shape=self.shape[:0:-1] if part.transposed else self.shape[1:], part=part)


class Checkpoint:
    """A folder with config.json and safetensors files.

    Attributes:
        path: the folder.
        config: config.json as it stands.
        quantization: the raw quantisation config (of config.json, of its text model, or of a file beside it), or {}.
        headers: every tensor's header, by key, in the order in which they lie in the files.
        metadata: each file's own, which safetensors holds beside the tensors' headers.
    """

    def __init__(self, path: str | Path) -> None:
        """Read configs and headers.

        Raises:
            FormatError: a file is missing, unreadable, truncated or contradicts the index.
            UnsupportedError: there are weights, and not in safetensors.
        """
        self.path = Path(path)
        self.config = _read_json(self.path / "config.json")
        self.quantization = self._find_quantization()
        self.headers: dict[str, TensorHeader] = {}
        self.metadata: dict[Path, Mapping[str, str]] = {}
        self._open: dict[Path, Any] = {}
        self._warned: set[str] = set()
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())):
            self._read_headers(file)
        for key, file in weight_map.items():
            if key and (key not in self.headers or self.headers[key].file is not file):
                raise FormatError(
                    f"{key} of {INDEX_FILE}",
                    got=f"no such tensor in {file.name}",
                    rule="every tensor of the index in the file it names",
                    remedy="download the checkpoint again",
                )

    def _find_quantization(self) -> dict[str, Any]:
        for config in (self.config, self.config.get("text_config") or {}):
            found = config.get("quantization_config")
            if found and not isinstance(found, dict):
                raise FormatError(
                    f"quantization_config of {self.path / 'config.json'}",
                    got=type(found).__name__,
                    rule="a JSON object",
                    remedy="download config.json again",
                )
            if found:
                return found
        for name in QUANT_CONFIG_FILES:
            if (self.path / name).is_file():
                return _read_json(self.path / name)
        return {}

    def _weight_map(self) -> dict[str, Path]:
        """File of each key; the key is empty where there is no index and every tensor of the file counts."""
        if (self.path / INDEX_FILE).is_file():
            weight_map = _read_json(self.path / INDEX_FILE).get("weight_map")
            if not isinstance(weight_map, Mapping):
                raise FormatError(
                    INDEX_FILE, got="no weight_map", rule="a weight_map", remedy="download the index again"
                )
            files = {name: self.path / str(name) for name in set(weight_map.values())}  # one object each, which is fast
            return {key: files[name] for key, name in weight_map.items()}
        if (self.path / SINGLE_FILE).is_file():
            return {"": self.path / SINGLE_FILE}
        for pattern, name in OTHER_FILES.items():
            for file in self.path.glob(pattern):
                raise UnsupportedError(
                    f"weights of {self.path}",
                    got=f"{name} ({file.name})",
                    rule=f"{SINGLE_FILE} or {INDEX_FILE}",
                    remedy="take a checkpoint in safetensors",
                )
        raise FormatError(
            f"checkpoint {self.path}",
            got="no weights",
            rule=f"{SINGLE_FILE} or {INDEX_FILE}",
            remedy="save the model as safetensors; other weight files are not read",
        )

    def _read_headers(self, file: Path) -> None:
        handle = self._handle(file)
        self.metadata[file] = handle.metadata() or {}
        for key in handle.offset_keys():
            tensor = handle.get_slice(key)
            self.headers[key] = TensorHeader(key, _DTYPES.get(tensor.get_dtype()), tuple(tensor.get_shape()), file)

    def _handle(self, file: Path) -> Any:
        """The open file; data is mapped, not read."""
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise FormatError(
                    f"weights file {file.name} in {self.path}",
                    got=f"{type(error).__name__}: {error}",
                    rule="a whole safetensors file",
                    remedy="download it again",
                ) from error
        return self._open[file]

    def read(self, key: str, part: Part | None = None, window: Sequence[slice] | None = None) -> Tensor:
        """The tensor ``key`` on the CPU, or the ``part`` of it that a header names; of that only ``window``, if given.

        A window has a slice for each dimension. What is outside of it is not read.

        Raises:
            MissingTensorError: the checkpoint has no such tensor.
        """
        header = self.headers.get(key)
        if header is None:
            raise MissingTensorError(
                key, got="no such tensor", rule=f"it in {self.path}", remedy="download the checkpoint again"
            )
        handle = self._handle(header.file)
        if part is None:
            return handle.get_tensor(key) if window is None else handle.get_slice(key)[tuple(window)]
        index = () if window is None else tuple(reversed(window) if part.transposed else window)
        expert = handle.get_slice(key)[(part.expert, *index)]
        return expert.T if part.transposed else expert

    def warn_once(self, message: str) -> None:
        """Log a warning about the checkpoint, unless it has been logged."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self.path, message)

    def modules(self) -> dict[str, dict[str, TensorHeader]]:
        """Headers by module and suffix: ``modules()["model.layers.0.mlp.gate"]["weight"]``."""
        grouped: dict[str, dict[str, TensorHeader]] = {}
        for key, header in self.headers.items():
            module, _, suffix = key.rpartition(".")
            grouped.setdefault(module, {})[suffix] = header
        return grouped

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self._open)


def resolve_checkpoint(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Path:
    """The folder of a checkpoint: ``path`` itself, or a snapshot of the hub repository of that name.

    Only configs, tokenizer files and safetensors are downloaded; with ``local_files_only``, or HF_HUB_OFFLINE in the
    environment, nothing is, and the snapshot has to be in the cache.

    Raises:
        FormatError: there is no such folder, and the hub or its cache does not give one.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = _snapshot(str(path), subfolder, hub)
    if not (folder / subfolder).is_dir():
        raise FormatError(
            f"subfolder of {path}", got=repr(subfolder), rule="a folder in it", remedy="correct the name of the folder"
        )
    return folder / subfolder


def _snapshot(repository: str, subfolder: str, hub: Mapping[str, Any]) -> Path:
    """A snapshot of a hub repository, or as much of it as a subfolder needs."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # huggingface_hub 1 asks the hub for a commit that is in the cache, also offline.
    hub = {**hub, "local_files_only": hub["local_files_only"] or constants.HF_HUB_OFFLINE}
    below = f"{subfolder.rstrip('/')}/" if subfolder else ""
    wanted = [below + pattern for pattern in ("*.safetensors", *SMALL_FILES)]
    # Some repositories hold the weights a second time, under the names of their authors' own code.
    twice = [below + pattern for pattern in ("original/*", "consolidated*")]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=twice, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(
            f"checkpoint {repository}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            rule="a folder with config.json and safetensors files, or a repository of the hub",
            remedy="check the path; offline, download the repository first",
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            str(file), got=f"{type(error).__name__}: {error}", rule="a JSON object", remedy="download it again"
        ) from error
    if not isinstance(content, dict):
        raise FormatError(str(file), got=type(content).__name__, rule="a JSON object", remedy="download it again")
    return content
