r"""Refit a layer to what the compressed network feeds it and what follows it (METHODS 1 and 5).

With x the columns that the compressed prefix gives, y what the layer should give (the original's output, less what a
shortcut already differs by), H = cov(x), C = cov(y, x) and a damping delta toward the original weights W,

.. math:: T = (C + \delta W)(H + \delta I)^{-1}, \qquad J_\delta(E) = \|(T - E)(H + \delta I)^{1/2}\|_F^2

so that every closed form for (W, H) serves (T, H + delta I). The damping is the one of a grid that is best on other
columns, and no worse there than the factors that it starts from, which were fitted layer by layer: too few samples
fall back to those.

Behind a piecewise linear activation phi the target y is then replaced, in turns, by

.. math:: z = \arg\min_z (\phi(u) - \phi(z))^2 + \rho (z - v)^2

(u what phi sees in the original network, v what it sees now) and the layer is fitted to z. z is known on a sample of
the columns; the moments of all columns are moved by what z and y differ by on the sample. The iterate that is best on
the other columns behind phi is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg

from onnx_lrs.solvers.activation import LINEAR
from onnx_lrs.solvers.behind import activation_error, argument, bias_of, pre_activation, respond, unargument
from onnx_lrs.solvers.problem import AnyFactors, Array, ElementFactors, Factors, Problem, Response, SpatialFactors
from onnx_lrs.solvers.prox import through
from onnx_lrs.solvers.spatial import fit_spatial
from onnx_lrs.solvers.spectral import DAMPING, Seen, assemble, damped, joint, reduce_rows, seen

GRID = tuple(10.0**power for power in range(-4, 3))  # delta in units of the mean diagonal of H
TIE = 0.01  # errors on a sample of columns that are this close do not tell two dampings apart
ROUNDS = (0.1, 0.3, 1.0, 1.0)  # rho, round by round


@dataclasses.dataclass(frozen=True)
class Refit:
    """How a refit ended.

    ``damping`` is None where the factors are those it started from; ``errors`` are the ones behind the activation on
    the checks: before, after the linear refit, and after all.
    """

    factors: AnyFactors
    damping: float | None
    errors: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class System:
    """H + delta I, factorised, and delta times W: what every target of one damping needs."""

    damping: float
    metric: Array
    factor: Array
    pull: Array

    def target(self, cross: Array) -> Seen:
        """Return T with its products with the metric, for C = ``cross`` (out, d)."""
        image = cross + self.pull
        half = scipy.linalg.solve_triangular(self.factor, image.T, lower=True, check_finite=False)
        solved = scipy.linalg.solve_triangular(self.factor, half, lower=True, trans="T", check_finite=False)
        return Seen(np.ascontiguousarray(solved.T), image, half.T @ half)


def system(problem: Problem, damping: float) -> System:
    """Return the factorised system of one damping; one Cholesky of d x d."""
    assert problem.moments is not None  # a refit has moments
    metric = damped(problem, damping)
    assert metric is not None
    level = float(metric[0, 0] - problem.moments.second(problem.affine)[0, 0])
    factor = scipy.linalg.cholesky(metric, lower=True, check_finite=False)
    return System(damping, metric, factor, level * problem.weight)


def centred_cross(problem: Problem, response: Response) -> Array:
    """Return C for the problem's metric, (out, d): about the means where a bias absorbs them, else about zero."""
    if problem.affine:
        return response.cross
    assert problem.moments is not None
    return response.cross + np.outer(response.mean - bias_of(problem), problem.moments.mean)


def with_mean(problem: Problem, factors: AnyFactors, mean: Array) -> AnyFactors:
    """Return the factors with the bias that gives the mean output ``mean`` (out,); as they are without a bias."""
    if not problem.affine:
        return factors
    assert problem.moments is not None
    shift = mean - bias_of(problem) - factors.dense() @ problem.moments.mean
    return dataclasses.replace(factors, bias_shift=shift)


