"""im2col columns: all of them times the weight are the layer as ONNX Runtime computes it; a sample covers the map."""

import dataclasses
import itertools
import math

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_lrs.calibration.columns import _strata, channel_major, columns, is_by_sample
from onnx_lrs.graph.layers import Geometry, Layer

ALL = np.zeros((1, 10**4))  # more strata than any map below has positions


def position_count(layer, input_shape, output_shape):
    """How many columns one run of the layer has."""
    if layer.op == "Conv":
        return input_shape[0] * math.prod(output_shape[2:])
    return math.prod(input_shape) // layer.channels


def make_layer(op, weight_shape, out, channels, taps, **geometry):
    names = {"name": op, "op": op, "node": "y", "input": "x", "weight": "w"}
    return Layer(
        **names,
        weight_shape=weight_shape,
        out=out,
        channels=channels,
        taps=taps,
        bias=None,
        bias_add=None,
        affine=True,
        geometry=Geometry(**geometry),
    )


def conv_layer(weight, strides=None, dilations=None, pads=None, auto_pad="NOTSET"):
    out, channels, *kernel = weight.shape
    axes = len(kernel)
    return make_layer(
        "Conv",
        weight.shape,
        out,
        channels,
        math.prod(kernel),
        kernel=tuple(kernel),
        strides=tuple(strides or [1] * axes),
        dilations=tuple(dilations or [1] * axes),
        pads=tuple(pads or [0] * 2 * axes),
        auto_pad=auto_pad,
    )


def run_op(op, inputs, weights, **attributes):
    """Return what ONNX Runtime computes for one node."""
    graph = helper.make_graph(
        [
            helper.make_node(
                op, [*inputs, *weights][:: -1 if attributes.pop("weight_first", False) else 1], ["y"], **attributes
            )
        ],
        "one",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def run_conv(layer, x, weight):
    g = layer.geometry
    attributes = {"strides": g.strides, "dilations": g.dilations, "kernel_shape": g.kernel, "auto_pad": g.auto_pad}
    if g.auto_pad == "NOTSET":
        attributes["pads"] = g.pads
    return run_op("Conv", {"x": x}, {"w": weight}, **attributes)


def all_columns(layer, x):
    """Return every column, channel-major, in the order of samples and output positions."""
    return columns(layer, x, np.repeat(ALL, len(x), axis=0))[:, channel_major(layer)]


def outputs_as_rows(y):
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_conv_is_columns_times_weight(layer, x, weight):
    y = run_conv(layer, x, weight)
    found = all_columns(layer, x)
    assert found.dtype == np.float32
    assert len(found) == position_count(layer, x.shape, y.shape)
    np.testing.assert_allclose(found @ weight.reshape(len(weight), -1).T, outputs_as_rows(y), atol=2e-5)


SHAPES = {1: ((11,), (3,)), 2: ((9, 7), (3, 2)), 3: ((5, 6, 4), (2, 3, 1))}


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pads", ["none", "even", "uneven"])
def test_convolution_with_explicit_pads(axes, stride, dilation, pads):
    size, kernel = SHAPES[axes]
    sides = {"none": [0] * 2 * axes, "even": [1] * 2 * axes, "uneven": [*range(axes), *range(axes, 0, -1)]}[pads]
    weight = numbers(4, 3, *kernel, seed=1)
    layer = conv_layer(weight, [stride] * axes, [dilation] * axes, sides)
    assert_conv_is_columns_times_weight(layer, numbers(2, 3, *size), weight)


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution_with_automatic_pads(axes, stride, auto_pad):
    size, kernel = SHAPES[axes]
    weight = numbers(4, 3, *kernel, seed=1)
    layer = conv_layer(weight, [stride] * axes, auto_pad=auto_pad)
    assert_conv_is_columns_times_weight(layer, numbers(2, 3, *size), weight)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [((1, 1), 2), ((2, 4), 1), ((2, 2), 3), ((5, 3), 2)])
def test_automatic_pads_of_kernels_smaller_than_the_stride_and_even_ones(auto_pad, kernel, stride):
    weight = numbers(2, 3, *kernel, seed=2)
    layer = conv_layer(weight, [stride, stride], auto_pad=auto_pad)
    assert_conv_is_columns_times_weight(layer, numbers(1, 3, 8, 9), weight)


@pytest.mark.parametrize("stride", [1, 2])
def test_valid_pads_with_dilation(stride):
    """ONNX Runtime refuses dilation together with SAME."""
    weight = numbers(2, 3, 3, 3, seed=2)
    layer = conv_layer(weight, [stride, stride], [2, 3], auto_pad="VALID")
    assert_conv_is_columns_times_weight(layer, numbers(1, 3, 11, 10), weight)


