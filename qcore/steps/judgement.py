"""Judgement on files: evaluate a candidate against its baseline, then decide and sign."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import GateRefused, ModelError
from qcore.steps.costs import LATENCY, STANDARD, Costing, costs_of, download_of, measured_costs, pack
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from concurrent.futures import Future

    from qcore.data.dataset import Dataset
    from qcore.evaluation import Question
    from qcore.evaluation_part import Costs, ModelFile, Part
    from qcore.report import Direction, EvaluationReport, GateDecision
    from qcore.runtime.ort import Loaded, Predict
    from qcore.tally import Tally

EVALUATION_BATCH = 8
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
    costing: Costing = STANDARD,
    released: Path | None = None,
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
        costing: how much is measured of what the models cost.
        released: the model that devices have; the report then says what the update would download.
        progress: called with the number of samples done.
    """
    from qcore.evaluation_part import report_of
    from qcore.files import write_json

    asked = _Asked(split=split, metrics=metrics, costing=costing, released=released, progress=progress)
    part = _part_on_files(candidate, baseline, data, out, asked)
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
    costing: Costing = STANDARD,
    released: Path | None = None,
    progress: Progress = silent,
) -> "Part":
    """Return part I (from 1) of N of an evaluation, `shard` being (I, N), written to `out`; see `merge_reports`.

    Shard 1 measures costs, for all. The other arguments are those of `evaluate`.
    """
    from qcore.evaluation_part import part_to_json
    from qcore.files import write_json

    asked = _Asked(split=split, shard=shard, metrics=metrics, costing=costing, released=released, progress=progress)
    part = _part_on_files(candidate, baseline, data, out, asked)
    write_json(out, part_to_json(part))
    return part


def merge_reports(*, parts: Sequence[Path], out: Path) -> "EvaluationReport":
    """Return the report of all shards `parts`, in any order, written to `out`: that of one process but for costs.

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
    released: Path | None
    progress: Progress


def _part_on_files(candidate: Path, baseline: Path, data: Path, out: Path, asked: _Asked) -> "Part":
    """Return the part that was asked for."""
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.runtime import ahead, ort
    from qcore.user_metric import parsed_metric

    refuse_overwrite(out, candidate, baseline, *([asked.released] if asked.released else []), data=data)
    files = [read_model_bytes(p) for p in (candidate, baseline)]
    released = None if asked.released is None else read_model_bytes(asked.released)
    theirs = ort.load_exact(files[1], name=str(baseline), threads=ahead.threads_of_a_run())
    dataset = open_dataset(data, asked.split)
    judge = Judge(
        raw=files[1],
        dataset=dataset,
        costing=asked.costing,
        baseline=theirs,
        answers=None,
        progress=asked.progress,
        question=question_of(dataset, dict(map(parsed_metric, asked.metrics))),
        released=released,
    )
    return _counted(judge, files[0], str(candidate), asked.shard)


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
    where they are few enough to be kept. `released` is the model that devices have.
    """

    raw: bytes
    dataset: "Dataset"
    costing: Costing
    baseline: "Loaded"
    answers: tuple[Mapping[str, Any], ...] | None
    progress: Progress
    question: "Question"
    released: bytes | None = None


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
    from qcore.runtime import ahead, ort

    theirs, dataset = judge.baseline, judge.dataset
    ours = ort.load_exact(candidate, name=name, threads=ahead.threads_of_a_run())
    names = [sorted(p.name for p in loaded.inputs) for loaded in (ours, theirs)]
    if names[0] != names[1]:
        raise ModelError(
            f"{name} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that it was "
            "made from"
        )
    place = shard_of(dataset.n, *shard, batch=theirs.fixed_batch or EVALUATION_BATCH)
    cut = dataset if shard[1] == 1 else part_of(dataset, place.start, place.stop)
    if place.start != 0:
        return _part(judge, candidate, tally_of(judge, ours, cut), (place.start, None))
    with ThreadPoolExecutor(2) as beside:
        packages = pack(beside, (candidate, judge.raw), judge.costing)
        update = beside.submit(download_of, judge.released, candidate) if judge.released else None
        tally = tally_of(judge, ours, cut)
    costs = _costs(judge, candidate, packages)
    return _part(judge, candidate, tally, (0, costs if update is None else replace(costs, download=update.result())))


def tally_of(judge: Judge, candidate: "Loaded", cut: "Dataset") -> "Tally":
    """Return what is kept of the answers of `candidate` and the baseline on the samples `cut`, run on all cores."""
    from qcore.evaluation import count_samples
    from qcore.runtime import ahead, ort

    models = [candidate] if judge.answers is not None else [candidate, judge.baseline]
    fed = _fed(cut, judge.baseline, judge.progress, "evaluating")
    with ThreadPoolExecutor(ahead.runs_at_once()) as pool:
        source, answers = ahead.run_ahead(pool, [ort.on_samples(model) for model in models], fed)
        baseline = answers[1] if judge.answers is None else _recalled(judge.answers)
        return count_samples(answers[0], baseline, source, judge.question)


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
    return report_of(_part(judge, judge.raw, tally, (0, _costs(judge, judge.raw, _packed(judge)))))


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


def _part(judge: Judge, candidate: bytes, tally: "Tally", of: "tuple[int, Costs | None]") -> "Part":
    from qcore.evaluation_part import Part
    from qcore.report import MeasuredData
    from qcore.runtime import ort

    dataset, (start, costs) = judge.dataset, of
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
        costs=costs,
        tally=tally,
    )


def _recalled(answers: Sequence[Mapping[str, Any]]) -> "Predict":
    """Return what gives `answers` in the order of the batches, whatever it is fed with."""
    given = iter(answers)
    return lambda fed: dict(next(given))


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


def _file(raw: bytes) -> "ModelFile":
    from qcore.canonical import sha256_bytes
    from qcore.evaluation_part import ModelFile

    return ModelFile(sha256=sha256_bytes(raw), size_bytes=len(raw))
