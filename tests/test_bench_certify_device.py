"""What a certificate does on a device: the paths that a CPU does not take, on a driver that launches nothing."""

from __future__ import annotations

import argparse
import os
from functools import reduce
from pathlib import Path

import pytest
import torch

from bench import certify
from bench.certify import correct, machine, peers, problems, speed, tools
from bench.certify.rows import NotRun, Setting
from bench.tiles.roofline import MACHINES
from bench.tiles.verify import SHAPES
from isa_triton import Partition, partitioned_attention
from isa_triton.backend import triton
from tests.compiling import run_compiling

ON_GPU = Setting("cuda", ("Swin 49",), 1, "nowhere")

# Every item of parts a, b, c and e that asks nothing of a device but launches, with the kernels that it launched.
LAUNCHED = """
import contextlib, sys, types
from collections import Counter
import torch
from bench import devices, stand_in
from bench.certify import attend, behave, correct, machine, once, problems, speed
from bench.certify.parts import PARTS
from bench.certify.rows import Setting
from isa_triton.backend.kernels import launch

class Binary:
    function = packed_metadata = None

def loaded(planned, device):
    return Binary, lambda *args: graphs[-1].append(planned.kernel.fn.__name__)

class Graph:
    def replay(self):
        graphs[0].extend(self.launches)

@contextlib.contextmanager
def capture(graph):
    graph.launches = []
    graphs.append(graph.launches)
    yield
    graphs.pop()

graphs, started = [[]], []
runtime = types.SimpleNamespace(cudaProfilerStart=lambda: started.append(len(graphs[0])), cudaProfilerStop=lambda: None)
properties = types.SimpleNamespace(multi_processor_count=132)
for name, value in {"CUDAGraph": Graph, "graph": capture, "_sleep": lambda cycles: None, "cudart": lambda: runtime,
                    "get_device_properties": lambda device: properties}.items():
    setattr(torch.cpu, name, value)
launch._loaded, machine.COPIED, machine.SIDE = loaded, 64, 4
setting = Setting("cpu", ("Swin 49", "dense 16384"), 1, "nowhere")
for shape in setting.shapes:
    problems.SHAPES[shape] = problems.tiny(problems.SHAPES[shape])

def look(letter, *name):
    graphs[0].clear()
    found = once.look(PARTS[letter], setting, name)
    counts = " ".join(f"{kernel} {n}" for kernel, n in sorted(Counter(graphs[0]).items()))
    print(f"{letter} {', '.join(name)}", found.outcome, counts, found.why, " ".join(found.figures), sep="|")

with stand_in.installed():
    assert not setting.interpreted
    for name in ("device", "copy", "matmul bfloat16"):
        look("a", name)
    look("b", "Swin 49", "bfloat16")
    look("b", "Swin 49", "float16")
    look("b", "dense 16384", "float16")
    for name in ("stream", "second device", "graph, forward", "graph", "autocast"):
        look("c", name)
    speed.SHAPES["Swin 49"] = speed.SHAPES["dense 16384"]
    speed.maps_of = lambda shape: 1
    for pass_ in speed.PASSES:
        look("e", "Swin 49", pass_, "isa_triton")
        look("e", "Swin 49", pass_, "sdpa")
    graphs[0].clear()
    attend.main("cpu", "bfloat16", "Swin 49", "training", "1")
    print("attend", started, *graphs[0])
"""


@pytest.mark.slow
def test_a_device_is_given_the_launches_of_every_item() -> None:
    done = run_compiling("-c", LAUNCHED)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    made = {name: (outcome, counts, why, figures) for name, outcome, counts, why, figures in lines[:-1]}
    one, forward = "backward_group_kernel {0} forward_group_kernel {0}", "forward_group_kernel {0}"
    assert {name: counts for name, (_, counts, _, _) in made.items()} == {
        "a device": "", "a copy": "", "a matmul bfloat16": "",
        "b Swin 49, bfloat16": one.format(20),
        "b Swin 49, float16": one.format(20),
        "b dense 16384, float16": "backward_columns_kernel 20 forward_kernel 20",
        "c stream": one.format(3),
        "c second device": "",
        "c graph, forward": forward.format(3 + 1 + 1),  # before the capture, replayed, and beside it
        "c graph": one.format(3 + 1 + 1),
        "c autocast": one.format(2),
        "e Swin 49, forward, isa_triton": "forward_kernel 22",  # once, and the samples
        "e Swin 49, forward, sdpa": "forward_kernel 1",  # ours, beside
        "e Swin 49, training, isa_triton": "backward_columns_kernel 22 forward_kernel 22",
        "e Swin 49, training, sdpa": "backward_columns_kernel 1 forward_kernel 1",
    }  # fmt: skip
    for name in ("b Swin 49, bfloat16", "b Swin 49, float16", "b dense 16384, float16"):  # nothing was written
        outcome, _, why, figures = made[name]
        assert outcome == "failed"
        assert "out has " in why
        assert "NaN of" in why
        assert ("lse" in figures.split()) == name.endswith(" float16")
    assert made["c second device"][:3:2] == ("not run", "this machine has 1 device")
    for pass_ in speed.PASSES:
        assert made[f"e Swin 49, {pass_}, isa_triton"][0] == "measured"
        assert made[f"e Swin 49, {pass_}, isa_triton"][3] == "us spread samples how clocks"
        assert made[f"e Swin 49, {pass_}, sdpa"][2].startswith("computes something else")
    assert made["a copy"][3] == "GB/s how clocks"
    assert made["a matmul bfloat16"][3] == "TFLOP/s how clocks"
    twice = ["forward_kernel", "backward_columns_kernel"] * 2
    assert lines[-1] == [" ".join(["attend [2]", *twice])]  # the first call is not watched


