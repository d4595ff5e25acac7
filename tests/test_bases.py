"""What eight bits make of weights and the tensor between them: against ONNX Runtime's own integers and simulation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lrs.graph.linear import Link, links, products, turned, with_biases
from onnx_lrs.runtime.quantise import Recipe, stand_in_ranges, to_int8
from onnx_lrs.solvers.rounding import Pair, best_turn, rounded
from tests.builders import layout, make, node, normal, run

CONV = [
    node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
    node("Conv", ["a", "w2", "b2"], ["y"], "second", pads=[1] * 4),
]
GEMM = [node("Gemm", ["x", "w1", "b1"], ["a"], transB=1), node("Gemm", ["a", "w2"], ["y"])]
RIGHT = [node("MatMul", ["x", "w1"], ["a"]), node("MatMul", ["a", "w2"], ["y"])]
LEFT = [node("MatMul", ["w1", "x"], ["a"]), node("MatMul", ["w2", "a"], ["y"])]
MIXED = [node("Gemm", ["x", "w1", "b1"], ["a"], transB=1), node("MatMul", ["a", "w2"], ["y"])]
CHAINS = {
    "conv": (CONV, [2, 6, 5, 5], {"w1": (8, 6, 3, 3), "w2": (7, 8, 3, 3), "b2": (7,)}),
    "gemm": (GEMM, [4, 6], {"w1": (8, 6), "b1": (8,), "w2": (8, 7)}),
    "right": (RIGHT, [2, 3, 6], {"w1": (6, 8), "w2": (8, 7)}),
    "left": (LEFT, [2, 6, 3], {"w1": (8, 6), "w2": (7, 8)}),
    "mixed": (MIXED, [4, 6], {"w1": (8, 6), "b1": (8,), "w2": (8, 7)}),
}


def chain(kind: str) -> onnx.ModelProto:
    nodes, shape, constants = CHAINS[kind]
    return make(nodes, {"x": shape}, ["y"], {name: normal(*sizes) for name, sizes in constants.items()})


def found_links(model: onnx.ModelProto) -> list[Link]:
    return links(model, products(model))


# ---------------------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize(
    ("op", "flags", "axis"), [("Conv", {}, 0), ("Gemm", {"transB": 1}, 0), ("Gemm", {"transB": 0}, 1)]
)
def test_rounded_weights_are_those_that_onnxruntime_stores(op, flags, axis):
    matrix = normal(9, 12) * np.logspace(-3, 2, 9)[:, None]
    weight = layout(op, matrix, (1, 3), **flags)
    attributes = {} if op == "Conv" else flags
    shape = [1, 4, 1, 3] if op == "Conv" else [1, 12]
    model = make([node(op, ["x", "w"], ["y"], **attributes)], {"x": shape}, ["y"], {"w": weight})
    stored = {
        t.name: numpy_helper.to_array(t) for t in to_int8(model, stand_in_ranges(model), Recipe()).graph.initializer
    }
    integers, scale = stored["w_quantized"], stored["w_scale"]
    assert integers.dtype == np.int8
    sizes = [-1 if i == axis else 1 for i in range(weight.ndim)]
    expected = integers.astype(np.float64) * scale.reshape(sizes)
    np.testing.assert_allclose(rounded(weight, axis), expected, rtol=1e-6)


def test_a_row_of_zeros_stays_zero():
    weight = np.zeros((2, 3))
    weight[0] = 1, -2, 127
    np.testing.assert_array_equal(rounded(weight, 0), weight)


# ------------------------------------------------------------------------------------------------------ noise and bases


def a_pair(seed: int = 0, spread: float = 0.0) -> tuple[Pair, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4096, 24))
    first, second = rng.standard_normal((12, 24)), rng.standard_normal((16, 12, 1))
    first *= np.logspace(0, spread, 12)[:, None]
    return Pair(x @ first.T, first, second, float(np.square(x).sum(axis=1).mean())), x


def simulated(pair: Pair, x: np.ndarray, turn: np.ndarray) -> float:
    """The mean square of what rounding changes, by rounding."""
    first, second = turn @ pair.first, (pair.second[:, :, 0] @ np.linalg.inv(turn))
    z = x @ rounded(first, 0).T
    exact = x @ first.T
    step = (max(exact.max(), 0.0) - min(exact.min(), 0.0)) / 255
    z = np.rint(z / step) * step
    return float(np.square(z @ rounded(second, 0).T - x @ pair.first.T @ pair.second[:, :, 0].T).sum(axis=1).mean())


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_the_noise_is_what_rounding_makes(spread):
    pair, x = a_pair(spread=spread)
    turn = np.linalg.qr(normal(12, 12))[0].astype(np.float64)
    for basis in (np.eye(12), turn):
        assert pair.noise(basis) == pytest.approx(simulated(pair, x, basis), rel=0.25)


def test_the_best_basis_makes_much_less_of_it_where_channels_differ_in_size():
    pair, x = a_pair(spread=3.0)
    turn, least, given = best_turn(pair)
    assert turn is not None
    assert least == pytest.approx(pair.noise(turn))
    assert least < 0.2 * given
    assert simulated(pair, x, turn) < 0.25 * simulated(pair, x, np.eye(12))


@pytest.mark.parametrize("seed", range(3))
def test_no_basis_is_chosen_that_is_worse(seed):
    pair, _ = a_pair(seed, spread=float(seed))
    _, least, given = best_turn(pair)
    assert least <= given


def test_a_dead_channel_is_no_obstacle():
    pair, _ = a_pair()
    pair.between[:, 3], pair.first[3] = 0.0, 0.0
    turn, least, _ = best_turn(pair)
    assert np.isfinite(least)
    assert turn is None or np.isfinite(np.linalg.inv(turn)).all()


# -------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("kind", CHAINS)
def test_any_matrix_may_stand_between_two_products(kind):
    model = chain(kind)
    (pair,) = found_links(model)
    assert pair.between == "a"
    turn = np.linalg.qr(normal(8, 8))[0] @ np.diag(np.logspace(-1, 1, 8))
    changed = turned(model, [pair], {"a": turn})
    assert changed != model
    np.testing.assert_allclose(run(changed)[0], run(model)[0], rtol=1e-4, atol=1e-4)
    assert [n.op_type for n in changed.graph.node] == [n.op_type for n in model.graph.node]


def test_three_in_a_row_take_two_matrices():
    constants = {"w1": normal(8, 6), "w2": normal(7, 8), "w3": normal(5, 7)}
    nodes = [
        node("Gemm", ["x", "w1"], ["a"], transB=1),
        node("Gemm", ["a", "w2"], ["b"], transB=1),
        node("Gemm", ["b", "w3"], ["y"], transB=1),
    ]
    model = make(nodes, {"x": [3, 6]}, ["y"], constants)
    pairs = found_links(model)
    changed = turned(model, pairs, {"a": normal(8, 8).astype(float), "b": normal(7, 7).astype(float)})
    np.testing.assert_allclose(run(changed)[0], run(model)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([node("Gemm", ["x", "w1"], ["z"]), node("Relu", ["z"], ["a"]), node("Gemm", ["a", "w2"], ["y"])], ["y"]),
        ([node("Gemm", ["x", "w1"], ["a"]), node("Gemm", ["a", "w2"], ["y"])], ["y", "a"]),
        ([node("Gemm", ["x", "w1"], ["a"]), node("Gemm", ["a", "w2"], ["b"]), node("Add", ["a", "b"], ["y"])], ["y"]),
        ([node("Gemm", ["x", "w1"], ["a"]), node("Gemm", ["a", "w1"], ["y"])], ["y"]),
        ([node("Gemm", ["x", "w1"], ["a"]), node("Gemm", ["w2", "a"], ["y"])], ["y"]),
        ([node("Gemm", ["x", "w1"], ["a"]), node("Gemm", ["a", "w2"], ["y"], transA=1)], ["y"]),
        ([node("Gemm", ["x", "w1", "m"], ["a"]), node("Gemm", ["a", "w2"], ["y"])], ["y"]),
    ],
    ids=["an activation", "an output", "two readers", "a shared weight", "as weight", "transposed", "a matrix added"],
)
def test_no_link_where_something_else_reads_it_or_stands_between(nodes, outputs):
    model = make(nodes, {"x": [6, 6]}, outputs, {"w1": normal(6, 6), "w2": normal(6, 6, seed=1), "m": normal(6, 6)})
    assert found_links(model) == []


def test_a_grouped_convolution_keeps_its_basis():
    nodes = [node("Conv", ["x", "w1"], ["a"], group=2), node("Conv", ["a", "w2"], ["y"])]
    model = make(nodes, {"x": [1, 4, 3, 3]}, ["y"], {"w1": normal(4, 2, 1, 1), "w2": normal(5, 4, 1, 1)})
    assert [product.groups for product in products(model)] == [2, 1]
    assert found_links(model) == []


@pytest.mark.parametrize("with_bias", [True, False])
def test_biases_are_shifted_or_made(with_bias):
    operands = ["x", "w", "b"] if with_bias else ["x", "w"]
    nodes = [node("Conv", operands, ["a"]), node("Relu", ["a"], ["y"])]
    constants = {"w": normal(5, 4, 1, 1)} | ({"b": normal(5)} if with_bias else {})
    model = make(nodes, {"x": [2, 4, 3, 3]}, ["y"], constants)
    shift = np.linspace(1, 2, 5)
    changed = with_biases(model, {"a": shift})
    onnx.checker.check_model(changed, full_check=True)
    expected = np.maximum(run(make(nodes[:1], {"x": [2, 4, 3, 3]}, ["a"], constants))[0] + shift[:, None, None], 0)
    np.testing.assert_allclose(run(changed)[0], expected, rtol=1e-5, atol=1e-5)
    assert len(changed.graph.initializer) == 2  # the old bias is gone


def test_a_bias_that_others_read_stays_as_it_is():
    nodes = [
        node("Conv", ["x", "w1", "b"], ["a"]),
        node("Conv", ["x", "w2", "b"], ["c"]),
        node("Add", ["a", "c"], ["y"]),
    ]
    constants = {"w1": normal(4, 4, 1, 1), "w2": normal(4, 4, 1, 1, seed=1), "b": normal(4)}
    model = make(nodes, {"x": [1, 4, 2, 2]}, ["y"], constants)
    changed = with_biases(model, {"a": np.ones(4)})
    np.testing.assert_allclose(run(changed)[0], run(model)[0] + 1, rtol=1e-5, atol=1e-5)
