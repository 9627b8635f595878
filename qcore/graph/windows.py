"""How a Conv node looks at its input, read from its attributes."""

import onnx_ir as ir

from qcore.graph.traverse import auto_pad, ints_attribute
from qcore.numerics.windows import Window, same_pads


def window_of(node: ir.Node, kernel: tuple[int, ...], size: tuple[int, int]) -> Window:
    """Return how the convolution `node` looks at a plane; a signal in one dimension is a plane of height 1.

    Args:
        node: a Conv in one or two dimensions.
        kernel: taps along each axis.
        size: (height, width) of the input.
    """
    flat = len(kernel) == 1
    taps = (1, kernel[0]) if flat else (kernel[0], kernel[1])
    strides, dilations = (_pair(ints_attribute(node, name)) for name in ("strides", "dilations"))
    mode = auto_pad(node)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        (top, bottom), (left, right) = (
            same_pads(*axis, upper=mode == "SAME_UPPER") for axis in zip(size, taps, strides, dilations, strict=True)
        )
    else:
        pads = ints_attribute(node, "pads") if mode == "NOTSET" else ()
        top, left, bottom, right = (0, pads[0], 0, pads[1]) if flat and pads else pads or (0, 0, 0, 0)
    return Window(kernel=taps, strides=strides, pads=(top, left, bottom, right), dilations=dilations)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    """Return what a convolution says of its axes as (vertical, horizontal); it may say nothing, or have one axis."""
    vertical, horizontal = (1, 1, *values)[-2:]
    return vertical, horizontal
