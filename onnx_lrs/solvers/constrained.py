r"""The constraint set that :mod:`ddlr` and :mod:`nettrim` share, the splitting on it, and the exact check of an answer.

Sources: Net-Trim (Aghasi et al., arXiv 1611.05162, 1806.06457) for the set and the splitting, Papadimitriou and Jain
(arXiv 2107.05787) for the same set under the nuclear norm; everything else is our derivation. Symbols: X the columns
(n, d), A = phi(y) the responses to keep, Om = {A > 0} ("on"; all of it for a linear layer), V the limit outside Om,
U the new weight (out, d), b' its bias. The set asks

.. math:: \|(U x + b' - A)_{Om}\|_F \le eps, \qquad (U x + b')_{not Om} \le V,

with V = 0 in the parallel form (columns of the original network) and V = W x + b in the cascade form (inputs of the
compressed prefix beside the original outputs). Then ``relu(U x + b') <= max(V, 0)`` outside Om, so the error after
the activation is at most ``sqrt(eps^2 + ||max(V, 0)_{not Om}||_F^2)``, which is eps in the parallel form.

Inside, columns are centred where a bias may change (b' is then free and its best value is the one at the mean),
columns and responses are scaled to about one, and arrays are float32 once they are large. What leaves is checked by
:func:`settle` on the original arrays in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnx_lrs.solvers.activation import RELU
from onnx_lrs.solvers.behind import activation_error, bias_of, plain
from onnx_lrs.solvers.loop import Run, Step, iterate
from onnx_lrs.solvers.moments import Moments, moments_of
from onnx_lrs.solvers.problem import Array, Factors, Problem, Solution, Status, objective

Real = NDArray[Any]  # float32 or float64, one of them throughout a Region
Chosen = TypeVar("Chosen")
Prox = Callable[[Real, float], tuple[Real, float]]

LARGE = 3e7  # multiply-adds of one product X U^T from which the iterations run in float32
CHUNK = 1 << 22  # entries of the float64 blocks of a check (32 MB)
ROUNDING = 1e-12  # of the responses' size: how far inside the limit a bias is set, so that any order of sums keeps it
SLIGHT = 1e-5  # of eps: an excess elsewhere that is rounding, where the exact bias is set afterwards
REGULAR = 1e-6  # of the mean diagonal of X^T X: makes it regular in float32 too, without moving an answer
TRIES = (100, 25)  # steps after which a structure that is not in the set is given up: float64 and float32 problems
FULL = 50  # steps of the search for any weight in the set
SLOW = 1e-4  # relative fall of the squared distance at which a fit ends
PATIENCE = 4  # steps over which the rate of descent is measured
LOOK = 0.1  # of eps: distance at which it is worth the time to look whether a weight keeps to the set
NEAR = 0.01  # of eps: a distance that the bias may still mend
ROUND32 = 1e-4  # of eps and of the responses' scale: more than float32 sums lose
MARGIN = 0.995  # of eps, what a search aims at
LIFT = 5e-3  # of the responses' scale, below the limits, what it aims at where the bias is fixed
RELAXED = 1.6  # over-relaxation of the splitting (Eckstein and Bertsekas 1992: any value in (0, 2) converges)
BALANCE = 10  # steps between two looks at the balance of the residuals
UNBALANCED = 3.0  # ratio of primal to dual residual from which the penalty is changed


@dataclasses.dataclass(frozen=True)
class Region:
    """The constraint set in scaled units, and what every step on it needs.

    Parameters
    ----------
    inputs : ndarray, shape (n, d)
        Columns, centred if ``affine``, divided by ``scale_in``.
    target : ndarray, shape (n, out)
        A on Om, V elsewhere, less the bias where that is fixed, divided by ``scale_out``.
    on, floor : ndarray, shape (n, out), or None
        1 on Om and 0 elsewhere; -inf on Om and 0 elsewhere; None if the layer is linear. As numbers, because NumPy's
        masked operations take twenty times as long as plain ones.
    radius : float
        eps, divided by ``scale_out``.
    gram : ndarray, shape (d, d), float64
        ``inputs^T inputs``.
    weight : ndarray, shape (out, d)
        W in these units, the natural start.
    centre : ndarray, shape (d,), float64
        What was taken from the columns, in their own units; zeros if not ``affine``.
    """

    inputs: Real
    target: Real
    on: Real | None
    floor: Real | None
    radius: float
    gram: Array
    weight: Real
    centre: Array
    scale_in: float
    scale_out: float
    affine: bool

    @property
    def unit(self) -> float:
        """What a weight in these units is multiplied by to be one of the layer."""
        return self.scale_out / self.scale_in

    def excess(self, response: Real) -> Real:
        """Return how far a response (n, out) is from the target: signed on Om, what is above the limit elsewhere."""
        found = response - self.target
        if self.floor is not None:
            np.maximum(found, self.floor, out=found)
        return found

    def parts(self, excess: Real) -> tuple[float, float]:
        """Return the norm of an excess on Om and elsewhere."""
        if self.on is None:
            return math.sqrt(square_sum(excess)), 0.0
        inside = excess * self.on
        return math.sqrt(square_sum(inside)), math.sqrt(square_sum(excess - inside))

    def nearest(self, response: Real) -> Real:
        """Return the projection of a response (n, out) onto the set: into the eps-ball on Om, below V elsewhere."""
        excess = self.excess(response)
        inside = excess if self.on is None else excess * self.on
        size = math.sqrt(square_sum(inside))
        share = inside.dtype.type(self.radius / size if size > self.radius else 1.0)
        found: Real = response - excess
        found += share * inside
        return found

    def within(self, share: float, lower: float = 0.0) -> Region:
        """Return a smaller set: ``share`` of the radius, limits lowered by ``lower`` of the responses' scale."""
        target = self.target
        if lower and self.on is not None:
            target = target - target.dtype.type(lower) * (1 - self.on)
        return dataclasses.replace(self, radius=share * self.radius, target=target)

    def inner(self) -> Region:
        """Return the set less what rounding to this dtype may spoil: what is in it is in the set exactly."""
        return self.within(1 - ROUND32, 0.0 if self.affine else ROUND32)

    def goal(self) -> Region:
        """Return what a search aims at; without a bias to mend the rest, the limits are lowered too."""
        return self.within(MARGIN, 0.0 if self.affine else LIFT)

    def best_bias(self, base: Real) -> Real:
        """Return the bias (out,) that is best beside ``base`` = inputs U^T; zeros if it is fixed.

        The error on Om is a parabola in each b'_o, and the limits ask b'_o <= min (V - base): the mean or the limit.
        """
        room = self.target - base
        if not self.affine:
            return np.zeros(room.shape[1], room.dtype)
        if self.on is None or self.floor is None:
            return np.asarray(room.mean(axis=0))
        count = self.on.sum(axis=0)
        limit = (room - self.floor).min(axis=0)  # inf on Om
        mean = np.where(count > 0, (room * self.on).sum(axis=0) / np.maximum(count, 1), limit)
        return np.asarray(np.minimum(mean, limit))

    def above(self, response: Real) -> NDArray[np.bool_]:
        """Return which outputs of a response (n, out) exceed a limit anywhere; (out,)."""
        if self.on is None:
            return np.zeros(response.shape[1], bool)
        return np.asarray(((self.excess(response) > 0) & (self.on == 0)).any(axis=0))

    def is_met(self, response: Real) -> bool:
        """Whether a response (n, out) is in the set, by the arithmetic of this record."""
        on, elsewhere = self.parts(self.excess(response))
        return on <= self.radius and elsewhere <= (self.radius * SLIGHT if self.affine else 0.0)


