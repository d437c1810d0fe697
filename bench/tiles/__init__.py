"""``python -m bench tiles TOOL``: the workbench of the kernels. It compiles them for any target; no GPU is needed."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from bench.arguments import Help

TOOLS = {  # modules of this folder, imported when they are chosen
    "verify": "registers, spills, matrix instructions and access widths of shipped binaries, or of any problem's",
    "report": "one pass: resources, instructions, waste, bytes, and the time that they predict",
    "bounds": "every width and window of the field: the predicted time beside the roofs that it cannot go below",
    "search": "the tile of every kernel of a pass that is predicted to be fastest, and why",
    "sweep": "such a search for every width and window of the field, in one command that can be interrupted",
    "plot": "the tile space of a problem, and the roofline with it and the shipped kernels",
    "warm": "compile ahead for a GPU that is elsewhere, into Triton's cache",
    "calibrate": "predictions beside published measurements",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, what in TOOLS.items():  # whose options `run` reads: here they all are words
        tools.add_parser(name, help=what, add_help=False, prefix_chars="\0").add_argument("options", nargs="*")


def run(args: argparse.Namespace) -> None:
    tool = import_module(f"bench.tiles.{args.tool}")
    parser = argparse.ArgumentParser(
        prog=f"python -m bench tiles {args.tool}", description=tool.__doc__, formatter_class=Help, allow_abbrev=False
    )
    tool.add_arguments(parser)
    options = parser.parse_args(args.options)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("tiles compiles kernels, but TRITON_INTERPRET=1 interprets them: unset it")
    try:
        tool.run(options)
    except argparse.ArgumentError as error:  # arguments that are wrong together
        parser.error(str(error))
