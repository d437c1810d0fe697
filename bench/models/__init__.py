"""``python -m bench models``: networks of others, accelerated: how exact, in how many bytes, how fast.

exact: tiny networks of every package in fp64, outputs and all gradients against the package's own. memory: published
networks on fake tensors, FLOPs, peak bytes and bytes moved as every operator would, if it read what it takes and wrote
what it makes once; a PREDICTED time is the sum of what DRAM and the matrix units of an H100 would take for them. time:
such networks on a device, in inference and in training, each twice in one interleaved run, so that noise shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from bench import figures, terminal
from bench.arguments import add_device, add_out, add_rounds
from bench.models import exact, memory, times
from bench.models.networks import NETWORKS
from bench.models.zoo import PACKAGES, entries
from bench.records import write
from bench.terminal import Terminal

PARTS = ("exact", "memory", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "models_exact.csv, models_memory.csv, models_memory.png, models_time.csv")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="of the three")
    packages = f"of {', '.join(PACKAGES)}; exact alone looks at those without a published network here"
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES, metavar="NAME", help=packages)
    names = f"of {', '.join(NETWORKS)}; for memory and time"
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NAME", help=names)
    add_rounds(parser, 5)
    add_device(parser, "of what is timed")
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said = Terminal(args)
    chosen = [NETWORKS[name] for name in args.networks or NETWORKS if NETWORKS[name].package in args.packages]
    sentences, paths = [], []
    if "exact" in args.parts:
        found = [entry for package in args.packages for entry in _installed(said, entries, package)]
        path = args.out / "models_exact.csv"
        rows = _collected(said, "networks", found, exact.rows, exact.Row, path)
        said.show(exact.table(rows))
        sentences.append(exact.sentence(rows))
        paths.append(path)
    if "memory" in args.parts:
        path = args.out / "models_memory.csv"
        counted = _collected(said, "networks", chosen, memory.rows, memory.Row, path)
        said.show(memory.table(counted))
        figures.model_memory(counted, path.with_suffix(".png"))
        sentences.append(memory.sentence(counted))
        paths += [path, path.with_suffix(".png")]
    if "time" in args.parts:
        path = args.out / "models_time.csv"
        timed = _collected(said, "networks", chosen, lambda x: times.rows(x, args.rounds, args.device), times.Row, path)
        said.show(times.table(timed))
        sentences.append(times.sentence(timed))
        paths.append(path)
    said.end(" ".join(filter(None, sentences)), *paths)


def _installed(said: Terminal, function: Callable[[str], Sequence[Any]], package: str) -> Sequence[Any]:
    try:
        return function(package)
    except ImportError as error:
        said.say(f"{package} is left out: {error}")
        return ()


def _collected(
    said: Terminal, what: str, of: Sequence[Any], rows: Callable[[Any], list[Any]], kind: type[Any], path: Any
) -> list[Any]:
    """The rows of each, in a file that grows."""
    found: list[Any] = []
    said.say(f"Every row goes to {path}")
    with said.progress(what, len(of)) as bar:
        for each in of:
            bar.now(str(each))
            try:
                found += rows(each)
            except ImportError as error:
                said.say(f"{each} is left out: {error}")
            write(path, kind, found)
            bar.advance()
    return found
