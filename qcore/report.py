"""The evidence: what was measured (EvaluationReport) and what was decided (GateDecision).

Plain values with one JSON form each. Standard library only, so that gate, release and device stay light. How they are
made is in `evaluation.py` and `gate.py`; how a decision is signed is in `release/evidence.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from qcore.canonical import Digest, Json, sha256_json
from qcore.errors import GateRefused

Outcome = Literal["pass", "fail", "inconclusive"]

REPORT_SCHEMA = "qcore.evaluation/1"
DECISION_SCHEMA = "qcore.decision/1"
BUDGETS = ("size_bytes", "size_ratio", "latency_ratio")
"""Checks whose limit is an upper one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Wall time of one inference at batch 1 on one thread, in milliseconds; `runs` is the number of timed calls."""

    p50: float
    p95: float
    runs: int

    def __post_init__(self) -> None:
        """Refuse what no measurement gives."""
        if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in (self.p50, self.p95, self.runs)):
            raise GateRefused(f"latency {self.p50}, {self.p95} over {self.runs} runs; allowed: finite and above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredModel:
    """One model file as it was measured: SHA-256 and size of its bytes, and its latency."""

    sha256: Digest
    size_bytes: int
    latency_ms: Latency

    def __post_init__(self) -> None:
        """Refuse what is no file."""
        if type(self.size_bytes) is not int or self.size_bytes <= 0:
            raise GateRefused(f"size_bytes is {self.size_bytes!r}; allowed: a whole number above 0")
        _check_digest(self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredData:
    """The samples that were used: card name, split name, task, and the digest of samples and preprocessing."""

    name: str
    split: str
    task: Literal["classification", "none"]
    sha256: Digest

    def __post_init__(self) -> None:
        """Refuse what no card gives."""
        if self.task not in ("classification", "none"):
            raise GateRefused(f"task is {self.task!r}; allowed: classification, none")
        _check_digest(self.sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedCounts:
    """Samples by who was right; the four add up to n."""

    both_right: int
    only_candidate_right: int
    only_baseline_right: int
    both_wrong: int

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.both_right + self.only_candidate_right + self.only_baseline_right + self.both_wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Per-sample results, four columns of length n; `label` is None where the data has no labels.

    `baseline` and `candidate` are arg-max class indices (the first of equals).
    """

    index: tuple[int, ...]
    label: tuple[int, ...] | None
    baseline: tuple[int, ...]
    candidate: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Candidate and baseline on exactly the same samples.

    `metrics` always holds `output_sqnr_db` (of the worst output); where the first output has two values or more also
    `agreement` (share of samples with equal arg-max); with labels also `top1` (candidate), `baseline_top1` and
    `top1_delta`. Shares are fractions of 1. `paired` is None without labels.
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

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.evaluation/1`); `latency_ms` repeats the candidate's for short paths."""
        value = asdict(self)
        return {"schema": REPORT_SCHEMA, **value, "latency_ms": value["model"]["latency_ms"]}

    @property
    def sha256(self) -> Digest:
        """The digest of the canonical JSON form."""
        return sha256_json(self.to_json())


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One question of the policy and its answer.

    `observed` is the point value, `bound` the one-sided confidence bound that is held against `limit` (equal to
    `observed` where the value has no sampling error), `needs_samples` the further samples that would decide an
    inconclusive check at the observed rates. Budgets (`BUDGETS`) are upper limits, all others lower ones.

    Invariant: all numbers are finite, and the outcome is `pass` exactly if the bound satisfies the limit.
    """

    name: str
    outcome: Outcome
    observed: float
    bound: float
    limit: float
    reason: str
    needs_samples: int | None = None

    def __post_init__(self) -> None:
        """Hold the invariant, also for a check that was read from a file."""
        numbers = (self.observed, self.bound, self.limit)
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise GateRefused(f"check {self.name}: {numbers} are not finite numbers; run `qcore gate` again")
        if self.outcome not in get_args(Outcome):
            raise GateRefused(f"check {self.name}: outcome {self.outcome!r}; allowed: {', '.join(get_args(Outcome))}")
        at_most = self.name in BUDGETS
        holds = self.bound <= self.limit if at_most else self.bound >= self.limit
        if holds != (self.outcome == "pass"):
            wanted = "at most" if at_most else "at least"
            raise GateRefused(
                f"check {self.name}: bound {self.bound}, wanted {wanted} {self.limit}, is called {self.outcome}; "
                "run `qcore gate` again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GateDecision:
    """The outcome for one model, bound by digest to everything it was derived from.

    Invariant: `outcome` is `pass` only if there is at least one check and all checks pass.
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

    def __post_init__(self) -> None:
        """Hold the invariant: a pass cannot be built from anything but passed checks."""
        passed = bool(self.checks) and all(c.outcome == "pass" for c in self.checks)
        if (self.outcome == "pass") != passed:
            states = ", ".join(f"{c.name}={c.outcome}" for c in self.checks) or "no checks"
            raise GateRefused(f"decision says {self.outcome} but its checks say {states}; run `qcore gate` again")

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.decision/1`)."""
        return {"schema": DECISION_SCHEMA, **asdict(self)}


def report_from_json(value: Json) -> EvaluationReport:
    """Return the report that `to_json` wrote.

    Raises:
        GateRefused: a field is missing, unknown or of the wrong schema.
    """
    v = _fields(value, REPORT_SCHEMA)
    v.pop("latency_ms", None)
    if type(v.get("n")) is not int or not _are_numbers(v.get("metrics")):
        raise GateRefused("evaluation report: n or metrics are not numbers; run `qcore evaluate` again")
    try:
        labels = v["samples"]["label"]
        return EvaluationReport(
            **{
                **v,
                "model": _measured(v["model"]),
                "baseline": _measured(v["baseline"]),
                "data": MeasuredData(**v["data"]),
                "paired": PairedCounts(**v["paired"]) if v["paired"] is not None else None,
                "samples": Samples(
                    index=tuple(v["samples"]["index"]),
                    label=tuple(labels) if labels is not None else None,
                    baseline=tuple(v["samples"]["baseline"]),
                    candidate=tuple(v["samples"]["candidate"]),
                ),
            }
        )
    except (KeyError, TypeError) as e:
        raise GateRefused(f"evaluation report: field {e} is wrong or missing; run `qcore evaluate` again") from e


def decision_from_json(value: Json) -> GateDecision:
    """Return the decision that `to_json` wrote; one that contradicts its own checks is refused.

    Raises:
        GateRefused: a field is missing, unknown, not finite or of the wrong schema, or the outcome is not that of
            the checks.
    """
    v = _fields(value, DECISION_SCHEMA)
    try:
        checks = tuple(Check(**c) for c in v["checks"])
        decision = GateDecision(**{**v, "checks": checks})
    except (KeyError, TypeError) as e:
        raise GateRefused(f"gate decision: field {e} is wrong or missing; run `qcore gate` again") from e
    if decision.outcome not in get_args(Outcome):
        raise GateRefused(f"gate decision: outcome {decision.outcome!r}; allowed: {', '.join(get_args(Outcome))}")
    return decision


def _check_digest(value: object) -> None:
    if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise GateRefused(f"digest {str(value)[:70]!r} is not a SHA-256 of 64 lower-case hex digits")


def _fields(value: Json, schema: str) -> dict[str, Any]:
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != schema:
        raise GateRefused(f"expected a JSON object of schema {schema}, found {found}; pass the file that qcore wrote")
    return {k: v for k, v in value.items() if k != "schema"}


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(v) in (int, float) for v in value.values())


def _measured(value: Mapping[str, Any]) -> MeasuredModel:
    return MeasuredModel(**{**value, "latency_ms": Latency(**value["latency_ms"])})
