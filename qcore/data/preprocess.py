"""What happens to stored values on the way to the model: layout, dtype, normalization."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qcore.data.card import Preprocess
from qcore.errors import DataError

_MOVES = {("NHWC", "NCHW"): (0, 3, 1, 2), ("NCHW", "NHWC"): (0, 2, 3, 1)}


def prepare_arrays(
    x: NDArray[np.generic], steps: Sequence[Preprocess], stored: str, wanted: str
) -> NDArray[np.generic]:
    """Return the samples in the layout and values that the model wants, float32 unless there is nothing to compute.

    Args:
        x: (n, ...) as stored.
        steps: `normalize` and `scale` are applied in order, in float32, along the channel axis of `stored`;
            geometric steps were applied when images were read.
        stored: layout of `x` ("" = unknown).
        wanted: layout of the result.

    Raises:
        DataError: the layouts do not fit the array, or a mean has the wrong number of channels.
    """
    if stored and len(stored) != x.ndim:
        raise DataError(
            f"samples have {x.ndim - 1} dimensions; layout {stored} wants {len(stored) - 1}; correct `layout`"
        )
    channel = stored.find("C") if "C" in stored else x.ndim - 1
    values = x
    for step in steps:
        if step.normalize is not None:
            mean = _per_channel(step.normalize.mean, x, channel)
            values = (values.astype(np.float32) - mean) / _per_channel(step.normalize.std, x, channel)
        elif step.scale is not None:
            values = values.astype(np.float32) * np.float32(step.scale)
    move = _MOVES.get((stored, wanted))
    if move is None:
        if stored != wanted:
            raise DataError(
                f"layout {stored} cannot become {wanted}; allowed: {', '.join('->'.join(m) for m in _MOVES)}"
            )
        return values
    return np.ascontiguousarray(values.transpose(move))


def _per_channel(value: float | tuple[float, ...], x: NDArray[np.generic], channel: int) -> NDArray[np.float32]:
    array = np.asarray(value, np.float32)
    if array.ndim == 0:
        return array
    if array.size != x.shape[channel]:
        raise DataError(f"normalize has {array.size} values; the samples have {x.shape[channel]} channels; correct it")
    shape = [1] * x.ndim
    shape[channel] = -1
    return array.reshape(shape)
