"""What a package says about its model: how it answers a few real samples, and what a device must be to run it.

A device runs the golden samples before it switches. They cost download bytes, so they are few; other CPUs round some
integers differently, so the limits are not zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcore.data.dataset import Dataset, batches
from qcore.errors import ConfigError, PackageError
from qcore.evaluation import golden_samples
from qcore.graph.io import parse_model
from qcore.release.manifest import Compatibility, Golden, RuntimeRange, TensorInfo, Tolerance, parsed_version
from qcore.runtime import ort
from qcore.target import TARGET_KEY, TargetProfile, load_target

MAX_SAMPLES, MIN_SAMPLES = 8, 2
SHARE = 10
"""Golden inputs take at most this part (1 / SHARE) of the model's bytes, unless that is fewer than MIN_SAMPLES."""
MEASURED = "CPUExecutionProvider"
"""The provider that the golden answers come from."""
LIMITS = {MEASURED: (0.05, 0.875)}
OTHER_LIMITS = (0.10, 0.75)
"""Largest accepted difference, as a share of the range of the output, and least agreement: of the provider that was
measured, and of those that round otherwise (fused, in half precision). Chosen, not measured, to tell a model that works
from one that does not; how good it is the gate has decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenFile:
    """The written samples, the range of their answers (of the widest output), and the model's inputs and outputs."""

    path: Path
    n: int
    answer_range: float
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def limits(self, providers: Sequence[str]) -> Golden:
        """Return what each of `providers` must reproduce."""
        shares = {p: LIMITS.get(p, OTHER_LIMITS) for p in providers}
        return Golden(
            n=self.n,
            tolerances=tuple(
                Tolerance(provider=p, max_abs_error=error * self.answer_range, argmax_agreement=agreement)
                for p, (error, agreement) in shares.items()
            ),
        )


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
        n=len(next(iter(fed.values()))),
        answer_range=max(ranges),
        inputs=_described(loaded.inputs),
        outputs=_described(loaded.outputs),
    )


def compatibility(model: bytes, target: str | None, *, memory_mb: int = 0, control_flow: bool = False) -> Compatibility:
    """Return what a device must be: of the target's hardware class, with a runtime no older than that which measured.

    Newer ones are good up to the next major version.

    Args:
        model: the bytes of the ONNX file, which name the profile they were quantized for.
        target: profile name or file; None: the model's own, or that of this machine for a model that names none.
        memory_mb: MiB that a process needs that runs the model; 0: not known.
        control_flow: declare that the model may hold If, Loop or Scan.

    Raises:
        PackageError: `target` is not what the model was quantized for, or `memory_mb` is negative.
    """
    if memory_mb < 0:
        raise PackageError(f"memory_mb is {memory_mb}; allowed: MiB that the model needs, or 0 where nobody knows")
    parsed = parse_model(model, "model")
    made_for = parsed.metadata_props.get(TARGET_KEY)
    profile = _profile(target, made_for)
    if made_for not in (None, profile.name):
        raise PackageError(
            f"the model was quantized for {made_for}, the package is to be for {profile.name}; leave the target out, "
            "or quantize, evaluate and gate for it"
        )
    tested = ort.runtime_version()
    major, minor, _ = parsed_version(tested)
    return Compatibility(
        hardware=(profile.name,),
        cpu_features=profile.cpu_features,
        onnxruntime=RuntimeRange(minimum=f"{major}.{minor}", tested=tested, below=str(major + 1)),
        opset=parsed.opset_imports[""],
        providers=profile.providers,
        memory_bytes=memory_mb << 20 or None,
        control_flow=control_flow,
    )


def _profile(target: str | None, made_for: str | None) -> TargetProfile:
    """Return the profile that is asked for, else the model's own, else that of this machine.

    A model that was made for a profile of one's own, whose file is not given, needs what nobody here can tell.
    """
    if target is not None or made_for is None:
        return load_target(target or "host")
    try:
        return load_target(made_for)
    except ConfigError as e:
        raise PackageError(
            f"the model was quantized for {made_for}, which is no shipped profile; pass its file with --target"
        ) from e


def _described(ports: Sequence[ort.Port]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=p.name, dtype=p.dtype.name, shape=p.shape) for p in ports)
