"""Models that are quantised already: back to float, with the scales that they had."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

from onnx_lrs.errors import ModelError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.quantised import Scale, floated, is_quantised
from onnx_lrs.runtime.quantise import Recipe, stand_in_ranges, to_int8
from tests import small_nets as nets
from tests.builders import make, node, normal, run

IMAGES = nets.as_floats(nets.pictures(96))


class Once:
    def __init__(self, feed):
        self._feeds = iter([feed])

    def get_next(self):
        return next(self._feeds, None)


def quantised(model, feed, tmp_path, **options) -> onnx.ModelProto:
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(model, source)
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True} | options
    quantize_static(source, target, Once(feed), **options)
    return onnx.load(target)


def stored(model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def branches() -> onnx.ModelProto:
    """Two branches that are concatenated, added to the input and pooled."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["x", "w2"], ["b"]),
        node("Clip", ["b", "low", "high"], ["bc"]),
        node("Concat", ["ar", "bc"], ["c"], axis=1),
        node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "w3"], ["d"]),
        node("Add", ["d", "m"], ["e"]),
        node("GlobalAveragePool", ["e"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "w4"], ["h"]),
        node("Add", ["h", "b4"], ["y"]),
    ]
    constants = {
        "w1": normal(6, 4, 3, 3),
        "b1": normal(6),
        "w2": normal(6, 4, 1, 1),
        "w3": normal(12, 12, 1, 1),
        "low": np.float32(0),
        "high": np.float32(1.5),
        "w4": normal(12, 5),
        "b4": normal(5),
    }
    return make(nodes, {"x": [8, 4, 8, 8]}, ["y"], constants)


CASES = {"conv": (nets.conv_net, {"image": IMAGES}), "branches": (branches, {"x": normal(8, 4, 8, 8)})}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_channel": False},
        {"activation_type": QuantType.QInt8},
        {"extra_options": {"AddQDQPairToWeight": True}},
        {"extra_options": {"UseQDQContribOps": True}},
        {"extra_options": {"ActivationSymmetric": True}, "activation_type": QuantType.QInt8},
    ],
    ids=["channels", "tensors", "signed", "pairs on weights", "contrib", "symmetric"],
)
def test_the_float_model_is_back(case, options, tmp_path):
    build, feed = CASES[case]
    original = build()
    given = quantised(original, feed, tmp_path, **options)
    before = given.SerializeToString()
    found = floated(given)
    assert given.SerializeToString() == before
    onnx.checker.check_model(found.model, full_check=True)
    assert not is_quantised(found.model)
    assert models.signature(found.model) == models.signature(original)
    first, integers, back = (run(m, feed)[0] for m in (original, given, found.model))
    size = np.linalg.norm(first)
    assert np.linalg.norm(back - first) < 0.05 * size
    assert np.linalg.norm(back - integers) < 0.06 * size
    assert np.linalg.norm(back - first) < 1.01 * np.linalg.norm(integers - first)  # weights are rounded, nothing else


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_are_what_their_integers_stand_for(per_channel, tmp_path):
    given = quantised(nets.conv_net(), {"image": IMAGES}, tmp_path, per_channel=per_channel)
    values, found = stored(given), stored(floated(given).model)
    for name, axis in (("conv1.w", 0), ("conv2.w", 0), ("fc1.w", 0), ("fc2.w", 1)):
        whole, scale = values[f"{name}_quantized"], values[f"{name}_scale"]
        sizes = [-1 if i == axis and scale.size > 1 else 1 for i in range(whole.ndim)]
        (matching,) = [v for n, v in found.items() if n.startswith(name)]
        np.testing.assert_array_equal(matching, whole.astype(np.float32) * scale.reshape(sizes))


def test_scales_are_those_of_the_given_model_and_can_be_used_again(tmp_path):
    given = quantised(nets.conv_net(), {"image": IMAGES}, tmp_path)
    found = floated(given)
    values = stored(given)
    assert set(found.scales) >= {"image", "r1", "r2", "r3", "logits"}
    named = [name for name in found.scales if f"{name}_scale" in values]  # pools share those of what they read
    assert len(named) >= 5
    for name, scale in ((name, found.scales[name]) for name in named):
        assert scale == Scale(float(values[f"{name}_scale"]), int(values[f"{name}_zero_point"]), TensorProto.INT8)
    recipe = Recipe(activation_type="QInt8", scales=found.scales)
    again = stored(to_int8(found.model, stand_in_ranges(found.model), recipe))
    for name in named:
        assert again[f"{name}_scale"] == values[f"{name}_scale"]
        assert again[f"{name}_zero_point"] == values[f"{name}_zero_point"]


