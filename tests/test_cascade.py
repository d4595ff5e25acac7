"""Layers fitted behind each other: who makes up for a shortcut, and what a user sees of it at the outputs."""

import dataclasses
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_lrs import Budget, Config, compress
from onnx_lrs.calibration.store import Store
from onnx_lrs.graph.behind import Behind
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.graph.segments import Cutter
from onnx_lrs.planning.cascade import levels_of, with_targets
from onnx_lrs.planning.plan import Plan
from onnx_lrs.solvers.activation import LINEAR
from tests import small_nets as nets
from tests.builders import make, node, normal

WIDTH = 48
FITS = ("cascade", "cascade-linear", "independent")
BASE = Config(budget=Budget(params=0.5), threads=1, multiple=4)


# ---------------------------------------------------------------- who makes up for what


def view_of(nodes, outputs=("y",)):
    weights = {f"w{i}": normal(WIDTH, WIDTH, seed=i) / np.float32(7) for i in range(4)} | {"b": normal(WIDTH)}
    read = {name for each in nodes for name in each.input}
    return View(make(nodes, {"x": ("N", WIDTH)}, outputs, {k: v for k, v in weights.items() if k in read}))


def gemm(reads, makes, weight):
    return node("Gemm", [reads, weight, "b"], [makes], makes)


def two_branches(names=("deep2", "beside"), **more):
    """stem, then deep1 - LeakyRelu - deep2 beside one layer, and their sum; ``names`` in the Add's order."""
    return view_of(
        [
            gemm("x", "stem", "w0"),
            gemm("stem", "deep1", "w1"),
            node("LeakyRelu", ["deep1"], ["r"], alpha=0.4),
            gemm("r", "deep2", "w2"),
            gemm("stem", "beside", "w3"),
            node("Add", names, ["sum"]),
            node("Relu", ["sum"], ["y"]),
        ],
        **more,
    )


def shortcuts(view, chosen=None, shapes=None):
    layers = [la for la in find(view)[0] if chosen is None or la.name in chosen]
    equal = dict.fromkeys((n.outputs[0].name for n in view.nodes), (1, WIDTH))
    found = with_targets(Cutter(view), layers, equal | (shapes or {}))
    assert [la.node for la in found] == [la.node for la in layers]
    return {la.name: la.behind.shortcut for la in found}, found


@pytest.mark.parametrize("names", [("deep2", "beside"), ("beside", "deep2")])
def test_of_two_layers_that_are_added_the_deeper_one_makes_up_for_the_other(names):
    found, layers = shortcuts(two_branches(names))
    assert found == {"stem": None, "deep1": None, "deep2": "beside", "beside": None}
    beside = next(la for la in layers if la.name == "beside")
    assert (beside.behind.total, beside.activation) == ("beside", LINEAR)
    assert next(la for la in layers if la.name == "deep2").behind.total == "sum"


def test_where_one_of_them_is_dense_the_other_does_it():
    assert shortcuts(two_branches(), ["stem", "beside"])[0] == {"stem": None, "beside": "deep2"}


@pytest.mark.parametrize("names", [("deep2", "beside"), ("beside", "deep2")])
def test_dense_layers_on_the_way_count_as_depth(names):
    """beside comes later in the file, but deep2 reads what beside reads through one more layer."""
    assert shortcuts(two_branches(names), ["deep2", "beside"])[0] == {"deep2": "beside", "beside": None}


def test_a_sum_that_broadcasts_the_layers_output_is_no_shortcut():
    found, layers = shortcuts(two_branches(), shapes={"deep2": (1, 1, WIDTH), "beside": (1, 5, WIDTH)})
    assert set(found.values()) == {None}
    assert all(la.behind.total == la.output for la in layers if la.name in ("deep2", "beside"))


def test_levels_put_a_layer_behind_the_layers_of_its_shortcut():
    view = two_branches()
    _, layers = shortcuts(view)
    levels = levels_of(Cutter(view), layers)
    assert [sorted(la.name for la in level.layers) for level in levels] == [
        [],
        ["stem"],
        ["beside", "deep1"],
        ["deep2"],
    ]
    _, layers = shortcuts(view, ["stem", "beside"])  # beside now waits for deep2, which is no layer to be fitted
    levels = levels_of(Cutter(view), layers)
    assert [[la.name for la in level.layers] for level in levels] == [[], ["stem"], ["beside"]]


