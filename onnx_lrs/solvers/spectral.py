r"""Low-rank plus kept channels in closed form, for every rank at once (our derivation).

Fix the kept columns K and write T for the target, H for the (damped) metric. The best S on K for a given L explains of
``(T - L) x`` all that ``x_K`` can explain, so only the part of x that ``x_K`` cannot predict is left for L:

.. math:: \min_S J(L + S) = \mathrm{tr}\,(T - L)\,H_{|K}\,(T - L)^T, \qquad H_{|K} = H - H_{:K} H_{KK}^{-1} H_{K:}.

With U the top r eigenvectors of ``T H_|K T^T`` the joint optimum is ``L = U U^T T`` and
``S = (I - U U^T) T H_{:K} H_{KK}^{-1}``, and its error is the sum of the dropped eigenvalues. K empty is the low-rank
step in the H-metric; r = 0 is least squares on kept channels. One Cholesky factorisation ``H = C C^T`` with the columns
in order of importance serves every K that is a prefix of that order: with ``B = T C``, ``T H_|K T^T`` is the Gram of
B's columns behind K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg

from onnx_lrs.solvers.moments import Moments
from onnx_lrs.solvers.problem import Array, Factors, Indices, Problem, columns_of

DAMPING = 1e-3  # of the mean diagonal of H, toward the original weights; enough when there are many columns
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # tried on the validation moments when there are few
ENOUGH_COLUMNS = 8  # columns of x per column of H from which H is taken as known


@dataclasses.dataclass(frozen=True)
class Split:
    """A support with everything needed for any rank beside it.

    ``support`` (k,) channels in order of importance, ``coefficients`` (m, k * taps) the least-squares weights on them,
    ``basis`` (m, m or 0) orthonormal columns by falling eigenvalue. m = min(out, d).
    """

    support: Indices
    coefficients: Array
    basis: Array


@dataclasses.dataclass(frozen=True)
class Curve:
    """J on the judging samples for rank 0 ... len(losses) - 1 beside a support."""

    support: Indices
    losses: Array


@dataclasses.dataclass(frozen=True)
class Reduced:
    """A problem with at most d rows: ``weight = rotation @ target``; rotation (out, m) is None for the identity.

    The objective does not change under an orthonormal rotation of the outputs, so a tall layer is solved on d rows.
    """

    target: Array
    rotation: Array | None

    def lift(self, rows: Array) -> Array:
        """Return ``rotation @ rows``."""
        return rows if self.rotation is None else self.rotation @ rows


def reduce_rows(weight: Array) -> Reduced:
    """Return the problem on min(out, d) rows (QR if the layer has more outputs than inputs)."""
    out, d = weight.shape
    if out <= d:
        return Reduced(weight, None)
    rotation, target = np.linalg.qr(weight)
    return Reduced(target, rotation)


def choose_damping(problem: Problem) -> float:
    """Return the damping that generalises best from few columns; DAMPING when there are enough of them.

    Fully connected layers see one sample per image, so H is often rank-deficient, and what is fitted to it fails on
    other samples. Each value of DAMPINGS is judged on the validation moments by the mean log error of two easy
    families: low rank alone, and half of the channels (those of largest norm) refitted.
    """
    moments, validation = problem.moments, problem.validation
    if moments is None or validation is None or moments.count >= ENOUGH_COLUMNS * problem.d:
        return DAMPING
    if problem.width is not None:  # in the space of the outputs damping moves no eigenvector
        return DAMPING
    target = reduce_rows(problem.weight).target
    norms = np.einsum("md,md->d", target, target) * np.diagonal(moments.cov)
    order = np.argsort(-norms.reshape(-1, problem.taps).sum(axis=1), kind="stable").astype(np.int64)
    counts = [0, problem.channels // 2] if problem.channels > 1 else [0]
    scores = []
    for damping in DAMPINGS:
        found = splits(target, damped(problem, damping), order, counts, problem.taps)
        curves = [_validation_curve(problem, target, split) for split in found]
        scores.append(sum(float(np.log(curve + 1e-12 * curve[0] + 1e-300).mean()) for curve in curves))
    return DAMPINGS[int(np.argmin(scores))]


def _validation_curve(problem: Problem, target: Array, split: Split) -> Array:
    """Return the losses up to the rank at which the factors are as large as the layer."""
    assert problem.moments is not None
    rest = unexplained(target, split, problem.taps)
    basis = split.basis[:, : max(problem.params // problem.rank_cost, 1)]
    return losses(rest, basis, problem.validation, problem.affine, problem.moments.mean)


def damped(problem: Problem, damping: float = DAMPING) -> Array | None:
    """Return H + damping * mean(diag H) * I of the fit, positive definite; None stands for the identity."""
    if problem.moments is None:
        return None
    return with_level(problem.moments.second(problem.affine), damping)[0]


def with_level(moment: Array, damping: float) -> tuple[Array, float]:
    """Return ``moment + level * I`` for level = damping * mean(diag moment), 1 where that is 0, and the level."""
    metric = moment.copy()
    mean = float(np.trace(metric)) / len(metric)
    level = damping * mean if mean > 0 else 1.0
    metric[np.diag_indices_from(metric)] += level
    return metric, level


def splits(target: Array, metric: Array | None, order: Indices, counts: Sequence[int], taps: int) -> Iterator[Split]:
    """Yield a :class:`Split` for each prefix length in ``counts`` of the channel ``order``.

    ``target`` (m, d), ``metric`` (d, d) positive definite or None. Cost: one Cholesky of d x d, and per count one
    product of at most m x d x m and one eigenproblem of m x m.
    """
    columns = columns_of(order, taps)
    ordered = target[:, columns]
    if metric is None:
        yield from (_split(ordered, None, ordered, order[:k], taps) for k in counts)
        return
    factor = scipy.linalg.cholesky(metric[np.ix_(columns, columns)].T, lower=True, overwrite_a=True, check_finite=False)
    explained = ordered @ factor
    yield from (_split(explained, factor, ordered, order[:k], taps) for k in counts)


def _split(explained: Array, factor: Array | None, ordered: Array, support: Indices, taps: int) -> Split:
    k = len(support) * taps
    coefficients = ordered[:, :k] if factor is None else _regress(explained[:, :k], factor[:k, :k])
    rest = explained[:, k:]
    _, basis = np.linalg.eigh(rest @ rest.T)
    return Split(support, coefficients, np.ascontiguousarray(basis[:, ::-1]))


def prefix_curves(
    problem: Problem, target: Array, metric: Array | None, order: Indices, counts: tuple[Sequence[int], Sequence[int]]
) -> Iterator[Curve]:
    """Yield the error curve of each prefix of the channel ``order`` on the judging samples.

    ``counts`` are the prefix lengths beside which every rank is tried, and those that stand alone. With ``x = C z`` (C
    the Cholesky factor of the metric in the given order, V the judging samples' second moment about the fitted mean)
    the error of prefix k is that of ``B[:, k:] z[k:]`` with ``B = T C``, whose moment is ``A = C^{-1} V C^{-T}``:
    neither the factors nor the residuals have to be formed. Without rank all prefixes cost one product,
    ``J(k) = sum of (A * B^T B)[k:, k:]``.
    """
    ranked, plain = counts
    columns = columns_of(order, problem.taps)
    explained, judged = target[:, columns], None
    if metric is not None:
        factor = scipy.linalg.cholesky(metric[np.ix_(columns, columns)], lower=True, overwrite_a=True)
        explained = explained @ factor
        judged = _whitened(judging_moment(problem, columns), factor)
        del factor
    for k in ranked:
        rest = explained[:, k * problem.taps :]
        basis = np.linalg.eigh(rest @ rest.T)[1][:, ::-1]
        gram = rest @ (rest.T if judged is None else judged[k * problem.taps :, k * problem.taps :] @ rest.T)
        yield Curve(order[:k], _dropped(gram, basis))
    if len(plain):
        tails = _tail_sums(explained, judged)
        yield from (Curve(order[:k], tails[[k * problem.taps]]) for k in plain)


def judging_moment(problem: Problem, columns: Indices) -> Array:
    """Return E[(x - c)(x - c)^T] of the judging samples, columns in the given order.

    c is the mean that the bias was fitted to, 0 without a bias.
    """
    assert problem.moments is not None
    judge = problem.validation or problem.moments
    offset = judge.mean - problem.moments.mean if problem.affine else judge.mean
    moment = judge.cov[np.ix_(columns, columns)]
    moment += np.outer(offset[columns], offset[columns])
    return moment


def _whitened(moment: Array, factor: Array) -> Array:
    """Return ``factor^{-1} moment factor^{-T}``; overwrites ``moment``."""
    half = scipy.linalg.solve_triangular(factor, moment, lower=True, overwrite_b=True)
    return np.asarray(scipy.linalg.solve_triangular(factor, half.T, lower=True))


def _tail_sums(explained: Array, moment: Array | None) -> Array:
    """Return for every k what of ``explained[:, k:] z[k:]`` is left, z having that second moment (identity if None)."""
    if moment is None:
        rows = np.einsum("md,md->d", explained, explained)
    else:
        gram = explained.T @ explained
        gram *= moment
        rows = np.array([row[i] + 2.0 * row[i + 1 :].sum() for i, row in enumerate(gram)])
    tails: Array = np.append(np.cumsum(rows[::-1])[::-1], 0.0)
    return np.maximum(tails, 0.0)


def _regress(explained: Array, factor: Array) -> Array:
    if not factor.size:
        return np.zeros_like(explained)
    solved = scipy.linalg.solve_triangular(factor, explained.T, lower=True, trans="T", check_finite=False)
    return np.ascontiguousarray(solved.T)


def unexplained(target: Array, split: Split, taps: int) -> Array:
    """Return F, (m, d): what the kept channels leave is ``F x``, and of that rank r leaves ``(I - U U^T) F x``."""
    rest = target.copy()
    rest[:, columns_of(split.support, taps)] -= split.coefficients
    return rest


def losses(rest: Array, basis: Array, moments: Moments | None, affine: bool, centre: Array | None) -> Array:
    """Return J for rank 0 ... basis.shape[1] when F = ``rest`` is left without a low-rank part.

    ``moments`` are those of the judging samples (None: identity); ``centre`` is the mean that the bias was shifted for
    (None: no shift). Shape (ranks + 1,), float64.
    """
    if moments is None:
        gram = rest @ rest.T
    else:
        gram = rest @ moments.cov @ rest.T
        offset = rest @ (moments.mean if centre is None or not affine else moments.mean - centre)
        gram += np.outer(offset, offset)
    return _dropped(gram, basis)


def _dropped(gram: Array, basis: Array) -> Array:
    """Return the trace of ``gram`` less what the first r columns of ``basis`` take of it, for r = 0, 1, ..."""
    gains = np.einsum("mr,mr->r", basis, gram @ basis)
    left: Array = np.trace(gram) - np.concatenate([[0.0], np.cumsum(gains)])
    return np.maximum(left, 0.0)


def assemble(problem: Problem, reduced: Reduced, split: Split, rank: int, shift: bool = True) -> Factors:
    """Return the factors of a split with the given rank; ``shift`` False leaves the bias alone."""
    basis = split.basis[:, :rank].copy()  # the factors are not to keep all of the basis in memory
    coefficients = split.coefficients - basis @ (basis.T @ split.coefficients)
    by_channel = np.argsort(split.support)
    factors = Factors(
        left=reduced.lift(basis),
        right=basis.T @ reduced.target,
        kept=split.support[by_channel],
        sparse=reduced.lift(coefficients)[:, columns_of(by_channel, problem.taps)],
        bias_shift=np.zeros(problem.out),
        taps=problem.taps,
    )
    if not (shift and problem.affine and problem.moments is not None):
        return factors
    bias_shift = (problem.weight - factors.dense()) @ problem.moments.mean
    return dataclasses.replace(factors, bias_shift=bias_shift)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A target T (m, d) with T H (m, d) and T H T^T (m, m): what every support needs."""

    target: Array
    image: Array
    gram: Array


def seen(target: Array, metric: Array) -> Seen:
    """Return the products of a target with the metric, which :func:`joint` shares between supports."""
    image = target @ metric
    return Seen(target, image, image @ target.T)


def joint(given: Seen, metric: Array, support: Indices, taps: int) -> Split:
    """Return the :class:`Split` of one support from a factorisation of H_KK alone.

    For few channels much cheaper than :func:`splits`, which factorises all of H but serves every prefix of an order.
    """
    columns = columns_of(support, taps)
    block = given.image[:, columns]
    left = given.gram
    coefficients = block
    if len(columns):
        factor = scipy.linalg.cholesky(metric[np.ix_(columns, columns)], lower=True, check_finite=False)
        half = scipy.linalg.solve_triangular(factor, block.T, lower=True, check_finite=False)
        left = left - half.T @ half
        solved = scipy.linalg.solve_triangular(factor, half, lower=True, trans="T", check_finite=False)
        coefficients = np.ascontiguousarray(solved.T)
    basis = np.linalg.eigh(left)[1][:, ::-1]
    return Split(support, coefficients, np.ascontiguousarray(basis))
