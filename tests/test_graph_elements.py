"""Layers with single entries in S: the numbers and the work of the dense layer in ONNX Runtime, in a smaller file."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.sparse
from onnx import helper, numpy_helper

import onnx_lrs
from onnx_lrs import pipeline
from onnx_lrs.errors import VerificationError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.forms import element_params, is_in_parts, stored_entries
from onnx_lrs.graph.layers import find, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import merged, rewrite
from onnx_lrs.pipeline import Outcome
from onnx_lrs.planning.candidates import Fitted
from onnx_lrs.runtime.session import Session
from onnx_lrs.runtime.verify import check_structure
from onnx_lrs.solvers.problem import ElementFactors
from tests import small_nets as nets
from tests.builders import keeping, layout, make, node, normal, only, ops, planted_elements, ranks, run

OUT, CHANNELS, FEATURES, ROWS = 36, 30, 48, 5
CONTENTS = {"sparse": (0, 0.1), "full": (0, 0.8), "both": (3, 0.1), "both full": (3, 0.8), "low rank": (3, 0.0)}
SPARSE = "its weight is a sparse initialiser"
WEIGHTED = {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}


def rewritten(model, factors):
    """Rewrite the only layer; the checker takes the result and nothing happens to the model it came from."""
    before = model.SerializeToString()
    view = View(model)
    (layer,), _ = find(view)
    found = rewrite(view, [layer], {layer.node: factors}, ranks(model))
    assert model.SerializeToString() == before
    check_structure(model, found.model)
    for a, b in zip(run(found.model), run(merged(view, [layer], ranks(model), found)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    return found.model


def optimised(model, path) -> onnx.ModelProto:
    """Return what ONNX Runtime makes of a model at load."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(path))


def assert_runs_as(dense, new, folder):
    """Same outputs to the last bit and the same nodes in the end: that is what equal speed means."""
    for a, b in zip(run(dense), run(new), strict=True):
        np.testing.assert_array_equal(a, b)
    before, after = (optimised(m, folder / f"{i}.onnx") for i, m in enumerate((dense, new)))
    assert ops(after) == ops(before)
    assert WEIGHTED & set(ops(after))


def is_stored_sparse(model):
    return [tuple(t.dims) for t in model.graph.sparse_initializer]


def stored(factors):
    return element_params(factors.rank, int(stored_entries(factors.sparse).nnz), factors.sparse.shape, True)


def check(model, content, factors, folder):
    """Rewrite the only layer of a model whose weight is exactly E; return the new model."""
    new = rewritten(model, factors)
    assert_runs_as(model, new, folder)
    assert bool(new.graph.sparse_initializer) == (content in ("sparse", "both"))
    assert models.weight_count(model) - models.weight_count(new) == factors.dense().size - stored(factors)
    return new


# ---------------------------------------------------------------- every op, to the last bit

CONVS = {
    "1d": ((5,), (19,), {"strides": [2], "pads": [1, 3]}),
    "1d dilated": ((3,), (9,), {"dilations": [2], "kernel_shape": [3]}),
    "2d": ((3, 3), (7, 6), {}),
    "2d pointwise": ((1, 1), (5, 4), {"strides": [2, 2]}),
    "2d pads": ((3, 2), (8, 7), {"strides": [2, 1], "pads": [1, 0, 2, 1], "kernel_shape": [3, 2]}),
    "2d dilated": ((3, 3), (9, 8), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
    "2d same": ((2, 3), (8, 7), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "3d": ((2, 3, 2), (5, 6, 5), {"strides": [1, 2, 1]}),
}


def conv(factors, case="2d pads", bias=True, **options):
    kernel, size, attrs = CONVS[case]
    constants = {"w": layout("Conv", factors.dense(), kernel)} | ({"b": normal(OUT)} if bias else {})
    nodes = [node("Conv", ["x", *constants], ["c"], name="layer", **attrs), node("Relu", ["c"], ["y"])]
    return make(nodes, {"x": (2, CHANNELS, *size)}, ["y"], constants, **options)


def conv_factors(content="both", case="2d pads"):
    rank, share = CONTENTS[content]
    return planted_elements(OUT, CHANNELS * int(np.prod(CONVS[case][0])), rank, share)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("case", CONVS)
def test_conv(case, content, tmp_path):
    factors = conv_factors(content, case)
    check(conv(factors, case), content, factors, tmp_path)


def gemm(factors, c="row", opset=17, **flags):
    values = {"row": normal(OUT), "matrix row": normal(1, OUT), "scalar": np.float32(0.75), "full": normal(ROWS, OUT)}
    constants = {"w": layout("Gemm", factors.dense(), **flags)} | ({"c": values[c]} if c in values else {})
    inputs = {"x": (FEATURES, ROWS) if flags.get("transA") else (ROWS, FEATURES)}
    inputs |= {"c": (ROWS, OUT)} if c == "fed" else {}
    operands = ["x", "w"] if c == "absent" else ["x", "w", "c"]
    nodes = [node("Gemm", operands, ["g"], name="layer", **flags), node("Relu", ["g"], ["y"])]
    return make(nodes, inputs, ["y"], constants, opset=opset)


def gemm_factors(content="both", seed=0):
    return planted_elements(OUT, FEATURES, *CONTENTS[content], seed=seed)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("c", ["absent", "row", "matrix row", "scalar", "full", "fed"])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0)])
