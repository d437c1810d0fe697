"""Types of command-line arguments: each turns a word into a value, or says what would be valid."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from bench.workload import PASSES

MOST, LONGEST = 2**20, 2**15  # of anything, and a side: the scores of all pairs of pixels still have a size in 64 bits


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


def device(text: str) -> str:
    """The name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r}: {reason}") from error
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r}, which has no memory")
    return text


def folder(text: str) -> Path:
    """A folder to write to, whether it is there already or not."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"must be a folder to write to, got {text!r}: {there} is not one")
    return path


def add_out(parser: argparse.ArgumentParser, what: str = "the results") -> None:
    """Where a command writes."""
    parser.add_argument("--out", type=folder, default="out", metavar="DIR", help=f"folder of {what} (default: out)")


def add_passes(parser: argparse.ArgumentParser) -> None:
    """Which passes are measured."""
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")


def add_widths(parser: argparse.ArgumentParser) -> None:
    """C, K and V of a workload."""
    add = parser.add_argument
    add("--channels", type=positive, default=512, metavar="C", help="of a block, in and out (default: 512)")
    add("--key-channels", type=positive, default=256, metavar="K", help="default: 256")
    add("--value-channels", type=positive, default=512, metavar="V", help="default: 512")


def check_partition_size(partition_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Raises argparse.ArgumentError where a map is smaller than a partition size on either axis."""
    if partition_size[0] > size[0] or partition_size[1] > size[1]:
        wanted, given = (f"{height}x{width}" for height, width in (partition_size, size))
        raise argparse.ArgumentError(None, f"--partition-size {wanted} is larger than the map {given}")
