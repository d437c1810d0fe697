"""The command line: ``python -m bench COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

from bench import accuracy, pictures, train
from bench.commands import inference, paper, partitions, photograph, scaling, sharding

COMMANDS: dict[str, ModuleType] = {
    "scaling": scaling,
    "paper": paper,
    "partitions": partitions,
    "inference": inference,
    "pictures": pictures,
    "photograph": photograph,
    "sharding": sharding,
    "accuracy": accuracy,
    "train": train,
}
if find_spec("triton"):  # what looks at kernels has nothing to look at elsewhere
    from bench import tiles
    from bench.commands import check, overhead

    COMMANDS |= {"check": check, "overhead": overhead, "tiles": tiles}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure attention over partitions of a map.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                help=getattr(command, "HELP", "the workbench of the kernels, without a GPU"),
                description=command.__doc__,
            )
        )
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except argparse.ArgumentError as error:  # arguments that are wrong together
        parser.error(str(error))
    except OSError as error:  # a file that cannot be read or written
        parser.error(f"{args.command}: {error}")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
