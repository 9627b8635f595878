"""Mixed precision on files: the layers that need more than 8 bits for a budget, and the Pareto curve of all trials."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore import __version__
from qcore.canonical import Digest, Json, sha256_bytes
from qcore.errors import ConfigError, ModelError
from qcore.steps.compression import CompressionSummary, refuse_unusable, summary_of
from qcore.steps.guard import OnTrial, Progress, refuse_overwrite, silent, untold
from qcore.steps.search import SENSITIVITY_SAMPLES, prepare, rank_layers
from qcore.steps.tries import Bench, Tried, forget_models, journal_path, model_of, open_bench, try_recipe

if TYPE_CHECKING:
    from qcore.mixed_precision import Assignment, PrecisionSearch, Trial
    from qcore.recipe import Recipe
    from qcore.sensitivity import Sensitivity

PRECISION_SCHEMA = "qcore.precision/1"
MAX_DROP = 0.01
RECOVERED_DEMOTIONS = 4
"""Fewer single promotions are tried to be taken back where every trial recovers accuracy: each then takes minutes."""
_ROUNDING = 1e-12  # of a share that was computed in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found: its trials, the layers by sensitivity, and the recipe that was chosen, as it was tried.

    `layers` are empty where the recipe holds as it is.
    """

    search: "PrecisionSearch"
    layers: "tuple[Sensitivity, ...]"
    tried: Tried


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSummary:
    """The written model (None if the budget does not hold), the search that led to it, and where both are told.

    `measure` says what the error of a trial is; `judged_on` and `samples` on what it was measured; `base` what layers
    run in that are not promoted ("int8", or such as "w4a8": 4-bit weights, 8-bit activations).
    """

    written: CompressionSummary | None
    found: Found
    measure: str
    base: str
    target: str
    judged_on: str
    samples: int
    model_sha256: Digest
    data_sha256: Digest
    report: Path
    page: Path

    def words(self, position: int) -> str:
        """Return in words what the layers of a trial run in."""
        from qcore.mixed_precision import in_words

        return in_words(self.found.search.attempts[position].precision, len(self.found.layers))

    def to_json(self) -> Json:
        """Return the JSON form (`qcore.precision/1`), which is also what the report file holds."""
        precision = self.found.search.chosen.precision
        return {
            "schema": PRECISION_SCHEMA,
            **self.found.search.to_json(),
            "measure": self.measure,
            "base": self.base,
            "target": self.target,
            "model": {"sha256": self.model_sha256},
            "data": {"sha256": self.data_sha256, "split": self.judged_on, "n": self.samples},
            "layers": [{**asdict(s), "precision": precision.get(s.node, self.base)} for s in self.found.layers],
            "recipe": self.found.tried.recipe.model_dump(mode="json"),
            "written": None if self.written is None else self.written.to_json(),
            "qcore_version": __version__,
        }


def pareto_paths(out: Path) -> tuple[Path, Path]:
    """Return where the trials of a mixed precision search that writes `out` are told: as JSON and as a page."""
    return out.with_name(f"{out.name}.pareto.json"), out.with_name(f"{out.name}.pareto.html")


