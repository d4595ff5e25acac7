"""The solvers: objective, low-rank and channel steps, their joint optimum, and what every method promises.

Oracles: raw samples instead of moments, Eckart-Young on W H^(1/2), brute force over supports, alternating least squares
from random starts, planted solutions.
"""

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.solvers import (
    METHODS,
    Budget,
    Candidate,
    Factors,
    Moments,
    Problem,
    ProjectedFactors,
    Settings,
    SpatialFactors,
    Status,
    TuckerFactors,
    curve,
    fit,
    objective,
    projected,
    solve,
    spatial,
)
from onnx_lrs.solvers.channels import eliminate, inverse_spd, removal_scores
from onnx_lrs.solvers.closed_form import DATA_FREE, FAMILIES, NO_CHANNELS, candidates, data_free_split, refit
from onnx_lrs.solvers.problem import columns_of, judged
from onnx_lrs.solvers.projected import TUCKER, fit_projected, fit_tucker, projected_candidates
from onnx_lrs.solvers.solve import undominated
from onnx_lrs.solvers.spatial import fit_spatial, spatial_candidates
from onnx_lrs.solvers.spectral import (
    DAMPING,
    assemble,
    choose_damping,
    damped,
    losses,
    reduce_rows,
    splits,
    unexplained,
)
from tests.builders import planted_projected, planted_tucker

NAMES = sorted(FAMILIES)


# --- material -------------------------------------------------------------------------------------------------------


def samples(rng, n, d, level=1.0, decay=0.7):
    """Correlated columns with falling variances and a mean that is not zero."""
    mixing = rng.standard_normal((d, d)) * decay ** np.arange(d)[:, None]
    return rng.standard_normal((n, d)) @ mixing + level * rng.standard_normal(d)


def moments_of(x):
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean) / len(x))


def make(seed, out=6, channels=8, taps=1, n=200, held_out=True, affine=True):
    rng = np.random.default_rng(seed)
    d = channels * taps
    mixing = np.random.default_rng([seed, 1]).standard_normal((d, d)) * 0.85 ** np.arange(d)[:, None]
    x = rng.standard_normal((n, d)) @ mixing + 1.0
    z = rng.standard_normal((n, d)) @ mixing + 1.2
    weight = rng.standard_normal((out, d))
    return Problem(weight, taps, moments_of(x), moments_of(z) if held_out else None, affine)


def metric_problem(metric, weight, taps=1):
    """A problem whose undamped objective is that of ``metric``."""
    return Problem(weight, taps, Moments(1, np.zeros(len(metric)), metric))


def j_of(weight, approximation, metric):
    difference = weight - approximation
    return float(np.trace(difference @ metric @ difference.T))


def least_squares(target, metric, keep):
    """Return the best matrix that is zero outside the columns ``keep``."""
    found = np.zeros_like(target)
    if len(keep):
        found[:, keep] = np.linalg.solve(metric[np.ix_(keep, keep)], metric[keep] @ target.T).T
    return found


def best_low_rank(target, metric, rank):
    """Eckart-Young in the metric, through an explicit square root: independent of the code under test."""
    root = np.real(scipy.linalg.sqrtm(metric))
    u, s, vt = np.linalg.svd(target @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root), float(np.sum(s[rank:] ** 2))


def check_contract(problem, budget, found, method):
    factors = found.factors
    assert found.status in (Status.SOLVED, Status.SINGULAR)
    assert isinstance(factors, Factors)
    assert factors.left.shape == (problem.out, factors.rank)
    assert factors.right.shape == (factors.rank, problem.d)
    assert factors.sparse.shape == (problem.out, len(factors.kept) * problem.taps)
    assert factors.bias_shift.shape == (problem.out,)
    assert (np.diff(factors.kept) > 0).all()
    assert set(factors.kept) <= set(range(problem.channels))
    for array in (factors.left, factors.right, factors.sparse, factors.bias_shift):
        assert array.dtype == np.float64
        assert np.isfinite(array).all()
    assert 0 < factors.params <= budget.params < problem.params
    assert factors.rank % budget.multiple == 0
    assert len(factors.kept) % budget.multiple == 0
    if method in ("hsvd", "svd", "spatial"):
        assert len(factors.kept) == 0
    if method in ("channels", "magnitude"):
        assert factors.rank == 0
    if method in DATA_FREE or not problem.affine:
        assert not factors.bias_shift.any()
    exact = objective(problem.weight, factors.dense(), problem.moments, problem.affine)
    assert found.objective == exact


def budgets(problem, shares=(0.15, 0.3, 0.5, 0.8)):
    return [int(share * problem.params) for share in shares]


# --- objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_the_mean_squared_output_error(seed, affine):
    rng = np.random.default_rng(seed)
    x, weight, other = samples(rng, 50, 7, level=3.0), rng.standard_normal((4, 7)), rng.standard_normal((4, 7))
    errors = x @ (weight - other).T
    if affine:
        errors = errors - errors.mean(axis=0)
    exact = np.mean(np.sum(errors**2, axis=1))
    assert objective(weight, other, moments_of(x), affine) == pytest.approx(exact, rel=1e-10)


def test_the_objective_without_data_is_the_frobenius_distance():
    weight, other = np.random.default_rng(0).standard_normal((2, 4, 7))
    assert objective(weight, other, None) == pytest.approx(np.linalg.norm(weight - other) ** 2, rel=1e-14)


def test_the_objective_is_zero_at_the_weight_and_never_negative():
    rng = np.random.default_rng(1)
    x = samples(rng, 4, 30)  # singular moments
    weight = rng.standard_normal((3, 30))
    assert objective(weight, weight, moments_of(x)) == 0.0
    null = scipy.linalg.null_space(x - x.mean(axis=0))[:, 0]
    assert objective(weight, weight + 1e3 * null, moments_of(x)) >= 0.0


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_judged_is_the_relative_error_on_raw_samples(affine, shifted):
    rng = np.random.default_rng(2)
    x = samples(rng, 60, 6, level=2.0)
    weight = rng.standard_normal((4, 6))
    shift = rng.standard_normal(4) if shifted else np.zeros(4)
    factors = Factors(
        rng.standard_normal((4, 2)),
        rng.standard_normal((2, 6)),
        np.array([1, 4]),
        rng.standard_normal((4, 2)),
        shift,
        1,
    )
    bias = rng.standard_normal(4)
    y = x @ weight.T + bias
    approximated = x @ factors.dense().T + bias + shift
    reference = y - y.mean(axis=0) if affine else y - bias
    exact = np.linalg.norm(y - approximated) / np.linalg.norm(reference)
    assert judged(weight, factors, moments_of(x), affine) == pytest.approx(exact, rel=1e-10)


def test_judged_of_a_layer_without_output_is_zero():
    factors = Factors(np.zeros((2, 0)), np.zeros((0, 3)), np.zeros(0, int), np.zeros((2, 0)), np.zeros(2), 1)
    assert judged(np.zeros((2, 3)), factors, Moments(5, np.ones(3), np.eye(3))) == 0.0


def test_the_dense_form_of_factors():
    rng = np.random.default_rng(3)
    left, right, sparse = rng.standard_normal((3, 2)), rng.standard_normal((2, 8)), rng.standard_normal((3, 4))
    factors = Factors(left, right, np.array([1, 3]), sparse, np.zeros(3), 2)
    exact = left @ right
    exact[:, [2, 3, 6, 7]] += sparse
    np.testing.assert_array_equal(factors.dense(), exact)
    assert factors.params == 6 + 16 + 12


# --- low-rank step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "d"), [(5, 9), (9, 9), (12, 7), (1, 4), (6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_every_rank_is_optimal_by_eckart_young(out, d, seed):
    rng = np.random.default_rng(seed)
    metric = moments_of(samples(rng, 60, d)).cov + 0.01 * np.eye(d)
    problem = metric_problem(metric, rng.standard_normal((out, d)))
    reduced = reduce_rows(problem.weight)
    (split,) = splits(reduced.target, metric, np.arange(d), [0], 1)
    scale = j_of(problem.weight, 0, metric)
    curve_ = losses(unexplained(reduced.target, split, 1), split.basis, problem.moments, True, problem.moments.mean)
    for rank in range(min(out, d) + 1):
        _, optimum = best_low_rank(problem.weight, metric, rank)
        found = j_of(problem.weight, assemble(problem, reduced, split, rank).dense(), metric)
        assert found == pytest.approx(optimum, abs=1e-9 * scale)
        assert curve_[rank] == pytest.approx(optimum, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(3))
def test_the_dropped_eigenvalues_sum_to_the_objective(seed):
    problem = make(seed, out=6, channels=9)
    metric = damped(problem)
    values = np.linalg.eigvalsh(problem.weight @ metric @ problem.weight.T)[::-1]
    target, order = reduce_rows(problem.weight).target, np.arange(problem.channels)
    (split,) = splits(target, metric, order, [0], problem.taps)
    for rank in range(7):
        approximation = assemble(problem, reduce_rows(problem.weight), split, rank).dense()
        assert j_of(problem.weight, approximation, metric) == pytest.approx(
            values[rank:].sum(), abs=1e-10 * values.sum()
        )


@pytest.mark.parametrize("out", [5, 20])
def test_perturbed_factors_are_never_better(out):
    problem = make(4, out=out, channels=9)
    metric = damped(problem)
    target, order = reduce_rows(problem.weight).target, np.arange(problem.channels)
    (split,) = splits(target, metric, order, [0], problem.taps)
    factors = assemble(problem, reduce_rows(problem.weight), split, 3)
    best = j_of(problem.weight, factors.dense(), metric)
    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-3, 1e-5):
        for _ in range(50):
            left = factors.left + size * rng.standard_normal(factors.left.shape)
            right = factors.right + size * rng.standard_normal(factors.right.shape)
            assert j_of(problem.weight, left @ right, metric) >= best * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_what_damping_costs_is_bounded(seed):
    """E optimal for H + delta I has J_H(E) <= J_H(E*) + delta ||W - E*||^2 with E* optimal for H."""
    problem = make(seed, held_out=False)
    h = problem.moments.cov
    delta = DAMPING * np.trace(h) / problem.d
    for rank in range(1, 6):
        ideal, optimum = best_low_rank(problem.weight, h, rank)
        found = refit(problem, wanted(NO_CHANNELS, rank))[0].dense()
        bound = optimum + delta * np.linalg.norm(problem.weight - ideal) ** 2
        assert optimum * (1 - 1e-9) <= j_of(problem.weight, found, h) <= bound * (1 + 1e-9)


