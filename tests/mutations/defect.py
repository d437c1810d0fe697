"""A mistake: where, what, and who guards the place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """An edit that must not go unseen.

    Attributes:
        name: what is wrong.
        file: from the root of the checkout.
        right: a text that stands in the file once.
        wrong: what is planted in its place.
        test: who guards the place, by its pytest name below tests/.
        argued: why it may survive, or nothing.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str
    argued: str = ""

    @property
    def tests(self) -> list[str]:
        """The names in `test`, which may be several, behind each other."""
        return [f"test_{name}".strip() for name in f" {self.test}".split(" test_")[1:]]
