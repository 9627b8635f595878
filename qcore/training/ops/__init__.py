"""The operators that the executor runs: one table, made of one table in each file of this folder."""

from collections.abc import Mapping
from types import MappingProxyType

from qcore.training.ops import (
    activation,
    convolution,
    elementwise,
    indexing,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resize,
    shape,
)
from qcore.training.ops.node import OpFunction

OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        **activation.OPERATORS,
        **convolution.OPERATORS,
        **elementwise.OPERATORS,
        **indexing.OPERATORS,
        **matmul.OPERATORS,
        **normalization.OPERATORS,
        **pooling.OPERATORS,
        **quantization.OPERATORS,
        **recurrent.OPERATORS,
        **reduction.OPERATORS,
        **resize.OPERATORS,
        **shape.OPERATORS,
    }
)
"""Operator of the ONNX domain -> the function that builds what runs a node of it."""

MICROSOFT: Mapping[str, OpFunction] = MappingProxyType(
    {name: OPERATORS[name] for name in ("DequantizeLinear", "Gelu", "QuantizeLinear")}
)
"""The same for the domain com.microsoft, where 16-bit and 4-bit quantization lived before opset 21."""

SETTINGS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Clip": (1, 2),
        "ConstantOfShape": (0,),
        "CumProd": (1,),
        "CumSum": (1,),
        "Dropout": (1, 2),
        "Expand": (1,),
        "OneHot": (1,),
        "Pad": (1, 2, 3),
        "Range": (0, 1, 2),
        "ReduceL1": (1,),
        "ReduceL2": (1,),
        "ReduceLogSum": (1,),
        "ReduceLogSumExp": (1,),
        "ReduceMax": (1,),
        "ReduceMean": (1,),
        "ReduceMin": (1,),
        "ReduceProd": (1,),
        "ReduceSum": (1,),
        "ReduceSumSquare": (1,),
        "Reshape": (1,),
        "Resize": (1, 2, 3),
        "Slice": (1, 2, 3, 4),
        "Split": (1,),
        "Squeeze": (1,),
        "Tile": (1,),
        "TopK": (1,),
        "Trilu": (1,),
        "Unsqueeze": (1,),
    }
)
"""Inputs that say what to do and not what to do it with: they arrive as Python numbers and are never trained."""
