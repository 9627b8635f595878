"""Candidates for reviews: reports of classes that were drawn at random, and everything that can lie beside them."""

from dataclasses import replace

import numpy as np

from qcore.derived import class_counts, class_metrics, confusion, latency_of, paired_counts, ratio_of
from qcore.gate import decide
from qcore.measured import MeasuredModel, Rounds
from qcore.parity_report import ConditionResult, ParityOf, ParityReport
from qcore.policy import GatePolicy, GroupLimit, MetricLimit
from qcore.report import (
    ByModel,
    ClassDetails,
    EvaluationReport,
    MeasuredData,
    ProbabilityBin,
    Samples,
    Values,
)
from qcore.review.source import (
    Candidate,
    Layer,
    Layers,
    Package,
    RangeFit,
    Ranges,
    Step,
    Summary,
    Trial,
)

BASELINE, DATA = "b" * 64, "d" * 64


TIMES = tuple(1 + (k + 0.5) / 100 for k in range(-10, 10))
ROUNDS = Rounds(candidate=tuple(t / 2 for t in TIMES), baseline=TIMES)


def measured(digest: str, size: int, times) -> MeasuredModel:
    return MeasuredModel(sha256=digest, size_bytes=size, latency_ms=latency_of(times))


def by_model(label, named):
    bins = (ProbabilityBin(count=len(label), right=int((label == named).sum()), confidence=0.9),)
    return ByModel(confusion=confusion(label, named), reliability=bins)


def data_of(n: int, task: str = "classification", slices=()) -> MeasuredData:
    return MeasuredData(
        name="parts", split="evaluation", task=task, sha256=DATA, slices={k: len(v) for k, v in dict(slices).items()}
    )


def classified(label, theirs, ours, model: str = "a" * 64, slices=None) -> EvaluationReport:
    """Return the report on columns of class numbers; `label` None: unlabelled."""
    b, c = np.asarray(theirs), np.asarray(ours)
    metrics = {"agreement": float(np.mean(b == c)), "output_sqnr_db": 30.0}
    paired = details = None
    if label is not None:
        y = np.asarray(label)
        paired = paired_counts(c == y, b == y)
        details = ClassDetails(
            classes=class_counts(y, b, c), baseline=by_model(y, b), candidate=by_model(y, c), top5=None
        )
        metrics |= class_metrics(paired, details)
    return EvaluationReport(
        model=measured(model, 25_000, ROUNDS.candidate),
        baseline=measured(BASELINE, 100_000, ROUNDS.baseline),
        data=data_of(len(b), "none" if label is None else "classification", slices or {}),
        n=len(b),
        metrics=metrics,
        paired=paired,
        details=details,
        samples=Samples(
            index=tuple(range(len(b))),
            label=None if label is None else tuple(np.asarray(label).tolist()),
            baseline=tuple(b.tolist()),
            candidate=tuple(c.tolist()),
        ),
        slices=slices or {},
        runtime={"runtime": "onnxruntime 1"},
        qcore_version="0.1.0",
        measured_at="2026-11-27T12:00:00Z",
        rounds={"latency": ROUNDS},
        ratios={"latency": ratio_of(ROUNDS)},
        machine={"cpu": "one"},
    )


def drawn(n: int = 400, classes: int = 5, *, seed: int = 0, changed: float = 0.05, model: str = "a" * 64, slices=None):
    """Return a report whose float model is right nine times in ten, and whose candidate answers otherwise at times."""
    shared, own = np.random.default_rng(1), np.random.default_rng([2, seed])
    label = shared.integers(0, classes, n)
    theirs = np.where(shared.random(n) < 0.9, label, shared.integers(0, classes, n))
    ours = np.where(own.random(n) < changed, own.integers(0, classes, n), theirs)
    return classified(label, theirs, ours, model, slices)


