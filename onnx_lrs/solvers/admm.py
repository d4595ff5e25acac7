r"""Structured sparse + low-rank weights on post-activation features by ADMM (Ma et al. 2019, arXiv 1807.10119).

.. math:: \min_{L, S} \tfrac{1}{2n} \|A - \phi(M X + c)\|_F^2 + l_1 \sum_g \sqrt{|g|}\, \|S_g\|_F + l_2 \|L\|_*
          \quad \text{s.t. } M = L + S

with X the centred columns, A what the layer gave behind its activation phi, and the groups g the input channels. The
scheme is the paper's as far as its abstract tells it; the closed forms are our derivation. With Z = M X + c split off,
scaled duals ``dual`` (of M = L + S) and ``lift`` (of Z = M X + c), and penalties t and rho, every step is closed form
and ``H + t I`` is factorised once:

    S: group soft-threshold of M - L - dual at l1 sqrt|g| / t     L: singular-value threshold of M - S - dual at l2 / t
    M = (C + t (L + S + dual)) (H + t I)^{-1}, C = cov(Z + lift, x)     Z: the two cases of prox.through
    dual += L + S - M     lift += Z - M X - c

Without an activation Z is Y itself, C = T H, and nothing but H is needed: that problem is convex. Behind a ReLU it is
not; what is known is descent of the augmented Lagrangian to a stationary point when the penalties are large enough.

The balance l1 / l2 is delicate, and shrinking costs accuracy, so the relaxed solution decides on support and rank only:
a path over both penalties, warm-started, is run on the convex problem; its points are cut down to the budget and
refitted in closed form for their support. One of them goes on behind the ReLU, with penalties that just keep its rank
and channels, and is refitted there (METHODS 5). What is best behind the activation is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_lrs.solvers.activation import RELU
from onnx_lrs.solvers.behind import BLOCK, activation_error, bias_of, first, is_plain, pre_activation
from onnx_lrs.solvers.channels import inverse_spd
from onnx_lrs.solvers.closed_form import NO_CHANNELS, Family, best_within, candidates, kept_counts
from onnx_lrs.solvers.loop import Run, Step, iterate
from onnx_lrs.solvers.method import Method, finished
from onnx_lrs.solvers.problem import (
    LARGEST,
    Array,
    Budget,
    Candidate,
    Columns,
    Factors,
    Indices,
    Problem,
    Settings,
    Solution,
)
from onnx_lrs.solvers.prox import Floats, group_norms, group_soft, largest, singular_soft, through
from onnx_lrs.solvers.spectral import (
    Curve,
    assemble,
    choose_damping,
    damped,
    joint,
    losses,
    reduce_rows,
    seen,
    unexplained,
)

RATIOS = (1.0, 3.0)  # of l1 to l2, each relative to the least value at which its part is zero: see `path`
LEVELS = tuple(0.1 * 0.5**i for i in range(8))  # of both penalties, falling: parts grow
INNER = 3  # iterations a level, warm-started
PENALTY = 0.1  # t relative to the mean diagonal of H
LIFT = 1.0  # rho of Z = M X + c: the weight of the fit behind the activation is 1 as well
STEPS = 8  # behind the ReLU
ROUNDS = (0.1, 0.3, 1.0)  # rho of the refits behind the ReLU, rising (Zhang et al., TPAMI 2016)
PER_WIDTH = 2  # columns per feature that are used at least, where there are as many
WORK = 1 << 34  # multiply-adds of one product with the columns, up to which more of them are used
FAR = 1e12  # from 1: outputs larger, or smaller than its inverse, are scaled before float32 squares are formed
NOTHING = 1e-3  # of T: an M below it counts as zero when residuals are taken relative to it
WIDE = 2048  # features from which less is tried: a solve must not take ten times as long as its statistics
WIDE_INNER, WIDE_STEPS, WIDE_COUNTS = 2, 4, 4
NARROW = 512  # features from which float32 is used: the relaxed solution decides on support and rank only


@dataclasses.dataclass(frozen=True)
class State:
    """One iterate: M, L, S and the dual of M = L + S, all (out, d), with the singular values of L, falling."""

    middle: Floats
    low: Floats
    sparse: Floats
    dual: Floats
    values: Floats


@dataclasses.dataclass(frozen=True)
class Lifted:
    """An iterate behind the ReLU: Z ("split") and the dual of Z = M X + c ("lift"), both (n, out) float32."""

    state: State
    split: Floats
    lift: Floats


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The convex program of one layer: everything that does not change from step to step.

    ``target`` T (out, d), ``metric`` H (d, d), ``pull`` = t (H + t I)^{-1} (d, d), ``penalty`` t.
    """

    target: Floats
    metric: Floats
    pull: Floats
    penalty: float
    taps: int

    def start(self) -> State:
        """Return the iterate with M = T and nothing in the parts."""
        nothing = np.zeros_like(self.target)
        return State(self.target, nothing, nothing, nothing, nothing[0, :0])

    def parts(self, state: State, l1: float, l2: float) -> tuple[Floats, Floats, Floats]:
        """Return S, L and the singular values of L after their two steps."""
        step1, step2 = l1 * float(np.sqrt(self.taps)) / self.penalty, l2 / self.penalty
        sparse = group_soft(state.middle - state.low - state.dual, step1, self.taps)
        low, values = singular_soft(state.middle - sparse - state.dual, step2)
        return sparse, low, values

    def penalties(self, sparse: Floats, values: Floats, l1: float, l2: float) -> float:
        """Return ``l1 sum_g sqrt|g| ||S_g||_F + l2 ||L||_*``; an infinite penalty of nothing is nothing."""
        norms, nuclear = float(np.sqrt(self.taps)) * float(group_norms(sparse, self.taps).sum()), float(values.sum())
        return (l1 * norms if norms else 0.0) + (l2 * nuclear if nuclear else 0.0)

    def advance(self, state: State, l1: float, l2: float) -> tuple[State, Step]:
        """Return the next iterate without an activation, and its objective and residuals."""
        sparse, low, values = self.parts(state, l1, l2)
        goal = low + sparse + state.dual
        middle = self.target + (goal - self.target) @ self.pull
        gap = low + sparse - middle
        # (T - M) H = t (M - T - (G - T)) + ..., so that tr (T - M) H (T - M)^T needs no product with H
        loss = 0.5 * self.penalty * float(np.vdot(goal - middle, middle - self.target))
        moved = (low + sparse) - (state.low + state.sparse)
        primal, dual = _relative(gap, middle, self.target), _relative(moved, middle, self.target)
        step = Step(loss + self.penalties(sparse, values, l1, l2), primal, dual)
        return State(middle, low, sparse, state.dual + gap, values), step


