"""Search the tiles of a pass: compile, read, predict, and go on to better neighbours until there are none.

Times are PREDICTED from the machine code (bench/tiles/roofline.py) unless --measure times the best on this machine's
GPU. An interrupted search continues where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench import measure, records
from bench.arguments import positive
from bench.terminal import Table, Terminal
from bench.tiles import grid, options, page
from bench.tiles.binaries import LIMITS, Binaries, Binary, multiplies_fp32, occupancy
from bench.tiles.compile import (
    FILED,
    PASSES,
    TILE,
    Launch,
    Problem,
    Tensors,
    backward_launches,
    format_tile,
    forward_launches,
    gpu_target,
    named,
    pass_launches,
    shipped_entry,
)
from bench.tiles.roofline import Machine, Prediction, predict
from isa_triton import tiles
from isa_triton.backend.kernels import launch, plan
from isa_triton.backend.kernels.plan import padded
from isa_triton.backend.triton import target_of
from isa_triton.tiles import ARITHMETIC, BackwardTiles, Entry, Tile

LARGEST = {"block_m": 256, "block_n": 256, "block_k": 512, "block_v": 512, "num_warps": 16, "num_stages": 5}
ROUNDS = 50  # of a measurement
FMA_PRODUCTS = 4096  # of a thread at once, without matrix units: with more a compiler takes minutes
GAIN = 0.01  # of a step, without which a search ends
SHOWN = 5  # tiles of each kernel
SHORT = dict(zip(TILE, ("M", "N", "K", "V", "warps", "stages"), strict=True))  # for narrow tables
NARROW = 10  # columns of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_problem(parser)
    add = parser.add_argument
    add("--problems", type=Path, metavar="FILE", help="instead of one those of a JSON file: a list of objects "
        'like {"pass": "forward", "tokens": 64, "key_width": 256, "value_width": 512}')  # fmt: skip
    add("--write", action="store_true", help="put the choice and its evidence into isa_triton/tiles/TARGET.json")
    add("--measure", type=positive, default=0, metavar="N", help="time the N best of each kernel on this machine's GPU")
    add("--json", type=Path, metavar="FILE", help="write all that was tried there")
    add("--html", type=Path, metavar="FILE", help="write a page there: every tile as a point, and in tables to sort")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, problems, said = options.machine(args), _problems(args), Terminal(args)
    if args.measure and not torch.cuda.is_available():
        raise argparse.ArgumentError(None, "--measure needs a GPU on this machine, and torch finds none")
    if args.measure and (here := target_of(torch.device("cuda"))) != gpu.target:
        raise argparse.ArgumentError(None, f"--measure times on this machine's GPU, which is {here}, not {gpu.target}")
    if args.write:
        said.say(f"Entries go into {tiles.FOLDER}")
    searches, written = list[Search](), list[Path]()
    with options.compilers(args, said) as binaries:
        for problem, pass_ in problems:
            searches.append(search_pass(gpu, problem, pass_, binaries, args.measure))
            if args.write:
                written = [write(searches[-1].chosen)]
    said.show(*(table for search in searches for table in _tables(search, said.verbose)))
    for search in searches:
        for what, finding in (*(("shipped", f) for f in search.shipped), *(("chosen", f) for f in search.chosen)):
            if finding.violations:
                said.say(f"{what} for {finding.task.step}: {'; '.join(finding.violations)}", style="red")
    if args.json is not None:
        options.write_json(args.json, [row for search in searches for row in search.as_dicts()])
    if args.html is not None:
        records.write_text(args.html, page.html(searches))
    *lines, last = (search.result for search in searches)
    said.say(*lines)
    said.end(last, *written, *filter(None, (args.json, args.html)))


def _problems(args: argparse.Namespace) -> list[tuple[Problem, str]]:
    if args.problems is None:
        return [(options.problem(args), args.pass_)]
    if options.given(args):
        raise argparse.ArgumentError(None, f"--problems says all of its own, and takes no {options.given(args)}")
    try:
        given = [(entry.pop("pass", "forward"), entry) for entry in json.loads(args.problems.read_text())]
        found = [(options.make_problem(**entry), pass_) for pass_, entry in given if PASSES[pass_]]
    except (OSError, ValueError, TypeError, AttributeError, KeyError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentError(None, f"--problems {args.problems} is not a list of problems: {error}") from error
    if not found:
        raise argparse.ArgumentError(None, f"--problems {args.problems} is empty")
    return found


def _tables(search: Search, verbose: bool) -> Iterator[Table]:
    """The best tiles of each kernel, and the shipped one."""
    for step, found in search.tried.items():
        shown = [*found[:SHOWN], *(f for f in found[SHOWN:] if search.is_shipped(f))]
        facts = [search.facts(finding) for finding in shown]
        columns = [SHORT.get(name, name) for name in facts[0]][: None if verbose else NARROW]
        styles = ["bold" if f in search.chosen else "red" if f.violations else None for f in shown]
        title = f"{search.title}; {step}: {len(found)} tiles tried, the best and the shipped"
        rows = [list(row.values())[: len(columns)] for row in facts]
        yield Table(title, columns, rows, words=("bound", "violations"), styles=styles)


# -- a step and its tiles ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A kernel that wants a tile: one of `STEPS`, for a problem on a GPU."""

    gpu: Machine
    problem: Problem
    step: str

    def launch(self, tile: Tile) -> Launch | None:
        """The launch with this tile, or None where the kernel does not serve the problem so."""
        if self.step == "forward":
            return forward_launches(self.gpu.target, self.problem, tile)[0]
        launches = backward_launches(self.gpu.target, self.problem, self.backward(tile))
        return next((launch for launch in launches if launch.step == self.step), None)

    def backward(self, tile: Tile) -> BackwardTiles:
        """Tiles with which the backward pass has this step, with this tile."""
        group, values = tile if self.step == "group" else None, tile if self.step in ("dk", "dv") else None
        columns = tile if self.step == "columns" else None
        return BackwardTiles(group, queries=tile, keys=tile, values=values, pairs=tile, columns=columns)

    def seconds(self, tile: Tile) -> float:
        """Median seconds on the GPU of this machine, for a tile that serves the problem, on normal numbers.

        What other kernels of the pass write for this one comes from those that are shipped.
        """
        chosen = self.launch(tile)
        assert chosen is not None
        tensors = Tensors(self.problem, lambda x: torch.randn(x.shape, device="cuda", dtype=x.dtype))
        tensors.forward(tiles.lookup(self.gpu.target, "forward", *self.problem.sizes, self.problem.bias))
        shipped = tiles.backward(self.gpu.target, *self.problem.sizes, self.problem.bias)
        if self.step in PASSES["backward"] and not plan.in_one_kernel(shipped, self.problem.partition):
            tensors.backward(shipped, tensors.partials(shipped))
        if self.step == "forward":
            given = dict(zip(plan.FORWARD, tensors.of_forward(chosen.keeps_bias), strict=True))
        else:
            partials = tensors.partials(self.backward(tile))
            given = dict(zip(plan.BACKWARD, tensors.of_backward(partials), strict=True))
        run = launch.bind(chosen.planned, given)
        return measure.seconds({"kernel": lambda: run() or ()}, rounds=ROUNDS, device="cuda")["kernel"]

    @property
    def entry(self) -> Entry | None:
        """What is shipped for this step of the problem, if anything is."""
        return shipped_entry(self.gpu.target, self.step, self.problem)

    def shipped(self) -> list[Tile]:
        """The tile that is shipped for this problem, if one is, and those for others as far as they may fit here."""
        step, arithmetic = FILED.get(self.step, self.step), ARITHMETIC[self.problem.dtype]
        others = (
            Tile(*entry["tile"])
            for entry in tiles._entries(self.gpu.target)
            if (entry["step"], entry["arithmetic"]) == (step, arithmetic) and entry["tile"] is not None
        )
        own = [] if self.entry is None else [self.entry.tile, self.clipped(self.entry.tile)]
        return list(dict.fromkeys([*own, *filter(self.may_fit, map(self.clipped, others))]))

    def clipped(self, tile: Tile) -> Tile:
        """The tile without blocks that are larger than what they cut."""
        problem = self.problem
        tokens, key, value = map(padded, (problem.partition.tokens, problem.key_width, problem.value_width))
        if self.step == "columns":
            return Tile(tokens, min(tile.block_n, tokens), key, value, tile.num_warps, tile.num_stages)
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
        """Whether what a CTA keeps in registers, and a stage of what it loads, could fit on an SM."""
        problem, target, limits = self.problem, self.gpu.target, LIMITS[self.gpu.target]
        m, n, k, v, warps, stages = tile
        tokens, of_scores = problem.partition.tokens, 3 * m * n // 2  # where a block has all keys or queries of a group
        key, value = padded(problem.key_width), padded(problem.value_width)
        held = {  # fp32 numbers: sums, and scores or what becomes of them
            "forward": m * (n + v),
            "group": 2 * m * n,
            "columns": m * (2 * n + key),
            "queries": of_scores if tokens <= n else m * (n + key),
            "keys": of_scores if tokens <= m else n * (m + key + value),
            "dk": of_scores if tokens <= m else n * (m + key),
            "dv": m * n if tokens <= m else n * (m + value),
            "pairs": 2 * m * n,
        }[self.step]
        threads, exact = warps * gpu_target(target).warp_size, multiplies_fp32(target)
        per_thread = 448 if target.startswith("gfx9") else 224  # of 512 (CDNA) or 255 registers: a few are for the rest
        chunk = problem.itemsize * max((m + n) * k, n * v if self.step == "forward" else (m + n) * v)
        matrix = problem.precision == "tf32" or problem.itemsize == 2 or exact
        return (
            (held <= threads * per_thread or limits.tensor_columns > 0)
            and chunk * max(1, stages - 1) <= limits.shared_of_cta
            and (matrix or m * n * max(k, v) <= threads * FMA_PRODUCTS)
        )


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What became of one tile."""

    task: Task
    tile: Tile
    binary: Binary | None
    violations: list[str]
    prediction: Prediction | None
    measured: float | None = None  # seconds on a real GPU
    measured_on: str | None = None  # which it is

    @property
    def seconds(self) -> float:
        """Measured or else predicted."""
        predicted = inf if self.prediction is None else self.prediction.seconds
        return predicted if self.measured is None else self.measured

    @property
    def rank(self) -> tuple[bool, bool, float, float]:
        """The smaller, the better: sound, measured, fast, and of equals the one whose units have less to do."""
        busy = inf if self.prediction is None else sum(self.prediction.busy.values())
        return bool(self.violations), self.measured is None, self.seconds, busy

    def as_dict(self) -> dict[str, Any]:
        task, problem, prediction = self.task, self.task.problem, self.prediction
        return {
            "target": task.gpu.target, "gpu": task.gpu.name, "step": task.step, "tokens": problem.partition.tokens,
            **{name: getattr(problem, name) for name in ("key_width", "value_width", "dtype")},
            "tile": named(self.tile), "violations": self.violations, "measured_seconds": self.measured,
            "predicted_seconds": prediction and prediction.seconds, "bound": prediction and prediction.bound,
            "busy_seconds": prediction and prediction.busy,
            **{name: getattr(self.binary, name, None) for name in ("registers", "shared", "ctas_per_sm")},
        }  # fmt: skip


def search(task: Task, binaries: Binaries, measured: int = 0) -> list[Finding]:
    """All tiles that were tried, the best first; none where the kernel does not serve the problem.

    From the tiles that are shipped the search goes step by step to neighbours that are predicted to be faster: one
    block, chunk or number of warps doubled or halved, or one pipeline stage more or less. Those that cannot fit are
    left out by arithmetic; the others are compiled and read, and the best of all goes on to its own neighbours, until
    none is better. A binary with a violation (`binaries.violations`) ranks behind all without.

    Args:
        measured: so many of the best are timed on the GPU of this machine, and the times decide.
    """
    tried: dict[Tile, Finding] = {}
    candidates = task.shipped()
    while candidates and (found := findings(task, candidates, binaries)):
        before = min((finding.rank for finding in tried.values()), default=None)
        tried |= {finding.tile: finding for finding in found}
        best = min(tried.values(), key=lambda finding: finding.rank)
        gained = before is None or before[0] > bool(best.violations) or best.seconds < (1 - GAIN) * before[2]
        candidates = [tile for tile in task.neighbours(best.tile) if tile not in tried] if gained else []
    ranked = sorted(tried.values(), key=lambda finding: finding.rank)
    timed = [measure_finding(finding) for finding in ranked[:measured]]
    return sorted(timed + ranked[measured:], key=lambda finding: finding.rank)


def measure_finding(finding: Finding) -> Finding:
    """A finding with its time on the GPU of this machine, or with the reason why it has none there."""
    try:
        seconds = finding.task.seconds(finding.tile)
    except OutOfResources as error:
        return replace(finding, violations=[*finding.violations, f"does not fit on this GPU: {error}"])
    return replace(finding, measured=seconds, measured_on=torch.cuda.get_device_name())


def findings(task: Task, candidates: Iterable[Tile], binaries: Binaries) -> list[Finding]:
    """What becomes of each tile, in their order; tiles with which the kernel is not launched are left out."""
    launches = {tile: launch for tile in candidates if (launch := task.launch(tile)) is not None}
    found = []
    for tile, (launch, binary, violations) in zip(launches, binaries.verdicts(launches.values()), strict=True):
        prediction = predict(launch, binary, task.gpu) if binary is not None and binary.ctas_per_sm else None
        if prediction is not None and prediction.flops and prediction.flops < 0.98 * prediction.work.flops:
            violations = [*violations, "a loop of its code was not found: the prediction would be too short"]
        found.append(Finding(task, tile, binary, violations, prediction))
    return found


PLANS = (("forward",), ("group",), ("columns", "pairs"), ("queries", "keys", "pairs"), ("queries", "dk", "dv", "pairs"))


def choose(tried: Mapping[str, list[Finding]]) -> list[Finding]:
    """The kernels of a pass, each with its best tile: of the ways to do the pass the fastest one.

    Args:
        tried: for each step of the pass what `search` returned.
    """
    best = {step: found[0] for step, found in tried.items() if found}
    served = (plan for plan in PLANS if {*plan} - {"pairs"} <= {*best})  # which only a bias needs
    plans = ([best[step] for step in plan if step in best] for plan in served)
    return min(plans, key=lambda plan: (any(f.violations for f in plan), sum(f.seconds for f in plan)), default=[])


# -- a pass ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What was found for a pass."""

    gpu: Machine
    problem: Problem
    pass_: str
    tried: dict[str, list[Finding]]  # by step, the best first
    chosen: list[Finding]
    shipped: list[Finding]  # what the run time would launch now

    @property
    def title(self) -> str:
        return f"{self.pass_} on {self.gpu.name} ({self.gpu.target}): {self.problem}"

    @property
    def result(self) -> str:
        """What is gained, and by which tiles."""
        now, then = (1e6 * sum(f.seconds for f in kernels) for kernels in (self.shipped, self.chosen))
        how = "measured" if any(f.measured for f in self.chosen) else "PREDICTED"
        kernels = ", ".join(f"{f.task.step} {format_tile(f.tile)}" for f in self.chosen)
        return f"{how}: now {now:.1f} us -> {then:.1f} us, {options.change(then / now)}, with {kernels}"

    def is_shipped(self, finding: Finding) -> bool:
        return any((f.task.step, f.tile) == (finding.task.step, finding.tile) for f in self.shipped)

    def vs_shipped(self, finding: Finding) -> str | None:
        """A tile's time beside that of the shipped one, where the run time launches such a kernel."""
        now = next((f.seconds for f in self.shipped if f.task.step == finding.task.step), None)
        return options.change(finding.seconds / now) if now and finding.seconds < inf else None

    def facts(self, finding: Finding) -> dict[str, object]:
        """What tables say of a tile, by column."""
        binary, prediction, target = finding.binary, finding.prediction, self.gpu.target
        return {
            **named(finding.tile), "us": f"{1e6 * finding.seconds:.1f}", "vs shipped": self.vs_shipped(finding),
            "bound": prediction and prediction.bound, "regs": binary and binary.registers,
            "smem": binary and binary.shared, "CTAs/SM": binary and binary.ctas_per_sm,
            "occupancy": binary and f"{occupancy(target, binary.ctas_per_sm, binary.warps):.0%}",
            "waves": prediction and prediction.waves, "violations": "; ".join(finding.violations) or None,
        }  # fmt: skip

    def as_dicts(self) -> Iterator[dict[str, Any]]:
        for finding in (finding for found in self.tried.values() for finding in found):
            yield {**finding.as_dict(), "shipped": self.is_shipped(finding), "chosen": finding in self.chosen}


