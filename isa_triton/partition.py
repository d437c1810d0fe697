"""The geometry of the library: a partition is arithmetic, not data movement.

A partition of one image axis is six integers and one equation,

    pixel = origin + group * group_stride + token * token_stride,

and a partition of a feature map is that equation on each of its two axes. Interlaced and local partitions are the
same equation with groups and tokens exchanged; rows, columns and the whole map are special cases. Shifted windows
begin at an origin before the map. Tokens may fall outside the map, on either side; no group has all of them there.

Sources: Huang et al., arXiv 1907.12273, section 3.2 (the permutations of long-range and short-range attention); Liu
et al., arXiv 2103.14030, section 3.2 (shifted windows).
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import groupby, product
from operator import index
from typing import Any, NamedTuple


def coordinates(group, token, h, w):  # type: ignore[no-untyped-def]  # ints, arrays or tl.tensors alike
    """Row y and column x of each (group, token), and whether it lies inside the map: the equation on both axes.

    Kernels compile this very source for the device.
    """
    y = h.origin + (group // w.groups) * h.group_stride + (token // w.tokens) * h.token_stride
    x = w.origin + (group % w.groups) * w.group_stride + (token % w.tokens) * w.token_stride
    inside = (y < h.size) & (x < w.size)
    if h.origin < 0 or w.origin < 0:
        inside = inside & (y >= 0) & (x >= 0)
    return y, x, inside


def ceil_div(a: int, b: int) -> int:
    """The least integer not below a / b. Without a negation: symbolic shapes understand it too."""
    return (a + b - 1) // b


class Run(NamedTuple):
    """Neighbouring groups of an axis that have the same tokens inside the map."""

    group: int  # the first of the groups
    groups: int
    token: int  # the first of the tokens
    tokens: int


class Axis(NamedTuple):
    """How an image axis of `size` pixels falls into groups: ``origin + group * group_stride + token * token_stride``.

    Attributes:
        size: pixels of the axis.
        groups: how many.
        tokens: of a group, those outside the map counted.
        group_stride: from a group's token to the next group's.
        token_stride: from a group's token to its next.
        origin: the pixel of token 0 of group 0, on the map's edge or before it.

    Examples:
        >>> Axis.interlaced(10, stride=4)  # groups {0, 4, 8}, {1, 5, 9}, {2, 6, -}, {3, 7, -}
        Axis(size=10, groups=4, tokens=3, group_stride=1, token_stride=4, origin=0)
        >>> Axis.local(10, window=4, shift=3)  # groups {-, 0, 1, 2}, {3, 4, 5, 6}, {7, 8, 9, -}
        Axis(size=10, groups=3, tokens=4, group_stride=4, token_stride=1, origin=-1)
    """

    size: int
    groups: int
    tokens: int
    group_stride: int
    token_stride: int
    origin: int = 0

    @classmethod
    def interlaced(cls, size: int, stride: int) -> Axis:
        """`stride` groups whose tokens lie `stride` pixels apart."""
        size, stride = _whole(size), _whole(stride)
        return cls(size, groups=stride, tokens=ceil_div(size, stride), group_stride=1, token_stride=stride)

    @classmethod
    def grid(cls, size: int, tokens: int) -> Axis:
        """Interlaced groups of `tokens` tokens each, spread over the whole axis."""
        size, tokens = _whole(size), _whole(tokens)
        stride = ceil_div(size, tokens)
        return cls(size, groups=stride, tokens=tokens, group_stride=1, token_stride=stride)

    @classmethod
    def local(cls, size: int, window: int, shift: int = 0) -> Axis:
        """Groups of `window` adjacent pixels; a shift leaves `shift` of them to the first group."""
        size, window = _whole(size), _whole(window)
        origin = shift - window if shift else 0
        return cls(size, ceil_div(size - origin, window), window, group_stride=window, token_stride=1, origin=origin)

    @property
    def divides(self) -> bool:
        """Whether every token of every group lies inside the map."""
        return self.groups * self.tokens == self.size

    def pixel(self, group: int, token: int) -> int:
        """Where a group's token lies."""
        return self.origin + group * self.group_stride + token * self.token_stride

    def runs(self) -> tuple[Run, ...]:
        """The axis as up to three runs of groups, each of which is a strided view without a token outside the map."""

        def inside(group: int) -> tuple[int, int]:
            """The first of the group's tokens inside the map, and the first behind them."""
            start = self.pixel(group, 0)
            stop = min(self.tokens, ceil_div(self.size - start, self.token_stride))
            return max(0, ceil_div(-start, self.token_stride)), stop

        same = [(tokens, list(groups)) for tokens, groups in groupby(range(self.groups), inside)]
        return tuple(Run(groups[0], len(groups), start, stop - start) for (start, stop), groups in same)


