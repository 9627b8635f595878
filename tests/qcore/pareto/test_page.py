"""The page: a dot per trial, the front, the chosen one, and nothing loaded from elsewhere."""

import re

from qcore.pareto.page import Curve, Dot, _line, pareto_page


def curve(**changes):
    dots = [("int8 everywhere", 0.3, 1000, 2.0, False), ("9 in int16 of 9 layers", 0.01, 1100, 4.0, True)]
    dots += [("2 in int16 of 9 layers", 0.04, 1020, 2.5, True), ("1 in int16 of 9 layers", 0.2, 1030, 2.6, False)]
    names = ("label", "error", "size_bytes", "latency_ms", "holds")
    made = {
        "title": "Mixed precision for <here>",
        "why": "2 in int16",
        "base": "int8",
        "met": True,
        "measure": "drop",
        "limit": 0.05,
        "dots": tuple(Dot(**dict(zip(names, d, strict=True))) for d in dots),
        "chosen": 2,
        "rows": (("conv<1>", "Conv", "int16", 0.2), ("fc", "Gemm", "int8", 0.1)),
        "facts": {"float model": "sha256 abc"},
    }
    return Curve(**{**made, **changes})


def rows_of(page, marked):
    return [r for r in re.findall(r'<tr class="([^"]*)">', page) if marked in r]


def test_every_trial_is_a_dot_and_the_chosen_one_is_marked():
    page = pareto_page(curve())
    assert curve().front == (0, 2, 1)
    assert page.count("<svg") == 2  # over size, over latency
    assert page.count(" in int16 of 9 layers") == 3
    assert len(rows_of(page, "chosen")) == 1
    assert "front, chosen" in page
    assert page.count("does not hold</td>") == 2
    assert "The budget holds" in page
    assert "conv&lt;1&gt;" in page
    assert "for <here>" not in page
    # per plot: a circle for each trial, one for each on the front, one around the chosen
    marks = [svg.count("<use ") for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert all(m >= 4 + 3 + 1 for m in marks)


def test_it_loads_nothing_and_the_same_curve_gives_the_same_bytes():
    page = pareto_page(curve())
    assert page == pareto_page(curve())
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "<script" not in page


def test_without_latency_there_is_one_plot_and_a_reason():
    dots = tuple(Dot(label="int8", error=e, size_bytes=1, latency_ms=None, holds=False) for e in (0.1, 0.2))
    page = pareto_page(curve(dots=dots, chosen=0, met=False, limit=None))
    assert page.count("<svg") == 1
    assert "Latency was not measured" in page
    assert "no model was written" in page
    assert "nearest" in page


def test_the_line_of_a_plot_falls_from_left_to_right():
    costs, errors = [3.0, 1.0, 2.0, 2.0, 4.0], [0.1, 0.9, 0.5, 0.4, 0.2]
    assert _line(costs, errors) == [1, 3, 0]
