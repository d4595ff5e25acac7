r"""The spatial form: a k x k kernel as k x 1 followed by 1 x k (METHODS 2b).

.. math:: W[o, i, a, b] \approx \sum_r \mathrm{left}[o, r, b]\;\mathrm{right}[r, i, a]

is a matrix of rank r if W is laid out as (i, a) x (o, b). The SVD of that matrix is the best answer without data; with
data it is the start, and left and right are fitted in turn in the H-metric: left exactly (the features ``right x`` at
the kw tap columns are its regressors), right by conjugate gradients on its normal equations. The products with H are
taken tap by tap, so that one with the regressors of rank r costs r / out of what W H costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnx_lrs.solvers.problem import LARGEST, Array, Candidate, Problem, SpatialFactors, spread
from onnx_lrs.solvers.spectral import damped, judging_moment

FORM = SpatialFactors.form
Half = tuple[Array, Array, Array | None]  # left (out, rank, kw), right (rank, channels, kh), basis of the outputs
Floating = NDArray[np.floating[Any]]
RANKS = 8  # tried for the error curve; each costs one regression
STEPS = 16  # of conjugate gradients for `right`


def applies(problem: Problem) -> bool:
    """Return whether the layer has a 2-D kernel that is more than one wide on both axes."""
    return problem.kernel is not None and min(problem.kernel) > 1


def spatial_candidates(problem: Problem, multiple: int, damping: float) -> list[Candidate]:
    """Return spatial factorisations of a few ranks with J as their loss; empty if the form does not apply."""
    found = trials(problem, multiple, damping) if applies(problem) else ()
    return [trial.candidate(FORM, damping) for trial in found]


@dataclasses.dataclass(frozen=True)
class Trial:
    """The best left for a right of one rank, and what is left of W: ``difference`` and its product with V, (out, d).

    V is the second moment of the judging samples, ``image`` W V; ``regression`` is what left, (out, rank, kw), solves.
    """

    rank: int
    params: int
    left: Array
    regression: Regression
    difference: Array
    seen: Array
    image: Array

    def candidate(self, form: str, damping: float) -> Candidate:
        """Return the trial as a candidate, J its loss."""
        loss = float(np.vdot(self.seen, self.difference))
        return Candidate(form, self.rank, self.params, loss, np.zeros(0, np.int64), damping)


def trials(problem: Problem, multiple: int, damping: float, most: int | None = None) -> Iterator[Trial]:
    """Yield factorisations kh x 1 -> 1 x kw of at most so many ranks (None: all, and a few of them with moments)."""
    assert problem.kernel is not None
    kh, kw = problem.kernel
    cost = problem.channels * kh + problem.out * kw
    ranks = [*range(multiple, int(LARGEST * problem.params / cost) + 1, multiple)]
    if problem.moments is not None:
        most = most or RANKS
    ranks = spread(ranks, most) if most else ranks
    if not ranks:
        return
    basis = _right_basis(problem)
    regression = by_tap(problem, damped(problem, damping)).regression(basis[: ranks[-1]])
    judge = None if problem.moments is None else judging_moment(problem, np.arange(problem.d))
    image = problem.weight if judge is None else problem.weight @ judge
    for rank in ranks:
        left = regression.left(rank)
        difference = problem.weight - SpatialFactors(left, basis[:rank], np.zeros(0)).dense()
        seen = difference if judge is None else difference @ judge
        yield Trial(rank, rank * cost, left, regression, difference, seen, image)


def fit_spatial(problem: Problem, rank: int, damping: float) -> tuple[SpatialFactors, tuple[float, ...]]:
    """Return the factors of one rank and J (on the damped metric) after the fit of left, right and left again."""
    (left, right, _), history = fit_halves(problem, rank, damping)
    factors = SpatialFactors(left, right, np.zeros(problem.out))
    return dataclasses.replace(factors, bias_shift=shift_of(problem, factors)), history


def shift_of(problem: Problem, factors: SpatialFactors) -> Array:
    """Return what keeps the mean output, (out,); zeros where no bias takes it or no mean is known."""
    if not problem.affine or problem.moments is None:
        return np.zeros(problem.out)
    return np.asarray((problem.weight - factors.dense()) @ problem.moments.mean)


def fit_halves(
    problem: Problem, rank: int, damping: float, outer_rank: int | None = None
) -> tuple[Half, tuple[float, ...]]:
    """Return left and right of one rank and J (on the damped metric) after each half of the fit; see ByTap.halves."""
    goal = by_tap(problem, damped(problem, damping))
    found = [*goal.halves(_right_basis(problem)[:rank], goal.metric is not None, outer_rank)]
    return found[-1], tuple(goal.objective(left, right) for left, right, _ in found)


def _right_basis(problem: Problem) -> Array:
    """Return the left singular vectors of W as (i, a) x (o, b), the strongest first; shape (ranks, channels, kh)."""
    assert problem.kernel is not None
    kh, kw = problem.kernel
    matrix = problem.weight.reshape(problem.out, -1, kw).transpose(1, 0, 2).reshape(problem.channels * kh, -1)
    vectors = np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1]
    return np.ascontiguousarray(vectors.T.reshape(-1, problem.channels, kh))


@dataclasses.dataclass(frozen=True)
class ByTap:
    """A weight and a metric with their columns sorted by the tap b of the second kernel axis.

    There the regressors of a tap are ``right`` in that tap's columns and zero elsewhere, so that a product of them all
    with the metric costs a kw-th of the dense one. With m = channels * kh:

    target : (out, kw, m)
        The weight to be matched.
    metric : (kw, m, kw * m)
        Symmetric positive definite; None is the identity.
    image : (out, kw, m)
        target times metric; None where there is no metric.
    """

    target: Array
    metric: Array | None
    image: Array | None

    def fit(self, right: Array, steps: bool, outer_rank: int | None = None) -> Half:
        """Return the best left for a right, (rank, channels, kh); with ``steps``, right moved once as well."""
        *_, last = self.halves(right, steps, outer_rank)
        return last

    def halves(self, right: Array, steps: bool, outer_rank: int | None = None) -> Iterator[Half]:
        """Yield left and right after each half of the fit: left, and with ``steps`` right and left again.

        With ``outer_rank`` it is the best left of that rank over the outputs, and a basis of those comes with it.
        """
        left, basis = self._left(right, outer_rank)
        yield left, right, basis
        if steps:
            right = self.right(left, right)
            yield left, right, basis
            left, basis = self._left(right, outer_rank)
            yield left, right, basis

    def _left(self, right: Array, outer_rank: int | None) -> tuple[Array, Array | None]:
        regression = self.regression(right)
        left = regression.left()
        if outer_rank is None:
            return left, None
        basis = top(regression.explained(left), outer_rank)
        return (basis @ (basis.T @ left.reshape(len(left), -1))).reshape(left.shape), basis

    def regression(self, right: Array) -> Regression:
        """Return what every left for a prefix of ``right``, (rank, channels, kh), needs."""
        rows = right.reshape(len(right), -1)
        out, kw, m = self.target.shape
        if self.metric is None:
            gram = np.einsum("bc,rs->brcs", np.eye(kw), rows @ rows.T)
        else:
            gram = ((rows @ self.metric).reshape(-1, m) @ rows.T).reshape(kw, len(rows), kw, len(rows))
        image = self.target if self.image is None else self.image
        return Regression(gram, (image.reshape(-1, m) @ rows.T).reshape(out, kw, len(rows)))

    def right(self, left: Array, right: Array) -> Array:
        """Return right after a few steps of conjugate gradients for a given left, (out, rank, kw); J does not rise."""
        assert self.metric is not None
        assert self.image is not None
        out, kw, m = self.target.shape
        rank, shape = left.shape[1], right.shape
        filters = np.ascontiguousarray(left.transpose(2, 1, 0))
        pairs = filters.reshape(kw * rank, out)
        gram = (pairs @ pairs.T).reshape(kw, rank, kw * rank)
        values = right.reshape(rank, m)
        residual = np.matmul(filters, self.image.transpose(1, 0, 2)).sum(axis=0) - _curved(gram, self.metric, values)
        direction, size = residual, float(np.vdot(residual, residual))
        # From here on in single precision, at half the time: what is lost is a part of the residual, not of right.
        # All of size 1, so that activations of any scale are in its range.
        scale, spread = (float(np.abs(array).max()) or 1.0 for array in (gram, self.metric))
        gram, metric = (gram / scale).astype(np.float32), np.divide(self.metric, spread, dtype=np.float32)
        for _ in range(STEPS):
            length = float(np.linalg.norm(direction)) or 1.0
            image = _curved(gram, metric, (direction / length).astype(np.float32)) * (scale * spread * length)
            curvature = float(np.vdot(direction, image))
            if curvature <= 0:
                break
            values = values + (size / curvature) * direction
            residual = residual - (size / curvature) * image
            size, before = float(np.vdot(residual, residual)), size
            direction = residual + (size / before) * direction
        return values.reshape(shape)

    def objective(self, left: Array, right: Array) -> float:
        """Return J, the squared distance from the target in the metric."""
        out, kw, m = self.target.shape
        found = (left.transpose(0, 2, 1).reshape(out * kw, -1) @ right.reshape(len(right), m)).reshape(out, kw * m)
        difference = self.target.reshape(out, -1) - found
        seen = difference if self.metric is None else difference @ self.metric.reshape(kw * m, kw * m)
        return float(np.vdot(seen, difference))


def _curved(gram: Floating, metric: Floating, rows: Floating) -> Array:
    """Return the second derivative of J / 2 by right, times ``rows`` (rank, m): the sum over taps of G right H."""
    kw, rank, m = *gram.shape[:2], rows.shape[1]
    seen = (rows @ metric).reshape(kw * rank, kw, m)
    return np.asarray(np.matmul(gram, seen.transpose(1, 0, 2)).sum(axis=0, dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Regression:
    """The normal equations of left: ``gram`` (kw, rank, kw, rank), ``moment`` (out, kw, rank)."""

    gram: Array
    moment: Array

    def left(self, rank: int | None = None) -> Array:
        """Return the best left, (out, rank, kw), for the first ``rank`` filters of right; for all if None."""
        gram, moment = self.gram[:, :rank, :, :rank], self.moment[:, :, :rank]
        out, kw, count = moment.shape
        gram = gram.reshape(kw * count, kw * count).copy()
        gram[np.diag_indices_from(gram)] += 1e-10 * np.trace(gram) / len(gram)
        solved = scipy.linalg.solve(gram, moment.reshape(out, -1).T, assume_a="pos")
        return np.ascontiguousarray(solved.T.reshape(out, kw, count).transpose(0, 2, 1))

    def explained(self, left: Array) -> Array:
        """Return left G left^T, (out, out), G the normal equations' matrix, for the left that solves them.

        Its trace is what left takes off J; U U^T left takes off no more than the trace of U^T (...) U.
        """
        count = left.shape[1]
        moment = self.moment[:, :, :count].transpose(0, 2, 1).reshape(len(left), -1)
        return np.asarray(left.reshape(len(left), -1) @ moment.T)


def top(gram: Array, rank: int) -> Array:
    """Return the strongest eigenvectors of a symmetric matrix, (n, rank), by falling eigenvalue."""
    count, symmetric = len(gram), (gram + gram.T) / 2
    vectors = scipy.linalg.eigh(symmetric, subset_by_index=(max(count - rank, 0), count - 1), check_finite=False)[1]
    return np.ascontiguousarray(vectors[:, ::-1])


def by_tap(problem: Problem, metric: Array | None) -> ByTap:
    """Return the problem's weight and a metric (d, d), or None for the identity, by tap."""
    if metric is None:
        return ByTap(_sorted(problem, problem.weight), None, None)
    return goal_by_tap(problem, metric_by_tap(problem, metric), problem.weight, problem.weight @ metric)


def goal_by_tap(problem: Problem, metric: Array, weight: Array, image: Array) -> ByTap:
    """Return any weight and its product with the metric, both (out, d), by tap; ``metric`` is by tap already."""
    return ByTap(_sorted(problem, weight), metric, _sorted(problem, image))


def metric_by_tap(problem: Problem, metric: Array) -> Array:
    """Return a metric, (d, d), as (kw, m, kw * m)."""
    kw, m = _taps(problem)
    return metric.reshape(m, kw, m, kw).transpose(1, 0, 3, 2).reshape(kw, m, kw * m)


def _sorted(problem: Problem, values: Array) -> Array:
    kw, m = _taps(problem)
    return np.ascontiguousarray(values.reshape(-1, m, kw).transpose(0, 2, 1))


def _taps(problem: Problem) -> tuple[int, int]:
    assert problem.kernel is not None
    kw = problem.kernel[1]
    return kw, problem.d // kw
