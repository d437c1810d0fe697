"""The instructions of machine code: as disassemblers write them, what each does, and which unit takes it.

Every instruction is read with the line of source that it serves, and with the lines whose calls led there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

Frames = tuple[tuple[str, int], ...]  # file and line, and those of the calls that led there


@dataclass(frozen=True)
class Instruction:
    """An opcode with its modifiers, and the file name and line of source it serves; what else is known beside it."""

    opcode: str
    file: str = ""
    line: int = 0
    callers: Frames = field(default=(), compare=False)
    text: str = field(default="", compare=False)  # with predicate and operands
    labels: tuple[str, ...] = field(default=(), compare=False)  # by which jumps name it

    @property
    def frames(self) -> Frames:
        return (self.file, self.line), *self.callers


# -- text --------------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"([.$]\w+):")
_SASS_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_SASS_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)[^;]*)")


def sass_instructions(text: str) -> Iterator[Instruction]:
    """The instructions of `nvdisasm -c -gi`."""
    frames, labels = list[tuple[str, int]](), list[str]()
    within = False  # a run of lines about the source: a line and its callers, one by one
    for line in text.splitlines():
        if match := _SASS_LINE.search(line):
            frames = [*(frames if within else []), (Path(match[1]).name, int(match[2]))]
        elif match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _SASS_CODE.search(line):
            yield _instruction(match[2], match[1], frames, labels)
            labels = []
        within = "//##" in line


_AMD_FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
_AMD_LINE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_AMD_CALLER = re.compile(r"@\[ ([^:]*):(\d+):")
_AMD_CODE = re.compile(r"\s+(([a-z]\w*)(?:\s[^;]*)?)(?:;|$)")


def amd_instructions(text: str) -> Iterator[Instruction]:
    """The instructions of AMD assembly."""
    files, frames, labels = dict[str, str](), list[tuple[str, int]](), list[str]()
    for line in text.splitlines():
        if match := _AMD_FILE.match(line):
            files[match[1]] = Path(match[2]).name
        elif match := _AMD_LINE.match(line):
            callers = [(Path(name).name, int(number)) for name, number in _AMD_CALLER.findall(line)]
            frames = [(files.get(match[1], ""), int(match[2])), *callers]
        elif match := _LABEL.match(line):
            labels.append(match[1])
        elif match := _AMD_CODE.match(line):
            yield _instruction(match[2], match[1], frames, labels)
            labels = []


def _instruction(opcode: str, text: str, frames: list[tuple[str, int]], labels: list[str]) -> Instruction:
    (file, line), *callers = frames or [("", 0)]
    return Instruction(opcode, file, line, tuple(callers), text.strip(), tuple(labels))


# -- what an instruction does ------------------------------------------------------------------------------------------

UNITS = {
    "matrix": "products of matrices",
    "special": "exponentials, reciprocals and their like",
    "fma": "fp32 sums and products, integer products",
    "alu": "other integers, addresses, comparisons, conversions, moves",
    "shared": "shared memory, shuffles, tensor memory",
    "global": "global memory",
    "control": "jumps, barriers, waits, what is done once a warp",
}
_UNITS = {
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt)_",
    "fma": r"F(ADD|MUL|FMA)|H(ADD|MUL|FMA)2|IMAD|v_(pk_)?(add|sub|mul|fma|fmac)_(f32|f16|bf16)|v_(mul|mad)_",
    "shared": r"LDS|STS|LDSM|STSM|SHFL|ATOMS|LDTM|STTM|ds_",
    "control": r"BAR|BRA|EXIT|RET|CALL|DEPBAR|LDGDEPBAR|NOP|SYNCS|MEMBAR|FENCE|WARP|NANOSLEEP|BPT|ELECT|LDC|U[A-Z]|s_",
}


@cache
def unit(opcode: str) -> str:
    """Which of `UNITS` takes an instruction: "alu" those that no other does."""
    if matrix_kind(opcode):
        return "matrix"
    if access(opcode):
        return "global"
    return next((name for name, pattern in _UNITS.items() if re.match(pattern, opcode)), "alu")


@cache
def matrix_kind(opcode: str) -> str | None:
    """HMMA (warp), HGMMA (four warps), UTCHMMA (tensor memory), mfma or wmma (AMD), with TF32's apart; else None."""
    if match := re.match(r"(?:UTC)?[A-Z]G?MMA\b|UTC[A-Z]+MMA\b", opcode):
        return f"{match[0]}.TF32" if "TF32" in opcode else match[0]
    if match := re.match(r"v_s?(mfma|wmma)_", opcode):
        return f"{match[1]}.xf32" if "xf32" in opcode else match[1]
    return None


def matrix_flops(instruction: Instruction) -> int | None:
    """FLOPs of a matrix instruction, a warp's share; None where operands and not the name say how large it is."""
    if match := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.text):  # of four warps
        return 2 * prod(map(int, match.groups())) // 4
    if match := re.search(r"\bHMMA\.16(8)(4|8|16)\b", instruction.text):
        return 2 * 16 * prod(map(int, match.groups()))
    if match := re.search(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", instruction.text):
        return 2 * prod(map(int, match.groups()))
    return None


def is_atomic(opcode: str) -> bool:
    """Whether an instruction adds to global memory, in an order nobody knows."""
    return re.match(r"(ATOM|RED)G?\b|(global|buffer|flat)_atomic", opcode) is not None


TENSOR_COPY = 1 << 10  # bytes; a tensor copy moves whole rows, and all that matters is that it is wide
_AMD_WIDTHS = {"byte": 1, "short": 2, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
               "ubyte": 1, "sbyte": 1, "sshort": 2, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16,
               "u8": 1, "i8": 1, "u16": 2, "i16": 2}  # fmt: skip


@cache
def access(opcode: str) -> tuple[bool, int] | None:
    """Of an access to global memory: whether it stores, and a thread's bytes; else None."""
    name, *modifiers = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP", "UTMASTG"):
        return name == "UTMASTG", TENSOR_COPY
    if name in ("LDG", "LDGSTS", "LD", "STG", "ST"):
        return name in ("STG", "ST"), _bits(modifiers) // 8
    match = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_|d16_)?([a-z]+(?:x\d|\d+)?)", opcode)
    return (match[1] == "store", _AMD_WIDTHS[match[2]]) if match else None


def shared_bytes(instruction: Instruction, lanes: int) -> int:
    """Bytes that a warp moves to or from shared memory, conflicts between banks apart."""
    name, *modifiers = instruction.opcode.split(".")
    if match := re.search(r"HGMMA\.64x(\d+)x\S+ R\d+, (gdesc)?", instruction.text):
        # a warp's quarter of 32 bytes for each column of B, and for each of 64 rows of A that are not in registers
        return (int(match[1]) + (64 if match[2] else 0)) * 32 // 4
    if name in ("LDSM", "STSM"):
        return (int(modifiers[-1]) if modifiers[-1].isdecimal() else 1) * 128  # matrices of 8 rows of 16 bytes
    if name in ("LDGSTS", "LDS", "STS", "SHFL"):
        return _bits(modifiers) // 8 * lanes
    if match := re.match(r"ds_[a-z]+(2)?(?:st64)?_[bui](\d+)", name):
        return int(match[1] or 1) * int(match[2]) // 8 * lanes
    return 0


def _bits(modifiers: list[str]) -> int:
    """How wide an NVIDIA access is."""
    bits = [int(m.strip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|32|64|128|256)", m)]
    return bits[-1] if bits else 32
