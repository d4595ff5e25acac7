"""Rewriting a layer into its factors: the same numbers in ONNX Runtime, and nothing else of the model touched."""

import dataclasses
import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View, signature
from onnx_lrs.graph.rewrite import Rewritten, alive_outputs, merged, rewrite
from tests.builders import (
    OPSETS,
    keeping,
    layout,
    make,
    node,
    normal,
    only,
    ops,
    planted,
    planted_projected,
    planted_spatial,
    planted_tucker,
    ranks,
    run,
    shapes,
)

STORING = ("Constant", "Identity", "Transpose")  # those of a replaced weight go
FORMS = ("low_rank", "all_channels", "channels", "both")
NODES = {
    "low_rank": ["{op}", "{op}"],
    "all_channels": ["{op}"],
    "channels": ["Gather", "{op}"],
    "both": ["{op}", "{op}", "Gather", "{op}", "Add"],
    "spatial": ["{op}", "{op}"],
    "projected": ["{op}", "{op}"],
    "tucker": ["{op}", "{op}", "{op}"],
}


def rewritten(model, factors) -> Rewritten:
    """Rewrite the layers named in ``factors`` and check what has to hold for every rewriting."""
    before = model.SerializeToString()
    view = View(model)
    layers, _ = find(view)
    nodes = {layer.name: layer.node for layer in layers}
    result = rewrite(view, layers, {nodes[name]: f for name, f in factors.items()}, ranks(model))
    assert model.SerializeToString() == before
    assert_sound(model, result.model)
    assert_merges(model, view, layers, result)
    return result


def assert_merges(model, view, layers, result):
    """Check that the way back gives the old graph with weights that compute the same."""
    back = merged(view, layers, ranks(model), result)
    assert_sound(model, back)
    close(run(result.model), run(back))
    assert [(n.op_type, n.name, list(n.output)) for n in back.graph.node if n.op_type not in STORING] == [
        (n.op_type, n.name, list(n.output)) for n in model.graph.node if n.op_type not in STORING
    ]


def assert_sound(old, new):
    onnx.checker.check_model(new, full_check=True)
    read = {name for n in new.graph.node for name in n.input}
    assert set(shapes(new)) <= read
    for n in new.graph.node:
        if n.op_type in ("Constant", "Identity", "Transpose"):
            assert set(n.output) & (read | {o.name for o in new.graph.output})
    made = [name for n in new.graph.node for name in n.output]
    assert len(made) == len(set(made))
    assert new.opset_import == old.opset_import
    assert new.ir_version == old.ir_version
    assert signature(new) == signature(old)
    assert [o.SerializeToString() for o in new.graph.output] == [o.SerializeToString() for o in old.graph.output]


