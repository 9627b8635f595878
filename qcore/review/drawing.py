"""The plots of a review as SVG elements whose colours are those of the page, so that they follow light and dark.

Names of people are not drawn: candidates have letters, which the page explains, and tensors are named in captions.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcore.plots import svg_of
from qcore.review.facts import Judged, Review
from qcore.review.source import Layers, RangeFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOAT, LOST = "#6b7781", "#b3261f"
SERIES = ("#2b5f8b", "#c2571b", "#2e7d5c", "#7b4ea4", "#94741d", "#b0306f")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (2, 1)), (0, (5, 1, 1, 1)), (0, (1, 1)))
_LOCAL_DB, _ACCUMULATED_DB, _SHOWN_DB = 20.0, 12.0, 60.0

_THEME = {
    "#ffffff": "none",
    "#3a444c": "var(--ink)",
    "#000000": "var(--ink)",
    "#5b666e": "var(--dim)",
    "#8a939b": "var(--dim)",
    "#e6eaed": "var(--line)",
    FLOAT: "var(--dim)",
    LOST: "var(--fail)",
    **{color: f"var(--s{k})" for k, color in enumerate(SERIES)},
}
"""Colours as matplotlib writes them, and what the page has instead of them."""


def letter(position: int) -> str:
    """Return what the candidate at `position` is called in plots: A to Z, then A1 and so on."""
    return chr(ord("A") + position % 26) + (str(position // 26) if position >= 26 else "")


def themed(svg: str) -> str:
    """Return an SVG element with the page's colours in place of ours."""
    for color, variable in _THEME.items():
        svg = svg.replace(color, variable)
    return svg


def trade_plot(review: Review, label: str, cost: Callable[[Judged], float], floats: float) -> str:
    """Return what is lost over what it costs, with a point for each candidate and one for float at nothing lost."""
    scale = 100.0 if review.measure.kind == "share" else 1.0
    unit = "points" if review.measure.kind == "share" else "dB" if review.measure.kind == "decibel" else "its unit"

    def draw(axes: "Axes") -> None:
        if review.measure.kind != "decibel":  # float has no error that would be finite
            axes.scatter([floats], [0.0], s=46, color=FLOAT, marker="x", zorder=3)
            axes.annotate("float", (floats, 0.0), xytext=(0, 8), textcoords="offset points", ha="center", color=FLOAT)
        for k, c in enumerate(review.candidates):
            color, marker = SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)]
            axes.scatter([cost(c)], [scale * c.loss], s=52, color=color, marker=marker, zorder=4)
            at = (cost(c), scale * c.loss)
            axes.annotate(letter(k), at, xytext=(7, 5), textcoords="offset points", color=color, weight="bold")
        axes.set_xlabel(label)
        axes.set_ylabel(f"{review.measure.words}: lost, {unit}")
        axes.set_xlim(left=0)
        axes.margins(x=0.12, y=0.25)
        axes.grid()

    return themed(svg_of(draw, width=5.6, height=3.5))


def layers_plot(reports: Sequence[tuple[int, Layers]]) -> str:
    """Return accumulated error along the layers, a line per candidate (its position, its report); dots are local."""
    most = max(len(found.layers) for _, found in reports)

    def draw(axes: "Axes") -> None:
        lowest = 0.0
        for k, found in reports:
            color, dash = SERIES[k % len(SERIES)], DASHES[k % len(DASHES)]
            line = [min(e.accumulated_db, _SHOWN_DB) for e in found.layers]
            lowest = min([lowest, *line])
            axes.plot(range(1, len(line) + 1), line, color=color, linewidth=1.5, linestyle=dash)
            dots = [(n, min(e.local_db, _SHOWN_DB)) for n, e in enumerate(found.layers, 1) if e.local_db is not None]
            size = 16 if most <= 80 else 6
            axes.scatter([n for n, _ in dots], [db for _, db in dots], s=size, color=color, alpha=0.6, linewidths=0)
            at = [(n, min(e.local_db or 0.0, _SHOWN_DB)) for n, e in enumerate(found.layers, 1) if e.verdict == "local"]
            axes.scatter([n for n, _ in at], [db for _, db in at], s=46, color=LOST, marker="x", zorder=5)
            if line:
                axes.annotate(
                    letter(k),
                    (len(line), line[-1]),
                    xytext=(5, 0),
                    textcoords="offset points",
                    color=color,
                    weight="bold",
                )
        for limit in (_LOCAL_DB, _ACCUMULATED_DB):
            axes.axhline(limit, color=FLOAT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=lowest - 2, top=_SHOWN_DB + 2)
        axes.set_xlim(0.2, most * 1.04 + 0.8)
        axes.set_xlabel("layer, in graph order")
        axes.set_ylabel("SQNR, dB (higher is better)")
        axes.grid(axis="y")

    return themed(svg_of(draw, width=11.0, height=3.9))


def range_plot(fit: RangeFit) -> str:
    """Return the histogram of one tensor, counts as logarithms, with the ends of the chosen range."""
    width = math.ldexp(1.0, fit.exponent)

    def draw(axes: "Axes") -> None:
        edges = [(fit.first + k) * width for k in range(len(fit.counts) + 1)]
        heights = [math.log10(n + 1) for n in fit.counts]
        axes.stairs(heights, edges, fill=True, color=SERIES[0], alpha=0.55)
        for end in (fit.low, fit.high):
            axes.axvline(end, color=LOST, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.set_ylabel("log10 of the count")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)

    return themed(svg_of(draw, width=4.2, height=2.1))
