"""Parts of a model: in an order that can be run, each node once, and in a chain they give what the whole gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.graph.model import View
from onnx_lrs.graph.segments import Cutter
from tests.builders import make, node, normal

WIDTH = 6
_ERRORS_ONLY = 3


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def whole(model, feed, names):
    """Return tensors of a model by name, run in one piece."""
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return dict(zip(names, session(seen).run(names, feed), strict=True))


def chained(cutter, parts, feed, wanted):
    """Return tensors of a model by name, run part by part; between two parts only what later ones read is kept."""
    live = dict(feed)
    for number, nodes in enumerate(parts):
        made = cutter.makes(nodes)
        later = cutter.reads(node for part in parts[number + 1 :] for node in part) | set(wanted)
        fed = {name: live[name] for name in cutter.reads(nodes) - made}
        outputs = sorted(made & later)
        if outputs:
            part = cutter.submodel(nodes, fed, outputs)
            live |= dict(zip(outputs, session(part).run(outputs, fed), strict=True))
        live = {name: value for name, value in live.items() if name in later}
    return {name: live[name] for name in wanted}


def assert_chain_is_the_whole(model, starts, wanted, feed, seen=()):
    cutter = Cutter(View(model), seen)
    parts, _ = cutter.levels(starts, wanted)
    expected = whole(model, feed, wanted)
    for name, value in chained(cutter, parts, feed, wanted).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-5)
    return parts


def mm(reads, makes, weight="w"):
    return node("MatMul", [reads, weight], [makes])


def square(count, **more):
    """Return that many square weights w0, w1, ..."""
    return {f"w{i}": normal(WIDTH, WIDTH, seed=i) for i in range(count)} | more


def heights(model, starts, wanted=("y",)):
    return Cutter(View(model)).levels(starts, wanted)[1]


# ---------------------------------------------------------------- which level


def test_a_chain_has_a_level_for_each_layer():
    nodes = [mm("x", "a", "w0"), node("Relu", ["a"], ["r"]), mm("r", "b", "w1"), mm("b", "y", "w2")]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(3))
    parts, found = Cutter(View(model)).levels({"a": [], "b": [], "y": []}, ["y"])
    assert found == [1, 2, 3]
    assert parts == [[], [0, 1], [2], [3]]


def test_what_comes_before_the_first_layer_is_level_zero_and_what_nobody_wants_is_left_out():
    nodes = [node("Relu", ["x"], ["r"]), mm("r", "a", "w0"), node("Neg", ["x"], ["unwanted"]), mm("a", "y", "w1")]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y", "unwanted"], square(2))
    parts, _ = Cutter(View(model)).levels({"a": [], "y": []}, ["a", "y"])
    assert parts == [[0], [1], [3]]


def test_a_residual_block_and_a_projection_beside_it():
    nodes = [
        mm("x", "stem", "w0"),
        mm("stem", "one", "w1"),
        node("Relu", ["one"], ["r"]),
        mm("r", "two", "w2"),
        mm("stem", "beside", "w3"),
        node("Add", ["two", "beside"], ["y"]),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(4))
    plain = {"stem": [], "one": [], "two": [], "beside": []}
    assert heights(model, plain) == [1, 2, 3, 2]
    assert heights(model, plain | {"two": ["beside"]}) == [1, 2, 3, 2]
    assert heights(model, plain | {"beside": ["two"]}) == [1, 2, 3, 4]


def test_the_branches_of_a_concat_do_not_wait_for_each_other():
    nodes = [
        mm("x", "stem", "w0"),
        mm("stem", "a", "w1"),
        mm("stem", "b", "w2"),
        mm("b", "bb", "w3"),
        node("Concat", ["a", "bb"], ["both"], axis=1),
        mm("both", "y", "wide"),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(4, wide=normal(2 * WIDTH, WIDTH)))
    parts, found = Cutter(View(model)).levels({name: [] for name in ("stem", "a", "b", "bb", "y")}, ["y"])
    assert found == [1, 2, 2, 3, 4]
    assert parts == [[], [0], [1, 2], [3, 4], [5]]


def test_a_layer_may_wait_for_a_tensor_that_is_made_later_in_the_file():
    nodes = [mm("x", "first", "w0"), mm("x", "p", "w1"), mm("p", "q", "w2"), node("Add", ["first", "q"], ["y"])]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(3))
    starts = {"first": ["q"], "p": [], "q": []}
    assert heights(model, starts) == [3, 1, 2]
    feed = {"x": normal(4, WIDTH)}
    assert assert_chain_is_the_whole(model, starts, ["y"], feed) == [[], [1], [2], [0, 3]]


# ---------------------------------------------------------------- parts in a chain


@st.composite
def networks(draw):
    """Draw a random network on rows of WIDTH numbers, layers that begin levels, and what these wait for."""
    tensors, nodes, constants, layers = ["x", "z"], [], square(3), []
    for number in range(draw(st.integers(1, 12))):
        name, source = f"t{number}", draw(st.sampled_from(tensors))
        kind = draw(st.sampled_from(["layer", "layer", "transposed", "computed", "add", "concat", "relu", "if"]))
        weight = draw(st.sampled_from(["w0", "w1", "w2"]))
        if kind == "transposed":
            nodes += [node("Transpose", [weight], [f"{name}.t"]), node("Identity", [f"{name}.t"], [f"{name}.w"])]
        elif kind == "computed":
            nodes.append(node("Tanh", [weight], [f"{name}.w"]))
        if kind in ("layer", "transposed", "computed"):
            layers.append(name)
            nodes.append(mm(source, name, weight if kind == "layer" else f"{name}.w"))
        elif kind == "add":
            nodes.append(node("Add", [source, draw(st.sampled_from(tensors))], [name]))
        elif kind == "concat":
            constants["wide"] = normal(2 * WIDTH, WIDTH)
            nodes.append(node("Concat", [source, draw(st.sampled_from(tensors))], [f"{name}.c"], axis=1))
            nodes.append(mm(f"{name}.c", name, "wide"))
        elif kind == "relu":
            nodes.append(node("Relu", [source], [name]))
        else:
            constants["yes"] = np.array(True)
            branch = capturing(source, draw(st.sampled_from(tensors)), name)
            nodes.append(node("If", ["yes"], [name], then_branch=branch, else_branch=branch))
        tensors.append(name)
    outputs = dict.fromkeys(draw(st.sets(st.sampled_from(tensors[2:]), min_size=1, max_size=3)), ("N", WIDTH))
    model = make(nodes, {"x": ("N", WIDTH), "z": ("N", WIDTH)}, outputs, constants)
    begins = [name for name in layers if draw(st.booleans())]
    behind = {name: descendants(model, name) for name in begins}
    starts = {}
    for name in begins:  # no circles: what a layer waits for must not come after it, nor after one that waits for it
        others = [t for t in tensors[2:] if t not in behind[name]]
        starts[name] = draw(st.lists(st.sampled_from(others), max_size=1)) if others else []
        for waited in starts[name]:
            for other in behind:
                if waited in behind[other] or waited == other:
                    behind[other] |= behind[name]
    return model, starts, sorted(outputs)


def capturing(one, two, name):
    """Return a subgraph with tensors of its own that reads two of the network's and leaves an optional input out."""
    inside = [
        node("Sub", [one, two], [f"{name}.own"]),
        node("Clip", [f"{name}.own", "", f"{name}.six"], [f"{name}.out"]),
    ]
    result = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
    return helper.make_graph(
        inside, "branch", [], [result], [numpy_helper.from_array(np.float32(6).reshape(()), f"{name}.six")]
    )