def _relative(difference: Floats, to: Floats, whole: Floats) -> float:
    """Return the size of a difference relative to ``to``; where nothing is left of ``whole``, to a share of that."""
    size = max(float(np.linalg.norm(to)), NOTHING * float(np.linalg.norm(whole)))
    return float(np.linalg.norm(difference)) / max(size, 1e-30)


def relaxation(target: Array, metric: Array, taps: int) -> Relaxation:
    """Factorise the system of a layer once: t is PENALTY of H's mean diagonal.

    Raises
    ------
    LinAlgError
        If ``metric`` has an eigenvalue below -t.
    """
    level = PENALTY * float(np.trace(metric)) / len(metric)
    level = level if level > 0 else 1.0
    pull = inverse_spd(metric + level * np.eye(len(metric))) * level
    dtype = np.float32 if len(metric) >= NARROW else np.float64
    return Relaxation(target.astype(dtype), metric.astype(dtype), pull.astype(dtype), level, taps)


def relaxed(program: Relaxation, l1: float, l2: float, start: State, steps: int, tolerance: float) -> Run[State]:
    """Solve the convex program for one pair of penalties (identity activation), warm-started."""

    def advance(state: State, number: int) -> tuple[State, Step]:
        return program.advance(state, l1, l2)

    return iterate(advance, start, np.inf, steps, tolerance)


def path(program: Relaxation, channels: int) -> list[Indices]:
    """Return supports, strongest channel first, along falling penalties, one warm-started sweep for each ratio l1 / l2.

    Both penalties are counted relative to the value from which their part stays zero: the largest group norm and the
    largest singular value of the gradient T H at zero.
    """
    gradient = program.target @ program.metric
    largest2 = float(np.sqrt(max(np.linalg.eigvalsh(gradient @ gradient.T)[-1], 0.0)))
    largest1 = float(group_norms(gradient, program.taps).max()) / float(np.sqrt(program.taps))
    inner = INNER if len(program.metric) < WIDE else WIDE_INNER
    found = []
    for ratio in RATIOS:
        state = program.start()
        for level in LEVELS:
            run = relaxed(program, ratio * level * largest1, level * largest2, state, inner, 0.0)
            state = run.last
            norms = group_norms(state.sparse, program.taps)
            kept = np.argsort(-norms, kind="stable")[: int(np.count_nonzero(norms))].astype(np.int64)
            found.append(kept)
            if len(kept) > LARGEST * channels:
                break
    return found


# ------------------------------------------------------------------------------------------------ candidates for a plan


