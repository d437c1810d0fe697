"""The machine code of a program as stretches: instructions that run equally often, and what they are.

Loops of machine code are found by their jumps. A loop is told which loop of the source it is by the instructions in it
that multiply, load or store: the loop around the places that they serve, in Triton's IR. A loop without such
instructions waits for something, and counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from functools import reduce
from itertools import takewhile
from typing import NamedTuple

from bench.tiles.assembly import Frames, Instruction, matrix_flops, matrix_kind, shared_bytes, unit

Nest = tuple[int, ...]  # numbers of loops of the IR, the outermost first
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
    units = Counter(unit(i.opcode) for i in instructions)
    flops = [matrix_flops(i) for i in instructions if unit(i.opcode) == "matrix"]
    return Stretch(
        nest,
        dict(units),
        None if None in flops else sum(filter(None, flops)),
        sum(shared_bytes(i, lanes) for i in instructions),
        *waits(instructions, repeated=bool(nest)),
    )


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