def regression(theirs, ours) -> EvaluationReport:
    """Return the report on absolute errors."""
    errors = Values(baseline=tuple(map(float, theirs)), candidate=tuple(map(float, ours)))
    mae, baseline_mae = float(np.mean(ours)), float(np.mean(theirs))
    return replace(
        classified(None, [0] * len(theirs), [0] * len(theirs)),
        data=data_of(len(theirs), "regression"),
        metrics={
            "mae": mae,
            "baseline_mae": baseline_mae,
            "rmse": mae,
            "baseline_rmse": baseline_mae,
            "output_sqnr_db": 20.0,
        },
        samples=Samples(
            index=tuple(range(len(theirs))),
            label=None,
            baseline=None,
            candidate=None,
            values={"absolute_error": errors},
        ),
    )


def everything(
    name: str, report: EvaluationReport, *, says: str = "says", layers: int = 6, qat: bool = False
) -> Candidate:
    """Return a candidate with all that can be known; `says` is in every text that people choose."""
    sha256 = report.model.sha256
    policy = GatePolicy(top1=MetricLimit(max_drop=0.05), classes=GroupLimit(max_drop=0.2, min_support=20))
    steps = (
        Step(method="quantize", kept=True, reason=None, changed=9, skipped=((f"n {says}", "Conv", f"because {says}"),)),
        Step(method="correct-bias", kept=False, reason=f"not {says}", changed=0, skipped=()),
        *(
            [Step(method="qat", kept=True, reason=None, changed=9, skipped=(), epochs=3, samples=99, seconds=4.5)]
            if qat
            else []
        ),
    )
    return Candidate(
        name=name,
        report=report,
        decision=decide(report, policy),
        summary=Summary(
            model_sha256=sha256,
            recipe=f"int8 {says}",
            recipe_sha256="e" * 64,
            target=f"t {says}",
            steps=steps,
            breaches=(f"rule {says}",),
            trials=(
                Trial(label=f"try {says}", outcome="holds", error=0.1, size_bytes=9, latency_ms=None, chosen=True),
            ),
            searched=f"stopped {says}",
        ),
        layers=Layers(
            model_sha256=sha256,
            model="m.onnx",
            baseline_sha256=BASELINE,
            baseline=f"net {says}.onnx",
            samples=32,
            layers=tuple(
                Layer(
                    node=f"conv{k} {says}",
                    op_type="Conv",
                    verdict="local" if k == 1 else "fine",
                    why=f"why {says}",
                    accumulated_db=30.0 - k / 10,
                    local_db=15.0 if k == 1 else 40.0,
                )
                for k in range(layers)
            ),
            advice=f"mend {says}",
        ),
        parity=ParityReport(
            measured=ParityOf(
                model="m.onnx",
                model_sha256=sha256,
                target=f"t {says}",
                data="parts",
                split="evaluation",
                data_sha256="8" * 64,
                split_sha256=DATA,
                n=8,
                runtime={},
                qcore_version="0.1.0",
            ),
            top1=0.9,
            conditions=(
                ConditionResult(
                    name="one-thread",
                    verdict="far",
                    agreement=0.5,
                    top1=0.4,
                    sqnr_db=3.0,
                    meaning=f"m {says}",
                    advice=f"a {says}",
                ),
            ),
        ),
        ranges=Ranges(
            model_sha256=sha256,
            calibrated=BASELINE,
            data_sha256="f" * 64,
            samples=100,
            fits=tuple(
                RangeFit(
                    tensor=f"t{k} {says}",
                    low=-1.0,
                    high=1.0,
                    observed_low=-2.0,
                    observed_high=2.0,
                    exponent=0,
                    first=-2,
                    counts=(1, 5, 9, 2),
                    outside=0.01,
                    sqnr_db=30.0 + k,
                )
                for k in range(layers)
            ),
        ),
        package=Package(sha256="9" * 64, size_bytes=20_000, model_sha256=sha256, release="parts 1.0.0"),
    )
