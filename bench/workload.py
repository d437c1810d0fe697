"""What is measured: a workload, its inputs, what it costs a provider, and the FLOPs and bytes that theory gives."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bench.records import format_size

Level = Literal["attention", "module", "head"]
Pass = Literal["forward", "training"]
LEVELS: tuple[Level, ...] = get_args(Level)
BLOCK_LEVELS: tuple[Level, ...] = ("attention", "module")  # what all share in a head is not in it
PASSES: tuple[Pass, ...] = get_args(Pass)
Sides = tuple[Any, ...]  # the last is the width, of numbers or arrays
OURS = "isa"  # what the others are compared with


class OnMap:
    """What lies on a map of height x width pixels, or in a volume that has a depth too; a line is a map of one row."""

    height: int
    width: int
    depth: int | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return (self.height, self.width) if self.depth is None else (self.depth, self.height, self.width)

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Workload(OnMap):
    """One attention problem on a map of height x width pixels, or in a volume.

    Level "attention" is q, k, v -> context; level "module" is the whole block with its projections, C -> C channels;
    level "head" is the segmentation head as published, from a backbone's map of 4 C channels to its context of C.
    Pass "forward" is inference (no autograd, BN in evaluation); pass "training" is forward plus backward with respect
    to every input and parameter.
    """

    level: Level
    pass_: Pass
    height: int
    width: int
    channels: int = 512
    key_channels: int = 256
    value_channels: int = 512
    partition_size: tuple[int, ...] = (8, 8)
    dtype: torch.dtype = torch.float32
    batch: int = 1
    depth: int | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, K and V."""
        return self.channels, self.key_channels, self.value_channels

    @property
    def training(self) -> bool:
        return self.pass_ == "training"

    @property
    def in_channels(self) -> int:
        """Width of a module's or a head's input."""
        return 4 * self.channels if self.level == "head" else self.channels

    def columns(self) -> dict[str, Any]:
        """What rows of results say of a workload, by field, whatever its level."""
        names = ("pass_", "height", "width", "channels", "key_channels", "value_channels")
        said = {"partition_size": format_size(self.partition_size), "dtype": str(self.dtype).removeprefix("torch.")}
        return {name: getattr(self, name) for name in names} | said

    def inputs(self, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """Normal entries from a fixed seed: q, k [B, H, W, 1, K] and v [B, H, W, 1, V], or x [B, C or 4 C, H, W]."""
        if self.level == "attention":
            shapes = [self._pixels(width) for width in (self.key_channels, self.key_channels, self.value_channels)]
        else:
            shapes = [self._map(self.in_channels)]
        return tuple(tensor.requires_grad_(self.training) for tensor in self._normal(shapes, device, seed=0))

    def upstream(self, device: str | torch.device = "cpu") -> Tensor:
        """The gradient that arrives at the output; a dense one, since that of sum() is expanded and too cheap."""
        shape = self._pixels(self.value_channels) if self.level == "attention" else self._map(self.channels)
        return self._normal([shape], device, seed=1)[0]

    def _pixels(self, width: int) -> tuple[int, ...]:
        return self.batch, *self.size, 1, width

    def _map(self, channels: int) -> tuple[int, ...]:
        return self.batch, channels, *self.size

    def _normal(self, shapes: list[tuple[int, ...]], device: str | torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(shape, generator=generator, device=device, dtype=self.dtype) for shape in shapes]


@dataclass(frozen=True)
class Cost(OnMap):
    """A line of a CSV: what a provider costs on a workload."""

    provider: str
    level: Level
    pass_: Pass
    height: int
    width: int
    channels: int
    key_channels: int
    value_channels: int
    partition_size: str  # "8x8", height first
    dtype: str  # torch's name, without "torch."
    device: str
    flops: int = 0  # 2 to a multiply-add
    peak_bytes: int = 0
    seconds: float | None = None  # the median of the samples
    spread: float | None = None  # of the samples, as `measure.spread` has it
    samples: int | None = None
    note: str = ""  # why there are no seconds, or why they are doubtful
    how: str = ""  # seconds were found out, as `bench.devices.Timer` says it
    allocated_bytes: int | None = None  # at the peak, as a device's allocator says; beside what was counted
    clocks: str = ""  # of a device, as its driver reports them behind the calls
    host: str = ""  # the model of the device; what is unknown is empty
    threads: int | None = None
    versions: str = ""
    date: str = ""
    depth: int | None = None  # of a volume

    def __post_init__(self) -> None:
        """Raises ValueError where nothing can have been measured so: rows are read from files that people edit."""
        sides = ("height", "width", "channels", "key_channels", "value_channels", *["depth"] * (self.depth is not None))
        if wrong := next((name for name in sides if getattr(self, name) < 1), None):
            raise ValueError(f"{wrong} must be at least 1, got {getattr(self, wrong)}")
        if not re.fullmatch("x".join([r"[1-9]\d*"] * len(self.size)), self.partition_size):
            wanted = "HEIGHTxWIDTH, as 8x8" if self.depth is None else "DEPTHxHEIGHTxWIDTH, as 4x4x4"
            raise ValueError(f"partition_size must be {wanted}, got {self.partition_size!r}")
        for name in ("flops", "peak_bytes", "seconds", "spread", "samples", "allocated_bytes", "threads"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number from 0, got {value}")

    @classmethod
    def of(cls, provider: str, workload: Workload, device: str) -> Cost:
        """What is measured, before anything is found."""
        return cls(provider, workload.level, device=device, depth=workload.depth, **workload.columns())

    @property
    def cell(self) -> Cost:
        """What was measured without what was found: rows of one cell are the same measurement, made twice."""
        names = {field.name for field in fields(self) if field.default is MISSING} | {"depth"}
        return Cost(**{name: getattr(self, name) for name in names})

    @property
    def conditions(self) -> tuple[str, int | None, str]:
        """Rows under other conditions are not compared."""
        return self.host, self.threads, self.versions

    @property
    def doubtful(self) -> bool:
        """Whether there are seconds, and a reason not to trust them."""
        return self.seconds is not None and bool(self.note)

    @property
    def panel(self) -> tuple[Level, Pass]:
        """Of a plot or a table: what is measured alike."""
        return self.level, self.pass_

    @property
    def window(self) -> tuple[int, ...]:
        """The partition size (P_h, P_w), of a volume (P_d, P_h, P_w)."""
        return tuple(map(int, self.partition_size.split("x")))


@dataclass(frozen=True)
class Quantity:
    """A column that is compared: how a table and a plot show it."""

    column: str
    title: str
    unit: str
    scale: float  # of the unit
    file: str

    def of(self, row: Cost) -> float | None:
        value = getattr(row, self.column)
        return None if value is None else value / self.scale


QUANTITIES = (
    Quantity("flops", "FLOPs", "GFLOPs", 1e9, "flops.png"),
    Quantity("peak_bytes", "Peak memory", "MiB", 2**20, "memory.png"),
    Quantity("seconds", "Time", "ms", 1e-3, "time.png"),
)
ALLOCATED = Quantity("allocated_bytes", "Allocated memory", "MiB allocated", 2**20, "memory.png")


def tabled(rows: Sequence[Cost]) -> list[Quantity]:
    """What a table shows of rows: the quantities, and beside the counted memory what was allocated, where any was."""
    flops, peak, seconds = QUANTITIES
    return [flops, peak, *[ALLOCATED] * any(row.allocated_bytes is not None for row in rows), seconds]


def keys_per_query(pixels: Any, partition_size: Sides | None = None) -> Any:
    """How many keys a query meets: every pixel under dense attention, HW / (P_h P_w) + P_h P_w in ISA's two stages.

    `pixels` and the partition size are numbers or arrays. Exact where P divides the map.
    """
    if partition_size is None:
        return pixels
    window = math.prod(partition_size)
    return pixels / window + window


def closed_form_flops(
    pixels: Any, key_channels: int, value_channels: int, pass_: Pass = "forward", partition_size: Sides | None = None
) -> Any:
    """FLOPs of one map's attention matmuls, 2 to a multiply-add: 2 (K + V) HW keys; dense without a partition size.

    A training pass is three times that (each matmul has two gradients); what a backward recomputes is not in it.
    """
    forward = 2 * (key_channels + value_channels) * pixels * keys_per_query(pixels, partition_size)
    return 3 * forward if pass_ == "training" else forward


def closed_form_score_bytes(pixels: Any, itemsize: int, partition_size: Sides | None = None) -> Any:
    """Bytes of one copy of every score of one map: what a version that materialises them cannot go below."""
    return itemsize * pixels * keys_per_query(pixels, partition_size)
