"""Judgement on files: evaluate a candidate against its baseline, then decide and sign."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import GateRefused, ModelError
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.evaluation import PairedResult
    from qcore.report import EvaluationReport, GateDecision, Latency
    from qcore.runtime.ort import Loaded, Predict

EVALUATION_BATCH = 8
ANSWER_BYTES = 1 << 27
"""How much of a float model's outputs is kept while several candidates are held against it."""
TIMING: Mapping[str, Any] = {"budget_s": 2.0}
BRIEF: Mapping[str, Any] = {"budget_s": 0.5}
ONE_RUN: Mapping[str, Any] = {"budget_s": 0.0, "warmup": 0, "max_runs": 1}
"""How latency is measured: for a decision, for a curve, and where nobody asks but a report has to hold one."""


def evaluate(
    *,
    candidate: Path,
    baseline: Path,
    data: Path,
    out: Path,
    split: str = "evaluation",
    progress: Progress = silent,
) -> "EvaluationReport":
    """Return the report on `candidate` against `baseline` over `split`, written to `out` as JSON."""
    from qcore.data.dataset import open_dataset
    from qcore.files import write_json
    from qcore.graph.io import read_model_bytes

    refuse_overwrite(out, candidate, baseline, data=data)
    files = [read_model_bytes(p) for p in (candidate, baseline)]
    report = report_on((files[0], str(candidate)), (files[1], str(baseline)), open_dataset(data, split), progress)
    write_json(out, report.to_json())
    return report


