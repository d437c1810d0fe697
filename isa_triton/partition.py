"""The geometry of the library: a partition is arithmetic, not data movement.

A partition of one axis of a grid is six integers and one equation,

    pixel = origin + group * group_stride + token * token_stride,

and a partition of a line, a map or a volume is that equation on each of its axes. Interlaced and local partitions are
the same equation with groups and tokens exchanged; rows, columns and the whole map are special cases. Shifted windows
begin at an origin before the map. Tokens may fall outside the map, on either side; no group has all of them there. The
end of a cyclic axis, such as longitude, joins its beginning: what lies before the map lies at its end.

Sources: Huang et al., arXiv 1907.12273, section 3.2 (the permutations of long-range and short-range attention); Liu
et al., arXiv 2103.14030, section 3.2 (shifted windows), and arXiv 2106.13230, section 3.1 (windows of three axes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from itertools import product
from math import prod
from operator import and_
from typing import Any

from .axis import MOST_AXES, Axis, Run, along, integers, whole

Size = Sequence[int]  # of a line (L,), a map (H, W) or a volume (D, H, W)


def coordinates(group, token, axes):  # type: ignore[no-untyped-def]
    """The same of all axes, a tuple of pixels: numbers of groups and tokens are those of every axis, the last fastest.

    Kernels compile this very source for the device.
    """
    if len(axes) == 1:
        pixel, inside = along(group, token, axes[0])
        return (pixel,), inside
    else:  # noqa: RET505  # compilers of kernels look into what follows a return, and a name has no constants to them
        before, there = coordinates(group // axes[-1].groups, token // axes[-1].tokens, axes[:-1])
        pixel, here = along(group % axes[-1].groups, token % axes[-1].tokens, axes[-1])
        return before + (pixel,), there & here  # noqa: RUF005  # which they do not know


def flat_index(pixel, axes):  # type: ignore[no-untyped-def]
    """The number of a pixel, a tuple of places on all axes, in the map row by row: the last axis is fastest."""
    if len(axes) == 1:
        return pixel[0]
    else:  # noqa: RET505
        return flat_index(pixel[:-1], axes[:-1]) * axes[-1].size + pixel[-1]


class Partition(tuple[Axis, ...]):
    """A line, a feature map or a volume partitioned into groups; attention connects the tokens of a group.

    A tuple of one to three axes, each of its own kind: ``Partition(Axis.whole(8), Axis.local(28, 7))``. Groups and
    tokens are numbered with the last axis fastest, on a map row by row: ``group = group_h * w.groups + group_w``,
    tokens likewise.

    Examples:
        >>> Partition.local((4, 6), window=(2, 3)).coordinates(group=1, token=4)
        (1, 4, True)
        >>> Partition(Axis.whole(8), Axis.each(4), Axis.each(6)).tokens  # of a video, attention along time
        8
    """

    __slots__ = ()

    def __new__(cls, *axes: Axis) -> Partition:
        return super().__new__(cls, axes)

    def __getnewargs__(self) -> tuple[Axis, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"Partition({', '.join(map(repr, self))})"

    @classmethod
    def interlaced(cls, size: Size, *, stride: Size | None = None, grid: Size | None = None) -> Partition:
        """Groups whose pixels lie a fixed interval apart (the paper's long range).

        Args:
            size: the map, (H, W) pixels; of a line (L,), of a volume (D, H, W).
            stride: (P_h, P_w), the interval: P_h * P_w groups of ceil(H / P_h) * ceil(W / P_w) tokens each (ISA).
            grid: (G_h, G_w), the tokens of a group: the interval becomes ceil(H / G_h), ceil(W / G_w) (MaxViT).

        Exactly one of `stride` and `grid` is given, from 1 up to the map on each axis. Cyclic axes have no others.

        Raises:
            TypeError: a size that is not one to three integers, or not exactly one of `stride` and `grid`.
            ValueError: a size below 1 or larger than its axis.

        Examples:
            >>> Partition.interlaced((16, 24), stride=(8, 8)).tokens
            6
        """
        if (stride is None) == (grid is None):
            raise TypeError(f"give exactly one of stride=(P_h, P_w) and grid=(G_h, G_w), got {stride=} and {grid=}")
        make, name, chosen = (Axis.interlaced, "stride", stride) if grid is None else (Axis.grid, "grid", grid)
        return cls(*map(make, *_checked(size, name, chosen)))

    @classmethod
    def local(cls, size: Size, window: Size, shift: Size | None = None, *, cyclic: Any = False) -> Partition:
        """Groups of `window` = (P_h, P_w) adjacent pixels (the paper's short range; MaxViT block, Swin window).

        Args:
            size: the map, (H, W) pixels; of a line (L,), of a volume (D, H, W).
            window: from 1 up to the map's axis.
            shift: rows and columns by which every window is moved down and right, less than the window (Swin's shifted
                windows, without its roll and mask): those on the edges of the map are cut, at both ends. Default 0.
            cyclic: for each axis, or for all, whether its end joins its beginning, as longitudes do: a shifted window
                on the edge goes on at the other end.

        Raises:
            TypeError: a size that is not one to three integers, or `cyclic` that is not True or False.
            ValueError: a window below 1 or larger than its axis, a shift below 0 or not smaller than its window.

        Examples:
            >>> Partition.local((16, 24), window=(8, 8)).groups
            6
            >>> Partition.local((16, 24), window=(8, 8), shift=(4, 4)).groups
            12
            >>> Partition.local((16, 24), window=(8, 8), shift=(4, 4), cyclic=(False, True)).groups
            9
        """
        sizes, windows = _checked(size, "window", window)
        shifts = (0,) * len(sizes) if shift is None else integers("shift", shift, len(sizes))
        if not all(0 <= a < b for a, b in zip(shifts, windows, strict=True)):
            zeros = (0,) * len(sizes)
            raise ValueError(f"shift must be at least {zeros} and less than the window {window}, got {shift}")
        seams = (cyclic,) * len(sizes) if isinstance(cyclic, bool) else cyclic
        if not isinstance(seams, (tuple, list)) or len(seams) != len(sizes) or {*map(type, seams)} != {bool}:
            raise TypeError(f"cyclic must be True or False, or one of them for each of {sizes}, got {cyclic!r}")
        return cls(*map(Axis.local, sizes, windows, shifts, seams))

    @classmethod
    def axial(cls, size: Size, axis: int) -> Partition:
        """Groups that run along one axis: of it whole, of the others single pixels.

        Args:
            size: the map, (H, W) pixels; of a line (L,), of a volume (D, H, W).
            axis: the number of the axis, as Python's tuples are indexed.

        Raises:
            TypeError: a size that is not one to three integers, or an axis that is none.
            ValueError: a size below 1, or no such axis.

        Examples:
            >>> Partition.axial((8, 4, 6), axis=0).groups  # along time, of a video
            24
        """
        sizes, axis = _sizes(size), whole("axis", axis)
        if not -len(sizes) <= axis < len(sizes):
            raise ValueError(f"axis must lie between {-len(sizes)} and {len(sizes) - 1}, got {axis}")
        return cls(*(Axis.whole(n) if i == axis % len(sizes) else Axis.each(n) for i, n in enumerate(sizes)))

    @classmethod
    def rows(cls, size: Size) -> Partition:
        """Every row is a group (axial attention along the width, the last axis).

        Args:
            size: the map, (H, W) pixels, or of two or three axes.

        Raises:
            TypeError: a size that is not two or three integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.rows((2, 3)).groups, Partition.rows((2, 3)).tokens
            (2, 3)
        """
        return cls.axial(_sizes(size, least=2), -1)

    @classmethod
    def columns(cls, size: Size) -> Partition:
        """Every column is a group (axial attention along the height, the last axis but one).

        Args:
            size: the map, (H, W) pixels, or of two or three axes.

        Raises:
            TypeError: a size that is not two or three integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.columns((2, 3)).groups, Partition.columns((2, 3)).tokens
            (3, 2)
        """
        return cls.axial(_sizes(size, least=2), -2)

    @classmethod
    def dense(cls, size: Size) -> Partition:
        """The whole map is one group (non-local attention).

        Args:
            size: the map, (H, W) pixels; of a line (L,), of a volume (D, H, W).

        Raises:
            TypeError: a size that is not one to three integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.dense((2, 3)).groups, Partition.dense((2, 3)).tokens
            (1, 6)
        """
        return cls(*map(Axis.whole, _sizes(size)))

    @property
    def h(self) -> Axis:
        """How the rows of a map fall into groups: the last axis but one."""
        return self[-2]

    @property
    def w(self) -> Axis:
        """How the columns of a map fall into groups: the last axis."""
        return self[-1]

    @property
    def size(self) -> tuple[int, ...]:
        """The map, (H, W) pixels; of a line (L,), of a volume (D, H, W)."""
        return tuple([axis.size for axis in self])

    @property
    def pixels(self) -> int:
        """How many pixels the map has."""
        return prod(self.size)

    @property
    def groups(self) -> int:
        """How many groups the map has."""
        return prod([axis.groups for axis in self])

    @property
    def tokens(self) -> int:
        """How many tokens a group has, those outside the map counted."""
        return prod([axis.tokens for axis in self])

    @property
    def divides(self) -> bool:
        """Whether every token of every group lies inside the map."""
        return reduce(and_, [axis.divides for axis in self])  # of symbols, without a look at any

    @property
    def wraps(self) -> bool:
        """Whether a group lies across the seam of a cyclic axis, and is no view of the map until that is rolled."""
        return any(axis.wraps for axis in self)

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs of pixels attend: attention's FLOPs are twice the widths times this.

        Examples:
            >>> Partition.local((4, 6), window=(2, 3)).pairs  # 4 groups of 6 x 6
            144
        """
        return prod([sum(run.groups * run.tokens**2 for run in axis.runs()) for axis in self])

    def flat(self) -> list[int]:
        """The numbers of all axes, one after another, as operators take them.

        Examples:
            >>> Partition.unflatten(Partition.rows((2, 3)).flat()) == Partition.rows((2, 3))
            True
        """
        return [number for axis in self for number in (*axis[:-1], int(axis.cyclic))]

    @classmethod
    def unflatten(cls, numbers: Sequence[int]) -> Partition:
        """The inverse of `flat`."""
        n = len(Axis._fields)
        of_axes = [numbers[i : i + n] for i in range(0, len(numbers), n)]
        return cls(*[Axis._make([*of_axis[:-1], bool(of_axis[-1])]) for of_axis in of_axes])

    def coordinates(self, group: Any, token: Any) -> tuple[Any, ...]:
        """Row, column and `inside` of each (group, token), or as many pixels as there are axes and `inside`.

        Takes integers or any integer arrays that broadcast.
        """
        pixel, inside = coordinates(group, token, tuple(self))
        return *pixel, inside

    def seat(self, *pixel: Any) -> tuple[Any, Any]:
        """The (group, token) of the pixel in row y and column x, or as many as there are axes: undoes `coordinates`.

        Examples:
            >>> Partition.interlaced((4, 6), stride=(2, 3)).seat(3, 5)
            (5, 3)
        """
        group = token = 0
        for place, axis in zip(pixel, self, strict=True):
            place = place - axis.origin
            if axis.wraps:
                place = place % axis.size
            group = group * axis.groups + (place // axis.group_stride) % axis.groups
            token = token * axis.tokens + (place // axis.token_stride) % axis.tokens
        return group, token

    def unrolled(self) -> Partition:
        """The partition of maps that are rolled by minus the origin on every axis that `wraps`."""
        return Partition(*[axis.unrolled() for axis in self])

    def pieces(self) -> tuple[tuple[Run, ...], ...]:
        """The map, unrolled, as up to three boxes of groups an axis, each a strided view with no token outside the map.

        Where the partition divides the map there is one piece. Pieces are disjoint and cover every pixel.
        """
        return _pieces(self)

    def view(self, tensor: Any, piece: tuple[Run, ...] | None = None) -> Any:
        """A piece of `tensor` [B, H, W, ...] seen as [B, groups_h, groups_w, tokens_h, tokens_w, ...], no copy.

        Args:
            tensor: a torch tensor whose dimensions from 1 on are the map.
            piece: one of `pieces()`; not needed where the partition divides the map.

        Raises:
            ValueError: `tensor` is not on this map, no piece is named and the partition does not divide the map, or it
                `wraps`.
        """
        n = len(self)
        if tuple(tensor.shape[1 : 1 + n]) != self.size:
            raise ValueError(f"tensor must be [B, {_listed(self.size)}, ...], got {tuple(tensor.shape)}")
        if self.wraps:
            raise ValueError(f"{self} has groups across a seam, no views: roll the tensor, and take unrolled()")
        if piece is None:
            if not self.divides:
                raise ValueError(f"{self} does not divide its map: name one of its pieces()")
            order, seen = self._order(), (tensor.shape[0], *self._groups_and_tokens())
            rows_of_pixels = tensor.view(*(seen[i] for i in order), *tensor.shape[1 + n :])
            return rows_of_pixels.permute(*map(order.index, range(1 + 2 * n)), *range(1 + 2 * n, rows_of_pixels.dim()))
        batch, strides, rest = tensor.stride(0), tensor.stride()[1 : 1 + n], tensor.stride()[1 + n :]
        shape = *[run.groups for run in piece], *[run.tokens for run in piece]
        along_axes = list(zip(self, piece, strides, strict=True))
        groups = [axis.group_stride * stride for axis, _, stride in along_axes]
        tokens = [axis.token_stride * stride for axis, _, stride in along_axes]
        first = sum(axis.pixel(run.group, run.token) * stride for axis, run, stride in along_axes)
        return tensor.as_strided(
            (tensor.shape[0], *shape, *tensor.shape[1 + n :]),
            (batch, *groups, *tokens, *rest),
            tensor.storage_offset() + first,
        )

    def join(self, values: Any) -> Any:
        """The map [B, H, W, ...] that `view` sees as `values` [B, groups_h, groups_w, tokens_h, tokens_w, ...], a copy.

        Raises:
            ValueError: the partition does not divide the map or `wraps`, or `values` are of other groups.
        """
        n = len(self)
        if self.wraps or not self.divides or tuple(values.shape[1 : 1 + 2 * n]) != self._groups_and_tokens():
            raise ValueError(
                f"values must be [B, {_listed(self._groups_and_tokens())}, ...] of a partition that divides"
                f" its map, got {tuple(values.shape)} and {self}"
            )
        rows_of_pixels = values.permute(*self._order(), *range(1 + 2 * n, values.dim()))
        return rows_of_pixels.reshape(values.shape[0], *self.size, *values.shape[1 + 2 * n :])

    def _groups_and_tokens(self) -> tuple[int, ...]:
        return *[axis.groups for axis in self], *[axis.tokens for axis in self]

    def _order(self) -> tuple[int, ...]:
        """Which of [B, groups_h, groups_w, tokens_h, tokens_w] follow each other in a map that the partition divides.

        An axis is divided by groups of adjacent pixels or by interlaced ones, and by no others.
        """
        n, order = len(self), [0]
        for i, axis in enumerate(self, start=1):
            order += (i, i + n) if axis.token_stride == 1 else (i + n, i)
        return tuple(order)


def check_partition(partition: Any) -> None:
    """Whether a partition, which anybody may build of integers, has every pixel in one group once.

    Raises:
        TypeError: no Partition, or not of one to three axes of integers.
        ValueError: an axis that does not fall into groups of adjacent pixels or into interlaced ones, has pixels in no
            group, or a group without pixels.

    Examples:
        >>> check_partition(Partition.rows((4, 6)))
        >>> check_partition((3, 4))
        Traceback (most recent call last):
        TypeError: partition must be a Partition, got tuple
    """
    if not isinstance(partition, Partition):
        raise TypeError(f"partition must be a Partition, got {type(partition).__name__}")
    if not 1 <= len(partition) <= MOST_AXES:
        raise TypeError(f"partition must have one to three axes, got {len(partition)}")
    for name, axis in _named(partition):
        if not isinstance(axis, Axis) or not all(type(number) is int for number in axis[:-1]):
            raise TypeError(f"{name} must be an Axis of integers, got {axis!r}")
        if type(axis.cyclic) is not bool:
            raise TypeError(f"{name}.cyclic must be True or False, got {axis.cyclic!r}")
    _check_partition(partition)


@lru_cache(maxsize=4096)
def _check_partition(partition: Partition) -> None:
    for name, axis in _named(partition):
        if min(axis[:5]) < 1:
            raise ValueError(f"{name} must have all but its origin at least 1, got {axis}")
        size, groups, tokens, group_stride, token_stride, origin, _ = axis.unrolled()
        # either way the tokens of all groups are the pixels from the origin on, each once; one alone needs no stride
        adjacent = (groups == 1 or group_stride == tokens) and (tokens == 1 or token_stride == 1)
        interlaced = (groups == 1 or group_stride == 1) and (tokens == 1 or token_stride == groups)
        begins = -size < axis.origin <= 0 if axis.cyclic else origin <= 0
        covers = (adjacent or interlaced) and begins and size <= origin + groups * tokens
        if not covers:
            raise ValueError(f"{name} must have every pixel in one group once: {_fault(axis)} in {axis}")
        first, last = (origin + tokens, origin + (groups - 1) * tokens) if adjacent else (1, groups - 1)
        if not (first > 0 and last < size):
            raise ValueError(f"{name} must have a pixel in every group, which not all have of {axis}")


def _fault(axis: Axis) -> str:
    """Which pixel an axis has not, or has more than once; or what else is not as it must be."""
    if axis.size <= 2**20 and axis.groups * axis.tokens <= 2**20:
        seats = (along(group, token, axis) for group in range(axis.groups) for token in range(axis.tokens))
        pixels = Counter(pixel for pixel, inside in seats if inside)
        for pixel in range(axis.size):
            if pixels[pixel] != 1:
                return f"pixel {pixel} is there {pixels[pixel]} times"
    return "neither adjacent pixels (strides tokens and 1) nor interlaced ones (1 and groups), from 0 or before, are"


def _named(partition: Partition) -> Iterable[tuple[str, Any]]:
    """The axes, by the names of a map's or by their numbers."""
    names = ("partition.h", "partition.w") if len(partition) == 2 else map("partition[{}]".format, range(MOST_AXES))
    return zip(names, partition, strict=False)


@lru_cache(maxsize=1024)
def _pieces(partition: Partition) -> tuple[tuple[Run, ...], ...]:
    return tuple(product(*[axis.runs() for axis in partition]))


def _sizes(size: Any, least: int = 1) -> tuple[int, ...]:
    sizes = integers("size", size)
    if len(sizes) < least:
        raise TypeError(f"size must be two or three integers, got {size!r}")
    if any(n < 1 for n in sizes):
        raise ValueError(f"size must be at least {(1,) * len(sizes)}, got {sizes}")
    return sizes


def _checked(size: Any, name: str, parts: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = _sizes(size)
    given = integers(name, parts, len(sizes))
    if not all(1 <= part <= n for part, n in zip(given, sizes, strict=True)):
        raise ValueError(f"{name} must lie between {(1,) * len(sizes)} and the map's {sizes}, got {given}")
    return sizes, given


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))
