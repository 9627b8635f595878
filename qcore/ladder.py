"""The ladder of `recipe: auto`: ways to compress without training, cheapest first, up to the first that passes.

Cheap means cheap for the device first (one weight scale per tensor, then one per channel), then for the one who waits:
other ranges, recovery that runs samples, and last more bits for some layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qcore.compression import Recipe
from qcore.config import check_config
from qcore.report import Outcome
from qcore.target import TargetProfile

RANGES: Mapping[str, Any] = {"ranges": "percentile", "percentile": 99.999}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A recipe that was tried: what the gate says, and how far the result is from float on held-out samples."""

    recipe: str
    outcome: Outcome
    reason: str
    error: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Climb:
    """The end of a climb: all attempts in order, the position of the chosen one, and why it stopped there."""

    attempts: tuple[Attempt, ...]
    chosen: int
    why: str


def rungs(target: TargetProfile) -> tuple[Recipe, ...]:
    """Return the recipes to try for `target`, in order."""
    plain = {"method": "quantize", **RANGES}
    ladder: list[tuple[str, list[str], Mapping[str, Any], list[str]]] = []
    if target.weights_per_channel:
        ladder.append(("per-tensor", [], {**plain, "per_channel": False}, []))
    ladder += [
        ("per-channel" if target.weights_per_channel else "per-tensor", [], plain, []),
        ("min-max", [], {"method": "quantize", "ranges": "min-max"}, []),
        ("correct-bias", [], plain, ["correct-bias"]),
        ("equalize", ["equalize"], plain, ["correct-bias"]),
        ("round-weights", ["equalize"], plain, ["round-weights"]),
    ]
    return tuple(recipe_of(f"auto-{name}", before, step, after) for name, before, step, after in ladder)


def recipe_of(name: str, before: list[str], step: Mapping[str, Any], after: list[str]) -> Recipe:
    """Return the recipe with the steps `before`, the quantize step with options `step`, and the steps `after`."""
    prepared = [{"method": m} for m in ("fold-batchnorm", "gemm-head", *before)]
    mended = [{"method": m} for m in after]
    return check_config({"name": name, "steps": [*prepared, dict(step), *mended]}, Recipe, "ladder")


def with_precisions(recipe: Recipe, precisions: Mapping[str, str]) -> Recipe:
    """Return `recipe` with the layers named in `precisions` computed in more than 8 bits."""
    steps = [
        {**s.model_dump(), "precision": dict(precisions)} if s.method == "quantize" else s.model_dump()
        for s in recipe.steps
    ]
    return check_config({"name": "auto-mixed-precision", "steps": steps}, Recipe, "ladder")


def climb(
    recipes: tuple[Recipe, ...], attempt: Callable[[Recipe], Attempt], more_bits: Callable[[Recipe], Recipe | None]
) -> Climb:
    """Return the climb over `recipes` up to the first that passes.

    If none does, the one nearest to the float model on held-out samples is chosen: the outcome of a gate that lacks
    samples says little about which is better. Where all fail, `more_bits` is asked for one more recipe: a gate that
    merely lacks samples would not be helped by bits.

    Args:
        recipes: at least one, cheapest first.
        attempt: compresses and judges.
        more_bits: gives the nearest recipe with some layers in more bits, or None.
    """
    attempts: list[Attempt] = []
    for recipe in recipes:
        attempts.append(attempt(recipe))
        if attempts[-1].outcome == "pass":
            return _passed(attempts)
    if all(a.outcome == "fail" for a in attempts):
        nearest = min(range(len(attempts)), key=lambda k: attempts[k].error)
        if (last := more_bits(recipes[nearest])) is not None:
            attempts.append(attempt(last))
            if attempts[-1].outcome == "pass":
                return _passed(attempts)
    return _missed(attempts)


def _passed(attempts: list[Attempt]) -> Climb:
    last = attempts[-1]
    why = f"{last.recipe} is the first that passes the gate's policy ({last.reason})"
    return Climb(attempts=tuple(attempts), chosen=len(attempts) - 1, why=why)


def _missed(attempts: list[Attempt]) -> Climb:
    chosen = min(range(len(attempts)), key=lambda k: attempts[k].error)
    best = attempts[chosen]
    if any(a.outcome == "inconclusive" for a in attempts):
        advice = "the samples do not decide: evaluate on more, or train (qcore finetune --method qat)"
    else:
        advice = "what needs no training is exhausted: train (qcore finetune --method qat)"
    nearest = f"{best.recipe} is nearest to float (held-out error {best.error:.4g}; {best.reason})"
    return Climb(attempts=tuple(attempts), chosen=chosen, why=f"no recipe passes; {nearest}; {advice}")
