"""Judgement on files: evaluate a candidate against its baseline, then decide and sign."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import GateRefused, ModelError
from qcore.steps.guard import Progress, read_evidence, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.evaluation import Question
    from qcore.evaluation_part import ModelFile, Part
    from qcore.report import Direction, EvaluationReport, GateDecision, Latency
    from qcore.runtime.ort import Loaded, Predict
    from qcore.tally import Tally

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
    metrics: Sequence[str] = (),
    progress: Progress = silent,
) -> "EvaluationReport":
    """Return the report on `candidate` against `baseline` over `split`, written to `out` as JSON.

    Args:
        candidate: ONNX model.
        baseline: the float model it was made from.
        data: data card.
        out: where the report goes.
        split: of the card.
        metrics: further ones beside those of the card, as `module:function=higher` or `=lower`.
        progress: called with the number of samples done.
    """
    from qcore.evaluation_part import report_of
    from qcore.files import write_json

    part = _part_on_files(candidate, baseline, data, out, (split, (1, 1), metrics, progress))
    report = report_of(part)
    write_json(out, report.to_json())
    return report


def evaluate_shard(
    *,
    candidate: Path,
    baseline: Path,
    data: Path,
    out: Path,
    shard: tuple[int, int],
    split: str = "evaluation",
    metrics: Sequence[str] = (),
    progress: Progress = silent,
) -> "Part":
    """Return part I (from 1) of N of an evaluation, `shard` being (I, N), written to `out`; see `merge_reports`.

    Shard 1 measures latency, for all. The other arguments are those of `evaluate`.
    """
    from qcore.evaluation_part import part_to_json
    from qcore.files import write_json

    part = _part_on_files(candidate, baseline, data, out, (split, shard, metrics, progress))
    write_json(out, part_to_json(part))
    return part


def merge_reports(*, parts: Sequence[Path], out: Path) -> "EvaluationReport":
    """Return the report of all shards `parts`, in any order, written to `out`: that of one process but for latency.

    Raises:
        DataError: a file is damaged, of another run or missing.
    """
    import json

    from qcore.errors import DataError
    from qcore.evaluation_part import merge_parts, part_from_json, report_of
    from qcore.files import write_json

    refuse_overwrite(out, *parts)
    read = []
    for path in parts:
        try:
            read.append(part_from_json(json.loads(path.read_bytes())))
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f"{path} is not part of an evaluation ({e}); run `qcore evaluate --shard`") from e
    report = report_of(merge_parts(read))
    write_json(out, report.to_json())
    return report


Asked = tuple[str, tuple[int, int], Sequence[str], Progress]


def _part_on_files(candidate: Path, baseline: Path, data: Path, out: Path, asked: Asked) -> "Part":
    """Return the part that split, shard and further metrics ask for."""
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.runtime import ort
    from qcore.user_metric import parsed_metric

    split, shard, metrics, progress = asked
    refuse_overwrite(out, candidate, baseline, data=data)
    files = [read_model_bytes(p) for p in (candidate, baseline)]
    theirs = ort.load_exact(files[1], name=str(baseline))
    dataset = open_dataset(data, split)
    question = question_of(dataset, dict(map(parsed_metric, metrics)))
    judge = Judge(
        raw=files[1],
        dataset=dataset,
        timing=TIMING,
        baseline=theirs,
        answers=None,
        progress=progress,
        question=question,
    )
    return _counted(judge, files[0], str(candidate), shard)


def report_on(
    candidate: tuple[bytes, str], baseline: tuple[bytes, str], dataset: "Dataset", progress: Progress
) -> "EvaluationReport":
    """Return the report on `candidate` against `baseline`, each the bytes of a model and what messages call it.

    Accuracy is that of integer kernels that do not saturate (`load_exact`), latency that of the runtime as it comes.
    """
    from qcore.runtime import ort

    judge = Judge(
        raw=baseline[0],
        dataset=dataset,
        timing=TIMING,
        baseline=ort.load_exact(baseline[0], name=baseline[1]),
        answers=None,
        progress=progress,
        question=question_of(dataset, {}),
    )
    return judged(judge, *candidate)


def question_of(dataset: "Dataset", further: "Mapping[str, Direction]") -> "Question":
    """Return what is measured on `dataset`: its task, and the metrics of its card and `further` ones.

    Raises:
        DataError: a metric cannot be used.
    """
    from qcore.evaluation import Question
    from qcore.user_metric import user_metrics

    targets = dataset.targets
    return Question(
        task=dataset.card.task,
        centre=None if targets is None else targets[list(dataset.indices)].mean(axis=0),
        metrics=user_metrics({**(dataset.card.metrics or {}), **further}),
    )


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
    question: "Question"


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
    return Judge(
        raw=raw,
        dataset=dataset,
        timing=timing,
        baseline=loaded,
        answers=tuple(answers) if size <= ANSWER_BYTES else None,
        progress=progress,
        question=question_of(dataset, {}),
    )


def judged(judge: Judge, candidate: bytes, name: str) -> "EvaluationReport":
    """Return the report on the model `candidate`, which messages call `name`."""
    from qcore.evaluation_part import report_of

    return report_of(_counted(judge, candidate, name, (1, 1)))


def _counted(judge: Judge, candidate: bytes, name: str, shard: tuple[int, int]) -> "Part":
    """Return what `candidate` gives on a shard of the samples; cut between batches, so that no batch is torn."""
    from qcore.calibration import shard_of
    from qcore.data.dataset import part_of
    from qcore.evaluation import count_samples
    from qcore.runtime import ort

    ours, theirs, dataset = ort.load_exact(candidate, name=name), judge.baseline, judge.dataset
    names = [sorted(p.name for p in loaded.inputs) for loaded in (ours, theirs)]
    if names[0] != names[1]:
        raise ModelError(
            f"{name} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that it was "
            "made from"
        )
    place = shard_of(dataset.n, *shard, batch=theirs.fixed_batch or EVALUATION_BATCH)
    cut = dataset if shard[1] == 1 else part_of(dataset, place.start, place.stop)
    fed = _fed(cut, theirs, judge.progress, "evaluating")
    tally = count_samples(ort.on_samples(ours), _recalled(judge), fed, judge.question)
    return _part(judge, candidate, tally, place.start)


def judged_itself(judge: Judge) -> "EvaluationReport":
    """Return the report on the float model against itself: the best that a candidate can be expected to do."""
    import numpy as np

    from qcore.evaluation import count_samples
    from qcore.evaluation_part import report_of

    if judge.answers is None:
        return judged(judge, judge.raw, "the float model")
    size, dataset = judge.baseline.fixed_batch or EVALUATION_BATCH, judge.dataset
    fed: list[tuple[Any, Any, Any]] = []  # what goes in does not matter: the answers are known
    for start in range(0, dataset.n, size):
        index = np.array(dataset.indices[start : start + size], np.int64)
        labels = None if dataset.labels is None else np.array(dataset.labels[start : start + size], np.int64)
        target = None if dataset.targets is None else dataset.targets[index]
        fed.append((index, {}, _truth(labels, target, dataset.card.task)))
    tally = count_samples(_recalled(judge), _recalled(judge), fed, judge.question)
    return report_of(_part(judge, judge.raw, tally, 0))


def _part(judge: Judge, candidate: bytes, tally: "Tally", start: int) -> "Part":
    from qcore.evaluation_part import Part
    from qcore.report import MeasuredData
    from qcore.runtime import ort

    dataset, latencies = judge.dataset, None
    if start == 0:
        latencies = _latencies([candidate, judge.raw], dataset, judge.timing, judge.progress)
    chosen = set(dataset.indices)
    slices = {k: tuple(i for i in places if i in chosen) for k, places in dataset.slices.items()}
    return Part(
        model=_file(candidate),
        baseline=_file(judge.raw),
        data=MeasuredData(
            name=dataset.card.name,
            split=dataset.split,
            task=dataset.card.task,
            sha256=dataset.sha256,
            slices={name: len(places) for name, places in slices.items()},
        ),
        slices=slices,
        size=dataset.n,
        batch=judge.baseline.fixed_batch or EVALUATION_BATCH,
        runtime=ort.runtime_identity(),
        qcore_version=__version__,
        start=start,
        stop=start + tally.n,
        latencies=None if latencies is None else (latencies[0], latencies[1]),
        tally=tally,
    )


def _recalled(judge: Judge) -> "Predict":
    """Return the baseline as a function; what it was seen to answer is given again, in the order of the batches."""
    from qcore.runtime import ort

    if judge.answers is None:
        return ort.on_samples(judge.baseline)
    answers = iter(judge.answers)
    return lambda fed: dict(next(answers))


def gate(
    *,
    report: Path,
    out: Path,
    key: Path,
    policy: Path | None = None,
    package: Path | None = None,
    waivers: Sequence[Path] = (),
    now: datetime | None = None,
) -> "GateDecision":
    """Return the decision on `report`; `out` holds it signed with the private key file `key`.

    Args:
        report: evaluation report.
        out: where the evidence goes.
        key: private key file of the gate.
        policy: gate policy; None: the default one.
        package: what shall be published; without it the decision is a local one, which `publish` refuses.
        waivers: files of `waive`, made for exactly this decision.
        now: aware; the decision is of that time, and waivers must hold then. None: the time of the call.

    Raises:
        GateRefused: the report is missing or contradicts itself, the policy asks for what was not measured, the
            package does not fit the report, or a waiver cannot be used.
        PackageError: the package is damaged.
        ConfigError: the policy is wrong.
        ReleaseError: the key cannot be used.
    """
    from qcore.config import load_config
    from qcore.files import write_atomic
    from qcore.gate import GatePolicy, decide, default_policy
    from qcore.release.evidence import sign_decision
    from qcore.release.keys import load_signer
    from qcore.release.subject import package_of
    from qcore.release.waivers import overridden
    from qcore.waiver import format_time

    refuse_overwrite(out, report, key, *filter(None, (policy, package)), *waivers)
    loaded = load_report(report)
    chosen = load_config(policy, GatePolicy, "gate policy") if policy else default_policy(loaded)
    decision = decide(loaded, chosen)
    if package is not None:
        decision = replace(decision, package=package_of(package, loaded))
    signed = [read_evidence(path, "waiver", "qcore gate waive") for path in waivers]
    at = now or datetime.now(UTC)
    decision = replace(overridden(decision, signed, at), decided=format_time(at))
    write_atomic(out, sign_decision(decision, load_signer(key)))
    return decision


def load_report(path: Path) -> "EvaluationReport":
    """Return the evaluation report in the JSON file `path`.

    Raises:
        GateRefused: the file is missing or is not a report.
    """
    import json

    from qcore.report_file import report_from_json

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
        truth = _truth(batch.y, batch.target, dataset.card.task)
        yield batch.index, ort.samples(model, batch), truth
        done += len(batch.index)
        progress(what, done, dataset.n)


def _truth(labels: Any, target: Any, task: str) -> Any:
    """Return what outputs are held against: class numbers, targets, 0 and 1, or None."""
    import numpy as np

    if target is None:
        return labels
    return target[:, 0].astype(np.int64) if task == "anomaly" else target


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


def _file(raw: bytes) -> "ModelFile":
    from qcore.canonical import sha256_bytes
    from qcore.evaluation_part import ModelFile

    return ModelFile(sha256=sha256_bytes(raw), size_bytes=len(raw))
