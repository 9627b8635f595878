"""Sections on what was decided: the candidates side by side, the gate, how they were made, cost, lineage, override."""

from collections.abc import Mapping

from qcore.measured import Ratio
from qcore.report import Check, Group
from qcore.review.facts import Judged, Review, costs, digests, machine, urgent_first
from qcore.review.source import Step
from qcore.review.tables import Section, Table, number_columns, rest_of, subject_first
from qcore.review.wording import by_name, count, cut, listed, milliseconds, number, percent, size, times
from qcore.waiver import Waiver

GROUPS_SHOWN = 20
TRIALS_SHOWN = 20

COST_WORDS: Mapping[str, str] = {
    "latency_p50_ms": "latency, median, 1 thread",
    "latency_p95_ms": "latency, 95 %, 1 thread",
    "latency_runs": "timed runs",
    "size_bytes": "file size",
    "package_bytes": "model's share of a package (zstd)",
}


def models(review: Review) -> Section:
    """Return one row for the model with float and every candidate for each question, and a row per candidate."""
    measure, m = review.measure, review.candidates[0].source.report.metrics
    labels = [cut(c.label, 40) for c in review.candidates]
    reports = [c.source.report for c in review.candidates]
    theirs = m.get(f"baseline_{measure.key}")
    floats = [] if theirs is None else [measure.worth(theirs)]
    header = (
        "model",
        *(f"{measure.words}: {side}" for side in [*(["float"] if floats else []), *labels]),
        *(f"latency: {side}" for side in ["float", *labels]),
        *(f"size: {side}" for side in ["float", *labels]),
    )
    row = (
        cut(review.title, 60),
        *floats,
        *(measure.worth(r.metrics[measure.key]) for r in reports),
        milliseconds(review.baseline.latency_ms.p50),
        *(milliseconds(r.model.latency_ms.p50) for r in reports),
        size(review.baseline.size_bytes),
        *(size(r.model.size_bytes) for r in reports),
    )
    data = f"{count(review.n, 'sample')} of {cut(review.data.name, 60)} / {cut(review.data.split, 60)}"
    text = f"On {data}; latency is the median at batch 1 on one thread. Each candidate was timed in turns with float."
    sides = len(labels) + 1
    over = (("", 1), (measure.words, len(floats) + len(labels)), ("latency", sides), ("size", sides))
    table = Table(title="", header=header, rows=(row,), right=number_columns(header, ("model",)), over=over)
    return Section(key="models", title="Float and candidates", text=text, tables=(table, _candidates(review)))


def _candidates(review: Review) -> Table:
    measure = review.measure
    header = ("candidate", "gate", measure.words, "change", "agreement", "latency", "size", "trade-off")
    rows = []
    for c in subject_first(review):
        report = c.source.report
        theirs = report.metrics.get(f"baseline_{measure.key}")
        ours = report.metrics[measure.key]
        agreement = report.metrics.get("agreement")
        rows.append(
            (
                cut(c.label, 60),
                c.stands,
                measure.worth(ours),
                "" if theirs is None else measure.change(ours - theirs),
                "" if agreement is None else percent(agreement),
                times(report.model.latency_ms.p50 / report.baseline.latency_ms.p50),
                times(report.model.size_bytes / report.baseline.size_bytes),
                "on the front" if c.on_front else "another one is better in all",
            )
        )
    right = number_columns(header, ("candidate", "gate", "trade-off"))
    return Table(title="Against float", header=header, rows=tuple(rows), right=right)


def gate(review: Review) -> Section:
    """Return the checks of each decision, and of slices and classes."""
    tables: list[Table] = []
    for c in subject_first(review):
        if c.source.decision is None:
            continue
        ranked = urgent_first(c.source.decision)
        header = ("check", "outcome", "observed", "bound", "limit", "reason")  # on a phone the first two are seen
        by = {name: waiver.owner.name for name, waiver in c.source.decision.waived.items()}
        rows = tuple(_check(check, by.get(check.name)) for check in ranked)
        right = number_columns(header, ("check", "outcome", "reason"))
        title, aside = f"Checks of {cut(c.label, 60)}", c is not review.judged
        tables.append(Table(title=title, header=header, rows=rows, right=right, aside=aside))
        tables += [_groups(review, check, c) for check in ranked if check.groups]
    silent = [c.label for c in review.candidates if c.source.decision is None]
    text = (
        "The bound is what the value is at worst at the stated confidence; a check passes where the bound keeps the "
        "limit, and not where the observed value happens to."
    )
    if silent:
        text += f" Not judged: {listed(silent)}."
    return Section(
        key="gate", title="Gate", text=text if tables else "No gate decision was given.", tables=tuple(tables)
    )


