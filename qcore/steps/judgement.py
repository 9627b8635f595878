"""Judgement on files: evaluate a candidate against its baseline and a released champion, in one go or in shards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import GateRefused, ModelError
from qcore.steps.guard import Progress, read_evidence, refuse_overwrite, silent
from qcore.steps.matching import MeasuredFiles, load_parity, refuse_other_files

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.evaluation import Question
    from qcore.evaluation_part import ModelFile, Part
    from qcore.report import Direction, EvaluationReport, GateDecision, Latency
    from qcore.runtime.ort import Loaded, Predict
    from qcore.tally import Tally

EVALUATION_BATCH = 8
NO_FILES = MeasuredFiles()
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
    champion: Path | None = None,
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
        champion: the model that is released now, an ONNX file or the package (`.qpkg`) that holds it; it runs over
            the same samples in the same pass.
        progress: called with the number of samples done.
    """
    from qcore.evaluation_part import report_of
    from qcore.files import write_json

    part = _part_on_files(_Files(candidate, baseline, champion, data, out), (split, (1, 1), metrics, progress))
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
    champion: Path | None = None,
    progress: Progress = silent,
) -> "Part":
    """Return part I (from 1) of N of an evaluation, `shard` being (I, N), written to `out`; see `merge_reports`.

    Shard 1 measures latency, for all. The other arguments are those of `evaluate`.
    """
    from qcore.evaluation_part import part_to_json
    from qcore.files import write_json

    part = _part_on_files(_Files(candidate, baseline, champion, data, out), (split, shard, metrics, progress))
    write_json(out, part_to_json(part))
    return part


def merge_reports(*, parts: Sequence[Path], out: Path) -> "EvaluationReport":
    """Return the report of all shards `parts`, in any order, written to `out`.

    It is that of one process but for latency and time.

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


@dataclass(frozen=True, slots=True)
class _Files:
    """What an evaluation reads, and where it writes."""

    candidate: Path
    baseline: Path
    champion: Path | None
    data: Path
    out: Path


def _part_on_files(paths: _Files, asked: Asked) -> "Part":
    """Return the part that split, shard and further metrics ask for."""
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.runtime import ort
    from qcore.user_metric import parsed_metric

    split, shard, metrics, progress = asked
    inputs = [paths.candidate, paths.baseline, *([paths.champion] if paths.champion else [])]
    refuse_overwrite(paths.out, *inputs, data=paths.data)
    files = [read_model_bytes(p) for p in (paths.candidate, paths.baseline)]
    released = None if paths.champion is None else (read_released(paths.champion), str(paths.champion))
    theirs = ort.load_exact(files[1], name=str(paths.baseline))
    dataset = open_dataset(paths.data, split)
    question = question_of(dataset, dict(map(parsed_metric, metrics)))
    judge = Judge(
        raw=files[1],
        dataset=dataset,
        timing=TIMING,
        baseline=theirs,
        answers=None,
        progress=progress,
        question=question,
        champion=released,
    )
    return _counted(judge, files[0], str(paths.candidate), shard)


def read_released(path: Path) -> bytes:
    """Return the bytes of a released model: of an ONNX file, or of the one in a package (`.qpkg`).

    Raises:
        ModelError: the file cannot be read.
        PackageError: the package is damaged.
    """
    from qcore.graph.io import read_model_bytes

    if path.suffix != ".qpkg":
        return read_model_bytes(path)
    from tempfile import TemporaryDirectory

    from qcore.release.manifest import MODEL
    from qcore.release.package import unpack_package

    with TemporaryDirectory(prefix="qcore-") as work:
        unpack_package(path, Path(work) / "champion")
        return read_model_bytes(Path(work) / "champion" / MODEL)


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
    few enough to be kept. `champion` is a released model that runs over the samples too: its bytes, and what messages
    call it.
    """

    raw: bytes
    dataset: "Dataset"
    timing: Mapping[str, Any]
    baseline: "Loaded"
    answers: tuple[Mapping[str, Any], ...] | None
    progress: Progress
    question: "Question"
    champion: tuple[bytes, str] | None = None


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

    began, theirs, dataset = now(), judge.baseline, judge.dataset
    ours = _like_baseline(candidate, name, theirs)
    released = None if judge.champion is None else ort.on_samples(_like_baseline(*judge.champion, theirs))
    place = shard_of(dataset.n, *shard, batch=theirs.fixed_batch or EVALUATION_BATCH)
    cut = dataset if shard[1] == 1 else part_of(dataset, place.start, place.stop)
    fed = _fed(cut, theirs, judge.progress, "evaluating")
    tally = count_samples(ort.on_samples(ours), _recalled(judge), fed, judge.question, released)
    return _part(judge, candidate, tally, (place.start, began))


def now() -> str:
    """Return the time as reports hold it."""
    from qcore.report import TIME_FORM

    return datetime.now(UTC).strftime(TIME_FORM)


def _like_baseline(raw: bytes, name: str, baseline: "Loaded") -> "Loaded":
    """Return the model `raw`, which takes the inputs that the baseline takes."""
    from qcore.runtime import ort

    loaded = ort.load_exact(raw, name=name)
    names = [sorted(p.name for p in model.inputs) for model in (loaded, baseline)]
    if names[0] != names[1]:
        raise ModelError(
            f"{name} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that it was "
            "made from"
        )
    return loaded


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
    return report_of(_part(judge, judge.raw, tally, (0, now())))


def _part(judge: Judge, candidate: bytes, tally: "Tally", begun: tuple[int, str]) -> "Part":
    """Return the part of `tally`; `begun` is the place of its first sample, and when it began."""
    from qcore.evaluation_part import Part
    from qcore.report import MeasuredData
    from qcore.runtime import ort

    dataset, latencies, start = judge.dataset, None, begun[0]
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
        measured_at=begun[1],
        champion=None if judge.champion is None else _file(judge.champion[0]),
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
    parity: Path | None = None,
    files: MeasuredFiles = NO_FILES,
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
        parity: parity report of the same model and split; needed where the policy limits parity.
        files: what the report has to be about.
        waivers: files of `waive`, made for exactly this decision.
        now: aware; waivers must hold then, and the report must not be too old. None: the time of the call.

    Raises:
        GateRefused: the report is missing, contradicts itself or is about other files, the policy asks for what was
            not measured, the package does not fit the report, or a waiver cannot be used.
        PackageError: the package is damaged.
        ConfigError: the policy is wrong.
        ReleaseError: the key cannot be used.
    """
    from qcore.config import load_config
    from qcore.files import write_atomic
    from qcore.gate import decide, default_policy
    from qcore.policy import GatePolicy
    from qcore.release.evidence import sign_decision
    from qcore.release.keys import load_signer
    from qcore.release.subject import package_of
    from qcore.release.waivers import overridden

    given = (policy, package, parity, files.model, files.baseline, files.champion)
    refuse_overwrite(out, report, key, *(path for path in given if path is not None), *waivers, data=files.data)
    loaded = load_report(report)
    refuse_other_files(loaded, files)
    chosen = load_config(policy, GatePolicy, "gate policy") if policy else default_policy(loaded)
    when = now or datetime.now(UTC)
    decision = decide(loaded, chosen, None if parity is None else load_parity(parity), when)
    if package is not None:
        decision = replace(decision, package=package_of(package, loaded))
    signed = [read_evidence(path, "waiver", "qcore gate waive") for path in waivers]
    decision = overridden(decision, signed, when)
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
