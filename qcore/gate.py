"""The gate: is the candidate good enough, given what was measured and how sure we are?

Three outcomes. `pass`: the confidence bound is inside the limit. `fail`: the observed value itself is outside.
`inconclusive`: the observed value is inside but the bound is not; the check says how many more samples would decide.
Only pass releases. Pure and deterministic; anything missing is a refusal or a failed check, never a pass.

A report of another qcore version is judged. What a field of it means is fixed by its schema, whose number is raised
when the meaning changes, and every value that a check looks at is counted again from the samples by the version that
decides; refusing would ask for a new evaluation after every update and prove nothing more. The decision holds the
version that measured.
"""

import math
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qcore.budgets import budget_checks
from qcore.derived import paired_counts
from qcore.errors import GateRefused
from qcore.groups import Counts, Family, judge_groups
from qcore.noninferiority import Question, answer, loss_check, rate_check, share_check, upper_check
from qcore.numerics.bounds import Estimate, Floats, roc_areas, upper_bound
from qcore.parity_report import ParityReport
from qcore.policy import ErrorLimit, GatePolicy, MetricLimit, ParityLimit, champion_checks
from qcore.recount import refuse_contradictions
from qcore.report import TIME_FORM, Check, EvaluationReport, GateDecision, Outcome, PairedCounts, Values, outcome_of
from qcore.waiver import NOBODY

FEWEST_OF_A_KIND = 20
"""Anomalies, and normal samples, below which the bound of an area is not conservative."""
CHAMPION = "champion_"
"""What stands in the name of a check that holds the candidate against the champion."""
CLOCKS_APART = timedelta(minutes=5)
"""How far a report may seem to come from the future: clocks of two machines."""

Flags = NDArray[np.bool_]


def default_policy(report: EvaluationReport) -> GatePolicy:
    """Return the policy used when none is given.

    With classes, one point of top-1; for anomalies, one point of the area under the ROC curve; of a regression, a
    twentieth more mean absolute error than the baseline's. Without labels, 97 % agreement and an output error of at
    most a tenth of the outputs' power (10 dB); where outputs name no class, a hundredth (20 dB), since nothing else
    speaks for the candidate.
    """
    if report.paired is not None:
        return GatePolicy(top1=MetricLimit(max_drop=0.01))
    if "auc" in report.metrics:
        return GatePolicy(auc=MetricLimit(max_drop=0.01))
    if (error := report.metrics.get("baseline_mae", 0.0)) > 0:
        return GatePolicy(mae=ErrorLimit(max_increase=error / 20))
    if "agreement" in report.metrics:
        return GatePolicy(agreement=MetricLimit(min=0.97), output_sqnr_db=10)
    return GatePolicy(output_sqnr_db=20)


def decide(
    report: EvaluationReport,
    policy: GatePolicy,
    parity: ParityReport | None = None,
    now: datetime | None = None,
    package_bytes: int | None = None,
) -> GateDecision:
    """Return the decision on the candidate of `report`.

    Args:
        report: what was measured.
        policy: what is asked.
        parity: how the same file computes elsewhere; judged if the policy asks, and refused if it is of another file.
        now: the time, aware; needed by a policy with `max_age_days`.
        package_bytes: size of the package file that shall be released, for the budget of that name; None: there is none
            yet, and the model's share is judged.

    Raises:
        GateRefused: the policy limits something that was not measured, the report contradicts itself, or `parity` is
            not about its model and samples.
    """
    refuse_contradictions(report)
    if parity is not None:
        _refuse_other_parity(report, parity)
    checks = [
        *_accuracy_checks(report, policy),
        *_agreement_checks(report, policy),
        *_output_checks(report, policy),
        *_error_checks(report, policy),
        *_area_checks(report, policy),
        *_user_checks(report, policy),
        *_group_checks(report, policy),
        *_champion_check(report, policy),
        *_parity_checks(parity, policy.parity),
        *_age_check(report, policy.max_age_days, now),
        *budget_checks(report, policy.budgets, policy.confidence, package_bytes),
    ]
    return GateDecision(
        outcome=outcome_of(checks),
        checks=tuple(checks),
        confidence=policy.confidence,
        n=report.n,
        model_sha256=report.model.sha256,
        baseline_sha256=report.baseline.sha256,
        data_sha256=report.data.sha256,
        policy_sha256=policy.sha256,
        report_sha256=report.sha256,
        qcore_version=report.qcore_version,
        metrics=dict(report.metrics),
        override=NOBODY if policy.waivers is None else policy.waivers.override,
        champion_sha256=None if report.champion is None else report.champion.sha256,
        parity_sha256=None if parity is None else parity.sha256,
    )