def reads_of(each):
    """Return what a node of the networks above reads, its branches included."""
    names = {*each.input}
    for attribute in each.attribute:
        names |= {name for inner in attribute.g.node for name in inner.input}
    return names


def descendants(model, name):
    found = {name}
    for each in model.graph.node:
        if found & reads_of(each):
            found |= {*each.output}
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks())
def test_any_network_in_parts(drawn):
    """Levels by the definition: the most starts on a way to a tensor, waiting counted as reading."""
    model, starts, outputs = drawn
    wanted = sorted({*outputs, *starts})
    cutter = Cutter(View(model))
    parts, found = cutter.levels(starts, wanted)
    makers = {name: each for each in model.graph.node for name in each.output}

    def height(name):
        if name not in makers:
            return 0
        sources = {*reads_of(makers[name]), *starts.get(name, ())}
        return max((height(source) for source in sources), default=0) + (name in starts)

    assert found == [height(name) for name in starts]
    level = {name: number for number, part in enumerate(parts) for name in cutter.makes(part)}
    assert all(level[name] == height(name) for name in level)
    every = [n for part in parts for n in part]
    assert len(every) == len({*every})
    assert {*wanted} <= {*level}
    assert all(part == sorted(part) for part in parts)
    feed = {"x": normal(3, WIDTH, seed=1), "z": normal(3, WIDTH, seed=2)}
    given_inputs = {name: feed[name] for name in cutter.reads(every) if cutter.is_given(name)}
    expected = whole(model, feed, wanted)
    for name, value in chained(cutter, parts, given_inputs, wanted).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-5)


