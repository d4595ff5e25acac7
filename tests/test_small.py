"""Layers alone in small graphs: they run, in the shapes that were asked for, and as they would run in their network."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrs.calibration.subject import measure_shapes
from onnx_lrs.graph.layers import Layer, find, tensors_around
from onnx_lrs.graph.model import View
from onnx_lrs.graph.small import LAYER, Shape, Small, build_small, small_of, streamer
from onnx_lrs.runtime.optimised import look
from onnx_lrs.runtime.session import with_outputs
from tests.builders import make, node, normal, ops, run, shapes

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="NCHWc is for x86-64")
OUT, CHANNELS, SIZE = 48, 32, 12
CONVS: dict[str, dict[str, Any]] = {
    "padded": {"pads": [1, 1, 1, 1]},
    "valid": {},
    "strides": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    "dilations": {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
    "uneven pads": {"pads": [0, 1, 2, 0]},
    "same upper": {"auto_pad": "SAME_UPPER"},
    "same lower": {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
}
ACTIVATIONS = {"relu": ("Relu", {}), "leaky": ("LeakyRelu", {"alpha": 0.2}), "clip": ("Clip", {}), "none": ("", {})}


def conv_net(
    kernel: tuple[int, ...] = (3, 3),
    fed: bool = False,
    bias: bool = True,
    shortcut: bool = False,
    activation: str = "none",
    **attributes: Any,
) -> onnx.ModelProto:
    """A Conv called ``mine`` from CHANNELS to OUT maps, with what is asked for around it."""
    attributes = {"kernel_shape": list(kernel)} | attributes
    size, ones = [SIZE] * len(kernel), [1] * len(kernel)
    constants = {"w": normal(OUT, CHANNELS, *kernel), "s": normal(OUT, CHANNELS, *ones), "low": np.float32(0)}
    constants |= {"f": normal(CHANNELS, CHANNELS, *ones), "b": normal(OUT), "high": np.float32(6)}
    nodes, source = [], "x"
    if fed:
        nodes += [node("Conv", ["x", "f"], ["f0"], "front"), node("Relu", ["f0"], ["f1"])]
        source = "f1"
    nodes.append(node("Conv", [source, "w", *["b"] * bias], ["y0"], "mine", **attributes))
    end = "y0"
    if shortcut:
        nodes += [node("Conv", ["x", "s"], ["s0"], "beside"), node("Add", ["y0", "s0"], ["y1"])]
        end = "y1"
    op, more = ACTIVATIONS[activation]
    if op:
        nodes.append(node(op, [end, *["low", "high"] * (op == "Clip")], ["y2"], **more))
        end = "y2"
    used = {name for n in nodes for name in n.input}
    constants = {name: value for name, value in constants.items() if name in used}
    return make(nodes, {"x": (1, CHANNELS, *size)}, [end], constants)


def gemm_net(trans_a: int, trans_b: int, rows: int = 3) -> onnx.ModelProto:
    weight = normal(OUT, CHANNELS) if trans_b else normal(CHANNELS, OUT)
    mine = node("Gemm", ["x", "w", "b"], ["y"], "mine", transA=trans_a, transB=trans_b)
    shape = (CHANNELS, rows) if trans_a else (rows, CHANNELS)
    return make([mine], {"x": shape}, ["y"], {"w": weight, "b": normal(OUT)})


def matmul_net(left: bool, ndim: int, bias: bool) -> onnx.ModelProto:
    weight = normal(OUT, CHANNELS) if left else normal(CHANNELS, OUT)
    shape = ([5] * (ndim - 2)) + ([CHANNELS, 7] if left else [7, CHANNELS])
    nodes = [node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], "mine")]
    constants = {"w": weight} | ({"b": normal(OUT)} if bias else {})
    if bias:
        nodes.append(node("Add", ["y", "b"], ["z"]))
    return make(nodes, {"x": shape}, ["z" if bias else "y"], constants)


NETS: dict[str, onnx.ModelProto] = {
    **{f"conv {name}": conv_net(**more) for name, more in CONVS.items()},
    **{f"conv {name} fed": conv_net(fed=True, **CONVS[name]) for name in ("padded", "strides", "uneven pads")},
    **{f"conv {name}": conv_net(activation=name, fed=True, pads=[1] * 4) for name in ("relu", "leaky", "clip")},
    "conv without bias": conv_net(bias=False),
    "conv shortcut": conv_net(shortcut=True, fed=True, activation="relu", pads=[1] * 4),
    "conv 1x1": conv_net((1, 1)),
    "conv 1-d": conv_net((3,), pads=[1, 1]),
    "conv 1-d fed": conv_net((3,), fed=True),
    **{f"gemm {a}{b}": gemm_net(a, b) for a, b in itertools.product((0, 1), repeat=2)},
    **{f"matmul {n}-d": matmul_net(False, n, n == 3) for n in (2, 3)},
    "matmul weight left": matmul_net(True, 2, False),
    "matmul weight left 3-d": matmul_net(True, 3, False),
}


def alone(model: onnx.ModelProto, weights: int = 10**4) -> tuple[Small, Layer]:
    """Return the layer called ``mine`` as a small graph, and as it is."""
    view = View(model)
    layers = [layer for layer in find(view)[0] if layer.name == "mine"]
    feed = {i.name: normal(*(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in model.graph.input}
    more = [*tensors_around(layers), *(la.behind.shortcut for la in layers if la.behind.shortcut)]
    found = measure_shapes(model, view, sorted(set(more)), feed, 1)
    return small_of(view, layers[0], found, weights), layers[0]


def rows_first(layer: Layer, rows: int, columns: int) -> tuple[int, int]:
    """Return how the layer stores a matrix of that size without taps."""
    turned = layer.op == "Gemm" and not layer.geometry.trans_b
    turned |= layer.op == "MatMul" and not layer.geometry.weight_left
    return (columns, rows) if turned else (rows, columns)


def weights_of(layer: Layer, shape: Shape) -> list[tuple[int, ...]]:
    """Return the shapes of the weights that a layer in that shape has, biases apart."""
    out, kernel = shape.outputs or layer.out, layer.geometry.kernel
    ones = (1,) * len(kernel)

    def of(rows: int, columns: int, spread: tuple[int, ...]) -> tuple[int, ...]:
        return (rows, columns, *spread) if layer.op == "Conv" else rows_first(layer, rows, columns)

    if shape.form == "tucker":
        one, core, other = (shape.inner, layer.channels), (shape.rank, shape.inner), (out, shape.rank)
        return [(*one, *ones), (*core, *kernel), (*other, *ones)]
    if shape.form == "spatial":
        return [(shape.rank, layer.channels, kernel[0], 1), (out, shape.rank, 1, kernel[1])]
    found = [of(shape.rank, layer.channels, kernel), of(out, shape.rank, ones)] if shape.rank else []
    if shape.kept or not shape.rank:
        found.append(of(out, shape.kept or layer.channels, kernel))
    return found


SHAPES = {
    "dense": Shape(),
    "fewer outputs": Shape(outputs=24),
    "low rank": Shape("low-rank", 8),
    "channels": Shape("channels", 0, 16),
    "channels that are there alone": Shape("channels", 0, 16, None, False),
    "fewer outputs of them": Shape("channels", 0, 16, 24, False),
    "low rank with channels": Shape("low-rank + channels", 8, 16),
    "all at once": Shape("low-rank + channels", 8, 16, 24),
    "spatial": Shape("spatial", 8),
    "spatial with fewer outputs": Shape("spatial", 8, 0, 24),
    "tucker": Shape("tucker", 8, inner=12),
    "tucker with fewer outputs": Shape("tucker", 8, 0, 24, inner=12),
}


@pytest.mark.parametrize("wanted", SHAPES)
@pytest.mark.parametrize("name", NETS)
def test_every_layer_runs_in_every_shape(name, wanted):
    small, layer = alone(NETS[name])
    shape = SHAPES[wanted]
    square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
    if shape.form in ("spatial", "tucker") and not square:
        return  # no such candidate
    model, feed = build_small(small, shape)
    neighbours = {"input.weight", "shortcut.weight"}
    weights = [dims for key, dims in shapes(model).items() if key not in neighbours and len(dims) > 1]
    biases = [key for key, dims in shapes(model).items() if "bias" in key]
    assert sorted(weights) == sorted(weights_of(layer, shape))
    assert len(biases) == (layer.bias is not None)
    assert ops(model).count("Gather") == (shape.gathered and shape.kept > 0)

    axis = {"Conv": 1, "Gemm": 1}.get(layer.op, len(small.output_shape) - (2 if layer.geometry.weight_left else 1))
    expected = tuple((shape.outputs or n) if i == axis else n for i, n in enumerate(small.output_shape))
    (value,) = run(with_outputs(model, [LAYER]), feed)
    assert value.shape == expected
    assert np.isfinite(value).all()
    assert value.std() > 0


@pytest.mark.parametrize("name", NETS)
def test_a_small_graph_has_the_surroundings_of_its_layer(name):
    small, _ = alone(NETS[name])
    model, feed = build_small(small, Shape())
    real = ops(NETS[name])
    assert ("Add" in ops(model)) == ("Add" in real)
    for op in ("LeakyRelu", "Clip"):
        assert ops(model).count(op) == real.count(op)
    assert small.fed == ("fed" in name or name.split()[1] in ("relu", "leaky", "clip", "shortcut"))
    assert small.shortcut == ("shortcut" in name)
    assert set(feed) == {"input"} | ({"shortcut"} if small.shortcut else set())
    if small.fed:
        assert feed["input"].shape[1] == 1  # a single channel, spread by a 1x1 Conv
    run(model, feed)


# ------------------------------------------------------------------------------------------------ keys


def twins(**second: Any) -> onnx.ModelProto:
    """Two Conv behind each other, each fed by one; what is given is changed in the second."""
    one = {"kernel_shape": [3, 3], "pads": [1] * 4}
    constants = {
        "f": normal(CHANNELS, 1, 1, 1),
        "w": normal(CHANNELS, CHANNELS, 3, 3),
        "v": normal(second.pop("out", CHANNELS), CHANNELS, *second.get("kernel_shape", [3, 3]), seed=1),
    }
    last = second.pop("activation", "Relu")
    nodes = [
        node("Conv", ["x", "f"], ["a"], "front"),
        node("Conv", ["a", "w"], ["b"], "one", **one),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "v"], ["d"], "two", **(one | second)),
        node(last, ["d"], ["e"]),
        node("Flatten", ["e"], ["y"]),
    ]
    return make(nodes, {"x": (1, 1, SIZE, SIZE)}, ["y"], constants)


def keys(model: onnx.ModelProto) -> list[str]:
    view = View(model)
    layers = find(view)[0]
    found = measure_shapes(model, view, sorted(tensors_around(layers)), {"x": normal(1, 1, SIZE, SIZE)}, 1)
    return [small_of(view, layer, found, 1).key for layer in layers]


def test_equal_layers_in_different_places_have_equal_keys():
    one, two = keys(twins())
    assert one == two
    assert keys(twins()) == [one, two]  # in another model as well


@pytest.mark.parametrize(
    "changed",
    [
        {"pads": [0] * 4},
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2] * 4},
        {"kernel_shape": [1, 1], "pads": [0] * 4},
        {"out": 40},
        {"activation": "Sigmoid"},
        {"activation": "LeakyRelu"},
    ],
    ids=str,
)
def test_different_layers_have_different_keys(changed):
    one, two = keys(twins(**changed))
    assert one != two


def test_what_stands_around_a_layer_is_in_its_key():
    plain = conv_net(pads=[1] * 4)
    others = [
        conv_net(pads=[1] * 4, fed=True),
        conv_net(pads=[1] * 4, bias=False),
        conv_net(pads=[1] * 4, activation="relu"),
        conv_net(pads=[1] * 4, shortcut=True),
    ]
    found = [alone(net)[0].key for net in (plain, *others)]
    assert len(set(found)) == len(found)
    cold = [alone(gemm_net(0, 1, 1), weights)[0] for weights in (10**4, 10**6, 10**6 + 1, 10**8)]
    assert [small.cold_mib for small in cold] == [1, 2, 2, 64]
    assert len({small.key for small in cold}) == 3


def test_keys_of_shapes_differ():
    fields = itertools.product(("low-rank", "channels"), (0, 1, 11), (0, 1, 11), (None, 1), (True, False))
    every = [Shape(*values) for values in fields]
    assert len({shape.key for shape in every}) == len(every)


# ------------------------------------------------------------------------------------------------ in its network


@x86
@pytest.mark.parametrize("name", ["conv relu", "conv strides fed", "conv shortcut"])
def test_a_fed_conv_runs_in_the_blocked_layout_with_all_that_is_fused_in_the_network(name):
    small, _ = alone(NETS[name])
    for shape in (Shape(), Shape("low-rank", 16), Shape("channels", 0, 16)):
        model, _ = build_small(small, shape)
        seen = look(model, 1)
        assert seen is not None
        assert seen.outside_nchwc == ()
        assert seen.nchwc == seen.convs == ops(model).count("Conv")
        assert seen.unfused_sums == seen.unfused_activations == ()


def test_a_dense_small_graph_has_the_arithmetic_of_the_layer():
    """Multiply-accumulates, counted by the shapes that really come out."""
    for name in ("conv strides", "conv dilations", "conv same lower", "conv 1-d"):
        small, layer = alone(NETS[name])
        model, feed = build_small(small, Shape())
        (value,) = run(with_outputs(model, [LAYER]), feed)
        assert value.shape == small.output_shape == run(NETS[name])[0].shape
        assert math.prod(value.shape) * layer.d == math.prod(small.output_shape) * CHANNELS * layer.taps


def test_the_streamer_reads_what_it_says():
    for mib in (1, 4):
        model, feed = streamer(mib)
        (weight,) = shapes(model).values()
        assert 4 * math.prod(weight) == mib << 20
        assert run(model, feed)[0].shape == (1, weight[1])


def test_random_weights_are_the_same_every_time():
    small = dataclasses.replace(alone(NETS["conv relu"])[0])
    shape = Shape("low-rank + channels", 8, 16)
    first, second = (build_small(small, shape)[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
