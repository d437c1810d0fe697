"""What Triton 3.6 cannot compile, found in the source of the kernels, for the Triton that is installed may be newer.

Triton 3.6.0 was tried with each of `WRONG`, and refuses to return None, also in a tuple. A parameter that is None and
comes back is refused as well, which the source of a function does not show: `bench/versions.sh` does.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from isa_triton.backend.kernels import backward, common, forward

JITTED: dict[str, Callable[..., Any]] = {  # what kernels are made of, as it was before `triton.jit`
    name: value.fn
    for module in (common, forward, backward)
    for name, value in vars(module).items()
    if type(value).__name__ in ("JITFunction", "InterpretedFunction")
}


def results(value: ast.expr | None) -> Iterator[ast.expr | None]:
    """What may come out of an expression, and the parts of tuples."""
    match value:
        case ast.IfExp(body=first, orelse=second):
            yield from (*results(first), *results(second))
        case ast.Tuple(elts=parts):
            yield value
            for part in parts:
                yield from results(part)
        case _:
            yield value


def returns_none(text: str) -> bool:
    """Whether a function says that it returns None, or returns nothing in one place and something in another."""
    returned = [node.value for node in ast.walk(ast.parse(textwrap.dedent(text))) if isinstance(node, ast.Return)]
    found = [part for value in returned for part in results(value)]
    literal = any(isinstance(part, ast.Constant) and part.value is None for part in found)
    return literal or (None in found and found != [None] * len(found))


@pytest.mark.parametrize("name", JITTED)
def test_no_function_of_a_kernel_returns_none(name: str) -> None:
    assert not returns_none(inspect.getsource(JITTED[name])), f"{name} returns None, which Triton 3.6 cannot compile"


def test_all_kernels_and_what_they_call_are_looked_at() -> None:
    """Those of other files too, which serve the host as they are."""
    kernels = {"forward_kernel", "backward_group_kernel", "backward_queries_kernel", "backward_keys_kernel"}
    assert {"kept", "dropped", "locate", "coordinates", *kernels} <= JITTED.keys()


WRONG = {
    "None": "if C:\n        return None\n    else:\n        return x",
    "None by a condition": "return None if C else x",
    "nothing": "if C:\n        return\n    return x",
    "None in a tuple": "if C:\n        return x, None\n    else:\n        return x, x",
}
RIGHT = {
    "a tuple of nothing": "if C:\n        return ()\n    else:\n        return (x,)",
    "no value at all": "if C:\n        return\n    tl.store(x, 1)",
    "no return": "tl.store(x, None)",
    "a comparison": "return x is None",
}


@pytest.mark.parametrize("body", [*WRONG.values(), *RIGHT.values()], ids=[*WRONG, *RIGHT])
def test_what_returns_none_is_told_from_what_does_not(body: str) -> None:
    wrong = returns_none(f"@triton.jit\ndef f(x, C: tl.constexpr):\n    {body}\n")
    assert wrong == (body in WRONG.values())
