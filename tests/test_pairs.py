"""Columns and responses are read at the same positions: the layer maps the ones to the others."""

import numpy as np
import pytest

from onnx_lrs.calibration.columns import channel_major, columns, is_by_sample, responses
from onnx_lrs.calibration.frontier import Call
from onnx_lrs.calibration.pairs import Sink, pair_of, reading_of
from onnx_lrs.errors import VerificationError
from onnx_lrs.graph.layers import bias_row, find, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.runtime.session import Session, with_outputs
from tests.builders import make, node, normal

GIB = 1 << 30
OUT, CHANNELS = 7, 5


class Values:
    """A network whose tensors are known, for one call."""

    def __init__(self, values):
        self.values = values

    def value(self, name, call):
        assert call == 0
        return self.values[name]


def one_layer(nodes, inputs, outputs, constants, **how):
    """Return a view, its only layer, and all tensors around it for some input."""
    model = make(nodes, inputs, outputs, constants, **how)
    view = View(model)
    (layer,), _ = find(view, smallest=1)
    return view, layer


def computed(view, feed, names):
    with Session(with_outputs(view.model, [n for n in names if n not in feed]), 1) as session:
        return feed | session.run(feed)


def conv(size, kernel, **attributes):
    constants = {"w": normal(OUT, CHANNELS, *kernel), "b": normal(OUT)}
    nodes = [node("Conv", ["x", "w", "b"], ["y"], "layer", **attributes)]
    return nodes, {"x": ("N", CHANNELS, *size)}, {"y": ("N", OUT, *[None] * len(size))}, constants, (CHANNELS, *size)


