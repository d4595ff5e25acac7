"""Which layers are found, why others are not, and that ``W x + b`` is what ONNX Runtime computes."""

import pickle
import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.errors import ModelError
from onnx_lrs.graph import layers as module
from onnx_lrs.graph.cost import macs_by_node, tensors_to_measure
from onnx_lrs.graph.layers import Behind, affine_behind, bias_row, find, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.solvers.activation import LINEAR, RELU, clip, leaky_relu
from tests.builders import OPSETS, layout, make, node, normal, planted, run

OUT, IN = 32, 40
W = normal(IN, OUT)  # as Gemm and MatMul store it


def search(model, exclude=()):
    before = model.SerializeToString()
    found = find(View(model), exclude)
    assert model.SerializeToString() == before
    assert pickle.loads(pickle.dumps(found)) == found
    return found


def reason(model, name="layer", exclude=()):
    """Return why the layer was skipped; it must be listed as skipped, and only so."""
    layers, skipped = search(model, exclude)
    assert name not in [layer.name for layer in layers]
    (found,) = [s for s in skipped if s.name == name]
    return found.reason


def build(nodes, inputs=None, constants=None, outputs=("y",), **options):
    return make(nodes, inputs or {"x": (2, IN)}, outputs, {"w": W} if constants is None else constants, **options)


def matmul(weight="w", output="y", source="x", name="layer"):
    return node("MatMul", [source, weight], [output], name=name)


def conv_model(weight, channels, bias=True, **attrs):
    constants = {"w": weight} | ({"b": normal(len(weight))} if bias else {})
    nodes = [node("Conv", ["x", *constants], ["y"], name="layer", **attrs)]
    return build(nodes, {"x": (2, channels, *[7] * (weight.ndim - 2))}, constants)


# ---------------------------------------------------------------- eligible: W x + b


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_is_w_times_its_columns_plus_b(opset, bias):
    weight = normal(OUT, 5, 3, 3)
    constants = {"w": weight} | ({"b": normal(OUT)} if bias else {})
    attrs = {"strides": [2, 1], "pads": [1, 0, 0, 1], "dilations": [1, 2]}
    model = build(
        [node("Conv", ["x", *constants], ["y"], name="layer", **attrs)], {"x": (1, 5, 8, 9)}, constants, opset=opset
    )
    (layer,), skipped = search(model)
    assert not skipped
    assert (layer.op, layer.out, layer.channels, layer.taps, layer.params) == ("Conv", OUT, 5, 9, OUT * 45)
    assert (layer.geometry.kernel, layer.geometry.strides) == ((3, 3), (2, 1))
    assert (layer.geometry.pads, layer.geometry.dilations) == ((1, 0, 0, 1), (1, 2))
    x = normal(1, 5, 8, 9)
    (y,) = run(model, {"x": x})
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 1)))
    view = View(model)
    shift = 0 if bias_row(view, layer) is None else bias_row(view, layer)
    for i, j in np.ndindex(*y.shape[2:]):
        column = padded[0, :, 2 * i : 2 * i + 3, j : j + 5 : 2].reshape(-1)
        np.testing.assert_allclose(y[0, :, i, j], weight_matrix(view, layer) @ column + shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (OUT,), (1, OUT)])
def test_gemm_is_w_x_plus_b(trans_a, trans_b, c):
    flags = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 3.0}
    constants = {"w": W.T if trans_b else W} | ({} if c is None else {"c": normal(*c)})
    shape = (IN, 6) if trans_a else (6, IN)
    model = build([node("Gemm", ["x", *constants], ["y"], name="layer", **flags)], {"x": shape}, constants)
    (layer,), _ = search(model)
    view = View(model)
    x = normal(*shape)
    expected = (x.T if trans_a else x) @ weight_matrix(view, layer).T
    assert (bias_row(view, layer) is None) == (c is None)
    assert layer.affine
    np.testing.assert_allclose(
        run(model, {"x": x})[0], expected + (0 if c is None else bias_row(view, layer)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("left", [False, True])
def test_matmul_is_w_x(left):
    matrix, x = normal(OUT, IN), normal(3, IN, 6) if left else normal(3, 6, IN)
    nodes = [node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], name="layer")]
    model = build(nodes, {"x": x.shape}, {"w": layout("MatMul", matrix, left=left)})
    (layer,), _ = search(model)
    assert (layer.out, layer.channels, layer.input, layer.bias) == (OUT, IN, "x", None)
    weight = weight_matrix(View(model), layer)
    expected = weight @ x if left else x @ weight.T
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


def test_matmul_finds_its_bias_in_the_add_behind():
    model = build([matmul(output="m"), node("Add", ["b", "m"], ["y"])], constants={"w": W, "b": normal(1, OUT)})
    (layer,), _ = search(model)
    assert (layer.bias, layer.bias_add, layer.node, layer.output) == ("b", "y", "m", "y")
    view, x = View(model), normal(2, IN)
    expected = x @ weight_matrix(view, layer).T + bias_row(view, layer)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


