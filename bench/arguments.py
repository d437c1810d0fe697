"""Command-line arguments: types, which turn a word into a value or say what would be valid, and options of several.

An option that takes several values is a plural, one that takes one is a singular; its help needs no default: `Help`
says it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.records import format_size
from bench.workload import PASSES
from isa_triton.axis import MOST_AXES
from isa_triton.backend.triton import DEVICES

SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
MOST, LONGEST = 2**20, 2**15  # of anything, and a side: the scores of all pairs of pixels still have a size in 64 bits


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that says every default, but those that a help says itself in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if default in (None, False, argparse.SUPPRESS) or "default:" in said:
            return said
        return f"{said} (default: {_word(default)})".replace("%", "%%")


def _word(value: object) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, tuple) and all(isinstance(side, int) for side in value):
        return format_size(value)
    if isinstance(value, (list, tuple)):
        return " ".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def positive(text: str) -> int:
    """A whole number from 1 to `MOST`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    if int(text) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {text!r}")
    return int(text)


def from_zero(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def amount(text: str) -> float:
    """A number from 0; "inf" is one."""
    return _number(text, lambda value: value >= 0, "a number from 0")


def _number(text: str, is_valid: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_valid(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


def size(text: str) -> tuple[int, int]:
    """(height, width) of "64" or "64x128", each up to `LONGEST`."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH in pixels, as 64 or 64x128, got {text!r}")
    if any(int(side) > LONGEST for side in sides):
        raise argparse.ArgumentTypeError(f"must have sides of at most {LONGEST} pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


def sides(text: str) -> tuple[int, ...]:
    """Those of "64", "64x128" or "16x64x128", each up to `LONGEST`: of a line, a map or a volume; or one for all."""
    given = text.lower().split("x")
    if len(given) > MOST_AXES or not all(side.isdecimal() and int(side) > 0 for side in given):
        raise argparse.ArgumentTypeError(f"must be a side, HEIGHTxWIDTH or DEPTHxHEIGHTxWIDTH, got {text!r}")
    if any(int(side) > LONGEST for side in given):
        raise argparse.ArgumentTypeError(f"must have sides of at most {LONGEST} pixels, got {text!r}")
    return tuple(map(int, given))


def on_axes(name: str, given: Sequence[int], axes: int) -> tuple[int, ...]:
    """The sides of a map, or of a partition size, where one may stand for all; a line is a map of one row.

    Raises:
        argparse.ArgumentError: there are more or fewer.
    """
    if len(given) not in (1, axes):
        raise argparse.ArgumentError(None, f"--{name} must have one side or {axes}, as --axes says, got {len(given)}")
    return (1, given[0]) if axes == 1 else tuple(given) if len(given) == axes else (given[0],) * axes


def add_axes(parser: argparse.ArgumentParser) -> None:
    """Of lines, maps or volumes."""
    what = "1: lines, 2: maps, 3: volumes; results of 1 and 3 have lines_ and volumes_ in front of their names"
    parser.add_argument("--axes", type=int, choices=(1, 2, 3), default=2, help=what)


PREFIX = {1: "lines_", 2: "", 3: "volumes_"}  # of the names of results, by axes


def dtype(text: str) -> str:
    """A dtype's name of its short form; what is valid is left to `choices`."""
    return SHORT_DTYPES.get(text.lower(), text)


def device(text: str) -> str:
    """The name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r}: {reason}") from error
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r}, which has no memory")
    if torch.device(text).type in DEVICES and os.environ.get("TRITON_INTERPRET") == "1":
        raise argparse.ArgumentTypeError(
            f"must be cpu where TRITON_INTERPRET=1 interprets the kernels, got {text!r}: unset it to compile them"
        )
    return text


def folder(text: str) -> Path:
    """A folder to write to, whether it is there already or not."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"must be a folder to write to, got {text!r}: {there} is not one")
    return path


def add_out(parser: argparse.ArgumentParser, what: str = "the results", default: str = "out") -> None:
    """Where a command writes."""
    parser.add_argument("--out", type=folder, default=default, metavar="DIR", help=f"folder of {what}")


def add_sizes(
    parser: argparse.ArgumentParser,
    default: Sequence[tuple[int, int]],
    what: str = "maps in pixels",
    nargs: str = "+",
) -> None:
    """Maps or images."""
    help_ = f"{what}, 64 or 64x128, height first"
    parser.add_argument("--sizes", nargs=nargs, type=size, default=list(default), metavar="SIZE", help=help_)


def add_partition_size(parser: argparse.ArgumentParser, what: str = "P of ISA") -> None:
    """P of ISA."""
    help_ = f"{what}, 8 or 8x4, height first"
    parser.add_argument("--partition-size", type=size, default=(8, 8), metavar="P", help=help_)


def add_dtype(parser: argparse.ArgumentParser, names: Sequence[str], what: str = "of all tensors") -> None:
    """A dtype, the first of some by default."""
    short = ", ".join(short for short, name in SHORT_DTYPES.items() if name in names)
    help_ = f"{what}; for short {short}"
    parser.add_argument("--dtype", type=dtype, choices=names, default=names[0], help=help_)


def add_device(parser: argparse.ArgumentParser, what: str = "of the tensors", default: str = "cpu") -> None:
    """A device of this machine."""
    parser.add_argument("--device", type=device, default=default, help=what)


def add_rounds(parser: argparse.ArgumentParser, default: int, what: str = "timed calls of each, interleaved") -> None:
    """How often something is timed."""
    parser.add_argument("--rounds", type=positive, default=default, metavar="N", help=f"at most so many {what}")


def add_budget(parser: argparse.ArgumentParser, default: float) -> None:
    """When enough time has been spent on repetitions."""
    help_ = "nothing is repeated after so many seconds"
    parser.add_argument("--budget", type=amount, default=default, metavar="S", help=help_)


def add_redraw(parser: argparse.ArgumentParser) -> None:
    """Pictures of a CSV that is there."""
    parser.add_argument("--redraw", action="store_true", help="draw from the CSV in DIR, and measure nothing")


def add_passes(parser: argparse.ArgumentParser) -> None:
    """Which passes are measured."""
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="what is measured")


def add_widths(parser: argparse.ArgumentParser) -> None:
    """C, K and V of a workload."""
    add = parser.add_argument
    add("--channels", type=positive, default=512, metavar="C", help="of a block, in and out")
    add("--key-channels", type=positive, default=256, metavar="K", help="of queries and keys")
    add("--value-channels", type=positive, default=512, metavar="V", help="of values")


def check_partition_size(partition_size: Sequence[int], size: Sequence[int]) -> None:
    """Raises argparse.ArgumentError where a map is smaller than a partition size on an axis."""
    if any(part > side for part, side in zip(partition_size, size, strict=True)):
        wanted, given = ("x".join(map(str, each)) for each in (partition_size, size))
        raise argparse.ArgumentError(None, f"--partition-size {wanted} is larger than the map {given}")