CONVS = {
    "1d": conv((13,), (3,), strides=[2], pads=[1, 2]),
    "2d": conv((9, 8), (3, 3), pads=[1, 1, 1, 1]),
    "2d strides and uneven pads": conv((11, 9), (3, 2), strides=[2, 3], pads=[0, 1, 2, 0]),
    "2d dilations": conv((12, 10), (3, 3), dilations=[2, 3], pads=[2, 0, 1, 3]),
    "2d same upper": conv((9, 7), (4, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    "2d same lower": conv((9, 7), (4, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    "2d valid": conv((9, 7), (4, 3), auto_pad="VALID"),
    "1x1": conv((6, 6), (1, 1), strides=[2, 1]),
    "3d": conv((5, 6, 4), (2, 3, 1), strides=[1, 2, 1]),
}
MATRICES = {
    "Gemm": ([node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1)], (6, CHANNELS)),
    "Gemm alpha and beta": ([node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1, alpha=0.5, beta=2.0)], (6, 5)),
    "Gemm transA": ([node("Gemm", ["x", "w", "b"], ["y"], "layer", transA=1, transB=1)], (CHANNELS, 6)),
    "MatMul tokens": ([node("MatMul", ["x", "wt"], ["m"], "layer"), node("Add", ["m", "b"], ["y"])], (6, 9, CHANNELS)),
    "MatMul left": ([node("MatMul", ["w", "x"], ["y"], "layer")], (CHANNELS, 6)),
    "MatMul left of a stack": ([node("MatMul", ["w", "x"], ["y"], "layer")], (6, CHANNELS, 9)),
}


def matrix(case):
    nodes, shape = MATRICES[case]
    read = {name for each in nodes for name in each.input}
    weights = {"w": normal(OUT, CHANNELS), "wt": normal(CHANNELS, OUT), "b": normal(OUT)}
    constants = {name: value for name, value in weights.items() if name in read}
    return one_layer(nodes, {"x": shape}, ["y"], constants), shape


def assert_same_positions(view, layer, x, samples, count):
    """W x + b of the sampled columns are the sampled responses, and fewer than all are sampled where that was asked."""
    y = computed(view, {"x": x}, [layer.output])[layer.output]
    uniform = np.random.default_rng(3).random((samples, count))
    by_sample = is_by_sample(layer, x, samples)
    found, wanted = columns(layer, x, uniform), responses(layer, y, uniform, by_sample)
    assert len(found) == len(wanted)
    assert wanted.dtype == np.float32
    bias = bias_row(view, layer)
    expected = found[:, channel_major(layer)] @ weight_matrix(view, layer).T + (0 if bias is None else bias)
    np.testing.assert_allclose(wanted, expected, atol=3e-5)
    return len(wanted), y.size // layer.out


@pytest.mark.parametrize("count", [1, 4, 10**3])
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case, count):
    *built, shape = CONVS[case]
    view, layer = one_layer(*built)
    rows, every = assert_same_positions(view, layer, normal(3, *shape), 3, count)
    assert rows == (every if count == 10**3 else 3 * count)


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_a_convolution_over_windows_folded_into_the_batch(samples):
    """12 images of 1, 2, 3 or 4 samples; 5 samples share all numbers, as nobody can tell whose image is whose."""
    *built, shape = CONVS["2d strides and uneven pads"]
    view, layer = one_layer(*built)
    for images in (12, 5):
        rows, every = assert_same_positions(view, layer, normal(images, *shape), samples, 6)
        assert rows < every


@pytest.mark.parametrize("count", [1, 4, 10**3])
@pytest.mark.parametrize("case", MATRICES)
def test_matrix_products(case, count):
    (view, layer), shape = matrix(case)
    for samples in (1, 2, 6):
        rows, every = assert_same_positions(view, layer, normal(*shape), samples, count)
        assert rows <= every
        assert rows == every or rows == samples * count or not is_by_sample(layer, normal(*shape), samples)


# ---------------------------------------------------------------- pairs and their statistics


def pairs(view, layer, original, compressed, count=5, samples=3):
    """Return reading and pair of one call; networks are tensors by name."""
    reading = reading_of(view, layer, GIB)
    uniform = np.random.default_rng(1).random((samples, count))
    call = Call("fit", np.arange(samples))
    return reading, pair_of(reading, (Values(original), Values(compressed)), 0, call, uniform)


def collected(reading, pair, rows, summed=True):
    sink = Sink(reading, rows, summed)
    count = len(pair.columns)
    halves = slice(0, count // 2), slice(count // 2, count)
    priorities, items = np.random.default_rng(2).permutation(count) / count, np.arange(count)
    for half in halves:
        parts = (a if a is None else a[half] for a in (pair.columns, pair.responses, pair.offset))
        sink.add(type(pair)(*parts, pair.by_sample), priorities[half], items[half])
    return sink.statistic(), np.argsort(priorities)


def test_of_equal_networks_the_response_is_the_layer_itself():
    *built, shape = CONVS["2d dilations"]
    view, layer = one_layer(*built)
    values = computed(view, {"x": normal(3, *shape)}, ["y"])
    reading, pair = pairs(view, layer, values, values)
    assert pair.offset is None
    assert reading.scale is None
    found, order = collected(reading, pair, rows=9)
    weight, bias = weight_matrix(view, layer), bias_row(view, layer)
    np.testing.assert_array_equal(found.items, order[:9])
    np.testing.assert_allclose(found.sample.outputs, found.sample.inputs @ weight.T + bias, atol=3e-5)
    np.testing.assert_allclose(found.response.cross, weight @ found.moments.cov, atol=1e-4)
    np.testing.assert_allclose(found.response.mean, weight @ found.moments.mean + bias, atol=1e-5)
    assert found.moments.count == len(pair.columns) == 15
    x = pair.columns[:, channel_major(layer)].astype(np.float64)
    np.testing.assert_allclose(found.moments.cov, np.cov(x, rowvar=False, bias=True), atol=1e-5)
    judged, _ = collected(reading, pair, rows=9, summed=False)
    assert (judged.moments, judged.response) == (None, None)
    np.testing.assert_array_equal(judged.sample.inputs, found.sample.inputs)


def test_columns_come_from_the_compressed_network_and_responses_from_the_original():
    (view, layer), shape = matrix("Gemm")
    x = normal(*shape)
    original = computed(view, {"x": x}, ["y"])
    _, pair = pairs(view, layer, original, {"x": x + 1, "y": None}, samples=6)
    np.testing.assert_array_equal(pair.columns, x + 1)
    np.testing.assert_array_equal(pair.responses, original["y"])


def norm_rows(prefix):
    return {f"{prefix}.{name}": normal(OUT, seed=i) for i, name in enumerate("bm")} | {
        f"{prefix}.{name}": 0.5 + np.abs(normal(OUT, seed=9 + i)) for i, name in enumerate("sv")
    }


def norm(prefix, reads, makes):
    return node("BatchNormalization", [reads, *(f"{prefix}.{n}" for n in "sbmv")], [makes], epsilon=1e-3)


def residual(first, second, kernel=(3, 3)):
    """Conv, maybe a BatchNormalization, Add of a shortcut, maybe another one, Relu."""
    steps, here = [node("Conv", ["x", "w", "b"], ["y"], "layer", pads=[1] * 4)], "y"
    constants = {"w": normal(OUT, CHANNELS, *kernel), "b": normal(OUT)}
    if first:
        steps, here, constants = [*steps, norm("n", here, "n")], "n", constants | norm_rows("n")
    steps, here = [*steps, node("Add", ["s", here], ["a"])], "a"
    if second:
        steps, here, constants = [*steps, norm("k", here, "k")], "k", constants | norm_rows("k")
    steps.append(node("Relu", [here], ["z"]))
    inputs = {"x": ("N", CHANNELS, 6, 6), "s": ("N", OUT, 6, 6)}
    return one_layer(steps, inputs, {"z": ("N", OUT, 6, 6)}, constants)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_behind_a_shortcut_the_response_makes_the_sum_right(first, second):
    """scale * response + offset is the original's sum, whatever the compressed network's shortcut is."""
    view, layer = residual(first, second)
    assert layer.behind.shortcut == "s"
    total = layer.behind.total
    original = computed(view, {"x": normal(3, CHANNELS, 6, 6), "s": normal(3, OUT, 6, 6)}, ["y", total])
    worse = {"x": original["x"] + 0.1, "s": original["s"] + normal(3, OUT, 6, 6, seed=5)}
    reading, pair = pairs(view, layer, original, worse)
    scale = 1.0 if reading.scale is None else reading.scale
    uniform = np.random.default_rng(1).random((3, 5))
    sampled = {name: responses(layer, original[name], uniform, True) for name in ("y", total)}
    np.testing.assert_allclose(scale * pair.responses + pair.offset, sampled[total], atol=1e-4)
    assert np.abs(pair.responses - sampled["y"]).mean() > 0.1
    exact = computed(view, worse, ["y", total])  # the offset is what the compressed network adds to its layer
    own = {name: responses(layer, exact[name], uniform, True) for name in ("y", total)}
    np.testing.assert_allclose(scale * own["y"] + pair.offset, own[total], atol=1e-4)
    found, order = collected(reading, pair, rows=10)
    np.testing.assert_array_equal(found.sample.offset, pair.offset[order[:10]])
    np.testing.assert_array_equal(found.sample.outputs, pair.responses[order[:10]])
    np.testing.assert_allclose(found.response.mean, pair.responses.mean(axis=0), atol=1e-5)


def test_with_an_exact_shortcut_the_response_is_the_layers_own_output():
    view, layer = residual(first=True, second=True)
    values = computed(view, {"x": normal(3, CHANNELS, 6, 6), "s": normal(3, OUT, 6, 6)}, ["y", layer.behind.total])
    _, pair = pairs(view, layer, values, values)
    own = responses(layer, values["y"], np.random.default_rng(1).random((3, 5)), True)
    np.testing.assert_allclose(pair.responses, own, atol=1e-4)


def test_a_normalisation_alone_is_scale_and_offset():
    nodes = [node("Conv", ["x", "w", "b"], ["y"], "layer"), norm("n", "y", "n"), node("Relu", ["n"], ["z"])]
    constants = {"w": normal(OUT, CHANNELS, 1, 1), "b": normal(OUT)} | norm_rows("n")
    view, layer = one_layer(nodes, {"x": ("N", CHANNELS, 4, 4)}, {"z": ("N", OUT, 4, 4)}, constants)
    values = computed(view, {"x": normal(3, CHANNELS, 4, 4)}, ["y", "n"])
    reading, pair = pairs(view, layer, values, values)
    uniform = np.random.default_rng(1).random((3, 5))
    sampled = {name: responses(layer, values[name], uniform, True) for name in ("y", "n")}
    np.testing.assert_allclose(pair.responses, sampled["y"], atol=1e-5)
    np.testing.assert_allclose(reading.scale * pair.responses + pair.offset, sampled["n"], atol=1e-5)


def test_one_row_for_all_samples_is_added_to_each():
    """A shortcut computed from constants: at a batch of 1, where shapes are measured, it looks like any other."""
    nodes = [
        node("Exp", ["e"], ["s"]),
        node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1),
        node("Add", ["y", "s"], ["a"]),
        node("Relu", ["a"], ["z"]),
    ]
    constants = {"w": normal(OUT, CHANNELS), "b": normal(OUT), "e": normal(1, OUT)}
    view, layer = one_layer(nodes, {"x": ("N", CHANNELS)}, {"z": ("N", OUT)}, constants)
    assert layer.behind.shortcut == "s"
    values = computed(view, {"x": normal(6, CHANNELS)}, ["y", "a", "s"])
    _, pair = pairs(view, layer, values, values, samples=6)
    np.testing.assert_allclose(pair.offset, np.repeat(np.exp(constants["e"]), 6, axis=0), rtol=1e-6)
    np.testing.assert_allclose(pair.responses, values["y"], atol=1e-5)


def test_a_wide_layer_is_read_in_its_outputs():
    """y' = E (W x): the columns are W x, and the response beside them is W x + b."""
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1)]
    constants = {"w": normal(OUT, 300), "b": normal(OUT)}
    view, layer = one_layer(nodes, {"x": ("N", 300)}, {"y": ("N", OUT)}, constants)
    values = computed(view, {"x": normal(6, 300)}, ["y"])
    reading = reading_of(view, layer, 1 << 20)
    assert reading.width == OUT
    call, uniform = Call("fit", np.arange(6)), np.zeros((6, 1))
    pair = pair_of(reading, (Values(values), Values(values)), 0, call, uniform)
    np.testing.assert_allclose(pair.columns + constants["b"], pair.responses, atol=1e-4)
    found, _ = collected(reading, pair, rows=6)
    np.testing.assert_allclose(found.response.cross, found.moments.cov, atol=1e-3)


def test_values_that_are_not_finite_are_refused_with_the_layers_name():
    (view, layer), shape = matrix("Gemm")
    values = computed(view, {"x": normal(*shape)}, ["y"])
    with pytest.raises(VerificationError, match="'layer'"):
        pairs(view, layer, values, {"x": np.full(shape, np.nan, np.float32)}, samples=6)
