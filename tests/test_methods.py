"""The published methods through the whole tool: budgets, guarantees, single entries, and what does not go together."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrs.solvers
from onnx_lrs import Budget, Config, compress, errors
from onnx_lrs.cli import main
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.planning.guarantee import find_chain
from tests import small_nets as nets

SIZES = (40, 64, 48, 10)


def perceptron(sizes=SIZES, ends_in: str | None = None) -> onnx.ModelProto:
    """Gemm + Relu layers and a last Gemm; ``ends_in`` names an op behind it."""
    rng = np.random.default_rng(3)
    nodes, constants, name = [], {}, "x"
    for i, (d, out) in enumerate(itertools.pairwise(sizes)):
        low = rng.standard_normal((out, 6)) @ rng.standard_normal((6, d))
        entries = 20 * (rng.random((out, d)) < 0.03) * rng.standard_normal((out, d))
        constants[f"w{i}"] = ((low + entries + 0.3 * rng.standard_normal((out, d))) / d).astype(np.float32)
        constants[f"b{i}"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [f"y{i}"], name=f"fc{i}", transB=1))
        name = f"y{i}"
        if i < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [name], [f"a{i}"]))
            name = f"a{i}"
    if ends_in:
        nodes.append(helper.make_node(ends_in, [name], ["end"]))
        name = "end"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", sizes[0]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", sizes[-1]])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def inputs(count=300, seed=0):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((count, 12)) @ rng.standard_normal((12, SIZES[0])), 0).astype(np.float32)


def settings(**changes) -> Config:
    return Config(**({"threads": 1, "multiple": 2} | changes))


def responses(model, x):
    """Return the output and what stands behind each ReLU."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = [f"a{i}" for i in range(len(SIZES) - 2)]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = nets.run(copy, {"x": x})
    return found[0].astype(np.float64), [f.astype(np.float64) for f in found[1:]]


@pytest.mark.parametrize("method", ["ddlr", "nettrim"])
@pytest.mark.parametrize("gain", [0.1, 0.3])
def test_a_gain_is_kept_and_the_bound_holds_for_the_output(method, gain, tmp_path):
    model, x = perceptron(), inputs()
    wanted = settings(method=method, budget=Budget(gain=gain), holdout=0.2)
    result = compress(model, tmp_path / "small.onnx", data=x, config=wanted)
    assert result.after.params < result.before.params
    changed = [layer for layer in result.layers if layer.form != "dense"]
    assert changed
    for layer in changed:
        assert layer.allowed_error == pytest.approx(gain, rel=1e-6)
        assert 0 <= layer.reached_error <= layer.allowed_error * (1 + 1e-6)
        assert layer.activation_error is not None
    found = result.certificate
    assert found is not None
    assert found.layers == ("fc0", "fc1", "fc2")[-len(found.layers) :]
    assert found.samples == 160  # 4 d columns of the first layer
    assert 0 < found.measured <= found.bound
    kept = onnx.load(tmp_path / "small.onnx")
    exact, near = (responses(m, x)[0] if m is model else nets.run(m, {"x": x})[0] for m in (model, kept))
    change = np.linalg.norm(exact - near) / np.linalg.norm(exact)
    assert change <= 3 * found.bound  # held-out samples are among these, for which nothing was promised


def test_a_larger_gain_makes_a_smaller_model():
    sizes = []
    for gain in (0.1, 0.2, 0.4):
        result = compress(perceptron(), data=inputs(), config=settings(method="ddlr", budget=Budget(gain=gain)))
        sizes.append(result.after.params)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_where_the_guarantees_promise_nothing_together_a_note_says_why():
    wanted = settings(method="ddlr", budget=Budget(gain=0.2))
    result = compress(perceptron(ends_in="Sigmoid"), data=inputs(), config=wanted)
    assert result.certificate is None
    assert any("No bound for the whole network" in note for note in result.notes)


def test_the_chain_starts_at_the_first_compressed_layer_and_holds_all_of_them():
    view, names = View(perceptron()), ["y0", "y1", "y2"]  # the last one is too small to be compressed
    assert [la.node for la in find_chain(view, names).layers] == names
    assert [la.node for la in find_chain(view, names[1:2]).layers] == names[1:]
    assert isinstance(find_chain(view, []), str)
    assert isinstance(find_chain(view, [*names, "elsewhere"]), str)
    conv = View(nets.conv_net())
    assert "no chain of fully connected layers" in find_chain(conv, [la.node for la in find(conv)[0]])


