"""Models as torch modules: the numbers of ONNX Runtime, gradients for the file's own constants, and the way back."""

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx2torch")

from onnx_lrs.errors import ModelError  # noqa: E402
from onnx_lrs.graph.tuning import constants, twin, with_values  # noqa: E402
from onnx_lrs.training.student import Student  # noqa: E402
from tests import small_nets as nets  # noqa: E402
from tests.builders import OPSETS, make, node, normal, run  # noqa: E402
from tests.test_tuning import CONV, compressed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:onnx2torch")

ONE = {
    "conv": (node("Conv", ["x", "w", "b"], ["y"], pads=[1] * 4), (2, 4, 6, 5), {"w": normal(6, 4, 3, 3)}),
    "grouped": (node("Conv", ["x", "w", "b"], ["y"], group=2), (2, 4, 6, 5), {"w": normal(6, 2, 3, 3)}),
    "transposed": (
        node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2]),
        (2, 4, 6, 5),
        {"w": normal(4, 6, 3, 3)},
    ),
    "gemm": (node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0), (3, 5), {"w": normal(5, 6)}),
    "gemm turned": (node("Gemm", ["x", "w", "b"], ["y"], transB=1), (3, 5), {"w": normal(6, 5)}),
    "matmul": (node("MatMul", ["x", "w"], ["y"]), (2, 3, 5), {"w": normal(5, 6)}),
    "weight on the left": (node("MatMul", ["w", "x"], ["y"]), (2, 5, 3), {"w": normal(6, 5)}),
    "padded apart": (node("Conv", ["x", "w", "b"], ["y"], pads=[0, 0, 1, 1]), (2, 4, 6, 5), {"w": normal(6, 4, 3, 3)}),
    "gemm of a transpose": (node("Gemm", ["x", "w", "b"], ["y"], transA=1), (5, 3), {"w": normal(5, 6)}),
}


def single(case):
    operator, shape, values = ONE[case]
    bias = {"b": normal(6)} if "b" in operator.input else {}
    return make([operator], {"x": shape}, ["y"], values | bias)


def outputs(model, feed):
    names = [value.name for value in model.graph.output]
    student = Student(twin(model), names)
    with torch.no_grad():
        found = student(*(torch.tensor(value) for value in feed.values()))
    return student, [found[name].numpy() for name in names]


def feed_of(model, seed=5):
    sizes = [[d.dim_value or 2 for d in value.type.tensor_type.shape.dim] for value in model.graph.input]
    return {value.name: normal(*size, seed=seed) for value, size in zip(model.graph.input, sizes, strict=True)}


def close(found, expected, rtol=2e-5):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


MODELS = {**{case: single(case) for case in ONE}, **{f"form {form}": compressed(form) for form in CONV}}


@pytest.mark.parametrize("case", MODELS)
def test_the_numbers_are_those_of_onnx_runtime_before_and_after_a_change(case):
    model = MODELS[case]
    feed = feed_of(model)
    student, found = outputs(model, feed)
    close(found, run(model, feed))
    with torch.no_grad():
        for leaf in student.leaves.parameters():
            leaf.mul_(1.5).add_(0.1)
        changed = student(*(torch.tensor(value) for value in feed.values()))
    back = with_values(model, student.values)
    close([value.numpy() for value in changed.values()], run(back, feed))


@pytest.mark.parametrize("case", MODELS)
def test_gradients_reach_every_constant_and_are_right(case):
    model = MODELS[case]
    feed = {name: torch.tensor(value) for name, value in feed_of(model).items()}
    student = Student(twin(model), ["y"])

    def loss():
        return student(*feed.values())["y"].double().square().sum()

    loss().backward()
    assert set(student.keys) == {t.name for t in twin(model).tunables}
    for each in twin(model).tunables:
        leaf = student.leaves[student.keys[each.name]]
        direction = torch.tensor(normal(*each.values.shape, seed=7))
        expected = float((leaf.grad * direction).sum())
        step = 1e-2
        with torch.no_grad():
            leaf.add_(step * direction)
            above = float(loss())
            leaf.sub_(2 * step * direction)
            below = float(loss())
            leaf.add_(step * direction)
        assert expected == pytest.approx((above - below) / (2 * step), rel=2e-2, abs=1e-2 * abs(above))
        assert expected != 0


