"""The machine code of LoRA's kernels, by themselves and beside a GEMM, as real layers launch them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

import pytest

from quant_moelora.kernels.grouped_gemm.spec import GemmSpec
from quant_moelora.kernels.lora.spec import EXPAND_BLOCK, LoRASpec
from tests.kernels.compiled import gpus
from tests.kernels.lora_compiled import Case, Kernel, Launched, launched
from tests.kernels.sass import Code, Instruction

SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a multiprocessor: CUDA C++ Programming Guide, compute capabilities
RESERVED = 1 << 10  # bytes of shared memory that each block has beside its own
# Instructions that bring registers of a thread back from memory, or to it: of the activation, which is held to 128
# registers; where it holds many parts of v or of gate_up, or ranks come in several blocks (measured, and more than is
# good); of a GEMM whose rider takes ranks in several blocks; of others, where ptxas spills what it need not.
FEW, MANY, OF_RIDERS, FEWEST = 28, 144, 16, 2
BLOCKS = 4  # of 128 threads on a multiprocessor, which suffice
ROWS = 16  # of a segment that are computed at once
SAMPLE = [
    ("qwen3-30b-a3b", 1, 64, 90),
    ("qwen3-30b-a3b", 64, 16, 90),
    ("deepseek-v3", 1024, 16, 90),
    ("mixtral-8x7b", 16, 16, 80),
]


def _wide(instructions: Iterable[Instruction]) -> int:
    """Loads of 16 bytes from global memory."""
    return sum(i.name in {"LDG", "LDGSTS"} and "128" in i.modifiers for i in instructions)


def _loads(elements: int, size: int, threads: int) -> int:
    """Loads of 16 bytes that each thread needs for so many elements."""
    return elements * size // 16 // threads


def _factors(spec: LoRASpec, threads: int) -> int:
    """Those of the activation's three factors, for one block of columns."""
    return (3 if spec.gated else 2) * _loads(spec.cut.expand_ranks * spec.cut.activation_block, 2, threads)


def _step(spec: LoRASpec, threads: int) -> int:
    """Those of the activation for one block of columns: factors, and gate_up or its parts."""
    rows = 8 if spec.direct else ROWS  # of a pair of its own, what its threads find at once
    gate_up = (2 if spec.gated else 1) * spec.gemm_parts
    size = 2 if spec.gemm_parts == 1 else 4
    return _factors(spec, threads) + gate_up * _loads(rows * spec.cut.activation_block, size, threads)


def _of_riders(spec: LoRASpec, threads: int, *, shrinks: bool) -> int:
    """Those of the first shrink, for each of its heights, or of the second expand."""
    if not shrinks:
        return _loads(spec.cut.expand_ranks * EXPAND_BLOCK, 2, threads)
    heights = [(16, 128)] if spec.direct else [(16, 128), (32, 64)]
    return sum(_loads((spec.cut.shrink_ranks + rows) * columns, 2, threads) for rows, columns in heights)


def _most_spills(found: Launched) -> int:
    """Of a kernel, loads and stores each."""
    spec = found.spec
    if found.kernel.name == "activate_kernel":
        return MANY if found.in_blocks or spec.cut.parts13 > 4 or spec.gemm_parts > 1 else FEW
    if found.in_blocks and found.gemm:
        return MANY if spec.cut.parts2 > 16 else OF_RIDERS
    return FEWEST


def faults(found: Launched, capability: int) -> list[str]:
    """What is wrong with a compiled kernel."""
    kernel, spec = found.kernel, found.spec
    code = kernel.program.instructions
    wrong = [f"hazard: {hazard}" for hazard in kernel.hazards]
    most = _most_spills(found)
    spills = max(sum(i.name == name for i in code) for name in ("LDL", "STL"))
    if spills > most:
        wrong.append(f"{spills} instructions that spill, at most {most} expected")
    if narrow := [str(i) for i in code if i.name in {"LDG", "LDGSTS"} and {"U8", "S8", "U16", "S16"} & {*i.modifiers}]:
        wrong.append(f"{len(narrow)} loads of 2 bytes, as {narrow[0]}")
    if kernel.name == "activate_kernel":
        return wrong + _order_faults(kernel, spec)
    if (wide := _wide(code)) < (least := _of_riders(spec, kernel.threads, shrinks=found.shrinks)):
        wrong.append(f"{wide} loads of 16 bytes, at least {least} expected")
    if found.gemm is not None:
        return wrong + _gemm_faults(kernel, *found.gemm, capability, longer=1.2 if found.in_blocks else 1.1)
    if copies := [str(i) for i in code if i.name == "LDGSTS" and "128" not in i.modifiers]:
        wrong.append(f"{len(copies)} narrow copies to shared memory, as {copies[0]}")
    return wrong


