"""Sections on what was measured in detail: layers, classes, samples, ranges, what was left alone, other conditions."""

from collections.abc import Sequence
from dataclasses import replace

from qcore.review.facts import Flip, Judged, Review
from qcore.review.source import RangeFit, Summary
from qcore.review.tables import Section, Table, number_columns, rest_of, subject_first
from qcore.review.wording import count, cut, decibels, listed, number, percent, points, small

CLASSES_SHOWN = 20
FLIPS_SHOWN = 12
LAYERS_SHOWN = 10
REASONS_SHOWN = 12
RANGES_SHOWN = 8
"""Histograms that are drawn; the other tensors are named."""


def layers(review: Review) -> Section | None:
    """Return the layers that stand out; None without a layer report."""
    tables, said = [], []
    header = ("#", "layer", "op", "verdict", "local", "accumulated", "why")
    for c in subject_first(review):
        found = c.source.layers
        if found is None:
            continue
        said.append(f"{cut(c.label, 60)}: {cut(found.advice, 400)}")
        noted = [(k, e) for k, e in enumerate(found.layers) if e.verdict != "fine"]
        worst = sorted(noted, key=lambda numbered: (numbered[1].verdict != "local", numbered[1].accumulated_db))
        rows = tuple(
            (
                str(k + 1),
                cut(e.node, 80),
                e.op_type,
                e.verdict,
                "float" if e.local_db is None else decibels(e.local_db),
                decibels(e.accumulated_db),
                cut(e.why),
            )
            for k, e in worst[:LAYERS_SHOWN]
        )
        if rows:
            title = f"Layers of {cut(c.label, 60)} that stand out, {len(noted)} of {len(found.layers)}"
            more = rest_of(len(worst), LAYERS_SHOWN, "layer")
            tables.append(
                Table(
                    title=title,
                    header=header,
                    rows=rows,
                    right=frozenset({0, 4, 5}),
                    more=more,
                    aside=c is not review.judged,
                )
            )
    if not said:
        return None
    said.append("Accumulated is a tensor inside the whole quantized model, local the layer alone; more dB is better.")
    return Section(key="layers", title="Error of each layer", text=" ".join(said), tables=tuple(tables))


def classes(review: Review) -> Section | None:
    """Return the classes that change; None without labels."""
    tables, said = [], []
    for c in subject_first(review):
        if not c.classes:
            continue
        moved = [k for k in c.classes if k.change]
        lose, gain = (sum(k.change * sign > 0 for k in moved) for sign in (-1, 1))
        said.append(f"{cut(c.label, 60)}: {lose:,} of {count(len(c.classes), 'class', 'classes')} lose, {gain:,} gain.")
        if not moved:
            continue
        header = ("class", "samples", "float", "candidate", "change")
        rows = tuple(
            (
                cut(review.class_name(k.label), 60),
                f"{k.support:,}",
                percent(k.baseline_right / k.support),
                percent(k.candidate_right / k.support),
                points(k.change),
            )
            for k in moved[:CLASSES_SHOWN]
        )
        title = f"Classes of {cut(c.label, 60)} that change, worst first"
        more = rest_of(len(moved), CLASSES_SHOWN, "class", "classes")
        right = number_columns(header, ("class",))
        tables.append(
            Table(title=title, header=header, rows=rows, right=right, more=more, aside=c is not review.judged)
        )
    if not said:
        return None
    said.append("A class of few samples moves a lot by chance; a policy can limit what classes may lose.")
    return Section(key="classes", title="Classes", text=" ".join(said), tables=tuple(tables))


def flips(review: Review) -> Section | None:
    """Return the samples whose answer changed; None where outputs name no class."""
    tables, said = [], []
    for c in subject_first(review):
        kinds = c.flips.named()
        if c.source.report.samples.candidate is None:
            tables += _grown(review, c)
            continue
        counted = ", ".join(f"{len(v):,} {kind}" for kind, v in kinds.items())
        said.append(f"{cut(c.label, 60)}: {counted}.")
        header = ("change", "sample", "class", "float says", "candidate says")
        rows = tuple(
            (
                kind,
                str(f.index),
                "" if f.label is None else cut(review.class_name(f.label), 60),
                cut(review.class_name(f.baseline), 60),
                cut(review.class_name(f.candidate), 60),
            )
            for kind, flips in kinds.items()
            for f in spread(flips)
        )
        if rows:
            found = sum(map(len, kinds.values()))
            more = rest_of(found, len(rows), "sample")
            title = f"Samples that {cut(c.label, 60)} answers otherwise"
            tables.append(
                Table(
                    title=title, header=header, rows=rows, right=frozenset({1}), more=more, aside=c is not review.judged
                )
            )
    if not said and not tables:
        return None
    title = "Samples that flipped" if said else "Samples that got worse"
    return Section(key="flips", title=title, text=" ".join(said), tables=tuple(tables))


