r"""Proximal maps and projections, each a pure function of arrays.

``prox_f(x) = argmin_z f(z) + 1/2 ||z - x||^2``; a projection is the map of an indicator function. All of them are
non-expansive but :func:`largest` and :func:`through`, whose sets or losses are not convex.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.solvers.activation import Activation, Piece, on_piece
from onnx_lrs.solvers.problem import Array

Floats = NDArray[np.floating[Any]]  # what comes in as float32 goes out as float32
Mask = NDArray[np.bool_]


def soft(x: Floats, threshold: float) -> Floats:
    """Return the map of ``threshold * ||x||_1``: entries shrunk toward zero; any shape."""
    shrunk: Floats = np.sign(x) * np.maximum(np.abs(x) - x.dtype.type(threshold), 0)
    return shrunk


def group_norms(x: Floats, taps: int) -> Floats:
    """Return the Frobenius norm of each channel's columns; x (out, channels * taps), result (channels,)."""
    squares = np.einsum("md,md->d", x, x)
    norms: Floats = np.sqrt(squares.reshape(-1, taps).sum(axis=1))
    return norms


def group_soft(x: Floats, threshold: float, taps: int) -> Floats:
    """Return the map of ``threshold * sum_g ||x_g||_F``: channels shrunk toward zero; x (out, channels * taps)."""
    norms = group_norms(x, taps)
    kept = np.maximum(norms - x.dtype.type(threshold), 0) / np.maximum(norms, np.finfo(x.dtype).tiny)
    shrunk: Floats = x * np.repeat(kept, taps)[None, :]
    return shrunk


def singular_soft(x: Floats, threshold: float) -> tuple[Floats, Floats]:
    """Return the map of ``threshold * ||x||_*`` and the singular values that are left, falling.

    By the eigenvectors of the smaller Gram matrix, so values below about 1e-8 (float32: 1e-3) of the largest are not
    resolved; they are the ones a threshold removes.
    """
    if x.shape[0] > x.shape[1]:
        found, values = singular_soft(np.ascontiguousarray(x.T), threshold)
        return np.ascontiguousarray(found.T), values
    squares, vectors = np.linalg.eigh(x @ x.T)
    values = np.sqrt(np.maximum(squares, 0))
    left = np.maximum(values - x.dtype.type(threshold), 0)
    kept = left > 0
    basis = vectors[:, kept]
    return (basis * (left[kept] / values[kept])) @ (basis.T @ x), left[kept][::-1]


def to_ball(x: Floats, centre: Floats, radius: float) -> Floats:
    """Return the projection onto ``||x - centre||_F <= radius``; any shape."""
    difference = x - centre
    distance = float(np.linalg.norm(difference))
    return x if distance <= radius else centre + difference * x.dtype.type(radius / distance)


def below(x: Floats, limit: Floats | float) -> Floats:
    """Return the projection onto ``x <= limit``, entry by entry."""
    return np.minimum(x, limit)


def largest(scores: Array, count: int) -> Mask:
    """Return where the ``count`` largest scores stand; of equal ones the earlier. Any shape, bool."""
    flat = scores.ravel()
    chosen = np.zeros(flat.size, bool)
    if count >= flat.size:
        chosen[:] = True
    elif count > 0:
        bar = np.partition(flat, flat.size - count)[flat.size - count]
        chosen[flat > bar] = True
        chosen[np.flatnonzero(flat == bar)[: count - int(chosen.sum())]] = True
    return chosen.reshape(scores.shape)


def through(v: Floats, a: Floats, rho: float, activation: Activation) -> Floats:
    """Return ``argmin_z (a - phi(z))^2 + rho (z - v)^2``, entry by entry (METHODS 5, our derivation).

    On a piece of phi the cost is a parabola, whose least point, a ridge average of a and v, moves to the nearer end
    where it lies outside; the cheapest piece wins, of equally cheap ones the rightmost. ``rho`` > 0, any shape.
    """
    last, *others = reversed(list(activation.pieces()))
    best = _on_piece(v, a, rho, last)
    cost = _cost(v, a, rho, last, best) if others else best
    for number, piece in enumerate(others, 1):
        found = _on_piece(v, a, rho, piece)
        own = _cost(v, a, rho, piece, found)
        best = np.where(cost <= own, best, found)
        cost = np.minimum(cost, own) if number < len(others) else cost
    return best


def _on_piece(v: Floats, a: Floats, rho: float, piece: Piece) -> Floats:
    """Return the cheapest z on one piece."""
    if piece.slope == 0.0:
        return _between(v, piece)
    kind, slope = v.dtype.type, piece.slope
    pulled = a - kind(piece.intercept) if piece.intercept else a
    pulled = pulled if slope == 1.0 else pulled * kind(slope)
    average = kind(rho) * v
    average += pulled
    average /= kind(slope * slope) + kind(rho)
    return _between(average, piece)


def _between(z: Floats, piece: Piece) -> Floats:
    low, high = piece.low, piece.high
    if high == np.inf:
        return z if low == -np.inf else np.maximum(z, low)
    return np.minimum(z, high) if low == -np.inf else np.clip(z, low, high)


def _cost(v: Floats, a: Floats, rho: float, piece: Piece, z: Floats) -> Floats:
    missed = a - (v.dtype.type(piece.intercept) if piece.slope == 0.0 else on_piece(z, piece))
    np.square(missed, out=missed)
    moved = z - v
    np.square(moved, out=moved)
    moved *= v.dtype.type(rho)
    missed += moved
    return missed
