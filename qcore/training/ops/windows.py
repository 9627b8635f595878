"""Where the windows of convolutions and poolings lie: kernel, strides, dilations and pads."""

import math
from dataclasses import dataclass

from qcore.training.ops.node import OpNode

Pads = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """The window attributes of one node, for any number of spatial axes; an empty list stands for the default."""

    auto_pad: str
    pads: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    ceil: bool

    @property
    def symmetric(self) -> bool:
        """Whether the pads are given and equal before and behind each axis, so that torch can apply them."""
        half = len(self.pads) // 2
        return self.auto_pad in ("NOTSET", "VALID") and self.pads[:half] == self.pads[half:]

    @property
    def padding(self) -> tuple[int, ...] | int:
        """The pads of `symmetric` windows in torch's form."""
        return self.pads[: len(self.pads) // 2] or 0

    @property
    def stride(self) -> tuple[int, ...] | int:
        """The strides in torch's form."""
        return self.strides or 1

    @property
    def dilation(self) -> tuple[int, ...] | int:
        """The dilations in torch's form."""
        return self.dilations or 1


def windows_of(node: OpNode) -> Windows:
    """Return the window attributes of `node`.

    Raises:
        Unsupported: `auto_pad` is not one that ONNX knows.
    """
    auto_pad = node.choice("auto_pad", ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
    return Windows(
        auto_pad=auto_pad,
        pads=tuple(node.integers("pads") or ()) if auto_pad == "NOTSET" else (),
        strides=tuple(node.integers("strides") or ()),
        dilations=tuple(node.integers("dilations") or ()),
        ceil=bool(node.integer("ceil_mode")),
    )


def pads_for(windows: Windows, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> Pads:
    """Return the pads before and behind each axis of an input with sides `spatial` under windows `kernel`.

    Source: ONNX Conv-22, attribute auto_pad.
    """
    n = len(spatial)
    if windows.auto_pad == "VALID" or (windows.auto_pad == "NOTSET" and not windows.pads):
        return [(0, 0)] * n
    if windows.auto_pad == "NOTSET":
        return list(zip(windows.pads[:n], windows.pads[n:], strict=True))
    pads = []
    for side, reach, stride in zip(spatial, reaches(windows, kernel), windows.strides or (1,) * n, strict=True):
        total = max((math.ceil(side / stride) - 1) * stride + reach - side, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if windows.auto_pad == "SAME_UPPER" else (large, small))
    return pads


def reaches(windows: Windows, kernel: tuple[int, ...]) -> list[int]:
    """Return how many elements each side of a dilated window spans."""
    return [(k - 1) * d + 1 for k, d in zip(kernel, windows.dilations or (1,) * len(kernel), strict=True)]


def whole_windows(windows: Windows, spatial: tuple[int, ...], kernel: tuple[int, ...], pads: Pads) -> Pads:
    """Return pads like `pads`, with the last one of each axis changed so that the windows end exactly at its end.

    Windows that would start behind the padded input are left out (ONNX MaxPool-22).
    """
    exact = []
    sides = zip(spatial, reaches(windows, kernel), windows.strides or (1,) * len(spatial), pads, strict=True)
    for side, reach, stride, (before, behind) in sides:
        steps = (before + side + behind - reach) / stride
        count = (math.ceil(steps) if windows.ceil else math.floor(steps)) + 1
        if windows.ceil and (count - 1) * stride >= side + before:
            count -= 1
        exact.append((before, (count - 1) * stride + reach - before - side))
    return exact


def torch_order(pads: Pads) -> list[int]:
    """Return `pads` as torch.nn.functional.pad wants them: last axis first."""
    return [amount for pair in reversed(pads) for amount in pair]