def mixed_precision(
    *,
    model: Path,
    data: Path,
    out: Path,
    max_drop: float | None = None,
    max_error: float | None = None,
    target: str = "host",
    recipe: str = "int8",
    split: str = "calibration",
    judged_on: str | None = None,
    samples: int = SENSITIVITY_SAMPLES,
    progress: Progress = silent,
    on_trial: OnTrial = untold,
) -> MixedSummary:
    """Return the search for the cheapest precisions that hold a budget; write the model to `out`.

    A trial is the whole recipe, recovery included, so what is written is what was judged. No model is written if the
    budget cannot be met; the JSON report and the page (`pareto_paths`) are. Latency is measured where the target is
    this machine, and does not change the choice.

    Args:
        model: the float model.
        data: the data card.
        out: the ONNX file of the chosen model; finished trials are kept in `journal_path(out)`.
        max_drop: the most top-1 that may be lost on the samples judged on, as a share of 1; needs labels.
        max_error: the largest normalised mean square error of the outputs, as a share of their power; instead of
            `max_drop`. Neither: with labels one point of top-1.
        target: profile name or file; its `mixed` lists what may be chosen.
        recipe: what every trial applies, with other precisions in its quantize step.
        split: for calibration, recovery and sensitivities.
        judged_on: the split that trials are judged on; None: `validation`, or `evaluation` where there is none.
        samples: how many of `split` sensitivities are measured on.
        progress: told how far it is.
        on_trial: called with every trial.

    Raises:
        ConfigError: the budget does not fit the data, or a file is wrong.
    """
    from qcore.files import write_atomic, write_json
    from qcore.graph.io import read_model_bytes
    from qcore.ladder import precision_of
    from qcore.recipe import load_recipe

    report, page = pareto_paths(out)
    for path in (out, report, page, journal_path(out)):
        refuse_overwrite(path, model, recipe, target, data=data)
    loaded, raw = load_recipe(recipe), read_model_bytes(model)
    bench = open_bench(
        raw,
        str(model),
        data=data,
        split=split,
        judged_on=judged_on,
        target=target,
        out=out,
        progress=progress,
        on_trial=on_trial,
    )
    budget = _budget(bench, max_drop, max_error)
    found = search_on(bench, loaded, budget, samples)
    written = None
    if found.search.met:
        chosen = model_of(bench, found.tried)
        refuse_unusable(chosen, "the chosen model")
        write_atomic(out, chosen)
        written = summary_of(out, raw, chosen, found.tried.steps, recipe=found.tried.recipe, target=bench.target)
    summary = MixedSummary(
        written=written,
        found=found,
        measure=budget.measure,
        base=precision_of(loaded, bench.target),
        target=bench.target.name,
        judged_on=bench.judged.split,
        samples=bench.judged.n,
        model_sha256=sha256_bytes(raw),
        data_sha256=bench.judged.sha256,
        report=report,
        page=page,
    )
    write_json(report, summary.to_json())
    write_atomic(page, precision_page(summary, budget.limit).encode())
    forget_models(bench)
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a trial must hold: in words, what its error is called, the error of a trial, and whether it holds."""

    words: str
    measure: str
    limit: float | None
    error: Callable[[Tried], float]
    holds: Callable[[Tried], bool]


def search_on(bench: Bench, recipe: "Recipe", budget: Budget, samples: int = SENSITIVITY_SAMPLES) -> Found:
    """Return what a search of `recipe` with some layers in more bits finds for `budget`.

    Layers are ranked, on so many `samples` of the bench, only where the recipe does not hold as it is.
    """
    from qcore.data.dataset import some_samples
    from qcore.ladder import with_precisions
    from qcore.mixed_precision import MAX_DEMOTIONS, Trial, search_precision

    origin = [sha256_bytes(bench.raw), bench.dataset.sha256]
    prepared = prepare(bench.model, recipe, bench.target, bench.evidence(), origin, bench.shared)
    count = 0

    def at(assignment: "Assignment") -> Tried:
        return try_recipe(bench, with_precisions(recipe, assignment, prepared.nodes, f"{recipe.name}-mixed"))

    def run(assignment: "Assignment") -> "Trial":
        nonlocal count
        count += 1
        try:
            tried = at(assignment)
        except ModelError:  # NaN or infinity, as where float16 overflows; if nothing else is left, it is raised again
            return Trial(error=math.inf, size_bytes=0, holds=False)
        bench.progress("trying precisions", count, 0)  # how many there will be depends on what they show
        latency = tried.report.model.latency_ms.p50 if bench.timed else None
        return Trial(
            error=budget.error(tried), size_bytes=tried.size_bytes, holds=budget.holds(tried), latency_ms=latency
        )

    layers: tuple[Sensitivity, ...] = ()
    if not run({}).holds:
        chosen = some_samples(bench.dataset, samples)
        layers = rank_layers(prepared, chosen, journal_path(bench.out), progress=bench.progress)
    ranked = [s.node for s in layers] or list(prepared.nodes)
    demotions = RECOVERED_DEMOTIONS if recipe.needs_samples else MAX_DEMOTIONS
    found = search_precision(ranked, run, bench.target.mixed, budget.words, demotions)
    return Found(search=found, layers=layers, tried=at(found.chosen.precision))


def _budget(bench: Bench, max_drop: float | None, max_error: float | None) -> Budget:
    """Return the budget that was asked for, checked against the data."""
    labelled = bench.judged.labels is not None
    if max_drop is not None and max_error is not None:
        raise ConfigError("max_drop and max_error are both given; allowed: one budget; leave one out")
    if max_drop is not None and not labelled:
        raise ConfigError(
            f"max_drop needs labels, and {bench.judged.card.name} has task none; allowed: max_error, the largest "
            "normalised mean square error of the outputs (0.01 is 20 dB)"
        )
    if max_error is not None or not labelled:
        return _output_budget(max_error)
    limit = MAX_DROP if max_drop is None else max_drop
    if not 0 <= limit < 1:
        raise ConfigError(f"max_drop is {limit}; allowed: a share of 1, at least 0 (0.01 is one point of top-1)")

    def drop(tried: Tried) -> float:
        return 0.0 - tried.report.metrics["top1_delta"]  # not -0.0

    return Budget(
        words=f"a drop in top-1 of at most {limit:g}",
        measure="drop in top-1, as a share of 1",
        limit=limit,
        error=drop,
        holds=lambda tried: drop(tried) <= limit + _ROUNDING,
    )


def _output_budget(limit: float | None) -> Budget:
    from qcore.numerics.error import SQNR_LIMIT

    if limit is None:
        raise ConfigError(
            "the data have no labels, so a budget of accuracy is missing; allowed: max_error, the largest normalised "
            "mean square error of the outputs (0.01 is 20 dB)"
        )
    if not 0 < limit < 1:
        raise ConfigError(f"max_error is {limit}; allowed: above 0 and below 1 (0.01 is 20 dB)")

    def error(tried: Tried) -> float:
        decibel = tried.report.metrics["output_sqnr_db"]
        return 0.0 if decibel >= SQNR_LIMIT else float(10 ** (-decibel / 10))

    return Budget(
        words=f"an output error of at most {limit:g}",
        measure="largest normalised mean square error of the outputs",
        limit=limit,
        error=error,
        holds=lambda tried: error(tried) <= limit,
    )


def precision_page(summary: MixedSummary, limit: float | None) -> str:
    """Return the HTML page of `summary`; `limit` is the budget as a number."""
    from qcore.pareto.page import Curve, Dot, pareto_page

    search, layers = summary.found.search, summary.found.layers
    dots = tuple(
        Dot(
            label=summary.words(k),
            error=a.trial.error,
            size_bytes=a.trial.size_bytes,
            latency_ms=a.trial.latency_ms,
            holds=a.trial.holds,
        )
        for k, a in enumerate(search.attempts)
    )
    chosen = search.chosen.precision
    return pareto_page(
        Curve(
            title=f"Mixed precision for {summary.target}",
            why=search.why,
            base=summary.base,
            met=search.met,
            measure=summary.measure,
            limit=limit,
            dots=dots,
            chosen=search.attempts.index(search.chosen),
            rows=tuple((s.node, s.op_type, chosen.get(s.node, summary.base), s.error) for s in layers),
            facts={
                "float model": f"sha256 {summary.model_sha256}",
                "judged on": f"{summary.samples} samples of {summary.judged_on}, sha256 {summary.data_sha256}",
                "recipe": summary.found.tried.recipe.name,
                "made by": f"kfp-qcore {__version__}",
            },
        )
    )