def test_a_layer_in_front_in_the_file_waits_for_its_shortcuts_layers():
    """The layer beside two others that do not count (they are dense) comes first in the file and is fitted last."""
    nodes = [
        gemm("x", "first", "w0"),
        node("Relu", ["x"], ["r"]),
        gemm("r", "one", "w1"),
        node("Sigmoid", ["one"], ["s"]),
        node("Add", ["first", "s"], ["y"]),
    ]
    view = view_of(nodes)
    found, layers = shortcuts(view)
    assert found == {"first": "s", "one": None}
    assert [[la.name for la in level.layers] for level in levels_of(Cutter(view), layers)] == [[], ["one"], ["first"]]


# ---------------------------------------------------------------- networks


def mlp(depth=6, width=WIDTH, seed=0):
    """Gemm + Relu several times: x (N, width) -> y (N, 10)."""
    rng = np.random.default_rng(seed)
    nodes, constants, here = [], {}, "x"
    for number in range(depth):
        last = number == depth - 1
        constants[f"w{number}"] = nets.weight(rng, 10 if last else width, width)
        constants[f"b{number}"] = nets.bias(rng, 10 if last else width)
        out = "y" if last else f"g{number}"
        nodes.append(node("Gemm", [here, f"w{number}", f"b{number}"], [out], f"fc{number}", transB=1))
        if not last:
            nodes.append(node("Relu", [out], [f"r{number}"]))
            here = f"r{number}"
    ends = [("x", TensorProto.FLOAT, ["N", width])], [("y", TensorProto.FLOAT, ["N", 10])]
    return nets.build(nodes, constants, *ends)


def rows(count, width=WIDTH, seed=0):
    rng = np.random.default_rng([seed, 1])
    return rng.standard_normal((count, width)).astype(np.float32)


def residual_net(seed=0):
    """Conv stem, a residual block with a projection, a mean over the map and a Gemm: image (N, 3, 8, 8)."""
    rng = np.random.default_rng(seed)
    constants = {
        "s.w": nets.weight(rng, 32, 3, 3, 3),
        "a.w": nets.weight(rng, 40, 32, 3, 3),
        "b.w": nets.weight(rng, 48, 40, 3, 3),
        "p.w": nets.weight(rng, 48, 32, 1, 1),
        "f.w": nets.weight(rng, 32, 48),
    } | {f"{name}.b": nets.bias(rng, size) for name, size in (("s", 32), ("a", 40), ("b", 48), ("p", 48), ("f", 32))}

    def conv(reads, makes, name, pad=1):
        return node("Conv", [reads, f"{name}.w", f"{name}.b"], [makes], name, pads=[pad] * 4)

    nodes = [
        conv("image", "s", "s"),
        node("Relu", ["s"], ["sr"]),
        conv("sr", "a", "a"),
        node("Relu", ["a"], ["ar"]),
        conv("ar", "b", "b"),
        conv("sr", "p", "p", 0),
        node("Add", ["b", "p"], ["sum"]),
        node("Relu", ["sum"], ["out"]),
        node("GlobalAveragePool", ["out"], ["pool"]),
        node("Flatten", ["pool"], ["flat"]),
        node("Gemm", ["flat", "f.w", "f.b"], ["y"], "f", transB=1),
    ]
    ends = [("image", TensorProto.FLOAT, ["N", 3, 8, 8])], [("y", TensorProto.FLOAT, ["N", 32])]
    return nets.build(nodes, constants, *ends)


