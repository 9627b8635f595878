"""Calibration on files: a model and a split in, a table out; in shards and in several processes if wanted."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.canonical import Json
from qcore.steps.children import Call, run_children
from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationOptions, CalibrationTable, Shard, Tensors
    from qcore.data.dataset import Dataset

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
    from qcore.data.dataset import open_dataset
    from qcore.errors import CalibrationError

    if jobs < 1:
        raise CalibrationError(f"jobs is {jobs}; allowed: 1 or more")
    refuse_overwrite(out, model, data=data)
    patterns = tuple(sorted(set(tensors)))
    options = CalibrationOptions(bins=bins, decay=decay, tensors=patterns)
    dataset = open_dataset(data, split)
    plan = _planned(model, patterns)
    options = replace(options, batch=plan["batch"])
    whole = shard_of(dataset.n, *shard, batch=options.batch)
    if jobs == 1:
        table = _count_file(model, plan, (dataset, options, whole), progress)
    else:
        count = {"model": str(model), "plan": plan, "data": str(data), "split": split, "options": options.to_json()}
        table = merge_tables(_count_in_jobs(count, whole, min(jobs, _batches(whole, options)), progress))
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
    from qcore.canonical import sha256_bytes

    plan = {"names": _names_of(model, ()), "batch": _batch_of(model), "sha256": sha256_bytes(raw)}
    options = CalibrationOptions(bins=bins, batch=plan["batch"])
    return _count(raw, plan, (dataset, options, shard_of(dataset.n, 1, 1, batch=options.batch)), progress)


def plan_file(model: str, patterns: Sequence[str]) -> Json:
    """Return what to measure of the model file: `names`, its fixed `batch` (1 if it has none), and its `sha256`."""
    from qcore.canonical import sha256_bytes
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(Path(model))
    parsed = parse_model(raw, model)
    return {"names": _names_of(parsed, patterns), "batch": _batch_of(parsed), "sha256": sha256_bytes(raw)}


def count_file(
    *, model: str, plan: Json, data: str, split: str, options: Json, shard: Json, out: str, progress: Progress
) -> None:
    """Count one shard of a file and write its table: what a process of `calibrate(jobs=...)` does."""
    from qcore.calibration import CalibrationOptions, Shard, save_table
    from qcore.data.dataset import open_dataset

    chosen = CalibrationOptions(**{**options, "tensors": tuple(options["tensors"])})
    what = (open_dataset(Path(data), split), chosen, Shard(**shard))
    save_table(_count_file(Path(model), plan, what, progress), Path(out))


def _planned(model: Path, patterns: Sequence[str]) -> Json:
    """Return `plan_file` of a process of its own: onnx_ir brings 35 MB that calibration has no other use for."""
    if "onnx_ir" in sys.modules:
        return plan_file(str(model), patterns)
    arguments = {"model": str(model), "patterns": list(patterns)}
    return run_children([Call(what="plan", arguments=arguments, name="reading the model")])[0]


def _count_in_jobs(count: Json, whole: "Shard", jobs: int, progress: Progress) -> "list[CalibrationTable]":
    """Return the tables of `jobs` processes that share the samples of `whole`."""
    from qcore.calibration import load_table, shard_of

    batch = count["options"]["batch"]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with tempfile.TemporaryDirectory(prefix="qcore-calibrate-") as folder:
        calls, outs = [], []
        for k in range(jobs):
            part = shard_of(whole.stop - whole.start, k + 1, jobs, batch=batch)
            start, stop = whole.start + part.start, whole.start + part.stop
            outs.append(Path(folder) / f"{k}.json")
            shard = {"size": whole.size, "start": start, "stop": stop, "threads": threads}
            arguments = {**count, "shard": shard, "out": str(outs[-1])}
            calls.append(Call(what="count", arguments=arguments, name=f"calibrating samples {start} to {stop - 1}"))
        run_children(calls, progress)
        return [load_table(path) for path in outs]


def _batches(shard: "Shard", options: "CalibrationOptions") -> int:
    return -(-(shard.stop - shard.start) // options.batch)


Counted = tuple["Dataset", "CalibrationOptions", "Shard"]


def _count_file(model: Path, plan: Json, what: Counted, progress: Progress) -> "CalibrationTable":
    from qcore.canonical import sha256_bytes
    from qcore.errors import ModelError

    raw = [model.read_bytes()]  # handed over below: the runtime's copy is enough
    if sha256_bytes(raw[0]) != plan["sha256"]:
        raise ModelError(f"model file {model} changed while it was read; run the same command again")
    return _count(raw.pop(), plan, what, progress)


def _count(raw: bytes, plan: Json, what: Counted, progress: Progress) -> "CalibrationTable":
    """Return the table of the model with the bytes `raw` over the samples of a shard."""
    from qcore.calibration import calibrate as count

    dataset, options, shard = what
    return count(
        _activations(raw, plan["names"], what, progress),
        model_sha256=plan["sha256"],
        data_sha256=dataset.sha256,
        options=options,
        shard=shard,
    )


def _activations(
    raw: bytes, names: Sequence[str], what: Counted, progress: Progress
) -> "Iterator[tuple[int, Tensors]]":
    from qcore.data.dataset import batches
    from qcore.runtime import ort

    dataset, options, shard = what
    part = replace(
        dataset,
        indices=dataset.indices[shard.start : shard.stop],
        labels=None if dataset.labels is None else dataset.labels[shard.start : shard.stop],
    )
    produced = ort.activations(raw, names, batches(part, options.batch), threads=shard.threads)
    del raw
    done = 0
    for n, tensors in produced:
        if n and done:
            progress("calibrating", done, part.n)
        done += n
        yield n, tensors
        del tensors
    progress("calibrating", done, part.n)


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
