"""Poolings over windows and over whole images."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from qcore.training.ops.elementwise import plain
from qcore.training.ops.node import Function, OpFunction, OpNode, Unsupported
from qcore.training.ops.windows import Pads, Windows, pads_for, torch_order, whole_windows, windows_of

_MAX: Mapping[int, Function] = MappingProxyType({3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d})
_AVERAGE: Mapping[int, Function] = MappingProxyType({3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d})
_CONV: Mapping[int, Function] = MappingProxyType({3: F.conv1d, 4: F.conv2d, 5: F.conv3d})


def max_pool(node: OpNode) -> Function:
    """Build MaxPool-22; the second output is where in the whole input each maximum is.

    Raises:
        Unsupported: indices in column-major order.
    """
    windows, kernel, wants_indices = windows_of(node), _kernel(node), node.wants(1)
    if wants_indices and node.integer("storage_order"):
        raise Unsupported("storage_order 1 with indices")

    def run(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return run_general(x.to(torch.float64)).to(x.dtype)
        return _MAX[x.dim()](x, kernel, windows.stride, windows.padding, windows.dilation, windows.ceil)

    def run_general(x: Tensor) -> Tensor:
        return _MAX[x.dim()](_padded_low(x, windows, kernel), kernel, windows.stride, 0, windows.dilation)

    def run_with_indices(x: Tensor) -> tuple[Tensor, Tensor]:
        padded = _padded_low(x, windows, kernel)
        y, indices = _MAX[x.dim()](padded, kernel, windows.stride, 0, windows.dilation, return_indices=True)
        before = [pair[0] for pair in pads_for(windows, tuple(x.shape[2:]), kernel)]
        return y, _indices_in_input(indices, tuple(padded.shape[2:]), before, x)

    if wants_indices:
        return run_with_indices
    return run if _torch_pads(windows, kernel) else run_general


def average_pool(node: OpNode) -> Function:
    """Build AveragePool-22; pads count where count_include_pad says so, what ceil_mode adds behind them never does."""
    windows, kernel = windows_of(node), _kernel(node)
    with_pads = bool(node.integer("count_include_pad"))

    def run(x: Tensor) -> Tensor:
        return _AVERAGE[x.dim()](x, kernel, windows.stride, windows.padding, windows.ceil, with_pads)

    def run_general(x: Tensor) -> Tensor:
        spatial = tuple(x.shape[2:])
        pads = pads_for(windows, spatial, kernel)
        ones = torch.ones((1, 1, *spatial), dtype=x.dtype, device=x.device)
        counted = F.pad(ones, torch_order(pads), value=1.0) if with_pads else ones
        given: Pads = pads if with_pads else [(0, 0)] * len(spatial)
        whole = whole_windows(windows, spatial, kernel, pads)
        rest = [(w[0] - g[0], w[1] - g[1]) for w, g in zip(whole, given, strict=True)]
        total = _window_sums(F.pad(x, torch_order(whole)), windows, kernel)
        return total / _window_sums(F.pad(counted, torch_order(rest)), windows, kernel)

    return run if _torch_pads(windows, kernel) and not any(d > 1 for d in windows.dilations) else run_general


def lp_pool(node: OpNode) -> Function:
    """Build LpPool-22: the p-norm of each window."""
    windows, kernel, p = windows_of(node), _kernel(node), node.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        spatial = tuple(x.shape[2:])
        whole = whole_windows(windows, spatial, kernel, pads_for(windows, spatial, kernel))
        powers = F.pad(x.abs() ** p, torch_order(whole))
        return _window_sums(powers, windows, kernel) ** (1.0 / p)

    return run


def global_lp_pool(node: OpNode) -> Function:
    """Build GlobalLpPool-22: the p-norm of each channel of each sample."""
    p = node.integer("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)


def global_average(x: Tensor) -> Tensor:
    """Return the mean of each channel of each sample: (n, c, ...) -> (n, c, 1, ...)."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max(x: Tensor) -> Tensor:
    """Return the maximum of each channel of each sample: (n, c, ...) -> (n, c, 1, ...)."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _kernel(node: OpNode) -> tuple[int, ...]:
    kernel = tuple(node.integers("kernel_shape") or ())
    if not 1 <= len(kernel) <= 3:
        raise Unsupported(f"{len(kernel)} spatial dimensions, not 1 to 3")
    return kernel


def _torch_pads(windows: Windows, kernel: tuple[int, ...]) -> bool:
    """Say whether torch takes these pads as they are: at most half a window, the same at both ends."""
    return windows.symmetric and all(p <= k // 2 for p, k in zip(windows.pads, kernel + kernel, strict=False))


def _padded_low(x: Tensor, windows: Windows, kernel: tuple[int, ...]) -> Tensor:
    spatial = tuple(x.shape[2:])
    pads = whole_windows(windows, spatial, kernel, pads_for(windows, spatial, kernel))
    return F.pad(x, torch_order(pads), value=-torch.inf)


def _window_sums(x: Tensor, windows: Windows, kernel: tuple[int, ...]) -> Tensor:
    channels = x.shape[1]
    ones = torch.ones((channels, 1, *kernel), dtype=x.dtype, device=x.device)
    return _CONV[x.dim()](x, ones, None, windows.stride, 0, windows.dilation, channels)


def _indices_in_input(indices: Tensor, padded: tuple[int, ...], before: list[int], x: Tensor) -> Tensor:
    """Return positions in one padded image as positions in the whole input `x`, row-major."""
    flat, rest = torch.zeros_like(indices), indices
    size = 1
    for axis in reversed(range(len(padded))):
        flat = flat + (rest % padded[axis] - before[axis]) * size
        rest = rest // padded[axis]
        size *= x.shape[axis + 2]
    images = torch.arange(x.shape[0] * x.shape[1], device=x.device) * size
    return flat + images.reshape(x.shape[0], x.shape[1], *(1,) * len(padded))


OPERATORS: Mapping[str, OpFunction] = MappingProxyType(
    {
        "AveragePool": average_pool,
        "GlobalAveragePool": plain(global_average),
        "GlobalLpPool": global_lp_pool,
        "GlobalMaxPool": plain(global_max),
        "LpPool": lp_pool,
        "MaxPool": max_pool,
    }
)