def report_on(
    candidate: tuple[bytes, str], baseline: tuple[bytes, str], dataset: "Dataset", progress: Progress
) -> "EvaluationReport":
    """Return the report on `candidate` against `baseline`, each the bytes of a model and what messages call it.

    Accuracy is that of integer kernels that do not saturate (`load_exact`), latency that of the runtime as it comes.
    """
    from qcore.runtime import ort

    theirs = ort.load_exact(baseline[0], name=baseline[1])
    judge = Judge(raw=baseline[0], dataset=dataset, timing=TIMING, baseline=theirs, answers=None, progress=progress)
    return judged(judge, *candidate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What several candidates are held against: a float model on the same samples.

    `timing` are options of `measure_latency`; `answers` are the outputs of `baseline` batch by batch, where they are
    few enough to be kept.
    """

    raw: bytes
    dataset: "Dataset"
    timing: Mapping[str, Any]
    baseline: "Loaded"
    answers: tuple[Mapping[str, Any], ...] | None
    progress: Progress


def judge_of(raw: bytes, dataset: "Dataset", timing: Mapping[str, Any], progress: Progress) -> Judge:
    """Return the judge of candidates made from the float model `raw`, which runs over `dataset` once."""
    from qcore.runtime import ort

    loaded = ort.load_exact(raw, name="the float model")
    predict, answers, size = ort.on_samples(loaded), [], 0
    for _, fed, _ in _fed(dataset, loaded, progress, "running the float model"):
        answers.append(predict(fed))
        size += sum(v.nbytes for v in answers[-1].values())
        if size > ANSWER_BYTES:
            break
    kept = tuple(answers) if size <= ANSWER_BYTES else None
    return Judge(raw=raw, dataset=dataset, timing=timing, baseline=loaded, answers=kept, progress=progress)


def judged(judge: Judge, candidate: bytes, name: str) -> "EvaluationReport":
    """Return the report on the model `candidate`, which messages call `name`."""
    from qcore.evaluation import evaluate as evaluate_pair
    from qcore.runtime import ort

    ours, theirs, dataset = ort.load_exact(candidate, name=name), judge.baseline, judge.dataset
    names = [sorted(p.name for p in loaded.inputs) for loaded in (ours, theirs)]
    if names[0] != names[1]:
        raise ModelError(
            f"{name} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that it was "
            "made from"
        )
    fed = _fed(dataset, theirs, judge.progress, "evaluating")
    return _report(judge, candidate, evaluate_pair(ort.on_samples(ours), _recalled(judge), fed))


def judged_itself(judge: Judge) -> "EvaluationReport":
    """Return the report on the float model against itself: the best that a candidate can be expected to do."""
    import numpy as np

    from qcore.evaluation import evaluate as evaluate_pair

    if judge.answers is None:
        return judged(judge, judge.raw, "the float model")
    size, dataset = judge.baseline.fixed_batch or EVALUATION_BATCH, judge.dataset
    fed: list[tuple[Any, Any, Any]] = []  # what goes in does not matter: the answers are known
    for start in range(0, dataset.n, size):
        labels = None if dataset.labels is None else np.array(dataset.labels[start : start + size], np.int64)
        fed.append((np.array(dataset.indices[start : start + size], np.int64), {}, labels))
    return _report(judge, judge.raw, evaluate_pair(_recalled(judge), _recalled(judge), fed))


def _report(judge: Judge, candidate: bytes, result: "PairedResult") -> "EvaluationReport":
    from qcore.report import EvaluationReport, MeasuredData
    from qcore.runtime import ort

    dataset = judge.dataset
    latencies = _latencies([candidate, judge.raw], dataset, judge.timing, judge.progress)
    return EvaluationReport(
        model=_measured(candidate, latencies[0]),
        baseline=_measured(judge.raw, latencies[1]),
        data=MeasuredData(name=dataset.card.name, split=dataset.split, task=dataset.card.task, sha256=dataset.sha256),
        n=result.n,
        metrics=result.metrics,
        paired=result.paired,
        samples=result.samples,
        runtime=ort.runtime_identity(),
        qcore_version=__version__,
    )


def _recalled(judge: Judge) -> "Predict":
    """Return the baseline as a function; what it was seen to answer is given again, in the order of the batches."""
    from qcore.runtime import ort

    if judge.answers is None:
        return ort.on_samples(judge.baseline)
    answers = iter(judge.answers)
    return lambda fed: dict(next(answers))


def gate(*, report: Path, out: Path, key: Path, policy: Path | None = None) -> "GateDecision":
    """Return the decision on `report`; `out` holds it signed with the private key file `key`.

    Raises:
        GateRefused: the report is missing or contradicts itself, or the policy asks for what was not measured.
        ConfigError: the policy is wrong.
        ReleaseError: the key cannot be used.
    """
    from qcore.config import load_config
    from qcore.files import write_atomic
    from qcore.gate import GatePolicy, decide, default_policy
    from qcore.release.evidence import sign_decision
    from qcore.release.keys import load_signer

    refuse_overwrite(out, report, key, *([policy] if policy else []))
    loaded = load_report(report)
    chosen = load_config(policy, GatePolicy, "gate policy") if policy else default_policy(loaded)
    decision = decide(loaded, chosen)
    write_atomic(out, sign_decision(decision, load_signer(key)))
    return decision


def load_report(path: Path) -> "EvaluationReport":
    """Return the evaluation report in the JSON file `path`.

    Raises:
        GateRefused: the file is missing or is not a report.
    """
    import json

    from qcore.report import report_from_json

    try:
        return report_from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as e:
        raise GateRefused(f"evaluation report {path} does not exist; run `qcore evaluate`") from e
    except (OSError, ValueError, RecursionError) as e:
        raise GateRefused(f"{path} is not an evaluation report ({e}); run `qcore evaluate`") from e


def _fed(dataset: "Dataset", model: "Loaded", progress: Progress, what: str) -> Iterator[tuple[Any, Any, Any]]:
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    done = 0
    for batch in batches(dataset, model.fixed_batch or EVALUATION_BATCH):
        yield batch.index, ort.samples(model, batch), batch.y
        done += len(batch.index)
        progress(what, done, dataset.n)


def _latencies(
    files: list[bytes], dataset: "Dataset", timing: Mapping[str, Any], progress: Progress
) -> "list[Latency]":
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    progress("measuring latency", 0, 1)
    models = [ort.load(raw, threads=1) for raw in files]
    sample = next(batches(dataset, models[0].fixed_batch or 1))
    result = ort.measure_latency(models, ort.samples(models[1], sample), **timing)
    progress("measuring latency", 1, 1)
    return result


def _measured(raw: bytes, latency: Any) -> Any:
    from qcore.canonical import sha256_bytes
    from qcore.report import MeasuredModel

    return MeasuredModel(sha256=sha256_bytes(raw), size_bytes=len(raw), latency_ms=latency)
