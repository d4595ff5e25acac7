"""Refits to given responses: closed forms beat every perturbation, planted layers come back, nothing gets worse."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.solvers import Accumulator, Candidate, Settings, cascade, fit, spatial
from onnx_lrs.solvers.activation import LINEAR, RELU, clip, leaky_relu
from onnx_lrs.solvers.cascade import GRID, METRICS, Tried, refit
from onnx_lrs.solvers.problem import (
    Columns,
    Factors,
    Problem,
    ProjectedFactors,
    Response,
    SpatialFactors,
    TuckerFactors,
)
from tests.builders import planted, planted_elements, planted_projected, planted_spatial, planted_tucker

OUT, CHANNELS = 9, 12


def bias_of(problem):
    return np.zeros(problem.out) if problem.bias is None else problem.bias


def error(problem, factors, columns):
    """Return ||phi(u) - phi(u')|| / ||phi(u)|| in float64, from the definition."""

    def response(values):
        values = values * (1.0 if problem.scale is None else problem.scale)
        values = values + (0.0 if columns.offset is None else columns.offset.astype(np.float64))
        return problem.activation(values)

    exact = response(columns.outputs.astype(np.float64))
    near = columns.inputs.astype(np.float64) @ factors.dense().T + bias_of(problem) + factors.bias_shift
    size = np.linalg.norm(exact)
    return np.linalg.norm(exact - response(near)) / size if size else 0.0


def made(weight, inputs, outputs, checks=None, taps=1, **more):
    """Return the problem of a layer that gets ``inputs`` and should give ``outputs``."""
    inputs, outputs = inputs.astype(np.float32), outputs.astype(np.float32)
    sums = Accumulator(inputs.shape[1], outputs.shape[1])
    sums.add(inputs, outputs)
    moments, mean, cross = sums.paired()
    seen = Columns(inputs, outputs)
    judges = seen if checks is None else Columns(*(values.astype(np.float32) for values in checks))
    response = Response(mean, cross)
    return Problem(weight, taps, moments, columns=seen, checks=judges, response=response, **more)


def drawn(seed=0, out=OUT, channels=CHANNELS, taps=1, rows=400, noise=0.3, rank=None, **more):
    """Return a layer behind others that are compressed: its columns are the original's, mixed and noisy."""
    rng = np.random.default_rng(seed)
    d = channels * taps
    weight, bias = rng.standard_normal((out, d)), rng.standard_normal(out)
    mix, spread = np.eye(d) + 0.3 * rng.standard_normal((d, d)) / np.sqrt(d), np.exp(-np.arange(d) / 4)
    turn, centre, parts = rng.standard_normal((d, d)), rng.standard_normal(d), []
    for count in (rows, max(rows, 400)):
        x = (rng.standard_normal((count, d)) * spread) @ turn + centre
        y = x @ weight.T + bias
        parts.append((x @ mix.T + noise * rng.standard_normal(x.shape), y))
    more = {"bias": bias} | more
    return made(weight, *parts[0], parts[1], taps, **more)


def start_of(form, out=OUT, channels=CHANNELS, taps=1, seed=7):
    """Return factors of a form that fit nothing."""
    return planted(form, out, channels, taps, seed)


FORMS = ("low_rank", "channels", "both")
SHAPES = {"wide": (9, 12, 1), "tall": (30, 8, 1), "kernel": (7, 6, 4)}


# ---------------------------------------------------------------- the linear fit


def cost(problem, dense, damping):
    """Return J_delta from the columns themselves: E||y - y'||^2 + delta ||W - E||^2, the bias at its best."""
    x, y = (values.astype(np.float64) for values in (problem.columns.inputs, problem.columns.outputs))
    y = y - bias_of(problem)
    if problem.affine:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    level = np.square(x).sum() / x.size
    missed = np.square(y - x @ dense.T).sum() / len(x)
    return missed + damping * level * np.square(problem.weight - dense).sum()


def perturbed(factors, rng, size):
    def moved(values):
        return values + size * rng.standard_normal(values.shape) * (np.abs(values).mean() if values.size else 1.0)

    return dataclasses.replace(
        factors, left=moved(factors.left), right=moved(factors.right), sparse=moved(factors.sparse)
    )


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_perturbation_of_the_factors_lowers_the_damped_error(shape, form, affine, damping):
    out, channels, taps = SHAPES[shape]
    problem = drawn(1, out, channels, taps, affine=affine, bias=np.arange(out) / 10)
    problem = dataclasses.replace(problem, checks=problem.columns)
    start = start_of(form, out, channels, taps)
    found = refit(problem, start, (damping,), (), (damping,))
    assert found.damping == damping
    factors = found.factors
    assert (factors.rank, [*factors.kept]) == (start.rank, [*start.kept])
    least = cost(problem, factors.dense(), damping)
    rng = np.random.default_rng(2)
    for size in (1e-3, 1e-2, 0.1, 0.5):
        for _ in range(20):
            other = cost(problem, perturbed(factors, rng, size).dense(), damping)
            assert other >= least * (1 - 1e-6)


@pytest.mark.parametrize("form", ["low_rank", "both"])
def test_alternating_least_squares_from_anywhere_finds_nothing_better(form):
    """The closed form is the least of all, not only of its neighbours."""
    problem, damping = drawn(3), 1e-3
    factors = refit(problem, start_of(form), (damping,), (), (damping,)).factors
    least = cost(problem, factors.dense(), damping)
    x, y = (v.astype(np.float64) - v.mean(axis=0, dtype=np.float64) for v in dataclasses.astuple(problem.columns)[:2])
    level = np.sqrt(damping * np.square(x).sum() / x.size * len(x))
    x, y = np.vstack([x, level * np.eye(x.shape[1])]), np.vstack([y, level * problem.weight.T])
    for seed in range(5):
        right = np.random.default_rng(seed).standard_normal(factors.right.shape)
        for _ in range(60):
            features = np.hstack([x @ right.T, x[:, factors.kept]])
            left = np.linalg.lstsq(features, y, rcond=None)[0].T
            rest = y - x[:, factors.kept] @ left[:, len(right) :].T
            left = left[:, : len(right)]
            right = np.linalg.lstsq(x, (np.linalg.pinv(left) @ rest.T).T, rcond=None)[0].T
        features = np.hstack([x @ right.T, x[:, factors.kept]])
        left = np.linalg.lstsq(features, y, rcond=None)[0].T
        dense = left[:, : len(right)] @ right
        dense[:, factors.kept] += left[:, len(right) :]
        assert cost(problem, dense, damping) >= least * (1 - 1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_compression_in_front_it_is_the_independent_fit(shape, form, affine):
    """With x of the original network C = W H, so that T = W whatever the damping."""
    out, channels, taps = SHAPES[shape]
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((out, channels * taps)), rng.standard_normal(out)
    x = rng.standard_normal((500, channels * taps)) @ rng.standard_normal((channels * taps, channels * taps)) + 1
    problem = made(weight, x, x @ weight.T + bias, taps=taps, affine=affine, bias=bias)
    start = start_of(form, out, channels, taps)
    alone = dataclasses.replace(problem, response=None, columns=None, checks=None)
    for damping in (1e-4, 1e-2, 1.0):
        chosen = Candidate("", start.rank, start.params, 0.0, start.kept, damping)
        expected = fit(alone, chosen, "lrs", Settings(steps=0)).factors
        found = refit(problem, start, (damping,), (), (damping,)).factors
        scale = np.abs(weight).max()
        np.testing.assert_allclose(found.dense(), expected.dense(), atol=1e-3 * scale)
        np.testing.assert_allclose(found.bias_shift, expected.bias_shift, atol=2e-3 * scale * channels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_planted_behind_the_compressed_ones_comes_back(shape, form):
    """y = W0 x + b0 of exactly this form; the layer's own weight is another one."""
    out, channels, taps = SHAPES[shape]
    exact = planted(form, out, channels, taps, seed=3)
    start = dataclasses.replace(
        planted(form, out, channels, taps, seed=3), left=0 * exact.left, sparse=0 * exact.sparse
    )
    rng = np.random.default_rng(5)
    x = rng.standard_normal((600, channels * taps)) + 2
    weight = rng.standard_normal((out, channels * taps))
    problem = made(weight, x, x @ exact.dense().T + np.arange(out), taps=taps, bias=np.ones(out))
    found = refit(problem, start, (1e-9, 1e-1), ())
    assert found.damping == 1e-9
    np.testing.assert_allclose(found.factors.dense(), exact.dense(), atol=2e-4 * np.abs(exact.dense()).max())
    np.testing.assert_allclose(found.factors.bias_shift, np.arange(out) - 1, atol=1e-2)
    assert found.errors[1] < 1e-4


def test_a_layer_without_a_bias_keeps_none():
    problem = drawn(6, affine=False, bias=None)
    found = refit(problem, start_of("low_rank"), GRID, ()).factors
    assert not found.bias_shift.any()
    assert not found.sparse.size


def alone(problem, form):
    """Return the factors of rank 3 (Tucker-2: 3, 3) fitted to the layer alone."""
    wanted = Candidate(form, 3, 0, 0.0, np.zeros(0, np.int64), 1e-3, inner=3 if form == "tucker" else 0)
    return fit(dataclasses.replace(problem, response=None, columns=None, checks=None), wanted, "lrs").factors


@pytest.mark.parametrize(
    ("form", "kernel", "kind"),
    [
        ("spatial", (3, 3), SpatialFactors),
        ("spatial", (3, 2), SpatialFactors),
        ("projected", (3, 2), ProjectedFactors),
        ("tucker", (3, 2), TuckerFactors),
    ],
)
def test_a_chain_is_no_worse_than_its_start_and_meets_the_mean(form, kernel, kind):
    channels = 5
    problem = drawn(7, OUT, channels, kernel[0] * kernel[1], kernel=kernel)
    start = alone(problem, form)
    assert type(start) is kind
    found = refit(problem, start)
    assert type(found.factors) is kind
    assert found.factors.rank == 3
    assert found.factors.params == start.params
    before, after = (error(problem, f, problem.checks) for f in (start, found.factors))
    assert after < 0.9 * before
    x, y = problem.columns.inputs, problem.columns.outputs
    near = x @ found.factors.dense().T + problem.bias + found.factors.bias_shift
    np.testing.assert_allclose(near.mean(axis=0), y.mean(axis=0), atol=1e-3)


@pytest.mark.parametrize(("form", "share"), [("spatial", 0.99), ("projected", 0.999), ("tucker", 0.9999)])
@pytest.mark.parametrize("activation", [LINEAR, RELU], ids=["linear", "behind a relu"])
def test_both_ends_of_a_chain_are_fitted_again(activation, form, share, monkeypatch):
    problem = drawn(7, OUT, 5, 9, kernel=(3, 3), activation=activation)
    problem = dataclasses.replace(problem, checks=problem.columns)
    start = alone(problem, form)
    found = refit(problem, start)
    monkeypatch.setattr(spatial, "STEPS", 0)
    left_only = refit(problem, start)
    np.testing.assert_array_equal(left_only.factors.right, start.right)
    assert found.errors[1] < share * left_only.errors[1]
    assert found.errors[2] < share * left_only.errors[2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", [SpatialFactors, ProjectedFactors, TuckerFactors])
def test_a_chain_is_never_worse_on_the_checks_than_its_start(kind, rows, seed):
    problem = drawn(seed, OUT, 5, 9, rows=rows, kernel=(3, 3), activation=RELU)
    rng = np.random.default_rng(seed)
    second, first = (3, 3) if kind is SpatialFactors else (9, 1)
    wide, outer = (3, [rng.standard_normal((OUT, 3))]) if kind is TuckerFactors else (OUT, [])
    start = kind(rng.standard_normal((wide, 2, second)), rng.standard_normal((2, 5, first)), np.zeros(OUT), *outer)
    found = refit(problem, start)
    assert found.errors[2] <= found.errors[1] <= found.errors[0]
    assert error(problem, found.factors, problem.checks) <= error(problem, start, problem.checks) * (1 + 1e-6)


def test_of_dampings_that_fit_alike_the_weakest_goes_on_behind_an_activation():
    tried = [Tried(0.01, 1.05), Tried(0.1, 1.005), Tried(1.0, 1.0), Tried(10.0, 1.2)]
    assert cascade._least(tried, tie=True) == 0.1
    assert cascade._least(tried, tie=False) == 1.0


@pytest.mark.parametrize(
    "exact",
    [
        planted_spatial(OUT, 5, (3, 3), seed=2),
        planted_projected(OUT, 5, 9, seed=2),
        planted_tucker(OUT, 5, 9, seed=2),
    ],
)
def test_a_planted_chain_is_found_from_its_own_weight(exact):
    x = np.random.default_rng(8).standard_normal((900, 45))
    problem = made(exact.dense(), x, x @ exact.dense().T + 1.0, taps=9, kernel=(3, 3), bias=np.zeros(OUT))
    nothing = dataclasses.replace(exact, left=0 * exact.left)
    found = refit(problem, nothing, (1e-6,), ())
    np.testing.assert_allclose(found.factors.dense(), exact.dense(), atol=1e-3 * np.abs(exact.dense()).max())


def test_single_entries_stay_and_only_the_bias_moves():
    problem, start = drawn(9), planted_elements(OUT, CHANNELS, rank=2)
    found = refit(problem, start)
    np.testing.assert_array_equal(found.factors.dense(), start.dense())
    mean = (
        problem.columns.outputs.mean(axis=0, dtype=np.float64) - problem.columns.inputs.mean(axis=0) @ start.dense().T
    )
    np.testing.assert_allclose(found.factors.bias_shift, mean - problem.bias, atol=1e-4)
    assert found.damping is None


# ---------------------------------------------------------------- what is chosen


def by_hand(problem, rank, damping, metric_damping):
    """Return T = (C + delta W)(H + delta I)^-1 cut to a rank in the metric H + mu I, and the bias that goes with it."""
    x, y = (v.astype(np.float64) for v in (problem.columns.inputs, problem.columns.outputs))
    centred_x, centred_y = x - x.mean(axis=0), y - y.mean(axis=0)
    moment, cross = centred_x.T @ centred_x / len(x), centred_y.T @ centred_x / len(x)
    unit = np.trace(moment) / len(moment) * np.eye(len(moment))
    target = np.linalg.solve(moment + damping * unit, (cross + damping * unit[0, 0] * problem.weight).T).T
    root = np.linalg.cholesky(moment + metric_damping * unit)
    basis = np.linalg.svd(target @ root, full_matrices=False)[0][:, :rank]
    dense = basis @ (basis.T @ target)
    shift = y.mean(axis=0) - dense @ x.mean(axis=0) - problem.bias
    nothing = np.zeros(0, np.int64), np.zeros((problem.out, 0))
    return Factors(dense, np.eye(problem.d), *nothing, shift, 1)


@pytest.mark.parametrize("rows", [14, 20, 60, 500])
@pytest.mark.parametrize("seed", range(3))
def test_the_damping_is_the_best_of_the_grid_on_the_checks(rows, seed):
    problem, start = drawn(20 + seed, rows=rows, noise=1.0), start_of("low_rank")
    pulls = [by_hand(problem, start.rank, damping, METRICS[0]) for damping in GRID]
    best = GRID[int(np.argmin([error(problem, factors, problem.checks) for factors in pulls]))]
    trials = [by_hand(problem, start.rank, best, damping) for damping in METRICS]
    errors = [error(problem, factors, problem.checks) for factors in trials]
    found = refit(problem, start, GRID, ())
    assert found.damping == best
    assert found.errors[1] == pytest.approx(min(errors), rel=1e-3)
    wanted = trials[int(np.argmin(errors))].dense()
    np.testing.assert_allclose(found.factors.dense(), wanted, atol=1e-3 * np.abs(problem.weight).max())


def test_the_grid_has_something_to_choose():
    """Few noisy columns want a strong pull to the weights, many want none."""
    strong = refit(drawn(31, rows=14, noise=1.0), start_of("low_rank"), GRID, ()).damping
    weak = refit(drawn(31, rows=3000, noise=1.0), start_of("low_rank"), GRID, ()).damping
    assert strong > weak


def test_a_start_that_is_better_stays():
    problem = drawn(10)
    problem = dataclasses.replace(problem, weight=-problem.weight)
    exact = refit(problem, start_of("low_rank"), (1e-4,), ()).factors
    found = refit(problem, exact, (1e6,), ())
    assert found.damping is None
    np.testing.assert_array_equal(found.factors.dense(), exact.dense())


@st.composite
def problems(draw):
    """Draw a problem with hardly any columns or many, any activation, scale and offset."""
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    rows = draw(st.sampled_from([1, 2, 3, 8, 40, 200]))
    problem = drawn(seed, rows=rows, noise=draw(st.sampled_from([0.0, 0.3, 3.0])), affine=draw(st.booleans()))
    activation = draw(st.sampled_from([LINEAR, RELU, clip(0.0, 6.0), leaky_relu(0.1)]))
    more = {"activation": activation}
    if draw(st.booleans()):
        more["scale"] = 0.5 + rng.random(OUT)
    if draw(st.booleans()):
        for name in ("columns", "checks"):
            own = getattr(problem, name)
            offset = rng.standard_normal(own.outputs.shape).astype(np.float32)
            more[name] = dataclasses.replace(own, offset=offset)
    return dataclasses.replace(problem, **more)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), form=st.sampled_from([*FORMS, "elements"]), seed=st.integers(0, 99))
def test_it_is_never_worse_on_the_checks_than_its_start(problem, form, seed):
    start = planted_elements(OUT, CHANNELS, 2, seed=seed) if form == "elements" else start_of(form, seed=seed)
    if seed % 2 and form != "elements":  # a good one
        alone = dataclasses.replace(problem, response=None, columns=None, checks=None, activation=LINEAR, scale=None)
        start = fit(alone, Candidate("", start.rank, start.params, 0.0, start.kept, 1e-2), "lrs").factors
    found = refit(problem, start)
    before, linear, after = found.errors
    assert after <= linear <= before
    for value, factors in ((before, start), (after, found.factors)):
        assert value == pytest.approx(error(problem, factors, problem.checks), rel=1e-3, abs=1e-4)
    assert np.isfinite(found.factors.dense()).all()
    assert np.isfinite(found.factors.bias_shift).all()


# ---------------------------------------------------------------- behind the activation


HIDDEN_GRID = (1e-3,)  # what is left to choose here is what the rounds gain


def masked(activation, dead, seed=0, rows=2000, rank=8):
    """Return a layer, half of whose outputs lie where phi is flat (or nearly), fresh columns of it, and a start.

    A linear fit of half the rank spends itself on all outputs alike.
    """
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((16, 16)), np.where(np.arange(16) % 2, 0.0, dead)
    parts = []
    for _ in range(3):
        x = rng.standard_normal((rows, 16))
        parts.append((x, x @ weight.T + bias))
    problem = made(weight, *parts[0], parts[1], bias=bias, activation=activation)
    nothing = np.zeros(0, np.int64), np.zeros((16, 0)), np.zeros(16)
    start = Factors(np.zeros((16, rank)), np.zeros((rank, 16)), *nothing, 1)
    return problem, Columns(*(values.astype(np.float32) for values in parts[2])), start


@pytest.mark.parametrize(
    ("activation", "dead"),
    [(RELU, -16.0), (clip(0.0, 6.0), -16.0), (clip(0.0, 6.0), 22.0), (leaky_relu(0.01), -16.0)],
    ids=["relu", "relu6 below", "relu6 above", "leaky"],
)
def test_what_the_activation_hides_costs_nothing(activation, dead):
    problem, fresh, start = masked(activation, dead)
    linear, behind = refit(problem, start, HIDDEN_GRID, ()), refit(problem, start, HIDDEN_GRID)
    before, after = (error(problem, found.factors, fresh) for found in (linear, behind))
    assert after < 0.85 * before
    assert behind.errors[1] == linear.errors[1]
    assert behind.errors[2] == pytest.approx(error(problem, behind.factors, problem.checks), rel=1e-3)


def test_without_an_activation_there_are_no_rounds():
    problem, start = drawn(11), start_of("low_rank")
    found, linear = refit(problem, start), refit(problem, start, GRID, ())
    np.testing.assert_array_equal(found.factors.dense(), linear.factors.dense())
    assert found.errors[1] == found.errors[2] == linear.errors[1]


@pytest.mark.parametrize("scaled", [False, True])
def test_behind_a_shortcut_the_activation_sees_the_sum(scaled):
    """The shortcut hides half of the outputs: who ignores it cannot know that."""
    problem, fresh, start = masked(RELU, 0.0)
    rng, scale = np.random.default_rng(12), np.linspace(0.5, 2.0, 16) if scaled else None
    samples = []
    for own in (problem.columns, problem.checks, fresh):
        offset = np.where(np.arange(16) % 2, 1.0, -60.0) + rng.standard_normal(own.outputs.shape)
        samples.append(dataclasses.replace(own, offset=offset.astype(np.float32)))
    columns, checks, fresh = samples
    problem = dataclasses.replace(problem, columns=columns, checks=checks, scale=scale)
    linear, behind = refit(problem, start, HIDDEN_GRID, ()), refit(problem, start, HIDDEN_GRID)
    for found in (linear, behind):
        assert found.errors[0] == pytest.approx(error(problem, start, checks), rel=1e-4)
        assert found.errors[2] == pytest.approx(error(problem, found.factors, checks), rel=1e-3)
    bare = (dataclasses.replace(own, offset=None) for own in (columns, checks))
    ignorant = refit(dataclasses.replace(problem, **dict(zip(("columns", "checks"), bare, strict=True))), start)
    for other in (linear, ignorant):
        assert error(problem, behind.factors, fresh) < 0.85 * error(problem, other.factors, fresh)
