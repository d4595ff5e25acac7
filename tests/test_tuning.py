"""What of a model may be trained, its plain twin, and the way back into the file."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.graph.tuning import boundaries, constants, twin, with_values
from tests.builders import (
    OPSETS,
    layout,
    make,
    node,
    normal,
    planted,
    planted_elements,
    planted_projected,
    planted_spatial,
    planted_tucker,
    ranks,
    run,
)

CONV = {
    **{form: planted(form, 36, 30, 9) for form in ("low_rank", "all_channels", "channels", "both")},
    "spatial": planted_spatial(36, 30, (3, 3)),
    "projected": planted_projected(36, 30, 9),
    "tucker": planted_tucker(36, 30, 9),
    "elements": planted_elements(36, 270),
    "low rank + elements": planted_elements(36, 270, rank=3),
}


def compressed(form):
    """A Conv whose weight is exactly what its factors say, in that form."""
    factors = CONV[form]
    values = {"w": layout("Conv", factors.dense(), (3, 3)), "b": normal(36)}
    conv = node("Conv", ["x", "w", "b"], ["c"], name="layer", pads=[1] * 4)
    model = make([conv, node("Relu", ["c"], ["y"])], {"x": (2, 30, 7, 6)}, ["y"], values)
    view = View(model)
    layers, _ = find(view)
    return rewrite(view, layers, {"c": factors}, ranks(model)).model


def same(a, b, rtol=1e-5):
    for x, y in zip(run(a), run(b), strict=True):
        np.testing.assert_allclose(y, x, rtol=rtol, atol=rtol * np.abs(x).max())


@pytest.mark.parametrize("form", CONV)
def test_the_twin_computes_the_same_and_holds_every_weight_dense(form):
    model = compressed(form)
    found = twin(model)
    same(model, found.model)
    assert not found.model.graph.sparse_initializer
    assert {n.op_type for n in found.model.graph.node} <= {"Conv", "Relu", "Gather", "Add"}
    assert sum(t.values.size if t.support is None else int(t.support.sum()) for t in found.tunables) == sum(
        np.count_nonzero(values) for values in constants(model).values()
    )


@pytest.mark.parametrize("form", CONV)
def test_its_own_values_change_nothing_and_others_arrive(form):
    model = compressed(form)
    found = twin(model)
    assert with_values(model, {t.name: t.values for t in found.tunables}) == model
    other = with_values(model, {t.name: t.values * 2 for t in found.tunables})
    again = twin(other)
    for before, after in zip(found.tunables, again.tunables, strict=True):
        np.testing.assert_array_equal(after.values, 2 * before.values)
    same(other, again.model)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_and_initialisers_that_must_be_inputs(opset):
    values = {"w": normal(6, 5), "b": normal(6)}
    gemm = node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    for ir in (3, None) if opset < 9 else (None,):
        model = make([gemm], {"x": (2, 5)}, ["y"], values, opset=opset, ir=ir)
        assert [t.name for t in twin(model).tunables] == ["w", "b"]
        same(model, twin(model).model)


def test_what_may_be_trained_and_what_not():
    values = {
        "w": normal(4, 3, 3, 3),
        "b": np.zeros(4, np.float32),
        **{name: np.abs(normal(4)) for name in ("scale", "shift", "mean", "var")},
        "index": np.array([0, 2]),
        "m": np.where(normal(2, 5) > 0, 1, 0).astype(np.float32),
        "factor": normal(1),
    }
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        node("Gather", ["n", "index"], ["g"], axis=1),
        node("GlobalAveragePool", ["g"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Mul", ["f", "factor"], ["s"]),
        node("MatMul", ["s", "m"], ["y"]),
    ]
    found = {t.name: t for t in twin(make(nodes, {"x": (1, 3, 5, 5)}, ["y"], values)).tunables}
    assert set(found) == {"w", "b", "m"}
    assert found["b"].support is None  # a bias may leave zero
    np.testing.assert_array_equal(found["m"].support, values["m"] != 0)


def test_a_weight_that_callers_may_replace_is_not_trained():
    model = make([node("Gemm", ["x", "w"], ["y"])], {"x": (2, 5)}, ["y"], {"w": normal(5, 4)})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 4]))
    assert not twin(model).tunables


def test_what_a_subgraph_reads_is_not_trained():
    branch = helper.make_graph(
        [node("MatMul", ["x", "w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
        node("Add", ["a", "i"], ["y"]),
    ]
    values = {"w": normal(4, 4), "yes": np.array(True)}
    model = make(nodes, {"x": (2, 4)}, {"y": (2, 4)}, values)
    assert not twin(model).tunables
    same(model, twin(model).model)


def test_constant_nodes_are_trained_and_stay_constant_nodes():
    constant = node("Constant", [], ["w"], value=numpy_helper.from_array(normal(5, 4)))
    model = make([constant, node("MatMul", ["x", "w"], ["y"])], {"x": (2, 5)}, ["y"], {})
    (weight,) = twin(model).tunables
    changed = with_values(model, {"w": weight.values + 1})
    assert [n.op_type for n in changed.graph.node] == ["Constant", "MatMul"]
    np.testing.assert_array_equal(constants(changed)["w"], normal(5, 4) + np.float32(1))


def test_nothing_but_values_changes():
    model = compressed("low rank + elements")
    model.doc_string, model.producer_name = "kept", "somebody"
    onnx.helper.set_model_props(model, {"author": "me"})
    changed = with_values(model, {t.name: t.values + np.float32(0.5) * (t.values != 0) for t in twin(model).tunables})
    for copy in (model, changed):
        for tensor in copy.graph.initializer:
            tensor.ClearField("raw_data")
        for sparse in copy.graph.sparse_initializer:
            sparse.values.ClearField("float_data")
            sparse.values.ClearField("raw_data")
    assert changed == model


def test_boundaries_are_where_all_data_flows():
    values = {f"w{i}": normal(4, 4, 1, 1, seed=i) for i in range(4)}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"]),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"]),
        node("Relu", ["c1"], ["r1"]),  # beside the shortcut
        node("Conv", ["r1", "w2"], ["c2"]),
        node("Add", ["c2", "r0"], ["a"]),
        node("Relu", ["a"], ["r2"]),
        node("Conv", ["r2", "w3"], ["y"]),
    ]
    model = make(nodes, {"x": (1, 4, 3, 3)}, ["y"], values)
    assert boundaries(model, model) == ["r0", "a", "r2"]
    other = make([*nodes[:2], node("Conv", ["r0", "w3"], ["y"])], {"x": (1, 4, 3, 3)}, ["y"], values)
    assert boundaries(model, other) == ["r0"]


def test_unknown_names_and_other_shapes_are_refused():
    model = compressed("elements")
    with pytest.raises(KeyError, match="no constants: nobody"):
        with_values(model, {"nobody": normal(3)})
    (name, *_) = constants(model)
    with pytest.raises(ValueError, match="not \\[3\\]"):
        with_values(model, {name: normal(3)})


def test_masks_and_tables_are_not_trained_and_biases_behind_a_layer_are():
    values = {"w": normal(4, 4), "bias": np.zeros(4, np.float32), "mask": normal(3, 4), "one": normal(4)}
    nodes = [
        node("Identity", ["bias"], ["same"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["same", "h"], ["b"]),
        node("Add", ["b", "mask"], ["m"]),
        node("Relu", ["m"], ["r"]),
        node("Add", ["r", "one"], ["y"]),
    ]
    found = {t.name: t for t in twin(make(nodes, {"x": (3, 4)}, ["y"], values)).tunables}
    assert set(found) == {"w", "bias"}
    assert found["bias"].support is None


def test_a_reshape_that_copies_a_size_is_left_alone():
    values = {"w": normal(4, 6), "shape": np.array([0, 6])}
    nodes = [node("Reshape", ["w", "shape"], ["v"]), node("MatMul", ["x", "v"], ["y"])]
    model = make(nodes, {"x": (3, 4)}, ["y"], values)
    same(model, twin(model).model)
    assert not twin(model).tunables
