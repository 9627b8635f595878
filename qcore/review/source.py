"""What a review is made from: candidates with everything that was measured and decided about each of them.

Every file names its model by digest, so each is put to the candidate it is about, and what fits none is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json
from qcore.errors import DataError
from qcore.report import EvaluationReport, GateDecision

if TYPE_CHECKING:
    from qcore.parity_report import ParityReport  # which needs numpy; tasks that only describe a run do not

TRAINED = frozenset({"qat", "finetune"})
"""Methods after which a candidate is no longer compressed after training alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a recipe: how many nodes it changed, what it left alone (node, op type, reason), how it trained.

    `reason` says why a step is not `kept`, where that was not measured. `seconds` is what training took, over `epochs`
    and on `samples`; 0 without training.
    """

    method: str
    kept: bool
    reason: str | None
    changed: int
    skipped: tuple[tuple[str, str, str], ...]
    epochs: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate of a search: what it was, what came of it, its error, file size and latency; `chosen` is written.

    `error` is None where the model gave no finite numbers, `latency_ms` where nobody measured.
    """

    label: str
    outcome: str
    error: float | None
    size_bytes: int
    latency_ms: float | None
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How a candidate was made: recipe, target, steps, where it is not what the target wants, and what else was tried.

    `packed_bytes` is its size inside a package, where a step pays only there.
    """

    model_sha256: Digest
    recipe: str
    recipe_sha256: Digest
    target: str
    steps: tuple[Step, ...]
    breaches: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    searched: str = ""
    packed_bytes: int | None = None

    @property
    def trained(self) -> bool:
        """Whether a step that is in the result trains."""
        return any(s.method in TRAINED and s.kept for s in self.steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a per-layer error report; SQNR in dB, `local_db` None where the layer runs in float."""

    node: str
    op_type: str
    verdict: str
    why: str
    accumulated_db: float
    local_db: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """A per-layer error report: both models, the number of samples, layers in graph order, and the advice."""

    model_sha256: Digest
    model: str
    baseline_sha256: Digest
    baseline: str
    samples: int
    layers: tuple[Layer, ...]
    advice: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeFit:
    """A tensor's calibration histogram and the range that was chosen for it.

    `counts` are those of `2**exponent` wide bins from `first` on, at most `histograms.BINS`. `outside` is the share of
    the values beyond the range, `sqnr_db` the signal over what clipping to the range and rounding within it cost.
    """

    tensor: str
    low: float
    high: float
    observed_low: float
    observed_high: float
    exponent: int
    first: int
    counts: tuple[int, ...]
    outside: float
    sqnr_db: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """The ranges of one candidate over the calibration tables they were chosen from, worst first."""

    model_sha256: Digest
    calibrated: Digest
    data_sha256: Digest
    samples: int
    fits: tuple[RangeFit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoRanges:
    """Why the ranges of one candidate are not drawn, in one sentence."""

    model_sha256: Digest
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """What devices download: digest and size of the file, and the release that it says it is."""

    sha256: Digest
    size_bytes: int
    model_sha256: Digest
    release: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A candidate by the name that people call it, its evaluation, and what else is known about exactly these bytes."""

    name: str
    report: EvaluationReport
    decision: GateDecision | None = None
    summary: Summary | None = None
    layers: Layers | None = None
    parity: "ParityReport | None" = None
    ranges: Ranges | None = None
    no_ranges: NoRanges | None = None
    package: Package | None = None

    @property
    def label(self) -> str:
        """The name, after how it was made where that is known and not said by the name: `QAT int8`."""
        if self.summary is None:
            return self.name
        kind = "QAT" if any(s.method == "qat" and s.kept for s in self.summary.steps) else "PTQ"
        kind = "trained" if kind == "PTQ" and self.summary.trained else kind
        return self.name if kind.lower() in self.name.lower() else f"{kind} {self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """All candidates, made from one float model and measured on the same samples.

    `title` names the model; `classes` maps class numbers to names; both may be empty. `vouched`: whoever asks has made
    or verified the decisions; else the review says that nobody checked their signatures.

    Raises:
        DataError: no candidate, a name is used twice, or something is about another model or other samples.
    """

    candidates: tuple[Candidate, ...]
    title: str = ""
    classes: Mapping[int, str] = field(default_factory=dict)
    vouched: bool = False

    def __post_init__(self) -> None:
        """Hold that everything is about the same float model and samples."""
        if not self.candidates:
            raise DataError("a review of no candidate; allowed: one or more; pass the report of `qcore evaluate`")
        names = [c.name for c in self.candidates]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise DataError(f"candidate {shown_name(twice[0])} is there twice; give each report a name of its own")
        first = self.candidates[0]
        for c in self.candidates:
            _refuse_other_measurement(c, first)
            _refuse_other_model(c)
            if c.decision is not None:
                _refuse_other_decision(c, c.decision)


def one_candidate(
    report: EvaluationReport, decision: GateDecision | None, name: str = "candidate", *, vouched: bool = False
) -> Sources:
    """Return the sources of the review of one candidate alone; `vouched` as in `Sources`."""
    return Sources(candidates=(Candidate(name=name, report=report, decision=decision),), vouched=vouched)


def shown_name(name: str) -> str:
    """Return a name that came from outside as messages show it."""
    return repr(name if len(name) <= 60 else name[:57] + "...")


def _refuse_other_measurement(candidate: Candidate, first: Candidate) -> None:
    ours, theirs = candidate.report, first.report
    pairs: dict[str, tuple[Json, Json]] = {
        "float model": (ours.baseline.sha256, theirs.baseline.sha256),
        "data": (ours.data.name, theirs.data.name),
        "split": (ours.data.split, theirs.data.split),
        "samples": (ours.data.sha256, theirs.data.sha256),
        "task": (ours.data.task, theirs.data.task),
        "number of samples": (ours.n, theirs.n),
    }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            raise DataError(
                f"candidate {shown_name(candidate.name)} was measured with {what} {str(found)[:60]}, candidate "
                f"{shown_name(first.name)} with {str(wanted)[:60]}; allowed: one float model on the same samples; run "
                "`qcore evaluate` for both with the same --baseline, --data and --split"
            )


def _refuse_other_model(candidate: Candidate) -> None:
    sha256 = candidate.report.model.sha256
    kinds = ("summary", "layers", "parity", "ranges", "no_ranges", "package")
    for kind in kinds:
        attached = getattr(candidate, kind)
        if attached is not None and attached.model_sha256 != sha256:
            raise DataError(
                f"the {kind} of candidate {shown_name(candidate.name)} is about model {attached.model_sha256[:12]}, "
                f"its report about {sha256[:12]}; pass what was made for that file"
            )
    layers = candidate.layers
    if layers is not None and layers.baseline_sha256 != candidate.report.baseline.sha256:
        raise DataError(
            f"the layer report of candidate {shown_name(candidate.name)} is against float model "
            f"{layers.baseline_sha256[:12]}, the evaluation against {candidate.report.baseline.sha256[:12]}; run "
            "`qcore layers` with the same --baseline"
        )


def _refuse_other_decision(candidate: Candidate, decision: GateDecision) -> None:
    report = candidate.report
    pairs = {
        "model": (decision.model_sha256, report.model.sha256),
        "float model": (decision.baseline_sha256, report.baseline.sha256),
        "samples": (decision.data_sha256, report.data.sha256),
        "report": (decision.report_sha256, report.sha256),
    }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            raise DataError(
                f"the decision on candidate {shown_name(candidate.name)} is about {what} {found[:12]}, the evaluation "
                f"about {wanted[:12]}; run `qcore gate` on this report"
            )