def fit_target(problem: Problem, like: AnyFactors, known: System, response: Response) -> AnyFactors:
    """Return the best factors for a response with the rank and channels of ``like`` (closed form, or spatial)."""
    goal = known.target(centred_cross(problem, response))
    if isinstance(like, SpatialFactors):
        towards = dataclasses.replace(problem, weight=goal.target)
        found: AnyFactors = fit_spatial(towards, like.rank, known.damping)[0]
        return with_mean(problem, found, response.mean)
    assert isinstance(like, Factors)
    reduced = reduce_rows(goal.target)
    wanted = goal if reduced.rotation is None else seen(reduced.target, known.metric)
    split = joint(wanted, known.metric, like.kept, problem.taps)
    return with_mean(problem, assemble(problem, reduced, split, like.rank, shift=False), response.mean)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A linear fit and its error behind the activation on the checks; ``damping`` None: not a refit of its own."""

    error: float
    factors: AnyFactors
    damping: float | None


def refit(problem: Problem, start: AnyFactors, grid: Sequence[float] = GRID, rounds: Sequence[float] = ROUNDS) -> Refit:
    """Refit the factors to the problem's response; never worse on the checks than those it starts from.

    Parameters
    ----------
    problem : Problem
        With moments and response of the columns to fit on, a sample of those as ``columns`` and others as ``checks``.
    start : Factors, SpatialFactors or ElementFactors
        Gives form, rank and channels. Single elements keep their places and values; only the bias is fitted again.
    grid : sequence of float
        Dampings to try; empty where nothing but the bias and what the activation asks for is to change.
    rounds : sequence of float
        rho of each round behind the activation; empty for a linear refit.
    """
    return finish(problem, [*as_it_is(problem, start), *(linear(problem, start, each) for each in grid)], rounds)


def as_it_is(problem: Problem, start: AnyFactors) -> list[Trial]:
    """Return the start, and the start with the bias that gives the mean response."""
    assert problem.response is not None
    centred = with_mean(problem, start, problem.response.mean)
    return [Trial(_error(problem, factors), factors, None) for factors in (start, centred)]


def linear(problem: Problem, start: AnyFactors, damping: float) -> Trial:
    """Return the linear refit with one damping; single elements stay as they are."""
    assert problem.response is not None
    if isinstance(start, ElementFactors):
        return as_it_is(problem, start)[1]
    factors = fit_target(problem, start, system(problem, damping), problem.response)
    return Trial(_error(problem, factors), factors, damping)


def finish(problem: Problem, trials: Sequence[Trial], rounds: Sequence[float]) -> Refit:
    """Choose among linear trials, the first of which is the start, and go on behind the activation."""
    best = min(trials, key=lambda trial: trial.error)
    if problem.activation != LINEAR and not isinstance(best.factors, ElementFactors) and rounds:
        begin = _least_pulled(trials, best)
        known = system(problem, DAMPING if begin.damping is None else begin.damping)
        found = behind_activation(problem, begin.factors, known, rounds)
        later = [Trial(_error(problem, factors), factors, known.damping) for factors in found]
        last = min([best, *later], key=lambda trial: trial.error)
    else:
        last = best
    return Refit(last.factors, last.damping, (trials[0].error, best.error, last.error))


def _least_pulled(trials: Sequence[Trial], best: Trial) -> Trial:
    """Return the trial with the least damping among those as good as the best.

    Where many dampings fit equally well, a strong one would only hold back what comes behind the activation.
    """
    good = [t for t in trials if t.damping is not None and t.error <= (1 + TIE) * best.error]
    return min(good, key=lambda trial: trial.damping or 0.0, default=best)


def _error(problem: Problem, factors: AnyFactors) -> float:
    checks = problem.checks or problem.columns
    assert checks is not None  # a refit has columns
    return activation_error(problem, factors, checks)


def behind_activation(
    problem: Problem, start: AnyFactors, known: System, rounds: Sequence[float]
) -> Iterator[AnyFactors]:
    """Yield the factors after each round of the refit behind the activation."""
    assert problem.columns is not None
    assert problem.response is not None
    columns, factors = problem.columns, start
    inputs = columns.inputs - columns.inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
    target = pre_activation(problem, columns)
    wanted = problem.activation(argument(problem, target, columns))
    for rho in rounds:
        now = argument(problem, respond(problem, factors, columns), columns)
        moved = unargument(problem, through(now, wanted, rho, problem.activation), columns) - target
        mean = moved.mean(axis=0, dtype=np.float64)
        cross = ((moved - mean.astype(np.float32)).T @ inputs).astype(np.float64) / len(inputs)
        response = Response(problem.response.mean + mean, problem.response.cross + cross)
        factors = fit_target(problem, factors, known, response)
        yield factors