def test_strides_dilations_and_pads_differ_by_axis():
    weight = numbers(3, 2, 3, 2, seed=3)
    layer = conv_layer(weight, [2, 1], [1, 3], [0, 2, 1, 3])
    assert_conv_is_columns_times_weight(layer, numbers(3, 2, 8, 6), weight)


def test_channel_major_is_the_order_of_the_weight():
    layer = conv_layer(numbers(4, 3, 2, 2))
    tap_major = [(channel, tap) for tap in range(4) for channel in range(3)]
    weight_order = [(channel, tap) for channel in range(3) for tap in range(4)]
    assert [tap_major[i] for i in channel_major(layer)] == weight_order


def as_set(rows):
    return {row.tobytes() for row in np.ascontiguousarray(rows)}


@pytest.mark.parametrize("wanted", [1, 2, 7, 20, 29])
def test_a_sample_is_a_part_of_all_columns_without_repetition(wanted):
    layer = conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4)
    x = numbers(4, 3, 6, 5)
    every = columns(layer, x, np.repeat(ALL, 4, axis=0)).reshape(4, 30, -1)
    found = columns(layer, x, np.random.default_rng(0).random((4, wanted))).reshape(4, wanted, -1)
    for own, picked in zip(every, found, strict=True):
        assert len(as_set(picked)) == wanted
        assert as_set(picked) <= as_set(own)


def test_images_are_sampled_at_different_positions():
    layer = conv_layer(numbers(2, 1, 1, 1))
    x = np.broadcast_to(np.arange(100, dtype=np.float32).reshape(1, 1, 10, 10), (6, 1, 10, 10))
    found = columns(layer, x, np.random.default_rng(0).random((6, 5))).reshape(6, 5)
    assert len({tuple(np.sort(row)) for row in found}) == 6


def test_the_numbers_alone_decide_the_positions():
    layer = conv_layer(numbers(2, 3, 3, 3))
    x, uniform = numbers(4, 3, 9, 9), np.random.default_rng(0).random((4, 5))
    together = columns(layer, x, uniform)
    alone = [columns(layer, x[i : i + 1], uniform[i : i + 1]) for i in range(4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 400), data=st.data(), seed=st.integers(0, 10**6))
def test_strata_are_covered_once_each(count, data, seed):
    """No position twice, and no gap (around the end, too) longer than two strata."""
    wanted = data.draw(st.integers(1, count))
    drawn = np.random.default_rng(seed).random((3, wanted))
    drawn[2] = np.nextafter(1.0, 0.0)
    for row in np.sort(_strata(drawn, count), axis=1):
        assert row[0] >= 0
        assert row[-1] < count
        assert len(set(row)) == wanted
        gaps = np.diff([*row, row[0] + count])
        assert gaps.max() <= 2 * math.ceil(count / wanted) - 1 or wanted == 1


@pytest.mark.parametrize(("count", "wanted"), [(10, 1), (9, 2), (10, 7), (16, 4), (5, 4)])
def test_every_position_is_equally_likely(count, wanted):
    rows = 40_000
    drawn = _strata(np.random.default_rng(0).random((rows, wanted)), count)
    share = np.bincount(drawn.ravel(), minlength=count) / rows
    expected = wanted / count
    np.testing.assert_allclose(share, expected, atol=5 * math.sqrt(expected * (1 - expected) / rows))


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("trans_a", [False, True])
def test_gemm(trans_a, trans_b):
    matrix, x = numbers(5, 4, seed=1), numbers(3, 4)
    layer = make_layer("Gemm", (), 5, 4, 1, trans_a=trans_a, trans_b=trans_b)
    given_x, given_w = (x.T if trans_a else x), (matrix if trans_b else matrix.T)
    y = run_op(
        "Gemm",
        {"x": np.ascontiguousarray(given_x)},
        {"w": np.ascontiguousarray(given_w)},
        transA=int(trans_a),
        transB=int(trans_b),
    )
    np.testing.assert_allclose(all_columns(layer, given_x) @ matrix.T, y, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
def test_matmul_with_the_weight_on_the_right(lead):
    matrix, x = numbers(5, 4, seed=1), numbers(*lead, 4)
    layer = make_layer("MatMul", (4, 5), 5, 4, 1)
    y = run_op("MatMul", {"x": x}, {"w": np.ascontiguousarray(matrix.T)})
    found = all_columns(layer, x if lead else x[None])
    assert len(found) == position_count(layer, x.shape, y.shape)
    np.testing.assert_allclose(found @ matrix.T, y.reshape(-1, 5), atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 4, 3)])
def test_matmul_with_the_weight_on_the_left(shape):
    matrix, x = numbers(5, 4, seed=1), numbers(*shape)
    layer = make_layer("MatMul", (5, 4), 5, 4, 1, weight_left=True)
    y = run_op("MatMul", {"x": x}, {"w": matrix}, weight_first=True)
    rows = np.moveaxis(y, -2, -1).reshape(-1, 5) if len(shape) > 1 else y[None]
    np.testing.assert_allclose(columns(layer, x, ALL) @ matrix.T, rows, atol=1e-5)