def _candidates(problem: Problem, multiple: int, settings: Settings) -> list[Candidate]:
    """Return every rank beside every support of the path, refitted in closed form for that support.

    The relaxed rank is one of these ranks; which is best within a budget the exact curve tells better.
    """
    counts = kept_counts(problem.channels, min(problem.weight.shape), multiple)
    return _beside(problem, [0, *counts], multiple)


def _beside(
    problem: Problem, counts: Sequence[int], multiple: int, program: Relaxation | None = None
) -> list[Candidate]:
    """Return every rank beside the supports of the path that hold one of ``counts`` channels.

    The path is that of ``program``, if there is one already, else that of the damped metric.
    """
    damping = choose_damping(problem)
    metric, target = damped(problem, damping), reduce_rows(problem.weight).target
    assert metric is not None  # a problem with columns has moments
    if program is None:
        program = relaxation(target, metric, problem.taps)
    points = path(dataclasses.replace(program, target=target.astype(program.target.dtype)), problem.channels)
    supports = _truncated(points, counts, problem.channels, len(RATIOS) if problem.d < WIDE else 1)
    given, curves = seen(target, metric), []
    centre = problem.moments.mean if problem.moments is not None else None
    for support in supports:
        split = joint(given, metric, support, problem.taps)
        rest = unexplained(target, split, problem.taps)
        judge = problem.validation or problem.moments
        curves.append(Curve(support, losses(rest, split.basis, judge, problem.affine, centre)))
    return candidates(problem, Family(curves, damping), multiple)


def _truncated(points: Sequence[Indices], counts: Sequence[int], channels: int, each: int) -> list[Indices]:
    """Return for each count the strongest channels of the points that hold at least as many and fewest above them.

    ``each`` is the number of points taken for a count. If none holds as many, the point that holds most is filled up
    with other channels.
    """
    found: dict[tuple[int, ...], Indices] = {(): NO_CHANNELS} if 0 in counts else {}
    most = max(points, key=len)
    filled = np.concatenate([most, np.setdiff1d(np.arange(channels), most)])
    for count in (c for c in counts if c):
        enough = sorted((p for p in points if len(p) >= count), key=len) or [filled]
        for support in (p[:count] for p in enough[:each]):
            found[tuple(sorted(support))] = support
    return list(found.values())


def _choose(
    problem: Problem, budget: Budget, settings: Settings, program: Relaxation | None = None
) -> Candidate | None:
    if budget.params is not None:
        room = budget.params // (problem.taps * problem.out)
        counts = [c for c in kept_counts(problem.channels, min(problem.weight.shape), budget.multiple) if c <= room]
        if problem.d >= WIDE and len(counts) > WIDE_COUNTS:
            counts = [counts[i] for i in np.linspace(0, len(counts) - 1, WIDE_COUNTS).astype(int)]
        return best_within(_beside(problem, [0, *counts], budget.multiple, program), budget)
    if budget.channels is None:
        return None
    return best_within(
        _beside(problem, [budget.channels], 1, program), budget
    )  # any split, not only those on the curves


# ------------------------------------------------------------------------------------------------ behind the activation


@dataclasses.dataclass(frozen=True)
class Sample:
    """Columns in float32, centred where a bias absorbs the mean, with what the layer gives for them.

    ``inputs`` (n, d), ``mean`` (d,), ``outputs`` A (n, out) behind the activation, ``program`` on their own moments.
    """

    inputs: Floats
    mean: Array
    outputs: Floats
    program: Relaxation


