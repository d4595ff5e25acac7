"""One entrance to every method: validated in, validated out, and every way to fail is a Status."""

from __future__ import annotations

import numpy as np

from onnx_lrs.solvers import admm, closed_form, greedy
from onnx_lrs.solvers.ddlr import DDLR
from onnx_lrs.solvers.method import Method, definite
from onnx_lrs.solvers.nettrim import NETTRIM
from onnx_lrs.solvers.problem import Budget, Candidate, Problem, Settings, Solution

METHODS: dict[str, Method] = {
    "lrs": closed_form.LRS,
    "admm": admm.ADMM,
    "greedy": greedy.GREEDY,
    "ddlr": DDLR,
    "nettrim": NETTRIM,
    "hsvd": closed_form.HSVD,
    "channels": closed_form.CHANNELS,
    "svd": closed_form.SVD,
    "spatial": closed_form.SPATIAL,
    "magnitude": closed_form.MAGNITUDE,
}


def curve(
    problem: Problem, method: str, multiple: int, settings: Settings | None = None, each_form: bool = False
) -> list[Candidate]:
    """Return the candidates of ``method`` that no other one beats in both parameters and loss, by rising parameters.

    With ``each_form`` that no other one of the same form and number of kept channels beats: what takes fewer parameters
    may take longer. Empty if the problem holds values that are not finite.
    """
    if not problem.finite:
        return []
    try:
        found = METHODS[method].candidates(problem, multiple, settings or Settings())
    except np.linalg.LinAlgError:
        found = METHODS[method].candidates(definite(problem), multiple, settings or Settings())
    if not each_form:
        return undominated(found)
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in found:
        groups.setdefault((candidate.form, len(candidate.support) if candidate.rank else 0), []).append(candidate)
    return sorted((c for group in groups.values() for c in undominated(group)), key=lambda c: (c.params, c.loss))


def undominated(found: list[Candidate]) -> list[Candidate]:
    """Return the Pareto front, by rising parameters."""
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.params, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def solve(problem: Problem, budget: Budget, *, method: str = "lrs", settings: Settings | None = None) -> Solution:
    """Approximate one layer within a budget.

    Parameters
    ----------
    problem : Problem
        The layer and what is known of its inputs.
    budget : Budget
        Parameters (the method chooses the split), the split itself, or the error that is allowed.
    method : str
        A key of :data:`METHODS`; ``METHODS[name](problem, budget, settings=settings)`` says the same.
    settings : Settings, optional
        How the method works.

    Returns
    -------
    Solution
        ``factors`` within the budget, or None with the status INFEASIBLE, DENSE, NOT_FINITE or ERROR_TOO_SMALL.

    Raises
    ------
    KeyError
        If the method is unknown.
    ValueError
        If the method cannot take such a budget, or needs columns that the problem lacks.
    """
    return METHODS[method](problem, budget, settings=settings)


def fit(problem: Problem, chosen: Candidate, method: str, settings: Settings | None = None) -> Solution:
    """Return the factors for a candidate of :func:`curve`, perhaps on other statistics than the curve's."""
    try:
        return METHODS[method].fit(problem, chosen, settings or Settings())
    except np.linalg.LinAlgError:
        return METHODS[method].fit(definite(problem), chosen, settings or Settings())
