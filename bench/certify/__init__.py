"""``python -m bench certify``: what a GPU does with the kernels, on one page, or without a GPU what can be said there.

Correctness against fp64, streams and graphs and compilers, NVIDIA's tools, times beside others' and beside what was
predicted. Every part runs in a process of its own, and whatever happens to it is a row. A run that is stopped goes on
where it was. With --device cpu kernels are interpreted on tiny problems, and nothing is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace
from typing import Any

import torch

from bench import arguments, measure
from bench.arguments import add_out, number
from bench.certify import conduct
from bench.certify.parts import PARTS
from bench.certify.problems import distinct
from bench.certify.rows import Certificate, Setting, left
from bench.terminal import Terminal
from bench.tiles import options
from bench.tiles.verify import SHAPES

FILE = "certificate.json"
SOURCES = ("isa_triton", "reference", "bench/certify", "bench/tiles")  # what rows depend on, of ours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, or cpu, where kernels are interpreted")
    add_out(parser, "the certificate", "certificate")
    what = "; ".join(f"{letter}: {part.title}" for letter, part in PARTS.items())
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"{what} (default: all)")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE",
        help=f"of {', '.join(SHAPES)} (default: all)")  # fmt: skip
    add("--minutes", type=number, default=20.0, metavar="N", help="nothing begins later; the same command goes on")
    add("--again", action="store_true", help="forget what an earlier run has found")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    device = check_device(args.device)
    setting = Setting(str(device), tuple(args.shapes), args.jobs, str(args.cache.absolute()))
    if setting.interpreted:
        setting = replace(setting, shapes=distinct(setting.shapes))
    said, certificate = Terminal(args), Certificate(args.out / FILE, conditions(device))
    if args.again:
        certificate.path.unlink(missing_ok=True)
    if not certificate.read():
        said.say(f"{certificate.path} is of another machine, versions or sources: it is made anew")
    args.out.mkdir(parents=True, exist_ok=True)
    said.say(f"On {certificate.conditions['host']}; every row goes to {certificate.path}")
    items = [item for letter in PARTS if letter in args.parts for item in PARTS[letter].all(setting)]
    todo = left(items, certificate)
    with said.progress("items", len(todo)) as bar:
        without_time = conduct.conduct(todo, setting, certificate, args.out / "log.txt", 60 * args.minutes, bar)
    from bench.certify import page  # draws, which no process of a part does

    judged = page.Judged(certificate, without_time)
    written = page.write(args.out, setting, judged, f"python -m bench certify --device {args.device}")
    for outcome in ("failed", "slower"):
        said.say(*judged.lines(outcome), style="red" if outcome == "failed" else None)
    if said.verbose:
        said.show(*(page.table(PARTS[letter], rows) for letter, rows in judged.rows.items() if rows))
    said.end(judged.sentence, certificate.path, *written)
    if judged.failed:
        sys.exit(1)


def check_device(name: str) -> torch.device:
    """A device of this machine that kernels run on, or the CPU.

    Raises:
        argparse.ArgumentError: it is neither, or kernels would be interpreted on it.
    """
    try:
        found = torch.device(arguments.device(name))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentError(None, f"--device {error}") from error
    if found.type not in ("cuda", "cpu"):
        raise argparse.ArgumentError(None, f"--device must be cuda, or cpu to interpret kernels, got {name!r}")
    return found


def conditions(device: torch.device) -> dict[str, Any]:
    """What rows depend on: the device, the versions, and our files."""
    found = measure.conditions(str(device))
    return {"host": found["host"], "versions": found["versions"], "sources": _sources()}


def _sources() -> str:
    paths = (path for folder in SOURCES for path in sorted((conduct.ROOT / folder).rglob("*")))
    kept = b"".join(path.read_bytes() for path in paths if path.suffix in (".py", ".json"))
    return hashlib.sha256(kept).hexdigest()[:16]