def test_gemm(trans_a, trans_b, c, content, tmp_path):
    factors = gemm_factors(content)
    model = gemm(factors, c, transA=trans_a, transB=trans_b, alpha=0.5, beta=-2.0)
    new = check(model, content, factors, tmp_path)
    (layer,) = [n for n in new.graph.node if n.op_type == "Gemm"]
    flags = {a.name: helper.get_attribute_value(a) for a in layer.attribute}
    assert (flags["transA"], flags["transB"]) == (trans_a, trans_b)
    if c in ("scalar", "full", "fed"):
        assert (layer.input[2], flags["beta"]) == ("c", -2.0)


def matmul(factors, rank=3, left=False, bias=False, **options):
    constants = {"w": layout("MatMul", factors.dense(), left=left)}
    shape = (2, 3)[: rank - 2] + ((FEATURES, ROWS) if left else (ROWS, FEATURES))
    nodes = [node("MatMul", ["w", "x"] if left else ["x", "w"], ["m"], name="layer")]
    if bias:
        constants["b"] = normal(OUT)
        nodes.append(node("Add", ["b", "m"], ["a"], name="add"))
    nodes.append(node("Relu", [nodes[-1].output[0]], ["y"]))
    return make(nodes, {"x": shape}, ["y"], constants, **options)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("left", "bias"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("rank", [2, 4])
def test_matmul(rank, left, bias, content, tmp_path):
    factors = gemm_factors(content)
    check(matmul(factors, rank, left, bias), content, factors, tmp_path)


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("content", CONTENTS)
def test_the_bias_gains_its_shift(content, op):
    build, factors = {
        "Conv": (conv, conv_factors(content)),
        "Gemm": (gemm, gemm_factors(content)),
        "MatMul": (lambda f: matmul(f, bias=True), gemm_factors(content)),
    }[op]
    shift = normal(OUT, seed=5).astype(np.float64)
    model = build(factors)
    model.graph.node[-1].op_type = "Identity"
    new = rewritten(model, dataclasses.replace(factors, bias_shift=shift))
    (old,) = run(model)
    wanted = old + shift.reshape((-1, 1, 1) if op == "Conv" else (-1,))
    np.testing.assert_allclose(run(new)[0], wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


# ---------------------------------------------------------------- how it is stored


@pytest.mark.parametrize(("opset", "ir"), [(7, 6), (11, 6), (13, 7), (17, 8), (26, 13)])
def test_sparse_in_every_format_that_knows_it(opset, ir, tmp_path):
    factors = conv_factors()
    check(conv(factors, opset=opset, ir=ir), "both", factors, tmp_path)


@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (9, 4), (10, 5), (11, 5)])
def test_in_full_where_the_format_is_older_than_sparse_tensors(opset, ir, tmp_path):
    factors = conv_factors()
    model = conv(factors, opset=opset, ir=ir)
    new = rewritten(model, factors)
    assert not new.graph.sparse_initializer
    assert new.ir_version == ir
    assert_runs_as(model, new, tmp_path)
    assert models.weight_count(new) == factors.dense().size + OUT


