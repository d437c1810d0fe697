"""Kernels with one line of their PTX changed: what a wrong kernel would be, and whether it is noticed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.ptx_machine import machine
from bench.ptx_machine.check import errors
from bench.ptx_machine.driver import Device, installed
from bench.ptx_machine.faults import Fault
from bench.ptx_machine.problems import Work
from bench.ptx_machine.results import SURVIVED, MutantRow


class Change(NamedTuple):
    """A way to change a line that a pattern finds."""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]


def _further(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) + 1}"


def _moved(match: re.Match[str]) -> str:
    return f"{match[1]}[{match[2]}+{int(match[3] or 0) + 16}]"


def _doubled(match: re.Match[str]) -> str:
    return f"{match[1]}{2 * int(match[2])}"


CHANGES = (
    Change("barrier removed", r"^\s*bar\.sync[^;]*;", ""),
    Change("warp barrier removed", r"^\s*bar\.warp\.sync[^;]*;", ""),
    Change("wait for copies one group later", r"(cp\.async\.wait_group\s+)(\d+)", _further),
    Change("wait for products one group later", r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)", _further),
    Change("wgmma.fence removed", r"^\s*wgmma\.fence[^;]*;", ""),
    Change("proxy fence removed", r"^\s*fence\.proxy[^;]*;", ""),
    Change("wait for tensor memory removed", r"^\s*tcgen05\.wait[^;]*;", ""),
    Change("commit removed", r"^\s*@%p\d+ tcgen05\.commit[^;]*;", ""),
    Change("guard of a load or store dropped", r"@!?%p\d+ (?=(?:ld|st)\.global)", ""),
    Change("copy of all its bytes", r"(cp\.async\.c[ag]\.shared\.global [^;]*), %r\d+(?=\s*;)", r"\1"),
    Change("shared address 16 bytes further",
           r"((?:(?:ld|st)\.shared|(?:ld|st)matrix|cp\.async\.c)[^\[]*)\[\s*(%r\d+)(?:\s*\+\s*(\d+))?\s*\]", _moved),
    Change("registers of a fragment exchanged", r"(mma\.sync\S*\s+\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
    Change("less than for at most", r"(?<=setp\.)le(?=\.s)", "lt"),
    Change("at most for less than", r"(?<=setp\.)lt(?=\.s)", "le"),
    Change("stride doubled", r"((?:mul|mad)\.wide\.s32[^;]*, )(\d+)(?=[,;])", _doubled),
    Change("shift one further", r"(sh[lr]\.b32\s+%r\d+, %r\d+, )(\d+)", _further),
    Change("minimum for maximum", r"(?<=\s)max(?=\.f32|\.NaN\.f32)", "min"),
    Change("difference for sum", r"(?<=\s)add(?=\.(?:s32|s64|f32)\s)", "sub"),
    Change("lanes of a shuffle twice as far", r"(shfl\.sync\.bfly\.b32[^;]*, )(\d+)(?=, 31)", _doubled),
    Change("product begins anew", r"(wgmma\.mma_async[^;]*, )%p\d+(?=, 1, 1)", r"\g<1>0"),
    Change("shared matrix one piece further", r"(add\.s64\s+%rd\d+, %rd\d+, )(4611\d+)", _further),
)  # fmt: skip


class Mutant(NamedTuple):
    """A line of a kernel's text, changed."""

    text: str
    line: int
    change: str
    before: str
    after: str

    def apply(self, text: str) -> str:
        """The text, if it is this kernel's with the line changed."""
        if text != self.text:
            return text
        lines = text.split("\n")
        lines[self.line] = self.after
        return "\n".join(lines)


def possible(text: str) -> dict[str, list[Mutant]]:
    """All mutants of a kernel, by the name of the change."""
    found: dict[str, list[Mutant]] = {}
    for number, line in enumerate(text.split("\n")):
        for change in CHANGES:
            after = re.sub(change.pattern, change.replacement, line, count=1)
            if after != line:
                found.setdefault(change.name, []).append(Mutant(text, number, change.name, line, after))
    return found


def drawn(texts: list[str], count: int, seed: str) -> Iterator[Mutant]:
    """Some mutants of some kernels: of every change in turn, as far as there are any."""
    chosen, left = random.Random(seed), dict[str, list[Mutant]]()
    for text in texts:
        for name, mutants in possible(text).items():
            left.setdefault(name, []).extend(mutants)
    names = chosen.sample(sorted(left), len(left))
    while left and count:
        for name in [name for name in names if name in left][:count]:
            yield left[name].pop(chosen.randrange(len(left[name])))
            count -= 1
            if not left[name]:
                del left[name]


def run(work: Work, count: int, seed: int) -> list[MutantRow]:
    """Some mutants of the kernels of a check, and whether it notices them.

    Raises:
        Fault: the kernels are wrong as they are.
    """
    with installed(work.target) as device:
        texts = dict[str, None]()
        device.change = lambda text: texts.setdefault(text) or text
        if max(errors(work).values()) > 1:
            raise Fault("the kernels are wrong as they are")
        right = _notes(device)
        return [
            _row(work, mutant, _outcome(work, device, mutant, right))
            for mutant in drawn(list(texts), count, f"{seed} {work.name} {work.arithmetic}")
        ]


def _notes(device: Device) -> dict[str, int]:
    """What was noted of all executions, which are forgotten."""
    found = sum((each.notes for each in device.executions), Counter[str]())
    device.executions.clear()
    return found


def _outcome(work: Work, device: Device, mutant: Mutant, right: dict[str, int]) -> str:
    device.change = mutant.apply
    try:
        parts = errors(work)
    except Exception as error:  # whatever the change leads to
        device.executions.clear()
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return re.sub(r"(?<=: )\w+_kernel: ", "", said)[:120]
    if (notes := _notes(device)) != right:
        return f"noted: {', '.join(notes) or 'less'}"
    wrong = [name for name, part in parts.items() if not part <= 1]
    return f"wrong {', '.join(wrong)}" if wrong else SURVIVED


def _row(work: Work, mutant: Mutant, outcome: str) -> MutantRow:
    kernel = machine.parse(mutant.text).name
    before, after = (" ".join(line.split()) for line in (mutant.before, mutant.after))
    said = mutant.change, mutant.line, before, after, outcome
    return MutantRow(work.target, work.name, work.arithmetic, kernel, *said)