def _accuracy_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    checks = []
    five = report.details.top5 if report.details is not None else None
    champion = (None, None) if report.champion is None else (report.champion.paired, report.champion.top5)
    for name, limit, paired, released in (
        ("top1", policy.top1, report.paired, champion[0]),
        ("top5", policy.top5, five, champion[1]),
    ):
        if limit is None:
            continue
        if paired is None:
            why = "the data has no labels" if report.paired is None else "the model tells five classes apart or fewer"
            raise GateRefused(f"the policy limits {name} but {why}; limit agreement or top1 instead")
        checks += _drop_checks(name, limit, paired, released, policy.confidence)
        if limit.min is not None:
            right = paired.both_right + paired.only_candidate_right
            checks.append(rate_check(f"{name}_min", (right, paired.n), limit.min, policy.confidence))
    return checks


def _drop_checks(
    name: str, limit: MetricLimit, paired: PairedCounts | None, released: PairedCounts | None, confidence: float
) -> list[Check]:
    """Return what a share of right answers may lose against the baseline and against the champion."""
    asked = ((f"{name}_drop", limit.max_drop, paired), (f"{name}_champion_drop", limit.max_drop_champion, released))
    return [
        share_check(check, (c.only_candidate_right, c.only_baseline_right, c.n), most, confidence)
        for check, most, c in asked
        if most is not None and c is not None
    ]


def _agreement_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    """Return the checks of agreement; against the champion, of who more often names the baseline's class."""
    limit, s = policy.agreement, report.samples
    if limit is None:
        return []
    if s.baseline is None or s.candidate is None:
        raise GateRefused(
            "the policy limits agreement but the outputs name no class (one value per sample); limit output_sqnr_db"
        )
    theirs = np.array(s.baseline)
    agrees = np.array(s.candidate) == theirs
    checks = []
    if limit.min is not None:
        checks.append(
            rate_check("agreement_min", (int(np.count_nonzero(agrees)), report.n), limit.min, policy.confidence)
        )
    if limit.max_drop_champion is not None and s.champion is not None:
        counts = paired_counts(agrees, np.array(s.champion) == theirs)
        checks += _drop_checks("agreement", limit, None, counts, policy.confidence)
    return checks


def _output_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.output_sqnr_db
    if limit is None:
        return []
    if "output_sqnr_db" not in report.metrics:
        raise GateRefused("the policy limits output_sqnr_db, which the report lacks; run `qcore evaluate` again")
    observed = report.metrics["output_sqnr_db"]
    return [_least("output_sqnr_db", observed, limit, f"dB of the worst output over {report.n} samples")]


def _least(name: str, observed: float, limit: float, reason: str) -> Check:
    """Return the check that a value without sampling error is at least `limit`."""
    outcome: Outcome = "pass" if observed >= limit else "fail"
    return Check(name=name, outcome=outcome, observed=observed, bound=observed, limit=limit, reason=reason)


def _error_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.mae
    if limit is None:
        return []
    if report.data.task != "regression":
        raise GateRefused(f"the policy limits mae but the task is {report.data.task}; limit what that task measures")
    errors = report.samples.values["absolute_error"]
    ours = np.array(errors.candidate, np.float64)
    most = {"": limit.max_increase, CHAMPION: limit.max_increase_champion}
    checks = [
        upper_check(f"mae_{rival}increase", ours - column, allowed, policy.confidence, same)
        for rival, (column, same) in _rivals(report, errors).items()
        if (allowed := most[rival]) is not None
    ]
    if limit.max is not None:
        checks.append(upper_check("mae_max", ours, limit.max, policy.confidence))
    return checks


def _rivals(report: EvaluationReport, values: Values) -> dict[str, tuple[Floats, bool]]:
    """Return the columns that the candidate is held against, and whether they are of the candidate's own file.

    The keys stand in the names of checks: "" for the baseline, `CHAMPION` for the champion where there is one.
    """
    rivals = {"": (np.array(values.baseline, np.float64), report.baseline.sha256 == report.model.sha256)}
    if report.champion is not None and values.champion is not None:
        rivals[CHAMPION] = (np.array(values.champion, np.float64), report.champion.sha256 == report.model.sha256)
    return rivals


