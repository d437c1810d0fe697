"""Launches as the GPU gets them, on a driver that launches nothing: which kernels, which binary, which arguments."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from triton.backends.amd.driver import HIPLauncher
from triton.runtime import _allocation
from triton.runtime.driver import driver

from bench.__main__ import main
from isa_triton.backend.kernels import launch
from tests.compiling import run_compiling

HEAD = """
import contextlib, struct, torch
from bench import stand_in
from isa_triton import Partition, partitioned_attention, partitioned_attention_with_lse, tiles
from isa_triton import replays
from isa_triton.backend import triton
from isa_triton.backend.kernels import launch, plan
from isa_triton.backend.kernels.plan import Pointer

SWIN = Partition.local((14, 21), (7, 7), shift=(3, 3))
MANY = Partition.dense((24, 24))

def maps(*widths, heads=2, size=(14, 21), dtype=torch.bfloat16, batch=2):
    return [torch.randn(batch, *size, heads, width, dtype=dtype) for width in widths]
"""
PARAMETERS = """
import triton.language as tl

def flat(value, tensors):
    if isinstance(value, Pointer):
        x = tensors[value.name]
        yield struct.pack("<Q", x if isinstance(x, int) else x.data_ptr())
    elif isinstance(value, tuple):
        for part in value:
            yield from flat(part, tensors)
    elif isinstance(value, float):
        yield struct.pack("<f", value).ljust(8, b"\\0")
    elif type(value) is int:
        yield struct.pack("<i" if abs(value) < 2**31 else "<q", value).ljust(8, b"\\0")

launched = []
class Spy(launch._Bound):
    def __init__(self, planned, names, device):
        super().__init__(planned, names, device)
        self.planned, self.names = planned, names

    def __call__(self, tensors, stream):
        values = (v for n, v in self.planned.arguments.items() if not self.planned.kernel.params[
            self.planned.kernel.arg_names.index(n)].is_constexpr)
        expected = [part for value in values for part in flat(value, dict(zip(self.names, tensors)))]
        launches.expect([8 if part[4:] != bytes(4) else 4 for part in expected])
        super().__call__(tensors, stream)
        assert launches.parameters() == expected, (self.planned, launches.parameters(), expected)
        launched.append(self.planned.kernel.fn.__name__)

launch._Bound = Spy
with stand_in.installed() as launches:
    for partition, biased in ((SWIN, True), (SWIN, False), (MANY, True)):
        q, k, v = (x.requires_grad_() for x in maps(32, 32, 24, size=partition.size))
        bias = torch.randn(2, partition.tokens, partition.tokens, dtype=q.dtype) if biased else None
        out, lse = partitioned_attention_with_lse(q, k, v, partition, bias=bias)
        (out.sum() + lse.sum()).backward()
        for _ in range(3):
            partitioned_attention(q, k, v, partition, bias=bias).backward(torch.ones_like(v))
    print(*sorted(set(launched)))
"""
SAME = """
def cold(call):
    replays.forget()
    return recorded(call)

def recorded(call):
    seen.clear()
    call()
    return list(seen)

class Binary:
    # what a launch would be compiled to, by all that it depends on
    made, function, packed_metadata = 0, None, None

    def __init__(self, planned):
        target = launch.driver.active.get_current_target()
        self.known = repr((planned.kernel, *planned.specialised(target), planned.options))
        Binary.made += 1

launch._loaded, seen = lambda planned, device: (Binary(planned), lambda *args: None), []
class Spy(launch._Bound):
    def __call__(self, tensors, stream):
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in tensors]
        seen.append((self.compiled.known, self.grid, given[:3], given[3] == bias.data_ptr(), [x is None for x in given],
                     list(map(str, self.arguments))))
        super().__call__(tensors, stream)
launch._Bound = Spy

q, k, v = maps(32, 32, 24)
wide = maps(40, 40, 40)
bias = torch.randn(2, 49, 49, dtype=torch.bfloat16)
base = torch.randn(2 * 14 * 21 * 2 * 32 + 1, dtype=torch.bfloat16)
P, ODD = Partition.local((14, 21), (7, 7)), Partition.dense((15, 17))

