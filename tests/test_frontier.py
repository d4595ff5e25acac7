"""Two networks advance side by side: every node runs once in each, and what is in memory changes no bit."""

import collections
import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lrs import Budget, Config, compress
from onnx_lrs.calibration.capture import Capture, Setting, groups
from onnx_lrs.calibration.frontier import Frontier, calls_of
from onnx_lrs.calibration.store import Store
from onnx_lrs.data import Samples, open_samples
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View, signature
from onnx_lrs.graph.segments import Cutter
from onnx_lrs.planning.cascade import levels_of, with_targets
from onnx_lrs.progress import Silent, Timer
from onnx_lrs.runtime.session import Session, with_outputs
from tests import small_nets as nets
from tests.builders import make, node, normal

GIB = 1 << 30
SETTING = Setting(GIB, columns=512, batch=16, threads=1, seed=0, dynamic_batch=True)
CONV = nets.conv_net()
PICTURES = nets.as_floats(nets.pictures(40))


@pytest.fixture
def executions(monkeypatch):
    """Count how often each node (by its first output) is run between two cuts, all calls together."""
    found = collections.Counter()

    class Counted(Session):
        def __init__(self, model, threads):
            super().__init__(model, threads)
            self.nodes = [n.output[0] for n in model.graph.node]

        def run(self, feed, names=None):
            found.update(self.nodes)
            return super().run(feed, names)

    monkeypatch.setattr("onnx_lrs.calibration.frontier.Session", Counted)
    return found


@pytest.fixture
def reads(monkeypatch):
    """Record the items that are read from the samples."""
    found = []
    item = Samples.item
    monkeypatch.setattr(Samples, "item", lambda self, index: found.append(int(index)) or item(self, index))
    return found


def doubled(names):
    """Return what doubles the stored tensors of some names in a model."""

    def change(model):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for tensor in copy.graph.initializer:
            if tensor.name in names:
                tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
        return copy

    return change


def side_by_side(limit, changed=("conv2.w", "fc2.w"), seen=()):
    """Advance CONV and CONV with some weights doubled; return logits of both, call by call, and the spilled bytes."""
    cutter = Cutter(View(CONV))
    parts, _ = cutter.levels({"c1": [], "c2": [], "g1": [], "logits": []}, ["logits"])
    with open_samples({"image": PICTURES}, signature(CONV)[0], None) as samples, Store(limit) as store:
        original = Frontier(cutter, store, 1, Timer())
        feeds = [feed for _, feed in calls_of(samples, [("all", np.arange(40))], 16, True)]
        original.begin(iter(feeds), ["image"])
        other = Frontier(cutter, store, 1, Timer(), original)
        assert original.count == other.count == 3
        for number, nodes in enumerate(parts):
            later = [n for part in parts[number + 1 :] for n in part]
            keep = (cutter.reads(later) | {"logits"}) - cutter.makes(later)
            assert [call for call, _ in original.advance(nodes, keep)] == [0, 1, 2]
            if number:
                [*other.advance(nodes, keep, change=doubled(changed))]
            for network in (original, other):
                network.release(keep)
                assert all(name in keep for owner, name in store.names() if owner == id(network))
            for watch in seen:
                watch(number, original, other)
        found = [[np.array(network.value("logits", call)) for call in range(3)] for network in (original, other)]
        return *found, store.spilled_bytes, feeds


def test_both_networks_give_what_they_give_in_one_piece():
    original, other, spilled, feeds = side_by_side(GIB)
    assert not spilled
    for model, parts in ((CONV, original), (doubled(("conv2.w", "fc2.w"))(CONV), other)):
        with Session(model, 1) as session:
            for feed, logits in zip(feeds, parts, strict=True):
                np.testing.assert_allclose(session.run(feed)["logits"], logits, rtol=1e-4, atol=1e-4)


def test_what_waits_on_disk_changes_no_bit():
    original, other, spilled, _ = side_by_side(0)
    assert spilled
    for found, expected in zip((original, other), side_by_side(GIB)[:2], strict=True):
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_network_shares_what_is_equal_and_owns_what_is_not():
    def watch(number, original, other):
        if number == 0:
            assert original.has("image")
            assert not other.has("image")
            assert other.value("image", 1) is original.value("image", 1)
        if number == 2:  # behind the first change
            assert original.has("p2") or original.has("flat")
            name = "p2" if original.has("p2") else "flat"
            assert other.has(name)
            assert not np.array_equal(other.value(name, 0), original.value(name, 0))

    side_by_side(GIB, seen=(watch,))


def test_every_node_runs_once_in_each_network(executions):
    side_by_side(GIB)
    assert executions == {n.output[0]: 2 * 3 for n in CONV.graph.node}