def test_entries_are_sorted_positions_in_the_order_of_the_node():
    factors = gemm_factors("sparse")
    for model in (gemm(factors), gemm(factors, transB=1), matmul(factors), matmul(factors, left=True)):
        (weight,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w")
        (stored,) = rewritten(model, factors).graph.sparse_initializer
        places = numpy_helper.to_array(stored.indices)
        assert tuple(stored.dims) == weight.shape
        np.testing.assert_array_equal(places, np.flatnonzero(weight))
        np.testing.assert_array_equal(numpy_helper.to_array(stored.values), weight.ravel()[places])


def test_s_may_come_unsorted_with_double_and_zero_entries(tmp_path):
    clean = gemm_factors("sparse").sparse.tocoo()
    rows, columns = (np.concatenate([clean.coords[axis], clean.coords[axis], [7]])[::-1] for axis in (0, 1))
    values = np.concatenate([clean.data / 2, clean.data / 2, [0.0]])[::-1]
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=OUT))])
    untidy = scipy.sparse.csr_array((values[order], columns[order], starts), shape=(OUT, FEATURES))
    assert untidy.nnz == 2 * clean.nnz + 1
    factors = dataclasses.replace(gemm_factors("sparse"), sparse=untidy)
    new = check(gemm(factors), "sparse", factors, tmp_path)
    assert new.graph.sparse_initializer[0].values.dims[0] == clean.nnz
    assert untidy.nnz == 2 * clean.nnz + 1  # the caller's own


@pytest.mark.parametrize("shape", [(4, 4), (16, 8), (40, 50), (128, 128), (1500, 1500)])
def test_sparse_where_it_takes_fewer_bytes(shape):
    size, overhead = int(np.prod(shape)), 30  # field tags, lengths, dims

    def sparse_bytes(count):
        places = np.linspace(0, size - 1, count).astype(np.int64)
        return models.sparse_tensor(places, np.ones(count, np.float32), shape).ByteSize()

    most = max(count for count in range(1, size) if is_in_parts(0, count, shape, True))
    assert size / 3 < most < size
    assert sparse_bytes(most) <= 4 * size + overhead
    assert sparse_bytes(int(1.2 * most)) > 4 * size  # no large share of the gain is given away


def test_a_name_of_the_model_is_not_taken_again(tmp_path):
    factors = gemm_factors()
    model = gemm(factors)
    names = {"x": "layer.elements", "w": "layer.left", "g": "layer.low_rank_output", "c": "layer.right"}
    text = model.SerializeToString()
    for item in (*model.graph.input, *model.graph.initializer):
        item.name = names.get(item.name, item.name)
    for n in model.graph.node:
        n.input[:] = [names.get(name, name) for name in n.input]
        n.output[:] = [names.get(name, name) for name in n.output]
    assert model.SerializeToString() != text
    new = check(model, "both", factors, tmp_path)
    tensors = [*new.graph.initializer, *(t.values for t in new.graph.sparse_initializer), *new.graph.input]
    assert len({t.name for t in tensors}) == len(tensors)


def test_the_sparse_initialisers_of_the_model_stay():
    factors = gemm_factors("sparse")
    model = gemm(factors)
    own = models.sparse_tensor(np.array([3]), np.array([2.0], np.float32), [OUT])
    own.values.name = "own"
    model.graph.sparse_initializer.append(own)
    model.graph.node[1].CopyFrom(node("Add", ["g", "own"], ["y"]))
    new = rewritten(model, factors)
    assert new.graph.sparse_initializer[0] == own
    assert is_stored_sparse(new) == [(OUT,), (FEATURES, OUT)]
    np.testing.assert_array_equal(run(model)[0], run(new)[0])


def test_nothing_at_all_is_refused():
    empty = planted_elements(OUT, FEATURES, 0, 0.0)
    with pytest.raises(ValueError, match=r"'layer'.*elements"):
        rewritten(gemm(gemm_factors()), empty)


# ---------------------------------------------------------------- dead filters


@pytest.mark.parametrize("content", CONTENTS)
def test_filters_that_nobody_reads_go(content, tmp_path):
    kept = (1, 4, 19)
    first = conv_factors(content, "2d")
    second = only(normal(40, OUT * 9, seed=1), kept, 9)
    constants = {"w": layout("Conv", first.dense(), (3, 3)), "b": normal(OUT)}
    constants["w_second"] = second.reshape(40, OUT, 3, 3)
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], name="first"),
        node("Relu", ["c"], ["t"]),
        node("Conv", ["t", "w_second"], ["y"], name="second"),
    ]
    model = make(nodes, {"x": (2, CHANNELS, 12, 12)}, ["y"], constants)
    view = View(model)
    layers, _ = find(view)
    reader = {"y": keeping(second, kept, 9)}
    dense = rewrite(view, layers, reader, ranks(model)).model
    result = rewrite(view, layers, {"c": first} | reader, ranks(model))
    assert result.kept_outputs["c"].tolist() == list(kept)
    check_structure(model, result.model)
    assert_runs_as(dense, result.model, tmp_path)
    left = [(3, CHANNELS, 3, 3)] if content == "sparse" else []  # three rows are less than factors of rank 3
    assert is_stored_sparse(result.model) == left