def _sample(problem: Problem) -> Sample:
    assert problem.columns is not None
    used = first(problem.columns, max(PER_WIDTH * problem.d, WORK // problem.params))
    outputs = np.maximum(pre_activation(problem, used), 0)
    mean = used.inputs.mean(axis=0, dtype=np.float64) * problem.affine
    inputs = used.inputs - mean.astype(np.float32)
    gram = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    return Sample(inputs, mean, outputs, relaxation(problem.weight, gram, problem.taps))


def behind_relu(problem: Problem, sample: Sample, start: Factors, steps: int, tolerance: float) -> Run[Lifted]:
    """Go on from a linear approximation with the ReLU in the objective, its rank and channels just kept.

    The penalties are the values at which the next channel and the next rank would enter at the first step.
    """
    program, width = sample.program, len(sample.inputs)
    low, whole = (m.astype(program.target.dtype) for m in (start.left @ start.right, start.dense()))
    split = through(_responses(problem, sample, start), sample.outputs, LIFT, RELU)
    begin = Lifted(State(whole, low, whole - low, np.zeros_like(whole), low[0, :0]), split, np.zeros_like(split))
    middle, _ = _middle(problem, sample, begin)
    l1, l2 = _just_keeping(program, middle, begin.state, (start.rank, len(start.kept)))

    def advance(now: Lifted, number: int) -> tuple[Lifted, Step]:
        middle, values = _middle(problem, sample, now)
        split = through(values - now.lift, sample.outputs, LIFT, RELU)
        sparse, low, singular = program.parts(dataclasses.replace(now.state, middle=middle), l1, l2)
        gap, lag = low + sparse - middle, split - values
        loss = 0.5 * float(np.square(np.maximum(values, 0) - sample.outputs).sum(dtype=np.float64)) / width
        step = Step(
            loss + program.penalties(sparse, singular, l1, l2),
            max(_relative(gap, middle, program.target), _relative(lag, split, sample.outputs)),
            _relative(low + sparse - now.state.low - now.state.sparse, middle, program.target),
        )
        return Lifted(State(middle, low, sparse, now.state.dual + gap, singular), split, now.lift + lag), step

    return iterate(advance, begin, np.inf, steps, tolerance)


def _responses(problem: Problem, sample: Sample, factors: Factors) -> Floats:
    """Return what the factors give before the activation, (n, out) float32."""
    dense = factors.dense()
    row = bias_of(problem) + factors.bias_shift + dense @ sample.mean
    return sample.inputs @ dense.T.astype(np.float32) + row.astype(np.float32)


def _middle(problem: Problem, sample: Sample, now: Lifted) -> tuple[Floats, Floats]:
    """Return M and M X + c after their step: the regression of Z + lift on x, pulled toward L + S + dual by t."""
    wanted, program = now.split + now.lift, sample.program
    goal = now.state.low + now.state.sparse + now.state.dual
    image = _image(problem, sample, wanted).astype(goal.dtype)
    middle = goal + ((image - goal @ program.metric) / goal.dtype.type(program.penalty)) @ program.pull
    constant = wanted.mean(axis=0, dtype=np.float64) if problem.affine else bias_of(problem)
    return middle, sample.inputs @ middle.T.astype(np.float32) + constant.astype(np.float32)


def _image(problem: Problem, sample: Sample, wanted: Floats) -> Floats:
    """Return E[(wanted - c) x^T], (out, d) float32; centred columns need no c, without them it is the bias."""
    free = wanted if problem.affine or problem.bias is None else wanted - bias_of(problem).astype(np.float32)
    return np.asarray(free.T @ sample.inputs) / np.float32(len(wanted))


def _just_keeping(program: Relaxation, middle: Floats, state: State, kept: tuple[int, int]) -> tuple[float, float]:
    """Return the penalties that leave ``kept`` = (rank, channels) of the next two parts; inf where nothing is left."""
    rank, channels = kept
    norms = np.sort(group_norms(middle - state.low, program.taps))[::-1]
    rest = middle - state.sparse
    gram = rest @ rest.T if len(rest) <= rest.shape[1] else rest.T @ rest
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))
    next_norm = norms[channels] if channels < len(norms) else 0.0
    next_value = values[rank] if rank < len(values) else 0.0
    l1 = float(next_norm) * program.penalty / float(np.sqrt(program.taps)) if channels else np.inf
    return l1, float(next_value) * program.penalty if rank else np.inf


def refitted(problem: Problem, sample: Sample, start: Factors, metric: Array) -> list[Factors]:
    """Return the factors after each round of METHODS 5 with the support and rank of ``start``.

    ``z`` takes the place of the target, given what the layer gave behind the ReLU and what the last factors give before
    it; its regression on x, pulled toward the last factors by t, is approximated as ever.
    """
    found, program = [start], sample.program
    for rho in ROUNDS if problem.d < WIDE else ROUNDS[::2]:
        last = found[-1]
        dense = last.dense()
        split = through(_responses(problem, sample, last), sample.outputs, rho, RELU)
        centre = split.mean(axis=0, dtype=np.float64)
        moved = _image(problem, sample, split) - dense.astype(program.metric.dtype) @ program.metric
        target = dense + np.asarray((moved / program.penalty).astype(program.pull.dtype) @ program.pull, np.float64)
        found.append(_of_target(problem, metric, target, start, centre, sample.mean))
    return found


def _of_target(problem: Problem, metric: Array, target: Array, like: Factors, centre: Array, mean: Array) -> Factors:
    """Return factors of ``target`` with the rank and channels of ``like``; the mean output becomes ``centre``."""
    reduced = reduce_rows(target)
    split = joint(seen(reduced.target, metric), metric, like.kept, problem.taps)
    factors = assemble(problem, reduced, split, like.rank, shift=False)
    if not problem.affine:
        return factors
    return dataclasses.replace(factors, bias_shift=centre - bias_of(problem) - factors.dense() @ mean)