def test_what_is_asked_for_besides_is_given_but_not_kept():
    cutter = Cutter(View(CONV))
    with open_samples({"image": PICTURES}, signature(CONV)[0], None) as samples, Store(GIB) as store:
        network = Frontier(cutter, store, 1, Timer())
        network.begin((feed for _, feed in calls_of(samples, [("all", np.arange(20))], 16, True)), ["image"])
        found = [*network.advance(cutter.ancestors(["r1"]), ["r1"], ["c1"])]
        assert [(call, [*values]) for call, values in found] == [(0, ["c1"]), (1, ["c1"])]
        assert network.has("r1")
        assert not network.has("c1")
        np.testing.assert_array_equal(np.maximum(found[1][1]["c1"], 0), network.value("r1", 1))


# ---------------------------------------------------------------- the passes of a run


def test_a_run_costs_three_forward_passes_however_many_layers_there_are(executions, reads):
    """One pass for the plan, and one of each network for the fit; the compressed one counts the layers' own nodes."""
    config = Config(budget=Budget(params=0.5), threads=1, multiple=4, calibration_batch=8)
    done = compress(CONV, data={"image": PICTURES}, config=config)
    assert sum(layer.form != "dense" for layer in done.layers) == 2
    sizes = {"fit": 26, "select": 6, "held out": 8}
    calls = {role: -(-size // 8) for role, size in sizes.items()}
    plan, fit = calls["fit"] + calls["select"], sum(calls.values())
    own = {n.output[0] for n in CONV.graph.node}
    assert executions["r2"] == executions["p2"] == plan + 2 * fit
    assert executions["r1"] == plan + fit  # in front of every compressed layer both networks are one
    assert max(count for name, count in executions.items() if name in own) <= plan + 2 * fit
    assert sorted(collections.Counter(reads).values())[:26] == [2] * 26  # those to fit on: for the plan, and the fit


def captured(model, data, parts, reads, setting=SETTING, with_columns=True):
    """Ask one Capture for groups of layers, one after the other; ``parts`` are tuples of first outputs."""
    layers = {layer.node: layer for layer in find(View(model), smallest=1)[0]}
    found = []
    with open_samples(data, signature(model)[0], None) as samples:
        roles = {"fit": np.arange(0, len(samples) - 8), "select": np.arange(len(samples) - 8, len(samples))}
        made = Capture(model, [*layers.values()], samples, setting)
        reads.clear()
        found = [made.statistics([layers[n] for n in part], roles, Silent(), with_columns) for part in parts]
        made.close()
    return found, len(reads)


def assert_same_statistics(found, expected, rtol=0.0):
    assert [*found] == [*expected]
    for role in expected:
        one, two = found[role], expected[role]
        assert one.moments.count == two.moments.count
        scale = np.abs(two.moments.cov).max()
        np.testing.assert_allclose(one.moments.cov, two.moments.cov, rtol=0, atol=rtol * scale)
        np.testing.assert_allclose(one.moments.mean, two.moments.mean, rtol=0, atol=rtol * np.sqrt(scale))
        np.testing.assert_array_equal(one.items, two.items)
        np.testing.assert_allclose(one.columns.inputs, two.columns.inputs, rtol=0, atol=100 * rtol * np.sqrt(scale))


def test_groups_give_what_one_group_gives_in_one_pass_over_the_samples(reads, executions):
    data = {"image": PICTURES}
    (one,), count = captured(CONV, data, [("c1", "c2", "g1", "logits")], reads)
    assert count == 40
    once = dict(executions)
    executions.clear()
    split, count = captured(CONV, data, [("c1",), ("c2", "g1"), ("logits",)], reads)
    assert count == 40
    assert dict(executions) == once
    assert set(once.values()) == {3}  # calls: 16 + 16 of the one role, 8 of the other
    assert "logits" not in once  # nobody reads what the last layer gives
    for part in split:
        for name in part:
            assert_same_statistics(part[name], one[name], 1e-6)


def test_groups_split_by_the_memory_are_such_groups(reads):
    memory = 45 << 20
    layers, _ = find(View(CONV), smallest=1)
    parts = groups(layers, 2, memory, True)
    assert len(parts) > 1
    setting = dataclasses.replace(SETTING, memory_bytes=memory)
    (one,), _ = captured(CONV, {"image": PICTURES}, [[la.node for la in layers]], reads, setting)
    split, count = captured(CONV, {"image": PICTURES}, [[la.node for la in p] for p in parts], reads, setting)
    assert count == 40
    for part in split:
        for name in part:
            assert_same_statistics(part[name], one[name], 1e-6)


def test_an_earlier_group_begins_a_new_pass_and_gives_the_same(reads):
    data = {"image": PICTURES}
    (first, _, again), count = captured(CONV, data, [("c2",), ("logits",), ("c2",)], reads)
    assert count == 80
    assert_same_statistics(again["c2"], first["c2"])


def test_other_samples_begin_a_new_pass():
    layers, _ = find(View(CONV), smallest=1)
    conv1, conv2 = layers[:2]
    with open_samples({"image": PICTURES}, signature(CONV)[0], None) as samples:
        made = Capture(CONV, layers, samples, SETTING)
        made.moments([conv1], {"fit": np.arange(20)}, Silent())
        found = made.moments([conv2], {"fit": np.arange(20, 40)}, Silent())
        made.close()
        fresh = Capture(CONV, layers, samples, SETTING)
        expected = fresh.moments([conv2], {"fit": np.arange(20, 40)}, Silent())
        fresh.close()
    np.testing.assert_allclose(found["c2"]["fit"].cov, expected["c2"]["fit"].cov, rtol=0, atol=1e-6)


def test_two_groups_that_read_one_tensor(reads):
    net = nets.block()
    (one,), _ = captured(net, nets.sentences(), [("query", "u", "d")], reads)
    split, count = captured(net, nets.sentences(), [("query",), ("u",), ("d",)], reads)
    assert count == 40
    for part in split:
        for name in part:
            assert_same_statistics(part[name], one[name], 1e-6)
    assert_same_statistics(split[0]["query"], split[1]["u"])


def test_the_moments_are_those_of_what_the_layer_reads(reads):
    """Every position of a fully connected layer is read, so numpy can say it in one line."""
    (found,), _ = captured(CONV, {"image": PICTURES}, [("c1", "c2", "g1", "logits")], reads)
    with Session(with_outputs(CONV, ["flat", "r3"]), 1) as session:
        values = session.run({"image": PICTURES[:32]})
    for name, read in (("g1", "flat"), ("logits", "r3")):
        moments = found[name]["fit"].moments
        assert moments.count == 32
        exact = np.cov(values[read].astype(np.float64), rowvar=False, bias=True)
        np.testing.assert_allclose(moments.cov, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


# ---------------------------------------------------------------- what layers read that no input reaches


def table_net(default=False):
    """Rows of a table, normalised and multiplied, join what comes from x: the table's layer sees constants alone."""
    nodes = [
        node("Tanh", ["table"], ["rows"]),
        node("MatMul", ["table" if default else "rows", "wt"], ["t"], "table"),
        node("ReduceMean", ["t"], ["mean"], axes=[0], keepdims=1),
        node("Gemm", ["x", "w1", "b1"], ["g"], "one"),
        node("Add", ["g", "mean"], ["sum"]),
        node("Relu", ["sum"], ["h"]),
        node("Gemm", ["h", "w2", "b2"], ["y"], "two"),
    ]
    weights = {"wt": normal(40, 48, seed=5), "w1": normal(40, 48), "b1": normal(48), "w2": normal(48, 40)}
    constants = weights | {"b2": normal(40), "table": normal(30, 40, seed=3)}
    model = make(nodes[default:], {"x": ("N", 40)}, {"y": ("N", 40)}, constants)
    if default:
        model.graph.input.append(onnx.helper.make_tensor_value_info("table", onnx.TensorProto.FLOAT, [30, 40]))
    return model


@pytest.mark.parametrize("default", [False, True], ids=["computed at load", "input with a default"])
@pytest.mark.parametrize("fit", ["cascade", "independent"])
def test_a_layer_that_reads_constants_is_compressed_as_any_other(default, fit):
    config = Config(budget=Budget(params=0.6), threads=1, multiple=4, fit=fit)
    data = {"x": (normal(120, 8, seed=1) @ normal(8, 40, seed=2)).astype(np.float32)}
    done = compress(table_net(default), data=data, config=config)
    assert [layer.name for layer in done.layers] == ["table", "one", "two"]
    assert done.layers[0].form != "dense"
    assert done.quality[0].relative_l2 < 0.2


def test_the_layers_of_a_run_wait_for_each_other_in_no_circle():
    """A MatMul whose activation ends at the Add, a Gemm that looks through the normalisation behind it: one Add."""
    rows = {"scale": 0.5 + np.abs(normal(48)), "mean": normal(48), "shift": normal(48), "var": 0.5 + np.abs(normal(48))}
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["g"], "gemm"),
        node("MatMul", ["x", "w2"], ["m"], "matmul"),
        node("Add", ["g", "m"], ["sum"]),
        node("BatchNormalization", ["sum", "scale", "shift", "mean", "var"], ["n"]),
        node("Relu", ["n"], ["y"]),
    ]
    weights = {"w1": normal(40, 48), "b1": normal(48), "w2": normal(40, 48, seed=1)}
    view = View(make(nodes, {"x": ("N", 40)}, {"y": ("N", 48)}, weights | rows))
    layers, _ = find(view)
    shapes = dict.fromkeys(("g", "m", "sum", "n"), (1, 48))
    assert [(la.behind.shortcut, la.behind.total) for la in layers] == [("m", "n"), ("g", "sum")]
    kept = with_targets(Cutter(view), layers, shapes)
    assert [la.behind.shortcut for la in kept].count(None) == 1
    assert sum(len(level.layers) for level in levels_of(Cutter(view), kept)) == 2
