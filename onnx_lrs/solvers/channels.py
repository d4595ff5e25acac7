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

SHARE = 32  # a round drops one channel in 32: scores are exact for one removal, so small rounds keep them honest


def eliminate(target: Array, metric: Array, taps: int) -> Indices:
    """Return all channel numbers, the most useful first; the first k are the support of size k.

    Parameters
    ----------
    target : ndarray, shape (m, d)
        The matrix to explain from few channels.
    metric : ndarray, shape (d, d)
        Damped, positive definite second moments.
    taps : int
        Columns per channel.
    """
    channels = target.shape[1] // taps
    inverse = inverse_spd(metric)
    weights = target.copy()
    alive = np.arange(channels)
    dropped: list[Indices] = []
    while len(alive) > 1:
        scores = removal_scores(weights, inverse, taps)
        count = max(1, len(alive) // SHARE)
        order = np.argsort(scores, kind="stable")
        drop, keep = order[:count], np.sort(order[count:])
        dropped.append(alive[drop])
        weights, inverse = _remove(weights, inverse, columns_of(drop, taps), columns_of(keep, taps))
        alive = alive[keep]
    dropped.append(alive)
    return np.concatenate(dropped)[::-1].astype(np.int64)


def removal_scores(weights: Array, inverse: Array, taps: int) -> Array:
    """Return by how much J rises when one channel goes, for each; weights (m, k * taps), inverse (k * taps,) * 2."""
    k = weights.shape[1] // taps
    if taps == 1:
        return np.einsum("mk,mk->k", weights, weights) / np.diagonal(inverse)
    at = np.arange(k)
    blocks = inverse.reshape(k, taps, k, taps)[at, :, at, :]
    grams = weights.reshape(-1, k, taps).transpose(1, 2, 0)
    grams = grams @ grams.transpose(0, 2, 1)
    return np.einsum("kab,kba->k", np.linalg.inv(blocks), grams)


def inverse_spd(matrix: Array) -> Array:
    """Return the inverse of a symmetric positive definite matrix by Cholesky (potrf, potri)."""
    factor, _ = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
    inverse, info = scipy.linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)
    if info:
        raise np.linalg.LinAlgError(f"potri failed with info {info}")
    lower = np.tril(inverse)
    lower += np.tril(inverse, -1).T
    return lower


def _remove(weights: Array, inverse: Array, drop: Indices, keep: Indices) -> tuple[Array, Array]:
    cross = inverse[np.ix_(drop, keep)]
    factor = scipy.linalg.cho_factor(inverse[np.ix_(drop, drop)], lower=True, check_finite=False)
    gain = scipy.linalg.cho_solve(factor, cross, check_finite=False)
    return weights[:, keep] - weights[:, drop] @ gain, inverse[np.ix_(keep, keep)] - cross.T @ gain
