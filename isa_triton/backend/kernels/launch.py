"""Launchers: from tensors, a partition and tiles to kernel launches. They allocate nothing and choose nothing.

Tensors are anything with `shape`, `stride()` and a data pointer, on the current device, with any strides:

    q, k, dq, dk       [B, H, W, heads, K]           fp16, bf16 or fp32, all four tensors q, k, v, do alike; k and v may
    v, out, do, dv     [B, H, W, heads, V]           have fewer heads, which divide those of q; dk and dv have as q
    lse, dlse, delta   [B, H, W, heads]              fp32
    bias               [heads, tokens, tokens]       any float; or [B, heads, tokens, tokens]; larger with zeros
                                                     below and on the right, as `plan.whole_rows` has it
    scales             [heads], contiguous           any float
    valid              [B, H, W, heads]              uint8, 0 or not; alike for all heads
    seed               [calls], contiguous           int64, of dropout; each is of as many neighbouring heads
    table              [groups, tokens], contiguous  int32, of packed maps, whose q is [1, pixels, heads, K]
    dbias_partials     [slots, heads, tokens, tokens], contiguous, fp32, of a bias for each map B * heads for heads

What a call launches is planned and compiled once for its layouts, sizes and tiles; after that a call is a look-up and
the launches themselves, by Triton's function in C. Its own `kernel[grid](...)` takes many times as long, to find out
what we know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from isa_triton.backend.kernels import plan
from isa_triton.backend.kernels.forward import forward_kernel
from isa_triton.backend.kernels.plan import Launch, Layout, Pointer
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Tile

INTERPRETED = not isinstance(forward_kernel, JITFunction)
Tensors = tuple[Any | None, ...]
Planned = Callable[..., Iterator[Launch]]
_NAMES: dict[Planned, tuple[str, ...]] = {plan.forward: plan.FORWARD, plan.backward: plan.BACKWARD}
_BINARIES: dict[Any, Any] = {}
_INTERPRETER = Lock()


def forward(
    q: Any, k: Any, v: Any, bias: Any | None, out: Any, lse: Any | None, scale: float, partition: Partition, tile: Tile,
    precision: str = "ieee", dropout_p: float = 0.0, *, scales: Any | None = None, valid: Any | None = None,
    seed: Any | None = None, table: Any | None = None, cosine: bool = False,
) -> None:  # fmt: skip
    """Write out = softmax(scale * q k^T + bias) v within every group, and lse where it is not None.

    Args:
        scales: of every head, by which its scores are multiplied too.
        valid: which pixels exist; nothing is written for others.
        tile: a group of at most `tile.block_n` tokens is one block of keys.
        precision: of products of fp32, as `tl.dot` names it: "ieee", "tf32" or "tf32x3".
        dropout_p: the share of weights that is dropped, by `seed`.
        table: of packed maps, where the tokens of the partition's groups lie.
        cosine: whether q and k are divided by their lengths.
    """
    tensors = q, k, v, bias, scales, valid, seed, table, out, lse
    _launch(plan.forward, tensors, scale, partition, tile, precision, dropout_p, cosine)


def backward(
    q: Any, k: Any, v: Any, bias: Any | None, out: Any | None, lse: Any | None, do: Any, dlse: Any | None,
    dq: Any, dk: Any, dv: Any, delta: Any | None, dbias_partials: Any | None, scale: float, partition: Partition,
    tiles: BackwardTiles, precision: str = "ieee", dropout_p: float = 0.0, *, scales: Any | None = None,
    valid: Any | None = None, seed: Any | None = None, table: Any | None = None, cosine: bool = False,
) -> None:  # fmt: skip
    """Write dq, dk, dv and partial sums of dbias, which the caller adds over their first dimension.

    Args:
        out, lse: what forward wrote; like delta, not looked at where `plan.in_one_kernel` holds.
        dlse: the gradient of lse, or None for zero.
        delta: scratch.
        dbias_partials: of the shape that `plan.bias_partials_shape` says, or None where dbias is not wanted.
        precision, dropout_p, valid, seed, table: as in `forward`.
        scales: likewise; dq is written without them, for their own gradient.
        cosine: likewise; dq and dk are written as of vectors of length 1, for that of the scales too.
    """
    tensors = q, k, v, bias, scales, valid, seed, table, out, lse, do, dlse, dq, dk, dv, delta, dbias_partials
    _launch(plan.backward, tensors, scale, partition, tiles, precision, dropout_p, cosine)


class Replay:
    """The launches of a pass on the current device, all of them settled but where the tensors lie.

    Args:
        planned: `plan.forward` or `plan.backward`.
        tensors: those of the pass, in its order; every call's are laid out as they are.
        rest: what the pass takes beside them.
    """

    def __init__(self, planned: Planned, tensors: Tensors, *rest: Any) -> None:
        self.current_device, self.current_stream = driver.active.get_current_device, driver.active.get_current_stream
        self.device = self.current_device()
        self.launches = _bound(planned, self.device, tuple(map(layout, tensors)), *rest)

    def is_here(self) -> bool:
        """Whether its device is the current one."""
        return self.current_device() == self.device

    def __call__(self, tensors: Tensors) -> None:
        """Launch, where `is_here` holds; that the tensors are on the device is the caller's word."""
        stream = self.current_stream(self.device)
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        for bound in self.launches:
            bound(addresses, stream)


