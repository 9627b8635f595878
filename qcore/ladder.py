"""The ladder of `recipe: auto`: ways to compress without training, cheapest first, up to the first that passes.

Cheap means cheap for the device first (one weight scale per tensor, then one per channel), then for the one who waits:
other ranges, recovery that runs samples, and last more bits for some layers. More bits are worth a search only where
the model is at fault: on few samples a gate cannot tell, and a search would promote layers until luck passes it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcore.config import check_config
from qcore.methods.quantize import QuantizeStep
from qcore.numerics.affine import container_bits
from qcore.pareto.front import pareto_front
from qcore.recipe import AFTER, BEFORE, Recipe
from qcore.report import BUDGETS, Check, GateDecision, Outcome
from qcore.target import TargetProfile

RANGES: Mapping[str, Any] = {"ranges": "percentile", "percentile": 99.999}
POWER_RANGES: Mapping[str, Any] = {"ranges": "mse"}
"""Powers of two are rounded up, so a range that just goes over one doubles every step: here the error decides."""

Obstacle = Literal["model", "samples", "budget"]
"""What keeps a result from passing: its accuracy, the number of samples, or a limit of size or latency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A recipe that was tried: what the gate says, and how far the result is from float on held-out samples.

    `obstacle` says what keeps it from passing; None where it passes.
    """

    recipe: str
    outcome: Outcome
    reason: str
    error: float
    size_bytes: int
    obstacle: Obstacle | None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Climb:
    """The end of a climb: all attempts in order, the position of the chosen one, and why it stopped there."""

    attempts: tuple[Attempt, ...]
    chosen: int
    why: str

    @property
    def pareto(self) -> tuple[int, ...]:
        """The positions of the attempts that no other one beats in error, size and latency at once."""
        return pareto_front(self.attempts)


def rungs(target: TargetProfile) -> tuple[Recipe, ...]:
    """Return the recipes to try for `target`, in order."""
    plain = {"method": "quantize", **(POWER_RANGES if target.power_of_two_scales else RANGES)}
    ladder: list[tuple[str, list[str], Mapping[str, Any], list[str]]] = []
    if target.weights_per_channel:
        ladder.append(("per-tensor", [], {**plain, "per_channel": False}, []))
    ladder += [
        ("per-channel" if target.weights_per_channel else "per-tensor", [], plain, []),
        ("min-max", [], {"method": "quantize", "ranges": "min-max"}, []),
        ("correct-bias", [], plain, ["correct-bias"]),
        ("equalize", ["equalize", "smooth"], plain, ["correct-bias"]),
        ("round-weights", ["equalize", "smooth"], plain, ["round-weights"]),
    ]
    return tuple(recipe_of(f"auto-{name}", before, step, after) for name, before, step, after in ladder)


def recipe_of(name: str, before: list[str], step: Mapping[str, Any], after: list[str]) -> Recipe:
    """Return the recipe with the steps `before`, the quantize step with options `step`, and the steps `after`."""
    prepared = [{"method": m} for m in ("fold-batchnorm", "gemm-head", *before)]
    mended = [{"method": m} for m in after]
    return check_config({"name": name, "steps": [*prepared, dict(step), *mended]}, Recipe, "ladder")


def with_precisions(recipe: Recipe, precisions: Mapping[str, str], nodes: Collection[str], name: str) -> Recipe:
    """Return `recipe`, called `name`, with the layers named in `precisions` computed in more than 8 bits.

    Args:
        recipe: with a quantize step. Nothing to change gives it back as it is.
        precisions: by node name; added to what the recipe says itself.
        nodes: all layers that the recipe quantizes; where all of them stay float, only its float steps are left.
        name: of the result.
    """
    if not precisions:
        return recipe
    if all(precisions.get(node) == "float" for node in nodes):
        left = [s.model_dump() for s in recipe.steps if not isinstance(s, QuantizeStep | BEFORE | AFTER)]
        return check_config({"name": name, "steps": left or [{"method": "fold-batchnorm"}]}, Recipe, "ladder")
    steps = [
        {**s.model_dump(), "precision": {**s.precision, **precisions}}
        if isinstance(s, QuantizeStep)
        else s.model_dump()
        for s in recipe.steps
    ]
    return check_config({"name": name, "steps": steps}, Recipe, "ladder")


def precision_of(recipe: Recipe, target: TargetProfile) -> str:
    """Return what the layers of a quantizing `recipe` run in: "int8", or such as "w4a8" where bits are others."""
    step = recipe.quantize_step
    weights = target.weight_scheme(0, bits=None if step is None else step.weight_bits).width
    activations = container_bits(target.activations)
    return "int8" if weights >= 7 and activations == 8 else f"w{weights}a{activations}"


def obstacle_of(decision: GateDecision, ceiling: GateDecision) -> Obstacle | None:
    """Return what keeps the candidate of `decision` from passing, None if it passes.

    It is the model if a check fails by more than the samples leave open, or if the samples leave so little open (less
    than half of what the policy allows) that more of them would not change much: then more bits may help. Else the
    samples are too few, and a search would only find out who is lucky on them. What the samples leave open is taken as
    the distance from the observed value to its bound, on both sides. What the float model itself fails is not the
    candidate's fault.

    Args:
        decision: on the candidate.
        ceiling: on the float model against itself, by the same policy and samples.
    """
    best = {c.name: c for c in ceiling.checks}
    stops = [c for c in decision.checks if c.outcome != "pass"]
    if any(c.name in BUDGETS for c in stops):
        return "budget"
    if any(_speaks(c, best[c.name]) for c in stops):
        return "model"
    return "samples" if stops else None


def _speaks(check: Check, best: Check) -> bool:
    left_open, allowed = check.observed - check.bound, best.observed - check.limit
    if best.outcome == "fail":
        return False
    return check.observed + left_open < check.limit or left_open <= allowed / 2


def out_of_reach(ceiling: GateDecision) -> str | None:
    """Return why not even the float model would pass on these samples, or None if it would.

    Args:
        ceiling: on the float model against itself; its size and latency do not count.
    """
    stops = [c for c in ceiling.checks if c.outcome != "pass" and c.name not in BUDGETS]
    return in_words(stops[0]) if stops else None


def in_words(check: Check) -> str:
    """Return a check in words, with the samples that it lacks."""
    more = f"; about {check.needs_samples} more would decide" if check.needs_samples else ""
    return f"{check.name}: {check.reason}{more}"


def climb(
    recipes: tuple[Recipe, ...],
    attempt: Callable[[Recipe], Attempt],
    more_bits: Callable[[Recipe], tuple[Recipe | None, str]],
    unreachable: str | None = None,
) -> Climb:
    """Return the climb over `recipes` up to the first that passes.

    If none does, the one nearest to the float model on held-out samples is chosen: the outcome of a gate that lacks
    samples says little about which is better. Where the obstacle is the model, `more_bits` is asked for one more.

    Args:
        recipes: at least one, cheapest first.
        attempt: compresses and judges.
        more_bits: gives the nearest recipe with some layers in more bits, or None, and why in words.
        unreachable: why not even the float model would pass, if it would not.
    """
    attempts: list[Attempt] = []
    for recipe in recipes:
        attempts.append(attempt(recipe))
        if attempts[-1].outcome == "pass":
            return _passed(attempts)
    nearest, searched = _nearest(attempts), None
    if attempts[nearest].obstacle == "model":
        last, searched = more_bits(recipes[nearest])
        if last is not None:
            attempts.append(attempt(last))
            if attempts[-1].outcome == "pass":
                return _passed(attempts)
    return _missed(attempts, searched, unreachable)


def _nearest(attempts: Sequence[Attempt]) -> int:
    return min(range(len(attempts)), key=lambda k: attempts[k].error)


def _passed(attempts: list[Attempt]) -> Climb:
    last = attempts[-1]
    why = f"{last.recipe} is the first that passes the gate's policy ({last.reason})"
    return Climb(attempts=tuple(attempts), chosen=len(attempts) - 1, why=why)


def _missed(attempts: list[Attempt], searched: str | None, unreachable: str | None) -> Climb:
    chosen = _nearest(attempts)
    best = attempts[chosen]
    said = [f"no recipe passes; {best.recipe} is nearest to float (held-out error {best.error:.3g}; {best.reason})"]
    said += [f"mixed precision: {searched}"] if searched else []
    train = "hand over to training: qcore finetune --method qat"
    if unreachable:
        said.append(f"on these samples not even the float model would pass ({unreachable}): evaluate on more")
    elif best.obstacle == "samples":
        said.append(f"the samples do not decide: evaluate on more, or {train}")
    elif best.obstacle == "budget":
        said.append("bits do not help against a limit of size or latency: raise it, or prune (qcore prune)")
    else:
        said.append(f"what needs no training is exhausted: {train}")
    return Climb(attempts=tuple(attempts), chosen=chosen, why="; ".join(said))
