"""Search the tiles of a pass: compile, read, predict, and go on to better neighbours until there are none.

Times are PREDICTED from the machine code (bench/tiles/roofline.py) unless --measure times the best on this machine's
GPU. An interrupted search continues where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import records
from bench.arguments import positive
from bench.tiles import options
from bench.tiles.binaries import Binaries, Binary
from bench.tiles.compile import Problem
from bench.tiles.roofline import Prediction, predict
from bench.tiles.steps import FILED, PASSES, Task
from isa_triton import tiles
from isa_triton.backend.kernels.launch import padded
from isa_triton.tiles import ARITHMETIC, Tile

GAIN = 0.01  # of a step, without which a search ends
SHOWN = 5  # tiles of each kernel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser)
    options.add_problem(parser)
    add = parser.add_argument
    add("--shapes", type=Path, metavar="FILE", help="instead of one problem those of a JSON file: a list of objects "
        'like {"pass": "forward", "tokens": 64, "key_width": 256, "value_width": 512}')  # fmt: skip
    add("--write", action="store_true", help="put the choice and its evidence into isa_triton/tiles/TARGET.json")
    add("--measure", type=positive, default=0, metavar="N", help="time the N best of each kernel on this machine's GPU")
    add("--json", type=Path, metavar="FILE", help="write all that was tried there")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, problems, console = options.machine(args), _problems(args), options.wide_console()
    if args.measure and not torch.cuda.is_available():
        raise argparse.ArgumentError(None, "--measure needs a GPU on this machine, and torch finds none")
    rows = list[dict[str, Any]]()
    with options.compilers(args) as binaries, options.progress(console) as bar:
        for problem, pass_ in problems:
            console.print(f"{pass_} on {gpu.name} ({gpu.target}): {problem}", highlight=False)
            tried = dict[str, list[Finding]]()
            for step in PASSES[pass_]:
                if any(not finding.offences for finding in tried.get("group", [])):
                    break  # one kernel reads every tensor once, where several would read them again
                line = bar.add_task(step, total=None)
                binaries.advance = partial(bar.advance, line)
                tried[step] = search(Task(gpu, problem, step), binaries, args.measure)
                bar.update(line, total=len(tried[step]), visible=bool(tried[step]))
            chosen = choose(tried)
            for step, found in tried.items():
                if found:
                    console.print(_table(step, found, chosen))
                    rows += [finding.as_dict() for finding in found]
            total = sum(finding.seconds for finding in chosen)
            how = "measured" if args.measure else "PREDICTED"
            kernels = ", ".join(f"{finding.task.step} {tuple(finding.tile)}" for finding in chosen)
            console.print(f"chosen: {kernels}; {how} {1e6 * total:.1f} us together", highlight=False, soft_wrap=True)
            if args.write:
                console.print(f"wrote {write(chosen)}", highlight=False)
    if args.json is not None:
        options.write_json(args.json, rows)


def _problems(args: argparse.Namespace) -> list[tuple[Problem, str]]:
    if args.shapes is None:
        return [(options.problem(args), args.pass_)]
    try:
        entries = json.loads(args.shapes.read_text())
        passes = [entry.pop("pass", "forward") for entry in entries]
        return [(options.make_problem(**entry), pass_) for entry, pass_ in zip(entries, passes, strict=True)]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise argparse.ArgumentError(None, f"--shapes {args.shapes} is not a list of problems: {error}") from error


def _table(step: str, findings: list[Finding], chosen: list[Finding]) -> Table:
    columns = ("queries", "keys", "K chunk", "V chunk", "warps", "stages", "us", "measured", "bound", "regs", "shared",
               "programs", "waves", "offences")  # fmt: skip
    rows, styles = [], []
    for finding in findings[:SHOWN]:
        binary, prediction = finding.binary, finding.prediction
        facts: list[object] = [""] * 7
        if binary is not None and prediction is not None:
            measured = "" if finding.measured is None else f"{1e6 * finding.measured:.1f}"
            facts = [f"{1e6 * prediction.seconds:.1f}", measured, prediction.bound, binary.registers,
                     f"{binary.shared / 1024:.0f}K", binary.programs, prediction.waves]  # fmt: skip
        rows.append([*finding.tile, *facts, "; ".join(finding.offences)])
        styles.append("bold" if finding in chosen else "red" if finding.offences else None)
    title = f"{step}: {len(findings)} tiles tried, the best"
    return records.table(title, columns, rows, words=("bound", "offences"), styles=styles)


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What became of one tile."""

    task: Task
    tile: Tile
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
        task, problem, prediction = self.task, self.task.problem, self.prediction
        return {
            "target": task.gpu.target,
            "gpu": task.gpu.name,
            "step": task.step,
            "tokens": problem.partition.tokens,
            **{name: getattr(problem, name) for name in ("key_width", "value_width", "dtype")},
            "tile": self.tile,
            "offences": self.offences,
            "measured_seconds": self.measured,
            "predicted_seconds": prediction and prediction.seconds,
            "bound": prediction and prediction.bound,
            "busy_seconds": prediction and prediction.busy,
            **{name: getattr(self.binary, name, None) for name in ("registers", "shared", "programs")},
        }


