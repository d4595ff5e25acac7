"""BatchNormalization merged into the Conv before it: exact, or left alone."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.graph.fold import fold_batch_norm
from onnx_lrs.graph.model import signature
from tests.builders import make, node, normal, ops, run, shapes

OUT, CHANNELS = 8, 4
NORM = ("scale", "beta", "mean", "var")


def constants(bias=True, group=1):
    values = {"w": normal(OUT, CHANNELS // group, 3, 3), "scale": normal(OUT), "beta": normal(OUT, seed=1)}
    values |= {"mean": normal(OUT, seed=2), "var": np.abs(normal(OUT, seed=3)) + np.float32(0.1)}
    return values | ({"b": normal(OUT, seed=4)} if bias else {})


def conv(output="c", bias=True, **attrs):
    return node("Conv", ["x", "w", "b"] if bias else ["x", "w"], [output], name="conv", **attrs)


def norm(source="c", output="n", **attrs):
    return node("BatchNormalization", [source, *NORM], [output], name="norm", **attrs)


def build(nodes, outputs=("y",), opset=17, values=None, **options):
    return make(nodes, {"x": (2, CHANNELS, 7, 6)}, outputs, values or constants(), opset=opset, **options)


def folded(model, count):
    before = model.SerializeToString()
    result, found = fold_batch_norm(model)
    assert model.SerializeToString() == before
    assert found == count
    assert ops(model).count("BatchNormalization") - ops(result).count("BatchNormalization") == count
    onnx.checker.check_model(result, full_check=True)
    assert signature(result) == signature(model)
    assert set(shapes(result)) <= {name for n in result.graph.node for name in n.input}
    for a, b in zip(run(model), run(result), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 17, 26])
def test_fold(opset, group, bias):
    attrs = {"spatial": 1} if opset < 9 else {"training_mode": 0} if opset >= 14 else {}
    nodes = [
        conv(bias=bias, group=group, strides=[2, 1], pads=[1, 0, 1, 2]),
        norm(epsilon=0.02, momentum=0.5, **attrs),
        node("Relu", ["n"], ["y"]),
    ]
    new = folded(build(nodes, opset=opset, values=constants(bias, group)), 1)
    assert new.graph.node[0].name == "conv"
    assert new.graph.node[1] == nodes[2]


def test_the_name_of_a_graph_output_stays():
    new = folded(build([conv(), norm(output="y")]), 1)
    assert new.graph.node[0].output == ["y"]


def test_two_in_a_row_and_one_that_follows_another_op():
    values = constants() | {"w2": normal(OUT, OUT, 1, 1)}
    nodes = [
        conv(),
        norm(),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "w2"], ["c2"], name="conv2"),
        node("BatchNormalization", ["c2", *NORM], ["n2"], name="norm2"),
        node("BatchNormalization", ["n2", *NORM], ["y"], name="norm3"),
    ]
    new = folded(build(nodes, values=values), 2)
    assert ops(new) == ["Conv", "Relu", "Conv", "BatchNormalization"]


def test_a_shared_weight_is_left_alone():
    """Folding would store it once for each of its readers, and none of them would count as shared any more."""
    nodes = [conv(), norm(), node("Conv", ["x", "w", "b"], ["c2"]), node("Add", ["n", "c2"], ["y"])]
    folded(build(nodes), 0)


def test_value_info_of_the_tensor_between_goes():
    model = build([conv(), norm(), node("Relu", ["n"], ["y"])])
    for name in ("c", "n", "w"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    assert [v.name for v in folded(model, 1).graph.value_info] == ["n"]


def test_constants_in_constant_nodes_fold_too():
    tensors = [node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in constants().items()]
    new = folded(make([*tensors, conv(), norm(output="y")], {"x": (2, CHANNELS, 7, 6)}, ["y"], {}), 1)
    assert ops(new) == ["Conv"]


BETWEEN = [node("Relu", ["c"], ["r"])]
LEFT_ALONE = {
    "behind a relu": ([conv(), *BETWEEN, norm("r", "y")], ["y"]),
    "two readers": ([conv(), norm(), node("Add", ["n", "c"], ["y"])], ["y"]),
    "two norms": ([conv(), norm(), norm("c", "m"), node("Add", ["n", "m"], ["y"])], ["y"]),
    "the conv is an output": ([conv(), norm(output="y")], ["y", "c"]),
    "behind a matmul": ([node("MatMul", ["x", "v"], ["c"]), norm(output="y")], ["y"]),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    nodes, outputs = LEFT_ALONE[case]
    values = constants()
    if case == "behind a matmul":
        values = {k: v[:CHANNELS] for k, v in values.items() if k in NORM} | {"v": normal(6, 5)}
    model = build(nodes, outputs, values=values)
    assert fold_batch_norm(model) == (model, 0)


@pytest.mark.parametrize("name", ["w", "b", *NORM])
def test_parameters_that_a_caller_may_replace_are_left_alone(name):
    model = build([conv(), norm(output="y")])
    shape = shapes(model)[name]
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    assert fold_batch_norm(model)[1] == 0
    del model.graph.initializer[[t.name for t in model.graph.initializer].index(name)]  # now it has to be fed
    assert fold_batch_norm(model)[1] == 0


def test_before_ir_4_initialisers_are_inputs_that_nobody_can_feed():
    model = build([conv(), norm(output="y")], opset=8)
    assert "w" in [v.name for v in model.graph.input]
    new = folded(model, 1)
    assert [v.name for v in new.graph.input] == ["x", *shapes(new)]


def test_a_subgraph_that_reads_the_conv_keeps_it():
    out = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Identity", ["c"], ["s"])], "branch", [], [out])
    nodes = [conv(), norm(), node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch)]
    nodes.append(node("Add", ["n", "i"], ["y"]))
    folded(build(nodes, values=constants() | {"yes": np.array(True)}), 0)


def test_training_mode_and_norms_over_single_elements_are_left_alone():
    trains = node("BatchNormalization", ["c", *NORM], ["y", "m", "v"], training_mode=1)
    assert fold_batch_norm(build([conv(), trains]))[1] == 0
    old = node("BatchNormalization", ["c", *NORM], ["y", "m", "v", "sm", "sv"])
    assert fold_batch_norm(build([conv(), old], opset=9))[1] == 0
    values = constants() | {k: np.ones((OUT, 5, 4), np.float32) for k in NORM}
    per_element = helper.make_graph(
        [conv(), norm(output="y", spatial=0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, CHANNELS, 7, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, OUT, 5, 4))],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )
    model = helper.make_model(per_element, opset_imports=[helper.make_opsetid("", 7)], ir_version=4)
    assert fold_batch_norm(model)[1] == 0


@pytest.mark.parametrize(("name", "value"), [("var", -1.0), ("w", np.nan), ("scale", np.inf)])
@pytest.mark.filterwarnings("error")
def test_what_would_not_be_finite_is_left_alone(name, value):
    values = constants()
    values[name].flat[3] = value
    assert fold_batch_norm(build([conv(), norm(output="y")], values=values))[1] == 0


def test_half_precision_is_left_alone():
    values = {k: v.astype(np.float16) for k, v in constants().items()}
    graph = helper.make_graph(
        [conv(), norm(output="y")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (2, CHANNELS, 7, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, (2, OUT, 5, 4))],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert fold_batch_norm(model)[1] == 0
