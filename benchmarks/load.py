"""Time and peak memory of loading one layer of Qwen3-30B-A3B's size, beside a plain copy of the same file.

`python -m benchmarks.load --device cpu --out DIR` writes DIR/load-cpu.csv. Files have random codes and stand in a
temporary folder, in the page cache; each format is measured in a process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import provenance, write_rows
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.loaders.checkpoint import Checkpoint
from quant_moelora.loaders.experts import load_layer
from quant_moelora.loaders.families import build_skeleton, find_experts
from quant_moelora.loaders.layer_format import describe_layers

EXPERTS, HIDDEN, INTER, GROUP = 128, 2048, 768, 128
MODULE = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
    "num_experts": EXPERTS,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
COLUMNS = (
    "format codes_at_once file_bytes copy_s load_s load_cpu_s copy_gbps load_gbps over_copy packed_bytes "
    "peak_extra_bytes"
).split()


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape).to(torch.float16)


def gptq(n: int, k: int) -> dict[str, Tensor]:
    groups = k // GROUP
    zeros = torch.full((groups, n // 8), 0x77777777, dtype=torch.int32)  # symmetric: 8, stored minus one
    g_idx = torch.arange(k, dtype=torch.int32) // GROUP
    return {"qweight": words(k // 8, n), "qzeros": zeros, "scales": scales(groups, n), "g_idx": g_idx}


def awq(n: int, k: int) -> dict[str, Tensor]:
    groups = k // GROUP
    return {"qweight": words(k, n // 8), "qzeros": words(groups, n // 8), "scales": scales(groups, n)}


def pack_quantized(n: int, k: int) -> dict[str, Tensor]:
    return {"weight_packed": words(n, k // 8), "weight_scale": scales(n, k // GROUP)}


FORMATS: dict[str, tuple[Callable[[int, int], dict[str, Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"bits": 4, "group_size": GROUP, "sym": True, "checkpoint_format": "gptq"}),
    "awq": (awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "compressed-tensors": (pack_quantized, {}),
}


def write(parent: Path, name: str) -> Path:
    """A folder with config.json and one file of the layer's experts, each projection by itself."""
    encode, config = FORMATS[name]
    tensors = {
        f"{MODULE}.{expert}.{projection}.{suffix}": tensor
        for expert in range(EXPERTS)
        for projection, shape in SHAPES.items()
        for suffix, tensor in encode(*shape).items()
    }
    quantization = {"quantization_config": {"quant_method": name, **config}} if config else {}
    folder = parent / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | quantization), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def copy(file: Path, device: torch.device) -> Tensor:
    """The file's bytes in new memory, and from there on the device."""
    memory = torch.empty(file.stat().st_size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with file.open("rb", buffering=0) as stream:
        assert stream.readinto(memory.numpy()) == memory.numel()
    return memory.to(device, non_blocking=True)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Medians of the time that ``work`` takes, and of the process's own time on all cores."""
    taken: list[tuple[float, float]] = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        held = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start, time.process_time() - cpu))
        del held
    wall, own = zip(*taken, strict=True)
    return statistics.median(wall), statistics.median(own)


def resident(*fields: str) -> int:
    """Bytes of this process, from the kernel's account: VmHWM is the most there were."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return sum(int(status[field].split()[0]) for field in fields) * 1024


def peak_extra(work: Callable[[], MoEQuantInfo], device: torch.device) -> tuple[int, int]:
    """Bytes of the result, and how many more there were at once; mapped pages of the file do not count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        packed = work().nbytes
        return packed, torch.cuda.max_memory_allocated() - before - packed
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM to what there is now
    before, mapped = resident("VmHWM"), resident("RssFile")
    packed = work().nbytes
    return packed, resident("VmHWM") - before - (resident("RssFile") - mapped) - packed


def measure(name: str, folder: Path, device_name: str, codes_at_once: int | None, repeats: int) -> dict[str, object]:
    """One row of the table, of the files in ``folder``."""
    device = torch.device(device_name)
    checkpoint = Checkpoint(folder)
    model = build_skeleton(checkpoint)
    (layer,) = describe_layers(checkpoint, find_experts(model), model)
    file = folder / "model.safetensors"
    size = file.stat().st_size

    def load() -> MoEQuantInfo:
        return load_layer(checkpoint, layer, device, codes_at_once=codes_at_once)

    if device.type == "cuda":
        load()  # what the first use of a kernel costs
    packed, extra = peak_extra(load, device)
    copy_s, _ = seconds(lambda: copy(file, device), device, repeats)
    load_s, load_cpu_s = seconds(load, device, repeats)
    return {
        "format": name,
        "codes_at_once": codes_at_once or "default",
        "file_bytes": size,
        "copy_s": f"{copy_s:.3f}",
        "load_s": f"{load_s:.3f}",
        "load_cpu_s": f"{load_cpu_s:.3f}",
        "copy_gbps": f"{size / copy_s / 1e9:.2f}",
        "load_gbps": f"{size / load_s / 1e9:.2f}",
        "over_copy": f"{load_s / copy_s:.1f}",
        "packed_bytes": packed,
        "peak_extra_bytes": extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--codes-at-once", type=int, nargs="*", default=[None], help="sizes of a chunk to compare")
    parser.add_argument("--commit", default="none", help="the commit that runs, for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fixed = provenance(args.device, args.commit, safetensors=safetensors.__version__)
    # A process for each row, so that none finds memory that another has touched before.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        files = {name: write(Path(folder), name) for name in FORMATS}
        rows = (
            processes.submit(measure, name, file, args.device, count, args.repeats).result()
            for name, file in files.items()
            for count in args.codes_at_once
        )
        write_rows(args.out / f"load-{args.device}.csv", fixed, COLUMNS, rows)
    print((args.out / f"load-{args.device}.csv").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
