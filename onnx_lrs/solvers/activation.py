"""What stands behind a layer: continuous piecewise linear functions, applied entry by entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
CONTINUOUS = 1e-6  # of the values at a break: how far two pieces may be apart there, for constants in float32


@dataclasses.dataclass(frozen=True)
class Piece:
    """``slope * u + intercept`` for u in [low, high]; the ends may be infinite."""

    low: float
    high: float
    slope: float
    intercept: float


@dataclasses.dataclass(frozen=True)
class Activation:
    """A continuous piecewise linear function phi of one number.

    Parameters
    ----------
    name : str
        What a report calls it: "linear", "relu", "clip" or "leaky-relu".
    breaks : tuple of float
        Where one piece ends and the next begins, rising.
    slopes, intercepts : tuple of float
        One more than ``breaks``: phi(u) = slopes[i] * u + intercepts[i] between breaks[i - 1] and breaks[i].
    """

    name: str
    breaks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = (1.0,)
    intercepts: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not len(self.slopes) == len(self.intercepts) == len(self.breaks) + 1:
            raise ValueError(f"{len(self.breaks)} breaks need one more slope and one more intercept")
        if not all(map(math.isfinite, (*self.breaks, *self.slopes, *self.intercepts))):
            raise ValueError("breaks, slopes and intercepts of an activation must be finite")
        if any(b <= a for a, b in zip(self.breaks, self.breaks[1:], strict=False)):
            raise ValueError("the breaks of an activation must rise")
        lines = list(zip(self.slopes, self.intercepts, strict=True))
        for at, (slope, intercept), (other, level) in zip(self.breaks, lines, lines[1:], strict=False):
            ends = slope * at + intercept, other * at + level
            if abs(ends[0] - ends[1]) > CONTINUOUS * max(abs(slope * at), abs(other * at), *map(abs, ends), 1e-30):
                raise ValueError(f"the pieces of an activation do not meet at {at}")

    def __call__(self, values: Floats) -> Floats:
        """Return phi of the values, any shape and float type, kept; the values themselves where phi is the identity."""
        if self.slopes == (1.0,) and self.intercepts == (0.0,):
            return values
        limits = self._limits()
        if limits is not None:
            low, high = limits
            return np.maximum(values, low) if high == np.inf else np.clip(values, low, high)
        pieces = list(self.pieces())
        result = on_piece(values, pieces[0])
        for piece in pieces[1:]:
            result = np.where(values > piece.low, on_piece(values, piece), result)
        return result

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces from left to right."""
        yield from map(Piece, (-np.inf, *self.breaks), (*self.breaks, np.inf), self.slopes, self.intercepts)

    def _limits(self) -> tuple[float, float] | None:
        """Return (low, high) where phi is ``min(max(u, low), high)``, else None."""
        middle = 1 if self.slopes[0] == 0.0 else 0
        if self.slopes not in ((0.0, 1.0), (1.0, 0.0), (0.0, 1.0, 0.0)) or self.intercepts[middle] != 0.0:
            return None
        low = self.breaks[0] if middle else -np.inf
        return low, self.breaks[middle] if middle < len(self.breaks) else np.inf


def on_piece(values: Floats, piece: Piece) -> Floats:
    """Return the line of a piece at the values, in their type; no work for slopes and intercepts of 0 and 1."""
    kind = values.dtype.type
    if piece.slope == 0.0:
        return np.full_like(values, piece.intercept)
    sloped = values if piece.slope == 1.0 else values * kind(piece.slope)
    return sloped + kind(piece.intercept) if piece.intercept else sloped


LINEAR = Activation("linear")
RELU = Activation("relu", (0.0,), (0.0, 1.0), (0.0, 0.0))


def named(activation: Activation | str) -> Activation:
    """Return the activation itself, or the one called "linear" or "relu".

    Raises
    ------
    ValueError
        For any other name.
    """
    if isinstance(activation, Activation):
        return activation
    for known in (LINEAR, RELU):
        if known.name == activation:
            return known
    raise ValueError(f"activation {activation!r}: only 'linear' and 'relu' go by their names")


def clip(low: float, high: float) -> Activation:
    """Return ``min(max(u, low), high)``, either of which may be infinite: RELU for (0, inf), LINEAR without limits.

    Raises
    ------
    ValueError
        If ``low`` is above ``high``, or no number lies between them.
    """
    if not low <= high or low == np.inf or high == -np.inf:
        raise ValueError(f"no number lies between the limits {low} and {high}")
    if low == high:
        return Activation("clip", (), (0.0,), (float(low),))
    if high == np.inf:
        if low in (0.0, -np.inf):
            return RELU if low == 0.0 else LINEAR
        return Activation("clip", (float(low),), (0.0, 1.0), (float(low), 0.0))
    if low == -np.inf:
        return Activation("clip", (float(high),), (1.0, 0.0), (0.0, float(high)))
    return Activation("clip", (float(low), float(high)), (0.0, 1.0, 0.0), (float(low), 0.0, float(high)))


def leaky_relu(slope: float) -> Activation:
    """Return u where it is positive, ``slope * u`` elsewhere: RELU for a slope of 0, LINEAR for 1.

    Raises
    ------
    ValueError
        If the slope is negative (the function would not be monotone) or not finite.
    """
    if not 0 <= slope < np.inf:
        raise ValueError(f"the slope must be a number from 0 on, not {slope}")
    if slope in (0.0, 1.0):
        return LINEAR if slope else RELU
    return Activation("leaky-relu", (0.0,), (float(slope), 1.0), (0.0, 0.0))
