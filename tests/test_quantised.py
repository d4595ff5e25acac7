"""Models in QDQ format back to floats: weights to the bit, outputs but for rounding, and the scales."""

import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from onnx_lrs.errors import ModelError
from onnx_lrs.graph.model import load, save, signature
from onnx_lrs.graph.quantised import Scale, floated, is_quantised
from onnx_lrs.graph.splice import outer_reads
from onnx_lrs.graph.weights import scratch_for
from tests import small_nets
from tests.builders import OPSETS, make, node, normal, ops, run, shapes

OUT, CHANNELS = 8, 4
NOISE = 0.05  # relative; a pair of 8 bits adds about 0.005 to what goes through it
FLOAT = TensorProto.FLOAT
U8 = Scale(0.5, 3, TensorProto.UINT8)
Feed = Mapping[str, np.ndarray]


class Samples(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._left, None)


def quantised(model: onnx.ModelProto, feeds: Sequence[Feed], **options: Any) -> onnx.ModelProto:
    """Return what quantize_static makes of a model; it would change a ModelProto, so it gets a copy."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantised.onnx")
        logging.disable(logging.WARNING)
        try:
            quantize_static(source, str(path), Samples(feeds), **{"quant_format": QuantFormat.QDQ} | options)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(str(path))


def branches() -> onnx.ModelProto:
    """Two branches that meet in an Add and in a Concat; several outputs, one of them read inside as well."""
    values = {"a.w": normal(OUT, 3, 3, 3) / 5, "b.w": normal(OUT, 3, 1, 1), "c.w": normal(6, 2 * OUT, 1, 1) / 4}
    values |= {"a.b": normal(OUT) / 3, "scale": np.abs(normal(OUT)) + np.float32(0.5), "shift": normal(OUT, seed=1)}
    values |= {"mean": normal(OUT, seed=2) / 4, "var": np.abs(normal(OUT, seed=3)) + np.float32(0.3)}
    nodes = [
        node("Conv", ["image", "a.w", "a.b"], ["a"], "a", pads=[1] * 4),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["n"]),
        node("Relu", ["n"], ["ar"]),
        node("Conv", ["image", "b.w"], ["b"], "b"),
        node("Add", ["ar", "b"], ["sum"]),
        node("Relu", ["sum"], ["sr"]),
        node("Concat", ["ar", "sr"], ["both"], axis=1),
        node("Conv", ["both", "c.w"], ["c"], "c"),
        node("Sigmoid", ["c"], ["gate"]),
        node("Mul", ["c", "gate"], ["swish"]),
        node("GlobalAveragePool", ["swish"], ["pooled"]),
    ]
    return make(nodes, {"image": ("N", 3, 16, 16)}, ["pooled", "sr", "c"], values)


def bounded() -> onnx.ModelProto:
    """A Clip(0, 6) that many samples reach at both ends, and one that none reaches at its upper end."""
    values = {"a.w": 4 * normal(OUT, 3, 3, 3), "b.w": normal(OUT, OUT, 1, 1) / 20, "zero": np.float32(0)}
    values |= {"six": np.float32(6), "a.b": normal(OUT)}
    nodes = [
        node("Conv", ["image", "a.w", "a.b"], ["a"], "a"),
        node("Clip", ["a", "zero", "six"], ["ac"]),
        node("MaxPool", ["ac"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "b.w"], ["b"], "b"),
        node("Clip", ["b", "zero", "six"], ["bc"]),
        node("Conv", ["bc", "b.w"], ["y"], "c"),
    ]
    return make(nodes, {"image": ("N", 3, 16, 16)}, ["y"], values)


def pictures(count: int = 16) -> list[Feed]:
    return [{"image": picture[None]} for picture in small_nets.as_floats(small_nets.pictures(count))]


def pairs() -> list[Feed]:
    values = small_nets.pairs(64)
    return [{name: array[[i]] for name, array in values.items()} for i in range(64)]


NETS: dict[str, tuple[Callable[[], onnx.ModelProto], Callable[[], Sequence[Feed]]]] = {
    "conv": (small_nets.conv_net, pictures),
    "block": (small_nets.block, lambda: small_nets.sentences(16)),
    "two inputs": (small_nets.two_inputs, pairs),
    "branches": (branches, pictures),
    "bounded": (bounded, pictures),
}
WAYS: dict[str, dict[str, Any]] = {
    "u8": {},
    "u8 per channel": {"per_channel": True},
    "s8": {"activation_type": QuantType.QInt8},
    "u8 weights": {"weight_type": QuantType.QUInt8},
    "s8 per channel": {"activation_type": QuantType.QInt8, "per_channel": True},
    "s8 symmetric": {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}},
    "pairs at weights": {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
    "s8, pairs at weights": {"activation_type": QuantType.QInt8, "extra_options": {"AddQDQPairToWeight": True}},
    "pairs of their own": {"extra_options": {"DedicatedQDQPair": True}},
    "activations kept": {"extra_options": {"QDQKeepRemovableActivations": True}},
    "com.microsoft": {"per_channel": True, "extra_options": {"UseQDQContribOps": True}},
    "u16": {"activation_type": QuantType.QUInt16, "extra_options": {"UseQDQContribOps": True}},
}
DEFAULTS = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}


@functools.cache
def example(net: str, way: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a net and the same quantised one way."""
    build, feeds = NETS[net]
    model = build()
    return model, quantised(model, feeds(), **DEFAULTS | WAYS[way])


