"""A roofline that says what it assumes: how long a launch should take on a GPU that nobody has at hand.

Every figure that comes from here is a PREDICTION. Its inputs are the machine code (instructions of every unit, counted
times the trips of their loops), the bytes and products that Triton's IR asks for, and a table of data-sheet rates.

    time = launch + slowest + (alone - slowest) * waves

`slowest` is the time of the unit that is busiest over the whole launch, on the SM with most CTAs.
`alone` is what one wave of CTAs would take if it overlapped nothing: the sum of all units' times for one CTA,
and a memory latency each time that it waits for what it has asked for just before; where products are formed in
between, whichever of the two is longer. The CTAs that an SM runs at a time hide each other's waits, so that
this remainder is paid once a wave: with many CTAs per SM only the slowest unit counts.

Where it is off, as `python -m bench tiles calibrate` shows: clocks are those of the data sheet, but matrix units at
full load draw more power than they may, which costs a fifth and more of them, and exponentials overlap with them less
than is assumed here. Banks of shared memory never conflict
here, and schedulers are perfect. What is read again comes from L2, whatever its size, and L2 is one cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

from bench.tiles.assembly import Nest, Stretch
from bench.tiles.binaries import Binary
from bench.tiles.compile import Launch, gpu_target
from bench.tiles.foreign import ForeignCall
from bench.tiles.program import Work, repeats, work
from isa_triton.tiles import ARITHMETIC


class Machine(NamedTuple):
    """A GPU's rates, dense and at the clock of the data sheet."""

    name: str
    target: str
    sms: int  # CDNA: compute units; RDNA: workgroup processors
    clock: float  # Hz
    matrix: dict[str, float]  # FLOP/s by arithmetic, as `isa_triton.tiles.ARITHMETIC` names it
    warp_matrix: float  # the part of that rate that matrix instructions of a single warp (HMMA) reach
    fma: int  # lanes a clock, of an SM; the next two likewise
    alu: int  # 0: it shares those of fma
    special: int  # exponentials among them
    issue: float  # instructions of warps that an SM begins in a clock
    shared: int  # bytes a clock, of an SM
    l2: float  # bytes/s
    dram: float  # bytes/s
    latency: float  # seconds, of memory under load

    def flops(self, dtype: str) -> float:
        """FLOP/s of products of a dtype: on FMA units where there are no matrix units for it."""
        return self.matrix.get(ARITHMETIC[dtype], 2 * self.fma * self.clock * self.sms)

    @property
    def exponentials(self) -> float:
        """Of fp32 numbers, a second: what its units for special functions reach."""
        return self.special * self.clock * self.sms


# SMs, matrix rates and memory bandwidth: the vendors' data sheets of A100 (80 GB SXM), A10, H100 SXM5, H200 SXM,
# B200 (one GPU of HGX), MI300X and Radeon RX 7900 XTX; clocks are those at which these rates hold. Lanes: CUDA C++
# Programming Guide, "Arithmetic Instructions" (results a clock; of base-2 exponentials 16 for compute capabilities 8.0
# to 12.x), AMD's CDNA3 white paper (4 SIMDs of 16 lanes; a
# quarter of them for special functions) and RDNA white paper (4 SIMDs of 32 lanes, likewise). HMMA on H100: 62.9 % of
# the peak that wgmma has (arXiv 2501.12084); on B200 it is assumed that an SM does as much as H100's. Shared memory: 32
# banks of 4 bytes a clock, of a workgroup processor 64. L2: 5120 bytes a clock (A100 white paper), assumed for H100 too
# and for each of B200's two dies, as much per SM for A10, and 60 % of that to be within reach; MI300X and RX 7900 XTX:
# the peak of their Infinity Cache. Latency: about 480 clocks without load on A100 and H100 (arXiv 2402.13499), assumed
# to double under load, and to be the same on A10; those of AMD's are assumed.
_H100 = Machine("H100", "sm_90", 132, 1.83e9, {"16-bit": 989.4e12, "tf32": 494.7e12}, 0.629,
                128, 64, 16, 4, 128, 0.6 * 5120 * 1.83e9, 3.35e12, 0.52e-6)  # fmt: skip
MACHINES = {machine.name: machine for machine in (
    Machine("A100", "sm_80", 108, 1.41e9, {"16-bit": 312e12, "tf32": 156e12}, 1.0,
            64, 64, 16, 4, 128, 0.6 * 5120 * 1.41e9, 2.039e12, 0.68e-6),
    Machine("A10", "sm_86", 72, 1.695e9, {"16-bit": 125e12, "tf32": 62.5e12}, 1.0,
            128, 64, 16, 4, 128, 0.6 * 5120 * 72 / 108 * 1.695e9, 0.6e12, 0.68e-6),
    _H100, _H100._replace(name="H200", dram=4.8e12),
    Machine("B200", "sm_100", 148, 1.85e9, {"16-bit": 2250e12, "tf32": 1125e12}, 0.31,
            128, 64, 16, 4, 128, 0.6 * 10240 * 1.85e9, 8.0e12, 0.52e-6),
    Machine("MI300X", "gfx942", 304, 2.1e9, {"16-bit": 1307.4e12, "tf32": 653.7e12, "ieee": 163.4e12}, 1.0,
            64, 0, 16, 5, 128, 17.2e12, 5.3e12, 0.8e-6),
    Machine("RX7900XTX", "gfx1100", 48, 2.5e9, {"16-bit": 122.8e12}, 1.0,
            128, 0, 32, 4, 256, 3.5e12, 0.96e12, 0.8e-6),
)}  # fmt: skip
LAUNCH = 3e-6  # seconds between the starts of dependent kernels that do nothing; assumed for all


