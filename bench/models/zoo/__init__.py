"""Networks that `isa_triton.models.accelerate` takes, tiny and with default arguments: one file for each package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from isa_triton._extras import install

Size = tuple[int, ...]
APART = {"aurora": "microsoft-aurora", "boltz": "boltz", "sam2": "sam2"}  # they pin too much for an extra of ours
PACKAGES = (
    *APART,
    "monai",
    "spandrel",
    "timm",
    "timm_hiera",
    "torchvision",
    "transformers",
    "transformers_hiera",
    "transformers_qwen",
)


@dataclass(frozen=True)
class Entry:
    """A network of a package.

    Attributes:
        package, name: what it is.
        make: builds it, tiny.
        inputs: what it is called with on an image, video or volume of a size, in fp64; the first is differentiated.
        sizes: three of them, of which windows do not divide the maps of at least one.
        result: what is differentiated of what it returns.
        is_graph: whether tests compile and export it as a whole: not where theirs cannot be, nor where its blocks are
            those of another entry.
    """

    package: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Size], tuple[Any, ...]]
    sizes: tuple[Size, ...]
    result: Callable[[Any], Tensor] = lambda y: y
    is_graph: bool = True

    def __str__(self) -> str:
        return f"{self.package} {self.name}"


def entries(package: str) -> tuple[Entry, ...]:
    """Those of a package. Raises ImportError where it is missing, with what installs it."""
    try:
        module = import_module(f"{__name__}.{package}")
    except ModuleNotFoundError as error:
        apart = f"pip install --no-deps {APART.get(package)}, and what it imports"
        how = apart if package in APART else install("models")
        raise ImportError(f"{error.name} is not installed: {how}") from error
    found: tuple[Entry, ...] = module.ENTRIES
    return found
