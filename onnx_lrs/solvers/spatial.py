r"""The spatial form: a k x k kernel as k x 1 followed by 1 x k (METHODS 2b).

.. math:: W[o, i, a, b] \approx \sum_r \mathrm{left}[o, r, b]\;\mathrm{right}[r, i, a]

is a matrix of rank r if W is laid out as (i, a) x (o, b). The SVD of that matrix is the best answer without data; with
data it is the start, and left and right are fitted in turn in the H-metric: left exactly (the features ``right x`` at
the kw tap columns are its regressors), right by conjugate gradients on its normal equations.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lrs.solvers.problem import LARGEST, Array, Candidate, Problem, SpatialFactors
from onnx_lrs.solvers.spectral import damped, judging_moment

FORM = "spatial"
RANKS = 8  # tried for the error curve; each costs one regression
STEPS = 8  # of conjugate gradients for `right`


def applies(problem: Problem) -> bool:
    """Return whether the layer has a 2-D kernel that is more than one wide on both axes."""
    return problem.kernel is not None and min(problem.kernel) > 1


def spatial_candidates(problem: Problem, multiple: int, damping: float) -> list[Candidate]:
    """Return spatial factorisations of a few ranks with J as their loss; empty if the form does not apply."""
    if not applies(problem):
        return []
    assert problem.kernel is not None
    kh, kw = problem.kernel
    cost = problem.channels * kh + problem.out * kw
    ranks = np.arange(multiple, int(LARGEST * problem.params / cost) + 1, multiple)
    if problem.moments is not None and len(ranks) > RANKS:
        ranks = ranks[np.unique(np.round(np.geomspace(1, len(ranks), RANKS)).astype(int)) - 1]
    basis, metric = _right_basis(problem), damped(problem, damping)
    judge = None if problem.moments is None else judging_moment(problem, np.arange(problem.d))
    none = np.zeros(0, np.int64)
    found = []
    for rank in (int(r) for r in ranks):
        left = _fit_left(problem, basis[:rank], metric)
        difference = problem.weight - SpatialFactors(left, basis[:rank], np.zeros(0)).dense()
        found.append(Candidate(FORM, rank, rank * cost, _distance(difference, judge), none, damping))
    return found


def fit_spatial(problem: Problem, rank: int, damping: float) -> tuple[SpatialFactors, tuple[float, ...]]:
    """Return the factors of one rank and J (on the damped metric) after the fit of left, right and left again."""
    right, metric = _right_basis(problem)[:rank], damped(problem, damping)
    left = _fit_left(problem, right, metric)
    history = [_objective(problem, left, right, metric)]
    if metric is not None:
        right = _fit_right(problem, left, right, metric)
        history.append(_objective(problem, left, right, metric))
        left = _fit_left(problem, right, metric)
        history.append(_objective(problem, left, right, metric))
    dense = SpatialFactors(left, right, np.zeros(0)).dense()
    shift = np.zeros(problem.out)
    if problem.affine and problem.moments is not None:
        shift = (problem.weight - dense) @ problem.moments.mean
    return SpatialFactors(left, right, shift), tuple(history)


def _taps(problem: Problem) -> tuple[int, int, int]:
    assert problem.kernel is not None
    return problem.channels, *problem.kernel


def _right_basis(problem: Problem) -> Array:
    """Return the left singular vectors of W as (i, a) x (o, b), the strongest first; shape (ranks, channels, kh)."""
    channels, kh, kw = _taps(problem)
    matrix = problem.weight.reshape(problem.out, channels, kh, kw).transpose(1, 2, 0, 3).reshape(channels * kh, -1)
    vectors = np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1]
    return np.ascontiguousarray(vectors.T.reshape(-1, channels, kh))


def _fit_left(problem: Problem, right: Array, metric: Array | None) -> Array:
    """Return the best left, (out, rank, kw), for a given right, (rank, channels, kh)."""
    channels, kh, kw = _taps(problem)
    rank = len(right)
    features = np.einsum("ria,bc->rbiac", right, np.eye(kw)).reshape(rank * kw, channels * kh * kw)
    seen = features if metric is None else features @ metric
    gram = seen @ features.T
    gram[np.diag_indices_from(gram)] += 1e-10 * np.trace(gram) / len(gram)
    left = scipy.linalg.solve(gram, seen @ problem.weight.T, assume_a="pos")
    return np.ascontiguousarray(left.T.reshape(problem.out, rank, kw))


def _fit_right(problem: Problem, left: Array, right: Array, metric: Array) -> Array:
    """Return right after a few steps of conjugate gradients for a given left; J does not rise."""
    channels, kh, kw = _taps(problem)

    def gradient(difference: Array) -> Array:
        seen = (difference @ metric).reshape(problem.out, channels, kh, kw)
        return np.asarray(np.einsum("orb,oiab->ria", left, seen, optimize=True))

    def expand(values: Array) -> Array:
        return SpatialFactors(left, values, np.zeros(0)).dense()

    residual = gradient(problem.weight - expand(right))
    direction, size = residual, float(np.vdot(residual, residual))
    for _ in range(STEPS):
        image = gradient(expand(direction))
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        right = right + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        size, before = float(np.vdot(residual, residual)), size
        direction = residual + (size / before) * direction
    return right


def _objective(problem: Problem, left: Array, right: Array, metric: Array | None) -> float:
    return _distance(problem.weight - SpatialFactors(left, right, np.zeros(0)).dense(), metric)


def _distance(difference: Array, metric: Array | None) -> float:
    return float(np.vdot(difference if metric is None else difference @ metric, difference))
