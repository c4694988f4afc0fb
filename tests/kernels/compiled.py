"""The kernels that the backend launches for real layers, compiled for a GPU that need not be there."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from quant_moelora.core import packing
from quant_moelora.core.activations import Activation
from quant_moelora.core.quant_info import MoEQuantInfo
from quant_moelora.core.scheme import QuantScheme
from quant_moelora.core.weights import PackedWeight
from quant_moelora.experts import marlin_op
from quant_moelora.kernels.common.launch import options
from quant_moelora.kernels.dequant.prepare import PreparedWeight, prepared_weight, recipe
from quant_moelora.kernels.grouped_gemm import choice, launch, op, product
from quant_moelora.kernels.grouped_gemm.layer import LayerShape
from quant_moelora.kernels.grouped_gemm.spec import GemmSpec, Tile
from quant_moelora.kernels.grouped_gemm.table import shipped_tables
from tests.kernels.sass import Code, Program


class Shape(NamedTuple):
    """A layer of a released model."""

    experts: int
    top_k: int
    hidden: int
    inter: int
    bias: bool = False
    activation: Activation = Activation("silu")


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, True, Activation("swigluoai", alpha=1.702, limit=7.0)),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
MAIN_SCHEME = QuantScheme(4, 128, True, torch.bfloat16)
SCHEMES = [
    QuantScheme(bits, group, symmetric, torch.bfloat16)
    for bits, group, symmetric in itertools.product((4, 8), (32, 64, 128), (True, False))
]
DTYPES = (torch.bfloat16, torch.float16)
_LONG = 9  # steps, from which on a loop is a loop whatever the compiler thinks of its length


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(shape: Shape, scheme: QuantScheme, halves: int, n: int, k: int, n_pad: int) -> PackedWeight:
    k_pad = packing.padded_columns(k, scheme.group_size)
    assert scheme.group_size is not None
    pairs = packing.pairs_shape(shape.experts, halves * n_pad, k_pad // scheme.group_size)
    return PackedWeight(
        num_experts=shape.experts,
        halves=halves,
        n=n,
        k=k,
        n_pad=n_pad,
        k_pad=k_pad,
        bias=_empty((shape.experts, halves * n_pad), torch.float32) if shape.bias else None,
        scheme=scheme,
        qweight=_empty(packing.qweight_shape(shape.experts, halves * n_pad, k_pad, scheme.bits)),
        scales=_empty(pairs),
        zeros=None if scheme.symmetric else _empty(pairs),
        k_perm=None,
    )


def _layer(shape: Shape, scheme: QuantScheme) -> MoEQuantInfo:
    inter_pad = packing.padded_columns(shape.inter, scheme.group_size)
    w13 = _weight(shape, scheme, 2, shape.inter, shape.hidden, inter_pad)
    w2 = _weight(shape, scheme, 1, shape.hidden, shape.inter, packing.padded_rows(shape.hidden))
    return MoEQuantInfo(w13, w2, shape.activation)


def _prepared(weight: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    how = recipe(dtype, weight.scheme.bits, weight.scheme.symmetric)
    post = _empty((weight.num_experts,), torch.float32) if how.one_step else None
    return prepared_weight(weight, scales=weight.scales, zeros=weight.zeros, zero=0, post=post, one_step=how.one_step)


class Gpu(NamedTuple):
    """What tiles are chosen for; the empty name has no tables."""

    name: str
    capability: tuple[int, int]

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may be launched while the one before still runs."""
        return self.capability >= (9, 0)


def gpus(capability: int) -> list[Gpu]:
    """One GPU of which nothing was measured, and those of the shipped tables."""
    own = divmod(capability, 10)
    measured = {table.gpu for _, table in shipped_tables() if table.capability == own}
    return [Gpu(name, own) for name in ("", *sorted(measured))]


