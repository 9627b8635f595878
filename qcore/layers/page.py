"""The layer report as one HTML page: plots, verdicts, and a table that sorts; it loads nothing from anywhere.

The same report gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from qcore.layers.report import ACCUMULATED_DB, CORE, LOCAL_DB, LayerError, LayerReport
from qcore.numerics.error import SQNR_LIMIT
from qcore.plots import svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("page.html.j2")
COLORS = {"local": "#c0392b", "accumulated": "#d98e04", "fine": "#2e7d5b"}
_WIDTH, _SHOWN_DB = 11.0, 60.0


def layer_page(report: LayerReport) -> str:
    """Return the HTML page of `report`."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"db": _db, "share": _share, "number": lambda x: f"{x:.4g}"}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        colors=COLORS,
        local_db=LOCAL_DB,
        accumulated_db=ACCUMULATED_DB,
        core=CORE,
        sqnr_plot=_svg(report.layers, _draw_sqnr, 4.2),
        range_plot=_svg(report.layers, _draw_ranges, 3.4),
    )


def _db(value: float) -> str:
    return "exact" if value >= SQNR_LIMIT else f"{value:.1f}"


def _share(value: float) -> str:
    """Return a fraction of 1 as per cent, so that a little is not shown as nothing."""
    return "0" if value == 0 else "< 0.01" if value < 1e-4 else f"{100 * value:.2f}"


def _svg(layers: Sequence[LayerError], draw: Any, height: float) -> str:
    """Return the plot that `draw` makes of `layers` as an SVG element."""

    def draw_all(axes: "Axes") -> None:
        draw(axes, layers)
        _name_layers(axes, layers)

    return svg_of(draw_all, width=_WIDTH, height=height)


def _draw_sqnr(axes: "Axes", layers: Sequence[LayerError]) -> None:
    accumulated = [min(e.accumulated.sqnr_db, _SHOWN_DB) for e in layers]
    lines = [(k, e.local.sqnr_db, e) for k, e in enumerate(layers) if e.local is not None]
    axes.axhspan(min([0.0, *accumulated]) - 2, ACCUMULATED_DB, color="#f6efe2", zorder=0)
    axes.axhline(LOCAL_DB, color=COLORS["local"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axhline(ACCUMULATED_DB, color=COLORS["accumulated"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot(range(len(layers)), accumulated, color="#2b5f8a", linewidth=1.6, label="accumulated: in the whole model")
    axes.plot(
        [k for k, _, _ in lines],
        [min(db, _SHOWN_DB) for _, db, _ in lines],
        color="#9aa5ad",
        linewidth=0.9,
        marker="o",
        markersize=3.5,
        label="local: the layer alone",
    )
    at_fault = [(k, db) for k, db, e in lines if e.verdict == "local"]
    if at_fault:
        x, y = zip(*at_fault, strict=True)
        axes.scatter(x, y, s=46, color=COLORS["local"], zorder=3, label="at fault itself")
    axes.set_ylabel("SQNR, dB (higher is better)")
    axes.set_ylim(bottom=min([0.0, *accumulated]) - 2, top=_SHOWN_DB + 2)
    axes.grid(axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3, frameon=False)


def _draw_ranges(axes: "Axes", layers: Sequence[LayerError]) -> None:
    uses = [(k, e.activation) for k, e in enumerate(layers) if e.activation is not None]
    x = [k for k, _ in uses]
    saturated = [100 * u.saturated for _, u in uses]
    axes.bar(x, [100 * (1 - u.unused) for _, u in uses], color="#d7dee4", label="levels that any value uses")
    axes.bar(x, [100 * u.core for _, u in uses], color="#5b8db8", label="levels that hold 99.9 % of the values")
    axes.set_ylabel("% of the quantizer's levels")
    axes.set_ylim(0, 100)
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.plot(x, saturated, color=COLORS["local"], linewidth=1.2, marker=".", label="values saturated")
    right.set_ylabel("% of values saturated", color=COLORS["local"])
    right.set_ylim(0, max(1.0, 1.15 * max(saturated, default=0.0)))
    handles = [axes.get_legend_handles_labels(), right.get_legend_handles_labels()]
    drawn, names = ([*a, *b] for a, b in zip(*handles, strict=True))
    axes.legend(drawn, names, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)


def _name_layers(axes: "Axes", layers: Sequence[LayerError]) -> None:
    """Number the layers as the table does, and not more densely than can be read."""
    step = max(1, -(-len(layers) // 32))
    axes.set_xticks(range(0, len(layers), step))
    axes.set_xticklabels([str(k + 1) for k in range(0, len(layers), step)], fontsize=8)
    axes.set_xlim(-0.8, len(layers) - 0.2)
    axes.set_xlabel("layer, as numbered in the table")