def search_pass(gpu: Machine, problem: Problem, pass_: str, binaries: Binaries, measured: int = 0) -> Search:
    """Search the tiles of every kernel of a pass, those apart that a better way of doing it makes needless."""
    tried = dict[str, list[Finding]]()
    for step in PASSES[pass_]:
        if any(not finding.violations for finding in tried.get("group", [])):
            break  # one kernel reads every tensor once, where several would read them again
        if found := search(Task(gpu, problem, step), binaries, measured):
            tried[step] = found
    shipped = list[Finding]()
    for now in pass_launches(gpu.target, problem, pass_):
        (found_now,) = findings(Task(gpu, problem, now.step), [now.tile], binaries)
        shipped.append(measure_finding(found_now) if measured else found_now)
    return Search(gpu, problem, pass_, tried, choose(tried), shipped)


# -- the files ---------------------------------------------------------------------------------------------------------


def write(chosen: Sequence[Finding], without_bias: bool = False) -> Path:
    """Put tiles and their evidence into the file of their target; entries for the same problem are replaced.

    Args:
        without_bias: the tiles are for calls without a bias alone.
    """
    target, only = chosen[0].task.gpu.target, {"bias": False} if without_bias else {}

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return *(entry[name] for name in _KEY), entry.get("bias")

    path = tiles.FOLDER / f"{target}.json"
    before = json.loads(path.read_text())
    entries = {key(entry): entry for entry in before if not tiles.ONLY & entry.keys()}
    others = [
        entry for entry in before if tiles.ONLY & entry.keys()
    ]  # for another compiler or target, if not for these
    for finding in chosen:
        for entry in ({**entry, **only} for entry in _entries(finding)):  # what the dtype had alone would go before it
            entries.pop(key({**entry, "arithmetic": finding.task.problem.dtype}), None)
            entries[key(entry)] = entry
            others = [other for other in others if key(other) != key(entry) or not tiles._is_for(other, target)]
    kept = needed([*entries.values(), *others])
    lines = [f"  {json.dumps(entry)}" for entry in sorted(kept, key=_order)]
    records.write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    tiles._entries.cache_clear()
    tiles._lookup.cache_clear()
    return path


