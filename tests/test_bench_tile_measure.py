"""Tiles that are timed: the kernel that is named runs and no other, and a tile that cannot run says why."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench.tiles import search as command
from bench.tiles.options import make_problem
from bench.tiles.roofline import MACHINES
from bench.tiles.search import Finding, Task, measure_finding
from isa_triton.tiles import Tile
from tests.compiling import run_compiling

H100, PROBLEM = MACHINES["H100"], make_problem(64, 64, 64)
TILE = Tile(64, 64, 32, 32, 4, 2)
BEGIN = """
import torch
from bench import stand_in
from isa_triton import replays
from isa_triton.backend.kernels import launch
from tests.scripted_device import ScriptedDevice

class Binary:
    function = packed_metadata = None

def loaded(planned, device):
    written = [name for name in ("dk", "dv") if planned.arguments.get(name) is not None]
    name = " ".join([planned.kernel.fn.__name__, *written])
    return Binary, lambda *args: gpu.launch(name, 1e-6)

gpu, launch._loaded = ScriptedDevice(), loaded
"""
STEPS = """
from bench.tiles import search
from bench.tiles.compile import STEPS
from bench.tiles.options import make_problem
from bench.tiles.roofline import MACHINES
from isa_triton.tiles import Tile

randn = torch.randn
torch.randn = lambda shape, device, dtype: randn(shape, dtype=dtype)
for step in STEPS:
    for tokens in (16, 64):
        replays.forget()
        problem = make_problem(tokens, 16, 16, bias=True, maps=1)
        task, tile = search.Task(MACHINES["H100"], problem, step), Tile(64 if step == "group" else 32, 32, 16, 16)
        with stand_in.installed(), gpu.installed():
            if task.launch(tile) is not None:
                assert round(task.seconds(tile), 12) == 1e-6
                print(step, tokens, *gpu.timed[-1], sep=", ")
"""
PROVIDERS = """
from bench import check, measure
from bench.cases import Case
from bench.compared import PROVIDERS
from bench.workload import Workload

for name in ("isa-triton", "rcca-triton", "nonlocal-triton"):
    for pass_ in ("forward", "training"):
        workload = Workload("attention", pass_, 16, 16, 16, 16, 16, (4, 4))
        with stand_in.installed():
            step = measure.step(PROVIDERS[name], workload)
            with gpu.installed():
                ((seconds, how),) = measure.samples({name: step}, device="cuda").values()
        assert how == "graph" and all(round(each, 12) == len(gpu.timed[-1]) * 1e-6 for each in seconds)
        print(name, pass_, *gpu.timed[-1], sep=", ")
inputs, case = Case.inputs, Case("local", (8, 8), (4, 4), (16, 16), bias=True)
Case.inputs = lambda case, device: inputs(case)
with stand_in.installed(), gpu.installed():
    print(check.timed(case, "triton", "cuda"), *(names for names in gpu.timed[-2:]), sep=", ")
assert set(gpu.streams[-20:]) == {7}  # forward too, for the graph of backward
"""


@pytest.mark.slow
def test_only_the_kernel_of_a_step_is_timed() -> None:
    done = run_compiling("-c", BEGIN + STEPS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "forward, 16, forward_group_kernel",
        "forward, 64, forward_kernel",
        "group, 16, backward_group_kernel dk dv",
        "group, 64, backward_group_kernel dk dv",
        "columns, 16, backward_columns_kernel dk dv",  # of 64 tokens no tile makes one block
        *(f"queries, {tokens}, backward_queries_kernel" for tokens in (16, 64)),
        *(f"keys, {tokens}, backward_keys_kernel dk dv" for tokens in (16, 64)),
        *(f"dk, {tokens}, backward_keys_kernel dk" for tokens in (16, 64)),
        *(f"dv, {tokens}, backward_keys_kernel dv" for tokens in (16, 64)),
        *(f"pairs, {tokens}, backward_pairs_kernel" for tokens in (16, 64)),
    ]


@pytest.mark.slow
def test_a_timed_call_of_a_provider_launches_its_kernels_and_no_others() -> None:
    done = run_compiling("-c", BEGIN + PROVIDERS)
    assert done.returncode == 0, done.stderr
    forward, group = "forward_group_kernel", "backward_group_kernel dk dv"
    apart = "backward_queries_kernel, backward_keys_kernel dk, backward_keys_kernel dv"  # of 256 tokens
    assert done.stdout.splitlines() == [
        f"isa-triton, forward, {forward}, {forward}",
        f"isa-triton, training, {forward}, {forward}, {group}, {group}",
        f"rcca-triton, forward, {', '.join([forward] * 4)}",
        f"rcca-triton, training, {', '.join([forward] * 4 + [group] * 4)}",
        "nonlocal-triton, forward, forward_kernel",
        f"nonlocal-triton, training, forward_kernel, {apart}",
        f"{{'forward_ms': 0.001, 'backward_ms': 0.001, 'how': 'graph'}}, ['forward_group_kernel'], ['{group}']",
    ]


@dataclass(frozen=True)
class MeasuredTask(Task):
    """On a GPU where tiles of four warps do not fit."""

    def seconds(self, tile: Tile) -> float:
        if tile.num_warps == 4:
            raise OutOfResources(300000, 232448, "shared memory")
        return 2e-6


def test_a_tile_that_does_not_fit_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    task = MeasuredTask(H100, PROBLEM, "forward")
    fits, large = (measure_finding(Finding(task, TILE._replace(num_warps=n), None, [], None)) for n in (8, 4))
    assert (fits.seconds, fits.measured_on, fits.violations) == (2e-6, "a GPU", [])
    assert large.measured is None
    assert large.violations[0].startswith("does not fit on this GPU: out of resource: shared memory, Required: 300000")
    assert fits.rank < large.rank


def test_another_gpu_than_the_targets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "target_of", lambda device: "sm_80")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match="this machine's GPU, which is sm_80, not sm_90"):
        command.run(parser.parse_args(["--measure", "2"]))
