"""``torchrun --nproc-per-node N -m bench sharding``: one map over N devices, run here and simulated on many more.

Run: the two-stage module on gloo, for a map that stays (strong scaling) and one whose height grows with N (weak
scaling; its long-range groups grow too, and with them the FLOPs of a device). Rows of other N stay in the CSV, so that
runs with N = 1, 2, 4 make one plot. Simulated: fake process groups and fake tensors
count peak bytes, exchanged bytes and FLOPs of a device without having it; the time of a device is PREDICTED from
them, as FLOPs over a rate plus bytes over a link's speed, both assumed and printed, with nothing overlapped.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench import figures, measure, terminal
from bench.arguments import add_out, add_partition_size, add_passes, add_redraw, add_rounds, number, positive, size
from bench.compared.modules import isa_block
from bench.records import format_size, read, short, write
from bench.terminal import Table, Terminal
from bench.workload import OnMap, Pass, Workload
from isa_triton.sharding import MapParallel
from isa_triton.sharding.layouts import even_cuts

CORES = os.cpu_count() or 1
LINKS = (25.0, 50.0, 450.0)  # GB/s each way: two speeds of networks between machines, one of links within


@dataclass(frozen=True)
class Row(OnMap):
    """One line of the CSV: what a map costs the device that it costs most."""

    source: str  # "run" or "simulated"
    scaling: str  # "strong": the map stays; "weak": its height grows with the devices
    pass_: Pass
    devices: int
    height: int
    width: int
    channels: int
    key_channels: int
    value_channels: int
    partition_size: str
    dtype: str
    flops: int
    peak_bytes: int
    sent_bytes: int  # to other devices in all-to-alls; as many are received
    bound_bytes: int  # of sending every pixel that is elsewhere's: 2 (N - 1) / N of the local map, in a pass
    seconds: float | None  # where it was run: the median
    spread: float | None = None  # of the samples, as `measure.spread` has it
    samples: int | None = None
    cores: int | None = None  # of the host; each process has one thread
    host: str = ""
    versions: str = ""
    date: str = ""

    @property
    def cell(self) -> tuple[object, ...]:
        """What was measured without what was found."""
        return self.source, self.scaling, self.pass_, self.devices, self.size, self.channels, self.partition_size

    @property
    def oversubscribed(self) -> bool:
        """Whether processes had to share cores, so that the time says nothing of devices."""
        return self.cores is not None and self.devices > self.cores

    def parts(self, rate: float, link: float) -> tuple[float, float]:
        """Seconds of computing at `rate` TFLOP/s, and of sending at `link` GB/s."""
        return self.flops / (1e12 * rate), self.sent_bytes / (1e9 * link)

    def predicted(self, rate: float, link: float) -> float:
        """Seconds of a device: computing, then sending."""
        return sum(self.parts(rate, link))

    def hidden(self, rate: float, link: float) -> float:
        """The part of these seconds that overlapping could hide at best, all of the shorter behind the longer."""
        return min(self.parts(rate, link)) / self.predicted(rate, link)


class Wire(TorchDispatchMode):
    """Counts the all-to-alls that run inside the mode, and the bytes that this device sends to others in them."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.exchanges, self.sent_bytes = rank, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            pixels, _, sends, _ = args
            self.exchanges += 1
            self.sent_bytes += (sum(sends) - sends[self.rank]) * pixels[:1].numel() * pixels.element_size()
        return func(*args, **(kwargs or {}))


def step(workload: Workload, mesh: DeviceMesh, backend: str = "auto") -> measure.Step:
    """One pass of this device's part: as `measure.step`, of a map whose rows are spread over a mesh."""
    layer = isa_block(workload, backend).train(workload.training)
    parallelize_module(layer, mesh, MapParallel())
    cuts, rank = even_cuts(workload.height, mesh.size()), mesh.get_local_rank()
    part = replace(workload, height=cuts[rank + 1] - cuts[rank])
    (x,), upstream = part.inputs(), part.upstream()
    B, C, H, W = workload.batch, workload.channels, workload.height, workload.width
    shape, stride = torch.Size((B, C, H, W)), (C * H * W, H * W, W, 1)
    joined = partial(DTensor.from_local, device_mesh=mesh, placements=[Shard(2)], shape=shape, stride=stride)
    if not workload.training:
        return measure.forward(lambda: layer(joined(x)))
    return measure.training(lambda: layer(joined(x)), (x, *layer.parameters()), joined(upstream))


