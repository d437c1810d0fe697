"""The page of a certificate, certificate.md, with its plots and a CSV a part: what it says, it reads from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.certify.parts import PARTS, Part
from bench.certify.peers import OURS, PEERS
from bench.certify.rows import Certificate, Found, Item, Name, Outcome, Setting
from bench.certify.speed import beside_peers
from bench.records import replacing, write_text
from bench.terminal import Table

INTERPRETED = (
    "Kernels were **interpreted** by Triton's interpreter, on tiny problems: this says that their numerics are right "
    "and that the certificate can be made, nothing of a GPU, and nothing of time."
)
TIMES, PREDICTIONS = "times.png", "predictions.png"
COLOURS = dict(zip(PEERS, ("#009E73", "#E69F00", "#56B4E9", "#117733", "#882255"), strict=True))
MARKERS = dict(zip(PEERS, "vs^8D", strict=True))
WORDS: dict[Outcome, str] = {  # what is said of outcomes, after how many items have one
    "passed": "passed", "measured": "measured", "slower": "slower than a peer", "not run": "could not run",
    "failed": "failed",
}  # fmt: skip


class Judged:
    """The rows of a certificate, seen together.

    Args:
        certificate: with its rows.
        without_time: the items that have none, for there was no time.
    """

    def __init__(self, certificate: Certificate, without_time: Sequence[Item]) -> None:
        self.conditions, self.without_time = certificate.conditions, without_time
        self.rows = {letter: certificate.of(letter) for letter in PARTS}
        self.rows["e"] = beside_peers(self.rows["e"])
        self.rows["g"] = beside_measured(self.rows["g"], self.rows["e"])
        self.counts = Counter(found.outcome for rows in self.rows.values() for found in rows.values())

    @property
    def failed(self) -> int:
        return self.counts["failed"]

    @property
    def timed(self) -> bool:
        """Whether anything was."""
        return bool(_times(self.rows["e"]))

    @property
    def sentence(self) -> str:
        """27 items, 0 failed."""
        parts = [f"{self.counts[outcome]} {words}" for outcome, words in WORDS.items() if self.counts[outcome]]
        parts += [] if self.failed else ["0 failed"]
        parts += [f"{len(self.without_time)} without time"] if self.without_time else []
        return f"{sum(self.counts.values()) + len(self.without_time)} items: {', '.join(parts)}."

    def lines(self, outcome: str) -> Iterator[str]:
        """A line for every row that came out so; items of the same reason share one."""
        reasons: dict[tuple[str, str], list[Name]] = {}
        for letter, rows in self.rows.items():
            for name, found in rows.items():
                if found.outcome == outcome:
                    reasons.setdefault((letter, found.why), []).append(name)
        for (letter, why), names in reasons.items():
            which = "; ".join(", ".join(name) for name in names)
            yield f"- ({letter}) {which}: {why}"


def beside_measured(predictions: Mapping[Name, Found], times: Mapping[Name, Found]) -> dict[Name, Found]:
    """The rows of part g, with what part e has measured."""
    found = {}
    for name, row in predictions.items():
        measured = times.get((*name, OURS), Found("not run")).figures.get("us")
        figures = dict(row.figures)
        if measured is not None and "predicted us" in figures:
            ratio = f"{measured / figures['predicted us']:.2f}"
            predicted = figures.pop("predicted us")
            figures = {"predicted us": predicted, "measured us": measured, "measured / predicted": ratio, **figures}
        found[name] = Found(row.outcome, row.why, figures, row.seconds)
    return found


def table(part: Part, rows: Mapping[Name, Found]) -> Table:
    """A line an item: its name, its figures, what came of it and why."""
    figures = list(dict.fromkeys(name for found in rows.values() for name in found.figures))
    lines = [
        [*name, *(found.figures.get(figure) for figure in figures), found.outcome, found.why]
        for name, found in rows.items()
    ]
    words = {*part.columns, "outcome", "why"}
    return Table("", (*part.columns, *figures, "outcome", "why"), lines, words=words)


def of_devices(rows: Mapping[Name, Found]) -> Table:
    """Part a on the page: items that have no figures in common."""
    header = ("what", "found")
    said = ("; ".join(f"{name} {figure}" for name, figure in found.figures.items()) for found in rows.values())
    return Table("", header, [[*name, text or None] for name, text in zip(rows, said, strict=True)], words=header)


def of_times(rows: Mapping[Name, Found]) -> Table:
    """Part e on the page: a line for a shape and a pass, microseconds of everyone, or why there are none."""
    header = ("shape", "pass", *(f"{who}, us" for who in PEERS), "ours")
    missing = Found("not run")
    cells = list[list[object]]()
    for where in dict.fromkeys(name[:2] for name in rows):
        found = {who: rows.get((*where, who), missing) for who in PEERS}
        times = (each.figures.get("us", each.outcome) for each in found.values())
        cells.append([*where, *times, found[OURS].why or None])
    return Table("", header, cells, words=("shape", "pass", "ours"))


ON_PAGE = {"a": of_devices, "e": of_times}  # tables of parts that read better so than a line an item


def write(folder: Path, setting: Setting, judged: Judged, command: str) -> list[Path]:
    """Write the page, its plots where there is something to plot, and the CSVs; returns their paths."""
    written = [folder / "certificate.md"]
    for letter, part in PARTS.items():
        if judged.rows[letter]:
            write_text(folder / part.file, table(part, judged.rows[letter]).csv())
            written.append(folder / part.file)
    plots = {TIMES: draw_times(judged.rows["e"]), PREDICTIONS: draw_predictions(judged.rows["g"])}
    for name, figure in plots.items():
        if figure is not None:
            with replacing(folder / name) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
            written.append(folder / name)
    drawn = [name for name, figure in plots.items() if figure is not None]
    write_text(written[0], "\n".join(page(setting, judged, command, drawn)) + "\n")
    return written


def page(setting: Setting, judged: Judged, command: str, drawn: Sequence[str]) -> Iterator[str]:
    """The page, line by line."""
    machine = judged.conditions["host"]
    how = "interpreted" if setting.interpreted else "compiled and run"
    yield f"# Certificate of isa_triton: {how} on {machine}"
    yield from ("", judged.sentence, "")
    if setting.interpreted:
        yield from (INTERPRETED, "")
    yield f"`{command}` makes it, and goes on where it was stopped; {judged.conditions['versions']}."
    for title, outcome, none in (
        ("What failed", "failed", "Nothing."),
        ("Where it is slower than a peer", "slower", "Nowhere." if judged.timed else "Nothing was timed."),
        ("What could not run", "not run", "Everything could."),
    ):
        yield from ("", f"## {title}", "", *(list(judged.lines(outcome)) or [none]))
    if judged.without_time:
        yield from (
            "",
            f"There was no time for {len(judged.without_time)} items; the same command goes on with them:",
            "",
        )
        yield from (f"- {item}" for item in judged.without_time)
    for name in drawn:
        yield from ("", f"![{name}]({name})")
    for letter, part in PARTS.items():
        if judged.rows[letter]:
            shown = ON_PAGE.get(letter, partial(table, part))(judged.rows[letter])
            yield from ("", f"## {letter}. {part.title}", "", shown.markdown().strip())


# -- plots -------------------------------------------------------------------------------------------------------------


def _times(rows: Mapping[Name, Found]) -> dict[Name, float]:
    return {name: found.figures["us"] for name, found in rows.items() if "us" in found.figures}


def draw_times(rows: Mapping[Name, Found]) -> Figure | None:
    """A panel a pass: everyone's time over the shapes, in times of ours; None where nothing was timed."""
    times = _times(rows)
    passes = list(dict.fromkeys(name[1] for name in times if name[2] == OURS))
    if not passes:
        return None
    figure = Figure(figsize=(12, 1 + 4 * len(passes)), layout="constrained")
    for panel, pass_ in zip(figure.subplots(len(passes), 1, squeeze=False).flat, passes, strict=True):
        shapes = [shape for shape, of, who in times if of == pass_ and who == OURS]
        for who, peer in PEERS.items():
            points = [(i, times[s, pass_, who] / times[s, pass_, OURS]) for i, s in enumerate(shapes)
                      if (s, pass_, who) in times]  # fmt: skip
            if points:
                style: dict[str, Any] = {"color": COLOURS[who], "marker": MARKERS[who], "linestyle": ""}
                panel.plot(*zip(*points, strict=True), label=peer.title, **style)
        panel.axhline(1.0, color="0.6", linewidth=1, zorder=0)
        panel.set(yscale="log", ylabel="time, in times of ours", title=f"{pass_} (below the line: faster than ours)")
        panel.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        panel.grid(color="0.92")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_predictions(rows: Mapping[Name, Found]) -> Figure | None:
    """Measured over predicted time, a point a shape and pass; None where there are not both."""
    both = {name: found.figures for name, found in rows.items() if "measured us" in found.figures}
    if not both:
        return None
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    panel = figure.subplots()
    for pass_, marker in zip(dict.fromkeys(name[1] for name in both), "os", strict=False):
        points = [(f["predicted us"], f["measured us"]) for name, f in both.items() if name[1] == pass_]
        panel.plot(*zip(*points, strict=True), marker=marker, linestyle="", label=pass_)
    for (shape, _), f in both.items():
        panel.annotate(shape, (f["predicted us"], f["measured us"]), fontsize=7, xytext=(4, 2),
                       textcoords="offset points")  # fmt: skip
    ends = [number for f in both.values() for number in (f["predicted us"], f["measured us"])]
    panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=1, zorder=0)
    panel.set(xscale="log", yscale="log", xlabel="predicted, us", ylabel="measured, us")
    panel.legend()
    return figure
