r"""The projected form: a k x k kernel as 1 x 1 followed by k x k (METHODS 2c).

.. math:: W[o, i, t] \approx \sum_r \mathrm{left}[o, r, t]\;\mathrm{right}[r, i]

with t the kernel's positions: the input channels are projected to r of them, which the k x k kernel reads. This is the
spatial form with the whole kernel on the second axis, k x k read as 1 x k^2, so that fit and candidates are those of
spatial.py. It wins where the channels of a layer's input are more alike than those of its output.
"""

from __future__ import annotations

import dataclasses

from onnx_lrs.solvers.problem import Candidate, Problem, ProjectedFactors
from onnx_lrs.solvers.spatial import fit_spatial, two_step_candidates

FORM = "projected"


def applies(problem: Problem) -> bool:
    """Return whether the layer has a 2-D kernel that is more than a point."""
    return problem.kernel is not None and problem.taps > 1


def flattened(problem: Problem) -> Problem:
    """Return the problem with its kernel read as one row of positions; its columns keep their order."""
    return dataclasses.replace(problem, kernel=(1, problem.taps))


def projected_candidates(problem: Problem, multiple: int, damping: float) -> list[Candidate]:
    """Return projected factorisations of a few ranks with J as their loss; empty if the form does not apply."""
    if not applies(problem):
        return []
    return two_step_candidates(flattened(problem), multiple, damping, FORM)


def fit_projected(problem: Problem, rank: int, damping: float) -> tuple[ProjectedFactors, tuple[float, ...]]:
    """Return the factors of one rank and J (on the damped metric) after the fit of left, right and left again."""
    found, history = fit_spatial(flattened(problem), rank, damping)
    return ProjectedFactors(found.left, found.right, found.bias_shift), history
