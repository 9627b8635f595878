"""Searches on files: which layers are sensitive, and which must have more than 8 bits for a budget to hold.

Both keep a journal of finished trials beside their output (`<out>.trials.jsonl`), so that a killed run goes on where it
was. The journal may be deleted at any time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcore import __version__
from qcore.canonical import Digest, Json, sha256_bytes, sha256_json
from qcore.errors import ConfigError
from qcore.steps.compression import gathered
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import Recipe
    from qcore.data.dataset import Dataset
    from qcore.methods.quantize import QuantizeStep
    from qcore.mixed_precision import Assignment, PrecisionSearch, Trial
    from qcore.recovery import Evidence
    from qcore.runtime.ort import Predict
    from qcore.sensitivity import Sensitivity, SensitivityReport, SmallSet
    from qcore.target import TargetProfile

SENSITIVITY_SAMPLES = 32
_BATCH = 8


def journal_path(out: Path) -> Path:
    """Return where the finished trials of a search that writes `out` are kept."""
    return out.with_name(f"{out.name}.trials.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A float model ready to be quantized in part: after the float steps of a recipe, with its table and target.

    `nodes` are the layers that the target runs on integers, by name with their op types, in graph order. `sha256`
    covers the model, the step, the target, the table and what computes with them.
    """

    model: "ir.Model"
    step: "QuantizeStep"
    target: "TargetProfile"
    table: "CalibrationTable"
    nodes: Mapping[str, str]
    sha256: Digest


def sensitivity(
    *,
    model: Path,
    data: Path,
    out: Path,
    target: str = "host",
    recipe: str = "int8",
    split: str = "calibration",
    samples: int = SENSITIVITY_SAMPLES,
    precision: Literal["int8", "int16", "float16"] = "int8",
    progress: Progress = silent,
) -> "SensitivityReport":
    """Return how sensitive each layer of `model` is to `precision`, written to `out` as JSON.

    Args:
        model: the float model.
        data: the data card; `samples` of `split` are used, evenly spread.
        out: the JSON file; finished trials are kept in `journal_path(out)`.
        target: profile name or file.
        recipe: its steps before `quantize` are applied to the whole model, its `quantize` to one layer at a time.
        split: also what ranges are calibrated on.
        samples: 32 rank the layers of a CNN as hundreds do.
        precision: what the one layer runs in.
        progress: told how far it is.
    """
    from qcore.data.dataset import open_dataset, some_samples
    from qcore.files import write_json
    from qcore.graph.io import read_model_bytes
    from qcore.sensitivity import SensitivityReport

    if samples < 1:
        raise ConfigError(f"samples is {samples}; allowed: 1 or more")
    for path in (out, journal_path(out)):
        refuse_overwrite(path, model, recipe, target, data=data)
    raw, dataset = read_model_bytes(model), open_dataset(data, split)
    prepared = prepare(raw, str(model), dataset, recipe=recipe, target=target, progress=progress)
    chosen = some_samples(dataset, samples)
    ranked = rank_layers(prepared, chosen, journal_path(out), precision=precision, progress=progress)
    report = SensitivityReport(
        model_sha256=sha256_bytes(raw),
        data_sha256=chosen.sha256,
        samples=chosen.n,
        target=prepared.target.name,
        precision=precision,
        measure=_measure(chosen),
        layers=ranked,
        qcore_version=__version__,
    )
    write_json(out, report.to_json())
    return report


