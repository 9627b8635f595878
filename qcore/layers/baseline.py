"""The float model as the quantizer saw it: the exact rewrites that every shipped recipe starts with."""

import onnx_ir as ir

from qcore.graph.fold import fold_batchnorm
from qcore.graph.head import conv_head_to_gemm
from qcore.graph.traverse import node_name


def matching_baseline(baseline: ir.Model, quantized: ir.Model) -> ir.Model:
    """Return `baseline` with batch norms folded and the head as Gemm, each only where `quantized` has it so.

    The numbers are the same up to float rounding; what changes is which tensors there are to compare.
    """
    norms = sum(n.op_type == "BatchNormalization" for n in quantized.graph)
    if sum(n.op_type == "BatchNormalization" for n in baseline.graph) > norms:
        baseline = fold_batchnorm(baseline).model
    types = {node_name(n): n.op_type for n in quantized.graph}
    head = conv_head_to_gemm(baseline)
    return head.model if any(types.get(name) == "Gemm" for name in head.changed) else baseline
