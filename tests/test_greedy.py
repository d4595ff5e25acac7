"""The SVD-free method: its two pure cases, least squares on a support, falling error, planted solutions, no SVD."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg

from onnx_lrs.solvers import METHODS, Budget, ElementFactors, Problem, Settings, Status, objective, solve
from onnx_lrs.solvers.greedy import decompose, descend, task
from onnx_lrs.solvers.spectral import DAMPING, damped
from tests.test_solvers import make, moments_of, samples

ELEMENTS = Settings(structure="elements")


def exact(problem):
    return dataclasses.replace(task(problem, DAMPING, True), count=0)


@pytest.mark.parametrize("structure", ["channels", "elements"])
@pytest.mark.parametrize("d", [24, 600])
def test_no_svd_and_no_eigenvectors(monkeypatch, structure, d):
    def forbidden(*args, **kwargs):
        raise AssertionError("an SVD or eigenproblem on the SVD-free path")

    for module in (np.linalg, scipy.linalg):
        for name in ("svd", "svdvals", "eigh", "eigvalsh", "eig", "eigvals", "pinv", "lstsq", "matrix_rank"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, forbidden)
    problem = make(1, out=12, channels=d // 3, taps=3, n=400)
    found = METHODS["greedy"](problem, Budget(params=problem.params // 3), settings=Settings(structure=structure))
    assert found.factors.params <= problem.params // 3
    METHODS["greedy"].candidates(problem, 2, Settings(structure=structure))


@pytest.mark.parametrize("seed", range(4))
def test_without_entries_it_is_the_best_low_rank(seed):
    """Card 0: the closed form in the H-metric is the optimum, and power iteration reaches it."""
    problem = make(seed, out=10, channels=14, held_out=False)
    for rank in (1, 3, 5):
        best = solve(problem, Budget(rank=rank, channels=0), method="hsvd").objective
        long = Settings(steps=400, tolerance=0)
        found = solve(problem, Budget(rank=rank, channels=0), method="greedy", settings=long)
        assert len(found.factors.kept) == 0
        assert found.objective == pytest.approx(best, rel=1e-6)
        entries = solve(problem, Budget(rank=rank, elements=0), method="greedy", settings=long)
        assert entries.objective == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("structure", ["channels", "elements"])
def test_rank_0_is_pruning_with_least_squares(structure):
    problem = make(5, out=6, channels=12, taps=2, held_out=False)
    budget = Budget(rank=0, channels=4) if structure == "channels" else Budget(rank=0, elements=40)
    found = solve(problem, budget, method="greedy").factors
    assert found.rank == 0
    dense, metric = found.dense(), damped(problem, DAMPING)
    assert np.count_nonzero(dense) == (4 * 2 * 6 if structure == "channels" else 40)
    gradient = (problem.weight - dense) @ metric
    scale = np.abs(problem.weight @ metric).max()
    assert np.abs(gradient[dense != 0]).max() < (1e-9 if structure == "channels" else 1e-3) * scale


def test_the_entries_are_the_largest_in_the_metric_when_nothing_correlates():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 3.0, 20)
    weight = rng.standard_normal((8, 20))
    m = dataclasses.replace(moments_of(rng.standard_normal((100, 20))), cov=np.diag(scale), mean=np.zeros(20))
    found = solve(Problem(weight, 1, m), Budget(rank=0, elements=30), method="greedy").factors
    scores = weight**2 * scale
    expected = scores >= np.sort(scores.ravel())[-30]
    np.testing.assert_array_equal(found.dense() != 0, expected)
    np.testing.assert_allclose(found.dense()[expected], weight[expected], rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 60])
@pytest.mark.parametrize("rank", [0, 2])
def test_conjugate_gradients_lower_the_error_to_the_least_squares_solution(steps, rank):
    rng = np.random.default_rng(steps)
    metric = moments_of(samples(rng, 300, 12)).cov + 0.1 * np.eye(12)
    target, mask = rng.standard_normal((5, 12)), rng.random((5, 12)) < 0.4
    left = np.linalg.qr(rng.standard_normal((5, rank)))[0]
    free = np.eye(5) - left @ left.T

    def error(sparse):
        rest = free @ (target - sparse)
        return float(np.vdot(rest @ metric, rest))

    start = np.where(mask, target, 0)
    found = descend(metric, target, (start, mask), left, steps)
    assert not found[~mask].any()
    assert error(found) <= error(start)
    if steps == 60:
        basis = [np.kron(free, np.eye(12)) @ e for e in np.eye(60)[mask.ravel()]]
        root = np.kron(np.eye(5), scipy.linalg.sqrtm(metric).real)
        columns = np.stack([root @ b for b in basis], axis=1)
        best, *_ = np.linalg.lstsq(columns, root @ np.kron(free, np.eye(12)) @ target.ravel(), rcond=None)
        sparse = np.zeros(60)
        sparse[mask.ravel()] = best
        assert error(found) <= error(sparse.reshape(5, 12)) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("elements", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_error_falls_and_the_best_iterate_is_kept(elements, seed):
    problem = make(seed, out=10, channels=16, taps=1)
    given = dataclasses.replace(task(problem, DAMPING, elements), count=25 if elements else 4)
    run = decompose(given, 3, 30, Settings(tolerance=0.0))
    assert (np.diff(run.history) <= 1e-12 * run.history[0]).all()
    assert run.best.error == min(run.history[-1], run.best.error)
    miss = given.target - run.best.low - run.best.sparse
    assert run.best.error == pytest.approx(float(np.vdot(miss @ given.metric, miss)), rel=1e-9)


def planted(seed, noise):
    """Rank 2 with entries of size 1 to 4, and 40 single entries of size 8 to 12 in 30 x 40."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 40))
    sparse = np.zeros((30, 40))
    where = rng.choice(1200, 40, replace=False)
    sparse.flat[where] = rng.choice([-1, 1], 40) * rng.uniform(8, 12, 40)
    weight = low + sparse + noise * rng.standard_normal((30, 40))
    return Problem(weight, 1, moments_of(samples(rng, 2000, 40, decay=0.98))), set(where)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_planted_sum_of_low_rank_and_entries_is_recovered(noise):
    """The problem is not convex, so a start in a hundred may end elsewhere: one of ten is forgiven."""
    missed = 0
    for seed in range(10):
        problem, where = planted(seed, noise)
        settings = Settings(structure="elements", steps=200, tolerance=0.0)
        found = solve(problem, Budget(rank=2, elements=40), method="greedy", settings=settings)
        missed += set(np.flatnonzero(found.factors.sparse.toarray())) != where
        if not missed:
            nothing = objective(problem.weight, 0 * problem.weight, problem.moments)
            assert found.objective <= (1e-12 + 10 * noise**2) * nothing
    assert missed <= 1


def test_more_blocks_of_random_rows_do_not_change_the_answer_much_but_the_seed_is_kept():
    problem = make(9, out=20, channels=30)
    one, two = (
        solve(problem, Budget(params=300), method="greedy", settings=Settings(seed=s, structure="elements"))
        for s in (0, 0)
    )
    np.testing.assert_array_equal(one.factors.dense(), two.factors.dense())
    other = solve(problem, Budget(params=300), method="greedy", settings=Settings(seed=7, structure="elements"))
    assert other.objective == pytest.approx(one.objective, rel=0.3)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_entries_hold_their_budget_exactly(share):
    problem = make(11, out=12, channels=20)
    params = int(share * problem.params)
    found = solve(problem, Budget(params=params), method="greedy", settings=ELEMENTS)
    assert found.status in (Status.SOLVED, Status.SINGULAR)
    assert isinstance(found.factors, ElementFactors)
    assert found.factors.params <= params
    assert found.factors.params > params - problem.rank_cost
