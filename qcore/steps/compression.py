"""Compression on files: a model in, the bytes of a smaller one and a summary out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Digest, Json
from qcore.errors import ConfigError
from qcore.steps.calibration import CALIBRATION_BINS, count_table
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import AppliedStep, Recipe

ANY_TARGET = "x86-avx2"  # a recipe without quantize does not look at it


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
    refuse_overwrite(out, model)
    if sparsity == 0:
        return _unchanged(model, out, recipe)
    return _compressed(model, out, recipe, ANY_TARGET, None)


def quantize(*, model: Path, table: Path, out: Path, target: str = "host", recipe: str = "int8") -> CompressionSummary:
    """Return the summary of `out`: `model` after the steps of `recipe`, with ranges from `table`.

    Raises:
        CalibrationError: the table is of another model.
        ConfigError: the recipe changes weights before it quantizes, which the table has not seen.
    """
    from qcore.calibration import check_table, load_table
    from qcore.canonical import sha256_bytes
    from qcore.compression import load_recipe
    from qcore.graph.io import read_model_bytes
    from qcore.methods.prune import PruneStep

    refuse_overwrite(out, model, table, recipe, target)
    loaded = load_recipe(recipe)
    if any(isinstance(s, PruneStep) for s in loaded.steps):
        raise ConfigError(
            f"recipe {loaded.name} prunes before it quantizes, but the table is of the unpruned model; run "
            "`qcore prune`, calibrate the result, then quantize; or use `qcore compress`"
        )
    measured = load_table(table)
    check_table(measured, model_sha256=sha256_bytes(read_model_bytes(model)), name=str(model))
    return _compressed(model, out, loaded, target, lambda current: measured)


def compress(
    *,
    model: Path,
    data: Path,
    out: Path,
    recipe: str = "int8",
    target: str = "host",
    split: str = "calibration",
    progress: Progress = silent,
) -> CompressionSummary:
    """Return the summary of `out`: `model` after all steps of `recipe`, calibrated on `split` where one needs it."""
    from qcore.compression import load_recipe
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import serialize_model

    loaded = load_recipe(recipe)
    refuse_overwrite(out, model, recipe, target, data=data)
    if not loaded.needs_calibration:
        return _compressed(model, out, loaded, target, None)
    dataset = open_dataset(data, split)

    def calibrated(current: "ir.Model") -> "CalibrationTable":
        return count_table(serialize_model(current), current, dataset, CALIBRATION_BINS, progress)

    return _compressed(model, out, loaded, target, calibrated)


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
