"""The steps of the main path on files: read, one call, write all at once.

The command line, the pipeline components and the tests call exactly these functions. Each loads only what it needs,
so importing this module is cheap. Inputs are never changed, and nothing is written beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import __version__
from qcore.canonical import Digest, Json
from qcore.errors import ConfigError, GateRefused, ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import AppliedStep, Recipe
    from qcore.data.dataset import Dataset
    from qcore.release.package import Package
    from qcore.release.repository import Release
    from qcore.report import EvaluationReport, GateDecision
    from qcore.runtime.ort import Loaded

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how many."""

CALIBRATION_BINS = 2048
ANY_TARGET = "x86-avx2"  # a recipe without quantize does not look at it
EVALUATION_BATCH = 8


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionSummary:
    """A written model: where, its digest and size, and what each step did."""

    output: Path
    sha256: Digest
    size_bytes: int
    input_size_bytes: int
    recipe: str
    recipe_sha256: Digest
    target: str
    steps: "tuple[AppliedStep, ...]"

    def to_json(self) -> Json:
        """Return the JSON form of `--json`."""
        return {
            "output": str(self.output),
            "size_bytes": self.size_bytes,
            "input_size_bytes": self.input_size_bytes,
            "model": {"sha256": self.sha256, "size_bytes": self.size_bytes},
            "recipe": self.recipe,
            "recipe_sha256": self.recipe_sha256,
            "target": self.target,
            "steps": [
                {
                    "method": s.method,
                    "changed": list(s.changed),
                    "skipped": [{"node": k.node, "op_type": k.op_type, "reason": k.reason} for k in s.skipped],
                }
                for s in self.steps
            ],
        }


def prune(*, model: Path, out: Path, sparsity: float = 0.5) -> CompressionSummary:
    """Return the summary of `out`: `model` with the fraction `sparsity` of every layer's weights set to zero."""
    from qcore.compression import Recipe
    from qcore.config import check_config

    recipe = check_config(
        {"name": "prune", "steps": [{"method": "prune", "sparsity": sparsity}]}, Recipe, "prune options"
    )
    _refuse_overwrite(out, model)
    if sparsity == 0:
        return _unchanged(model, out, recipe)
    return _compressed(model, out, recipe, ANY_TARGET, None)


def calibrate(
    *,
    model: Path,
    data: Path,
    out: Path,
    split: str = "calibration",
    bins: int = CALIBRATION_BINS,
    progress: Progress = _silent,
) -> "CalibrationTable":
    """Return the calibration table of `model` over `split`, written to `out`."""
    from qcore.calibration import save_table
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(model)
    _refuse_overwrite(out, model, data=data)
    table = _table(raw, parse_model(raw, str(model)), open_dataset(data, split), bins, progress)
    save_table(table, out)
    return table


def quantize(*, model: Path, table: Path, out: Path, target: str = "host", recipe: str = "int8") -> CompressionSummary:
    """Return the summary of `out`: `model` after the steps of `recipe`, with ranges from `table`.

    Raises:
        CalibrationError: the table is of another model.
        ConfigError: the recipe changes weights before it quantizes, which the table has not seen.
    """
    from qcore.calibration import load_table
    from qcore.canonical import sha256_bytes
    from qcore.compression import load_recipe
    from qcore.graph.io import read_model_bytes
    from qcore.methods.prune import PruneStep

    _refuse_overwrite(out, model, table, recipe, target)
    loaded = load_recipe(recipe)
    if any(isinstance(s, PruneStep) for s in loaded.steps):
        raise ConfigError(
            f"recipe {loaded.name} prunes before it quantizes, but the table is of the unpruned model; run "
            "`qcore prune`, calibrate the result, then quantize; or use `qcore compress`"
        )
    measured = load_table(table)
    _expect_table_of(measured, sha256_bytes(read_model_bytes(model)), model)
    return _compressed(model, out, loaded, target, lambda current: measured)


def compress(
    *,
    model: Path,
    data: Path,
    out: Path,
    recipe: str = "int8",
    target: str = "host",
    split: str = "calibration",
    progress: Progress = _silent,
) -> CompressionSummary:
    """Return the summary of `out`: `model` after all steps of `recipe`, calibrated on `split` where one needs it."""
    from qcore.compression import load_recipe
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import serialize_model

    loaded = load_recipe(recipe)
    _refuse_overwrite(out, model, recipe, target, data=data)
    if not loaded.needs_calibration:
        return _compressed(model, out, loaded, target, None)
    dataset = open_dataset(data, split)

    def calibrated(current: "ir.Model") -> "CalibrationTable":
        return _table(serialize_model(current), current, dataset, CALIBRATION_BINS, progress)

    return _compressed(model, out, loaded, target, calibrated)


