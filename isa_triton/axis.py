"""One axis of a grid, fallen into groups by one equation, and the integers that it is made of."""

from __future__ import annotations

from itertools import groupby
from operator import index
from typing import Any, NamedTuple

MOST_AXES = 3


def along(group, token, axis):  # type: ignore[no-untyped-def]  # ints, arrays or tl.tensors alike
    """The pixel of each (group, token) of one axis, and whether it lies inside: the equation."""
    place = group * axis.group_stride + token * axis.token_stride
    pixel = axis.origin + place
    if axis.cyclic:
        pixel += (pixel < 0) * axis.size
    if axis.all_inside:
        inside = place == place  # true of each, and to a compiler a constant
    elif axis.cyclic:
        inside = place < axis.size
    else:
        inside = pixel < axis.size
        if axis.origin < 0:
            inside = inside & (pixel >= 0)
    return pixel, inside


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
    """How an axis of `size` pixels falls into groups: ``origin + group * group_stride + token * token_stride``.

    Attributes:
        size: pixels of the axis.
        groups: how many.
        tokens: of a group, those outside the map counted.
        group_stride: from a group's token to the next group's.
        token_stride: from a group's token to its next.
        origin: the pixel of token 0 of group 0, on the map's edge or before it.
        cyclic: whether the axis's end joins its beginning, so that a pixel before the first is one from the end.

    Examples:
        >>> Axis.interlaced(10, stride=4)  # groups {0, 4, 8}, {1, 5, 9}, {2, 6, -}, {3, 7, -}
        Axis(size=10, groups=4, tokens=3, group_stride=1, token_stride=4, origin=0, cyclic=False)
        >>> Axis.local(10, window=4, shift=3)  # groups {-, 0, 1, 2}, {3, 4, 5, 6}, {7, 8, 9, -}
        Axis(size=10, groups=3, tokens=4, group_stride=4, token_stride=1, origin=-1, cyclic=False)
        >>> Axis.local(12, window=4, shift=3, cyclic=True).groups  # {11, 0, 1, 2}, {3, 4, 5, 6}, {7, 8, 9, 10}
        3
    """

    size: int
    groups: int
    tokens: int
    group_stride: int
    token_stride: int
    origin: int = 0
    cyclic: bool = False

    @classmethod
    def interlaced(cls, size: int, stride: int) -> Axis:
        """`stride` groups whose tokens lie `stride` pixels apart; on a cyclic axis the same."""
        return interlaced(_length(size), _part("stride", stride, size))

    @classmethod
    def grid(cls, size: int, tokens: int) -> Axis:
        """Interlaced groups of `tokens` tokens each, spread over the whole axis."""
        return grid(_length(size), _part("tokens", tokens, size))

    @classmethod
    def local(cls, size: int, window: int, shift: int = 0, cyclic: bool = False) -> Axis:
        """Groups of `window` adjacent pixels; a shift leaves `shift` of them to the first group.

        On a cyclic axis the first group has the pixels before them too, which are the last of the axis.
        """
        size, window, shift = _length(size), _part("window", window, size), whole("shift", shift)
        if type(shift) is type(window) is int and not 0 <= shift < window:
            raise ValueError(f"shift must be at least 0 and less than the window {window}, got {shift}")
        if type(cyclic) is not bool:
            raise TypeError(f"cyclic must be True or False, got {cyclic!r}")
        return local(size, window, shift, cyclic)

    @classmethod
    def whole(cls, size: int) -> Axis:
        """One group of all pixels."""
        size = _length(size)
        return local(size, size)

    @classmethod
    def each(cls, size: int) -> Axis:
        """Every pixel is a group."""
        return local(_length(size), 1)

    @property
    def divides(self) -> bool:
        """Whether every token of every group lies inside the map."""
        return self.groups * self.tokens == self.size

    @property
    def all_inside(self) -> bool:
        """Whether `along` need not test it: a constant of kernels, where it `divides`; sizes here may be symbols."""
        return False

    @property
    def wraps(self) -> bool:
        """Whether a group lies across the seam of a cyclic axis."""
        return self.cyclic and self.origin < 0

    def pixel(self, group: int, token: int) -> int:
        """Where a group's token lies."""
        pixel: int = along(group, token, self)[0]
        return pixel

    def unrolled(self) -> Axis:
        """The axis of what is rolled by the origin, so that no group lies across the seam."""
        return self._replace(origin=0, cyclic=False) if self.wraps else self

    def runs(self) -> tuple[Run, ...]:
        """The axis, unrolled, as up to three runs of groups, each a strided view without a token outside the map."""
        axis = self.unrolled()

        def inside(group: int) -> tuple[int, int]:
            """The first of the group's tokens inside the map, and the first behind them."""
            start = axis.pixel(group, 0)
            stop = min(axis.tokens, ceil_div(axis.size - start, axis.token_stride))
            return max(0, ceil_div(-start, axis.token_stride)), stop

        same = [(tokens, list(groups)) for tokens, groups in groupby(range(self.groups), inside)]
        return tuple(Run(groups[0], len(groups), start, stop - start) for (start, stop), groups in same)