def _order_faults(kernel: Kernel, spec: LoRASpec) -> list[str]:
    """The activation loads what it can before it waits for the launch before, and all of a step before it uses any."""
    code = kernel.program.instructions
    names = [i.name for i in code]
    barriers, wrong = [at for at, name in enumerate(names) if name == "BAR"], list[str]()
    wide = [_wide(code[begin:end]) for begin, end in itertools.pairwise((0, *barriers, len(code)))]
    step, several = _step(spec, kernel.threads), spec.activation_steps > 1
    # The first step's loads, and in the loop those of the following one, maybe without a barrier between the two.
    together = [count for count in wide if count] if several else wide[:1]
    if min(together) < step or (several and sum(together) < 2 * step):
        wrong.append(f"{together} loads of 16 bytes between barriers, {step} in a step")
    if spec.overlap:
        wait = names.index("ACQBULK")
        early, expected = _wide(code[:wait]), _factors(spec, kernel.threads)
        if early != expected:
            wrong.append(f"{early} loads of 16 bytes before the wait for the launch before, {expected} expected")
        if barriers[0] < wait:
            wrong.append("a barrier before the wait for the launch before")
    return wrong


def _gemm_faults(kernel: Kernel, gemm: GemmSpec, base: Kernel, capability: int, *, longer: float) -> list[str]:
    """A rider changes nothing of the product beside it, but that loops may be up to ``longer`` times as long."""
    wrong: list[str] = []
    blocks, without = _blocks(kernel, capability), _blocks(base, capability)
    if blocks < min(without, BLOCKS):
        wrong.append(f"{blocks} blocks on a multiprocessor, {without} without a rider")
    if gemm.tile.bm == 16 and kernel.registers > 128:
        wrong.append(f"{kernel.registers} registers")
    if capability == 90 and not any(loop.from_registers for loop in kernel.program.loops()):
        wrong.append("no loop of wgmmas")
    lengths: dict[str, list[int]] = {}
    for loop in kernel.program.loops():
        lengths.setdefault(_of_loop(loop), []).append(loop.length)
    for loop in base.program.loops():
        alike = lengths.get(_of_loop(loop), [])
        if not alike:
            wrong.append(f"no loop as {loop}")
        elif min(alike) > longer * loop.length:
            wrong.append(f"a loop of {min(alike)} instructions, {loop.length} without a rider")
    return wrong


def _of_loop(loop: Code) -> str:
    """A loop but for its length."""
    return str(dataclasses.replace(loop, length=0))


def _blocks(kernel: Kernel, capability: int) -> int:
    """Blocks that fit a multiprocessor, by registers, which come in eights, and by shared memory."""
    registers = -(-kernel.registers // 8) * 8
    return min((1 << 16) // (registers * kernel.threads), SHARED[capability] // (kernel.shared + RESERVED))


def check(cases: list[tuple[str, int, int, int]]) -> None:
    """Compile what forwards of a model, tokens, rank and capability launch, and collect what is wrong with any."""
    forwards = [Case(*case[:3], gpus(case[3])[-1]) for case in cases]
    wrong: list[str] = []
    for case, all_found in zip(cases, launched(forwards), strict=True):
        names = Counter(found.kernel.name for found in all_found)
        assert names["activate_kernel"] == names["shrink13_kernel"] == names["expand2_kernel"] == 1, names
        assert names["grouped_gemm_kernel"] == (2 if case[1] <= 64 else 0), names
        wrong += [
            f"Triton {version('triton')}, {case}, {found.kernel.name}: {fault}; {found.spec}"
            for found in all_found
            for fault in faults(found, case[3])
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_some_forwards() -> None:
    check(SAMPLE)


@pytest.mark.compile_all
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"])
def test_each_forward(model: str, capability: int) -> None:
    check([(model, tokens, rank, capability) for tokens, rank in itertools.product((1, 16, 64, 1024), (16, 64))])
