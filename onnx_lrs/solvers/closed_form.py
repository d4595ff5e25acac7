"""The methods that need no iteration over data: svd, spatial, hsvd, channels, magnitude, and their union lrs.

Each is a function ``method(problem, multiple, damping) -> Family``; a split admits every rank at once (spectral.py), so
a method is fully described by the supports it tries, the metric of its basis, and whether it refits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from onnx_lrs.solvers.channels import eliminate
from onnx_lrs.solvers.method import Method, finished
from onnx_lrs.solvers.moments import Moments
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
    columns_of,
    judged,
    objective,
    spread,
)
from onnx_lrs.solvers.projected import FORM as PROJECTED
from onnx_lrs.solvers.projected import TUCKER, fit_projected, fit_tucker, projected_candidates
from onnx_lrs.solvers.spatial import FORM, RANKS, applies, fit_spatial, spatial_candidates, trials
from onnx_lrs.solvers.spectral import (
    DAMPING,
    Curve,
    Reduced,
    Split,
    assemble,
    choose_damping,
    damped,
    losses,
    prefix_curves,
    reduce_rows,
    splits,
    unexplained,
)
from onnx_lrs.solvers.three_block import propose

NO_CHANNELS: Indices = np.zeros(0, np.int64)
DATA_FREE = ("svd", "spatial", "magnitude")  # baselines that see no data; the bias stays as it is
WORTH = 0.01  # of J: a support from ADMM that gains less is as often worse as better on other samples
ROUNDS = 2  # of re-choosing the support; the objective falls by less than 1e-4 after the second


@dataclasses.dataclass(frozen=True)
class Family:
    """All approximations a method offers for one layer; the curves are made one by one, once."""

    curves: Iterable[Curve]
    damping: float = DAMPING
    others: Sequence[Candidate] = ()


def kept_counts(channels: int, rows: int, multiple: int) -> list[int]:
    """Return the support sizes to try: multiples, at most 12 (an eigenproblem each), denser at the low end."""
    most = 12 if rows <= 1024 else 6 if rows <= 2048 else 3
    return spread(range(multiple, channels, multiple), most)


def hsvd(problem: Problem, multiple: int, damping: float) -> Family:
    """Low rank in the H-metric (METHODS 2): U from the eigenproblem of W H W^T, exact for every rank."""
    target, metric = reduce_rows(problem.weight).target, damped(problem, damping)
    return Family(prefix_curves(problem, target, metric, np.arange(problem.channels), ([0], [])), damping)


def channels(problem: Problem, multiple: int, damping: float) -> Family:
    """Kept input channels only: exact backward elimination, least-squares refit (METHODS 3)."""
    target, metric = reduce_rows(problem.weight).target, damped(problem, damping)
    order = importance(target, metric, problem.taps)
    counts = range(multiple, problem.channels, multiple)
    return Family(prefix_curves(problem, target, metric, order, ([], counts)), damping)


def lrs(problem: Problem, multiple: int, damping: float) -> Family:
    """Low rank and kept channels together; contains all of hsvd and all of ``channels``, so it is never worse.

    For k x k kernels the spatial and the projected form and Tucker-2 are offered as well.
    """
    target, metric = reduce_rows(problem.weight).target, damped(problem, damping)
    order = importance(target, metric, problem.taps)
    ranked = [0, *kept_counts(problem.channels, len(target), multiple)]
    plain = sorted(set(range(multiple, problem.channels, multiple)) - set(ranked))
    curves = prefix_curves(problem, target, metric, order, (ranked, plain))
    others = spatial_candidates(problem, multiple, damping) + projected_candidates(problem, multiple, damping)
    return Family(curves, damping, others)


def svd(problem: Problem, multiple: int, damping: float) -> Family:
    """Plain truncated SVD of the weights; sees no data, so the bias stays too. A baseline."""
    return _data_free(problem, [data_free_split(problem, NO_CHANNELS, low_rank=True)])


def spatial(problem: Problem, multiple: int, damping: float) -> Family:
    """Spatial SVD of the weights, k x 1 then 1 x k (Jaderberg et al. 2014), or plain SVD where no kernel is 2-D.

    Sees no data; what AIMET calls spatial SVD. A baseline.
    """
    if not applies(problem):
        return svd(problem, multiple, damping)
    moments, others = problem.validation or problem.moments, []
    for trial in trials(_blind(problem), multiple, damping, RANKS):
        loss = objective(problem.weight, problem.weight - trial.difference, moments, problem.affine)
        others.append(dataclasses.replace(trial.candidate(FORM, damping), loss=loss))
    return Family((), damping, others)


def _blind(problem: Problem) -> Problem:
    """Return the problem without anything that is known of its inputs."""
    return dataclasses.replace(problem, moments=None, validation=None, columns=None, checks=None)


def magnitude(problem: Problem, multiple: int, damping: float) -> Family:
    """Keep the input channels with the largest weights, unchanged; sees no data. A baseline."""
    order = importance(problem.weight, None, problem.taps)
    counts = range(multiple, problem.channels, multiple)
    return _data_free(problem, [data_free_split(problem, order[:k], low_rank=False) for k in counts])


def data_free_split(problem: Problem, support: Indices, low_rank: bool) -> Split:
    """Return the split of a method that looks at the weights only: they stay as they are on the support."""
    target = reduce_rows(problem.weight).target
    if low_rank:
        (split,) = splits(target, None, np.arange(problem.channels), [0], problem.taps)
        return split
    return Split(support, target[:, columns_of(support, problem.taps)], np.zeros((len(target), 0)))


def _data_free(problem: Problem, found: Iterable[Split]) -> Family:
    target, moments = reduce_rows(problem.weight).target, problem.validation or problem.moments
    return Family(
        Curve(s.support, losses(unexplained(target, s, problem.taps), s.basis, moments, problem.affine, None))
        for s in found
    )


def importance(target: Array, metric: Array | None, taps: int) -> Indices:
    """Return the channels, most useful first; by the norm of their weights when the metric is the identity (None)."""
    if metric is not None:
        return eliminate(target, metric, taps)
    norms = np.einsum("md,md->d", target, target).reshape(-1, taps).sum(axis=1)
    return np.argsort(-norms, kind="stable").astype(np.int64)


def candidates(problem: Problem, family: Family, multiple: int) -> list[Candidate]:
    """Return every (rank, support) of the family that is smaller than the dense layer, with its validation loss."""
    scale = _reference(problem, problem.validation or problem.moments)
    found = [dataclasses.replace(c, loss=c.loss / scale) for c in family.others]
    for curve in family.curves:
        most = min(len(curve.losses) - 1, problem.params // problem.rank_cost)
        for rank in range(0, most + 1, multiple):
            params = rank * problem.rank_cost + len(curve.support) * problem.taps * problem.out
            if 0 < params <= LARGEST * problem.params:
                form, loss = form_of(rank, len(curve.support)), float(curve.losses[rank] / scale)
                found.append(Candidate(form, rank, params, loss, curve.support, family.damping))
    return found


def _reference(problem: Problem, moments: Moments | None) -> float:
    """Return what J is relative to: the output's variance, or 1e-12 of its squared mean if it hardly varies."""
    varies = objective(problem.weight, np.zeros_like(problem.weight), moments, problem.affine)
    means = [m.mean for m in (problem.moments, problem.validation) if m is not None]
    constant = max((float(np.sum(np.square(problem.weight @ mean))) for mean in means), default=0.0)
    return max(varies, 1e-12 * constant, 1e-300)


