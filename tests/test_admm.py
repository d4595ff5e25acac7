"""Low rank + group sparse by ADMM: the convex program against cvxpy, what happens behind a ReLU, planted layers.

Material: 10 outputs, 15 columns (or 8 channels of few), correlated columns with a mean that is not zero.
"""

import dataclasses

import numpy as np
import pytest

from onnx_lrs.solvers import Budget, Factors, Problem, Settings, Status, admm, solve
from onnx_lrs.solvers.behind import BLOCK, activation_error, bias_of, first, pre_activation
from onnx_lrs.solvers.moments import moments_of
from onnx_lrs.solvers.problem import Columns
from onnx_lrs.solvers.reference import low_rank_plus_groups
from onnx_lrs.solvers.spectral import damped

OUT, D, N = 10, 15, 60


# --- material -------------------------------------------------------------------------------------------------------


def columns_with(rng, n, d):
    mixing = rng.standard_normal((d, d)) * 0.9 ** np.arange(d)[:, None]
    return (rng.standard_normal((n, d)) @ mixing + 1).astype(np.float32)


def make(seed, n=300, checks=True, **changes):
    """A layer behind a ReLU; seeds go through tall and wide, taps 1 and 3, with and without bias, affine or not."""
    rng = np.random.default_rng(seed)
    out, channels = (30, 8) if seed % 3 == 0 else (10, 15)
    taps = 1 + 2 * (seed % 2)
    both = columns_with(rng, 2 * n, channels * taps)
    x, z = both[:n], both[n:]
    problem = Problem(
        rng.standard_normal((out, channels * taps)),
        taps,
        moments_of(x),
        moments_of(z),
        affine=seed % 4 < 2,
        bias=None if seed % 5 == 0 else 2 * rng.standard_normal(out),
        activation="relu",
        columns=Columns(x),
        checks=Columns(z) if checks else None,
    )
    return dataclasses.replace(problem, **changes)


def start_of(problem, share=0.5):
    """Return the sample and the linear approximation that the ADMM behind the ReLU goes on from."""
    chosen = admm.ADMM.choose(problem, Budget(params=int(share * problem.params)), Settings())
    metric = damped(problem, chosen.damping)
    return admm._sample(problem), admm._linear(problem, metric, chosen.support, chosen.rank), metric


def program_of(taps, seed=0):
    """Return centred columns (n, d), what W gives for them, the program, and the penalties from which all is zero."""
    rng = np.random.default_rng([seed, taps])
    x = columns_with(rng, N, D).astype(np.float64)
    x -= x.mean(axis=0)
    weight = rng.standard_normal((OUT, D))
    gradient = weight @ x.T @ x / N
    largest1 = max(np.linalg.norm(gradient[:, g : g + taps]) for g in range(0, D, taps)) / np.sqrt(taps)
    most = largest1, np.linalg.norm(gradient, 2)
    return x, x @ weight.T, admm.relaxation(weight, x.T @ x / N, taps), most


def plain_objective(data, parts, taps, l1, l2, middle=None):
    """The program's objective by its definition; the loss is that of M, which is L + S unless given."""
    (x, y), (low, sparse) = data, parts
    middle = low + sparse if middle is None else middle
    groups = sum(np.linalg.norm(sparse[:, g : g + taps]) for g in range(0, sparse.shape[1], taps))
    loss = 0.5 * np.sum((y - x @ middle.T) ** 2) / len(x)
    return loss + l1 * np.sqrt(taps) * groups + l2 * np.linalg.norm(low, "nuc")


# --- the convex program ---------------------------------------------------------------------------------------------

