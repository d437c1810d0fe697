"""One pass under the lens: what its kernels cost, what they waste, what bounds them, on a GPU that need not be here.

Resources and instructions are read from the binary, bytes and products from Triton's IR; times are PREDICTED from both
(bench/tiles/roofline.py). Without --tile the kernels are those that the run time would launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from math import prod
from pathlib import Path
from typing import Any

from bench import records
from bench.arguments import positive
from bench.tiles import options
from bench.tiles.assembly import UNITS
from bench.tiles.binaries import Binaries, Binary, occupancy
from bench.tiles.compile import Launch, Problem, pass_launches
from bench.tiles.program import repeats
from bench.tiles.roofline import MACHINES, Machine, Prediction, predict
from bench.tiles.search import KERNELS, PASSES, Task
from isa_triton.tiles import ARITHMETIC, Tile

BOUNDS = (  # of H100, bf16: (problem, pass, times the larger of bytes and products)
    (options.make_problem(64, 256, 512, "local"), "forward", 1.3),
    (options.make_problem(256, 256, 512), "forward", 1.3),
    (options.make_problem(64, 256, 512, "local"), "backward", 2.0),
    (options.make_problem(256, 256, 512), "backward", 2.0),
    *(
        (options.make_problem(tokens, 32, 32, "local", heads=4, bias=True, maps=64), pass_, bound)
        for pass_, bound in (("forward", 2.0), ("backward", 3.0))
        for tokens in (49, 64)
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_problem(parser)
    add, tile = parser.add_argument, ("M", "N", "K", "V", "WARPS", "STAGES")
    what = "of --step: queries, keys, chunks of K and V, warps, stages"
    add("--tile", nargs=6, type=positive, metavar=tile, help=what)
    add("--step", choices=list(KERNELS), help="the kernel that --tile is for (default: forward)")
    add("--bounds", action="store_true", help="instead: H100's predictions beside the bounds that are promised for it")
    add("--csv", type=Path, metavar="FILE", help="write the lines of --bounds there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    if args.csv is not None and not args.bounds:
        raise argparse.ArgumentError(None, "--csv is for --bounds; one pass goes into --json")
    console = records.console(options.WIDTH)
    with options.compilers(args) as binaries:
        if args.bounds:
            bounds = list(_bounds(binaries))
            header = [name.replace("_", " ") for name in records.columns(Bound)]
            styles = [None if bound.holds == "yes" else "red" for bound in bounds]
            words = header[0], header[-1]
            console.print(records.table("", header, map(astuple, bounds), words=words, styles=styles))
            if args.csv is not None:
                records.write(args.csv, Bound, bounds)
            return
        gpu, problem = options.machine(args), options.problem(args)
        try:
            whole = Pass(problem, args.pass_, gpu, kernels(_launches(args, problem, gpu), gpu, binaries))
        except ValueError as error:
            raise argparse.ArgumentError(None, str(error)) from error
    console.print(f"{args.pass_} on {gpu.name} ({args.target}): {problem}")
    lines = zip(*map(_facts, whole.kernels), strict=True)
    rows = [[line[0][0], *(value for _, value in line)] for line in lines]
    console.print(records.table("", ["", *(kernel.launch.label for kernel in whole.kernels)], rows))
    console.print(whole.summary, soft_wrap=True)
    if args.json is not None:
        options.write_json(args.json, [kernel.as_dict() for kernel in whole.kernels])


def _launches(args: argparse.Namespace, problem: Problem, gpu: Machine) -> list[Launch]:
    if args.tile is None:
        return pass_launches(args.target, problem, args.pass_)
    step, passes = args.step or "forward", PASSES[args.pass_]
    if step not in passes:
        raise argparse.ArgumentError(None, f"--step must be of the {args.pass_} pass, {passes}, got {step!r}")
    tile = Tile(*args.tile)
    if any(block < 16 or block & (block - 1) for block in tile[:4]) or tile.num_warps & (tile.num_warps - 1):
        raise argparse.ArgumentError(None, f"--tile takes powers of two, blocks and chunks from 16, got {tuple(tile)}")
    launch = Task(gpu, problem, step).launch(tile)
    if launch is None:
        raise argparse.ArgumentError(None, f"{step} with the tile {tuple(tile)} does not serve {problem}")
    return [launch]


def _facts(kernel: Kernel) -> Iterator[tuple[str, object]]:
    """What the table says of a kernel, line by line."""
    binary, prediction, work = kernel.binary, kernel.prediction, kernel.prediction.work
    yield "grid", f"{prod(kernel.launch.grid)} programs of {binary.warps} warps"
    yield "registers of a thread", binary.registers
    yield "spills, bytes / accesses", f"{binary.spill_bytes} / {binary.spill_accesses}"
    yield "shared memory, bytes", binary.shared
    yield "tensor memory, columns", binary.tensor_columns
    yield "programs at a time", f"{binary.programs}, limited by {kernel.limiter}"
    yield "offences", "; ".join(kernel.offences) or "none"
    yield "", ""
    yield "instructions of a warp", "outside + in loops = run"
    for unit, (outside, inside, executed) in kernel.instructions().items():
        yield f"  {unit}: {UNITS[unit]}", f"{outside} + {inside} = {executed:.0f}"
    yield "", ""
    yield "rows of tiles that are pixels", f"{work.rows:.0%}"
    yield "channels of chunks that exist", f"{work.columns:.0%}"
    yield "GFLOPs asked for", f"{work.flops / 1e9:.2f}"
    yield "GFLOPs done by matrix units", f"{prediction.flops / 1e9:.2f}"
    yield "MB at different addresses", f"{work.distinct / 1e6:.2f}"
    yield "MB asked for", f"{work.bytes / 1e6:.2f}"
    yield "MB read again, from L2", f"{(work.bytes - work.distinct) / 1e6:.2f}"
    yield "", ""
    for unit, seconds in prediction.busy.items():
        yield f"  us of {unit}", f"{1e6 * seconds:.1f}"
    yield "waves of programs", f"{prediction.waves}, {prediction.at_once} at a time"
    yield "PREDICTED us", f"{1e6 * prediction.seconds:.1f}, bound by {prediction.bound}"


@dataclass(frozen=True)
class Bound:
    """A promise and what is predicted, as it is printed: `ratio` is to the larger of bytes and products."""

    predicted_for_H100: str
    us: str
    us_of_bytes: str
    us_of_products: str
    ratio: str
    at_most: str
    holds: str
    kernels_bound_by: str


def _bounds(binaries: Binaries) -> Iterator[Bound]:
    for problem, pass_, bound in BOUNDS:
        whole = Pass.shipped(problem, pass_, MACHINES["H100"], binaries)
        yield Bound(
            f"{pass_}, {problem}", f"{1e6 * whole.seconds:.1f}", f"{1e6 * whole.bytes_seconds:.1f}",
            f"{1e6 * whole.flops_seconds:.1f}", f"{whole.ratio:.2f}", f"{bound:.1f}",
            "yes" if whole.ratio <= bound else "no",
            ", ".join(f"{kernel.launch.label} {kernel.prediction.bound}" for kernel in whole.kernels),
        )  # fmt: skip


# -- a pass and its kernels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One launch, its binary and what is predicted of it."""

    launch: Launch
    binary: Binary
    offences: list[str]
    prediction: Prediction

    @property
    def limiter(self) -> str:
        """What keeps more programs from running on a multiprocessor."""
        b = self.binary
        resources = occupancy(self.launch.target, b.registers, b.warps, b.shared, b.tensor_columns)
        return " and ".join(name for name, programs in resources.items() if programs == b.programs)

    def instructions(self) -> dict[str, tuple[int, int, float]]:
        """For each unit: instructions outside of loops, inside, and how many a warp runs through."""
        often, counts = repeats(self.binary.loops, self.launch), {unit: [0, 0, 0.0] for unit in UNITS}
        for stretch in self.binary.stretches:
            for unit, count in stretch.units.items():
                counts[unit][bool(stretch.nest)] += count
                counts[unit][2] += count * often(stretch.nest)
        return {unit: (int(outside), int(inside), run) for unit, (outside, inside, run) in counts.items()}

    def as_dict(self) -> dict[str, Any]:
        launch, prediction, work = self.launch, self.prediction, self.prediction.work
        resources = "registers", "spill_bytes", "spill_accesses", "shared", "tensor_columns", "warps", "programs"
        return {
            "kernel": launch.label, "key": launch.key, "grid": launch.grid,
            **{name: getattr(self.binary, name) for name in resources}, "limited_by": self.limiter,
            "instructions": self.instructions(), "offences": self.offences,
            "bytes_distinct": work.distinct, "bytes_asked": work.bytes,
            "flops_asked": work.flops, "flops_done": prediction.flops,
            "rows_used": work.rows, "columns_used": work.columns,
            "predicted_seconds": prediction.seconds, "bound": prediction.bound,
            "busy_seconds": prediction.busy, "waves": prediction.waves,
        }  # fmt: skip