def close(a, b, rtol=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(y, x, rtol=rtol, atol=rtol * np.abs(x).max())


def check(model, factors, form, op):
    """Rewrite the only layer ``layer``; equal outputs, and exactly the nodes of the form in its place."""
    result = rewritten(model, {"layer": factors})
    close(run(model), run(result.model))
    others = [o for o in ops(model) if o != op]
    assert ops(result.model) == [o.format(op=op) for o in NODES[form]] + others
    return result.model


# ---------------------------------------------------------------- Conv

CONVS = {
    "1d": ((5,), (9,), {}),
    "1d pads": ((5,), (9,), {"strides": [2], "pads": [1, 3]}),
    "1d dilated": ((3,), (9,), {"dilations": [2], "kernel_shape": [3]}),
    "1d same": ((5,), (9,), {"auto_pad": "SAME_LOWER", "strides": [2]}),
    "2d": ((3, 3), (7, 6), {}),
    "2d pointwise": ((1, 1), (5, 4), {"strides": [2, 2]}),
    "2d pads": ((3, 2), (8, 7), {"strides": [2, 1], "pads": [1, 0, 2, 1], "kernel_shape": [3, 2]}),
    "2d dilated": ((3, 3), (9, 8), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    "2d same upper": ((3, 2), (8, 7), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "2d same lower": ((2, 3), (8, 7), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "2d valid": ((3, 3), (8, 7), {"auto_pad": "VALID", "strides": [2, 2], "dilations": [2, 1]}),
    "2d notset": ((3, 3), (8, 7), {"auto_pad": "NOTSET", "pads": [1, 1, 1, 1]}),
    "3d": ((2, 3, 2), (5, 6, 5), {"strides": [1, 2, 1], "pads": [1, 0, 1, 0, 2, 1]}),
}
OUT, CHANNELS = 36, 30


def conv(factors, kernel, size, attrs, bias=True, opset=17):
    constants = {"w": layout("Conv", factors.dense(), kernel)} | ({"b": normal(OUT)} if bias else {})
    layer = node("Conv", ["x", *constants], ["c"], name="layer", **attrs)
    tail = node("Relu", ["c"], ["y"], name="tail")
    return make([layer, tail], {"x": (2, CHANNELS, *size)}, ["y"], constants, opset=opset)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVS)
def test_conv(case, bias, form):
    kernel, size, attrs = CONVS[case]
    factors = planted(form, OUT, CHANNELS, int(np.prod(kernel)))
    new = check(conv(factors, kernel, size, attrs, bias), factors, form, "Conv")
    assert sum(len(n.input) > 2 for n in new.graph.node if n.op_type == "Conv") == bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", OPSETS)
def test_conv_in_every_opset(opset, form):
    kernel, size, attrs = CONVS["2d pads"]
    factors = planted(form, OUT, CHANNELS, 6)
    check(conv(factors, kernel, size, attrs, opset=opset), factors, form, "Conv")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [7, 11, 26])
@pytest.mark.parametrize("case", [case for case in CONVS if case.startswith("2d")])
def test_spatial_conv(case, opset, bias):
    kernel, size, attrs = CONVS[case]
    factors = planted_spatial(OUT, CHANNELS, kernel)
    new = check(conv(factors, kernel, size, attrs, bias, opset), factors, "spatial", "Conv")
    first, second = (shapes(new)[n.input[1]] for n in new.graph.node[:2])
    assert (first, second) == ((3, CHANNELS, kernel[0], 1), (OUT, 3, 1, kernel[1]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [7, 11, 26])
@pytest.mark.parametrize("case", CONVS)
def test_projected_conv(case, opset, bias):
    kernel, size, attrs = CONVS[case]
    factors = planted_projected(OUT, CHANNELS, int(np.prod(kernel)))
    model = conv(factors, kernel, size, attrs, bias, opset)
    new = check(model, factors, "projected", "Conv")
    first, second = new.graph.node[:2]
    ones = (1,) * len(kernel)
    assert (shapes(new)[first.input[1]], shapes(new)[second.input[1]]) == ((3, CHANNELS, *ones), (OUT, 3, *kernel))
    given = {a.name: helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    given = {name: value for name, value in given.items() if value != b"NOTSET"}
    kept = {a.name: helper.get_attribute_value(a) for a in second.attribute}
    assert kept | given == kept  # strides, pads and dilations are the layer's own
    assert (len(first.input), len(second.input)) == (2, 2 + bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("opset", [7, 11, 26])
@pytest.mark.parametrize("case", CONVS)
def test_tucker_conv(case, opset, bias):
    kernel, size, attrs = CONVS[case]
    factors = planted_tucker(OUT, CHANNELS, int(np.prod(kernel)))
    new = check(conv(factors, kernel, size, attrs, bias, opset), factors, "tucker", "Conv")
    nodes, ones = new.graph.node[:3], (1,) * len(kernel)
    assert [shapes(new)[n.input[1]] for n in nodes] == [(3, CHANNELS, *ones), (2, 3, *kernel), (OUT, 2, *ones)]
    assert [len(n.input) for n in nodes] == [2, 2, 2 + bias]


def planted_as(form, out, channels, kernel):
    taps = int(np.prod(kernel))
    if form == "tucker":
        return planted_tucker(out, channels, taps)
    if form == "spatial":
        return planted_spatial(out, channels, kernel)
    return planted_projected(out, channels, taps) if form == "projected" else planted(form, out, channels, taps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [*FORMS, "spatial", "projected", "tucker"])
def test_conv_bias_shift(form, bias):
    kernel, size, attrs = CONVS["2d pads"]
    factors = planted_as(form, OUT, CHANNELS, kernel)
    shift = normal(OUT, seed=5).astype(np.float64)
    model = conv(factors, kernel, size, attrs, bias)
    model.graph.node[1].op_type = "Identity"
    new = rewritten(model, {"layer": dataclasses.replace(factors, bias_shift=shift)}).model
    (old,) = run(model)
    close([old + shift.reshape(1, -1, 1, 1)], run(new))


def test_a_conv_whose_bias_is_an_empty_name():
    factors = planted("both", OUT, CHANNELS, 9)
    model = conv(factors, (3, 3), (5, 5), {}, bias=False)
    model.graph.node[0].input.append("")
    check(model, factors, "both", "Conv")


# ---------------------------------------------------------------- Gemm

ROWS, FEATURES = 5, 48
C_KINDS = ("absent", "row", "matrix row", "scalar", "column", "full", "dynamic", "dynamic full")
AFFINE_C = ("absent", "row", "matrix row")


def gemm(factors, c="row", opset=17, **flags):
    """Gemm named ``layer`` with C of some kind, and a Relu behind."""
    c_values = {
        "row": normal(OUT),
        "matrix row": normal(1, OUT),
        "scalar": np.float32(0.7),
        "column": normal(ROWS, 1),
        "full": normal(ROWS, OUT),
    }
    constants = {"w": layout("Gemm", factors.dense(), **flags)}
    inputs = {"x": (FEATURES, ROWS) if flags.get("transA") else (ROWS, FEATURES)}
    if c in c_values:
        constants["c"] = c_values[c]
    elif c != "absent":
        inputs["c"] = (OUT,) if c == "dynamic" else (ROWS, OUT)
    operands = ["x", "w"] if c == "absent" else ["x", "w", "c"]
    nodes = [node("Gemm", operands, ["g"], name="layer", **flags), node("Relu", ["g"], ["y"])]
    return make(nodes, inputs, ["y"], constants, opset=opset)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", C_KINDS)
@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product([0, 1], [0, 1])))
def test_gemm_flags(trans_a, trans_b, c, form):
    factors = planted(form, OUT, FEATURES)
    model = gemm(factors, c, transA=trans_a, transB=trans_b, alpha=0.5, beta=-2.0)
    check(model, factors, form, "Gemm")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", ["row", "full", "dynamic"])
@pytest.mark.parametrize("opset", OPSETS)
def test_gemm_in_every_opset(opset, c, form):
    factors = planted(form, OUT, FEATURES)
    model = check(gemm(factors, c, opset), factors, form, "Gemm")
    if opset < 11:  # the third input was required
        assert all(len(n.input) == 3 for n in model.graph.node if n.op_type == "Gemm")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("c", C_KINDS)
def test_gemm_bias_shift_only_where_it_is_affine(c, form):
    factors = planted(form, OUT, FEATURES)
    shift = normal(OUT, seed=5).astype(np.float64)
    model = gemm(factors, c, beta=3.0)
    model.graph.node[1].op_type = "Identity"
    (layer,), _ = find(View(model))
    assert layer.affine == (c in AFFINE_C)
    new = rewritten(model, {"layer": dataclasses.replace(factors, bias_shift=shift)}).model
    (old,) = run(model)
    close([old + shift * layer.affine], run(new))


# ---------------------------------------------------------------- MatMul


def matmul(factors, rank=3, left=False, bias=None, opset=17):
    """MatMul named ``layer``; ``bias`` is None or (its shape, whether it is the first operand of the Add)."""
    constants = {"w": layout("MatMul", factors.dense(), left=left)}
    shape = ((2, 3, ROWS)[: rank - 1] if rank > 1 else ()) + (FEATURES,)
    if left and rank > 1:
        shape = (*shape[:-2], FEATURES, ROWS)
    operands = ["w", "x"] if left else ["x", "w"]
    nodes = [node("MatMul", operands, ["m"], name="layer")]
    if bias is not None:
        constants["b"] = normal(*bias[0])
        nodes.append(node("Add", ["b", "m"] if bias[1] else ["m", "b"], ["a"], name="add", doc_string="kept"))
    nodes.append(node("Relu", [nodes[-1].output[0]], ["y"]))
    return make(nodes, {"x": shape}, ["y"], constants, opset=opset)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_matmul_sides_and_ranks(rank, left, form):
    factors = planted(form, OUT, FEATURES)
    check(matmul(factors, rank, left), factors, form, "MatMul")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", OPSETS)
def test_matmul_in_every_opset(opset, form):
    factors = planted(form, OUT, FEATURES)
    check(matmul(factors, bias=((OUT,), False), opset=opset), factors, form, "MatMul")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(OUT,), (1, OUT), (1, 1, OUT)])
def test_matmul_with_a_bias_behind(shape, first, rank, form):
    factors = planted(form, OUT, FEATURES)
    shift = normal(OUT, seed=5).astype(np.float64)
    model = matmul(factors, rank, bias=(shape, first))
    model.graph.node[2].op_type = "Identity"
    (layer,), _ = find(View(model))
    assert (layer.affine, layer.output) == (True, "a")
    new = rewritten(model, {"layer": dataclasses.replace(factors, bias_shift=shift)}).model
    close([run(model)[0] + shift], run(new))
    add = new.graph.node[-2]
    assert (add.name, add.op_type, shapes(new)[add.input[0 if first else 1]]) == ("add", "Add", shape)


@pytest.mark.parametrize("left", [False, True])
def test_a_matmul_without_a_bias_behind_gets_no_shift(left):
    factors = dataclasses.replace(planted("both", OUT, FEATURES), bias_shift=np.ones(OUT))
    model = matmul(factors, left=left)
    assert not find(View(model))[0][0].affine
    check(model, factors, "both", "MatMul")


@pytest.mark.parametrize("other", ["scalar", "column", "dynamic", "itself", "wide"])
def test_an_add_that_is_no_bias_is_left_alone(other):
    factors = planted("low_rank", OUT, FEATURES)
    constants = {"w": layout("MatMul", factors.dense())}
    values = {"scalar": np.float32(2), "column": normal(ROWS, 1), "wide": normal(4, ROWS, OUT)}
    constants |= {"b": values[other]} if other in values else {}
    added = {"dynamic": "x2", "itself": "m"}.get(other, "b")
    nodes = [node("MatMul", ["x", "w"], ["m"], name="layer"), node("Add", ["m", added], ["y"])]
    inputs = {"x": (ROWS, FEATURES)} | ({"x2": (ROWS, OUT)} if other == "dynamic" else {})
    model = make(nodes, inputs, ["y"], constants)
    (layer,), _ = find(View(model))
    assert (layer.bias, layer.bias_add, layer.affine) == (None, None, False)
    check(model, factors, "low_rank", "MatMul")


# ---------------------------------------------------------------- what feeds a weight goes with it


def test_constants_that_fed_only_the_layer_are_removed():
    factors = planted("low_rank", OUT, FEATURES)
    weight = numpy_helper.from_array(factors.dense().astype(np.float32))
    nodes = [
        node("Constant", [], ["w0"], value=weight),
        node("Identity", ["w0"], ["w1"]),
        node("Transpose", ["w1"], ["w2"], perm=[1, 0]),
        node("Constant", [], ["idle"], value=weight),  # was unread before: not ours to remove
        node("MatMul", ["x", "w2"], ["y"], name="layer"),
    ]
    model = make(nodes, {"x": (2, FEATURES)}, ["y"], {})
    (layer,), _ = find(View(model))
    new = rewrite(View(model), [layer], {layer.node: factors}, {"x": 2}).model
    assert ops(new) == ["Constant", "MatMul", "MatMul"]
    assert new.graph.node[0].output[0] == "idle"
    close(run(model), run(new))


def test_a_bias_that_others_read_stays():
    factors = planted("low_rank", OUT, FEATURES)
    nodes = [
        node("Gemm", ["x", "w", "b"], ["g"], name="layer"),
        node("Identity", ["b"], ["b1"]),
        node("Mul", ["g", "b1"], ["y"]),
    ]
    constants = {"w": layout("Gemm", factors.dense()), "b": normal(OUT)}
    model = make(nodes, {"x": (2, FEATURES)}, ["y"], constants)
    shifted = dataclasses.replace(factors, bias_shift=np.ones(OUT))
    new = rewritten(model, {"layer": shifted}).model
    (old,) = run(model)
    close([old + constants["b"]], run(new))


def test_new_names_avoid_those_of_the_model():
    factors = planted("both", OUT, FEATURES)
    nodes = [
        node("Gemm", ["x", "layer.right", "layer.left"], ["layer.sum"], name="layer"),
        node("Relu", ["layer.sum"], ["layer.low_rank_output"], name="layer.gather"),
    ]
    constants = {"layer.right": layout("Gemm", factors.dense()), "layer.left": normal(OUT)}
    model = make(nodes, {"x": (2, FEATURES)}, ["layer.low_rank_output"], constants)
    new = rewritten(model, {"layer": factors}).model
    close(run(model), run(new))
    names = [n.name for n in new.graph.node]
    assert len(set(names)) == len(names)


def test_factors_without_anything_are_refused():
    model = gemm(planted("low_rank", OUT, FEATURES))
    with pytest.raises(ValueError, match="layer"):
        rewritten(model, {"layer": keeping(np.zeros((OUT, FEATURES)), [])})


# ---------------------------------------------------------------- the rest of the model stays byte for byte


def rich_model():
    """Everything that a rewriting has to carry along: two layers, of which only ``layer`` will be rewritten."""
    factors = planted("both", OUT, FEATURES)
    branch = helper.make_graph(
        [node("Identity", ["n"], ["t"])], "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Neg", ["n"], ["e"])], "else", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)]
    )
    nodes = [
        node("Gelu", ["x"], ["x1"], name="gelu", domain="com.microsoft", doc_string="microsoft's own"),
        node("MatMul", ["x1", "w"], ["m"], name="layer"),
        node("FusedMatMul", ["m", "v"], ["n"], name="fused", domain="com.microsoft", transB=1, alpha=0.5),
        node("Twice", ["n"], ["n2"], name="function", domain="local"),
        node("ReduceMax", ["n2"], ["top"], keepdims=0),
        node("Greater", ["top", "zero"], ["yes"]),
        node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=other),
        node("Add", ["chosen", "sparse"], ["s"], name="sum"),
        node("Sub", ["s", "n2"], ["y"], name="last"),
    ]
    nodes[3].metadata_props.add(key="node", value="kept")
    constants = {"w": layout("MatMul", factors.dense()), "v": normal(OUT, OUT, seed=2), "zero": np.float32(0)}
    stored = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(2, np.float32), "sparse"), numpy_helper.from_array(np.array([0, 7])), [OUT]
    )
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tensors[1].doc_string = "a tensor's"
    graph = helper.make_graph(
        nodes,
        "named",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES], doc_string="in")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", OUT], doc_string="out")],
        tensors,
        doc_string="a graph's",
        value_info=[
            helper.make_tensor_value_info("n", TensorProto.FLOAT, ["N", OUT], doc_string="info"),
            helper.make_tensor_value_info("m", TensorProto.FLOAT, ["N", OUT]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [FEATURES, OUT]),
            helper.make_tensor_value_info("sparse", TensorProto.FLOAT, [OUT]),
            helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["N", FEATURES]),
        ],
        sparse_initializer=[stored],
    )
    graph.metadata_props.add(key="graph", value="kept")
    note = graph.quantization_annotation.add(tensor_name="n")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="zero")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    twice = helper.make_function("local", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], imports[:1])
    model = helper.make_model(
        graph,
        opset_imports=imports,
        functions=[twice],
        ir_version=10,
        producer_name="somebody",
        producer_version="1.2",
        domain="org.example",
        model_version=7,
        doc_string="a model's",
    )
    helper.set_model_props(model, {"author": "A", "license": "B"})
    model.training_info.add().algorithm.CopyFrom(helper.make_graph([], "train", [], []))
    return model, factors


