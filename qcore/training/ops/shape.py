"""Operators that move elements without choosing among them: reshapes, transposes, joins, pads."""

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported, carrier, number
from qcore.training.ops.windows import torch_order
from qcore.training.tensors import torch_from_onnx


def reshape(node: OpNode) -> Function:
    """Build Reshape-25: 0 keeps a side, unless allowzero, and -1 is what is left."""
    keeps = not node.integer("allowzero")

    def run(x: Tensor, shape: list[int]) -> Tensor:
        if keeps and 0 in shape:
            shape = [x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)]
        return x.reshape(shape)

    return run


def transpose(node: OpNode) -> Function:
    """Build Transpose-25; without `perm` the axes are reversed."""
    perm = node.integers("perm")

    def run_reversed(x: Tensor) -> Tensor:
        return x.permute(*reversed(range(x.dim())))

    return run_reversed if perm is None else lambda x: x.permute(perm)


def concat(node: OpNode) -> Function:
    """Build Concat-13 along `axis`."""
    axis = node.integer("axis")
    return lambda *tensors: torch.cat(tensors, axis)


def split(node: OpNode) -> Function:
    """Build Split-18: into the given sizes, or equal parts of which the last may be smaller."""
    axis, parts = node.integer("axis"), node.integer("num_outputs", len(node.outputs))

    def run(x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
        if sizes is None:
            size = -(-x.shape[axis] // parts)
            sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
        return tuple(torch.split(x, sizes, axis))

    return run if len(node.outputs) > 1 else lambda x, sizes=None: run(x, sizes)[0]


def squeeze(node: OpNode) -> Function:
    """Build Squeeze-25: removes the given axes of length 1, or all."""
    del node  # it has no attributes

    def run(x: Tensor, axes: list[int] | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes))

    return run


def unsqueeze(node: OpNode) -> Function:
    """Build Unsqueeze-25: the axes count in the result."""
    del node  # it has no attributes

    def run(x: Tensor, axes: list[int] | int) -> Tensor:
        listed = axes if isinstance(axes, list) else [axes]
        rank = x.dim() + len(listed)
        for axis in sorted(axis % rank for axis in listed):
            x = x.unsqueeze(axis)
        return x

    return run


def flatten(node: OpNode) -> Function:
    """Build Flatten-25: to a matrix, whose rows are the axes before `axis`."""
    axis = node.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        return x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)

    def run_at(x: Tensor) -> Tensor:
        rows = x.shape[: axis if axis >= 0 else x.dim() + axis].numel()
        return x.reshape(rows, x.numel() // rows if rows else -1)

    return run if axis == 1 else run_at


def expand(node: OpNode) -> Function:
    """Build Expand-13: input and shape are broadcast to each other."""
    del node  # it has no attributes
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, shape))


def tile(node: OpNode) -> Function:
    """Build Tile-13."""
    del node  # it has no attributes
    return lambda x, repeats: x.repeat(repeats)


def shape(node: OpNode) -> Function:
    """Build Shape-25: the sides from `start` to `end`, on the CPU."""
    start, end = node.integer("start"), node.attributes.get("end")
    stop = None if end is None else end.as_int()
    return lambda x: torch.tensor(x.shape[start:stop], dtype=torch.int64)


def size(node: OpNode) -> Function:
    """Build Size-25: the number of elements, on the CPU."""
    del node  # it has no attributes
    return lambda x: torch.tensor(x.numel())


def constant(node: OpNode) -> Function:
    """Build Constant-25 of numbers; most are initializers before an operator function sees them."""
    ((name, attribute), *_) = node.attributes.items()
    match name:
        case "value":
            tensor = attribute.as_tensor()
            carrier(tensor.dtype)
            value = torch_from_onnx(tensor)
        case "value_float" | "value_floats":
            value = torch.tensor(attribute.value, dtype=torch.float32)
        case "value_int" | "value_ints":
            value = torch.tensor(attribute.value, dtype=torch.int64)
        case _:
            raise Unsupported(f"the attribute {name}")
    return lambda: value


