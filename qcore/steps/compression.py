"""Compression on files: a model in, the bytes of a smaller one and a summary out."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcore import __version__
from qcore.canonical import Digest, Json
from qcore.errors import ConfigError
from qcore.steps.calibration import CALIBRATION_BINS, count_table
from qcore.steps.guard import OnEpoch, Progress, is_first, open_calibration, refuse_overwrite, silent, unseen
from qcore.steps.training import Training

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.compression import AppliedStep
    from qcore.data.dataset import Dataset
    from qcore.lint import Finding
    from qcore.recipe import Recipe
    from qcore.recovery import Evidence
    from qcore.steps.training import School
    from qcore.target import TargetProfile

logger = logging.getLogger(__name__)

RECOVERY_BATCH = 8
MUCH_LOST = 0.02  # of accuracy, which deserves a warning
HELD_OUT = 4  # one batch in so many judges
ANY_TARGET = "x86-avx2"  # a recipe without quantize does not look at it


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionSummary:
    """A written model: where, its digest and size, what each step did, and where it is not what the target wants.

    `breaches` are what `qcore lint` finds; none where the recipe does not look at the target. `packed_bytes` and
    `input_packed_bytes` are the sizes of the file and of what it was made from inside a package, where the recipe has a
    step that pays only there, and zstandard is installed.
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
    packed_bytes: int | None = None
    input_packed_bytes: int | None = None

    @property
    def sizes(self) -> dict[str, float]:
        """Bytes of the file, and inside a package where only that became smaller, as a tracking server takes them."""
        packed = {} if self.packed_bytes is None else {"packed_bytes": float(self.packed_bytes)}
        return {"size_bytes": float(self.size_bytes), **packed}

    def to_json(self) -> Json:
        """Return the JSON form of `--json`."""
        return {
            "output": str(self.output),
            "size_bytes": self.size_bytes,
            "input_size_bytes": self.input_size_bytes,
            "packed_bytes": self.packed_bytes,
            "input_packed_bytes": self.input_packed_bytes,
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
                    "epochs": [asdict(e) for e in s.epochs],
                    "layers": [asdict(la) for la in s.layers],
                    "best": s.best,
                    "samples": s.samples,
                    "seconds": sum(e.seconds for e in s.epochs),
                    "changed": list(s.changed),
                    "skipped": [{"node": k.node, "op_type": k.op_type, "reason": k.reason} for k in s.skipped],
                    "resized": [asdict(r) for r in s.resized],
                }
                for s in self.steps
            ],
            "breaches": [b.to_json() for b in self.breaches],
        }


def refuse_beyond_table(recipe: "Recipe") -> None:
    """Refuse a recipe that needs more than a model and its calibration table, which is what `quantize` has.

    Raises:
        ConfigError: it changes weights before it quantizes, runs samples, or trains.
    """
    from qcore.methods.cluster import ClusterStep
    from qcore.methods.prune import PruneStep
    from qcore.methods.prune_channels import PruneChannelsStep

    before = (PruneStep, PruneChannelsStep, ClusterStep)
    changing = next((s.method for s in recipe.steps if isinstance(s, before)), None)
    if changing is not None:
        raise ConfigError(
            f"recipe {recipe.name} changes weights ({changing}) before it quantizes, but the table is of the model "
            f"before that; apply that first, calibrate the result, then quantize; or use `qcore compress`"
        )
    if recipe.needs_samples or recipe.training_steps:
        does = "trains on" if recipe.training_steps else "runs"
        raise ConfigError(
            f"recipe {recipe.name} {does} samples, which a table does not hold; allowed where only a table is at hand "
            "(`quantize`, the pipeline `release`): recipes such as int8; run `qcore compress` with --data"
        )