def spread(flips: Sequence[Flip]) -> list[Flip]:
    """Return at most `FLIPS_SHOWN` of `flips`, evenly spread: data are often sorted by class."""
    n = len(flips)
    return [flips[k * n // FLIPS_SHOWN] for k in range(FLIPS_SHOWN)] if n > FLIPS_SHOWN else list(flips)


def _grown(review: Review, judged: Judged) -> list[Table]:
    """Return the samples of a regression whose error grew most."""
    samples = judged.source.report.samples
    errors = samples.values.get("absolute_error")
    if errors is None:
        return []
    rows = sorted(zip(samples.index, errors.baseline, errors.candidate, strict=True), key=lambda r: (r[1] - r[2], r[0]))
    worse = [r for r in rows if r[2] > r[1]]
    shown = tuple((str(i), number(a), number(b), number(b - a)) for i, a, b in worse[:FLIPS_SHOWN])
    if not shown:
        return []
    return [
        Table(
            title=f"Samples whose error grows most with {cut(judged.label, 60)}",
            header=("sample", "float's error", "candidate's error", "growth"),
            rows=shown,
            right=frozenset(range(4)),
            more=rest_of(len(worse), FLIPS_SHOWN, "sample"),
            aside=judged is not review.judged,
        )
    ]


def ranges(review: Review) -> Section | None:
    """Return the worst ranges, or why they are not drawn; None without calibration tables."""
    tables, said = [], []
    header = ("tensor", "chosen range", "observed", "beyond the range", "quantizer alone")
    for c in subject_first(review):
        found = c.source.ranges
        if c.source.no_ranges is not None:
            said.append(f"{cut(c.label, 60)}: {cut(c.source.no_ranges.why, 300)}")
        if found is None:
            continue
        rest = [f.tensor for f in found.fits[RANGES_SHOWN:]]
        more = f" Not shown: {listed(rest, 8)}." if rest else ""
        said.append(f"{cut(c.label, 60)}, calibrated on {count(found.samples, 'sample')}.{more}")
        rows = tuple(_range(f) for f in found.fits[:RANGES_SHOWN])
        title = f"Ranges of {cut(c.label, 60)}, worst first"
        right, aside = frozenset({1, 2, 3, 4}), c is not review.judged
        if rows:
            tables.append(Table(title=title, header=header, rows=rows, right=right, aside=aside))
    if not said:
        return None
    if tables:
        said.append("The last column is the signal over what clipping to the range and rounding within it cost.")
    return Section(key="ranges", title="Calibration", text=" ".join(said), tables=tuple(tables))


def _range(f: RangeFit) -> tuple[str, ...]:
    chosen, seen = (f"{number(a)} to {number(b)}" for a, b in ((f.low, f.high), (f.observed_low, f.observed_high)))
    return (cut(f.tensor, 80), chosen, seen, small(f.outside), decibels(f.sqnr_db))


def skipped(review: Review) -> Section | None:
    """Return what was left alone; None without a summary."""
    tables = [
        replace(t, aside=c is not review.judged)
        for c in subject_first(review)
        if c.source.summary is not None
        for t in _left(c.label, c.source.summary)
    ]
    made = [c for c in review.candidates if c.source.summary is not None]
    if not made:
        return None
    text = "What the recipe would have changed and did not, and where the file is not what its target wants."
    return Section(
        key="skipped",
        title="What was skipped and why",
        text=text if tables else "Nothing: every step did all of it, and the file is what its target wants.",
        tables=tuple(tables),
    )


def _left(label: str, summary: Summary) -> list[Table]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for step in summary.steps:
        if not step.kept:
            reasons[step.method, "whole step", step.reason or "the error on held-out samples did not fall"] = ["-"]
        for node, op_type, why in step.skipped:
            reasons.setdefault((step.method, op_type, why), []).append(node)
    tables = []
    if reasons:
        rows = tuple(
            (cut(method, 40), cut(op_type, 40), str(len(nodes)), cut(why), listed(nodes, 3))
            for (method, op_type, why), nodes in list(reasons.items())[:REASONS_SHOWN]
        )
        header = ("step", "op", "nodes", "why", "which")
        more = rest_of(len(reasons), REASONS_SHOWN, "reason")
        title = f"Left alone in {cut(label, 60)}"
        tables.append(Table(title=title, header=header, rows=rows, right=frozenset({2}), more=more))
    if summary.breaches:
        breaches = tuple((cut(b),) for b in summary.breaches[:REASONS_SHOWN])
        more = rest_of(len(summary.breaches), REASONS_SHOWN, "breach", "breaches")
        title = f"{cut(label, 60)} is not what {cut(summary.target, 60)} wants"
        tables.append(Table(title=title, header=("breach",), rows=breaches, more=more))
    return tables


def parity(review: Review) -> Section | None:
    """Return how each candidate behaves elsewhere; None without a parity report."""
    tables, said = [], []
    for c in subject_first(review):
        found = c.source.parity
        if found is None:
            continue
        said.append(f"{cut(c.label, 60)}, {count(found.measured.n, 'sample')}: {cut(found.advice(), 300)}")
        header = ("condition", "verdict", "agreement", "top-1", "output SQNR", "stands for")
        rows = tuple(
            (
                cut(k.name, 60),
                k.verdict,
                "" if k.agreement is None else percent(k.agreement),
                "" if k.top1 is None else percent(k.top1),
                decibels(k.sqnr_db),
                cut(k.meaning),
            )
            for k in found.conditions
        )
        title = f"{cut(c.label, 60)} under other conditions"
        right, aside = frozenset({2, 3, 4}), c is not review.judged
        tables.append(Table(title=title, header=header, rows=rows, right=right, aside=aside))
    text = " ".join(said)
    return (
        Section(key="parity", title="Will it behave the same on the target?", text=text, tables=tuple(tables))
        if said
        else None
    )
