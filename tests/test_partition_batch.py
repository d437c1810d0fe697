"""Maps of several sizes in one launch are attention over one after another, whatever the mix and whoever computes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from isa_triton import Partition, PartitionBatch, partitioned_attention, partitioned_attention_with_lse
from isa_triton.axis import grid_axis, local_axis
from isa_triton.backend import triton
from tests import test_door
from tests.cases import relative_error
from tests.compiling import run_compiling
from tests.kernel_cases import FORMS, tiles_of
from tests.test_launches import HEAD

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.usefixtures("_quietly")]
_quietly = test_door._quietly
Mix = list[tuple[int, ...]]
KINDS: dict[str, dict[str, Any]] = {
    "windows": {"window": (3, 4)},
    "shifted windows": {"window": (3, 4), "shift": (1, 2)},
    "interlaced": {"grid": (3, 2)},
    "lines": {"window": (4,), "shift": (3,)},
    "volumes": {"grid": (2, 1, 3)},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def batch_of(sizes: Any, options: dict[str, Any], **budgets: Any) -> PartitionBatch:
    return (PartitionBatch.local if "window" in options else PartitionBatch.interlaced)(sizes, **options, **budgets)


def partition_of(size: Sequence[int], options: dict[str, Any]) -> Partition:
    """Of one map alone, which may be smaller than its window."""
    if "grid" in options:
        return Partition(*map(grid_axis, size, options["grid"]))
    return Partition(*map(local_axis, size, options["window"], options.get("shift", (0,) * len(size))))


def axes_of(options: dict[str, Any]) -> int:
    return len(options.get("window") or options["grid"])


def mixed(axes: int, generator: random.Random, most: int = 7) -> Mix:
    return [tuple(generator.randint(1, most) for _ in range(axes)) for _ in range(generator.randint(1, 5))]


def drawn(pixels: int, tokens: int, *features: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    key_heads = 3 if "shared" in features else 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    given = {"q": normal(pixels, 6, 5), "k": normal(pixels, key_heads, 5), "v": normal(pixels, key_heads, 4)}
    given |= {"bias": normal(6, tokens, tokens)} if "bias" in features else {}
    given |= {"scale": normal(6)} if "scales" in features else {}
    return given | ({"valid": torch.rand(pixels) < 0.7} if "valid" in features else {})


def one_by_one(mix: Mix, options: dict[str, Any], given: dict[str, Tensor], pixels: int) -> tuple[Tensor, Tensor]:
    """out and lse of every map alone, and of none behind the last."""
    outs, lses, start = [], [], 0
    for size in mix:
        here = slice(start, start + prod(size))
        start = here.stop
        maps = {n: x[here].unflatten(0, size)[None] if n in ("q", "k", "v", "valid") else x for n, x in given.items()}
        q, k, v = (maps.pop(name) for name in ("q", "k", "v"))
        out, lse = partitioned_attention_with_lse(q, k, v, partition_of(size, options), **maps, backend="eager")
        outs.append(out[0].flatten(0, -3))
        lses.append(lse[0].flatten(0, -2))
    out, lse = torch.cat(outs), torch.cat(lses)
    behind = torch.zeros(pixels - start, *out.shape[1:], dtype=out.dtype)
    return torch.cat([out, behind]), torch.cat([lse, torch.full_like(behind[..., 0], -torch.inf)])


def compared(
    mix: Mix, options: dict[str, Any], batch: PartitionBatch, tolerance: float, given: dict[str, Tensor], **more: Any
) -> None:
    """Output, lse and all gradients."""
    rest: dict[str, Any] = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    got = partitioned_attention_with_lse(given["q"], given["k"], given["v"], batch, **rest, **more)
    expected = one_by_one(mix, options, given, batch.pixels)
    none = expected[1].isinf()
    assert torch.equal(got[1].isinf(), none)
    assert relative_error(got[0], expected[0]) < tolerance
    assert relative_error(got[1].masked_fill(none, 0), expected[1].masked_fill(none, 0)) < tolerance
    leaves = [x for x in given.values() if x.requires_grad]
    upstream = torch.randn_like(got[0]), torch.randn_like(got[1]).masked_fill(none, 0)
    found, wanted = (torch.autograd.grad(outputs, leaves, upstream) for outputs in (got, expected))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < tolerance
    assert not found[0][sum(map(prod, mix)) :].any()


@every_kind
def test_every_pixel_has_the_seat_that_its_map_gives_it(options: dict[str, Any]) -> None:
    generator = random.Random(1)
    for _ in range(5):
        mix = mixed(axes_of(options), generator)
        batch, expected, start = batch_of(mix, options), [], 0
        for size in mix:
            partition = partition_of(size, options)
            for group in range(partition.groups):
                row = []
                for token in range(partition.tokens):
                    *pixel, inside = partition.coordinates(group, token)
                    number = start
                    for i, place in enumerate(pixel):
                        number += place * prod(size[i + 1 :])
                    row.append(number if inside else -1)
                expected.append(row)
            start += prod(size)
        assert batch.table.tolist() == expected
        assert sorted(n for row in expected for n in row if n >= 0) == list(range(batch.pixels))


@every_kind
def test_a_hundred_mixes_a_kind_are_their_maps_one_by_one(options: dict[str, Any]) -> None:
    """Of five kinds; sizes are a list, or a tensor with rows of no map and budgets that are not used up."""
    generator, axes = random.Random(2), axes_of(options)
    for i in range(100):
        mix = mixed(axes, generator)
        if i % 2:
            rows = torch.tensor([*mix, *[(0,) * axes] * (6 - len(mix))])[torch.randperm(6) if i % 4 == 1 else range(6)]
            mix = [tuple(row) for row in rows.tolist() if all(row)]
            pixels = sum(map(prod, mix)) + generator.randint(0, 9)
            batch = batch_of(rows, options, pixels=pixels)
        else:
            batch = batch_of(mix, options)
        given = drawn(batch.pixels, batch.table.shape[1], "bias", *(["shared", "valid", "scales"] if i % 3 else []))
        compared(mix, options, batch, 1e-12, given)


MIXES: dict[str, Mix] = {
    "windows": [(3, 4), (5, 7), (2, 9)],
    "shifted windows": [(4, 6), (1, 1)],
    "interlaced": [(5, 4)],
}


@pytest.mark.parametrize(("name", "mix"), MIXES.items(), ids=MIXES)
def test_kernels_read_the_table_too(name: str, mix: Mix) -> None:
    options = KINDS[name]
    batch = batch_of(torch.tensor(mix), options, pixels=sum(map(prod, mix)) + 5, groups=14)
    given = drawn(batch.pixels, batch.table.shape[1], "bias", "shared", "valid", "scales", dtype=torch.float32)
    compared(mix, options, batch, 2e-5, given, backend="triton")


@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_reads_the_table(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, mix = {"window": (3, 6), "shift": (1, 0)}, [(2, 7), (4, 3)]
    batch = batch_of(mix, options, pixels=30, groups=7)
    tile, backward = tiles_of(form, batch.table.shape[1])
    monkeypatch.setattr(triton, "_forward_tile", lambda *problem: tile)
    monkeypatch.setattr(triton, "_backward_tiles", lambda *problem: backward)
    monkeypatch.setattr(triton, "keeps_output", lambda *problem: backward.group is None)
    compared(mix, options, batch, 2e-5, drawn(30, 18, "bias", dtype=torch.float32), backend="triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_lies_behind_the_last_map_is_no_matter(backend: str) -> None:
    batch = PartitionBatch.local(torch.tensor([[2, 3], [0, 0], [3, 1]]), window=(2, 2), pixels=12)
    q, k, v = torch.randn(3, 12, 2, 4)

    def results(value: float) -> list[Tensor]:
        leaves = [torch.where(torch.arange(12)[:, None, None] < 9, x, value).requires_grad_() for x in (q, k, v)]
        out = partitioned_attention(*leaves, batch, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for clean, dirty in zip(results(0.0), results(torch.nan), strict=True):
        assert torch.equal(clean, dirty)
        assert not dirty[9:].any()


def test_derivatives_of_every_order() -> None:
    batch = PartitionBatch.local([(2, 2), (1, 3)], window=(2, 2), shift=(1, 0), pixels=8)
    q, k, v = (torch.randn(8, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(*x: Tensor) -> Tensor:
        return partitioned_attention(*x[:3], batch, bias=x[3])

    assert torch.autograd.gradcheck(f, (q, k, v, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v, bias))


def test_compiled_and_exported_programs_serve_every_mix() -> None:
    """The table is made in the graph, of sizes that are an argument."""

    class Net(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
            batch = PartitionBatch.local(sizes, window=(2, 3), shift=(1, 1), pixels=40)
            return partitioned_attention(q, k, v, batch)

    q, k, v = torch.randn(3, 40, 2, 4, dtype=torch.float64).unbind()
    q.requires_grad_()
    mixes = [torch.tensor(mix) for mix in ([[4, 5], [3, 6]], [[1, 1], [2, 7]], [[6, 6], [0, 0]])]
    compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(Net(), (q, k, v, mixes[0]))
    for net in (compiled, program.module()):
        for sizes in mixes:
            out, expected = (f(q, k, v, sizes) for f in (net, Net()))
            assert relative_error(out, expected) < 1e-14
            a, b = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected))
            assert relative_error(a, b) < 1e-14


def test_vmap_folds_calls_into_heads() -> None:
    batch = PartitionBatch.interlaced([(4, 5), (3, 3)], grid=(2, 2))
    q, k, v = torch.randn(3, 4, batch.pixels, 2, 3, dtype=torch.float64)
    together = torch.func.vmap(lambda *x: partitioned_attention(*x, batch))(q, k, v)
    alone = torch.stack([partitioned_attention(*x, batch) for x in zip(q, k, v, strict=True)])
    assert relative_error(together, alone) < 1e-13


LAUNCHES = """
from isa_triton import PartitionBatch