def distances(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> list[float]:
    floats = [(x, y) for x, y in zip(a, b, strict=True) if x.dtype == np.float32]
    return [float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in floats]


def over(model: onnx.ModelProto, feeds: Sequence[Feed]) -> list[np.ndarray]:
    """Return each output for all samples, as one vector."""
    outputs = zip(*(run(model, feed) for feed in feeds), strict=True)
    return [np.concatenate([array.ravel() for array in arrays]) for arrays in outputs]


def stored_integers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return what DQ nodes make of integers in the file, by numpy alone."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values = {}
    for dq in model.graph.node:
        if dq.op_type == "DequantizeLinear" and dq.input[0] in stored:
            q, scale, zero = (stored[name] for name in dq.input)
            axis = next((a.i for a in dq.attribute if a.name == "axis"), 1)
            if scale.size > 1:
                shape = [-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]
                scale, zero = scale.reshape(shape), zero.reshape(shape)
            values[dq.output[0]] = (q.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale
    return values


def stored_scales(model: onnx.ModelProto) -> set[tuple[float, int, int]]:
    """Return scale, zero point and type of all Q nodes that read no initialiser."""
    stored = {t.name: t for t in model.graph.initializer}
    found = set()
    for q in model.graph.node:
        if q.op_type == "QuantizeLinear" and q.input[0] not in stored:
            scale, zero = (numpy_helper.to_array(stored[name]) for name in q.input[1:])
            found.add((float(scale), int(zero), stored[q.input[2]].data_type))
    return found


def unread(model: onnx.ModelProto) -> set[str]:
    """Return the initialisers that nothing reads."""
    read = {v.name for v in model.graph.output}.union(*map(outer_reads, model.graph.node))
    return set(shapes(model)) - read


def untold(model: onnx.ModelProto) -> set[str]:
    """Return the names in value_info that no node writes; ONNX Runtime leaves some of those that it deleted."""
    return {v.name for v in model.graph.value_info} - {name for each in model.graph.node for name in each.output}


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the floated model after the checks that hold for any."""
    before = model.SerializeToString(deterministic=True)
    new = floated(model).model
    assert model.SerializeToString(deterministic=True) == before
    assert not is_quantised(new)
    onnx.checker.check_model(new, full_check=True)
    assert signature(new) == signature(model)
    assert new.opset_import == model.opset_import
    assert unread(new) <= unread(model)
    assert untold(new) <= untold(model)
    return new


# ------------------------------------------------------------------------------------ what quantize_static makes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_the_float_model_computes_the_same_but_for_rounding(net, way):
    model, qdq = example(net, way)
    assert is_quantised(qdq)
    assert not is_quantised(model)
    new = checked(qdq)
    kept = sorted(op for op in ops(model) if op not in ("Clip", "Relu"))
    assert sorted(op for op in ops(new) if op not in ("Clip", "Relu")) == kept
    feeds = NETS[net][1]()[:8]
    in_floats, in_qdq, in_new = (over(each, feeds) for each in (model, qdq, new))
    noise = max(distances(in_floats, in_qdq))
    assert noise < 0.1
    assert max(distances(in_floats, in_new)) < 1.3 * noise
    # With 16 bits hardly more is left than the weights' rounding, which both have, and saturation at the ends.
    assert max(distances(in_qdq, in_new)) < (0.5 if way == "u16" else 1.3) * noise


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_as_many_relus_and_clips_as_before(net, way):
    model, qdq = example(net, way)
    new = ops(floated(qdq).model)
    cuts = [op for op in ops(model) if op in ("Clip", "Relu")]
    if way in ("s8 symmetric", "activations kept"):  # ONNX Runtime deleted none
        assert [op for op in new if op in ("Clip", "Relu")] == cuts
    elif net == "bounded":
        assert [op for op in new if op in ("Clip", "Relu")] == ["Clip", "Relu"]  # no sample reached the second 6
    else:
        assert ops(qdq).count("Relu") < len(cuts)
        assert [op for op in new if op in ("Clip", "Relu")] == cuts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_weights_are_the_stored_integers_dequantised(net, way):
    _, qdq = example(net, way)
    new = {t.name: numpy_helper.to_array(t) for t in floated(qdq).model.graph.initializer}
    expected = stored_integers(qdq)
    assert expected or "pairs at weights" in way
    for name, values in expected.items():
        assert new[name].dtype == np.float32
        np.testing.assert_array_equal(new[name], values)


@pytest.mark.parametrize("way", ["u8 per channel", "pairs at weights", "s8, pairs at weights", "com.microsoft"])
def test_weights_are_what_onnx_runtime_computes(way):
    _, qdq = example("conv", way)
    new = {t.name: numpy_helper.to_array(t) for t in floated(qdq).model.graph.initializer}
    shown = onnx.ModelProto()
    shown.CopyFrom(qdq)
    made = {name for each in qdq.graph.node if each.op_type == "DequantizeLinear" for name in each.output}
    names = sorted(made & set(new))
    assert len(names) == 8
    shown.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, new[name].shape) for name in names)
    for name, value in zip(names, run(shown, pictures(1)[0])[1:], strict=True):
        np.testing.assert_array_equal(new[name], value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", NETS)
def test_scales_are_those_of_the_pairs_and_can_be_used_again(net, way):
    _, qdq = example(net, way)
    result = floated(qdq)
    tensors = {name for each in result.model.graph.node for name in each.output}
    assert set(result.scales) <= tensors | {v.name for v in result.model.graph.input}
    assert {(s.scale, s.zero_point, s.dtype) for s in result.scales.values()} == stored_scales(qdq)
    again = quantised(
        result.model, NETS[net][1]()[:2], **DEFAULTS | WAYS[way] | {"extra_options": overrides(result, way)}
    )
    assert floated(again).scales == result.scales


def overrides(result, way: str) -> dict[str, Any]:
    kinds = {QuantType[name].tensor_type: QuantType[name] for name in ("QUInt8", "QInt8", "QUInt16", "QInt16")}
    wanted = {
        name: [
            {
                "scale": np.array(s.scale, np.float32),
                "zero_point": np.array(s.zero_point, helper.tensor_dtype_to_np_dtype(s.dtype)),
                "quant_type": kinds[s.dtype],
            }
        ]
        for name, s in result.scales.items()
    }
    return WAYS[way].get("extra_options", {}) | {"TensorQuantOverrides": wanted}


def test_a_relu_that_was_deleted_is_there_again():
    """Every pre-activation of the samples is negative or small, so a float model without the Relu would be far off."""
    values = {"w": normal(CHANNELS, OUT), "b": np.full(OUT, -4, np.float32), "v": normal(OUT, 3)}
    nodes = [
        node("Gemm", ["x", "w", "b"], ["g"], "g"),
        node("Relu", ["g"], ["r"]),
        node("Gemm", ["r", "v"], ["y"], "h"),
    ]
    model = make(nodes, {"x": ("N", CHANNELS)}, ["y"], values)
    feeds = [{"x": 2 * normal(16, CHANNELS, seed=i)} for i in range(8)]
    for way in ("u8", "s8 per channel"):
        qdq = quantised(model, feeds, **DEFAULTS | WAYS[way])
        assert "Relu" not in ops(qdq)
        new = checked(qdq)
        assert ops(new) == ["Gemm", "Relu", "Gemm"]
        assert new.graph.node[1].output == ["r"]
        for feed in feeds:
            assert max(distances(run(model, feed), run(new, feed))) < NOISE


def test_files_and_weights_outside(tmp_path):
    _, qdq = example("conv", "u8")
    save(qdq, tmp_path / "q.onnx", external=True)
    outside = load(tmp_path / "q.onnx")
    with scratch_for(outside, tmp_path / "new.onnx") as scratch:
        new = floated(outside, scratch).model
        large = [t.name for t in new.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        save(new, tmp_path / "new.onnx", external=False)
    assert large == ["fc1.w_DequantizeLinear_Output"]
    written = onnx.load(str(tmp_path / "new.onnx"))
    expected = floated(qdq).model
    assert shapes(written) == shapes(expected)
    feed = pictures(1)[0]
    np.testing.assert_array_equal(run(written, feed)[0], run(expected, feed)[0])


# ------------------------------------------------------------------------------------ graphs made by hand


def q(source: str, output: str = "", name: str = "", numbers: Sequence[str] = ("s", "z"), **attrs: Any):
    return node("QuantizeLinear", [source, *numbers], [output or f"{source}_q"], name or f"{source}_quantise", **attrs)


def dq(source: str, output: str, name: str = "", numbers: Sequence[str] = ("s", "z"), **attrs: Any):
    return node("DequantizeLinear", [source, *numbers], [output], name or f"{output}_dequantise", **attrs)


def numbers(scale: Any = 0.5, zero: Any = 3, dtype: Any = np.uint8, tag: str = "") -> dict[str, np.ndarray]:
    return {f"s{tag}": np.asarray(scale, np.float32), f"z{tag}": np.asarray(zero, dtype)}


def hand(nodes, outputs=("y",), values=None, inputs=None, **options):
    """Return a model that tells the shapes of all tensors, as many files do."""
    model = make(nodes, inputs or {"x": (2, CHANNELS)}, outputs, numbers() | (values or {}), **options)
    return onnx.shape_inference.infer_shapes(model)


def close(model: onnx.ModelProto, step: float = 1.5) -> onnx.ModelProto:
    """Return the floated model, whose outputs are within some steps of a scale of those of the quantised one."""
    new = checked(model)
    for a, b in zip(run(model), run(new), strict=True):
        np.testing.assert_allclose(b, a, atol=step)
    return new


def nodes_of(model: onnx.ModelProto) -> list[tuple[str, list[str], list[str]]]:
    return [(n.op_type, list(n.input), list(n.output)) for n in model.graph.node]


def test_an_output_behind_a_pair_keeps_its_name():
    model = hand([node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "y")])
    assert nodes_of(close(model)) == [("Neg", ["x"], ["y"])]
    assert floated(model).scales == {"y": U8}


def test_other_readers_follow_a_tensor_that_takes_the_name_of_an_output():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "y"), node("Abs", ["f"], ["a"]), node("Cos", ["y"], ["c"])]
    model = hand(nodes, ["a", "y", "c"])
    assert nodes_of(close(model)) == [("Neg", ["x"], ["y"]), ("Abs", ["y"], ["a"]), ("Cos", ["y"], ["c"])]


def test_an_input_that_is_an_output_needs_an_identity():
    model = hand([q("x"), dq("x_q", "y")])
    assert nodes_of(close(model)) == [("Identity", ["x"], ["y"])]
    assert floated(model).scales == {"x": U8}


def test_outputs_in_front_and_behind_and_twice():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "y"), dq("f_q", "z2"), node("Cos", ["z2"], ["c"])]
    front = close(hand(nodes, ["z2", "f", "y", "c"]))
    assert nodes_of(front)[:1] == [("Neg", ["x"], ["f"])]
    assert sorted(ops(front)) == ["Cos", "Identity", "Identity", "Neg"]
    twice = close(hand(nodes, ["y", "c", "z2"]))
    assert nodes_of(twice) == [("Neg", ["x"], ["y"]), ("Identity", ["y"], ["z2"]), ("Cos", ["y"], ["c"])]


def test_two_pairs_in_a_row_and_two_on_one_tensor():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "d"), q("d"), dq("d_q", "e"), node("Cos", ["e"], ["y"])]
    assert nodes_of(close(hand(nodes))) == [("Neg", ["x"], ["f"]), ("Cos", ["f"], ["y"])]
    nodes = [node("Neg", ["x"], ["f"]), q("f"), q("f", "f_q2", "again"), dq("f_q", "d"), dq("f_q2", "e")]
    model = hand([*nodes, node("Add", ["d", "e"], ["y"])])
    assert nodes_of(close(model, 3)) == [("Neg", ["x"], ["f"]), ("Add", ["f", "f"], ["y"])]
    assert floated(model).scales == {"f": U8}


def test_a_constant_as_an_output_and_constants_in_nodes():
    weight = numpy_helper.from_array(np.arange(8, dtype=np.uint8).reshape(CHANNELS, 2))
    nodes = [
        node("Constant", [], ["k"], value=weight),
        node("Constant", [], ["t"], value_float=0.25),
        dq("k", "w", numbers=("t", "z")),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    new = close(hand(nodes, ["y", "w"]))
    assert ops(new) == ["MatMul"]
    np.testing.assert_array_equal(run(new)[1], (np.arange(8).reshape(CHANNELS, 2) - 3) * 0.25)


def test_a_weight_behind_a_transpose_stays_without_relu():
    """Its pair's lower end is 0, and so is its smallest value."""
    values = numbers(0.5, 0) | {"k": np.arange(8, dtype=np.uint8).reshape(2, CHANNELS)}
    nodes = [dq("k", "w"), node("Transpose", ["w"], ["t"]), q("t"), dq("t_q", "u"), node("MatMul", ["x", "u"], ["y"])]
    assert ops(close(hand(nodes, values=values))) == ["Transpose", "MatMul"]


def test_floats_through_a_pair_become_what_onnx_runtime_computes():
    """Halves go to the even integer, and -2 and 5 lie outside of the range."""
    values = numbers(0.25, -125, np.int8) | {"w": np.arange(-16, 40, dtype=np.float32) / 8, "x0": np.float32(0)}
    nodes = [node("Add", ["x", "x0"], ["y"]), q("w"), dq("w_q", "v")]
    new = close(hand(nodes, ["y", "v"], values), 0)
    assert set(shapes(new)) == {"x0", "v"}


def test_what_nobody_reads_and_notes_about_quantisation_go():
    values = {"k": np.arange(4, dtype=np.uint8)}
    model = hand(
        [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "y"), dq("k", "w"), q("f", "unread", "again")], values=values
    )
    note = model.graph.quantization_annotation.add(tensor_name="f_q")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    new = close(model)
    assert nodes_of(new) == [("Neg", ["x"], ["y"])]
    assert not new.graph.initializer
    assert not new.graph.quantization_annotation


def test_without_zero_points_and_with_vectors_of_one():
    values = {"k": np.arange(-4, 4, dtype=np.int8).reshape(CHANNELS, 2), "v": np.array([0.5], np.float32)}
    nodes = [
        q("x", numbers=("v",)),
        dq("x_q", "d", numbers=("s",)),
        dq("k", "w", numbers=("v",)),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    model = hand(nodes, values=values)
    assert floated(model).scales == {"x": Scale(0.5, 0, TensorProto.UINT8)}
    assert ops(checked(model)) == ["MatMul"]


@pytest.mark.parametrize("opset", [o for o in OPSETS if o >= 10])
@pytest.mark.parametrize("low", [0, -2])
def test_clamps_in_every_opset(opset, low):
    """Behind a Conv, a pair of the range that a Clip(low, 6) has."""
    scale = np.float32((6 - low) / 255)
    values = numbers(scale, round(-low / scale)) | {"w": 4 * normal(OUT, CHANNELS, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["c"], "conv"), q("c"), dq("c_q", "d"), node("Neg", ["d"], ["y"])]
    model = hand(nodes, values=values, inputs={"x": (2, CHANNELS, 5, 5)}, opset=opset)
    new = close(model, 0.03)
    assert ops(new) == ["Conv", "Clip", "Neg"]
    assert new.graph.node[1].output == ["c"]
    assert min(run(new)[0].ravel()) == -6
    assert max(run(new)[0].ravel()) == -low


def test_initialisers_that_have_to_be_inputs():
    values = numbers(0.05, 9, np.int8) | {"k": np.arange(8, dtype=np.int8).reshape(CHANNELS, 2)}
    values |= {"r": normal(CHANNELS, 2)}
    nodes = [dq("k", "w"), q("r"), dq("r_q", "v"), node("Add", ["w", "v"], ["a"]), node("MatMul", ["x", "a"], ["y"])]
    new = close(hand(nodes, values=values, opset=10, ir=3), 1e-6)
    assert [v.name for v in new.graph.input] == ["x", "w", "v"]


CUT = [  # what is in front of a pair whose lower end is 0, and whether a Relu takes its place
    ([node("Conv", ["x", "w"], ["f"])], True),
    ([node("Neg", ["x"], ["f"])], True),
    ([node("Relu", ["x"], ["f"])], False),
    ([node("Sigmoid", ["x"], ["f"])], False),
    ([node("Softmax", ["x"], ["g"]), node("MaxPool", ["g"], ["f"], kernel_shape=[2, 2])], False),
    ([node("Relu", ["x"], ["g"]), node("Concat", ["g", "g"], ["f"], axis=1)], False),
    ([node("Relu", ["x"], ["g"]), node("Concat", ["g", "x"], ["f"], axis=1)], True),
    ([node("Relu", ["x"], ["g"]), node("Transpose", ["g"], ["h"]), node("Add", ["h", "h"], ["f"])], False),
    ([node("Relu", ["x"], ["g"]), node("Add", ["g", "negative"], ["f"])], True),
    ([node("Relu", ["x"], ["g"]), node("Mul", ["g", "positive"], ["f"])], False),
    ([node("Relu", ["x"], ["g"]), node("Mul", ["g", "negative"], ["f"])], True),
    ([node("Relu", ["x"], ["g"]), node("Div", ["g", "positive"], ["f"])], False),
    ([node("Relu", ["x"], ["g"]), node("Sub", ["g", "positive"], ["f"])], True),
    ([node("Relu", ["x"], ["g"]), node("Sub", ["g", "negative"], ["f"])], False),
    ([node("Relu", ["x"], ["g"]), node("Pad", ["g", "pads"], ["f"])], False),
    ([node("Relu", ["x"], ["g"]), node("Pad", ["g", "pads", "negative"], ["f"])], True),
    ([node("Clip", ["x", "positive"], ["f"])], False),
    ([node("Clip", ["x", "negative"], ["f"])], True),
    ([node("Sigmoid", ["x"], ["g"]), node("Div", ["g", "g"], ["f"])], True),
    ([node("AveragePool", ["x"], ["f"], kernel_shape=[2, 2])], True),
]


@pytest.mark.parametrize("case", range(len(CUT)))
def test_a_relu_only_where_negative_values_may_come(case):
    nodes, expected = CUT[case]
    values = numbers(0.07, -128, np.int8) | {"w": normal(OUT, CHANNELS, 1, 1), "pads": np.array([0, 0, 1, 1] * 2)}
    values |= {"positive": np.float32(0.5), "negative": np.float32(-0.5)}
    model = hand([*nodes, q("f"), dq("f_q", "y")], values=values, inputs={"x": (2, CHANNELS, 5, 5)})
    before, after = ops(model).count("Relu"), ops(close(model, 0.04)).count("Relu")
    assert after == before + expected


def test_an_input_and_what_only_moves_it_are_not_cut_off():
    nodes = [q("x"), dq("x_q", "d"), node("Transpose", ["d"], ["t"]), q("t"), dq("t_q", "y")]
    assert ops(checked(hand(nodes, values=numbers(0.5, 0)))) == ["Transpose"]


def test_a_range_of_0_to_1_that_was_computed_is_no_clip():
    """255 times the float32 next to 1 / 255 is a little more than 1."""
    values = numbers(1, 0) | numbers(1 / 255, 0, tag="2") | {"k": np.float32(1 / 255)}
    nodes = [q("x"), dq("x_q", "d"), node("Mul", ["d", "k"], ["f"]), q("f", numbers=("s2", "z2"))]
    model = hand([*nodes, dq("f_q", "y", numbers=("s2", "z2"))], values=values)
    assert ops(checked(model)) == ["Mul"]


def test_a_pair_in_front_of_nothing_but_relus_leaves_them_to_it():
    front = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "d"), node("Relu", ["d"], ["y"])]
    assert ops(close(hand(front, values=numbers(0.07, 0)))) == ["Neg", "Relu"]
    also = hand([*front, node("Cos", ["d"], ["c"])], ["y", "c"], numbers(0.07, 0))
    assert ops(close(also, 0.04)) == ["Neg", "Relu", "Relu", "Cos"]


