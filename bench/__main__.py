"""The command line: ``python -m bench COMMAND``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

COMMANDS = {  # modules of this folder, imported when they are chosen
    "scaling": "FLOPs, memory and time across resolutions: scaling.csv, flops.png, memory.png, time.png",
    "paper": "FLOPs of the paper's heads under the authors' conventions and exactly: paper.csv",
    "partitions": "cost by partition size, order and parallel sizes: partitions.csv, partition_sizes_*.png",
    "norm": "how exact training is on a CPU with our batch normalisation, and what it costs: norm.csv",
    "inference": "folded inference against the authors' layout: inference.csv",
    "models": "networks of others, accelerated: models_exact.csv, models_memory.csv and .png, models_time.csv",
    "pictures": "partitions, constructors, supports, attention on a photograph: partitions.png, constructors.png, ...",
    "photograph": "IANet on a photograph, ISA's head beside the dense one, in seconds and bytes: photograph.csv",
    "sharding": "one map over several devices (torchrun -m bench sharding), run and simulated: sharding.csv, .png",
    "accuracy": "tasks that need long-range context, learned with every head: accuracy.csv, accuracy_*.png",
    "train": "a segmentation network by the authors' recipe, and its mean IoU: checkpoint.pt, log.csv, iou.csv",
    "predict": "what such a network sees in a folder of images: labels, overlays, contact_sheet.png",
    "check": "both backends against fp64, forward and backward: check.csv, with times on a GPU",
    "certify": "what a GPU does with the kernels, on one page: certificate.md, .json, and a CSV a part",
    "overhead": "microseconds of host time a call, layer by layer: overhead.csv",
    "tiles": "the workbench of the kernels: verify, report, search, plot and calibrate, without a GPU",
}
OF_KERNELS = ("check", "certify", "overhead", "tiles")


def _hush() -> None:
    """What torch says of a machine without a GPU is no news of a command: before torch is loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's: only what its own user asks to hear
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # CUDA_HOME without a GPU


def main(argv: Sequence[str] | None = None) -> None:
    _hush()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure attention over partitions of a map.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=what, allow_abbrev=False) for name, what in COMMANDS.items()}
    chosen = next(iter(argv), None)
    if chosen not in COMMANDS:
        parser.parse_args(argv)  # the help, or what is wrong
        return
    parser = parsers[chosen]  # whose usage stands above what is wrong
    if chosen in OF_KERNELS and not find_spec("triton"):
        parser.error(f"{chosen} looks at kernels and needs triton, which is not installed (pip install triton)")
    try:
        command, arguments = import_module(f"bench.{chosen}"), import_module("bench.arguments")  # loads torch
    except ModuleNotFoundError as error:
        from isa_triton._extras import install

        parser.error(f"{chosen} needs {error.name}, which is not installed: {install('bench')}")
    parser.description, parser.formatter_class = command.__doc__, arguments.Help
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        command.run(args)
    except (argparse.ArgumentError, OSError) as error:  # wrong together; a file that cannot be read or written
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
