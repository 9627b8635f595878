"""`recipe: auto` on files: climb the ladder, judge every rung with the gate's policy, write the first that passes."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json
from qcore.errors import ConfigError
from qcore.steps.compression import CompressionSummary, gathered, refuse_unusable, summary_of
from qcore.steps.guard import Progress, refuse_overwrite, silent
from qcore.steps.judgement import report_on
from qcore.steps.search import SENSITIVITY_SAMPLES, journal_path, precision_trial, prepared_from, rank_layers

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.compression import Compressed, Recipe
    from qcore.data.dataset import Dataset
    from qcore.gate import GatePolicy
    from qcore.ladder import Attempt, Climb
    from qcore.recovery import Evidence
    from qcore.target import TargetProfile

DEFAULT_DROP = 0.01  # of the policy that is used when none is given
JUDGED_ON = ("validation", "evaluation")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoSummary:
    """The written model, and the climb that led to it; `judged_on` is the split that the gate's policy was asked of."""

    written: CompressionSummary
    climb: "Climb"
    judged_on: str

    def to_json(self) -> Json:
        """Return the JSON form of `--json`: that of the summary, and the ladder."""
        attempts = [asdict(a) for a in self.climb.attempts]
        return {**self.written.to_json(), "ladder": attempts, "stopped": self.climb.why, "judged_on": self.judged_on}


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

    The policy is asked on the card's split `validation`, or `evaluation` where there is none. A pass there is a choice,
    not the evidence for a release: that is `qcore gate` on what was written.

    Raises:
        ConfigError: the card has neither split, or a file is wrong.
    """
    from qcore.config import load_config
    from qcore.data.dataset import open_dataset
    from qcore.files import write_atomic
    from qcore.gate import GatePolicy
    from qcore.graph.io import parse_model, read_model_bytes
    from qcore.ladder import climb, rungs
    from qcore.target import load_target

    refuse_overwrite(out, model, target, *([policy] if policy else []), data=data)
    refuse_overwrite(journal_path(out), model, data=data)
    asked = load_config(policy, GatePolicy, "gate policy") if policy else None
    raw, dataset = read_model_bytes(model), open_dataset(data, split)
    parsed = parse_model(raw, str(model))
    judge = Judge(raw=raw, judged=_judging(data, dataset), policy=asked, progress=progress)
    run = _Run(model=parsed, target=load_target(target), evidence=gathered(parsed, dataset, True, progress))
    result = climb(
        rungs(run.target),
        lambda recipe: _attempt(run, recipe, judge),
        lambda recipe: _more_bits(run, recipe, judge, dataset, journal_path(out)),
    )
    recipe, made, written = run.trials[result.chosen]
    write_atomic(out, written)
    summary = summary_of(out, raw, written, made.steps, recipe=recipe, target=run.target.name)
    return AutoSummary(written=summary, climb=result, judged_on=judge.judged.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What every rung is judged by: the baseline's bytes, the samples, the policy (None: the default one)."""

    raw: bytes
    judged: "Dataset"
    policy: "GatePolicy | None"
    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One climb: what is compressed, for what, on what evidence, and what was made so far."""

    model: "ir.Model"
    target: "TargetProfile"
    evidence: "Evidence"
    trials: "list[tuple[Recipe, Compressed, bytes]]" = field(default_factory=list)


def _judging(data: Path, dataset: "Dataset") -> "Dataset":
    from qcore.data.dataset import open_dataset

    for split in JUDGED_ON:
        if split in dataset.card.splits:
            return open_dataset(data, split)
    raise ConfigError(
        f"data card {dataset.card.name} has splits {', '.join(dataset.card.splits)}; recipe auto judges on validation "
        "or evaluation; add one"
    )


def _attempt(run: _Run, recipe: "Recipe", judge: Judge) -> "Attempt":
    from qcore.compression import compress
    from qcore.gate import decide, default_policy
    from qcore.graph.io import serialize_model
    from qcore.ladder import Attempt
    from qcore.recovery import output_distance

    judge.progress(f"trying {recipe.name}", 0, 1)
    made = compress(run.model, recipe, run.target, run.evidence)
    written = serialize_model(made.model)
    refuse_unusable(written, f"the result of recipe {recipe.name} for {run.target.name}")
    run.trials.append((recipe, made, written))
    report = report_on((written, recipe.name), (judge.raw, "the float model"), judge.judged, judge.progress)
    decision = decide(report, judge.policy or default_policy(report))
    telling = next((c for c in decision.checks if c.outcome == decision.outcome), decision.checks[0])
    error = made.error if made.error is not None else output_distance(made.model, run.model, run.evidence)
    judge.progress(f"trying {recipe.name}", 1, 1)
    return Attempt(
        recipe=recipe.name,
        outcome=decision.outcome,
        reason=f"{telling.name}: {telling.reason}",
        error=error,
        size_bytes=len(written),
    )


def _more_bits(run: _Run, recipe: "Recipe", judge: Judge, dataset: "Dataset", journal: Path) -> "Recipe | None":
    """Return `recipe` with the fewest layers in more bits whose drop is within the policy's, or None if none is."""
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import some_samples
    from qcore.ladder import with_precisions
    from qcore.mixed_precision import search_precision

    made = next(made for tried, made, _ in run.trials if tried is recipe)
    limit = judge.policy.top1.max_drop if judge.policy is not None and judge.policy.top1 is not None else DEFAULT_DROP
    if not run.target.mixed or judge.judged.labels is None or limit is None:
        return None
    origin = [sha256_bytes(judge.raw), dataset.sha256]
    prepared = prepared_from(made.reference, recipe, run.target, run.evidence, origin)
    ranked = rank_layers(prepared, some_samples(dataset, SENSITIVITY_SAMPLES), journal, progress=judge.progress)
    trial = precision_trial(prepared, judge.judged, journal, progress=judge.progress)
    found = search_precision([s.node for s in ranked], trial, run.target.mixed, limit)
    return with_precisions(recipe, found.chosen.precision) if found.met else None