def _area_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    limit = policy.auc
    if limit is None:
        return []
    label = report.samples.label
    if report.data.task != "anomaly" or label is None:
        raise GateRefused(f"the policy limits auc but the task is {report.data.task}; limit what that task measures")
    positive, scores = np.array(label) == 1, report.samples.values["score"]
    odd = int(positive.sum())
    scarcer = min(odd, report.n - odd)
    if scarcer < 2:
        raise GateRefused(f"auc rests on {scarcer} sample; allowed: {FEWEST_OF_A_KIND} of 0 and of 1; add samples")
    ours, most = np.array(scores.candidate, np.float64), {"": limit.max_drop, CHAMPION: limit.max_drop_champion}
    asked: list[tuple[str, Estimate, float, float, float]] = []
    for rival, (column, _) in _rivals(report, scores).items():
        areas = roc_areas(positive, column, ours)
        if (allowed := most[rival]) is not None:
            asked.append((f"auc_{rival}drop", areas.drop, areas.candidate - areas.baseline, -allowed, 0.0))
        if limit.min is not None and not rival:
            asked.append(("auc_min", areas.missing, areas.candidate, limit.min, 1.0))
    checks = []
    for name, estimate, observed, least, whole in asked:
        question = Question(
            name=name,
            observed=observed,
            limit=least,
            bound_at=partial(_area_bound, estimate, whole, (report.n, policy.confidence)),
            counts=f"{odd} anomalies among {report.n} samples",
            fewest=math.ceil(FEWEST_OF_A_KIND * report.n / scarcer),
        )
        checks.append(answer(question, report.n))
    return checks


def _area_bound(estimate: Estimate, whole: float, of: tuple[int, float], m: float) -> float:
    n, confidence = of
    return whole - upper_bound(estimate, m / n, confidence)


def _user_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    """Return the checks of the user's metrics; one that gives 0 and 1 alone is a share, and judged as top-1 is."""
    checks = []
    for name, limit in policy.metrics.items():
        direction = report.user_metrics.get(name)
        if direction is None:
            known = ", ".join(report.user_metrics) or "none"
            raise GateRefused(f"the policy limits metric {name!r}, which was not measured; known: {known}; add it")
        values = report.samples.values[name]
        ours, most = np.array(values.candidate, np.float64), {"": limit.max_loss, CHAMPION: limit.max_loss_champion}
        for rival, (column, same) in _rivals(report, values).items():
            if (allowed := most[rival]) is None:
                continue
            worse = column - ours if direction == "higher" else ours - column
            check = f"{name}_{rival}change"
            if _are_shares(ours, column) and allowed < 1:
                counts = (int(np.sum(worse < 0)), int(np.sum(worse > 0)), report.n)
                checks.append(share_check(check, counts, allowed, policy.confidence))
            else:
                checks.append(loss_check(check, worse, -allowed, policy.confidence, same))
    return checks


def _are_shares(*columns: Floats) -> bool:
    return all(bool(np.isin(column, (0.0, 1.0)).all()) for column in columns)