def test_who_reads_in_front_of_a_pair_is_not_cut_off():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "d"), node("Cos", ["d"], ["y"]), node("Cos", ["f"], ["c"])]
    model = hand(nodes, ["y", "c", "f"], numbers(0.07, 0))
    new = close(model, 0.04)
    assert ("Cos", ["f"], ["c"]) in nodes_of(new)
    assert ("Relu", ["f"], ["f_clamped"]) in nodes_of(new)
    assert list(floated(model).scales) == ["f_clamped"]


def test_outputs_in_front_of_a_clamp():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "d"), node("Cos", ["d"], ["y"])]
    new = close(hand(nodes, ["y", "f"], numbers(0.07, 0)), 0.04)
    assert nodes_of(new)[:2] == [("Neg", ["x"], ["f"]), ("Relu", ["f"], ["f_clamped"])]


def test_outputs_behind_a_clamp():
    nodes = [node("Neg", ["x"], ["f"]), q("f"), dq("f_q", "y"), dq("f_q", "e"), node("Cos", ["e"], ["c"])]
    model = hand(nodes, ["y", "c"], numbers(0.07, 0))
    assert nodes_of(close(model, 0.04))[1:] == [("Relu", ["f"], ["y"]), ("Cos", ["y"], ["c"])]
    assert list(floated(model).scales) == ["y"]


