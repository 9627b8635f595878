"""The inputs that single outputs of a convolution see: im2col at sampled positions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """How a 2-D convolution looks at its input: all as in ONNX Conv, `pads` (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)


def windows_at(x: Rows, window: Window, rows: NDArray[np.int64], columns: NDArray[np.int64], groups: int) -> Rows:
    """Return what the outputs at some positions see, as (groups, samples * positions, channels per group * taps).

    Args:
        x: (samples, channels, height, width).
        window: of the convolution.
        rows: (samples, positions) row of each sampled output.
        columns: the same shape, its column.
        groups: of the convolution.
    """
    top, left, bottom, right = window.pads
    padded = np.pad(np.asarray(x), ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = window.kernel
    at_row = rows[:, :, None] * window.strides[0] + np.arange(height) * window.dilations[0]
    at_column = columns[:, :, None] * window.strides[1] + np.arange(width) * window.dilations[1]
    sample = np.arange(len(x))[:, None, None, None]
    seen = padded[sample, :, at_row[:, :, :, None], at_column[:, :, None, :]]  # (n, p, kh, kw, c)
    by_group = seen.reshape(rows.size, height * width, groups, -1)
    result: Rows = np.ascontiguousarray(by_group.transpose(2, 0, 3, 1)).reshape(groups, rows.size, -1)
    return result


def same_pads(size: int, kernel: int, stride: int, dilation: int, *, upper: bool) -> tuple[int, int]:
    """Return the pads before and after one axis with which `ceil(size / stride)` outputs come out.

    Args:
        size: of the input along the axis.
        kernel: taps along the axis.
        stride: of the convolution.
        dilation: distance of taps.
        upper: an odd pad goes to the end (SAME_UPPER), else to the start.

    Source: ONNX Conv-11, attribute auto_pad.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)
