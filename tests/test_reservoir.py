"""Sampled columns: uniform, the same whatever surrounds them, in the weight's order, and within the memory limit."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnx_lrs import Budget, Config, compress
from onnx_lrs.calibration.capture import (
    MOST_KEPT,
    Capture,
    Setting,
    Statistic,
    groups,
    is_wide,
    key_of,
    reservoir_rows,
    solver_rows,
)
from onnx_lrs.calibration.reservoir import Reservoir, lots
from onnx_lrs.data import open_samples
from onnx_lrs.graph.layers import Geometry, Layer, bias_row, find, weight_matrix
from onnx_lrs.graph.model import View, signature
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.planning.candidates import FIT, JUDGE, SELECT, Bench, candidates_of, solution_of, solution_within
from onnx_lrs.progress import Silent
from onnx_lrs.solvers import METHODS
from onnx_lrs.solvers.activation import LINEAR, RELU
from onnx_lrs.solvers.behind import activation_error
from onnx_lrs.solvers.moments import moments_of
from onnx_lrs.solvers.problem import Columns, Factors, Problem
from tests import small_nets as nets
from tests.builders import make, normal, run

GIB = 1 << 30
UNLIKELY = 1e-6  # seeds are fixed: a test that passes once passes always
PLAIN = Setting(GIB, columns=2048, batch=32, threads=1, seed=0, dynamic_batch=True)


@dataclasses.dataclass(frozen=True)
class Net:
    """A model and its data."""

    model: object
    data: object

    @property
    def samples(self):
        return open_samples(self.data, signature(self.model)[0], None)

    @property
    def layers(self):
        return find(View(self.model))[0]


NETS = {
    "conv": Net(nets.conv_net(), {"image": nets.as_floats(nets.pictures())}),
    "fixed batch": Net(nets.conv_net(4), {"image": nets.as_floats(nets.pictures())}),
    "block": Net(nets.block(), nets.sentences()),
    "two inputs": Net(nets.two_inputs(), nets.pairs(300)),
}


def capture(net, roles=None, layers=None, with_columns=True, **changes):
    """Return node -> role -> statistic; the role "all" stands for every item."""
    dynamic = net is not NETS["fixed batch"]
    setting = dataclasses.replace(PLAIN, **({"dynamic_batch": dynamic} | changes))
    layers = net.layers if layers is None else layers
    with net.samples as samples:
        roles = {"all": np.arange(len(samples))} if roles is None else roles
        made = Capture(net.model, layers, samples, setting)
        found = made.statistics(layers, roles, Silent(), with_columns)
        made.close()
    return found


def rows(statistic):
    return statistic.columns.inputs


# ---------------------------------------------------------------- the reservoir itself


@settings(max_examples=60, deadline=None)
@given(
    places=st.integers(1, 30),
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_the_smallest_priorities_stay_however_the_columns_come(places, sizes, seed, data):
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    columns, priorities = rng.standard_normal((count, 3)).astype(np.float32), rng.random(count)
    items, order = rng.integers(0, 9, count), np.array(data.draw(st.permutations(range(3))))
    reservoir, start = Reservoir(places, 3), 0
    for size in sizes:
        part = slice(start, start + size)
        reservoir.add(columns[part], priorities[part], items[part])
        start += size
    best = np.argsort(priorities)[:places]
    found, owners = reservoir.sample(order)
    np.testing.assert_array_equal(found, columns[best][:, order])
    np.testing.assert_array_equal(owners, items[best])
    assert (found.dtype, owners.dtype) == (np.float32, np.int64)


def test_an_item_has_one_stream_whoever_asks():
    some, owners = lots(7, (3, 5), (4, 2))
    more, _ = lots(7, (5, 3), (9, 4))
    np.testing.assert_array_equal(some, [*more[9:], *more[:2]])
    np.testing.assert_array_equal(owners, [3, 3, 3, 3, 5, 5])
    assert not np.isin(lots(8, (3,), (4,))[0], some).any()
    assert not np.isin(np.random.default_rng([7, 3]).random(4), some).any()  # those draw the positions


# ---------------------------------------------------------------- uniform


def assert_uniform(counts):
    expected = counts.sum() / counts.size
    statistic = np.square(counts - expected).sum() / expected
    assert statistic < scipy.stats.chi2.isf(UNLIKELY, counts.size - 1)


def test_every_item_is_equally_likely():
    x = np.repeat(np.arange(120, dtype=np.float32)[:, None], 8, axis=1)
    net = Net(nets.one_gemm(8, 128), {"x": x})
    counts = np.zeros(120)
    for seed in range(300):
        statistic = capture(net, seed=seed)["y"]["all"]
        assert len(np.unique(statistic.items)) == len(rows(statistic)) == 4 * 8
        np.testing.assert_array_equal(rows(statistic)[:, 0], statistic.items)
        counts[statistic.items] += 1
    assert_uniform(counts)


def pixels(items=12, side=5):
    """Return a 1 x 1 convolution and images whose pixels say which item and which position they are."""
    place = np.broadcast_to(np.arange(side * side, dtype=np.float32).reshape(1, 1, side, side), (items, 1, side, side))
    item = np.broadcast_to(np.arange(items, dtype=np.float32)[:, None, None, None], place.shape)
    x = np.concatenate([item, place, item, place], axis=1)
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    constants = {"w": nets.weight(np.random.default_rng(0), 256, 4, 1, 1)}
    ends = [("x", TensorProto.FLOAT, ["N", 4, side, side])], [("y", TensorProto.FLOAT, ["N", 256, side, side])]
    return Net(nets.build([conv], constants, *ends), {"x": x})


@pytest.mark.parametrize("columns", [60, 10**4])
def test_every_position_of_every_item_is_equally_likely(columns):
    """Also where the moments see only some of the positions."""
    counts = np.zeros((12, 25))
    net = pixels()
    for seed in range(300):
        statistic = capture(net, seed=seed, columns=columns)["y"]["all"]
        np.testing.assert_array_equal(rows(statistic)[:, 0], statistic.items)
        place = rows(statistic)[:, 1].astype(int)
        assert len(set(zip(statistic.items, place, strict=True))) == 4 * 4
        counts[statistic.items, place] += 1
    assert_uniform(counts)
    assert_uniform(counts.sum(axis=0))
    assert_uniform(counts.sum(axis=1))


def test_a_prefix_is_a_sample_too():
    first, net = np.zeros(12), pixels()
    for seed in range(600):
        first[capture(net, seed=seed, columns=10**4)["y"]["all"].items[0]] += 1
    assert_uniform(first)


# ---------------------------------------------------------------- the same whatever surrounds it


def assert_same(found, expected, rtol=0.0):
    assert list(found) == list(expected)
    for node, own in expected.items():
        for role, statistic in own.items():
            np.testing.assert_array_equal(found[node][role].items, statistic.items)
            scale = np.abs(rows(statistic)).max()
            np.testing.assert_allclose(rows(found[node][role]), rows(statistic), rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("columns", [60, 2048])
@pytest.mark.parametrize("name", NETS)
def test_neither_the_batch_nor_the_run_changes_the_sample(name, columns):
    expected = capture(NETS[name], columns=columns)
    assert_same(capture(NETS[name], columns=columns), expected)
    for batch in (1, 7):
        assert_same(capture(NETS[name], columns=columns, batch=batch), expected, rtol=1e-5)  # kernels differ by batch
    other = capture(NETS[name], columns=columns, seed=1)
    full = [node for node, own in expected.items() if len(own["all"].items) == 4 * rows(own["all"]).shape[1]]
    assert all(not np.array_equal(rows(other[n]["all"]), rows(expected[n]["all"])) for n in full)


@pytest.mark.parametrize("name", NETS)
def test_no_other_layer_and_no_order_changes_the_sample(name):
    layers = NETS[name].layers
    expected = capture(NETS[name])
    backwards = capture(NETS[name], layers=layers[::-1])
    assert_same({node: backwards[node] for node in expected}, expected)
    for layer in layers:
        assert_same(capture(NETS[name], layers=[layer]), {layer.node: expected[layer.node]})


def test_the_order_of_the_items_changes_nothing():
    items = np.random.default_rng(0).permutation(48)
    assert_same(capture(NETS["conv"], {"all": items}), capture(NETS["conv"]), rtol=1e-5)


def test_fully_connected_layers_keep_the_same_items():
    found = {node: own["all"].items for node, own in capture(NETS["two inputs"]).items()}
    assert {node: len(items) for node, items in found.items()} == {"a": 160, "b": 96, "hidden": 256}
    np.testing.assert_array_equal(found["b"], found["hidden"][:96])
    np.testing.assert_array_equal(found["a"], found["hidden"][:160])


def test_layers_with_one_input_share_one_array():
    found = capture(NETS["block"])
    query, up, down = (rows(found[node]["all"]) for node in ("query", "u", "d"))
    assert np.shares_memory(query, up)
    assert not np.shares_memory(query, down)


def test_asking_for_columns_leaves_the_moments_alone():
    for net in NETS.values():
        with_columns, without = capture(net), capture(net, with_columns=False)
        for node, own in without.items():
            plain, asked = own["all"], with_columns[node]["all"]
            assert plain.columns is plain.items is None
            assert asked.moments.count == plain.moments.count
            np.testing.assert_array_equal(asked.moments.mean, plain.moments.mean)
            np.testing.assert_array_equal(asked.moments.cov, plain.moments.cov)


def test_moments_alone_are_those_of_the_statistics():
    net = NETS["conv"]
    with net.samples as samples:
        made = Capture(net.model, net.layers, samples, PLAIN)
        moments = made.moments(net.layers, {"all": np.arange(48)}, Silent())
        made.close()
    for node, own in capture(net).items():
        np.testing.assert_array_equal(moments[node]["all"].cov, own["all"].moments.cov)


# ---------------------------------------------------------------- what a row is


def outputs_by_item(net, layer):
    """Return item -> the layer's outputs at all positions, (positions, out), as ONNX Runtime computes them."""
    model = type(net.model)()
    model.CopyFrom(net.model)
    model.graph.output.append(helper.make_tensor_value_info(layer.output, TensorProto.FLOAT, None))
    with net.samples as samples:
        every = [run(model, samples.item(i))[-1] for i in range(len(samples))]
    if layer.op == "Conv":
        every = [np.moveaxis(y, 1, -1) for y in every]
    return [y.reshape(-1, layer.out) for y in every]