def quantize(*, model: Path, table: Path, out: Path, target: str = "host", recipe: str = "int8") -> CompressionSummary:
    """Return the summary of `out`: `model` after the steps of `recipe`, with ranges from `table`.

    Raises:
        CalibrationError: the table is of another model.
        ConfigError: the recipe changes weights before it quantizes, which the table has not seen.
    """
    from qcore.calibration import check_table, load_table
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.recipe import load_recipe
    from qcore.recovery import Evidence

    refuse_overwrite(out, model, table, recipe, target)
    loaded = load_recipe(recipe)
    refuse_beyond_table(loaded)
    measured = load_table(table)
    raw = read_model_bytes(model)
    check_table(measured, model_sha256=sha256_bytes(raw), name=str(model))
    evidence = Evidence(table=lambda current: measured, fit=(), held_out=(), batch=1, task="none")
    asked = Asked(target=target, evidence=evidence, data={"calibration": measured.data_sha256})
    return _written(raw, parse_model(raw, str(model)), out, loaded, asked, silent)


def compress(
    *,
    model: Path,
    out: Path,
    data: Path | None = None,
    recipe: str = "int8",
    target: str = "host",
    split: str = "calibration",
    device: str = "auto",
    progress: Progress = silent,
    on_epoch: OnEpoch = unseen,
) -> CompressionSummary:
    """Return the summary of `out`: `model` after all steps of `recipe`, calibrated on `split` where one needs it.

    Steps that train use `device` ("cpu", "cuda" or "auto"), and all processes that `torchrun` started.

    Raises:
        ConfigError: the recipe needs calibration data and there are none. Data that it does not need are not read.
    """
    from qcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    refuse_overwrite(out, model, recipe, target, data=data)
    progress = progress if is_first() else silent
    if not loaded.reads_calibration_data and not loaded.training_steps:
        return apply_to_file(model, out, loaded, target, None, progress)
    if data is None:
        does = "calibrates" if loaded.quantize_step else "runs samples" if loaded.needs_samples else "trains"
        raise ConfigError(
            f"recipe {loaded.name} {does} and got no data; allowed: a data card; pass --data CARD, or a recipe "
            "without calibration (int8-dynamic, int8-weights, int4-weights, float16)"
        )
    if loaded.training_steps:
        training = Training(data=data, split=split, device=device, progress=progress, on_epoch=on_epoch)
        return trained(model, out, loaded, target, training)
    return apply_to_file(model, out, loaded, target, open_calibration(data, split), progress)


def trained(model: Path, out: Path, recipe: "Recipe", target: str, training: Training) -> CompressionSummary:
    """Return the summary of `out`: `model` after a recipe that trains; its state lies beside `out` until that is there.

    Of several processes the first one speaks and writes.
    """
    import tempfile

    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.steps.training import checkpoint_of, parted, refuse_hopeless, school_of, splits

    inputs: list[Path | str] = [model, target, *(s.teacher for s in recipe.training_steps if s.teacher)]
    states = [checkpoint_of(out, k) for k, s in enumerate(recipe.steps) if s in recipe.training_steps]
    for path in (out, *states):
        refuse_overwrite(path, *inputs, data=training.data)
    if not is_first():
        training = replace(training, progress=silent, on_epoch=unseen)
    raw = read_model_bytes(model)
    parsed = parse_model(raw, str(model))
    learn, judge = splits(training.data, training.split, recipe.training_steps[0], logging.DEBUG)
    # Who judges training must not have taught the steps before it either.
    own = learn if judge.split == training.split else open_calibration(training.data, training.split)
    dataset = own if recipe.reads_calibration_data else None
    with tempfile.TemporaryDirectory(prefix="qcore-train-") as folder, parted():
        refuse_hopeless(out, recipe.training_steps, training.device)
        school = school_of(raw, training, out=out, folder=Path(folder))
        evidence = None if dataset is None else gathered(parsed, dataset, recipe.needs_samples, training.progress)
        data = {"train": learn.sha256, "validation": judge.sha256}
        data |= {} if dataset is None else {"calibration": dataset.sha256}
        asked = Asked(target=target, evidence=evidence, data=data)
        summary = _written(raw, parsed, out, recipe, asked, training.progress, school=school)
    if is_first():
        for path in states:
            path.unlink(missing_ok=True)
    for s in summary.steps:
        if s.epochs:
            seconds, epochs = sum(e.seconds for e in s.epochs), len(s.epochs) - 1
            logger.info("%s: %d samples x %d epochs in %.1f s", s.method, s.samples, epochs, seconds)
            logger.info("%s: validation loss %.4g -> %.4g", s.method, s.error_before, s.error_after)
            _say_what_was_lost(s)
    return summary