def kernels(launches: Iterable[Launch], gpu: Machine, binaries: Binaries) -> list[Kernel]:
    """The kernels of launches.

    Raises:
        ValueError: one does not compile, or not even one program of it fits on a multiprocessor.
    """
    found = []
    for launch, binary, offences in binaries.verdicts(launches):
        if binary is None:
            raise ValueError(f"{launch.name} {offences[0]}")
        found.append(Kernel(launch, binary, offences, predict(launch, binary, gpu)))
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
        problem, (height, width) = self.problem, self.problem.partition.size
        K, V, backward = problem.key_width, problem.value_width, self.name == "backward"
        widths = (2 * K + 2 * V) + backward * (2 * K + V)  # q, k, v, out; or q, k, v, do and dq, dk, dv
        tables = problem.bias * (1 + backward) * problem.partition.tokens**2
        return problem.itemsize * problem.heads * (problem.maps * height * width * widths + tables)

    @property
    def flops(self) -> int:
        """Of the products: two forward, five backward, where the scores are formed again."""
        K, V = self.problem.key_width, self.problem.value_width
        widths = K + V if self.name == "forward" else 3 * K + 2 * V
        return 2 * self.problem.maps * self.problem.heads * self.problem.partition.pairs * widths

    @property
    def bytes_seconds(self) -> float:
        return self.bytes / self.gpu.dram

    @property
    def flops_seconds(self) -> float:
        rate = self.gpu.matrix.get(ARITHMETIC[self.problem.dtype], 2 * self.gpu.fma * self.gpu.clock * self.gpu.units)
        return self.flops / rate

    @property
    def ratio(self) -> float:
        """The prediction beside the larger of the two."""
        return self.seconds / max(self.bytes_seconds, self.flops_seconds)

    @property
    def summary(self) -> str:
        works = [kernel.prediction.work for kernel in self.kernels]
        moved, asked = sum(work.distinct for work in works), sum(work.bytes for work in works)
        done = sum(kernel.prediction.flops or kernel.prediction.work.flops for kernel in self.kernels)
        return (
            f"bytes that must move {self.bytes / 1e6:.1f} MB, {1e6 * self.bytes_seconds:.1f} us of DRAM; "
            f"the kernels move {moved / self.bytes:.2f}x and ask for {asked / self.bytes:.2f}x of them\n"
            f"FLOPs that are needed {self.flops / 1e9:.2f} G, {1e6 * self.flops_seconds:.1f} us of matrix units; "
            f"done {done / self.flops:.2f}x\n"
            f"PREDICTED {1e6 * self.seconds:.1f} us, {self.ratio:.2f}x of the larger of the two"
        )