BALANCES = {
    "both parts": (0.12, 0.06),
    "both parts, weaker": (0.02, 0.01),
    "l1 dominant: low rank only": (1.5, 0.1),
    "l2 dominant: channels only": (0.1, 1.5),
    "both strong": (0.6, 0.4),
}


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("taps", [1, 3])
def test_the_convex_program_reaches_the_optimum_of_cvxpy(taps, balance):
    x, y, program, most = program_of(taps)
    l1, l2 = (share * top for share, top in zip(BALANCES[balance], most, strict=True))
    optimum, low, sparse = low_rank_plus_groups(y, x, taps, l1, l2)
    run = admm.relaxed(program, l1, l2, program.start(), 5000, 1e-7)
    last = run.last
    assert run.converged
    assert np.linalg.norm(last.low + last.sparse - last.middle) <= 1e-4 * np.linalg.norm(last.middle)
    reached = plain_objective((x, y), (last.low, last.sparse), taps, l1, l2)
    assert reached == pytest.approx(optimum, rel=1e-4)
    assert reached >= optimum * (1 - 1e-7)
    assert run.history[-1] == pytest.approx(optimum, rel=1e-4)
    np.testing.assert_allclose(last.low + last.sparse, low + sparse, atol=2e-3 * np.abs(low + sparse).max())
    if "only" in balance:
        assert not (last.low if balance.startswith("l2") else last.sparse).any()


@pytest.mark.parametrize("taps", [1, 3])
def test_the_history_is_finite_and_the_residuals_fall(taps):
    _, _, program, most = program_of(taps)
    run = admm.relaxed(program, 0.12 * most[0], 0.06 * most[1], program.start(), 300, 0.0)
    residuals = np.array(run.residuals)
    assert np.isfinite(run.history).all()
    assert residuals.shape == (300, 2)
    worst = residuals.max(axis=1)
    assert worst[:10].max() > 10 * worst[40:50].max() > 100 * worst[-10:].max()


@pytest.mark.parametrize("taps", [1, 3])
def test_the_objective_without_a_product_with_h_is_that_of_the_definition(taps):
    x, y, program, most = program_of(taps)
    l1, l2 = 0.1 * most[0], 0.05 * most[1]
    state = program.start()
    for _ in range(12):
        state, step = program.advance(state, l1, l2)
        exact = plain_objective((x, y), (state.low, state.sparse), taps, l1, l2, state.middle)
        assert step.value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("taps", [1, 3])
def test_the_largest_penalties_are_those_from_which_nothing_is_left(taps):
    _, _, program, most = program_of(taps)
    for share in (1.001, 0.97):
        run = admm.relaxed(program, share * most[0], share * most[1], program.start(), 5000, 1e-9)
        assert run.converged
        assert bool(run.last.low.any() or run.last.sparse.any()) is (share < 1)


def test_the_singular_values_of_a_state_are_those_of_its_low_rank_part():
    _, _, program, most = program_of(3)
    run = admm.relaxed(program, 0.3 * most[0], 0.05 * most[1], program.start(), 200, 1e-6)
    exact = np.linalg.svd(run.last.low, compute_uv=False)
    assert 0 < len(run.last.values) < OUT
    np.testing.assert_allclose(run.last.values, exact[: len(run.last.values)], rtol=1e-8)
    assert exact[len(run.last.values)] < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_is_warm_started(seed):
    _, _, program, most = program_of(1 + 2 * (seed % 2), seed)
    state, warm, cold = program.start(), 0, 0
    for level in admm.LEVELS:
        penalties = level * most[0], level * most[1]
        run = admm.relaxed(program, *penalties, state, 5000, 1e-5)
        fresh = admm.relaxed(program, *penalties, program.start(), 5000, 1e-5)
        assert run.converged
        assert fresh.converged
        assert run.history[-1] == pytest.approx(fresh.history[-1], rel=1e-3)
        state, warm, cold = run.last, warm + len(run.steps), cold + len(fresh.steps)
    assert warm < 0.95 * cold


@pytest.mark.parametrize("seed", range(4))
def test_a_path_holds_the_groups_that_are_left_strongest_first_and_starts_with_few(seed):
    taps = 1 + 2 * (seed % 2)
    channels = D // taps
    _, _, program, most = program_of(taps, seed)
    found = iter(admm.path(program, channels))
    for ratio in admm.RATIOS:
        state = program.start()
        for level in admm.LEVELS:
            state = admm.relaxed(program, ratio * level * most[0], level * most[1], state, admm.INNER, 0.0).last
            norms = np.array([np.linalg.norm(state.sparse[:, g : g + taps]) for g in range(0, D, taps)])
            support = next(found)
            assert set(support) == set(np.flatnonzero(norms))
            assert (np.diff(norms[support]) <= 0).all()
            if len(support) > 0.95 * channels:
                break
    assert next(found, None) is None