def test_what_is_not_replaced_stays_byte_for_byte():
    model, factors = rich_model()
    view = View(model)
    layers, _ = find(view)
    assert [layer.name for layer in layers] == ["layer"]
    new = rewrite(view, layers, {"m": factors}, {"x1": 2}).model
    close(run(model, {"x": normal(3, FEATURES)}), run(new, {"x": normal(3, FEATURES)}))

    def by_output(m):
        return {n.output[0]: n.SerializeToString(deterministic=True) for n in m.graph.node}

    old_nodes, new_nodes = by_output(model), by_output(new)
    assert {k: v for k, v in old_nodes.items() if k != "m"}.items() <= new_nodes.items()
    old_values = {t.name: t.SerializeToString() for t in model.graph.initializer if t.name != "w"}
    assert old_values.items() <= {t.name: t.SerializeToString() for t in new.graph.initializer}.items()
    assert "w" not in shapes(new)
    kept = [v.SerializeToString() for v in model.graph.value_info if v.name != "w"]
    assert [v.SerializeToString() for v in new.graph.value_info] == kept
    for m in (model, new):
        for field in ("node", "initializer", "value_info"):
            m.graph.ClearField(field)
    assert new.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_before_ir_4_initialisers_stay_graph_inputs():
    factors = planted("both", OUT, FEATURES)
    model = gemm(factors, "row", opset=7)
    assert model.ir_version == 3
    new = rewritten(model, {"layer": factors}).model  # the checker asks for them
    assert [v.name for v in new.graph.input][:1] == ["x"]
    assert {v.name for v in new.graph.input} == {"x", *shapes(new)}


