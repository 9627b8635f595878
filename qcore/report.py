"""The evidence: what was measured (EvaluationReport) and what was decided (GateDecision).

Plain values with one JSON form each. Standard library only, so that gate, release and device stay light. How they are
made is in `evaluation.py` and `gate.py`; how a decision is signed is in `release/evidence.py`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from qcore.canonical import Digest, Json, sha256_json, sha256_numbers
from qcore.errors import GateRefused
from qcore.measured import Download, MeasuredModel, Ratio, Rounds, check_digest
from qcore.waiver import (
    NOBODY,
    Binding,
    Override,
    SignedWaiver,
    WaivedCheck,
    Waiver,
    override_from_json,
    parse_time,
    refuse_not_permitted,
    refuse_other_subject,
    signed_waiver_from_json,
)

Outcome = Literal["pass", "fail", "inconclusive"]

REPORT_SCHEMA = "qcore.evaluation/3"
DECISION_SCHEMA = "qcore.decision/3"
Task = Literal["classification", "regression", "anomaly", "none"]
Direction = Literal["higher", "lower"]

BUDGETS = (
    "size_bytes",
    "size_ratio",
    "package_bytes",
    "package_ratio",
    "download_bytes",
    "latency_ms",
    "latency_ratio",
    "latency_all_cores_ratio",
    "cold_start_ms",
    "memory_bytes",
    "memory_ratio",
)
"""Checks that more samples or better weights do not help."""
NOT_WAIVABLE = ("champion", "parity", "parity_conditions", "age_days")
"""Checks about what was not measured, or not lately: nobody can vouch for what is not there."""
UPPER_LIMITS = (*BUDGETS, "mae_increase", "mae_champion_increase", "mae_max", "age_days")
"""Checks whose limit is an upper one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredData:
    """The samples that were used: names of card and split, task, the number of samples of each slice, and a digest.

    The digest is that of samples, preprocessing and slices.
    """

    name: str
    split: str
    task: Task
    sha256: Digest
    slices: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no card gives."""
        if self.task not in get_args(Task):
            raise GateRefused(f"task is {self.task!r}; allowed: {', '.join(get_args(Task))}")
        texts, counts = (self.name, self.split, *self.slices), self.slices.values()
        if not all(isinstance(v, str) for v in texts) or not all(type(n) is int for n in counts):
            raise GateRefused(f"data are called {texts!r} with slices {self.slices!r}; allowed: text and whole numbers")
        check_digest(self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedCounts:
    """Samples by who was right; the four add up to n. `baseline` is the champion where one is compared with."""

    both_right: int
    only_candidate_right: int
    only_baseline_right: int
    both_wrong: int

    def __post_init__(self) -> None:
        """Refuse what nobody counts."""
        for count in (self.both_right, self.only_candidate_right, self.only_baseline_right, self.both_wrong):
            if type(count) is not int or count < 0:
                raise GateRefused(f"a paired count is {count!r}; allowed: a whole number of at least 0")

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.both_right + self.only_candidate_right + self.only_baseline_right + self.both_wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """One number per sample of each model; `champion` is None where there was none."""

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]
    champion: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Per-sample results, columns of length n.

    `label` holds class numbers, or 0 and 1 for anomalies; None for other tasks. `baseline`, `candidate` and `champion`
    are arg-max class numbers (the first of equals), None where outputs name no class, or there was no champion.
    `values` holds `absolute_error` of a
    regression (the mean over its outputs), `score` of anomalies, and what the metrics of users gave, by their names.
    """

    index: tuple[int, ...]
    label: tuple[int, ...] | None
    baseline: tuple[int, ...] | None
    candidate: tuple[int, ...] | None
    values: Mapping[str, Values] = field(default_factory=dict)
    champion: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """How many samples a class has, and how many of them either model names right."""

    label: int
    support: int
    baseline_right: int
    candidate_right: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbabilityBin:
    """Samples whose top probability lies in one of equal-width bins: how many, how many right, their mean probability.

    `confidence` is 0 where the bin is empty.
    """

    count: int
    right: int
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ByModel:
    """Of one model: cells of the confusion matrix that are not zero, as (label, predicted, count); probability bins."""

    confusion: tuple[tuple[int, int, int], ...]
    reliability: tuple[ProbabilityBin, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassDetails:
    """What labelled classes allow to say beyond top-1; `top5` is None for five classes or fewer."""

    classes: tuple[ClassCount, ...]
    baseline: ByModel
    candidate: ByModel
    top5: PairedCounts | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Champion:
    """The released model that the candidate would replace: SHA-256 and size of its file, and what it got right.

    `paired` and `top5` count candidate against champion; None where those of the baseline are.
    """

    sha256: Digest
    size_bytes: int
    paired: PairedCounts | None
    top5: PairedCounts | None

    def __post_init__(self) -> None:
        """Refuse what is no file."""
        if type(self.size_bytes) is not int or self.size_bytes <= 0:
            raise GateRefused(f"size_bytes of the champion is {self.size_bytes!r}; allowed: a whole number above 0")
        check_digest(self.sha256)


TIME_FORM = "%Y-%m-%dT%H:%M:%SZ"
"""How a report says when it was measured: UTC, to the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Candidate and baseline on exactly the same samples, and a released champion where there is one.

    `metrics` always holds `output_sqnr_db` (of the worst output). Beside it, `X` of the candidate and `baseline_X`:

    * classification: `top1`, `ece` (expected calibration error), for more than five classes `top5`; and the
      differences `top1_delta`, `top5_delta`. `paired` and `details` are there for this task alone.
    * regression: `mae`, `rmse`, `r2` (absent where all labels are equal); over all outputs together.
    * anomaly: `auc`, the area under the ROC curve.
    * `agreement` (share of samples with equal arg-max) for classification and unlabelled outputs of two values or more.
    * the mean of each metric of `user_metrics`, which says whether higher or lower values are better.

    With a champion there is `champion_X` beside each of them but `ece`; its `champion_agreement` and
    `champion_output_sqnr_db` are those with the baseline, as the candidate's are.

    Shares are fractions of 1. `slices` holds places in the columns of `samples`. `measured_at` is when the evaluation
    began (`TIME_FORM`); beside costs it is all that two runs over the same files do not share.

    `rounds` holds the times that latencies and `ratios` follow from, by the names of `TIMED`; `machine` says what they
    were measured on. `download` is None where there was no champion.
    """

    model: MeasuredModel
    baseline: MeasuredModel
    data: MeasuredData
    n: int
    metrics: Mapping[str, float]
    paired: PairedCounts | None
    samples: Samples
    runtime: Mapping[str, str]
    qcore_version: str
    measured_at: str
    champion: Champion | None = None
    details: ClassDetails | None = None
    slices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    user_metrics: Mapping[str, Direction] = field(default_factory=dict)
    rounds: Mapping[str, Rounds] = field(default_factory=dict)
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    download: Download | None = None

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.evaluation/3`); `latency_ms` repeats the candidate's for short paths."""
        value = _shallow(self)
        value |= {name: asdict(value[name]) for name in ("model", "baseline", "data")}
        value["paired"] = None if self.paired is None else asdict(self.paired)
        value["champion"] = None if self.champion is None else asdict(self.champion)
        value["details"] = None if self.details is None else _details_json(self.details)
        value |= {name: {k: asdict(v) for k, v in value[name].items()} for name in ("rounds", "ratios")}
        value["download"] = None if self.download is None else asdict(self.download)
        value["samples"] = _shallow(self.samples) | {"values": {k: _shallow(v) for k, v in self.samples.values.items()}}
        return {"schema": REPORT_SCHEMA, **value, "latency_ms": value["model"]["latency_ms"]}

    @property
    def sha256(self) -> Digest:
        """The digest of the canonical JSON form, with the digest of its numbers in place of every column and slice.

        The numbers are int64 or float64, little-endian: a million of them take milliseconds so, a second as text.
        """
        value, samples = self.to_json(), _shallow(self.samples)
        columns = {k: sha256_numbers("q", v) for k, v in samples.items() if k != "values" and v is not None}
        for name, sides in self.samples.values.items():
            numbers = {k: v for k, v in _shallow(sides).items() if v is not None}
            columns |= {f"{name} {k}": sha256_numbers("d", v) for k, v in numbers.items()}
        slices = {name: sha256_numbers("q", places) for name, places in self.slices.items()}
        return sha256_json({**value, "samples": columns, "slices": slices})


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One slice or class of a check: `bound` is None where it was not judged, `observed` where it has no samples."""

    name: str
    support: int
    outcome: Outcome | Literal["not judged"]
    observed: float | None
    bound: float | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question of the policy and its answer.

    `observed` is the point value, `bound` the one-sided confidence bound that is held against `limit` (equal to
    `observed` where the value has no sampling error), `needs_samples` the further samples that would decide an
    inconclusive check at the observed rates, `needs_runs` the further rounds of timing. Limits of `UPPER_LIMITS` are
    upper ones, all others lower ones.

    `groups` are the slices or classes that the check is about; numbers are then those of the worst one.

    Invariant: all numbers are finite, and the outcome is `pass` exactly if the bound satisfies the limit. It is not
    `pass` if that of a group is `fail` or `inconclusive`.
    """

    name: str
    outcome: Outcome
    observed: float
    bound: float
    limit: float
    reason: str
    needs_samples: int | None = None
    groups: tuple[Group, ...] = ()
    needs_runs: int | None = None

    def __post_init__(self) -> None:
        """Hold the invariant, also for a check that was read from a file."""
        numbers = (self.observed, self.bound, self.limit)
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise GateRefused(f"check {self.name}: {numbers} are not finite numbers; run `qcore gate` again")
        if self.outcome not in get_args(Outcome):
            raise GateRefused(f"check {self.name}: outcome {self.outcome!r}; allowed: {', '.join(get_args(Outcome))}")
        if self.outcome == "pass" and any(g.outcome not in ("pass", "not judged") for g in self.groups):
            raise GateRefused(f"check {self.name} passes but a group of it does not; run `qcore gate` again")
        at_most = self.name in UPPER_LIMITS
        holds = self.bound <= self.limit if at_most else self.bound >= self.limit
        if holds != (self.outcome == "pass"):
            wanted = "at most" if at_most else "at least"
            raise GateRefused(
                f"check {self.name}: bound {self.bound}, wanted {wanted} {self.limit}, is called {self.outcome}; "
                "run `qcore gate` again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedPackage:
    """The package that a decision is about: SHA-256 of all its bytes and of its manifest, and what devices call it."""

    sha256: Digest
    manifest_sha256: Digest
    family: str
    version: str

    def __post_init__(self) -> None:
        """Refuse what names no package."""
        check_digest(self.sha256)
        check_digest(self.manifest_sha256)
        if not all(isinstance(v, str) and v for v in (self.family, self.version)):
            raise GateRefused(f"package is called {self.family!r} {self.version!r}; allowed: text; package again")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateDecision:
    """The outcome for one model, bound by digest to everything it was derived from.

    `package` is what may be published on it, None for a local decision; `champion_sha256` is None where nothing
    released was compared with, `parity_sha256` where no parity was given. `decided` is when (2026-11-27T12:00:00Z);
    None where nobody said, and then the evidence has no age and is not published. `override` says who may waive checks
    of the policy, `waivers` who did; a waived check keeps its own outcome.

    Invariant: `outcome` is `pass` only if there is at least one check and all checks pass or are waived; `fail` and
    `inconclusive` only if a check that is not waived says so. Every waiver is about exactly this decision, within what
    `override` permits, and waives checks that did not pass; none is waived twice. Signatures and expiry are for
    `release/waivers.py`.
    """

    outcome: Outcome
    checks: tuple[Check, ...]
    confidence: float
    n: int
    model_sha256: Digest
    baseline_sha256: Digest
    data_sha256: Digest
    policy_sha256: Digest
    report_sha256: Digest
    qcore_version: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    champion_sha256: Digest | None = None
    parity_sha256: Digest | None = None
    override: Override = NOBODY
    package: GatedPackage | None = None
    waivers: tuple[SignedWaiver, ...] = ()
    decided: str | None = None

    def __post_init__(self) -> None:
        """Hold the invariant, also for a decision from a file: a pass cannot be built from anything else."""
        _ = self.binding  # refuses what is no digest
        if self.decided is not None:
            try:
                parse_time(self.decided)
            except GateRefused as e:
                raise GateRefused(f"gate decision: decided {self.decided!r} is no time; run `qcore gate` again") from e
        for signed in self.waivers:
            refuse_not_permitted(signed.waiver, self.override)
            refuse_other_subject(signed.waiver, self.binding)
            _refuse_other_checks(signed.waiver, self.checks)
        waived = [c.name for signed in self.waivers for c in signed.waiver.checks]
        if len(set(waived)) != len(waived):
            raise GateRefused(f"waivers: {', '.join(waived)}: a check is waived twice; pass one waiver for each check")
        if self.outcome != outcome_of(self.checks, waived):
            states = ", ".join(f"{c.name}={c.outcome}" for c in self.checks) or "no checks"
            by = f" and {', '.join(waived)} waived" if waived else ""
            raise GateRefused(f"decision says {self.outcome} but its checks say {states}{by}; run `qcore gate` again")

    @property
    def binding(self) -> Binding:
        """The digests that a waiver of this decision must name."""
        return Binding(
            model=self.model_sha256,
            baseline=self.baseline_sha256,
            data=self.data_sha256,
            policy=self.policy_sha256,
            report=self.report_sha256,
            parity=self.parity_sha256,
            package=None if self.package is None else self.package.sha256,
        )

    @property
    def waived(self) -> Mapping[str, Waiver]:
        """The waivers by the names of the checks that did not pass and yet do not stop the release."""
        return MappingProxyType({c.name: s.waiver for s in self.waivers for c in s.waiver.checks})

    def who_may_override(self) -> str:
        """Return who overrode this decision and who may, in sentences for people; never empty."""
        done = [f"{signed.waiver.sentence()}." for signed in self.waivers]
        return " ".join([*done, self.override.sentence()])

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.decision/3`)."""
        return {"schema": DECISION_SCHEMA, **asdict(self)}


def outcome_of(checks: Sequence[Check], waived: Collection[str] = ()) -> Outcome:
    """Return what the checks say together if those named in `waived` are left out; without any check, `fail`."""
    outcomes = {c.outcome for c in checks if c.name not in waived}
    if "fail" in outcomes or not checks:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


def waived_check(check: Check) -> WaivedCheck:
    """Return `check` as a waiver names it.

    Raises:
        GateRefused: the check passes, or says nothing because nothing was measured.
    """
    if check.outcome == "pass":
        raise GateRefused(f"check {check.name} passes and needs no waiver; leave it out")
    if check.name in NOT_WAIVABLE:
        raise GateRefused(f"check {check.name} says that something is missing or too old ({check.reason}); no waiver")
    if check.groups and all(g.outcome == "not judged" for g in check.groups):
        raise GateRefused(
            f"check {check.name} judged nothing ({check.reason}); data that are missing cannot be waived; add samples"
        )
    return WaivedCheck(
        name=check.name, outcome=check.outcome, observed=check.observed, bound=check.bound, limit=check.limit
    )


def _refuse_other_checks(waiver: Waiver, checks: Sequence[Check]) -> None:
    """Refuse a waiver of checks that this decision does not hold with exactly these numbers."""
    by_name = {c.name: c for c in checks}
    for waived in waiver.checks:
        if waived.name not in by_name:
            raise GateRefused(
                f"waiver of {waiver.owner.name} waives {waived.name}, which this decision does not ask; "
                f"allowed: {', '.join(by_name)}; leave it out"
            )
        if waived_check(by_name[waived.name]) != waived:
            raise GateRefused(
                f"waiver of {waiver.owner.name} is about {waived.name} with other values than this decision; "
                "waive the evidence of exactly this decision"
            )


def _shallow(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without copying what they hold: columns have millions of numbers."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _details_json(details: ClassDetails) -> Json:
    sides = {
        name: {"confusion": side.confusion, "reliability": [asdict(b) for b in side.reliability]}
        for name, side in (("baseline", details.baseline), ("candidate", details.candidate))
    }
    top5 = None if details.top5 is None else asdict(details.top5)
    return {"classes": [asdict(c) for c in details.classes], **sides, "top5": top5}


def decision_from_json(value: Json) -> GateDecision:
    """Return the decision that `to_json` wrote; one that contradicts its own checks is refused.

    Raises:
        GateRefused: a field is missing, unknown, not finite or of the wrong schema, or the outcome is not that of
            the checks.
    """
    v = _fields(value, DECISION_SCHEMA)
    if odd := sorted({f.name for f in fields(GateDecision)} ^ set(v)):
        raise GateRefused(f"gate decision: field {odd[0]!r} is missing or unknown; run `qcore gate` again")
    try:
        checks = tuple(Check(**{**c, "groups": tuple(Group(**g) for g in c.get("groups", ()))}) for c in v["checks"])
        rest = {
            "override": override_from_json(v["override"]),
            "package": None if v["package"] is None else GatedPackage(**v["package"]),
            "waivers": tuple(map(signed_waiver_from_json, v["waivers"])),
        }
        decision = GateDecision(**{**v, "checks": checks, **rest})
    except (KeyError, TypeError, AttributeError) as e:
        raise GateRefused(f"gate decision: field {e} is wrong or missing; run `qcore gate` again") from e
    if decision.outcome not in get_args(Outcome):
        raise GateRefused(f"gate decision: outcome {decision.outcome!r}; allowed: {', '.join(get_args(Outcome))}")
    return decision


def _fields(value: Json, schema: str) -> dict[str, Any]:
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != schema:
        raise GateRefused(f"expected a JSON object of schema {schema}, found {found}; pass the file that qcore wrote")
    return {k: v for k, v in value.items() if k != "schema"}
