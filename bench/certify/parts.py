"""The parts of a certificate, in their order: what each is, who runs it, and how long one of its items may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bench.certify.rows import Found, Item, Name, Setting

OTHERS_FAIL = "e"  # the part whose items are others' too: where theirs hang or crash that is no fault of ours


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        letter: its name.
        title: in words.
        file: of its CSV.
        columns: what the words of its items' names are.
        module: of this folder, or any by its whole name: which items there are, and how one is looked at, its functions
            say that `items` and `run` name.
        interpreted: whether kernels are, where there is no GPU; else they are compiled.
        limit: seconds of an item.
    """

    letter: str
    title: str
    file: str
    columns: tuple[str, ...]
    module: str
    interpreted: bool = True
    limit: float = 60.0
    items: str = "items"
    run: str = "run"

    def all(self, setting: Setting) -> list[Item]:
        """Its items."""
        return [Item(self.letter, name) for name in self._function(self.items)(setting)]

    def look(self, setting: Setting, name: Name) -> Found:
        """What comes out of one, or what it raises."""
        return self._function(self.run)(setting, *name)

    def _function(self, name: str) -> Callable[..., Any]:
        return getattr(import_module(self.module, __package__), name)


PARTS = {
    part.letter: part
    for part in (
        Part("a", "The device and its ceilings", "device.csv", ("what",), ".machine", interpreted=False, limit=300.0),
        Part("b", "Errors against fp64, as parts of the budget", "correctness.csv", ("shape", "dtype"), ".correct"),
        Part("c", "Streams, graphs, compilers, large maps", "behaviour.csv", ("what",), ".behave", limit=180.0),
        Part("d", "compute-sanitizer", "sanitizers.csv", ("check", "shape"), ".tools", limit=120.0),
        Part("e", "Times beside others", "times.csv", ("shape", "pass", "who"), ".speed", limit=90.0),
        Part("f", "Counters of the GPU beside what was counted", "counters.csv", ("shape", "pass"), ".tools",
             interpreted=False, limit=120.0, items="counters", run="count"),
        Part("g", "Predicted times", "predictions.csv", ("shape", "pass"), ".speed", interpreted=False, limit=120.0,
             items="predictions", run="predict"),
    )
}  # fmt: skip
