"""A bounded uniform sample of a layer's columns, taken while they stream by.

Every column that enters the moments gets a random priority, and the columns of the smallest priorities stay. A priority
is drawn from (seed, item) alone, so the sample depends neither on batches nor on other layers, and layers with equally
many columns an item keep those of the same items: a smaller reservoir holds the first rows of a larger one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STREAM = 1  # sets the priorities of an item apart from the numbers that draw its positions


class Reservoir:
    """Keeps the columns of the ``rows`` smallest priorities of all that were added; 4 * rows * d bytes."""

    def __init__(self, rows: int, d: int) -> None:
        self._columns = np.empty((rows, d), np.float32)
        self._priorities = np.full(rows, np.inf)  # of an empty place: any column is better
        self._items = np.full(rows, -1, np.int64)

    def add(
        self,
        columns: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        priorities: NDArray[np.float64],
        items: NDArray[np.int64],
    ) -> None:
        """Take in columns (n, d), float32, each with its priority (n,) and the item it comes from (n,).

        A sequence of arrays (n, d_1), (n, d_2), ... stands for the wider one that they make side by side.
        """
        places = len(self._priorities)
        best = np.argpartition(np.concatenate([self._priorities, priorities]), places - 1)[:places]
        incoming = np.sort(best[best >= places]) - places
        stays = np.zeros(places, bool)
        stays[best[best < places]] = True
        free = np.flatnonzero(~stays)
        start = 0
        for part in [columns] if isinstance(columns, np.ndarray) else columns:
            self._columns[free, start : start + part.shape[1]] = part[incoming]
            start += part.shape[1]
        self._priorities[free] = priorities[incoming]
        self._items[free] = items[incoming]

    def sample(self, order: NDArray[np.int64] | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the columns (n, d), by rising priority, and their items (n,); gives up the buffer.

        ``order`` permutes the entries of the columns. The order of the rows is random with respect to the data, so any
        prefix is a uniform sample as well.
        """
        rows = np.argsort(self._priorities, kind="stable")[: np.isfinite(self._priorities).sum()]
        columns = self._columns[rows] if order is None else self._columns[np.ix_(rows, order)]
        self._columns = self._columns[:0]
        return columns, self._items[rows]


@functools.lru_cache(maxsize=8)  # the layers of one call ask for the same few
def lots(seed: int, items: tuple[int, ...], counts: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the priorities in [0, 1) of ``counts[j]`` columns of each item, one item after the other, and the items.

    Of two counts the smaller one gets the first numbers of the larger one.
    """
    drawn = [
        np.random.default_rng([seed, item, STREAM]).random(count) for item, count in zip(items, counts, strict=True)
    ]
    return np.concatenate(drawn), np.repeat(np.array(items, np.int64), counts)
