"""Searches as one HTML page, which needs nothing beside itself: every tile that was tried is a point and a row.

A click on a point leads to its row, a click on a column's head sorts by it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from bench.tiles.search import Finding, Search

STYLE = """
body { font: 14px/1.4 sans-serif; margin: 2em; } table { border-collapse: collapse; }
svg { max-width: 100%; height: auto; }
th { cursor: pointer; text-align: right; vertical-align: bottom; position: sticky; top: 0; background: #eee; }
th, td { padding: .2em .6em; } td { text-align: right; border-bottom: 1px solid #ddd; } tr:target { background: #fe8; }
[aria-sort=ascending]::after { content: " ▲"; } [aria-sort=descending]::after { content: " ▼"; }
.chosen { font-weight: bold; } .shipped { background: #def; } .violating { color: #b00; }
"""
SORT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.onclick = () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    const key = row => { const text = row.cells[i].textContent, n = parseFloat(text); return isNaN(n) ? text : n; };
    const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
    body.append(...[...body.rows].sort((a, b) => sign * order(key(a), key(b))));
    for (const other of heads) other.ariaSort = other === head ? (sign > 0 ? "ascending" : "descending") : null;
  });
}
"""


def html(searches: Sequence[Search]) -> str:
    """The page."""
    parts = "\n".join(part for i, search in enumerate(searches) for part in _section(search, f"search-{i}"))
    head = f'<meta charset="utf-8"><title>Tiles</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{parts}\n<script>{SORT}</script></body></html>\n'
    )


def _section(search: Search, name: str) -> Iterator[str]:
    yield f"<h1>{escape(search.title)}</h1><p>{escape(search.result)}</p>"
    yield "<p>Bold: chosen. Blue: shipped. Red: has a violation.</p>"
    for step, found in search.tried.items():
        heads = "".join(f"<th>{escape(column)}</th>" for column in search.facts(found[0]))
        names = [f"{name}-{step}-{i}" for i in range(len(found))]
        yield f"<h2>{step}: {len(found)} tiles tried</h2>"
        yield _points(search, found, names)
        rows = "\n".join(_row(search, finding, id_) for finding, id_ in zip(found, names, strict=True))
        yield f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _row(search: Search, finding: Finding, name: str) -> str:
    kinds = {"chosen": finding in search.chosen, "shipped": search.is_shipped(finding), "violating": finding.violations}
    facts = search.facts(finding).values()
    cells = "".join(f"<td>{'-' if fact is None else escape(str(fact))}</td>" for fact in facts)
    return f'<tr id="{name}" class="{" ".join(kind for kind, holds in kinds.items() if holds)}">{cells}</tr>'


def _points(search: Search, found: Sequence[Finding], names: Sequence[str]) -> str:
    """An SVG of times over registers per thread, a colour for each unit that binds; points link to rows."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[int, float, str]]] = {}
    for finding, name in zip(found, names, strict=True):
        if finding.binary is None or finding.prediction is None:
            continue
        point = finding.binary.registers, 1e6 * finding.seconds, f"#{name}"
        kinds.setdefault("violation" if finding.violations else finding.prediction.bound, []).append(point)
        if search.is_shipped(finding) or finding in search.chosen:
            label = "shipped" if search.is_shipped(finding) else "chosen"
            axes.annotate(label, point[:2], xytext=(6, 4), textcoords="offset points")
    for kind, points in sorted(kinds.items()):
        x, y, urls = zip(*points, strict=True)
        bad = kind == "violation"
        axes.scatter(x, y, label=kind, marker="x" if bad else "o", color="#b00" if bad else None).set_urls(urls)
    how = "measured or PREDICTED" if any(finding.measured for finding in found) else "PREDICTED"
    axes.set(xlabel="registers per thread", ylabel=f"{how} us", yscale="log", xmargin=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(title="bound by", loc="center left", bbox_to_anchor=(1, 0.5))
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue().partition("<svg")[1] + svg.getvalue().partition("<svg")[2]