@pytest.mark.parametrize("zero", [0, 100])
def test_subgraphs_read_the_new_names(zero):
    """Both branches read tensors behind pairs, one of which takes another name, and a dequantised weight."""
    branch = [
        helper.make_graph([node(op, ["d", "w"], [op])], op, [], [helper.make_tensor_value_info(op, FLOAT, None)])
        for op in ("Add", "Mul")
    ]
    values = numbers(0.07, zero) | {"k": np.arange(CHANNELS, dtype=np.uint8), "which": np.array(True)}
    nodes = [
        node("Neg", ["x"], ["f"]),
        q("f"),
        dq("f_q", "d"),
        dq("k", "w"),
        node("If", ["which"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    new = close(hand(nodes, {"y": (2, CHANNELS)}, values), 0.3)
    assert ops(new) == (["Neg", "If"] if zero else ["Neg", "Relu", "If"])
    inner = [a.g.node[0].input[0] for a in new.graph.node[-1].attribute]
    assert inner == ["f", "f"]


# ------------------------------------------------------------------------------------ what is declined


def declined(model: onnx.ModelProto, *parts: str) -> None:
    before = model.SerializeToString(deterministic=True)
    assert is_quantised(model)
    with pytest.raises(ModelError) as caught:
        floated(model)
    assert caught.value.remedy == "Give the float model that it was made from."
    for part in parts:
        assert part in caught.value.message
    assert model.SerializeToString(deterministic=True) == before


def test_other_formats_of_onnx_runtime_are_declined(tmp_path):
    model = small_nets.conv_net()
    declined(quantised(model, pictures(4), quant_format=QuantFormat.QOperator), "QLinearConv node", "QOperator format")
    logging.disable(logging.WARNING)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
    logging.disable(logging.NOTSET)
    declined(onnx.load(tmp_path / "dynamic.onnx"), "DynamicQuantizeLinear node", "dynamic quantisation")


@pytest.mark.parametrize(
    ("op", "domain", "reason"),
    [
        ("QGemm", "com.microsoft", "QOperator format"),
        ("QLinearMatMul", "", "QOperator format"),
        ("MatMulInteger", "", "dynamic quantisation"),
        ("DynamicQuantizeLSTM", "com.microsoft", "dynamic quantisation"),
        ("MatMulNBits", "com.microsoft", "in blocks"),
        ("GatherBlockQuantized", "com.microsoft", "in blocks"),
    ],
)
def test_other_operators_are_declined(op, domain, reason):
    model = make([node("Neg", ["x"], ["y"])], {"x": (2, 3)}, ["y"], {})
    model.graph.node.append(helper.make_node(op, ["x"], ["z"], name="odd", domain=domain))
    declined(model, f"{op} node 'odd'", reason)


@pytest.mark.parametrize("op", ["QuickGelu", "Gelu", "MatMulNBits", "QLinearConv"])
def test_operators_of_others_are_not_of_quantisation(op):
    model = make([node("Neg", ["x"], ["y"])], {"x": (2, 3)}, ["y"], {})
    model.graph.node[0].op_type, model.graph.node[0].domain = op, "my.own"
    assert not is_quantised(model)
    model.graph.node[0].domain = "com.microsoft"
    assert is_quantised(model) == (op in ("MatMulNBits", "QLinearConv"))


def typed(model: onnx.ModelProto, name: str, dtype: int) -> onnx.ModelProto:
    """Give a graph input or output another element type."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.type.tensor_type.elem_type = dtype
    return model


TAIL = [dq("x_q", "y")]


def test_integers_that_go_elsewhere_are_declined():
    declined(typed(hand([q("x"), *TAIL], ["y", "x_q"]), "x_q", TensorProto.UINT8), "'x_quantise'", "graph output")
    nodes = [q("x"), *TAIL, node("Cast", ["x_q"], ["c"], "cast", to=FLOAT)]
    declined(hand(nodes, ["y", "c"]), "QuantizeLinear node 'x_quantise'", "'x_q'", "by Cast node 'cast'")
    info = helper.make_tensor_value_info("i", FLOAT, None)
    inner = helper.make_graph([node("Cast", ["x_q"], ["i"], "inner", to=FLOAT)], "inner", [], [info])
    nodes = [q("x"), *TAIL, node("If", ["which"], ["c"], then_branch=inner, else_branch=inner)]
    declined(
        hand(nodes, {"y": (2, CHANNELS), "c": (2, CHANNELS)}, {"which": np.array(True)}), "'x_quantise'", "'inner'"
    )


def test_integers_that_come_from_elsewhere_are_declined():
    model = typed(hand([dq("x", "y", "first")]), "x", TensorProto.UINT8)
    declined(model, "DequantizeLinear node 'first'", "a graph input, 'x'")
    nodes = [node("Cast", ["x"], ["i"], to=TensorProto.UINT8), dq("i", "y", "first")]
    declined(hand(nodes), "'first'", "a computed integer tensor, 'i'")
    nodes = [q("x"), node("Transpose", ["x_q"], ["t"], "turn"), dq("t", "y")]
    declined(hand(nodes), "'x_quantise'", "by Transpose node 'turn'")


def test_scales_along_an_axis_of_an_activation_are_declined():
    model = hand([q("x"), *TAIL], values=numbers([0.5] * CHANNELS, [3] * CHANNELS))
    declined(model, "'x_quantise'", "4 scales along an axis")


def test_scales_that_are_not_constant_are_declined():
    nodes = [node("Abs", ["t"], ["scale"]), q("x", numbers=("scale", "z")), dq("x_q", "y", numbers=("scale", "z"))]
    model = hand(nodes, inputs={"x": (2, CHANNELS), "t": ()})
    declined(model, "'x_quantise'", "not constant, 'scale'")
    fed = hand([q("x"), *TAIL])
    fed.graph.input.append(helper.make_tensor_value_info("s", FLOAT, []))
    declined(fed, "'x_quantise'", "not constant, 's'")


@pytest.mark.parametrize("other", [(0.25, 3, np.uint8), (0.5, 4, np.uint8)])
def test_two_scales_on_one_tensor_are_declined(other):
    values = numbers(*other, tag="2")
    declined(hand([q("x"), dq("x_q", "y", numbers=("s2", "z2"))], values=values), "'y_dequantise'", "tensor 'x'")
    nodes = [q("x"), dq("x_q", "d"), q("d", numbers=("s2", "z2")), dq("d_q", "y", numbers=("s2", "z2"))]
    declined(hand(nodes, values=values), "'d_quantise'", "another scale or zero point", "tensor 'x'")
    nodes = [q("w"), dq("w_q", "v", numbers=("s2", "z2")), node("MatMul", ["x", "v"], ["y"])]
    declined(hand(nodes, values=values | {"w": normal(CHANNELS, 2)}), "'v_dequantise'", "another scale", "'w_quantise'")


def test_pairs_inside_subgraphs_and_functions_are_declined():
    info = helper.make_tensor_value_info("i", FLOAT, None)
    inner = helper.make_graph([q("x", name="deep"), dq("x_q", "i")], "inner", [], [info])
    model = hand([node("If", ["which"], ["y"], then_branch=inner, else_branch=inner)], {"y": (2, 4)}, {"which": True})
    declined(model, "QuantizeLinear node 'deep'", "inside a subgraph or a function")
    model = hand([node("Neg", ["x"], ["y"])])
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "F", ["a"], ["a_q"], [q("a", name="deep")], imports))
    declined(model, "'deep'", "inside a subgraph or a function")


def weight(kind: int, values: np.ndarray, scale: Any, **attrs: Any) -> onnx.ModelProto:
    """Return a model whose weight (CHANNELS, 2) has integers of any type, in opset 21."""
    stored = helper.make_tensor("k", kind, (CHANNELS, 2), values)
    zero = helper.make_tensor("z", kind, np.shape(scale), np.zeros(np.size(scale), np.int64))
    model = make(
        [node("Neg", ["x"], ["y"])], {"x": (2, CHANNELS)}, ["y"], {"s": np.asarray(scale, np.float32)}, opset=21
    )
    model.graph.node.insert(0, dq("k", "w", "odd", **attrs))
    model.graph.node.append(node("MatMul", ["x", "w"], ["v"]))
    model.graph.initializer.extend([stored, zero])
    return model


def test_other_kinds_of_numbers_are_declined():
    values = np.arange(2 * CHANNELS)
    declined(weight(TensorProto.INT4, values - 4, 0.5), "'odd'", "INT4")
    declined(weight(TensorProto.UINT4, values, 0.5), "'odd'", "UINT4")
    declined(weight(TensorProto.FLOAT8E4M3FN, values, 0.5), "'odd'", "FLOAT8E4M3FN")
    declined(weight(TensorProto.INT8, values, np.full((2, 2), 0.5), block_size=2, axis=0), "'odd'", "in blocks of 2")
    declined(weight(TensorProto.INT8, values, [0.5] * 3, axis=0), "'odd'", "3 scales for axis 0", "[4, 2]")
    declined(weight(TensorProto.INT8, values, [0.5] * 2, axis=5), "'odd'", "axis 5")
    declined(weight(TensorProto.INT8, values, np.nan), "'odd'", "not finite")
    half = weight(TensorProto.INT8, values, 0.5)
    half.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float16(0.5), "s"))
    declined(half, "'odd'", "float16")
    declined(hand([q("x"), *TAIL], values=numbers(0.0)), "'x_quantise'", "scale of 0")
