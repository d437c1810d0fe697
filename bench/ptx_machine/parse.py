"""PTX text as instructions, registers, labels and parameters (PTX ISA: Syntax; State Spaces, Types, and Variables)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from bench.ptx_machine.faults import Unsupported

WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}  # bits of a register, by its type
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}  # bytes of a type, by its digits
STATEMENT = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|((?:[^;{}]|\{[^{}]*\})*);)")
GUARD = re.compile(r"@(!?)([\w$%]+)\s+")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"([\w$%.]+)(?:\+?(-?\w+))?")
SHARED = "global_smem"  # what Triton calls the shared memory of a launch; it begins at 0


@dataclass(frozen=True)
class Register:
    """A register: its name, its bits (1 for a predicate), and its row among those of as many bits."""

    name: str
    width: int
    row: int


@dataclass(frozen=True)
class Word:
    """An operand of one word that is no register: a number, a special register, a name, or "_"."""

    text: str


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Word
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; of one register it is the register."""

    parts: tuple[Register | Word, ...]


@dataclass(frozen=True)
class Pair:
    """d|p: a register, and a predicate beside it."""

    first: Register | Word
    second: Register | Word


Operand = Register | Word | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """A line of PTX: `@guard opcode operands`."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: str


@dataclass
class Module:
    """A kernel.

    Attributes:
        threads: of a program.
        registers: how many there are of each width.
        parameters: where each begins in the kernel's arguments.
        labels: the number of the instruction that each stands before.
        in_use: registers that units use beside the threads, as `warp_groups.in_use` finds them.
    """

    name: str
    threads: int
    registers: dict[int, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    in_use: dict[str, int] = field(default_factory=dict)


@dataclass
class _Scope:
    """A block in braces: names that it declares hide those outside of it."""

    number: int
    outer: _Scope | None
    registers: dict[str, Register] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)

    def register(self, name: str) -> Register | None:
        return self.registers.get(name) or (self.outer.register(name) if self.outer else None)

    def label(self, name: str) -> str:
        if name in self.labels:
            return f"{name}#{self.number}"
        if self.outer is None:
            raise Unsupported(f"a branch to {name}, which is not in the kernel")
        return self.outer.label(name)


@lru_cache(maxsize=256)
def parse(text: str) -> Module:
    """The one kernel of a text.

    Raises:
        Unsupported: what Triton does not write: several kernels, functions, variables, clusters.
    """
    entries = re.findall(r"\.entry (\w+)\(", text)
    threads = re.findall(r"\.(?:req|max)ntid (\d+)", text)
    if len(entries) != 1 or len(threads) != 1:
        raise Unsupported(f"a module must have one kernel of a known number of threads, got {entries} of {threads}")
    text = re.sub(r"//[^\n]*|(?m:^\s*\.(?:loc|pragma|file)[^\n]*)", "", text)
    head, _, body = text.partition("\n{")
    if unknown := re.findall(
        r"\.func\b.*|\.\w+ctapercluster.*|\.(?:shared|const)\b.*(?<!global_smem\[\];)$", head, re.M
    ):
        raise Unsupported(f"{entries[0]} has {unknown[0].strip()}")
    module, end = Module(entries[0], int(threads[0])), 0
    for bits, name in re.findall(r"\.param \.[a-z](\d+)[^,\n)]*? (\w+_param_\d+)", head):
        end += -end % SIZES[bits]
        module.parameters[name], end = end, end + SIZES[bits]
    _read(module, body)
    return module


def _read(module: Module, body: str) -> None:
    """Statements up to the brace that ends the kernel: names first, as labels may stand behind what branches there."""
    scope, scopes, position, found = _Scope(0, None), 1, 0, list[tuple[_Scope, str]]()
    while True:
        match = STATEMENT.match(body, position)
        if match is None:
            raise Unsupported(f"a statement that is none: {body[position : position + 60].strip()!r}")
        position, (brace, label, statement) = match.end(), match.groups()
        if brace == "{":
            scope, scopes = _Scope(scopes, scope), scopes + 1
        elif brace == "}" and scope.outer is None:
            break
        elif brace == "}":
            scope = scope.outer  # type: ignore[assignment]
        elif label:
            scope.labels.add(label)
            module.labels[f"{label}#{scope.number}"] = len(found)
        elif statement.strip().startswith(".reg"):
            _declare(module, scope, statement.strip())
        elif statement.strip():
            found.append((scope, " ".join(statement.split())))
    module.instructions = [_instruction(scope, line) for scope, line in found]


def _declare(module: Module, scope: _Scope, statement: str) -> None:
    """.reg .b32 %r<5>, or .reg .pred p, q."""
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
    if match is None or match[1] not in WIDTHS:
        raise Unsupported(statement)
    width = WIDTHS[match[1]]
    for name in re.split(r"\s*,\s*", match[2]):
        many = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
        for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            row = module.registers.setdefault(width, 0)
            scope.registers[each] = Register(each, width, row)
            module.registers[width] += 1


def _instruction(scope: _Scope, line: str) -> Instruction:
    guard, rest = GUARD.match(line), line
    if guard:
        rest = line[guard.end() :]
    opcode, _, operands = rest.partition(" ")
    if opcode in ("bra", "bra.uni"):
        found: tuple[Operand, ...] = (Word(scope.label(operands.strip())),)
    else:
        found = tuple(_operand(scope, part) for part in OPERAND.findall(operands))
    on = scope.register(guard[2]) if guard else None
    if guard and (on is None or on.width != 1):
        raise Unsupported(f"a guard that is no predicate: {line}")
    return Instruction(opcode, found, on, bool(guard and guard[1]), line)


def _operand(scope: _Scope, text: str) -> Operand:
    if text.startswith("{"):
        parts = tuple(_word(scope, part.strip()) for part in text[1:-1].split(","))
        return Vector(parts) if len(parts) > 1 else parts[0]
    if text.startswith("["):
        inside = text[1:-1].replace(" ", "")
        match = ADDRESS.fullmatch(inside)
        if match is None:
            raise Unsupported(f"an address {text}")
        return Address(_word(scope, match[1]), int(match[2] or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return Pair(_word(scope, first), _word(scope, second))
    return _word(scope, text)


def _word(scope: _Scope, text: str) -> Register | Word:
    return scope.register(text) or Word(text)