@contextmanager
def stands_for(gpu: Gpu) -> Generator[None]:
    """Have products of tensors without memory be cut and compiled as on a GPU."""
    with (
        patch.multiple(choice, capability=lambda _: gpu.capability, gpu_name=lambda _: gpu.name),
        patch.multiple(launch, capability=lambda _: gpu.capability, overlaps=lambda _: gpu.overlaps),
        patch.object(launch, "multiprocessors", lambda _: 132),  # only the number of programs depends on it
    ):
        yield


def prepared_layer(shape: Shape, scheme: QuantScheme, dtype: torch.dtype) -> marlin_op.MarlinLayer:
    """A layer as the operator takes it, without memory."""
    info = _layer(shape, scheme)
    assert isinstance(info.w13, PackedWeight) and isinstance(info.w2, PackedWeight)
    source = choice.TileSource(LayerShape.of(info, dtype).name, "")
    w13, w2 = _prepared(info.w13, dtype), _prepared(info.w2, dtype)
    return marlin_op.MarlinLayer(w13, w2, shape.activation, weigh_input=False, tiles=source)


def layer_specs(shape: Shape, tokens: int, scheme: QuantScheme, dtype: torch.dtype, gpu: Gpu) -> list[GemmSpec]:
    """What the backend launches on a GPU for a forward of the base model, and products by themselves."""
    layer, pairs = prepared_layer(shape, scheme, dtype), tokens * shape.top_k
    w13, w2 = layer.w13, layer.w2
    ids, x, h = _empty((tokens, shape.top_k)), _empty((tokens, shape.hidden), dtype), _empty((pairs, w2.k_pad), dtype)
    rows, tiles = _empty((pairs,)), _empty((pairs, 4))
    specs: list[GemmSpec] = []

    def record(
        x: Tensor,  # as of `launch.grouped_gemm`, and so the others
        weight: PreparedWeight,
        tiles: Tensor,
        rows: Tensor | None,
        top_k: int | None,
        out: Tensor,
        tile: Tile,
        activation: Activation | None = None,
        rider: None = None,
    ) -> Tensor:
        specs.append(launch._spec(x, weight, rows is None, top_k, out, tile, activation, plain=False))
        return out

    with (
        patch.multiple(
            marlin_op,
            align_tensors=lambda *_: (rows, rows, None, None, tiles),
            activate=lambda *arguments, **_: arguments[-1],
            moe_sum=lambda *arguments, **_: arguments[-1],
        ),
        patch.object(product, "grouped_gemm", record),
        stands_for(gpu),
    ):
        marlin_op.write_layer(x, ids, _empty(ids.shape, torch.float32), *layer.arguments(), torch.empty_like(x))
        for given, gather, columns, weight in ((x, True, w13.rows, w13), (h, False, w2.n, w2)):
            out = _empty((pairs, columns), dtype)
            op.write_product(given, ids, rows, tiles, gather, columns, *layer.tiles, *weight, out)
    return specs


