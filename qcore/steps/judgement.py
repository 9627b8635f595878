"""Judgement on files: evaluate a candidate against its baseline, then decide and sign."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.errors import GateRefused, ModelError
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.data.dataset import Dataset
    from qcore.report import EvaluationReport, GateDecision
    from qcore.runtime.ort import Loaded

EVALUATION_BATCH = 8


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
    from qcore.evaluation import evaluate as evaluate_pair
    from qcore.report import EvaluationReport, MeasuredData
    from qcore.runtime import ort

    ours, theirs = (ort.load_exact(raw, name=name) for raw, name in (candidate, baseline))
    names = [sorted(p.name for p in loaded.inputs) for loaded in (ours, theirs)]
    if names[0] != names[1]:
        raise ModelError(
            f"{candidate[1]} has inputs {names[0]}, the baseline {names[1]}; allowed: equal names; pass the model that "
            "it was made from"
        )
    result = evaluate_pair(ort.on_samples(ours), ort.on_samples(theirs), _fed(dataset, theirs, progress))
    latencies = _latencies([candidate[0], baseline[0]], dataset, progress)
    return EvaluationReport(
        model=_measured(candidate[0], latencies[0]),
        baseline=_measured(baseline[0], latencies[1]),
        data=MeasuredData(name=dataset.card.name, split=dataset.split, task=dataset.card.task, sha256=dataset.sha256),
        n=result.n,
        metrics=result.metrics,
        paired=result.paired,
        samples=result.samples,
        runtime=ort.runtime_identity(),
        qcore_version=__version__,
    )


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


def _fed(dataset: "Dataset", model: "Loaded", progress: Progress) -> Iterator[tuple[Any, Any, Any]]:
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    done = 0
    for batch in batches(dataset, model.fixed_batch or EVALUATION_BATCH):
        yield batch.index, ort.samples(model, batch), batch.y
        done += len(batch.index)
        progress("evaluating", done, dataset.n)


def _latencies(files: list[bytes], dataset: "Dataset", progress: Progress) -> list[Any]:
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    progress("measuring latency", 0, 1)
    models = [ort.load(raw, threads=1) for raw in files]
    sample = next(batches(dataset, models[0].fixed_batch or 1))
    result = ort.measure_latency(models, ort.samples(models[1], sample))
    progress("measuring latency", 1, 1)
    return result


def _measured(raw: bytes, latency: Any) -> Any:
    from qcore.canonical import sha256_bytes
    from qcore.report import MeasuredModel

    return MeasuredModel(sha256=sha256_bytes(raw), size_bytes=len(raw), latency_ms=latency)
