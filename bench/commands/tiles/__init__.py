"""``python -m bench tiles TOOL``: the workbench of the kernels. It compiles them for any target; no GPU is needed."""

from __future__ import annotations

import argparse
import os
from types import ModuleType

from bench.commands.tiles import calibrate, plot, report, search, verify

HELP = "the workbench of the kernels: verify, report, search, plot and calibrate, without a GPU"
TOOLS: dict[str, ModuleType] = {
    "verify": verify,
    "report": report,
    "search": search,
    "plot": plot,
    "calibrate": calibrate,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, tool in TOOLS.items():
        tool.add_arguments(tools.add_parser(name, help=tool.HELP, description=tool.__doc__))


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise argparse.ArgumentError(None, "tiles compiles kernels, but TRITON_INTERPRET=1 interprets them: unset it")
    TOOLS[args.tool].run(args)