def evaluate(
    *,
    candidate: Path,
    baseline: Path,
    data: Path,
    out: Path,
    split: str = "evaluation",
    progress: Progress = _silent,
) -> "EvaluationReport":
    """Return the report on `candidate` against `baseline` over `split`, written to `out` as JSON."""
    from qcore.data.dataset import open_dataset
    from qcore.evaluation import evaluate as evaluate_pair
    from qcore.files import write_json
    from qcore.graph.io import read_model_bytes
    from qcore.report import EvaluationReport, MeasuredData
    from qcore.runtime import ort

    _refuse_overwrite(out, candidate, baseline, data=data)
    files = [read_model_bytes(p) for p in (candidate, baseline)]
    models = [ort.load(raw, name=str(p)) for raw, p in zip(files, (candidate, baseline), strict=True)]
    if {p.name for p in models[0].inputs} != {p.name for p in models[1].inputs}:
        raise ModelError(
            f"{candidate} has inputs {sorted(p.name for p in models[0].inputs)}, the baseline "
            f"{sorted(p.name for p in models[1].inputs)}; allowed: equal names; pass the model that it was made from"
        )
    dataset = open_dataset(data, split)
    result = evaluate_pair(models[0].predict, models[1].predict, _fed(dataset, models[1], progress))
    latencies = _latencies(files, dataset, progress)
    report = EvaluationReport(
        model=_measured(files[0], latencies[0]),
        baseline=_measured(files[1], latencies[1]),
        data=MeasuredData(name=dataset.card.name, split=split, task=dataset.card.task, sha256=dataset.sha256),
        n=result.n,
        metrics=result.metrics,
        paired=result.paired,
        samples=result.samples,
        runtime=ort.runtime_identity(),
        qcore_version=__version__,
    )
    write_json(out, report.to_json())
    return report


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

    _refuse_overwrite(out, report, key, *([policy] if policy else []))
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


def package(
    *,
    model: Path,
    data: Path,
    evidence: Path,
    out: Path,
    family: str,
    version: str,
    target: str | None = None,
    split: str = "evaluation",
) -> "Package":
    """Return the package written to `out`: the model, golden samples from `split`, and what a device must be.

    Raises:
        PackageError: `target` is not the profile that the model was quantized for; None takes the model's own.
        GateRefused: the evidence is about another model or is not a pass. Its signature is checked by `publish`.
    """
    import tempfile

    from qcore.data.dataset import open_dataset
    from qcore.graph.io import read_model_bytes
    from qcore.release.golden import compatibility, write_golden
    from qcore.release.manifest import Provenance
    from qcore.release.package import PackageSource, build_package

    _refuse_overwrite(out, model, evidence, data=data)
    raw = read_model_bytes(model)
    decision = _claimed_pass(evidence, raw)
    with tempfile.TemporaryDirectory() as folder:
        golden = write_golden(raw, open_dataset(data, split), Path(folder) / "golden.npz")
        source = PackageSource(
            family=family,
            version=version,
            model=model,
            golden=golden.path,
            compat=compatibility(raw, target),
            inputs=golden.inputs,
            outputs=golden.outputs,
            golden_limits=golden.limits,
            provenance=Provenance(
                baseline_sha256=decision.baseline_sha256,
                data_sha256=decision.data_sha256,
                policy_sha256=decision.policy_sha256,
                qcore_version=__version__,
            ),
        )
        return build_package(source, out)


def publish(*, package: Path, evidence: Path, repository: Path, keys: Path, channel: str = "stable") -> "Release":
    """Return the release of `package`, signed into the repository folder `repository` with the key ring `keys`.

    Raises:
        GateRefused: the evidence is not signed by the gate, not a pass, or not about this package's model.
        PackageError: the package is damaged.
        ReleaseError: the repository or a key is missing, or the version exists with other bytes.
    """
    from datetime import UTC, datetime

    from qcore.release.keys import load_keys
    from qcore.release.repository import Submission, publish_release
    from qcore.release.store import DirectoryStore

    submission = Submission(package=package, evidence=_read_evidence(evidence), channel=channel)
    return publish_release(DirectoryStore(folder=repository), submission, load_keys(keys), now=datetime.now(UTC))


def _compressed(
    model: Path,
    out: Path,
    recipe: "Recipe",
    target: str,
    calibrated: "Callable[[ir.Model], CalibrationTable] | None",
) -> CompressionSummary:
    """Apply `recipe` to files; `calibrated` gives the table of the model that is about to be quantized."""
    from qcore.compression import compress as apply_recipe
    from qcore.graph.io import parse_model, read_model_bytes, save_model, serialize_model
    from qcore.target import load_target

    raw = read_model_bytes(model)
    profile = load_target(target)
    result = apply_recipe(parse_model(raw, str(model)), recipe, profile, calibrated)
    _refuse_unusable(serialize_model(result.model), f"the result of recipe {recipe.name} for {profile.name}")
    digest = save_model(result.model, out)
    return CompressionSummary(
        output=out,
        sha256=digest,
        size_bytes=out.stat().st_size,
        input_size_bytes=len(raw),
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        target=profile.name if calibrated is not None else "any",
        steps=result.steps,
    )