# -- axes of sizes that fit: to compilers their symbols are integers, and comparing those would restrict them ----------


def interlaced(size: int, stride: int) -> Axis:
    size, stride = whole("size", size), whole("stride", stride)
    return Axis(size, groups=stride, tokens=ceil_div(size, stride), group_stride=1, token_stride=stride)


def grid(size: int, tokens: int) -> Axis:
    return grid_axis(whole("size", size), whole("tokens", tokens))


def grid_axis(size: Any, tokens: int) -> Axis:
    """The same, of tensors of sizes too."""
    stride = ceil_div(size, tokens)
    return Axis(size, groups=stride, tokens=tokens, group_stride=1, token_stride=stride)


def local(size: int, window: int, shift: int = 0, cyclic: bool = False) -> Axis:
    return local_axis(whole("size", size), whole("window", window), whole("shift", shift), cyclic)


def local_axis(size: Any, window: int, shift: int = 0, cyclic: bool = False) -> Axis:
    """The same, of tensors of sizes too."""
    origin = shift - window if shift else 0
    covered = size if cyclic else size - origin  # from the origin on
    return Axis(size, ceil_div(covered, window), window, window, token_stride=1, origin=origin, cyclic=cyclic)


def pair(name: str, values: Any) -> tuple[int, int]:
    """Two integers as Python's own, or a compiler's symbols. Raises TypeError, by name, where they are none."""
    try:
        first, second = [whole(name, value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a pair of integers (h, w), got {values!r}") from error
    return first, second


def integers(name: str, values: Any, count: int | None = None) -> tuple[int, ...]:
    """As many integers as there are axes, likewise."""
    try:
        given = tuple([whole(name, value) for value in values])
    except (TypeError, ValueError):
        given = ()
    if not (1 <= len(given) <= MOST_AXES) or len(given) != (count or len(given)):
        wanted = {None: "one to three integers", 1: "one integer (l,)", 2: "a pair of integers (h, w)"}
        raise TypeError(f"{name} must be {wanted.get(count, 'three integers (d, h, w)')}, got {values!r}")
    return given


def whole(name: str, number: Any) -> int:
    """An integer as Python's own, or a compiler's symbol for one.

    NumPy's overflow, kernels take neither those nor truth values, and those of `torch.jit.trace` are tensors.
    """
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    if getattr(getattr(number, "node", None), "pytype", None) is int:  # a torch.SymInt
        return number
    try:
        if isinstance(number, bool):
            raise TypeError
        return index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None


def _length(size: Any) -> int:
    """The pixels of an axis."""
    size = whole("size", size)
    if type(size) is int and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return size


def _part(name: str, value: Any, size: int) -> int:
    """What an axis of `size` pixels is partitioned by; of symbols nothing is asked, which would restrict them."""
    value = whole(name, value)
    if type(value) is type(size) is int and not 1 <= value <= size:
        raise ValueError(f"{name} must lie between 1 and the axis's {size}, got {value}")
    return value
