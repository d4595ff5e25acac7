"""Piecewise linear activations against their definitions, and what a layer gives behind one, scale and offset too."""

import dataclasses
import pickle

import numpy as np
import pytest

from onnx_lrs.solvers import METHODS, Budget, Problem, solve
from onnx_lrs.solvers.activation import LINEAR, RELU, Activation, clip, leaky_relu, named
from onnx_lrs.solvers.behind import (
    BLOCK,
    activation_error,
    argument,
    first,
    is_plain,
    plain,
    pre_activation,
    response_norm,
)
from onnx_lrs.solvers.problem import Columns, Factors

U = np.concatenate([np.linspace(-8, 8, 321), [0.0, -0.0, 6.0, 1e30, -1e30]])
DEFINITIONS = {
    "linear": (LINEAR, lambda u: u),
    "relu": (RELU, lambda u: np.maximum(u, 0)),
    "clip": (clip(0, 6), lambda u: np.minimum(np.maximum(u, 0), 6)),
    "clip, negative": (clip(-3, -1), lambda u: np.minimum(np.maximum(u, -3), -1)),
    "clip, above only": (clip(-np.inf, 2), lambda u: np.minimum(u, 2)),
    "clip, below only": (clip(-2, np.inf), lambda u: np.maximum(u, -2)),
    "clip, one value": (clip(1, 1), np.ones_like),
    "leaky-relu": (leaky_relu(0.1), lambda u: np.where(u < 0, 0.1 * u, u)),
    "leaky-relu, steep": (leaky_relu(3), lambda u: np.where(u < 0, 3 * u, u)),
    "relu, moved": (Activation("moved", (2.0,), (0.0, 1.0), (0.0, -2.0)), lambda u: np.maximum(u - 2, 0)),
    "no unit slope": (
        Activation("hard", (-3.0, 3.0), (0, 1 / 6, 0), (0, 0.5, 1)),
        lambda u: np.clip(u / 6 + 0.5, 0, 1),
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_are_those_of_the_definition(name, dtype):
    activation, definition = DEFINITIONS[name]
    values = U.astype(dtype).reshape(2, -1)
    before = values.copy()
    found = activation(values)
    assert (found.dtype, found.shape) == (dtype, values.shape)
    np.testing.assert_allclose(found, definition(values).astype(dtype), rtol=4 * np.finfo(dtype).eps, atol=1e-6)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_pieces_are_the_function(name):
    activation, definition = DEFINITIONS[name]
    pieces = list(activation.pieces())
    assert (pieces[0].low, pieces[-1].high) == (-np.inf, np.inf)
    assert [p.high for p in pieces[:-1]] == [p.low for p in pieces[1:]] == list(activation.breaks)
    for piece in pieces:
        inside = U[(piece.low <= U) & (piece.high >= U)]
        assert inside.size
        np.testing.assert_allclose(piece.slope * inside + piece.intercept, definition(inside), rtol=1e-12, atol=1e-12)


def test_one_function_has_one_form_and_name():
    assert clip(0, np.inf) == clip(-0.0, np.inf) == leaky_relu(0) == RELU
    assert clip(-np.inf, np.inf) == leaky_relu(1) == LINEAR
    assert clip(np.float32(0), np.float32(6)) == clip(0, 6)
    names = [a.name for a in (LINEAR, RELU, clip(0, 6), leaky_relu(0.1))]
    assert names == ["linear", "relu", "clip", "leaky-relu"]
    assert len({LINEAR, RELU, clip(0, 6), clip(0, 5), leaky_relu(0.1), leaky_relu(0.2)}) == 6
    assert pickle.loads(pickle.dumps(clip(0, 6))) == clip(0, 6)


def test_the_identity_copies_nothing():
    assert LINEAR(U) is U


@pytest.mark.parametrize("limits", [(1, 0), (np.nan, 1), (0, np.nan), (np.inf, np.inf), (-np.inf, -np.inf)])
def test_limits_without_a_number_between_them_are_refused(limits):
    with pytest.raises(ValueError, match="between the limits"):
        clip(*limits)


@pytest.mark.parametrize("slope", [-0.1, np.inf, np.nan])
def test_a_slope_that_is_not_monotone_is_refused(slope):
    with pytest.raises(ValueError, match="slope"):
        leaky_relu(slope)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (((0.0,), (1.0,), (0.0,)), "one more slope"),
        (((), (1.0,), (0.0, 1.0)), "one more slope"),
        (((1.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)), "rise"),
        (((0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)), "rise"),
        (((1.0,), (0.0, 1.0), (0.0, 0.0)), "meet at 1"),
        (((np.inf,), (0.0, 1.0), (0.0, 0.0)), "finite"),
    ],
)
def test_what_is_no_continuous_function_is_refused(parts, match):
    with pytest.raises(ValueError, match=match):
        Activation("odd", *parts)


def test_a_problem_takes_two_names():
    weight = np.eye(2)
    assert Problem(weight).activation is LINEAR
    assert Problem(weight, activation="linear").activation is LINEAR
    assert Problem(weight, activation="relu").activation is RELU is named(RELU)
    assert Problem(weight, activation=clip(0, 6)).activation == clip(0, 6)
    with pytest.raises(ValueError, match="'clip'"):
        Problem(weight, activation="clip")


# --- scale and offset -----------------------------------------------------------------------------------------------


