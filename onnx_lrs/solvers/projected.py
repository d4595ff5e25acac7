r"""The projected form, a k x k kernel as 1 x 1 followed by k x k (METHODS 2c), and Tucker-2, with a 1 x 1 behind it.

.. math:: W[o, i, t] \approx \sum_r \mathrm{left}[o, r, t]\;\mathrm{right}[r, i]

with t the kernel's positions: the input channels are projected to r of them, which the k x k kernel reads. This is the
spatial form with the whole kernel on the second axis, k x k read as 1 x k^2, so that fit and candidates are those of
spatial.py. It wins where the channels of a layer's input are more alike than those of its output.

Where both are, left is of low rank over the outputs too: with G the normal equations' matrix for a given right and
``left`` their solution, ``U U^T left`` with U the top eigenvectors of ``left G left^T`` is the best of that rank, and
loses the eigenvalues that it drops. One eigenproblem of out x out serves every rank beside one r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from onnx_lrs.solvers.problem import LARGEST, Array, Candidate, Problem, ProjectedFactors, TuckerFactors, spread
from onnx_lrs.solvers.spatial import RANKS, Half, Trial, fit_halves, fit_spatial, shift_of, top, trials

FORM, TUCKER = ProjectedFactors.form, TuckerFactors.form


def applies(problem: Problem) -> bool:
    """Return whether the layer has a 2-D kernel that is more than a point."""
    return problem.kernel is not None and problem.taps > 1


def flattened(problem: Problem) -> Problem:
    """Return the problem with its kernel read as one row of positions; its columns keep their order."""
    return dataclasses.replace(problem, kernel=(1, problem.taps))


def projected_candidates(problem: Problem, multiple: int, damping: float) -> list[Candidate]:
    """Return factorisations of both forms and a few ranks with J as their loss; empty if they do not apply."""
    if not applies(problem):
        return []
    found, inner = [], spread(range(multiple, problem.channels, multiple), RANKS)
    for trial in trials(flattened(problem), multiple, damping):
        found.append(trial.candidate(FORM, damping))
        if problem.moments is not None or trial.rank in inner:  # without moments every rank is tried
            found += _tucker_candidates(problem, trial, multiple, damping)
    return found


def _tucker_candidates(problem: Problem, trial: Trial, multiple: int, damping: float) -> Iterator[Candidate]:
    """Yield Tucker-2 of every outer rank beside one inner rank.

    With P the projected form's weight and U the basis of one rank, J = tr (W - U U^T P) V (W - U U^T P)^T, that is
    tr W V W^T less the trace of U^T P V (2 W - P)^T U.
    """
    basis = top(trial.regression.explained(trial.left), problem.out)
    near = problem.weight - trial.difference
    gains = np.einsum("or,or->r", basis, near @ (trial.image + trial.seen).T @ basis)
    total = float(np.vdot(trial.image, problem.weight))
    losses = np.maximum(total - np.concatenate([[0.0], np.cumsum(gains)]), 0.0)
    none = np.zeros(0, np.int64)
    for rank in range(multiple, min(problem.out, trial.rank * problem.taps), multiple):
        params = tucker_params(problem.channels, problem.out, problem.taps, (trial.rank, rank))
        if params < min(trial.params, LARGEST * problem.params):
            yield Candidate(TUCKER, rank, params, float(losses[rank]), none, damping, inner=trial.rank)


def tucker_params(channels: int, out: int, taps: int, ranks: tuple[int, int]) -> int:
    """Return the weights of Tucker-2 with (inner, outer) ranks."""
    inner, rank = ranks
    return channels * inner + inner * rank * taps + rank * out


def fit_projected(problem: Problem, rank: int, damping: float) -> tuple[ProjectedFactors, tuple[float, ...]]:
    """Return the factors of one rank and J (on the damped metric) after the fit of left, right and left again."""
    found, history = fit_spatial(flattened(problem), rank, damping)
    return ProjectedFactors(found.left, found.right, found.bias_shift), history


def fit_tucker(problem: Problem, inner: int, rank: int, damping: float) -> tuple[TuckerFactors, tuple[float, ...]]:
    """Return Tucker-2 of the given ranks and J (on the damped metric) after left, right and left again."""
    half, history = fit_halves(flattened(problem), inner, damping, rank)
    factors = as_tucker(half, np.zeros(problem.out))
    return dataclasses.replace(factors, bias_shift=shift_of(problem, factors)), history


def as_tucker(half: Half, shift: Array) -> TuckerFactors:
    """Return left, right and the basis of the outputs as three convolutions."""
    left, right, basis = half
    assert basis is not None  # an outer rank was asked for
    core = (basis.T @ left.reshape(len(left), -1)).reshape(basis.shape[1], *left.shape[1:])
    return TuckerFactors(core, right, shift, basis)
