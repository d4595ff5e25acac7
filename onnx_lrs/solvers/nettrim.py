r"""The fewest weights with a guaranteed error: Net-Trim (Aghasi et al., arXiv 1611.05162 and 1806.06457).

The program is ``min ||U||_1`` over the constraint set of :mod:`constrained`, by the paper's splitting (METHODS 6.4).
Its solution lies on the border of the set because it shrinks; what it shrinks is room for more zeros. So, as
steps of our own: a round of reweighting (Candes, Wakin and Boyd 2008), then entries are taken away, smallest
``u_ij^2 H_jj`` first and half of them at once as long as that goes well, then ever smaller shares, and what is left is
refitted by conjugate gradients inside majorise-minimise steps until it is back in the set.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.sparse

from onnx_lrs.solvers import constrained as on
from onnx_lrs.solvers.constrained import Fitted, Point, Prox, Pull, Reached, Real, Region, Split, System
from onnx_lrs.solvers.loop import Run
from onnx_lrs.solvers.method import Method, finished
from onnx_lrs.solvers.problem import (
    Array,
    Budget,
    Candidate,
    ElementFactors,
    Indices,
    Problem,
    Settings,
    Solution,
    Status,
)
from onnx_lrs.solvers.prox import Mask, largest, soft
from onnx_lrs.solvers.spectral import choose_damping

NO_CHANNELS: Indices = np.zeros(0, np.int64)
FORM = "elements"
STEPS = (3000, 300)  # of the convex program of a guarantee: float64 and float32 problems
LOOSER = (10.0, 30.0)  # times the tolerance where only its support is used, likewise
AGAIN = (40, 1e-2)  # steps and residuals of the reweighted program
SHARP = 0.1  # of the root mean square of the entries kept: what the reweighting takes for small
FINE = 1 / 64  # the least share of the entries whose removal is tried (at least one entry)
DESCENTS = 12  # steps of a fit to a budget
GAINS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)  # of ||A||: the convex path of a budget, from slack to tight
PATH = (40, 3e-3)  # steps and residuals of a point on it
DENSITIES = (1 / 32, 1 / 16, 1 / 10, 1 / 6, 1 / 4, 1 / 3, 0.45)  # beyond about half a sparse tensor saves nothing
CONJUGATE = 8  # steps of conjugate gradients of one fit


# ------------------------------------------------------------------------------------------------- the convex program


def entries(weight: Real, threshold: float) -> tuple[Real, float]:
    """Return the proximal map of the sum of absolute values and that sum of what it returns."""
    found = soft(weight, threshold)
    return found, float(np.abs(found).sum(dtype=np.float64))


def weighted(weights: Real) -> Prox:
    """Return the map of ``sum |w_ij u_ij|``."""

    def prox(weight: Real, threshold: float) -> tuple[Real, float]:
        size = np.maximum(np.abs(weight) - weight.dtype.type(threshold) * weights, 0)
        return np.copysign(size, weight), float((size * weights).sum(dtype=np.float64))

    return prox


def relax(here: Region, start: Split | None, limits: tuple[int, float], solver: System | None = None) -> Run[Split]:
    """Return the run of the paper's program ``min ||U||_1`` over the set, from the layer's weight or a warm start."""
    return on.splitting(here, solver or on.system(here), entries, start or on.natural(here, entries), limits)


def reweighted(here: Region, run: Run[Split], solver: System) -> Real:
    """Return the weight of least ``sum |u_ij| / (|u'_ij| + small)``, u' the solution before (Candes et al. 2008)."""
    size = np.abs(run.last.weight)
    kept = size[size > 0]
    if not kept.size:
        return run.last.weight
    usual = float(np.sqrt(np.mean(np.square(kept))))
    weights = size.dtype.type(usual) / (size + size.dtype.type(SHARP * usual))
    return on.splitting(here, solver, weighted(weights), run.last, AGAIN).last.weight


# ------------------------------------------------------------------------------------------------ the fit on a support


def on_support(here: Region, strength: float, mask: Mask) -> Fitted:
    """Return the step of :func:`constrained.descend` for one support: conjugate gradients on it, CONJUGATE steps.

    All rows at once, each with its own step lengths, preconditioned by the diagonal of H; from the present weight, so
    the bound never rises.
    """
    metric = here.gram.astype(here.inputs.dtype)
    metric[np.diag_indices_from(metric)] += metric.dtype.type(strength)
    kept = mask.astype(metric.dtype)
    inverse = kept / np.diagonal(metric)

    def fitted(correlation: Real, now: Point) -> tuple[Real, None]:
        weight = now.weight
        residual = (correlation - weight @ metric) * kept
        ahead = inverse * residual
        direction, slope = ahead, np.einsum("od,od->o", residual, ahead)
        for _ in range(CONJUGATE):
            image = (direction @ metric) * kept
            step = (slope / np.maximum(np.einsum("od,od->o", direction, image), TINY))[:, None]
            weight = weight + step * direction
            residual = residual - step * image
            ahead = inverse * residual
            before, slope = slope, np.einsum("od,od->o", residual, ahead)
            direction = ahead + (slope / np.maximum(before, TINY))[:, None] * direction
        return weight, None

    return fitted


TINY = np.float32(1e-30)  # below any curvature in scaled units


def scores(here: Region, weight: Real) -> Array:
    """Return what each entry weighs in the H-metric, ``u_ij^2 H_jj``, (out, d)."""
    return np.square(weight.astype(np.float64)) * np.diagonal(here.gram)


def supported(here: Region, weight: Real, mask: Mask, pull: Pull | None = None) -> Point:
    """Return a weight on a support, as it is, with the best admissible bias."""
    kept = np.where(mask, weight, weight.dtype.type(0))
    return on.place(here, pull or Pull(kept, 0.0), kept, here.best_bias(here.inputs @ kept.T))


def factors_of(here: Region, weight: Real, shift: Array) -> ElementFactors:
    """Return a weight of the scaled set as factors without a low-rank part."""
    out, d = weight.shape
    sparse = scipy.sparse.csr_array(np.asarray(weight, np.float64) * here.unit)
    return ElementFactors(np.zeros((out, 0)), np.zeros((0, d)), sparse, shift)


# ---------------------------------------------------------------------------------------------- the guaranteed error


def within_error(problem: Problem, gain: float, settings: Settings) -> Solution:
    """Return the factors of fewest entries found that keep to ``eps = gain ||A||_F``, checked in float64.

    ``allowed``, DENSE, ERROR_TOO_SMALL and NOT_CONVERGED as in :func:`ddlr.within_error`. Net-Trim's own eps in the
    cascade form is that of :func:`constrained.cascade_gain`.
    """
    problem = on.stated(problem)
    scale = on.size_of_responses(problem)
    eps = gain * scale
    allowed = math.hypot(eps, on.left_open(problem))
    nothing = on.settle(problem, np.zeros_like(problem.weight))
    here = on.region(problem, eps)
    if nothing.keeps_to(eps):
        return _solution(problem, factors_of(here, np.zeros_like(here.weight), nothing.shift), nothing, allowed)
    solver, goal = on.system(here), here.goal()
    run = relax(
        goal, None, (settings.steps or on.by_size(here, STEPS), on.by_size(here, LOOSER) * settings.tolerance), solver
    )
    found = fewest(problem, here, (run.last.weight, reweighted(goal, run, solver), here.weight), eps)
    if found is None:
        return on.unreduced(problem, here, eps, allowed)
    return _solution(problem, *found, allowed, run)


def fewest(
    problem: Problem, here: Region, weights: tuple[Real, ...], eps: float
) -> tuple[ElementFactors, Reached] | None:
    """Return the factors of fewest entries found that keep to eps, or None if nothing smaller than the layer does."""
    inner, start, high = here.inner(), here.weight, problem.params
    kept: list[Real] = []
    for weight in weights:  # as they are
        count = int(np.count_nonzero(weight))
        if count < high and on.admitted(inner, supported(inner, weight, weight != 0)):
            kept, high, start = [*kept, weight], count, weight
    kept += pruned(here, start, high)
    for weight in reversed(kept):
        factors = factors_of(here, weight, np.zeros(problem.out))
        settled = on.settle(problem, factors.dense())
        if settled.keeps_to(eps):
            return _smaller(problem, eps, dataclasses.replace(factors, bias_shift=settled.shift), settled)
    return None


def _smaller(problem: Problem, eps: float, found: ElementFactors, reached: Reached) -> tuple[ElementFactors, Reached]:
    """Return the layer itself if it has fewer entries and keeps to eps: it may lie on the very border of the set."""
    if np.count_nonzero(problem.weight) >= found.params:
        return found, reached
    own = on.measure(problem, problem.weight, None)
    if not own.keeps_to(eps):
        return found, reached
    return dataclasses.replace(found, sparse=scipy.sparse.csr_array(problem.weight), bias_shift=own.shift), own


def pruned(here: Region, weight: Real, count: int) -> list[Real]:
    """Return ever sparser weights in the set, each from the one before; the first from one with ``count`` entries."""
    found: list[Real] = []
    share = 0.5
    while share >= FINE and share * count >= 0.5 and count > 1:
        trial = attempt(here, weight, min(count - 1, round((1 - share) * count)))
        left = count if trial is None else int(np.count_nonzero(trial))
        if trial is None or left >= count:
            share /= 2
            continue
        if left > (1 - share / 2) * count:  # most of what was wanted came back
            share /= 2
        found.append(trial)
        weight, count = trial, left
    return found


def attempt(here: Region, weight: Real, count: int) -> Real | None:
    """Return a weight in the set with the ``count`` largest entries of one that is in it, or None if none is found.

    Where no bias can mend it, outputs that do not keep below the limits stay as they were; more entries are left then.
    """
    inner, mask = here.inner(), largest(scores(here, weight), count)
    fitted = on_support(here, on.strength_of(here, on.REGULAR), mask)
    point, found = on.chase(inner, here.goal(), fitted, supported(inner, weight, mask), on.by_size(here, on.TRIES))
    if found:
        return point.weight
    if here.affine:
        return None
    mended = supported(inner, np.where(inner.above(point.response)[:, None], weight, point.weight), np.ones_like(mask))
    return mended.weight if on.admitted(inner, mended) else None


def _solution(
    problem: Problem, factors: ElementFactors, reached: Reached, allowed: float, run: Run[Split] | None = None
) -> Solution:
    solution = dataclasses.replace(finished(problem, factors), allowed=allowed, error=reached.error)
    if run is None:
        return solution
    status = Status.SOLVED if run.converged else Status.NOT_CONVERGED
    return dataclasses.replace(solution, status=status, history=run.history, residuals=run.residuals)


# ----------------------------------------------------------------------------------------------- a budget of entries


def choose(problem: Problem, budget: Budget, settings: Settings) -> Candidate | None:
    """Return the candidate of a number of entries; its loss is not computed (nan)."""
    if budget.rank or budget.channels:
        return None
    count = budget.params if budget.params is not None else budget.elements
    if not count or count >= problem.params:
        return None
    return _candidate(count, float("nan"), choose_damping(problem))


def _candidate(count: int, loss: float, damping: float) -> Candidate:
    return Candidate(FORM, 0, count, loss, NO_CHANNELS, damping, count)


def fit(problem: Problem, chosen: Candidate, settings: Settings) -> Solution:
    """Return at most ``chosen.elements`` entries: the support of the convex path, truncated, then refitted.

    ``history`` is the squared distance from the set with eps = 0, with the damping's pull toward W, per response and
    in scaled units; it never rises. The iterate that is best on ``problem.checks``, if there are any, is kept.
    """
    problem = on.stated(problem)
    here = on.region(problem, 0.0)
    (weight,) = path(here, [chosen.elements])
    run = refit(problem, here, weight, chosen, DESCENTS if settings.steps is None else settings.steps)
    shift = on.shift_of(problem, here, run.best)
    factors = factors_of(here, run.best.weight, shift)
    error = on.measure(problem, factors.dense(), shift).error
    return dataclasses.replace(finished(problem, factors, run.history), error=error)


def path(here: Region, counts: list[int]) -> list[Real]:
    """Return for each of the rising ``counts`` a weight to take its entries from: the first on the path with as many.

    The path is the convex program at GAINS, each warm-started from the one before; behind its end stands W.
    """
    found: list[Real] = []
    scale = on.reach_of(here)
    now, solver = on.natural(here, entries), on.system(here)
    for gain in GAINS:
        if len(found) == len(counts):
            return found
        now = relax(dataclasses.replace(here, radius=gain * scale), now, PATH, solver).last
        enough = np.count_nonzero(now.weight)
        while len(found) < len(counts) and counts[len(found)] <= enough:
            found.append(now.weight)
    return found + [here.weight] * (len(counts) - len(found))


def refit(problem: Problem, here: Region, weight: Real, chosen: Candidate, steps: int) -> Run[Point]:
    """Return the better of two fits: on the largest entries of a weight of the path, and on those of the layer."""
    strength = on.strength_of(here, chosen.damping)
    pull = Pull(here.weight, strength)
    runs = []
    for origin in (weight, here.weight):
        mask = largest(scores(here, origin), chosen.elements)
        start = supported(here, here.weight, mask, pull)
        runs.append(on.fitted_run(problem, here, pull, on_support(here, strength, mask), start, steps))
    return min(runs, key=lambda run: run.best.distance)


def candidates(problem: Problem, multiple: int, settings: Settings) -> list[Candidate]:
    """Return the DENSITIES that are at least one entry, each fitted to the columns.

    The loss is that of ddlr's candidates.
    """
    problem = on.stated(problem)
    counts = sorted({int(share * problem.params) for share in DENSITIES} - {0})
    here, damping = on.region(problem, 0.0), choose_damping(problem)
    found = []
    for count, weight in zip(counts, path(here, counts), strict=True):
        best = refit(problem, here, weight, _candidate(count, 0.0, damping), DESCENTS // 2).best
        dense = np.asarray(best.weight, np.float64) * here.unit
        found.append(_candidate(count, on.loss(problem, dense, on.shift_of(problem, here, best)), damping))
    return found


NETTRIM = Method(candidates, choose, fit, within_error, needs_columns=True, structures=("elements",))