def layout(x: Any | None) -> tuple[Any, ...] | None:
    """A tensor's `plan.Layout`, as a plain tuple, which takes half the time."""
    return None if x is None else (x.shape, x.stride(), x.dtype, not x.data_ptr() % 16)


def _launch(planned: Planned, tensors: Tensors, *rest: Any) -> None:
    layouts = tuple(map(layout, tensors))
    if INTERPRETED:
        for launch in _planned(planned, layouts, *rest):
            interpret(launch, dict(zip(_NAMES[planned], tensors, strict=True)))
        return
    device = driver.active.get_current_device()
    stream = driver.active.get_current_stream(device)
    for bound in _bound(planned, device, layouts, *rest):
        bound(tensors, stream)


def _planned(planned: Planned, layouts: tuple[Any, ...], *rest: Any) -> Iterator[Launch]:
    return planned(tuple(None if layout is None else Layout(*layout) for layout in layouts), *rest)


def compile(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel, the binary of a launch for a target; no device is needed.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    source = ASTSource(launch.kernel, *launch.specialised(target))
    return triton.compile(source, target=target, options=launch.options)


def bind(launch: Launch, tensors: dict[str, Any]) -> Callable[[], None]:
    """A function that runs one launch on the current device and stream."""
    device, given = driver.active.get_current_device(), tuple(tensors.values())
    bound = _Bound(launch, tuple(tensors), device)
    return lambda: bound(given, driver.active.get_current_stream(device))


def interpret(launch: Launch, tensors: dict[str, Any]) -> None:
    """Run a launch in Triton's interpreter, which puts functions in the place of its language's, for all threads."""
    with _INTERPRETER:
        launch.kernel[(launch.programs,)](**filled(launch, tensors))


def filled(launch: Launch, tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch, its tensors put in."""

    def fill(argument: Any) -> Any:
        if isinstance(argument, Pointer):
            return tensors[argument.name]
        if isinstance(argument, tuple) and any(isinstance(part, (Pointer, tuple)) for part in argument):
            parts = map(fill, argument)
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        return argument

    return {name: fill(argument) for name, argument in launch.arguments.items()}


class _Bound:
    """A launch that is compiled and loaded; what is left is to say where the tensors lie."""

    def __init__(self, launch: Launch, names: tuple[str, ...], device: int) -> None:
        self.grid, (self.compiled, self.launcher) = (launch.programs, 1, 1), _loaded(launch, device)
        self.arguments = [value for _, value in _flat(launch)]
        self.tensors = [(i, names.index(x.name)) for i, x in enumerate(self.arguments) if isinstance(x, Pointer)]
        self.run, self.before, self.after = _settled(self.launcher, self.grid, self.compiled, self.arguments)

    def __call__(self, tensors: Sequence[Any], stream: int) -> None:
        """Launch for tensors, of which Triton asks the driver whether it can reach them, or for their addresses."""
        arguments = self.arguments.copy()
        for at, which in self.tensors:
            arguments[at] = tensors[which]
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
            function, metadata = self.compiled.function, self.compiled.packed_metadata
            said = self.compiled.launch_metadata(self.grid, stream)
            self.launcher(*self.grid, stream, function, metadata, said, enter, leave, *arguments)
        else:
            self.run(*self.before, stream, *self.after, arguments)


def _settled(launcher: Any, grid: tuple[int, int, int], compiled: Any, arguments: list[Any]) -> tuple[Any, Any, Any]:
    """A function that launches, what it takes before a stream and what after it, the list of arguments being the last.

    Triton's launcher finds out in Python, in every call, what is the same in all of them, and hands it to a function in
    C, in an order that its versions and platforms have each their own. So it is asked once, and what it would hand over
    is handed over from then on; unless there is more to do, such as to allocate scratch memory.
    """
    after = compiled.function, compiled.packed_metadata, None, None, None
    sizes = (getattr(launcher, f"{of}_scratch_size", None) for of in ("global", "profile"))
    if any(size != 0 for size in sizes) or getattr(launcher, "gsan_enabled", False):
        return _spread(launcher), grid, after
    handed, there, asked = list[Any](), object(), copy(launcher)
    asked.launch = lambda *given: handed.extend(given)
    asked(*grid, there, *after, *arguments)
    in_c, stream = launcher.launch, handed.index(there)
    if isinstance(handed[-1], tuple):  # all arguments are one, as in triton 3.8 and not in 3.6
        return in_c, handed[:stream], handed[stream + 1 : -1]
    return _spread(in_c), handed[:stream], handed[stream + 1 : -len(arguments)]


def _spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes one by one what this one takes as a list at the end."""
    return lambda *given: function(*given[:-1], *given[-1])


@lru_cache(maxsize=4096)
def _bound(planned: Planned, device: int, layouts: tuple[Any, ...], *rest: Any) -> tuple[_Bound, ...]:
    return tuple(_Bound(launch, _NAMES[planned], device) for launch in _planned(planned, layouts, *rest))


def forget() -> None:
    """Forget what was compiled: for another driver in the place of this one."""
    _bound.cache_clear()
    _BINARIES.clear()


class _Source(NamedTuple):
    """What Triton's launcher asks of a kernel's source: the types of its arguments, by their places."""

    signature: dict[int, str]


def _loaded(launch: Launch, device: int) -> tuple[Any, Any]:
    """The binary on a device and what launches it, the same for all launches that differ in integers only."""
    target = driver.active.get_current_target()
    key = device, launch.kernel.fn.__name__, repr((*launch.specialised(target), launch.options))
    if key not in _BINARIES:
        compiled, source = compile(launch, target), _Source(dict(enumerate(of for of, _ in _flat(launch))))
        compiled._init_handles()
        _BINARIES[key] = compiled, driver.active.launcher_cls(source, compiled.metadata)
    return _BINARIES[key]


def _flat(launch: Launch) -> Iterator[tuple[str, Any]]:
    """Types and values of the arguments as the device gets them: tuples are opened and constants left out."""

    def flat(of: Any, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(of, tuple):
            for parts in zip(of, value, strict=True):
                yield from flat(*parts)
        elif of != "constexpr":
            yield of, value

    types, *_ = launch.specialised(driver.active.get_current_target())
    return flat(tuple(types.values()), tuple(launch.arguments.values()))
