"""Scores of vectors of length 1: against those that are normalised outside, by every kernel, for any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.models.memory import Traffic
from isa_triton import Partition, PartitionBatch, partitioned_attention, partitioned_attention_with_lse, replays
from isa_triton.backend import triton
from isa_triton.backend.contract import Call
from isa_triton.backend.cosine import pulled_back
from isa_triton.inference import decompose
from isa_triton.tiles import Tile
from tests import test_door
from tests.cases import PARTITIONS, relative_error
from tests.kernel_cases import FORMS, tiles_of
from tests.test_door import compared, drawn, is_real, learned

pytestmark = pytest.mark.usefixtures("kernels")
_quietly = test_door._quietly
both_backends = pytest.mark.parametrize("backend", ["eager", "triton"])


def outside(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
    return partitioned_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), *rest, **options)


def results(attend: Any, given: dict[str, Any], partition: Any, **options: Any) -> list[Tensor]:
    """The output and all gradients."""
    given = learned(given)
    rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    out = attend(given["q"], given["k"], given["v"], partition, **rest, **options)
    leaves = [x for x in given.values() if is_real(x) and x.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


# -- every kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quietly")
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_has_cosines(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, block by block, with whole rows and columns of scores, and dq, dk and dv at once."""
    partition = Partition.local((4, 8), window=(3, 6), shift=(1, 0))
    tile, backward = tiles_of(form, partition.tokens)
    monkeypatch.setattr(triton, "_forward_tile", lambda *problem: tile)
    monkeypatch.setattr(triton, "_backward_tiles", lambda *problem: backward)
    monkeypatch.setattr(triton, "keeps_output", lambda *problem: backward.group is None)
    for features in (("bias", "scales", "valid", "shared", "cosine"), ("cosine",)):
        given = drawn(partition, features, torch.float32)
        given = {name: x[1:] if name in ("q", "k", "v", "valid") else x for name, x in given.items()}
        compared(partition, given, 2e-5, "triton")


