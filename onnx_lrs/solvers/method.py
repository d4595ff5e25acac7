"""What a method of approximation is: candidates for a plan, factors for a candidate, and one call that does both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from onnx_lrs.solvers.moments import Moments, moments_of
from onnx_lrs.solvers.problem import (
    LARGEST,
    AnyFactors,
    Budget,
    Candidate,
    Problem,
    Settings,
    Solution,
    Status,
    Structure,
    objective,
)

Candidates = Callable[[Problem, int, Settings], list[Candidate]]
Chosen = Callable[[Problem, Budget, Settings], Candidate | None]
Fit = Callable[[Problem, Candidate, Settings], Solution]
Direct = Callable[[Problem, Budget, Settings], Solution | None]
Guarantee = Callable[[Problem, float, Settings], Solution]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to approximate a layer, called as ``method(problem, budget, settings=...) -> Solution``.

    Parameters
    ----------
    candidates : callable
        ``(problem, multiple, settings)`` -> the points of the error curve, with losses on the validation moments.
    choose : callable
        ``(problem, budget, settings)`` -> the candidate for a budget of params or a split, or None if none fits.
    fit : callable
        ``(problem, candidate, settings)`` -> the factors, perhaps on other statistics than the candidate came from.
    within_error : callable, optional
        ``(problem, gain, settings)`` -> the smallest factors that keep to an error, for methods that guarantee one.
    needs_columns : bool
        Whether sampled columns are needed, not only moments.
    sees_data : bool
        False for the baselines that fit nothing.
    direct : callable, optional
        ``(problem, budget, settings)`` -> what ``choose`` and ``fit`` give together, where they share a factorisation.
    structures : tuple of str
        What the sparse part may keep, as in :class:`onnx_lrs.solvers.Settings`.
    fully_connected_only : bool
        Whether the method is stated for fully connected layers and leaves convolutions alone.
    """

    candidates: Candidates
    choose: Chosen
    fit: Fit
    within_error: Guarantee | None = None
    needs_columns: bool = False
    sees_data: bool = True
    structures: tuple[Structure, ...] = ("channels",)
    fully_connected_only: bool = False
    direct: Direct | None = None

    def __call__(self, problem: Problem, budget: Budget, *, settings: Settings | None = None) -> Solution:
        """Approximate one layer within a budget; see :func:`onnx_lrs.solvers.solve`."""
        settings = settings or Settings()
        if self.needs_columns and problem.columns is None:
            raise ValueError("this method needs sampled columns: Problem(..., columns=Columns(inputs))")
        if budget.gain is not None and self.within_error is None:
            raise ValueError("this method guarantees no error: give params or a split instead of a gain")
        if not problem.finite:
            return Solution(Status.NOT_FINITE, None, float("nan"))
        problem = with_moments(problem)
        if budget.params is not None and budget.params >= problem.params:
            return Solution(Status.DENSE, None, 0.0)
        try:
            return self._solved(problem, budget, settings)
        except np.linalg.LinAlgError:  # statistics that are no moments (negative eigenvalues): their nearest ones
            found = self._solved(definite(problem), budget, settings)
            return found if found.factors is None else dataclasses.replace(found, status=Status.SINGULAR)

    def _solved(self, problem: Problem, budget: Budget, settings: Settings) -> Solution:
        if budget.gain is not None:
            assert self.within_error is not None  # checked by the caller
            return self._flagged(problem, self.within_error(problem, budget.gain, settings))
        wanted = budget
        if budget.rank is not None and budget.rank > min(problem.weight.shape):
            wanted = dataclasses.replace(budget, rank=_largest_useful(problem, budget))
        found = self._within_budget(problem, wanted, settings)
        if found is None:
            nothing = objective(problem.weight, 0 * problem.weight, problem.moments, problem.affine)
            return Solution(Status.INFEASIBLE, None, nothing)
        if wanted is not budget and found.status is Status.SOLVED:
            return dataclasses.replace(found, status=Status.RANK_TOO_LARGE)
        return self._flagged(problem, found)

    def _within_budget(self, problem: Problem, budget: Budget, settings: Settings) -> Solution | None:
        if self.direct is not None:
            return self.direct(problem, budget, settings)
        chosen = self.choose(problem, budget, settings)
        return None if chosen is None else self.fit(problem, chosen, settings)

    def _flagged(self, problem: Problem, found: Solution) -> Solution:
        """Return the solution, marked SINGULAR if it was fitted to moments that cannot have full rank."""
        m = problem.moments
        if found.status is not Status.SOLVED or m is None or problem.width is not None or not self.sees_data:
            return found
        singular = m.count <= problem.d or not np.diagonal(m.cov).any()
        return dataclasses.replace(found, status=Status.SINGULAR) if singular else found


def _largest_useful(problem: Problem, budget: Budget) -> int:
    """Return the largest rank that the matrix has and that, beside the sparse part, is worth a candidate."""
    sparse = (budget.channels or 0) * problem.taps * problem.out + (budget.elements or 0)
    most = min(int(LARGEST * problem.params), problem.params - 1)
    return min(problem.out, problem.d, max(most - sparse, 0) // problem.rank_cost)


def with_moments(problem: Problem) -> Problem:
    """Return the problem with moments, those of its columns and checks where it has none."""
    if problem.moments is not None or problem.columns is None:
        return problem
    validation = problem.validation or (None if problem.checks is None else moments_of(problem.checks.inputs))
    return dataclasses.replace(problem, moments=moments_of(problem.columns.inputs), validation=validation)


def definite(problem: Problem) -> Problem:
    """Return the problem with its moments projected onto the positive semidefinite matrices."""
    return dataclasses.replace(problem, moments=_definite(problem.moments), validation=_definite(problem.validation))


def _definite(moments: Moments | None) -> Moments | None:
    if moments is None:
        return None
    values, vectors = np.linalg.eigh((moments.cov + moments.cov.T) / 2)
    return dataclasses.replace(moments, cov=(vectors * np.maximum(values, 0.0)) @ vectors.T)


def finished(problem: Problem, factors: AnyFactors, history: tuple[float, ...] = ()) -> Solution:
    """Return the solved record of factors: their objective on the undamped moments.

    Raises
    ------
    FloatingPointError
        If a solver returned values that are not finite (a bug).
    """
    value = objective(problem.weight, factors.dense(), problem.moments, problem.affine)
    if not np.isfinite(value):
        raise FloatingPointError("a solver returned values that are not finite")
    return Solution(Status.SOLVED, factors, value, history)