def simulate(workload: Workload, devices: int, rank: int, backend: str = "auto") -> tuple[int, int, int]:
    """FLOPs, peak bytes and bytes sent of one device among many that are not there."""
    with _process_group("fake", rank=rank, world_size=devices, store=FakeStore()):
        mesh = init_device_mesh("cpu", (devices,))
        with FakeTensorMode(), Wire(rank) as wire, measure.Counter() as counter:
            step(workload, mesh, backend)()
    return counter.flops, counter.peak_bytes, wire.sent_bytes


@contextmanager
def _process_group(backend: str, **options: Any) -> Iterator[None]:
    dist.init_process_group(backend, **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def bound(workload: Workload, devices: int) -> int:
    """Bytes that a device sends in a pass if every pixel that others need leaves once, and comes back once."""
    local = workload.batch * workload.channels * workload.pixels * workload.dtype.itemsize / devices
    return round(2 * (devices - 1) / devices * local * (2 if workload.training else 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    add("--size", type=size, default=(128, 96), metavar="SIZE", help="map that is run, 64 or 64x128")
    add("--channels", type=positive, default=128, metavar="C", help="of the run, K = C / 2, V = C")
    add_partition_size(parser, "P of the run")
    add_rounds(parser, 5)
    add_passes(parser)
    devices, maps = [1, 2, 4, 8, 16, 32, 64], [(4096, 4096), (8192, 8192)]
    simulated = "simulated; none: leave the simulation out"
    add("--devices", nargs="*", type=positive, default=devices, metavar="N", help=simulated)
    add("--simulated-sizes", nargs="+", type=size, default=maps, metavar="SIZE", help="maps that are simulated")
    add("--simulated-channels", type=positive, default=512, metavar="C", help="of these, K = C / 2, V = C")
    add("--simulated-partition-size", type=size, default=(64, 64), metavar="P", help="of these")
    add("--rate", type=number, default=100.0, metavar="TFLOPS", help="assumed of a device, TFLOP/s")
    add("--links", nargs="+", type=number, default=list(LINKS), metavar="GBS", help="assumed of a link, GB/s each way")
    add_redraw(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    most, shortest = max(args.devices, default=0), min(height for height, _ in args.simulated_sizes)
    if most > shortest:
        raise argparse.ArgumentError(None, f"--devices {most} is more than a simulated map has rows, {shortest}")
    path, picture = args.out / "sharding.csv", args.out / "sharding.png"
    try:
        earlier = read(path, Row)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"{error}; move it away") from error
    if args.redraw:
        if not earlier:
            raise argparse.ArgumentError(None, f"--redraw: {path} is not there")
        figures.sharding_costs(earlier, args.rate, args.links, picture)
        Terminal(args).end("Drawn again.", picture)
        return
    rank, devices = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    said = Terminal(args, quiet=rank != 0)
    torch.set_num_threads(1)
    said.say(f"{devices} processes of one thread on {CORES} cores, gloo on the CPU; rows go to {path}")
    with _process_group("gloo", **options):
        rows = list(_measured(args, devices, said))
    if rank != 0:  # gloo sometimes aborts a process that ends in good order, and torchrun would then end all others
        os._exit(0)
    tables = [_table("Run on this CPU", rows)]
    if args.devices:
        simulated = list(_simulated(args, said))
        title = "Simulated: counted on fake tensors, of the first and last device the larger"
        tables += [_table(title, simulated), _predictions(simulated, args.rate, args.links)]
        rows += simulated
    shared = f", and their times say nothing: {devices} processes share {CORES} cores" if devices > CORES else ""
    sentence = f"{len(rows)} rows, {sum(row.source == 'run' for row in rows)} of them run{shared}."
    cells = {row.cell: row for row in (*earlier, *rows)}  # what is new takes the place of what was found before
    rows = sorted(cells.values(), key=lambda row: (row.source, row.scaling, row.pass_, row.height, row.devices))
    write(path, Row, rows)
    figures.sharding_costs(rows, args.rate, args.links, picture)
    said.show(*tables)
    said.end(sentence, path, picture)


def _workload(pass_: Pass, size: tuple[int, int], channels: int, partition_size: tuple[int, int]) -> Workload:
    """The two-stage module with K = C / 2, V = C."""
    return Workload("module", pass_, *size, channels, max(channels // 2, 1), channels, partition_size)


def _measured(args: argparse.Namespace, devices: int, said: Terminal) -> Iterator[Row]:
    """Rows of maps that all processes of this run share."""
    mesh = init_device_mesh("cpu", (devices,))
    for scaling, pass_ in _visited(said, "rows run", [*product(("strong", "weak"), args.passes)]):
        map_ = args.size[0] * (devices if scaling == "weak" else 1), args.size[1]
        workload = _workload(pass_, map_, args.channels, args.partition_size)
        with Wire(mesh.get_local_rank()) as wire, measure.Counter() as counter:
            call = step(workload, mesh)
            call()
        times = torch.tensor(measure.samples({"": call}, rounds=args.rounds, budget=float("inf"))[""].seconds)
        found = torch.tensor([counter.flops, counter.peak_bytes, wire.sent_bytes], dtype=torch.int64)
        for each in (times, found):  # a pass has ended when its last device has
            dist.all_reduce(each, dist.ReduceOp.MAX)
        yield _row(scaling, workload, devices, found.tolist(), times.tolist())


def _simulated(args: argparse.Namespace, said: Terminal) -> Iterator[Row]:
    cells = [*product(args.simulated_sizes, args.passes, args.devices)]
    for map_, pass_, devices in _visited(said, "rows simulated", cells):
        workload = _workload(pass_, map_, args.simulated_channels, args.simulated_partition_size)
        counts = [simulate(workload, devices, rank, backend="triton") for rank in {0, devices - 1}]
        yield _row("strong", workload, devices, map(max, zip(*counts, strict=True)), [])


def _visited(said: Terminal, unit: str, cells: Sequence[Any]) -> Iterator[Any]:
    """The cells, under a progress bar that names each."""
    with said.progress(unit, total=len(cells)) as bar:
        for cell in cells:
            bar.now(" ".join(format_size(each) if isinstance(each, tuple) else str(each) for each in cell))
            yield cell
            bar.advance()


def _row(scaling: str, workload: Workload, devices: int, counts: Iterable[int], times: Sequence[float]) -> Row:
    source = "run" if times else "simulated"
    found: dict[str, Any] = dict(zip(("flops", "peak_bytes", "sent_bytes"), counts, strict=True))
    found |= {"bound_bytes": bound(workload, devices), "seconds": statistics.median(times) if times else None}
    if times:
        found |= {"spread": round(measure.spread(times), 3), "samples": len(times)}
    where = {name: value for name, value in measure.conditions().items() if name != "threads"} | {"cores": CORES}
    return Row(source=source, scaling=scaling, devices=devices, **workload.columns(), **found, **where)


def _table(title: str, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        counts = (row.flops / 1e9, row.peak_bytes / 2**20, row.devices * row.peak_bytes / 2**20)
        figures = [f"{count:,.0f}" if count >= 100 else short(count) for count in counts]
        sent = [f"{row.sent_bytes / 2**20:,.1f}", short(row.sent_bytes / row.bound_bytes) if row.bound_bytes else None]
        time = None if row.seconds is None else short(1e3 * row.seconds)
        lines.append([row.scaling, row.pass_, format_size(row.size), row.devices, *figures, *sent, time])
    names = ("scaling", "pass", "map", "N", "GFLOPs", "peak MiB", "x N", "sent MiB", "/ bound", "ms")
    return Table(title, names, lines, words=3)


def _predictions(rows: Sequence[Row], rate: float, links: Sequence[float]) -> Table:
    assumed = f"FLOPs at {rate:g} TFLOP/s + bytes over a link, both assumed, not overlapped"
    title = f"PREDICTED seconds of a pass: {assumed} (and the most of them that overlapping could hide)"
    lines = []
    for row in rows:
        alone = short(row.predicted(rate, float("inf")))
        times = [f"{short(row.predicted(rate, link))} ({row.hidden(rate, link):.0%})" for link in links]
        lines.append([row.pass_, format_size(row.size), row.devices, alone, *times])
    header = ("pass", "map", "N", "FLOPs alone", *(f"{link:g} GB/s" for link in links))
    return Table(title, header, lines, words=2)