def _group_checks(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    if policy.slices is None and policy.classes is None:
        return []
    s = report.samples
    if report.paired is None or s.label is None:
        raise GateRefused("the policy limits slices or classes of top-1 but the data has no classes; leave them out")
    if policy.slices is not None and not report.slices:
        raise GateRefused("the policy limits slices but the data card has none; add `slices` and evaluate again")
    label, ours = np.array(s.label, np.int64), np.array(s.candidate, np.int64) == np.array(s.label, np.int64)
    checks = []
    for rival, column in (("", s.baseline), (CHAMPION, s.champion)):
        if column is None:
            continue
        theirs = np.array(column, np.int64) == label
        won, lost = ours & ~theirs, theirs & ~ours
        for name, limit in (("slices", policy.slices), ("classes", policy.classes)):
            if limit is None or (most := limit.max_drop_champion if rival else limit.max_drop) is None:
                continue
            counted = _counts_of_slices(report, won, lost) if name == "slices" else _counts_of_classes(label, won, lost)
            family = Family(
                name=f"{name}_{rival}drop",
                max_drop=most,
                min_support=limit.min_support,
                require=limit.require,
                confidence=policy.confidence,
                total=report.n,
            )
            checks.append(judge_groups(family, counted))
    return checks


def _counts_of_slices(report: EvaluationReport, won: Flags, lost: Flags) -> dict[str, Counts]:
    chosen = {name: np.array(places, np.int64) for name, places in report.slices.items()}
    return {name: Counts(n=len(k), wins=int(won[k].sum()), losses=int(lost[k].sum())) for name, k in chosen.items()}


def _counts_of_classes(label: NDArray[np.int64], won: Flags, lost: Flags) -> dict[str, Counts]:
    columns = [np.bincount(label, weights=w).astype(np.int64).tolist() for w in (None, won, lost)]
    rows = enumerate(zip(*columns, strict=True))
    return {f"class {k}": Counts(n=n, wins=w, losses=b) for k, (n, w, b) in rows if n}


def _champion_check(report: EvaluationReport, policy: GatePolicy) -> list[Check]:
    """Return the check that there is a champion where the policy limits something against it and there is none.

    Observed is how many champions were measured. A first release, which the policy has to state, passes without one;
    the decision names what was not asked for that reason.
    """
    asked = champion_checks(policy)
    if not asked or report.champion is not None:
        return []
    if policy.first_release:
        said = f"first release, as the policy states: no champion to compare with; not judged: {', '.join(asked)}"
        return [_least("champion", 0.0, 0.0, said)]
    said = (
        f"the policy asks {', '.join(asked)} and the report has no champion; evaluate with --champion RELEASED, or "
        "state `first_release: true` in the policy if nothing was released before"
    )
    return [_least("champion", 0.0, 1.0, said)]


def _refuse_other_parity(report: EvaluationReport, parity: ParityReport) -> None:
    measured, data = parity.measured, report.data
    pairs = {
        "model": (measured.model_sha256, report.model.sha256),
        "data": (measured.split_sha256, data.sha256),
        "data card and split": (f"{measured.data}/{measured.split}", f"{data.name}/{data.split}"),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            shown = (found, expected) if "/" in found else (found[:12], expected[:12])
            raise GateRefused(
                f"the parity report is about {what} {shown[0]}, the evaluation report about {shown[1]}; "
                "allowed: the same; run `qcore parity` on the model and split that were evaluated"
            )


def _parity_checks(parity: ParityReport | None, limit: ParityLimit | None) -> list[Check]:
    if limit is None:
        return []
    if parity is None:
        return [_least("parity", 0.0, 1.0, "the policy asks for parity and none was given; run `qcore parity`")]
    judged = [c for c in parity.conditions if c.name in limit.conditions]
    there = f"conditions that the policy names: {', '.join(limit.conditions)}"
    if missing := [name for name in limit.conditions if name not in {c.name for c in judged}]:
        there = f"the parity report lacks {', '.join(missing)}; run `qcore parity` again"
    checks = [_least("parity_conditions", float(len(judged)), float(len(limit.conditions)), there)]
    said = f"worst of {len(judged)} conditions over {parity.measured.n} samples"
    if limit.agreement is not None:
        shares = [(c.agreement, c.name) for c in judged if c.agreement is not None]
        if len(shares) != len(judged):
            raise GateRefused("the policy limits parity.agreement but the outputs name no class; limit parity.sqnr_db")
        if shares:
            worst = min(shares)
            checks.append(_least("parity_agreement", worst[0], limit.agreement, f"{worst[1]}, the {said}"))
    if limit.sqnr_db is not None and judged:
        noise = min((c.sqnr_db, c.name) for c in judged)
        checks.append(_least("parity_sqnr_db", float(noise[0]), limit.sqnr_db, f"dB under {noise[1]}, the {said}"))
    return checks


def _age_check(report: EvaluationReport, limit: float | None, now: datetime | None) -> list[Check]:
    """Return the check that what was measured is not older than `limit` days."""
    if limit is None:
        return []
    if now is None:
        raise GateRefused("the policy limits the age of the report and the time is not known; run `qcore gate`")
    # Whole seconds, so that whoever knows the age can decide again.
    age = now.replace(microsecond=0) - datetime.strptime(report.measured_at, TIME_FORM).replace(tzinfo=UTC)
    if age < -CLOCKS_APART:
        raise GateRefused(
            f"the report was measured at {report.measured_at}, which is not yet; allowed: the past; correct the clock "
            "of either machine and run `qcore evaluate` again"
        )
    days = max(age / timedelta(days=1), 0.0)
    outcome: Outcome = "pass" if days <= limit else "fail"
    reason = f"days since {report.measured_at}"
    reason = reason if outcome == "pass" else f"{reason}: too old; run `qcore evaluate` again"
    return [Check(name="age_days", outcome=outcome, observed=days, bound=days, limit=limit, reason=reason)]