def _sees_relu(problem: Problem) -> bool:
    """Return whether there are columns and a ReLU right behind the layer; anything else is fitted as linear."""
    return problem.columns is not None and problem.activation == RELU and is_plain(problem)


def _direct(problem: Problem, budget: Budget, settings: Settings) -> Solution | None:
    """Choose and fit on the same columns, whose system is factorised once."""
    sample = None
    if _sees_relu(problem):
        sample = _sample(_in_units(problem, _unit(problem)))
    chosen = _choose(problem, budget, settings, None if sample is None else sample.program)
    return None if chosen is None else _fit(problem, chosen, settings, sample)


def _fit(problem: Problem, chosen: Candidate, settings: Settings, sample: Sample | None = None) -> Solution:
    """Fit one rank and number of channels: linearly, then behind the ReLU if there is one."""
    metric = damped(problem, chosen.damping)
    assert metric is not None
    linear = _linear(problem, metric, chosen.support, chosen.rank)
    if not _sees_relu(problem):
        return finished(problem, linear)
    unit = _unit(problem)
    scaled = _in_units(problem, unit)
    sample = sample or _sample(scaled)
    best, run = _fit_behind(scaled, chosen, _scaled(linear, 1 / unit), (metric, sample), settings)
    history = tuple(value * unit**2 for value in run.history)
    return dataclasses.replace(finished(problem, _scaled(best, unit), history), residuals=run.residuals)


def _unit(problem: Problem) -> float:
    """Return 1, or a power of two like the layer's outputs where float32 squares of those would not do."""
    assert problem.columns is not None
    size = float(np.abs(pre_activation(problem, first(problem.columns, BLOCK))).max())
    return 1.0 if size == 0 or 1 / FAR < size < FAR else float(2.0 ** np.round(np.log2(size)))


def _in_units(problem: Problem, unit: float) -> Problem:
    """Return the problem with its outputs divided by ``unit``; a ReLU commutes with that."""
    if unit == 1:
        return problem

    def part(columns: Columns | None) -> Columns | None:
        if columns is None or columns.outputs is None:
            return columns
        return dataclasses.replace(columns, outputs=columns.outputs / np.float32(unit))

    bias = None if problem.bias is None else problem.bias / unit
    weight, columns, checks = problem.weight / unit, part(problem.columns), part(problem.checks)
    return dataclasses.replace(problem, weight=weight, bias=bias, columns=columns, checks=checks)


def _scaled(factors: Factors, by: float) -> Factors:
    """Return the factors of ``by`` times the matrix and the shift."""
    right, sparse, bias_shift = (by * part for part in (factors.right, factors.sparse, factors.bias_shift))
    return dataclasses.replace(factors, right=right, sparse=sparse, bias_shift=bias_shift)


def _fit_behind(
    problem: Problem, chosen: Candidate, linear: Factors, known: tuple[Array, Sample], settings: Settings
) -> tuple[Factors, Run[Lifted]]:
    """Return the best of several iterates behind the ReLU on the checks (or columns), and the run of the ADMM."""
    assert problem.columns is not None
    metric, sample = known
    usual = STEPS if problem.d < WIDE else WIDE_STEPS
    steps = usual if settings.steps is None else settings.steps
    run = behind_relu(problem, sample, linear, steps, settings.tolerance)
    norms = group_norms(run.last.state.sparse, problem.taps).astype(np.float64)
    norms[chosen.support] += 1e-9 * norms.max(initial=1.0)  # where the relaxed part holds fewer channels, the old ones
    support = np.flatnonzero(largest(norms, len(chosen.support)))
    found = refitted(problem, sample, linear, metric)
    # without a low-rank part the channels stay: a plan may have taken filters out for them
    if chosen.rank and set(support) != set(chosen.support):
        found += refitted(problem, sample, _linear(problem, metric, support, chosen.rank), metric)
    judges = problem.checks or first(problem.columns, max(problem.d, WORK // problem.params))
    errors = [activation_error(problem, factors, judges) for factors in found]
    return found[int(np.argmin(errors))], run


def _linear(problem: Problem, metric: Array, support: Indices, rank: int) -> Factors:
    reduced = reduce_rows(problem.weight)
    return assemble(problem, reduced, joint(seen(reduced.target, metric), metric, support, problem.taps), rank)


ADMM = Method(_candidates, _choose, _fit, needs_columns=True, direct=_direct)
