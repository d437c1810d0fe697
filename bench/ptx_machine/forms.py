"""The table of instruction forms: an instruction that no row of it describes is not executed, but raises `Unsupported`.

A row is a pattern of opcodes, every modifier spelled out, the kinds of its operands, the section of NVIDIA's PTX ISA
that says what it does, and what builds it:

    @form(r"ex2\\.approx(\\.ftz)?\\.f32", "d a", "Floating Point Instructions: ex2")
    def exponential(operands, flushes): ...  # a function of `Threads`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.parse import Address, Instruction, Operand, Pair, Register, Vector, Word
from bench.ptx_machine.threads import Threads

Execute = Callable[[Threads], None]
Operands = tuple[Any, ...]  # of a row: `Operand`s of the kinds that it says
KINDS: dict[str, Callable[[Operand], bool]] = {
    "d": lambda x: isinstance(x, Register) or x == Word("_"),  # written
    "a": lambda x: isinstance(x, (Register, Word)) and x != Word("_"),  # read
    "d|p": lambda x: isinstance(x, Pair),
    "[a]": lambda x: isinstance(x, Address),
    "{}": lambda x: isinstance(x, Vector),
    "{}|a": lambda x: isinstance(x, (Vector, Register)),
    "#": lambda x: isinstance(x, Word) and re.fullmatch(r"-?(\d+|0x[\da-fA-F]+)", x.text) is not None,
}


class Form(NamedTuple):
    """A row."""

    pattern: re.Pattern[str]
    operands: tuple[str, ...]
    section: str
    build: Callable[..., Execute]

    def fits(self, instruction: Instruction) -> re.Match[str] | None:
        """The match of its opcode, where its operands are these as well."""
        match = self.pattern.fullmatch(instruction.opcode)
        same = len(self.operands) == len(instruction.operands)
        pairs = zip(self.operands, instruction.operands, strict=False)
        return match if match and same and all(KINDS[kind](x) for kind, x in pairs) else None


TABLE: list[Form] = []


def form(pattern: str, operands: str, section: str) -> Callable[[Callable[..., Execute]], Callable[..., Execute]]:
    """Adds a row, whose function takes the operands of an instruction and the groups of the pattern.

    Args:
        operands: a word of `KINDS` each.
        section: of the PTX ISA, by its title.
    """

    def add(build: Callable[..., Execute]) -> Callable[..., Execute]:
        TABLE.append(Form(re.compile(pattern), tuple(operands.split()), section, build))
        return build

    return add


@lru_cache(maxsize=4096)
def _of_opcode(opcode: str) -> tuple[Form, ...]:
    return tuple(row for row in TABLE if row.pattern.fullmatch(opcode))


def describe(instruction: Instruction) -> Form:
    """The row of an instruction.

    Raises:
        Unsupported: there is none.
    """
    for row in _of_opcode(instruction.opcode):
        if row.fits(instruction):
            return row
    raise Unsupported(f"{instruction.opcode} with {len(instruction.operands)} operands: {instruction.line}")


def build(instruction: Instruction) -> Execute:
    """What an instruction does.

    Raises:
        Unsupported: no row describes it.
    """
    row = describe(instruction)
    match: Any = row.fits(instruction)
    return row.build(instruction.operands, *match.groups())


def sections() -> Iterator[str]:
    """Those of the PTX ISA that the table names."""
    yield from dict.fromkeys(row.section for row in TABLE)
