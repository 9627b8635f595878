"""What a package says about its model: how it answers a few real samples, and what a device must be to run it.

A device runs the golden samples before it switches. They cost download bytes, so they are few; other CPUs round some
integers differently, so the limits are not zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcore.data.dataset import Dataset, batches
from qcore.errors import PackageError
from qcore.evaluation import golden_samples
from qcore.graph.io import parse_model
from qcore.release.manifest import Compatibility, Golden, TensorInfo
from qcore.runtime import ort
from qcore.target import TARGET_KEY, load_target

MAX_SAMPLES, MIN_SAMPLES = 8, 2
SHARE = 10
"""Golden inputs take at most this part (1 / SHARE) of the model's bytes, unless that is fewer than MIN_SAMPLES."""
ERROR = 0.05
"""Largest accepted difference, as a share of the range of the output."""
AGREEMENT = 0.875


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenFile:
    """The written samples, the limits they must be reproduced in, and the model's inputs and outputs."""

    path: Path
    limits: Golden
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def write_golden(model: bytes, dataset: Dataset, path: Path) -> GoldenFile:
    """Return the golden samples of `model`, written to `path`: the first of `dataset` and the answers to them.

    Raises:
        ModelError: the model cannot be run.
        DataError: the samples do not fit it.
    """
    loaded = ort.load(model, threads=1)
    sample_bytes = sum(v.nbytes for v in ort.feeds(loaded, next(batches(dataset, 1))).values())
    fitting = len(model) // SHARE // max(sample_bytes, 1)
    n = loaded.fixed_batch or min(max(fitting, MIN_SAMPLES), MAX_SAMPLES)
    fed = ort.feeds(loaded, next(batches(dataset, n)))
    path.write_bytes(golden_samples(loaded.predict, fed))
    ranges = [float(np.ptp(np.asarray(v, np.float64))) for v in loaded.predict(fed).values()]
    return GoldenFile(
        path=path,
        limits=Golden(n=len(next(iter(fed.values()))), max_abs_error=ERROR * max(ranges), argmax_agreement=AGREEMENT),
        inputs=_described(loaded.inputs),
        outputs=_described(loaded.outputs),
    )


def compatibility(model: bytes, target: str | None) -> Compatibility:
    """Return what a device must be: of the target's hardware class, with at least the runtime that measured the model.

    Args:
        model: the bytes of the ONNX file, which name the profile they were quantized for.
        target: profile name or file; None: the model's own, or that of this machine for a model that names none.

    Raises:
        PackageError: `target` is not what the model was quantized for.
    """
    made_for = parse_model(model, "model").metadata_props.get(TARGET_KEY)
    named = load_target(target).name if target is not None else made_for or load_target("host").name
    if made_for not in (None, named):
        raise PackageError(
            f"the model was quantized for {made_for}, the package is to be for {named}; leave the target out, or "
            "quantize, evaluate and gate for it"
        )
    return Compatibility(
        hardware=(named,),
        onnxruntime=".".join(ort.runtime_version().split(".")[:2]),
        opset=parse_model(model, "model").opset_imports[""],
        providers=("CPUExecutionProvider",),
    )


def _described(ports: Sequence[ort.Port]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=p.name, dtype=p.dtype.name, shape=p.shape) for p in ports)