def _kind(spec: GemmSpec) -> GemmSpec:
    """A spec without the dimensions that are only strides and trip counts."""
    steps = min(spec.k // spec.tile.bk // spec.tile.split, _LONG)
    narrow, partial = spec.x_columns < spec.k, spec.n_out < spec.n
    return replace(spec, n=0, half_rows=0, k=steps, x_columns=int(narrow), n_out=int(partial))


def all_specs(capability: int) -> dict[str, list[GemmSpec]]:
    """One spec of each kind, by the first model whose layer it serves, at some number of tokens, scheme and dtype."""
    first: dict[GemmSpec, tuple[str, GemmSpec]] = {}
    points = itertools.product(gpus(capability), SHAPES.items(), TOKENS, SCHEMES, DTYPES)
    for gpu, (name, shape), tokens, scheme, dtype in points:
        for spec in layer_specs(shape, tokens, scheme, dtype, gpu):
            first.setdefault(_kind(spec), (name, spec))
    return {model: [spec for name, spec in first.values() if name == model] for model in SHAPES}


def sample(capability: int) -> list[GemmSpec]:
    """Every tile of every model: in the main scheme with and without the activation, and once in another scheme.

    A scheme is met in the loops and an activation behind them, so that these need not be crossed.
    """
    main: dict[object, GemmSpec] = {}
    other: dict[object, GemmSpec] = {}
    forms = itertools.cycle((s, d) for d in reversed(DTYPES) for s in SCHEMES if s != MAIN_SCHEME)
    for gpu, shape, tokens in itertools.product(gpus(capability), SHAPES.values(), TOKENS):
        for kept, form in ((main, (MAIN_SCHEME, torch.bfloat16)), (other, next(forms))):
            for spec in layer_specs(shape, tokens, *form, gpu):
                kept.setdefault((spec.tile, kept is main and spec.activation != ""), spec)
    return list(dict.fromkeys((*main.values(), *other.values())))


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs, and what its code says.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory.
        whole: all of its code.
        loops: around matrix instructions.
        hazards: see `Program.hazards`.
    """

    registers: int
    shared: int
    whole: Code
    loops: list[Code]
    hazards: list[str]


def compiled(specs: list[GemmSpec], capability: int) -> list[Compiled]:
    """Compile each for a compute capability (90 for sm_90)."""
    return [_compile(spec, capability) for spec in specs]


def _compile(spec: GemmSpec, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, source_of = _kernel(spec)
    types = _types(spec)
    names = kernel.arg_names
    assert set(types) == set(names), "the kernel's arguments are not those that are described here"
    values = {"SPEC": spec, "top_k": 1, "rider": None, "RIDER": None, "SHRINKS": False}
    constants = {(i,): values[n] for i, n in enumerate(names) if types[n] == "constexpr"}
    unaligned = {"num_tiles", "num_experts", *values}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in unaligned}
    source = source_of(kernel, {n: types[n] for n in names}, constants, attributes)
    chosen = {"num_warps": spec.tile.warps, "maxnreg": spec.tile.registers, **options(spec.overlap)}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)
    registers, program = disassembled(made.asm["cubin"])
    return Compiled(
        registers=registers,
        shared=made.metadata.shared,
        whole=program.whole(),
        loops=program.loops(),
        hazards=program.hazards(),
    )


def _kernel(spec: GemmSpec) -> tuple[Any, Any]:
    """The kernel of a tile, and what makes a source of it."""
    if spec.tile.consumers:
        from triton.experimental.gluon._runtime import GluonASTSource

        from quant_moelora.kernels.grouped_gemm.specialized.kernel import specialized_gemm_kernel

        return specialized_gemm_kernel, GluonASTSource
    from triton.compiler import ASTSource

    from quant_moelora.kernels.grouped_gemm.kernel import grouped_gemm_kernel

    return grouped_gemm_kernel, ASTSource


def disassembled(cubin: bytes) -> tuple[int, Program]:
    """Registers of a thread, and the program."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        use = _output(str(tools / "cuobjdump"), "-res-usage", file.name)
        program = Program.parse(_output(str(tools / "nvdisasm"), "-c", file.name))
    registers = re.search(r"REG:(\d+)", use)
    assert registers is not None, use
    return int(registers[1]), program


def _types(spec: GemmSpec) -> dict[str, str]:
    """Triton's types of the kernel's arguments, as of a launch by `launch.grouped_gemm` without a rider."""
    floats = "*fp16" if spec.fp16 else "*bf16"
    riding = {"rider": "constexpr", "riding": "i32", "RIDER": "constexpr", "SHRINKS": "constexpr"}
    return {
        "x": floats,
        "stride_x": "i32",
        "half_stride": "i32",
        "w": "*i32",
        "scales": "*i32",
        "zeros": "*i32" if spec.zeros else "i32",
        "post": "*fp32" if spec.has_post else "*i32",
        "bias": "*fp32" if spec.has_bias else "*i32",
        "out": "*fp32" if spec.tile.split > 1 else floats,
        "stride_out": "i32",
        "slice_stride": "i32",
        "rows": "*i32",
        "tiles": "*i32",
        "num_tiles": "i32",
        "num_experts": "i32",
        "top_k": "i32" if spec.gather else "constexpr",
        "SPEC": "constexpr",
        **({} if spec.tile.consumers else riding),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout
