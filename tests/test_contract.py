"""What every method keeps to, whatever it is: one contract over all of METHODS, on ordinary and on degenerate problems.

A method that is added to METHODS is tested here without a word; what it may refuse is said by its own record
(``needs_columns``, ``within_error``).
"""

import copy
import dataclasses
import itertools

import numpy as np
import pytest

from onnx_lrs.solvers import Budget, Factors, Moments, Problem, Settings, Solution, Status, curve, fit, objective, solve
from onnx_lrs.solvers.activation import RELU
from onnx_lrs.solvers.method import definite
from onnx_lrs.solvers.moments import moments_of
from onnx_lrs.solvers.problem import Candidate, Columns
from onnx_lrs.solvers.solve import METHODS

NAMES = sorted(METHODS)
GUARANTEED = [name for name in NAMES if METHODS[name].within_error is not None]
WITHOUT_FACTORS = {Status.INFEASIBLE, Status.DENSE, Status.NOT_FINITE, Status.ERROR_TOO_SMALL}
FITTED = set(Status) - WITHOUT_FACTORS
QUICK = Settings(steps=30)
SHAPES = {"wide": (6, 10, 1), "tall": (14, 8, 1), "taps": (8, 5, 3)}  # outputs, channels, taps

pytestmark = pytest.mark.filterwarnings("error")


# --- material -------------------------------------------------------------------------------------------------------


def of_columns(weight, x, z, taps=1, **changes):
    """A problem in which everything comes from columns x (fit) and z (choice)."""
    x, z = x.astype(np.float32), z.astype(np.float32)
    given = {"bias": np.linspace(-1, 1, len(weight)), "activation": "relu", **changes}
    return Problem(weight, taps, moments_of(x), moments_of(z), columns=Columns(x), checks=Columns(z), **given)


def make(shape="wide", seed=0, n=120, **changes):
    out, channels, taps = SHAPES[shape]
    rng = np.random.default_rng([seed, out])
    d = channels * taps
    mixing = rng.standard_normal((d, d)) * 0.9 ** np.arange(d)[:, None]
    x = rng.standard_normal((2 * n, d)) @ mixing + 0.5
    return of_columns(rng.standard_normal((out, d)), x[:n], x[n:], taps, **changes)


def arrays_of(record):
    """Return every array below a record, in a fixed order."""
    if isinstance(record, np.ndarray):
        return [record]
    if hasattr(record, "nnz"):
        return [record.data, record.indices, record.indptr]
    if dataclasses.is_dataclass(record):
        return [a for field in dataclasses.fields(record) for a in arrays_of(getattr(record, field.name))]
    return []


def same_bits(a, b):
    ours, theirs = arrays_of(a), arrays_of(b)
    return len(ours) == len(theirs) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(ours, theirs, strict=True)
    )


def check(problem, budget, found):
    """What holds for every answer."""
    assert isinstance(found, Solution)
    assert (found.factors is None) == (found.status in WITHOUT_FACTORS)
    assert np.isfinite(found.history).all()
    assert np.isfinite(found.residuals).all()
    assert all(len(pair) == 2 for pair in found.residuals)
    if found.factors is None:
        return
    factors = found.factors
    assert all(np.isfinite(a).all() for a in arrays_of(factors))
    assert factors.dense().shape == problem.weight.shape
    assert factors.bias_shift.shape == (problem.out,)
    assert problem.affine or not factors.bias_shift.any()
    used = [problem, definite(problem)]  # statistics that are no moments: their nearest ones may have been used
    values = [objective(problem.weight, factors.dense(), p.moments, problem.affine) for p in used]
    assert found.objective in values if found.status is Status.SINGULAR else found.objective == values[0]
    if budget.params is not None:
        assert factors.params <= budget.params < problem.params
    if isinstance(factors, Factors):
        assert factors.left.shape == (problem.out, factors.rank)
        assert factors.right.shape == (factors.rank, problem.d)
        assert factors.sparse.shape == (problem.out, len(factors.kept) * problem.taps)
        assert (np.diff(factors.kept) > 0).all()
        assert set(factors.kept) <= set(range(problem.channels))
        assert {a.dtype for a in arrays_of(factors)} <= {np.dtype(np.float64), np.dtype(np.int64)}
        if budget.gain is None:
            assert factors.rank % budget.multiple == 0
            assert len(factors.kept) % budget.multiple == 0


def solved(problem, budget, name, settings=QUICK):
    found = solve(problem, budget, method=name, settings=settings)
    check(problem, budget, found)
    return found


# --- ordinary problems ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_holds_and_the_answer_is_whole(name, shape, activation, affine):
    problem = make(shape, activation=activation, affine=affine)
    reached = []
    for share in (0.4, 0.6, 0.9):
        found = solved(problem, Budget(params=int(share * problem.params)), name)
        assert found.status in FITTED
        reached.append(found.objective)
    nothing = objective(problem.weight, 0 * problem.weight, problem.moments, affine)
    assert min(reached) < nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("multiple", [2, 4])
def test_ranks_and_channels_are_multiples(name, multiple):
    problem = make("tall")
    for share in (0.8, 0.9):
        assert solved(problem, Budget(params=int(share * problem.params), multiple=multiple), name).status in FITTED


@pytest.mark.parametrize("name", NAMES)
def test_the_same_problem_gives_the_same_bits_and_is_not_changed(name):
    problem, budget = make("taps"), Budget(params=60)
    before = copy.deepcopy(problem)
    first = solved(problem, budget, name)
    assert same_bits(problem, before)
    again = solved(before, budget, name)
    assert same_bits(first.factors, again.factors)
    assert dataclasses.replace(first, factors=None) == dataclasses.replace(again, factors=None)


@pytest.mark.parametrize("name", NAMES)
def test_the_method_called_is_the_method_solved_and_settings_may_be_left_out(name):
    problem, budget = make(), Budget(params=35)
    called = METHODS[name](problem, budget)
    assert same_bits(called.factors, solve(problem, budget, method=name).factors)
    check(problem, budget, called)