STORED = numpy_helper.from_array(W)
WEIGHTS = {
    "constant node": ([node("Constant", [], ["w"], value=STORED), matmul()], {}),
    "identity chain": ([node("Identity", ["v"], ["u"]), node("Identity", ["u"], ["w"]), matmul()], {"v": W}),
    "transpose": ([node("Transpose", ["v"], ["w"]), matmul()], {"v": np.ascontiguousarray(W.T)}),
    "transposed constant node": (
        [node("Constant", [], ["v"], value=STORED), node("Transpose", ["v"], ["w"], perm=[1, 0]), matmul()],
        {},
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_behind_constant_identity_and_transpose_nodes(case):
    nodes, constants = WEIGHTS[case]
    shape = (2, OUT) if case == "transposed constant node" else (2, IN)
    model = build(nodes, {"x": shape}, constants)
    (layer,), _ = search(model)
    weight = weight_matrix(View(model), layer)
    np.testing.assert_allclose(run(model)[0], normal(*shape) @ weight.T, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- skipped, and why


def test_grouped_and_depthwise_convolutions():
    assert reason(conv_model(normal(32, 8, 3, 3), 16, group=2)) == "grouped convolution (2 groups)"
    assert reason(conv_model(normal(64, 1, 5, 5), 64, group=64)) == "depthwise convolution"


def test_tiny_layers():
    assert "tiny: 1023 weights" in reason(build([matmul()], {"x": (2, 33)}, {"w": normal(33, 31)}))
    assert len(search(build([matmul()], {"x": (2, 32)}, {"w": normal(32, 32)}))[0]) == 1


@pytest.mark.parametrize(
    "nodes",
    [
        [matmul(output="a"), matmul(output="b", name="other"), node("Add", ["a", "b"], ["y"])],
        [matmul(output="a"), node("ReduceSum", ["w"], ["b"], keepdims=0), node("Add", ["a", "b"], ["y"])],
        [
            node("Identity", ["w"], ["v"]),
            matmul("v", "a"),
            matmul("w", "b", name="other"),
            node("Add", ["a", "b"], ["y"]),
        ],
    ],
)
def test_a_weight_that_two_nodes_read(nodes):
    assert "shared" in reason(build(nodes))


def test_a_weight_that_one_node_reads_twice():
    square = normal(40, 40)
    model = build([node("Gemm", ["x", "w", "w"], ["y"], name="layer")], {"x": (40, 40)}, {"w": square})
    assert "shared" in reason(model)
    assert "both inputs are constant" in reason(build([matmul(source="w")], constants={"w": square}))


@pytest.mark.parametrize("opset", [7, 17])
def test_a_weight_that_is_a_graph_input(opset):
    """From IR 4 on a caller may replace it; before, initialisers had to be listed, and ONNX Runtime takes no others."""
    model = build([matmul()], opset=opset)
    if opset == 7:
        assert model.ir_version == 3
        assert [layer.weight for layer in search(model)[0]] == ["w"]
        with pytest.raises(Exception, match="Invalid input name: w"):
            run(model, {"w": W})
        return
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, W.shape))
    assert "graph input" in reason(model)
    assert search(model)[1][0].params == W.size
    assert not np.array_equal(run(model)[0], run(model, {"w": 2 * W})[0])


def test_a_weight_that_is_fed():
    assert "activations only" in reason(build([matmul()], {"x": (2, IN), "w": W.shape}, {}))
    nodes = [node("Conv", ["x", "w"], ["y"], name="layer")]
    assert "computed" in reason(build(nodes, {"x": (1, 8, 9), "w": (8, 8, 3)}, {}))


def test_a_weight_that_is_also_a_graph_output():
    assert "graph output" in reason(build([matmul()], outputs=("y", "w")))
    nodes = [node("Identity", ["w"], ["v"]), matmul("v")]
    assert "graph output" in reason(build(nodes, outputs=("y", "v")))


def branch(nodes, output):
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def if_model(inner, outer):
    inside = branch([*inner, node("Identity", ["s"], ["z"])], "z")
    nodes = [*outer, node("If", ["yes"], ["i"], then_branch=inside, else_branch=inside)]
    nodes.append(node("Add", ["a", "i"], ["y"]))
    return build(nodes, constants={"w": W, "yes": np.array(True)})


def test_a_weight_that_a_subgraph_reads():
    model = if_model([node("ReduceSum", ["w"], ["s"], keepdims=0)], [matmul(output="a")])
    assert "subgraph" in reason(model)
    assert run(model)[0].shape == (2, OUT)
    whole = branch([], "w")
    nodes = [matmul(output="a"), node("If", ["yes"], ["i"], then_branch=whole, else_branch=whole)]
    assert "subgraph" in reason(build(nodes, constants={"w": W, "yes": np.array(True)}, outputs=("a", "i")))


def test_layers_inside_subgraphs():
    model = if_model([matmul(output="s", name="inside")], [node("ReduceSum", ["x"], ["a"], keepdims=0)])
    layers, skipped = search(model)
    assert not layers
    assert {(s.name, s.node, s.reason) for s in skipped} == {("inside", None, "inside a subgraph (If, Loop or Scan)")}
    body = helper.make_graph(
        [node("Conv", ["state", "k"], ["next"], name="looped"), node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 32, 9]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [1, 32, 9]),
        ],
    )
    nodes = [node("Loop", ["n", "yes", "x"], ["y"], body=body)]
    constants = {"n": np.array(2), "yes": np.array(True), "k": normal(32, 32, 1)}
    assert "subgraph" in reason(build(nodes, {"x": (1, 32, 9)}, constants), "looped")