def inception_net(seed=0):
    """A stem, two branches joined by a Concat, a 1 x 1 convolution: image (N, 3, 8, 8) -> (N, 16, 8, 8)."""
    rng = np.random.default_rng(seed)
    constants = {
        "s.w": nets.weight(rng, 32, 3, 3, 3),
        "a.w": nets.weight(rng, 24, 32, 1, 1),
        "b.w": nets.weight(rng, 40, 32, 1, 1),
        "c.w": nets.weight(rng, 40, 40, 3, 3),
        "j.w": nets.weight(rng, 16, 64, 1, 1),
    }
    nodes = [
        node("Conv", ["image", "s.w"], ["s"], "s", pads=[1] * 4),
        node("Relu", ["s"], ["sr"]),
        node("Conv", ["sr", "a.w"], ["a"], "a"),
        node("Conv", ["sr", "b.w"], ["b"], "b"),
        node("Clip", ["b", "low", "high"], ["br"]),
        node("Conv", ["br", "c.w"], ["c"], "c", pads=[1] * 4),
        node("Concat", ["a", "c"], ["joined"], axis=1),
        node("Relu", ["joined"], ["jr"]),
        node("Conv", ["jr", "j.w"], ["y"], "j"),
    ]
    constants |= {"low": np.float32(0), "high": np.float32(6)}
    ends = [("image", TensorProto.FLOAT, ["N", 3, 8, 8])], [("y", TensorProto.FLOAT, ["N", 16, 8, 8])]
    return nets.build(nodes, constants, *ends)


def images(count=60, seed=0):
    rng = np.random.default_rng([seed, 2])
    coarse = rng.standard_normal((count, 3, 4, 4))
    fine = np.kron(coarse, np.ones((1, 1, 2, 2))) + 0.3 * rng.standard_normal((count, 3, 8, 8))
    return fine.astype(np.float32)