def attend(q=q, k=k, v=v, partition=P, function=partitioned_attention, **rest):
    return lambda: function(q, k, v, partition, **rest)

elsewhere = {}
def moved(x):
    return elsewhere.setdefault(x.data_ptr(), x.detach().transpose(1, 2).contiguous().transpose(1, 2))

def learn(*tensors, do=None, bias=None, hooks=False, **rest):
    leaves = [x.clone().requires_grad_() for x in (*tensors, *([] if bias is None else [bias]))]

    def call():
        across = torch.autograd.graph.saved_tensors_hooks(lambda x: x, moved)
        with torch.enable_grad(), across if hooks else contextlib.nullcontext():
            out = attend(*leaves[:3], bias=leaves[3] if bias is not None else None, **rest)()
            torch.autograd.grad(out, leaves, torch.ones_like(out) if do is None else do)
    return call

calls = {
    "as it is": attend(),
    "other strides": attend(q=maps(32, heads=4)[0][:, :, :, ::2]),
    "other channels": attend(v=v.transpose(3, 4).contiguous().transpose(3, 4)),
    "not aligned": attend(q=base[1:].view(2, 14, 21, 2, 32)),
    "aligned": attend(q=base[:-1].view(2, 14, 21, 2, 32)),
    "other dtype": attend(*(x.half() for x in (q, k, v))),
    "fp32": attend(*(x.float() for x in (q, k, v))),
    "other widths": attend(*wide),
    "other batch": attend(*(x[:1] for x in (q, k, v))),
    "other partition": attend(partition=SWIN),
    "other tokens": attend(partition=Partition.interlaced((14, 21), stride=(7, 7))),
    "other scale": attend(scale=0.5),
    "a bias": attend(bias=bias),
    "lse": attend(function=partitioned_attention_with_lse),
    "learned": learn(q, k, v),
    "learned, a bias": learn(q, k, v, bias=bias),
    "learned, passes": learn(*maps(32, 32, 24, size=(24, 24)), partition=MANY),
    "learned, a bias, in passes": learn(*maps(32, 32, 24, size=(15, 17)), partition=ODD,
        bias=torch.randn(2, 255, 255, dtype=torch.bfloat16)),
    "learned, saved elsewhere": learn(q, k, v, hooks=True),
    "learned, other gradient": learn(q, k, v, do=torch.ones_like(v).transpose(1, 2).contiguous().transpose(1, 2)),
    "learned, gradient of a sum": learn(q, k, v, do=torch.ones(()).bfloat16().expand(v.shape)),
}
with stand_in.installed() as launches, torch.no_grad():
    for name, call in calls.items():
        for _ in range(2):
            call()
        made, again = Binary.made, recorded(call)
        assert Binary.made == made, name
        assert again == cold(call), name
        for call_before in calls.values():
            call_before()
        assert recorded(call) == again, name
    different = [str([entry[:2] + entry[3:] for entry in recorded(call)]) for call in calls.values()]
    print(len(different) - len(set(different)))

    replays.forget()
    attend()(); before = recorded(attend())
    lookup = triton.tiles.lookup
    triton.tiles.lookup = lambda *args: lookup(*args)._replace(num_warps=8)
    replays.forget()
    print(recorded(attend())[0][0] != before[0][0])
    triton.tiles.lookup = lookup

    replays.forget()
    fp32 = attend(*(x.float() for x in (q, k, v)))
    fp32(); exact = recorded(fp32)
    triton.precision_of = lambda dtype, device: "tf32" if dtype == torch.float32 else "ieee"
    print(recorded(fp32)[0][0] != exact[0][0])
