"""What recovery steps ask of the calibration data: ranges, channel statistics, and how far from float a model is.

The samples are cut in two: steps learn from `fit`, and are judged on `held_out`, which they never see. Where nothing
could be held out, no step can be judged, so none is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.calibration import CalibrationTable
from qcore.errors import ModelError
from qcore.graph.io import serialize_model
from qcore.methods.quantize import tensors_to_calibrate
from qcore.numerics.channels import ChannelStats, stream_channels
from qcore.numerics.error import output_error
from qcore.runtime.nodewise import expose
from qcore.runtime.ort import load_unfused, on_samples

Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Calibration data of one run: `table` counts all samples of the split through a model.

    `fit` and `held_out` are named inputs of `batch` samples each; `task` is that of the data card.
    """

    table: Callable[[ir.Model], CalibrationTable]
    fit: tuple[Tensors, ...]
    held_out: tuple[Tensors, ...]
    batch: int
    task: Literal["classification", "none"]

    @property
    def everything(self) -> tuple[Tensors, ...]:
        """The batches of `fit`, then those of `held_out`."""
        return self.fit + self.held_out

    def some(self, batches: tuple[Tensors, ...], samples: int) -> tuple[Tensors, ...]:
        """Return as many of `batches` as hold `samples` samples, evenly spread: data are often sorted by class."""
        count = min(len(batches), max(1, -(-samples // self.batch)))
        return tuple(batches[k * len(batches) // count] for k in range(count)) if batches else ()


def channel_statistics(
    model: ir.Model, evidence: Evidence, axes: Mapping[str, int] | None = None
) -> dict[str, ChannelStats]:
    """Return the statistics of the channels of float activations of `model` over the samples to fit, by tensor name.

    Args:
        model: float model.
        evidence: calibration data; one batch at a time is in memory.
        axes: the activations and the axis of their channels: 1 for what convolutions read, -1 for what MatMul
            multiplies. None for all that a target may quantize, along axis 1.
    """
    fed = evidence.fit[0].keys() if evidence.fit else ()
    wanted = tuple(tensors_to_calibrate(model) if axes is None else axes)
    predict = expose(model, [name for name in wanted if name not in fed])

    def floats(sample: Tensors) -> dict[str, NDArray[np.floating]]:
        made = {**sample, **predict(sample)}
        return {k: made[k].astype(np.float32, copy=False) for k in wanted if k in made and made[k].dtype.kind == "f"}

    return stream_channels((floats(sample) for sample in evidence.fit), axes)


def output_distance(model: ir.Model, reference: ir.Model, evidence: Evidence) -> float:
    """Return `output_error` of `model` against `reference` on the held-out samples; on all where none are.

    The numbers of the file count: no fused kernel, whose sums saturate on some machines, takes part.

    Raises:
        ModelError: a model gives NaN or infinity, or other outputs than the reference.
    """
    samples = evidence.held_out or evidence.fit
    ours, theirs = (_outputs(m, samples) for m in (model, reference))
    try:
        return output_error(theirs, ours, evidence.task)
    except ValueError as e:
        raise ModelError(f"outputs cannot be compared: {e}; check the model and the preprocessing") from e


def _outputs(model: ir.Model, samples: tuple[Tensors, ...]) -> dict[str, NDArray[np.generic]]:
    predict = on_samples(load_unfused(serialize_model(model)))
    parts = [predict(sample) for sample in samples]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