def test_rows_of_a_matrix_product_are_sampled_without_repetition():
    layer = make_layer("MatMul", (4, 5), 5, 4, 1)
    x = numbers(3, 50, 4)
    found = columns(layer, x, np.random.default_rng(0).random((3, 7)))
    assert found.shape == (21, 4)
    assert len(as_set(found)) == 21
    assert as_set(found) <= as_set(x.reshape(-1, 4))


FOLDED = {  # layer, and an input of 3 samples cut into 2 parts each or not
    "images": (conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4), numbers(3, 3, 6, 6)),
    "windows": (conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4), numbers(6, 3, 6, 6)),
    "more windows than numbers": (conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4), numbers(30, 3, 6, 6)),
    "rows": (make_layer("Gemm", (4, 5), 5, 4, 1), numbers(60, 4)),
    "rows of a transpose": (make_layer("Gemm", (4, 5), 5, 4, 1, trans_a=True), numbers(4, 60)),
    "tokens": (make_layer("MatMul", (4, 5), 5, 4, 1), numbers(3, 50, 4)),
    "weight on the left": (make_layer("MatMul", (5, 4), 5, 4, 1, weight_left=True), numbers(3, 4, 50)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_the_columns_of_a_sample_do_not_depend_on_its_neighbours(case):
    layer, x = FOLDED[case]
    uniform = np.random.default_rng(0).random((3, 7))
    together = columns(layer, x, uniform)
    parts = np.split(x, 3, axis=1 if case == "rows of a transpose" else 0)
    alone = [columns(layer, part, row[None]) for part, row in zip(parts, uniform, strict=True)]
    assert is_by_sample(layer, x, 3)
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_first_axis_that_the_samples_do_not_divide_says_so():
    conv = conv_layer(numbers(2, 3, 3, 3))
    dense = make_layer("MatMul", (4, 5), 5, 4, 1)
    assert not is_by_sample(conv, numbers(40, 3, 5, 5), 3)
    assert not is_by_sample(dense, numbers(50, 3, 4), 3)  # time first
    assert not is_by_sample(dense, numbers(4), 3)
    assert is_by_sample(dense, numbers(4), 1)


@pytest.mark.parametrize("folded", [6, 12, 40])
def test_more_images_than_samples_share_the_numbers(folded):
    """A graph that cuts windows out of an image has more images in its batch than the run has samples."""
    layer = conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4)
    x = numbers(folded, 3, 5, 4)
    found = columns(layer, x, np.random.default_rng(0).random((3, 8)))
    each = max(24 // folded, 1)
    assert len(found) == folded * each
    every = columns(layer, x, np.repeat(ALL, folded, axis=0)).reshape(folded, 20, -1)
    for own, picked in zip(every, found.reshape(folded, each, -1), strict=True):
        assert as_set(picked) <= as_set(own)
        assert len(as_set(picked)) == each


def test_fewer_images_than_samples_get_more_positions_each():
    layer = conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4)
    found = columns(layer, numbers(2, 3, 6, 6), np.random.default_rng(0).random((6, 4)))
    assert len(found) == 24


def test_the_values_are_not_changed_and_need_not_be_contiguous_float32():
    layer = conv_layer(numbers(2, 3, 3, 3), pads=[1] * 4)
    x = numbers(2, 5, 4, 3).astype(np.float64).transpose(0, 3, 1, 2)
    kept = x.copy()
    found = all_columns(layer, x)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(found, all_columns(layer, np.ascontiguousarray(x, np.float32)))


def test_every_geometry_field_of_a_convolution_is_read():
    """Another value of any field gives other columns, so none of the comparisons above passes by chance."""
    x, weight = numbers(1, 2, 9, 9), numbers(2, 2, 3, 3)
    plain = conv_layer(weight)
    changes = {"strides": (2, 1), "dilations": (1, 2), "pads": (1, 0, 0, 0), "auto_pad": "SAME_UPPER"}
    found = [all_columns(plain, x)]
    for field, value in changes.items():
        changed = dataclasses.replace(plain.geometry, **{field: value})
        found.append(all_columns(dataclasses.replace(plain, geometry=changed), x))
    for one, two in itertools.combinations(found, 2):
        assert one.shape != two.shape or not np.array_equal(one, two)


def test_the_oracle_is_the_standard():
    """The reference evaluator of onnx agrees with ONNX Runtime on one of the cases (both are independent of us)."""
    weight, x = numbers(2, 2, 3, 3), numbers(1, 2, 6, 6)
    layer = conv_layer(weight, [2, 2], pads=[1, 0, 0, 1])
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 0, 0, 1])
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "w")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    (y,) = ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": x, "w": weight})
    np.testing.assert_allclose(run_conv(layer, x, weight), y, atol=1e-5)
