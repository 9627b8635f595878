"""Calibration on files: a model and a split in, a table out; in shards and in several processes if wanted."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json
from qcore.steps.children import Call, run_children
from qcore.steps.guard import Progress, open_calibration, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationOptions, CalibrationTable, Shard, Tensors
    from qcore.data.dataset import Dataset
    from qcore.runtime.ort import LoadedPiece

CALIBRATION_BINS = 2048
CALIBRATION_DECAY = 0.99


def calibrate(
    *,
    model: Path,
    data: Path,
    out: Path,
    split: str = "calibration",
    bins: int = CALIBRATION_BINS,
    decay: float = CALIBRATION_DECAY,
    tensors: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    jobs: int = 1,
    progress: Progress = silent,
) -> "CalibrationTable":
    """Return the calibration table of `model` over `split`, written to `out`.

    Args:
        model: float ONNX model.
        data: data card.
        out: where the table goes.
        split: of the card.
        bins: histogram resolution.
        decay: of the moving average, per sample.
        tensors: names or patterns (`*`, `?`) of the activations to measure; none: all that a target may quantize.
        shard: (I, N): only part I (from 1) of N of the split; `merge_tables` puts the parts together.
        jobs: processes to count with; the table is the same.
        progress: called with the number of samples done.

    Raises:
        QcoreError: model, data or options cannot be used, or a process was killed.
    """
    from qcore.calibration import CalibrationOptions, merge_tables, save_table, shard_of
    from qcore.errors import CalibrationError, ModelError
    from qcore.runtime.heap import one_heap

    if not model.exists():
        raise ModelError(f"model file {model} does not exist; check the path")
    if jobs < 1:
        raise CalibrationError(f"jobs is {jobs}; allowed: 1 or more")
    refuse_overwrite(out, model, data=data)
    one_heap()
    patterns = tuple(sorted(set(tensors)))
    options = CalibrationOptions(bins=bins, decay=decay, tensors=patterns)
    dataset = open_calibration(data, split)
    with tempfile.TemporaryDirectory(prefix="qcore-calibrate-") as name:
        folder = Path(name)
        plan = _planned(model, patterns, _sample_shapes(dataset), folder)
        options = replace(options, batch=plan["batch"])
        whole = shard_of(dataset.n, *shard, batch=options.batch)
        if jobs == 1:
            table = _count(plan, (dataset, options, whole), progress)
        else:
            count = {"plan": plan, "data": str(data), "split": split, "options": options.to_json()}
            table = merge_tables(_count_in_jobs(count, whole, min(jobs, _batches(whole, options)), progress, folder))
    save_table(table, out)
    return table


def merge_tables(*, tables: Sequence[Path], out: Path) -> "CalibrationTable":
    """Return the table of all shards `tables` together, written to `out`; their order does not matter.

    Raises:
        CalibrationError: no table, a damaged one, tables of different runs, or a sample that is in two of them.
    """
    from qcore.calibration import load_table, save_table
    from qcore.calibration import merge_tables as merged

    refuse_overwrite(out, *tables)
    table = merged(load_table(path) for path in tables)
    save_table(table, out)
    return table


def count_table(raw: bytes, model: "ir.Model", dataset: "Dataset", bins: int, progress: Progress) -> "CalibrationTable":
    """Return the table of `model` (the bytes `raw`) over all samples of `dataset`."""
    from qcore.calibration import CalibrationOptions, shard_of

    with tempfile.TemporaryDirectory(prefix="qcore-calibrate-") as name:
        plan = _cut(raw, _plan(raw, model, ()), _sample_shapes(dataset), Path(name))
        options = CalibrationOptions(bins=bins, batch=plan["batch"])
        return _count(plan, (dataset, options, shard_of(dataset.n, 1, 1, batch=options.batch)), progress)


def plan_file(*, model: str, patterns: Sequence[str]) -> Json:
    """Return what to measure of a model file.

    Args:
        model: path of the file.
        patterns: as `tensors` of `calibrate`.

    Returns:
        `names` of the tensors, the fixed `batch` of the model (1 if it has none), the file's `sha256`, and in words
        which initializer is not finite (`suspect`, null if none).

    Raises:
        ModelError: the file is not a model, or a weight is NaN or infinite.
    """
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(Path(model))
    return _plan(raw, parse_model(raw, model), patterns)


def cut_file(*, model: str, plan: Json, shapes: Mapping[str, Sequence[int]], folder: str) -> Json:
    """Return `plan` with the `pieces` that the model runs in (file, what it reads, what it gives), written to `folder`.

    Args:
        model: path of the file.
        plan: of `plan_file`.
        shapes: of one sample, by input.
        folder: for the pieces.

    Raises:
        ModelError: the file is not the one that was planned.
    """
    from qcore.canonical import sha256_bytes
    from qcore.errors import ModelError

    raw = Path(model).read_bytes()
    if sha256_bytes(raw) != plan["sha256"]:
        raise ModelError(f"model file {model} changed while it was read; run the same command again")
    return _cut(raw, plan, shapes, Path(folder))


def count_part(*, plan: Json, data: str, split: str, options: Json, shard: Json, out: str, progress: Progress) -> None:
    """Count one shard and write its table: what a process of `calibrate(jobs=...)` does."""
    from qcore.calibration import CalibrationOptions, Shard, save_table
    from qcore.data.dataset import open_dataset
    from qcore.runtime.heap import one_heap

    one_heap()
    chosen = CalibrationOptions(**{**options, "tensors": tuple(options["tensors"])})
    save_table(_count(plan, (open_dataset(Path(data), split), chosen, Shard(**shard)), progress), Path(out))


def _planned(model: Path, patterns: Sequence[str], shapes: Mapping[str, Sequence[int]], folder: Path) -> Json:
    """Return the plan, made by processes of their own: analysis needs memory that counting has no other use for."""
    first = {"model": str(model), "patterns": list(patterns)}
    second = {"model": str(model), "shapes": dict(shapes), "folder": str(folder)}
    if "onnx_ir" in sys.modules:  # the memory is spent already, for instance by a recipe's other steps
        return cut_file(**second, plan=plan_file(**first))  # type: ignore[arg-type]
    plan = run_children([Call(what="plan", arguments=first, name="that reads the model")])[0]
    return run_children([Call(what="cut", arguments={**second, "plan": plan}, name="that cuts the model")])[0]


def _plan(raw: bytes, model: "ir.Model", patterns: Sequence[str]) -> Json:
    from qcore.canonical import sha256_bytes
    from qcore.graph.finite import non_finite_initializer, refuse_non_finite_weights

    refuse_non_finite_weights(model)
    own = {"suspect": non_finite_initializer(model), "sha256": sha256_bytes(raw)}
    return {**own, "names": _names_of(model, patterns), "batch": _batch_of(model)}


def _cut(raw: bytes, plan: Json, shapes: Mapping[str, Sequence[int]], folder: Path) -> Json:
    from qcore.runtime.pieces import cut

    pieces = []
    for k, piece in enumerate(cut(raw, plan["names"], shapes)):
        path = folder / f"piece{k}.onnx"
        assert isinstance(piece.model, bytes)  # noqa: S101 - what was just cut is no file yet
        path.write_bytes(piece.model)
        pieces.append({"file": str(path), "reads": piece.reads, "gives": piece.gives})
    return {**plan, "pieces": pieces}


def _sample_shapes(dataset: "Dataset") -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample by input, from the first."""
    from qcore.data.dataset import batches

    one = replace(dataset, indices=dataset.indices[:1], labels=None if dataset.labels is None else dataset.labels[:1])
    return {name: x.shape[1:] for name, x in next(batches(one, 1)).x.items()}


