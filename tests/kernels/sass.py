"""NVIDIA machine code as text: its loops around matrix instructions, and registers written too early.

A wgmma (HGMMA) runs while the program goes on: until WARPGROUP.DEPBAR has waited for its group, the registers that it
multiplies must not be written, and those that it adds to must not be touched. Nothing in the hardware guards them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"(?m)^(\.L_x_\d+):|^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\.L_x_\d+")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)\b")  # and not UR4
_PREDICATE = re.compile(r"!?U?P(T|\d+)")
_SHAPE = re.compile(r"64x(\d+)x")
# Their first operand is read, or they only write predicates.
_WRITE_NOTHING = frozenset(
    "BAR BRX DSETP FCHK FSETP HSETP2 ISETP JMX NANOSLEEP RET WARPGROUP WARPSYNC".split()  # noqa: SIM905
)
_MATRIX = frozenset(("HGMMA", "HMMA", "UTCHMMA"))
_MOST_GROUPS = 8  # in flight; more are a loop that never waits


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard opcode operands``."""

    guard: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """Those of the opcode."""
        return self.opcode.split(".")[1:]

    @property
    def written(self) -> range:
        """Registers written. Of HMMA as many as its widest form has, the rest is exact."""
        operands = self.operands
        if self.name in _WRITE_NOTHING:
            return range(0)
        while operands and _PREDICATE.fullmatch(operands[0]):  # SHFL, LOP3: a predicate, then the register
            operands = operands[1:]
        first = _REGISTER.match(operands[0]) if operands else None  # stores begin with an address in brackets
        return _registers(first, self._width) if first else range(0)

    @property
    def _width(self) -> int:
        modifiers = self.modifiers
        if self.name == "HGMMA":
            shape = _SHAPE.match(modifiers[0])
            assert shape is not None, self
            return int(shape[1]) // (2 if "F32" in modifiers else 4)
        if self.name == "HMMA" or "128" in modifiers or (self.name == "LDSM" and "4" in modifiers):
            return 4
        wide = {"64", "WIDE", "F64"} & set(modifiers) or (self.name == "LDSM" and "2" in modifiers)
        wide = wide or (self.name == "CS2R" and "32" not in modifiers) or self.name in {"DADD", "DFMA", "DMUL"}
        return 2 if wide else 1

    @property
    def multiplied(self) -> range:
        """Registers that a wgmma reads its left operand from; none if that is in shared memory."""
        left = _REGISTER.match(self.operands[1])
        return _registers(left, 4) if left else range(0)

    @property
    def mentioned(self) -> set[int]:
        """Registers by whose number the operands begin, and those written."""
        return {int(r) for operand in self.operands for r in _REGISTER.findall(operand)} | set(self.written)


def _registers(first: re.Match[str], count: int) -> range:
    return range(int(first[1]), int(first[1]) + count)


@dataclass(frozen=True)
class Code:
    """What is in a piece of a program.

    Attributes:
        matrix: matrix instructions.
        from_registers: of them wgmmas whose left operand is in registers.
        waits: waits for wgmmas.
        wide_loads: 16-byte loads from shared memory.
        loads: other loads from shared memory, without those of LDSM.
        wide_global: 16-byte loads from global memory into registers.
        forbidden: what costs a trip to memory or to other threads, by opcode: spills, stores to shared memory, loads
            from global memory into registers, shuffles.
        length: instructions.
    """

    matrix: int
    from_registers: int
    waits: int
    wide_loads: int
    loads: int
    wide_global: int
    forbidden: dict[str, int]
    length: int


