r"""The lowest rank with a guaranteed error: data-driven low rank (Papadimitriou and Jain, arXiv 2107.05787).

The paper's program is ``min ||U||_*`` over the constraint set of :mod:`constrained`; its solver here is the splitting
of Net-Trim with singular values thresholded (METHODS 6.3). The nuclear norm spends the allowed error on shrinking, not
on rank, so the rank is bisected afterwards (our derivation): for each rank the distance from the set is lowered by
majorise-minimise steps, each a reduced-rank regression in the metric ``H = X^T X``,

.. math:: \min_{rank\ r} \|Z - X U^T\|_F^2 + \delta \|U - U_0\|_F^2, \qquad
          T = (Z^T X + \delta U_0)(H + \delta I)^{-1}, \quad U = P P^T T,

P the top r eigenvectors of ``T (H + delta I) T^T`` (METHODS 2), from the convex solution and from the layer itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import scipy.linalg

from onnx_lrs.solvers import constrained as on
from onnx_lrs.solvers.constrained import Fitted, Point, Pull, Reached, Real, Region
from onnx_lrs.solvers.loop import Run
from onnx_lrs.solvers.method import Method, finished
from onnx_lrs.solvers.problem import (
    LARGEST,
    Array,
    Budget,
    Candidate,
    Factors,
    Indices,
    Problem,
    Settings,
    Solution,
    Status,
)
from onnx_lrs.solvers.prox import singular_soft
from onnx_lrs.solvers.spectral import ENOUGH_COLUMNS, choose_damping

NO_CHANNELS: Indices = np.zeros(0, np.int64)
FORM = "low-rank"
STEPS = (3000, 300)  # of the convex program of a guarantee: float64 and float32 problems
LOOSER = (10.0, 100.0)  # times the tolerance where only its singular directions are used, likewise
DESCENTS = 12  # steps of a fit to a budget; more move the error by less than a percent
FINE = 64  # the rank is found to one part in this (exactly up to this rank)
EXACT = 256  # rows up to which the eigenvectors are computed afresh in each step; above, one block power step
POINTS = 8  # of an error curve
# Damping of the refits where columns are few. LeNet-5's 500 x 800 layer, 800 columns, error allowed and kept 10 %:
# rank 37 and 39 % on other columns without it, rank 82 and 10 % with it; the lowest rank on few columns is no bargain.
FEW = 1e-2


@dataclasses.dataclass(frozen=True)
class Answer:
    """Factors with what they reach on the columns."""

    factors: Factors
    reached: Reached


# ------------------------------------------------------------------------------------------------- the convex program


def nuclear(weight: Real, threshold: float) -> tuple[Real, float]:
    """Return the proximal map of the nuclear norm and the norm of what it returns."""
    found, values = singular_soft(weight, threshold)
    return found, float(values.sum())


def relax(here: Region, start: on.Split | None, limits: tuple[int, float]) -> Run[on.Split]:
    """Return the run of the paper's program ``min ||U||_*`` over the set, from the layer's weight or a warm start."""
    return on.splitting(here, on.system(here), nuclear, start or on.natural(here, nuclear), limits)


# ------------------------------------------------------------------------------------------- the best fit of one rank


def regression(here: Region, root: Real, rank: int) -> Fitted:
    """Return the step of :func:`constrained.descend` for one rank; ``root`` is the Cholesky factor of H + delta I.

    What is found again is P (out, rank). Up to EXACT rows it is computed afresh; above, P is carried through one block
    power step, which is the exact best left factor for the present right one, so the bound falls all the same.
    """

    def fitted(correlation: Real, now: Point) -> tuple[Real, Real]:
        half = scipy.linalg.solve_triangular(root, correlation.T, lower=True, check_finite=False).T  # T C, H = C C^T
        basis = leading(half, rank) if min(half.shape) <= EXACT or now.share is None else _carried(half, now.share)
        right = scipy.linalg.solve_triangular(root, (basis.T @ half).T, lower=True, trans="T", check_finite=False).T
        return basis @ right, basis

    return fitted


def metric_root(here: Region, strength: float) -> Real:
    """Return the lower Cholesky factor of ``H + strength I`` in the set's dtype."""
    metric = here.gram.copy()
    metric[np.diag_indices_from(metric)] += strength
    root = scipy.linalg.cholesky(metric, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(root, here.inputs.dtype)


def leading(half: Real, rank: int) -> Real:
    """Return the top ``rank`` left singular vectors of (out, d), (out, rank), by the smaller Gram matrix."""
    if half.shape[0] <= half.shape[1]:
        return np.ascontiguousarray(np.linalg.eigh(half @ half.T)[1][:, ::-1][:, :rank])
    vectors = np.linalg.eigh(half.T @ half)[1][:, ::-1][:, :rank]
    return np.asarray(np.linalg.qr(half @ vectors)[0])


def _carried(half: Real, basis: Real) -> Real:
    return np.asarray(np.linalg.qr(half @ (half.T @ basis))[0])


def truncated(here: Region, weight: Real, basis: Real, pull: Pull | None = None) -> Point:
    """Return the best approximation of a weight in the H-metric with this basis, with the best admissible bias."""
    low = basis @ (basis.T @ weight)
    bias = here.best_bias(here.inputs @ low.T)
    return on.place(here, pull or Pull(low, 0.0), low, bias, np.ascontiguousarray(basis))


def factors_of(problem: Problem, here: Region, point: Point) -> Factors:
    """Return a point as factors of the layer with the bias as it was; P is orthonormal, so ``right = P^T U``."""
    basis = np.asarray(point.share, np.float64)
    right = basis.T @ np.asarray(point.weight, np.float64) * here.unit
    empty = np.zeros((problem.out, 0))
    return Factors(basis, right, NO_CHANNELS, empty, np.zeros(problem.out), problem.taps)


# ---------------------------------------------------------------------------------------------- the guaranteed error


def within_error(problem: Problem, gain: float, settings: Settings) -> Solution:
    """Return the factors of lowest rank found that keep to ``eps = gain ||A||_F``, checked in float64.

    ``allowed`` is the guaranteed error after the activation: eps, in the cascade form ``sqrt(eps^2 + ||max(V, 0)||^2)``
    over the entries outside Om. DENSE if only ranks that save nothing keep to it, ERROR_TOO_SMALL if no weight was
    found to, NOT_CONVERGED if the step limit ended the convex program.
    """
    problem = on.stated(problem)
    scale = on.size_of_responses(problem)
    eps = gain * scale
    allowed = math.hypot(eps, on.left_open(problem))
    nothing = on.settle(problem, np.zeros_like(problem.weight))
    if nothing.keeps_to(eps):
        return _solution(problem, Answer(_nothing(problem, nothing), nothing), allowed)
    here = on.region(problem, eps)
    if eps == 0.0 < scale:  # only rounding tells the layer itself from a factorisation of it
        return on.unreduced(problem, here, eps, allowed)
    run = relax(
        here.goal(), None, (settings.steps or on.by_size(here, STEPS), on.by_size(here, LOOSER) * settings.tolerance)
    )
    found = lowest_rank(problem, here, run.last.weight, eps)
    if found is None:
        return on.unreduced(problem, here, eps, allowed)
    return _solution(problem, found, allowed, run)


def lowest_rank(problem: Problem, here: Region, convex: Real, eps: float) -> Answer | None:
    """Return the factors of the lowest rank found that keep to eps, or None if no rank that saves anything does.

    Bisection, since a higher rank can do all that a lower one can. A rank is tried without a refit first, so none
    higher is returned than the truncated convex solution needs on the bisection's path.
    """
    enough = len(here.inputs) >= ENOUGH_COLUMNS * problem.d
    root = metric_root(here, on.strength_of(here, on.REGULAR if enough else FEW))
    starts = [_start(root, weight) for weight in (convex, here.weight)]
    low, high = 1, min((problem.params - 1) // problem.rank_cost, *problem.weight.shape) + 1
    kept: list[Point] = []
    while high - low > high // FINE:
        rank = (low + high) // 2
        point = attempt(here, root, starts, rank)
        if point is None:
            low = rank + 1
        else:
            kept.append(point)
            high = rank
            starts = [starts[0], _start(root, point.weight)]
    for point in reversed(kept):
        factors = factors_of(problem, here, point)
        reached = on.settle(problem, factors.dense())
        if reached.keeps_to(eps):
            return Answer(dataclasses.replace(factors, bias_shift=reached.shift), reached)
    return None


def _start(root: Real, weight: Real) -> tuple[Real, Real]:
    """Return a weight and the basis in which it is truncated to any rank."""
    return weight, leading(weight @ root, min(weight.shape))


def attempt(here: Region, root: Real, starts: list[tuple[Real, Real]], rank: int) -> Point | None:
    """Return a point of this rank in the set, or None if none is found: from the start that is nearest to it."""
    inner = here.inner()
    points = [truncated(inner, weight, basis[:, :rank]) for weight, basis in starts]
    best = min(points, key=lambda point: point.distance)
    for point in points:
        if on.admitted(inner, point):
            return point
    point, found = on.chase(inner, here.goal(), regression(here, root, rank), best, on.by_size(here, on.TRIES))
    return point if found else None


def _nothing(problem: Problem, reached: Reached) -> Factors:
    left, right = np.zeros((problem.out, 0)), np.zeros((0, problem.d))
    return Factors(left, right, NO_CHANNELS, np.zeros((problem.out, 0)), reached.shift, problem.taps)


def _solution(problem: Problem, found: Answer, allowed: float, run: Run[on.Split] | None = None) -> Solution:
    solution = dataclasses.replace(finished(problem, found.factors), allowed=allowed, error=found.reached.error)
    if run is None:
        return solution
    status = Status.SOLVED if run.converged else Status.NOT_CONVERGED
    return dataclasses.replace(solution, status=status, history=run.history, residuals=run.residuals)


# -------------------------------------------------------------------------------------------------- a budget of rank


def choose(problem: Problem, budget: Budget, settings: Settings) -> Candidate | None:
    """Return the candidate of the largest rank within the budget; its loss is not computed (nan)."""
    rank = budget.rank
    if budget.params is not None:
        rank = min(budget.params // problem.rank_cost, *problem.weight.shape) // budget.multiple * budget.multiple
    elif budget.channels or budget.elements:
        return None
    if not rank or rank * problem.rank_cost >= problem.params:
        return None
    return _candidate(problem, rank, float("nan"), choose_damping(problem))


def _candidate(problem: Problem, rank: int, loss: float, damping: float) -> Candidate:
    return Candidate(FORM, rank, rank * problem.rank_cost, loss, NO_CHANNELS, damping)


def fit(problem: Problem, chosen: Candidate, settings: Settings) -> Solution:
    """Return the factors of the candidate's rank of smallest violation: what the set asks with eps = 0.

    ``history`` is the squared distance from that set with the damping's pull toward W, per column and in the scaled
    units; it never rises. The iterate that is best on ``problem.checks``, if there are any, is kept.
    """
    problem = on.stated(problem)
    here = on.region(problem, 0.0)
    (point, history), *_ = fits(
        problem, here, [chosen.rank], chosen.damping, DESCENTS if settings.steps is None else settings.steps
    )
    return budgeted(problem, factors_of(problem, here, point), on.shift_of(problem, here, point), history)


def budgeted(problem: Problem, factors: Factors, shift: Array, history: tuple[float, ...]) -> Solution:
    """Return the solved record of factors with a bias shift, and what they reach on the columns."""
    factors = dataclasses.replace(factors, bias_shift=shift)
    error = on.measure(problem, factors.dense(), shift).error
    return dataclasses.replace(finished(problem, factors, history), error=error)


def fits(
    problem: Problem, here: Region, ranks: list[int], damping: float, steps: int
) -> Iterator[tuple[Point, tuple[float, ...]]]:
    """Yield the fit of each rank with its history; ranks should fall, each starts from the one before, truncated."""
    strength = on.strength_of(here, damping)
    root = metric_root(here, strength)
    pull = Pull(here.weight, strength)
    weight = here.weight
    for rank in ranks:
        start = truncated(here, weight, leading(weight @ root, rank), pull)
        run = on.fitted_run(problem, here, pull, regression(here, root, rank), start, steps)
        weight = run.best.weight
        yield run.best, run.history


def candidates(problem: Problem, multiple: int, settings: Settings) -> list[Candidate]:
    """Return at most POINTS ranks, multiples and geometric, each fitted to the columns.

    The loss is the relative squared error behind the activation on the checks (or columns), not J: J would count what
    the ReLU cuts. It compares the layers of a network, not this method with others.
    """
    problem = on.stated(problem)
    most = min(int(LARGEST * problem.params) // problem.rank_cost, *problem.weight.shape) // multiple
    if most < 1:
        return []
    ranks = sorted({multiple * round(k) for k in np.geomspace(1, most, POINTS)}, reverse=True)
    damping, here = choose_damping(problem), on.region(problem, 0.0)
    found = []
    for rank, (point, _) in zip(ranks, fits(problem, here, ranks, damping, DESCENTS // 2), strict=True):
        factors = factors_of(problem, here, point)
        found.append(
            _candidate(problem, rank, on.loss(problem, factors.dense(), on.shift_of(problem, here, point)), damping)
        )
    return found[::-1]


DDLR = Method(candidates, choose, fit, within_error, needs_columns=True, fully_connected_only=True)
