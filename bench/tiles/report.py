"""One pass under the lens: what its kernels cost, what they waste, what bounds them, on a GPU that need not be here.

Resources and instructions are read from the binary, bytes and products from Triton's IR; times are PREDICTED from both
(bench/tiles/roofline.py). Without --tiles the kernels are those that the run time would launch, with the tiles that are
shipped. With it one kernel stands beside itself: every tile, with the difference from the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.arguments import positive
from bench.ptx_machine.counted import Counted, execute, tables
from bench.ptx_machine.faults import Fault, Unsupported
from bench.terminal import Table, Terminal
from bench.tiles import foreign, options
from bench.tiles.assembly import UNITS
from bench.tiles.binaries import Binaries, Binary, ctas_by_resource, dump_file, occupancy
from bench.tiles.compile import NOT_SHIPPED, PASSES, STEPS, TILE, Launch, Problem, format_tile, pass_launches
from bench.tiles.foreign import ForeignCall
from bench.tiles.roofline import Machine, Prediction, executions, predict
from bench.tiles.search import Task
from bench.tiles.verify import SHAPES
from isa_triton.tiles import Tile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_problem(parser)
    add = parser.add_argument
    what = f"a problem of tiles verify instead, of {', '.join(SHAPES)}; --maps and --dtype say more of it"
    add("--shape", choices=SHAPES, metavar="SHAPE", help=what)
    what = f"tiles of one kernel, as {','.join(f'{name}=N' for name in TILE)}; what one leaves out is as shipped"
    add("--cosine", action="store_true", help="of queries and keys that the kernels normalise")
    add("--tiles", nargs="+", type=options.tile, metavar="TILE", help=what)
    add("--step", choices=STEPS, help="the kernel that --tiles is for (default: the pass's first)")
    add("--vs", type=options.tile, metavar="TILE", help="what --tiles stands beside, as 'shipped' (default: its first)")
    add("--dump", type=Path, metavar="DIR", help="write each binary there, from Triton's IR to machine code")
    what = "execute the first N CTAs of each kernel in an emulator too, and count what they ask for (default of N: 8)"
    add("--execute", nargs="?", const=8, type=positive, metavar="N", help=what)
    add("--sass", action="store_true", help="show the machine code, with the lines of source that it serves")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    foreign.add_arguments(parser)
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said = Terminal(args)
    gpu = options.machine(args)
    if args.kernel is not None:
        _report_foreign(args, gpu, said)
        return
    problem = _problem(args)
    if args.execute and not gpu.target.startswith("sm_"):
        raise argparse.ArgumentError(None, f"--execute is for NVIDIA's targets, got {gpu.target}")
    launches = _launches(args, problem, gpu)
    with TemporaryDirectory() as scratch:
        dump = args.dump or (Path(scratch) if args.sass else None)
        with options.compilers(args, said, dump) as binaries:
            found = kernels(launches, gpu, binaries)
        counted = _executed(found, args.execute) if args.execute else []
        code = [dump_file(dump, launch).read_text() for launch in launches] if args.sass and dump else []
    title = f"{args.pass_} on {gpu.name} ({gpu.target}): {problem}"
    if args.tiles is None:
        names = [kernel.launch.label for kernel in found]
        said.show(_table(title, names, found))
    else:
        title = f"{found[0].launch.label}, {title}"
        names = [f"tile {i}" if kernel.launch.origin == NOT_SHIPPED else "shipped" for i, kernel in enumerate(found, 1)]
        said.show(_table(title, names, found, found[0]))
    if counted:
        said.show(*tables(title, names, found, counted))
    said.detail(*(f"{unit}: {what}" for unit, what in UNITS.items()))
    said.say(*code)
    if args.json is not None:
        executed = [{"executed": each.as_dict()} for each in counted] or [{}] * len(found)
        options.write_json(args.json, [kernel.as_dict() | more for kernel, more in zip(found, executed, strict=True)])
    end = Pass(problem, args.pass_, gpu, found).summary if args.tiles is None else _comparison(found)
    said.end(end, *filter(None, (args.json, args.dump)))


def _problem(args: argparse.Namespace) -> Problem:
    """The problem that --shape names, or the one that --tokens and the rest say."""
    if args.shape is None:
        return replace(options.problem(args), cosine=args.cosine)
    if described := options.given(args, but=("maps", "dtype")):
        raise argparse.ArgumentError(None, f"--shape names a problem, and {described} describes another: give one")
    more = {name: getattr(args, name) for name in ("maps", "dtype") if hasattr(args, name)}
    return replace(SHAPES[args.shape], **{"dtype": "bfloat16", "cosine": args.cosine} | more)


def _executed(found: Sequence[Kernel], programs: int) -> list[Counted]:
    """Some programs of each kernel, on the machine."""
    try:
        return [execute(kernel.launch, programs) for kernel in found if isinstance(kernel.launch, Launch)]
    except (Fault, Unsupported) as error:
        raise argparse.ArgumentError(None, f"--execute: {error}") from error


def _report_foreign(args: argparse.Namespace, gpu: Machine, said: Terminal) -> None:
    ours = {"--pass": args.pass_ != "forward", "--tiles": args.tiles, "--step": args.step, "--vs": args.vs is not None,
            "--sass": args.sass, "--shape": args.shape}  # fmt: skip
    if given := " ".join(filter(None, [options.given(args), *(name for name, value in ours.items() if value)])):
        raise argparse.ArgumentError(None, f"--kernel says all of its own, and takes no {given}")
    call = foreign.call(args, gpu.target)
    with options.compilers(args, said, args.dump) as binaries:
        binary, violations = foreign.read(call, binaries)
    try:
        kernel = Kernel(call, binary, violations, predict(call, binary, gpu), gpu)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    said.show(_table(f"{call.name} of {call.origin} on {gpu.name} ({gpu.target})", [call.label], [kernel]))
    if args.json is not None:
        options.write_json(args.json, [kernel.as_dict()])
    rates = gpu.dram, gpu.flops(call.dtype(binary))
    said.end("\n".join(foreign.lines(call, kernel.prediction.seconds, kernel.prediction.work, *rates)))


def _launches(args: argparse.Namespace, problem: Problem, gpu: Machine) -> list[Launch]:
    if args.tiles is None:
        if args.step or args.vs is not None:
            raise argparse.ArgumentError(None, "--step and --vs are for --tiles")
        return pass_launches(gpu.target, problem, args.pass_)
    step = args.step or PASSES[args.pass_][0]
    if step not in PASSES[args.pass_]:
        steps = ", ".join(PASSES[args.pass_])
        raise argparse.ArgumentError(None, f"--step must be of the {args.pass_} pass, {steps}, got {step!r}")
    task = Task(gpu, problem, step)
    launches = []
    for changes in ([] if args.vs is None else [args.vs]) + args.tiles:
        tile = _changed(task, changes)
        if (launch := task.launch(tile)) is None:
            raise argparse.ArgumentError(None, f"{step} with the tile {format_tile(tile)} does not serve {problem}")
        launches.append(launch)
    return list({launch.tile: launch for launch in launches}.values())


def _changed(task: Task, changes: dict[str, int]) -> Tile:
    """A tile that is said by its differences from the shipped one; where none is, by all of its fields."""
    if (entry := task.entry) is not None:
        return entry.tile._replace(**changes)
    if len(changes) < len(TILE):
        raise argparse.ArgumentError(None, f"no tile of {task.step} is shipped for {task.problem}: say all of one")
    return Tile(**changes)


def _table(title: str, names: Sequence[str], kernels: Sequence[Kernel], reference: Kernel | None = None) -> Table:
    """A column a kernel; numbers with their difference from those of a reference, where there is one."""
    beside = [value for _, value, _ in _facts(reference)] if reference else []
    rows = list[list[str]]()
    for i, line in enumerate(zip(*map(_facts, kernels), strict=True)):
        cells = [_cell(value, spec, beside[i] if beside else None) for _, value, spec in line]
        rows.append([line[0][0], *cells] if line[0][0] else [])
    return Table(title, ("figure", *names), rows, words=len(names) + 1)


def _cell(value: Any, spec: str, reference: Any) -> str:
    text = f"{value:{spec}}"
    is_same = isinstance(value, str) or not reference or f"{reference:{spec}}" == text
    return text if is_same else f"{text} ({options.change(value / reference)})"


def _facts(kernel: Kernel) -> Iterator[tuple[str, Any, str]]:
    """What the table says of a kernel, line by line: a name, a word or a number, and how it is written."""
    launch, binary, prediction, work = kernel.launch, kernel.binary, kernel.prediction, kernel.prediction.work
    for name, n in launch.choices.items():
        yield name, str(n), ""
    yield "from", launch.origin, ""
    yield "", "", ""
    yield "grid", f"{launch.programs} CTAs of {binary.warps} warps", ""
    yield "registers per thread", binary.registers, ""
    yield "spills, bytes/accesses", f"{binary.spill_bytes}/{binary.spill_accesses}", ""
    yield "shared memory, bytes", binary.shared, ""
    yield "tensor memory, columns", binary.tensor_columns, ""
    yield "CTAs per SM", binary.ctas_per_sm, ""
    yield "limited by", kernel.limiter, ""
    yield "occupancy", f"{kernel.occupancy:.0%}", ""
    yield "waves", prediction.waves, ""
    yield "violations", "; ".join(kernel.violations) or "none", ""
    yield "", "", ""
    yield "instructions per warp", "", ""
    for unit, (_, _, executed) in kernel.instructions().items():
        yield f"  {unit}", executed, ".0f"
    yield "", "", ""
    yield "tile utilisation", f"{work.tile_utilisation:.0%}", ""
    yield "channel utilisation", f"{work.channel_utilisation:.0%}", ""
    yield "GFLOPs asked for", work.flops / 1e9, ".2f"
    yield "GFLOPs of matrix units", prediction.flops / 1e9, ".2f"
    yield "MB that must move", work.distinct / 1e6, ".2f"
    yield "MB asked for", work.bytes / 1e6, ".2f"
    yield "", "", ""
    for unit, seconds in prediction.busy.items():
        yield f"us of {unit}", 1e6 * seconds, ".1f"
    yield "bound by", prediction.bound, ""
    yield "PREDICTED us", 1e6 * prediction.seconds, ".1f"


def _comparison(found: list[Kernel]) -> str:
    """Which of several tiles is best, beside the first."""
    first, best = found[0], min(found, key=lambda kernel: (bool(kernel.violations), kernel.prediction.seconds))
    a, b = (1e6 * kernel.prediction.seconds for kernel in (first, best))
    named = ",".join(f"{name}={n}" for name, n in best.launch.choices.items())
    return f"PREDICTED {a:.1f} us -> {b:.1f} us, {options.change(b / a)}, with {named}"


# -- a pass and its kernels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One launch, its binary and what is predicted of it."""

    launch: Launch | ForeignCall
    binary: Binary
    violations: list[str]
    prediction: Prediction
    gpu: Machine

    @property
    def limiter(self) -> str:
        """What keeps more CTAs from fitting on an SM."""
        b = self.binary
        resources = ctas_by_resource(self.launch.target, b.registers, b.warps, b.shared, b.tensor_columns)
        return " and ".join(name for name, ctas in resources.items() if ctas == b.ctas_per_sm)

    @property
    def occupancy(self) -> float:
        return occupancy(self.launch.target, self.binary.ctas_per_sm, self.binary.warps)

    def instructions(self) -> dict[str, tuple[int, int, float]]:
        """For each unit: instructions outside of loops, inside, and how many a warp runs through."""
        often, counts = executions(self.launch, self.binary), {unit: [0, 0, 0.0] for unit in UNITS}
        for stretch in self.binary.stretches:
            for unit, count in stretch.units.items():
                counts[unit][bool(stretch.nest)] += count
                counts[unit][2] += count * often(stretch.nest)
        return {unit: (int(outside), int(inside), run) for unit, (outside, inside, run) in counts.items()}

    @property
    def shared_bytes(self) -> float:
        """What a CTA moves to or from shared memory."""
        often = executions(self.launch, self.binary)
        return self.binary.warps * sum(stretch.shared * often(stretch.nest) for stretch in self.binary.stretches)

    def as_dict(self) -> dict[str, Any]:
        launch, prediction, work = self.launch, self.prediction, self.prediction.work
        resources = "registers", "spill_bytes", "spill_accesses", "shared", "tensor_columns", "warps", "ctas_per_sm"
        return {
            "kernel": launch.label, "key": launch.key, "programs": launch.programs,
            "tile": launch.choices, "tile_from": launch.origin,
            **{name: getattr(self.binary, name) for name in resources}, "limited_by": self.limiter,
            "occupancy": self.occupancy, "instructions": self.instructions(), "violations": self.violations,
            "bytes_distinct": work.distinct, "bytes_asked": work.bytes,
            "flops_asked": work.flops, "flops_done": prediction.flops,
            "tile_utilisation": work.tile_utilisation, "channel_utilisation": work.channel_utilisation,
            "predicted_seconds": prediction.seconds, "bound": prediction.bound,
            "busy_seconds": prediction.busy, "waves": prediction.waves,
        }  # fmt: skip


