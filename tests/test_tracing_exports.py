"""Whoever traces gets a graph that is right for other batches and layouts, and refuses maps of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from isa_triton import InterlacedSparseSelfAttention, ISAHead, Partition, partitioned_attention
from isa_triton.inference import fuse
from isa_triton.models import accelerate
from tests.cases import PARTITIONS, qkv, relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracers, about themselves


def onnx(model: nn.Module, x: Tensor, path: Path, dynamo: bool) -> Callable[[Tensor], Tensor]:
    """The exported file of a model, whose batch is free, in onnxruntime."""
    free = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False, **free)
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def maxvit(backend: str) -> nn.Module:
    return accelerate(timm.create_model("maxvit_nano_rw_256", img_size=64, depths=(1, 1, 1, 1)).eval(), backend=backend)


def swin(backend: str) -> nn.Module:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2, 1, 1), num_classes=7)
    return accelerate(model.eval(), backend=backend)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "isa": (lambda: InterlacedSparseSelfAttention(6, 4, 5, partition_size=(3, 4)).eval(), (6, 9, 11)),
    "masked": (
        lambda: InterlacedSparseSelfAttention(6, 4, 6, partition_size=(3, 4), padding="mask").eval(),
        (6, 9, 11),
    ),
    "heads": (lambda: ISAHead(6, 6, 3, key_channels=4, partition_size=(3, 4), num_heads=2).eval(), (6, 9, 11)),
    "folded": (lambda: fuse(ISAHead(6, 5, 3, key_channels=4, partition_size=(3, 4))), (6, 9, 11)),
    "maxvit": (lambda: maxvit("auto"), (3, 64, 64)),
    "maxvit, eager": (lambda: maxvit("eager"), (3, 64, 64)),
    "swin": (lambda: swin("auto"), (3, 112, 112)),
    "swin, eager": (lambda: swin("eager"), (3, 112, 112)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        *product(["masked", "heads", "folded", "maxvit"], [False, True]),
        ("swin", False),
    ],  # the other takes half a minute
)
@torch.no_grad()
def test_onnx_files_of_either_exporter_take_other_batches(name: str, dynamo: bool, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    model = make()
    exported = onnx(model, torch.randn(2, *shape), tmp_path / "model.onnx", dynamo)
    for batch in (1, 2, 3):
        x = torch.randn(batch, *shape)
        y = model(x)
        assert exported(x).shape == y.shape
        assert relative_error(exported(x), y) < 1e-5


OF_TIMM = {"maxvit", "maxvit, eager", "swin", "swin, eager"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in OF_TIMM else []) for n in MODELS])
@torch.no_grad()
def test_a_torchscript_trace_takes_other_batches_and_layouts(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    traced = torch.jit.trace(model, torch.randn(2, *shape))
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        assert relative_error(traced(x), model(x)) < 1e-5
        channels_last = x.to(memory_format=torch.channels_last)
        assert relative_error(traced(channels_last), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["isa", "masked", "heads", "folded"])
@torch.no_grad()
def test_a_torchscript_trace_refuses_maps_of_other_sizes(name: str) -> None:
    make, shape = MODELS[name]
    traced = torch.jit.trace(make(), torch.randn(2, *shape))
    for size in ((11, 9), (12, 16), (10, 11)):
        with pytest.raises(RuntimeError, match="must match the existing size"):
            traced(torch.randn(2, shape[0], *size))


RECORDED = [(name, "eager") for name in PARTITIONS] + [("interlaced-ragged", "triton"), ("rows", "triton")]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "backend"), RECORDED)
def test_make_fx_records_one_operator_that_takes_other_batches_and_strides(name: str, backend: str) -> None:
    partition = PARTITIONS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, partition, backend=backend)

    q, k, v = qkv(partition, dtype=torch.float32)
    graph: Any = make_fx(attend)(q, k, v)
    assert "isa_triton.forward" in graph.code
    assert "as_strided" not in graph.code
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(partition, batch=3, dtype=torch.float32))
    assert relative_error(graph(q, k, v), attend(q, k, v)) < 1e-6


def test_a_recorded_graph_refuses_maps_of_other_sizes() -> None:
    partition = Partition.local((7, 10), window=(3, 4))
    q = torch.randn(2, 7, 10, 1, 4)
    graph: Any = make_fx(lambda q: partitioned_attention(q, q, q, partition))(q)
    with pytest.raises(ValueError, match=r"q must be a map of \(7, 10\), as axes say, got shape \(2, 10, 7, 1, 4\)"):
        graph(torch.randn(2, 10, 7, 1, 4))


@torch.no_grad()
def test_a_trace_follows_its_weights() -> None:
    """Position biases, kept in inference on a CPU, are not constants of the graph."""
    model = maxvit("auto")
    x = torch.randn(1, 3, 64, 64)
    model(x)
    traced = torch.jit.trace(model, x)
    for parameter in traced.parameters():
        parameter.mul_(1.1)
    assert relative_error(traced(x), model(x)) < 1e-5