# -- tools -------------------------------------------------------------------------------------------------------------

RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at forward_kernel+0x100
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
NCU = """==PROF== Profiling "forward_group_kernel": 0%....100% - 6 passes
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward_group_kernel","dram__bytes_read.sum","byte","30,000,000"
"0","forward_group_kernel","dram__bytes_write.sum","byte","10,000,000"
"0","forward_group_kernel","lts__t_bytes.sum","byte","90000000"
"0","forward_group_kernel","sm__inst_executed_pipe_tensor.sum","inst","1,000"
"0","forward_group_kernel","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","%","12.5"
"0","forward_group_kernel","l1tex__data_bank_conflicts_pipe_lsu.sum","","7"
"0","forward_group_kernel","gpu__time_duration.sum","ns","25000"
"1","backward_group_kernel","dram__bytes_read.sum","byte","5"
"1","backward_group_kernel","gpu__time_duration.sum","ns","n/a"
"""


def install(folder: Path, tool: str, says: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tool that says something, and writes down how it was called."""
    (folder / "says").write_text(says)
    script = folder / tool
    script.write_text(f'#!/bin/sh\necho "$@" > {folder}/words\ncat {folder}/says\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "words"


@pytest.mark.parametrize(
    ("check", "says", "outcome", "why"),
    [
        ("memcheck", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "passed", ""),
        ("racecheck", RACE, "failed",
         "racecheck found 3: Error: Race reported between Write access at forward_kernel+0x100"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_finds_is_read(
    check: str, says: str, outcome: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = install(tmp_path, "compute-sanitizer", says, monkeypatch)
    found = tools.run(ON_GPU, check, "HRFormer 49")
    assert (found.outcome, found.why) == (outcome, why)
    assert f"--tool {check} " in words.read_text()
    assert words.read_text().strip().endswith("-m bench.certify.attend cuda bfloat16 HRFormer 49 training 1")


def test_a_tool_that_cannot_watch_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "compute-sanitizer", "\nError: no permission to watch\n", monkeypatch)
    with pytest.raises(NotRun, match="memcheck said nothing: Error: no permission to watch"):
        tools.run(ON_GPU, "memcheck", "Swin 49")
    install(tmp_path, "ncu", "==ERROR== ERR_NVGPUCTRPERM - no permission for the counters\n", monkeypatch)
    with pytest.raises(NotRun, match="ncu counted nothing: ==ERROR== ERR_NVGPUCTRPERM"):
        tools.count(ON_GPU, "Swin 49", "forward")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotRun, match="ncu is not installed"):
        tools.count(ON_GPU, "Swin 49", "forward")


def test_counters_are_added_over_the_kernels_of_a_pass() -> None:
    totals = tools._totals(NCU, "forward")
    assert sum(totals[name] for name in tools.DRAM) == 40_000_000
    assert (totals[tools.L2], totals[tools.BUSY], totals[tools.CONFLICTS]) == (90_000_000, 12.5, 7)
    assert tools._totals(NCU, "backward") == {"dram__bytes_read.sum": 5}
    assert tools._totals("no table", "forward") == {}


# -- which device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("NVIDIA A10", "sm_86", "A10"),
        ("NVIDIA A10G", "sm_86", None),
        ("NVIDIA A100X", "sm_80", None),
        ("AMD Instinct MI300X", "gfx942", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "gfx1100", "RX7900XTX"),
        ("NVIDIA GeForce RTX 4090", "sm_89", None),
    ],
)
def test_a_gpu_is_found_among_the_data_sheets(
    name: str, target: str, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(triton, "target_of", lambda device: target)
    if known is not None:
        assert speed.machine(ON_GPU) == MACHINES[known]
        return
    with pytest.raises(NotRun, match=f"{name} .{target}. is not among the data sheets: A100, A10, H100"):
        speed.machine(ON_GPU)


def test_a_target_that_no_limits_are_known_of_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "target_of", lambda device: "sm_75")
    with pytest.raises(NotRun, match="what an SM of sm_75 holds is not known, but of sm_80"):
        machine.binaries(ON_GPU)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(argparse.ArgumentError, match="--device must be a device of this machine, got 'cuda:77'"):
        certify.check_device("cuda:77")
    monkeypatch.setattr("bench.arguments.device", str)
    with pytest.raises(argparse.ArgumentError, match="--device must be cuda, or cpu to interpret kernels, got 'xpu'"):
        certify.check_device("xpu")


# -- peers and problems ------------------------------------------------------------------------------------------------

PARTITIONS = [
    Partition.local((4, 9), (2, 3)),
    Partition.local((5, 7), (2, 3)),
    Partition.interlaced((6, 8), stride=(3, 2)),
    Partition.interlaced((5, 7), stride=(2, 3)),
    Partition.interlaced((6, 8), grid=(3, 2)),
    Partition.dense((3, 5)),
    Partition.local((3, 5, 4), (2, 2, 3)),
    Partition.interlaced((4, 5, 6), stride=(2, 3, 2)),
]


def place(pixel: tuple[int, ...], size: tuple[int, ...]) -> int:
    """The number of a pixel in a map, row by row."""
    return reduce(lambda before, axis: before * axis[1] + axis[0], zip(pixel, size, strict=True), 0)


@pytest.mark.parametrize("partition", PARTITIONS, ids=map(str, range(len(PARTITIONS))))
def test_groups_are_gathered_as_the_partition_has_them(partition: Partition) -> None:
    x = torch.randn(2, *partition.size, 3, 4)
    groups = peers.gather(partition, x).unflatten(0, (2, partition.groups))
    assert torch.equal(peers.scatter(partition, groups.flatten(0, 1)), x)
    pixels: list[tuple[int, ...]] = [(0,) * len(partition), tuple(side - 1 for side in partition.size), (2, 1, 3)]
    for pixel in (each[: len(partition)] for each in pixels):
        group, token = partition.seat(*pixel)
        assert torch.equal(groups[:, group, :, token], x.flatten(1, len(pixel))[:, place(pixel, partition.size)])


@pytest.mark.parametrize("who", ["sdpa", "authors"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS, ids=map(str, range(len(PARTITIONS))))
def test_peers_compute_the_same(partition: Partition, bias: bool, who: str) -> None:
    problem = problems.Problem(partition, 4, 6, 3, bias, "float32")
    tensors = problems.Tensors.of(problem, "cpu")
    got = speed.calls(peers.PEERS[who], problem, tensors, "training")()
    ours = partitioned_attention(tensors.q, tensors.k, tensors.v, partition, bias=tensors.bias)
    wanted = ours.detach(), *torch.autograd.grad(ours, tensors.leaves, tensors.do)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)
    assert speed.relative(got, wanted) < 1e-5
    assert speed.relative((got[0] * 1.1,), (wanted[0],)) > speed.SAME


def test_natten_says_what_it_has_no_form_of() -> None:
    assert peers.natten_refuses(SHAPES["ISA 64"]) is None
    assert peers.natten_refuses(SHAPES["Swin 49"]) == "takes no bias"
    ragged = problems.Problem(Partition.local((5, 7), (2, 3)), 4, 4)
    assert peers.natten_refuses(ragged) == "takes maps that the partition divides"


def test_the_interpreter_is_given_every_kind_of_problem_once() -> None:
    shapes = problems.distinct(SHAPES)
    assert set(problems.distinct(reversed(shapes))) == set(shapes)
    tiny = {shape: problems.tiny(SHAPES[shape]) for shape in SHAPES}
    assert {(p.partition.divides, p.bias, p.partition.groups == 1) for p in (tiny[shape] for shape in shapes)} == {
        (p.partition.divides, p.bias, p.partition.groups == 1) for p in SHAPES.values()
    }
    longest = triton._longest_group_of(triton.INTERPRETED_TARGET, "float32", 40, 48)
    assert tiny["dense 16384"].partition.tokens > longest  # backward in passes


def test_memory_is_poisoned_and_bits_are_compared() -> None:
    with correct.poisoned():
        assert bool(torch.empty(3, 5).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()
    nan, zero = torch.full((2,), torch.nan), torch.zeros(2)
    assert correct.equal_bits({"out": nan}, {"out": nan.clone()})
    assert not correct.equal_bits({"out": zero}, {"out": -zero})
    got = {"out": torch.tensor([torch.nan, 1.0]), "dq": torch.zeros(1), "dk": torch.zeros(1)}
    assert list(correct.wrong({"out": torch.nan, "dq": 3.0, "dk": 0.5}, got, 19, 20)) == [
        "out has 1 NaN of 2, as memory that was not written has",
        "dq is wrong by 3 times what the error budget allows",
        "1 of 20 calls have other bits",
    ]
