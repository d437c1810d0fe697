"""Who may import whom, and who does: ``python -m tests.house [CHECKOUT]`` prints the picture, as Mermaid draws it.

Floors go down: a file imports from lower ones, so there is no circle.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("isa_triton", "reference", "bench", "tests")

# A file may import what stands right of it, and nothing else of ours.
ARROWS = {
    "isa_triton._extras": set(),
    "isa_triton._tracing": set(),
    "isa_triton.axis": set(),
    "isa_triton.partition": {"isa_triton.axis"},
    "isa_triton.batch": {"isa_triton.axis", "isa_triton.partition"},
    "isa_triton.dropout": set(),
    "isa_triton.tiles": set(),
    "isa_triton.backend.contract": {"isa_triton.partition"},
    "isa_triton.backend.packed": {"isa_triton.backend.contract"},
    "isa_triton.backend.cosine": {"isa_triton.backend.contract"},
    "isa_triton.backend.plain": {
        "isa_triton.axis",
        "isa_triton.dropout",
        "isa_triton.partition",
        "isa_triton.backend.contract",
        "isa_triton.backend.cosine",
        "isa_triton.backend.packed",
    },
    "isa_triton.backend.eager": {
        "isa_triton.axis",
        "isa_triton.dropout",
        "isa_triton.partition",
        "isa_triton.backend.contract",
        "isa_triton.backend.cosine",
        "isa_triton.backend.packed",
    },
    "isa_triton.backend.kernels": {
        "isa_triton.axis",
        "isa_triton.dropout",
        "isa_triton.partition",
        "isa_triton.tiles",
        "isa_triton.backend.kernels",
    },
    "isa_triton.backend.triton": {
        "isa_triton._tracing",
        "isa_triton.partition",
        "isa_triton.tiles",
        "isa_triton.backend.contract",
        "isa_triton.backend.cosine",
        "isa_triton.backend.kernels",
    },
    "isa_triton.backend": {"isa_triton.backend"},
    "isa_triton.ops": {"isa_triton._tracing", "isa_triton.backend"},
    "isa_triton.replays": {"isa_triton._tracing", "isa_triton.partition", "isa_triton.backend", "isa_triton.ops"},
    "isa_triton.functional": {
        "isa_triton._tracing",
        "isa_triton.axis",
        "isa_triton.batch",
        "isa_triton.dropout",
        "isa_triton.partition",
        "isa_triton.backend",
        "isa_triton.ops",
        "isa_triton.replays",
    },
    "isa_triton.norm": {"isa_triton._tracing"},
    "isa_triton.maps": {
        "isa_triton._tracing",
        "isa_triton.axis",
        "isa_triton.partition",
        "isa_triton.backend",
        "isa_triton.functional",
        "isa_triton.norm",
    },
    "isa_triton.modules": {
        "isa_triton._tracing",
        "isa_triton.axis",
        "isa_triton.partition",
        "isa_triton.backend",
        "isa_triton.norm",
        "isa_triton.maps",
    },
    "isa_triton._state_dict": set(),
    "isa_triton.checkpoints": {"isa_triton._state_dict"},
    "isa_triton.inference": {
        "isa_triton._tracing",
        "isa_triton.backend",
        "isa_triton.norm",
        "isa_triton.maps",
        "isa_triton.modules",
    },
    "isa_triton.sharding": {
        "isa_triton._tracing",
        "isa_triton.axis",
        "isa_triton.partition",
        "isa_triton.norm",
        "isa_triton.maps",
        "isa_triton.modules",
        "isa_triton.sharding",
    },
    "isa_triton.models": {
        "isa_triton._extras",
        "isa_triton._state_dict",
        "isa_triton._tracing",
        "isa_triton.axis",
        "isa_triton.batch",
        "isa_triton.partition",
        "isa_triton.backend",
        "isa_triton.functional",
        "isa_triton.norm",
        "isa_triton.maps",
        "isa_triton.modules",
        "isa_triton.checkpoints",
        "isa_triton.models",
    },
    "isa_triton.__main__": {"isa_triton", "isa_triton._extras", "isa_triton.backend", "isa_triton.tiles"},
    "isa_triton": {
        "isa_triton.axis",
        "isa_triton.batch",
        "isa_triton.partition",
        "isa_triton.functional",
        "isa_triton.maps",
        "isa_triton.modules",
    },
    "reference": {"reference"},
    "bench": {"bench", "isa_triton", "reference"},
    "tests": {"tests", "bench", "isa_triton", "reference"},
}
WITHOUT_TORCH = {"isa_triton.axis", "isa_triton.partition", "isa_triton.backend.kernels", "isa_triton.tiles"}
TORCH_ONLY = {"reference"}


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every file of ours by the name under which it is imported."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(name: str, root: Path = ROOT) -> Iterator[str]:
    """Absolute names of everything that a file imports, at any depth."""
    path = modules(root)[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = (f"{origin}.{alias.name}" for alias in node.names)
            yield from names if origin in modules(root) else (origin,)


def is_within(name: str, parents: set[str]) -> bool:
    """Whether a name is one of the parents or lies inside one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def room(name: str) -> str:
    """Where a file lives, as the picture has it: a file or folder of the library, else the package."""
    package, *parts = name.split(".")
    return ".".join([package, *parts[:1]]) if package == "isa_triton" else package


def picture(root: Path = ROOT) -> set[tuple[str, str]]:
    """The arrows between rooms: who imports whom; the library as others see it is its rooms."""
    rooms = {room(name) for name in modules(root)}
    arrows = set()
    for name in modules(root):
        ours = {room(other) for other in imports(name, root) if other.split(".")[0] in PACKAGES}
        arrows |= {(room(name), other) for other in ours & rooms if other != room(name)}
    return {arrow for arrow in arrows if arrow[0].split(".")[0] == "isa_triton"} | {
        (a, b.split(".")[0]) for a, b in arrows if a.split(".")[0] != "isa_triton"
    }


def mermaid(root: Path = ROOT) -> str:
    """The picture in Mermaid's words."""
    short = {arrow: tuple(name.removeprefix("isa_triton.") for name in arrow) for arrow in picture(root)}
    return "\n".join(["graph TD", *sorted(f"    {a} --> {b}" for a, b in short.values())])


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT
    rooms = {name for arrow in picture(root) for name in arrow}
    print(mermaid(root), f"%% {len(rooms)} rooms, {len(picture(root))} arrows", sep="\n")
