"""A kernel of somebody else's under the same lens: from a file and a function's name, and what it is called with.

Nothing is known of it but its code. So masked lanes count as asked for, both ways of a branch are taken, and what must
move at least are the tensors that it reads and writes, once each, or what it asks of them where that is less.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from bench.tiles.assembly import Nest
from bench.tiles.binaries import Binaries, Binary, compile_and_read
from bench.tiles.compile import gpu_target
from bench.tiles.program import Work

ELEMENTS = {  # bytes, by Triton's names
    "fp64": 8, "i64": 8, "u64": 8, "fp32": 4, "i32": 4, "u32": 4, "fp16": 2, "bf16": 2, "i16": 2, "u16": 2, "i8": 1,
    "u8": 1, "i1": 1, "fp8e4nv": 1, "fp8e5": 1,
}  # fmt: skip
_TENSOR = re.compile(rf"({'|'.join(ELEMENTS)})\[([\d, x]+)\]")


class Tensor(NamedTuple):
    """One of a kernel's tensors, which lies at a multiple of 16 bytes."""

    element: str
    size: int  # elements

    @property
    def bytes(self) -> int:
        return ELEMENTS[self.element] * self.size


class ForeignCall:
    """A launch of a kernel that is not ours.

    Args:
        target: as `gpu_target` takes it.
        file: Python, which is imported.
        name: of the kernel in it.
        grid: up to three numbers of programs.
        arguments: by name: a `Tensor`, an integer, a float, or a constant for the compiler.
        options: of the compiler, such as num_warps.

    Raises:
        ValueError: there is no such kernel, or it does not take these arguments.
    """

    def __init__(
        self, target: str, file: Path, name: str, grid: Sequence[int], arguments: dict[str, Any],
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.target, self.name, self.label, self.origin = target, name, name, str(file)
        self.grid, self.options, self.programs = tuple(grid), options, prod(grid)
        self.kernel = kernel_of(file, name)
        declared = {param.name: param for param in self.kernel.params}
        if unknown := arguments.keys() - declared.keys():
            raise ValueError(f"{name} takes {', '.join(declared)}, not {', '.join(sorted(unknown))}")
        defaults = {name: p.default for name, p in declared.items() if p.has_default}
        if missing := declared.keys() - arguments.keys() - defaults.keys():
            raise ValueError(f"{name} needs {', '.join(n for n in declared if n in missing)} as well")
        given = defaults | arguments
        self.arguments = {param: given[param] for param in declared}
        numbers = {n for n, value in self.arguments.items() if type(value) in (Tensor, int, float) and value != 1}
        constant = {n for n, param in declared.items() if param.is_constexpr or n not in numbers}  # 1 is, to Triton too
        self.constants = {n: value for n, value in self.arguments.items() if n in constant}

    @property
    def choices(self) -> dict[str, Any]:
        """What tables say first."""
        return {name: value for name, value in self.constants.items() if value is not None} | self.options

    @property
    def planned(self) -> Any:
        """As `isa_triton.backend.kernels.launch.compile` takes it."""
        return SimpleNamespace(kernel=self.kernel, specialised=self.specialised, options=self.options)

    def specialised(self, target: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
        """Types, constants and attributes, by Triton's rules: what 16 divides is said to be."""
        attributes_of, types, attributes = make_backend(target).parse_attr, dict[str, str](), dict[tuple[int], Any]()
        for i, (name, value) in enumerate(self.arguments.items()):
            if name in self.constants:
                types[name] = "constexpr"
            elif isinstance(value, Tensor):
                types[name], attributes[(i,)] = f"*{value.element}", attributes_of("D")
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = attributes_of("D")
        constants = {(i,): self.constants[name] for i, name in enumerate(self.arguments) if name in self.constants}
        return types, constants, attributes

    @cached_property
    def key(self) -> str:
        """A name for the binary."""
        target = gpu_target(self.target)
        binary = self.kernel.cache_key, target, self.specialised(target), self.options, triton.__version__
        return hashlib.sha256(str(binary).encode()).hexdigest()[:32]

    @property
    def problem(self) -> Any:
        """What files are named by."""
        return SimpleNamespace(name=Path(self.origin).stem, dtype="")

    def dtype(self, binary: Binary) -> str:
        """Of its products, as `isa_triton.tiles` names it; those of 8 bits pass for 16."""
        wide = any(op.kind == "dot" and op.itemsize == 4 for op in binary.ops)
        return "bfloat16" if not wide else "tf32" if binary.matrix else "float32"

    def repeats(self, binary: Binary) -> Callable[[Nest], float]:
        """How often a program runs what stands in some of the loops: the mean over all programs.

        Raises:
            ValueError: a loop depends on what is only known when it runs.
        """
        integers = {name: value for name, value in self.arguments.items() if type(value) is int}
        x, y, z = (*self.grid, 1, 1)[:3]
        number = np.arange(self.programs)
        values = {**integers, "program": number % x, "program.y": number // x % y, "program.z": number // x // y % z}
        try:
            trips = [loop.trips(values) for loop in binary.loops]
        except KeyError as error:
            raise ValueError(
                f"a loop of {self.name} runs as often as {error} says, which is not known before"
            ) from error
        return lambda nest: prod(trips[loop] for loop in nest)

    def work(self, binary: Binary) -> Work:
        """What it asks for."""
        often, flops, asked = self.repeats(binary), 0.0, dict[tuple[str, str], float]()
        for kind, shape, itemsize, argument, nest in binary.ops:
            times = self.programs * often(nest)
            if kind == "dot":
                flops += 2 * prod(shape) * times
            else:
                asked[kind, argument] = asked.get((kind, argument), 0.0) + times * itemsize * prod(shape)
        tensors = {name: value.bytes for name, value in self.arguments.items() if isinstance(value, Tensor)}
        moved = sum(min(size, tensors.get(argument, size)) for (_, argument), size in asked.items())
        return Work(flops, sum(asked.values()), round(moved), 1.0, 1.0)


def read(call: ForeignCall, binaries: Binaries) -> tuple[Binary, list[str]]:
    """Its binary, and what may be wrong with it.

    Raises:
        argparse.ArgumentError: it does not compile.
    """
    known = binaries.known(call)  # type: ignore[arg-type]  # its key is all that this looks at
    binary = known or compile_and_read(call, binaries.cache, binaries.dump)  # type: ignore[arg-type]  # likewise
    if isinstance(binary, str):
        raise argparse.ArgumentError(None, f"{call.name} {binary}")
    found = [] if binary.ctas_per_sm else [f"not one CTA of {binary.warps} warps fits on an SM"]
    if binary.spill_accesses:
        found.append(f"spills {binary.spill_bytes} bytes ({binary.spill_accesses} accesses)")
    if binary.atomics:
        found.append(f"has {binary.atomics} atomic instructions: its sums are not deterministic")
    return binary, found


@cache
def kernel_of(file: Path, name: str) -> JITFunction[Any]:
    """The kernel in a file, out of what tunes it.

    Raises:
        ValueError: the file cannot be imported, or has no such kernel.
    """
    spec = importlib.util.spec_from_file_location(f"foreign_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it does when it is imported
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    kernel = getattr(module, name, None)
    while kernel is not None and not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):
        kernel = kernel.fn  # of triton.autotune, triton.heuristics
    if not isinstance(kernel, JITFunction):
        kernels = [name for name, value in inspect.getmembers(module) if hasattr(value, "fn")]
        raise ValueError(f"{file} has no kernel {name!r}, but {', '.join(kernels) or 'none'}")
    return kernel


# -- the command line --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a kernel of somebody else's, instead of a pass of ours")
    add = group.add_argument
    add(
        "--kernel",
        type=_kernel,
        metavar="FILE:NAME",
        help="a function under triton.jit in a Python file, which is imported",
    )
    add("--arguments", nargs="+", type=_argument, default=[], metavar="NAME=VALUE",
        help="tensors as q=bf16[4,64], numbers as n=64 or scale=0.125, constants as BLOCK=64 or FLAG=None")  # fmt: skip
    add("--grid", nargs="+", type=int, default=[1], metavar="N", help="programs, on up to three axes (default: 1)")
    add("--options", nargs="+", type=_argument, default=[], metavar="NAME=N", help="num_warps, num_stages and others")


def call(args: argparse.Namespace, target: str) -> ForeignCall:
    """What the arguments say. Raises argparse.ArgumentError."""
    if not 1 <= len(args.grid) <= 3 or min(args.grid) < 1:
        raise argparse.ArgumentError(None, f"--grid must be one to three positive numbers, got {args.grid}")
    (file, name), options = args.kernel, {"num_warps": 4, "num_stages": 3, **dict(args.options)}
    try:
        return ForeignCall(target, file, name, args.grid, dict(args.arguments), options)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--kernel: {error}") from error


def _kernel(text: str) -> tuple[Path, str]:
    file, _, name = text.rpartition(":")
    if not file or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be FILE:NAME, got {text!r}")
    return Path(file), name


def _argument(text: str) -> tuple[str, Any]:
    """A name and what stands for it."""
    name, _, value = text.partition("=")
    if not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    if match := _TENSOR.fullmatch(value):
        return name, Tensor(match[1], prod(map(int, re.findall(r"\d+", match[2]))))
    if value.startswith("tl.") and isinstance(of := getattr(tl, value[3:], None), tl.dtype):
        return name, of
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        if "[" in value:
            raise argparse.ArgumentTypeError(
                f"tensors are {', '.join(ELEMENTS)}, as q=bf16[4,64]; got {text!r}"
            ) from None
        return name, value  # a word, such as "ieee"


def lines(call: ForeignCall, seconds: float, work: Work, dram: float, flops: float) -> Iterator[str]:
    """What it needs at least, in words; rates are of the GPU, a second."""
    us, moves, multiplies = 1e6 * seconds, 1e6 * work.distinct / dram, 1e6 * work.flops / flops
    yield f"{call.name} must move {work.distinct / 1e6:.1f} MB, {moves:.1f} us of DRAM"
    yield f"its products are {work.flops / 1e9:.2f} GFLOPs, {multiplies:.1f} us of matrix units"
    yield f"PREDICTED {us:.1f} us, {us / max(moves, multiplies, 1e-9):.2f}x of the larger of the two"