# ---------------------------------------------------------------- dead filters

A, B, C, D = 12, 20, 24, 16  # channels along a chain; A * B * 9 weights and so on


def w_conv(out, channels, kept=None, seed=0):
    matrix = normal(out, channels * 9, seed=seed)
    return (matrix if kept is None else only(matrix, kept, 9)).reshape(out, channels, 3, 3)


def keep_conv(weight, kept):
    return keeping(weight.reshape(len(weight), -1), kept, 9)


def conv_chain(readers=(("second", (1, 4, 19)),), extra=()):
    """Conv ``first`` -> Relu (its output is ``t``) -> one Conv for each reader, summed up."""
    constants = {"w": w_conv(B, A), "b": normal(B)}
    nodes = [node("Conv", ["x", "w", "b"], ["c"], name="first"), *RELU]
    for i, (name, kept) in enumerate(readers):
        constants[f"w_{name}"] = w_conv(C, B, kept, seed=i + 1)
        nodes.append(node("Conv", ["t", f"w_{name}"], [f"y_{name}"], name=name))
    nodes.append(node("Sum", [f"y_{name}" for name, _ in readers], ["y"]))
    return make([*nodes, *extra], {"x": (2, A, 12, 12)}, ["y"], constants)


RELU = [node("Relu", ["c"], ["t"])]
POOL = [
    node("Relu", ["c"], ["r"]),
    node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
    node("Clip", ["p", "low", "high"], ["q"]),
    node("Identity", ["q"], ["t"]),
]


