"""Batch, height and width stay open: in programs of torch.export, in ONNX files of them, and under torch.compile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.export import Dim, ExportedProgram

from isa_triton import ISAHead, ISAModule, Partition, SelfAttention2d, partitioned_attention
from isa_triton.inference import decompose, fuse
from isa_triton.models import accelerate
from isa_triton.models.ianet import IANet
from tests.cases import assert_same, relative_error

P = (3, 4)
B = Dim("B", min=1, max=16)
OPEN: dict[str, tuple[Any, tuple[int, int]]] = {  # what is open, and the map that shows it
    "batch": ({0: B}, (9, 13)),
    "multiples of P": ({0: B, 2: P[0] * Dim("rows", max=50), 3: P[1] * Dim("columns", max=50)}, (9, 12)),
    "any size": ({0: B, 2: Dim("H"), 3: Dim("W")}, (10, 13)),
}
WITHIN_P = [(2, 3), (1, 17)]  # as `decompose` says, not for its programs
SIZES = {
    "batch": [(9, 13)],
    "multiples of P": [(9, 12), (3, 4), (12, 4), (18, 24)],
    "any size": [(10, 13), (9, 12), *WITHIN_P, (25, 41)],  # ragged, divided, small, large
}


def head(padding: str, **options: Any) -> nn.Module:
    return ISAHead(6, 6, 3, key_channels=4, partition_size=P, padding=padding, dropout=0.0, **options)


def patterns() -> nn.Module:
    """The patterns without a partition size, the order of stages that is not published, and several heads."""
    stages = (SelfAttention2d(6, 4, 6, pattern=pattern) for pattern in ("rows", "columns", "dense"))
    return nn.Sequential(*stages, ISAModule(6, 4, 6, 5, partition_size=P, num_heads=2, order="short-long"))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "zeros": lambda: head("zeros").eval(),
    "mask": lambda: head("mask").eval(),
    "patterns": lambda: patterns().eval(),
    "folded": lambda: fuse(head("zeros")),
    "training": lambda: head("zeros").train(),
}


class Case(NamedTuple):
    """A program of torch.export, and the name of its test."""

    network: str
    open: str
    strict: bool

    def __str__(self) -> str:
        return f"{self.network}, {self.open}{', strict' if self.strict else ''}"


CASES = [
    Case("zeros", "batch", strict=True),
    Case("zeros", "batch", strict=False),
    Case("zeros", "multiples of P", strict=True),
    Case("mask", "multiples of P", strict=False),
    Case("zeros", "any size", strict=True),
    Case("zeros", "any size", strict=False),
    Case("mask", "any size", strict=True),
    Case("mask", "any size", strict=False),
    Case("patterns", "any size", strict=False),
    Case("folded", "any size", strict=False),
    Case("training", "any size", strict=True),
    Case("training", "any size", strict=False),
]
SOME = [CASES[i] for i in (2, 4, 7, 11)]


@cache
def exported(case: Case) -> tuple[nn.Module, ExportedProgram]:
    """A network and its program, exported once for all tests."""
    torch.manual_seed(0)
    model, (dynamic, size) = NETWORKS[case.network]().double(), OPEN[case.open]
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    return model, torch.export.export(model, (x,), dynamic_shapes=(dynamic,), strict=case.strict)


def check(program: ExportedProgram, model: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """Outputs, gradients and running statistics of a program are the model's, at any size and batch."""
    program_module, model = program.module(), copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    for i, size in enumerate(sizes):
        x = torch.randn(1 + i % 3, 6, *size, dtype=torch.float64)
        assert_same(step(program_module, state, x), step(model, state, x), tolerance=1e-9)