def quantised(op="MatMul", activations=False):
    """A QDQ graph: int8 weight -> DequantizeLinear -> op (or both operands dequantised activations)."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "zero"], ["xd"]),
        node("DequantizeLinear", ["wq", "s", "zero"], ["wd"]),
    ]
    if activations:
        nodes[2] = node("Transpose", ["xd"], ["xt"])
        nodes += [
            node("QuantizeLinear", ["xt", "s", "zero"], ["tq"]),
            node("DequantizeLinear", ["tq", "s", "zero"], ["wd"]),
        ]
    constants = {"s": np.float32(0.05), "zero": np.int8(0)}
    constants |= {} if activations else {"wq": np.clip(20 * W, -127, 127).astype(np.int8)}
    return build([*nodes, node(op, ["xd", "wd"], ["y"], name="layer")], constants=constants, opset=13)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_quantised_weight(op):
    model = quantised(op)
    assert run(model)[0].shape == (2, OUT)
    (skipped,) = search(model)[1]
    assert (skipped.reason, skipped.shape, skipped.params) == ("quantised weight (QDQ)", (IN, OUT), IN * OUT)


def test_a_product_of_quantised_activations_has_no_weight():
    assert "activations only" in reason(quantised(activations=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [matmul()],
        "g",
        [helper.make_tensor_value_info("x", kind, (2, IN))],
        [helper.make_tensor_value_info("y", kind, (2, OUT))],
        [numpy_helper.from_array(W.astype(dtype), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert np.dtype(dtype).name in reason(model)


@pytest.mark.parametrize(
    "op", ["ConvTranspose", "LSTM", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"]
)
def test_ops_that_are_not_supported(op):
    weight = normal(8, 16, 3, 3).astype(np.int8 if "Q" in op or "Integer" in op else np.float32)
    graph = helper.make_graph(
        [node(op, ["x", "w"], ["y"], name="layer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    layers, (skipped,) = search(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert not layers
    assert skipped.reason == module.NOT_SUPPORTED[op]
    assert (skipped.shape, skipped.params, skipped.node) == (weight.shape, weight.size, "y")


def test_products_without_a_matrix():
    assert "activations" in reason(build([matmul("x2")], {"x": (2, IN), "x2": (IN, 3)}, {}))
    assert reason(build([matmul()], {"x": (3, 2, IN)}, {"w": normal(3, IN, OUT)})).startswith("weight of rank 3")
    gemm = build([node("Gemm", ["w", "x"], ["y"], name="layer")], {"x": (OUT, 3)})
    assert "first input of the Gemm" in reason(gemm)
    assert search(gemm)[1][0].shape == W.shape


def test_a_convolution_over_four_dimensions_and_a_bias_that_is_fed():
    nodes = [node("Conv", ["x", "w"], ["y"], name="layer")]
    assert "4 spatial" in reason(build(nodes, {"x": (1, 16, 3, 3, 3, 3)}, {"w": normal(16, 16, 2, 2, 2, 2)}))
    nodes = [node("Conv", ["x", "w", "b"], ["y"], name="layer")]
    assert "bias" in reason(build(nodes, {"x": (1, 16, 9), "b": (32,)}, {"w": normal(32, 16, 3)}))


def test_a_sparse_weight_and_a_custom_domain():
    model = build([matmul()])
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 7]))
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, W.shape))
    (skipped,) = search(model)[1]
    assert (skipped.reason, skipped.shape) == ("its weight is a sparse initialiser", W.shape)
    custom = build([node("MatMul", ["x", "w"], ["m"], name="layer", domain="org.example"), node("Shape", ["m"], ["y"])])
    assert "org.example" in reason(custom)


@pytest.mark.parametrize(
    ("pattern", "matches"), [("layer", True), ("la*", True), ("l?yer", True), ("Layer", False), ("y", False)]
)
def test_exclusion_by_pattern(pattern, matches):
    layers, skipped = search(build([matmul()]), ["nothing", pattern])
    assert len(layers) == (not matches)
    assert [s.reason for s in skipped] == ["excluded by the user"] * matches


def test_every_layer_gets_a_name_of_its_own():
    names = ["same", "same", "", "d", ""]
    weights = {f"w{i}": normal(IN, IN, seed=i) for i in range(5)}
    nodes, source = [], "x"
    for i, (name, output) in enumerate(zip(names, ["a", "b", "d", "e", "f"], strict=True)):
        nodes.append(matmul(f"w{i}", output, source, name))
        source = output
    # the third has no name and takes that of its output, ``d``, which is the name of the fourth
    layers, _ = search(build(nodes, constants=weights, outputs=("f",)))
    found = [layer.name for layer in layers]
    assert found == ["same", "b", "d", "e", "f"]
    nodes[2].name, nodes[3].name = "d", ""
    nodes[3].output[0] = nodes[4].input[0] = "same"
    found = [layer.name for layer in search(build(nodes, constants=weights, outputs=("f",)))[0]]
    assert len(set(found)) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_names_tensor_and_layer(value):
    weight = W.copy()
    weight[3, 4] = value
    model = build([matmul()], constants={"w": weight})
    with pytest.raises(ModelError, match=r"'w' of layer 'layer'"):
        find(View(model))
    assert reason(model, exclude=["layer"]) == "excluded by the user"


# ---------------------------------------------------------------- what follows


CUT = node("Relu", ["y"], ["z"])
READERS = {  # what reads the layer's output y, the graph outputs, and what the layer is followed by
    "relu": ([CUT], ("z",), "relu"),
    "relu of the standard domain by name": ([node("Relu", ["y"], ["z"], domain="ai.onnx")], ("z",), "relu"),
    "two relus": ([CUT, node("Relu", ["y"], ["z2"])], ("z", "z2"), "relu"),
    "a relu and another": ([CUT, node("Neg", ["y"], ["z2"])], ("z", "z2"), "linear"),
    "an addition behind the relu": ([CUT, node("Add", ["z", "z"], ["s"])], ("s",), "relu"),
    "nothing": ([], ("y",), "linear"),
    "a relu and the caller": ([CUT], ("z", "y"), "linear"),
    "another function": ([node("Sigmoid", ["y"], ["z"])], ("z",), "linear"),
    "leaky": ([node("LeakyRelu", ["y"], ["z"])], ("z",), "leaky-relu"),
    "two leaks": (
        [node("LeakyRelu", ["y"], ["z"]), node("LeakyRelu", ["y"], ["z2"], alpha=0.1)],
        ("z", "z2"),
        "linear",
    ),
    "a leak, given and by default": (
        [node("LeakyRelu", ["y"], ["z"]), node("LeakyRelu", ["y"], ["z2"], alpha=0.01)],
        ("z", "z2"),
        "leaky-relu",
    ),
    "identity, then relu": ([node("Identity", ["y"], ["i"]), node("Relu", ["i"], ["z"])], ("z",), "linear"),
}


@pytest.mark.parametrize("case", READERS)
def test_the_activation_is_what_every_reader_applies_first(case):
    nodes, outputs, expected = READERS[case]
    (layer,), _ = search(build([matmul(), *nodes], outputs=outputs))
    assert layer.activation.name == expected


def test_a_relu_of_another_domain_may_be_anything():
    foreign = node("Relu", ["y"], ["z"], domain="com.other")
    opaque = make([matmul(), foreign], {"x": (2, IN)}, {"z": (2, OUT)}, {"w": W})
    assert search(opaque)[0][0].activation.name == "linear"


def pool(source, *outputs, **attrs):
    return node("MaxPool", [source], outputs, **({"kernel_shape": [2, 2]} | attrs))


POOLS = {
    "pool, relu": ([pool("y", "p"), node("Relu", ["p"], ["z"])], ("z",), "relu"),
    "pool, pool, relu": ([pool("y", "p"), pool("p", "q"), node("Relu", ["q"], ["z"])], ("z",), "relu"),
    "pool and relu": ([CUT, pool("y", "p"), node("Relu", ["p"], ["z2"])], ("z", "z2"), "relu"),
    "pool": ([pool("y", "p")], ("p",), "linear"),
    "pool, relu and another": (
        [pool("y", "p"), node("Relu", ["p"], ["z"]), node("Neg", ["p"], ["n"])],
        ("z", "n"),
        "linear",
    ),
    "pool, relu, and the pool is an output": ([pool("y", "p"), node("Relu", ["p"], ["z"])], ("z", "p"), "linear"),
    "pool with the places of its maxima": ([pool("y", "p", "at"), node("Relu", ["p"], ["z"])], ("z",), "linear"),
    "another pool": (
        [node("AveragePool", ["y"], ["p"], kernel_shape=[2, 2]), node("Relu", ["p"], ["z"])],
        ("z",),
        "linear",
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_a_maximum_over_positions_commutes_with_relu(case):
    nodes, outputs, expected = POOLS[case]
    nodes = [node("Conv", ["x", "k", "b"], ["y"], name="layer"), *nodes]
    constants = {"k": normal(OUT, 5, 3, 3), "b": normal(OUT)}
    model = build(nodes, {"x": (1, 5, 9, 9)}, constants, outputs=outputs)
    (layer,), _ = search(model)
    assert layer.activation.name == expected
    if expected == "relu":  # so nobody notices that the layer gives its ReLU already
        nodes[0] = node("Conv", ["x", "k", "b"], ["before"])
        early = build([nodes[0], node("Relu", ["before"], ["y"]), *nodes[1:]], {"x": (1, 5, 9, 9)}, constants, outputs)
        for value, other in zip(run(model), run(early), strict=True):
            np.testing.assert_array_equal(value, other)


def test_the_activation_stands_behind_the_bias_of_a_product():
    added = [matmul(output="m"), node("Add", ["b", "m"], ["y"])]
    constants = {"w": W, "b": normal(1, OUT)}
    (layer,), _ = search(build([*added, CUT], constants=constants, outputs=("z",)))
    assert (layer.output, layer.activation.name) == ("y", "relu")
    (layer,), _ = search(build(added, constants=constants))
    assert layer.activation.name == "linear"
    (layer,), _ = search(build([*added, node("Relu", ["m"], ["z"])], constants=constants, outputs=("y", "z")))
    assert (layer.output, layer.activation.name) == ("m", "linear")


@pytest.mark.parametrize(("c", "expected"), [((OUT,), "relu"), ((2, OUT), "linear"), (None, "relu")])
def test_a_gemm_with_more_than_a_bias_is_not_cut_off_where_w_x_plus_b_is(c, expected):
    constants = {"w": W} | ({"c": normal(*c)} if c else {})
    gemm = node("Gemm", ["x", *constants], ["y"], name="layer")
    (layer,), _ = search(build([gemm, CUT], constants=constants, outputs=("z",)))
    assert layer.activation.name == expected


def test_an_output_that_a_subgraph_reads_is_seen_as_it_is():
    inside = branch([node("ReduceSum", ["m"], ["s"], keepdims=0), node("Identity", ["s"], ["z"])], "z")
    nodes = [matmul(output="m"), node("Relu", ["m"], ["a"])]
    nodes += [node("If", ["yes"], ["i"], then_branch=inside, else_branch=inside), node("Add", ["a", "i"], ["y"])]
    (layer,), _ = search(build(nodes, constants={"w": W, "yes": np.array(True)}))
    assert layer.activation.name == "linear"


def gemm(*behind, outputs=("z",), constants=None, **options):
    """Return a model of a Gemm, output ``y``, and what follows it; ``s`` is a computed tensor of y's shape."""
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], name="layer"), node("Tanh", ["t"], ["s"]), *behind]
    given = {"w": W, "b": normal(OUT)} | (constants or {})
    return build(nodes, {"x": (3, IN), "t": (3, OUT)}, given, outputs, **options)


