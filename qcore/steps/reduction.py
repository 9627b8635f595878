"""Verbs that make a float model smaller without training: weights to zero, few values, fewer channels, chains."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json
from qcore.steps.compression import ANY_TARGET, CompressionSummary, apply_to_file, summary_of
from qcore.steps.guard import Progress, open_calibration, refuse_overwrite, silent

if TYPE_CHECKING:
    from qcore.recipe import Recipe


def prune(*, model: Path, out: Path, sparsity: float = 0.5, pattern: str | None = None) -> CompressionSummary:
    """Return the summary of `out`: `model` with some weights of every layer set to zero.

    Args:
        model: the float model.
        out: where to write.
        sparsity: the fraction of every layer's weights, where there is no pattern.
        pattern: N:M, keeps N of every M weights along the inputs of a layer.
    """
    options = {"sparsity": sparsity} if pattern is None else {"pattern": pattern}
    recipe = _one_step("prune", options)
    refuse_overwrite(out, model)
    if sparsity == 0 and pattern is None:
        return _unchanged(model, out, recipe)
    return apply_to_file(model, out, recipe, ANY_TARGET, None, silent)


def cluster(*, model: Path, out: Path, clusters: int = 16) -> CompressionSummary:
    """Return the summary of `out`: `model` with at most `clusters` distinct values in every layer's weights."""
    recipe = _one_step("cluster", {"clusters": clusters})
    refuse_overwrite(out, model)
    return apply_to_file(model, out, recipe, ANY_TARGET, None, silent)


def decompose(
    *,
    model: Path,
    data: Path,
    out: Path,
    macs: float | None = None,
    size: float | None = None,
    multiple: int | None = None,
    split: str = "calibration",
    progress: Progress = silent,
) -> CompressionSummary:
    """Return the summary of `out`: `model` with layers written as chains of smaller ones.

    Args:
        model: the float model; batch norms are folded first.
        data: the data card.
        out: where to write.
        macs: share of the multiplications that may be left; 0.5 without it and `size`.
        size: share of the weights instead.
        multiple: of all ranks; that of `DecomposeStep` without it.
        split: runs through the model.
        progress: told how far it is.
    """
    options = {"macs": macs, "size": size, "multiple": multiple}
    recipe = _one_step("decompose", {k: v for k, v in options.items() if v is not None})
    refuse_overwrite(out, model, data=data)
    return apply_to_file(model, out, recipe, ANY_TARGET, open_calibration(data, split), progress)


def _one_step(method: str, options: Mapping[str, Json]) -> "Recipe":
    """Return the recipe of one step; batch norms are folded before a decomposition, which moves biases."""
    from qcore.config import check_config
    from qcore.recipe import Recipe

    before = [{"method": "fold-batchnorm"}] if method == "decompose" else []
    value = {"name": method, "steps": [*before, {"method": method, **options}]}
    return check_config(value, Recipe, f"{method} options")


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
        macs: share of the multiply-accumulates to keep; if no budget is given 0.6, with 0.75 of the latency.
        size: share of the file size to keep.
        latency: share of the latency on this machine to keep.
        split: of the card.
        progress: told how far it is.
    """
    from qcore.config import check_config
    from qcore.recipe import Recipe

    step = {"method": "prune-channels", "macs": macs, "size": size, "latency": latency}
    value = {"name": "prune-channels", "steps": [{"method": "fold-batchnorm"}, step]}
    recipe = check_config(value, Recipe, "prune options")
    refuse_overwrite(out, model, data=data)
    return apply_to_file(model, out, recipe, ANY_TARGET, open_calibration(data, split), progress)


def _unchanged(model: Path, out: Path, recipe: "Recipe") -> CompressionSummary:
    """Write the bytes of `model` to `out`: nothing was asked for, so the digest stays what it was."""
    from qcore.files import write_atomic
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.target import load_target

    raw = read_model_bytes(model)
    parse_model(raw, str(model))
    write_atomic(out, raw)
    return summary_of(out, raw, raw, (), recipe=recipe, target=load_target(ANY_TARGET))
