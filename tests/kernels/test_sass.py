"""The reader of machine code, on planted faults."""

import pytest

from tests.kernels.sass import Instruction, Program

GOOD = """
        MOV R3, RZ
.L_x_1:
        LDS.128 R4, [R3+UR4]
        LDS R8, [R3]
        @!PT LDS RZ, [RZ]
        LOP3.LUT R4, R4, R8, RZ, 0xc0, !PT
        WARPGROUP.ARRIVE
        HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24
        UIADD3 UR24, UR24, 0x1, URZ
        HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0
        IADD3 R3, R3, 0x1, RZ
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        ISETP.GE.AND P0, PT, R3, R20, PT
        @!P0 BRA `(.L_x_1)
        STG.E.64 desc[UR4][R2.64], R24
        EXIT
"""


def program(text: str) -> Program:
    """The text as nvdisasm prints it."""
    lines = (line.strip() for line in text.splitlines())
    return Program.parse("\n".join(line if line.startswith(".") else f"    /*0000*/    {line} ;" for line in lines))


def edited(old: str, new: str) -> Program:
    """GOOD with a change."""
    assert GOOD.count(old) == 1
    return program(GOOD.replace(old, new))


def test_a_clean_loop() -> None:
    clean = program(GOOD)
    assert clean.hazards() == []
    (loop,) = clean.loops()
    assert (loop.matrix, loop.from_registers, loop.waits) == (2, 2, 1)
    assert (loop.wide_loads, loop.loads, loop.length, loop.forbidden) == (1, 1, 11, {})


@pytest.mark.parametrize(
    "line",
    ["LDL R9, [R1]", "STL.64 [R1], R2", "STS.128 [R3], R12", "LDG.E R9, [R2]", "SHFL.BFLY PT, R9, R3, 0x1, 0x1f"],
)
def test_what_a_loop_must_not_have(line: str) -> None:
    (loop,) = edited("WARPGROUP.ARRIVE", line).loops()
    assert [(line.startswith(name), count) for name, count in loop.forbidden.items()] == [(True, 1)]


def test_weights_in_shared_memory() -> None:
    (loop,) = edited("R24, R4, gdesc[UR8], R24", "R24, gdesc[UR4], R24").loops()
    assert (loop.matrix, loop.from_registers) == (2, 1)


@pytest.mark.parametrize(
    ("line", "register"),
    [
        ("IADD3 R11, R3, 0x1, RZ", 11),  # the last of the second wgmma's
        ("MOV R4, R3", 4),
        ("@P1 MOV R7, R3", 7),
        ("LDS.64 R2, [R3]", None),
        ("LDS.128 R2, [R3]", 4),
        ("IMAD.WIDE R6, R3, 0x4, R12", 6),
        ("CS2R R10, SRZ", 10),
        ("CS2R.32 R3, SRZ", None),
        ("LDSM.16.M88.4 R0, [R3]", None),
        ("LDSM.16.M88.4 R2, [R3]", 4),
        ("SHFL.BFLY PT, R5, R3, 0x1, 0x1f", 5),
        ("LOP3.LUT P1, RZ, R4, 0x1, RZ, 0xc0, !PT", None),
        ("ISETP.GE.AND P1, PT, R4, R8, PT", None),
        ("STS [R4], R5", None),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]", None),
        ("UMOV UR4, UR24", None),
        ("R2UR UR4, R3", None),
        ("FADD R3, R24, R3", 24),
        ("STS [R3], R31", 31),
        ("FADD R32, R3, R3", None),
    ],
)
def test_a_register_of_a_wgmma_in_flight(line: str, register: int | None) -> None:
    found = edited("IADD3 R3, R3, 0x1, RZ", line).hazards()
    assert len(found) == (register is not None)
    assert all(f"R{register}," in hazard for hazard in found)


def test_a_hazard_in_the_next_step() -> None:
    """One group may stay in flight: the loop's first load then comes too early."""
    (hazard,) = edited("gsb0, 0x0", "gsb0, 0x1").hazards()[:1]
    assert "LDS.128 R4" in hazard


def test_a_hazard_behind_a_branch() -> None:
    text = GOOD.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P2 BRA `(.L_x_2)\n WARPGROUP.DEPBAR.LE gsb0, 0x0")
    found = program(text.replace("STG.E", "EXIT\n.L_x_2:\n STG.E")).hazards()
    assert len(found) == 1 and "STG.E.64" in found[0]


def test_code_that_is_never_reached_is_no_hazard() -> None:
    assert edited("EXIT", "EXIT\n HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0\n MOV R4, RZ").hazards() == []


def test_only_inner_loops_with_matrix_instructions() -> None:
    outer = ".L_x_0:\n" + GOOD.replace("EXIT", ".L_x_3:\nMOV R9, RZ\n@P0 BRA `(.L_x_3)\n@P3 BRA `(.L_x_0)\nEXIT")
    assert [loop.matrix for loop in program(outer).loops()] == [2]


@pytest.mark.parametrize(
    ("text", "count"),
    [("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24", 64), ("HGMMA.64x32x16.F16 R24, gdesc[UR4], R24", 8)],
)
def test_accumulators(text: str, count: int) -> None:
    opcode, _, operands = text.partition(" ")
    instruction = Instruction("", opcode, tuple(operands.split(", ")))
    assert instruction.written == range(24, 24 + count)
