"""Which tile each kernel runs with: data, one file a GPU architecture, written by the tuner and looked up here.

An entry is made for one step and arithmetic (or one dtype of it, which then goes first), and serves up to so many
channels and tokens. A look-up takes the smallest entry that is large enough; nobody tunes anything on a user's first
call. To run with a tile that is not in the files, build a `Tile` and hand it to the launcher.

An entry whose `bias` is false is for calls without one alone, and goes before the entry for all.

An entry that names a `target` or a `triton`, such as "3.6", is for that architecture alone, of those that its file
serves, or for that version of the compiler, where the tile of all others makes a binary that spills; it goes first.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

STEPS = ("forward", "group", "columns", "queries", "keys", "values", "pairs")
ARITHMETIC = {"float16": "16-bit", "bfloat16": "16-bit", "float32": "ieee", "tf32": "tf32"}
_LIMITS = ("key_width", "value_width", "tokens")
ONLY = frozenset(("target", "triton"))  # what an entry may be for alone, beside calls without a bias
FOLDER = Path(__file__).parent
RELATIVES = {  # architectures like one that has a file: the same tiles make sound binaries for them
    "sm_87": "sm_80", "sm_89": "sm_86", "sm_103": "sm_100", "sm_120": "sm_86", "sm_121": "sm_86",
    "gfx90a": "gfx942", "gfx950": "gfx942",
    **dict.fromkeys(("gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201"), "gfx1100"),
}  # fmt: skip


class Tile(NamedTuple):
    """What one program of a kernel takes at a time, and how many warps and pipeline stages it does it with.

    Blocks are powers of two of at least 16; chunks of the widths likewise, and need not divide them.

    Attributes:
        block_m: queries.
        block_n: keys.
        block_k: channels of q and k.
        block_v: channels of v and do.
        num_warps: of one program.
        num_stages: of the pipeline that loads the next block while one is computed.

    Examples:
        >>> lookup("sm_90", "forward", 256, 512, "bfloat16", tokens=64)._replace(num_warps=8).num_warps
        8
    """

    block_m: int
    block_n: int
    block_k: int
    block_v: int
    num_warps: int = 4
    num_stages: int = 2


class Entry(NamedTuple):
    """A line of a file: a tile, and the largest problem that it serves.

    Attributes:
        tile: what the kernel runs with.
        target: the architecture whose file it is.
        key_width: up to so many channels of q and k; None: any number.
        value_width: of v, likewise.
        tokens: of a group, likewise.

    Examples:
        >>> str(entry("sm_90", "forward", 40, 40, "bfloat16", tokens=100))
        'sm_90, K = 48, V = 48, 100 tokens'
    """

    tile: Tile
    target: str
    key_width: int | None
    value_width: int | None
    tokens: int | None

    def __str__(self) -> str:
        key, value, tokens = ("any" if limit is None else limit for limit in self[2:])
        return f"{self.target}, K = {key}, V = {value}, {tokens} tokens"

    def is_made_for(self, key_width: int, value_width: int, tokens: int) -> bool:
        """Whether a problem has these very widths, and more than half the tokens: else a larger one's tile serves it.

        Args:
            key_width: channels of q and k.
            value_width: channels of v.
            tokens: of a group.

        Examples:
            >>> entry("sm_90", "forward", 48, 48, "bfloat16", tokens=49).is_made_for(48, 48, 49)
            True
        """
        of_tokens = self.tokens is None or self.tokens <= max(16, 2 * tokens - 1)
        return (self.key_width, self.value_width) == (key_width, value_width) and of_tokens


class BackwardTiles(NamedTuple):
    """The tiles of the backward kernels; `group` serves groups of up to `group.block_m` tokens, the others the rest.

    Attributes:
        group: of the kernel that computes every gradient at once; None where it does not serve.
        queries: of dq.
        keys: of dk and dv, or of dk alone where `values` has a tile.
        values: of dv, or None.
        pairs: of dbias.
        columns: of the kernel that computes dq, dk and dv at once, for groups of up to `columns.block_m` tokens and
            widths of up to its chunks; None where it does not serve.

    Examples:
        >>> backward("sm_90", 256, 512, "bfloat16", tokens=4096).group is None
        True
    """

    group: Tile | None
    queries: Tile
    keys: Tile
    values: Tile | None
    pairs: Tile
    columns: Tile | None = None


def lookup(
    target: str, step: str, key_width: int, value_width: int, dtype: str, tokens: int, bias: bool = True
) -> Tile:
    """The tile for one kernel: that of its `entry`, which has the same arguments and raises the same errors.

    Examples:
        >>> lookup("sm_90", "forward", 256, 512, "bfloat16", tokens=64).block_m
        64
    """
    return entry(target, step, key_width, value_width, dtype, tokens, bias).tile


def entry(
    target: str, step: str, key_width: int, value_width: int, dtype: str, tokens: int, bias: bool = True
) -> Entry:
    """The entry that serves one kernel: of those that are large enough the smallest.

    Args:
        target: the architecture, such as "sm_90" or "gfx942".
        step: one of `STEPS`: the forward kernel, or a field of `BackwardTiles`.
        key_width: channels of q and k.
        value_width: channels of v.
        dtype: "float16", "bfloat16", "float32" or, for fp32 tensors multiplied as tf32, "tf32".
        tokens: of a group, those outside the map counted.
        bias: whether there is one; without, entries serve too that are for calls without a bias alone.

    Raises:
        TypeError: a target that is no string.
        ValueError: an unknown step or dtype, a width or number of tokens below 1.
        LookupError: the step does not serve such groups; of "group", "columns" and "values" only.

    Examples:
        >>> entry("sm_89", "forward", 256, 512, "bfloat16", tokens=49).target
        'sm_86'
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be the name of an architecture, got {target!r}")
    if not isinstance(step, str) or step not in STEPS:
        raise ValueError(f"step must be one of {STEPS}, got {step!r}")
    for name, number in {"key_width": key_width, "value_width": value_width, "tokens": tokens}.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    if not isinstance(dtype, str) or dtype not in ARITHMETIC:
        raise ValueError(f"dtype must be one of {tuple(ARITHMETIC)}, got {dtype!r}")
    return _lookup(target, step, key_width, value_width, dtype, tokens, bool(bias))