def square_sum(x: Real) -> float:
    """Return the sum of squares (BLAS, pairwise enough: relative error about 1e-7 in float32)."""
    flat = x.ravel()
    return float(flat @ flat)


# ------------------------------------------------------------------------------------ the problem, exactly, in blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of a problem in float64: columns (k, d), A (k, out), where it is off, and the limits V there."""

    x: Array
    a: Array
    off: NDArray[np.bool_]
    limit: Array | float


def blocks(problem: Problem) -> Iterator[Block]:
    """Yield the rows of a problem in float64 blocks; y is W x + b where the problem does not give it."""
    assert problem.columns is not None
    given, relu = problem.columns.outputs, problem.activation == RELU
    rows = max(CHUNK // max(problem.out, problem.d), 1)
    for first in range(0, len(problem.columns.inputs), rows):
        x = problem.columns.inputs[first : first + rows].astype(np.float64)
        v = responses(x, problem.weight, bias_of(problem))
        y = v if given is None else given[first : first + rows].astype(np.float64)
        off = y <= 0 if relu else np.zeros(y.shape, bool)
        yield Block(x, np.maximum(y, 0) if relu else y, off, 0.0 if given is None else v)


def responses(x: Array, weight: Array, bias: Array) -> Array:
    """Return ``weight x + bias`` for each row of x; the same bits for the same block, whoever asks."""
    return np.asarray(x @ weight.T + bias)


def size_of_responses(problem: Problem) -> float:
    """Return ``||A||_F`` over the columns."""
    return math.sqrt(sum(float(np.vdot(b.a, b.a)) for b in blocks(problem)))


def left_open(problem: Problem) -> float:
    """Return ``||max(V, 0)_{not Om}||_F``: the error that the limits admit; 0 in the parallel form."""
    return math.sqrt(sum(float(np.sum(np.square(np.maximum(b.limit, 0.0) * b.off))) for b in blocks(problem)))


def cascade_gain(problem: Problem, gamma: float = 1.1) -> float:
    """Return the gain of Net-Trim's cascade rule ``eps^2 = gamma * sum over Om of (V - A)^2`` (arXiv 1611.05162).

    For problems with ``columns.outputs``; at ``gamma >= 1`` the layer's own weight keeps to it. Without outputs the
    original weight makes no error and the gain is 0. Give it as ``Budget(gain=cascade_gain(problem))``.
    """
    made = scale = 0.0
    for block in blocks(problem):
        v = responses(block.x, problem.weight, bias_of(problem))
        made += float(np.sum(np.square(np.where(block.off, 0.0, v - block.a))))
        scale += float(np.vdot(block.a, block.a))
    return math.sqrt(gamma * made / scale) if scale > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a matrix does on the columns, in float64: the norm on Om, the largest excess elsewhere, the whole error."""

    shift: Array
    on: float
    above: float
    error: float

    def keeps_to(self, allowed: float) -> bool:
        """Whether all constraints hold, without any tolerance."""
        return self.on <= allowed and self.above <= 0.0


def settle(problem: Problem, approximation: Array) -> Reached:
    """Return the best admissible bias beside E (out, d) and what both reach, exactly (see Region.best_bias).

    Where the bias may not change it stays. Float64 on the original arrays; two passes over them.
    """
    return measure(problem, approximation, _exact_shift(problem, approximation) if problem.affine else None)


def measure(problem: Problem, approximation: Array, shift: Array | None) -> Reached:
    """Return what E with a bias shift (None: zeros) reaches on the columns, in float64."""
    moved = np.zeros(problem.out) if shift is None else shift
    bias = bias_of(problem) + moved
    on = whole = 0.0
    above = -np.inf
    for block in blocks(problem):
        v = responses(block.x, approximation, bias)
        above = max(above, float(np.max(v - block.limit, where=block.off, initial=-np.inf)))
        on += float(np.sum(np.square(np.where(block.off, 0.0, v - block.a))))
        after = np.maximum(v, 0.0) if problem.activation == RELU else v
        whole += float(np.sum(np.square(after - block.a)))
    return Reached(moved, math.sqrt(on), above, math.sqrt(whole))


def _exact_shift(problem: Problem, approximation: Array) -> Array:
    """Return the best admissible b' - b beside E; ROUNDING inside the limit, so that summing otherwise keeps it."""
    out = problem.out
    total, count, limit, size = np.zeros(out), np.zeros(out), np.full(out, np.inf), np.zeros(out)
    nothing = np.zeros(out)
    for block in blocks(problem):
        base = responses(block.x, approximation, nothing)
        total += np.where(block.off, 0.0, block.a - base).sum(axis=0)
        count += len(base) - block.off.sum(axis=0)
        limit = np.minimum(limit, np.where(block.off, block.limit - base, np.inf).min(axis=0))
        size = np.maximum(size, np.abs(base).max(axis=0))
    room = limit - ROUNDING * (size + np.where(np.isfinite(limit), np.abs(limit), 0.0))
    mean = np.where(count > 0, total / np.maximum(count, 1), room)
    bias = bias_of(problem)
    return _inside(np.minimum(mean, room) - bias, bias, limit)


def _inside(shift: Array, bias: Array, limit: Array) -> Array:
    """Return the shift, lowered where ``bias + shift`` is rounded above the limit."""
    return np.where(bias + shift > limit, np.nextafter(shift - np.spacing(np.abs(bias)), -np.inf), shift)


# -------------------------------------------------------------------------------------------------- the scaled region


def region(problem: Problem, eps: float) -> Region:
    """Return the constraint set of a problem, scaled; ``eps`` in the layer's own units. One product X^T X."""
    assert problem.columns is not None
    x = problem.columns.inputs
    kind = np.float32 if len(x) * problem.d * problem.out > LARGE else np.float64
    centre = x.mean(axis=0, dtype=np.float64) if problem.affine else np.zeros(problem.d)
    bias = np.zeros(problem.out) if problem.affine else bias_of(problem)
    inputs = x - centre
    scale_in = _scale(inputs)
    inputs = (inputs / scale_in).astype(kind)
    target = np.concatenate([np.where(b.off, b.limit, b.a) - bias for b in blocks(problem)])
    on: Real | None = None
    if problem.activation == RELU:
        on = np.concatenate([~b.off for b in blocks(problem)]).astype(kind)
    scale_out = _scale(target, float(np.linalg.norm(problem.weight)) * scale_in)
    return Region(
        inputs=inputs,
        target=(target / scale_out).astype(kind),
        on=on,
        floor=None if on is None else np.where(on == 1, kind(-np.inf), kind(0)),
        radius=eps / scale_out,
        gram=_gram(inputs),
        weight=(problem.weight * (scale_in / scale_out)).astype(kind),
        centre=centre,
        scale_in=scale_in,
        scale_out=scale_out,
        affine=problem.affine,
    )


def _gram(inputs: Real) -> Array:
    """Return ``X^T X`` in float64, rows in blocks: summed in float32 it need not be semidefinite."""
    rows = max(CHUNK // inputs.shape[1], 1)
    parts = (inputs[first : first + rows].astype(np.float64) for first in range(0, len(inputs), rows))
    return np.asarray(sum(part.T @ part for part in parts))


def _scale(x: Array, otherwise: float = 1.0) -> float:
    """Return the root mean square, a power of two so that scaling loses no digit; of zeros ``otherwise``, or 1."""
    size = float(np.abs(x).max(initial=0.0))
    if size > 0:
        size *= float(np.sqrt(np.mean(np.square(x / size))))
    size = size or float(otherwise) or 1.0
    return float(2.0 ** np.round(np.log2(size)))


def stated(problem: Problem) -> Problem:
    """Return the problem as the set states it: with moments, and linear unless a ReLU stands right behind the layer."""
    return dataclasses.replace(plain(problem), moments=column_moments(problem))


def column_moments(problem: Problem) -> Moments:
    """Return the moments of the fit, those of the columns where the problem has none.

    Raises
    ------
    ValueError
        If the problem has no columns, which everything here needs.
    """
    if problem.columns is None:
        raise ValueError("this method needs sampled columns: Problem(..., columns=Columns(inputs))")
    return problem.moments or moments_of(problem.columns.inputs)


# ------------------------------------------------------------------------------------------------------ the splitting


@dataclasses.dataclass(frozen=True)
class Split:
    """The iterate of the splitting: all it needs to go on, also elsewhere on the same set (a warm start).

    ``weight`` (out, d) is the sparse or low-rank copy (W2 of Net-Trim), ``response`` (n, out) the copy in the set
    (W1), ``dual_*`` their scaled duals (D2, D1), ``penalty`` rho, ``bias`` (out,) what belongs to the consensus.
    """

    weight: Real
    response: Real
    dual_weight: Real
    dual_response: Real
    bias: Real
    penalty: float


@dataclasses.dataclass(frozen=True)
class System:
    """The least-squares half of the splitting: factorised once, whatever the penalty.

    ``inverse`` (d, d) is ``(X^T X / c^2 + pull I)^-1``; ``level`` is c^2; ``pull`` 1, or 0 where no copy of the weight
    is penalised.
    """

    inverse: Real
    level: float


def system(here: Region) -> System:
    """Return the system of Net-Trim: ``c = 0.3 sqrt(max |X X^T|)``; float64 Cholesky, inverse in the set's dtype."""
    level = 0.09 * float(np.diagonal(here.gram).max(initial=0.0)) or 1.0
    scaled = here.gram / level
    scaled[np.diag_indices_from(scaled)] += 1.0
    factor = scipy.linalg.cho_factor(scaled, lower=True, overwrite_a=True, check_finite=False)
    inverse = scipy.linalg.cho_solve(factor, np.eye(len(scaled)), check_finite=False)
    return System(inverse.astype(here.inputs.dtype), level)


def begin(here: Region, weight: Real, penalty: float) -> Split:
    """Return the first iterate at a weight: both copies there, duals zero."""
    base = here.inputs @ weight.T
    bias = here.best_bias(base)
    base += bias
    return Split(weight, base, np.zeros_like(weight), np.zeros_like(base), bias, penalty)


def natural(here: Region, prox: Prox) -> Split:
    """Return the first iterate at the layer's own weight, with the penalty at which prox shrinks it by a fair share.

    ``rho = norm(W) / ||W||_F^2``: 1/rho is then a weighted mean of the entries or singular values.
    """
    size = square_sum(here.weight)
    return begin(here, here.weight, prox(here.weight, 0.0)[1] / size if size > 0 else 1.0)


def splitting(here: Region, solver: System, prox: Prox, start: Split, limits: tuple[int, float]) -> Run[Split]:
    """Minimise a norm of the weight over the set by the alternating direction method (Net-Trim, METHODS 6.4).

    Parameters
    ----------
    here, solver
        The set and its factorised system.
    prox : callable
        ``(weight, 1 / rho)`` -> the proximal map of the norm there, and the norm of what it returns.
    start : Split
        Where to go on from; of another radius is fine.
    limits : (int, float)
        Steps at most, and the relative residuals at which to stop.

    Returns
    -------
    Run
        ``last`` is the answer; its weight is exactly sparse or of low rank, and in the set up to the residuals.
        ``history`` holds the norm of the weight copy, which need not fall.
    """

    def advance(now: Split, number: int) -> tuple[Split, Step]:
        following, step = _advance(here, solver, prox, now)
        if number % BALANCE == BALANCE - 1:
            following = _balanced(following, step)
        return following, step

    return iterate(advance, start, math.inf, *limits)


def _advance(here: Region, solver: System, prox: Prox, now: Split) -> tuple[Split, Step]:
    """Return one step: the consensus by least squares, then both copies, then the duals."""
    level = now.response.dtype.type(solver.level)
    pulled = now.response + now.dual_response
    bias = pulled.mean(axis=0) if here.affine else now.bias
    middle = ((pulled.T @ here.inputs) / level + now.weight + now.dual_weight) @ solver.inverse
    seen = here.inputs @ middle.T
    seen += bias
    far = _distance(seen - now.response, middle - now.weight, solver.level)
    size = max(_distance(now.response, now.weight, solver.level), 1e-30)
    relaxed = seen.dtype.type(RELAXED)
    wide = relaxed * seen + (1 - relaxed) * now.response - now.dual_response
    response = here.nearest(wide)
    stretched = relaxed * middle + (1 - relaxed) * now.weight - now.dual_weight
    weight, value = prox(stretched, 1.0 / now.penalty)
    moved = _distance(response - now.response, weight - now.weight, solver.level)
    following = Split(weight, response, weight - stretched, response - wide, bias, now.penalty)
    pulls = max(_distance(following.dual_response, following.dual_weight, solver.level), 1e-30)
    return following, Step(value, far / size, moved / pulls)


def _distance(response: Real, weight: Real, level: float) -> float:
    return math.sqrt(square_sum(response) / level + square_sum(weight))


def _balanced(now: Split, step: Step) -> Split:
    """Return the iterate with a penalty at which the residuals fall together (He, Yang and Wang 2000)."""
    ratio = step.primal / max(step.dual, 1e-30)
    if 1 / UNBALANCED < ratio < UNBALANCED:
        return now
    factor = float(np.clip(math.sqrt(max(ratio, 1e-30)), 0.2, 5.0))
    return dataclasses.replace(
        now,
        penalty=now.penalty * factor,
        dual_weight=now.dual_weight / now.dual_weight.dtype.type(factor),
        dual_response=now.dual_response / now.dual_response.dtype.type(factor),
    )


# ------------------------------------------------------------------------- the set met by a weight of given structure


@dataclasses.dataclass(frozen=True)
class Point:
    """A weight (out, d) and bias (out,) of :func:`descend` with their response (n, out) and distance from the set.

    ``distance`` is the squared distance of the response from the set plus the pull toward an anchor; ``share`` the
    factor that ``fit`` keeps of its structure (None before the first step).
    """

    weight: Real
    bias: Real
    response: Real
    distance: float
    share: Any = None


@dataclasses.dataclass(frozen=True)
class Pull:
    """A ridge toward a weight: ``strength ||U - anchor||_F^2`` is added to the squared distance.

    Makes singular columns regular; toward the original weight it also keeps what few columns cannot tell.
    """

    anchor: Real
    strength: float


Fitted = Callable[[Real, Point], tuple[Real, Any]]


def place(here: Region, pull: Pull, weight: Real, bias: Real, share: Any = None) -> Point:
    """Return the point of a weight and a bias at the mean."""
    response = here.inputs @ weight.T
    response += bias
    distance = square_sum(response - here.nearest(response)) + pull.strength * square_sum(weight - pull.anchor)
    return Point(weight, bias, response, distance, share)


def descend(here: Region, pull: Pull, fitted: Fitted, now: Point) -> Point:
    """Return the next point: project the response onto the set, refit the structure to that (majorise, minimise).

    ``||z - response||^2`` with z the projection of the present response bounds the squared distance from above and
    touches it there (our derivation), so the distance cannot rise if ``fitted`` lowers the bound. ``fitted`` takes
    ``z^T X + strength * anchor`` (out, d) and the present point, and returns a weight of the structure whose
    ``||z - U x||^2 + strength ||U - anchor||^2`` is no larger, with what it wants to find again.
    """
    nearest = here.nearest(now.response)
    bias = nearest.mean(axis=0) if here.affine else now.bias
    correlation = nearest.T @ here.inputs
    correlation += pull.anchor * correlation.dtype.type(pull.strength)
    weight, share = fitted(correlation, now)
    return place(here, pull, weight, bias, share)


def admitted(here: Region, point: Point) -> bool:
    """Whether the point's weight keeps to the set with the best bias that is allowed."""
    base = point.response - point.bias
    return here.is_met(base + here.best_bias(base))


def fitted_run(problem: Problem, here: Region, pull: Pull, fitted: Fitted, start: Point, steps: int) -> Run[Point]:
    """Return the run of ``steps`` descents; ``best`` is best on ``problem.checks``, else nearest to the set.

    ``history`` is the squared distance per column of the start and of each step; it never rises.
    """
    judges = None if problem.checks is None else dataclasses.replace(problem, columns=problem.checks)
    history = [start.distance / max(len(here.inputs), 1)]

    def worth(point: Point) -> float:
        if judges is None:
            return point.distance
        return measure(judges, _unscaled(here, point), shift_of(problem, here, point)).error

    def advance(now: Point, number: int) -> tuple[Point, Step]:
        following = descend(here, pull, fitted, now)
        history.append(following.distance / max(len(here.inputs), 1))
        change = (now.distance - following.distance) / max(now.distance, 1e-30)
        return following, Step(worth(following), max(change, 0.0))

    run = iterate(advance, start, worth(start), steps, SLOW)
    return dataclasses.replace(run, steps=tuple(Step(value) for value in history[: len(run.steps) + 1]))


def _unscaled(here: Region, point: Point) -> Array:
    return np.asarray(point.weight, np.float64) * here.unit


def shift_of(problem: Problem, here: Region, point: Point) -> Array:
    """Return b' - b of a point in the layer's units; zeros where the bias is fixed."""
    if not problem.affine:
        return np.zeros(problem.out)
    at_mean = np.asarray(point.bias, np.float64) * here.scale_out
    return at_mean - _unscaled(here, point) @ here.centre - bias_of(problem)


def strength_of(here: Region, damping: float) -> float:
    """Return delta: ``damping`` times the mean diagonal of X^T X, positive."""
    level = float(np.trace(here.gram)) / len(here.gram)
    return damping * level if level > 0 else 1.0


def loss(problem: Problem, approximation: Array, shift: Array) -> float:
    """Return the relative squared error behind the activation on the checks (or columns), with this bias; for plans.

    J would mislead: what lies below zero behind a ReLU is free here, and often far off.
    """
    sample = problem.checks or problem.columns
    assert sample is not None  # methods of this module need columns
    zero = np.zeros((problem.out, 0))
    factors = Factors(zero, np.zeros((0, problem.d)), np.arange(problem.d), approximation, shift, 1)
    return activation_error(problem, factors, sample) ** 2


def unreduced(problem: Problem, here: Region, eps: float, allowed: float) -> Solution:
    """Return DENSE with its error if the layer's weight or a refitted one keeps to eps, else ERROR_TOO_SMALL."""
    reached = measure(problem, problem.weight, None)
    if not reached.keeps_to(eps):
        reached = settle(problem, _unscaled(here, _refitted(here)))
    if reached.keeps_to(eps):
        return Solution(Status.DENSE, None, 0.0, allowed=allowed, error=reached.error)
    nothing = objective(problem.weight, 0 * problem.weight, column_moments(problem), problem.affine)
    return Solution(Status.ERROR_TOO_SMALL, None, nothing, allowed=allowed, error=reached.error)


def _refitted(here: Region) -> Point:
    """Return the full weight nearest to the set, or in it: a convex problem."""
    strength = strength_of(here, REGULAR)
    metric = here.gram.copy()
    metric[np.diag_indices_from(metric)] += strength
    factor = scipy.linalg.cho_factor(metric, lower=True, overwrite_a=True, check_finite=False)
    pull = Pull(here.weight, strength)

    def fitted(correlation: Real, now: Point) -> tuple[Real, None]:
        return np.asarray(scipy.linalg.cho_solve(factor, correlation.T, check_finite=False).T, now.weight.dtype), None

    point = place(here, pull, here.weight, here.best_bias(here.inputs @ here.weight.T))
    for _ in range(FULL):
        point = descend(here, pull, fitted, point)
    return point


def by_size(here: Region, choices: tuple[Chosen, Chosen]) -> Chosen:
    """Return the first of two settings where a step costs milliseconds (float64), the second where it costs more."""
    return choices[here.inputs.dtype == np.float32]


def chase(here: Region, goal: Region, fitted: Fitted, start: Point, steps: int) -> tuple[Point, bool]:
    """Return a weight of the structure, and whether it is in ``here``; if not, the last one.

    Descends to ``goal``, a slightly smaller set, with Nesterov's extrapolation of the response, begun afresh whenever
    the distance rises; gives up early when the distance falls too slowly to end in time.
    """
    now, before, age, strength = start, start, 0, strength_of(here, REGULAR)
    distances = [start.distance]
    for number in range(steps):
        if now.distance <= (LOOK * here.radius) ** 2 and admitted(here, now):
            return now, True
        if len(distances) > PATIENCE and _hopeless(distances, goal.radius, steps - number):
            return now, False
        beta = now.response.dtype.type(age / (age + 3.0))
        ahead = dataclasses.replace(now, response=now.response + beta * (now.response - before.response))
        before, now = now, descend(goal, Pull(now.weight, strength), fitted, ahead)
        age = 0 if now.distance > distances[-1] else age + 1
        distances.append(now.distance)
    return now, admitted(here, now)


def _hopeless(distances: list[float], radius: float, left: int) -> bool:
    """Whether the squared distance, falling as over the last steps, will still be far from zero at the end."""
    rate = (distances[-1] / max(distances[-1 - PATIENCE], 1e-300)) ** (1 / PATIENCE)
    return bool(distances[-1] * min(rate, 1.0) ** left > (NEAR * radius) ** 2)


def reach_of(here: Region) -> float:
    """Return ``||A||_F`` in the set's units."""
    return math.sqrt(square_sum(here.target if here.on is None else here.target * here.on))