@pytest.mark.parametrize("form", ["elements", "low rank + elements"])
def test_zeros_stay_zero_whatever_the_optimiser_does(form):
    model = compressed(form)
    student = Student(twin(model), ["y"])
    optimiser = torch.optim.AdamW(student.leaves.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        student(torch.tensor(normal(2, 30, 7, 6)))["y"].square().sum().backward()
        optimiser.step()
    for each in twin(model).tunables:
        if each.support is not None:
            assert not student.values[each.name][~each.support].any()
            assert (student.values[each.name] != each.values).any()
    same = {name: values != 0 for name, values in constants(with_values(model, student.values)).items()}
    assert all((same[name] <= (values != 0)).all() for name, values in constants(model).items() if values.ndim > 1)


def test_a_whole_network_with_any_of_its_tensors():
    model = nets.conv_net()
    feed = {"image": nets.as_floats(nets.pictures(3))}
    student = Student(twin(model), ["logits", "r1", "p2"])
    with torch.no_grad():
        found = student(torch.tensor(feed["image"]))
    for name, value in found.items():
        probe = nets.conv_net()
        del probe.graph.output[:]
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        close([value.numpy()], run(probe, feed))


def test_several_inputs_and_outputs_in_order():
    model = nets.two_inputs()
    feed = {name: value[:4] for name, value in nets.pairs().items()}
    close(outputs(model, feed)[1], nets.run(model, feed))


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_taken_or_refused_with_what_is_missing(opset):
    values = {"w": normal(4, 3, 3, 3), "b": normal(4), "m": normal(4, 5)}
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["r"]), node("GlobalAveragePool", ["r"], ["p"])]
    nodes += [node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "m"] + ["z"] * (opset < 11), ["y"])]
    values |= {"z": np.zeros(1, np.float32)} if opset < 11 else {}
    model = make(nodes, {"x": (2, 3, 6, 6)}, ["y"], values, opset=opset)
    try:
        student = Student(twin(model), ["y"])
    except ModelError as error:
        assert f"opset {opset}" in error.message  # noqa: PT017
        return
    with torch.no_grad():
        close([student(torch.tensor(normal(2, 3, 6, 6)))["y"].numpy()], run(model, {"x": normal(2, 3, 6, 6)}))


def test_operators_that_are_not_known_are_all_named():
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Hardmax", ["a"], ["h"]),
        node("Strange", ["h"], ["y"], domain="own"),
    ]
    model = make(nodes[:2], {"x": (2, 4)}, ["h"], {"w": normal(4, 4)})
    model.graph.node.append(nodes[2])
    model.graph.output[0].name = "y"
    model.opset_import.add(domain="own", version=1)
    with pytest.raises(ModelError) as caught:
        Student(twin(model), ["y"])
    assert "Hardmax (opset 17), Strange (own 1)" in caught.value.message


def test_a_constant_that_onnx2torch_hides_elsewhere_is_not_trained():
    """The bias of the Conv is the norm's too, which onnx2torch copies into a module: half of it would be trained."""
    values = {"w": normal(4, 3, 3, 3), "b": normal(4), "mean": normal(4), "var": np.abs(normal(4)) + 1, "s": normal(4)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]),
        node("BatchNormalization", ["c", "s", "b", "mean", "var"], ["y"]),
    ]
    model = make(nodes, {"x": (2, 3, 6, 6)}, ["y"], values)
    student = Student(twin(model), ["y"])
    assert set(student.keys) == {"w"}
    with torch.no_grad():
        student.leaves["w0"].mul_(2)
        found = student(torch.tensor(normal(2, 3, 6, 6)))["y"].numpy()
    close([found], run(with_values(model, student.values), {"x": normal(2, 3, 6, 6)}))


def test_everything_moves_to_another_device():
    values = {"w": normal(4, 3, 3, 3), **{name: np.abs(normal(4)) for name in ("s", "b", "mean", "var")}}
    nodes = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", "s", "b", "mean", "var"], ["y"])]
    student = Student(twin(make(nodes, {"x": (2, 3, 6, 6)}, ["y"], values)), ["y"]).to("meta")
    assert student(torch.empty(2, 3, 6, 6, device="meta"))["y"].shape == (2, 4, 4, 4)


def test_outputs_of_one_node_and_others():
    values = {"w": normal(6, 8)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Split", ["h"], ["a", "b"], axis=1), node("Relu", ["h"], ["y"])]
    model = make(nodes, {"x": (3, 6)}, ["b", "y", "a"], values, opset=12)
    feed = {"x": normal(3, 6)}
    close(outputs(model, feed)[1], run(model, feed))


@pytest.mark.parametrize("case", ["same", "nothing"])
def test_what_cannot_be_translated_or_trained_is_a_clear_error(case):
    if case == "same":
        nodes = [
            node("Conv", ["x", "w"], ["c"]),
            node("AveragePool", ["c"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
        ]
        told = "onnx2torch cannot translate this model"
    else:
        nodes, told = [node("Relu", ["x"], ["y"])], "no float32 weights that could be trained"
    model = make(nodes, {"x": (2, 3, 6, 6)}, ["y"], {"w": normal(4, 3, 3, 3)})
    with pytest.raises(ModelError, match=told):
        Student(twin(model), ["y"])