@pytest.mark.parametrize("name", NAMES)
def test_float32_weights_and_float64_columns(name):
    problem, budget = make(), Budget(params=35)
    narrow = dataclasses.replace(problem, weight=problem.weight.astype(np.float32))
    rounded = dataclasses.replace(problem, weight=problem.weight.astype(np.float32).astype(np.float64))
    assert same_bits(solved(narrow, budget, name).factors, solved(rounded, budget, name).factors)
    wide = dataclasses.replace(
        problem,
        columns=Columns(problem.columns.inputs.astype(np.float64)),
        checks=Columns(problem.checks.inputs.astype(np.float64)),
    )
    found = solved(wide, budget, name)
    assert found.status in FITTED
    assert found.objective == pytest.approx(solved(problem, budget, name).objective, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_the_original_network(name):
    problem = make("tall")
    rng = np.random.default_rng(9)
    given = [
        Columns(c.inputs, (c.inputs @ problem.weight.T + rng.standard_normal((len(c.inputs), 14))).astype(np.float32))
        for c in (problem.columns, problem.checks)
    ]
    assert (
        solved(dataclasses.replace(problem, columns=given[0], checks=given[1]), Budget(params=60), name).status
        in FITTED
    )


@pytest.mark.parametrize("without", ["checks", "validation", "bias", "moments", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_what_may_be_left_out(name, without):
    everything = ("checks", "validation", "bias", "moments")
    left = dataclasses.replace(make(), **dict.fromkeys(everything if without == "all" else (without,)))
    found = solve(left, Budget(params=35), method=name, settings=QUICK)
    assert found.status in FITTED
    assert found.factors.params <= 35
    assert np.isfinite(found.objective)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_needs_columns_says_so_and_others_do_without(name):
    problem = dataclasses.replace(make(), columns=None)
    if not METHODS[name].needs_columns:
        assert solved(problem, Budget(params=35), name).status in FITTED
        return
    with pytest.raises(ValueError, match="needs sampled columns"):
        solve(problem, Budget(params=35), method=name)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_can_be_fitted_and_cost_what_they_say(name):
    problem = make("tall")
    found = curve(problem, name, 2, QUICK)
    assert found
    assert all(isinstance(c, Candidate) and np.isfinite(c.loss) and c.loss >= 0 for c in found)
    assert [c.params for c in found] == sorted({c.params for c in found})
    assert all(a.loss > b.loss for a, b in itertools.pairwise(found))
    for candidate in (found[0], found[-1]):
        factors = fit(problem, candidate, name, QUICK).factors
        assert factors.params <= candidate.params < problem.params


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_the_layer_is_dense_and_none_is_infeasible(name):
    problem = make()
    for params in (problem.params, 10 * problem.params):
        assert solved(problem, Budget(params=params), name).status is Status.DENSE
    for params in (0, 1):
        found = solved(problem, Budget(params=params), name)
        assert found.status is Status.INFEASIBLE or found.factors.params <= params


@pytest.mark.parametrize("name", NAMES)
def test_more_rank_than_there_is(name):
    """A method that takes this split says so; one that cannot says that too."""
    problem = make("tall")
    found = solved(problem, Budget(rank=50, channels=0), name)
    assert found.status in (Status.RANK_TOO_LARGE, Status.INFEASIBLE)
    if found.status is Status.RANK_TOO_LARGE:
        assert found.factors.rank <= 8
        assert found.factors.params < problem.params
    assert name not in ("lrs", "hsvd", "svd", "admm") or found.status is Status.RANK_TOO_LARGE


@pytest.mark.parametrize("name", ["lrs", "admm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_methods_with_both_parts_take_any_split(name, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 40)) + 0.5
    problem = of_columns(rng.standard_normal((30, 40)), x[:200], x[200:])
    for rank, channels in itertools.product((0, 3, 5), (0, 1, 7, 17)):
        if rank + channels:
            found = solved(problem, Budget(rank=rank, channels=channels), name)
            assert found.status in FITTED
            assert (found.factors.rank, len(found.factors.kept)) == (rank, channels)


@pytest.mark.parametrize("name", ["lrs", "admm"])
@pytest.mark.parametrize("where", ["zero weight", "dead channel", "equal columns", "constant input", "one sample"])
def test_a_split_is_taken_where_channels_are_worth_nothing(name, where):
    for channels in (4, 9):
        found = solved(DEGENERATE[where], Budget(rank=0, channels=channels), name)
        assert (found.factors.rank, len(found.factors.kept)) == (0, channels)


# --- guaranteed errors ----------------------------------------------------------------------------------------------


def reached_behind(problem, factors):
    """||phi(y) - phi(y')|| and ||phi(y)|| over the columns, in float64."""
    x = problem.columns.inputs.astype(np.float64)
    exact = x @ problem.weight.T + problem.bias
    near = x @ factors.dense().T + problem.bias + factors.bias_shift
    if problem.activation == RELU:
        exact, near = np.maximum(exact, 0), np.maximum(near, 0)
    return np.linalg.norm(exact - near), np.linalg.norm(exact)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("gain", [0.05, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_kept_to_or_refused(name, gain, activation, affine):
    problem = make("taps", activation=activation, affine=affine)
    if name not in GUARANTEED:
        with pytest.raises(ValueError, match="guarantees no error"):
            solve(problem, Budget(gain=gain), method=name)
        return
    found = solve(problem, Budget(gain=gain), method=name)
    check(problem, Budget(gain=gain), found)
    if found.factors is None:  # the smallest factors that keep to a small error may be as large as the layer
        assert found.status in (Status.ERROR_TOO_SMALL, Status.DENSE)
        assert gain < 0.1
        return
    error, size = reached_behind(problem, found.factors)
    assert found.allowed == pytest.approx(gain * size, rel=1e-6)
    assert found.error <= found.allowed
    assert error <= found.allowed * (1 + 1e-9)
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-9 * size)


# --- values that are not finite -------------------------------------------------------------------------------------


def damaged(value):
    good = make()

    def broken(array):
        array = array.copy()
        array.flat[0] = value
        return array

    def moments(m):
        return {
            "mean": dataclasses.replace(m, mean=broken(m.mean)),
            "cov": dataclasses.replace(m, cov=broken(m.cov)),
        }

    found = {"weight": {"weight": broken(good.weight)}, "bias": {"bias": broken(good.bias)}}
    for name in ("moments", "validation"):
        found |= {f"{name} {k}": {name: m} for k, m in moments(getattr(good, name)).items()}
    for name in ("columns", "checks"):
        inputs = getattr(good, name).inputs
        outputs = np.zeros((len(inputs), good.out), np.float32)
        found[name] = {name: Columns(broken(inputs))}
        found[f"outputs of {name}"] = {name: Columns(inputs, broken(outputs))}
    return {k: dataclasses.replace(good, **change) for k, change in found.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite_are_a_status(name, value):
    budgets = [Budget(params=35), *([Budget(gain=0.1)] if name in GUARANTEED else [])]
    for where, problem in damaged(value).items():
        for budget in budgets:
            found = solve(problem, budget, method=name, settings=QUICK)
            assert (found.status, found.factors) == (Status.NOT_FINITE, None), where
        assert curve(problem, name, 1) == [], where


# --- degenerate problems --------------------------------------------------------------------------------------------


def degenerate():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((6, 10))
    x, z = rng.standard_normal((2, 80, 10)) @ (rng.standard_normal((10, 10)) * 0.9 ** np.arange(10)[:, None]) + 0.5
    twins = [0, 1, 2, 3, 4] * 2
    alive = np.arange(10) >= 2
    tall = rng.standard_normal((14, 4))
    narrow_x, narrow_z = rng.standard_normal((2, 80, 4))
    return {
        "zero weight": of_columns(0 * weight, x, z),
        "zero weight and bias": of_columns(0 * weight, x, z, bias=None),
        "dead channel": of_columns(weight, x * alive, z * alive),
        "dead channel of two taps": of_columns(weight, x * alive, z * alive, 2),
        "dead only where it is fitted": of_columns(weight, x * alive, z),
        "equal columns": of_columns(weight, x[:, twins], z[:, twins]),
        "equal columns of equal weight": of_columns(np.tile(weight[:, :5], 2), x[:, twins], z[:, twins]),
        "constant input": of_columns(weight, 0 * x + 3, 0 * z + 3),
        "constant input, uncentred": of_columns(weight, 0 * x + 3, 0 * z + 3, affine=False),
        "zero input": of_columns(weight, 0 * x, 0 * z),
        "zero input, uncentred": of_columns(weight, 0 * x, 0 * z, affine=False),
        "one sample": of_columns(weight, x[:1], z[:1]),
        "one sample, uncentred": of_columns(weight, x[:1], z[:1], affine=False),
        "fewer columns than features": of_columns(weight, x[:4], z[:4]),
        "all off": of_columns(weight, x, z, bias=np.full(6, -1e3)),
        "all off, no shift": of_columns(weight, x, z, bias=np.full(6, -1e3), affine=False),
        "all on": of_columns(weight, x, z, bias=np.full(6, 1e3)),
        "one output off": of_columns(weight, x, z, bias=np.array([-1e3, 0, 0, 0, 0, 0])),
        "rank-one weight": of_columns(np.outer(weight[:, 0], weight[0]), x, z),
        "huge": of_columns(1e15 * weight, 1e10 * x, 1e10 * z, bias=np.full(6, 1e24)),
        "tiny": of_columns(1e-12 * weight, 1e-10 * x, 1e-10 * z, bias=np.full(6, 1e-22)),
        "scales apart": of_columns(weight, x * np.logspace(-6, 6, 10), z * np.logspace(-6, 6, 10)),
        "large mean": of_columns(weight, x + 1e4, z + 1e4),
        "one output": of_columns(weight[:1], x, z),
        "one channel": of_columns(weight, x, z, 10),
        "one channel of one tap": of_columns(weight[:, :1], x[:, :1], z[:, :1]),
        "tall": of_columns(tall, narrow_x, narrow_z),
        "tall, two taps": of_columns(tall, narrow_x, narrow_z, 2),
        "indefinite moments": dataclasses.replace(
            of_columns(weight, x, z), moments=Moments(80, np.zeros(10), np.diag([-3.0, *range(1, 10)]))
        ),
    }


DEGENERATE = degenerate()
UNSPLITTABLE = ("one output", "one channel", "one channel of one tap", "tall, two taps")


@pytest.mark.parametrize("where", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_problems_are_solved_or_a_status(name, where):
    problem = DEGENERATE[where]
    before = copy.deepcopy(problem)
    for share, activation in itertools.product((0.45, 0.8), ("relu", "linear")):
        here = dataclasses.replace(problem, activation=activation)
        found = solved(here, Budget(params=int(share * problem.params)), name)
        assert found.status in FITTED or (found.status is Status.INFEASIBLE and where in UNSPLITTABLE)
    for candidate in curve(problem, name, 1, QUICK):
        assert np.isfinite(candidate.loss)
        assert 0 < candidate.params < problem.params
    assert same_bits(problem, before)


@pytest.mark.parametrize("where", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_problems_keep_to_an_error_or_say_why_not(name, where):
    problem = DEGENERATE[where]
    if name not in GUARANTEED:
        with pytest.raises(ValueError, match="guarantees no error"):
            solve(problem, Budget(gain=0.2), method=name)
        return
    found = solve(problem, Budget(gain=0.2), method=name, settings=QUICK)
    check(problem, Budget(gain=0.2), found)
    if found.factors is not None:
        assert found.error <= found.allowed