def _check(check: Check, by: str | None) -> tuple[str, ...]:
    values = (by_name(check.name, v) for v in (check.observed, check.bound, check.limit))
    more = "" if check.needs_samples is None else f"; about {count(check.needs_samples, 'more sample')} would decide"
    waiver = "" if by is None else f"waived by {cut(by, 60)}: "
    return (cut(check.name, 60), check.outcome, *values, waiver + cut(check.reason) + more)


def _groups(review: Review, check: Check, judged: Judged) -> Table:
    header = ("group", "samples", "observed", "bound", "outcome", "reason")
    order = {"fail": 0, "inconclusive": 1, "pass": 2, "not judged": 3}
    ranked = sorted(check.groups, key=lambda g: (order[g.outcome], g.bound or 0.0, g.name))
    rows = tuple(_group(review, check.name, g) for g in ranked[:GROUPS_SHOWN])
    return Table(
        title=f"{cut(judged.label, 60)}, groups of {cut(check.name, 60)}, worst first",
        header=header,
        rows=rows,
        right=number_columns(header, ("group", "outcome", "reason")),
        more=rest_of(len(ranked), GROUPS_SHOWN, "group"),
        aside=judged is not review.judged,
        minor=check.outcome == "pass",
    )


def _group(review: Review, check: str, g: Group) -> tuple[str, ...]:
    kind, _, label = g.name.partition(" ")
    known = kind == "class" and label.isdecimal() and int(label) in review.classes
    name = f"{g.name} {review.classes[int(label)]}" if known else g.name
    observed, bound = ("" if v is None else by_name(check, v) for v in (g.observed, g.bound))
    return (cut(name, 60), f"{g.support:,}", observed, bound, g.outcome, cut(g.reason))


def changed(review: Review) -> Section | None:
    """Return how each candidate was made; None where nobody told."""
    rows = []
    for c in subject_first(review):
        s = c.source.summary
        if s is not None:
            trained = "yes" if s.trained else "no"
            rows.append(
                (cut(c.label, 60), cut(s.recipe, 60), cut(s.target, 60), trained, "; ".join(map(_step, s.steps)))
            )
    if not rows:
        return None
    header = ("candidate", "recipe", "target", "trained", "steps")
    table = Table(title="", header=header, rows=tuple(rows))
    return Section(
        key="changed", title="What changed", text="Each candidate was made from the float model.", tables=(table,)
    )


def _step(step: Step) -> str:
    parts = [f"{step.changed:,} changed"] if step.changed else []
    if step.epochs:
        took = f"{count(step.epochs, 'epoch')} on {count(step.samples, 'sample')}, {milliseconds(1000 * step.seconds)}"
        parts.append(took)
    if step.skipped:
        parts.append(f"{len(step.skipped):,} left alone")
    if not step.kept:
        parts.append("not kept")
    return f"{cut(step.method, 40)} ({', '.join(parts)})" if parts else cut(step.method, 40)


def trade(review: Review) -> Section:
    """Return the question that the trade-off plots answer."""
    front = [c.label for c in review.candidates if c.on_front]
    words = review.measure.words
    text = (
        f"Lower and further left is better; float is where nothing is lost in {words}. On the front: {listed(front)}."
    )
    return Section(key="trade", title="What is lost for what is saved", text=text)


def trials(review: Review) -> Section | None:
    """Return what searches tried; None without one."""
    tables, said = [], []
    header = ("#", "trial", "outcome", "error", "size", "latency", "")
    for c in subject_first(review):
        s = c.source.summary
        if s is None or not s.trials:
            continue
        said.append(cut(s.searched, 400))
        rows = tuple(
            (
                str(k + 1),
                cut(t.label, 80),
                t.outcome,
                "none" if t.error is None else number(t.error),
                size(t.size_bytes) if t.size_bytes else "none",
                "" if t.latency_ms is None else milliseconds(t.latency_ms),
                "chosen" if t.chosen else "",
            )
            for k, t in enumerate(s.trials)
            if k < TRIALS_SHOWN or t.chosen
        )
        more = rest_of(len(s.trials), len(rows), "trial")
        right = frozenset({0, 3, 4, 5})
        tables.append(
            Table(
                title=f"Tried for {cut(c.label, 60)}",
                header=header,
                rows=rows,
                right=right,
                more=more,
                aside=c is not review.judged,
            )
        )
    return Section(key="trials", title="What was tried", text=" ".join(said), tables=tuple(tables)) if tables else None


