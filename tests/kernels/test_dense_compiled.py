"""The machine code of the dense grouped GEMM, at the tiles that real layers get."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import pytest
import torch

from quant_moelora.kernels.common.launch import options
from quant_moelora.kernels.dense_gemm.config import DenseSpec, choose_tile, shared_bytes
from quant_moelora.kernels.grouped_gemm.spec import Tile
from tests.kernels.compiled import SHAPES, TOKENS, Compiled, disassembled

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of a block: CUDA C++ Programming Guide
HEIGHTS = {16: 1, 32: 2, 64: 3, 128: 4}  # of a tile: it, and all lower powers of two from 16 on


@dataclass(frozen=True)
class Found:
    """A compiled kernel, and its copies to shared memory and stores that move fewer than 16 bytes a thread."""

    made: Compiled
    narrow: list[str]


def specs(capability: int, models: Sequence[str]) -> list[DenseSpec]:
    """Each tile that these models' layers get at some number of tokens, w13 with the gather and w2 without."""
    first: dict[tuple[Tile, bool, bool], DenseSpec] = {}
    for shape in (SHAPES[model] for model in models):
        for tokens in TOKENS:
            for n, k, gather in ((2 * shape.inter, shape.hidden, True), (shape.hidden, shape.inter, False)):
                tile = choose_tile(tokens * shape.top_k, shape.experts, n, k, divmod(capability, 10))
                overlap = tile.overlaps and capability >= 90
                spec = DenseSpec(tile, n, n, k, k, shape.bias, gather, wide=False, overlap=overlap)
                first.setdefault((tile, gather, k % tile.bk == 0), spec)
    return list(first.values())


def _compile(spec: DenseSpec, capability: int, dtype: torch.dtype = torch.bfloat16) -> Found:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant_moelora.kernels.dense_gemm.kernel import dense_gemm_kernel as kernel

    floats = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {"x": floats, "w": floats, "bias": "*fp32", "out": floats, "rows": "*i32", "tiles": "*i32"}
    types |= {"num_tiles": "i32", "top_k": "i32", "SPEC": "constexpr"}
    values: dict[str, object] = {"SPEC": spec}
    if not spec.has_bias:
        types["bias"], values["bias"] = "constexpr", None
    if not spec.gather:
        types["top_k"], values["top_k"] = "constexpr", 1
    names = kernel.arg_names
    assert set(types) == set(names), "the kernel's arguments are not those that are described here"
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")},
    )
    given = {"num_warps": spec.tile.warps, **options(spec.overlap)}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
    registers, program = disassembled(made.asm["cubin"])
    moves = [i for i in program.instructions if i.name in {"LDGSTS", "STG"}]
    # 16 rows of x are 8 bytes for each thread of 8 warps: the lowest height of the highest tile.
    wide = {"128", "64"} if 16 * spec.tile.bk < 8 * 32 * spec.tile.warps else {"128"}
    narrow = [str(i) for i in moves if not wide & set(i.modifiers)]
    return Found(Compiled(registers, made.metadata.shared, program.whole(), program.loops(), program.hazards()), narrow)


def faults(spec: DenseSpec, capability: int, compiled: Found) -> list[str]:
    """What is wrong with a compiled kernel."""
    tile, found = spec.tile, compiled.made
    wrong = [f"hazard: {hazard}" for hazard in found.hazards] + [f"narrow: {move}" for move in compiled.narrow]
    most = min(shared_bytes(tile), SHARED[capability])
    if found.shared > most:
        wrong.append(f"{found.shared} bytes of shared memory, at most {most}")
    if found.registers * 32 * tile.warps > 65_536:
        wrong.append(f"{found.registers} registers of a thread, {tile.warps} warps")
    if {"LDL", "STL"} & found.whole.forbidden.keys():
        wrong.append(f"spills: {found.whole.forbidden}")
    if capability == 100:  # its operands go through a memory of their own
        return wrong
    # A load of an operand into registers would be an LDG in the loop, whatever its width: copies do not pass there.
    wrong += [f"in a loop: {loop.forbidden}" for loop in found.loops if loop.forbidden]
    if len(found.loops) != HEIGHTS[tile.bm]:
        wrong.append(f"{len(found.loops)} loops for {HEIGHTS[tile.bm]} heights")
    if capability == 90:
        for loop in found.loops:
            one_step = tile.bn // 64 * (tile.bk // 16) // (tile.warps // 4)
            if loop.from_registers or loop.matrix % one_step or not loop.waits:
                wrong.append(f"{loop.matrix} wgmma, {loop.from_registers} from registers, {loop.waits} waits")
            if loop.waits * one_step > loop.matrix:
                wrong.append(f"{loop.waits} waits for {loop.matrix} wgmma, {one_step} a step")
    return wrong


def check(asked: list[DenseSpec], capability: int) -> None:
    """Compile, in both dtypes in turn, and collect what is wrong with any."""
    pytest.importorskip("triton")
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    each = [_compile(spec, capability, dtype) for spec, dtype in zip(asked, dtypes, strict=False)]
    wrong = [
        f"Triton {version('triton')}, sm_{capability}: {fault}; {spec}"
        for spec, found in zip(asked, each, strict=True)
        for fault in faults(spec, capability, found)
    ]
    assert not wrong, "\n".join(wrong)


def odd(spec: DenseSpec) -> DenseSpec:
    """The same tile where neither it nor its step divides the weight, which has padding and a bias."""
    return replace(spec, n=spec.n - 8, k=spec.k - 8, has_bias=True, wide=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_each_tile(capability: int) -> None:
    """Of one model whole, and of another one with ends of all kinds."""
    check([*specs(capability, ("deepseek-v3",)), *map(odd, specs(capability, ("gpt-oss-20b",)))], capability)


@pytest.mark.compile_all
@pytest.mark.parametrize("capability", SHARED)
def test_each_kernel(capability: int) -> None:
    whole = specs(capability, list(SHAPES))
    check([*whole, *map(odd, whole)], capability)