def search(task: Task, binaries: Binaries, measured: int = 0) -> list[Finding]:
    """All tiles that were tried, the best first; none where the kernel does not serve the problem.

    From the tiles that are shipped the search goes step by step to neighbours that are predicted to be faster: one
    block, chunk or number of warps doubled or halved, or one pipeline stage more or less. Those that cannot fit are
    left out by arithmetic; the others are compiled and read, and the best of all goes on to its own neighbours, until
    none is better. A binary with an offence (`binaries.offences`) ranks behind all without.

    Args:
        measured: so many of the best are timed on the GPU of this machine, and the times decide.
    """
    tried: dict[Tile, Finding] = {}
    candidates = task.shipped()
    while candidates and (found := findings(task, candidates, binaries)):
        before = min((finding.rank for finding in tried.values()), default=None)
        tried |= {finding.tile: finding for finding in found}
        best = min(tried.values(), key=lambda finding: finding.rank)
        gained = before is None or before[0] > bool(best.offences) or best.seconds < (1 - GAIN) * before[2]
        candidates = [tile for tile in task.neighbours(best.tile) if tile not in tried] if gained else []
    ranked = sorted(tried.values(), key=lambda finding: finding.rank)
    timed = [replace(finding, measured=task.seconds(finding.tile)) for finding in ranked[:measured]]
    return sorted(timed + ranked[measured:], key=lambda finding: finding.rank)


def findings(task: Task, candidates: Iterable[Tile], binaries: Binaries) -> list[Finding]:
    """What becomes of each tile, in their order; tiles with which the kernel is not launched are left out."""
    launches = {tile: launch for tile in candidates if (launch := task.launch(tile)) is not None}
    found = []
    for tile, (launch, binary, offences) in zip(launches, binaries.verdicts(launches.values()), strict=True):
        prediction = predict(launch, binary, task.gpu) if binary is not None and binary.programs else None
        found.append(Finding(task, tile, binary, offences, prediction))
    return found


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


def write(chosen: Sequence[Finding]) -> Path:
    """Put tiles and their evidence into the file of their target; entries for the same problem are replaced."""
    path, key = tiles.FOLDER / f"{chosen[0].task.gpu.target}.json", itemgetter(*_KEY)
    entries = {key(entry): entry for entry in json.loads(path.read_text())}
    for finding in chosen:
        for entry in _entries(finding):  # what the dtype had to itself would go before it
            entries.pop(key({**entry, "arithmetic": finding.task.problem.dtype}), None)
            entries[key(entry)] = entry
    lines = [f"  {json.dumps(entry)}" for entry in sorted(entries.values(), key=_order)]
    records.write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    tiles._entries.cache_clear()
    tiles._lookup.cache_clear()
    return path


_KEY = ("step", "arithmetic", "key_width", "value_width", "tokens")


def _entries(finding: Finding) -> list[dict[str, Any]]:
    """What a file says of a choice: the tile serves groups of up to the next power of two of tokens."""
    step, problem = FILED.get(finding.task.step, finding.task.step), finding.task.problem
    limits = problem.key_width, problem.value_width, padded(problem.partition.tokens)
    serves = dict(zip(_KEY, (step, ARITHMETIC[problem.dtype], *limits), strict=True))
    evidence = {
        "us": round(1e6 * finding.seconds, 1),
        "how": "predicted" if finding.measured is None else "measured",
        "gpu": finding.task.gpu.name,
        "maps": [problem.maps, *problem.partition.size],
        "bound": getattr(finding.prediction, "bound", None),
        "registers": getattr(finding.binary, "registers", None),
    }
    dv = [{**serves, "step": "values", "tile": None}] if finding.task.step == "keys" else []  # which comes with dk
    return [{**serves, "tile": finding.tile, "evidence": evidence}, *dv]


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    arithmetic = "16-bit", "tf32", "ieee"
    limits = (entry[name] or inf for name in ("key_width", "value_width", "tokens"))
    kind = ARITHMETIC.get(entry["arithmetic"], entry["arithmetic"])
    return arithmetic.index(kind), tiles.STEPS.index(entry["step"]), *limits
