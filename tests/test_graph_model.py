"""Loading and saving: every damaged file is explained, a failed write leaves the old file whole, stdout stays empty."""

import errno
import os
import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.errors import ModelError, OutputError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.fold import fold_batch_norm
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View, load, save, signature
from onnx_lrs.graph.rewrite import rewrite
from tests.builders import make, node, normal, planted, run

SIZE = 40


def small(opset=17, **options):
    constants = {"w": normal(SIZE, SIZE), "b": normal(SIZE)}
    return make([node("Gemm", ["x", "w", "b"], ["y"], name="g")], {"x": (2, SIZE)}, ["y"], constants, opset=opset)


def same(a, b):
    for tensor in (
        *a.graph.initializer,
        *b.graph.initializer,
    ):  # onnx writes the default down when it loads a data file
        if tensor.data_location == TensorProto.DEFAULT:
            tensor.ClearField("data_location")
    assert a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


@pytest.fixture
def apart(tmp_path):
    """Return the path of a model whose weight ``w`` lies in a data file beside it."""
    path = tmp_path / "model.onnx"
    onnx.save_model(small(), path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return path


def place(path, **entries):
    """Change where the model says that its external tensor lies."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    kept = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


# ---------------------------------------------------------------- load


def test_load_takes_a_path_a_string_and_a_model(tmp_path):
    model, path = small(), tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    for source in (path, str(path), model):
        loaded = load(source)
        same(loaded, model)
        assert loaded is not model


@pytest.mark.parametrize(
    "content", [b"", b"# a text file\nwith lines\n", bytes(range(256)) * 8, b"\x00" * 64, b"PK\3\4"]
)
def test_what_is_not_onnx_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"no ONNX graph|not an ONNX model"):
        load(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    content, path = small().SerializeToString(), tmp_path / "m.onnx"
    for length in (1, 2, 10, 100, len(content) // 2, len(content) - 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            load(path)


def test_a_tensor_shorter_than_its_shape_is_explained():
    model = small()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]
    with pytest.raises(ModelError, match=r"'w'.*\[40, 40\]"):
        find(View(load(model)))


def test_an_old_opset_is_refused():
    model = small()
    model.opset_import[0].version = 6
    with pytest.raises(ModelError, match="opset 6"):
        load(model)


def test_the_opset_may_be_named_ai_onnx():
    model = small()
    model.opset_import[0].domain = "ai.onnx"
    assert models.opset(load(model)) == 17
    assert len(find(View(model))[0]) == 1


def test_external_data_is_loaded(apart):
    same(load(apart), small())
    assert models.external_places(apart) == {"model.onnx.data"}
    assert models.file_bytes(apart) == apart.stat().st_size + 4 * SIZE * SIZE


def test_missing_external_data(apart):
    apart.with_name("model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"'w'.*model.onnx.data.*missing"):
        load(apart)


@pytest.mark.parametrize("length", [None, str(4 * SIZE * SIZE)])
def test_truncated_external_data(apart, length):
    data = apart.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-10])
    if length:
        place(apart, length=length)
    with pytest.raises(ModelError, match=r"truncated|does not fill"):
        find(View(load(apart)))


@pytest.mark.parametrize("entry", [{"offset": "-4"}, {"offset": "many"}, {"length": "-1"}, {"offset": "99999"}])
def test_nonsense_in_external_data(apart, entry):
    place(apart, **entry)
    with pytest.raises(ModelError, match=r"external data|truncated"):
        load(apart)


@pytest.mark.parametrize("location", ["../other/w.bin", "/etc/hostname", "sub/../../w.bin", ""])
def test_external_data_outside_the_folder_is_refused(apart, location):
    (apart.parent / "sub").mkdir()
    place(apart, location=location)
    with pytest.raises(ModelError, match=r"outside|missing"):
        load(apart)


def test_links_are_refused(apart, tmp_path_factory):
    data, elsewhere = apart.with_name("model.onnx.data"), tmp_path_factory.mktemp("elsewhere") / "w.bin"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)
    with pytest.raises(ModelError, match="outside"):
        load(apart)
    inside = apart.with_name("inside.bin")
    inside.write_bytes(elsewhere.read_bytes())
    data.unlink()
    data.symlink_to(inside)
    with pytest.raises(ModelError, match="external data"):  # onnx takes no link at all
        load(apart)


def test_a_model_in_memory_has_no_folder(apart):
    with pytest.raises(ModelError, match="'w'"):
        load(onnx.load(apart, load_external_data=False))


# ---------------------------------------------------------------- save


@pytest.mark.parametrize("external", [False, True])
def test_round_trip(tmp_path, external):
    path, model = tmp_path / "new.onnx", small()
    before = model.SerializeToString()
    save(model, path, external)
    same(load(path), model)
    assert model.SerializeToString() == before
    assert models.external_places(path) == ({"new.onnx.data"} if external else set())
    assert {p.name for p in tmp_path.iterdir()} == {"new.onnx", "new.onnx.data"} if external else {"new.onnx"}
    (before_saving,), (after,) = run(model), run(load(path))
    np.testing.assert_array_equal(before_saving, after)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        save(small(), tmp_path / name, external=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_beyond_the_limit_of_protobuf_the_weights_go_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "PROTOBUF_LIMIT", 2000)
    save(small(), tmp_path / "new.onnx", external=False)
    assert models.external_places(tmp_path / "new.onnx") == {"new.onnx.data"}
    same(load(tmp_path / "new.onnx"), small())


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "new.onnx"
    save(small(opset=13), path, external=True)
    save(small(), path, external=True)
    same(load(path), small())


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("owner", "function"), [(os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "write_bytes")]
)
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, owner, function, external):
    path = tmp_path / "new.onnx"
    save(small(opset=13), path, external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(owner, function, no_space)
    with pytest.raises(OutputError, match="No space left on device"):
        save(small(), path, external)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        save(small(), tmp_path / "none" / "new.onnx", external=False)
    with pytest.raises(OutputError, match="is a folder"):
        save(small(), tmp_path, external=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="could not be written"):
        save(small(), tmp_path / "file" / "new.onnx", external=False)


# ---------------------------------------------------------------- looking at it


def test_signature_leaves_out_initialisers_and_keeps_symbols():
    model = small(opset=7)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    (x,), (y,) = signature(model)
    assert (x.name, x.shape, x.dtype, y.name) == ("x", ("N", SIZE), np.float32, "y")


def test_inputs_and_outputs_that_are_no_typed_tensors_are_refused():
    model = small()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    with pytest.raises(ModelError, match="'y'"):
        signature(model)
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match="'y'"):
        signature(model)


@pytest.mark.parametrize("weight", ["initialiser", "constant node", "identity", "transpose", "transpose of identity"])
def test_constants_through_the_nodes_that_make_them(weight):
    value = normal(2, 3, 5)
    stored = numpy_helper.from_array(value)
    nodes = {
        "initialiser": [node("Identity", ["i"], ["z"])],
        "constant node": [node("Constant", [], ["k"], value=stored)],
        "identity": [node("Identity", ["i"], ["k"])],
        "transpose": [node("Transpose", ["i"], ["k"])],
        "transpose of identity": [node("Identity", ["i"], ["j"]), node("Transpose", ["j"], ["k"], perm=[1, 2, 0])],
    }[weight]
    name = "i" if weight == "initialiser" else "k"
    view = View(make([*nodes, node("Relu", [name], ["y"])], {}, ["y"], {"i": value}))
    (expected,) = run(view.model)
    assert view.is_constant(name)
    np.testing.assert_array_equal(np.maximum(view.constant(name), 0), expected)
    assert view.stored_shape(name) == expected.shape
    assert view.stored_shape("y") is None
    with pytest.raises(KeyError):
        view.constant("y")


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.0]}, np.float32([1, 2])),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [4, 5]}, np.int64([4, 5])),
    ],
)
def test_constant_nodes_of_every_form(attribute, expected):
    view = View(make([node("Constant", [], ["k"], **attribute), node("Cast", ["k"], ["y"], to=1)], {}, ["y"], {}))
    value = view.constant("k")
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)
    assert view.stored_shape("k") == expected.shape


def test_reads_count_operands_and_readers_are_sole_if_nothing_else_reads():
    nodes = [node("Add", ["x", "x"], ["a"]), node("Relu", ["a"], ["b"]), node("Mul", ["a", "b"], ["y"])]
    view = View(make(nodes, {"x": (2,)}, ["y"], {}))
    assert [view.reads(name) for name in ("x", "a", "b", "y", "nothing")] == [2, 2, 1, 0, 0]
    assert view.sole_reader("x").op == "Add"
    assert view.sole_reader("a") is None
    assert view.sole_reader("y") is None


def test_a_tensor_that_a_subgraph_hands_on_has_no_sole_reader():
    out = helper.make_tensor_value_info("a", TensorProto.FLOAT, None)
    branch = helper.make_graph([], "branch", [], [out])
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["b"]),
        node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch),
        node("Add", ["b", "i"], ["y"]),
    ]
    view = View(make(nodes, {"x": (2,)}, {"y": (2,)}, {"yes": np.array(True)}))
    assert view.sole_reader("a") is None
    assert view.sole_reader("b").op == "Add"


def test_weights_are_counted_once_and_indices_not():
    nodes = [node("Constant", [], ["k"], value=numpy_helper.from_array(normal(3))), node("Add", ["x", "k"], ["y"])]
    model = make(nodes, {"x": (2, 3)}, ["y"], {"i": np.arange(9), "w": normal(4, 5)})
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(2, np.float32), "s"), numpy_helper.from_array(np.array([0, 7])), [99]
    )
    model.graph.sparse_initializer.append(sparse)
    assert models.weight_count(model) == 3 + 20 + 2


def test_stdout_stays_empty(tmp_path, capfd):
    """onnx-graphsurgeon's logger prints to stdout, where --json has to stay alone."""
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([3])), [9]
    )
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(normal(SIZE, SIZE))),
        node("Constant", [], ["unknown"], sparse_value=sparse),  # an attribute that it warns about
        node("Gemm", ["x", "w"], ["g"], name="same"),
        node("Unheard", ["g"], ["u"], name="same", domain="org.example"),
        node("Relu", ["u"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", SIZE))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)  # a domain is missing
    save(model, tmp_path / "m.onnx", external=False)
    view = View(fold_batch_norm(load(tmp_path / "m.onnx"))[0])
    layers, _ = find(view)
    rewrite(view, layers, {layers[0].node: planted("both", SIZE, SIZE)}, {"x": 2})
    assert capfd.readouterr().out == ""
