"""A first pass over a data set: every file is decoded and counted before anything is trained on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.terminal import Table, Terminal
from bench.train.classes import UNKNOWN, Classes
from bench.train.data import MANY, OWN, DataSet, Paths, lossy, matched, read, shown_size
from bench.train.recipe import IGNORED, InputError

if TYPE_CHECKING:
    from bench.train.trainer import Process

SPLITS = ("train", "val")
NAMED = 3  # files of one fault that the table names
SHOWN = 20  # faults that it shows, unless --verbose


@dataclass(frozen=True)
class Fault:
    """What a file has that it should not, in the same words for every file that has it."""

    path: Path
    what: str
    pixels: int | None = None

    @classmethod
    def of(cls, error: InputError) -> Fault:
        assert error.path is not None
        return cls(error.path, str(error).removeprefix(f"{error.path} "))

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


@dataclass
class Seen:
    """What a split holds, or one pair of it."""

    images: int = 0
    sizes: Counter[tuple[int, int]] = field(
        default_factory=Counter
    )  # width and height of the images, as they are shown
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # of every class, `IGNORED`, `UNKNOWN`
    holders: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # how many labels hold it
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.images += other.images
        self.sizes.update(other.sizes)
        self.pixels += other.pixels
        self.holders += other.holders
        self.faults += other.faults


def check(data: DataSet, folder: Path, process: Process, said: Terminal) -> dict[str, Paths]:
    """Decode every file, and show what is there; several processes share the work.

    Returns:
        The pairs of every split.

    Raises:
        InputError: there is a fault; the table shows all of them.
    """
    paths, seen = {}, {}
    for split in SPLITS:
        paths[split], missing = data.find(folder, split)
        seen[split] = Seen(faults=list(map(Fault.of, missing)))
    mine = {split: paths[split][process.rank :: process.world_size] for split in SPLITS}
    with said.progress("pairs", sum(map(len, mine.values()))) as bar:
        bar.now("checking")
        for split in SPLITS:
            found = Seen()
            for each in look_at_all(mine[split], data):
                found.add(each)
                bar.advance()
            for theirs in process.gather(found):
                seen[split].add(theirs)
    said.show(*tables(seen, data.classes, folder, said.verbose))
    faults = sorted((fault for each in seen.values() for fault in each.faults), key=lambda fault: fault.path)
    if faults:
        files = len({fault.path for fault in faults})
        more = f"; the table names what is wrong with {files} files" if files > 1 else ""
        raise InputError(f"{faults[0]}{hint(faults[0], data)}{more}")
    if left_out := others(data, folder):
        said.say(f"{len(left_out)} files end otherwise and are left out: {', '.join(left_out[:NAMED])}")
    absent = [name for name, count in zip(data.classes.names, seen["train"].pixels, strict=False) if not count]
    if absent:
        said.say(f"No image to train on has {', '.join(absent)}: what is not shown cannot be learned.")
    return paths


def others(data: DataSet, folder: Path) -> list[str]:
    """Files beside one's own images and labels that are none, hidden ones apart."""
    if not data.own:
        return []
    places = (place for split in SPLITS for place in data.layout(split))
    paths = (path for place in places for path in folder.glob(f"{place}.*") if not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() not in OWN)


