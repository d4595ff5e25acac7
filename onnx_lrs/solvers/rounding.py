r"""What eight bits make of a pair of weights and of the tensor between them, and the basis in which they make least.

Between two linear maps the basis is free: :math:`B A x = (B T^{-1}) (T A) x`. Integers have one step for the whole
tensor between them, :math:`\Delta_z` = its span / 255, and one for each row of a weight, its largest entry / 127; an
entry is off by :math:`\Delta^2 / 12` in the mean square. What reaches the output is then

.. math:: \frac{\Delta_z^2}{12} \|B'\|_F^2 + E\|z'\|^2 t \sum_o \frac{\Delta_o^2}{12}
          + E\|x\|^2 \sum_j \frac{\Delta_j^2}{12} \|B'_{\cdot j}\|^2

with :math:`t` taps of the second kernel. Scaling makes the channels of z alike (cross-layer equalisation, Nagel et al.
2019), a rotation spreads what is large in few channels over all of them (as QuaRot, Ashkboos et al. 2024, does between
blocks of a transformer).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVELS, LARGEST = 255, 127  # steps of an activation, largest integer of a weight
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the whitening
FLOOR = 1e-7  # of the largest variance: below it a direction is as good as absent


def rounded(weight: NDArray[np.floating], axis: int | None) -> Floats:
    """Return a weight as symmetric INT8 has it, one step for each index of ``axis`` (None: one for all).

    Parameters
    ----------
    weight : ndarray of float
    axis : int or None

    Returns
    -------
    ndarray of float64, of the same shape
    """
    values = np.asarray(weight, np.float64)
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
    step = np.abs(values).max(axis=others, keepdims=True, initial=0.0) / LARGEST
    step = np.where(step > 0, step, 1.0)
    return np.asarray(np.clip(np.rint(values / step), -LARGEST, LARGEST) * step)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two maps with a basis between them that is free.

    Parameters
    ----------
    between : ndarray of float64, shape (samples, r)
        The tensor between them.
    first : ndarray of float64, shape (r, d)
    second : ndarray of float64, shape (out, r, t)
    energy : float
        Mean of ||x||^2 over the columns that the first one multiplies with.
    """

    between: Floats
    first: Floats
    second: Floats
    energy: float

    def noise(self, turn: Floats) -> float:
        """Return what rounding adds to the mean square of the output in the basis that ``turn`` (r, r) makes."""
        z, first = self.between @ turn.T, turn @ self.first
        second = np.einsum("ort,rs->ost", self.second, np.linalg.inv(turn))
        span = max(float(z.max()), 0.0) - min(float(z.min()), 0.0)
        steps_out = np.abs(second).max(axis=(1, 2)) / LARGEST
        steps_in = np.abs(first).max(axis=1) / LARGEST
        size = float(np.square(z).sum(axis=1).mean()) * second.shape[2]
        columns = np.square(second).sum(axis=(0, 2))
        of_tensor = (span / LEVELS) ** 2 * float(columns.sum())
        of_weights = size * float(np.square(steps_out).sum()) + self.energy * float(np.square(steps_in) @ columns)
        return float(of_tensor + of_weights) / 12.0


def best_turn(pair: Pair) -> tuple[Floats | None, float, float]:
    """Return the basis in which rounding makes least, None where that is the given one; its noise, and the given one's.

    Tried are scales alone (equal ranges, equal variances), and the principal axes with their variances made more or
    less alike, as they are and spread by a cosine transform, which is orthogonal and has no large entries.
    """
    rank = pair.between.shape[1]
    given = pair.noise(np.eye(rank))
    best: Floats | None = None
    least = given
    for turn in _turns(pair.between):
        noise = pair.noise(turn)
        if np.isfinite(noise) and noise < least:
            best, least = turn, noise
    return best, least, given


def _turns(between: Floats) -> list[Floats]:
    """Return the bases that are tried, (r, r) each."""
    rank = between.shape[1]
    second = between.T @ between / len(between)
    ranges = np.abs(between).max(axis=0)
    scales = [ranges, np.sqrt(np.diag(second))]
    found = [np.diag(1.0 / np.maximum(scale, FLOOR**0.5 * scale.max(initial=1e-30))) for scale in scales]
    values, axes = np.linalg.eigh(second)
    values = np.maximum(values, FLOOR * max(float(values[-1]), 1e-30))
    spread = scipy.fft.dct(np.eye(rank), norm="ortho", axis=0)
    for power in POWERS:
        principal = (axes * values ** (-power / 2)).T
        found += [principal, spread @ principal]
    return found