def seen(model):
    ((layer,), _) = search(model)
    return layer


LIMITS = {"low": np.float32(-1), "high": np.float32(6), "row": normal(OUT), "nan": np.float32(np.nan)}
LIMITS |= {"largest": np.finfo(np.float32).max, "lowest": np.finfo(np.float32).min, "same": np.full((1,), -1, "f4")}


@pytest.mark.parametrize(
    ("operands", "expected", "label"),
    [
        (["y"], LINEAR, "linear"),
        (["y", "low"], clip(-1, np.inf), "clip"),
        (["y", "", "high"], clip(-np.inf, 6), "clip"),
        (["y", "low", "high"], clip(-1, 6), "clip"),
        (["y", "low", ""], clip(-1, np.inf), "clip"),
        (["y", "lowest", "largest"], LINEAR, "linear"),
        (["y", "low", "same"], clip(-1, -1), "clip"),
        (["y", "high", "low"], LINEAR, "clip, fitted as linear"),
        (["y", "row", "high"], LINEAR, "clip, fitted as linear"),
        (["y", "nan", "high"], LINEAR, "clip, fitted as linear"),
        (["y", "low", "computed"], LINEAR, "clip, fitted as linear"),
    ],
)
@pytest.mark.parametrize("opset", [11, 12, 17])
def test_the_limits_of_a_clip_are_constant_inputs(opset, operands, expected, label):
    used = {name: np.asarray(LIMITS[name]) for name in operands if name in LIMITS}
    nodes = [node("ReduceMax", ["t"], ["computed"], keepdims=0)] * ("computed" in operands)
    layer = seen(gemm(*nodes, node("Clip", operands, ["z"]), constants=used, opset=opset))
    assert layer.activation == expected
    assert layer.behind == Behind("y", label=label)