def test_ancestors_are_what_a_tensor_needs_less_what_is_done():
    nodes = [mm("x", "a", "w0"), mm("a", "b", "w1"), mm("x", "c", "w2"), node("Add", ["b", "c"], ["y"])]
    cutter = Cutter(View(make(nodes, {"x": ("N", WIDTH)}, ["y"], square(3))))
    assert cutter.ancestors(["b"]) == [0, 1]
    assert cutter.ancestors(["y"]) == [0, 1, 2, 3]
    assert cutter.ancestors(["y"], done={0, 1}) == [2, 3]
    assert cutter.ancestors(["x"]) == []


# ---------------------------------------------------------------- models as files have them


FEED = {"x": normal(3, WIDTH, seed=1)}


def test_a_model_whose_initialisers_are_inputs():
    nodes = [mm("x", "a", "w0"), node("Relu", ["a"], ["r"]), mm("r", "y", "w1")]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(2), opset=8, ir=3)
    assert len(model.graph.input) == 3
    assert assert_chain_is_the_whole(model, {"a": [], "y": []}, ["a", "y"], FEED) == [[], [0, 1], [2]]


def test_an_input_with_a_default_keeps_it():
    nodes = [mm("x", "a", "w0"), node("Add", ["a", "level"], ["b"]), mm("b", "y", "w1")]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(2, level=normal(WIDTH)))
    model.graph.input.append(helper.make_tensor_value_info("level", TensorProto.FLOAT, [WIDTH]))
    parts = assert_chain_is_the_whole(model, {"a": [], "y": []}, ["a", "b", "y"], FEED)
    cutter = Cutter(View(model))
    assert cutter.reads(parts[1]) == {"x", "a"}
    np.testing.assert_array_equal(cutter.default("level"), normal(WIDTH))


def test_sparse_initialisers_go_with_the_parts_that_read_them():
    values = numpy_helper.from_array(np.array([1.5, -2.0], np.float32), "s")
    places = numpy_helper.from_array(np.array([3, 20], np.int64))
    nodes = [node("Add", ["w0", "s"], ["w"]), mm("x", "a", "w"), mm("a", "b", "w1"), mm("b", "y", "w")]
    model = make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", WIDTH)}, square(2, s=normal(WIDTH, WIDTH)))
    stored = next(t for t in model.graph.initializer if t.name == "s")
    model.graph.initializer.remove(stored)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [WIDTH, WIDTH]))
    parts = assert_chain_is_the_whole(model, {"a": [], "b": [], "y": []}, ["y"], FEED)
    assert parts == [[], [1], [2], [3]]
    cutter = Cutter(View(model))
    sizes = [len(cutter.submodel(p, {"x": FEED["x"]}, []).graph.sparse_initializer) for p in parts[1:]]
    assert sizes == [1, 0, 1]


def test_weights_behind_identity_and_transpose_are_repeated_where_they_are_read():
    nodes = [
        node("Identity", ["w0"], ["i"]),
        node("Transpose", ["i"], ["t"]),
        mm("x", "a", "t"),
        mm("a", "y", "t"),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(1))
    parts = assert_chain_is_the_whole(model, {"a": [], "y": []}, ["y"], FEED)
    assert parts == [[], [2], [3]]
    cutter = Cutter(View(model))
    for part in parts[1:]:
        made = cutter.submodel(part, {"x": FEED["x"]}, [])
        assert [n.op_type for n in made.graph.node] == ["Identity", "Transpose", "MatMul"]
        assert [t.name for t in made.graph.initializer] == ["w0"]


def test_a_part_holds_no_weights_of_other_parts():
    nodes = [mm("x", "a", "w0"), mm("a", "b", "w1"), mm("b", "y", "w2")]
    cutter = Cutter(View(make(nodes, {"x": ("N", WIDTH)}, ["y"], square(3))))
    part = cutter.submodel([1], {"a": FEED["x"]}, ["b"])
    assert [t.name for t in part.graph.initializer] == ["w1"]
    assert ([v.name for v in part.graph.input], [v.name for v in part.graph.output]) == (["a"], ["b"])


