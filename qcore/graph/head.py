"""The classifier head as Gemm: a 1x1 convolution on pooled features is a matrix product.

MobileNets end in GlobalAveragePool -> Conv 1x1 -> Flatten. Integer convolutions must round their outputs to 8 bits;
integer Gemm kernels can hand out float logits. Writing the head as Flatten -> Gemm computes the same numbers and lets
close classes keep their order.
"""

import numpy as np
import onnx_ir as ir

from qcore.graph.edit import add_initializer, drop_unused_initializers, editable_copy, fresh_name, remove_in_favour_of
from qcore.graph.rewrite import Rewrite, Skipped
from qcore.graph.traverse import constant_array, int_attribute, node_name, only_consumer


def conv_head_to_gemm(model: ir.Model) -> Rewrite:
    """Return the model with every `Conv 1x1 -> Flatten` behind a GlobalAveragePool written as `Flatten -> Gemm`."""
    out = editable_copy(model)
    changed: list[str] = []
    skipped: list[Skipped] = []
    for conv in [n for n in out.graph if n.op_type == "Conv" and n.domain == ""]:
        pool = conv.inputs[0].producer() if conv.inputs[0] is not None else None
        if pool is None or pool.op_type != "GlobalAveragePool":
            continue
        reason = _refusal(conv)
        if reason is None:
            _replace(out.graph, conv)
            changed.append(node_name(conv))
        else:
            skipped.append(Skipped(node=node_name(conv), op_type="Conv", reason=reason))
    drop_unused_initializers(out.graph)
    return Rewrite(model=out, changed=tuple(changed), skipped=tuple(skipped))


def _refusal(conv: ir.Node) -> str | None:
    weight = constant_array(conv.inputs[1])
    if weight is not None and weight.dtype != np.float32:
        return f"its weights are {weight.dtype}"
    if weight is None or weight.shape[2:] != (1,) * (weight.ndim - 2) or int_attribute(conv, "group", 1) != 1:
        return "it is not a 1x1 convolution with constant weights and one group"
    pads = conv.attributes.get("pads")
    if pads is not None and any(pads.as_ints()):
        return "it pads"
    flatten = only_consumer(conv.outputs[0])
    if flatten is None or flatten.op_type != "Flatten" or int_attribute(flatten, "axis", 1) != 1:
        return "its output is not flattened"
    return None


def _replace(graph: ir.Graph, conv: ir.Node) -> None:
    weight, flatten = constant_array(conv.inputs[1]), only_consumer(conv.outputs[0])
    assert weight is not None and flatten is not None  # noqa: S101, PT018 - _refusal has looked
    name = node_name(conv)
    matrix = add_initializer(graph, f"{name}.matrix", weight.reshape(weight.shape[:2]).astype(np.float32))
    flat = ir.node("Flatten", [conv.inputs[0]], {"axis": 1}, name=f"{name}.flatten")
    bias = [conv.inputs[2]] if len(conv.inputs) > 2 and conv.inputs[2] is not None else []
    gemm = ir.node("Gemm", [flat.outputs[0], matrix, *bias], {"transB": 1}, name=name)
    flat.outputs[0].name = fresh_name(graph, f"{name}.features")
    flat.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    gemm.outputs[0].type, gemm.outputs[0].shape = flatten.outputs[0].type, flatten.outputs[0].shape
    graph.insert_before(conv, [flat, gemm])
    remove_in_favour_of(flatten, gemm.outputs[0])
    graph.remove(conv, safe=True)