def reader_factors(model, names=("second",)):
    """Return channel factors for the readers: the channels in which their weights are not zero."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for name in names:
        weight = stored[f"w_{name}"]
        found[name] = keep_conv(weight, np.flatnonzero(np.abs(weight).sum((0, 2, 3))))
    return found


def test_filters_that_nobody_reads_go_and_the_gather_with_them():
    constants = {"w": w_conv(B, A), "b": normal(B), "w_second": w_conv(C, B, (1, 4, 19), seed=1)}
    constants |= {"low": np.float32(0), "high": np.float32(1.5)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="first"),
        *POOL,
        node("Conv", ["t", "w_second"], ["y"], name="second"),
    ]
    model = make(nodes, {"x": (2, A, 12, 12)}, ["y"], constants)
    result = rewritten(model, reader_factors(model))
    assert {k: v.tolist() for k, v in result.kept_outputs.items()} == {"c": [1, 4, 19]}
    assert ops(result.model) == ops(model)
    weights = [shapes(result.model)[n.input[1]] for n in result.model.graph.node if n.op_type == "Conv"]
    assert weights == [(3, A, 3, 3), (C, 3, 3, 3)]
    assert shapes(result.model)[result.model.graph.node[0].input[2]] == (3,)
    close(run(model), run(result.model))


def test_stale_value_info_of_narrowed_tensors_goes():
    model = conv_chain()
    for name, width in (("c", B), ("t", B), ("y_second", C)):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, width, None, None)))
    new = rewritten(model, reader_factors(model)).model
    assert [v.name for v in new.graph.value_info] == ["y_second"]


def test_two_readers_share_the_union_of_their_channels():
    model = conv_chain([("second", (1, 4, 19)), ("third", (0, 4)), ("fourth", (0, 1, 4, 19))])
    result = rewritten(model, reader_factors(model, ("second", "third", "fourth")))
    assert result.kept_outputs["c"].tolist() == [0, 1, 4, 19]
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    gathered = [stored[n.input[1]].tolist() for n in result.model.graph.node if n.op_type == "Gather"]
    assert gathered == [[1, 2, 3], [0, 2]]  # the fourth keeps all that is left
    close(run(model), run(result.model))


@pytest.mark.parametrize("form", ["low_rank", "channels", "all_channels", "both", "spatial", "projected", "tucker"])
def test_the_producer_may_be_factorised_itself(form):
    factors = planted_as(form, B, A, (3, 3))
    factors = dataclasses.replace(factors, bias_shift=normal(B, seed=9).astype(np.float64))
    model = conv_chain()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(layout("Conv", factors.dense(), (3, 3)), "w"))
    whole = rewritten(model, {"first": factors})  # the reader stays dense: nothing dies
    assert not whole.kept_outputs
    result = rewritten(model, {"first": factors} | reader_factors(model))
    assert result.kept_outputs["c"].tolist() == [1, 4, 19]
    assert ops(result.model).count("Gather") == (form in ("channels", "both"))
    close(run(whole.model), run(result.model))


def test_a_chain_of_three_loses_filters_twice():
    constants = {"w": w_conv(B, A), "b": normal(B)}
    constants |= {"w_second": w_conv(C, B, (2, 3, 11), 1), "w_third": w_conv(D, C, (0, 23), 2)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="first"),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w_second"], ["c2"], name="second"),
        node("Conv", ["c2", "w_third"], ["y"], name="third"),
    ]
    model = make(nodes, {"x": (1, A, 9, 9)}, ["y"], constants)
    result = rewritten(model, reader_factors(model, ("second", "third")))
    assert {k: v.tolist() for k, v in result.kept_outputs.items()} == {"c": [2, 3, 11], "c2": [0, 23]}
    weights = [shapes(result.model)[n.input[1]] for n in result.model.graph.node if n.op_type == "Conv"]
    assert weights == [(3, A, 3, 3), (2, 3, 3, 3), (D, 2, 3, 3)]
    assert "Gather" not in ops(result.model)
    close(run(model), run(result.model))


STOPS = {
    "graph output": {"extra": [], "outputs": ["t"]},
    "identity to a graph output": {"extra": [node("Identity", ["t"], ["copy"])], "outputs": ["copy"]},
    "add": {"extra": [node("Add", ["t", "t"], ["z"])], "outputs": ["z"]},
    "concat": {"extra": [node("Concat", ["t", "c"], ["z"], axis=1)], "outputs": ["z"]},
    "flatten": {"extra": [node("Flatten", ["t"], ["z"])], "outputs": ["z"]},
    "prelu": {"extra": [node("PRelu", ["t", "slope"], ["z"])], "outputs": ["z"]},
    "softmax": {"extra": [node("Softmax", ["t"], ["z"], axis=1)], "outputs": ["z"]},
    "pool with indices": {
        "extra": [node("MaxPool", ["t"], ["z", "at"], kernel_shape=[2, 2]), node("Cast", ["at"], ["at1"], to=1)],
        "outputs": ["at1"],
    },
    "dropout with a mask": {
        "extra": [node("Dropout", ["t"], ["z", "mask"]), node("Cast", ["mask"], ["mask1"], to=1)],
        "outputs": ["mask1"],
    },
    "as a weight": {"extra": [node("Conv", ["big", "t"], ["z"])], "outputs": ["z"]},
    "as input and weight": {"extra": [node("Conv", ["t", "t"], ["z"])], "outputs": ["z"]},
    "matmul": {"extra": [node("MatMul", ["t", "square"], ["z"])], "outputs": ["z"]},
    "custom domain": {
        "extra": [
            node("Gelu", ["t"], ["g"], domain="com.microsoft"),
            node("Size", ["g"], ["n"]),
            node("Cast", ["n"], ["z"], to=1),
        ],
        "outputs": ["z"],
    },
    "shape": {"extra": [node("Shape", ["t"], ["s"]), node("Cast", ["s"], ["z"], to=1)], "outputs": ["z"]},
}


@pytest.mark.parametrize("case", STOPS)
def test_any_other_use_of_a_filter_keeps_it(case):
    more = {"slope": normal(B, 1, 1), "big": normal(1, B, 12, 12), "square": normal(10, 40)}
    extra, outputs = STOPS[case]["extra"], STOPS[case]["outputs"]
    constants = {"w": w_conv(B, A), "b": normal(B), "w_second": w_conv(C, B, (1, 4, 19), 1)}
    constants |= {k: v for k, v in more.items() if any(k in n.input for n in extra)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="first"),
        node("Relu", ["c"], ["t"]),
        node("Conv", ["t", "w_second"], ["y"], name="second"),
    ]
    model = make([*nodes, *extra], {"x": (2, A, 12, 12)}, ["y", *outputs], constants)
    result = rewritten(model, reader_factors(model))
    assert not result.kept_outputs
    assert "Gather" in ops(result.model)
    close(run(model), run(result.model))


MIXES = {
    "prelu": [node("PRelu", ["c", "slope"], ["t"])],
    "softmax": [node("Softmax", ["c"], ["t"], axis=1)],
    "lrn": [node("LRN", ["c"], ["t"], size=3)],
    "scale": [node("Mul", ["c", "slope"], ["t"])],
    "two inputs": [node("Relu", ["c"], ["r"]), node("Add", ["c", "r"], ["t"])],
    "custom domain": [node("Gelu", ["c"], ["t"], domain="com.microsoft")],
}


@pytest.mark.parametrize("case", MIXES)
def test_an_op_on_the_way_that_looks_at_channels_keeps_them(case):
    constants = {"w": w_conv(B, A), "b": normal(B), "w_second": w_conv(C, B, (1, 4, 19), 1)}
    constants |= {"slope": normal(B, 1, 1)} if case in ("prelu", "scale") else {}
    first = node("Conv", ["x", "w", "b"], ["c"], name="first")
    second = node("Conv", ["t", "w_second"], ["y"], name="second")
    model = make([first, *MIXES[case], second], {"x": (2, A, 12, 12)}, {"y": (2, C, 8, 8)}, constants)
    result = rewritten(model, reader_factors(model))
    assert not result.kept_outputs
    close(run(model), run(result.model))


@pytest.mark.parametrize("reader", ["dense", "both", "grouped"])
def test_a_reader_of_all_channels_keeps_them(reader):
    model = conv_chain([("second", (1, 4, 19)), ("third", None)])
    factors = reader_factors(model)
    if reader == "both":
        planted_factors = planted("both", C, B, 9)
        model.graph.initializer[3].CopyFrom(
            numpy_helper.from_array(layout("Conv", planted_factors.dense(), (3, 3)), "w_third")
        )
        factors["third"] = planted_factors
    if reader == "grouped":
        model.graph.initializer[3].CopyFrom(numpy_helper.from_array(normal(C, B // 4, 3, 3), "w_third"))
        model.graph.node[3].attribute.append(helper.make_attribute("group", 4))
    result = rewritten(model, factors)
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_subgraph_that_reads_a_filter_keeps_it():
    def branch(name):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("Relu", ["t"], [name])], name, [], [out])

    extra = [node("If", ["flag"], ["z"], then_branch=branch("a"), else_branch=branch("e"))]
    constants = {"w": w_conv(B, A), "b": normal(B), "w_second": w_conv(C, B, (1, 4, 19), 1), "flag": np.array(True)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="first"),
        *RELU,
        node("Conv", ["t", "w_second"], ["y"], name="second"),
    ]
    model = make([*nodes, *extra], {"x": (2, A, 12, 12)}, ["y", "z"], constants)
    result = rewritten(model, reader_factors(model))
    assert not result.kept_outputs
    close(run(model), run(result.model))


def chain(ops_between, first, second, kept, c=None, shape=(3, FEATURES), **flags):
    """Gemm or MatMul ``first`` -> elementwise nodes from h to t -> ``second``, which reads few features."""
    w1, w2 = normal(40, FEATURES, seed=1), only(normal(OUT, 40, seed=2), kept)
    constants = {"w1": layout(first, w1, **flags), "w2": layout(second, w2)}
    nodes = [node(first, ["x", "w1"], ["h0" if c is not None and first == "MatMul" else "h"], name="first", **flags)]
    if c is not None:
        constants["c"] = c
        if first == "Gemm":
            nodes[0].input.append("c")
        else:
            nodes.append(node("Add", ["h0", "c"], ["h"]))
    nodes += [*ops_between, node(second, ["t", "w2"], ["y"], name="second")]
    return make(nodes, {"x": shape}, ["y"], constants, opset=20), keeping(w2, kept)


BETWEEN = [node("Relu", ["h"], ["t"])]
KEPT = (0, 3, 17, 39)


@pytest.mark.parametrize(("first", "second"), [("Gemm", "Gemm"), ("Gemm", "MatMul"), ("MatMul", "MatMul")])
@pytest.mark.parametrize("bias", [None, (40,), (1, 40)])
def test_features_that_nobody_reads_go(first, second, bias):
    c = None if bias is None else normal(*bias)
    model, factors = chain(BETWEEN, first, second, KEPT, c)
    result = rewritten(model, {"second": factors})
    assert result.kept_outputs["h0" if first == "MatMul" and bias else "h"].tolist() == list(KEPT)
    assert ops(result.model) == ops(model)
    assert all(40 not in shape for shape in shapes(result.model).values())
    close(run(model), run(result.model))


def test_a_dense_gemm_that_loses_features_has_its_flags_multiplied_out():
    flags = {"alpha": 0.5, "beta": 3.0, "transB": 1}
    model, factors = chain(BETWEEN, "Gemm", "Gemm", KEPT, normal(40), **flags)
    result = rewritten(model, {"second": factors})
    assert result.kept_outputs["h"].tolist() == list(KEPT)
    close(run(model), run(result.model))


@pytest.mark.parametrize("form", FORMS)
def test_features_of_a_factorised_matmul_with_a_bias_and_gelu(form):
    between = [node("Gelu", ["h"], ["g"]), node("Dropout", ["g"], ["t"])]
    model, factors = chain(between, "MatMul", "MatMul", KEPT, normal(1, 40), shape=(2, 3, FEATURES))
    first = dataclasses.replace(planted(form, 40, FEATURES), bias_shift=normal(40, seed=8).astype(np.float64))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(layout("MatMul", first.dense()), "w1"))
    whole = rewritten(model, {"first": first})
    result = rewritten(model, {"first": first, "second": factors})
    assert list(result.kept_outputs) == ["h0"]
    close(run(whole.model), run(result.model))


@pytest.mark.parametrize("c", [normal(3, 40), np.float32(0.5), normal(3, 1)])
def test_a_gemm_whose_c_is_passed_on_keeps_its_features(c):
    model, factors = chain(BETWEEN, "Gemm", "Gemm", KEPT, c)
    result = rewritten(model, {"second": factors})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_gemm_whose_c_is_an_input_keeps_its_features():
    w2 = only(normal(OUT, 40, seed=2), KEPT)
    constants = {"w1": normal(FEATURES, 40), "w2": layout("Gemm", w2)}
    nodes = [
        node("Gemm", ["x", "w1", "c"], ["h"], name="first"),
        node("Gemm", ["h", "w2"], ["y"], name="second"),
    ]
    model = make(nodes, {"x": (3, FEATURES), "c": (3, 40)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_reader_that_transposes_its_input_keeps_the_features():
    """Gemm with transA reads the rows of what the first one writes, not its features."""
    w2 = only(normal(OUT, 40, seed=2), KEPT)
    constants = {"w1": normal(FEATURES, 40), "w2": layout("Gemm", w2)}
    nodes = [
        node("Gemm", ["x", "w1"], ["h"], name="first"),
        node("Gemm", ["h", "w2"], ["y"], name="second", transA=1),
    ]
    model = make(nodes, {"x": (40, FEATURES)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


@pytest.mark.parametrize("first_left", [False, True])
def test_a_weight_on_the_left_reads_and_writes_another_axis(first_left):
    """Of x (40, 40): W x mixes the rows, x W the columns; square shapes hide a mixed-up axis from every checker."""
    w1, w2 = normal(40, 40, seed=1), only(normal(40, 40, seed=2), KEPT)
    constants = {"w1": w1.T if not first_left else w1, "w2": w2 if not first_left else w2.T.copy()}
    first, second = (["x", "w1"], ["w2", "h"]) if not first_left else (["w1", "x"], ["h", "w2"])
    nodes = [node("MatMul", first, ["h"], name="first"), node("MatMul", second, ["y"], name="second")]
    model = make(nodes, {"x": (40, 40)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_conv_behind_a_rank_3_matmul_reads_another_axis():
    """MatMul writes features last, Conv reads channels on axis 1; both are 40 here."""
    w2 = only(normal(C, 40 * 3), KEPT, 3)
    constants = {"w1": normal(FEATURES, 40), "w2": w2.reshape(C, 40, 3)}
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="first"),
        node("Relu", ["h"], ["t"]),
        node("Conv", ["t", "w2"], ["y"], name="second"),
    ]
    model = make(nodes, {"x": (2, 40, FEATURES)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT, 3)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_matmul_behind_a_conv_reads_another_axis():
    w2 = only(normal(OUT, 40), KEPT)
    constants = {"w1": normal(40, A, 3), "w2": layout("MatMul", w2)}
    nodes = [node("Conv", ["x", "w1"], ["h"], name="first"), node("MatMul", ["h", "w2"], ["y"], name="second")]
    model = make(nodes, {"x": (2, A, 42)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_pool_over_features_keeps_them():
    """Behind a MatMul a pool runs over the features themselves."""
    w2 = only(normal(OUT, 39), KEPT[:-1])
    constants = {"w1": normal(FEATURES, 40), "w2": layout("MatMul", w2)}
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="first"),
        node("MaxPool", ["h"], ["t"], kernel_shape=[2]),
        node("MatMul", ["t", "w2"], ["y"], name="second"),
    ]
    model = make(nodes, {"x": (2, 5, FEATURES)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT[:-1])})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_product_of_two_activations_keeps_the_features():
    w2 = only(normal(OUT, 40), KEPT)
    constants = {"w1": normal(FEATURES, 40), "w2": layout("MatMul", w2)}
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="first"),
        node("MatMul", ["h", "w2"], ["y"], name="second"),
        node("MatMul", ["h", "v"], ["z"]),
    ]
    model = make(nodes, {"x": (2, FEATURES), "v": (40, 3)}, ["y", "z"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_gemm_that_also_adds_what_it_reads_keeps_the_features():
    w2 = only(normal(40, 40), KEPT)
    constants = {"w1": normal(FEATURES, 40), "w2": layout("Gemm", w2)}
    nodes = [node("Gemm", ["x", "w1"], ["h"], name="first"), node("Gemm", ["h", "w2", "h"], ["y"], name="second")]
    model = make(nodes, {"x": (3, FEATURES)}, ["y"], constants)
    result = rewritten(model, {"second": keeping(w2, KEPT)})
    assert not result.kept_outputs
    close(run(model), run(result.model))


def test_a_layer_read_by_nobody_loses_nothing():
    model = conv_chain(extra=[node("Conv", ["t", "w_idle"], ["idle"], name="idle")])
    model.graph.initializer.append(numpy_helper.from_array(w_conv(C, B), "w_idle"))
    view = View(model)
    layers, _ = find(view)
    alive, reshaped = alive_outputs(view, layers, {"y_second": np.array([1, 4, 19])})
    assert not alive
    assert not reshaped


def test_readers_that_need_all_channels_together_take_none_away():
    model = conv_chain([("second", None), ("third", None)])
    view = View(model)
    half = np.arange(B // 2)
    assert alive_outputs(view, find(view)[0], {"y_second": half, "y_third": half + B // 2}) == ({}, set())