"""
WATCHED = """
from torch.utils.flop_counter import FlopCounterMode
q, k, v = maps(32, 32, 24)
P = Partition.local((14, 21), (7, 7))
with stand_in.installed() as launches:
    for _ in range(3):
        partitioned_attention(q, k, v, P)
    print(launches.names())
    with FlopCounterMode(display=False) as counter:
        partitioned_attention(q, k, v, P)
    print(counter.get_total_flops() > 0)
    meta = partitioned_attention(*(x.to("meta") for x in (q, k, v)), P, backend="triton")
    print(meta.shape == v.shape, launches.count())
    q.requires_grad_()
    print(partitioned_attention(q, k, v, P).requires_grad)
    with torch.no_grad():
        print(partitioned_attention(q, k, v, P).requires_grad)
    with torch.autocast("cpu", torch.float16):
        print(partitioned_attention(q, k, v, P).dtype)
    launches.names()
    print(*(len(partitioned_attention(q[:0], k[:0], v[:0], P)) for _ in range(2)), launches.count())
    for bad in ({"scale": float("nan")}, {"scale": [1]}, {"backend": ["x"]}, {"backend": "kernels"}):
        for _ in range(2):
            try:
                partitioned_attention(k, k, v, P, **bad)
            except (TypeError, ValueError) as error:
                print(type(error).__name__, str(error)[:20])
"""


ODD = """
q, k, v = maps(32, 32, 24)
P = Partition.local((14, 21), (7, 7))

def is_known(q, k=k, v=v):
    key = replays.key(q, k, v, None, P, None, "auto", False)
    return key is not None and key in replays._KNOWN

with stand_in.installed() as launches, torch.no_grad():
    for _ in range(2):
        partitioned_attention(q, k, v, P)
        for odd in (q.to_sparse(), torch.nested.nested_tensor([q[0], q[1]]), q.to("meta"), None, "q"):
            try:
                print(partitioned_attention(odd, k, v, P))
            except (TypeError, ValueError) as error:
                print(type(error).__name__)
    negated = torch.randn(2, 14, 21, 2, 32, dtype=torch.complex64).conj().imag
    partitioned_attention(negated, k.float(), v.float(), P)
    print(negated.is_neg(), is_known(q), is_known(negated, k.float(), v.float()))
"""
PROFILED = """
import triton as language
knobs = launch.knobs.runtime
q, k, v = maps(32, 32, 24)
P = Partition.local((14, 21), (7, 7))
events, scratch = [], torch.empty(1 << 20, dtype=torch.int8)

def enter(said):
    events.append("enter " + said.get()["name"])

def leave(said):
    events.append(f"leave {said.get()['stream']}")

def allocate(size, alignment, stream):
    events.append(f"allocate {size}")
    return scratch

with stand_in.installed() as launches, torch.no_grad():
    for _ in range(2):
        partitioned_attention(q, k, v, P)
    knobs.launch_enter_hook.add(enter)
    knobs.launch_exit_hook.add(leave)
    partitioned_attention(q, k, v, P)
    knobs.launch_enter_hook.remove(enter)
    knobs.launch_exit_hook.remove(leave)
    partitioned_attention(q, k, v, P)
    print(*events, launches.count())

    events.clear()
    replays.forget()
    loaded = launch._loaded
    def with_scratch(planned, device):
        compiled, launcher = loaded(planned, device)
        launcher.global_scratch_size = 1
        return compiled, launcher
    launch._loaded = with_scratch
    language.set_allocator(allocate)
    for _ in range(3):
        partitioned_attention(q, k, v, P)
    print(len(events), launches.count())
"""
OVERHEAD = """
import sys
from bench import overhead
from bench.__main__ import main
overhead.CASES = {"49 tokens, bias": overhead.CASES["49 tokens, bias"]}
overhead.DTYPES = {"bf16": torch.bfloat16}
main(["overhead", "--out", sys.argv[1], "--rounds", "2", "--calls", "2"])
"""

WARM = """
with stand_in.installed() as launches:
    for size in ((56, 56), (28, 35)):
        P = Partition.local(size, (7, 7))
        q, k, v = (x.requires_grad_() for x in maps(32, 32, 32, heads=3, size=size))
        bias = torch.zeros(3, 49, 49, dtype=torch.bfloat16, requires_grad=True)
        partitioned_attention(q, k, v, P, bias=bias).backward(torch.ones_like(v))
    print(*launches.names())
