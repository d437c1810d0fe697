"""Launches of the workbench executed on the machine, and what was counted beside what their binaries say.

A launch's first programs run on tensors of its whole problem, full of zeros: they touch the places that they would
touch on a GPU, and what their numbers are changes no count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.ptx_machine.counts import BANKS, LINE, SECTOR, WORD, Execution, Requests, Wavefronts, add, total
from bench.ptx_machine.driver import installed
from bench.ptx_machine.global_memory import ALIGNED
from bench.terminal import Table
from bench.tiles.compile import Launch, Tensors
from bench.tiles.roofline import LAUNCH
from isa_triton.axis import ceil_div
from isa_triton.backend.kernels import launch, plan

if TYPE_CHECKING:
    from bench.tiles.report import Kernel
    from bench.tiles.roofline import Machine


TYPES = r"sync|aligned|b\d+|[suf]\d+|bf16|tf32|m\d+n\d+\w*|c[ag]|global"  # what is left out of an opcode's name


@dataclass(frozen=True)
class Counted:
    """An execution of some programs of a launch.

    Attributes:
        names: of its regions, the arguments that lie there.
    """

    launch: Launch
    done: Execution
    names: dict[int, str]

    @property
    def times(self) -> float:
        """How many times more programs the launch has."""
        return self.launch.programs / self.done.programs

    def requests(self) -> dict[tuple[str, str], Requests]:
        """Of global memory, by "load" or "store" and the argument."""
        found = defaultdict[tuple[str, str], Requests](Requests)
        for (opcode, region), some in self.done.requests.items():
            add(found["store" if opcode.startswith("st.") else "load", self.names[region]], some)
        return dict(found)

    def wavefronts(self) -> dict[str, Wavefronts]:
        """Of shared memory, by the opcode less its types: "ld.shared.v4"."""
        found = defaultdict[str, Wavefronts](Wavefronts)
        for opcode, some in self.done.wavefronts.items():
            words = [word for word in re.sub(r"::\w+", "", opcode).split(".") if not re.fullmatch(TYPES, word)]
            add(found[".".join(words)], some)
        return dict(found)

    def seconds(self, gpu: Machine) -> dict[str, float]:
        """How long units of a GPU are busy with what was counted, as `bench.tiles.roofline` says it of the binary.

        L1 is taken to find a line a clock, shared memory to serve a wavefront.
        """
        done, most = self.done, ceil(self.launch.programs / gpu.sms)
        asked, served = total(done.requests.values(), Requests), total(done.wavefronts.values(), Wavefronts)
        clocks = {"shared": served.wavefronts * BANKS * WORD / gpu.shared, "L1": float(asked.lines)}
        busy = {unit: most * n / done.programs / gpu.clock for unit, n in clocks.items()}
        return busy | {"L2": self.times * asked.sectors * SECTOR / gpu.l2}

    def as_dict(self) -> dict[str, Any]:
        """All counts, for JSON."""
        done = self.done
        return {
            "programs": done.programs, "warps": done.warps, "instructions": done.units(), "flops": done.flops,
            "requests": [{"kind": kind, "of": of, **asdict(some)} for (kind, of), some in self.requests().items()],
            "wavefronts": [{"opcode": opcode, **asdict(some)} for opcode, some in self.wavefronts().items()],
        }  # fmt: skip


def execute(launched: Launch, programs: int) -> Counted:
    """Execute the first programs of a launch: so many or some more, until the blocks of a group are complete.

    Raises:
        Fault: something is not as a GPU needs it.
        ValueError: the machine does not know the target.
    """
    problem = launched.problem
    blocks = max(1, launched.programs // (problem.maps * problem.partition.groups * problem.heads))
    count = min(launched.programs, ceil_div(programs, blocks) * blocks)
    tensors = Tensors(problem, zeros)
    if launched.step == "forward":
        given = dict(zip(plan.FORWARD, tensors.of_forward(launched.keeps_bias), strict=True))
    else:
        slots, tokens = launched.integers.get("slots", 1), problem.partition.tokens
        partials = tensors.new(slots, problem.heads, tokens, tokens, dtype=torch.float32) if problem.bias else None
        given = dict(zip(plan.BACKWARD, tensors.of_backward(partials), strict=True))
    with installed(launched.target) as device:
        launch.bind(launched.planned._replace(programs=count), given)()
    (done,) = device.executions
    return Counted(launched, done, {x.untyped_storage().data_ptr(): name for name, x in given.items() if x is not None})


def zeros(like: Tensor) -> Tensor:
    """In memory, as aligned as a GPU's allocator has it."""
    size = like.numel() * like.itemsize
    room = torch.zeros(size + ALIGNED, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNED
    return room[start : start + size].view(like.dtype).reshape(like.shape)


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(title: str, names: Sequence[str], kernels: Sequence[Kernel], counted: Sequence[Counted]) -> list[Table]:
    """What kernels do, beside what their binaries say; what they ask of global memory, and what of shared memory."""
    columns = [f"{name}, {how}" for name in names for how in ("read", "executed")]
    rows = list[list[str]]()
    for facts in zip(*map(_facts, kernels, counted), strict=True):
        rows.append([facts[0][0], *(cell for _, *cells in facts for cell in cells)] if facts[0][0] else [])
    requests, wavefronts = list[list[object]](), list[list[object]]()
    for name, each in zip(names, counted, strict=True):
        for (kind, of), n in each.requests().items():
            said = _each(n.requests, n.bytes, n.sectors, n.bytes / SECTOR, n.lines, n.bytes / LINE)
            requests.append([name, f"{kind} {of}", f"{n.requests / each.done.warps:.1f}", *said])
        for opcode, w in each.wavefronts().items():
            said = _each(w.requests, w.wavefronts, w.ideal)
            wavefronts.append([name, opcode, f"{w.requests / each.done.warps:.1f}", *said])
    return [
        Table(f"Executed by an emulator: {title}", ("figure", *columns), rows, words=1),
        Table("Of global memory, by request of a warp", ("kernel", "request", "a warp makes", "bytes", "sectors",
              "at least", "lines", "at least "), requests, words=2),
        Table("Of shared memory, by request of a warp", ("kernel", "request", "a warp makes", "wavefronts",
              "without conflicts"), wavefronts, words=2),
    ]  # fmt: skip


def _each(requests: int, *counts: float) -> list[str]:
    """Counts by request."""
    return [f"{n / requests:.1f}" for n in counts]


def _facts(kernel: Kernel, counted: Counted) -> Iterator[tuple[str, str, str]]:
    """Lines of the first table: a figure's name, what the binary says, and what was counted."""
    done, prediction, gpu = counted.done, kernel.prediction, kernel.gpu
    asked, served = total(done.requests.values(), Requests), total(done.wavefronts.values(), Wavefronts)
    yield "CTAs", str(kernel.launch.programs), str(done.programs)
    yield "", "", ""
    yield "instructions per warp", "machine code", "PTX"
    units = done.units()
    for unit, (_, _, executed) in kernel.instructions().items():
        yield f"  {unit}", f"{executed:.0f}", f"{units[unit] / done.warps:.0f}"
    yield "", "", ""
    yield "GFLOPs of matrix units", f"{prediction.flops / 1e9:.2f}", f"{counted.times * done.flops / 1e9:.2f}"
    moved = counted.times * asked.bytes, counted.times * asked.sectors * SECTOR
    yield "MB asked for", f"{prediction.work.bytes / 1e6:.2f}", f"{moved[0] / 1e6:.2f}"
    yield "MB of their sectors", "-", f"{moved[1] / 1e6:.2f}"
    in_shared = kernel.shared_bytes / (BANKS * WORD)
    yield "wavefronts per CTA", f"{in_shared:.0f}", f"{served.wavefronts / done.programs:.0f}"
    yield "  of conflicts", "-", f"{(served.wavefronts - served.ideal) / done.programs:.0f}"
    yield "", "", ""
    busy, unhidden = counted.seconds(gpu), prediction.seconds - LAUNCH - max(prediction.busy.values())
    for unit, seconds in busy.items():
        read = prediction.busy.get(unit)
        yield f"us of {unit}", "-" if read is None else f"{1e6 * read:.1f}", f"{1e6 * seconds:.1f}"
    busy = prediction.busy | busy
    slowest = max(busy, key=busy.__getitem__)
    yield "bound by", prediction.bound, "latency" if unhidden > busy[slowest] else slowest
    yield "PREDICTED us", f"{1e6 * prediction.seconds:.1f}", f"{1e6 * (LAUNCH + busy[slowest] + unhidden):.1f}"
