"""Calibration on files: a model and a split in, a table out."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.steps.guard import Progress, refuse_overwrite, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcore.calibration import CalibrationTable
    from qcore.data.dataset import Dataset

CALIBRATION_BINS = 2048


def calibrate(
    *,
    model: Path,
    data: Path,
    out: Path,
    split: str = "calibration",
    bins: int = CALIBRATION_BINS,
    progress: Progress = silent,
) -> "CalibrationTable":
    """Return the calibration table of `model` over `split`, written to `out`."""
    from qcore.calibration import save_table
    from qcore.data.dataset import open_dataset
    from qcore.graph.io import parse_model, read_model_bytes

    raw = read_model_bytes(model)
    refuse_overwrite(out, model, data=data)
    table = count_table(raw, parse_model(raw, str(model)), open_dataset(data, split), bins, progress)
    save_table(table, out)
    return table


def count_table(raw: bytes, model: "ir.Model", dataset: "Dataset", bins: int, progress: Progress) -> "CalibrationTable":
    """Return the table of `model` (the bytes `raw`) over all samples of `dataset`."""
    from qcore.calibration import calibrate as count
    from qcore.canonical import sha256_bytes
    from qcore.data.dataset import Batch, batches
    from qcore.graph.fold import fold_batchnorm
    from qcore.methods.quantize import tensors_to_calibrate
    from qcore.runtime import ort

    names = tensors_to_calibrate(fold_batchnorm(model).model)
    size = ort.load(raw).fixed_batch or 1

    def counted() -> Iterator[Batch]:
        done = 0
        for batch in batches(dataset, size):
            yield batch
            done += len(batch.index)
            progress("calibrating", done, dataset.n)

    return count(
        ort.activations(raw, names, counted()), model_sha256=sha256_bytes(raw), data_sha256=dataset.sha256, bins=bins
    )
