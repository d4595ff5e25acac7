r"""Which input channels to keep: backward elimination with exact scores (our derivation).

With K the kept columns, P = H_KK^{-1} and E = T H[:, K] P the least-squares weights on K, removing the columns g of one
channel raises the objective by exactly

.. math:: \mathrm{tr}\,(E_g P_{gg}^{-1} E_g^T),

and afterwards ``E <- E - E_g P_gg^{-1} P_g.`` and ``P <- P - P_.g P_gg^{-1} P_g.`` (block inverse formula).
A dead channel has a zero row in H, hence a score of zero (up to the damping), and goes first.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lrs.solvers.problem import Array, Indices, columns_of

COMPACT = 0.75  # of the columns still alive: then the arrays are cut down; each cut is a copy of d x d
SHARE = 32  # a round drops one channel in 32: scores are exact for one removal, so small rounds keep them honest


def eliminate(target: Array, metric: Array, taps: int, share: int = SHARE) -> Indices:
    """Return all channel numbers, the most useful first; the first k are the support of size k.

    Parameters
    ----------
    target : ndarray, shape (m, d)
        The matrix to explain from few channels.
    metric : ndarray, shape (d, d)
        Damped, positive definite second moments.
    taps : int
        Columns per channel.
    share : int
        A round drops one channel in so many: fewer are faster and less exact.
    """
    alive = np.arange(target.shape[1] // taps)
    place = alive.copy()  # where each living channel stands in `inverse` and `weights`
    inverse = _lower_inverse(metric)
    weights = target.copy()
    dropped: list[Indices] = []
    while len(alive) > 1:
        scores = removal_scores(weights, inverse, taps)[place]
        count = max(1, len(alive) // share)
        ranking = np.argsort(scores, kind="stable")
        drop, keep = place[ranking[:count]], np.sort(ranking[count:])
        dropped.append(alive[ranking[:count]])
        weights, inverse = _remove(weights, inverse, columns_of(drop, taps))
        alive, place = alive[keep], place[keep]
        if len(place) * taps <= COMPACT * len(inverse):
            columns = columns_of(place, taps)
            weights, inverse = weights[:, columns], inverse.T[np.ix_(columns, columns)].T
            place = np.arange(len(alive))
    dropped.append(alive)
    return np.concatenate(dropped)[::-1].astype(np.int64)


def removal_scores(weights: Array, inverse: Array, taps: int) -> Array:
    """Return by how much J rises when one channel goes, for each; shape (k,).

    ``weights`` is (m, k * taps), ``inverse`` (k * taps, k * taps), of which the lower triangle is read.
    """
    k = weights.shape[1] // taps
    if taps == 1:
        return np.asarray(np.einsum("mk,mk->k", weights, weights) / np.diagonal(inverse))
    start, tap = np.arange(k)[:, None, None] * taps, np.arange(taps)
    blocks = np.tril(inverse[start + tap[:, None], start + tap])
    blocks += np.tril(blocks, -1).transpose(0, 2, 1)
    grams = weights.reshape(-1, k, taps).transpose(1, 2, 0)
    grams = grams @ grams.transpose(0, 2, 1)
    return np.asarray(np.einsum("kab,kba->k", np.linalg.inv(blocks), grams))


def inverse_spd(matrix: Array) -> Array:
    """Return the inverse of a symmetric positive definite matrix."""
    lower = _lower_inverse(matrix)
    return np.tril(lower) + np.tril(lower, -1).T


def _lower_inverse(matrix: Array) -> Array:
    """Return the lower triangle of the inverse by Cholesky (potrf, potri), in Fortran order; above it is no data."""
    factor, _ = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
    inverse, info = scipy.linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)
    if info:
        raise np.linalg.LinAlgError(f"potri failed with info {info}")
    return np.asfortranarray(inverse)


def _remove(weights: Array, inverse: Array, drop: Indices) -> tuple[Array, Array]:
    """Take columns out of the regression; their rows of ``inverse`` become meaningless. Works in place on ``inverse``.

    Only the lower triangle of ``inverse`` is valid and updated (half the work of a full product).
    """
    below = np.arange(len(inverse))[None, :] <= drop[:, None]
    cross = np.where(below, inverse[drop], inverse[:, drop].T)
    factor = scipy.linalg.cholesky(cross[:, drop], lower=True, check_finite=False)
    half = scipy.linalg.solve_triangular(factor, cross, lower=True, check_finite=False)
    removed = scipy.linalg.solve_triangular(factor, weights[:, drop].T, lower=True, check_finite=False)
    weights = weights - removed.T @ half
    inverse = scipy.linalg.blas.dsyrk(-1.0, half, beta=1.0, c=inverse, trans=1, lower=1, overwrite_c=1)
    inverse[drop, drop] = 1.0  # a unit pivot keeps the block of a gone channel invertible
    return weights, inverse