def constant_of_shape(node: OpNode) -> Function:
    """Build ConstantOfShape-25; without `value` it is float 0."""
    attribute = node.attributes.get("value")
    if attribute is None:
        return lambda shape: torch.zeros(shape)
    tensor = attribute.as_tensor()
    dtype, value = carrier(tensor.dtype), tensor.numpy().reshape(-1)[0].item()
    return lambda shape: torch.full(shape, value, dtype=dtype)


def arange(node: OpNode) -> Function:
    """Build Range-27, in the type of `start`."""
    found = node.input_type(0)
    dtype = None if found is None else carrier(found)

    def run(start: float | list[float], limit: float | list[float], delta: float | list[float]) -> Tensor:
        first, last, step = number(start), number(limit), number(delta)
        count = max(-(-(last - first) // step), 0)
        steps = torch.arange(int(count), dtype=torch.int64 if isinstance(first, int) else torch.float64)
        return (steps * step + first).to(dtype or (torch.int64 if isinstance(first, int) else torch.float32))

    return run


def eye_like(node: OpNode) -> Function:
    """Build EyeLike-22: ones on the k-th diagonal."""
    k, attribute = node.integer("k"), node.attributes.get("dtype")
    dtype = None if attribute is None else carrier(ir.DataType(attribute.as_int()))

    def run(x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        return (torch.arange(x.shape[1], device=x.device) == rows + k).to(dtype or x.dtype)

    return run


def pad(node: OpNode) -> Function:
    """Build Pad-25: constant, reflect, edge or wrap; negative pads cut off."""
    mode = node.choice("mode", ("constant", "reflect", "edge", "wrap"))

    def run(
        x: Tensor, pads: list[int], value: float | list[float] | None = None, axes: list[int] | None = None
    ) -> Tensor:
        listed = range(x.dim()) if axes is None else axes
        pairs = [(0, 0)] * x.dim()
        for axis, before, behind in zip(listed, pads[: len(listed)], pads[len(listed) :], strict=True):
            pairs[axis] = (before, behind)
        if mode == "constant":
            return F.pad(x, torch_order(pairs), value=0 if value is None else number(value))
        for axis, (before, behind) in enumerate(pairs):
            if before or behind:
                x = x.index_select(axis, _padded_indices(x.shape[axis], before, behind, mode).to(x.device))
        return x

    return run


def _padded_indices(side: int, before: int, behind: int, mode: str) -> Tensor:
    """Return which elements of an axis of length `side` stand at its places after padding."""
    places = torch.arange(-before, side + behind)
    if mode == "edge":
        return places.clamp(0, side - 1)
    if mode == "wrap":
        kept = side + min(before, 0) + min(behind, 0)
        return (places - max(-before, 0)) % kept + max(-before, 0)
    period = max(2 * (side - 1), 1)
    folded = places % period
    return torch.minimum(folded, period - folded) if side > 1 else torch.zeros_like(places)


def depth_to_space(node: OpNode) -> Function:
    """Build DepthToSpace-28: (n, c * b * b, h, w) -> (n, c, h * b, w * b)."""
    b, depth_first = node.integer("blocksize"), node.choice("mode", ("DCR", "CRD")) == "DCR"

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if depth_first:
            blocks = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            blocks = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(n, c // (b * b), h * b, w * b)

    return run


def space_to_depth(node: OpNode) -> Function:
    """Build SpaceToDepth-28: (n, c, h * b, w * b) -> (n, c * b * b, h, w)."""
    b, depth_first = node.integer("blocksize"), node.choice("mode", ("DCR", "CRD")) == "DCR"

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // b, b, w // b, b)
        order = (0, 3, 5, 1, 2, 4) if depth_first else (0, 1, 3, 5, 2, 4)
        return blocks.permute(order).reshape(n, c * b * b, h // b, w // b)

    return run


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "Concat": concat,
        "Constant": constant,
        "ConstantOfShape": constant_of_shape,
        "DepthToSpace": depth_to_space,
        "Expand": expand,
        "EyeLike": eye_like,
        "Flatten": flatten,
        "Pad": pad,
        "Range": arange,
        "Reshape": reshape,
        "Shape": shape,
        "Size": size,
        "SpaceToDepth": space_to_depth,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": tile,
        "Transpose": transpose,
        "Unsqueeze": unsqueeze,
    }
)
