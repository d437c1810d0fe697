"""What a kernel's programs do, read from Triton's intermediate form: loops, products, loads and stores.

Triton's IR (TTIR) is what every target is compiled from: helpers are inlined, constants folded, what a loop need not
repeat is hoisted, while loops, shapes and the tensors behind pointers are still there to read. What is counted here is
what the kernel asks for; which instructions do it, the machine code says.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.tiles.assembly import Frames, Nest
from bench.tiles.compile import Launch
from isa_triton.axis import ceil_div

Expression = Any  # an integer, the name of one of a kernel's arguments, or (operation, expression, expression)

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "divsi": operator.floordiv,
    "divui": operator.floordiv, "remsi": operator.mod, "remui": operator.mod, "minsi": np.minimum, "maxsi": np.maximum,
    "shli": operator.lshift, "shrsi": operator.rshift, "shrui": operator.rshift,
}  # fmt: skip


class Loop(NamedTuple):
    """`for i in range(start, stop, step)`."""

    start: Expression
    stop: Expression
    step: Expression

    def trips(self, values: Mapping[str, Any]) -> float:
        """How often it runs with these values of the kernel's arguments, the mean over all programs."""
        start, stop, step = (evaluate(bound, values) for bound in self)
        return float(np.mean(np.maximum(0, ceil_div(stop - start, step))))


class Op(NamedTuple):
    """A product of matrices, or a load or a store of a tile."""

    kind: str  # "dot", "load" or "store"
    shape: tuple[int, ...]  # of a dot: M, N, K
    itemsize: int  # of a dot's factors
    argument: str  # of the kernel, where the tile lies: "q" and so on; of a dot ""
    loops: Nest  # around it


class Work(NamedTuple):
    """What all programs of a launch ask for together."""

    flops: float  # of products, 2 to a multiply-add, masked rows and padded widths included
    bytes: float  # masked lanes not counted
    distinct: int  # bytes read at different addresses, and written: what must move at least
    tile_utilisation: float  # the part of the rows of tiles that are pixels
    channel_utilisation: float  # the part of the chunks of these rows that are channels


def read_program(ttir: str, arguments: Sequence[str]) -> tuple[list[Loop], list[Op], dict[Frames, Nest]]:
    """Loops, what is done in them, and the loops around each place in the source where something is done.

    Args:
        ttir: the text.
        arguments: of the kernel those that are no constants, by name, in order. The text may call them otherwise: to
            Triton 3.6 the numbers of `axes` are axes, axes_16, axes_17 and so on.
    """
    where = _locations(ttir)
    named = dict(zip(_parameters(ttir), arguments, strict=True))
    values: dict[str, Expression] = dict(named)  # of scalars
    origin: dict[str, str] = {}  # what a value is derived from in the first place: of a pointer, a pointer
    varies: dict[str, set[int]] = {}  # the loops that a value changes with
    loops, ops, written = list[Loop](), list[Op](), set[int]()
    regions, changing = list[int | None](), list[set[int]]()
    places: dict[Frames, Nest] = {}
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}"):
            regions.pop()
        nest, loop = tuple(region for region in regions if region is not None), None
        result, *operands = _NAME.findall(line) or [""]
        varies[result] = {i for name in operands for i in varies.get(name, ())}
        if match := _FOR.search(line):
            loop = len(loops)
            loops.append(Loop(*(_expression(name, values, origin) for name in match.groups()[1:])))
            values[match[1]] = loops[-1].start
            carried = re.findall(r"(%[\w.]+) = (%[\w.]+)", line.partition("iter_args")[2])
            origin.update(carried)
            varies |= {name: {*nest, loop} for name in (match[1], *(name for name, _ in carried))}
            varies[result] = set(nest)
        elif match := _CONSTANT.match(line):
            values[match[1]] = int(match[2])
        elif match := _SCALAR.match(line):
            values[match[1]] = match[2], *(_expression(name, values, origin) for name in match.groups()[2:])
        elif match := _PROGRAM.search(line):
            values[result] = "program" if match[1] == "x" else f"program.{match[1]}"
        elif match := _RESULT.match(line):
            origin[match[1]] = match[2]
        if match := _TILE_OP.search(line):
            ops.append(_op(match[1], line, origin, named, nest))
            changing.append(varies[result] if ops[-1].kind == "load" else set(nest))
            written |= set(nest) if ops[-1].kind == "store" else set()
            if at := _PLACE.search(line):
                places[where.get(at[1], ())] = nest
        if line.endswith("{"):
            regions.append(loop)
    hoisted = [_hoisted(op, changes | written) for op, changes in zip(ops, changing, strict=True)]
    return loops, hoisted, places


def _hoisted(op: Op, needed: set[int]) -> Op:
    """The operation where the compiler moves it: a load out of loops that do not change it, and that store nothing."""
    nest = op.loops
    while nest and nest[-1] not in needed:
        nest = nest[:-1]
    return op._replace(loops=nest)


