"""`recipe: auto` on files: climb the ladder, judge every rung with the gate's policy, write the first that passes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json
from qcore.steps.compression import CompressionSummary, summary_of
from qcore.steps.costs import costing_for
from qcore.steps.guard import Progress, refuse_overwrite, silent
from qcore.steps.precision import Budget, Found, search_on
from qcore.steps.tries import (
    Bench,
    Tried,
    forget_models,
    journal_path,
    model_of,
    open_bench,
    try_float,
    try_recipe,
)

if TYPE_CHECKING:
    from qcore.ladder import Attempt, Climb
    from qcore.policy import GatePolicy
    from qcore.recipe import Recipe
    from qcore.report import EvaluationReport, GateDecision


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoSummary:
    """The written model, and the climb that led to it; `judged_on` is the split that the gate's policy was asked of.

    `mixed` is the search for mixed precision, where the climb came so far.
    """

    written: CompressionSummary
    climb: "Climb"
    judged_on: str
    mixed: Found | None

    def to_json(self) -> Json:
        """Return the JSON form of `--json`: that of the summary, and the ladder; `pareto` as positions in it."""
        return {
            **self.written.to_json(),
            "ladder": [asdict(a) for a in self.climb.attempts],
            "chosen": self.climb.chosen,
            "pareto": list(self.climb.pareto),
            "stopped": self.climb.why,
            "judged_on": self.judged_on,
            "mixed_precision": None if self.mixed is None else self.mixed.search.to_json(),
        }


def compress_auto(
    *,
    model: Path,
    data: Path,
    out: Path,
    target: str = "host",
    split: str = "calibration",
    policy: Path | None = None,
    progress: Progress = silent,
) -> AutoSummary:
    """Return the summary of `out`: the first rung of the ladder that passes `policy`, or the one nearest to float.

    The policy is asked on the card's split `validation`, or `evaluation` where there is none, but for champion,
    download, parity and age, which belong to a release. A pass there is a choice, not the evidence for a release: that
    is `qcore gate` on what was written. After a kill the same call goes on, and repeats no finished trial
    (`journal_path(out)`).

    Raises:
        ConfigError: the card has neither split, or a file is wrong.
    """
    from qcore.config import load_config
    from qcore.files import write_atomic
    from qcore.graph.io import read_model_bytes
    from qcore.ladder import climb, out_of_reach, rungs
    from qcore.policy import GatePolicy, for_choosing

    for path in (out, journal_path(out)):
        refuse_overwrite(path, model, target, *([policy] if policy else []), data=data)
    asked = for_choosing(load_config(policy, GatePolicy, "gate policy")) if policy else None
    raw = read_model_bytes(model)
    bench = open_bench(
        raw,
        str(model),
        data=data,
        split=split,
        judged_on=None,
        target=target,
        out=out,
        costing=None if asked is None else costing_for(asked.budgets),
        progress=progress,
    )
    run = _Run(bench=bench, policy=asked, ceiling=_decided(try_float(bench), asked), tried=[], found=[])
    result = climb(
        rungs(bench.target),
        lambda recipe: _attempt(run, recipe),
        lambda recipe: _more_bits(run, recipe),
        out_of_reach(run.ceiling),
    )
    chosen = run.tried[result.chosen]
    written = model_of(bench, chosen)
    write_atomic(out, written)
    forget_models(bench)
    summary = summary_of(out, raw, written, chosen.steps, recipe=chosen.recipe, target=bench.target)
    found = run.found[0] if run.found else None
    return AutoSummary(written=summary, climb=result, judged_on=bench.judged.split, mixed=found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One climb: its bench, the policy (None: the default one), what float itself would get, and what was tried."""

    bench: Bench
    policy: "GatePolicy | None"
    ceiling: "GateDecision"
    tried: list[Tried]
    found: list[Found]


def _decided(report: "EvaluationReport", policy: "GatePolicy | None") -> "GateDecision":
    from qcore.gate import decide, default_policy

    return decide(report, policy or default_policy(report))


def _attempt(run: _Run, recipe: "Recipe") -> "Attempt":
    from qcore.ladder import Attempt, in_words, obstacle_of

    tried = try_recipe(run.bench, recipe)
    run.tried.append(tried)
    decision = _decided(tried.report, run.policy)
    telling = next((c for c in decision.checks if c.outcome == decision.outcome), decision.checks[0])
    return Attempt(
        recipe=recipe.name,
        outcome=decision.outcome,
        reason=in_words(telling),
        error=tried.error,
        size_bytes=tried.size_bytes,
        obstacle=obstacle_of(decision, run.ceiling),
        latency_ms=tried.report.model.latency_ms.p50 if run.bench.timed else None,
    )


def _more_bits(run: _Run, recipe: "Recipe") -> "tuple[Recipe | None, str]":
    """Return `recipe` with the fewest layers in more bits found that the policy does not blame, or None, and why.

    A trial holds if the policy passes, or if only the number of samples keeps it from passing.
    """
    from qcore.ladder import obstacle_of

    if not run.bench.target.mixed:
        return None, f"{run.bench.target.name} allows no other precision"

    def holds(tried: Tried) -> bool:
        decision = _decided(tried.report, run.policy)
        if decision.outcome == "inconclusive":
            return obstacle_of(decision, run.ceiling) == "samples"
        return decision.outcome == "pass"

    budget = Budget(
        words="the gate's policy",
        measure="distance from the float model on held-out samples",
        limit=None,
        error=lambda tried: tried.error,
        holds=holds,
    )
    found = search_on(run.bench, recipe, budget)
    run.found.append(found)
    if found.tried.recipe.quantize_step is None:
        return None, "nothing but float everywhere holds the policy"
    return (found.tried.recipe if found.search.met else None), found.search.why
