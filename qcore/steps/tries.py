"""Recipes tried on files: made and judged once, and remembered, so that a killed search goes on where it was.

A finished trial is a line in the journal (`<out>.trials.jsonl`); the models that were made wait in `<out>.trials/`
under their digests until the search has written its result. The journal may be deleted at any time, which starts over.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.canonical import Digest, Json, sha256_bytes, sha256_json
from qcore.errors import ConfigError
from qcore.steps.compression import gathered, refuse_unusable
from qcore.steps.costs import BRIEF, ONE_RUN, Costing
from qcore.steps.guard import Progress, open_calibration
from qcore.steps.judgement import Judge, judge_of, judged, judged_itself

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.compression import AppliedStep, Compressed, Shared
    from qcore.data.dataset import Dataset
    from qcore.recipe import Recipe
    from qcore.recovery import Evidence
    from qcore.report import EvaluationReport
    from qcore.target import TargetProfile

JUDGED_ON = ("validation", "evaluation")
KEPT_BYTES = 1 << 30
"""How much of the models that were tried is kept on disk; one that is missing is made again if it is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What all trials of one search share: the float model, for what, on what evidence, judged by what.

    `timed` says whether latencies mean anything. `evidence` and `judge` are read from data when a trial first needs
    them. `key` covers everything that a trial depends on besides its recipe.
    """

    raw: bytes
    model: "ir.Model"
    target: "TargetProfile"
    dataset: "Dataset"
    judged: "Dataset"
    timed: bool
    evidence: "Callable[[], Evidence]"
    judge: Callable[[], Judge]
    shared: "Shared"
    out: Path
    key: Digest
    progress: Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A recipe that was made and judged: its bytes by digest, what its steps did, and what was measured.

    `error` is the distance from the float model on the samples that recovery held out (`recovery.output_distance`).
    """

    recipe: "Recipe"
    sha256: Digest
    size_bytes: int
    error: float
    steps: "tuple[AppliedStep, ...]"
    report: "EvaluationReport"


def journal_path(out: Path) -> Path:
    """Return where the finished trials of a search that writes `out` are kept."""
    return out.with_name(f"{out.name}.trials.jsonl")


def models_path(out: Path) -> Path:
    """Return the folder of the models that a search has made and may still write to `out`."""
    return out.with_name(f"{out.name}.trials")


def open_bench(
    raw: bytes,
    name: str,
    *,
    data: Path,
    split: str,
    judged_on: str | None,
    target: str,
    out: Path,
    costing: Costing | None = None,
    progress: Progress,
) -> Bench:
    """Return the bench for the float model `raw`, which messages call `name`.

    Args:
        raw: bytes of the model.
        name: of the model.
        data: data card.
        split: to calibrate and recover on.
        judged_on: the split that results are judged on; None: `validation`, or `evaluation` where there is none.
        target: profile name or file.
        out: where the search writes its result.
        costing: what somebody asks for; else latency is measured briefly where the target is this machine.
        progress: told how far it is.
    """
    from functools import cache, partial

    from qcore.compression import Shared
    from qcore.data.dataset import open_dataset
    from qcore.graph.finite import refuse_non_finite_weights
    from qcore.graph.io import parse_model
    from qcore.runtime.ort import runtime_version
    from qcore.target import is_host, load_target
    from qcore.trials import source_sha256

    model, profile, dataset = parse_model(raw, name), load_target(target), open_calibration(data, split)
    refuse_non_finite_weights(model)  # before the float model is judged: its outputs would say less
    judging = open_dataset(data, judged_on or _judging(dataset))
    timed = costing is not None or is_host(profile)
    chosen = costing or (BRIEF if timed else ONE_RUN)
    known = [sha256_bytes(raw), dataset.sha256, judging.sha256, profile.sha256, asdict(chosen)]
    return Bench(
        raw=raw,
        model=model,
        target=profile,
        dataset=dataset,
        judged=judging,
        timed=timed,
        evidence=cache(partial(gathered, model, dataset, True, progress)),
        judge=cache(partial(judge_of, raw, judging, chosen, progress)),
        shared=Shared(told=lambda method, done, total: progress(f"step {method}", done, total)),
        out=out,
        key=sha256_json(["recipes", *known, source_sha256(), runtime_version()]),
        progress=progress,
    )