def work(loops: tuple[Loop, ...], ops: tuple[Op, ...], launch: Launch) -> Work:
    """What a launch asks for."""
    problem, partition, often = launch.problem, launch.problem.partition, repeats(loops, launch)
    tokens = partition.pixels / partition.groups  # of a group, those inside the map: the mean
    pixels = problem.maps * problem.heads * partition.pixels
    flops = others = 0.0
    lanes = columns = unmasked = 0.0  # bytes of tiles: of all lanes, of channels that exist, and of these in pixels
    distinct = set[tuple[str, str, int]]()
    for kind, shape, itemsize, argument, nest in ops:
        times = launch.programs * often(nest)
        if kind == "dot":
            flops += 2 * prod(shape) * times
        elif argument in PAIRS:
            rows = launch.integers[f"{argument}.tokens"] * launch.integers[f"{argument}.unit"]  # as many as columns
            pairs = prod(_filled(rows, partition.tokens, block) * block for block in shape)
            others += times * itemsize * pairs
            tables = launch.integers["slots"] if argument == "partials" else 1
            distinct.add((kind, argument, tables * problem.heads * rows**2 * itemsize))
        elif not shape:
            others += times * itemsize
        elif len(shape) == 1:
            others += times * itemsize * shape[0] * _filled(tokens, partition.tokens, shape[0])
            distinct.add((kind, argument, pixels * itemsize))
        else:
            width = problem.key_width if argument in KEY_WIDE else problem.value_width
            bytes_ = times * itemsize * prod(shape)
            in_columns = bytes_ * _filled(width, width, shape[1])
            lanes += bytes_
            columns += in_columns
            unmasked += in_columns * _filled(tokens, partition.tokens, shape[0])
            distinct.add((kind, argument, pixels * width * itemsize))
    moved = sum(size for _, _, size in distinct)
    return Work(flops, unmasked + others, moved, unmasked / columns, columns / lanes)


PAIRS = ("bias", "partials")  # arguments that hold a number for every pair of tokens
KEY_WIDE = ("q", "k", "dq", "dk")  # arguments of the key width; other maps have the value width


def repeats(loops: Iterable[Loop], launch: Launch) -> Callable[[Nest], float]:
    """How often a program of a launch runs what stands in some of the loops: the mean over all programs."""
    values = {**launch.integers, "program": np.arange(launch.programs)}
    trips = [loop.trips(values) for loop in loops]
    return lambda nest: prod(trips[loop] for loop in nest)


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """The value of a scalar of TTIR.

    Raises:
        KeyError: it depends on something that `values` does not have.
    """
    if isinstance(expression, str):
        return values[expression]
    if isinstance(expression, int):
        return expression
    name, a, b = expression
    return OPERATIONS[name](evaluate(a, values), evaluate(b, values))


def _filled(part: float, whole: int, block: int) -> float:
    """How much of the blocks over `whole` things `part` of them fill."""
    return part / (ceil_div(whole, block) * block)


# -- the text ----------------------------------------------------------------------------------------------------------

_FOR = re.compile(r"scf\.for (%[\w.]+) = (%[\w.]+) to (%[\w.]+) step (%[\w.]+)")
_CONSTANT = re.compile(r"(%[\w.]+) = arith\.constant (-?\d+) : i\d+")
_SCALAR = re.compile(r"(%[\w.]+) = arith\.(\w+) (%[\w.]+), (%[\w.]+) : i\d+ ")
_NAME = re.compile(r"%[\w.]+")
_RESULT = re.compile(r"(%[\w.]+) = [^%]*(%[\w.]+)")  # of something else: what it is derived from comes first
_TILE_OP = re.compile(r"\btt\.(dot|load|store|descriptor_load|descriptor_store)\b")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)|!tt\.ptr<[a-z]+(\d+)")  # the latter: of a scalar
_PROGRAM = re.compile(r"tt\.get_program_id ([xyz])")
_PLACE = re.compile(r"loc\((#loc\d*)\)$")
_LOCATION = re.compile(
    r'(#loc\d*) = loc\((?:"([^"]+)":(\d+):\d+|"[^"]*"\((#loc\d*)\)|callsite\((#loc\d*) at (#loc\d*)\))\)'
)


def _expression(name: str, values: Mapping[str, Expression], origin: Mapping[str, str]) -> Expression:
    while name not in values and name in origin:  # conversions between integers
        name = origin[name]
    return values.get(name, name.removeprefix("%"))


def _parameters(ttir: str) -> list[str]:
    """What the text calls the kernel's arguments."""
    line = next(line for line in ttir.splitlines() if "tt.func public" in line)
    return re.findall(r"(%[\w.]+): ", line)


def _op(kind: str, line: str, origin: Mapping[str, str], named: Mapping[str, str], nest: Nest) -> Op:
    types = _TENSOR.findall(line)
    found = [(tuple(map(int, shape.split("x")[:-1])), of_tile or of_one) for shape, of_tile, of_one in types]
    itemsize = max(8, int(found[0][1])) // 8
    if kind == "dot":
        (*batch, m, k), (*_, n) = (shape for shape, _ in found[:2])
        return Op(kind, (prod(batch) * m, n, k), itemsize, "", nest)
    name = _NAME.findall(line.partition(kind)[2])[0]
    while name in origin:
        name = origin[name]
    argument = named.get(name, "").partition(".")[0]  # a pointer that is chosen, or loaded, is nobody's
    return Op(kind.removeprefix("descriptor_"), found[-1][0], itemsize, argument, nest)


def _locations(ttir: str) -> dict[str, Frames]:
    """What the IR calls its places in the source."""
    lines = {match[1]: match for match in map(_LOCATION.match, ttir.splitlines()) if match}

    @cache
    def frames(name: str) -> Frames:
        match = lines.get(name)
        if match is None:  # unknown
            return ()
        if match[2]:
            return ((Path(match[2]).name, int(match[3])),)
        return tuple(frame for inner in match.groups()[3:] if inner for frame in frames(inner))

    return {name: frames(name) for name in lines}
