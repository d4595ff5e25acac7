"""First and second moments of im2col columns, as values: accumulate, merge.

Batches are centred on their own mean before the float32 product and merged in float64 by the pairwise formula of
Chan, Golub and LeVeque (1979), so a large common mean (post-ReLU features) costs no digits.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FLUSH_ROWS = (
    2048  # rows gathered before one product: below that the float64 addition of d x d costs more than the product
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of ``count`` columns, float64; the covariance divides by ``count``."""

    count: int
    mean: Array
    cov: Array

    def second(self, affine: bool) -> Array:
        """Return the (d, d) metric of the objective: covariance if a bias absorbs the mean, else E[x x^T]."""
        return self.cov if affine else self.cov + np.outer(self.mean, self.mean)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets of columns."""
    n = a.count + b.count
    delta = b.mean - a.mean
    cov = a.cov * (a.count / n)
    cov += b.cov * (b.count / n)
    cov += np.outer(delta, delta) * (a.count * b.count / n**2)
    return Moments(n, a.mean + delta * (b.count / n), cov)


class Accumulator:
    """Streams columns into :class:`Moments`, and with ``out`` their responses into a covariance of the two.

    Holds one d x d and one out x d matrix and ``FLUSH_ROWS`` + one batch of columns and responses.
    """

    def __init__(self, d: int, out: int = 0) -> None:
        self._count = 0
        self._mean, self._mean_y = np.zeros(d), np.zeros(out)
        self._scatter, self._cross = np.zeros((d, d)), np.zeros((out, d))
        self._pending: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self._rows = 0

    def add(self, columns: NDArray[np.float32], responses: NDArray[np.float32] | None = None) -> None:
        """Take in columns (n, d) and, where they are wanted, responses (n, out), float32."""
        if responses is None:
            responses = np.zeros((len(columns), 0), np.float32)
        self._pending.append((columns, responses))
        self._rows += len(columns)
        if self._rows >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        x, mean = _centred([columns for columns, _ in self._pending])
        y, mean_y = _centred([responses for _, responses in self._pending])
        n, total = len(x), self._count + len(x)
        self._pending, self._rows = [], 0
        delta, delta_y = mean - self._mean, mean_y - self._mean_y
        self._scatter += x.T @ x  # syrk inside NumPy
        if len(delta_y):
            self._cross += y.T @ x
        if self._count:
            self._scatter += np.outer(delta, delta * (self._count * n / total))
            self._cross += np.outer(delta_y, delta * (self._count * n / total))
        self._mean += delta * (n / total)
        self._mean_y += delta_y * (n / total)
        self._count = total

    def moments(self) -> Moments:
        """Return the moments of everything added, and give up the matrix (the accumulator is spent).

        Raises
        ------
        ValueError
            If nothing was added.
        """
        return self.paired()[0]

    def paired(self) -> tuple[Moments, Array, Array]:
        """Return the moments, the mean response (out,) and the covariance of response and columns (out, d).

        Gives up the matrices (the accumulator is spent).

        Raises
        ------
        ValueError
            If nothing was added.
        """
        self._flush()
        if not self._count:
            raise ValueError("no columns were added")
        self._scatter /= self._count
        self._cross /= self._count
        found = Moments(self._count, self._mean, self._scatter), self._mean_y, self._cross
        self._count, self._scatter, self._cross = 0, np.zeros((0, 0)), np.zeros((0, 0))
        return found


def _centred(parts: list[NDArray[np.float32]]) -> tuple[NDArray[np.float32], Array]:
    """Return the rows of all parts less their float32 mean, and the mean that they really have, float64."""
    x = parts[0] if len(parts) == 1 else np.concatenate(parts)
    mean = x.mean(axis=0, dtype=np.float64)
    x = x - mean.astype(np.float32)
    # centring in float32 leaves a mean of about 1e-8; the scatter is about that point, which is what delta measures
    return x, mean.astype(np.float32).astype(np.float64) + x.mean(axis=0, dtype=np.float64)


def moments_of(columns: NDArray[np.float32]) -> Moments:
    """Return the moments of columns (n, d) float32, ``FLUSH_ROWS`` of them at a time."""
    sums = Accumulator(columns.shape[1])
    for start in range(0, len(columns), FLUSH_ROWS):
        sums.add(columns[start : start + FLUSH_ROWS])
    return sums.moments()


def permuted(m: Moments, order: NDArray[np.int64]) -> Moments:
    """Return the moments of the same columns with their entries taken in another order."""
    return Moments(m.count, m.mean[order], m.cov[np.ix_(order, order)])