def test_wide_layers_use_float32_and_agree_with_float64(monkeypatch):
    _, _, program, most = program_of(3)
    monkeypatch.setattr(admm, "NARROW", 1)
    narrow = admm.relaxation(program.target, program.metric, 3)
    exact, rough = (admm.relaxed(p, 0.12 * most[0], 0.06 * most[1], p.start(), 60, 0.0) for p in (program, narrow))
    assert {a.dtype for a in (rough.last.low, rough.last.sparse, rough.last.middle, rough.last.dual)} == {
        np.dtype(np.float32)
    }
    np.testing.assert_allclose(rough.last.middle, exact.last.middle, atol=1e-3)
    assert rough.history[-1] == pytest.approx(exact.history[-1], rel=1e-4)


# --- behind the ReLU ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_it_is_never_worse_behind_the_relu_than_its_linear_start(seed):
    problem = make(seed, n=600, checks=seed % 7 != 0)
    judges = problem.checks or problem.columns
    budget = Budget(params=int((0.3, 0.5, 0.7)[seed % 3] * problem.params))
    found = solve(problem, budget, method="admm")
    linear = solve(dataclasses.replace(problem, activation="linear"), budget, method="admm")
    assert found.factors.rank == linear.factors.rank
    assert len(found.factors.kept) == len(linear.factors.kept)
    assert activation_error(problem, found.factors, judges) <= activation_error(problem, linear.factors, judges)
    assert len(found.history) == len(found.residuals) > 0
    assert not linear.history


@pytest.mark.parametrize("seed", range(12))
def test_many_steps_behind_the_relu_lower_the_objective_and_come_to_rest(seed):
    problem = make(seed)
    sample, linear, _ = start_of(problem)
    run = admm.behind_relu(problem, sample, linear, 300, 0.0)
    assert np.isfinite(run.history).all()
    assert run.history[-1] < 0.9 * run.history[0]
    assert max(max(pair) for pair in run.residuals[-20:]) < 1e-2
    gap = run.last.state.low + run.last.state.sparse - run.last.state.middle
    assert np.linalg.norm(gap) < 1e-2 * np.linalg.norm(run.last.state.middle)


@pytest.mark.parametrize("seed", range(8))
def test_the_first_objective_behind_the_relu_is_that_of_its_definition(seed):
    """Loss of M x + c behind the ReLU, with M and c the ridge regression of z on x that pulls M toward the start."""
    problem = make(seed)
    sample, linear, _ = start_of(problem)
    x = sample.inputs.astype(np.float64)
    dense, level = linear.dense(), sample.program.penalty
    shift = bias_of(problem) + linear.bias_shift + dense @ sample.mean
    v = x @ dense.T + shift
    a = np.maximum((x + sample.mean) @ problem.weight.T + bias_of(problem), 0)
    np.testing.assert_allclose(sample.outputs, a, atol=1e-4)
    z = np.where(v > 0, (a + v) / 2, v)  # the two cases with rho = 1
    crosses = (v <= 0) & (np.square(np.maximum(a + v, 0) / 2 - a) + np.square(np.maximum(a + v, 0) / 2 - v) < a**2)
    z[crosses] = (a + v)[crosses] / 2
    free = z.mean(axis=0) if problem.affine else bias_of(problem)
    system = x.T @ x / len(x) + level * np.eye(x.shape[1])
    middle = np.linalg.solve(system, ((z - free).T @ x / len(x) + level * dense).T).T
    loss = 0.5 * np.sum((np.maximum(x @ middle.T + free, 0) - a) ** 2) / len(x)
    begin = admm.Lifted(
        admm.State(dense, linear.left @ linear.right, dense - linear.left @ linear.right, 0 * dense, dense[0, :0]),
        z.astype(np.float32),
        np.zeros_like(z, np.float32),
    )
    found, values = admm._middle(problem, sample, begin)
    np.testing.assert_allclose(found, middle, atol=1e-3 * np.abs(middle).max())
    again = 0.5 * np.sum((np.maximum(values, 0) - a) ** 2) / len(x)
    assert again == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_a_layer_that_is_exact_is_left_alone(seed):
    """Nothing behind the ReLU pulls at the layer itself, whatever its bias and whether that may change."""
    problem = make(seed)
    everything = np.arange(problem.channels)
    exact = Factors(
        np.zeros((problem.out, 0)),
        np.zeros((0, problem.d)),
        everything,
        problem.weight,
        np.zeros(problem.out),
        problem.taps,
    )
    sample = admm._sample(problem)
    scale = np.abs(problem.weight).max()
    for factors in admm.refitted(problem, sample, exact, damped(problem, 1e-3)):
        np.testing.assert_allclose(factors.dense(), problem.weight, atol=1e-4 * scale)
        assert activation_error(problem, factors, problem.checks) < 1e-4
    run = admm.behind_relu(problem, sample, exact, 5, 0.0)
    np.testing.assert_allclose(run.last.state.middle, problem.weight, atol=1e-3 * scale)