@pytest.mark.parametrize("opset", [7, 9])
def test_the_limits_of_an_old_clip_are_attributes(opset):
    cases = [({}, LINEAR), ({"min": -1.0}, clip(-1, np.inf)), ({"max": 6.0}, clip(-np.inf, 6)), ({"min": 0.0}, RELU)]
    cases += [({"min": 0.0, "max": 6.0}, clip(0, 6)), ({"min": 2.0, "max": 1.0}, LINEAR)]
    for attrs, expected in cases:
        layer = seen(gemm(node("Clip", ["y"], ["z"], **attrs), opset=opset))
        assert (layer.activation, layer.behind.total) == (expected, "y")


def slope_of(value):
    return {"a": np.asarray(value, np.float32)}


@pytest.mark.parametrize(
    ("behind", "constants", "expected", "label"),
    [
        (node("LeakyRelu", ["y"], ["z"]), {}, leaky_relu(np.float32(0.01)), "leaky-relu"),
        (node("LeakyRelu", ["y"], ["z"], alpha=3.0), {}, leaky_relu(3.0), "leaky-relu"),
        (node("LeakyRelu", ["y"], ["z"], alpha=0.0), {}, RELU, "relu"),
        (node("LeakyRelu", ["y"], ["z"], alpha=-0.5), {}, LINEAR, "leakyrelu, fitted as linear"),
        (node("PRelu", ["y", "a"], ["z"]), slope_of([0.25]), leaky_relu(0.25), "leaky-relu"),
        (node("PRelu", ["y", "a"], ["z"]), slope_of([[0.25]]), leaky_relu(0.25), "leaky-relu"),
        (node("PRelu", ["y", "a"], ["z"]), slope_of([-0.25]), LINEAR, "prelu, fitted as linear"),
        (node("PRelu", ["y", "a"], ["z"]), slope_of([0.25] * OUT), LINEAR, "prelu, fitted as linear"),
        (node("PRelu", ["y", "s"], ["z"]), {}, LINEAR, "prelu, fitted as linear"),
        (node("PRelu", ["s", "y"], ["z"]), {}, LINEAR, "prelu, fitted as linear"),
        (node("Sigmoid", ["y"], ["z"]), {}, LINEAR, "sigmoid, fitted as linear"),
        (node("HardSwish", ["y"], ["z"]), {}, LINEAR, "hardswish, fitted as linear"),
        (node("Softmax", ["y"], ["z"]), {}, LINEAR, "softmax, fitted as linear"),
        (node("Neg", ["y"], ["z"]), {}, LINEAR, "linear"),
    ],
)
def test_other_activations(behind, constants, expected, label):
    layer = seen(gemm(behind, constants=constants))
    assert (layer.activation, layer.behind) == (expected, Behind("y", label=label))
    if expected != LINEAR:  # and it is what ONNX Runtime computes
        z, y = run(gemm(behind, constants=constants, outputs=("z", "y")))
        np.testing.assert_allclose(z, expected(y), rtol=1e-6)


def test_a_sigmoid_that_is_not_all_that_is_seen_goes_unnamed():
    sigmoid = node("Sigmoid", ["y"], ["z"])
    assert seen(gemm(sigmoid, outputs=("z", "y"))).behind.label == "linear"
    assert seen(gemm(sigmoid, node("Mul", ["y", "z"], ["m"]), outputs=("m",))).behind.label == "linear"


# ---------------------------------------------------------------- what stands between

NORM = ("gain", "beta", "mean", "var")
ADD = node("Add", ["y", "s"], ["a"])


def norm(source, output, name="", **attrs):
    return node("BatchNormalization", [source, *(name + part for part in NORM)], [output], **attrs)


def norm_constants(name="", out=OUT, seed=0):
    gain, beta, mean, var = (normal(out, seed=4 * seed + i) for i in range(4))
    return {name + "gain": gain, name + "beta": beta, name + "mean": mean, name + "var": np.abs(var) + np.float32(0.1)}


def relu(source, output="z"):
    return node("Relu", [source], [output])


def clip6(source):
    return node("Clip", [source, "zero", "six"], ["z"])


