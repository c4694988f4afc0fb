"""The machine code of align: what a program waits for, and in which order it asks."""

from __future__ import annotations

import pytest

from quant_moelora.kernels.align.launch import _blocks
from tests.kernels.compiled import disassembled
from tests.kernels.sass import Program

PAIRS = (8, 64, 65, 1000, 32_768)  # compared each with each up to 64
EXPERTS = 128


def compiled(pairs: int, lora: bool, capability: int) -> tuple[int, Program]:
    """Registers of a thread, and the program that serves so many pairs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant_moelora.kernels.align.kernel import align_kernel as kernel

    block, size, warps = _blocks(pairs)
    overlap = capability >= 90
    constants = {"TOP_K": 8, "BM": 16, "BINS": EXPERTS, "BLOCK": block, "SIZE": size, "FEW": pairs <= 64}
    constants |= {"OVERLAP": overlap} | ({} if lora else {"slots": None, "segments": None})
    types = dict.fromkeys(kernel.arg_names, "*i32") | {"ids": "*i64", "state": "*i64"}
    types |= dict.fromkeys(("num_pairs", "num_experts", "num_tiles"), "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")},
    )
    options = {"num_warps": warps, "launch_pdl": overlap}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return disassembled(made.asm["cubin"])


def loops(program: Program) -> list[tuple[int, int]]:
    """First and last instruction of each."""
    targets = ((program._target(instruction), at) for at, instruction in enumerate(program.instructions))
    return [(to, at) for to, at in targets if to is not None and to < at]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_the_wait_reads_memory_in_each_round(pairs: int, lora: bool, capability: int) -> None:
    """A load moved out of the loop would wait for ever; and one after the number is drawn would wait for that first."""
    pytest.importorskip("triton")
    registers, program = compiled(pairs, lora, capability)
    assert registers * 32 * _blocks(pairs)[2] <= 65_536, "a block has to fit a multiprocessor"
    polls = [at for at, i in enumerate(program.instructions) if i.name == "LDG" and "SYS" in i.modifiers]
    drawn = [at for at, i in enumerate(program.instructions) if i.name == "ATOMG" and "ADD" in i.modifiers]
    if pairs <= 64:
        assert not polls and not drawn
        return
    assert any(first <= poll <= last for poll in polls for first, last in loops(program))
    asked = [at for at, i in enumerate(program.instructions) if i.name == "LDG" and at < drawn[0]]
    assert asked, "ids are asked for while the number is drawn"