def branching_net():
    """An If whose branches capture a tensor of the network and have tensors of their own."""
    inside = [node("Neg", ["h"], ["own"]), node("Clip", ["own", "", "six"], ["branch"])]
    result = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    branch = helper.make_graph(inside, "branch", [], [result])
    constants = {"w0": normal(WIDTH, WIDTH), "w1": normal(WIDTH, WIDTH, seed=1), "b": normal(WIDTH)}
    constants |= {"zero": np.float32(0), "six": np.float32(6)}
    nodes = [
        gemm("x", "g", "w0"),
        node("Relu", ["g"], ["h"]),
        node("ReduceSum", ["x"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["yes"]),
        node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
        gemm("i", "y", "w1"),
    ]
    return make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", WIDTH)}, constants)


NETS = {
    "conv": lambda: (nets.conv_net(), {"image": nets.as_floats(nets.pictures())}),
    "static batch": lambda: (nets.conv_net(4), {"image": nets.as_floats(nets.pictures())}),
    "tokens": lambda: (nets.block(), nets.sentences()),
    "two inputs": lambda: (nets.two_inputs(), nets.pairs(300)),
    "residual": lambda: (residual_net(), {"image": images()}),
    "inception": lambda: (inception_net(), {"image": images()}),
    "if": lambda: (branching_net(), {"x": rows(100)}),
}


def content(result):
    return result.model.SerializeToString(deterministic=True)


def off(result, output=0):
    return result.quality[output].relative_l2


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", NETS)
def test_every_net_is_compressed_within_its_budget(name, fit):
    """Verification is part of the run; the errors told are those of the layers in their new surroundings."""
    model, data = NETS[name]()
    done = compress(model, data=data, config=dataclasses.replace(BASE, fit=fit))
    assert done.after.params <= 0.5 * done.before.params
    onnx.checker.check_model(done.model, full_check=True)
    assert all(np.isfinite(quality.relative_l2) for quality in done.quality)
    for layer in done.layers:
        if layer.form != "dense":
            assert 0 <= layer.error < 1.5
            assert fit != "independent" or layer.damping is None
    assert done.settings["fit"] == fit


def test_over_several_layers_errors_do_not_add_up():
    model, data = mlp(8, 32), {"x": rows(2000, 32)}
    errors = {}
    for fit in FITS:
        config = dataclasses.replace(BASE, fit=fit, multiple=2, budget=Budget(params=0.45), method="hsvd")
        errors[fit] = off(compress(model, data=data, config=config))
    assert errors["cascade"] < 0.95 * errors["independent"]
    assert errors["cascade-linear"] < errors["independent"]


def test_the_deeper_layer_makes_up_for_a_shortcut_that_is_compressed_badly(monkeypatch):
    """The same plan twice: once with deep2 fitted to the sum less what beside gives now, once to its own output."""
    view = two_branches(outputs=("sum", "y"))
    more = {"method": "channels", "budget": Budget(params=0.95), "exclude": ("stem", "deep1")}
    config = dataclasses.replace(BASE, fit="cascade-linear", **more)
    data, channels = {"x": rows(1500)}, {"beside": 12, "deep2": 44}

    def planned(subject, curves, limits, dense):
        return Plan({n: next(c for c in curves[n] if len(c.support) == k) for n, k in channels.items()})

    def alone(cutter, layers, shapes):
        return [dataclasses.replace(la, behind=Behind(total=la.output), activation=LINEAR) for la in layers]

    monkeypatch.setattr("onnx_lrs.planning.search.make_plan", planned)
    with_correction = compress(view.model, data=data, config=config)
    monkeypatch.setattr("onnx_lrs.planning.cascade.with_targets", alone)
    without = compress(view.model, data=data, config=config)
    for done in (with_correction, without):
        assert {layer.name: layer.kept_channels for layer in done.layers} == channels
    assert off(with_correction) < 0.7 * off(without)


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_the_same_seed_gives_the_same_bytes_wherever_activations_wait(name, monkeypatch, tmp_path):
    model, data = NETS[name]()
    first = compress(model, data=data, config=BASE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spilled = []
    begin, put = Store.__init__, Store._on_disk
    monkeypatch.setattr(Store, "__init__", lambda self, limit, one_file=False: begin(self, 0, one_file))
    monkeypatch.setattr(Store, "_on_disk", lambda self, *what: spilled.append(what[0]) or put(self, *what))
    second = compress(model, data=data, config=BASE)
    assert spilled
    assert content(first) == content(second)
    assert not [*tmp_path.iterdir()]


def test_another_seed_gives_another_file():
    model, data = mlp(3), {"x": rows(200)}
    found = [content(compress(model, data=data, config=dataclasses.replace(BASE, seed=seed))) for seed in (0, 1)]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["tokens", "residual"])
def test_little_memory_gives_the_same_bytes(name):
    model, data = NETS[name]()
    found = [compress(model, data=data, config=dataclasses.replace(BASE, memory_bytes=m)) for m in (1 << 28, 1 << 31)]
    assert content(found[0]) == content(found[1])


@pytest.mark.parametrize("name", ["residual", "two inputs"])
def test_the_size_of_the_batches_hardly_matters(name):
    """Sums in another order: the plan is the same, and the outputs are as far off."""
    model, data = NETS[name]()
    found = [compress(model, data=data, config=dataclasses.replace(BASE, calibration_batch=batch)) for batch in (5, 64)]
    for other in found[1:]:
        assert [(la.form, la.rank) for la in other.layers] == [(la.form, la.rank) for la in found[0].layers]
        assert off(other) == pytest.approx(off(found[0]), rel=0.02)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("count", [3, 5])
def test_a_handful_of_samples_is_enough_to_run(count, fit):
    done = compress(mlp(3), data={"x": rows(count)}, config=dataclasses.replace(BASE, fit=fit))
    assert np.isfinite(off(done))
    assert done.after.params <= 0.5 * done.before.params


@pytest.mark.parametrize(
    "more",
    [
        {"method": "hsvd"},
        {"method": "channels"},
        {"method": "svd"},
        {"method": "magnitude"},
        {"method": "greedy", "structure": "elements"},
        {"budget": Budget(macs=0.5)},
    ],
    ids=lambda more: " ".join(map(str, more.values())),
)
def test_methods_in_a_cascade(more):
    done = compress(mlp(3), data={"x": rows(300)}, config=dataclasses.replace(BASE, **more))
    assert np.isfinite(off(done))
    assert any(layer.form != "dense" for layer in done.layers)


def test_a_wide_layer_in_a_cascade(monkeypatch):
    """Too wide for d x d statistics: it is fitted in the space of its outputs."""
    monkeypatch.setattr("onnx_lrs.config.GIB", 1)
    config = dataclasses.replace(BASE, memory_bytes=30 << 20)
    done = compress(nets.conv_net(), data={"image": nets.as_floats(nets.pictures(80))}, config=config)
    fc1 = next(layer for layer in done.layers if layer.name == "fc1")
    assert config.memory_bytes < 8 * 768**2 * 8
    assert fc1.form == "low-rank"
    assert off(done) < 0.5


def test_without_data_nothing_is_refitted():
    done = compress(mlp(3), config=dataclasses.replace(BASE, method="svd"))
    assert all(layer.damping is None for layer in done.layers)
