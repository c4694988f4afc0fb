"""The machine code of the grouped GEMM, at the tiles that real layers get."""

from importlib.metadata import version

import pytest

from quant_moelora.kernels.grouped_gemm.layer import WeightShape, shared_bytes
from quant_moelora.kernels.grouped_gemm.spec import GemmSpec, Tile
from tests.kernels.compiled import SHAPES, Compiled, all_specs, compiled, sample

# Bytes of shared memory that a block may have: CUDA C++ Programming Guide, table of compute capabilities.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHORT = 8  # steps; a loop that has no more may be unrolled


def heights(tile: Tile) -> int:
    """Loops of a tile: one for each height; see `Tile`."""
    powers = tile.bm.bit_length() - 4  # 16, 32, .. bm
    between = {16: 0, 32: 0, 64: 1, 128: 3}  # 48; and 80 and 96
    return powers + (between[tile.bm] if tile.mixed else 0)


def faults(spec: GemmSpec, capability: int, found: Compiled) -> list[str]:
    """What is wrong with a compiled kernel."""
    tile = spec.tile
    wrong = [f"hazard: {hazard}" for hazard in found.hazards]
    said = shared_bytes(tile, WeightShape(spec.n, spec.k, spec.bits, spec.group, spec.zeros), divmod(capability, 10))
    if found.shared > min(said, SHARED[capability]):
        wrong.append(f"{found.shared} bytes of shared memory, {said} expected, at most {SHARED[capability]}")
    if capability == 100:  # its operands go through a memory of their own
        if any({"LDL", "STL"} & loop.forbidden.keys() for loop in found.loops):
            wrong.append("spills in a loop")
        return wrong
    wrong += [f"in a loop: {loop.forbidden}" for loop in found.loops if loop.forbidden]
    if capability != 90:
        return wrong
    if len(found.loops) != heights(tile) and spec.k // tile.bk // tile.split > SHORT:
        wrong.append(f"{len(found.loops)} loops for {heights(tile)} heights")
    if found.whole.from_registers < found.whole.matrix or not found.whole.matrix:
        wrong.append(f"{found.whole.from_registers} of {found.whole.matrix} matrix instructions from registers")
    one_product = tile.bn // 64 * (tile.bk // 16)
    words_a_thread = tile.bn * tile.bk * spec.bits // 32 // (32 * tile.warps)
    for loop in found.loops:
        if loop.waits * one_product != loop.matrix:
            wrong.append(f"{loop.waits} waits for {loop.matrix} matrix instructions, {one_product} a product")
        if loop.wide_loads * 4 < words_a_thread:
            wrong.append(f"{loop.wide_loads} 16-byte loads for {words_a_thread} words of weights")
    return wrong


def check(specs: list[GemmSpec], capability: int) -> None:
    """Compile and collect what is wrong with any."""
    wrong = [
        f"Triton {version('triton')}, sm_{capability}: {fault}; {spec}"
        for spec, found in zip(specs, compiled(specs, capability), strict=True)
        for fault in faults(spec, capability, found)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_each_tile_on_hopper() -> None:
    check(sample(90), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89])
def test_each_tile_elsewhere(capability: int) -> None:
    check(sample(capability), capability)


@pytest.mark.compile_all
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("model", SHAPES)
def test_each_kernel(model: str, capability: int) -> None:
    check(all_specs(capability)[model], capability)
