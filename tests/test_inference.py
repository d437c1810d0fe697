"""Folding for inference and recomputing in training change bytes and time, and nothing else."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.measure import Step, count
from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.inference import FoldedStage, decompose, fuse
from isa_triton.maps import ConvNormReLU
from tests.cases import assert_same, outputs_and_gradients, relative_error, with_random_statistics

LEAKY: dict[str, Any] = {"activation": partial(nn.LeakyReLU, 0.01)}  # not in place
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "stage": lambda: SelfAttention2d(6, 4, 5, 5, pattern="interlaced", partition_size=(4, 3)),
    "stage, wider than its values": lambda: SelfAttention2d(6, 4, 5, 7, pattern="local", partition_size=(4, 3)),
    "stage, masked": lambda: SelfAttention2d(6, 4, 5, pattern="local", partition_size=(4, 3), padding="mask"),
    "stage, rows": lambda: SelfAttention2d(6, 4, 5, pattern="rows"),
    "isa": lambda: InterlacedSparseSelfAttention(6, 4, 5, 3, partition_size=(4, 3)),
    "isa, short first": lambda: InterlacedSparseSelfAttention(6, 4, 5, 7, partition_size=(4, 3), order="short-long"),
    "isa, masked": lambda: InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3), padding="mask"),
    "isa, slopes of their own": lambda: InterlacedSparseSelfAttention(6, 4, 5, activation=nn.PReLU),
    "module": lambda: ISAModule(6, 4, 8, 7),
    "module, two branches": lambda: ISAModule(6, 4, 8, 7, partition_size=((4, 3), (2, 5)), **LEAKY),
    "head": lambda: ISAHead(6, 8, 3, key_channels=4, partition_size=(4, 3), align_corners=True),
    "network": lambda: nn.Sequential(nn.Conv2d(6, 6, 3), ISAModule(6, 4, 6, 6), nn.BatchNorm2d(6)),
}


def layer(name: str) -> nn.Module:
    made = with_random_statistics(LAYERS[name]()).eval()
    for activation in made.modules():
        if isinstance(activation, nn.PReLU):
            nn.init.uniform_(activation.weight)
    return made


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_folded_module_is_the_same_function(name: str, memory_format: torch.memory_format) -> None:
    module, x = layer(name), torch.randn(2, 6, 13, 17, dtype=torch.float64).contiguous(memory_format=memory_format)
    expected, given = module(x), x.clone()
    assert relative_error(fuse(module)(x), expected) < 1e-13
    assert torch.equal(x, given)
    assert torch.equal(module(x), expected)  # which stays as it was


@pytest.mark.parametrize("name", ["isa", "module, two branches", "head"])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2**-23)])
@torch.no_grad()
def test_a_folded_module_rounds_no_worse_than_it_did(name: str, dtype: torch.dtype, eps: float) -> None:
    """In each precision the error is at most twice that of the module before and a few roundings."""
    module, x = layer(name), torch.randn(2, 6, 13, 17, dtype=torch.float64)
    exact, low = module(x), copy.deepcopy(module).to(dtype)
    before, folded = (relative_error(f(x.to(dtype)).double(), exact) for f in (low, fuse(low)))
    assert fuse(low)(x.to(dtype)).dtype == dtype
    assert folded < 2 * before + 4 * eps


def test_a_folded_module_passes_gradients_to_its_input_and_keeps_none() -> None:
    module, x = layer("module"), torch.randn(2, 6, 13, 17, dtype=torch.float64, requires_grad=True)
    folded = fuse(module)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    ours, theirs = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (folded, module))
    assert relative_error(ours, theirs) < 1e-13


@pytest.mark.usefixtures("interpreter")
def test_the_activation_does_not_write_over_what_the_kernels_keep() -> None:
    """The Triton backend keeps its output for long groups; the activation must not write over that."""
    module = with_random_statistics(SelfAttention2d(16, 16, 16, pattern="dense")).float().eval()
    x = torch.randn(1, 16, 13, 5, requires_grad=True)  # 65 tokens: two passes
    expected = torch.autograd.grad(module(x).sin().sum(), x)[0]
    folded = fuse(module)
    for stage in folded.modules():
        if isinstance(stage, FoldedStage):
            stage.backend = "triton"
    assert relative_error(torch.autograd.grad(folded(x).sin().sum(), x)[0], expected) < 1e-4


def test_everything_that_folds_is_folded() -> None:
    folded = fuse(layer("head"))
    assert not any(isinstance(m, nn.BatchNorm2d | SelfAttention2d) for m in folded.modules())
    assert all(isinstance(m.norm, nn.Identity) for m in folded.modules() if isinstance(m, ConvNormReLU))
    network = list(fuse(layer("network")).children())
    assert isinstance(network[2], nn.BatchNorm2d)  # what is not ours stays


def test_a_shared_layer_is_folded_once() -> None:
    stage = layer("stage")
    folded = fuse(nn.Sequential(nn.Conv2d(6, 6, 1), stage, nn.Conv2d(5, 6, 1), nn.Sequential(stage)))
    assert folded.get_submodule("1") is folded.get_submodule("3.0")


@torch.no_grad()
def test_one_gemm_takes_key_query_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers are one product, nothing is multiplied after attention, and attention reads its views."""
    shapes: list[tuple[int, ...]] = []
    baddbmm = torch.baddbmm

    def spy(y: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        if "out" not in options:  # the backend's own products
            shapes.append((a.shape[-1], b.shape[-1]))
        return baddbmm(y, a, b, **options)

    folded = fuse(layer("stage"))
    monkeypatch.setattr(torch, "baddbmm", spy)
    folded(torch.randn(2, 6, 8, 12, dtype=torch.float64))
    assert shapes == [(6, 4 + 4 + 5), (4, 4), (4, 4)]


def test_the_papers_module_folded_peaks_at_its_widest_projection_and_saves_flops() -> None:
    """128x256, fp32: at most 1.35 times input, output and the widest projection, the merged one of 1024 channels."""

    def step(make: Callable[[nn.Module], nn.Module]) -> Step:
        module, x = make(ISAModule(512, 256, 512, 512).eval()), torch.randn(1, 512, 128, 256)
        return torch.no_grad()(lambda: (module(x),))

    flops, peak = count(lambda: step(fuse))
    flops_before, peak_before = count(lambda: step(lambda module: module))
    assert peak < 1.35 * 4 * 128 * 256 * (512 + 512 + 1024)
    assert peak < 1.03 * peak_before  # which holds nothing that it does not need either
    assert flops == flops_before - 2 * 2 * 512**3  # the product of two weights in each stage


# -- training ----------------------------------------------------------------------------------------------------------


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, of the module's own tensors and x none."""
    known = {y.untyped_storage().data_ptr() for y in (x, *module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}
    tensors: list[Tensor] = []  # alive, so that no address is used twice

    def pack(y: Tensor) -> Tensor:
        tensors.append(y)
        storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        module(x)
    return sum(size for address, size in storages.items() if address not in known)


@pytest.mark.parametrize("padding", ["zeros", "mask"])
def test_recomputing_changes_nothing_but_bytes(padding: str) -> None:
    widths, options = (6, 4, 5, 7), {"partition_size": (4, 3), "padding": padding}
    plain = with_random_statistics(InterlacedSparseSelfAttention(*widths, **options))
    recomputing = InterlacedSparseSelfAttention(*widths, **options, recompute=True).double()
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    for training in (True, False):  # batch statistics included
        modules = (recomputing.train(training), plain.train(training))
        assert_same(*(outputs_and_gradients(module, x) for module in modules))


def test_recomputing_keeps_the_projections_inputs_only() -> None:
    """Of the query's and the key's four maps each, one is kept: what attention takes."""
    C, K, H, W = 24, 16, 16, 24
    kept = [
        kept_bytes(SelfAttention2d(C, K, C, pattern="local", recompute=recompute), torch.randn(1, C, H, W))
        for recompute in (False, True)
    ]
    fewer = kept[0] - kept[1]
    assert fewer == pytest.approx(2 * 3 * 4 * K * H * W, rel=0.02)  # statistics of the norms beside the maps


def test_norm_and_activation_are_the_callers() -> None:
    options: dict[str, Any] = {"norm_layer": partial(nn.GroupNorm, 2), "activation": nn.GELU}
    head = ISAHead(
        6, 8, 3, key_channels=4, partition_size=[(4, 3), (2, 2)], align_corners=True, order="short-long", **options
    )
    kinds = [type(module) for module in head.modules()]
    assert nn.BatchNorm2d not in kinds
    assert nn.ReLU not in kinds
    assert kinds.count(nn.GELU) == kinds.count(nn.GroupNorm) == 1 + 2 * 2 * 5 + 2
    x = torch.randn(1, 6, 9, 11)
    expected = nn.functional.interpolate(head.eval()(x), size=(18, 22), mode="bilinear", align_corners=True)
    assert torch.equal(head(x, size=(18, 22)), expected)


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folded_module_compiles_in_one_graph_for_several_sizes() -> None:
    folded = fuse(layer("module"))
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    for size in ((8, 12), (9, 11)):
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        assert relative_error(compiled(x), folded(x)) < 1e-13


def test_a_folded_module_exports_and_decomposes() -> None:
    folded, x = fuse(layer("head")), torch.randn(2, 6, 9, 11, dtype=torch.float64)
    program = torch.export.export(folded, (x,))
    plain = decompose(program)
    for exported in (program, plain):
        assert relative_error(exported.module()(x), folded(x)) < 1e-13
    operators = [{str(node.target) for node in p.graph.nodes} for p in (program, plain)]
    assert ["isa_triton.forward.default" in names for names in operators] == [True, False]


@pytest.mark.slow
def test_onnx_runtime_runs_what_was_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript, which writes ONNX files, is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folded, x = fuse(layer("isa").float()), torch.randn(1, 6, 9, 11)
    path = str(tmp_path / "isa.onnx")
    torch.onnx.export(decompose(torch.export.export(folded, (x,))), f=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(y), folded(x)) < 1e-5


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_inference_command_writes_a_row_for_everyone(tmp_path: Path) -> None:
    widths = ["--channels", "32", "--key-channels", "8", "--value-channels", "32", "--partition-size", "4x3"]
    main(["inference", "--sizes", "9x13", *widths, "--rounds", "1", "--out", str(tmp_path)])
    with (tmp_path / "inference.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["unfused", "isa", "isa-folded"]
    saved = int(rows["isa"]["flops"]) - int(rows["isa-folded"]["flops"])
    assert saved == 2 * 2 * 32 * 32 * 32  # the product of two weights in each stage, made once and for all
    assert all(0 < float(row["in_matmuls"]) < 1 for row in rows.values())
    assert {(row["how"], row["clocks"]) for row in rows.values()} == {("clock", "")}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_networks_without_our_layers_and_maps_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold a layer of isa_triton, got Linear without one"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"x must be \[B, 6, H, W\]"):
        fuse(layer("isa"))(torch.ones(1, 5, 4, 4))


def test_folding_takes_the_eps_of_each_normalisation() -> None:
    norm = partial(nn.BatchNorm2d, eps=0.3, dtype=torch.float64)
    network = ISAModule(6, 4, 5, 7, partition_size=(2, 3), norm_layer=norm).double().eval()
    with_random_statistics(network)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    assert relative_error(fuse(network)(x), network(x)) < 1e-12
