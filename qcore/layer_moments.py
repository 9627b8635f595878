"""Moments of what a layer reads and of what it should make, at sampled positions of samples.

The float model says what the outputs of a layer should be; a walk through another model (quantized, or with fewer
channels) says what it really reads there. What a layer becomes with that is up to others.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.windows import window_of
from qcore.numerics.refine import LayerMoments, MomentSums
from qcore.numerics.shrinkage import MOST_INPUTS
from qcore.numerics.windows import windows_at
from qcore.runtime.nodewise import Walk, expose, inputs_of

Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledLayer:
    """A Conv (in one or two dimensions), Gemm or MatMul.

    `name` is that of the node in the walk, `wanted` the float tensor that the layer should make. `kernel` is the shape
    of a convolution's taps, () for others. `centred` says whether it has a bias, so that means do not count.
    """

    name: str
    node: ir.Node
    wanted: str
    kernel: tuple[int, ...]
    groups: int = 1
    centred: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Sampled float outputs of one layer in one batch: `y` (rows, outputs), and where they are in a feature map."""

    y: NDArray[np.float32]
    rows: NDArray[np.int64] | None
    columns: NDArray[np.int64] | None


def wanted_outputs(
    reference: ir.Model, layers: Sequence[SampledLayer], samples: Sequence[Tensors], positions: int
) -> dict[str, list[Wanted]]:
    """Return the float outputs of every layer by name, batch by batch, at `positions` places of each feature map."""
    predict = expose(reference, tuple(la.wanted for la in layers))
    wanted: dict[str, list[Wanted]] = {la.name: [] for la in layers}
    for k, batch in enumerate(samples):
        made = predict(batch)
        for layer in layers:
            y = made[layer.wanted].astype(np.float32, copy=False)
            if not layer.kernel:
                wanted[layer.name].append(Wanted(y=np.array(y.reshape(-1, y.shape[-1])), rows=None, columns=None))
                continue
            n, channels, height, width = _planes(y).shape
            rng = np.random.default_rng([zlib.crc32(layer.name.encode()), k])
            chosen = np.stack([rng.permutation(height * width)[:positions] for _ in range(n)])
            picked = np.take_along_axis(y.reshape(n, channels, -1), chosen[:, None, :], axis=2).transpose(0, 2, 1)
            found = Wanted(y=picked.reshape(-1, channels), rows=chosen // width, columns=chosen % width)
            wanted[layer.name].append(found)
    return wanted


def layer_moments(walk: Walk, layer: SampledLayer, wanted: Sequence[Wanted], shape: tuple[int, ...]) -> LayerMoments:
    """Return the moments of `layer`, whose weights have `shape` (groups, outputs, inputs), in `walk`."""
    groups, outputs, inputs = shape
    sums, seen = MomentSums(groups, outputs, inputs), 0
    for x, w in zip(inputs_of(walk, layer.name), wanted, strict=True):
        rows = _rows(layer, np.asarray(x, np.float32), w)
        y = w.y.reshape(-1, groups, outputs).transpose(1, 0, 2)
        # The rows of a sample lie together. Two halves need twice the memory: not for layers that ask for none.
        sample = seen + np.arange(rows.shape[1]) * len(x) // rows.shape[1]
        sums.add(rows, np.ascontiguousarray(y), sample if inputs <= MOST_INPUTS else None)
        seen += len(x)
    return sums.moments(centred=layer.centred)


def _rows(layer: SampledLayer, x: NDArray[np.float32], wanted: Wanted) -> NDArray[np.float32]:
    """Return what each sampled output sees, (groups, rows, inputs)."""
    if wanted.rows is None or wanted.columns is None:
        return x.reshape(1, -1, x.shape[-1])
    x = _planes(x)
    window = window_of(layer.node, layer.kernel, (x.shape[2], x.shape[3]))
    return windows_at(x, window, wanted.rows, wanted.columns, layer.groups)


def _planes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (samples, channels, height, width); a signal in one dimension is a plane of height 1."""
    return x if x.ndim == 4 else x[:, :, None, :]
