"""Networks of others, made to attend where their windows lie: ``accelerate(model)``, whatever package it is of.

A module of theirs becomes one of ours by its class alone, a subclass that says where the windows are: no weight is
touched, and what stands in it is called as before. A file here for each
family of theirs is loaded when a model holds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TypeVar

from torch import nn
from torch.fx import GraphModule

from ..._extras import install
from ...backend import check_backend
from ...maps import check_module
from .families import FAMILIES, VERSIONS, Family
from .windows import OnMaps

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Finding:
    """What `accelerate` makes of a module.

    Attributes:
        name: of the module in the model.
        theirs: its class, as its package names it.
        taken: whether it runs on `partitioned_attention`.
        why: where it is not taken, the reason; where it is, what is left to theirs all the same, if anything.

    Examples:
        >>> print(Finding("layers.0.attn", "WindowAttention", taken=False, why="its attention is Linear"))
        layers.0.attn: WindowAttention left: its attention is Linear
    """

    name: str
    theirs: str
    taken: bool
    why: str = ""

    def __str__(self) -> str:
        kept = "taken" if self.taken else "left"
        return f"{self.name or '(itself)'}: {self.theirs} {kept}{': ' * bool(self.why)}{self.why}"


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Let every window, grid and shifted-window attention that we know run on `partitioned_attention`, in place.

    It is the same function: the same outputs and gradients to rounding. Nothing is copied but on a CPU, where "auto"
    has torch's scaled_dot_product_attention work between one copy of the map and another, and leaves to the package
    what that would be slower for (`report` says where).

    No weight is touched, so checkpoints load before and after. What stands in a block is called: adapters, hooks and
    parametrisations work as before, and a block whose attention is not its package's own stays as it is. Calling it
    again sets the backend anew; `restore` takes it back.

    Args:
        model: any network that holds attention of the packages in `VERSIONS`.
        backend: of `partitioned_attention`.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it that is known, or an unknown backend.
        ImportError: its package is of a version whose classes are others.

    Examples:
        >>> model = accelerate(torchvision.models.swin_t())  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 250, 320)).shape  # doctest: +SKIP
        torch.Size([1, 1000])
    """
    check_module("model", model)
    check_backend(backend)
    families = _families(model)
    blocks = [block for block in model.modules() for family in families if family.takes(block)]
    if not blocks:
        left = "".join(f"; {finding}" for finding in _findings(model, families))
        if any(isinstance(module, GraphModule) for module in model.modules()):
            left += "; a graph of torch.fx has functions in the place of modules: accelerate what it is traced from"
        raise ValueError(
            f"model must hold window attention of {', '.join(VERSIONS)}, got {type(model).__name__} without any{left}"
        )
    for family in families:
        for block in filter(family.takes, blocks):
            for module in (block, *family.attentions_of(block)):
                module.__class__ = family.ours(module)
            block.backend = backend  # type: ignore[assignment]
        for holder in filter(family.holds, model.modules()):
            holder.__class__ = family.ours(holder)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that is not accelerated stays as it is.

    Examples:
        >>> restore(accelerate(model)) is model  # doctest: +SKIP
        True
    """
    check_module("model", model)
    for family in _families(model):
        for module in model.modules():
            if theirs := family.theirs(module):
                module.__class__ = theirs
                module.__dict__.pop("backend", None)
    return model


def report(model: nn.Module) -> list[Finding]:
    """What of a model is accelerated and what is not, and why.

    Args:
        model: any network, accelerated or not.

    Returns:
        A finding for every module that is known, in the order of the model's modules.

    Examples:
        >>> print(*report(accelerate(model)), sep="\\n")  # doctest: +SKIP
        features.1.0.attn: ShiftedWindowAttention taken
    """
    check_module("model", model)
    return list(_findings(model, _families(model)))


def _findings(model: nn.Module, families: list[Family]) -> Iterator[Finding]:
    for name, module in model.named_modules():
        for family in families:
            if (finding := family.finding(module)) is not None:
                yield Finding(name, *finding)


def _families(model: nn.Module) -> list[Family]:
    """Of the classes that a model's modules are of, or derived from. Raises ImportError by versions."""
    theirs = {base.__module__ for kind in {type(module) for module in model.modules()} for base in kind.__mro__}
    names = dict.fromkeys(ours for module, ours in FAMILIES.items() if module in theirs)
    return [_family(name) for name in names]


def _family(name: str) -> Family:
    package = name.split("_")[0]
    try:
        family: Family = import_module(f"{__name__}.{name}").FAMILY
        _check_overrides(family)
    except (ImportError, AttributeError) as error:
        oldest, newest = VERSIONS[package]
        raise ImportError(
            f"accelerate knows {package} from {oldest} to {newest}, and other classes than those of the installed"
            f" {_version(package)} ({error}): {install('models')}"
        ) from error
    return family


def _version(package: str) -> str:
    """The installed one of what is imported by a name, which may be another than the package's."""
    return metadata.version(metadata.packages_distributions()[package][0])


def _check_overrides(family: Family) -> None:
    """Raises AttributeError where a method of ours takes the place of none of theirs, or has other parameters."""
    for theirs, ours in (family.blocks | family.holders).items():
        mixed_in = [base for base in ours.__mro__ if not issubclass(theirs, base)]
        common = {name: x for base in reversed(mixed_in) for name, x in vars(base).items() if hasattr(theirs, name)}
        for name, method in (common | vars(ours)).items():
            is_override = name == "forward" or (name not in family.added and not hasattr(OnMaps, name))
            if inspect.isfunction(method) and is_override:
                expected = inspect.signature(getattr(theirs, name))
                if inspect.signature(method).parameters.keys() != expected.parameters.keys():
                    raise AttributeError(f"{theirs.__name__}.{name} takes {expected}")