def needed(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries without those in whose place another one would serve with the same tile: the next of the same widths.

    Where one dtype, target or Triton has an entry to itself, all of these widths stay.
    """
    of_widths = dict[tuple[Any, ...], list[dict[str, Any]]]()
    for entry in sorted(entries, key=_order):
        family = ARITHMETIC.get(entry["arithmetic"], entry["arithmetic"])
        of_widths.setdefault((entry["step"], family, entry["key_width"], entry["value_width"]), []).append(entry)
    kept = list[dict[str, Any]]()
    for (_, family, *_), same in of_widths.items():
        stay = list[dict[str, Any]]()  # the longest groups first
        special = any(tiles.ONLY & entry.keys() or entry["arithmetic"] != family for entry in same)
        for entry in reversed(same):
            general = next((other for other in reversed(stay) if "bias" not in other), None)
            without_bias = stay[-1] if stay else None
            following = [without_bias] if "bias" in entry else [without_bias, general]
            if special or any(other is None or other["tile"] != entry["tile"] for other in following):
                stay.append(entry)
        kept += reversed(stay)
    return kept


_KEY = ("step", "arithmetic", "key_width", "value_width", "tokens")


def _entries(finding: Finding) -> list[dict[str, Any]]:
    """What a file says of a choice: the tile serves groups of up to as many tokens, one for long groups all of them."""
    step, problem = FILED.get(finding.task.step, finding.task.step), finding.task.problem
    limits = problem.key_width, problem.value_width, grid.limit(problem.partition.tokens)
    serves = dict(zip(_KEY, (step, ARITHMETIC[problem.dtype], *limits), strict=True))
    evidence = {
        "us": round(1e6 * finding.seconds, 1),
        "how": "predicted" if finding.measured is None else "measured",
        "gpu": finding.measured_on or finding.task.gpu.name,
        "maps": [problem.maps, *problem.partition.size],
        "bound": getattr(finding.prediction, "bound", None),
        "registers": getattr(finding.binary, "registers", None),
    }
    dv = [{**serves, "step": "values", "tile": None}] if finding.task.step == "keys" else []  # which comes with dk
    first: dict[str, tuple[str, ...]] = {"queries": ("group", "columns"), "columns": ("group",)}
    before = first.get(finding.task.step, ())  # steps that would be taken in its place
    served = [step for step in before if shipped_entry(finding.task.gpu.target, step, problem) is not None]
    none = [{**serves, "step": step, "tile": None} for step in served]
    return [{**serves, "tile": [*finding.tile], "evidence": evidence}, *dv, *none]


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    arithmetic = "16-bit", "tf32", "ieee"
    limits = (entry[name] or inf for name in ("key_width", "value_width", "tokens"))
    kind = ARITHMETIC.get(entry["arithmetic"], entry["arithmetic"])
    return arithmetic.index(kind), tiles.STEPS.index(entry["step"]), *limits, entry.get("bias", True)
