r"""Low rank + sparse without a singular value decomposition (Yu, Liu, Wang and Tao, CVPR 2017).

The paper reconstructs feature maps by a greedy bilateral decomposition; its full text was not at hand, and the steps
follow the author's GreBsmo and GoDec. With T the target, H the second moments of the inputs, and J the output error of
solvers/problem.py, one iteration is

    L = U V:  U from the QR of R H V^T with R = T - S + alpha (T - L - S),  V = U^T (T - S)
    S:        the ``count`` largest entries (or channels) in the H-metric, then least squares

The step past L (alpha) is raised while the error falls and taken back to zero when it rises; the rank grows in blocks
of random rows of what is left, until the budget is met. Rank 0 is pruning, and without entries in S it is low rank
alone. Entries are chosen by the residual T - L; channels by a coarse backward elimination first (channels.py: of the
residual alone they were chosen up to eight times worse), then by S and its gradient. Entries are chosen again in every
iteration, channels in every third, and the old ones are kept if the error rises. Least squares on channels is exact by
Cholesky, that on entries takes a few steps of conjugate gradients.

No singular values or eigenvectors are computed: QR and Cholesky only, and products with H, in float32 for wide layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.solvers.channels import eliminate
from onnx_lrs.solvers.loop import Run, Step, iterate
from onnx_lrs.solvers.method import Method, finished
from onnx_lrs.solvers.problem import (
    LARGEST,
    AnyFactors,
    Array,
    Budget,
    Candidate,
    ElementFactors,
    Factors,
    Indices,
    Problem,
    Settings,
    Solution,
    columns_of,
    judged,
)
from onnx_lrs.solvers.prox import Mask, largest
from onnx_lrs.solvers.spectral import DAMPING, DAMPINGS, ENOUGH_COLUMNS, Reduced, damped, reduce_rows

Floats = NDArray[np.floating[Any]]

COARSE = 2  # the elimination halves the channels in a round
RECHOOSE = 3  # iterations between two choices of channels
BLOCKS = 4  # in which the rank grows
STEPS = 12  # iterations at full rank; J falls by less than 1e-3 of itself after ten
QUICK = (2, 1)  # blocks and iterations that decide between splits of a budget
WIDE = 2048  # columns from which the weaker half of the channels is not eliminated one by one
WIDE_STEPS = 6
DESCENTS = 3  # conjugate gradient steps for the entries of S in one iteration
POLISH = 20  # and at the end
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a budget for the low-rank part
SIZES = tuple(0.9 * 0.65**i for i in range(8))  # of the dense layer, for the error curve
NARROW = 512  # columns from which float32 is used
NO_CHANNELS: Indices = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class Task:
    """One layer made ready: T (m, d) and H (d, d) in working precision; ``count`` channels or entries in S.

    ``reduced`` is the layer on at most d rows, ``exact`` H in float64, ``order`` the channels, most useful first.
    """

    target: Floats
    metric: Floats
    exact: Array
    reduced: Reduced
    taps: int
    count: int
    elements: bool
    order: Indices


@dataclasses.dataclass(frozen=True)
class State:
    """One iterate: U (m, r), V (r, d), S (m, d) with ``mask`` (m, d) where it may be other than zero, J, and alpha."""

    left: Floats
    right: Floats
    sparse: Floats
    mask: Mask
    error: float
    alpha: float

    @property
    def low(self) -> Floats:
        """L, shape (m, d)."""
        return self.left @ self.right


def task(problem: Problem, damping: float, elements: bool, order: Indices | None = None) -> Task:
    """Return a problem made ready, with nothing in S; without moments H is the identity.

    ``order`` names the channels to begin with, most useful first, if they are known.
    """
    metric = damped(problem, damping)
    # single entries would be lost by turning the rows
    reduced = Reduced(problem.weight, None) if elements else reduce_rows(problem.weight)
    exact = np.eye(problem.d) if metric is None else metric
    if order is None:
        order = NO_CHANNELS if elements else _ordered(reduced.target, exact, problem.taps)
    dtype = np.float32 if problem.d >= NARROW else np.float64
    return Task(reduced.target.astype(dtype), exact.astype(dtype), exact, reduced, problem.taps, 0, elements, order)


def _ordered(target: Array, metric: Array, taps: int) -> Indices:
    """Return all channels, most useful first: by a coarse elimination, of wide layers only within the stronger half.

    Half of the columns cost an eighth of the factorisation; strong are those with a large tr(T_g H_gg T_g^T).
    """
    if target.shape[1] < WIDE:
        return eliminate(target, metric, taps, COARSE)
    strength = _block_norms(target, _blocks(metric, taps))
    ranking = np.argsort(-strength, kind="stable")
    strong = np.sort(ranking[: len(ranking) // 2])
    columns = columns_of(strong, taps)
    inside = eliminate(target[:, columns], metric[np.ix_(columns, columns)], taps, COARSE)
    return np.concatenate([strong[inside], ranking[len(strong) :]]).astype(np.int64)


def _blocks(metric: Floats, taps: int) -> Floats:
    """Return the blocks H_gg of the channels, (channels, taps, taps)."""
    start, tap = np.arange(len(metric) // taps)[:, None, None] * taps, np.arange(taps)
    return np.asarray(metric[start + tap[:, None], start + tap])


def _block_norms(matrix: Floats, blocks: Floats) -> Array:
    """Return tr(M_g H_gg M_g^T) of every channel, (channels,) float64."""
    parts = matrix.reshape(-1, *blocks.shape[:2]).transpose(1, 2, 0)
    return np.asarray(np.einsum("kab,kab->k", blocks, parts @ parts.transpose(0, 2, 1)), np.float64)


def decompose(given: Task, rank: int, steps: int, settings: Settings, blocks: int = BLOCKS) -> Run[State]:
    """Grow the rank in blocks, then iterate at full rank; the best iterate is ``run.best``.

    Parameters
    ----------
    given : Task
        The layer and the size of S.
    rank : int
        Of the low-rank part, at most min(out, d).
    steps : int
        Limit of the iterations at full rank.
    settings : Settings
        ``seed`` of the random rows and ``tolerance`` of the relative fall of J.
    blocks : int
        In which the rank grows.
    """
    rng = np.random.default_rng(settings.seed)
    nothing = np.zeros_like(given.target)
    state = State(given.target[:, :0], given.target[:0], nothing, nothing.astype(bool), np.inf, 0.0)
    for block in np.diff(np.linspace(0, rank, min(blocks, rank) + 1).astype(int)):
        left = given.target - state.low - state.sparse
        mix = rng.standard_normal((int(block), len(left))).astype(left.dtype)
        state = _advance(given, dataclasses.replace(state, right=np.concatenate([state.right, mix @ left])), True)
    if not rank:
        state = _advance(given, state, True)

    def advance(now: State, number: int) -> tuple[State, Step]:
        # channels alone stay those of the candidate: a plan may have taken filters out for them
        choose = given.elements or (rank > 0 and number % RECHOOSE == RECHOOSE - 1)
        found = _advance(given, now, choose)
        fall = (now.error - found.error) / max(now.error, 1e-300)
        if found.error > now.error:  # too long a step, or worse channels: again without
            return dataclasses.replace(now, alpha=0.0), Step(now.error, 1.0 if now.alpha or choose else 0.0)
        return dataclasses.replace(found, alpha=now.alpha + 0.25 if rank else 0.0), Step(found.error, fall)

    return iterate(advance, state, state.error, steps, settings.tolerance)


def _advance(given: Task, now: State, choose: bool) -> State:
    """Return the iterate after one step of L and one of S, whose support is chosen again or kept."""
    rest = given.target - now.sparse
    if len(now.right):
        longer = rest + given.target.dtype.type(now.alpha) * (rest - now.low) if now.alpha and now.left.size else rest
        left, _ = np.linalg.qr(longer @ (given.metric @ now.right.T))
    else:
        left = now.left
    low = left @ (left.T @ rest)
    if choose:
        mask = _chosen_entries(given, low) if given.elements else _chosen_channels(given, low, now)
    else:
        mask = now.mask
    sparse = _entries(given, left, low, mask) if given.elements else _channels(given, left, mask)
    right = left.T @ (given.target - sparse)  # for this U and support the best V together with S
    low = left @ right
    miss = given.target - low - sparse
    return State(left, right, sparse, mask, float(np.vdot(miss @ given.metric, miss)), now.alpha)


def _channels(given: Task, left: Floats, mask: Mask) -> Floats:
    """Return S on its channels by least squares, for the best V beside it."""
    columns = np.flatnonzero(mask[0])
    sparse = np.zeros_like(given.target)
    if len(columns):
        rest = given.target - left @ (left.T @ given.target) if left.size else given.target
        # float64: LAPACK's float32 Cholesky takes five times as long at this size
        factor = scipy.linalg.cho_factor(given.exact[np.ix_(columns, columns)], lower=True, check_finite=False)
        solved = scipy.linalg.cho_solve(factor, (rest @ given.metric[:, columns]).T, check_finite=False)
        sparse[:, columns] = solved.T
    return sparse


def _chosen_channels(given: Task, low: Floats, now: State) -> Mask:
    """Return where the channels of S stand: the elimination's at first, then those of S and of its gradient.

    A channel outside S would gain tr(G_g H_gg^{-1} G_g^T), G the gradient; one inside costs tr(S_g H_gg S_g^T).
    """
    channels = given.target.shape[1] // given.taps
    chosen = given.order[: given.count]
    if now.mask.any():
        blocks = _blocks(given.metric, given.taps)
        gradient = (given.target - low - now.sparse) @ given.metric
        parts, slopes = (m.reshape(-1, channels, given.taps).transpose(1, 2, 0) for m in (now.sparse, gradient))
        parts = parts + np.linalg.solve(blocks, slopes)
        scores = np.einsum("kab,kab->k", blocks, parts @ parts.transpose(0, 2, 1))
        chosen = np.flatnonzero(largest(np.asarray(scores, np.float64), given.count))
    mask = np.zeros(given.target.shape, bool)
    mask[:, columns_of(chosen, given.taps)] = True
    return mask


def _chosen_entries(given: Task, low: Floats) -> Mask:
    """Return where the largest entries of the residual stand in the H-metric: R_ij^2 H_jj."""
    return largest(np.asarray(np.square(given.target - low) * np.diagonal(given.metric), np.float64), given.count)


def _entries(given: Task, left: Floats, low: Floats, mask: Mask) -> Floats:
    """Return S on its entries after a few steps of conjugate gradients from the residual."""
    start = np.where(mask, given.target - low, 0).astype(given.target.dtype)
    return descend(given.metric, given.target, (start, mask), left, DESCENTS) if given.count else start


def descend(metric: Floats, target: Floats, begin: tuple[Floats, Mask], left: Floats, steps: int) -> Floats:
    """Return S after conjugate gradients on ``||(I - U U^T)(T - S) H^(1/2)||^2``, zero outside its mask.

    That is the error when V = U^T (T - S) follows S. ``begin`` is S with its mask, both (m, d); ``left`` U (m, r).
    Preconditioned by diag H; a step costs one product of (m, d) with (d, d), and the error does not rise.
    """

    def seen(values: Floats) -> Floats:
        free = values - left @ (left.T @ values) if left.size else values
        return np.where(mask, free @ metric, 0)

    found, mask = begin
    scale = np.maximum(np.diagonal(metric), np.finfo(metric.dtype).tiny)
    gradient = seen(target - found)
    direction = gradient / scale
    size = float(np.vdot(gradient, direction))
    for _ in range(steps):
        image = seen(direction)
        curvature = float(np.vdot(direction, image))
        if size <= 0 or curvature <= 0 or not np.isfinite(size / curvature):
            break
        step = metric.dtype.type(size / curvature)
        found = np.asarray(found + step * direction)
        gradient = gradient - step * image
        conditioned = gradient / scale
        size, before = float(np.vdot(gradient, conditioned)), size
        direction = conditioned + metric.dtype.type(size / before) * direction
    return found


# ---------------------------------------------------------------------------------------------------------- the method


def _finish(problem: Problem, given: Task, state: State) -> AnyFactors:
    """Return the factors of an iterate in float64, refitted for its U and its support."""
    left = np.linalg.qr(state.left.astype(np.float64))[0] if state.left.size else state.left.astype(np.float64)
    found = (
        _with_entries(problem, given, state, left) if given.elements else _with_channels(problem, given, state, left)
    )
    if problem.affine and problem.moments is not None:
        return dataclasses.replace(found, bias_shift=(problem.weight - found.dense()) @ problem.moments.mean)
    return found


def _with_entries(problem: Problem, given: Task, state: State, left: Array) -> ElementFactors:
    target, start = given.reduced.target, np.where(state.mask, state.sparse, 0.0)
    sparse = np.asarray(descend(given.exact, target, (start, state.mask), left, POLISH), np.float64)
    return ElementFactors(left, left.T @ (target - sparse), scipy.sparse.csr_array(sparse), np.zeros(problem.out))


def _with_channels(problem: Problem, given: Task, state: State, left: Array) -> Factors:
    target, lift = given.reduced.target, given.reduced.lift
    support = np.flatnonzero(state.mask[0, :: given.taps]).astype(np.int64)
    columns = columns_of(support, given.taps)
    coefficients = np.zeros((problem.out, 0))
    if len(columns):
        factor = scipy.linalg.cho_factor(given.exact[np.ix_(columns, columns)], lower=True, check_finite=False)
        rest = (target - left @ (left.T @ target)) @ given.exact[:, columns]
        coefficients = lift(scipy.linalg.cho_solve(factor, rest.T, check_finite=False).T)
    shift = np.zeros(problem.out)
    return Factors(lift(left), left.T @ target, support, np.ascontiguousarray(coefficients), shift, given.taps)


def _split(problem: Problem, size: float, share: float, multiple: int, elements: bool) -> tuple[int, int]:
    """Return rank and count for ``size`` parameters, of which ``share`` go to the low-rank part."""
    rank = int(share * size) // problem.rank_cost // multiple * multiple
    left = int(size) - rank * problem.rank_cost
    if elements:
        return rank, min(left, problem.params) if share < 1 else 0
    count = left // (problem.taps * problem.out) // multiple * multiple
    return rank, min(count, problem.channels) if share < 1 else 0


def _run(given: Task, wanted: Candidate, growth: tuple[int, int], settings: Settings) -> Run[State]:
    given = dataclasses.replace(given, count=wanted.elements or len(wanted.support))
    blocks, steps = growth
    return decompose(given, min(wanted.rank, *given.target.shape), steps, settings, blocks)


def _quick(problem: Problem, given: Task, wanted: Candidate) -> AnyFactors:
    return _finish(problem, given, _run(given, wanted, QUICK, Settings()).best)


def _priced(problem: Problem, given: Task, wanted: tuple[int, int], damping: float) -> Candidate | None:
    """Return a split as a candidate with the loss that a quick solve of it reaches, or None if it saves nothing."""
    rank, count = wanted
    elements, kind = given.elements, "elements" if given.elements else "channels"
    params = rank * problem.rank_cost + count * (1 if elements else problem.taps * problem.out)
    if not 0 < params <= LARGEST * problem.params or rank > min(problem.weight.shape):
        return None
    form = {(True, True): f"low-rank + {kind}", (True, False): "low-rank"}.get((rank > 0, count > 0), kind)
    chosen = Candidate(
        form, rank, params, 0.0, NO_CHANNELS if elements else np.arange(count), damping, count if elements else 0
    )
    state = _run(given, chosen, QUICK, Settings()).best
    if problem.validation is None:
        loss = state.error / max(float(np.vdot(given.target @ given.metric, given.target)), 1e-300)
    else:
        loss = judged(problem.weight, _finish(problem, given, state), problem.validation, problem.affine) ** 2
    support = NO_CHANNELS if elements else np.flatnonzero(state.mask[0, :: given.taps]).astype(np.int64)
    return dataclasses.replace(chosen, loss=loss, support=support)


def _candidates(problem: Problem, multiple: int, settings: Settings) -> list[Candidate]:
    elements = settings.structure == "elements"
    damping = _damping(problem)
    given = task(problem, damping, elements)
    sizes = [size * problem.params for size in SIZES]
    splits = {_split(problem, size, share, multiple, elements) for size in sizes for share in SHARES[::2]}
    found = (_priced(problem, given, split, damping) for split in sorted(splits))
    return [candidate for candidate in found if candidate is not None]


def _choose(problem: Problem, budget: Budget, settings: Settings) -> Candidate | None:
    elements = budget.elements is not None or (budget.channels is None and settings.structure == "elements")
    damping = _damping(problem)
    given = task(problem, damping, elements)
    if budget.params is None:
        assert budget.rank is not None
        splits = [(budget.rank, budget.elements if budget.elements is not None else budget.channels or 0)]
    else:
        shares = SHARES if problem.d < NARROW else SHARES[::2]
        splits = sorted({_split(problem, budget.params, share, budget.multiple, elements) for share in shares})
    found = [c for c in (_priced(problem, given, split, damping) for split in splits) if c is not None]
    return min(found, key=lambda c: (c.loss, c.params), default=None)


def _fit(problem: Problem, chosen: Candidate, settings: Settings) -> Solution:
    usual = STEPS if problem.d < WIDE else WIDE_STEPS
    steps = usual if settings.steps is None else settings.steps
    given = task(problem, chosen.damping, chosen.elements > 0, chosen.support)
    run = _run(given, chosen, (BLOCKS, steps), settings)
    found = finished(problem, _finish(problem, given, run.best), run.history)
    return dataclasses.replace(found, residuals=run.residuals)


def _damping(problem: Problem) -> float:
    """Return the damping that generalises best; as spectral.choose_damping, but by this method's own low-rank step."""
    moments, validation = problem.moments, problem.validation
    if moments is None or validation is None or moments.count >= ENOUGH_COLUMNS * problem.d:
        return DAMPING
    rank = max(problem.params // 4 // problem.rank_cost, 1)
    errors = []
    for damping in DAMPINGS:
        wanted = Candidate("low-rank", rank, 0, 0.0, NO_CHANNELS, damping)
        found = _quick(problem, task(problem, damping, True), wanted)
        errors.append(judged(problem.weight, found, validation, problem.affine))
    return DAMPINGS[int(np.argmin(errors))]


GREEDY = Method(_candidates, _choose, _fit, structures=("channels", "elements"))