@dataclass(frozen=True)
class Program:
    """A kernel's instructions, and the index that each label stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read what ``nvdisasm -c`` prints, less what is never executed: loads that only fill time before a fence."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for label, guard, opcode, operands in _LINE.findall(text):
            if label:
                labels[label] = len(instructions)
            elif guard != "!PT":
                split = tuple(o.strip() for o in operands.split(",") if o.strip())
                instructions.append(Instruction(guard, opcode, split))
        return cls(instructions, labels)

    def whole(self) -> Code:
        """All of it."""
        return _counted(self.instructions)

    def loops(self) -> list[Code]:
        """The innermost loops that have matrix instructions."""
        ranges = [
            (to, at) for at, i in enumerate(self.instructions) if (to := self._target(i)) is not None and to <= at
        ]
        inner = [a for a in ranges if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
        loops = (_counted(self.instructions[begin : end + 1]) for begin, end in sorted(inner))
        return [loop for loop in loops if loop.matrix]

    def _target(self, instruction: Instruction) -> int | None:
        if instruction.name not in {"BRA", "CALL"} or not (to := _TARGET.search(str(instruction))):
            return None
        return self.labels[to[0]]

    def hazards(self) -> list[str]:
        """Instructions that, on some way through the program, touch a register of a wgmma in flight.

        All ways are followed, and at a branch both, as often as they come by with other wgmmas in flight; also from
        each label on, since the text does not say where a jump table leads. Of an instruction that reads an accumulator
        in a group of registers, only the first is seen.
        """
        found: dict[int, str] = {}
        todo = [(at, _Flight()) for at in {0, *self.labels.values()}]
        seen = set(todo)
        while todo:
            at, flight = todo.pop()
            if at >= len(self.instructions):
                continue
            instruction = self.instructions[at]
            if why := flight.touched_by(instruction):
                found[at] = f"instruction {at}, {instruction}: {why}"
            after = flight.after(instruction)
            for to in self._next(at, instruction):
                if (to, after) not in seen:
                    seen.add((to, after))
                    todo.append((to, after))
        return [found[at] for at in sorted(found)]

    def _next(self, at: int, instruction: Instruction) -> Iterator[int]:
        target = self._target(instruction)
        if target is not None:
            yield target
        always = not instruction.guard and not any(_PREDICATE.fullmatch(o.split()[0]) for o in instruction.operands)
        if not (always and instruction.name in {"BRA", "EXIT", "RET"}):
            yield at + 1


@dataclass(frozen=True)
class _Flight:
    """Registers of wgmmas in flight: those of each closed group, oldest first, and those of the open one."""

    groups: tuple[tuple[frozenset[int], frozenset[int]], ...] = ()
    operands: frozenset[int] = frozenset()
    accumulators: frozenset[int] = frozenset()

    def touched_by(self, i: Instruction) -> str | None:
        if i.name == "HGMMA":
            return None
        operands = self.operands.union(*(group[0] for group in self.groups))
        accumulators = self.accumulators.union(*(group[1] for group in self.groups))
        if hit := operands & set(i.written):
            return f"writes R{min(hit)}, which a wgmma in flight multiplies"
        if hit := accumulators & i.mentioned:
            return f"touches R{min(hit)}, which a wgmma in flight adds to"
        return None

    def after(self, i: Instruction) -> _Flight:
        if i.name == "HGMMA":
            operands, accumulators = self.operands.union(i.multiplied), self.accumulators.union(i.written)
            if "gsb0" not in i.operands:
                return _Flight(self.groups, operands, accumulators)
            assert len(self.groups) < _MOST_GROUPS, "wgmmas that nothing waits for"
            return _Flight((*self.groups, (operands, accumulators)))
        if i.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(i.operands[1], 16)
            return _Flight(self.groups[len(self.groups) - left :] if left else (), self.operands, self.accumulators)
        return self


def _counted(body: list[Instruction]) -> Code:
    shared = [i for i in body if i.name == "LDS"]
    wide = sum("128" in i.modifiers for i in shared)
    forbidden = {n: count for n in ("LDL", "STL", "STS", "LDG", "SHFL") if (count := sum(i.name == n for i in body))}
    return Code(
        matrix=sum(i.name in _MATRIX for i in body),
        from_registers=sum(i.name == "HGMMA" and bool(i.multiplied) for i in body),
        waits=sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in body),
        wide_loads=wide,
        loads=len(shared) - wide,
        wide_global=sum(i.name == "LDG" and "128" in i.modifiers for i in body),
        forbidden=forbidden,
        length=len(body),
    )
