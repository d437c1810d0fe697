"""Finding a tile: from the tiles that are shipped, step by step to neighbours that are predicted to be faster.

A neighbour has one block, chunk or number of warps doubled or halved, or one pipeline stage more or less. Those that
cannot fit are left out by arithmetic; the others are compiled and read, and the best of all goes on to its own
neighbours, until none is better. A binary with an offence (`verify.offences`) ranks behind all without. Facts of
binaries are kept, so an interrupted search goes on where it was, and a repeated one compiles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

from bench.records import write_text
from bench.tiles.compile import Launch, Problem, backward_launches, forward_launches
from bench.tiles.read import LIMITS, Binary
from bench.tiles.roofline import Machine, Prediction, predict
from bench.tiles.timing import kernel_seconds
from bench.tiles.verify import Case, Verifier, offences
from isa_triton import tiles
from isa_triton.backend.kernels.launch import in_one_kernel
from isa_triton.tiles import ARITHMETIC, BackwardTiles, Tile

KERNELS = {
    "forward": "forward_kernel",
    "group": "backward_group_kernel",
    "queries": "backward_queries_kernel",
    "keys": "backward_keys_kernel",  # dk and dv
    "dk": "backward_keys_kernel",  # in a pass of its own, as dv
    "dv": "backward_keys_kernel",
    "pairs": "backward_pairs_kernel",
}
FILED = {"dk": "keys", "dv": "values"}  # how `isa_triton.tiles.STEPS` calls them
LARGEST = {"block_m": 256, "block_n": 256, "block_k": 512, "block_v": 512, "num_warps": 16, "num_stages": 5}
GAIN = 0.01  # of a step, without which a search ends
FMA_PRODUCTS = 4096  # of a thread at once, without matrix units: with more a compiler takes minutes


@dataclass(frozen=True)
class Task:
    """A kernel that wants a tile: a key of `KERNELS`, for a problem on a target."""

    target: str
    problem: Problem
    step: str

    def launch(self, tile: Tile) -> Launch | None:
        """The launch with this tile, or None where the kernel does not serve the problem so."""
        if self.step == "forward":
            return forward_launches(self.target, self.problem, tile)[0]
        chosen = self._backward(tile)
        if (self.step == "group") != in_one_kernel(chosen, self.problem.partition):
            return None
        launches = backward_launches(self.target, self.problem, chosen)
        named = [launch for launch in launches if launch.name == KERNELS[self.step]]
        return named[-1 if self.step == "dv" else 0] if named else None  # dk is launched before dv

    def seconds(self, tile: Tile) -> float:
        """Median seconds on the GPU of this machine."""
        writes = {"keys": {"dk", "dv"}, "dk": {"dk"}, "dv": {"dv"}}.get(self.step, set())
        forward = tile if self.step == "forward" else tiles.lookup(self.target, "forward", *self._wanted)
        launch = self.launch(tile)
        assert launch is not None  # or there were nothing to time
        return kernel_seconds(self.problem, forward, self._backward(tile), launch.name, writes)

    @property
    def _wanted(self) -> tuple[int, int, str, int]:
        problem = self.problem
        return problem.key_width, problem.value_width, problem.dtype, problem.partition.tokens

    def _backward(self, tile: Tile) -> BackwardTiles:
        group, values = tile if self.step == "group" else None, tile if self.step in ("dk", "dv") else None
        return BackwardTiles(group, queries=tile, keys=tile, values=values, pairs=tile)

    def shipped(self) -> list[Tile]:
        """The tile that is shipped for this problem, if one is, and those for others as far as they may fit here."""
        step, arithmetic = FILED.get(self.step, self.step), ARITHMETIC[self.problem.dtype]
        try:
            found = [tiles.lookup(self.target, step, *self._wanted)]
        except LookupError:
            found = []
        others = [
            Tile(*entry["tile"])
            for entry in tiles._entries(self.target)
            if entry["step"] == step and entry["arithmetic"] == arithmetic and entry["tile"] is not None
        ]
        found += [tile for tile in map(self.clipped, others) if self.may_fit(tile)]
        return list(dict.fromkeys(map(self.clipped, found)))

    def clipped(self, tile: Tile) -> Tile:
        """The tile without blocks that are larger than what they cut."""
        tokens, key, value = map(
            _padded, (self.problem.partition.tokens, self.problem.key_width, self.problem.value_width)
        )
        m, n = (tokens, tokens) if self.step == "group" else (min(tile.block_m, tokens), min(tile.block_n, tokens))
        return Tile(m, n, min(tile.block_k, key), min(tile.block_v, value), tile.num_warps, tile.num_stages)

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """Tiles that differ from one in one field, and may fit."""
        for field, largest in LARGEST.items():
            value = getattr(tile, field)
            changes = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
            smallest = 16 if field.startswith("block") else 1
            for change in changes:
                other = tile._replace(**{field: change})
                if smallest <= change <= largest and self.clipped(other) == other and self.may_fit(other):
                    yield other

    def may_fit(self, tile: Tile) -> bool:
        """Whether what a program keeps in registers, and a stage of what it loads, could fit on a multiprocessor."""
        problem, limits = self.problem, LIMITS[self.target]
        m, n, k, v, warps, stages = tile
        tokens, of_scores = problem.partition.tokens, 3 * m * n // 2  # where a block has all keys or queries of a group
        key, value = _padded(problem.key_width), _padded(problem.value_width)
        kept = {  # fp32 numbers: sums, and scores or what becomes of them
            "forward": m * (n + v),
            "group": 2 * m * n,
            "queries": of_scores if tokens <= n else m * (n + key),
            "keys": of_scores if tokens <= m else n * (m + key + value),
            "dk": of_scores if tokens <= m else n * (m + key),
            "dv": m * n if tokens <= m else n * (m + value),
            "pairs": 2 * m * n,
        }[self.step]
        threads = warps * (64 if self.target.startswith("gfx9") else 32)
        per_thread = 448 if self.target.startswith("gfx") else 224  # of 512 and 255 registers: a few are for the rest
        chunk = problem.itemsize * max((m + n) * k, n * v if self.step == "forward" else (m + n) * v)
        matrix = problem.precision == "tf32" or problem.itemsize == 2 or self.target.startswith("gfx")
        return (
            (kept <= threads * per_thread or limits.tensor_columns > 0)
            and chunk * max(1, stages - 1) <= limits.shared_of_program
            and (matrix or m * n * max(k, v) <= threads * FMA_PRODUCTS)
        )


@dataclass(frozen=True)
class Finding:
    """What became of one tile."""

    task: Task
    tile: Tile
    gpu: str
    binary: Binary | None
    offences: list[str]
    prediction: Prediction | None
    measured: float | None = None  # seconds on a real GPU

    @property
    def seconds(self) -> float:
        """Measured or else predicted."""
        predicted = inf if self.prediction is None else self.prediction.seconds
        return predicted if self.measured is None else self.measured

    @property
    def rank(self) -> tuple[bool, bool, float, float]:
        """The smaller, the better: sound, measured, fast, and of equals the one whose units have less to do."""
        busy = inf if self.prediction is None else sum(self.prediction.busy.values())
        return bool(self.offences), self.measured is None, self.seconds, busy

    def as_dict(self) -> dict[str, Any]:
        problem, prediction, binary = self.task.problem, self.prediction, self.binary
        return {
            "target": self.task.target,
            "gpu": self.gpu,
            "step": self.task.step,
            "tokens": problem.partition.tokens,
            "key_width": problem.key_width,
            "value_width": problem.value_width,
            "dtype": problem.dtype,
            "tile": self.tile,
            "offences": self.offences,
            "measured_seconds": self.measured,
            "predicted_seconds": prediction and prediction.seconds,
            "bound": prediction and prediction.bound,
            "busy_seconds": prediction and prediction.busy,
            "registers": binary and binary.registers,
            "shared": binary and binary.shared,
            "programs": binary and binary.programs,
        }


class Searcher:
    """Compiles, reads and predicts tiles.

    Args:
        verifier: compiles and reads, and knows what it has read before.
        pool: where it does so.
        machine: the GPU that times are predicted for.
        found: called for each tile, as soon as it is known what becomes of it.
    """

    def __init__(
        self, verifier: Verifier, pool: Executor, machine: Machine, found: Callable[[Finding], Any] = lambda _: None
    ) -> None:
        self.verifier, self.pool, self.machine, self.found = verifier, pool, machine, found

    def search(self, task: Task, measured: int = 0) -> list[Finding]:
        """All tiles that were tried, the best first; none where the kernel does not serve the problem.

        Args:
            measured: so many of the best are timed on the GPU of this machine, and the times decide.
        """
        tried: dict[Tile, Finding] = {}
        candidates = task.shipped()
        while candidates and (found := self.findings(task, candidates)):
            before = min((finding.rank for finding in tried.values()), default=None)
            tried |= {finding.tile: finding for finding in found}
            best = min(tried.values(), key=lambda finding: finding.rank)
            gained = before is None or before[0] > bool(best.offences) or best.seconds < (1 - GAIN) * before[2]
            candidates = [tile for tile in task.neighbours(best.tile) if tile not in tried] if gained else []
        ranked = sorted(tried.values(), key=lambda finding: finding.rank)
        timed = [replace(finding, measured=task.seconds(finding.tile)) for finding in ranked[:measured]]
        return sorted(timed + ranked[measured:], key=lambda finding: finding.rank)

    def findings(self, task: Task, candidates: Iterable[Tile]) -> list[Finding]:
        """What becomes of each tile, in their order; tiles with which the kernel is not launched are left out."""
        launches = {tile: launch for tile in candidates if (launch := task.launch(tile)) is not None}
        cases = {tile: Case(task.target, task.step, task.problem, launch) for tile, launch in launches.items()}
        known = {tile: old for tile, case in cases.items() if (old := self.verifier.known(case)) is not None}
        pending = {self.pool.submit(self.verifier, cases[tile]): tile for tile in cases if tile not in known}
        come = ((pending[done], done.result()) for done in as_completed(pending))
        found: dict[Tile, Finding] = {}
        for tile, facts in chain[tuple[Tile, Binary | str]](known.items(), come):
            found[tile] = self._finding(task, tile, cases[tile], facts)
            self.found(found[tile])
        return [found[tile] for tile in cases]

    def _finding(self, task: Task, tile: Tile, case: Case, facts: Binary | str) -> Finding:
        if isinstance(facts, str):
            return Finding(task, tile, self.machine.name, None, [facts], None)
        prediction = predict(case.launch, task.problem, facts, self.machine) if facts.programs else None
        return Finding(task, tile, self.machine.name, facts, offences(case, facts), prediction)


PASSES = {"forward": ("forward",), "backward": ("group", "queries", "keys", "dk", "dv", "pairs")}
PLANS = (("forward",), ("group",), ("queries", "keys", "pairs"), ("queries", "dk", "dv", "pairs"))


def choose(tried: Mapping[str, list[Finding]]) -> list[Finding]:
    """The kernels of a pass, each with its best tile: of the ways to do the pass the fastest one.

    Args:
        tried: for each step of the pass what `search` returned.
    """
    plans = []
    for plan in PLANS:
        if all(tried.get(step) for step in plan if step != "pairs"):  # which only a bias needs
            plans.append([tried[step][0] for step in plan if tried.get(step)])
    return min(plans, key=lambda plan: (any(f.offences for f in plan), sum(f.seconds for f in plan)))


# -- the files ---------------------------------------------------------------------------------------------------------


def write(chosen: Iterable[Finding]) -> Path:
    """Put tiles and their evidence into the file of their target; entries for the same problem are replaced."""
    chosen = list(chosen)
    path = tiles.FOLDER / f"{chosen[0].task.target}.json"
    entries = [*json.loads(path.read_text()), *(entry for finding in chosen for entry in _entries(finding))]
    latest = {tuple(entry[name] for name in _LIMITS): entry for entry in entries}
    for finding in chosen:  # what one dtype had to itself would go before what is written now
        step, _, *limits = (_entries(finding)[0][name] for name in _LIMITS)
        latest.pop((step, finding.task.problem.dtype, *limits), None)
    lines = [f"  {json.dumps(entry)}" for entry in sorted(latest.values(), key=_order)]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    tiles._entries.cache_clear()
    tiles._lookup.cache_clear()
    return path


_LIMITS = ("step", "arithmetic", "key_width", "value_width", "tokens")


def _entries(finding: Finding) -> list[dict[str, Any]]:
    """What a file says of a choice: the tile serves groups of up to the next power of two of tokens."""
    task, prediction = finding.task, finding.prediction
    problem = task.problem
    serves = {
        "arithmetic": ARITHMETIC[problem.dtype],
        "key_width": problem.key_width,
        "value_width": problem.value_width,
        "tokens": _padded(problem.partition.tokens),
    }
    evidence = {
        "us": round(1e6 * finding.seconds, 1),
        "how": "predicted" if finding.measured is None else "measured",
        "gpu": finding.gpu,
        "maps": [problem.maps, *problem.partition.size],
        "bound": prediction.bound if prediction else None,
        "registers": finding.binary.registers if finding.binary else None,
    }
    found: list[dict[str, Any]] = [
        {"step": FILED.get(task.step, task.step), **serves, "tile": finding.tile, "evidence": evidence}
    ]
    if task.step == "keys":  # dv comes with dk
        found.append({"step": "values", **serves, "tile": None})
    return found


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    arithmetic = "16-bit", "tf32", "ieee"
    limits = (entry[name] or inf for name in ("key_width", "value_width", "tokens"))
    kind = ARITHMETIC.get(entry["arithmetic"], entry["arithmetic"])
    return arithmetic.index(kind), tiles.STEPS.index(entry["step"]), *limits


def _padded(width: int) -> int:
    """The next power of two, and what matrix units take at least."""
    return max(16, 1 << (width - 1).bit_length())