@pytest.mark.parametrize(("method", "structure"), [("greedy", "elements"), ("nettrim", "channels")])
def test_single_entries_make_a_smaller_file_that_computes_the_same_operations(method, structure, tmp_path):
    model, x = perceptron((40, 128, 96, 10)), inputs()
    wanted = settings(method=method, structure=structure, budget=Budget(params=0.25))
    result = compress(model, tmp_path / "small.onnx", data=x, config=wanted)
    assert result.after.params <= 0.25 * result.before.params
    assert result.after.file_bytes < 0.6 * result.before.file_bytes
    sparse = [layer for layer in result.layers if "elements" in layer.form]
    assert sparse
    assert all(layer.macs_after == layer.macs_before for layer in sparse)
    assert any("smaller file at the same speed" in note for note in result.notes)
    written = onnx.load(tmp_path / "small.onnx")
    assert written.graph.sparse_initializer
    np.testing.assert_array_equal(nets.run(written, {"x": x})[0], nets.run(tmp_path / "small.onnx", {"x": x})[0])


def test_ddlr_leaves_convolutions_alone_and_says_so():
    data = nets.as_floats(nets.pictures())
    result = compress(nets.conv_net(), data=data, config=settings(method="ddlr", budget=Budget(gain=0.3)))
    assert all(layer.form == "dense" for layer in result.layers if layer.op == "Conv")
    assert any("fully connected" in note and "Conv" in note for note in result.notes)


@pytest.mark.parametrize("method", ["admm", "ddlr", "nettrim"])
def test_methods_that_see_the_activation_report_the_error_behind_it(method):
    result = compress(perceptron(), data=inputs(), config=settings(method=method, budget=Budget(params=0.5)))
    changed = [layer for layer in result.layers if layer.form != "dense"]
    assert changed
    for layer in changed:
        assert 0 < layer.activation_error < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lrs", "budget": Budget(gain=0.1)}, "guaranteed error"),
        ({"method": "admm", "structure": "elements"}, "--structure elements"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(changes, words):
    with pytest.raises(errors.ConfigError, match=words) as caught:
        compress(perceptron(), data=inputs(), config=settings(**changes))
    assert "Methods" in caught.value.remedy


def test_a_gain_that_no_layer_can_use_is_an_error_and_macs_do_not_go_with_single_weights():
    with pytest.raises(errors.BudgetError, match="No layer becomes smaller"):
        compress(perceptron(), data=inputs(), config=settings(method="ddlr", budget=Budget(gain=1e-4)))
    with pytest.raises(errors.ConfigError, match="--macs"):
        compress(perceptron(), data=inputs(), config=settings(method="nettrim", budget=Budget(macs=0.5)))


def test_no_bound_where_a_layer_sees_more_than_one_column_a_sample_or_adds_what_is_computed():
    model, data = nets.block(), nets.sentences()
    result = compress(model, data=data, config=settings(method="nettrim", budget=Budget(gain=0.4), multiple=1))
    assert result.certificate is None
    residual = perceptron((48, 48, 48, 48))
    for node in residual.graph.node:
        if node.name == "fc1":
            node.input[2] = "y0"  # C of the second Gemm is what the first one gives
    view = View(residual)
    assert isinstance(find_chain(view, ["y0", "y2"]), str)


@pytest.mark.parametrize("gain", [-0.1, 0.0, 1.5])
def test_a_gain_out_of_range_is_refused(gain):
    with pytest.raises(errors.ConfigError, match="relative error"):
        Budget(gain=gain)


def test_an_unknown_structure_is_refused():
    with pytest.raises(errors.ConfigError, match="channels or elements"):
        Config(structure="rows")


def test_the_command_line_takes_gain_and_structure(tmp_path, capsys):
    onnx.save(perceptron(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", inputs())
    words = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--data", str(tmp_path / "x.npy")]
    assert main([*words, "--method", "ddlr", "--gain", "0.2", "--threads", "1"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "Error on calibration columns" in shown
    assert "is off by at most" in shown
    assert main([*words, "--method", "greedy", "--structure", "elements", "--params", "0.3", "--threads", "1"]) == 0
    assert main([*words, "--method", "svd", "--gain", "0.2"]) == 2
    assert "Methods that do: ddlr, nettrim" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["admm", "greedy", "ddlr", "nettrim"])
def test_two_runs_give_the_same_bytes(method):
    wanted = settings(method=method, budget=Budget(params=0.5))
    one, two = (compress(perceptron(), data=inputs(), config=wanted) for _ in range(2))
    assert one.model.SerializeToString(deterministic=True) == two.model.SerializeToString(deterministic=True)


def test_the_methods_are_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in onnx_lrs.solvers.METHODS:
        assert name in shown


@pytest.mark.parametrize("method", ["ddlr", "nettrim"])
def test_a_gain_that_the_bias_alone_keeps_to_still_gives_a_model_that_runs(method, tmp_path):
    wanted = settings(method=method, budget=Budget(gain=1.0))
    result = compress(perceptron(), tmp_path / "small.onnx", data=inputs(), config=wanted)
    assert np.isfinite(nets.run(tmp_path / "small.onnx", {"x": inputs()})[0]).all()
    assert result.after.params < result.before.params
