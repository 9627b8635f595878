"""Layer-wise refinement of a quantized model: every layer in turn, seeing the inputs that it really gets.

The float model says what each layer's outputs should be; the quantized model is run unit by unit, and each layer's
integers and bias are replaced before the units behind it run. Nothing here decides whether the result is better.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcore.graph.edit import editable_copy
from qcore.graph.grid import LAYERS, GridNode, grid_nodes, matrix_of, replace_layer, scale_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, node_name
from qcore.layer_moments import SampledLayer, layer_moments, wanted_outputs
from qcore.numerics.refine import GridLayer, LayerMoments
from qcore.runtime.nodewise import start_walk
from qcore.runtime.ort import encoded, load_unfused

Array = NDArray[np.float64]
Tensors = Mapping[str, NDArray[np.generic]]
Refine = Callable[[GridLayer, LayerMoments], tuple[GridLayer, Array]]
"""From a layer and its moments to what it should be and its bias (groups, outputs)."""


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
    sampled = {node_name(la.node): _sampled(la) for la in layers}
    wanted = wanted_outputs(reference, tuple(sampled.values()), samples, positions)
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
        refined, bias = refine(grid, layer_moments(walk, sampled[name], wanted[name], matrix.shape))
        new = replace_layer(layer, refined, bias)
        walk.constants.update(new)
        if new:
            changed.append(name)
        elif not layer.has_bias:
            skipped.append(Skipped(node=name, op_type=layer.node.op_type, reason=layer.unbiased))
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _sampled(layer: GridNode) -> SampledLayer:
    weight = constant_array(layer.weight)
    assert weight is not None  # noqa: S101 - an initializer
    return SampledLayer(
        name=node_name(layer.node),
        node=layer.node,
        wanted=str(layer.wanted.name),
        kernel=weight.shape[2:] if layer.node.op_type == "Conv" else (),
        groups=layer.groups,
        centred=layer.has_bias,
    )