BETWEEN = {  # what follows y -> activation, way
    "add": ([ADD, relu("a")], RELU, Behind("a", "s", label="add + relu")),
    "add, operands swapped": (
        [node("Add", ["s", "y"], ["a"]), relu("a")],
        RELU,
        Behind("a", "s", label="add + relu"),
    ),
    "add of an input": ([node("Add", ["y", "t"], ["a"]), relu("a")], RELU, Behind("a", "t", label="add + relu")),
    "add alone": ([ADD, node("Neg", ["a"], ["z"])], LINEAR, Behind("a", "s", label="add")),
    "add, sigmoid": (
        [ADD, node("Sigmoid", ["a"], ["z"])],
        LINEAR,
        Behind("a", "s", label="add + sigmoid, fitted as linear"),
    ),
    "add, relu twice": ([ADD, relu("a"), relu("a", "r")], RELU, Behind("a", "s", label="add + relu")),
    "add, relu and others": ([ADD, relu("a"), node("Neg", ["a"], ["r"])], LINEAR, Behind("a", "s", label="add")),
    "add, read twice": ([ADD, relu("a"), node("Neg", ["y"], ["r"])], LINEAR, Behind("y")),
    "add to itself": ([node("Add", ["y", "y"], ["a"]), relu("a")], LINEAR, Behind("y")),
    "add of a constant": ([node("Add", ["y", "gain"], ["a"]), relu("a")], LINEAR, Behind("y")),
    "add of a relu of itself": ([relu("y", "r"), node("Add", ["y", "r"], ["z"])], LINEAR, Behind("y")),
    "two adds": (
        [ADD, node("Add", ["a", "t"], ["c"]), relu("c")],
        LINEAR,
        Behind("a", "s", label="add"),
    ),
    "norm": ([norm("y", "n"), relu("n")], RELU, Behind("n", None, (("n", False),), "batch-norm + relu")),
    "norm alone": (
        [norm("y", "n"), node("Neg", ["n"], ["z"])],
        LINEAR,
        Behind("n", None, (("n", False),), "batch-norm"),
    ),
    "norm, add, norm, norm, clip": (
        [norm("y", "n"), node("Add", ["n", "s"], ["a"]), norm("a", "m", "2"), norm("m", "o", "3"), clip6("o")],
        clip(0, 6),
        Behind("o", "s", (("n", False), ("m", True), ("o", True)), "batch-norm + add + batch-norm + clip"),
    ),
    "add, norm, clip": (
        [ADD, norm("a", "n"), clip6("n")],
        clip(0, 6),
        Behind("n", "s", (("n", True),), "add + batch-norm + clip"),
    ),
    "a norm of the sum and another reader": (
        [ADD, norm("a", "n"), relu("n"), node("Neg", ["a"], ["r"])],
        LINEAR,
        Behind("a", "s", label="add"),
    ),
    "a norm without a gain": ([ADD, norm("a", "n", "dead"), relu("n")], LINEAR, Behind("a", "s", label="add")),
    "a norm that is not finite": ([norm("y", "n", "bad"), relu("n")], LINEAR, Behind("y")),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_stands_between_a_layer_and_its_activation(case):
    nodes, activation, behind = BETWEEN[case]
    dead = norm_constants("dead")
    dead["deadgain"][3] = 0
    bad = norm_constants("bad")
    bad["badvar"][5] = -1
    constants = {"zero": np.float32(0), "six": np.float32(6)} | dead | bad
    constants |= norm_constants() | norm_constants("2", seed=1) | norm_constants("3", seed=2)
    read = {name for n in nodes for name in n.input}
    constants = {name: value for name, value in constants.items() if name in read}
    ends = tuple(name for name in ("z", "r") if any(name in n.output for n in nodes)) or ("n",)
    layer = seen(gemm(*nodes, outputs=ends, constants=constants))
    assert (layer.activation, layer.behind) == (activation, behind)
    agrees_with_onnx_runtime(layer, lambda outputs: gemm(*nodes, outputs=outputs, constants=constants), ends)


def agrees_with_onnx_runtime(layer, model, ends):
    """Check ``u = scale * y + shortcut_scale * s + shift`` with y and s as ONNX Runtime computes them, and phi(u)."""
    names = dict.fromkeys((layer.output, layer.behind.total, ends[0]))
    shortcut = layer.behind.shortcut
    values = dict(zip(names, run(model(tuple(names))), strict=True))
    rank = values[layer.output].ndim - 2

    def along(row, otherwise):
        return otherwise if row is None else row.reshape(-1, *[1] * rank)

    scale, shift, shortcut_scale = affine_behind(View(model(ends)), layer)
    for row in (scale, shift, shortcut_scale):
        assert row is None or (row.dtype, row.shape) == (np.float64, (layer.out,))
    expected = along(scale, 1.0) * values[layer.output] + along(shift, 0.0)
    if shortcut is not None:
        inputs = {"t": normal(*values[layer.output].shape)}  # what run() feeds
        added = inputs["t"] if shortcut == "t" else np.tanh(inputs["t"])
        expected = expected + along(shortcut_scale, 1.0) * added
    np.testing.assert_allclose(values[layer.behind.total], expected, rtol=1e-4, atol=1e-4)
    if layer.activation != LINEAR:
        response = layer.activation(expected)
        if "max-pool" in layer.behind.label:  # of 2 x 2 positions, behind the activation instead of in front of it
            response = np.lib.stride_tricks.sliding_window_view(response, (2, 2), axis=(2, 3)).max(axis=(4, 5))
        np.testing.assert_allclose(values[ends[0]], response, rtol=1e-4, atol=1e-4)


def test_without_anything_between_nothing_is_changed():
    model = gemm(relu("y"))
    assert affine_behind(View(model), seen(model)) == (None, None, None)
    model = gemm(ADD, relu("a"))
    assert affine_behind(View(model), seen(model)) == (None, None, None)


def residual(*behind, outputs=("z",), constants=None):
    """Return a model of a Conv, output ``y``, and what follows; ``s`` is a computed tensor of y's shape."""
    nodes = [node("Conv", ["x", "k", "b"], ["y"], name="layer"), node("Tanh", ["t"], ["s"]), *behind]
    given = {"k": normal(OUT, 5, 3, 3), "b": normal(OUT)} | (constants or {})
    return build(nodes, {"x": (1, 5, 9, 9), "t": (1, OUT, 7, 7)}, given, outputs)


CONVOLVED = {
    "add, pool, relu": (
        [ADD, pool("a", "p"), relu("p")],
        RELU,
        Behind("a", "s", label="add + max-pool + relu"),
    ),
    "norm, pool, relu": (
        [norm("y", "n"), pool("n", "p"), relu("p")],
        RELU,
        Behind("n", None, (("n", False),), "batch-norm + max-pool + relu"),
    ),
    "add, norm, relu": (
        [ADD, norm("a", "n"), relu("n")],
        RELU,
        Behind("n", "s", (("n", True),), "add + batch-norm + relu"),
    ),
    "a pool in front of the norm": (
        [pool("y", "p"), norm("p", "n"), relu("n")],
        LINEAR,
        Behind("y"),
    ),
    "pool, leaky": (
        [pool("y", "p"), node("LeakyRelu", ["p"], ["z"], alpha=0.25)],
        leaky_relu(0.25),
        Behind("y", label="max-pool + leaky-relu"),
    ),
    "pool and relu": ([pool("y", "p"), relu("p"), relu("y", "r")], RELU, Behind("y", label="max-pool + relu")),
    "pool, relu, and another activation": (
        [pool("y", "p"), relu("p"), node("LeakyRelu", ["y"], ["r"])],
        LINEAR,
        Behind("y"),
    ),
}


@pytest.mark.parametrize("case", CONVOLVED)
def test_what_stands_between_a_convolution_and_its_activation(case):
    nodes, activation, behind = CONVOLVED[case]
    constants = norm_constants() if any(n.op_type == "BatchNormalization" for n in nodes) else {}
    ends = tuple(name for name in ("z", "r") if any(name in n.output for n in nodes))
    layer = seen(residual(*nodes, outputs=ends, constants=constants))
    assert (layer.activation, layer.behind) == (activation, behind)
    agrees_with_onnx_runtime(layer, lambda outputs: residual(*nodes, outputs=outputs, constants=constants), ends)


@pytest.mark.parametrize("attrs", [{"training_mode": 1}, {"epsilon": 0.5}])
def test_a_norm_that_trains_ends_the_way(attrs):
    nodes = [norm("y", "n", **attrs), relu("n")]
    layer = seen(gemm(*nodes, constants=norm_constants()))
    trains = "training_mode" in attrs
    assert layer.behind.norms == (() if trains else (("n", False),))
    if not trains:
        agrees_with_onnx_runtime(layer, lambda out: gemm(*nodes, outputs=out, constants=norm_constants()), ("z",))


def test_a_product_has_a_shortcut_behind_its_bias_but_no_norm():
    start = [matmul(output="m"), node("Add", ["m", "b"], ["y"]), node("Tanh", ["t"], ["s"])]
    options = {"inputs": {"x": (3, IN), "t": (3, OUT)}, "outputs": ("z",)}
    constants = {"w": W, "b": normal(OUT)}
    layer = seen(build([*start, ADD, relu("a")], constants=constants, **options))
    assert (layer.output, layer.behind) == ("y", Behind("a", "s", label="add + relu"))
    layer = seen(build([*start, norm("y", "n"), relu("n")], constants=constants | norm_constants(), **options))
    assert (layer.activation, layer.behind) == (LINEAR, Behind("y"))


def test_a_sum_that_the_caller_or_a_subgraph_reads_too():
    assert seen(gemm(ADD, relu("a"), outputs=("z", "y"))).behind == Behind("y")
    inside = branch([node("ReduceSum", ["y"], ["q"], keepdims=0), node("Identity", ["q"], ["o"])], "o")
    nodes = [ADD, relu("a", "r"), node("If", ["yes"], ["i"], then_branch=inside, else_branch=inside)]
    model = gemm(*nodes, node("Add", ["r", "i"], ["z"]), constants={"yes": np.array(True)})
    assert seen(model).behind == Behind("y")


def test_a_gemm_with_more_than_a_bias_has_nothing_behind():
    nodes = [node("Gemm", ["x", "w", "c"], ["y"], name="layer"), node("Tanh", ["t"], ["s"]), ADD, relu("a")]
    model = build(nodes, {"x": (2, IN), "t": (2, OUT)}, {"w": W, "c": normal(2, OUT)}, ("z",))
    assert (seen(model).activation, seen(model).behind) == (LINEAR, Behind("y"))


# ---------------------------------------------------------------- cost, and what it takes to look


def test_macs():
    nodes = [
        node("Conv", ["x", "k"], ["c"], strides=[2, 1]),
        node("ConvTranspose", ["c", "t"], ["u"], group=2),
        node("Reshape", ["u", "flat"], ["f"]),
        node("Transpose", ["f"], ["ft"]),
        node("Gemm", ["ft", "w"], ["g"], transA=1),
        node("MatMul", ["g", "v"], ["m"]),
        node("MatMul", ["m", "row"], ["y"]),
    ]
    constants = {"k": normal(6, 3, 3, 3), "t": normal(6, 2, 1, 1), "flat": np.array([2, -1]), "w": normal(36, 8)}
    constants |= {"v": normal(8, 5), "row": normal(5)}
    view = View(build(nodes, {"x": (2, 3, 7, 5)}, constants))
    assert set(tensors_to_measure(view)) == {"c", "u", "ft", "g", "m", "y"}
    shapes = {
        "x": (2, 3, 7, 5),
        "c": (2, 6, 3, 3),
        "u": (2, 4, 3, 3),
        "ft": (36, 2),
        "g": (2, 8),
        "m": (2, 5),
        "y": (2,),
    }
    assert macs_by_node(view, shapes) == {
        "c": 2 * 6 * 9 * 27,
        "u": 2 * 6 * 9 * 2,
        "g": 2 * 8 * 36,
        "m": 2 * 5 * 8,
        "y": 2 * 5,
    }


def chain_of(count, shared):
    constants = {f"w{i}": normal(32, 32) for i in range(1 if shared else count)}
    nodes = []
    for i in range(count):
        weight = "w0" if shared else f"w{i}"
        nodes += [matmul(weight, f"m{i}", f"r{i - 1}" if i else "x", f"layer{i}"), node("Relu", [f"m{i}"], [f"r{i}"])]
    return build(nodes, {"x": (1, 32)}, constants, outputs=(f"r{count - 1}",))


@pytest.mark.parametrize("shared", [False, True])
def test_thousands_of_nodes_take_seconds(shared):
    model = chain_of(2500, shared)
    begun = time.process_time()
    view = View(model)
    layers, skipped = find(view)
    rewrite(view, layers, {layer.node: planted("channels", 32, 32) for layer in layers}, {v.input: 2 for v in layers})
    assert time.process_time() - begun < 10  # 1.5 s here; what is quadratic takes far longer
    assert (len(layers), len(skipped)) == ((0, 2500) if shared else (2500, 0))


def test_every_weight_is_loaded_once(monkeypatch):
    loaded = []
    constant = View.constant
    monkeypatch.setattr(View, "constant", lambda view, name: loaded.append(name) or constant(view, name))
    nodes = [
        matmul("w", "a"),
        node("Transpose", ["v"], ["vt"]),
        matmul("vt", "b", "a", "second"),
        node("Conv", ["c", "k"], ["d"], name="grouped", group=2),
    ]
    constants = {"w": W, "v": normal(OUT, OUT), "k": normal(32, 8, 3)}
    find(View(build(nodes, {"x": (2, IN), "c": (1, 16, 9)}, constants, outputs=("b", "d"))))
    assert sorted(loaded) == ["k", "v", "vt", "w"]  # vt by way of v


# ---------------------------------------------------------------- weights computed from constants


def sparse_values(name, matrix):
    """Return a sparse initialiser, and how many values it stores."""
    places = np.flatnonzero(matrix)
    values = numpy_helper.from_array(matrix.ravel()[places], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places), matrix.shape), len(places)