def kernels(launches: Iterable[Launch], gpu: Machine, binaries: Binaries) -> list[Kernel]:
    """The kernels of launches.

    Raises:
        argparse.ArgumentError: one does not compile, or not even one CTA of it fits on an SM.
    """
    found = []
    for launch, binary, violations in binaries.verdicts(launches):
        if binary is None or not binary.ctas_per_sm:
            raise argparse.ArgumentError(None, f"{launch.label} for {launch.problem} {violations[0]}")
        found.append(Kernel(launch, binary, violations, predict(launch, binary, gpu), gpu))
    return found


@dataclass(frozen=True)
class Pass:
    """A pass beside what no implementation of it can go below."""

    problem: Problem
    name: str  # "forward" or "backward"
    gpu: Machine
    kernels: list[Kernel]

    @classmethod
    def shipped(cls, problem: Problem, name: str, gpu: Machine, binaries: Binaries) -> Pass:
        """The pass that the run time would launch. Raises as `kernels`."""
        return cls(problem, name, gpu, kernels(pass_launches(gpu.target, problem, name), gpu, binaries))

    @property
    def seconds(self) -> float:
        return sum(kernel.prediction.seconds for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Every input and output once."""
        problem, pixels = self.problem, prod(self.problem.partition.size)
        K, V, backward = problem.key_width, problem.value_width, self.name == "backward"
        widths = (2 * K + 2 * V) + backward * (2 * K + V)  # q, k, v, out; or q, k, v, do and dq, dk, dv
        tables = problem.bias * (1 + backward) * problem.partition.tokens**2
        return problem.itemsize * problem.heads * (problem.maps * pixels * widths + tables)

    @property
    def flops(self) -> int:
        """Of the products: two forward, five backward, where the scores are formed again."""
        K, V = self.problem.key_width, self.problem.value_width
        widths = K + V if self.name == "forward" else 3 * K + 2 * V
        return 2 * self.problem.maps * self.problem.heads * self.problem.partition.pairs * widths

    @property
    def exponentials(self) -> int:
        """One for every pair of tokens, once in each pass."""
        return self.problem.maps * self.problem.heads * self.problem.partition.pairs

    @property
    def roofs(self) -> dict[str, float]:
        """The seconds that each of three units of the GPU cannot do it below, by name."""
        return {
            "DRAM": self.bytes / self.gpu.dram,
            "matrix": self.flops / self.gpu.flops(self.problem.dtype),
            "exp": self.exponentials / self.gpu.exponentials,
        }

    @property
    def ratio(self) -> float:
        """The prediction beside the highest of the roofs."""
        return self.seconds / max(self.roofs.values())

    @property
    def summary(self) -> str:
        us = {name: f"{1e6 * seconds:.1f}" for name, seconds in self.roofs.items()}
        works = [kernel.prediction.work for kernel in self.kernels]
        moved, asked = sum(work.distinct for work in works), sum(work.bytes for work in works)
        done = sum(kernel.prediction.flops or kernel.prediction.work.flops for kernel in self.kernels)
        return (
            f"bytes that must move {self.bytes / 1e6:.1f} MB, {us['DRAM']} us of DRAM; "
            f"the kernels move {moved / self.bytes:.2f}x and ask for {asked / self.bytes:.2f}x of them\n"
            f"FLOPs that are needed {self.flops / 1e9:.2f} G, {us['matrix']} us of matrix units; "
            f"done {done / self.flops:.2f}x; {self.exponentials / 1e9:.2f} G exponentials, {us['exp']} us\n"
            f"PREDICTED {1e6 * self.seconds:.1f} us, {self.ratio:.2f}x of the largest of the three"
        )
