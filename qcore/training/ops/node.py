"""What an operator function gets to see: one node, when the program is built.

An operator function takes an `OpNode` and returns the function that runs it: `(tensors) -> tensor or tuple of tensors`.
It looks at attributes once, there, and raises `Unsupported` for what it cannot do, before any work. The function that
it returns gets one argument for each input: a tensor; None where the input is absent; and for *settings* (see
`SETTINGS` in `qcore.training.ops`: shapes, axes, pads) the Python numbers or lists of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qcore.training.tensors import TORCH_TYPES

Function = Callable[..., torch.Tensor]  # or a tuple of tensors, where the node has several outputs
OpFunction = Callable[["OpNode"], Function]


class Unsupported(Exception):  # noqa: N818 - it becomes a line in a refusal, never an error of its own
    """The node asks for something that its operator function does not do; the text says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpInput:
    """An input that is there: its element type, if known, and its value on the CPU, if it can never change."""

    dtype: ir.DataType | None = None
    constant: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpNode:
    """A node with the version of its operators.

    `outputs` says for each output whether anything reads it. `carries_integers` is False where all readers of the
    first output dequantize it, so that it may stay a float tensor of whole numbers, which has a gradient.
    `may_overwrite` is True where nothing else, not even a gradient, needs the first input any more.
    `batch_statistics` and `dropout` say what BatchNormalization and Dropout do in this program.
    """

    op_type: str
    opset: int
    attributes: Mapping[str, ir.Attr]
    inputs: tuple[OpInput | None, ...]
    outputs: tuple[bool, ...]
    carries_integers: bool = True
    may_overwrite: bool = False
    batch_statistics: bool = False
    dropout: bool = False

    def integer(self, name: str, default: int = 0) -> int:
        """Return the integer attribute `name`, or `default` where it is absent."""
        found = self.attributes.get(name)
        return default if found is None else found.as_int()

    def real(self, name: str, default: float) -> float:
        """Return the float attribute `name`, or `default` where it is absent."""
        found = self.attributes.get(name)
        return default if found is None else found.as_float()

    def integers(self, name: str) -> list[int] | None:
        """Return the list of integers in the attribute `name`, or None where it is absent."""
        found = self.attributes.get(name)
        return None if found is None else list(found.as_ints())

    def text(self, name: str, default: str) -> str:
        """Return the string attribute `name`, or `default` where it is absent."""
        found = self.attributes.get(name)
        return default if found is None else found.as_string()

    def texts(self, name: str) -> list[str]:
        """Return the list of strings in the attribute `name`, empty where it is absent."""
        found = self.attributes.get(name)
        return [] if found is None else list(found.as_strings())

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return the string attribute `name`; the first of `allowed` is its default.

        Raises:
            Unsupported: it is not in `allowed`.
        """
        found = self.text(name, allowed[0])
        if found not in allowed:
            raise Unsupported(f"{name} {found!r}, not one of {', '.join(allowed)}")
        return found

    def has(self, index: int) -> bool:
        """Say whether the input `index` is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input_type(self, index: int) -> ir.DataType | None:
        """Return the element type of the input `index`, or None where it is absent or not known."""
        found = self.inputs[index] if index < len(self.inputs) else None
        return None if found is None else found.dtype

    def constant(self, index: int) -> torch.Tensor | None:
        """Return the value of the input `index`, or None where it is absent or not a constant."""
        found = self.inputs[index] if index < len(self.inputs) else None
        return None if found is None else found.constant

    def wants(self, index: int) -> bool:
        """Say whether anything reads the output `index`."""
        return index < len(self.outputs) and self.outputs[index]


def carrier(dtype: ir.DataType) -> torch.dtype:
    """Return the torch type that carries `dtype`.

    Raises:
        Unsupported: there is none.
    """
    if dtype not in TORCH_TYPES:
        raise Unsupported(f"element type {dtype.name}")
    return TORCH_TYPES[dtype]


def number(setting: list[float] | float) -> float:
    """Return the one number in `setting`, which exporters write as a scalar or as a list of length 1."""
    return setting[0] if isinstance(setting, list) else setting
