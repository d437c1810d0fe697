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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.arguments import folder, number, positive, size
from bench.providers import isa_module
from bench.records import format_size, read, short, write_whole
from bench.workload import PASSES, Pass, Workload
from isa_triton.sharding import MapParallel
from isa_triton.sharding.layouts import even_cuts

HELP = "one map over several devices, run and simulated (torchrun -m bench sharding): sharding.csv, sharding.png"
LINKS = (25.0, 50.0, 450.0)  # GB/s each way: two speeds of networks between machines, one of links within


@dataclass(frozen=True)
class Row:
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
    seconds: float | None  # where it was run


COLUMNS = tuple(name.rstrip("_") for name in Row.__dataclass_fields__)


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
    layer = isa_module(workload, backend).train(workload.training)
    parallelize_module(layer, mesh, MapParallel())
    cuts, rank = even_cuts(workload.height, mesh.size()), mesh.get_local_rank()
    part = replace(workload, height=cuts[rank + 1] - cuts[rank])
    (x,), upstream = part.inputs(), part.upstream()
    B, C, H, W = workload.batch, workload.channels, workload.height, workload.width
    joined = partial(
        DTensor.from_local,
        device_mesh=mesh,
        placements=[Shard(2)],
        run_check=False,
        shape=torch.Size((B, C, H, W)),
        stride=(C * H * W, H * W, W, 1),
    )
    if not workload.training:
        return torch.no_grad()(lambda: (layer(joined(x)),))

    def training() -> tuple[Tensor, ...]:
        output = layer(joined(x))
        output.backward(joined(upstream))
        gradients = [leaf.grad for leaf in (x, *layer.parameters())]
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        return output, *gradients

    return training


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
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the results (default: out)")
    add("--size", type=size, default=(128, 96), metavar="SIZE", help="map that is run, 64 or 64x128 (default: 128x96)")
    add("--channels", type=positive, default=128, metavar="C", help="of the run, K = C / 2, V = C (default: 128)")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="of the run (default: 8)")
    add("--rounds", type=positive, default=5, help="timed calls of each (default: 5)")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    add(
        "--devices",
        nargs="*",
        type=positive,
        default=[1, 2, 4, 8, 16, 32, 64],
        metavar="N",
        help="simulated; none: leave the simulation out (default: 1 2 4 8 16 32 64)",
    )
    add("--simulated-sizes", nargs="+", type=size, default=[(4096, 4096), (8192, 8192)], metavar="SIZE")
    add("--simulated-channels", type=positive, default=512, metavar="C", help="K = C / 2, V = C (default: 512)")
    add("--simulated-partition-size", type=size, default=(64, 64), metavar="P", help="default: 64")
    add("--rate", type=number, default=100.0, metavar="TFLOPS", help="assumed of a device, TFLOP/s (default: 100)")
    add("--links", nargs="+", type=number, default=list(LINKS), metavar="GBS", help="assumed of a link, GB/s each way")


def run(args: argparse.Namespace) -> None:
    most, shortest = max(args.devices, default=0), min(height for height, _ in args.simulated_sizes)
    if most > shortest:
        raise argparse.ArgumentError(None, f"--devices {most} is more than a simulated map has rows, {shortest}")
    path = args.out / "sharding.csv"
    earlier = read_earlier(path)
    rank, devices = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    options: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    console = Console(quiet=rank != 0)
    console.width = max(console.width, 120)  # rather wrapped by the terminal than cut off
    torch.set_num_threads(1)
    console.print(f"{devices} processes of one thread on {os.cpu_count()} cores, gloo on the CPU", highlight=False)
    with _process_group("gloo", **options):
        rows = list(_measured(args, devices))
    if rank != 0:  # gloo sometimes aborts a process that ends in good order, and torchrun would then end all others
        os._exit(0)
    console.print(_table("Run on this CPU", rows))
    if args.devices:
        simulated = list(_simulated(args))
        console.print(_table("Simulated: counted on fake tensors, of the first and last device the larger", simulated))
        console.print(_predictions(simulated, args.rate, args.links))
        rows += simulated
    rows = merge(earlier, rows)
    write_whole(path, COLUMNS, (tuple(asdict(row).values()) for row in rows))
    plot(rows, args.rate, args.links, args.out / "sharding.png")
    console.print("Wrote", path, args.out / "sharding.png", sep="\n  ", highlight=False)


