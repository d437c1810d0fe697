"""Who is watching: compilers, transforms, modes that look at operators. PyTorch answers by private names, here only.

A call that nobody watches may take short cuts; one that somebody watches must be made of what can be seen. When PyTorch
moves these names, this is the file that breaks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

_PLAIN = {Tensor, torch.nn.Parameter}
Function = TypeVar("Function", bound=Callable[..., Any])


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has shapes and no memory, under a `FakeTensorMode` (compilers check for themselves)."""
    fake_tensor = sys.modules.get("torch._subclasses.fake_tensor")  # costs half a second to load; not loaded: none made
    return fake_tensor is not None and isinstance(x, fake_tensor.FakeTensor)


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, whose tensors are not what they seem."""
    return torch._C._are_functorch_transforms_active()


def has_modes() -> bool:
    """Whether a dispatch mode (fake tensors, FLOP counters, tracers) sees every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_differentiated(tensors: list[Tensor]) -> bool:
    """Whether autograd, in reverse or forward mode, or a transform may want a function of these tensors recorded."""
    return (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or is_differentiated_forward()


def is_differentiated_forward() -> bool:
    """Whether forward mode, or a transform, may want it."""
    return is_transformed() or forward_ad._current_level >= 0


def wants_operators(tensors: list[Tensor]) -> bool:
    """Whether somebody looks at operators: a mode, a profiler, a subclass of Tensor, or tensors without memory."""
    observed = has_modes() or torch.autograd._profiler_enabled()
    return observed or any(type(x) not in _PLAIN or x.is_meta for x in tensors)


def is_unwatched(tensors: Iterable[Tensor]) -> bool:
    """Whether results and gradients, in reverse mode, are all that anybody sees of a call on plain tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # what the functions above ask: this is on every call's way
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ) and _PLAIN.issuperset(map(type, tensors))


def autocast(x: Tensor) -> torch.dtype | None:
    """What autocast casts tensors on a tensor's device to, None where it is off."""
    if not torch._C._is_any_autocast_enabled():  # in a third of the time
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_inference() -> bool:
    """Whether a result is all that is wanted of a computation: no gradient, graph, cast or transform of it."""
    watched = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return not (watched or is_transformed() or has_modes() or wants_torch_operators())


def wants_torch_operators() -> bool:
    """Whether a graph is made for a runtime that knows PyTorch's own operators only: TorchScript, an ONNX exporter."""
    if torch.compiler.is_dynamo_compiling():
        return False
    onnx = sys.modules.get("torch.onnx")
    return torch.jit.is_tracing() or (onnx is not None and onnx.is_in_onnx_export())


def is_recorded() -> bool:
    """Whether `make_fx` or its like records operators: loops, strides and the batch would become constants."""
    if torch.compiler.is_dynamo_compiling():  # which knows sizes and strides as symbols
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_exported() -> bool:
    """Whether a graph is made that may run elsewhere: what is faster here is no reason to put it there."""
    return torch.compiler.is_exporting() or wants_torch_operators() or is_recorded()


def is_known_to_be(condition: Any) -> bool:
    """Whether a condition on sizes holds at all of those that a graph is made for; asking does not restrict them."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy, which whoever compiles has loaded

    return statically_known_true(condition)


def is_plain(module: torch.nn.Module, kind: type) -> bool:
    """Whether a module is exactly of a class (parametrised ones are not) and has no hooks: its weight says it all."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def is_proxy(x: Any) -> bool:
    """Whether `torch.fx` traces, and x stands for a value to come."""
    return isinstance(x, Proxy)


def leaf_of_fx(forward: Function) -> Function:
    """A module's forward that `torch.fx` does not look into: graphs hold a call of the module, as of `nn.Conv2d`."""

    @wraps(forward)
    def leaf(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        proxies = [x for x in args if is_proxy(x)]
        if not proxies:
            return forward(self, *args, **kwargs)
        tracer = proxies[0].tracer
        if not (name := tracer.path_of_module(self)):
            raise TypeError(f"{type(self).__name__} is one node to torch.fx: trace a network that holds it")
        return tracer.create_proxy("call_module", name, args, kwargs)

    # Dynamo keeps compiled frames, eight at most, by code object: one of its own for each class, as without this
    code = leaf.__code__  # type: ignore[attr-defined]  # a function, which mypy takes for a callable only
    leaf.__code__ = code.replace(co_name=forward.__name__)  # type: ignore[attr-defined]
    return leaf  # type: ignore[return-value]  # the same signature


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without the second and more of import that it takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def has_autocast(kind: str) -> bool:
    """Whether there is autocast for a kind of devices; Dynamo (torch 2.11) cannot look into the answer."""
    return torch.amp.is_autocast_available(kind)


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls action(module) once somebody imports a module, or now if somebody has: what is not needed is not loaded."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ActionOnImport(name, action))


class _ActionOnImport(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = execute_and_act
        return spec
