"""Sensitivity on files: which layers of a float model suffer most from few bits.

Finished trials are kept in a journal beside the output (`<out>.trials.jsonl`), so that a killed run goes on where it
was. The journal may be deleted at any time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcore import __version__
from qcore.canonical import Digest, sha256_bytes, sha256_json
from qcore.errors import ConfigError
from qcore.steps.compression import gathered
from qcore.steps.guard import Progress, open_calibration, refuse_overwrite, silent
from qcore.steps.tries import journal_path

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import Shared
    from qcore.data.dataset import Dataset
    from qcore.methods.quantize import QuantizeStep
    from qcore.recipe import Recipe
    from qcore.recovery import Evidence
    from qcore.runtime.ort import Predict
    from qcore.sensitivity import Sensitivity, SensitivityReport, SmallSet
    from qcore.target import TargetProfile

SENSITIVITY_SAMPLES = 32
_BATCH = 8


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
    from qcore.data.dataset import some_samples
    from qcore.files import write_json
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.recipe import load_recipe
    from qcore.sensitivity import SensitivityReport
    from qcore.target import load_target

    if samples < 1:
        raise ConfigError(f"samples is {samples}; allowed: 1 or more")
    for path in (out, journal_path(out)):
        refuse_overwrite(path, model, recipe, target, data=data)
    raw, dataset = read_model_bytes(model), open_calibration(data, split)
    loaded, parsed = load_recipe(recipe), parse_model(raw, str(model))
    evidence = gathered(parsed, dataset, loaded.needs_samples, progress)
    prepared = prepare(parsed, loaded, load_target(target), evidence, [sha256_bytes(raw), dataset.sha256])
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


def prepare(
    model: "ir.Model",
    recipe: "Recipe",
    target: "TargetProfile",
    evidence: "Evidence",
    origin: list[Digest],
    shared: "Shared | None" = None,
) -> Prepared:
    """Return `model` after the float steps of `recipe`, ready to be quantized in part.

    Args:
        model: float model.
        recipe: with a quantize step; what it does behind that takes no part.
        target: profile.
        evidence: gives the calibration table.
        origin: digests of the model and the data that all this comes from.
        shared: of the runs of several recipes on `model`.

    Raises:
        ConfigError: the recipe does not quantize.
    """
    from qcore.compression import asked_of, compress
    from qcore.graph.traverse import node_name
    from qcore.methods.quantize import quantize
    from qcore.recipe import AFTER
    from qcore.runtime.ort import runtime_version
    from qcore.trials import source_sha256

    if (step := recipe.quantize_step) is None:
        raise ConfigError(f"recipe {recipe.name} does not quantize; allowed: a recipe with a quantize step")
    floats = recipe.model_copy(update={"steps": tuple(s for s in recipe.steps if not isinstance(s, AFTER))})
    reference = compress(model, floats, target, evidence, shared).reference
    table, asked = evidence.table(reference), asked_of(target, recipe)
    changed = quantize(reference, step, asked, table).changed
    types = {node_name(n): n.op_type for n in reference.graph}
    known = [*origin, floats.sha256, target.sha256, sha256_json(table.to_json()), source_sha256()]
    return Prepared(
        model=reference,
        step=step,
        target=asked,
        table=table,
        nodes={n: types[n] for n in changed},
        sha256=sha256_json([*known, runtime_version()]),
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
    return SmallSet(batches=fed, task=samples.card.error_of, predictor=_predictor)


def _predictor(model: "ir.Model") -> "Predict":
    """Return how a model runs in a search: by the numbers that it states, whatever this machine's kernels do."""
    from qcore.graph.io import serialize_model
    from qcore.runtime import ort

    return ort.load_unfused(serialize_model(model)).predict