@pytest.mark.parametrize("seed", range(12))
def test_each_refit_lowers_the_error_on_its_own_columns(seed):
    """With all columns in the sample, which then is what it is fitted to."""
    problem = make(seed, n=100)
    sample, linear, metric = start_of(problem, 0.4)
    own = first(problem.columns, len(sample.inputs))
    errors = [activation_error(problem, f, own) for f in admm.refitted(problem, sample, linear, metric)]
    assert errors[1] < errors[0]
    assert errors[-1] < errors[0]
    for factors in admm.refitted(problem, sample, linear, metric):
        assert (factors.rank, list(factors.kept)) == (linear.rank, list(linear.kept))
        assert problem.affine or not factors.bias_shift.any()


@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_outputs_whose_float32_squares_overflow_change_nothing_but_the_scale(seed, scale):
    problem, budget = make(seed, n=600), Budget(params=100)
    bias = None if problem.bias is None else scale * problem.bias
    far = dataclasses.replace(problem, weight=scale * problem.weight, bias=bias)
    given = [Columns(c.inputs, pre_activation(far, c)) for c in (problem.columns, problem.checks)]
    one = solve(problem, budget, method="admm")
    for other in (far, dataclasses.replace(far, columns=given[0], checks=given[1])):
        found = solve(other, budget, method="admm")
        assert list(found.factors.kept) == list(one.factors.kept)
        np.testing.assert_allclose(found.factors.dense() / scale, one.factors.dense(), atol=1e-4)
        assert np.isfinite(found.history).all()
        np.testing.assert_allclose(np.array(found.history) / scale**2, one.history, rtol=1e-3)
        error, exact = (activation_error(p, f.factors, p.checks) for p, f in ((other, found), (problem, one)))
        assert error == pytest.approx(exact, rel=1e-3)


def planted(seed, taps, noise):
    """A layer of rank 2 beside 3 channels of 12, behind a ReLU; noise relative to entries of about 1."""
    rng = np.random.default_rng([seed, taps])
    out, channels, rank = 20, 12, 2
    d = channels * taps
    kept = np.sort(rng.choice(channels, 3, replace=False))
    weight = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, d)) / np.sqrt(rank)
    weight.reshape(out, channels, taps)[:, kept] += 2 * rng.standard_normal((out, 3, taps))
    weight += noise * rng.standard_normal(weight.shape)
    x, z = (rng.standard_normal((2, 800, d)) + 0.5).astype(np.float32)
    bias = rng.standard_normal(out)
    moments = moments_of(x), moments_of(z)
    return kept, Problem(weight, taps, *moments, bias=bias, activation="relu", columns=Columns(x), checks=Columns(z))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_layer_is_recovered_rank_and_channels(seed, taps, noise):
    kept, problem = planted(seed, taps, noise)
    budget = Budget(params=2 * problem.rank_cost + 3 * taps * problem.out)
    found = solve(problem, budget, method="admm")  # the split is left to the method
    assert found.status is Status.SOLVED
    assert found.factors.rank == 2
    assert list(found.factors.kept) == list(kept)
    assert activation_error(problem, found.factors, problem.checks) <= max(noise, 1e-5)


