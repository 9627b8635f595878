"""Structure of weights that training must not undo: zeros stay zero, shared values stay shared.

Both are functions between the tensor that the optimizer moves and the one that the graph reads, so gradients follow
by themselves: none to a zero, and to a shared value the sum over all who share it.

Source: Han et al. 2016 (arXiv 1510.00149) section 3 for shared values; collaborative optimization as in the field's
PQAT, CQAT and PCQAT.
"""

import numpy as np
import torch
from numpy.typing import NDArray

MOST_VALUES = 256
"""Weights of so many different values or fewer share them."""
_FEWEST_PER_VALUE = 4
_ZEROS = 0.1  # share of exact zeros from which on they are meant


class KeptZeros(torch.nn.Module):
    """Multiplies by a mask."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """`mask` is True where a weight may be other than zero."""
        super().__init__()
        self.register_buffer("mask", torch.from_numpy(np.asarray(mask, np.float32)))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Return `w` with zeros where the mask has them."""
        return w * self.mask


class KeptClusters(torch.nn.Module):
    """Gives every weight the mean of those that share its value: they move together."""

    def __init__(self, w: NDArray[np.floating]) -> None:
        """Weights of `w` that are equal now stay equal; zero stays zero."""
        super().__init__()
        values, members = np.unique(w, return_inverse=True)
        counts = np.bincount(members.reshape(-1), minlength=values.size)
        self.register_buffer("members", torch.from_numpy(members.reshape(-1).astype(np.int64)))
        weight = np.where(values == 0, 0.0, 1.0 / counts).astype(np.float32)
        self.register_buffer("weight", torch.from_numpy(weight))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Return the shared values, shape of `w`."""
        flat = w.reshape(-1)
        sums = torch.zeros_like(self.weight).index_add(0, self.members, flat)
        return (sums * self.weight)[self.members].reshape(w.shape)


def kept_structure(w: NDArray[np.floating], *, zeros: bool, clusters: bool) -> tuple[torch.nn.Module, ...]:
    """Return what keeps the structure that `w` has: nothing for weights that have none.

    Args:
        w: weights, any shape.
        zeros: whether exact zeros, if at least a tenth of all, are kept.
        clusters: whether weights of at most 256 different values, four or more of each on average, share them.
    """
    values = np.unique(w)
    if clusters and values.size <= MOST_VALUES and w.size >= _FEWEST_PER_VALUE * values.size:
        return (KeptClusters(w),)
    if zeros and np.mean(w == 0) >= _ZEROS:
        return (KeptZeros(w != 0),)
    return ()