@pytest.mark.parametrize("block_n", [16, 32])  # block by block, and one block
def test_lengths_are_those_of_all_chunks_of_the_width(block_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of K channels that chunks do not divide, and V others."""
    tile = Tile(32, block_n, 16, 16, 4, 2)
    monkeypatch.setattr(triton, "_forward_tile", lambda *problem: tile)
    partition = Partition.interlaced((7, 9), stride=(2, 2))  # of 20 tokens, or fewer
    q, k, v = (torch.randn(2, 7, 9, 3, width) for width in (39, 39, 24))
    options: dict[str, Any] = {"scale": torch.tensor([1.0, 5.0, 30.0]), "bias": torch.randn(3, 20, 20)}
    found = partitioned_attention(q, k, v, partition, **options, cosine=True, backend="triton")
    assert relative_error(found, outside(q.double(), k.double(), v.double(), partition, **options)) < 1e-5


@both_backends
def test_packed_maps_have_them_too(backend: str) -> None:
    batch = PartitionBatch.local([(3, 4), (5, 2)], window=(2, 3), pixels=25)
    given = {name: torch.randn(25, 3, 8, dtype=torch.float32) for name in ("q", "k", "v")}
    given["scale"] = torch.tensor([2.0, 5.0, 9.0])
    found = results(partitioned_attention, given, batch, cosine=True, backend=backend)
    exact = results(outside, {name: x.double() for name, x in given.items()}, batch, backend="eager")
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) < 1e-5
    given["q"][22:] = torch.nan  # behind the last map
    for a, b in zip(results(partitioned_attention, given, batch, cosine=True, backend=backend), found, strict=True):
        assert torch.equal(a, b)


# -- any vectors -------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_only_directions_matter(dtype: torch.dtype, backend: str) -> None:
    """The sums of squares of the longest are beyond fp16, those of the shortest below; gradients are as short."""
    partition = Partition.interlaced((7, 6), stride=(2, 3))
    q, k, v = (torch.randn(2, 7, 6, 3, 24).to(dtype) for _ in range(3))
    given = {"q": q, "k": k, "v": v}

    def found(factor: float) -> list[Tensor]:
        scaled = given | {"q": q * factor, "k": k * factor}
        return results(partitioned_attention, scaled, partition, scale=4.0, cosine=True, backend=backend)

    plain = found(1.0)
    exact = results(outside, {name: x.double() for name, x in given.items()}, partition, scale=4.0)
    for a, b in zip(plain, exact, strict=True):
        assert relative_error(a.double(), b) < 20 * torch.finfo(dtype).eps
    for factor in (2.0**12, 2.0**-8):
        out, dq, dk, dv = found(factor)
        for a, b in ((out, plain[0]), (dq * factor, plain[1]), (dk * factor, plain[2]), (dv, plain[3])):
            assert relative_error(a.double(), b.double()) < (1e-2 if dtype != torch.float32 else 1e-6), factor


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_vector_of_zeros_is_like_every_other(dtype: torch.dtype, backend: str) -> None:
    """Its cosines are 0; its gradient is divided by 1e-12, as that of `F.normalize`."""
    partition = Partition.local((4, 6), window=(2, 3))
    given = {name: torch.randn(1, 4, 6, 2, 16).to(dtype) for name in ("q", "k", "v")}
    given["q"][:, 0, 0] = 0
    given["k"][:, 1, 2] = 0
    given["q"][:, 3, 3], given["k"][:, 2, 4] = 1e-20, 1e-20
    out = partitioned_attention(*given.values(), partition, cosine=True, backend=backend)
    mean = given["v"][:, :2, :3].float().mean((1, 2))
    assert relative_error(out[:, 0, 0].float(), mean) < 4 * torch.finfo(dtype).eps
    assert out.isfinite().all()
    if dtype == torch.float32:
        found = results(partitioned_attention, given, partition, cosine=True, backend=backend)
        exact = results(outside, {name: x.double() for name, x in given.items()}, partition, backend="eager")
        for a, b in zip(found, exact, strict=True):
            assert relative_error(a, b) < 1e-5  # to the largest: those of zeros
            short = b.abs() < 1e6
            assert relative_error(a[short], b[short]) < 1e-5


@both_backends
def test_channels_may_lie_anywhere(backend: str) -> None:
    partition = Partition.local((5, 7), window=(2, 3), shift=(1, 1))
    q, k, v = (torch.randn(2, 3, 16, 5, 7).movedim((1, 2), (-2, -1)) for _ in range(3))
    assert q.stride(-1) == 35
    found = partitioned_attention(q, k, v, partition, scale=5.0, cosine=True, backend=backend)
    assert relative_error(found, outside(q.double(), k.double(), v.double(), partition, scale=5.0)) < 1e-5


# -- who else looks at a call ------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own look at copies
def test_operators_pass_opcheck(backend: str) -> None:
    partition = Partition.local((3, 4), window=(2, 3))
    q, k, v = (torch.randn(1, 3, 4, 2, 8, requires_grad=True) for _ in range(3))
    scales = torch.tensor([2.0, 5.0], requires_grad=True)
    call = Call(1.0, partition, True, backend, cosine=True).flat()
    torch.library.opcheck(torch.ops.isa_triton.forward.default, (q, k, v, None, scales, None, None, None, *call))
    plain = [None if x is None else x.detach() for x in (q, k, v, None, scales)]
    arguments = (*plain, *[None] * 5, torch.randn_like(v), None, *call)
    torch.library.opcheck(torch.ops.isa_triton.backward.default, arguments)


def test_exported_programs_have_them() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            partition = Partition.local((q.shape[1], q.shape[2]), window=(2, 3))
            return partitioned_attention(q, k, v, partition, scale=5.0, cosine=True)

    q, k, v = torch.randn(3, 1, 4, 6, 2, 8)
    program = torch.export.export(Layer(), (q, k, v))
    expected = outside(q, k, v, Partition.local((4, 6), window=(2, 3)), scale=5.0)
    for each in (program, decompose(program)):
        torch.testing.assert_close(each.module()(q, k, v), expected)


def test_vmap_folds_calls_into_heads() -> None:
    partition = PARTITIONS["local-ragged"]
    q, k, v = torch.randn(3, 4, 2, *partition.size, 3, 8, dtype=torch.float64)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, partition, scale=5.0, cosine=True)

    together = torch.func.vmap(one)(q, k, v)
    alone = torch.stack([outside(*each, partition, scale=5.0) for each in zip(q, k, v, strict=True)])
    assert relative_error(together, alone) < 1e-13


def test_dropout_is_of_the_same_weights() -> None:
    partition = PARTITIONS["shifted"]
    given = drawn(partition, ("scales", "bias", "extra"))
    rest: dict[str, Any] = {name: given[name] for name in ("scale", "bias", "extra_v")}
    rest |= {"dropout_p": 0.3, "seed": 7}
    q, k, v, more = (given[name] for name in ("q", "k", "v", "extra_k"))
    found = partitioned_attention_with_lse(q, k, v, partition, extra_k=more, **rest, cosine=True)
    q, k, more = (F.normalize(x, dim=-1) for x in (q, k, more))
    for a, b in zip(found, partitioned_attention_with_lse(q, k, v, partition, extra_k=more, **rest), strict=True):
        infinite = b.isinf()
        assert relative_error(a.masked_fill(infinite, 0), b.masked_fill(infinite, 0)) < 1e-13


def test_a_call_is_not_made_again_as_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays are of calls that say nothing of lengths."""
    partition, asked = Partition.rows((4, 6)), list[Any]()
    monkeypatch.setattr(replays, "key", lambda *call: asked.append(call))
    q = torch.randn(1, 4, 6, 2, 8)
    partitioned_attention(q, q, q, partition, cosine=True)
    assert not asked
    partitioned_attention(q, q, q, partition)
    assert len(asked) == 1


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    partition, counts = Partition.rows((4, 6)), []
    q = torch.randn(1, 4, 6, 2, 8, requires_grad=True)
    for cosine in (False, True):
        with FlopCounterMode(display=False) as counter:
            partitioned_attention(q, q, q, partition, cosine=cosine, backend="triton").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 7 * 2 * 8 * partition.pairs


# -- what it costs: the table of kernels/README.md ---------------------------------------------------------------------


def moved(attend: Callable[..., Tensor], **options: Any) -> tuple[float, float]:
    """What operators move forward and backward, in tensors like q."""
    with FakeTensorMode(), Traffic() as traffic:
        q, k, v = (torch.empty(32, 64, 64, 3, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        made = traffic.moved_bytes
        out = attend(q, k, v, Partition.local((64, 64), (8, 8)), scale=torch.ones(3), backend="triton", **options)
        forward = traffic.moved_bytes
        out.backward(out.detach())
        return (forward - made) / q.nbytes, (traffic.moved_bytes - forward) / q.nbytes


def test_lengths_move_nothing_forward_and_backward_about_what_they_do_outside() -> None:
    """Behind backward kernels lengths are PyTorch's, inside of an operator: counted here, of q and of k."""
    alone, outer, inner = moved(partitioned_attention), moved(outside), moved(partitioned_attention, cosine=True)
    assert (outer[0], inner[0], alone[0]) == pytest.approx((10.25, 4.0, 4.0), abs=0.01)
    assert outer[1] - alone[1] == pytest.approx(40.75, abs=0.01)
    with FakeTensorMode(), Traffic() as traffic:
        q, dy = torch.empty(2, 32, 64, 64, 3, 32, dtype=torch.bfloat16)
        traffic.moved_bytes = 0
        pulled_back(q, dy)
        assert 2 * traffic.moved_bytes / q.nbytes == pytest.approx(38.2, abs=0.05)
