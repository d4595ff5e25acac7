"""Three-block ADMM as another way to a support: what it finds, and when the closed form takes it."""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.solvers import Candidate, Moments, Problem, closed_form, three_block
from onnx_lrs.solvers.closed_form import WORTH, importance, refit
from onnx_lrs.solvers.problem import columns_of, judged, objective
from onnx_lrs.solvers.spectral import assemble, damped, joint, reduce_rows, seen
from onnx_lrs.solvers.three_block import propose

DAMPING = 1e-3
SIZES = {  # taps, outputs, channels, rank, kept channels
    "1 x 1": (1, 14, 40, 2, 4),
    "1 x 3": (3, 20, 16, 2, 4),
    "3 x 3": (9, 16, 12, 2, 3),
}


# --- material -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planted:
    """A layer T of a rank beside some channels, with the closed form for a support that is partly wrong."""

    target: np.ndarray
    metric: np.ndarray
    taps: int
    kept: np.ndarray
    support: np.ndarray
    start: tuple


def planted(seed, size, wrong, decay=0.1, noise=0.01):
    taps, out, channels, rank, count = SIZES[size]
    rng = np.random.default_rng([seed, taps])
    d = channels * taps
    kept = np.sort(rng.choice(channels, count, replace=False))
    target = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, d)) / np.sqrt(rank)
    target[:, columns_of(kept, taps)] += 2 * rng.standard_normal((out, count * taps))
    target += noise * rng.standard_normal(target.shape)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    x = rng.standard_normal((6 * d, d)) @ (rotation * np.geomspace(1, decay, d)) @ rotation.T
    metric = x.T @ x / len(x)
    others = np.setdiff1d(np.arange(channels), kept)
    support = np.sort(np.concatenate([kept[wrong:], rng.choice(others, wrong, replace=False)]))
    problem = Problem(target, taps, Moments(len(x), np.zeros(d), metric))
    factors = assemble(problem, reduce_rows(target), joint(seen(target, metric), metric, support, taps), rank)
    start = factors.left, factors.dense() - factors.left @ factors.right, support
    return Planted(target, metric, taps, kept, support, start)


def explained_twice(seed, channels=40, out=30, rank=3, count=6):
    """A low-rank part that lies mostly in a few channels, dear to an elimination that keeps columns only.

    The low-rank part explains them for nothing; the planted support are other, weaker channels.
    """
    rng = np.random.default_rng(seed)
    loud = 0.3 * rng.standard_normal((rank, channels))
    loud[np.arange(rank), np.arange(rank)] = 6
    weight = rng.standard_normal((out, rank)) @ loud
    kept = np.arange(channels - count, channels)
    weight[:, kept] += rng.standard_normal((out, count))
    weight += 0.01 * rng.standard_normal(weight.shape)
    x, z = rng.standard_normal((2, 500, channels))
    return kept, Problem(weight, 1, moments(x), moments(z))


def moments(x):
    return Moments(len(x), x.mean(axis=0), np.cov(x.T, bias=True).reshape(x.shape[1], -1))


def chosen(problem, rank, count):
    """The candidate that elimination alone comes to."""
    order = importance(reduce_rows(problem.weight).target, damped(problem, DAMPING), problem.taps)
    return Candidate("low-rank + channels", rank, 0, float("nan"), order[:count], DAMPING)


def proposing(support):
    """Stand in for propose(): it ends with this support (None: with the one it starts from)."""

    def stand_in(target, metric, taps, start):
        return types.SimpleNamespace(last=types.SimpleNamespace(support=start[2] if support is None else support))

    return stand_in


# --- what it finds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.03])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_with_enough_steps_a_planted_support_is_found_from_one_without_any_of_its_channels(
    size, decay, seed, monkeypatch
):
    monkeypatch.setattr(three_block, "STEPS", 200)
    case = planted(seed, size, wrong=SIZES[size][-1], decay=decay)
    assert not set(case.support) & set(case.kept)
    run = propose(case.target, case.metric, case.taps, case.start)
    np.testing.assert_array_equal(run.last.support, case.kept)


@pytest.mark.parametrize("seed", range(6))
def test_in_the_steps_it_has_it_mends_one_wrong_channel(seed):
    case = planted(seed, "3 x 3", wrong=1)
    run = propose(case.target, case.metric, case.taps, case.start)
    np.testing.assert_array_equal(run.last.support, case.kept)
    assert len(run.steps) <= three_block.STEPS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_a_right_support_stays(size, seed):
    case = planted(seed, size, wrong=0)
    run = propose(case.target, case.metric, case.taps, case.start)
    np.testing.assert_array_equal(run.last.support, case.kept)


@pytest.mark.parametrize("size", SIZES)
def test_every_iterate_has_the_rank_and_the_number_of_channels_it_started_with(size, monkeypatch):
    taps, out, channels, rank, count = SIZES[size]
    for steps in (1, 5):
        monkeypatch.setattr(three_block, "STEPS", steps)
        case = planted(0, size, wrong=count)
        run = propose(case.target, case.metric, taps, case.start)
        last = run.last
        assert np.linalg.matrix_rank(last.low, tol=1e-3 * np.linalg.norm(last.low)) == rank
        np.testing.assert_allclose(last.basis.T @ last.basis, np.eye(rank), atol=1e-5)
        norms = np.linalg.norm(last.kept.reshape(out, channels, taps), axis=(0, 2))
        np.testing.assert_array_equal(np.flatnonzero(norms), last.support)
        assert len(last.support) == count
        left = case.target - last.low - last.kept
        assert run.history[-1] == pytest.approx(np.trace(left @ case.metric @ left.T), rel=1e-3)
        assert len(run.history) == len(run.residuals) == steps


