"""Layer-wise refinement of a quantized model: every layer in turn, seeing the inputs that it really gets.

The float model says what each layer's outputs should be; the quantized model is run unit by unit, and each layer's
integers and bias are replaced before the units behind it run. Nothing here decides whether the result is better.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import editable_copy
from qcore.graph.grid import LAYERS, GridNode, grid_nodes, matrix_of, replace_layer, scale_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name
from qcore.graph.windows import window_of
from qcore.numerics.refine import GridLayer, LayerMoments, MomentSums
from qcore.numerics.shrinkage import MOST_INPUTS
from qcore.numerics.windows import Window, windows_at
from qcore.runtime.nodewise import Walk, expose, inputs_of, start_walk
from qcore.runtime.ort import encoded, load_unfused

Array = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.generic]]
Refine = Callable[[GridLayer, LayerMoments], tuple[GridLayer, Array]]
"""From a layer and its moments to what it should be and its bias (groups, outputs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """Sampled float outputs of one layer in one batch: `y` (rows, outputs), and where they are in a feature map."""

    y: NDArray[np.float32]
    rows: NDArray[np.int64] | None
    columns: NDArray[np.int64] | None


def refine_layers(  # noqa: PLR0913 - two models, two settings, and what to do with a layer
    quantized: ir.Model,
    reference: ir.Model,
    samples: Sequence[Tensors],
    refine: Refine,
    positions: int,
    *,
    float_biases: bool = False,
) -> Rewrite:
    """Return `quantized` with every layer refined; `changed` names the layers whose numbers are new.

    Args:
        quantized: QDQ model.
        reference: the float model that it was made from, with the same node names.
        samples: named inputs of each batch.
        refine: what becomes of a layer.
        positions: how many output positions of each sample of a convolution are looked at.
        float_biases: whether layers without a bias get a float one; else int32.
    """
    out = editable_copy(quantized)
    floats = {node_name(n): n for n in editable_copy(reference).graph if n.op_type in LAYERS}
    layers, skipped = grid_nodes(out.graph, floats, float_biases=float_biases)
    wanted = _wanted(reference, layers, samples, positions)
    proto = ir.serde.serialize_model(out)
    loaded = load_unfused(proto.SerializeToString())
    walk = start_walk(proto, [encoded(loaded, batch) for batch in samples])
    changed: list[str] = []
    for layer in layers:
        name = node_name(layer.node)
        matrix = matrix_of(layer, constant_array(floats[name].inputs[1]))
        grid = GridLayer(
            wanted=matrix,
            integers=matrix_of(layer, constant_array(layer.weight)) - layer.zero,
            scale=scale_of(layer, matrix.shape),
            shared=layer.scale.size == 1,
        )
        refined, bias = refine(grid, _moments(walk, layer, wanted[name], matrix.shape))
        new = replace_layer(layer, refined, bias)
        walk.constants.update(new)
        if new:
            changed.append(name)
        elif not layer.has_bias:
            skipped.append(Skipped(node=name, op_type=layer.node.op_type, reason=layer.unbiased))
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _wanted(
    reference: ir.Model, layers: Sequence[GridNode], samples: Sequence[Tensors], positions: int
) -> dict[str, list[_Wanted]]:
    """Return the float outputs of every layer at sampled positions, batch by batch."""
    outputs = {node_name(la.node): str(la.wanted.name) for la in layers}
    convolutions = {node_name(la.node) for la in layers if la.node.op_type == "Conv"}
    predict = expose(reference, tuple(outputs.values()))
    wanted: dict[str, list[_Wanted]] = {name: [] for name in outputs}
    for k, batch in enumerate(samples):
        made = predict(batch)
        for name, output in outputs.items():
            y = made[output].astype(np.float32, copy=False)
            if name not in convolutions:
                wanted[name].append(_Wanted(y=np.array(y.reshape(-1, y.shape[-1])), rows=None, columns=None))
                continue
            n, channels, height, width = _planes(y).shape
            rng = np.random.default_rng([zlib.crc32(name.encode()), k])
            chosen = np.stack([rng.permutation(height * width)[:positions] for _ in range(n)])
            picked = np.take_along_axis(y.reshape(n, channels, -1), chosen[:, None, :], axis=2).transpose(0, 2, 1)
            wanted[name].append(_Wanted(y=picked.reshape(-1, channels), rows=chosen // width, columns=chosen % width))
    return wanted


def _moments(walk: Walk, layer: GridNode, wanted: Sequence[_Wanted], shape: tuple[int, ...]) -> LayerMoments:
    groups, outputs, inputs = shape
    sums, seen = MomentSums(groups, outputs, inputs), 0
    for x, w in zip(inputs_of(walk, layer.node.name or ""), wanted, strict=True):
        rows = _rows(layer, np.asarray(x, np.float32), w)
        y = w.y.reshape(-1, groups, outputs).transpose(1, 0, 2)
        # The rows of a sample lie together. Two halves need twice the memory: not for layers that ask for none.
        sample = seen + np.arange(rows.shape[1]) * len(x) // rows.shape[1]
        sums.add(rows, np.ascontiguousarray(y), sample if inputs <= MOST_INPUTS else None)
        seen += len(x)
    return sums.moments(centred=layer.has_bias)


def _rows(layer: GridNode, x: NDArray[np.float32], wanted: _Wanted) -> NDArray[np.float32]:
    """Return what each sampled output sees, (groups, rows, inputs)."""
    if wanted.rows is None or wanted.columns is None:
        return x.reshape(1, -1, x.shape[-1])
    x = _planes(x)
    return windows_at(x, _window(layer, (x.shape[2], x.shape[3])), wanted.rows, wanted.columns, layer.groups)


def _planes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (samples, channels, height, width); a signal in one dimension is a plane of height 1."""
    return x if x.ndim == 4 else x[:, :, None, :]


def _window(layer: GridNode, size: tuple[int, int]) -> Window:
    """Return how the convolution `layer` looks at an input of height and width `size`."""
    weight = constant_array(layer.weight)
    assert weight is not None  # noqa: S101 - an initializer
    return window_of(layer.node, weight.shape[2:], size)