def test_names_inside_a_subgraph_are_not_read_from_outside():
    branch = capturing("a", "x", "i")
    nodes = [mm("x", "a", "w0"), node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch), mm("i", "y", "w1")]
    model = make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", WIDTH)}, square(2, yes=np.array(True)))
    parts = assert_chain_is_the_whole(model, {"a": [], "y": []}, ["y"], FEED)
    assert Cutter(View(model)).reads(parts[1]) == {"x", "a"}
    assert parts == [[], [0, 1], [2]]


def test_subgraphs_within_subgraphs_capture_from_the_outermost():
    inner = capturing("a", "x", "k")
    result = helper.make_tensor_value_info("k", TensorProto.FLOAT, None)
    outer = helper.make_graph([node("If", ["yes"], ["k"], then_branch=inner, else_branch=inner)], "outer", [], [result])
    nodes = [mm("x", "a", "w0"), node("If", ["yes"], ["i"], then_branch=outer, else_branch=outer), mm("i", "y", "w1")]
    model = make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", WIDTH)}, square(2, yes=np.array(True)))
    parts = assert_chain_is_the_whole(model, {"a": [], "y": []}, ["y"], FEED)
    assert Cutter(View(model)).reads(parts[1]) == {"x", "a"}


def test_a_tensor_computed_from_constants_belongs_to_a_part_where_somebody_wants_to_see_it():
    """The rows of a table that a layer multiplies: columns of that layer as any other's."""
    nodes = [
        node("Tanh", ["table"], ["rows"]),
        mm("rows", "p", "w0"),
        mm("x", "a", "w1"),
        node("Add", ["a", "p"], ["s"]),
        mm("s", "y", "w2"),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, ["y"], square(3, table=normal(1, WIDTH)))
    starts = {"p": [], "a": [], "y": []}
    parts = assert_chain_is_the_whole(model, starts, ["rows", "p", "y"], FEED, seen=["rows"])
    assert parts == [[0], [1, 2, 3], [4]]
    assert Cutter(View(model)).ancestors(["y"]) == [2, 3, 4]


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform"])
def test_random_numbers_are_no_constants(op):
    """Repeated in two parts they would be two different draws."""
    nodes = [
        node(op, [], ["noise"], shape=[1, WIDTH]),
        mm("x", "a", "w0"),
        node("Add", ["a", "noise"], ["b"]),
        mm("b", "c", "w1"),
        node("Add", ["c", "noise"], ["y"]),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", WIDTH)}, square(2))
    cutter = Cutter(View(model))
    parts, _ = cutter.levels({"a": [], "c": []}, ["y"])
    assert parts == [[0], [1, 2], [3, 4]]
    assert "noise" in cutter.reads(parts[2])


@pytest.mark.parametrize(("tensor", "expected"), [("a", True), ("x", True), ("p", False), ("grid", False), ("s", True)])
def test_what_follows_the_values_of_an_input_and_what_its_shape_alone(tensor, expected):
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["grid"]),
        mm("grid", "p", "w0"),
        mm("x", "a", "w1"),
        node("Add", ["a", "p"], ["s"]),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, {"s": ("N", WIDTH)}, square(2))
    assert Cutter(View(model)).follows_samples(tensor) == expected


def test_parts_keep_element_types_and_numbers_of_dimensions():
    nodes = [
        node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        node("ArgMax", ["half"], ["best"], axis=1, keepdims=0),
        node("ReduceMax", ["half"], ["top"], keepdims=0),
        node("Cast", ["top"], ["scale"], to=TensorProto.FLOAT),
        node("Mul", ["x", "scale"], ["m"]),
        mm("m", "a", "w0"),
        node("Gather", ["a", "best"], ["y"], axis=1),
    ]
    model = make(nodes, {"x": ("N", WIDTH)}, {"y": ("N", "M")}, square(1))
    cutter = Cutter(View(model))
    live = whole(model, FEED, ["half", "best", "top", "a"]) | FEED
    assert (live["half"].dtype, live["best"].dtype, live["top"].shape) == (np.float16, np.int64, ())
    for nodes_, fed, output in (([3, 4], ["x", "top"], "m"), ([6], ["a", "best"], "y"), ([1, 2], ["half"], "best")):
        feed = {name: live[name] for name in fed}
        part = cutter.submodel(nodes_, feed, [output])
        expected = whole(model, FEED, [output])[output]
        np.testing.assert_allclose(session(part).run([output], feed)[0], expected, rtol=2e-3)  # half
