"""The geometry: one equation, its inverse, its views."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from itertools import product
from math import prod

import numpy as np
import pytest
import torch

from isa_triton import Axis, Partition, partitioned_attention
from isa_triton.axis import along
from isa_triton.partition import check_partition
from tests.cases import PARTITIONS

SIZES = [(1, 1), (1, 9), (5, 4), (7, 12), (8, 3), (13,), (3, 5, 4)]


def every_partition(size: tuple[int, ...]) -> list[Partition]:
    """Interlaced, grid and local, with every partition size from 1 to the axis, and shifts; axial, dense, mixed."""
    parts = list(product(*(range(1, extent + 1) for extent in size)))

    def shift(part: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((extent // 2, extent - 1)[i % 2] for i, extent in enumerate(part))

    return [
        *(Partition.interlaced(size, stride=part) for part in parts),
        *(Partition.interlaced(size, grid=part) for part in parts),
        *(Partition.local(size, window=part) for part in parts),
        *(Partition.local(size, window=part, shift=shift(part)) for part in parts),
        *(Partition.local(size, part, shift(part), cyclic=(True, False, True)[: len(size)]) for part in parts),
        *(Partition.axial(size, axis) for axis in range(len(size))),
        Partition.dense(size),
        Partition(*(Axis.local(n, min(n, 2), int(n > 1)) for n in size[:-1]), Axis.interlaced(size[-1], 1)),
    ]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_has_one_seat(size: tuple[int, ...]) -> None:
    for partition in every_partition(size):
        pixels = {}
        for group, token in product(range(partition.groups), range(partition.tokens)):
            *pixel, inside = partition.coordinates(group, token)
            at = tuple(pixel)
            if not partition.wraps:
                assert inside == all(0 <= i < extent for i, extent in zip(at, size, strict=True))
            if inside:
                assert at not in pixels
                pixels[at] = (group, token)
                assert partition.seat(*at) == (group, token)
        assert set(pixels) == set(product(*map(range, size)))
        assert {group for group, _ in pixels.values()} == set(range(partition.groups))  # no row of scores is all masked
        assert partition.divides == (partition.groups * partition.tokens == prod(size) == partition.pixels)
        members = Counter(group for group, _ in pixels.values())
        assert partition.pairs == sum(n * n for n in members.values())


def test_interlaced_is_the_remainder_and_local_the_quotient() -> None:
    for y, x in product(range(10), range(7)):
        group, token = Partition.interlaced((10, 7), stride=(4, 3)).seat(y, x)
        assert (divmod(group, 3), divmod(token, 3)) == ((y % 4, x % 3), (y // 4, x // 3))
        group, token = Partition.local((10, 7), window=(4, 3)).seat(y, x)
        assert (divmod(group, 3), divmod(token, 3)) == ((y // 4, x // 3), (y % 4, x % 3))


def test_groups_and_tokens_are_dual_where_the_partition_divides() -> None:
    interlaced, local = Partition.interlaced((6, 8), stride=(2, 4)), Partition.local((6, 8), window=(2, 4))
    for y, x in product(range(6), range(8)):
        assert interlaced.seat(y, x) == local.seat(y, x)[::-1]


def test_grid_fixes_the_tokens_and_stride_the_interval() -> None:
    grid = Partition.interlaced((56, 42), grid=(7, 6))
    assert grid == Partition.interlaced((56, 42), stride=(8, 7))
    assert Partition.interlaced((9, 10), grid=(4, 3)).tokens == 12  # not every token of a group lies inside the map


def test_coordinates_and_seats_take_tensors() -> None:
    partition = PARTITIONS["interlaced-ragged"]
    group, token = torch.arange(partition.groups)[:, None], torch.arange(partition.tokens)
    y, x, inside = partition.coordinates(group, token)
    for g, t in product(range(partition.groups), range(partition.tokens)):
        assert (y[g, t], x[g, t], inside[g, t]) == partition.coordinates(g, t)
    back = partition.seat(y, x)
    assert torch.equal(back[0][inside], group.expand_as(y)[inside])
    assert torch.equal(back[1][inside], token.expand_as(y)[inside])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pieces_are_views_that_seat_every_pixel_once(size: tuple[int, ...]) -> None:
    x, n = torch.arange(prod(size)).view(1, *size, 1), len(size)
    for given in every_partition(size):
        if given.wraps:
            with pytest.raises(ValueError, match=r"groups across a seam, no views: roll the tensor"):
                given.view(x, given.pieces()[0])
            assert given.pieces() == given.unrolled().pieces()
        partition, seen = given.unrolled(), []
        assert len(partition.pieces()) <= (3**n if any(axis.origin for axis in partition) else 2**n)
        for piece in partition.pieces():
            view = partition.view(x, piece)
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            for place in product(*map(range, view.shape[1:-1])):
                group = token = 0
                for axis, run, g, t in zip(partition, piece, place[:n], place[n:], strict=True):
                    group, token = group * axis.groups + run.group + g, token * axis.tokens + run.token + t
                *pixel, inside = partition.coordinates(group, token)
                assert inside
                assert view[(0, *place, 0)] == x[(0, *pixel, 0)]
            seen += view.flatten().tolist()
        assert sorted(seen) == list(range(prod(size)))
        assert (len(partition.pieces()) == 1) or not partition.divides


def test_view_without_a_piece_is_the_whole_map() -> None:
    x = torch.randn(2, 6, 8, 3)
    view = Partition.local((6, 8), window=(3, 4)).view(x)
    assert torch.equal(view, x.view(2, 2, 3, 2, 4, 3).transpose(2, 3))
    view = Partition.interlaced((6, 8), stride=(3, 4)).view(x)
    assert torch.equal(view, x.view(2, 2, 3, 2, 4, 3).permute(0, 2, 4, 1, 3, 5))


@pytest.mark.parametrize("size", [(6, 8), (9, 12), (1, 7), (5, 7), (12,), (4, 3, 6)], ids=str)
def test_join_is_the_inverse_of_view(size: tuple[int, ...]) -> None:
    x = torch.randn(2, *size, 3, 2)
    whole = [partition for partition in every_partition(size) if partition.divides and not partition.wraps]
    assert whole
    for partition in whole:
        assert torch.equal(partition.join(partition.view(x)), x)
        with pytest.raises(ValueError, match=r"values must be \[B(, \d+){2,6}, \.\.\.\] of a partition that"):
            partition.join(x)
    with pytest.raises(ValueError, match="divides its map, got"):
        Partition.local((5, 7), window=(2, 2)).join(torch.zeros(2, 3, 4, 2, 2, 3))


def test_integers_of_numpy_and_torch_become_those_of_python() -> None:
    expected = Partition.local((200, 300), window=(8, 9))
    for pair in (np.array([8, 9], np.uint8), torch.tensor([8, 9]), (np.int8(8), 9)):
        partition = Partition.local((200, 300), window=pair)
        assert partition == expected
        assert all(type(n) is int for axis in partition for n in axis[:-1])


@pytest.mark.parametrize("size", [(6, 8), (9, 12)], ids=str)
def test_shifted_windows_are_those_of_the_rolled_map_cut_where_it_wraps(size: tuple[int, int]) -> None:
    """Swin rolls the map by -shift, and masks pairs of pixels that were not neighbours: group by group the same."""
    window, shift = (3, 4), (1, 2)
    shifted, plain = Partition.local(size, window, shift), Partition.local(size, window)
    pixels = list(product(range(size[0]), range(size[1])))

    def rolled(y: int, x: int) -> tuple[tuple[int, int, bool, bool], int]:
        group, token = plain.seat((y - shift[0]) % size[0], (x - shift[1]) % size[1])
        return (*divmod(group, plain.w.groups), y < shift[0], x < shift[1]), token

    for here, there in product(pixels, pixels):
        (group, token), (other, _) = shifted.seat(*here), shifted.seat(*there)
        assert (group == other) == (rolled(*here)[0] == rolled(*there)[0])
        assert token == rolled(*here)[1]  # so the same table of biases serves


@pytest.mark.parametrize("size", [(8,), (9,), (6, 8), (7, 9)], ids=str)
def test_windows_of_a_cyclic_axis_go_on_beyond_its_seam(size: tuple[int, ...]) -> None:
    """They are the plain windows of a map that is rolled: of weather models, without the roll and without a mask."""
    window, shift = (4,) * len(size), (3,) * len(size)
    partition, plain = Partition.local(size, window, shift, cyclic=True), Partition.local(size, window)
    assert (partition.groups, partition.tokens) == (plain.groups, plain.tokens)
    for pixel in product(*map(range, size)):
        rolled = tuple((i - s + w) % n for i, s, w, n in zip(pixel, shift, window, size, strict=True))
        assert partition.seat(*pixel) == plain.seat(*rolled)


def test_axes_are_six_integers_and_partitions_are_hashable_tuples() -> None:
    assert Axis.interlaced(10, 4) == (10, 4, 3, 1, 4, 0, False)
    assert Axis.local(10, 4) == (10, 3, 4, 4, 1, 0, False)
    assert Axis.local(10, 4, shift=3) == (10, 3, 4, 4, 1, -1, False)
    assert Axis.local(8, 4, shift=3, cyclic=True) == (8, 2, 4, 4, 1, -1, True)
    assert len({Partition.dense((3, 4)), Partition.local((3, 4), (3, 4)), Partition.rows((3, 4))}) == 2
    volume = Partition(Axis.whole(3), Axis.each(4), Axis.interlaced(5, 2))
    for same in (pickle.loads(pickle.dumps(volume)), copy.deepcopy(volume), Partition.unflatten(volume.flat())):
        assert type(same) is Partition
        assert same == volume
    assert eval(repr(volume)) == volume
    assert Partition.rows((3, 4, 5)) == Partition.local((3, 4, 5), (1, 1, 5)) == Partition.axial((3, 4, 5), 2)
    assert Partition.columns((3, 4)) == Partition.local((3, 4), (3, 1)) == Partition.axial((3, 4), -2)


def refused(partition: Partition) -> str:
    """Why a partition is refused, or nothing."""
    try:
        check_partition(partition)
    except ValueError as refusal:
        return str(refusal)
    return ""


def test_an_axis_passes_if_its_equation_and_the_inverse_give_every_pixel_once() -> None:
    """All small ones, cyclic or not, by brute force; refusals name a pixel that is missing or there twice.

    Refused are also a few that are right by accident: strides of neither kind, and tokens behind the map.
    """
    line, passed = Axis.local(1, window=1), Counter[bool]()
    ranges = range(1, 5), range(1, 5), range(1, 5), range(1, 7), range(1, 7), (-3, -1, 0), (False, True)
    for *numbers, cyclic in product(*ranges):
        axis = Axis(*numbers, cyclic=cyclic)
        partition = Partition(axis, line)
        seated = [[along(group, token, axis) for token in range(axis.tokens)] for group in range(axis.groups)]
        pixels = [[pixel for pixel, inside in group if inside] for group in seated]
        counts = Counter(pixel for group in pixels for pixel in group)
        wrong = [pixel for pixel in range(axis.size) if counts[pixel] != 1]
        seats = (partition.seat(pixel, 0) for pixel in range(axis.size))
        right = not wrong and all(pixels) and axis.size > -axis.origin * cyclic
        right = right and all(axis.pixel(*seat) == pixel for pixel, seat in enumerate(seats))
        refusal = refused(partition)
        assert right or refusal, axis
        assert not refusal or not right or axis.groups * axis.tokens > axis.size, axis
        assert not refusal or not wrong or f"pixel {wrong[0]} is there {counts[wrong[0]]} times" in refusal
        passed[cyclic] += not refusal
    assert passed == {False: 210, True: 227}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_constructors_make_passes(size: tuple[int, ...]) -> None:
    for partition in every_partition(size):
        check_partition(partition)


def test_no_backend_starts_on_a_partition_with_a_hole() -> None:
    """Nor do the operators that exported programs hold, with other maps either."""
    partition, q = Partition(Axis(4, 1, 3, 3, 1), Axis.local(6, 3)), torch.randn(1, 4, 6, 1, 2)
    call, rest = (1.0, partition.flat(), False, "eager"), (None,) * 4  # scales, valid, seed, table
    message = r"partition\.h must have every pixel in one group once: pixel 3 is there 0 times"
    with pytest.raises(ValueError, match=message):
        partitioned_attention(q, q, q, partition)
    with pytest.raises(ValueError, match=message):
        torch.ops.isa_triton.forward(q, q, q, None, *rest, *call)
    with pytest.raises(ValueError, match=message):
        torch.ops.isa_triton.backward(q, q, q, None, *rest, None, None, q, None, *call)
    with pytest.raises(ValueError, match=r"q must be a map of \(4, 6\), as axes say, got shape \(1, 3, 6"):
        torch.ops.isa_triton.forward(q[:, :3], q, q, None, *rest, 1.0, Partition.rows((4, 6)).flat(), False, "eager")
