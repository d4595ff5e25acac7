"""Guaranteed errors: the convex programs against cvxpy, planted layers, feasibility recomputed here in float64.

Oracles: cvxpy (solvers/reference.py), planted ranks and supports, the constraints written out once more (`breaks`).
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from onnx_lrs.solvers import (
    METHODS,
    Budget,
    Columns,
    ElementFactors,
    Factors,
    Moments,
    Problem,
    Settings,
    Status,
    curve,
    ddlr,
    fit,
    nettrim,
    objective,
    reference,
    solve,
)
from onnx_lrs.solvers import constrained as on
from onnx_lrs.solvers.activation import LINEAR, RELU
from onnx_lrs.solvers.behind import activation_error

NAMES = ("ddlr", "nettrim")
PROGRAMS = {"ddlr": (ddlr.relax, "nuclear"), "nettrim": (nettrim.relax, "entries")}
TIGHT = Settings(tolerance=1e-7, steps=20000)


# --- material -------------------------------------------------------------------------------------------------------


def make(seed, out=10, d=15, n=60, relu=True, affine=True, cascade=False):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, d)) @ (rng.standard_normal((d, d)) * 0.85 ** np.arange(d)[:, None]) + 0.5).astype("f4")
    weight, bias = rng.standard_normal((out, d)), rng.standard_normal(out)
    original = x + 0.1 * rng.standard_normal(x.shape)
    outputs = (original @ weight.T + bias).astype("f4") if cascade else None
    activation = "relu" if relu else "linear"
    return Problem(weight, bias=bias, activation=activation, affine=affine, columns=Columns(x, outputs))


def planted(seed, rank=None, density=None, out=16, d=24, n=300, affine=True):
    problem = make(seed, out, d, n, affine=affine)
    rng = np.random.default_rng([seed, 1])
    weight = rng.standard_normal((out, d))
    if rank:
        weight = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, d))
    if density:
        weight *= rng.random((out, d)) < density
    return dataclasses.replace(problem, weight=weight)


def parts(problem):
    """The columns, A, where it is on, and the limits, in float64."""
    x = problem.columns.inputs.astype(float)
    v = x @ problem.weight.T + (0 if problem.bias is None else problem.bias)
    y = v if problem.columns.outputs is None else problem.columns.outputs.astype(float)
    if problem.activation == LINEAR:
        return x, y, np.ones(y.shape, bool), v
    return x, np.maximum(y, 0), y > 0, np.zeros_like(v) if problem.columns.outputs is None else v


def reached(problem, factors):
    """Norm on Om, largest excess outside it, error after the activation: written out once more."""
    x, a, inside, limit = parts(problem)
    v = x @ factors.dense().T + (0 if problem.bias is None else problem.bias) + factors.bias_shift
    above = np.where(inside, -np.inf, v - limit).max(initial=-np.inf)
    after = np.maximum(v, 0) if problem.activation == RELU else v
    return np.linalg.norm((v - a)[inside]), above, np.linalg.norm(after - a)


def check_guarantee(problem, gain, found):
    _, a, inside, limit = parts(problem)
    eps = gain * np.linalg.norm(a)
    norm, above, error = reached(problem, found.factors)
    assert norm <= eps * (1 + 1e-12)
    assert above <= 1e-11 * np.abs(a).max(initial=1.0) if problem.affine else above <= 0
    outside = np.linalg.norm(np.maximum(limit, 0)[~inside])
    assert found.allowed == pytest.approx(math.hypot(eps, outside), rel=1e-12)
    assert found.error == pytest.approx(error, rel=1e-9, abs=1e-9)
    assert error <= found.allowed * (1 + 1e-12)
    assert found.factors.params < problem.params
    assert np.isfinite(found.factors.dense()).all()
    assert problem.affine or not found.factors.bias_shift.any()
    assert found.objective == objective(
        problem.weight, found.factors.dense(), on.column_moments(problem), problem.affine
    )
    assert len(found.residuals) == len(found.history)


# --- the convex programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.03, 0.4])
@pytest.mark.parametrize(("relu", "affine", "cascade"), list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("method", NAMES)
def test_the_convex_programs_agree_with_cvxpy(method, relu, affine, cascade, gain):
    problem = make(1, relu=relu, affine=affine, cascade=cascade)
    gain = max(gain, on.cascade_gain(problem))
    eps = gain * on.size_of_responses(problem)
    here = on.region(problem, eps)
    relax, norm = PROGRAMS[method]
    run = relax(here, None, (TIGHT.steps, TIGHT.tolerance))
    assert run.converged
    weight = np.asarray(run.last.weight) * here.unit
    optimum, _, _ = reference.constrained(problem, eps, norm)
    value = np.linalg.norm(weight, "nuc") if norm == "nuclear" else np.abs(weight).sum()
    assert value == pytest.approx(optimum, rel=1e-4)
    shift = run.last.bias * here.scale_out - weight @ here.centre - problem.bias if affine else None
    what = on.measure(problem, weight, shift)
    assert what.on <= eps * (1 + 1e-4)
    assert what.above <= 1e-4 * on.size_of_responses(problem)


@pytest.mark.parametrize("method", NAMES)
def test_a_warm_start_ends_at_the_same_optimum_sooner(method):
    problem = make(2)
    relax, _ = PROGRAMS[method]
    here = on.region(problem, 0.2 * on.size_of_responses(problem))
    near = relax(dataclasses.replace(here, radius=1.05 * here.radius), None, (20000, 1e-6)).last
    cold, warm = relax(here, None, (20000, 1e-6)), relax(here, near, (20000, 1e-6))
    assert warm.history[-1] == pytest.approx(cold.history[-1], rel=1e-4)
    assert len(warm.steps) < len(cold.steps)


def test_the_reference_for_low_rank_plus_groups_is_optimal():
    """L + S against perturbations, and the two ends: no penalty of use leaves zero, none at all least squares."""
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((40, 8))
    target = inputs @ rng.standard_normal((8, 5)) + 0.1 * rng.standard_normal((40, 5))

    def value(low, sparse, l1, l2):
        groups = np.sqrt(2) * sum(np.linalg.norm(sparse[:, g : g + 2]) for g in range(0, 8, 2))
        fit_ = np.sum((target - inputs @ (low + sparse).T) ** 2) / 80
        return fit_ + l1 * groups + l2 * np.linalg.norm(low, "nuc")

    best, low, sparse = reference.low_rank_plus_groups(target, inputs, 2, 0.3, 0.5)
    assert value(low, sparse, 0.3, 0.5) == pytest.approx(best, rel=1e-6)
    for _ in range(50):
        near = 0.01 * rng.standard_normal((2, 5, 8))
        assert value(low + near[0], sparse + near[1], 0.3, 0.5) >= best * (1 - 1e-7)
    _, low, sparse = reference.low_rank_plus_groups(target, inputs, 2, 1e3, 1e3)
    np.testing.assert_allclose(low + sparse, 0, atol=1e-5)


# --- what is guaranteed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("relu", "affine", "cascade"), list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("method", NAMES)
def test_what_is_returned_keeps_to_the_constraints(method, relu, affine, cascade, gain):
    problem = make(4, relu=relu, affine=affine, cascade=cascade)
    found = solve(problem, Budget(gain=gain), method=method)
    if found.status is Status.SOLVED:
        check_guarantee(problem, gain, found)
    else:
        assert found.factors is None
        assert found.status is Status.DENSE or (cascade and gain == 0.1 and found.status is Status.ERROR_TOO_SMALL)


@pytest.mark.parametrize("method", NAMES)
def test_a_large_layer_in_float32_keeps_to_them_exactly_as_well(method):
    problem = planted(5, rank=12, out=120, d=160, n=1600)
    assert on.region(problem, 1.0).inputs.dtype == np.float32
    for affine in (True, False):
        layer = dataclasses.replace(problem, affine=affine)
        found = solve(layer, Budget(gain=0.2), method=method, settings=Settings(steps=60))
        if found.factors is None:
            assert not affine
        else:
            check_guarantee(layer, 0.2, found)


@pytest.mark.parametrize("method", NAMES)
def test_an_error_so_slack_that_the_bias_alone_keeps_to_it_needs_no_weight(method):
    problem = make(6)
    _, a, inside, _ = parts(problem)
    bias = np.minimum(0.0, np.where(inside, a, 0).sum(0) / inside.sum(0))  # every output is off somewhere: at most 0
    needed = np.linalg.norm((a - bias)[inside]) / np.linalg.norm(a)
    found = solve(problem, Budget(gain=needed + 1e-9), method=method)
    assert (found.status, found.factors.params) == (Status.SOLVED, 0)
    check_guarantee(problem, needed + 1e-9, found)
    assert solve(problem, Budget(gain=0.98 * needed), method=method).factors.params > 0


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("affine", [True, False])
def test_no_error_at_all_leaves_the_layer_dense(method, affine):
    found = solve(make(7, affine=affine), Budget(gain=0.0), method=method)
    assert (found.status, found.factors, found.allowed, found.error) == (Status.DENSE, None, 0.0, 0.0)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("method", NAMES)
def test_a_cascade_that_cannot_keep_to_the_error_says_so(method, relu):
    found = solve(make(8, relu=relu, cascade=True), Budget(gain=1e-3), method=method)
    assert (found.status, found.factors) == (Status.ERROR_TOO_SMALL, None)


@pytest.mark.parametrize("method", NAMES)
def test_net_trims_own_error_of_a_cascade_admits_the_layer(method):
    problem = make(9, cascade=True)
    x, a, inside, _ = parts(problem)
    v = x @ problem.weight.T + problem.bias
    gain = on.cascade_gain(problem, 1.1)
    assert gain == pytest.approx(math.sqrt(1.1) * np.linalg.norm((v - a)[inside]) / np.linalg.norm(a), rel=1e-12)
    found = solve(problem, Budget(gain=gain), method=method)
    assert found.status in (Status.SOLVED, Status.DENSE)
    assert found.error <= found.allowed
    assert on.cascade_gain(make(9)) == 0.0


@pytest.mark.parametrize("method", NAMES)
def test_the_step_limit_keeps_what_is_feasible_and_says_so(method):
    problem = planted(10, rank=3) if method == "ddlr" else planted(10, density=0.2)
    found = solve(problem, Budget(gain=0.1), method=method, settings=Settings(steps=3))
    assert found.status is Status.NOT_CONVERGED
    assert len(found.history) == 3
    check_guarantee(problem, 0.1, found)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_planted_rank_is_found(rank, affine):
    problem = planted(rank, rank=rank, affine=affine)
    found = solve(problem, Budget(gain=1e-3), method="ddlr")
    assert found.status is Status.SOLVED
    assert found.factors.rank == rank
    check_guarantee(problem, 1e-3, found)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_planted_entries_are_found(density, affine):
    problem = planted(11, density=density, affine=affine)
    found = solve(problem, Budget(gain=1e-4), method="nettrim")
    assert isinstance(found.factors, ElementFactors)
    assert found.factors.params <= np.count_nonzero(problem.weight)
    assert not found.factors.dense()[problem.weight == 0].any()
    check_guarantee(problem, 1e-4, found)


@pytest.mark.parametrize("method", NAMES)
def test_more_error_needs_no_more_parameters(method):
    problem = planted(12, rank=8)
    sizes = [solve(problem, Budget(gain=gain), method=method).factors.params for gain in (0.05, 0.1, 0.2, 0.4, 0.8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_the_rank_is_never_above_that_of_the_truncated_convex_solution():
    problem = make(13, out=14, d=30, n=120)
    for gain in (0.2, 0.4):
        here = on.region(problem, gain * on.size_of_responses(problem))
        weight = ddlr.relax(here.goal(), None, (20000, 1e-6)).last.weight
        root = ddlr.metric_root(here, on.strength_of(here, on.REGULAR))
        basis = ddlr.leading(weight @ root, 14)
        needed = next(r for r in range(1, 15) if on.admitted(here, ddlr.truncated(here, weight, basis[:, :r])))
        assert solve(problem, Budget(gain=gain), method="ddlr").factors.rank <= needed


def test_pruning_behind_the_convex_solution_pays():
    problem = planted(14, density=0.3)
    here = on.region(problem, 0.1 * on.size_of_responses(problem))
    relaxed = np.count_nonzero(nettrim.relax(here, None, (20000, 1e-6)).last.weight)
    assert solve(problem, Budget(gain=0.1), method="nettrim").factors.params < 0.9 * relaxed


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_the_projection_is_the_nearest_point_of_the_set(affine):
    problem = make(15, affine=affine)
    here = on.region(problem, 0.1 * on.size_of_responses(problem))
    rng = np.random.default_rng(0)
    response = here.target + 0.3 * rng.standard_normal(here.target.shape)
    nearest = here.nearest(response)
    assert here.parts(here.excess(nearest))[0] <= here.radius * (1 + 1e-12)
    assert here.parts(here.excess(nearest))[1] <= 1e-14
    np.testing.assert_allclose(here.nearest(nearest), nearest, atol=1e-13)
    for _ in range(30):  # the angle to every other point of the set is obtuse
        other = here.nearest(response + rng.standard_normal(response.shape))
        assert np.vdot(response - nearest, other - nearest) <= 1e-9


def test_the_best_bias_is_the_least_error_among_the_admitted():
    problem = make(16)
    here = on.region(problem, 0.5 * on.size_of_responses(problem))
    base = here.inputs @ np.random.default_rng(1).standard_normal((10, 15)).T
    best = here.best_bias(base)
    norm, outside = here.parts(here.excess(base + best))
    assert outside <= 1e-12
    for step in (-0.1, -1e-3, 1e-3, 0.1):
        inside, above = here.parts(here.excess(base + best + step))
        assert inside >= norm or above > 0


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize("method", NAMES)
def test_the_distance_never_rises(method, relu, cascade):
    problem = make(17, relu=relu, cascade=cascade, n=90)
    budget = Budget(rank=2, channels=0) if method == "ddlr" else Budget(rank=0, elements=40)
    found = solve(problem, budget, method=method, settings=Settings(steps=40))
    assert len(found.history) > 1
    assert (np.diff(found.history) <= 1e-9 * found.history[0]).all()


def test_a_block_power_step_lowers_the_distance_too(monkeypatch):
    monkeypatch.setattr(ddlr, "EXACT", 0)
    found = solve(make(18, n=90), Budget(rank=3, channels=0), method="ddlr", settings=Settings(steps=40))
    assert (np.diff(found.history) <= 1e-9 * found.history[0]).all()


def test_a_linear_rank_is_that_of_eckart_young():
    problem = make(19, relu=False, n=400)
    found = solve(problem, Budget(rank=3, channels=0), method="ddlr")
    x = problem.columns.inputs.astype(float)
    tail = np.linalg.svd((x - x.mean(0)) @ problem.weight.T, compute_uv=False)[3:]
    assert found.error == pytest.approx(np.linalg.norm(tail), rel=1e-5)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_a_budget_of_parameters_is_kept_and_used(affine):
    problem = planted(20, affine=affine)
    low = solve(problem, Budget(params=170), method="ddlr")
    assert (low.status, low.factors.rank, low.factors.params) == (Status.SOLVED, 4, 160)
    few = solve(problem, Budget(params=100), method="nettrim")
    assert (few.status, few.factors.rank, few.factors.params) == (Status.SOLVED, 0, 100)
    for found in (low, few):
        assert found.allowed is None
        assert found.error == pytest.approx(reached(problem, found.factors)[2], rel=1e-9)
        assert affine or not found.factors.bias_shift.any()


def test_a_planted_budget_is_solved():
    for budget, method, problem in (
        (Budget(rank=3, channels=0), "ddlr", planted(21, rank=3)),
        (Budget(rank=0, elements=77), "nettrim", planted(21, density=0.2)),
    ):
        sized = budget if budget.elements is None else Budget(rank=0, elements=np.count_nonzero(problem.weight))
        found = solve(problem, sized, method=method)
        assert found.error < 1e-3 * on.size_of_responses(problem)


def test_the_error_behind_relu_is_lower_than_that_of_the_linear_fit():
    problem = planted(22)
    linear = dataclasses.replace(problem, activation="linear")
    seen, blind = (solve(p, Budget(params=130), method="ddlr").factors for p in (problem, linear))
    assert reached(problem, seen)[2] < reached(problem, blind)[2]


def test_more_budget_is_better():
    problem = planted(23)
    for method in NAMES:
        errors = [solve(problem, Budget(params=p), method=method).error for p in (60, 120, 180, 240)]
        assert errors == sorted(errors, reverse=True)


def test_splits_that_a_method_does_not_know_are_infeasible():
    problem = make(24)
    for method, budget in (
        ("ddlr", Budget(rank=2, channels=1)),
        ("ddlr", Budget(rank=2, elements=5)),
        ("ddlr", Budget(params=24)),
        ("ddlr", Budget(rank=0, channels=0)),
        ("nettrim", Budget(rank=1, elements=5)),
        ("nettrim", Budget(rank=0, channels=2)),
        ("nettrim", Budget(params=0)),
    ):
        assert solve(problem, budget, method=method).status is Status.INFEASIBLE


@pytest.mark.parametrize("method", NAMES)
def test_candidates_cost_and_lose_what_they_say(method):
    problem = planted(25, n=800)
    checks = make(26, 16, 24, 500).columns
    problem = dataclasses.replace(problem, checks=checks)
    found = METHODS[method].candidates(problem, 2, Settings())
    assert 3 <= len(found) <= 8
    for candidate in found:
        factors = fit(problem, candidate, method, Settings(steps=6)).factors
        assert factors.params == candidate.params < problem.params
        assert candidate.rank % 2 == 0
        assert activation_error(problem, factors, checks) ** 2 == pytest.approx(candidate.loss, rel=0.3)
    front = curve(problem, method, 2)
    assert [c.loss for c in front] == sorted((c.loss for c in front), reverse=True)


@pytest.mark.parametrize("method", NAMES)
def test_other_columns_choose_between_iterates(method):
    problem = planted(27, n=40)
    checks = make(28, 16, 24, 400).columns
    alone = solve(problem, Budget(params=120), method=method).factors
    chosen = solve(dataclasses.replace(problem, checks=checks), Budget(params=120), method=method).factors
    other = dataclasses.replace(problem, columns=checks)
    assert reached(other, chosen)[2] <= reached(other, alone)[2] * (1 + 1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_without_columns_there_is_nothing_to_see(method):
    with pytest.raises(ValueError, match="columns"):
        solve(Problem(np.ones((3, 4))), Budget(params=5), method=method)
    with pytest.raises(ValueError, match="columns"):
        curve(Problem(np.ones((3, 4))), method, 1)


# --- invariants and degenerate problems -----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(gain=0.3), Budget(params=120)])
@pytest.mark.parametrize("method", NAMES)
def test_the_same_problem_gives_the_same_bits_and_is_not_changed(method, budget):
    one, two = make(30, 16, 24, 100), make(30, 16, 24, 100)
    first = solve(one, budget, method=method)
    second = solve(two, budget, method=method)
    np.testing.assert_array_equal(first.factors.dense(), second.factors.dense())
    np.testing.assert_array_equal(first.factors.bias_shift, second.factors.bias_shift)
    assert (first.history, first.error) == (second.history, second.error)
    untouched = make(30, 16, 24, 100)
    for a, b in ((one.weight, untouched.weight), (one.columns.inputs, untouched.columns.inputs)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", NAMES)
def test_scales_do_not_matter(method):
    """Powers of two, so that nothing is rounded: the same structure at any scale."""
    problem = planted(31, rank=4)
    plain = solve(problem, Budget(gain=0.3), method=method)
    scaled = dataclasses.replace(
        problem,
        weight=problem.weight * 2.0**40,
        bias=problem.bias * 2.0**10,
        columns=Columns(problem.columns.inputs * np.float32(2.0**-30)),
    )
    found = solve(scaled, Budget(gain=0.3), method=method)
    np.testing.assert_allclose(found.factors.dense(), plain.factors.dense() * 2.0**40, rtol=1e-6, atol=1e20 * 1e-14)


def degenerate():
    problem = make(32, 6, 10, 80)
    x, weight = problem.columns.inputs, problem.weight

    def of(inputs, w=weight, bias=None, **more):
        return Problem(w, bias=bias, activation="relu", columns=Columns(np.asarray(inputs, np.float32)), **more)

    singular = Moments(80, np.zeros(10), np.zeros((10, 10)))
    return {
        "zero weight": of(x, 0 * weight),
        "zero weight, positive bias": of(x, 0 * weight, np.ones(6)),
        "zero columns": of(0 * x),
        "dead columns": of(x * (np.arange(10) > 3)),
        "equal columns": of(x[:, [0, 1, 2, 3, 4] * 2]),
        "one row again and again": of(np.repeat(x[:1], 20, axis=0)),
        "never on": of(x, weight, np.full(6, -1e3)),
        "never on, fixed bias": of(x, weight, np.full(6, -1e3), affine=False),
        "always on": of(x, weight, np.full(6, 1e3)),
        "always on, fixed bias": of(x, weight, np.full(6, 1e3), affine=False),
        "one column of x": of(x[:1]),
        "fewer columns than features": of(x[:4]),
        "fixed bias": of(x, weight, np.ones(6), affine=False),
        "one output": of(x, weight[:1]),
        "one input": of(x[:, :1], weight[:, :1]),
        "one by one": of(x[:, :1], weight[:1, :1]),
        "tiny": of(1e-20 * x.astype(float), 1e-20 * weight),
        "huge": of(1e15 * x.astype(float), 1e15 * weight),
        "scales apart": of(x * np.logspace(-8, 8, 10)),
        "singular moments": of(x, moments=singular, validation=singular),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.filterwarnings("error")
def test_degenerate_problems_end_in_a_status_with_finite_answers(name, method):
    problem = degenerate()[name]
    assert all(np.isfinite(c.loss) for c in curve(problem, method, 1))
    size = np.linalg.norm(parts(problem)[1])
    for budget in (Budget(gain=0.0), Budget(gain=0.2), Budget(gain=1.5), Budget(params=2), Budget(params=30)):
        found = solve(problem, budget, method=method, settings=Settings(steps=200))
        if found.factors is None:
            assert found.status in (Status.DENSE, Status.INFEASIBLE)
            continue
        assert np.isfinite(found.factors.dense()).all()
        assert np.isfinite(found.factors.bias_shift).all()
        assert np.isfinite([found.objective, found.error]).all()
        if budget.gain is not None:
            norm, _, error = reached(problem, found.factors)
            assert norm <= budget.gain * size * (1 + 1e-9)
            assert error <= found.allowed * (1 + 1e-9)
            assert found.factors.params < problem.params
        else:
            assert found.factors.params <= budget.params


@pytest.mark.parametrize("method", NAMES)
def test_values_that_are_not_finite_are_a_status(method):
    problem = make(33)
    broken = problem.columns.inputs.copy()
    broken[0, 0] = np.nan
    found = solve(dataclasses.replace(problem, columns=Columns(broken)), Budget(gain=0.1), method=method)
    assert (found.status, found.factors) == (Status.NOT_FINITE, None)


def test_the_forms_are_what_they_say():
    problem = planted(34, rank=4)
    low = solve(problem, Budget(gain=0.2), method="ddlr").factors
    assert isinstance(low, Factors)
    assert (low.left.shape, low.right.shape) == ((16, low.rank), (low.rank, 24))
    assert (len(low.kept), low.sparse.shape, low.bias_shift.shape) == (0, (16, 0), (16,))
    few = solve(problem, Budget(gain=0.2), method="nettrim").factors
    assert (few.left.shape, few.right.shape, few.sparse.format) == ((16, 0), (0, 24), "csr")
    assert (few.sparse.data != 0).all()
