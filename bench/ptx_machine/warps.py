"""Numbers exchanged between the threads of a warp."""

from __future__ import annotations

import numpy as np

from bench.ptx_machine.barriers import whole_warps
from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.parse import Operand, Pair, Word
from bench.ptx_machine.registers import NUMBERS, reader, writer
from bench.ptx_machine.threads import LANE, WARP, Threads

SECTION = "Data Movement and Conversion Instructions: shfl.sync"


@form(r"shfl\.sync\.(bfly|idx|up|down)\.b32", "d a a a a", SECTION)
def shuffle(operands: Operands, mode: str) -> Execute:
    return _shuffle(operands[0], None, operands[1:], mode)


@form(r"shfl\.sync\.(bfly|idx|up|down)\.b32", "d|p a a a a", SECTION)
def shuffle_and_say(operands: Operands, mode: str) -> Execute:
    pair: Pair = operands[0]
    return _shuffle(pair.first, pair.second, operands[1:], mode)


def _shuffle(to: Operand, inside: Operand | None, operands: Operands, mode: str) -> Execute:
    """The number of another lane; a lane that is out of range keeps its own."""
    whole = whole_warps(operands[3])
    put, say = writer(to, "b32"), writer(inside or Word("_"), "pred")
    value, where, clamp = (reader(x, "u32") for x in operands[:3])

    def execute(s: Threads) -> None:
        whole(s)
        values, b, c = (s.by_warp(x(s)).astype(np.int64) for x in (value, where, clamp))
        segment, limit = c >> 8 & 31, c & 31
        first, last = LANE & segment, (LANE & segment) | (limit & ~segment)
        b = b & 31
        if mode == "up":
            source = LANE - b
            holds = source >= last  # for up the limit is the lowest lane
        elif mode == "down":
            source = LANE + b
            holds = source <= last
        else:
            source = LANE ^ b if mode == "bfly" else first | (b & ~segment)
            holds = source <= last
        source = np.where(holds, source, LANE)
        put(s, np.take_along_axis(values, source, 1).astype(np.uint32).reshape(-1))
        say(s, holds.reshape(-1))

    return execute


@form(
    r"redux\.sync\.(max|min|add|and|or|xor)\.(u32|s32|b32)",
    "d a a",
    "Parallel Synchronization and Communication Instructions: redux.sync",
)
def reduce(operands: Operands, name: str, kind: str) -> Execute:
    return _reduce(operands, name, kind, nan=False)


@form(
    r"redux\.sync\.(max|min)(\.NaN)?\.f32",
    "d a a",
    "Parallel Synchronization and Communication Instructions: redux.sync",
)
def reduce_floats(operands: Operands, name: str, nan: str | None) -> Execute:
    return _reduce(operands, name, "f32", nan=bool(nan))


def _reduce(operands: Operands, name: str, kind: str, nan: bool) -> Execute:
    whole = whole_warps(operands[2])
    put, value = writer(operands[0], kind), reader(operands[1], kind)
    functions = {
        "max": np.maximum,
        "min": np.minimum,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    function = {"max": np.fmax, "min": np.fmin}[name] if kind == "f32" and not nan else functions[name]

    def execute(s: Threads) -> None:
        whole(s)
        put(s, np.repeat(function.reduce(s.by_warp(value(s)), axis=1, dtype=NUMBERS[kind]), WARP))

    return execute


@form(r"elect\.sync", "d|p a", "Parallel Synchronization and Communication Instructions: elect.sync")
def elect(operands: Operands) -> Execute:
    """The lowest lane is elected, as GPUs do."""
    whole = whole_warps(operands[1])
    pair: Pair = operands[0]
    put, say = writer(pair.first, "u32"), writer(pair.second, "pred")

    def execute(s: Threads) -> None:
        whole(s)
        warps = s.whole()
        put(s, np.zeros(warps * WARP, np.uint32))
        say(s, np.tile(LANE == 0, warps))

    return execute


@form(
    r"vote\.sync\.(any|all|ballot)\.(pred|b32)",
    "d a a",
    "Parallel Synchronization and Communication Instructions: vote.sync",
)
def vote(operands: Operands, mode: str, kind: str) -> Execute:
    whole = whole_warps(operands[2])
    if (mode == "ballot") != (kind == "b32"):
        raise Unsupported(f"vote.sync.{mode}.{kind}")
    put, value = writer(operands[0], kind), reader(operands[1], "pred")

    def execute(s: Threads) -> None:
        whole(s)
        votes = s.by_warp(value(s))
        if mode == "ballot":
            result = (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            result = votes.any(1) if mode == "any" else votes.all(1)
        put(s, np.repeat(result, WARP))

    return execute