@dataclass(frozen=True)
class Prediction:
    """How long a launch is predicted to take, and why."""

    seconds: float
    bound: str  # the slowest unit, or "latency" where what CTAs wait for and do not overlap takes longer still
    busy: dict[str, float]  # seconds of each unit, on the SM that has most CTAs
    waves: int  # of CTAs
    work: Work
    flops: float  # that matrix instructions do; more than the products have where warps repeat them


def predict(launch: Launch | ForeignCall, binary: Binary, machine: Machine) -> Prediction:
    """How long a launch should take on `machine`.

    Raises:
        ValueError: not even one CTA fits on an SM.
    """
    if not binary.ctas_per_sm:
        raise ValueError(f"no CTA of {launch.name} fits on an SM of {machine.name}")
    if isinstance(launch, ForeignCall):
        asked, dtype = launch.work(binary), launch.dtype(binary)
    else:
        asked, dtype = work(binary.loops, binary.ops, launch), launch.problem.dtype
    ctas, often_of = launch.programs, executions(launch, binary)
    most = ceil(ctas / machine.sms)  # CTAs of the busiest SM
    waves = ceil(most / binary.ctas_per_sm)
    times = [often_of(stretch.nest) for stretch in binary.stretches]

    flops = _matrix_flops(binary, times, asked.flops / ctas)
    rate = machine.matrix.get(ARITHMETIC[dtype], inf) / machine.sms
    if binary.matrix and all(kind.startswith("HMMA") for kind in binary.matrix):
        rate *= machine.warp_matrix
    busy: dict[str, float] = defaultdict(float)
    alone = 0.0  # seconds of one CTA, as busy is until all have been added
    for stretch, often, products in zip(binary.stretches, times, flops, strict=True):
        here = {"matrix": products / rate, **_core_seconds(stretch, binary, machine)}
        # operands stream through shared memory while they are multiplied; the other units serve one instruction stream
        together = max(here["matrix"], here["shared"]) + max(here["special"], here["fma"], here["alu"], here["issue"])
        alone += often * (max(together, stretch.overlapped * machine.latency) + stretch.waits * machine.latency)
        for name, seconds in here.items():
            busy[name] += often * seconds
    busy = {name: most * seconds for name, seconds in busy.items()}
    busy |= {"L2": asked.bytes / machine.l2, "DRAM": asked.distinct / machine.dram}  # which all SMs share
    slowest = max(busy, key=busy.__getitem__)
    unhidden = waves * max(0.0, alone - busy[slowest] / most)
    return Prediction(
        seconds=LAUNCH + busy[slowest] + unhidden, bound="latency" if unhidden > busy[slowest] else slowest,
        busy=busy, waves=waves, work=asked,
        flops=ctas * sum(often * products for often, products in zip(times, flops, strict=True)),
    )  # fmt: skip


def executions(launch: Launch | ForeignCall, binary: Binary) -> Callable[[Nest], float]:
    """How often a program runs what stands in some of the loops of its code: the mean over all programs."""
    return launch.repeats(binary) if isinstance(launch, ForeignCall) else repeats(binary.loops, launch)


def _matrix_flops(binary: Binary, times: list[float], asked: float) -> list[float]:
    """A CTA's matrix FLOPs in each stretch: what the instructions say, or else their part of what is asked for."""
    stretches = binary.stretches
    if all(stretch.flops is not None for stretch in stretches):
        return [binary.warps * (stretch.flops or 0) for stretch in stretches]
    instructions = [stretch.units.get("matrix", 0) for stretch in stretches]
    of_one = asked / sum(often * n for often, n in zip(times, instructions, strict=True))
    return [n * of_one for n in instructions]


def _core_seconds(stretch: Stretch, binary: Binary, machine: Machine) -> dict[str, float]:
    """Seconds that a CTA keeps the units of an SM busy, going through a stretch once."""
    counts = Counter(stretch.units)
    lanes = binary.warps * gpu_target(machine.target).warp_size
    if not machine.alu:
        counts["fma"] += counts.pop("alu", 0)
    clocks = {
        "special": lanes * counts["special"] / machine.special,
        "fma": lanes * counts["fma"] / machine.fma,
        "alu": lanes * counts["alu"] / (machine.alu or machine.fma),
        "issue": binary.warps * sum(counts.values()) / machine.issue,
        "shared": binary.warps * stretch.shared / machine.shared,
    }
    return {name: n / machine.clock for name, n in clocks.items()}
