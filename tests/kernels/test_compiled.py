"""The machine code of the grouped GEMM, at the tiles that real layers get."""

from dataclasses import replace
from importlib.metadata import version

import pytest

from quant_moelora.kernels.grouped_gemm.layer import WeightShape, shared_bytes
from quant_moelora.kernels.grouped_gemm.spec import GemmSpec, Tile
from quant_moelora.kernels.grouped_gemm.specialized import config
from tests.kernels.compiled import SHAPES, Compiled, all_specs, compiled, sample

# Bytes of shared memory that a block may have: CUDA C++ Programming Guide, table of compute capabilities.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
FEW = 8  # registers that a loop of the specialised kernel may spill, next to some 200 other instructions
SPECIALIZED = (128, 192)  # rows of the specialised kernel's tiles
SHORT = 8  # steps; a loop that has no more may be unrolled


def heights(tile: Tile) -> int:
    """Loops of a tile: one for each height; see `Tile`."""
    powers = tile.bm.bit_length() - 4  # 16, 32, .. bm
    between = {16: 0, 32: 0, 64: 1, 128: 3, 192: 4}  # 48; and 80 and 96; and 192
    return powers + (between[tile.bm] if tile.mixed else 0)


def faults(spec: GemmSpec, capability: int, found: Compiled) -> list[str]:
    """What is wrong with a compiled kernel."""
    tile = spec.tile
    wrong = [f"hazard: {hazard}" for hazard in found.hazards]
    if tile.consumers:
        if found.shared > SHARED[capability]:
            wrong.append(f"{found.shared} bytes of shared memory, at most {SHARED[capability]}")
        return wrong + specialized_faults(spec, found)
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


def specialized_faults(spec: GemmSpec, found: Compiled) -> list[str]:
    """As `faults`. Each consumer has its own loops, of two steps, which load weights into registers."""
    tile, wrong = spec.tile, list[str]()
    loops = tile.consumers * len(config.heights(tile.bm))
    if len(found.loops) != loops and spec.k // 64 > SHORT:
        wrong.append(f"{len(found.loops)} loops, not {loops}")
    if found.whole.from_registers < found.whole.matrix or not found.whole.matrix:
        wrong.append(f"{found.whole.from_registers} of {found.whole.matrix} matrix instructions from registers")
    for loop in found.loops:
        spills = max(loop.forbidden.get("LDL", 0), loop.forbidden.get("STL", 0))
        if spills > FEW or {"STS", "SHFL"} & loop.forbidden.keys():
            wrong.append(f"in a loop: {loop.forbidden}")
        if loop.waits * 4 not in (loop.matrix, loop.matrix // 2):
            wrong.append(f"{loop.waits} waits for {loop.matrix} matrix instructions, 4 or 8 a step")
        if loop.wide_global * 4 != loop.waits * spec.bits:
            wrong.append(f"{loop.wide_global} 16-byte loads of weights for {loop.waits} steps")
    return wrong


def check(specs: list[GemmSpec], capability: int) -> list[Compiled]:
    """Compile, collect what is wrong with any, and return them."""
    made = compiled(specs, capability)
    wrong = [
        f"Triton {version('triton')}, sm_{capability}: {fault}; {spec}"
        for spec, found in zip(specs, made, strict=True)
        for fault in faults(spec, capability, found)
    ]
    assert not wrong, "\n".join(wrong)
    return made


@pytest.mark.slow
def test_each_tile_on_hopper() -> None:
    check([spec for spec in sample(90) if not spec.tile.consumers], 90)


@pytest.mark.slow
@pytest.mark.parametrize("bm", SPECIALIZED)
def test_the_specialized_kernel(bm: int) -> None:
    """The main scheme with the activation, and the one with most scales and zero points, in an odd number of steps."""
    main = next(spec for spec in sample(90) if spec.activation and spec.tile.bm == 128)
    most = replace(main, bits=8, group=16, k=2880, zeros=True, one_step=False, fp16=True, has_bias=True)
    most = replace(most, activation="", gather=False, n_out=most.n)
    check([replace(spec, tile=config.specialized_tile(bm)) for spec in (main, most)], 90)


def test_all_specialized_tiles_are_compiled() -> None:
    found = {spec.tile for spec in sample(90) if spec.tile.consumers}
    assert found == {config.specialized_tile(bm) for bm in SPECIALIZED}


@pytest.mark.slow
def test_each_tile_elsewhere() -> None:
    """sm_89 has the tiles of sm_80, in less shared memory; its own code is read by `make compile-all`."""
    specs = sample(80)
    assert sample(89) == specs
    assert max(found.shared for found in check(specs, 80)) <= SHARED[89]


@pytest.mark.compile_all
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("model", SHAPES)
def test_each_kernel(model: str, capability: int) -> None:
    check(all_specs(capability)[model], capability)