def test_rows_without_any_entry_may_be_all_that_is_left(tmp_path):
    values = gemm_factors("sparse").sparse.toarray()
    values[[0, 3]] = 0
    first = dataclasses.replace(gemm_factors("sparse"), sparse=scipy.sparse.csr_array(values))
    second = only(normal(40, OUT, seed=2), (0, 3))
    constants = {"w": layout("Gemm", first.dense()), "b": normal(OUT), "v": layout("Gemm", second)}
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], name="first"), node("Gemm", ["h", "v"], ["y"], name="second")]
    model = make(nodes, {"x": (2, FEATURES)}, ["y"], constants)
    view = View(model)
    layers, _ = find(view)
    new = rewrite(view, layers, {"h": first, "y": keeping(second, (0, 3))}, ranks(model)).model
    assert not new.graph.sparse_initializer
    np.testing.assert_array_equal(run(model)[0], run(new)[0])


def test_a_reader_with_elements_reads_every_channel():
    second = planted_elements(40, OUT, 0, 0.05)
    constants = {"w": normal(FEATURES, OUT), "v": layout("Gemm", second.dense())}
    nodes = [node("Gemm", ["x", "w"], ["h"], name="first"), node("Gemm", ["h", "v"], ["y"], name="second")]
    model = make(nodes, {"x": (2, FEATURES)}, ["y"], constants)
    view = View(model)
    assert not rewrite(view, find(view)[0], {"y": second}, ranks(model)).kept_outputs


# ---------------------------------------------------------------- checks that still see what is wrong


def test_the_checker_still_looks_behind_a_sparse_operand():
    factors = gemm_factors()
    model = gemm(factors)
    new = rewritten(model, factors)
    new.graph.sparse_initializer[0].dims[:] = [FEATURES + 1, OUT]  # does not fit the product it is added to
    with pytest.raises(VerificationError, match="checker"):
        check_structure(model, new)
    new = rewritten(model, factors)
    new.graph.sparse_initializer[0].indices.int64_data[0] = FEATURES * OUT
    with pytest.raises(VerificationError, match="checker"):
        check_structure(model, new)


def test_what_the_checker_refuses_in_the_original_is_inherited():
    model = gemm(gemm_factors("sparse"))
    own = models.sparse_tensor(np.array([3]), np.array([2.0], np.float32), [FEATURES, OUT + 1])
    own.values.name = "c2"
    model.graph.sparse_initializer.append(own)
    model.graph.node[1].CopyFrom(node("Add", ["g", "c2"], ["y"]))
    check_structure(model, model)
    del own.values.float_data[:]
    sound = gemm(gemm_factors("sparse"))
    with pytest.raises(VerificationError, match="checker"):
        check_structure(sound, model)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("content", CONTENTS)
def test_through_a_file_and_back(content, external, tmp_path):
    factors = conv_factors(content)
    model = conv(factors)
    new = rewritten(model, factors)
    old_path, path = tmp_path / "old.onnx", tmp_path / "new.onnx"
    models.save(model, old_path, external)
    models.save(new, path, external)
    again = models.load(path)
    assert is_stored_sparse(again) == is_stored_sparse(new)
    assert models.weight_count(again) == models.weight_count(new)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = normal(2, CHANNELS, 8, 7)
    for got in (run(again, {"x": x}), session.run(None, {"x": x})):
        np.testing.assert_array_equal(got[0], run(model, {"x": x})[0])
    smaller = models.file_bytes(path) / models.file_bytes(old_path)
    assert smaller < {"sparse": 0.3, "both": 0.4, "low rank": 0.2}.get(content, np.inf)


def test_a_session_of_a_model_beyond_the_limit_of_protobuf(monkeypatch):
    factors = conv_factors()
    model = conv(factors)
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 1000)  # nobody tests with 2 GB
    x = {"x": normal(2, CHANNELS, 8, 7)}
    with Session(model, 1) as dense, Session(rewritten(model, factors), 1) as small:
        np.testing.assert_array_equal(small.run(x)["y"], dense.run(x)["y"])


