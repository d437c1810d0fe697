"""Machine code: its instructions as disassemblers write them, what each does, and stretches that run equally often.

Every instruction is read with the line of source that it serves, and with the lines whose calls led there. Loops are
found by the jumps. A loop is told which loop of the source it is by the instructions in it that multiply, load or
store: the loop around the places that they serve, in Triton's IR. A loop without such instructions waits for something,
and counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import NamedTuple

Frames = tuple[tuple[str, int], ...]  # file and line, and those of the calls that led there
Nest = tuple[int, ...]  # numbers of loops of the IR, the outermost first


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
    if match := re.search(r"v_(?:mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)", instruction.text):
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
    match = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_|tr_|d16_(?:hi_)?)?([a-z]+(?:x\d|\d+)?)", opcode)
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
    if match := re.match(r"ds_[a-z]+_?(2)?(?:addr)?(?:_?st(?:ride)?64)?_[bui](\d+)", name):
        return int(match[1] or 1) * int(match[2]) // 8 * lanes
    return 0


def _bits(modifiers: list[str]) -> int:
    """How wide an NVIDIA access is."""
    bits = [int(m.strip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|32|64|128|256)", m)]
    return bits[-1] if bits else 32


# -- stretches ---------------------------------------------------------------------------------------------------------

ANCHORS = ("matrix", "global")  # units whose instructions tell which lines of the source a loop serves


class Stretch(NamedTuple):
    """What a warp does as often as the loops of `nest` say."""

    nest: Nest
    units: dict[str, int]  # instructions by the unit that takes them
    flops: int | None  # of matrix instructions; None where the code does not say
    shared: int  # bytes moved to or from shared memory; what matrix units read there counts as well
    waits: float  # for memory that is asked for just before
    overlapped: float  # waits for memory that was asked for before products that have been formed meanwhile


def stretches(code: list[Instruction], places: Mapping[Frames, Nest], lanes: int) -> list[Stretch]:
    """The stretches of a program.

    Args:
        code: its machine code.
        places: the loops around each place in the source where something is done.
        lanes: threads of a warp.
    """
    loops, around = find_loops(code), _around(places)
    served: dict[int, Nest] = {}  # by a loop of the code: the loops of the IR around all that it does
    for head, body in loops.items():
        nests = [nest for i in body if unit(code[i].opcode) in ANCHORS and (nest := around(code[i])) is not None]
        served[head] = reduce(_common, nests) if nests else ()
    members: dict[Nest, list[Instruction]] = {}
    for i, instruction in enumerate(code):
        inside = [head for head, body in loops.items() if i in body]
        nest = tuple(sorted({served[head][-1] for head in inside if served[head]}))
        members.setdefault(nest, []).append(instruction)
    return [_stretch(nest, instructions, lanes) for nest, instructions in members.items()]


def _stretch(nest: Nest, instructions: list[Instruction], lanes: int) -> Stretch:
    units = dict(Counter(unit(i.opcode) for i in instructions))
    flops = [matrix_flops(i) for i in instructions if unit(i.opcode) == "matrix"]
    all_flops = None if None in flops else sum(filter(None, flops))
    shared = sum(shared_bytes(i, lanes) for i in instructions)
    return Stretch(nest, units, all_flops, shared, *waits(instructions, repeated=bool(nest)))


def _around(places: Mapping[Frames, Nest]) -> Callable[[Instruction], Nest | None]:
    """Finds the loops around what an instruction serves: its place, or what is common to those of the nearest call."""
    nests: dict[Frames, Nest] = {}
    for frames, nest in places.items():
        for outer in (frames[i:] for i in range(len(frames))):
            nests[outer] = _common(nests.get(outer, nest), nest)

    def find(instruction: Instruction) -> Nest | None:
        frames = instruction.frames
        return next((nests[frames[i:]] for i in range(len(frames)) if frames[i:] in nests), None)

    return find


def _common(a: Nest, b: Nest) -> Nest:
    return tuple(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# -- waiting for memory ------------------------------------------------------------------------------------------------

STEADY = 4  # iterations over which the waits of a loop are counted, after as many that fill its pipeline


def waits(instructions: list[Instruction], repeated: bool) -> tuple[float, float]:
    """How often memory is waited for that was asked for since the last such wait; what else is waited for has come.

    Returns the waits for what is asked for just before, and those where products were formed in between. Of a loop's
    instructions (`repeated`) in one of many iterations: copies that are several iterations ahead of their use share a
    wait. Otherwise what is still to come at the end counts as waited for.
    """
    if repeated:
        filled, steady = (_waits(instructions * count) for count in (STEADY, 2 * STEADY))
        return (steady[0] - filled[0]) / STEADY, (steady[1] - filled[1]) / STEADY
    exposed, overlapped, outstanding = _waits(instructions)
    return exposed + outstanding, overlapped


_MAY_BE_OUTSTANDING = re.compile(r"(?:DEPBAR\.LE SB0, |s_waitcnt .*?vmcnt\()(0x[0-9a-f]+|\d+)")


def _waits(instructions: list[Instruction]) -> tuple[int, int, bool]:
    """The waits of both kinds, and whether at the end something asked for since the last is still outstanding."""
    count, products = [0, 0], 0
    copies, loads = list[tuple[int, int]](), list[tuple[int, int]]()  # how many waits and products were before each

    def wait(issued: list[tuple[int, int]]) -> None:
        if new := [formed for waited, formed in issued if waited == sum(count)]:
            count[new[-1] < products] += 1

    for instruction in instructions:
        opcode = instruction.opcode
        if opcode.startswith("LDGDEPBAR") or re.match(r"(global|buffer)_load", opcode):
            copies.append((sum(count), products))
        elif opcode.startswith(("LDG.", "LD.")):
            loads.append((sum(count), products))
        elif match := _MAY_BE_OUTSTANDING.search(instruction.text):
            arrived = max(0, len(copies) - int(match[1], 0))
            wait(copies[:arrived])
            copies = copies[arrived:]
        elif (matrix := matrix_kind(opcode) is not None) or opcode.startswith(("STS", "MUFU")):
            wait(loads)  # what came into registers is used here at last
            loads = []
            products += matrix
    return count[0], count[1], any(waited == sum(count) for waited, _ in copies + loads)


# -- loops -------------------------------------------------------------------------------------------------------------

_JUMP = re.compile(r"(?:@!?U?P\w+\s+)?(?:BRA|CALL|RET|EXIT|s_c?branch|s_endpgm|s_setpc)\S*(?:.*?([.$]\w+))?")
_NO_FALL_THROUGH = re.compile(r"BRA\S*\s+`|RET|EXIT|s_branch|s_endpgm|s_setpc")


def find_loops(code: list[Instruction]) -> dict[int, Set[int]]:
    """The loops of machine code: by its first instruction, the instructions of each.

    A loop is a jump back to an instruction that every way to the jump goes through, and all that leads to the jump.
    """
    labels = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    jumps = {i: labels.get(match[1]) for i, instruction in enumerate(code) if (match := _JUMP.match(instruction.text))}
    heads = sorted({0, *labels.values(), *(i + 1 for i in jumps)} - {len(code)})
    blocks = [range(start, end) for start, end in zip(heads, [*heads[1:], len(code)], strict=True)]
    number = {block.start: n for n, block in enumerate(blocks)}
    predecessors: list[set[int]] = [set() for _ in blocks]
    for n, block in enumerate(blocks):
        if (target := jumps.get(block[-1])) is not None:
            predecessors[number[target]].add(n)
        if n + 1 < len(blocks) and not _NO_FALL_THROUGH.match(code[block[-1]].text):
            predecessors[n + 1].add(n)

    dominators, loops = _dominators(predecessors), dict[int, Set[int]]()
    for head, sources in enumerate(predecessors):
        body, pending = {head}, [source for source in sources if head in dominators[source]]
        if pending:
            while pending:
                if (n := pending.pop()) not in body:
                    body.add(n)
                    pending += predecessors[n]
            loops[heads[head]] = {i for n in body for i in blocks[n]}
    return loops


def _dominators(predecessors: list[set[int]]) -> list[set[int]]:
    """For each block those that every way from the first to it goes through."""
    dominators = [{0}, *(set(range(len(predecessors))) for _ in predecessors[1:])]
    changed = True
    while changed:
        changed = False
        for n, sources in enumerate(predecessors[1:], 1):
            through = {n}.union(set.intersection(*(dominators[m] for m in sources))) if sources else {n}
            changed |= through != dominators[n]
            dominators[n] = through
    return dominators