"""


def printed(program: str) -> list[str]:
    result = run_compiling("-c", HEAD + program)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow  # compiles every kernel
def test_kernels_get_the_arguments_that_were_planned() -> None:
    kernels = "backward_group_kernel backward_keys_kernel backward_pairs_kernel backward_queries_kernel"
    assert printed(PARAMETERS) == [f"{kernels} forward_group_kernel forward_kernel"]


def test_a_call_made_again_launches_what_it_did_and_others_what_they_would_alone() -> None:
    assert printed(SAME) == ["1", "True", "True"]


def test_calls_that_somebody_watches_are_not_short_cut() -> None:
    assert printed(WATCHED) == [
        str(3 * ["forward_group_kernel"]), "True", "True 1", "True", "False", "torch.float16",
        "0 0 0", *["ValueError scale must be finite"] * 2, *["TypeError scale must be a numb"] * 2,
        *["ValueError backend must be one "] * 4,
    ]  # fmt: skip


@pytest.mark.parametrize("scratch", [0, 8])
def test_what_amds_launcher_hands_over_in_its_own_order_is_handed_over_again(scratch: int) -> None:
    handed, launcher = list[Any](), HIPLauncher.__new__(HIPLauncher)
    memory = SimpleNamespace(get=lambda: lambda size, align, stream: (size, stream))
    vars(launcher).update(launch=lambda *given: handed.append(given), launch_cooperative_grid=False, warp_size=64)
    vars(launcher).update(arg_annotations=[None] * 3, kernel_signature=b"iii", num_ctas=1)
    for of in ("global", "profile"):
        vars(launcher).update({f"{of}_scratch_size": scratch, f"{of}_scratch_align": 1})
    compiled = SimpleNamespace(function=5, packed_metadata=(4, 1, 0))
    allocators = patch.multiple(_allocation, _allocator=memory, _profile_allocator=memory)
    with allocators, patch.object(driver, "_active", SimpleNamespace()):
        run, before, after = launch._settled(launcher, (7, 1, 1), compiled, [1, 2, 3])
        assert not handed
        run(*before, 9, *after, [4, 5, 6])
        launcher(7, 1, 1, 9, compiled.function, compiled.packed_metadata, None, None, None, 4, 5, 6)
    ours, theirs = ([list(x) if isinstance(x, tuple) else x for x in given] for given in handed)
    assert ours == theirs
    assert ([56, 9] in ours) == (scratch == 8)


def test_a_call_on_odd_tensors_is_made_as_any_other() -> None:
    refused = ["TypeError", "TypeError", "ValueError", "TypeError", "TypeError"]
    assert printed(ODD) == [*refused, *refused, "True True False"]


def test_profilers_and_scratch_memory_see_every_launch() -> None:
    assert printed(PROFILED) == ["enter forward_group_kernel leave 0 4", "3 7"]


@pytest.mark.slow  # compiles four binaries
def test_overhead_measures_every_layer(tmp_path: Path) -> None:
    result = run_compiling("-c", HEAD + OVERHEAD, str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "overhead.csv").read_text().splitlines()))
    layers = [row["layer"] for row in rows if row["pass"] == "forward"]
    assert layers[:3] == ["bare Python call", "kernel[grid](...)", "launcher"]
    assert layers[-2:] == ["partitioned_attention, unlike any before", "partitioned_attention"]
    assert [row["pass"] for row in rows] == 8 * ["forward"] + 9 * ["training"]
    assert all(float(row["microseconds"]) > 0 for row in rows)
    assert "A call costs the host" in result.stdout


def test_overhead_wants_kernels_that_are_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["overhead"])
    assert "TRITON_INTERPRET=1 interprets kernels" in capsys.readouterr().err


@pytest.mark.slow  # compiles two binaries
def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def binaries() -> set[Path]:
        return set(tmp_path.rglob("*.cubin"))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run_compiling("-m", "bench", "tiles", "warm", "--shapes", "Swin 49", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    assert "2 binaries for sm_90 are in Triton's cache." in result.stdout
    compiled = binaries()
    assert len(compiled) == 2
    assert printed(WARM) == [" ".join(2 * ["forward_group_kernel", "backward_group_kernel"])]
    assert binaries() == compiled