def computed_weight(reader, **options):
    """``x`` (2, IN) -> MatMul or Gemm whose weight is left @ right + S; ``options`` are those of make."""
    factors = {"left": normal(IN, 3), "right": normal(3, OUT)}
    nodes = [
        node("MatMul", ["left", "right"], ["product"], name="inner"),
        node("Add", ["product", "s"], ["w"]),
        node(reader, ["x", "w"], ["y"], name="layer"),
    ]
    model = make(nodes, {"x": (2, IN)}, {"y": (2, OUT)}, factors, **options)
    stored, count = sparse_values("s", np.where(normal(IN, OUT) > 1.5, normal(IN, OUT), 0).astype(np.float32))
    model.graph.sparse_initializer.append(stored)
    return model, 3 * (IN + OUT) + count


@pytest.mark.parametrize("reader", ["MatMul", "Gemm"])
def test_a_weight_computed_from_constants_is_one_layer_that_is_left_alone(reader):
    model, stored = computed_weight(reader)
    layers, skipped = search(model)
    assert not layers
    assert [(s.name, s.shape, s.params) for s in skipped] == [("layer", (IN, OUT), stored)]
    assert "computed from constants" in skipped[0].reason
    view = View(model)
    assert tensors_to_measure(view) == ["y"]
    assert macs_by_node(view, {"x": (2, IN), "y": (2, OUT)}) == {"y": 2 * IN * OUT}


