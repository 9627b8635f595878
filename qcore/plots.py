"""Plots of reports as SVG elements. The same drawing gives the same bytes: no date, and names from a fixed salt."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Any = {  # the stubs of rc_context name every setting
    "svg.hashsalt": "qcore",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of people's layers may hold dollars
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a939b",
    "axes.labelcolor": "#3a444c",
    "xtick.color": "#5b666e",
    "ytick.color": "#5b666e",
    "grid.color": "#e6eaed",
}


def svg_of(draw: Callable[["Axes"], None], *, width: float, height: float) -> str:
    """Return what `draw` puts on empty axes as an SVG element of `width` x `height` inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
