"""Maps of different sizes in one launch: their pixels one after another, and a table of which of them attend which."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axis import Axis, grid_axis, integers, local_axis, whole
from .partition import Partition, Size, coordinates, flat_index


class PartitionBatch(NamedTuple):
    """Partitions of several maps, whose pixels lie packed in one tensor: map after map, row by row.

    All groups have the same number of tokens. Where they lie is worked out on the device, without a synchronisation;
    launches depend on the budgets alone.

    Attributes:
        table: [groups, tokens], int32: the packed pixel of every token, -1 where there is none.
        pixels: how many the packed tensors have.

    Examples:
        >>> batch = PartitionBatch.local([(4, 6), (3, 2)], window=(2, 3))
        >>> batch.table.shape, batch.pixels
        (torch.Size([6, 6]), 30)
        >>> q = k = v = torch.randn(batch.pixels, 2, 16)
        >>> isa_triton.partitioned_attention(q, k, v, batch).shape
        torch.Size([30, 2, 16])
    """

    table: Tensor
    pixels: int

    @classmethod
    def local(
        cls,
        sizes: Sequence[Size] | Tensor,
        window: Size,
        shift: Size | None = None,
        *,
        pixels: int | None = None,
        groups: int | None = None,
        device: torch.device | str | None = None,
    ) -> PartitionBatch:
        """Windows of every map, as `Partition.local` has them; those of a map's edges, or of a small map, are cut.

        Args:
            sizes: of the maps, (H, W) each, or of lines or volumes; or a tensor of integers [maps, axes] on the device,
                whose rows may be 0 where there is no map.
            window: (P_h, P_w), of all maps. A map may be smaller.
            shift: as of `Partition.local`.
            pixels: the most, and the length of packed tensors; what lies behind the last map has outputs and gradients
                0. Default as many as there are; to be given with a tensor of sizes.
            groups: the most; default as many as there are, of a tensor of sizes as many as pixels. Groups that do not
                exist cost their programs, which do nothing.
            device: of the table; default that of a tensor of sizes, or torch's own.

        Raises:
            TypeError: sizes that are no integers, or a tensor of them without `pixels`.
            ValueError: sizes, a window or a shift that cannot be; budgets that do not suffice.
            RuntimeError: the same of a tensor of sizes, on its device, which asserts it.

        Examples:
            >>> PartitionBatch.local([(2, 3), (1, 2)], window=(2, 2)).table
            tensor([[ 0,  1,  3,  4],
                    [ 2, -1,  5, -1],
                    [ 6,  7, -1, -1]], dtype=torch.int32)
        """
        windows = _positive("window", window)
        shifts = (0,) * len(windows) if shift is None else integers("shift", shift, len(windows))
        if not all(0 <= a < b for a, b in zip(shifts, windows, strict=True)):
            raise ValueError(
                f"shift must be at least {(0,) * len(windows)} and less than the window {window}, got {shift}"
            )
        parts = tuple(zip(windows, shifts, strict=True))
        return _batch(
            sizes, [lambda size, part=part: local_axis(size, *part) for part in parts], pixels, groups, device
        )

    @classmethod
    def interlaced(
        cls,
        sizes: Sequence[Size] | Tensor,
        *,
        grid: Size,
        pixels: int | None = None,
        groups: int | None = None,
        device: torch.device | str | None = None,
    ) -> PartitionBatch:
        """Groups of `grid` = (G_h, G_w) tokens spread over every map, as `Partition.interlaced` has them.

        Args:
            sizes: as of `local`.
            grid: the tokens of a group. A map may be smaller.
            pixels: as of `local`.
            groups: as of `local`.
            device: as of `local`.

        Raises:
            TypeError: as `local`.
            ValueError: as `local`.

        Examples:
            >>> PartitionBatch.interlaced([(1, 6), (1, 2)], grid=(1, 3)).table
            tensor([[ 0,  2,  4],
                    [ 1,  3,  5],
                    [ 6,  7, -1]], dtype=torch.int32)
        """
        axes = [lambda size, part=part: grid_axis(size, part) for part in _positive("grid", grid)]
        return _batch(sizes, axes, pixels, groups, device)

    @property
    def line(self) -> Partition:
        """The partition of the groups' tokens one after another, of which the table says where they lie."""
        groups, tokens = self.table.shape
        return Partition(local_axis(groups * tokens, tokens))