def backward(
    target: str, key_width: int, value_width: int, dtype: str, tokens: int, bias: bool = True
) -> BackwardTiles:
    """The tiles of all backward kernels.

    Args:
        target: as of `lookup`.
        key_width: channels of q and k.
        value_width: channels of v.
        dtype: as of `lookup`.
        tokens: of a group, those outside the map counted.
        bias: as of `entry`.

    Raises:
        ValueError: an unknown dtype.

    Examples:
        >>> backward("sm_90", 256, 512, "bfloat16", tokens=64).group is not None
        True
    """

    def find(step: str) -> Tile | None:
        try:
            return lookup(target, step, key_width, value_width, dtype, tokens, bias)
        except LookupError:
            return None

    tiles = {step: find(step) for step in STEPS if step != "forward"}
    return BackwardTiles(**tiles)  # type: ignore[arg-type]  # only group, columns and values may be None


def file_for(target: str) -> Path:
    """The file of a target, of its relative, or else of the most modest of its vendor with as many threads a warp.

    Args:
        target: the architecture, such as "sm_90" or "gfx942"; one without a file is served by another's.

    Examples:
        >>> file_for("sm_89").name, file_for("gfx1201").name
        ('sm_86.json', 'gfx1100.json')
    """
    file = FOLDER / f"{RELATIVES.get(target, target)}.json"
    modest = "gfx942" if target.startswith("gfx9") else "gfx1100" if target.startswith("gfx") else "sm_86"
    return file if file.exists() else FOLDER / f"{modest}.json"


