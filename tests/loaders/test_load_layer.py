"""A layer is read some experts at a time: whatever the chunks, the same bits, each tensor once, and little memory."""

import json
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from quant_moelora.core.errors import FormatError
from quant_moelora.core.parallel import in_parallel
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.checkpoint import Checkpoint, Part
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import ExpertsSpec
from quant_moelora.loaders.layer_format import describe_layers
from tests.builders import same_bits, threads
from tests.checkpoints import (
    ENCODERS,
    Layer,
    definition,
    experts_spec,
    gptq_v1,
    layer_tensors,
    quantization_config,
    random_layer,
    random_linear,
    skeleton,
    write_checkpoint,
)

EXPERTS, HIDDEN, INTER = 12, 64, 96  # experts 10 and 11 stand before expert 2 in a file
CODES = 3 * HIDDEN * INTER  # of one expert
PARENT = "model.layers.0.mlp.experts"


def load(folder: Path, spec: ExpertsSpec, device: torch.device | str = "cpu", **options: Any) -> MoEQuantInfo:
    checkpoint = Checkpoint(folder)
    return load_layer(checkpoint, describe_layers(checkpoint, [spec], skeleton())[0], device, **options)


def write(folder: Path, layer: Layer, fmt: str = "gptq", **options: Any) -> ExpertsSpec:
    tensors = layer_tensors(layer, ENCODERS[fmt])
    write_checkpoint(folder, tensors, quantization=quantization_config(fmt, layer[0, "up"]), **options)
    return experts_spec(layer)


@pytest.mark.parametrize("experts_at_once", [1, 5, 6, 100])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("fmt", sorted(ENCODERS))
def test_chunks_do_not_matter(
    tmp_path: Path, device: torch.device, fmt: str, experts_at_once: int, workers: int
) -> None:
    """Also where only some experts have an act-order, so that chunks without one stand beside others."""
    rng = np.random.default_rng(0)
    layer = random_layer(rng, EXPERTS, HIDDEN, INTER, bits=8 if fmt == "int-quantized" else 4)
    if fmt.startswith("gptq"):
        layer[3, "gate"] = random_linear(rng, INTER, HIDDEN, act_order=True)
        layer[7, "down"] = random_linear(rng, HIDDEN, INTER, act_order=True)
    spec = write(tmp_path, layer, fmt, shard=lambda key: len(key) % 3)
    with threads(workers):
        info = load(tmp_path, spec, device, codes_at_once=experts_at_once * CODES)
        assert torch.get_num_threads() == workers
    for got, weight in zip(info.dequantize(), definition(layer), strict=True):
        assert got is not None
        assert torch.equal(got.cpu(), weight)
    whole = load(tmp_path, spec, codes_at_once=EXPERTS * CODES).tensors()
    assert info.tensors().keys() == whole.keys()
    assert all(same_bits(tensor, whole[name]) for name, tensor in info.tensors().items())


@pytest.mark.parametrize("module", [f"{PARENT}.11.up_proj", f"{PARENT}.0.gate_proj", f"{PARENT}.4.down_proj"])
@pytest.mark.parametrize("experts_at_once", [1, 5])
def test_damaged_expert_is_named_whatever_its_chunk(tmp_path: Path, module: str, experts_at_once: int) -> None:
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    tensors = layer_tensors(layer, gptq_v1)
    tensors[f"{module}.scales"][1, 5] = torch.inf
    write_checkpoint(tmp_path, tensors, quantization=quantization_config("gptq", layer[0, "up"]))
    with threads(2):
        with pytest.raises(FormatError, match=rf"scales of {module}: got values that are not finite"):
            load(tmp_path, experts_spec(layer), codes_at_once=experts_at_once * CODES)
        assert torch.get_num_threads() == 2


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Part | None]]:
    """What is read from a checkpoint, in order."""
    seen: list[tuple[str, Part | None]] = []
    original = Checkpoint.read

    def read(self: Checkpoint, key: str, part: Part | None = None, window: object = None) -> Tensor:
        seen.append((key, part))
        assert window is None, "a whole layer is read"
        return original(self, key, part)

    monkeypatch.setattr(Checkpoint, "read", read)
    return seen