def material(activation, n=200, out=5, d=12, scaled=True, moved=True, given=False):
    """Return a problem with scale and offset where they are wanted, and factors that are off."""
    rng = np.random.default_rng([n, out, d])
    x, offset, outputs = (rng.standard_normal((n, size)).astype("f4") for size in (d, out, out))
    weight, bias, scale = rng.standard_normal((out, d)), rng.standard_normal(out), rng.standard_normal(out)
    columns = Columns(x, 3 * outputs if given else None, offset if moved else None)
    problem = Problem(
        weight, bias=bias, activation=activation, columns=columns, checks=columns, scale=scale if scaled else None
    )
    left, right = rng.standard_normal((out, 2)), rng.standard_normal((2, d))
    return problem, Factors(left, right, np.zeros(0, np.int64), np.zeros((out, 0)), rng.standard_normal(out), 1)


@pytest.mark.parametrize("n", [7, 2 * BLOCK + 5])
@pytest.mark.parametrize(("scaled", "moved"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["linear", "relu", "clip", "leaky-relu"])
def test_errors_and_norms_behind_scale_offset_and_activation(name, given, scaled, moved, n):
    activation, phi = DEFINITIONS[name]
    problem, factors = material(activation, n, scaled=scaled, moved=moved, given=given)
    x = problem.columns.inputs.astype(float)
    target = problem.columns.outputs if given else x @ problem.weight.T + problem.bias
    near = x @ (factors.left @ factors.right).T + problem.bias + factors.bias_shift
    scale, offset = problem.scale if scaled else 1.0, problem.columns.offset if moved else 0.0
    exact, found = phi(scale * target + offset), phi(scale * near + offset)
    np.testing.assert_allclose(pre_activation(problem, problem.columns), target, rtol=1e-5, atol=1e-5)
    error = np.linalg.norm(exact - found) / np.linalg.norm(exact)
    assert activation_error(problem, factors, problem.columns) == pytest.approx(error, rel=1e-5)
    assert response_norm(problem, problem.columns) == pytest.approx(np.linalg.norm(exact), rel=1e-5)


def test_the_argument_of_the_activation():
    problem, _ = material(RELU)
    columns = problem.columns
    values = pre_activation(problem, columns)
    before = values.copy()
    found = argument(problem, values, columns)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, problem.scale * values + columns.offset, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values, before)
    bare, _ = material(RELU, scaled=False, moved=False)
    assert argument(bare, values, bare.columns) is values


def test_the_first_columns_keep_their_own_offset():
    problem, _ = material(RELU, given=True)
    some = first(problem.columns, 3)
    for name in ("inputs", "outputs", "offset"):
        np.testing.assert_array_equal(getattr(some, name), getattr(problem.columns, name)[:3])
    assert first(Columns(problem.columns.inputs), 3).offset is None


@pytest.mark.parametrize("shape", [(200, 4), (199, 5), (5,), (200, 1)])
def test_an_offset_of_another_shape_is_refused(shape):
    problem, _ = material(RELU)
    odd = dataclasses.replace(problem.columns, offset=np.zeros(shape, "f4"))
    for changes in ({"columns": odd}, {"checks": odd}):
        with pytest.raises(ValueError, match="offset of shape"):
            dataclasses.replace(problem, **changes)


@pytest.mark.parametrize("shape", [(4,), (5, 1), ()])
def test_a_scale_of_another_shape_is_refused(shape):
    problem, _ = material(RELU)
    with pytest.raises(ValueError, match="scale of shape"):
        dataclasses.replace(problem, scale=np.ones(shape))


def test_scale_and_offset_must_be_finite():
    problem, _ = material(RELU)
    offset = problem.columns.offset.copy()
    offset[3, 2] = np.nan
    odd = dataclasses.replace(problem.columns, offset=offset)
    assert problem.finite
    assert not dataclasses.replace(problem, scale=np.array([1, 1, np.inf, 1, 1])).finite
    assert not dataclasses.replace(problem, columns=odd).finite
    assert not dataclasses.replace(problem, checks=odd).finite


# --- methods that know a ReLU right behind the layer and nothing else ----------------------------------------------


def unlike_relu():
    """Yield problems that only look alike to a method that sees ``W x + b`` and a ReLU."""
    rest = {"n": 60, "out": 8, "d": 14}
    bare, _ = material(LINEAR, scaled=False, moved=False, **rest)
    yield bare, dataclasses.replace(bare, activation=clip(0, 6))
    yield bare, dataclasses.replace(bare, activation=leaky_relu(0.1))
    yield bare, material(RELU, moved=False, **rest)[0]
    yield bare, material(RELU, scaled=False, **rest)[0]
    yield bare, dataclasses.replace(bare, activation=RELU, checks=material(RELU, **rest)[0].checks)


@pytest.mark.parametrize("budget", [Budget(params=80), Budget(gain=0.5)], ids=["params", "gain"])
@pytest.mark.parametrize("method", METHODS)
def test_every_other_activation_is_fitted_as_linear(method, budget):
    if budget.gain and METHODS[method].within_error is None:
        pytest.skip("guarantees nothing")
    for linear, other in unlike_relu():
        expected, found = (solve(problem, budget, method=method) for problem in (linear, other))
        np.testing.assert_array_equal(found.factors.dense(), expected.factors.dense())
        np.testing.assert_array_equal(found.factors.bias_shift, expected.factors.bias_shift)
        assert (found.allowed, found.error) == (expected.allowed, expected.error)


def test_what_is_plain():
    for linear, other in unlike_relu():
        assert is_plain(linear)
        assert plain(linear) is linear
        assert not is_plain(other)
        seen = plain(other)
        assert is_plain(seen)
        assert (seen.activation, seen.scale) == (LINEAR, None)
        assert seen.columns.inputs is other.columns.inputs
    relu = dataclasses.replace(linear, activation=RELU)
    assert plain(relu) is relu
