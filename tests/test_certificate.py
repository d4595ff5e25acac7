"""The bound of a chain's error: against composed networks, and a chain that attains it."""

import dataclasses
import itertools

import numpy as np
import pytest

from onnx_lrs.solvers import Budget, Columns, Problem, Status, solve
from onnx_lrs.solvers.activation import RELU
from onnx_lrs.solvers.certificate import Link, bound, chain, link, spectral_norm


def layers_of(seed, widths=(12, 16, 14, 10), n=150):
    """A chain of layers as problems on the ORIGINAL network's inputs; the last one linear."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, widths[0])).astype(np.float32)
    found = []
    for d, out in itertools.pairwise(widths):
        weight, bias = rng.standard_normal((out, d)) / np.sqrt(d), 0.3 * rng.standard_normal(out)
        activation = "linear" if out == widths[-1] else "relu"
        found.append(Problem(weight, bias=bias, activation=activation, columns=Columns(a)))
        a = np.maximum(a @ weight.T + bias, 0).astype(np.float32)
    return found


def forward(problems, factors, a):
    for problem, found in zip(problems, factors, strict=True):
        weight, bias = problem.weight, problem.bias
        if found is not None:
            weight, bias = found.dense(), bias + found.bias_shift
        a = a @ weight.T + bias
        a = np.maximum(a, 0) if problem.activation == RELU else a
    return a


@pytest.mark.parametrize("method", ["ddlr", "nettrim"])
@pytest.mark.parametrize("seed", range(3))
def test_the_composed_network_keeps_to_the_bound(method, seed):
    problems = layers_of(seed)
    solutions = [solve(p, Budget(gain=0.2), method=method) for p in problems]
    assert any(s.factors is not None for s in solutions)
    factors = [s.factors for s in solutions]
    x = problems[0].columns.inputs.astype(float)
    error = np.linalg.norm(forward(problems, factors, x) - forward(problems, [None] * 3, x))
    found = chain(["a", "b", "c"], solutions, [p.weight for p in problems])
    assert 0 < error <= found.reached * (1 + 1e-5) <= found.allowed * (1 + 1e-5)  # inputs are stored in float32


def test_one_link_in_the_positive_orthant_attains_it():
    """Nothing is clipped, so the error of the chain is that of its one link."""
    rng = np.random.default_rng(7)
    x = rng.random((200, 20)).astype(np.float32)
    weight = rng.random((10, 4)) @ rng.random((4, 20)) + 0.05 * rng.random((10, 20))
    problem = Problem(weight, bias=np.ones(10), activation="relu", columns=Columns(x))
    solution = solve(problem, Budget(gain=0.02), method="ddlr")
    assert solution.status is Status.SOLVED
    found = chain(["only"], [solution], [weight])
    x64 = x.astype(float)
    error = np.linalg.norm(forward([problem], [solution.factors], x64) - forward([problem], [None], x64))
    assert found.reached == pytest.approx(error, rel=1e-9)
    assert found.allowed == solution.allowed == pytest.approx(0.02 * np.linalg.norm(x64 @ weight.T + 1), rel=1e-9)


def test_links_add_up():
    links = [Link("a", 2.0, 1.0, 9.0), Link("b", 3.0, 2.0, 4.0), Link("c", 5.0, 4.0, 0.5)]
    assert bound(links).allowed == 5.0 + 0.5 * (3.0 + 4.0 * 2.0)
    assert bound(links).reached == 4.0 + 0.5 * (2.0 + 4.0 * 1.0)
    assert bound([]).allowed == 0.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_the_spectral_norm_is_that_of_the_svd_and_never_less(shape, scale):
    weight = scale * np.random.default_rng(8).standard_normal(shape)
    exact = np.linalg.svd(weight, compute_uv=False)[0]
    assert exact <= spectral_norm(weight) <= exact * (1 + 1e-10)
    assert spectral_norm(0 * weight) == 0.0


def test_a_layer_without_a_guarantee_has_no_link():
    problem = layers_of(9)[0]
    solution = solve(problem, Budget(params=100), method="ddlr")
    with pytest.raises(ValueError, match="guarantees no error"):
        link("a", solution, problem.weight)
    kept = dataclasses.replace(solution, factors=None, status=Status.DENSE)
    assert link("a", kept, problem.weight).allowed == 0.0