class Binary:
    function, packed_metadata = None, None

    def __init__(self, planned):
        target = launch.driver.active.get_current_target()
        self.known = repr((planned.kernel, *planned.specialised(target), planned.options))

seen, calls = [], set()
launch._loaded = lambda planned, device: (Binary(planned), lambda *args: None)
class Spy(launch._Bound):
    def __call__(self, tensors, stream):
        here = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
        seen.append((self.compiled.known, self.grid, list(map(str, self.arguments)), here))
        super().__call__(tensors, stream)
launch._Bound = Spy

with stand_in.installed():
    for mix in ([[14, 21], [7, 7]], [[1, 1], [3, 5]], [[0, 0], [20, 20]]):
        seen.clear()
        batch = PartitionBatch.local(torch.tensor(mix), window=(7, 7), shift=(3, 3), pixels=512, groups=40)
        q, k, v = (torch.randn(512, 2, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias = torch.randn(2, 49, 49, requires_grad=True)
        partitioned_attention(q, k, v, batch, bias=bias).sum().backward()
        partitioned_attention(q, k, v, batch).sum().backward()
        calls.add(str(seen))
    print(len(seen), len(calls))
"""


def test_launches_depend_on_the_budgets_alone() -> None:
    """Grids, arguments, binaries and layouts, as the driver gets them."""
    done = run_compiling("-c", HEAD + LAUNCHES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "1"]


def test_kernels_that_read_a_table_compile() -> None:
    program = test_door.COMPILED.replace("seed = None", "table = layout(40, tokens, dtype=torch.int32); maps = 1")
    program = program.replace("here = partition.tokens, (maps, *partition.size)", "here = partition.tokens, (1, 900)")
    program = program.replace("bias, scales, valid, seed, None", "bias, scales, valid, None, table")
    program = program.replace(
        "valid = layout", "bias = layout(heads, tokens, tokens, dtype=torch.float32)\n    valid = layout"
    )
    program = program.replace("per_map=True", "per_map=False").replace(
        "    given = q", "    partition = Partition.local((40 * tokens,), (tokens,))\n    given = q"
    )
    done = run_compiling("-c", program)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"sm_90", "gfx942"}
    assert all(line.endswith("True") for line in done.stdout.splitlines())


Q = torch.zeros(12, 2, 4)
BATCH = PartitionBatch.local([(3, 4)], window=(2, 2))
SIZES = torch.tensor([[3, 4]])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: PartitionBatch.local([(3, 4)], window=(2,)), TypeError, r"sizes must be one integer"),
        (lambda: PartitionBatch.local([], window=(2, 2)), ValueError, "sizes must be of one or more maps"),
        (lambda: PartitionBatch.local([(3, 0)], window=(2, 2)), ValueError, "sizes must be of one or more maps"),
        (lambda: PartitionBatch.local([(3, 4)], window=(0, 2)), ValueError, "window must be at least"),
        (lambda: PartitionBatch.interlaced([(3, 4)], grid=(0, 2)), ValueError, "grid must be at least"),
        (lambda: PartitionBatch.local([(3, 4)], window=(2, 2), shift=(2, 0)), ValueError, "shift must be at least"),
        (lambda: PartitionBatch.local([(3, 4)], window=(2, 2), pixels=11), ValueError, "pixels must be at least the"),
        (lambda: PartitionBatch.local([(3, 4)], window=(2, 2), groups=3), ValueError, "groups must be at least the 4"),
        (lambda: PartitionBatch.local(SIZES, window=(2, 2), pixels=2**31), ValueError, "pixels must be at least 1 and"),
        (lambda: PartitionBatch.local(SIZES, window=(2, 2)), TypeError, "pixels must be given with a tensor"),
        (lambda: PartitionBatch.local(SIZES.float(), window=(2, 2), pixels=12), TypeError, "sizes must be torch.int32"),
        (lambda: PartitionBatch.local(SIZES[0], window=(2, 2), pixels=12), ValueError, r"sizes must be \[maps, 2\]"),
        (lambda: PartitionBatch.local(SIZES, window=(2, 2), pixels=11), RuntimeError, "pixels of all maps must be at"),
        (lambda: PartitionBatch.local(SIZES, window=(2, 2), pixels=12, groups=3), RuntimeError, "groups of all maps"),
        (lambda: partitioned_attention(Q[:9], Q, Q, BATCH), ValueError, r"q must be \[pixels, heads, width\] with 12"),
        (lambda: partitioned_attention(Q[None], Q, Q, BATCH), ValueError, "q must be"),
        (lambda: partitioned_attention(Q, Q[:, :0], Q, BATCH), ValueError, "k must have the shape of q"),
        (
            lambda: partitioned_attention(Q, Q, Q, BATCH, bias=torch.zeros(1, 2, 4, 4)), ValueError,
            "bias must be .*, for all maps",
        ),
        (lambda: partitioned_attention(Q, Q, Q, BATCH, dropout_p=0.1), ValueError, "dropout_p must be 0 with a Part"),
        (lambda: partitioned_attention(Q, Q, Q, BATCH, valid=torch.ones(3).bool()), ValueError, r"valid must be \[pix"),
        (lambda: partitioned_attention(Q, Q, Q, BATCH, extra_k=Q, extra_v=Q), ValueError, "extra_k, extra_v and"),
        (
            lambda: partitioned_attention(Q, Q, Q, BATCH._replace(table=BATCH.table.long())), TypeError,
            "partition.table must be a torch.int32",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