def step(f: nn.Module, state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """All that a step of training makes, or of inference where nothing can be learned."""
    with torch.no_grad():
        for name, saved in f.state_dict().items():
            saved.copy_(state[name])
    f.zero_grad()
    y = f(x)
    if y.requires_grad:
        y.square().sum().backward()
    gradients = {f"d{name}": p.grad for name, p in f.named_parameters() if p.grad is not None}
    counted = {name: x.clone() for name, x in f.named_buffers() if "tracked" not in name}  # which not all programs keep
    return {"y": y} | gradients | counted


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_program_runs_at_other_sizes_and_learns_what_its_model_learns(case: Case) -> None:
    model, program = exported(case)
    assert [node for node in program.graph.nodes if "isa_triton" in str(node.target)]
    check(program, model, SIZES[case.open])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_program_is_saved_and_loaded(case: Case) -> None:
    model, program = exported(case)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check(torch.export.load(file), model, SIZES[case.open])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_program_in_pytorch_s_own_operators_runs_at_other_sizes(case: Case) -> None:
    model, program = exported(case)
    program = decompose(program)
    assert not [node for node in program.graph.nodes if "isa_triton" in str(node.target)]
    with torch.set_grad_enabled(not model.training):  # decomposed, batch normalisation writes over what backward wants
        check(program, model, [size for size in SIZES[case.open] if size not in WITHIN_P])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("padding", ["zeros", "mask"])
@torch.no_grad()
def test_an_onnx_file_takes_any_batch_and_size(padding: str, tmp_path: Path) -> None:
    model = head(padding).eval()
    example, shapes = torch.randn(2, 6, 10, 13), ({0: "batch", 2: "height", 3: "width"},)
    torch.onnx.export(model, (example,), tmp_path / "m.onnx", input_names=["x"], dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for batch, *size in ((1, 16, 24), (3, 25, 41), (2, 18, 27), (1, 2, 3)):
        x = torch.randn(batch, 6, *size)
        (y,) = session.run(None, {"x": x.numpy()})
        assert y.shape == (batch, 3, *size)
        assert (torch.from_numpy(y) - model(x)).abs().max() < 1e-6


class Windows(nn.Module):
    """Attention as a user writes it, its partition made of the sizes at hand."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1], x.shape[2]
        shifted = partitioned_attention(x, x, x, Partition.local(size, (3, 4), shift=(1, 2)))
        return partitioned_attention(shifted, x, x, Partition.interlaced(size, grid=(2, 3)))


@pytest.mark.parametrize("strict", [True, False])
def test_partitions_are_made_of_open_sizes(strict: bool) -> None:
    open_ = ({0: B, 1: Dim("H", min=3), 2: Dim("W", min=4)},)
    program = torch.export.export(Windows(), (torch.randn(2, 7, 10, 2, 4),), dynamic_shapes=open_, strict=strict)
    for shape in ((1, 3, 4), (3, 12, 9), (2, 11, 16)):
        x = torch.randn(*shape, 2, 4)
        assert relative_error(program.module()(x), Windows()(x)) < 1e-5


def swin() -> nn.Module:
    options = {"depths": (2, 2), "num_heads": (1, 2), "embed_dim": 16, "img_size": 56, "num_classes": 5}
    return accelerate(timm.create_model("swin_tiny_patch4_window7_224", **options).eval())


def maxvit(**options: Any) -> nn.Module:
    options |= {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16, "img_size": 64}
    return accelerate(timm.create_model("maxvit_nano_rw_256", **options).eval())


def maxvit_nchw() -> nn.Module:
    return maxvit(transformer_use_nchw_attn=True)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(swin, 56), (maxvit_nchw, 64)])
@pytest.mark.parametrize("learns", [False, True])
def test_an_accelerated_model_takes_any_batch(make: Callable[[], nn.Module], size: int, learns: bool) -> None:
    model = make()
    with torch.set_grad_enabled(learns):
        program = torch.export.export(model, (torch.randn(2, 3, size, size),), dynamic_shapes=({0: B},))
    assert not [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]  # made for CPUs
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        assert relative_error(program.module()(x), model(x)) < 1e-5


BLOCKS = {
    "MaxViT's window": (maxvit, "stages.0.blocks.0.attn_block"),
    "MaxViT's grid": (maxvit, "stages.0.blocks.0.attn_grid"),
    "Swin's shifted windows": (swin, "layers.0.blocks.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_an_accelerated_block_takes_any_size(name: str) -> None:
    """Divided by its windows or not; those of timm refuse, and make constants of sizes."""
    make, path = BLOCKS[name]
    block: Any = make().get_submodule(path)
    C, open_ = block.norm1.weight.shape[0], ({0: B, 1: Dim("H", min=7), 2: Dim("W", min=7)},)
    program = torch.export.export(block, (torch.randn(2, 15, 21, C),), dynamic_shapes=open_)
    for shape in ((1, 21, 7), (3, 29, 16)):
        x = torch.randn(*shape, C)
        assert relative_error(program.module()(x), block(x)) < 1e-5


# -- torch.compile -----------------------------------------------------------------------------------------------------

HEIGHTS = (9, 10, 12, 17, 3, 24, 8, 33, 15, 16, 4, 7, 21, 30, 11, 5, 13, 14, 40, 27)
WIDTHS = (12, 13, 16, 20, 4, 11, 24, 30, 9, 8, 7, 33, 28, 15, 10, 17, 5, 40, 6, 25)
COMPILED: dict[str, Callable[[], nn.Module]] = {
    "long range": lambda: SelfAttention2d(6, 4, 5, pattern="interlaced", partition_size=P),
    "short range, masked": lambda: SelfAttention2d(6, 4, 5, pattern="local", partition_size=P, padding="mask"),
    "module of two branches": lambda: ISAModule(6, 4, 5, 6, partition_size=(P, (2, 2))),
    "head": lambda: head("zeros"),
    "network": lambda: IANet(
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        ISAHead(8, 6, 3, key_channels=4, partition_size=P),
    ),
}


BATCHES = (2, 1, 3)  # PyTorch's own convolution is another for one image, for a large one, and for 16 or more


class Frames:
    """A backend that counts the frames which went through; one that Dynamo begins again is one."""

    def __init__(self, name: str) -> None:
        self.backend, self.count = lookup_backend(name), 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        compiled = self.backend(graph, inputs)
        self.count += 1
        return compiled


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_three_frames_at_most_are_compiled_for_twenty_sizes(name: str) -> None:
    """Maps that P divides and others, in one axis or both, and batches from one up."""
    torch.compiler.reset()
    model, frames = COMPILED[name]().eval(), Frames("eager")
    compiled = torch.compile(model, backend=frames, dynamic=True, fullgraph=True)
    for i, (height, width) in enumerate(zip(HEIGHTS, WIDTHS, strict=True)):
        factor, less = (4, (i % 4, i % 3)) if name == "network" else (1, (0, 0))
        x = torch.randn(BATCHES[i % 3], 6, factor * height - less[0], factor * width - less[1])
        y, expected = compiled(x), model(x)
        if name == "network":
            y, expected = y["out"], expected["out"]
        assert relative_error(y, expected) < 1e-5
    assert 1 <= frames.count <= 3


@pytest.mark.slow
def test_a_loop_that_trains_and_validates_compiles_five_frames_at_most() -> None:
    """The first size, any other, and in evaluation any; a batch of one, and one large image."""
    torch.compiler.reset()
    model, frames = head("zeros"), Frames("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    sizes = list(zip(HEIGHTS, WIDTHS, strict=True))
    for size in sizes[:5]:
        compiled(torch.randn(2, 6, *size)).square().sum().backward()
    assert frames.count == 2
    model.eval()
    with torch.no_grad():
        for i, size in enumerate(sizes[12:]):
            compiled(torch.randn(BATCHES[i % 3], 6, *size))
    assert frames.count <= 5