def _batch(sizes: Any, axes: Sequence[Any], pixels: Any, groups: Any, device: Any) -> PartitionBatch:
    """The table of maps whose axes those functions of a size make."""
    pixels, groups = (None if n is None else whole(name, n) for name, n in (("pixels", pixels), ("groups", groups)))
    for name, limit in (("pixels", pixels), ("groups", groups)):
        if limit is not None and not 1 <= limit < 2**31:
            raise ValueError(f"{name} must be at least 1 and less than 2**31, got {limit}")
    if isinstance(sizes, Tensor):
        _check_sizes(sizes, len(axes))
        if pixels is None:
            raise TypeError("pixels must be given with a tensor of sizes: how many there are is known on its device")
        groups = pixels if groups is None else groups
        table, needed = _table(sizes.to(torch.int64), axes, groups)
        for name, count, limit in zip(("pixels", "groups"), needed, (pixels, groups), strict=True):
            torch._assert_async(count <= limit, f"{name} of all maps must be at most {limit}")
        return PartitionBatch(table, pixels)
    listed = [integers("sizes", size, len(axes)) for size in sizes]
    if not listed or any(n < 1 for size in listed for n in size):
        raise ValueError(f"sizes must be of one or more maps of one or more pixels, got {sizes}")
    counts = sum(map(prod, listed)), sum(prod(f(n).groups for f, n in zip(axes, size, strict=True)) for size in listed)
    for name, count, limit in zip(("pixels", "groups"), counts, (pixels, groups), strict=True):
        if limit is not None and limit < count:
            raise ValueError(f"{name} must be at least the {count} of these maps, got {limit}")
    pixels, groups = (count if limit is None else limit for count, limit in zip(counts, (pixels, groups), strict=True))
    there = torch.get_default_device() if device is None else device
    copied = torch.tensor(listed, device="cpu").to(there, non_blocking=True)  # or the host would wait for the device
    return PartitionBatch(_table(copied, axes, groups)[0], pixels)


def _table(sizes: Tensor, axes: Sequence[Any], groups: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Packed pixels [groups, tokens], and how many pixels and groups there are; by the arithmetic of partitions."""
    some = sizes.clamp(min=1)  # groups are divided by
    of_maps = [f(size) for f, size in zip(axes, some.unbind(1), strict=True)]  # numbers of an axis are [maps] or one
    lengths = sizes.prod(1)
    counts = (lengths > 0) * torch.stack([axis.groups + 0 * lengths for axis in of_maps]).prod(0)
    ends, pixel_ends = counts.cumsum(0), lengths.cumsum(0)
    number = torch.arange(groups, device=sizes.device)
    first = ends - counts  # of the groups of a map
    which = torch.searchsorted(ends, number, right=True).clamp(max=len(sizes) - 1)  # of the maps

    def here(of_map: Any) -> Any:
        return of_map[which][:, None] if isinstance(of_map, Tensor) else of_map

    here_axes = tuple(Axis(*map(here, axis)) for axis in of_maps)
    token = torch.arange(prod([axis.tokens for axis in of_maps]), device=sizes.device)
    pixel, inside = coordinates((number - first[which])[:, None], token, here_axes)
    packed = here(pixel_ends - lengths) + flat_index(pixel, here_axes)
    exists = inside & (number < ends[-1])[:, None]
    return torch.where(exists, packed, -1).to(torch.int32), (pixel_ends[-1], ends[-1])


def _check_sizes(sizes: Tensor, axes: int) -> None:
    if sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sizes must be torch.int32 or torch.int64, got {sizes.dtype}")
    if sizes.dim() != 2 or sizes.shape[1] != axes or sizes.shape[0] < 1:
        raise ValueError(f"sizes must be [maps, {axes}] with one map or more, got {tuple(sizes.shape)}")


def _positive(name: str, values: Any) -> tuple[int, ...]:
    numbers = integers(name, values)
    if any(n < 1 for n in numbers):
        raise ValueError(f"{name} must be at least {(1,) * len(numbers)}, got {numbers}")
    return numbers
