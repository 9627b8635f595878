"""Several batches in several models at once, answers in order: how a split is evaluated on all cores.

One thread a model and batch keeps cores busy where layers are too small to be split among them, and gives the same
numbers on any number of cores up to `MOST_RUNS`. Memory holds a few batches, however many there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qcore.machine import cores

Array = NDArray[np.generic]
Tensors = Mapping[str, Array]
Predict = Callable[[Tensors], Mapping[str, Array]]
Fed = tuple[NDArray[np.int64], Tensors, Array | None]

MOST_RUNS = 8
"""So many runs at once hold the activations of so many batches."""


def runs_at_once() -> int:
    """Return how many runs fit on this machine."""
    return min(cores(), MOST_RUNS)


def threads_of_a_run() -> int:
    """Return how many threads each of them should have."""
    return max(1, cores() // MOST_RUNS)


def run_ahead(
    pool: ThreadPoolExecutor, models: Sequence[Predict], batches: Iterable[Fed]
) -> tuple[Iterator[Fed], tuple[Predict, ...]]:
    """Return `batches` again, and each of `models` as a function that already has its answer to the batch at hand.

    Such a function does not look at its argument. It raises what the model raises. While one batch is looked at,
    the next ones are read and run.

    Args:
        pool: where models run; for as long as batches are read.
        models: that several threads may call at once.
        batches: sample numbers, inputs and truth of each.
    """
    answers: list[Future[Mapping[str, Array]]] = []

    def ahead() -> Iterator[Fed]:
        waiting: deque[tuple[Fed, list[Future[Mapping[str, Array]]]]] = deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(model, batch[1]) for model in models]))
            if len(waiting) > 2 * runs_at_once():
                yield from taken(waiting.popleft())
        while waiting:
            yield from taken(waiting.popleft())

    def taken(ready: tuple[Fed, list[Future[Mapping[str, Array]]]]) -> Iterator[Fed]:
        answers[:] = ready[1]
        yield ready[0]

    def answer_of(k: int) -> Predict:
        return lambda fed: answers[k].result()

    return ahead(), tuple(answer_of(k) for k in range(len(models)))