def offsets(file: Path) -> dict[str, int]:
    """Where each tensor begins, from the file's own header: 8 bytes of its length, then JSON."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {key: entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def test_each_tensor_is_read_once_and_experts_in_the_order_of_the_file(
    tmp_path: Path, reads: list[tuple[str, Part | None]]
) -> None:
    layer = random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)
    spec = write(tmp_path, layer)
    with threads(1):
        load(tmp_path, spec, codes_at_once=1)
    keys = [key for key, _ in reads]
    places = offsets(tmp_path / "model.safetensors")
    assert sorted(keys) == sorted(places)
    assert list(Checkpoint(tmp_path).headers) == sorted(places, key=lambda key: places[key])
    codes = [places[key] for key in keys if key.endswith("down_proj.qweight")]
    assert len(codes) == EXPERTS and codes == sorted(codes)


def test_each_fused_expert_is_read_once(tmp_path: Path, reads: list[tuple[str, Part | None]]) -> None:
    gate_up, down = torch.randn(EXPERTS, 2 * INTER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INTER)
    write_checkpoint(tmp_path, {f"{PARENT}.gate_up_proj": gate_up, f"{PARENT}.down_proj": down})
    info = load(tmp_path, experts_spec(random_layer(np.random.default_rng(0), EXPERTS, HIDDEN, INTER)), codes_at_once=1)
    gate, up, w2 = info.dequantize()
    assert gate is not None
    assert torch.equal(torch.cat((gate, up), dim=1), gate_up) and torch.equal(w2, down)
    assert len(reads) == len({(key, part.expert) for key, part in reads if part}) == 2 * EXPERTS


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator of the CPU held at once for ``work``, which uses this thread only."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()  # their stubs know half of them
    held = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        top = max(top, held)
    return top


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed-tensors"])
def test_peak_memory_is_the_layer_and_one_chunk(tmp_path: Path, fmt: str) -> None:
    experts, hidden, inter = 32, 128, 128
    layer = random_layer(np.random.default_rng(0), experts, hidden, inter, group_size=128)
    spec = write(tmp_path, layer, fmt)
    checkpoint = Checkpoint(tmp_path)  # its map of the file counts as memory when the file is opened
    described = describe_layers(checkpoint, [spec], skeleton())[0]
    infos: list[MoEQuantInfo] = []
    with threads(1):
        peak = peak_bytes(lambda: infos.append(load_layer(checkpoint, described, "cpu", codes_at_once=1)))
    # No more than 4 arrays of a byte a code of the expert: gate and up, both as halves, and what packing needs besides.
    # The whole layer is 32 experts of half a byte a code.
    assert 0 < peak - infos[0].nbytes < 4 * 3 * hidden * inter < infos[0].nbytes / 4


def test_results_are_in_order_and_few_wait() -> None:
    started: list[int] = []

    def work(item: int) -> tuple[int, int]:
        started.append(item)
        return item, torch.get_num_threads()

    with threads(4):
        with closing(in_parallel(work, range(20), 3)) as results:
            for taken, (item, operators) in enumerate(results):
                assert (item, operators) == (taken, 1)
                assert len(started) <= taken + 4  # this one, and three more
        assert torch.get_num_threads() == 4


def test_one_worker_is_the_caller() -> None:
    with threads(4):
        assert (
            list(in_parallel(lambda _: (threading.get_ident(), torch.get_num_threads()), range(3), 1))
            == [(threading.get_ident(), 4)] * 3
        )


def test_the_first_error_is_raised() -> None:
    def work(item: int) -> int:
        if item >= 3:
            raise ValueError(item)
        return item

    with threads(4), closing(in_parallel(work, range(9), 2)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="3"):
            next(results)
        assert torch.get_num_threads() == 4