# ---------------------------------------------------------------- the whole way


def largest_entries(job, subject, *_):
    """Stand in for plan and fit: a tenth of each layer's entries, on every second layer besides rank 2."""
    found = {}
    for number, layer in enumerate(subject.layers):
        weight, rank = weight_matrix(subject.view, layer), 2 * (number % 2)
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        left, right = u[:, :rank] * s[:rank], vt[:rank]
        rest = weight - left @ right
        rest[np.abs(rest) < np.quantile(np.abs(rest), 0.9)] = 0
        found[layer.node] = Fitted(ElementFactors(left, right, scipy.sparse.csr_array(rest), np.zeros(layer.out)), 0.5)
    return found


@pytest.fixture
def whole_way(monkeypatch):
    monkeypatch.setattr(pipeline, "plan_and_fit", lambda *given: Outcome(largest_entries(*given)))

    def run_it(model, output=None, **changes):
        return onnx_lrs.compress(model, output, config=onnx_lrs.Config(threads=1, **changes))

    return run_it


@pytest.mark.parametrize("model", [nets.conv_net(), nets.two_inputs()], ids=["conv", "two inputs"])
def test_the_report_counts_what_the_file_holds(model, whole_way, tmp_path):
    result = whole_way(model, tmp_path / "small.onnx")
    assert {layer.form for layer in result.layers} == {"elements", "low-rank + elements"}
    assert result.after.macs == result.before.macs
    assert all(layer.macs_after == layer.macs_before for layer in result.layers)
    saved = sum(layer.params_before - layer.params_after for layer in result.layers)
    assert result.after.params == result.before.params - saved
    sparse = {t.values.name: t.values.dims[0] for t in result.model.graph.sparse_initializer}
    assert sparse == {f"{layer.name}.elements": layer.elements for layer in result.layers}
    assert result.ratio.file_bytes > 2
    named = ", ".join(layer.name for layer in result.layers)
    assert f"Element-sparse layers ({named}) make a smaller file at the same speed: " in " ".join(result.notes)


def test_where_the_format_has_no_sparse_tensors_no_layer_is_smaller_and_nothing_is_said(whole_way):
    model = nets.conv_net()
    model.ir_version = 5
    result = whole_way(model, budget=onnx_lrs.Budget(macs=1.0))
    assert "Element-sparse" not in " ".join(result.notes)
    assert result.after.params == result.before.params
    assert [layer.params_after for layer in result.layers] == [layer.params_before for layer in result.layers]
    assert all(layer.elements for layer in result.layers)


def test_the_report_counts_the_rows_that_are_left(monkeypatch):
    kept = (1, 4, 19)
    first, second = conv_factors("sparse", "2d"), only(normal(40, OUT * 9, seed=1), kept, 9)
    constants = {"w": layout("Conv", first.dense(), (3, 3)), "v": second.reshape(40, OUT, 3, 3)}
    nodes = [node("Conv", ["x", "w"], ["c"], name="first"), node("Conv", ["c", "v"], ["y"], name="second")]
    model = make(nodes, {"x": (1, CHANNELS, 12, 12)}, ["y"], constants)
    found = {"c": Fitted(first, 0.5), "y": Fitted(keeping(second, kept, 9), 0.5)}
    monkeypatch.setattr(pipeline, "plan_and_fit", lambda *_: Outcome(found))
    result = onnx_lrs.compress(model, config=onnx_lrs.Config(threads=1))
    left = first.sparse[list(kept)].nnz
    assert (result.layers[0].kept_outputs, result.layers[0].elements) == (3, left)
    assert result.layers[0].params_after == left
    assert result.layers[0].macs_after == 3 * CHANNELS * 9 * 100
    assert sum(layer.params_after for layer in result.layers) == result.after.params
    assert sum(layer.macs_after for layer in result.layers) == result.after.macs


def test_inspect_reads_what_was_written(whole_way, tmp_path):
    result = whole_way(nets.conv_net(), tmp_path / "small.onnx")
    seen = onnx_lrs.inspect(tmp_path / "small.onnx")
    assert seen.totals.macs == result.before.macs
    assert seen.totals.params == result.after.params
    for before, after in zip(
        result.layers, [la for la in seen.layers if la.name.endswith("elements_product")], strict=True
    ):
        assert not after.eligible
        assert after.params == before.params_after
        assert "computed from constants" in after.reason if before.rank else after.reason == SPARSE
