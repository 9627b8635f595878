"""Compression on files: a model in, the bytes of a smaller one and a summary out."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json
from qcore.errors import ConfigError
from qcore.steps.calibration import CALIBRATION_BINS, count_table
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import AppliedStep
    from qcore.data.dataset import Dataset
    from qcore.lint import Finding
    from qcore.recipe import Recipe
    from qcore.recovery import Evidence
    from qcore.target import TargetProfile

RECOVERY_BATCH = 8
HELD_OUT = 4  # one batch in so many judges
ANY_TARGET = "x86-avx2"  # a recipe without quantize does not look at it


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionSummary:
    """A written model: where, its digest and size, what each step did, and where it is not what the target wants.

    `breaches` are what `qcore lint` finds; none where the recipe does not look at the target.
    """

    output: Path
    sha256: Digest
    size_bytes: int
    input_size_bytes: int
    recipe: str
    recipe_sha256: Digest
    target: str
    steps: "tuple[AppliedStep, ...]"
    breaches: "tuple[Finding, ...]" = ()

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
                    "kept": s.kept,
                    "reason": s.reason,
                    "error": None if s.error_after is None else {"before": s.error_before, "after": s.error_after},
                    "changed": list(s.changed),
                    "skipped": [{"node": k.node, "op_type": k.op_type, "reason": k.reason} for k in s.skipped],
                    "resized": [asdict(r) for r in s.resized],
                }
                for s in self.steps
            ],
            "breaches": [b.to_json() for b in self.breaches],
        }


def prune(*, model: Path, out: Path, sparsity: float = 0.5) -> CompressionSummary:
    """Return the summary of `out`: `model` with the fraction `sparsity` of every layer's weights set to zero."""
    from qcore.config import check_config
    from qcore.recipe import Recipe

    recipe = check_config(
        {"name": "prune", "steps": [{"method": "prune", "sparsity": sparsity}]}, Recipe, "prune options"
    )
    refuse_overwrite(out, model)
    if sparsity == 0:
        return _unchanged(model, out, recipe)
    return _compressed(model, out, recipe, ANY_TARGET, None, silent)


def prune_channels(
    *,
    model: Path,
    data: Path,
    out: Path,
    macs: float | None = None,
    size: float | None = None,
    latency: float | None = None,
    split: str = "calibration",
    progress: Progress = silent,
) -> CompressionSummary:
    """Return the summary of `out`: `model` with fewer channels, down to a share of its cost.

    Args:
        model: float ONNX file.
        data: card of the samples on which losses are measured and made good.
        out: where to write.
        macs: share of the multiply-accumulates to keep; 0.6 if no budget is given.
        size: share of the file size to keep, instead.
        latency: share of the latency on this machine to keep, instead.
        split: of the card.
        progress: told how far it is.
    """
    from qcore.config import check_config
    from qcore.data.dataset import open_dataset
    from qcore.recipe import Recipe

    step = {"method": "prune-channels", "macs": macs, "size": size, "latency": latency}
    value = {"name": "prune-channels", "steps": [{"method": "fold-batchnorm"}, step]}
    recipe = check_config(value, Recipe, "prune options")
    refuse_overwrite(out, model, data=data)
    return _compressed(model, out, recipe, ANY_TARGET, open_dataset(data, split), progress)


def quantize(*, model: Path, table: Path, out: Path, target: str = "host", recipe: str = "int8") -> CompressionSummary:
    """Return the summary of `out`: `model` after the steps of `recipe`, with ranges from `table`.

    Raises:
        CalibrationError: the table is of another model.
        ConfigError: the recipe changes weights before it quantizes, which the table has not seen.
    """
    from qcore.calibration import check_table, load_table
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.methods.prune import PruneStep
    from qcore.methods.prune_channels import PruneChannelsStep
    from qcore.recipe import load_recipe
    from qcore.recovery import Evidence

    refuse_overwrite(out, model, table, recipe, target)
    loaded = load_recipe(recipe)
    if any(isinstance(s, PruneStep | PruneChannelsStep) for s in loaded.steps):
        raise ConfigError(
            f"recipe {loaded.name} prunes before it quantizes, but the table is of the unpruned model; run "
            "`qcore prune`, calibrate the result, then quantize; or use `qcore compress`"
        )
    if loaded.needs_samples:
        raise ConfigError(
            f"recipe {loaded.name} recovers accuracy by running samples, which a table does not hold; run "
            "`qcore compress` with --data"
        )
    measured = load_table(table)
    raw = read_model_bytes(model)
    check_table(measured, model_sha256=sha256_bytes(raw), name=str(model))
    evidence = Evidence(table=lambda current: measured, fit=(), held_out=(), batch=1, task="none")
    return _written(raw, parse_model(raw, str(model)), out, loaded, target, evidence)