def test_a_computed_kernel_has_the_shape_it_is_given():
    constants = {"left": normal(OUT, 2), "right": normal(2, 5 * 9), "to": np.array([OUT, 5, 3, 3])}
    nodes = [
        node("MatMul", ["left", "right"], ["product"]),
        node("Reshape", ["product", "to"], ["same"]),
        node("Identity", ["same"], ["w"]),
        node("Conv", ["x", "w"], ["y"], name="layer"),
    ]
    view = View(make(nodes, {"x": (1, 5, 6, 6)}, ["y"], constants))
    assert (view.stored_shape("w"), view.stored_params("w")) == ((OUT, 5, 3, 3), 2 * (OUT + 45))
    assert [view.is_computed(name) for name in ("product", "same", "w", "left", "x", "y")] == [True] * 3 + [False] * 3


def test_what_a_caller_may_replace_is_not_computed_from_constants():
    model, _ = computed_weight("MatMul")
    model.graph.input.append(helper.make_tensor_value_info("left", TensorProto.FLOAT, (IN, 3)))
    view = View(model)
    assert not view.is_computed("w")
    assert tensors_to_measure(view) == ["product", "w", "y"]


def test_operands_that_do_not_fit_are_left_to_onnxruntime():
    constants = {"a": normal(2, 3), "b": normal(4)}
    nodes = [node("Add", ["a", "b"], ["w"]), node("Reshape", ["a", "to"], ["v"]), node("MatMul", ["x", "w"], ["y"])]
    model = make(nodes, {"x": (2, 2)}, {"y": (2, 3)}, constants | {"to": np.array([-1, 1])})
    assert not any(View(model).is_computed(name) for name in ("w", "v"))


def test_a_sparse_weight_counts_what_is_stored():
    model = build([matmul()], constants={})
    stored, count = sparse_values("w", np.where(W > 1, W, 0))
    model.graph.sparse_initializer.append(stored)
    (skipped,) = search(model)[1]
    assert (skipped.shape, skipped.params) == (W.shape, count)
