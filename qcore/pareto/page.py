"""The trials of a search as one HTML page: plots of error over size and latency, and a table; it loads nothing.

The same curve gives the same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from qcore.pareto.front import pareto_front
from qcore.plots import svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("page.html.j2")
_FRONT, _CHOSEN, _TRIED = "#2b5f8a", "#c0392b", "#b6bfc6"
_KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One trial: what it was, in words, what it costs, and whether it holds the budget."""

    label: str
    error: float
    size_bytes: int
    latency_ms: float | None
    holds: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """All trials of a search in order, and the position of the chosen one.

    `base` is what layers run in that are not promoted; `measure` names the error, `limit` is its budget where that is a
    number; `rows` are the layers as (name, op type, precision, error of the model with it alone in few bits), `facts`
    what was measured.
    """

    title: str
    why: str
    base: str
    met: bool
    measure: str
    limit: float | None
    dots: tuple[Dot, ...]
    chosen: int
    rows: tuple[tuple[str, str, str, float], ...]
    facts: Mapping[str, str]

    @property
    def front(self) -> tuple[int, ...]:
        """The positions on the Pareto front."""
        return pareto_front(self.dots)


def pareto_page(curve: Curve) -> str:
    """Return the HTML page of `curve`."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": lambda x: "" if x is None else f"{x:.4g}", "kib": lambda x: f"{x / _KIB:,.1f}"}
    plots = [_plot(curve, "file size, KiB", lambda d: d.size_bytes / _KIB)]
    timed = all(d.latency_ms is not None for d in curve.dots if math.isfinite(d.error))
    if timed:
        plots.append(_plot(curve, "latency p50, ms, one thread of this machine", lambda d: d.latency_ms or 0.0))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(curve=curve, plots=plots, timed=timed)


def _plot(curve: Curve, label: str, cost: Callable[[Dot], float]) -> str:
    def draw(axes: "Axes") -> None:
        _draw(axes, curve, [cost(d) for d in curve.dots])
        axes.set_xlabel(label)

    return svg_of(draw, width=11.0, height=3.6)


def _draw(axes: "Axes", curve: Curve, costs: Sequence[float]) -> None:
    errors = [d.error for d in curve.dots]
    if curve.limit is not None:
        axes.axhline(curve.limit, color="#2e7d5b", linewidth=0.9, linestyle=(0, (4, 3)), label="budget")
    axes.scatter(costs, errors, s=30, color=_TRIED, zorder=2, label="tried")
    axes.scatter(
        [costs[k] for k in curve.front],
        [errors[k] for k in curve.front],
        s=36,
        color=_FRONT,
        zorder=3,
        label="Pareto front",
    )
    line = _line(costs, errors)
    axes.plot([costs[k] for k in line], [errors[k] for k in line], color=_FRONT, linewidth=1.2, zorder=1)
    axes.scatter(
        [costs[curve.chosen]],
        [errors[curve.chosen]],
        s=150,
        facecolors="none",
        edgecolors=_CHOSEN,
        linewidths=1.8,
        zorder=4,
        label="chosen" if curve.met else "nearest",
    )
    axes.set_ylabel("error (lower is better)")
    axes.grid()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=4, frameon=False)


def _line(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the positions that nothing beats in the two values of one plot, in their order along it."""
    line: list[int] = []
    for k in sorted(range(len(costs)), key=lambda k: (costs[k], errors[k])):
        if math.isfinite(errors[k]) and (not line or errors[k] < errors[line[-1]]):
            line.append(k)
    return line