@lru_cache(maxsize=4096)
def _lookup(target: str, step: str, key_width: int, value_width: int, dtype: str, tokens: int, bias: bool) -> Entry:
    def limits(entry: dict[str, Any]) -> tuple[float, ...]:
        return tuple(entry[name] or inf for name in _LIMITS)  # null: any number

    def serves(entry: dict[str, Any]) -> bool:
        wanted = zip((key_width, value_width, tokens), limits(entry), strict=True)
        arithmetic = entry["arithmetic"] in (dtype, ARITHMETIC[dtype])
        is_for = _is_for(entry, target) and entry.get("bias", bias) == bias
        return entry["step"] == step and arithmetic and is_for and all(n <= limit for n, limit in wanted)

    def rank(entry: dict[str, Any]) -> tuple[Any, ...]:
        return limits(entry), "bias" not in entry, entry["arithmetic"] != dtype, -len(ONLY & entry.keys())

    entries = sorted(filter(serves, _entries(target)), key=rank)
    if not entries or entries[0]["tile"] is None:
        raise LookupError(f"no tile of {step!r} for groups of {tokens} tokens, widths {key_width} and {value_width}")
    return Entry(Tile(*entries[0]["tile"]), file_for(target).stem, *(entries[0][name] for name in _LIMITS))


def _is_for(entry: dict[str, Any], target: str) -> bool:
    """Whether an entry of a target's file is for that target, and for the Triton that is installed."""
    return entry.get("target", target) == target and entry.get("triton", _triton()) == _triton()


@cache
def _triton() -> str | None:
    """Its version as entries say it, "3.8"; None where it is not installed."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=64)
def _entries(target: str) -> tuple[dict[str, Any], ...]:
    """The entries of a target's file; a warning where another architecture's has to serve."""
    file = file_for(target)
    if file.stem != RELATIVES.get(target, target):
        _warn(f"no tiles were made for {target}, those of {file.stem} are taken")
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} must hold a list of entries, got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        if mistake := _mistake_in(entry):
            raise ValueError(f"{file}, entry {number}: {mistake}")
    return tuple(entries)


@cache  # for as long as the process lives, whatever else is looked up again
def _warn(message: str) -> None:
    """Warn once, at the line that led here from outside of this package and of PyTorch, which may call it."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (
        __name__.partition(".")[0],
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _mistake_in(entry: Any) -> str | None:
    """What is wrong with an entry of a file, or None."""
    if not isinstance(entry, dict) or not {"step", "arithmetic", *_LIMITS, "tile"} <= entry.keys():
        return f"must be an object with step, arithmetic, {', '.join(_LIMITS)} and tile, got {entry!r}"
    if entry["step"] not in STEPS or entry["arithmetic"] not in {*ARITHMETIC, *ARITHMETIC.values()}:
        return f"knows no step {entry['step']!r} of arithmetic {entry['arithmetic']!r}"
    if any(not (entry[name] is None or (type(entry[name]) is int and entry[name] > 0)) for name in _LIMITS):
        return f"{', '.join(_LIMITS)} must be positive integers or null, got {[entry[name] for name in _LIMITS]}"
    if entry.get("bias", False) is not False:
        return f"bias must be false, for calls without one alone, or left out, got {entry['bias']!r}"
    if wrong := {name: entry[name] for name in sorted(ONLY & entry.keys()) if not isinstance(entry[name], str)}:
        return f"what an entry is for alone must be a word, got {wrong}"
    tile = entry["tile"]
    if tile is None:
        return None
    if not isinstance(tile, list) or len(tile) != len(Tile._fields) or any(type(n) is not int or n < 1 for n in tile):
        return f"tile must be null or {len(Tile._fields)} positive integers, {', '.join(Tile._fields)}, got {tile!r}"
    if any(n < 16 or n & (n - 1) for n in tile[:4]):
        return f"blocks must be powers of two of at least 16, got {tile[:4]}"
    return None