def mixed_precision(
    *,
    model: Path,
    data: Path,
    out: Path,
    max_error: float,
    target: str = "host",
    recipe: str = "int8",
    split: str = "calibration",
    validation: str | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    progress: Progress = silent,
) -> "PrecisionSearch":
    """Return the search for the cheapest precisions whose error is at most `max_error`; write the model to `out`.

    The error of a trial is the drop in top-1 on `validation` (a share of 1) where the data have labels, else the
    output error (`numerics.error.output_error`). Nothing is written if the budget cannot be met. Latency is measured
    where the target is this machine, and does not change the choice.

    Args:
        model: the float model.
        data: the data card.
        out: the ONNX file of the chosen model; finished trials are kept in `journal_path(out)`.
        max_error: the budget.
        target: profile name or file; its `mixed` lists what may be chosen.
        recipe: its steps before `quantize` are applied first.
        split: for ranges and sensitivities.
        validation: the split that trials are judged on; None takes `split`, which is optimistic.
        samples: how many of `split` sensitivities are measured on.
        progress: told how far it is.
    """
    from qcore.data.dataset import open_dataset, some_samples
    from qcore.graph.io import read_model_bytes, save_model
    from qcore.mixed_precision import search_precision

    for path in (out, journal_path(out)):
        refuse_overwrite(path, model, recipe, target, data=data)
    raw, dataset = read_model_bytes(model), open_dataset(data, split)
    judged = open_dataset(data, validation or split)
    prepared = prepare(raw, str(model), dataset, recipe=recipe, target=target, progress=progress)
    ranked = rank_layers(prepared, some_samples(dataset, samples), journal_path(out), progress=progress)
    run = precision_trial(prepared, judged, journal_path(out), progress=progress)
    search = search_precision([s.node for s in ranked], run, prepared.target.mixed, max_error)
    if search.met:
        save_model(quantized_as(prepared, search.chosen.precision), out)
    return search


def prepare(
    raw: bytes, name: str, dataset: "Dataset", *, recipe: str, target: str, progress: Progress = silent
) -> Prepared:
    """Return the model in `raw` after the float steps of `recipe`, calibrated on `dataset`.

    Raises:
        ConfigError: the recipe does not quantize.
    """
    from qcore.compression import compress, load_recipe
    from qcore.graph.io import parse_model
    from qcore.target import load_target

    loaded, profile, parsed = load_recipe(recipe), load_target(target), parse_model(raw, name)
    if loaded.quantize_step is None:
        raise ConfigError(f"recipe {loaded.name} does not quantize; allowed: a recipe with a quantize step")
    evidence = gathered(parsed, dataset, loaded.needs_samples, progress)
    made = compress(parsed, loaded, profile, evidence)
    return prepared_from(made.reference, loaded, profile, evidence, [sha256_bytes(raw), dataset.sha256])


def prepared_from(
    reference: "ir.Model", recipe: "Recipe", target: "TargetProfile", evidence: "Evidence", origin: list[Digest]
) -> Prepared:
    """Return `reference`, the float model that `recipe` quantized, ready to be quantized in part.

    Args:
        reference: of `compress`.
        recipe: with a quantize step.
        target: profile.
        evidence: gives the table of `reference`.
        origin: digests of the model and the data that all this comes from.
    """
    from qcore.graph.traverse import node_name
    from qcore.methods.quantize import quantize
    from qcore.runtime.ort import runtime_version

    step = recipe.quantize_step
    assert step is not None  # noqa: S101 - callers have looked
    table = evidence.table(reference)
    changed = quantize(reference, step, target, table).changed
    types = {node_name(n): n.op_type for n in reference.graph}
    known = [*origin, recipe.sha256, target.sha256, sha256_json(table.to_json()), __version__, runtime_version()]
    return Prepared(
        model=reference,
        step=step,
        target=target,
        table=table,
        nodes={n: types[n] for n in changed},
        sha256=sha256_json(known),
    )


def quantized_as(prepared: Prepared, assignment: "Mapping[str, str]") -> "ir.Model":
    """Return the model with every layer in int8 but those of `assignment`, which run in what it says."""
    from qcore.config import check_config
    from qcore.methods.quantize import QuantizeStep, quantize

    if all(assignment.get(node) == "float" for node in prepared.nodes):
        return prepared.model
    options = prepared.step.model_dump()
    excluded = [node for node, precision in assignment.items() if precision == "float"]
    others = {node: precision for node, precision in assignment.items() if precision not in ("float", "int8")}
    options["exclude"] = (*prepared.step.exclude, *excluded)
    if others:
        options["precision"] = {**options.get("precision", {}), **others}
    step = check_config(options, QuantizeStep, "quantize options")
    return quantize(prepared.model, step, prepared.target, prepared.table).model