def try_recipe(bench: Bench, recipe: "Recipe") -> Tried:
    """Return what comes of `recipe`; a trial that the journal knows is not run again.

    Raises:
        QcoreError: the recipe cannot be applied, or its result cannot be used.
    """
    from qcore.compression import AppliedStep
    from qcore.graph.rewrite import Skipped
    from qcore.report_file import report_from_json

    result = _remembered(bench, [s.model_dump(mode="json") for s in recipe.steps], lambda: _run(bench, recipe))
    # The ladder's steps neither train nor resize: what such steps say in addition is empty.
    lists = ("changed", "epochs", "layers", "resized")
    steps = [
        {**s, **{k: tuple(s[k]) for k in lists}, "skipped": tuple(Skipped(**k) for k in s["skipped"])}
        for s in result["steps"]
    ]
    return Tried(
        recipe=recipe,
        sha256=result["sha256"],
        size_bytes=result["size_bytes"],
        error=result["error"],
        steps=tuple(AppliedStep(**s) for s in steps),
        report=report_from_json(result["report"]),
    )


def try_float(bench: Bench) -> "EvaluationReport":
    """Return the report on the float model against itself, remembered like a trial."""
    from qcore.report_file import report_from_json

    result = _remembered(bench, None, lambda: {"report": judged_itself(bench.judge()).to_json()})
    return report_from_json(result["report"])


def model_of(bench: Bench, tried: Tried) -> bytes:
    """Return the bytes of the model that was tried; made again if no file holds them any more.

    Raises:
        ConfigError: they cannot be made again, because the journal comes from a machine that computes otherwise.
    """
    for path in (_model_file(bench, tried.sha256), bench.out):
        if path.is_file() and sha256_bytes(raw := path.read_bytes()) == tried.sha256:
            return raw
    _, raw = _made(bench, tried.recipe)
    if sha256_bytes(raw) != tried.sha256:
        raise ConfigError(
            f"recipe {tried.recipe.name} gives other bytes than journal {journal_path(bench.out)} remembers; delete "
            "the journal and run the same command again"
        )
    return raw


def forget_models(bench: Bench) -> None:
    """Delete the models that were tried: the search has written its result."""
    folder = models_path(bench.out)
    for path in [*folder.glob("*.onnx"), *folder.glob(".*.onnx.*.tmp")]:  # the latter where a kill cut a file short
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remembered(bench: Bench, steps: Json, run: Callable[[], Json]) -> Any:
    from qcore.trials import remembered

    return remembered(journal_path(bench.out), bench.key, lambda trial: run())({"steps": steps})


def _run(bench: Bench, recipe: "Recipe") -> Json:
    from qcore.recovery import output_distance

    bench.progress(f"trying {recipe.name}", 0, 1)
    made, raw = _made(bench, recipe)
    refuse_unusable(raw, f"the result of recipe {recipe.name} for {bench.target.name}")
    digest = _keep(bench, raw)
    error = made.error if made.error is not None else output_distance(made.model, bench.model, bench.evidence())
    report = judged(bench.judge(), raw, recipe.name)
    bench.progress(f"trying {recipe.name}", 1, 1)
    return {
        "recipe": recipe.name,
        "sha256": digest,
        "size_bytes": len(raw),
        "error": error,
        "steps": [asdict(s) for s in made.steps],
        "report": report.to_json(),
    }


def _made(bench: Bench, recipe: "Recipe") -> "tuple[Compressed, bytes]":
    from qcore.compression import compress
    from qcore.graph.io import serialize_model

    made = compress(bench.model, recipe, bench.target, bench.evidence(), bench.shared)
    return made, serialize_model(made.model)


def _keep(bench: Bench, raw: bytes) -> Digest:
    """Write `raw` under its digest, the oldest models making room, and return the digest."""
    from qcore.files import write_atomic

    digest = sha256_bytes(raw)
    write_atomic(_model_file(bench, digest), raw)
    kept = sorted(models_path(bench.out).glob("*.onnx"), key=lambda p: p.stat().st_mtime_ns)
    sizes = [p.stat().st_size for p in kept]
    for k, path in enumerate(kept[:-1]):
        if sum(sizes[k:]) > KEPT_BYTES:
            path.unlink()
    return digest


def _model_file(bench: Bench, digest: Digest) -> Path:
    return models_path(bench.out) / f"{digest}.onnx"


def _judging(dataset: "Dataset") -> str:
    for split in JUDGED_ON:
        if split in dataset.card.splits:
            return split
    raise ConfigError(
        f"data card {dataset.card.name} has splits {', '.join(dataset.card.splits)}; results are judged on validation "
        "or evaluation; add one"
    )