def test_hsvd_in_the_identity_metric_is_the_truncated_svd():
    weight = np.random.default_rng(5).standard_normal((6, 9))
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    for moments in (None, Moments(9, np.zeros(9), np.eye(9))):
        found, _ = refit(Problem(weight, 1, moments), wanted(NO_CHANNELS, 3))
        np.testing.assert_allclose(found.dense(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-10)


# --- channel step ---------------------------------------------------------------------------------------------------


def removal_by_refit(target, metric, taps):
    """Return J without each channel, others refitted, minus J with all of them (which is zero)."""
    d = len(metric)
    rises = []
    for g in range(d // taps):
        keep = np.delete(np.arange(d), np.arange(g * taps, (g + 1) * taps))
        rises.append(j_of(target, least_squares(target, metric, keep), metric))
    return np.array(rises)


@pytest.mark.parametrize("taps", [1, 2, 9])
def test_removal_scores_are_exact(taps):
    rng = np.random.default_rng(taps)
    d = 5 * taps
    metric = moments_of(samples(rng, 3 * d, d, decay=0.95)).cov + 0.05 * np.eye(d)
    target = rng.standard_normal((4, d))
    scores = removal_scores(target, inverse_spd(metric), taps)
    np.testing.assert_allclose(scores, removal_by_refit(target, metric, taps), rtol=1e-8)


@pytest.mark.parametrize("taps", [1, 3])
def test_removal_scores_are_exact_on_a_subset_after_a_refit(taps):
    """The scores hold at a least-squares solution on K: how much worse than J(K) is J(K without g)?"""
    rng = np.random.default_rng(7)
    d = 6 * taps
    metric = moments_of(samples(rng, 4 * d, d, decay=0.95)).cov + 0.05 * np.eye(d)
    target = rng.standard_normal((4, d))
    support = np.array([0, 2, 3, 5])
    keep = columns_of(support, taps)
    refitted = least_squares(target, metric, keep)
    scores = removal_scores(refitted[:, keep], inverse_spd(metric[np.ix_(keep, keep)]), taps)
    before = j_of(target, refitted, metric)
    for i in range(len(support)):
        fewer = columns_of(np.delete(support, i), taps)
        rise = j_of(target, least_squares(target, metric, fewer), metric) - before
        assert scores[i] == pytest.approx(rise, rel=1e-8)


@pytest.mark.parametrize("d", [1, 2, 17, 60])
def test_the_inverse(d):
    rng = np.random.default_rng(d)
    matrix = moments_of(samples(rng, 2 * d + 5, d, decay=1.0)).cov + 0.1 * np.eye(d)
    kept = matrix.copy()
    found = inverse_spd(matrix)
    np.testing.assert_array_equal(matrix, kept)
    np.testing.assert_allclose(found @ matrix, np.eye(d), atol=1e-9)
    np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e-9 * np.abs(found).max())
    np.testing.assert_array_equal(found, found.T)


def test_the_inverse_refuses_a_matrix_that_is_not_positive_definite():
    with pytest.raises(np.linalg.LinAlgError):
        inverse_spd(np.diag([1.0, -1.0]))


@settings(max_examples=40, deadline=None)
@given(channels=st.integers(2, 8), taps=st.sampled_from([1, 3]), out=st.integers(1, 5), seed=st.integers(0, 999))
def test_each_step_of_the_elimination_is_the_best_single_removal(channels, taps, out, seed):
    rng = np.random.default_rng(seed)
    d = channels * taps
    metric = moments_of(samples(rng, 2 * d, d, decay=0.9)).cov + 0.05 * np.eye(d)
    target = rng.standard_normal((out, d))
    order = eliminate(target, metric, taps)
    assert sorted(order) == list(range(channels))

    def cost(support):
        return j_of(target, least_squares(target, metric, columns_of(np.sort(support), taps)), metric)

    for size in range(channels, 1, -1):
        alive = order[:size]
        best = min(cost(np.delete(alive, i)) for i in range(size))
        assert cost(order[: size - 1]) <= best + 1e-9 * j_of(target, 0, metric)


@pytest.mark.parametrize(("channels", "taps"), [(12, 1), (12, 4), (100, 1)])
def test_a_planted_support_is_recovered(channels, taps):
    rng = np.random.default_rng(channels + taps)
    d = channels * taps
    metric = moments_of(samples(rng, 3 * d, d, decay=0.99)).cov + 0.05 * np.eye(d)
    planted = np.sort(rng.choice(channels, channels // 3, replace=False))
    target = np.zeros((6, d))
    target[:, columns_of(planted, taps)] = rng.standard_normal((6, len(planted) * taps))
    target += 1e-6 * rng.standard_normal(target.shape)
    assert sorted(eliminate(target, metric, taps)[: len(planted)]) == list(planted)


@pytest.mark.parametrize("taps", [1, 4])
def test_dead_channels_go_first(taps):
    """A channel without variance has the largest weights here, and is worth nothing (but the damping: 1e-3 of 5^2)."""
    rng = np.random.default_rng(8)
    d = 10 * taps
    x = rng.standard_normal((500, d))
    dead = [3, 7]
    x[:, columns_of(np.array(dead), taps)] = 4.0
    weight = rng.standard_normal((5, d))
    weight[:, columns_of(np.array(dead), taps)] *= 5
    problem = Problem(weight, taps, moments_of(x))
    order = eliminate(weight, damped(problem), taps)
    assert sorted(order[-2:]) == dead


def test_of_two_equal_channels_one_is_enough():
    rng = np.random.default_rng(9)
    x = samples(rng, 300, 6, decay=1.0)
    x[:, 4] = x[:, 1]
    problem = Problem(rng.standard_normal((5, 6)), 1, moments_of(x))
    found = solve(problem, Budget(rank=0, channels=5), method="channels")
    assert {1, 4} - set(found.factors.kept)
    assert found.objective <= 1e-3 * objective(problem.weight, 0 * problem.weight, problem.moments)


@pytest.mark.parametrize("taps", [1, 3])
def test_the_weights_of_kept_channels_are_least_squares(taps):
    problem = make(10, channels=9, taps=taps, held_out=False)
    metric = damped(problem)
    for k in range(1, 9):
        found = solve(problem, Budget(rank=0, channels=k), method="channels").factors
        exact = least_squares(problem.weight, metric, columns_of(found.kept, taps))
        np.testing.assert_allclose(found.dense(), exact, atol=1e-8)


# --- low rank and channels together ---------------------------------------------------------------------------------


def alternating(target, metric, keep, rank, start, rounds=200):
    """Return J after alternating exact steps (L on T - S, S on T - L); the independent oracle."""
    sparse = start
    for _ in range(rounds):
        low, _ = best_low_rank(target - sparse, metric, rank)
        sparse = least_squares(target - low, metric, keep)
    return j_of(target, low + sparse, metric)


@pytest.mark.parametrize(("out", "channels", "taps"), [(4, 6, 1), (5, 4, 2), (9, 6, 1)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_joint_closed_form_is_the_optimum(out, channels, taps, rank):
    rng = np.random.default_rng(out + rank)
    d = channels * taps
    metric = moments_of(samples(rng, 4 * d, d, decay=0.9)).cov + 0.02 * np.eye(d)
    problem = metric_problem(metric, rng.standard_normal((out, d)), taps)
    order = rng.permutation(channels)
    reduced = reduce_rows(problem.weight)
    (split,) = splits(reduced.target, metric, order, [2], taps)
    factors = assemble(problem, reduced, split, rank)
    np.testing.assert_array_equal(factors.kept, np.sort(order[:2]))
    ours = j_of(problem.weight, factors.dense(), metric)
    keep = columns_of(factors.kept, taps)
    own = np.zeros_like(problem.weight)
    own[:, keep] = factors.sparse
    assert alternating(problem.weight, metric, keep, rank, own, rounds=20) == pytest.approx(ours, rel=1e-8)
    reached = []
    for _ in range(4):
        start = np.zeros_like(problem.weight)
        start[:, keep] = 3 * rng.standard_normal((out, len(keep)))
        reached.append(alternating(problem.weight, metric, keep, rank, start))
    assert min(reached) >= ours * (1 - 1e-8)
    assert min(reached) <= ours * 1.05  # the oracle comes close, so the comparison means something


@pytest.mark.parametrize("out", [5, 12])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("data", [True, False])
def test_full_rank_or_all_channels_reproduce_the_weight(out, taps, data):
    problem = make(11, out=out, channels=6, taps=taps)
    if not data:
        problem = Problem(problem.weight, taps)
    reduced = reduce_rows(problem.weight)
    order = np.random.default_rng(0).permutation(6)
    none, some, all_ = splits(reduced.target, damped(problem), order, [0, 2, 6], taps)
    full = len(reduced.target)
    for split, rank in ((none, full), (some, full), (all_, 0), (all_, 2)):
        factors = assemble(problem, reduced, split, rank)
        np.testing.assert_allclose(factors.dense(), problem.weight, atol=1e-8)
        np.testing.assert_allclose(factors.bias_shift, 0, atol=1e-7)


@pytest.mark.parametrize("taps", [1, 2])
def test_the_pure_cases_of_the_joint_form(taps):
    problem = make(12, channels=6, taps=taps)
    metric = damped(problem)
    order = np.array([4, 0, 5, 1, 2, 3])
    none, three = splits(problem.weight, metric, order, [0, 3], taps)
    reduced = reduce_rows(problem.weight)
    for rank in range(5):
        exact, _ = best_low_rank(problem.weight, metric, rank)
        np.testing.assert_allclose(assemble(problem, reduced, none, rank).dense(), exact, atol=1e-7)
    exact = least_squares(problem.weight, metric, columns_of(np.array([0, 4, 5]), taps))
    np.testing.assert_allclose(assemble(problem, reduced, three, 0).dense(), exact, atol=1e-8)


def test_the_identity_matrix_as_metric_and_no_metric_are_the_same():
    weight = np.random.default_rng(13).standard_normal((5, 8))
    order = np.array([6, 1, 0, 2, 3, 4, 5, 7])
    for with_none, with_eye in zip(
        splits(weight, None, order, [0, 3, 8], 1), splits(weight, np.eye(8), order, [0, 3, 8], 1), strict=True
    ):
        problem, reduced = Problem(weight), reduce_rows(weight)
        for rank in (0, 2, 5):
            np.testing.assert_allclose(
                assemble(problem, reduced, with_none, rank).dense(),
                assemble(problem, reduced, with_eye, rank).dense(),
                atol=1e-10,
            )


@pytest.mark.parametrize("affine", [True, False])
def test_the_bias_shift_keeps_the_mean_output(affine):
    problem = make(14, affine=affine)
    factors, _ = refit(problem, wanted(np.array([1, 3]), 2))
    drift = problem.weight @ problem.moments.mean - factors.dense() @ problem.moments.mean
    np.testing.assert_allclose(factors.bias_shift, drift if affine else np.zeros(6), atol=1e-9)


# --- error curves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("out", [4, 14])
def test_the_loss_of_a_candidate_is_the_judged_error_of_its_factors(method, affine, held_out, out):
    """On the fit's own and on other samples, whose mean differs; with and without a bias shift; tall and wide."""
    problem = make(15, out=out, channels=5, taps=2, affine=affine, held_out=held_out)
    found = candidates(problem, FAMILIES[method](problem, 1, DAMPING), 1)
    for candidate in found:
        factors = built(problem, candidate, method)
        exact = judged(problem.weight, factors, problem.validation or problem.moments, affine)
        assert candidate.loss == pytest.approx(exact**2, abs=1e-11)
        assert candidate.params == factors.params
        np.testing.assert_array_equal(np.sort(candidate.support), factors.kept)
    assert len(found) >= 2


def wanted(support, rank):
    return Candidate("", rank, 0, 0.0, support, DAMPING)


def built(problem, candidate, method):
    """Factors of exactly the candidate's support; fit() may find a better one."""
    reduced = reduce_rows(problem.weight)
    if method in DATA_FREE:
        split = data_free_split(problem, candidate.support, low_rank=candidate.rank > 0)
        return assemble(problem, reduced, split, candidate.rank, shift=False)
    others = np.setdiff1d(np.arange(problem.channels), candidate.support)
    order = np.concatenate([candidate.support, others])
    (split,) = splits(reduced.target, damped(problem), order, [len(candidate.support)], problem.taps)
    return assemble(problem, reduced, split, candidate.rank)


FITTED = [(name, True) for name in NAMES if name not in DATA_FREE]  # the others leave the mean as an error: see above


@pytest.mark.parametrize(("method", "data"), [*FITTED, *((name, False) for name in NAMES)])
def test_the_losses_of_a_fit_are_the_objective(method, data):
    problem = make(16, channels=7, held_out=False)
    if not data:
        problem = Problem(problem.weight)
    scale = objective(problem.weight, 0 * problem.weight, problem.moments)
    for found in FAMILIES[method](problem, 1, DAMPING).curves:
        for rank, value in enumerate(found.losses):
            candidate = wanted(found.support, rank)
            dense = built(problem, candidate, method).dense()
            assert value == pytest.approx(objective(problem.weight, dense, problem.moments), abs=1e-11 * scale)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("data", [True, False])
def test_a_curve_is_undominated_sorted_and_can_be_built(method, multiple, data):
    problem = make(17, out=7, channels=10, taps=2)
    if not data:
        problem = Problem(problem.weight, 2)
    found = curve(problem, method, multiple)
    assert found
    assert (np.diff([c.params for c in found]) > 0).all()
    assert (np.diff([c.loss for c in found]) < 0).all()
    for candidate in found:
        assert 0 < candidate.params < problem.params
        solution = fit(problem, candidate, method)
        assert solution.factors.params == candidate.params
        assert solution.factors.rank == candidate.rank
        assert len(solution.factors.kept) == len(candidate.support)


@pytest.mark.parametrize("method", NAMES)
def test_a_fit_is_at_least_as_good_as_its_candidate_promised(method):
    problem = make(18, out=7, channels=10, held_out=False)
    scale = objective(problem.weight, 0 * problem.weight, problem.moments)
    for candidate in curve(problem, method, 1):
        factors = fit(problem, candidate, method).factors
        assert judged(problem.weight, factors, problem.moments) ** 2 <= candidate.loss + 1e-10 * scale


@given(points=st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=12))
def test_the_front_holds_what_no_other_point_beats(points):
    from onnx_lrs.solvers import Candidate

    found = [Candidate("low-rank", 1, params, loss, NO_CHANNELS, DAMPING) for params, loss in points]
    front = {(c.params, c.loss) for c in undominated(found)}
    beaten = {(p, x) for p, x in points if any((q <= p and y < x) or (q < p and y <= x) for q, y in points)}
    assert front == set(points) - beaten


# --- refit and the promise of the combined method -------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), rank=st.integers(0, 4), kept=st.integers(0, 6), taps=st.sampled_from([1, 3]))
def test_the_history_of_a_refit_falls_to_its_objective(seed, rank, kept, taps):
    problem = make(seed, out=5, channels=7, taps=taps, held_out=False)
    support = np.random.default_rng(seed).permutation(7)[:kept]
    factors, history = refit(problem, wanted(support, rank))
    assert (np.diff(history) < 0).all()
    assert history[-1] == objective(problem.weight, factors.dense(), problem.moments)
    assert (factors.rank, len(factors.kept)) == (rank, kept)


def test_a_refit_chooses_another_support_when_that_is_better():
    """From a deliberately bad support; otherwise the history above could be of length one everywhere."""
    lengths = []
    for seed in range(10):
        problem = make(seed, out=5, channels=12, held_out=False)
        metric = damped(problem)
        worst = eliminate(problem.weight, metric, 1)[::-1][:3]
        lengths.append(len(refit(problem, wanted(worst, 2))[1]))
    assert max(lengths) >= 2


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    out=st.integers(2, 24),
    channels=st.integers(2, 40),
    taps=st.sampled_from([1, 2]),
    share=st.floats(0.05, 0.95),
    sparse=st.booleans(),
)
def test_the_combined_method_is_never_worse_than_a_pure_one(seed, out, channels, taps, share, sparse):
    problem = make(seed, out=out, channels=channels, taps=taps, held_out=False)
    if sparse:  # weights on a few channels only: the case of ``channels``
        dead = np.random.default_rng(seed).permutation(channels)[channels // 3 :]
        weight = problem.weight.copy()
        weight[:, columns_of(dead, taps)] = 0
        problem = dataclasses.replace(problem, weight=weight)
    budget = Budget(params=int(share * problem.params))
    combined = solve(problem, budget, method="lrs")
    scale = objective(problem.weight, 0 * problem.weight, problem.moments)
    for pure in ("hsvd", "channels"):
        found = solve(problem, budget, method=pure)
        if found.status is Status.SOLVED:
            assert combined.status is Status.SOLVED
            assert combined.objective <= found.objective + 1e-10 * scale


def test_the_combined_method_is_never_worse_without_data():
    for seed in range(6):
        problem = Problem(np.random.default_rng(seed).standard_normal((12, 40)))
        for params in budgets(problem):
            combined = solve(problem, Budget(params=params), method="lrs").objective
            for pure in ("svd", "hsvd", "channels", "magnitude"):
                assert combined <= solve(problem, Budget(params=params), method=pure).objective * (1 + 1e-12)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_planted_low_rank_plus_channels_is_recovered(seed, taps):
    rng = np.random.default_rng(seed)
    out, channels, rank, kept = 24, 24, 2, 3
    d = channels * taps
    support = np.sort(rng.choice(channels, kept, replace=False))
    weight = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, d))
    weight[:, columns_of(support, taps)] += 3 * rng.standard_normal((out, kept * taps))
    weight += 1e-7 * rng.standard_normal(weight.shape)
    problem = Problem(weight, taps, moments_of(rng.standard_normal((40 * d, d)) + 1.0))
    exact = rank * (out + d) + kept * taps * out
    found = solve(problem, Budget(params=exact), method="lrs")
    assert found.factors.rank == rank
    np.testing.assert_array_equal(found.factors.kept, support)
    assert found.objective <= 1e-10 * objective(weight, 0 * weight, problem.moments)
    for pure in ("hsvd", "channels"):
        assert solve(problem, Budget(params=exact), method=pure).objective > 1e3 * found.objective


# --- what every method promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize(("out", "channels", "taps"), [(8, 16, 1), (16, 8, 1), (40, 8, 2)])
@pytest.mark.parametrize("data", ["affine", "uncentred", "none"])
def test_the_budget_holds(method, multiple, out, channels, taps, data):
    problem = make(20, out=out, channels=channels, taps=taps, affine=data != "uncentred")
    if data == "none":
        problem = Problem(problem.weight, taps)
    solved = 0
    for params in budgets(problem):
        budget = Budget(params=params, multiple=multiple)
        found = solve(problem, budget, method=method)
        smallest = multiple * min(
            problem.rank_cost if method not in ("channels", "magnitude") else 10**9,
            taps * out if method not in ("svd", "hsvd", "spatial") else 10**9,
        )
        assert (found.status is Status.SOLVED) == (params >= smallest)
        if found.status is Status.SOLVED:
            check_contract(problem, budget, found, method)
            solved += 1
    assert solved


@pytest.mark.parametrize("method", NAMES)
def test_more_budget_is_never_worse(method):
    problem = make(21, out=8, channels=16)
    reached = []
    for params in range(problem.rank_cost, problem.params, 20):
        found = solve(problem, Budget(params=params), method=method)
        reached.append(judged(problem.weight, found.factors, problem.validation))
    candidates_ = [c.loss for c in curve(problem, method, 1)]
    assert candidates_ == sorted(candidates_, reverse=True)
    assert reached[-1] < reached[0]


@pytest.mark.parametrize("method", NAMES)
def test_the_same_problem_gives_the_same_bits(method):
    one, two = (solve(make(22, channels=10, taps=2), Budget(params=60), method=method) for _ in range(2))
    for a, b in zip(dataclasses.astuple(one.factors), dataclasses.astuple(two.factors), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.history == two.history


@pytest.mark.parametrize("method", NAMES)
def test_the_problem_is_not_changed(method):
    problem = make(23, channels=10)
    kept = [a.copy() for a in (problem.weight, problem.moments.cov, problem.moments.mean, problem.validation.cov)]
    solve(problem, Budget(params=50), method=method)
    curve(problem, method, 2)
    now = (problem.weight, problem.moments.cov, problem.moments.mean, problem.validation.cov)
    for a, b in zip(kept, now, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", NAMES)
def test_a_float32_weight_is_solved_in_float64(method):
    problem = make(24, channels=10)
    narrow = problem.weight.astype(np.float32)
    budget = Budget(params=50)
    found = solve(dataclasses.replace(problem, weight=narrow), budget, method=method)
    exact = solve(dataclasses.replace(problem, weight=narrow.astype(np.float64)), budget, method=method)
    check_contract(dataclasses.replace(problem, weight=narrow), budget, found, method)
    np.testing.assert_array_equal(found.factors.dense(), exact.factors.dense())


def zero_moments(d):
    return Moments(10, np.zeros(d), np.zeros((d, d)))


def degenerate():
    rng = np.random.default_rng(30)
    weight = rng.standard_normal((6, 10))
    x = samples(rng, 100, 10, decay=1.0)
    twins = x[:, [0, 1, 2, 3, 4] * 2]
    constant = Moments(10, np.full(10, 3.0), np.zeros((10, 10)))
    other = Moments(10, np.full(10, 3.0 + 1e-9), np.zeros((10, 10)))
    scales = moments_of(x * np.logspace(-8, 8, 10))
    float32 = moments_of(np.float32(1) + np.float32(1e-3) * rng.standard_normal((3, 10)).astype(np.float32))
    return {
        "zero weight": Problem(0 * weight, 1, moments_of(x)),
        "zero weight without data": Problem(0 * weight),
        "zero moments": Problem(weight, 1, zero_moments(10)),
        "zero moments with taps": Problem(weight, 2, zero_moments(10)),
        "zero validation": Problem(weight, 1, moments_of(x), zero_moments(10)),
        "constant input": Problem(weight, 1, constant, other),
        "constant input, uncentred": Problem(weight, 1, constant, other, affine=False),
        "one sample": Problem(weight, 1, moments_of(x[:1]), moments_of(x[:1])),
        "three samples": Problem(weight, 1, moments_of(x[:3]), moments_of(x[3:6])),
        "nearly no variance": Problem(weight, 1, float32),
        "equal columns": Problem(weight, 1, moments_of(twins)),
        "equal columns of equal weight": Problem(np.tile(weight[:, :5], 2), 1, moments_of(twins)),
        "rank-one weight": Problem(np.outer(weight[:, 0], weight[0]), 1, moments_of(x)),
        "one dead channel": Problem(weight, 2, moments_of(x * (np.arange(10) >= 2))),
        "scales apart by 1e16": Problem(weight, 1, scales),
        "tiny": Problem(1e-20 * weight, 1, moments_of(1e-20 * x)),
        "huge": Problem(1e15 * weight, 1, moments_of(1e15 * x)),
        "negative by rounding": Problem(weight, 1, Moments(9, np.zeros(10), np.ones((10, 10)) - 1e-9 * np.eye(10))),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.filterwarnings("error")
def test_degenerate_problems_are_solved_within_the_contract(name, method):
    problem = degenerate()[name]
    found = curve(problem, method, 1)
    assert found
    assert all(np.isfinite(c.loss) and 0 <= c.loss < 1e13 for c in found)
    for params in (20, 35, 50):
        budget = Budget(params=params)
        check_contract(problem, budget, solve(problem, budget, method=method), method)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    ("out", "channels", "taps"), [(1, 8, 1), (1, 3, 4), (8, 1, 1), (8, 1, 9), (1, 1, 1), (2, 2, 1)]
)
def test_small_shapes(method, out, channels, taps):
    """Nothing may fail where no factorisation is smaller than the layer; one output admits kept channels only."""
    problem = make(31, out=out, channels=channels, taps=taps)
    for params in range(1, problem.params, 1 if problem.params < 20 else 5):
        found = solve(problem, Budget(params=params), method=method)
        if found.status is Status.SOLVED:
            check_contract(problem, Budget(params=params), found, method)
        else:
            assert found.status is Status.INFEASIBLE
    for candidate in curve(problem, method, 1):
        assert fit(problem, candidate, method).factors.params == candidate.params


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("affine", [True, False])
def test_too_small_a_budget_is_infeasible_and_reports_the_loss_of_nothing(method, affine):
    problem = make(32, out=6, channels=8, affine=affine)
    for params in (0, 5):
        found = solve(problem, Budget(params=params), method=method)
        assert (found.status, found.factors) == (Status.INFEASIBLE, None)
        exact = objective(problem.weight, 0 * problem.weight, problem.moments, affine)
        assert found.objective == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("method", NAMES)
def test_a_budget_of_the_layer_itself_leaves_it_dense(method):
    problem = make(33)
    for params in (problem.params, 10 * problem.params):
        found = solve(problem, Budget(params=params), method=method)
        assert (found.status, found.factors, found.objective) == (Status.DENSE, None, 0.0)
    below = solve(problem, Budget(params=problem.params - 1), method=method)
    assert below.status is Status.SOLVED


@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("data", [True, False])
def test_a_given_split_is_kept_for_any_number_of_channels(taps, data):
    problem = make(34, out=16, channels=20, taps=taps)
    if not data:
        problem = Problem(problem.weight, taps)
    for rank, kept in itertools.product((0, 2), range(0, 17, 3)):
        if not rank + kept:
            continue
        found = solve(problem, Budget(rank=rank, channels=kept))
        assert found.status is Status.SOLVED
        assert (found.factors.rank, len(found.factors.kept)) == (rank, kept)


def test_a_given_split_that_saves_nothing_is_refused():
    problem = make(35, out=6, channels=8)
    assert solve(problem, Budget(rank=3, channels=2)).status is Status.INFEASIBLE
    assert solve(problem, Budget(rank=0, channels=0)).status is Status.INFEASIBLE
    assert solve(problem, Budget(rank=1, channels=1), method="hsvd").status is Status.INFEASIBLE
    assert solve(problem, Budget(rank=1, channels=1), method="channels").status is Status.INFEASIBLE


@pytest.mark.parametrize(
    "given_", [{}, {"rank": 2}, {"channels": 2}, {"params": 9, "rank": 1}, {"params": 9, "rank": 1, "channels": 1}]
)
def test_a_budget_is_params_or_a_split(given_):
    with pytest.raises(ValueError, match="a layer budget takes"):
        Budget(**given_)


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_is_positive(multiple):
    with pytest.raises(ValueError, match="multiple"):
        Budget(params=9, multiple=multiple)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", NAMES)
def test_values_that_are_not_finite_are_a_status(value, method):
    weight = np.ones((3, 4))
    good = moments_of(samples(np.random.default_rng(0), 9, 4))
    damaged = weight.copy()
    damaged[1, 2] = value
    bad = [Problem(damaged), Problem(damaged, 1, good)]
    for cell in (good.mean.copy(), good.cov.copy()):
        cell.flat[0] = value
        moments = Moments(9, cell, good.cov) if cell.ndim == 1 else Moments(9, good.mean, cell)
        bad += [Problem(weight, 1, moments), Problem(weight, 1, good, moments)]
    for problem in bad:
        found = solve(problem, Budget(params=9), method=method)
        assert (found.status, found.factors) == (Status.NOT_FINITE, None)
        assert curve(problem, method, 1) == []


def test_few_columns_are_a_status_and_indefinite_moments_are_solved_as_the_nearest_ones():
    rng = np.random.default_rng(3)
    few = Problem(rng.standard_normal((4, 10)), 1, moments_of(rng.standard_normal((7, 10))))
    found = solve(few, Budget(params=30))
    assert found.status is Status.SINGULAR
    assert found.factors.params <= 30
    indefinite = np.diag([1.0, 2.0, 3.0, -5.0])
    found = solve(Problem(rng.standard_normal((3, 4)), 1, Moments(99, np.zeros(4), indefinite)), Budget(params=8))
    assert found.status is Status.SINGULAR
    assert np.isfinite(found.factors.dense()).all()


def test_more_rank_than_the_matrix_has_is_a_status():
    found = solve(make(3, out=6, channels=8), Budget(rank=50, channels=0))
    assert (found.status, found.factors.rank) == (Status.RANK_TOO_LARGE, 3)  # 4 (6 + 8) would be larger than the layer
    assert solve(make(3, out=6, channels=8), Budget(rank=6, channels=0)).status is Status.INFEASIBLE


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="taps"):
        Problem(np.ones((3, 10)), 4)
    with pytest.raises(ValueError, match="moments"):
        Problem(np.ones((3, 10)), 1, zero_moments(9))


def test_an_unknown_method_is_an_error():
    with pytest.raises(KeyError):
        solve(make(0), Budget(params=9), method="magic")


@pytest.mark.parametrize("name", ["weights only", "identity"])
def test_without_correlations_the_combined_method_is_svd_beside_the_largest_channels(name):
    """With H = I: the kept channels are exact, and the low-rank part is the truncated SVD of the others."""
    weight = np.random.default_rng(36).standard_normal((8, 12))
    moments = None if name == "weights only" else Moments(1, np.zeros(12), np.eye(12))
    problem = Problem(weight, 1, moments)
    largest = np.argsort(-np.linalg.norm(weight, axis=0))
    for params in budgets(problem):
        best = np.inf
        for rank, kept in itertools.product(range(8), range(12)):
            if 0 < rank * 20 + kept * 8 <= params:
                s = np.linalg.svd(weight[:, largest[kept:]], compute_uv=False)
                best = min(best, float(np.sum(s[rank:] ** 2)))
        assert solve(problem, Budget(params=params)).objective <= best * (1 + 1e-9)


def test_a_layer_in_the_space_of_its_outputs_counts_its_real_columns():
    """W x ~ U U^T (W x): the identity stands for W, the costs are those of W."""
    rng = np.random.default_rng(37)
    x, weight = samples(rng, 300, 30), rng.standard_normal((6, 30))
    outputs = moments_of(x @ weight.T)
    narrow = Problem(np.eye(6), 1, outputs, width=30)
    full = Problem(weight, 1, moments_of(x))
    assert (narrow.params, narrow.rank_cost) == (full.params, full.rank_cost)
    for a, b in zip(curve(narrow, "hsvd", 1), curve(full, "hsvd", 1), strict=True):
        assert (a.rank, a.params) == (b.rank, b.params)
        assert a.loss == pytest.approx(b.loss, rel=0.05, abs=1e-3)  # the damping differs


# --- the spatial form -----------------------------------------------------------------------------------------------


def spatial_problem(seed, data=True, kernel=(3, 2), channels=4, out=6):
    plain = make(seed, out=out, channels=channels, taps=kernel[0] * kernel[1])
    return dataclasses.replace(plain, kernel=kernel) if data else Problem(plain.weight, plain.taps, kernel=kernel)


def test_a_spatial_kernel_of_full_rank_is_exact():
    problem = spatial_problem(30)
    factors, _ = fit_spatial(problem, 12, DAMPING)
    np.testing.assert_allclose(factors.dense(), problem.weight, atol=1e-6)


def test_a_planted_spatial_kernel_is_found():
    rng = np.random.default_rng(31)
    planted = SpatialFactors(rng.standard_normal((6, 2, 2)), rng.standard_normal((2, 4, 3)), np.zeros(6)).dense()
    problem = dataclasses.replace(spatial_problem(31), weight=planted)
    factors, _ = fit_spatial(problem, 2, DAMPING)
    np.testing.assert_allclose(factors.dense(), planted, atol=1e-6)
    assert factors.params == 2 * (4 * 3 + 6 * 2)


def test_without_data_it_is_the_truncated_svd_of_the_other_matrix():
    problem = spatial_problem(32, data=False)
    tail = np.linalg.svd(problem.weight.reshape(6, 4, 3, 2).transpose(1, 2, 0, 3).reshape(12, 12), compute_uv=False)
    for rank in (1, 3, 5):
        factors, _ = fit_spatial(problem, rank, DAMPING)
        distance = np.square(problem.weight - factors.dense()).sum()
        assert distance == pytest.approx(np.square(tail[rank:]).sum(), rel=1e-9)


def test_the_spatial_baseline_sees_no_data_and_its_losses_are_those_of_its_factors():
    problem, blind = (spatial_problem(33, data=data) for data in (True, False))
    for params in (30, 60, 100):
        found = solve(problem, Budget(params=params), method="spatial")
        np.testing.assert_allclose(
            found.factors.dense(), solve(blind, Budget(params=params), method="spatial").factors.dense(), atol=1e-9
        )
        assert not found.factors.bias_shift.any()
    validation = problem.validation or problem.moments
    nothing = objective(problem.weight, 0 * problem.weight, validation)
    offered = METHODS["spatial"].candidates(problem, 1, Settings())
    assert len(offered) > 3
    for candidate in offered:
        found = METHODS["spatial"].fit(problem, candidate, Settings()).factors.dense()
        assert candidate.loss == pytest.approx(objective(problem.weight, found, validation) / nothing, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_each_half_step_of_the_spatial_fit_lowers_the_objective(seed):
    problem = spatial_problem(40 + seed)
    factors, history = fit_spatial(problem, 3, DAMPING)
    assert len(history) == 3
    assert history[0] >= history[1] >= history[2] > 0
    metric = damped(problem)
    assert history[-1] == pytest.approx(j_of(problem.weight, factors.dense(), metric), rel=1e-9)
    rng = np.random.default_rng(seed)
    for _ in range(30):  # left is optimal for its right: no neighbour is better
        other = dataclasses.replace(factors, left=factors.left + 1e-3 * rng.standard_normal(factors.left.shape))
        assert j_of(problem.weight, other.dense(), metric) >= history[-1] * (1 - 1e-10)


@pytest.mark.parametrize("kernel", [(3, 2), (2, 3), (3, 3)])
def test_each_half_of_the_spatial_fit_is_the_least_squares_solution(kernel, monkeypatch):
    """The columns of E are linear in left and in right: both are solved with explicit regressors here."""
    monkeypatch.setattr(spatial, "STEPS", 400)
    problem, rank = spatial_problem(60, kernel=kernel), 2
    metric = damped(problem)
    root, rng = np.linalg.cholesky(metric), np.random.default_rng(60)
    right = rng.standard_normal((rank, problem.channels, kernel[0]))
    goal = spatial.by_tap(problem, metric)
    left = goal.regression(right).left()

    def seen(left, right):
        return (SpatialFactors(left, right, np.zeros(0)).dense() @ root).ravel()

    def least(expand, shape):
        units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
        regressors = np.stack([expand(unit) for unit in units], axis=1)
        return np.linalg.lstsq(regressors, (problem.weight @ root).ravel(), rcond=None)[0].reshape(shape)

    np.testing.assert_allclose(left, least(lambda unit: seen(unit, right), left.shape), rtol=1e-5, atol=1e-7)
    moved, best = goal.right(left, right), least(lambda unit: seen(left, unit), right.shape)
    wanted = goal.objective(left, best)
    assert wanted == pytest.approx(j_of(problem.weight, SpatialFactors(left, best, np.zeros(0)).dense(), metric))
    assert goal.objective(left, right) > 1.01 * wanted
    assert goal.objective(left, moved) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_spatial_fit_does_not_depend_on_the_scale_of_the_activations(scale):
    """Conjugate gradients run in single precision. Powers of two scale without rounding."""
    problem = spatial_problem(61)
    scaled = dataclasses.replace(
        problem, moments=Moments(problem.moments.count, scale * problem.moments.mean, scale**2 * problem.moments.cov)
    )
    (one, before), (other, after) = (fit_spatial(each, 3, DAMPING) for each in (problem, scaled))
    assert before[1] < 0.999 * before[0]
    np.testing.assert_allclose(after, scale**2 * np.asarray(before), rtol=1e-6)
    np.testing.assert_allclose(other.dense(), one.dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_few_samples_get_a_strong_damping(seed):
    """Two dozen columns of 64 inputs that hardly differ in strength: their covariance is noise, its mean is not."""
    rng = np.random.default_rng(seed)
    columns, others = (rng.standard_normal((count, 64)) for count in (24, 2000))
    moments, validation = (Moments(len(x), x.mean(axis=0), np.cov(x.T, bias=True)) for x in (columns, others))
    problem = Problem(rng.standard_normal((48, 64)), 1, moments, validation=validation)
    assert choose_damping(problem) == 10.0


def test_spatial_candidates_are_judged_on_the_other_samples_and_cost_what_they_say():
    problem = spatial_problem(50)
    found = spatial_candidates(problem, 1, DAMPING)
    assert found
    validation = problem.validation or problem.moments
    for candidate in found:
        factors, _ = fit_spatial(problem, candidate.rank, candidate.damping)
        assert candidate.params == factors.params <= 0.95 * problem.params
        assert judged(problem.weight, factors, validation) ** 2 <= candidate.loss * 1.5  # the fit goes on from there
    assert not spatial_candidates(dataclasses.replace(problem, kernel=None), 1, DAMPING)
    assert not spatial_candidates(dataclasses.replace(problem, kernel=(6, 1)), 1, DAMPING)


# --- the projected form ---------------------------------------------------------------------------------------------


def test_a_projected_kernel_of_full_rank_is_exact():
    problem = spatial_problem(70)
    factors, _ = fit_projected(problem, problem.channels, DAMPING)
    assert isinstance(factors, ProjectedFactors)
    np.testing.assert_allclose(factors.dense(), problem.weight, atol=1e-6)


@pytest.mark.parametrize("kernel", [(3, 2), (1, 3), (3, 1)])
def test_a_planted_projected_kernel_is_found(kernel):
    planted = planted_projected(6, 4, kernel[0] * kernel[1], seed=71)
    assert planted.params == 3 * (4 + 6 * planted.left.shape[2])
    problem = spatial_problem(71, kernel=kernel)
    problem = dataclasses.replace(problem, weight=planted.dense())
    factors, _ = fit_projected(problem, 3, DAMPING)
    np.testing.assert_allclose(factors.dense(), planted.dense(), atol=1e-6)
    expanded = np.einsum("ort,ri->oit", factors.left, factors.right[:, :, 0])
    np.testing.assert_allclose(factors.dense(), expanded.reshape(6, -1), rtol=1e-12, atol=1e-12)
    means = (planted.dense() - factors.dense()) @ problem.moments.mean
    np.testing.assert_allclose(factors.bias_shift, means, atol=1e-9)


def test_without_data_the_projected_form_is_the_truncated_svd_over_the_channels():
    problem = spatial_problem(72, data=False)
    tail = np.linalg.svd(problem.weight.reshape(6, 4, 6).transpose(1, 0, 2).reshape(4, 36), compute_uv=False)
    for rank in (1, 2, 3):
        factors, _ = fit_projected(problem, rank, DAMPING)
        distance = np.square(problem.weight - factors.dense()).sum()
        assert distance == pytest.approx(np.square(tail[rank:]).sum(), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_projected_fit_is_never_worse_than_the_svd_and_falls_from_half_to_half(seed):
    problem, rank = spatial_problem(73 + seed, kernel=(3, 3)), 2
    metric = damped(problem)
    over_channels = problem.weight.reshape(6, 4, 9).transpose(1, 0, 2).reshape(4, -1)
    basis = np.linalg.svd(over_channels)[0][:, :rank]
    plain = (basis @ (basis.T @ over_channels)).reshape(4, 6, 9).transpose(1, 0, 2).reshape(6, -1)
    factors, history = fit_projected(problem, rank, DAMPING)
    assert j_of(problem.weight, plain, metric) >= history[0] >= history[1] >= history[2] > 0
    assert history[-1] == pytest.approx(j_of(problem.weight, factors.dense(), metric), rel=1e-9)


def test_projected_candidates_are_judged_on_the_other_samples_and_cost_what_they_say():
    problem = spatial_problem(77, channels=6)
    found = projected_candidates(problem, 1, DAMPING)
    assert found
    assert {candidate.form for candidate in found} == {projected.FORM, TUCKER}
    validation = problem.validation or problem.moments
    for candidate in found:
        solution = fit(problem, candidate, "lrs")
        assert type(solution.factors) is (TuckerFactors if candidate.inner else ProjectedFactors)
        assert candidate.rank == solution.factors.rank
        assert candidate.params == solution.factors.params <= 0.95 * problem.params
        assert judged(problem.weight, solution.factors, validation) ** 2 <= candidate.loss * 1.5
    assert not projected_candidates(dataclasses.replace(problem, kernel=None), 1, DAMPING)
    assert not projected_candidates(Problem(problem.weight, 1, kernel=(1, 1)), 1, DAMPING)


def test_the_curve_takes_the_projected_form_where_channels_are_alike():
    planted = planted_projected(12, 6, 9, seed=78)
    problem = dataclasses.replace(spatial_problem(78, kernel=(3, 3), channels=6, out=12), weight=planted.dense())
    best = min((c for c in curve(problem, "lrs", 1) if c.params <= planted.params), key=lambda c: c.loss)
    assert (best.form, best.rank) == ("projected", 3)
    assert best.loss < 1e-12


# --- Tucker-2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3, 2), (1, 3), (3, 1)])
def test_a_planted_tucker_kernel_is_found(kernel):
    planted = planted_tucker(6, 4, kernel[0] * kernel[1], seed=81)
    assert planted.params == 3 * 4 + 2 * 3 * planted.left.shape[2] + 6 * 2
    problem = dataclasses.replace(spatial_problem(81, kernel=kernel), weight=planted.dense())
    factors, _ = fit_tucker(problem, 3, 2, DAMPING)
    np.testing.assert_allclose(factors.dense(), planted.dense(), atol=1e-6)
    expanded = np.einsum("os,srt,ri->oit", factors.outer, factors.left, factors.right[:, :, 0])
    np.testing.assert_allclose(factors.dense(), expanded.reshape(6, -1), rtol=1e-12, atol=1e-12)
    means = (planted.dense() - factors.dense()) @ problem.moments.mean
    np.testing.assert_allclose(factors.bias_shift, means, atol=1e-9)


def test_tucker_of_full_outer_rank_is_the_projected_form():
    problem = spatial_problem(82, kernel=(3, 3))
    tucker, history = fit_tucker(problem, 2, problem.out, DAMPING)
    plain, expected = fit_projected(problem, 2, DAMPING)
    np.testing.assert_allclose(tucker.dense(), plain.dense(), atol=1e-9 * np.abs(plain.dense()).max())
    np.testing.assert_allclose(history, expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_for_the_right_that_it_found_no_tucker_kernel_of_its_ranks_is_better(seed):
    """Against the best rank-s approximation by the singular values of left times a root of the normal equations."""
    problem = spatial_problem(83 + seed, kernel=(3, 3))
    metric = damped(problem)
    factors, history = fit_tucker(problem, 3, 2, DAMPING)
    assert history[0] >= history[1] >= history[2] > 0
    assert history[-1] == pytest.approx(j_of(problem.weight, factors.dense(), metric), rel=1e-6)
    read = np.einsum("tu,ri->rtiu", np.eye(9), factors.right[:, :, 0]).reshape(27, -1)
    root = np.linalg.cholesky(read @ metric @ read.T)
    best = np.linalg.solve(read @ metric @ read.T, read @ metric @ problem.weight.T).T
    u, sigma, v = np.linalg.svd(best @ root, full_matrices=False)
    cut = (u[:, :2] * sigma[:2]) @ v[:2] @ np.linalg.inv(root)
    assert history[-1] == pytest.approx(j_of(problem.weight, cut @ read, metric), rel=1e-6)


@pytest.mark.parametrize("data", [True, False])
def test_the_loss_of_a_tucker_candidate_is_that_of_the_best_core_for_its_start(data):
    problem = spatial_problem(88, kernel=(3, 3), channels=6, data=data)
    found = [c for c in projected_candidates(problem, 1, DAMPING) if c.inner]
    assert found
    judge = problem.validation or problem.moments
    for candidate in found:
        with mock.patch.object(spatial, "STEPS", 0):  # right stays where it starts
            factors, _ = fit_tucker(problem, candidate.inner, candidate.rank, DAMPING)
        assert candidate.params == factors.params < problem.params
        difference = problem.weight - factors.dense()
        if judge is None:
            assert candidate.loss == pytest.approx(np.vdot(difference, difference), rel=1e-6)
            continue
        miss = difference @ (judge.mean - problem.moments.mean)
        assert candidate.loss == pytest.approx(np.vdot(difference @ judge.cov, difference) + miss @ miss, rel=1e-6)


def test_the_curve_takes_tucker_where_inputs_and_outputs_are_alike():
    planted = planted_tucker(12, 6, 9, seed=89)
    problem = dataclasses.replace(spatial_problem(89, kernel=(3, 3), channels=6, out=12), weight=planted.dense())
    best = min((c for c in curve(problem, "lrs", 1) if c.params <= planted.params), key=lambda c: c.loss)
    assert (best.form, best.inner, best.rank) == (TUCKER, 3, 2)
    assert best.loss < 1e-12
