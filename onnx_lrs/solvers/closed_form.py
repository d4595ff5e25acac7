"""The methods that need no iteration over data: svd, hsvd, channels, magnitude, and their union lrs.

Each is a function ``method(problem, multiple, damping) -> Family``; a split admits every rank at once (spectral.py), so a
method is fully described by the supports it tries, the metric of its basis, and whether it refits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnx_lrs.solvers.channels import eliminate
from onnx_lrs.solvers.problem import Array, Budget, Candidate, Factors, Indices, Problem, columns_of, objective
from onnx_lrs.solvers.spectral import (
    DAMPING,
    Reduced,
    Split,
    assemble,
    damped,
    losses,
    reduce_rows,
    splits,
    unexplained,
)

NO_CHANNELS: Indices = np.zeros(0, np.int64)
DATA_FREE = ("svd", "magnitude")  # baselines that see no data; the bias stays as it is
LARGEST = 0.95  # of the dense layer: a smaller saving is not worth a second branch
ROUNDS = 4  # of re-choosing the support; the objective falls by less than 1e-4 after the second


@dataclasses.dataclass(frozen=True)
class Family:
    """All approximations a method offers for one layer."""

    reduced: Reduced
    splits: tuple[Split, ...]
    damping: float = DAMPING
    shift: bool = True


def kept_counts(channels: int, rows: int, multiple: int) -> list[int]:
    """Return the support sizes to try: multiples, at most 12 (an eigenproblem of ``rows`` each), denser at the low end."""
    most = 12 if rows <= 1024 else 6 if rows <= 2048 else 3
    every = np.arange(multiple, channels, multiple)
    if len(every) <= most:
        return [int(k) for k in every]
    picked = np.unique(np.round(np.geomspace(1, len(every), most)).astype(int))
    return [int(every[i - 1]) for i in picked]


def hsvd(problem: Problem, multiple: int, damping: float) -> Family:
    """Low rank in the H-metric (METHODS 2): U from the eigenproblem of W H W^T, exact for every rank."""
    reduced = reduce_rows(problem.weight)
    order = np.arange(problem.channels)
    return Family(reduced, tuple(splits(reduced.target, damped(problem, damping), order, [0], problem.taps)), damping)


def svd(problem: Problem, multiple: int, damping: float) -> Family:
    """Plain truncated SVD of the weights; sees no data, so the bias stays too. A baseline."""
    reduced = reduce_rows(problem.weight)
    order = np.arange(problem.channels)
    return Family(reduced, tuple(splits(reduced.target, None, order, [0], problem.taps)), shift=False)


def channels(problem: Problem, multiple: int, damping: float) -> Family:
    """Kept input channels only: exact backward elimination, least-squares refit (METHODS 3)."""
    reduced = reduce_rows(problem.weight)
    metric = damped(problem, damping)
    order = importance(reduced.target, metric, problem.taps)
    counts = range(multiple, problem.channels, multiple)
    return Family(reduced, tuple(splits(reduced.target, metric, order, counts, problem.taps, low_rank=False)), damping)


def magnitude(problem: Problem, multiple: int, damping: float) -> Family:
    """Keep the input channels with the largest weights, unchanged; sees no data. A baseline."""
    reduced = reduce_rows(problem.weight)
    order = importance(reduced.target, None, problem.taps)
    none = np.zeros((len(reduced.target), 0))
    found = [
        Split(order[:k], reduced.target[:, columns_of(order[:k], problem.taps)], none)
        for k in range(multiple, problem.channels, multiple)
    ]
    return Family(reduced, tuple(found), shift=False)


def lrs(problem: Problem, multiple: int, damping: float) -> Family:
    """Low rank and kept channels together; contains hsvd and the supports of ``channels``, so it is never worse."""
    reduced = reduce_rows(problem.weight)
    metric = damped(problem, damping)
    order = importance(reduced.target, metric, problem.taps)
    counts = [0, *kept_counts(problem.channels, len(reduced.target), multiple)]
    return Family(reduced, tuple(splits(reduced.target, metric, order, counts, problem.taps)), damping)


def importance(target: Array, metric: Array | None, taps: int) -> Indices:
    """Return the channels, most useful first; by the norm of their weights when the metric is the identity (None)."""
    if metric is not None:
        return eliminate(target, metric, taps)
    norms = np.square(target).reshape(len(target), -1, taps).sum(axis=(0, 2))
    return np.argsort(-norms, kind="stable").astype(np.int64)


def candidates(problem: Problem, family: Family, multiple: int) -> list[Candidate]:
    """Return every (rank, support) of the family that is smaller than the dense layer, judged on the validation moments."""
    moments = problem.validation or problem.moments
    centre = problem.moments.mean if family.shift and problem.moments is not None else None
    scale = objective(problem.weight, np.zeros_like(problem.weight), moments, problem.affine)
    found = []
    for split in family.splits:
        rest = unexplained(family.reduced.target, split, problem.taps)
        most = min(split.basis.shape[1], problem.params // problem.rank_cost)
        curve = losses(rest, split.basis[:, :most], moments, problem.affine, centre) / max(scale, 1e-300)
        for rank in range(0, most + 1, multiple):
            params = rank * problem.rank_cost + len(split.support) * problem.taps * problem.out
            if 0 < params <= LARGEST * problem.params:
                form = form_of(rank, len(split.support))
                found.append(Candidate(form, rank, params, curve[rank], split.support, family.damping))
    return found


def form_of(rank: int, kept: int) -> str:
    """Return the name of the form: low-rank, channels or both."""
    if not kept:
        return "low-rank"
    return "low-rank + channels" if rank else "channels"


def refit(problem: Problem, chosen: Candidate) -> tuple[Factors, tuple[float, ...]]:
    """Solve for a candidate's rank, support and damping, re-choosing the support while J falls (METHODS 4).

    Returns the factors and J (undamped) of the accepted iterates, falling.
    """
    support, rank = chosen.support, chosen.rank
    reduced = reduce_rows(problem.weight)
    metric = damped(problem, chosen.damping)
    best = _solve_split(problem, reduced, metric, support, rank)
    history = [objective(problem.weight, best.dense(), problem.moments, problem.affine)]
    rounds = ROUNDS if rank and len(support) and metric is not None else 0
    for _ in range(rounds):
        basis = best.left if reduced.rotation is None else reduced.rotation.T @ best.left
        residual = reduced.target - basis @ (basis.T @ reduced.target)
        support = importance(residual, metric, problem.taps)[: len(best.kept)]
        trial = _solve_split(problem, reduced, metric, support, rank)
        value = objective(problem.weight, trial.dense(), problem.moments, problem.affine)
        if value >= history[-1]:
            break
        best = trial
        history.append(value)
    return best, tuple(history)


def _solve_split(problem: Problem, reduced: Reduced, metric: Array | None, support: Indices, rank: int) -> Factors:
    others = np.setdiff1d(np.arange(problem.channels), support)
    order = np.concatenate([support, others]).astype(np.int64)
    (split,) = splits(reduced.target, metric, order, [len(support)], problem.taps)
    return assemble(problem, reduced, split, rank)


def best_within(found: list[Candidate], budget: Budget) -> Candidate | None:
    """Return the candidate of least loss within the budget; the smaller one on a tie."""
    if budget.params is not None:
        found = [c for c in found if c.params <= budget.params]
    else:
        found = [c for c in found if (c.rank, len(c.support)) == (budget.rank, budget.channels)]
    return min(found, key=lambda c: (c.loss, c.params), default=None)