def _count_in_jobs(
    count: dict[str, Json], whole: "Shard", jobs: int, progress: Progress, folder: Path
) -> "list[CalibrationTable]":
    """Return the tables of `jobs` processes that share the samples of `whole`."""
    from qcore.calibration import load_table

    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    calls, outs = [], []
    for k, part in enumerate(_parts(whole, jobs, count["options"]["batch"], threads)):
        outs.append(folder / f"{k}.json")
        arguments = {**count, "shard": asdict(part), "out": str(outs[-1])}
        calls.append(
            Call(what="count", arguments=arguments, name=f"that calibrates samples {part.start} to {part.stop - 1}")
        )
    run_children(calls, progress)
    return [load_table(path) for path in outs]


def _batches(shard: "Shard", options: "CalibrationOptions") -> int:
    return -(-(shard.stop - shard.start) // options.batch)


def _parts(whole: "Shard", count: int, batch: int, threads: int) -> "list[Shard]":
    """Return `whole` in `count` parts that are worked on at the same time, each with `threads` threads."""
    from qcore.calibration import shard_of

    cut = [shard_of(whole.stop - whole.start, k + 1, count, batch=batch) for k in range(count)]
    return [
        replace(p, size=whole.size, start=whole.start + p.start, stop=whole.start + p.stop, threads=threads)
        for p in cut
    ]


Counted = tuple["Dataset", "CalibrationOptions", "Shard"]


def _count(plan: Json, what: Counted, progress: Progress) -> "CalibrationTable":
    """Return the table of a planned model over the samples of a shard.

    Two threads share the samples and the loaded model: while one counts, which takes one core, the other's model runs.
    """
    from qcore.calibration import merge_tables
    from qcore.runtime import ort
    from qcore.runtime.piece import Piece

    dataset, options, shard = what
    threads = shard.threads or len(os.sched_getaffinity(0))
    lanes = min(2, threads, _batches(shard, options))
    pieces = [Piece(model=Path(p["file"]), reads=tuple(p["reads"]), gives=tuple(p["gives"])) for p in plan["pieces"]]
    loaded = ort.load_pieces(pieces, threads=max(1, threads // lanes))
    run = _Run(plan=plan, pieces=loaded, tell=_summed(progress, shard.stop - shard.start), stop=threading.Event())
    with ThreadPoolExecutor(lanes) as pool:
        parts = _parts(shard, lanes, options.batch, 0)
        counted = [pool.submit(_count_lane, run, (dataset, options, part)) for part in parts]
        try:
            return merge_tables([lane.result() for lane in counted])
        finally:
            run.stop.set()  # an error or Ctrl-C ends the other thread at its next sample


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What the threads of a count share: the model in the runtime, whom to tell of samples done, when to stop."""

    plan: Json
    pieces: "tuple[LoadedPiece, ...]"
    tell: Callable[[int], None]
    stop: threading.Event


def _summed(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a function that takes how many more samples are done, from any thread."""
    lock, done = threading.Lock(), 0

    def tell(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            progress("calibrating", done, total)

    return tell


def _count_lane(run: _Run, what: Counted) -> "CalibrationTable":
    from qcore.calibration import calibrate as count
    from qcore.errors import CalibrationError, NotFiniteError

    dataset, options, shard = what
    try:
        return count(
            _activations(run, what),
            model_sha256=run.plan["sha256"],
            data_sha256=dataset.sha256,
            options=options,
            shard=shard,
        )
    except NotFiniteError as e:
        if run.plan["suspect"] is None:
            raise
        raise CalibrationError(f"{e}; but {run.plan['suspect']}, which is the likelier cause: look there first") from e


def _activations(run: _Run, what: Counted) -> "Iterator[tuple[int, Tensors]]":
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    dataset, options, shard = what
    part = replace(
        dataset,
        indices=dataset.indices[shard.start : shard.stop],
        labels=None if dataset.labels is None else dataset.labels[shard.start : shard.stop],
    )
    done = 0
    for n, tensors in ort.piece_activations(run.pieces, run.plan["names"], batches(part, options.batch)):
        if n:
            if run.stop.is_set():
                return
            if done:
                run.tell(done)
            done = n
        yield n, tensors
        del tensors
    run.tell(done)


def _names_of(model: "ir.Model", patterns: Sequence[str]) -> list[str]:
    from qcore.errors import CalibrationError
    from qcore.graph.fold import fold_batchnorm
    from qcore.methods.quantize import tensors_to_calibrate

    names = tensors_to_calibrate(fold_batchnorm(model).model)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise CalibrationError(
                f"tensors names {pattern!r}, which is no activation that a target quantizes; known: "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            )
    return [n for n in names if not patterns or any(_matches(n, p) for p in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _batch_of(model: "ir.Model") -> int:
    """Return the batch size that the model insists on, or 1."""
    fed = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    shape = fed[0].shape if fed else None
    first = shape[0] if shape is not None and len(shape) else None
    return first if isinstance(first, int) and first > 0 else 1