def rank_layers(
    prepared: Prepared, samples: "Dataset", journal: Path, *, precision: str = "int8", progress: Progress = silent
) -> "tuple[Sensitivity, ...]":
    """Return how sensitive each layer of `prepared` is to `precision`, most sensitive first; resumes from `journal`."""
    from qcore.sensitivity import sensitivity as measure
    from qcore.trials import remembered

    key = sha256_json(["sensitivity", prepared.sha256, samples.sha256])

    def quantize_one(node: str) -> "ir.Model":
        others = {name: "float" for name in prepared.nodes if name != node}
        return quantized_as(prepared, {**others, node: precision})

    def remember(run: Callable[[str], float]) -> Callable[[str], float]:
        known = remembered(journal, key, lambda trial: run(trial["node"]))
        done = iter(range(1, len(prepared.nodes) + 1))

        def trial(node: str) -> float:
            error = float(known({"node": node, "precision": precision}))
            progress("measuring sensitivity", next(done), len(prepared.nodes))
            return error

        return trial

    return measure(prepared.model, quantize_one, prepared.nodes, _small_set(prepared.model, samples), remember)


def precision_trial(
    prepared: Prepared, judged: "Dataset", journal: Path, *, progress: Progress = silent
) -> "Callable[[Assignment], Trial]":
    """Return what tries an assignment on all samples of `judged`; finished trials are read from `journal`."""
    from qcore.mixed_precision import Trial
    from qcore.target import load_target
    from qcore.trials import remembered

    timed = load_target("host").name == prepared.target.name
    key = sha256_json(["mixed-precision", prepared.sha256, judged.sha256, timed])
    counted = 0

    def run(assignment: Json) -> Json:
        return _tried(prepared, quantized_as(prepared, assignment), judged, timed)

    known = remembered(journal, key, run)

    def trial(assignment: "Assignment") -> "Trial":
        nonlocal counted
        counted += 1
        result = Trial(**known(dict(assignment)))
        progress("trying precisions", counted, counted)
        return result

    return trial


def _measure(dataset: "Dataset") -> str:
    kl = dataset.card.task == "classification"
    return "mean KL divergence of the outputs, nats" if kl else "largest normalised mean square error of the outputs"


def _small_set(model: "ir.Model", samples: "Dataset") -> "SmallSet":
    from qcore.data.dataset import batches
    from qcore.graph.io import serialize_model
    from qcore.runtime import ort
    from qcore.sensitivity import SmallSet

    loaded = ort.load(serialize_model(model))
    size = loaded.fixed_batch or _BATCH
    fed = tuple(ort.feeds(loaded, batch) for batch in batches(samples, size))
    return SmallSet(batches=fed, task=samples.card.task, predictor=_predictor)


def _predictor(model: "ir.Model") -> "Predict":
    """Return how a model runs in a search: by the numbers that it states, whatever this machine's kernels do."""
    from qcore.graph.io import serialize_model
    from qcore.runtime import ort

    return ort.load_unfused(serialize_model(model)).predict


def _tried(prepared: Prepared, model: "ir.Model", judged: "Dataset", timed: bool) -> Json:
    from qcore.data.dataset import batches
    from qcore.evaluation import evaluate
    from qcore.graph.io import serialize_model
    from qcore.runtime import ort
    from qcore.sensitivity import outputs_of, small_set_error

    raw = serialize_model(model)
    error: float
    if judged.labels is not None:
        reference = ort.load_unfused(serialize_model(prepared.model))
        fed = ((b.index, ort.feeds(reference, b), b.y) for b in batches(judged, reference.fixed_batch or _BATCH))
        error = -evaluate(_predictor(model), reference.predict, fed).metrics["top1_delta"]
    else:
        small = _small_set(prepared.model, judged)
        error = small_set_error(model, outputs_of(_predictor(prepared.model), small.batches), small)
    latency = None
    if timed:
        loaded = ort.load(raw, threads=1)
        fed_once = ort.feeds(loaded, next(batches(judged, loaded.fixed_batch or 1)))
        latency = ort.measure_latency([loaded], fed_once, budget_s=0.5)[0].p50
    return {"error": error, "size_bytes": len(raw), "latency_ms": latency}