def _refuse_unusable(raw: bytes, name: str) -> None:
    """Refuse bytes that the checker or the runtime would refuse: nothing is written rather than a wrong file."""
    from qcore.graph.io import parse_model
    from qcore.runtime import ort

    parse_model(raw, name)
    ort.load(raw, name=name)


def _unchanged(model: Path, out: Path, recipe: "Recipe") -> CompressionSummary:
    """Write the bytes of `model` to `out`: nothing was asked for, so the digest stays what it was."""
    from qcore.canonical import sha256_bytes
    from qcore.files import write_atomic
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(model)
    parse_model(raw, str(model))
    write_atomic(out, raw)
    return CompressionSummary(
        output=out,
        sha256=sha256_bytes(raw),
        size_bytes=len(raw),
        input_size_bytes=len(raw),
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        target="any",
        steps=(),
    )


def _expect_table_of(table: "CalibrationTable", sha256: Digest, model: Path) -> None:
    from qcore.errors import CalibrationError

    if table.model_sha256 != sha256:
        raise CalibrationError(
            f"the calibration table is of model {table.model_sha256[:12]}, but {model} is {sha256[:12]}; run "
            "`qcore calibrate` on this model"
        )


def _table(raw: bytes, model: "ir.Model", dataset: "Dataset", bins: int, progress: Progress) -> "CalibrationTable":
    from qcore.calibration import calibrate as count
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import Batch, batches
    from qcore.graph.fold import fold_batchnorm
    from qcore.methods.quantize import tensors_to_calibrate
    from qcore.runtime import ort

    names = tensors_to_calibrate(fold_batchnorm(model).model)
    size = ort.load(raw).fixed_batch or 1

    def counted() -> Iterator[Batch]:
        done = 0
        for batch in batches(dataset, size):
            yield batch
            done += len(batch.index)
            progress("calibrating", done, dataset.n)

    return count(
        ort.activations(raw, names, counted()), model_sha256=sha256_bytes(raw), data_sha256=dataset.sha256, bins=bins
    )


def _fed(dataset: "Dataset", model: "Loaded", progress: Progress) -> Iterator[tuple[Any, Any, Any]]:
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    done = 0
    for batch in batches(dataset, model.fixed_batch or EVALUATION_BATCH):
        yield batch.index, ort.feeds(model, batch), batch.y
        done += len(batch.index)
        progress("evaluating", done, dataset.n)


def _latencies(files: list[bytes], dataset: "Dataset", progress: Progress) -> list[Any]:
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    progress("measuring latency", 0, 1)
    models = [ort.load(raw, threads=1) for raw in files]
    sample = next(batches(dataset, models[0].fixed_batch or 1))
    result = ort.measure_latency(models, ort.feeds(models[0], sample))
    progress("measuring latency", 1, 1)
    return result


def _measured(raw: bytes, latency: Any) -> Any:
    from qcore.canonical import sha256_bytes
    from qcore.report import MeasuredModel

    return MeasuredModel(sha256=sha256_bytes(raw), size_bytes=len(raw), latency_ms=latency)


def _read_evidence(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise GateRefused(f"evidence {path} cannot be read: {e.strerror}; run `qcore gate` first") from e


def _claimed_pass(evidence: Path, raw: bytes) -> "GateDecision":
    from qcore.canonical import sha256_bytes
    from qcore.release.evidence import claimed_decision

    decision = claimed_decision(_read_evidence(evidence))
    if decision.model_sha256 != sha256_bytes(raw):
        raise GateRefused(
            f"the evidence is about model {decision.model_sha256[:12]}, this model is {sha256_bytes(raw)[:12]}; "
            "evaluate and gate the model that is to be shipped"
        )
    if decision.outcome != "pass":
        raise GateRefused(f"the gate's outcome is {decision.outcome}; only a pass is packaged; see `qcore gate`")
    return decision


def _refuse_overwrite(out: Path, *inputs: Path | str, data: Path | None = None) -> None:
    """Refuse an output path that is one of the inputs, lies inside a data folder, or is not a regular file.

    Args:
        out: where a step wants to write.
        inputs: files; names of shipped recipes and targets are no files and do no harm.
        data: a data card, with everything that it reads.
    """
    if out.exists() and not out.is_file():
        raise ConfigError(f"output {out} is not a regular file; pass the path of a file")
    files, folders = [Path(p) for p in inputs], []
    if data is not None:
        from qcore.data.dataset import data_sources

        sources = data_sources(data)
        files += [p for p in sources if not p.is_dir()]
        folders = [p.resolve() for p in sources if p.is_dir()]
    for path in files:
        if out.exists() and path.exists() and out.samefile(path):
            raise ConfigError(f"output {out} is also an input; inputs are never changed; pass another path")
    for folder in folders:
        if out.resolve().is_relative_to(folder):
            raise ConfigError(
                f"output {out} lies in the data folder {folder}; inputs are never changed; pass another path"
            )