def _measured(args: argparse.Namespace, devices: int) -> Iterator[Row]:
    """Rows of maps that all processes of this run share."""
    mesh = init_device_mesh("cpu", (devices,))
    for scaling, pass_ in product(("strong", "weak"), args.passes):
        H, W = args.size
        H = H * devices if scaling == "weak" else H
        C = args.channels
        workload = Workload("module", pass_, H, W, C, max(C // 2, 1), C, args.partition_size)
        with Wire(mesh.get_local_rank()) as wire, measure.Counter() as counter:
            call = step(workload, mesh)
            call()
        times = measure.seconds({"": call}, rounds=args.rounds, budget=float("inf"))
        found = torch.tensor([counter.flops, counter.peak_bytes, wire.sent_bytes, times[""]], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        flops, peak_bytes, sent_bytes, seconds = found.tolist()
        yield _row("run", scaling, workload, devices, (int(flops), int(peak_bytes), int(sent_bytes)), seconds)


def _simulated(args: argparse.Namespace) -> Iterator[Row]:
    C = args.simulated_channels
    for map_, pass_, devices in product(args.simulated_sizes, args.passes, args.devices):
        workload = Workload("module", pass_, map_[0], map_[1], C, max(C // 2, 1), C, args.simulated_partition_size)
        ranks = {0, devices - 1}
        counts = [simulate(workload, devices, rank, backend="triton") for rank in ranks]
        flops, peak_bytes, sent_bytes = map(max, zip(*counts, strict=True))
        yield _row("simulated", "strong", workload, devices, (flops, peak_bytes, sent_bytes), None)


def _row(
    source: str, scaling: str, workload: Workload, devices: int, counted: tuple[int, int, int], seconds: float | None
) -> Row:
    return Row(
        source,
        scaling,
        workload.pass_,
        devices,
        workload.height,
        workload.width,
        workload.channels,
        workload.key_channels,
        workload.value_channels,
        format_size(workload.partition_size),
        str(workload.dtype).removeprefix("torch."),
        *counted,
        bound(workload, devices),
        seconds,
    )


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of a CSV and new ones, which take the place of what was found before for the same cell."""

    def cell(row: Row) -> Row:
        return replace(row, flops=0, peak_bytes=0, sent_bytes=0, bound_bytes=0, seconds=None)

    rows = {cell(row): row for row in (*old, *new)}
    return sorted(rows.values(), key=lambda row: (row.source, row.scaling, row.pass_, row.height, row.devices))


def read_earlier(path: Path) -> list[Row]:
    """The rows of an earlier run; none where there is no such file.

    Raises:
        argparse.ArgumentError: the file is something else.
    """
    try:
        return read(path, Row)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"{error}; move it away") from error


def predicted(row: Row, rate: float, link: float) -> float:
    """Seconds of a device: FLOPs at `rate` TFLOP/s, then bytes at `link` GB/s."""
    return sum(_parts(row, rate, link))


def hidden(row: Row, rate: float, link: float) -> float:
    """The part of these seconds that overlapping could hide at best, all of the shorter behind the longer."""
    return min(_parts(row, rate, link)) / predicted(row, rate, link)


def _parts(row: Row, rate: float, link: float) -> tuple[float, float]:
    """Seconds of computing and of sending."""
    return row.flops / (1e12 * rate), row.sent_bytes / (1e9 * link)


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("scaling", "pass", "map", "N", "GFLOPs", "peak MiB", "x N", "sent MiB", "/ bound", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ratio = short(row.sent_bytes / row.bound_bytes) if row.bound_bytes else "-"
        figures = (row.flops / 1e9, row.peak_bytes / 2**20, row.devices * row.peak_bytes / 2**20)
        table.add_row(
            row.scaling,
            row.pass_,
            format_size((row.height, row.width)),
            str(row.devices),
            *(f"{figure:,.0f}" if figure >= 100 else short(figure) for figure in figures),
            f"{row.sent_bytes / 2**20:,.1f}",
            ratio,
            "-" if row.seconds is None else short(1e3 * row.seconds),
        )
    return table


def _predictions(rows: Sequence[Row], rate: float, links: Sequence[float]) -> Table:
    title = (
        f"PREDICTED seconds of a pass: FLOPs at {rate:g} TFLOP/s + bytes over a link, both assumed, not overlapped"
        " (and the most of them that overlapping could hide)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("pass", "map", "N", "FLOPs alone", *(f"{link:g} GB/s" for link in links)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        alone = short(predicted(row, rate, float("inf")))
        times = [f"{short(predicted(row, rate, link))} ({hidden(row, rate, link):.0%})" for link in links]
        table.add_row(row.pass_, format_size((row.height, row.width)), str(row.devices), alone, *times)
    return table


def plot(rows: Sequence[Row], rate: float, links: Sequence[float], path: Path) -> None:
    """Draw what was run above, and below what was simulated: peak bytes, bytes sent and predicted seconds."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    found = [row for row in rows if row.source == "run"]
    for panel, scaling in zip(axes[0, :2], ("strong", "weak"), strict=True):
        for pass_ in PASSES:
            _draw(panel, [r for r in found if r.scaling == scaling and r.pass_ == pass_], "seconds", 1e-3, pass_)
        panel.set(title=f"{scaling} scaling, run on this CPU with gloo", ylabel="ms")
    for pass_ in PASSES:
        strong = [row for row in found if row.scaling == "strong" and row.pass_ == pass_]
        _draw(axes[0, 2], strong, "peak_bytes", 2**20, pass_)
    axes[0, 2].set(title="peak bytes of a device, run (strong)", ylabel="MiB")
    simulated = [row for row in rows if row.source == "simulated"]
    for map_, pass_ in product(sorted({(row.height, row.width) for row in simulated}), PASSES):
        line = [row for row in simulated if (row.height, row.width) == map_ and row.pass_ == pass_]
        label = f"{format_size(map_)} {pass_}"
        _draw(axes[1, 0], line, "peak_bytes", 2**30, label)
        _draw(axes[1, 1], [row for row in line if row.devices > 1], "sent_bytes", 2**30, label)
        axes[1, 1].plot(
            [row.devices for row in line if row.devices > 1],
            [row.bound_bytes / 2**30 for row in line if row.devices > 1],
            color="0.8",
            linewidth=6,
            zorder=0,
        )
    axes[1, 0].set(title="peak bytes of a device, simulated (grey: 1/N)", ylabel="GiB")
    axes[1, 1].set(title="bytes a device sends, simulated (grey: 2 (N-1)/N local maps)", ylabel="GiB")
    if simulated:
        largest = max(row.height * row.width for row in simulated)
        forward = [r for r in simulated if r.height * r.width == largest and r.pass_ == simulated[0].pass_]
        for link in links:
            times = [predicted(row, rate, link) for row in forward]
            axes[1, 2].plot([row.devices for row in forward], times, "o-", label=f"{link:g} GB/s")
        title = f"PREDICTED {forward[0].pass_} of {format_size((forward[0].height, forward[0].width))}"
        axes[1, 2].set(title=f"{title}, {rate:g} TFLOP/s assumed", ylabel="s")
    for panel in axes.flat:
        panel.set(xlabel="devices N")
        panel.title.set_fontsize(11)
        if panel.lines:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.grid(color="0.92")
            panel.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(panel: Any, rows: Sequence[Row], column: str, unit: float, label: str) -> None:
    """A line over N; for peak bytes with what 1/N of the first would be."""
    points = [(row.devices, getattr(row, column) / unit) for row in rows]
    if not points:
        return
    devices, values = zip(*points, strict=True)
    panel.plot(devices, values, "o-", label=label)
    if column == "peak_bytes":
        panel.plot(devices, [values[0] * devices[0] / n for n in devices], color="0.8", linewidth=6, zorder=0)