@pytest.mark.parametrize("name", NETS)
def test_every_row_times_the_weight_is_an_output_of_its_item(name):
    net, view = NETS[name], View(NETS[name].model)
    found = capture(net)
    for layer in net.layers:
        statistic, outputs = found[layer.node]["all"], outputs_by_item(net, layer)
        bias = bias_row(view, layer)
        y = rows(statistic) @ weight_matrix(view, layer).T + (0 if bias is None else bias)
        scale = max(np.abs(own).max() for own in outputs)
        for item, row in zip(statistic.items, y, strict=True):
            assert np.abs(outputs[item] - row).max(axis=1).min() < 1e-4 * scale
        assert len(np.unique(rows(statistic), axis=0)) > len(statistic.items) // 2


def test_where_samples_cannot_be_told_apart_the_items_are_unknown():
    """Time comes first, and 5 steps of a batch of 4 belong to nobody in particular."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "w"], ["m"], "fc"),
        helper.make_node("Transpose", ["m"], ["y"], perm=[1, 0, 2]),
    ]
    ends = [("x", TensorProto.FLOAT, ["N", 5, 32])], [("y", TensorProto.FLOAT, ["N", 5, 64])]
    x = np.random.default_rng(1).standard_normal((4, 5, 32)).astype(np.float32)
    net = Net(nets.build(nodes, {"w": nets.weight(np.random.default_rng(0), 32, 64)}, *ends), {"x": x})
    together, alone = capture(net)["m"]["all"], capture(net, batch=1)["m"]["all"]
    assert set(together.items) == {-1}
    assert sorted(alone.items) == sorted(list(range(4)) * 5)
    for statistic in (together, alone):
        np.testing.assert_array_equal(np.unique(rows(statistic), axis=0), np.unique(x.reshape(-1, 32), axis=0))


# ---------------------------------------------------------------- memory


def dense_layer(d, out, number=0):
    names = {"name": f"l{number}", "op": "Gemm", "node": f"y{number}", "input": f"x{number}", "weight": f"w{number}"}
    return Layer(
        **names,
        weight_shape=(d, out),
        out=out,
        channels=d,
        taps=1,
        bias=None,
        bias_add=None,
        affine=True,
        geometry=Geometry(),
    )


@pytest.mark.parametrize("memory", [GIB // 4, 2 * GIB, 16 * GIB])
@pytest.mark.parametrize("out", [16, 512, 32_000])
@pytest.mark.parametrize("d", [27, 576, 1900, 2040, 2048, 4608, 5792, 9000, 25_088])
def test_reservoirs_and_matrices_fit_the_memory_together(d, out, memory):
    layer = dense_layer(d, out)
    kept, given_to_solver = reservoir_rows(layer, memory), solver_rows(layer, memory)
    if is_wide(layer, memory):
        assert kept == given_to_solver == 0
        return
    assert given_to_solver <= kept <= min(4 * d, MOST_KEPT)
    assert 4 * kept * d <= memory // 4
    reservoirs, work = 2 * 4 * kept * d, 4 * given_to_solver * (d + 3 * out)
    assert 8 * 8 * d**2 + reservoirs + work <= memory


def test_what_the_common_layers_get():
    assert [reservoir_rows(dense_layer(d, 64), 2 * GIB) for d in (27, 576, 2304)] == [108, 2304, 9216]
    assert reservoir_rows(dense_layer(4608, 512), 4 * GIB) == solver_rows(dense_layer(4608, 512), 4 * GIB) == 18_432
    assert 2 * 4608 < reservoir_rows(dense_layer(4608, 512), 2 * GIB) < 18_432  # the matrices take two thirds


def test_groups_count_the_columns():
    memory = GIB // 4
    layers = [dense_layer(int(d), 256, i) for i, d in enumerate(np.random.default_rng(0).integers(100, 1500, 40))]
    plain, found = groups(layers, 2, memory), groups(layers, 2, memory, True)
    assert len(found) > len(plain)
    assert [layer for group in found for layer in group] == layers
    for group in found:
        if len(group) == 1:
            continue
        kept = {key_of(la, memory): 2 * (8 * la.d**2 + 4 * la.d * reservoir_rows(la, memory)) for la in group}
        work = [6 * 8 * la.d**2 + 4 * 8 * la.params + 4 * (la.d + 3 * la.out) * solver_rows(la, memory) for la in group]
        assert sum(kept.values()) + max(work) <= memory


def test_wide_layers_have_no_columns():
    memory = 4 << 20
    assert [layer.name for layer in NETS["conv"].layers if is_wide(layer, memory)] == ["fc1"]
    found = capture(NETS["conv"], memory_bytes=memory)
    assert found["g1"]["all"].columns is found["g1"]["all"].items is None
    assert found["g1"]["all"].moments.mean.shape == (96,)
    assert found["c2"]["all"].columns is not None


def test_a_small_memory_keeps_a_prefix():
    full, cut = (capture(NETS["conv"], memory_bytes=memory)["c2"]["all"] for memory in (GIB, 3_500_000))
    assert 0 < len(cut.items) < len(full.items) == 4 * 216
    np.testing.assert_array_equal(cut.items, full.items[: len(cut.items)])
    np.testing.assert_allclose(rows(cut), rows(full)[: len(cut.items)], atol=1e-5)


# ---------------------------------------------------------------- problems and errors


def bench_of(net, method="hsvd"):
    return Bench(View(net.model), method, 1, GIB, with_columns=True)


def test_a_problem_gets_bias_activation_and_columns():
    net = NETS["conv"]
    items = np.arange(48)
    statistics = capture(net, {FIT: items[:30], SELECT: items[30:40]})
    for layer in net.layers:
        _, problem = bench_of(net)._problem(layer, statistics[layer.node])
        own = statistics[layer.node]
        assert problem.activation == RELU
        np.testing.assert_array_equal(problem.bias, bias_row(View(net.model), layer))
        assert problem.columns is own[FIT].columns
        assert problem.checks is own[SELECT].columns
        assert set(own[FIT].items) <= set(items[:30])
        assert set(own[SELECT].items) <= set(items[30:40])
    assert bench_of(net)._problem(net.layers[0], {})[1].columns is None
    query = bench_of(NETS["block"])._problem(NETS["block"].layers[0], {})[1]
    assert (query.bias, query.activation) == (None, LINEAR)


@pytest.mark.parametrize(("seen", "expected"), [("y", RELU), ("a", LINEAR)])
def test_an_activation_that_sees_more_than_the_layer_is_not_put_on_the_layer_alone(seen, expected):
    weights = {"w": normal(40, 32), "b": normal(32)}
    gemm, add = helper.make_node("Gemm", ["x", "w", "b"], ["y"]), helper.make_node("Add", ["y", "t"], ["a"])
    nodes = [gemm, *[add] * (seen == "a"), helper.make_node("Relu", [seen], ["z"])]
    view = View(make(nodes, {"x": (3, 40), "t": (3, 32)}, ("z",), weights))
    (layer,), _ = find(view)
    assert layer.activation == RELU
    bench = Bench(view, "hsvd", 1, GIB, with_columns=True)
    assert bench._problem(layer, {})[1].activation == expected


@pytest.mark.parametrize("method", ["ddlr", "nettrim"])
def test_a_guarantee_in_front_of_a_clip_is_the_linear_one(method):
    weights = {"w": normal(40, 32), "b": normal(32)}
    columns = [Columns(normal(80, 40, seed=seed)) for seed in (1, 2)]
    roles = {role: Statistic(moments_of(c.inputs), c) for role, c in zip((FIT, JUDGE), columns, strict=True)}
    found = []
    for behind in (helper.make_node("Neg", ["y"], ["z"]), helper.make_node("Clip", ["y"], ["z"], min=0.0, max=6.0)):
        gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
        view = View(make([gemm, behind], {"x": (3, 40)}, ("z",), weights, opset=9, ir=8))
        (layer,), _ = find(view)
        bench = Bench(view, method, 1, GIB, with_columns=True)
        assert bench._problem(layer, roles)[1].activation == layer.activation
        question = bench.question(layer, roles)
        found.append(bench.outcome(layer, question, solution_within(question, 0.5), roles))
    linear, clipped = found
    np.testing.assert_array_equal(clipped.factors.dense(), linear.factors.dense())
    names = ("error", "activation_error", "allowed", "reached", "scale")
    assert [getattr(clipped, name) for name in names] == [getattr(linear, name) for name in names]
    assert clipped.reached <= clipped.allowed == pytest.approx(0.5 * clipped.scale)


@pytest.mark.parametrize(("name", "behind"), [("fc1", "r3"), ("conv2", "r2")])
def test_the_error_behind_the_activation_is_that_of_the_compressed_network(name, behind):
    """All held-out columns are in the reservoir of the last layer, a sample of them in that of the convolution."""
    net = NETS["conv"]
    view = View(net.model)
    (layer,) = [la for la in net.layers if la.name == name]
    roles = {FIT: np.arange(30), JUDGE: np.arange(30, 48)}
    own = capture(net, roles)[layer.node]
    bench = bench_of(net)
    question = bench.question(layer, own)
    candidates = candidates_of(question)
    fitted = bench.outcome(layer, question, solution_of(question, candidates[len(candidates) // 3]), own)
    small = rewrite(view, net.layers, {layer.node: fitted.factors}, {la.input: 4 for la in net.layers}).model
    values = []
    for model in (net.model, small):
        seen = type(model)()
        seen.CopyFrom(model)
        seen.graph.output.append(helper.make_tensor_value_info(behind, TensorProto.FLOAT, None))
        values.append(run(seen, {"image": net.data["image"][30:]})[-1])
    expected = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(values[0])
    assert expected > 1e-3
    assert fitted.activation_error == pytest.approx(expected, rel=0.15 if name == "conv2" else 1e-3)


def test_without_columns_nothing_is_known_behind_the_activation():
    net = NETS["conv"]
    roles = {FIT: np.arange(30), JUDGE: np.arange(30, 48)}
    layer = net.layers[-1]
    own = capture(net, roles, with_columns=False)[layer.node]
    question = bench_of(net).question(layer, own)
    fitted = bench_of(net).outcome(layer, question, solution_of(question, candidates_of(question)[0]), own)
    assert fitted.error is not None
    assert fitted.activation_error is None


def test_the_error_behind_an_activation_in_figures():
    """y = x - 1 becomes y' = 0 x - 1 + 2: through ReLU (0, 1, 2) becomes (1, 1, 1)."""
    problem = Problem(np.ones((1, 1)), bias=np.array([-1.0]), activation="relu")
    nothing = np.zeros((1, 0)), np.zeros((0, 1)), np.zeros(0, np.int64), np.zeros((1, 0))
    factors = Factors(*nothing, bias_shift=np.array([2.0]), taps=1)
    columns = Columns(np.array([[0], [2], [3]], np.float32))
    assert activation_error(problem, factors, columns) == pytest.approx(math.sqrt(2 / 5))
    linear = dataclasses.replace(problem, activation="linear")
    assert activation_error(linear, factors, columns) == pytest.approx(math.sqrt(5 / 6))
    dead = Columns(np.zeros((5, 1), np.float32))
    assert activation_error(problem, factors, dead) == 0.0


def test_a_run_with_columns_gives_the_same_to_a_method_that_ignores_them(monkeypatch):
    net = NETS["conv"]
    wanted = Config(threads=1, budget=Budget(params=0.5))
    plain = compress(net.model, data=net.data, config=wanted)
    monkeypatch.setitem(METHODS, wanted.method, dataclasses.replace(METHODS[wanted.method], needs_columns=True))
    asked = []
    statistics = Capture.statistics
    monkeypatch.setattr(Capture, "statistics", lambda *given: asked.append(given[4]) or statistics(*given))
    other = compress(net.model, data=net.data, config=wanted)
    assert asked
    assert all(flag is True for flag in asked)
    assert other.model.SerializeToString(deterministic=True) == plain.model.SerializeToString(deterministic=True)