def form_of(rank: int, kept: int) -> str:
    """Return the name of the form: low-rank, channels or both."""
    if not kept:
        return "low-rank"
    return "low-rank + channels" if rank else "channels"


def refit(problem: Problem, chosen: Candidate, rounds: int = ROUNDS) -> tuple[Factors, tuple[float, ...]]:
    """Solve for a candidate's rank, support and damping, re-choosing the support while J falls (METHODS 4).

    First by elimination on what the low-rank part leaves, at most ``rounds`` times, then once by three-block ADMM
    (three_block.py). Returns the factors and J (undamped) of the accepted iterates, falling.
    """
    support, rank = chosen.support, chosen.rank
    reduced = reduce_rows(problem.weight)
    metric = damped(problem, chosen.damping)
    best = _solve_split(problem, reduced, metric, support, rank)
    history = [objective(problem.weight, best.dense(), problem.moments, problem.affine)]
    if not rounds or not rank or not len(support) or metric is None:
        return best, tuple(history)
    for _ in range(rounds):
        basis = _rotated_back(reduced, best.left)
        residual = reduced.target - basis @ (basis.T @ reduced.target)
        support = importance(residual, metric, problem.taps)[: len(best.kept)]
        if not _improved(problem, best, trial := _solve_split(problem, reduced, metric, support, rank), history):
            break
        best = trial
    basis = _rotated_back(reduced, best.left)
    sparse = _rotated_back(reduced, best.dense() - best.left @ best.right)
    support = propose(reduced.target, metric, problem.taps, (basis, sparse, best.kept)).last.support
    trial = _solve_split(problem, reduced, metric, support, rank)
    return (trial if _improved(problem, best, trial, history, WORTH) else best), tuple(history)


