"""The review as one HTML page: it loads nothing from anywhere and needs no script. The same review, the same bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from qcore.review.drawing import layers_plot, letter, range_plot, trade_plot
from qcore.review.facts import Review
from qcore.review.measured import RANGES_SHOWN
from qcore.review.sections import sections
from qcore.review.source import RangeFit
from qcore.review.tables import subject_first
from qcore.review.wording import KIB, MIB, cut

TEMPLATE = Path(__file__).with_name("page.html.j2")

BADGES = {
    "pass": "✓",
    "pass by waiver": "≈",
    "fail": "✗",
    "inconclusive": "?",
    "not judged": "-",
    "holds": "✓",
    "does not hold": "✗",
    "equal": "✓",
    "near": "≈",
    "far": "✗",
    "local": "✗",
    "accumulated": "≈",
}
"""Words that stand alone in a cell, and the sign in front of them; both have a colour, none has colour alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A plot and what it shows, in words."""

    svg: str
    caption: str


def to_html(review: Review) -> str:
    """Return the HTML page of `review`."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.tests["digest"] = lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        review=review,
        sections=sections(review),
        figures=_figures(review),
        letters={"trade": _letters(review, False), "layers": _letters(review, True)},
        badges=BADGES,
        versions=review.judged.source.report.qcore_version,
    )


def _letters(review: Review, with_layers: bool) -> list[tuple[str, int, str]]:
    """Return letter, colour and name of each candidate, or of those with a layer report."""
    named = enumerate(review.candidates)
    return [(letter(k), k % 6, cut(c.label, 80)) for k, c in named if c.source.layers or not with_layers]


def _figures(review: Review) -> Mapping[str, tuple[Figure, ...]]:
    """Return the plots by the key of their section."""
    base = review.baseline
    unit, name = (MIB, "MiB") if base.size_bytes >= MIB else (KIB, "KiB")
    sizes = trade_plot(
        review, f"file size, {name}", lambda c: c.source.report.model.size_bytes / unit, base.size_bytes / unit
    )
    trade = (
        Figure(svg=sizes, caption="Loss over file size"),
        Figure(
            svg=trade_plot(
                review, "latency, median, ms", lambda c: c.source.report.model.latency_ms.p50, base.latency_ms.p50
            ),
            caption="Loss over latency on one thread of the machine that evaluated",
        ),
    )
    found: dict[str, tuple[Figure, ...]] = {"trade": trade}
    reports = [(k, c.source.layers) for k, c in enumerate(review.candidates)]
    given = [(k, layers) for k, layers in reports if layers is not None and layers.layers]
    if given:
        caption = (
            "Lines: accumulated error in the whole model; dots: each layer alone; crosses: layers that are at fault "
            "themselves. Dashed: the limits, 20 dB for a layer alone and 12 dB accumulated."
        )
        found["layers"] = (Figure(svg=layers_plot(given), caption=caption),)
    drawn = next((c for c in subject_first(review) if c.source.ranges is not None), None)
    if drawn is not None and drawn.source.ranges is not None:
        fits = drawn.source.ranges.fits[:RANGES_SHOWN]
        found["ranges"] = tuple(Figure(svg=range_plot(f), caption=_caption(drawn.label, f)) for f in fits)
    return found


def _caption(label: str, fit: RangeFit) -> str:
    return f"{cut(label, 40)}: {cut(fit.tensor, 80)}; dashed: the chosen range {fit.low:.4g} to {fit.high:.4g}"