def test_a_relu_that_the_integers_stood_for_is_there_again(tmp_path):
    model = nets.conv_net()
    given = quantised(model, {"image": IMAGES}, tmp_path)
    assert "Relu" not in {n.op_type for n in given.graph.node}
    found = floated(given).model
    behind = {n.input[0]: n.op_type for n in found.graph.node}
    convs = [n.output[0] for n in found.graph.node if n.op_type == "Conv"]
    assert [behind[name] for name in convs] == ["Clip", "Clip"]
    assert [n.op_type for n in found.graph.node].count("Clip") == 3  # none where a pool keeps the sign


def test_what_a_signed_range_did_not_replace_stays(tmp_path):
    options = {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}}
    found = floated(quantised(nets.conv_net(), {"image": IMAGES}, tmp_path, **options)).model
    assert [n.op_type for n in found.graph.node].count("Relu") == 3
    assert "Clip" not in {n.op_type for n in found.graph.node}


# --------------------------------------------------------------------------------------------------------- declined


def pair(scale=0.1, zero=0, kind=np.uint8, **attributes):
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize", **attributes),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize", **attributes),
        node("Relu", ["d"], ["y"]),
    ]
    return nodes, {"s": np.asarray(scale, np.float32), "z": np.asarray(zero, kind)}


def test_a_pair_between_input_and_output_goes():
    nodes, constants = pair(0.1, 128)
    nodes[1].output[0] = "y"
    model = make(nodes[:2], {"x": [2, 3]}, ["y"], constants)
    found = floated(model)
    np.testing.assert_array_equal(run(found.model, {"x": normal(2, 3)})[0], normal(2, 3))
    assert found.scales == {"x": Scale(pytest.approx(0.1), 128, TensorProto.UINT8)}


def test_other_formats_are_declined(tmp_path):
    operators = quantised(nets.conv_net(), {"image": IMAGES}, tmp_path, quant_format=QuantFormat.QOperator)
    with pytest.raises(ModelError, match="computes with integers"):
        floated(operators)
    onnx.save(nets.block(), tmp_path / "block.onnx")
    quantize_dynamic(tmp_path / "block.onnx", tmp_path / "dynamic.onnx")
    with pytest.raises(ModelError, match="computes with integers"):
        floated(onnx.load(tmp_path / "dynamic.onnx"))


def test_scales_of_channels_of_an_activation_are_declined():
    nodes, constants = pair([0.1, 0.2, 0.3], [0, 0, 0], axis=1)
    with pytest.raises(ModelError, match="a scale for each channel"):
        floated(make(nodes, {"x": [2, 3]}, ["y"], constants))


def test_two_scales_of_one_tensor_are_declined():
    nodes, constants = pair()
    more = [
        node("QuantizeLinear", ["x", "s2", "z"], ["q2"], "other"),
        node("DequantizeLinear", ["q2", "s2", "z"], ["d2"]),
        node("Add", ["y", "d2"], ["sum"]),
    ]
    with pytest.raises(ModelError, match="'x' has two scales"):
        floated(make([*nodes, *more], {"x": [2, 3]}, ["sum"], constants | {"s2": np.float32(0.3)}))


def test_integers_that_others_read_are_declined():
    nodes, constants = pair()
    nodes.append(node("Cast", ["q"], ["whole"], "cast", to=TensorProto.FLOAT))
    with pytest.raises(ModelError, match="Cast 'cast' cannot be undone: it reads the integers 'q'"):
        floated(make(nodes, {"x": [2, 3]}, ["y", "whole"], constants))


def test_integers_that_are_given_are_declined():
    nodes, constants = pair()
    graph = helper.make_graph(
        nodes[1:],
        "given",
        [helper.make_tensor_value_info("q", TensorProto.UINT8, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match="integers are computed or given"):
        floated(model)


def test_float_models_are_not_quantised():
    assert not is_quantised(nets.conv_net())
    assert is_quantised(make(pair()[0], {"x": [2, 3]}, ["y"], pair()[1]))