def test_the_same_start_gives_the_same_bits_and_nothing_is_changed():
    case = planted(1, "1 x 1", wrong=3)
    before = [case.target.copy(), case.metric.copy(), *(part.copy() for part in case.start)]
    runs = [propose(case.target, case.metric, case.taps, case.start) for _ in range(2)]
    for ours, theirs in zip(*(vars(run.last).values() for run in runs), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert runs[0].steps == runs[1].steps
    for old, new in zip(before, [case.target, case.metric, *case.start], strict=True):
        np.testing.assert_array_equal(old, new)


# --- when it is taken -----------------------------------------------------------------------------------------------


def random_problem(seed, out, channels, taps, validation):
    rng = np.random.default_rng(seed)
    d = channels * taps
    mixing = rng.standard_normal((d, d)) * 0.85 ** np.arange(d)[:, None]
    x, z = rng.standard_normal((2, 3 * d, d)) @ mixing + 1
    return Problem(rng.standard_normal((out, d)), taps, moments(x), moments(z) if validation else None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 9999),
    out=st.integers(2, 12),
    channels=st.integers(3, 10),
    taps=st.sampled_from([1, 3]),
    validation=st.booleans(),
)
def test_the_history_falls_and_other_samples_are_not_worse_for_it(seed, out, channels, taps, validation):
    problem = random_problem(seed, out, channels, taps, validation)
    rank, count = 1 + seed % min(out - 1, 3), 1 + seed % (channels - 1)
    candidate = chosen(problem, rank, count)
    factors, history = refit(problem, candidate)
    assert (np.diff(history) < 0).all()
    assert objective(problem.weight, factors.dense(), problem.moments, problem.affine) == pytest.approx(history[-1])
    assert (factors.rank, len(factors.kept)) == (rank, count)
    first, start = refit(problem, candidate, 0)
    assert history[0] == pytest.approx(start[0], rel=1e-12)
    if validation:
        errors = [judged(problem.weight, f, problem.validation) for f in (factors, first)]
        assert errors[0] <= errors[1] * (1 + 1e-12)


@pytest.mark.parametrize("validation", [True, False])
def test_a_support_that_raises_the_objective_is_not_taken(validation, monkeypatch):
    rejected = 0
    for seed in range(10):
        problem = random_problem(seed, 6, 8, 1, validation)
        candidate = chosen(problem, 2, 3)
        monkeypatch.setattr(closed_form, "propose", proposing(None))
        without, history = refit(problem, candidate)
        for support in (np.array([0, 1, 2]), np.array([5, 6, 7]), np.sort(candidate.support)):
            monkeypatch.setattr(closed_form, "propose", proposing(support))
            factors, after = refit(problem, candidate)
            if list(factors.kept) == list(without.kept):
                rejected += 1
                np.testing.assert_array_equal(factors.dense(), without.dense())
                assert after == history
            else:
                assert after[:-1] == history
                assert after[-1] < (1 - WORTH) * history[-1]
    assert rejected > 10


def test_a_support_that_is_better_on_the_fit_and_worse_elsewhere_is_not_taken(monkeypatch):
    """Only the moments of the other samples differ: columns along the direction in which the proposal is worse."""
    kept, problem = explained_twice(0)
    candidate = chosen(problem, 3, 6)
    monkeypatch.setattr(closed_form, "importance", lambda *given: candidate.support)  # the alternation changes nothing
    monkeypatch.setattr(closed_form, "propose", proposing(None))
    without, _ = refit(problem, candidate)
    monkeypatch.setattr(closed_form, "propose", proposing(kept))
    better, _ = refit(problem, candidate)
    assert list(better.kept) == list(kept) != list(without.kept)
    ours, theirs = (problem.weight - f.dense() for f in (better, without))
    gains, directions = np.linalg.eigh(ours.T @ ours - theirs.T @ theirs)
    for worst, expected in ((directions[:, -1], without), (directions[:, 0], better)):
        elsewhere = Moments(500, problem.moments.mean, np.outer(worst, worst))
        found, _ = refit(dataclasses.replace(problem, validation=elsewhere), candidate)
        assert list(found.kept) == list(expected.kept)
    assert gains[-1] > 0 > gains[0]


def test_what_elimination_took_and_the_low_rank_part_explains_as_well_is_let_go(monkeypatch):
    """With the 20 steps of a solve the error falls; with more of them the planted channels are all found."""
    ratios, found = [], 0
    for seed in range(6):
        kept, problem = explained_twice(seed)
        candidate = chosen(problem, 3, 6)
        assert set(candidate.support) & set(range(3))  # elimination alone falls for the loud channels
        with monkeypatch.context() as patch:
            patch.setattr(closed_form, "propose", proposing(None))
            without = refit(problem, candidate)[1][-1]
        ratios.append(refit(problem, candidate)[1][-1] / without)
        with monkeypatch.context() as patch:
            patch.setattr(three_block, "STEPS", 400)
            found += list(refit(problem, candidate)[0].kept) == list(kept)
    assert max(ratios) <= 1
    assert np.mean(ratios) < 0.9  # 0.41 to 1
    assert found == 6
