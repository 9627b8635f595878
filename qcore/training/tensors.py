"""ONNX tensors as torch tensors and back.

torch has no 4-bit integers and hardly any arithmetic on unsigned integers wider than 8 bits: such tensors are carried
in the next signed type that holds them. Values are equal; what does not hold is that they wrap around.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

_T = ir.DataType
TORCH_TYPES: Mapping[ir.DataType, torch.dtype] = MappingProxyType(
    {
        _T.FLOAT: torch.float32,
        _T.FLOAT16: torch.float16,
        _T.BFLOAT16: torch.bfloat16,
        _T.DOUBLE: torch.float64,
        _T.BOOL: torch.bool,
        _T.INT8: torch.int8,
        _T.UINT8: torch.uint8,
        _T.INT16: torch.int16,
        _T.INT32: torch.int32,
        _T.INT64: torch.int64,
        _T.UINT16: torch.int32,
        _T.UINT32: torch.int64,
        _T.UINT64: torch.int64,
        _T.INT4: torch.int8,
        _T.UINT4: torch.uint8,
    }
)
"""Element type of ONNX -> the torch type that carries it; a type that is not here is refused."""

FLOATS = frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE})
INTEGER_RANGES: Mapping[ir.DataType, tuple[int, int]] = MappingProxyType(
    {
        _T.INT4: (-8, 7),
        _T.UINT4: (0, 15),
        _T.INT8: (-128, 127),
        _T.UINT8: (0, 255),
        _T.INT16: (-(1 << 15), (1 << 15) - 1),
        _T.UINT16: (0, (1 << 16) - 1),
        _T.INT32: (-(1 << 31), (1 << 31) - 1),
    }
)
"""What QuantizeLinear saturates to."""


def torch_from_onnx(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy of `tensor` on the CPU, of the same shape and of the type in `TORCH_TYPES`."""
    array = tensor.numpy()
    if tensor.dtype == _T.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    carrier = TORCH_TYPES[tensor.dtype]
    if tensor.dtype in (_T.INT4, _T.UINT4, _T.UINT16, _T.UINT32, _T.UINT64):
        array = array.astype(str(carrier).removeprefix("torch."))
    return torch.from_numpy(np.array(array, order="C"))


def onnx_from_torch(tensor: torch.Tensor, like: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the values of `tensor` with the name and element type of `like`, rounded to it where it is narrower."""
    flat = tensor.detach().to("cpu", memory_format=torch.contiguous_format)
    if like.dtype == _T.BFLOAT16:
        bits: NDArray[np.generic] = flat.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return ir.Tensor(bits.view(like.dtype.numpy()), dtype=like.dtype, name=like.name)
    array = flat.contiguous().numpy().astype(like.dtype.numpy())
    return ir.Tensor(array, dtype=like.dtype, name=like.name)
