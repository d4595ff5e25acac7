r"""Refit a layer to what the compressed network feeds it and what follows it (METHODS 1 and 5).

With x the columns that the compressed prefix gives, y what the layer should give (the original's output, less what a
shortcut already differs by), H = cov(x), C = cov(y, x), a pull delta toward the original weights W and a damping mu of
the metric,

.. math:: T = (C + \delta W)(H + \delta I)^{-1}, \qquad J_\mu(E) = \|(T - E)(H + \mu I)^{1/2}\|_F^2

so that every closed form for (W, H) serves (T, H + mu I). METHODS has mu = delta; apart they do different things: a
large delta leaves the correction out, where few columns cannot tell it, a large mu lets H count for less. delta is the
one of a grid that is best on other columns, then mu (where an activation follows, the least of those within 1 % of the
best); what comes of it is taken if it is better there than the factors that it starts from, which were fitted layer by
layer: too few samples fall back to those.

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
from onnx_lrs.solvers.problem import (
    AnyFactors,
    Array,
    ElementFactors,
    Factors,
    Problem,
    ProjectedFactors,
    Response,
    SpatialFactors,
    TuckerFactors,
)
from onnx_lrs.solvers.projected import as_tucker, flattened
from onnx_lrs.solvers.prox import through
from onnx_lrs.solvers.spatial import goal_by_tap, metric_by_tap
from onnx_lrs.solvers.spectral import Seen, assemble, joint, reduce_rows, seen, with_level

GRID = tuple(10.0**power for power in range(-4, 3))  # delta in units of the mean diagonal of H
METRICS = (0.1, 0.01, 1.0, 10.0)  # mu in the same units; the deltas are compared with the first
TIE = 0.01  # errors on a sample of columns that are this close do not tell two dampings apart
ROUNDS = (0.1, 0.3, 1.0, 1.0)  # rho, round by round


@dataclasses.dataclass(frozen=True)
class Refit:
    """How a refit ended.

    ``damping`` is None where the factors are those it started from, but perhaps for the bias; ``errors`` are the ones
    behind the activation on the checks: before, after the linear refit, and after all.
    """

    factors: AnyFactors
    damping: float | None
    errors: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Pull:
    """H + delta I, factorised, and delta times W: what every T of one delta needs."""

    damping: float
    level: float
    factor: Array
    weight: Array

    def target(self, cross: Array) -> Target:
        """Return T for C = ``cross`` (out, d)."""
        image = cross + self.level * self.weight
        solved = scipy.linalg.cho_solve((self.factor, True), image.T, check_finite=False)
        return Target(np.ascontiguousarray(solved.T), image, self.level)


@dataclasses.dataclass(frozen=True)
class Target:
    """T (out, d) with its image T (H + delta I) and delta, which give its image in every metric H + mu I."""

    weight: Array
    image: Array
    level: float

    def seen(self, level: float) -> Array:
        """Return T (H + mu I) for mu = ``level``."""
        return self.image + (level - self.level) * self.weight


def pull(problem: Problem, damping: float) -> Pull:
    """Return what one delta needs; one Cholesky of d x d."""
    metric, level = _metric(problem, damping)
    factor = scipy.linalg.cholesky(metric.T, lower=True, overwrite_a=True, check_finite=False)
    return Pull(damping, level, factor, problem.weight)


def _metric(problem: Problem, damping: float) -> tuple[Array, float]:
    """Return H + damping * mean(diag H) * I, and what was added to the diagonal."""
    assert problem.moments is not None  # a refit has moments
    return with_level(problem.moments.second(problem.affine), damping)


class Form:
    """The metric of one mu, ready for a chain (spatial, projected, Tucker-2) or for low rank + channels."""

    def __init__(self, problem: Problem, like: AnyFactors, damping: float) -> None:
        self._problem = flattened(problem) if isinstance(like, ProjectedFactors) else problem
        metric, self._level = _metric(problem, damping)
        self._metric = metric_by_tap(self._problem, metric) if isinstance(like, SpatialFactors) else metric

    def fit(self, target: Target, like: AnyFactors, mean: Array, steps: bool = True) -> AnyFactors:
        """Return the best factors for T and the mean response, with the rank and channels of ``like``.

        In closed form; a spatial one gets the best left for the right that ``like`` has, and with ``steps`` some on
        from there.
        """
        problem = self._problem
        if isinstance(like, SpatialFactors):
            goal = goal_by_tap(problem, self._metric, target.weight, target.seen(self._level))
            if isinstance(like, TuckerFactors):
                fitted: AnyFactors = as_tucker(goal.fit(like.right, steps, like.rank), like.bias_shift)
            else:
                left, right, _ = goal.fit(like.right, steps)
                fitted = dataclasses.replace(like, left=left, right=right)
            return with_mean(problem, fitted, mean)
        assert isinstance(like, Factors)
        reduced = reduce_rows(target.weight)
        if reduced.rotation is None:
            image = target.seen(self._level)
            wanted = Seen(target.weight, image, image @ target.weight.T)
        else:
            wanted = seen(reduced.target, self._metric)
        split = joint(wanted, self._metric, like.kept, problem.taps)
        return with_mean(problem, assemble(problem, reduced, split, like.rank, shift=False), mean)


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


@dataclasses.dataclass(frozen=True)
class Trial:
    """Factors and their error behind the activation on the checks; delta is None where they are no refit."""

    error: float
    factors: AnyFactors
    damping: float | None = None


@dataclasses.dataclass(frozen=True)
class Tried:
    """The error of a fit with one damping. Its factors are made again if wanted: those of all would fill the memory."""

    damping: float
    error: float


def refit(
    problem: Problem,
    start: AnyFactors,
    grid: Sequence[float] = GRID,
    rounds: Sequence[float] = ROUNDS,
    metrics: Sequence[float] = METRICS,
) -> Refit:
    """Refit the factors to the problem's response; never worse on the checks than those it starts from.

    Parameters
    ----------
    problem : Problem
        With moments and response of the columns to fit on, a sample of those as ``columns`` and others as ``checks``.
    start : Factors, SpatialFactors or ElementFactors
        Gives form, rank and channels. Single elements keep their places and values; only the bias is fitted again.
    grid : sequence of float
        Pulls delta to try.
    rounds : sequence of float
        rho of each round behind the activation; empty for a linear refit.
    metrics : sequence of float
        Dampings mu of the metric to try.
    """
    fixed = isinstance(start, ElementFactors)
    pulls = [] if fixed else [linear(problem, start, damping, metrics[0]) for damping in grid]
    return finish(problem, as_it_is(problem, start), pulls, rounds, metrics)


def as_it_is(problem: Problem, start: AnyFactors) -> list[Trial]:
    """Return the start, and the start with the bias that gives the mean response."""
    assert problem.response is not None
    centred = with_mean(problem, start, problem.response.mean)
    return [Trial(_error(problem, factors), factors) for factors in (start, centred)]


def linear(problem: Problem, start: AnyFactors, damping: float, metric: float = METRICS[0]) -> Tried:
    """Return how good the linear refit with one pull delta is; the start has no single elements."""
    assert problem.response is not None
    assert not isinstance(start, ElementFactors)
    target = pull(problem, damping).target(centred_cross(problem, problem.response))
    form = Form(problem, start, metric)
    return Tried(damping, _error(problem, form.fit(target, start, problem.response.mean, steps=False)))


def finish(
    problem: Problem,
    starts: Sequence[Trial],
    pulls: Sequence[Tried],
    rounds: Sequence[float],
    metrics: Sequence[float] = METRICS,
) -> Refit:
    """Go on from the start, the first of ``starts``: choose delta, then mu, then fit behind the activation."""
    assert problem.response is not None
    start, best, mean = starts[0].factors, min(starts, key=_by_error), problem.response.mean
    if not pulls:
        return Refit(best.factors, None, (starts[0].error, best.error, best.error))
    behind = rounds if problem.activation != LINEAR else ()
    pulled = pull(problem, _least(pulls, bool(behind)))
    target = pulled.target(centred_cross(problem, problem.response))

    def fitted(form: Form, steps: bool) -> float:
        nonlocal best
        factors = form.fit(target, start, mean, steps)
        found = Trial(_error(problem, factors), factors, pulled.damping)
        best = min(best, found, key=_by_error)
        return found.error

    errors = [Tried(mu, fitted(Form(problem, start, mu), steps=False)) for mu in metrics]
    form = Form(problem, start, _least(errors, bool(behind)))
    if isinstance(start, SpatialFactors):
        fitted(form, steps=True)
    linearly = best.error
    if behind:
        for factors in behind_activation(problem, best.factors, (pulled, form), behind):
            best = min(best, Trial(_error(problem, factors), factors, pulled.damping), key=_by_error)
    return Refit(best.factors, best.damping, (starts[0].error, linearly, best.error))


def _by_error(trial: Trial) -> float:
    return trial.error


def _least(tried: Sequence[Tried], tie: bool) -> float:
    """Return the damping of least error; with ``tie`` the least damping among those that are nearly as good.

    Where many fit equally well, a strong one would only hold back what comes behind the activation.
    """
    most = (1 + TIE * tie) * min(each.error for each in tried)
    return min(each.damping for each in tried if each.error <= most)


def _error(problem: Problem, factors: AnyFactors) -> float:
    checks = problem.checks or problem.columns
    assert checks is not None  # a refit has columns
    return activation_error(problem, factors, checks)


def behind_activation(
    problem: Problem, start: AnyFactors, how: tuple[Pull, Form], rounds: Sequence[float]
) -> Iterator[AnyFactors]:
    """Yield the factors after each round of the refit behind the activation."""
    assert problem.columns is not None
    assert problem.response is not None
    columns, factors, (pulled, form) = problem.columns, start, how
    inputs = columns.inputs - columns.inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
    target = pre_activation(problem, columns)
    wanted = problem.activation(argument(problem, target, columns))
    for rho in rounds:
        now = argument(problem, respond(problem, factors, columns), columns)
        moved = unargument(problem, through(now, wanted, rho, problem.activation), columns) - target
        mean = moved.mean(axis=0, dtype=np.float64)
        cross = ((moved - mean.astype(np.float32)).T @ inputs).astype(np.float64) / len(inputs)
        response = Response(problem.response.mean + mean, problem.response.cross + cross)
        factors = form.fit(pulled.target(centred_cross(problem, response)), factors, response.mean)
        yield factors
