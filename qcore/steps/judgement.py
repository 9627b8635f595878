"""Judgement on files: evaluate a candidate against its baseline and a released champion, in one go or in shards.

What is decided on such a report is in `decision.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import ModelError
from qcore.steps.costs import LATENCY, STANDARD, Costing, costs_of, download_of, measured_costs, pack
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from concurrent.futures import Future

    from qcore.data.dataset import Dataset
    from qcore.evaluation import Question
    from qcore.evaluation_part import Costs, ModelFile, Part
    from qcore.report import Direction, EvaluationReport
    from qcore.runtime.ort import Loaded, Predict
    from qcore.tally import Tally

EVALUATION_BATCH = 8
PACKAGE_START = b"manifest.json\0"
"""A package is an archive whose first member is its manifest."""
ANSWER_BYTES = 1 << 27
"""How much of a float model's outputs is kept while several candidates are held against it."""


def evaluate(
    *,
    candidate: Path,
    baseline: Path,
    data: Path,
    out: Path,
    split: str = "evaluation",
    metrics: Sequence[str] = (),
    champion: Path | None = None,
    costing: Costing = STANDARD,
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
            the same samples in the same pass, and the report says what an update from it would download.
        costing: how much is measured of what the models cost.
        progress: called with the number of samples done.
    """
    from qcore.evaluation_part import report_of
    from qcore.files import write_json

    files = _Files(candidate=candidate, baseline=baseline, champion=champion, data=data, out=out)
    part = _part_on_files(files, _Asked(split=split, metrics=metrics, costing=costing, progress=progress))
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
    costing: Costing = STANDARD,
    progress: Progress = silent,
) -> "Part":
    """Return part I (from 1) of N of an evaluation, `shard` being (I, N), written to `out`; see `merge_reports`.

    Shard 1 measures costs, for all. The other arguments are those of `evaluate`.
    """
    from qcore.evaluation_part import part_to_json
    from qcore.files import write_json

    files = _Files(candidate=candidate, baseline=baseline, champion=champion, data=data, out=out)
    part = _part_on_files(files, _Asked(split=split, shard=shard, metrics=metrics, costing=costing, progress=progress))
    write_json(out, part_to_json(part))
    return part


def merge_reports(*, parts: Sequence[Path], out: Path) -> "EvaluationReport":
    """Return the report of all shards `parts`, in any order, written to `out`.

    It is that of one process but for costs and time.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What is asked of an evaluation beside its files."""

    split: str
    shard: tuple[int, int] = (1, 1)
    metrics: Sequence[str]
    costing: Costing
    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """What an evaluation reads, and where it writes."""

    candidate: Path
    baseline: Path
    champion: Path | None
    data: Path
    out: Path


def _part_on_files(paths: _Files, asked: _Asked) -> "Part":
    """Return the part that was asked for."""
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.runtime import ahead, ort
    from qcore.user_metric import parsed_metric

    inputs = [paths.candidate, paths.baseline, *([paths.champion] if paths.champion else [])]
    refuse_overwrite(paths.out, *inputs, data=paths.data)
    files = [read_model_bytes(p) for p in (paths.candidate, paths.baseline)]
    released = None if paths.champion is None else (read_released(paths.champion), str(paths.champion))
    theirs = ort.load_exact(files[1], name=str(paths.baseline), threads=ahead.threads_of_a_run())
    dataset = open_dataset(paths.data, asked.split)
    judge = Judge(
        raw=files[1],
        dataset=dataset,
        costing=asked.costing,
        baseline=theirs,
        answers=None,
        progress=asked.progress,
        question=question_of(dataset, dict(map(parsed_metric, asked.metrics))),
        champion=released,
    )
    return _counted(judge, files[0], str(paths.candidate), asked.shard)


def read_released(path: Path) -> bytes:
    """Return the bytes of a released model: of an ONNX file, or of the one in a package, whatever the file is called.

    Raises:
        ModelError: the file cannot be read.
        PackageError: the package is damaged.
    """
    from qcore.graph.io import read_model_bytes

    raw = read_model_bytes(path)
    if not raw.startswith(PACKAGE_START):
        return raw
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
    from qcore.runtime import ahead, ort

    judge = Judge(
        raw=baseline[0],
        dataset=dataset,
        costing=LATENCY,
        baseline=ort.load_exact(baseline[0], name=baseline[1], threads=ahead.threads_of_a_run()),
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

    `costing` says how much is measured of what models cost; `answers` are the outputs of `baseline` batch by batch,
    where they are few enough to be kept. `champion` is a released model that runs over the samples too: its bytes, and
    what messages call it.
    """

    raw: bytes
    dataset: "Dataset"
    costing: Costing
    baseline: "Loaded"
    answers: tuple[Mapping[str, Any], ...] | None
    progress: Progress
    question: "Question"
    champion: tuple[bytes, str] | None = None


def judge_of(raw: bytes, dataset: "Dataset", costing: Costing, progress: Progress) -> Judge:
    """Return the judge of candidates made from the float model `raw`, which runs over `dataset` once."""
    from qcore.runtime import ahead, ort

    loaded = ort.load_exact(raw, name="the float model", threads=ahead.threads_of_a_run())
    answers, size = [], 0
    with ThreadPoolExecutor(ahead.runs_at_once()) as pool:
        read = _fed(dataset, loaded, progress, "running the float model")
        source, (answer,) = ahead.run_ahead(pool, [ort.on_samples(loaded)], read)
        for _, fed, _ in source:
            answers.append(answer(fed))
            size += sum(v.nbytes for v in answers[-1].values())
            if size > ANSWER_BYTES:
                break
    return Judge(
        raw=raw,
        dataset=dataset,
        costing=costing,
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

    began, theirs, dataset = now(), judge.baseline, judge.dataset
    models = [_like_baseline(candidate, name, theirs)]
    models += [] if judge.champion is None else [_like_baseline(*judge.champion, theirs)]
    place = shard_of(dataset.n, *shard, batch=theirs.fixed_batch or EVALUATION_BATCH)
    cut = dataset if shard[1] == 1 else part_of(dataset, place.start, place.stop)
    if place.start != 0:
        return _part(judge, candidate, tally_of(judge, models, cut), _Begun(at=began, start=place.start))
    with ThreadPoolExecutor(2) as beside:
        packages = pack(beside, (candidate, judge.raw), judge.costing)
        update = beside.submit(download_of, judge.champion[0], candidate) if judge.champion else None
        tally = tally_of(judge, models, cut)
    costs = _costs(judge, candidate, packages)
    costs = costs if update is None else replace(costs, download=update.result())
    return _part(judge, candidate, tally, _Begun(at=began, costs=costs))


def now() -> str:
    """Return the time as reports hold it."""
    from qcore.report import TIME_FORM

    return datetime.now(UTC).strftime(TIME_FORM)


def _like_baseline(raw: bytes, name: str, baseline: "Loaded") -> "Loaded":
    """Return the model `raw`, which takes the inputs that the baseline takes."""
    from qcore.runtime import ahead, ort

    loaded = ort.load_exact(raw, name=name, threads=ahead.threads_of_a_run())
    names = [sorted(p.name for p in model.inputs) for model in (loaded, baseline)]
    if names[0] != names[1]:
        raise ModelError(
            f"{name} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that it was "
            "made from"
        )
    return loaded


def tally_of(judge: Judge, models: "Sequence[Loaded]", cut: "Dataset") -> "Tally":
    """Return what is kept of the answers to the samples `cut`, run on all cores.

    Args:
        judge: holds the baseline.
        models: the candidate, and the champion where there is one.
        cut: the samples.
    """
    from qcore.evaluation import count_samples
    from qcore.runtime import ahead, ort

    running = [*models, *([] if judge.answers is not None else [judge.baseline])]
    fed = _fed(cut, judge.baseline, judge.progress, "evaluating")
    with ThreadPoolExecutor(ahead.runs_at_once()) as pool:
        source, answers = ahead.run_ahead(pool, [ort.on_samples(model) for model in running], fed)
        baseline = answers[-1] if judge.answers is None else _recalled(judge.answers)
        champion = answers[1] if len(models) > 1 else None
        return count_samples(answers[0], baseline, source, judge.question, champion)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """When a part began, at which sample, and what the models cost; None but in the first part."""

    at: str
    start: int = 0
    costs: "Costs | None" = None


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
    tally = count_samples(_recalled(judge.answers), _recalled(judge.answers), fed, judge.question)
    begun = _Begun(at=now(), costs=_costs(judge, judge.raw, _packed(judge)))
    return report_of(_part(judge, judge.raw, tally, begun))


def _packed(judge: Judge) -> "list[Future[int]]":
    """Return the sizes of the float model in a package, as candidate and as baseline."""
    with ThreadPoolExecutor(1) as pool:
        return pack(pool, (judge.raw, judge.raw), judge.costing)


def _costs(judge: Judge, candidate: bytes, packages: "Sequence[Future[int]]") -> "Costs":
    """Return what `candidate` and the baseline cost; nothing else should run meanwhile."""
    from qcore.machine import machine_description

    sizes, machine = [f.result() for f in packages], machine_description()
    measured = measured_costs([candidate, judge.raw], judge.dataset, judge.costing, judge.progress)
    return costs_of(measured, sizes, machine)


def _part(judge: Judge, candidate: bytes, tally: "Tally", begun: _Begun) -> "Part":
    from qcore.evaluation_part import Part
    from qcore.report import MeasuredData
    from qcore.runtime import ort

    dataset = judge.dataset
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
        measured_at=begun.at,
        champion=None if judge.champion is None else _file(judge.champion[0]),
        start=begun.start,
        stop=begun.start + tally.n,
        costs=begun.costs,
        tally=tally,
    )


def _recalled(answers: Sequence[Mapping[str, Any]]) -> "Predict":
    """Return what gives `answers` in the order of the batches, whatever it is fed with."""
    given = iter(answers)
    return lambda fed: dict(next(given))


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


def _file(raw: bytes) -> "ModelFile":
    from qcore.canonical import sha256_bytes
    from qcore.evaluation_part import ModelFile

    return ModelFile(sha256=sha256_bytes(raw), size_bytes=len(raw))
