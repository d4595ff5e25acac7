"""One entrance to every method: validated in, validated out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_lrs.solvers import closed_form
from onnx_lrs.solvers.closed_form import ROUNDS, Family, best_within, candidates, data_free_split, exactly, refit
from onnx_lrs.solvers.problem import AnyFactors, Budget, Candidate, Problem, Solution, Status, objective
from onnx_lrs.solvers.spatial import FORM, fit_spatial
from onnx_lrs.solvers.spectral import assemble, choose_damping, reduce_rows

METHODS: dict[str, Callable[[Problem, int, float], Family]] = {
    "lrs": closed_form.lrs,
    "hsvd": closed_form.hsvd,
    "channels": closed_form.channels,
    "svd": closed_form.svd,
    "magnitude": closed_form.magnitude,
}


def curve(problem: Problem, method: str, multiple: int) -> list[Candidate]:
    """Return the candidates of ``method`` that no other one beats in both parameters and loss, by rising parameters."""
    found = candidates(problem, METHODS[method](problem, multiple, choose_damping(problem)), multiple)
    return undominated(found)


def undominated(found: list[Candidate]) -> list[Candidate]:
    """Return the Pareto front, by rising parameters."""
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.params, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def solve(problem: Problem, budget: Budget, *, method: str = "lrs") -> Solution:
    """Approximate one layer within a budget.

    Parameters
    ----------
    problem : Problem
        The layer and its statistics.
    budget : Budget
        Parameters (the method chooses the split), or rank and number of kept channels.
    method : str
        A key of :data:`METHODS`.

    Returns
    -------
    Solution
        ``factors`` within the budget, or None with the status INFEASIBLE or DENSE.

    Raises
    ------
    KeyError
        If the method is unknown.
    """
    if budget.params is not None and budget.params >= problem.params:
        return Solution(Status.DENSE, None, 0.0)
    if budget.rank is not None and budget.channels is not None and method == "lrs":
        chosen = exactly(problem, budget.rank, budget.channels)  # any split, not only those on the curves
    else:
        family = METHODS[method](problem, budget.multiple, choose_damping(problem))
        chosen = best_within(candidates(problem, family, budget.multiple), budget)
    if chosen is None:
        nothing = objective(problem.weight, 0 * problem.weight, problem.moments, problem.affine)
        return Solution(Status.INFEASIBLE, None, nothing)
    return fit(problem, chosen, method)


def fit(problem: Problem, chosen: Candidate, method: str, rounds: int = ROUNDS) -> Solution:
    """Solve for a candidate's rank and support (from other moments, perhaps), re-chosen ``rounds`` times."""
    if method in closed_form.DATA_FREE:  # nothing to refit
        split = data_free_split(problem, chosen.support, low_rank=chosen.rank > 0)
        factors: AnyFactors = assemble(problem, reduce_rows(problem.weight), split, chosen.rank, shift=False)
        history: tuple[float, ...] = ()
    elif chosen.form == FORM:
        factors, history = fit_spatial(problem, chosen.rank, chosen.damping)
    else:
        factors, history = refit(problem, chosen, rounds)
    return Solution(Status.SOLVED, factors, _objective(problem, factors), history)


def _objective(problem: Problem, factors: AnyFactors) -> float:
    value = objective(problem.weight, factors.dense(), problem.moments, problem.affine)
    if not np.isfinite(value):
        raise FloatingPointError("a solver returned values that are not finite")
    return value