def _say_what_was_lost(step: "AppliedStep") -> None:
    """Warn where a step that trains ends with much less accuracy than it began with, as zeros can bring about."""
    before, after = step.epochs[0].accuracy, step.epochs[step.best or 0].accuracy
    if before is not None and after is not None and before - after > MUCH_LOST:
        logger.warning(
            "%s: accuracy on the validation samples fell from %.1f %% to %.1f %%; take away less, or train longer, on "
            "more samples, or at another learning_rate",
            step.method,
            100 * before,
            100 * after,
        )


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
    return Evidence(table=table, fit=fit, held_out=held_out, batch=size, task=dataset.card.error_of)


def apply_to_file(
    model: Path, out: Path, recipe: "Recipe", target: str, dataset: "Dataset | None", progress: Progress
) -> CompressionSummary:
    """Apply `recipe` to files, with what it asks of `dataset`."""
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(model)
    parsed = parse_model(raw, str(model))
    evidence = None if dataset is None else gathered(parsed, dataset, recipe.needs_samples, progress)
    data = {} if dataset is None else {"calibration": dataset.sha256}
    return _written(raw, parsed, out, recipe, Asked(target=target, evidence=evidence, data=data), progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """For what a model is compressed, on what evidence, and the digests of the data behind that by their use."""

    target: str
    evidence: "Evidence | None"
    data: Mapping[str, Digest]


def _written(
    raw: bytes,
    model: "ir.Model",
    out: Path,
    recipe: "Recipe",
    asked: Asked,
    progress: Progress,
    *,
    school: "School | None" = None,
) -> CompressionSummary:
    from qcore.canonical import sha256_bytes
    from qcore.compression import Shared
    from qcore.compression import compress as apply_recipe
    from qcore.files import write_atomic
    from qcore.graph.history import Making, serialize_made
    from qcore.target import load_target

    profile = load_target(asked.target)
    result = apply_recipe(model, recipe, profile, asked.evidence, Shared(school=school, within=progress))
    kept = tuple(s.method for s in result.steps if s.kept)
    written = serialize_made(
        result.model,
        Making(
            made_from=sha256_bytes(raw),
            recipe=recipe.name,
            recipe_sha256=recipe.sha256,
            steps=kept,
            target=profile.name if recipe.reads_target else None,
            data=asked.data,
            qcore_version=__version__,
        ),
    )
    refuse_unusable(written, f"the result of recipe {recipe.name} for {profile.name}")
    if is_first():
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
        packed_bytes=_packed(written, recipe),
        input_packed_bytes=_packed(raw, recipe),
    )


def _packed(raw: bytes, recipe: "Recipe") -> int | None:
    """Return the size of `raw` inside a package, where the recipe has a step that makes only that smaller."""
    from importlib.util import find_spec

    if find_spec("zstandard") is None or not recipe.only_packs_smaller:
        return None
    from qcore.release.package import packed_size

    return packed_size(raw)


def refuse_unusable(raw: bytes, name: str) -> None:
    """Refuse bytes that the checker or the runtime would refuse: nothing is written rather than a wrong file."""
    from qcore.graph.io import check_model
    from qcore.runtime import ort

    check_model(raw, name)
    ort.load(raw, name=name)
