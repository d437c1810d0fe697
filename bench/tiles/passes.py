"""A pass as a whole: its kernels, what each is predicted to take, and what no implementation can go below."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from bench.tiles.assembly import UNITS
from bench.tiles.compile import Launch, Problem, backward_launches, forward_launches
from bench.tiles.program import trips
from bench.tiles.read import LIMITS, Binary, room
from bench.tiles.roofline import Machine, Prediction, predict
from bench.tiles.verify import Case, Verifier, offences
from isa_triton import tiles
from isa_triton.tiles import ARITHMETIC


def pass_launches(target: str, problem: Problem, pass_: str) -> list[Launch]:
    """What the run time would launch."""
    sizes = problem.key_width, problem.value_width, problem.dtype, problem.partition.tokens
    if pass_ == "forward":
        return forward_launches(target, problem, tiles.lookup(target, "forward", *sizes))
    return backward_launches(target, problem, tiles.backward(target, *sizes))


@dataclass(frozen=True)
class Kernel:
    """One launch, its binary and what is predicted of it."""

    launch: Launch
    binary: Binary
    prediction: Prediction
    offences: list[str]

    @property
    def name(self) -> str:
        """Of the kernel, and of what it writes where several passes launch it."""
        names, constants = self.launch.kernel.arg_names, self.launch.constants
        written = [
            name for name in ("dk", "dv") if name in names and constants.get((names.index(name),), 0) is not None
        ]
        alone = f": {written[0]}" if "dk" in names and len(written) == 1 else ""
        return self.launch.name.removesuffix("_kernel") + alone

    @property
    def limiter(self) -> str:
        """What keeps more programs from running on a multiprocessor."""
        binary, target = self.binary, self.launch.target
        name = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
        space = room(
            LIMITS[name], binary.registers, target.warp_size, binary.warps, binary.shared, binary.tensor_columns
        )
        return " and ".join(what for what, programs in space.items() if programs == binary.programs)

    def instructions(self) -> dict[str, tuple[int, int, float]]:
        """For each unit: instructions outside of loops, inside, and how many a warp runs through."""
        laps, counts = trips(self.binary.loops, self.launch), {name: [0, 0, 0.0] for name in UNITS}
        for stretch in self.binary.stretches:
            for name, count in stretch.units.items():
                counts[name][bool(stretch.nest)] += count
                counts[name][2] += count * prod(laps[loop] for loop in stretch.nest)
        return {name: (int(outside), int(inside), run) for name, (outside, inside, run) in counts.items()}

    def as_dict(self) -> dict[str, Any]:
        binary, prediction = self.binary, self.prediction
        return {
            "kernel": self.name,
            "key": self.launch.key,
            "grid": self.launch.grid,
            "registers": binary.registers,
            "spill_bytes": binary.spill_bytes,
            "spill_accesses": binary.spill_accesses,
            "shared": binary.shared,
            "tensor_columns": binary.tensor_columns,
            "warps": binary.warps,
            "programs": binary.programs,
            "limited_by": self.limiter,
            "instructions": self.instructions(),
            "offences": self.offences,
            "bytes_distinct": prediction.work.distinct,
            "bytes_asked": prediction.work.bytes,
            "flops_asked": prediction.work.flops,
            "flops_done": prediction.flops,
            "rows_used": prediction.work.rows,
            "columns_used": prediction.work.columns,
            "predicted_seconds": prediction.seconds,
            "bound": prediction.bound,
            "busy_seconds": prediction.busy,
            "waves": prediction.waves,
        }


def kernel(launch: Launch, problem: Problem, gpu: Machine, verifier: Verifier) -> Kernel:
    """The kernel of a launch.

    Raises:
        ValueError: it does not compile, or not even one program of it fits on a multiprocessor.
    """
    case = Case(gpu.target, launch.name, problem, launch)
    facts = verifier.known(case) or verifier(case)
    if isinstance(facts, str):
        raise ValueError(f"{launch.name} {facts}")
    return Kernel(launch, facts, predict(launch, problem, facts, gpu), offences(case, facts))


@dataclass(frozen=True)
class Whole:
    """A pass beside what no implementation of it can go below."""

    problem: Problem
    pass_: str
    gpu: Machine
    kernels: list[Kernel]

    @property
    def seconds(self) -> float:
        return sum(kernel.prediction.seconds for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Every input and output once."""
        problem, (height, width) = self.problem, self.problem.partition.size
        K, V, backward = problem.key_width, problem.value_width, self.pass_ == "backward"
        widths = (2 * K + 2 * V) + backward * (2 * K + V)  # q, k, v, out; or q, k, v, do and dq, dk, dv
        tables = problem.bias * (1 + backward) * problem.partition.tokens**2
        return problem.itemsize * problem.heads * (problem.maps * height * width * widths + tables)

    @property
    def flops(self) -> int:
        """Of the products: two forward, five backward, where the scores are formed again."""
        K, V = self.problem.key_width, self.problem.value_width
        widths = K + V if self.pass_ == "forward" else 3 * K + 2 * V
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
        done = sum(kernel.prediction.flops or kernel.prediction.work.flops for kernel in self.kernels)
        moved = sum(kernel.prediction.work.distinct for kernel in self.kernels)
        asked = sum(kernel.prediction.work.bytes for kernel in self.kernels)
        return (
            f"bytes that must move {self.bytes / 1e6:.1f} MB, {1e6 * self.bytes_seconds:.1f} us of DRAM; "
            f"the kernels move {moved / self.bytes:.2f}x and ask for {asked / self.bytes:.2f}x of them\n"
            f"FLOPs that are needed {self.flops / 1e9:.2f} G, {1e6 * self.flops_seconds:.1f} us of matrix units; "
            f"done {done / self.flops:.2f}x\n"
            f"PREDICTED {1e6 * self.seconds:.1f} us, {self.ratio:.2f}x of the larger of the two"
        )