def compress(
    *,
    model: Path,
    out: Path,
    data: Path | None = None,
    recipe: str = "int8",
    target: str = "host",
    split: str = "calibration",
    progress: Progress = silent,
) -> CompressionSummary:
    """Return the summary of `out`: `model` after all steps of `recipe`, calibrated on `split` where one needs it.

    Raises:
        ConfigError: the recipe needs calibration data and there are none. Data that it does not need are not read.
    """
    from qcore.data.dataset import open_dataset
    from qcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    refuse_overwrite(out, model, recipe, target, data=data)
    if not loaded.needs_calibration:
        return _compressed(model, out, loaded, target, None, progress)
    if data is None:
        raise ConfigError(
            f"recipe {loaded.name} calibrates and got no data; allowed: a data card; pass --data CARD, or a recipe "
            "without calibration (int8-dynamic, int8-weights, int4-weights, float16)"
        )
    return _compressed(model, out, loaded, target, open_dataset(data, split), progress)


def gathered(model: "ir.Model", dataset: "Dataset", samples: bool, progress: Progress) -> "Evidence":
    """Return what recipes may ask of `dataset`: one sample in four is held out, none of fewer than four.

    None are read unless `samples`.
    """
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import batches
    from qcore.graph.io import serialize_model
    from qcore.recovery import Evidence
    from qcore.runtime import ort

    tables: dict[Digest, CalibrationTable] = {}  # recipes often quantize the same float model

    def table(current: "ir.Model") -> "CalibrationTable":
        raw = serialize_model(current)
        digest = sha256_bytes(raw)
        if digest not in tables:
            tables[digest] = count_table(raw, current, dataset, CALIBRATION_BINS, progress)
        return tables[digest]

    loaded = ort.load(serialize_model(model))
    # Of few samples too some must be held out: then batches are smaller.
    size = loaded.fixed_batch or min(RECOVERY_BATCH, max(1, dataset.n // HELD_OUT))
    fed = [ort.feeds(loaded, batch) for batch in batches(dataset, size)] if samples else []
    held_out = tuple(fed[HELD_OUT - 1 :: HELD_OUT])
    fit = tuple(f for k, f in enumerate(fed) if (k + 1) % HELD_OUT)
    return Evidence(table=table, fit=fit, held_out=held_out, batch=size, task=dataset.card.task)


def _compressed(
    model: Path, out: Path, recipe: "Recipe", target: str, dataset: "Dataset | None", progress: Progress
) -> CompressionSummary:
    """Apply `recipe` to files, with what it asks of `dataset`."""
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(model)
    parsed = parse_model(raw, str(model))
    evidence = None if dataset is None else gathered(parsed, dataset, recipe.needs_samples, progress)
    return _written(raw, parsed, out, recipe, target, evidence, progress)


def _written(
    raw: bytes,
    model: "ir.Model",
    out: Path,
    recipe: "Recipe",
    target: str,
    evidence: "Evidence | None",
    progress: Progress = silent,
) -> CompressionSummary:
    from qcore.compression import Shared
    from qcore.compression import compress as apply_recipe
    from qcore.files import write_atomic
    from qcore.graph.io import serialize_model
    from qcore.target import load_target

    profile = load_target(target)
    shared = Shared(told=lambda method, done, total: progress(f"step {method}", done, total))
    result = apply_recipe(model, recipe, profile, evidence, shared)
    written = serialize_model(result.model)
    refuse_unusable(written, f"the result of recipe {recipe.name} for {profile.name}")
    write_atomic(out, written)
    return summary_of(out, raw, written, result.steps, recipe=recipe, target=profile)


def summary_of(
    out: Path,
    raw: bytes,
    written: bytes,
    steps: "tuple[AppliedStep, ...]",
    *,
    recipe: "Recipe",
    target: "TargetProfile",
) -> CompressionSummary:
    """Return the summary of `written`, made from `raw`."""
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import parse_model
    from qcore.lint import lint

    return CompressionSummary(
        output=out,
        sha256=sha256_bytes(written),
        size_bytes=len(written),
        input_size_bytes=len(raw),
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        target=target.name if recipe.reads_target else "any",
        steps=steps,
        breaches=lint(parse_model(written, str(out)), target) if recipe.reads_target else (),
    )


def refuse_unusable(raw: bytes, name: str) -> None:
    """Refuse bytes that the checker or the runtime would refuse: nothing is written rather than a wrong file."""
    from qcore.graph.io import check_model
    from qcore.runtime import ort

    check_model(raw, name)
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
