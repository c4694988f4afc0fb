"""The machine code of align: what its threads need, and that programs need nothing from one another."""

from __future__ import annotations

import pytest

from quant_moelora.kernels.align.launch import _blocks, _sorting
from quant_moelora.kernels.common.launch import options
from tests.kernels.compiled import disassembled
from tests.kernels.sass import Program

EXPERTS = 128
PAIRS = (8, 64, 65, 512, 1000, 8192, 32_768)  # compared each with each up to 64


def compiled(pairs: int, lora: bool, capability: int) -> tuple[int, int, Program]:
    """Registers of a thread, warps, and the program that serves so many pairs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant_moelora.kernels.align.kernel import align_kernel as kernel

    few = pairs <= 64 and not lora
    block, size, warps = _blocks(pairs, few=few, slots=lora)
    lanes, compared = _sorting(pairs, EXPERTS, block, warps)
    overlap = capability >= 90
    constants = {
        "TOP_K": 8,
        "BM": 16,
        "BLOCK": block,
        "SIZE": size,
        "OWN": lanes,
        "FEW": few,
        "COMPARED": compared,
        "OVERLAP": overlap,
    }
    constants |= {} if lora else {"slots": None, "segments": None}
    types = dict.fromkeys(kernel.arg_names, "*i32") | {"ids": "*i64"}
    types |= dict.fromkeys([name for name in kernel.arg_names if name.startswith("num_")], "i32") | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")},
    )
    given = {"num_warps": warps, **options(overlap)}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
    registers, program = disassembled(made.asm["cubin"])
    return registers, warps, program


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_registers_suffice_and_nothing_is_shared(pairs: int, lora: bool, capability: int) -> None:
    """Nothing is spilled, and no word of memory is one that several programs change."""
    pytest.importorskip("triton")
    registers, warps, program = compiled(pairs, lora, capability)
    assert registers * 32 * warps <= 65_536, "a block has to fit a multiprocessor"
    names = {instruction.name for instruction in program.instructions}
    assert not names & {"LDL", "STL"}, "spills"
    assert not names & {"ATOM", "ATOMG", "RED", "REDG"}, "atomics"