def cost(review: Review) -> Section:
    """Return what float model and candidates cost."""
    measured = {c.source.name: costs(c.source.report) for c in subject_first(review)}
    names = list(dict.fromkeys(k for found in measured.values() for k in found))
    header = ("cost", "float", *(cut(c.label, 40) for c in subject_first(review)))
    rows = []
    for name in names:
        theirs = next((found[name][0] for found in measured.values() if name in found), None)
        ours = [found.get(name, (None, None))[1] for found in measured.values()]
        said = COST_WORDS.get(
            name, name.rsplit("_", 1)[0].replace("_", " ") if name.endswith(("_ms", "_bytes")) else name
        )
        rows.append((cut(said, 60), *("" if v is None else by_name(name, v) for v in (theirs, *ours))))
    rows += _further_costs(review)
    table = Table(title="", header=header, rows=tuple(rows), right=number_columns(header, ("cost",)))
    where = ", ".join(f"{k} {v}" for k, v in sorted(machine(review.judged.source.report).items()))
    return Section(key="cost", title="What it costs", text=f"Measured with {cut(where, 300)}.", tables=(table,))


def _further_costs(review: Review) -> list[tuple[str, ...]]:
    """Return what other files than the report say: the package, and the time that training took."""
    sources = [c.source for c in subject_first(review)]
    packages = ["" if s.package is None else size(s.package.size_bytes) for s in sources]
    packed = [
        "" if s.summary is None or s.summary.packed_bytes is None else size(s.summary.packed_bytes) for s in sources
    ]
    seconds = [0.0 if s.summary is None else sum(step.seconds for step in s.summary.steps) for s in sources]
    timed = [s.report.ratios for s in sources]
    names = list(dict.fromkeys(name for found in timed for name in found))
    rows = [
        (f"{name.replace('_', ' ')}, of float", "", *(_interval(found.get(name)) for found in timed)) for name in names
    ]
    deltas = [s.report.download for s in sources]
    rows.append(("download from the champion", "", *("" if d is None else size(d.delta_bytes) for d in deltas)))
    rows += [("package, whole download", "", *packages), ("model's share of a package, when made", "", *packed)]
    rows.append(("training", "", *("" if not v else milliseconds(1000 * v) for v in seconds)))
    return [row for row in rows if any(row[1:])]


def _interval(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    bounds = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{times(ratio.value)}{bounds}"


def lineage(review: Review) -> Section:
    """Return the digests of everything."""
    tables = []
    for c in subject_first(review):
        source = c.source
        rows = [(name, value) for name, value in digests(c).items()]
        if source.package is not None:
            rows.append(("release", cut(source.package.release, 120)))
        rows += [(cut(k, 40), cut(str(v), 120)) for k, v in sorted(machine(source.report).items())]
        rows.append(("qcore", source.report.qcore_version))
        title = f"What exactly {cut(c.label, 60)} is (SHA-256)"
        aside = c is not review.judged
        tables.append(Table(title=title, header=("of", "digest or version"), rows=tuple(rows), aside=aside))
    shipped, decision = review.judged.source.package, review.judged.source.decision
    text = "No package was given; what is released is the candidate with exactly this digest."
    if decision is not None and decision.package is not None:
        gated = decision.package
        text = f"Judged as the package of {cut(gated.family, 60)} {cut(gated.version, 60)} with the digest below."
    if shipped is not None:
        said = f"Packaged: {cut(shipped.release, 120)}, {size(shipped.size_bytes)}, with the digest below."
        text = f"{said} Whether it was published is not known here."
    return Section(key="lineage", title="What exactly was judged and shipped", text=text, tables=tuple(tables))


def override(review: Review) -> Section:
    """Return who may release in spite of the outcome, and who did."""
    decision = review.judged.source.decision
    rule = "There is nothing to override yet: run the gate." if decision is None else decision.override.sentence()
    given = () if decision is None else decision.waivers
    text = f"{rule} A release needs the gate's signature on the decision, which the publisher cannot give."
    if not given:
        return Section(key="override", title="Who may override", text=f"{text} No waiver is in force.")
    header = ("waived by", "checks", "reason", "issued", "expires")
    table = Table(title="Waivers", header=header, rows=tuple(_waiver(signed.waiver) for signed in given))
    return Section(key="override", title="Who may override", text=text, tables=(table,))


def _waiver(w: Waiver) -> tuple[str, ...]:
    return (cut(w.owner.name, 60), cut(", ".join(c.name for c in w.checks)), cut(w.reason), w.issued, w.expires)