class Partition(NamedTuple):
    """A feature map of H x W pixels partitioned into groups; attention connects the tokens of a group.

    Groups and tokens are numbered row by row: ``group = group_h * w.groups + group_w``, tokens likewise.

    Attributes:
        h: how the rows fall into groups.
        w: how the columns do.

    Examples:
        >>> Partition.local((4, 6), window=(2, 3)).coordinates(group=1, token=4)
        (1, 4, True)
    """

    h: Axis
    w: Axis

    @classmethod
    def interlaced(
        cls,
        size: tuple[int, int],
        *,
        stride: tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Partition:
        """Groups whose pixels lie a fixed interval apart (the paper's long range).

        Args:
            size: the map, (H, W) pixels.
            stride: (P_h, P_w), the interval: P_h * P_w groups of ceil(H / P_h) * ceil(W / P_w) tokens each (ISA).
            grid: (G_h, G_w), the tokens of a group: the interval becomes ceil(H / G_h), ceil(W / G_w) (MaxViT).

        Exactly one of `stride` and `grid` is given, each from 1 up to the map's axis.

        Raises:
            TypeError: a size that is not a pair of integers, or not exactly one of `stride` and `grid`.
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
    def local(cls, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Partition:
        """Groups of `window` = (P_h, P_w) adjacent pixels (the paper's short range; MaxViT block, Swin window).

        Args:
            size: the map, (H, W) pixels.
            window: from 1 up to the map's axis.
            shift: rows and columns by which every window is moved down and right, less than the window (Swin's shifted
                windows, without its roll and mask): those on the edges of the map are cut, at both ends.

        Raises:
            TypeError: a size that is not a pair of integers.
            ValueError: a window below 1 or larger than its axis, a shift below 0 or not smaller than its window.

        Examples:
            >>> Partition.local((16, 24), window=(8, 8)).groups
            6
            >>> Partition.local((16, 24), window=(8, 8), shift=(4, 4)).groups
            12
        """
        (height, width), (part_h, part_w) = _checked(size, "window", window)
        shift_h, shift_w = pair("shift", shift)
        if not (0 <= shift_h < part_h and 0 <= shift_w < part_w):
            raise ValueError(f"shift must be at least (0, 0) and less than the window {window}, got {shift}")
        return cls(Axis.local(height, part_h, shift_h), Axis.local(width, part_w, shift_w))

    @classmethod
    def rows(cls, size: tuple[int, int]) -> Partition:
        """Every row is a group (axial attention along the width).

        Args:
            size: the map, (H, W) pixels.

        Raises:
            TypeError: a size that is not a pair of integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.rows((2, 3)).groups, Partition.rows((2, 3)).tokens
            (2, 3)
        """
        height, width = pair("size", size)
        return cls.local((height, width), (1, width))

    @classmethod
    def columns(cls, size: tuple[int, int]) -> Partition:
        """Every column is a group (axial attention along the height).

        Args:
            size: the map, (H, W) pixels.

        Raises:
            TypeError: a size that is not a pair of integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.columns((2, 3)).groups, Partition.columns((2, 3)).tokens
            (3, 2)
        """
        height, width = pair("size", size)
        return cls.local((height, width), (height, 1))

    @classmethod
    def dense(cls, size: tuple[int, int]) -> Partition:
        """The whole map is one group (non-local attention).

        Args:
            size: the map, (H, W) pixels.

        Raises:
            TypeError: a size that is not a pair of integers.
            ValueError: a size below 1.

        Examples:
            >>> Partition.dense((2, 3)).groups, Partition.dense((2, 3)).tokens
            (1, 6)
        """
        height, width = pair("size", size)
        return cls.local((height, width), (height, width))

    @property
    def size(self) -> tuple[int, int]:
        """The map, (H, W) pixels."""
        return self.h.size, self.w.size

    @property
    def groups(self) -> int:
        """How many groups the map has."""
        return self.h.groups * self.w.groups

    @property
    def tokens(self) -> int:
        """How many tokens a group has, those outside the map counted."""
        return self.h.tokens * self.w.tokens

    @property
    def divides(self) -> bool:
        """Whether every token of every group lies inside the map."""
        return self.h.divides & self.w.divides  # of symbols, without a look at either

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs of pixels attend: attention's FLOPs are twice the widths times this.

        Examples:
            >>> Partition.local((4, 6), window=(2, 3)).pairs  # 4 groups of 6 x 6
            144
        """
        return sum(h.groups * w.groups * (h.tokens * w.tokens) ** 2 for h, w in self.pieces())

    def coordinates(self, group: Any, token: Any) -> tuple[Any, Any, Any]:
        """Row, column and `inside` of each (group, token); takes integers or any integer arrays that broadcast."""
        return coordinates(group, token, self.h, self.w)

    def seat(self, y: Any, x: Any) -> tuple[Any, Any]:
        """The (group, token) of the pixel in row y and column x: the inverse of `coordinates`.

        Examples:
            >>> Partition.interlaced((4, 6), stride=(2, 3)).seat(3, 5)
            (5, 3)
        """
        h, w = self
        y, x = y - h.origin, x - w.origin
        group = (y // h.group_stride) % h.groups * w.groups + (x // w.group_stride) % w.groups
        token = (y // h.token_stride) % h.tokens * w.tokens + (x // w.token_stride) % w.tokens
        return group, token

    def pieces(self) -> tuple[tuple[Run, Run], ...]:
        """The map as up to nine rectangles of groups, each a strided view with no token outside the map.

        Where the partition divides the map there is one piece. Pieces are disjoint and cover every pixel.
        """
        return _pieces(self)

    def view(self, tensor: Any, piece: tuple[Run, Run] | None = None) -> Any:
        """A piece of `tensor` [B, H, W, ...] seen as [B, groups_h, groups_w, tokens_h, tokens_w, ...], no copy.

        Args:
            tensor: a torch tensor whose dimensions 1 and 2 are the map.
            piece: one of `pieces()`; not needed where the partition divides the map.

        Raises:
            ValueError: `tensor` is not on this map, or no piece is named and the partition does not divide the map.
        """
        if tuple(tensor.shape[1:3]) != self.size:
            raise ValueError(f"tensor must be [B, {self.h.size}, {self.w.size}, ...], got {tuple(tensor.shape)}")
        if piece is None:
            if not self.divides:
                raise ValueError(f"{self} does not divide its map: name one of its pieces()")
            order, seen = self._order(), (tensor.shape[0], *self._groups_and_tokens())
            rows_of_pixels = tensor.view(*(seen[i] for i in order), *tensor.shape[3:])
            return rows_of_pixels.permute(*map(order.index, range(5)), *range(5, rows_of_pixels.dim()))
        (h, w), (batch, y, x, *rest) = piece, tensor.stride()
        shape = tensor.shape[0], h.groups, w.groups, h.tokens, w.tokens, *tensor.shape[3:]
        groups = self.h.group_stride * y, self.w.group_stride * x
        tokens = self.h.token_stride * y, self.w.token_stride * x
        first = self.h.pixel(h.group, h.token) * y + self.w.pixel(w.group, w.token) * x
        return tensor.as_strided(shape, (batch, *groups, *tokens, *rest), tensor.storage_offset() + first)

    def join(self, values: Any) -> Any:
        """The map [B, H, W, ...] that `view` sees as `values` [B, groups_h, groups_w, tokens_h, tokens_w, ...], a copy.

        Raises:
            ValueError: the partition does not divide the map, or `values` are of other groups.
        """
        if not self.divides or tuple(values.shape[1:5]) != self._groups_and_tokens():
            raise ValueError(
                f"values must be [B, {', '.join(map(str, self._groups_and_tokens()))}, ...] of a partition that divides"
                f" its map, got {tuple(values.shape)} and {self}"
            )
        rows_of_pixels = values.permute(*self._order(), *range(5, values.dim()))
        return rows_of_pixels.reshape(values.shape[0], *self.size, *values.shape[5:])

    def _groups_and_tokens(self) -> tuple[int, int, int, int]:
        h, w = self
        return h.groups, w.groups, h.tokens, w.tokens

    def _order(self) -> tuple[int, ...]:
        """Which of [B, groups_h, groups_w, tokens_h, tokens_w] follow each other in a map that the partition divides.

        An axis is divided by groups of adjacent pixels or by interlaced ones, and by no others.
        """
        rows, columns = ((i, i + 2) if axis.token_stride == 1 else (i + 2, i) for i, axis in enumerate(self, start=1))
        return 0, *rows, *columns


def check_partition(partition: Any) -> None:
    """Whether a partition, which anybody may build of six integers an axis, has every pixel in one group once.

    Raises:
        TypeError: no Partition, or not of two axes of integers.
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
    for name, axis in zip(("h", "w"), partition, strict=True):
        if not isinstance(axis, Axis) or not all(type(number) is int for number in axis):
            raise TypeError(f"partition.{name} must be an Axis of integers, got {axis!r}")
    _check_partition(partition)


@lru_cache(maxsize=4096)
def _check_partition(partition: Partition) -> None:
    for name, axis in zip(("h", "w"), partition, strict=True):
        size, groups, tokens, group_stride, token_stride, origin = axis
        if min(size, groups, tokens, group_stride, token_stride) < 1:
            raise ValueError(f"partition.{name} must have all but its origin at least 1, got {axis}")
        # either way the tokens of all groups are the pixels from the origin on, each once; one alone needs no stride
        adjacent = (groups == 1 or group_stride == tokens) and (tokens == 1 or token_stride == 1)
        interlaced = (groups == 1 or group_stride == 1) and (tokens == 1 or token_stride == groups)
        covers = (adjacent or interlaced) and origin <= 0 and size <= origin + groups * tokens
        if not covers:
            raise ValueError(f"partition.{name} must have every pixel in one group once: {_fault(axis)} in {axis}")
        first, last = (origin + tokens, origin + (groups - 1) * tokens) if adjacent else (1, groups - 1)
        if not (first > 0 and last < size):
            raise ValueError(f"partition.{name} must have a pixel in every group, which not all have of {axis}")


def _fault(axis: Axis) -> str:
    """Which pixel an axis has not, or has more than once; or what else is not as it must be."""
    if axis.size <= 2**20 and axis.groups * axis.tokens <= 2**20:
        pixels = Counter(axis.pixel(group, token) for group in range(axis.groups) for token in range(axis.tokens))
        for pixel in range(axis.size):
            if pixels[pixel] != 1:
                return f"pixel {pixel} is there {pixels[pixel]} times"
    return "neither adjacent pixels (strides tokens and 1) nor interlaced ones (1 and groups), from 0 or before, are"


@lru_cache(maxsize=1024)
def _pieces(partition: Partition) -> tuple[tuple[Run, Run], ...]:
    return tuple(product(partition.h.runs(), partition.w.runs()))


def pair(name: str, values: Any) -> tuple[int, int]:
    """Two integers as Python's own, or a compiler's symbols. Raises TypeError, by name, where they are none."""
    try:
        first, second = map(_whole, values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a pair of integers (h, w), got {values!r}") from error
    return first, second


def _whole(number: Any) -> int:
    """An integer as Python's own, or a compiler's symbol for one.

    NumPy's overflow, kernels take neither those nor truth values, and those of `torch.jit.trace` are tensors.
    """
    if isinstance(number, bool):
        raise TypeError("a truth value")
    if isinstance(number, int) or getattr(getattr(number, "node", None), "pytype", None) is int:  # a torch.SymInt
        return number
    return index(number)


def _checked(size: Any, name: str, parts: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = pair("size", size)
    part_h, part_w = pair(name, parts)
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1), got {(height, width)}")
    if not (1 <= part_h <= height and 1 <= part_w <= width):
        raise ValueError(f"{name} must lie between (1, 1) and the map's {(height, width)}, got {(part_h, part_w)}")
    return (height, width), (part_h, part_w)
