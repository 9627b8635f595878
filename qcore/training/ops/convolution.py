"""Convolutions in one, two and three dimensions."""

from collections.abc import Mapping
from types import MappingProxyType

import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported
from qcore.training.ops.windows import Pads, Windows, pads_for, reaches, torch_order, windows_of

_CONV: Mapping[int, Function] = MappingProxyType({3: F.conv1d, 4: F.conv2d, 5: F.conv3d})
_TRANSPOSED: Mapping[int, Function] = MappingProxyType(
    {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
)


def conv(node: OpNode) -> Function:
    """Build Conv-22: x (n, c, ...), weights (m, c / group, ...), bias (m,).

    Pads that differ between the two ends of an axis are zeros put around the input first.
    """
    windows, group = _checked(node), node.integer("group", 1)
    stride, dilation, padding = windows.stride, windows.dilation, windows.padding

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return _CONV[x.dim()](x, w, b, stride, padding, dilation, group)

    def run_padded(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        pads = pads_for(windows, tuple(x.shape[2:]), tuple(w.shape[2:]))
        if all(before == behind for before, behind in pads):
            return _CONV[x.dim()](x, w, b, stride, [before for before, _ in pads], dilation, group)
        return _CONV[x.dim()](F.pad(x, torch_order(pads)), w, b, stride, 0, dilation, group)

    return run if windows.symmetric else run_padded


def conv_transpose(node: OpNode) -> Function:
    """Build ConvTranspose-22: x (n, c, ...), weights (c, m / group, ...), bias (m,).

    Computed without pads; then what pads take away is cut off, and what output_padding adds is put on.
    """
    windows, group = _checked(node), node.integer("group", 1)
    added, shape = node.integers("output_padding"), node.integers("output_shape")
    plain = windows.symmetric and shape is None and not any(added or ())

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return _TRANSPOSED[x.dim()](x, w, b, windows.stride, windows.padding, 0, group, windows.dilation)

    def run_cut(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        full = _TRANSPOSED[x.dim()](x, w, None, windows.stride, 0, 0, group, windows.dilation)
        pads = _transposed_pads(windows, tuple(x.shape[2:]), tuple(w.shape[2:]), (added, shape))
        extra = added or [0] * len(pads)
        cut = [(-before, more - behind) for (before, behind), more in zip(pads, extra, strict=True)]
        y = F.pad(full, torch_order(cut))
        return y if b is None else y + b.reshape(-1, *(1,) * len(pads))

    return run if plain else run_cut


def _transposed_pads(
    windows: Windows,
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    output: tuple[list[int] | None, list[int] | None],
) -> Pads:
    """Return the pads of a transposed convolution; `output` is its output_padding and its output_shape."""
    n = len(spatial)
    strides = windows.strides or (1,) * n
    added, shape = output
    if shape is None and windows.auto_pad in ("NOTSET", "VALID"):
        return list(zip(windows.pads[:n], windows.pads[n:], strict=True)) if windows.pads else [(0, 0)] * n
    wanted = (shape or [side * stride for side, stride in zip(spatial, strides, strict=True)])[-n:]
    pads = []
    for axis, reach in enumerate(reaches(windows, kernel)):
        extra = added[axis] if added else 0
        total = strides[axis] * (spatial[axis] - 1) + extra + reach - wanted[axis]
        half = total // 2
        pads.append((half, total - half) if windows.auto_pad == "SAME_UPPER" else (total - half, half))
    return pads


def _checked(node: OpNode) -> Windows:
    kernel = node.integers("kernel_shape")
    if kernel is not None and len(kernel) > 3:
        raise Unsupported(f"{len(kernel)} spatial dimensions, at most 3")
    return windows_of(node)


OPERATORS: Mapping[str, OpFunction] = MappingProxyType({"Conv": conv, "ConvTranspose": conv_transpose})
