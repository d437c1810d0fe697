"""Compile what the run time would launch, read the machine code, fail on what must not ship.

By default that is attention in networks that people run. What is said of them holds for them: another problem, as
--tokens, --widths and the rest describe it, may be served by the tile of a larger one, and has to be verified itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton

from bench.terminal import Table, Terminal
from bench.tiles import options
from bench.tiles.binaries import LIMITS, Verdict, format_widths
from bench.tiles.compile import DTYPES, Launch, Problem, format_tile, named, pass_launches
from isa_triton.partition import Partition

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "gfx1100", "gfx1200")


SHAPES = {  # attention in networks that people run, on one of their maps or volumes
    name: Problem(partition, *widths, heads, bias, name=name)
    for name, partition, widths, heads, bias in (
        ("ISA 64", Partition.local((128, 256), (8, 8)), (256, 512), 1, False),
        ("ISA 128", Partition.interlaced((64, 128), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 256", Partition.interlaced((128, 128), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 512", Partition.interlaced((128, 256), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 1024", Partition.interlaced((256, 256), stride=(8, 8)), (256, 512), 1, False),
        ("heads 64", Partition.local((64, 128), (8, 8)), (64, 64), 8, False),
        ("heads 256", Partition.interlaced((128, 128), stride=(8, 8)), (64, 64), 8, False),
        ("heads 1024", Partition.interlaced((256, 256), stride=(8, 8)), (64, 64), 8, False),
        ("Swin 49", Partition.local((56, 56), (7, 7)), (32, 32), 3, True),
        ("Swin 64", Partition.local((64, 64), (8, 8)), (32, 32), 3, True),
        ("Swin 144", Partition.local((48, 48), (12, 12)), (32, 32), 8, True),
        ("Swin 256", Partition.local((32, 64), (16, 16)), (32, 32), 6, True),
        ("MaxViT 49", Partition.interlaced((56, 56), grid=(7, 7)), (32, 32), 2, True),
        ("MaxViT 64", Partition.interlaced((64, 128), grid=(8, 8)), (32, 32), 2, True),
        ("MaxViT 144", Partition.interlaced((96, 96), grid=(12, 12)), (32, 32), 2, True),
        ("MaxViT 256", Partition.interlaced((64, 128), grid=(16, 16)), (32, 32), 4, True),
        ("HRFormer 49", Partition.local((64, 48), (7, 7)), (39, 39), 2, True),
        ("dense 16384", Partition.dense((128, 128)), (256, 256), 1, False),
        ("Pangu 144", Partition.local((8, 91, 180), (2, 6, 12)), (32, 32), 12, True),
        ("volume 216", Partition.local((24, 24, 24), (6, 6, 6)), (8, 8), 4, True),
        ("SwinUNETR 343", Partition.local((48, 48, 48), (7, 7, 7)), (16, 16), 3, True),
        ("Video Swin 392", Partition.local((16, 56, 56), (8, 7, 7)), (32, 32), 3, True),
    )
}
VOLUMES = tuple(name for name, problem in SHAPES.items() if len(problem.partition) == 3)
DEFAULT = tuple(name for name in SHAPES if name not in VOLUMES)  # for volumes no tile was made yet, and some spill
FP16 = ("ISA 64", "ISA 256", "heads 256", "Swin 49")  # it has bf16's tiles and other matrix instructions: these suffice
COLUMNS = ("shape", "dtype", "kernel", "warps", "regs", "spills", "CTAs/SM")
DETAILS = ("matrix", "row loads", "row stores", "other loads", "other stores", "smem", "tmem", "tile", "tile from")
BY = f"with triton {triton.__version__}"  # another compiler makes other binaries of the same tiles
UNITS = "spills: bytes of stack / accesses; loads, stores: bytes x how many"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, list(SHAPES)
    add("--targets", nargs="+", choices=LIMITS, default=list(TARGETS), metavar="TARGET",
        help=f"of {' '.join(LIMITS)} (default: {' '.join(TARGETS)})")  # fmt: skip
    add(
        "--shapes",
        nargs="+",
        choices=names,
        metavar="SHAPE",
        help=f"of {', '.join(names)} (default: all but the volumes)",
    )
    options.add_shape(parser)
    what = f"default: {' '.join(DTYPES)}"
    add("--dtypes", nargs="+", type=options.read_dtype, default=list(DTYPES), metavar="DTYPE", help=what)
    add("--dump", type=Path, metavar="DIR", help="write each binary there, from Triton's IR to machine code")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, chosen = Terminal(args), problems(args)
    shipped = launches(args.targets, chosen, args.dtypes)
    with options.compilers(args, said, args.dump) as binaries:
        verdicts = binaries.verdicts(shipped)
    said.show(*(_table(target, [v for v in verdicts if v.launch.target == target], said.verbose)
                for target in args.targets))  # fmt: skip
    if args.json is not None:
        options.write_json(args.json, [_as_dict(verdict) for verdict in verdicts])
    failed = [verdict for verdict in verdicts if verdict.violations]
    for launch, _, violations in failed:
        what = f"{launch.target}, {launch.problem.name}, {launch.problem.dtype}, {launch.name}"
        said.say(f"{what}: {'; '.join(violations)}", style="red")
    spills = [v.binary.spill_bytes for v in verdicts if v.binary and v.binary.spill_accesses]
    spilled = f"{len(spills)} spill, at most {max(spills, default=0)} bytes"
    sentence = f"{len(verdicts)} binaries {BY}, {len(failed)} with a violation; {spilled}"
    said.end(sentence, *filter(None, (args.dump, args.json)))
    if failed:
        sys.exit(1)


def problems(args: argparse.Namespace) -> list[Problem]:
    """Those that --shapes names, or the one that --tokens and the rest say."""
    described = options.given(args)
    if described and args.shapes:
        raise argparse.ArgumentError(None, f"--shapes names problems, and {described} describes another: give one")
    return [options.problem(args)] if described else [SHAPES[name] for name in args.shapes or DEFAULT]


def launches(
    targets: Iterable[str], problems: Iterable[Problem] = tuple(SHAPES.values()), dtypes: Iterable[str] = tuple(DTYPES)
) -> list[Launch]:
    """Every launch of forward and backward with the tiles that the run time takes, for each target and problem."""
    found = []
    for target in targets:
        for problem in problems_of(target.startswith("sm_"), problems, dtypes):
            found += pass_launches(target, problem, "forward", training=True)
            found += pass_launches(target, problem, "backward")
    return found


def problems_of(
    tf32: bool, problems: Iterable[Problem] = tuple(SHAPES.values()), dtypes: Iterable[str] = tuple(DTYPES)
) -> Iterator[Problem]:
    """The problems in every dtype that has binaries of its own, tf32 where a device has it."""
    for problem, dtype in product(problems, dtypes):
        is_repeated = dtype == "float16" and problem.name in {*SHAPES} - {*FP16}
        if not is_repeated and (dtype != "tf32" or tf32):
            yield replace(problem, dtype=dtype)


def _table(target: str, verdicts: list[Verdict], verbose: bool) -> Table:
    header = (*COLUMNS, *DETAILS) if verbose else COLUMNS
    styles = ["red" if verdict.violations else None for verdict in verdicts]
    title = f"{target} {BY}: {len(verdicts)} binaries, {len(list(filter(None, styles)))} with a violation ({UNITS})"
    return Table(title, header, [_row(v, verbose) for v in verdicts], words=3, styles=styles)


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    launch, problem, binary = verdict.launch, verdict.launch.problem, verdict.binary
    return {
        "target": launch.target, "shape": problem.name, "tokens": problem.partition.tokens,
        **{name: getattr(problem, name) for name in ("key_width", "value_width", "heads", "bias", "dtype")},
        "kernel": launch.name, "key": launch.key, "programs": launch.programs,
        "tile": named(launch.tile), "tile_from": launch.origin,
        **({} if binary is None else asdict(binary)),
        "accesses": [] if binary is None else [access._asdict() for access in binary.accesses],
        "violations": verdict.violations,
    }  # fmt: skip


def _row(verdict: Verdict, verbose: bool) -> list[object]:
    """What the table says of a binary."""
    launch, binary = verdict.launch, verdict.binary
    names = launch.problem.name, launch.problem.dtype, launch.label
    if binary is None:
        return [*names, *[None] * (len(COLUMNS) - len(names) + verbose * len(DETAILS))]
    spills = f"{binary.spill_bytes}/{binary.spill_accesses}" if binary.spill_bytes or binary.spill_accesses else 0
    matrix = " ".join(f"{kind} x{n}" for kind, n in binary.matrix.items()) or "none"
    kinds = [(store, rows) for rows in (True, False) for store in (False, True)]
    widths = (format_widths(a for a in binary.accesses if (a.store, a.rows) == kind) for kind in kinds)
    memory = binary.shared, binary.tensor_columns or None
    row: list[object] = [*names, binary.warps, binary.registers, spills, binary.ctas_per_sm]
    return [*row, matrix, *widths, *memory, format_tile(launch.tile), launch.origin] if verbose else row