# --- behind.py ------------------------------------------------------------------------------------------------------


def some_factors(problem, rng):
    return Factors(
        rng.standard_normal((problem.out, 2)),
        rng.standard_normal((2, problem.d)),
        np.array([1]),
        rng.standard_normal((problem.out, problem.taps)),
        rng.standard_normal(problem.out),
        problem.taps,
    )


@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("n", [50, BLOCK, BLOCK + 7])
@pytest.mark.parametrize("seed", [4, 5])
def test_the_error_behind_the_activation_on_raw_samples(activation, given, n, seed):
    rng = np.random.default_rng(n)
    problem = make(seed, activation=activation)
    x = rng.standard_normal((n, problem.d)).astype(np.float32)
    outputs = rng.standard_normal((n, problem.out)).astype(np.float32) if given else None
    factors = some_factors(problem, rng)
    bias = 0 if problem.bias is None else problem.bias
    exact = outputs if given else x @ problem.weight.T + bias
    near = x @ factors.dense().T + bias + factors.bias_shift
    if activation == "relu":
        exact, near = np.maximum(exact, 0), np.maximum(near, 0)
    expected = np.linalg.norm(exact - near) / np.linalg.norm(exact)
    assert activation_error(problem, factors, Columns(x, outputs)) == pytest.approx(expected, rel=1e-5)


def test_the_error_of_the_layer_itself_is_zero_and_of_nothing_one():
    problem = make(4, bias=None)
    nothing = Factors(
        np.zeros((10, 0)), np.zeros((0, problem.d)), np.zeros(0, int), np.zeros((10, 0)), np.zeros(10), problem.taps
    )
    itself = dataclasses.replace(nothing, left=np.eye(10), right=problem.weight)
    assert activation_error(problem, itself, problem.checks) == 0.0
    assert activation_error(problem, nothing, problem.checks) == pytest.approx(1.0)


def test_the_error_of_a_layer_that_gives_nothing_behind_the_relu_is_zero():
    problem = make(4, bias=np.full(10, -1e4))
    factors = some_factors(problem, np.random.default_rng(0))
    assert activation_error(problem, factors, problem.checks) == 0.0


def test_what_a_layer_should_give_is_given_or_the_layer():
    problem = make(4)
    x = problem.columns.inputs
    np.testing.assert_allclose(pre_activation(problem, problem.columns), x @ problem.weight.T + problem.bias, atol=1e-4)
    outputs = np.ones((len(x), problem.out), np.float32)
    assert pre_activation(problem, Columns(x, outputs)) is outputs
    bare = dataclasses.replace(problem, bias=None)
    np.testing.assert_allclose(pre_activation(bare, bare.columns), x @ problem.weight.T, atol=1e-4)


def test_given_outputs_are_what_the_fit_aims_at():
    """Columns of a compressed prefix, outputs of the original one: the factors follow the outputs."""
    problem = make(4, n=2000)
    other = problem.weight * 1.3
    x, z = problem.columns.inputs, problem.checks.inputs
    wanted = dataclasses.replace(
        problem,
        columns=Columns(x, (x @ other.T + problem.bias).astype(np.float32)),
        checks=Columns(z, (z @ other.T + problem.bias).astype(np.float32)),
    )
    found = solve(wanted, Budget(params=110), method="admm")
    linear = solve(dataclasses.replace(wanted, activation="linear"), Budget(params=110), method="admm")
    errors = [activation_error(wanted, f.factors, wanted.checks) for f in (found, linear)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("count", [0, 1, 7, 99])
def test_the_first_columns_are_views_with_their_outputs(count):
    x, y = np.arange(30, dtype=np.float32).reshape(10, 3), np.arange(20, dtype=np.float32).reshape(10, 2)
    part = first(Columns(x, y), count)
    np.testing.assert_array_equal(part.inputs, x[:count])
    np.testing.assert_array_equal(part.outputs, y[:count])
    assert count == 0 or np.shares_memory(part.inputs, x)
    assert first(Columns(x), count).outputs is None