def _improved(problem: Problem, best: Factors, trial: Factors, history: list[float], share: float = 0.0) -> bool:
    """Return whether the trial lowers J by a share of it and, if there are other samples, is not worse on them.

    If so its J joins the history.
    """
    value = objective(problem.weight, trial.dense(), problem.moments, problem.affine)
    if value >= (1 - share) * history[-1]:
        return False
    other = problem.validation
    if other is not None and judged(problem.weight, trial, other, problem.affine) > judged(
        problem.weight, best, other, problem.affine
    ):
        return False
    history.append(value)
    return True


def _rotated_back(reduced: Reduced, rows: Array) -> Array:
    """Return what :meth:`Reduced.lift` made ``rows`` from."""
    return rows if reduced.rotation is None else reduced.rotation.T @ rows


def _solve_split(problem: Problem, reduced: Reduced, metric: Array | None, support: Indices, rank: int) -> Factors:
    others = np.setdiff1d(np.arange(problem.channels), support)
    order = np.concatenate([support, others]).astype(np.int64)
    (split,) = splits(reduced.target, metric, order, [len(support)], problem.taps)
    return assemble(problem, reduced, split, rank)


def exactly(problem: Problem, rank: int, kept: int) -> Candidate | None:
    """Return the candidate of :func:`lrs` with this rank and number of kept channels, or None if it saves nothing."""
    params = rank * problem.rank_cost + kept * problem.taps * problem.out
    if not 0 < params < problem.params:
        return None
    damping = choose_damping(problem)
    order = importance(reduce_rows(problem.weight).target, damped(problem, damping), problem.taps)
    return Candidate(form_of(rank, kept), rank, params, float("nan"), order[:kept], damping)


def best_within(found: list[Candidate], budget: Budget) -> Candidate | None:
    """Return the candidate of least loss within the budget; the smaller one on a tie."""
    if budget.params is not None:
        found = [c for c in found if c.params <= budget.params]
    else:
        found = [c for c in found if (c.rank, len(c.support)) == (budget.rank, budget.channels)]
    return min(found, key=lambda c: (c.loss, c.params), default=None)


# ------------------------------------------------------------------------------------------ the families as methods

FAMILIES: dict[str, Callable[[Problem, int, float], Family]] = {
    "lrs": lrs,
    "hsvd": hsvd,
    "channels": channels,
    "svd": svd,
    "spatial": spatial,
    "magnitude": magnitude,
}


def _method(name: str) -> Method:
    """Return a family as a method; what it is is told by the family's own docstring."""
    family = FAMILIES[name]

    def found(problem: Problem, multiple: int, settings: Settings) -> list[Candidate]:
        return candidates(problem, family(problem, multiple, choose_damping(problem)), multiple)

    def choose(problem: Problem, budget: Budget, settings: Settings) -> Candidate | None:
        if budget.rank is not None and budget.channels is not None and name == "lrs":
            return exactly(problem, budget.rank, budget.channels)  # any split, not only those on the curves
        return best_within(found(problem, budget.multiple, settings), budget)

    sees_data = name not in DATA_FREE
    return Method(found, choose, _fit if sees_data else _fit_data_free, sees_data=sees_data)


def _fit(problem: Problem, chosen: Candidate, settings: Settings) -> Solution:
    """Solve for a candidate's form and rank; ``settings.steps`` bounds how often the support is chosen again."""
    if chosen.form == FORM:
        return finished(problem, *fit_spatial(problem, chosen.rank, chosen.damping))
    if chosen.form == PROJECTED:
        return finished(problem, *fit_projected(problem, chosen.rank, chosen.damping))
    if chosen.form == TUCKER:
        return finished(problem, *fit_tucker(problem, chosen.inner, chosen.rank, chosen.damping))
    return finished(problem, *refit(problem, chosen, ROUNDS if settings.steps is None else settings.steps))


def _fit_data_free(problem: Problem, chosen: Candidate, settings: Settings) -> Solution:
    if chosen.form == FORM:
        return finished(problem, fit_spatial(_blind(problem), chosen.rank, chosen.damping)[0])
    split = data_free_split(problem, chosen.support, low_rank=chosen.rank > 0)
    return finished(problem, assemble(problem, reduce_rows(problem.weight), split, chosen.rank, shift=False))


LRS, HSVD, CHANNELS, SVD, SPATIAL, MAGNITUDE = map(_method, ("lrs", "hsvd", "channels", "svd", "spatial", "magnitude"))
