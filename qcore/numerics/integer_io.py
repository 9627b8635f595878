"""Which integers a model takes and gives for real numbers, as its metadata say.

Apart from the graph edits that make them: who only runs a model need not import what edits graphs (40 MiB).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from qcore.numerics.affine import IntDtype, Levels, QParams, QScheme

INTEGER_IO_KEY = "qcore.integer_io"


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerIO:
    """The affine parameters of the integer inputs and outputs of a model, by name; empty where all are float."""

    inputs: Mapping[str, QParams]
    outputs: Mapping[str, QParams]


def read_integer_io(metadata: Mapping[str, str]) -> IntegerIO:
    """Return what `graph.integer_io.to_integer_io` wrote into a model's metadata.

    Raises:
        ValueError: the entry is damaged.
    """
    if INTEGER_IO_KEY not in metadata:
        return IntegerIO(inputs={}, outputs={})
    try:
        found = json.loads(metadata[INTEGER_IO_KEY])
        inputs, outputs = ({name: _read(p) for name, p in found[side].items()} for side in ("inputs", "outputs"))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"metadata {INTEGER_IO_KEY} is damaged ({e})") from e
    return IntegerIO(inputs=inputs, outputs=outputs)


def _read(parameters: Mapping[str, object]) -> QParams:
    dtype = cast(IntDtype, parameters["dtype"])
    low, high = QScheme(dtype=cast(Levels, parameters["dtype"])).levels
    return QParams(
        scale=np.array(parameters["scale"], np.float32),
        zero_point=np.array(parameters["zero_point"], np.int32),
        dtype=dtype,
        qmin=low,
        qmax=high,
    )