def look_at_all(paths: Paths, data: DataSet) -> Iterator[Seen]:
    """Every pair by itself, in threads: decoding and counting hold no lock."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(partial(look_at, data), paths)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for what runs, not for all that was to come


def look_at(data: DataSet, pair: tuple[Path, Path]) -> Seen:
    """One image and its label."""
    seen, pictures = Seen(images=1), []
    for path in pair:
        try:
            pictures.append(read(path, whole=True))
        except InputError as error:
            seen.faults.append(Fault.of(error))
    if seen.faults:
        return seen
    image, label = pictures
    seen.sizes[shown_size(image)] += 1
    try:
        _, values = matched((image, label), pair, data, whole=True)
    except InputError as error:
        seen.faults.append(Fault.of(error))
        return seen
    numbers = data.classes.read(values)
    classes = data.classes.table[numbers]
    seen.pixels = np.bincount(classes.ravel(), minlength=256)
    seen.holders = (seen.pixels > 0).astype(np.int64)
    if seen.pixels[UNKNOWN]:
        unknown = np.unique(numbers[classes == UNKNOWN], return_counts=True)
        seen.faults += unknown_numbers(pair[1], *unknown, data.classes, lossy(label))
    return seen


def unknown_numbers(
    path: Path, numbers: np.ndarray, counts: np.ndarray, classes: Classes, hint: str
) -> Iterator[Fault]:
    """Numbers that a label holds and that mean nothing; too many, or of a lossy file, are one fault."""
    if hint or len(numbers) > MANY:
        many = f"more than {MANY} " if len(numbers) > MANY else ""
        yield Fault(path, f"holds {many}unknown {classes.kind}s{hint}", int(counts.sum()))
        return
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        yield Fault(path, f"holds the unknown {classes.kind} {classes.word(number)}", count)


def hint(fault: Fault, data: DataSet) -> str:
    """What to do about a number that one's own list lacks."""
    if not data.own or fault.pixels is None or "lossy" in fault.what:
        return ""
    return ": list it as a class, or as `ignore`" if "the unknown" in fault.what else ": list them"


def tables(seen: dict[str, Seen], classes: Classes, folder: Path, all_faults: bool) -> Iterator[Table]:
    """What the splits hold: images and sizes, pixels of every class, faults."""
    rows: list[list[object]] = []
    for split, each in seen.items():
        sizes = sorted(each.sizes, key=lambda size: (size[0] * size[1], size))
        span = [f"{width}x{height}" for width, height in sizes[:1] + sizes[-1:]] or ["-", "-"]
        rows.append([split, each.images, *span, len(sizes), int(each.pixels.sum()), int(each.pixels[UNKNOWN])])
    header = ("split", "images", "smallest", "largest", "sizes", "pixels of labels", "unknown")
    yield Table(f"{folder}, sizes are width x height", header, rows)

    def line(name: str, label: str | None, number: int) -> list[object]:
        cells: list[object] = [name, label]
        for each in seen.values():
            share = 100 * each.pixels[number] / max(1, each.pixels.sum())
            cells += [int(each.pixels[number]), f"{share:.2f}", int(each.holders[number])]
        return cells

    columns = [f"{split} {what}" for split in seen for what in ("pixels", "%", "images")]
    lines = [
        line(name, classes.word(n), i) for i, (name, n) in enumerate(zip(classes.names, classes.numbers, strict=True))
    ]
    rest = [
        line("ignored", ", ".join(map(classes.word, classes.ignored)) or None, IGNORED),
        line("unknown", None, UNKNOWN),
    ]
    yield Table("Pixels of every class", ("class", classes.kind, *columns), [*lines, [], *rest], words=2)

    faults: dict[str, list[Fault]] = {}
    for fault in (fault for each in seen.values() for fault in each.faults):
        faults.setdefault(fault.what, []).append(fault)
    if faults:
        order = sorted(faults.items(), key=lambda item: -len(item[1]))
        shown = order if all_faults else order[:SHOWN]
        more = f", {len(shown)} of {len(order)}: --verbose shows all" if len(shown) < len(order) else ""
        named = ("what a file does", "files", "pixels", "the first of them")
        yield Table(f"Faults{more}", named, [_fault_line(*item, folder) for item in shown], words=(named[0], named[3]))


def _fault_line(what: str, faults: list[Fault], folder: Path) -> list[object]:
    paths = sorted({fault.path for fault in faults})
    pixels = [fault.pixels for fault in faults if fault.pixels is not None]
    named = [path.relative_to(folder).as_posix() for path in paths[:NAMED]]
    return [what, len(paths), sum(pixels) if pixels else None, ", ".join(named)]
