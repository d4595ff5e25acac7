"""Training with weights as INT8 leaves them: the values ONNX Runtime stores, gradients, and what it is good for."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import quantization

torch = pytest.importorskip("torch")
pytest.importorskip("onnx2torch")

from onnx_lrs.config import Training  # noqa: E402
from onnx_lrs.graph.tuning import twin, with_values  # noqa: E402
from onnx_lrs.training import rounding, student  # noqa: E402
from onnx_lrs.training.loop import Pool, Trainer  # noqa: E402
from onnx_lrs.training.losses import Goal, Loss  # noqa: E402
from onnx_lrs.training.rounding import nearest, straight_through  # noqa: E402
from onnx_lrs.training.student import Student  # noqa: E402
from tests.builders import make, node, normal, run  # noqa: E402
from tests.test_student import ONE, close, feed_of, single  # noqa: E402
from tests.test_tuning import compressed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:onnx2torch")
COURSE = Training(epochs=12, train_batch=16, learning_rate=0.001, patience=20, autocast="off", fake_quant=True)


class Feeds(quantization.CalibrationDataReader):
    def __init__(self, feed):
        self._left = iter([feed])

    def get_next(self):
        return next(self._left, None)


def stored(model, folder):
    """Return the weights of a model as quantize_static stores them, dequantised by ONNX Runtime itself."""
    before, after = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, before)
    quantization.quantize_static(
        before, after, Feeds(feed_of(model)), quant_format=quantization.QuantFormat.QDQ, per_channel=True
    )
    quantised = onnx.load(after)
    kinds = {t.name: t.data_type for t in quantised.graph.initializer}
    back = [n for n in quantised.graph.node if kinds.get(n.input[0]) == onnx.TensorProto.INT8]
    del quantised.graph.output[:], quantised.graph.node[:], quantised.graph.input[:]
    quantised.graph.node.extend(back)
    quantised.graph.output.extend(onnx.ValueInfoProto(name=n.output[0]) for n in back)
    return {n.input[0].removesuffix("_quantized"): value for n, value in zip(back, run(quantised), strict=True)}


def rounded_values(model):
    """Return what a student computes with, for each weight that is rounded."""
    found = twin(model)
    values = {each.name: torch.tensor(each.values) for each in found.tunables}
    return {name: nearest(values[name], axis).numpy() for name, axis in found.channels.items()}


def with_zeros():
    """A zero channel, zeros between others, halves, and channels whose sizes are far apart."""
    w = normal(6, 4, 3, 3) * np.float32(10.0) ** np.arange(-6, 6, 2, dtype=np.float32)[:, None, None, None]
    w[1] = 0
    w[2, ::2] = 0
    w[3, 0] = np.array([127, 63.5, 0.5, -0.5, 1.5, -1.5, 2.5, -127, 126.5], np.float32).reshape(3, 3)
    w[3, 1:] = 3.5
    return make([node("Conv", ["x", "w"], ["y"])], {"x": (2, 4, 6, 5)}, ["y"], {"w": w})


def shared(first, second):
    """A square weight that two nodes read, each with an axis of its own: the last one decides."""
    gemm = {"op_type": "Gemm", "transB": 1}
    kinds = {"turned": gemm, "plain": {"op_type": "MatMul"}}
    nodes = [
        node(inputs=["x", "w"], outputs=["h"], **kinds[first]),
        node(inputs=["h", "w"], outputs=["y"], **kinds[second]),
    ]
    return make(nodes, {"x": (3, 5)}, ["y"], {"w": normal(5, 5)})


def matmul(*shape):
    return make([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 3, 5)}, ["y"], {"w": normal(*shape)})


STORED = {
    **{case: single(case) for case in ONE},
    **{f"form {form}": compressed(form) for form in ("low_rank", "channels", "both", "spatial", "tucker")},
    "zeros": with_zeros(),
    "a batch of matrices": matmul(2, 5, 6),
    "a vector": matmul(5),
    "transposed in groups": make(
        [node("ConvTranspose", ["x", "w"], ["y"], group=2)], {"x": (2, 4, 6, 5)}, ["y"], {"w": normal(4, 3, 3, 3)}
    ),
    "shared, plain last": shared("turned", "plain"),
    "shared, turned last": shared("plain", "turned"),
}


@pytest.mark.parametrize("case", STORED)
def test_weights_are_to_the_bit_those_that_onnx_runtime_stores(case, tmp_path):
    model = STORED[case]
    expected, found = stored(model, tmp_path), rounded_values(model)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
        assert not found[name][numpy_helper.to_array(initialiser(model, name)) == 0].any()


def initialiser(model, name):
    return next(t for t in model.graph.initializer if t.name == name)


@pytest.mark.parametrize("case", STORED)
def test_a_student_computes_with_them_and_keeps_its_own(case, tmp_path):
    model = STORED[case]
    feed = feed_of(model)
    found = Student(twin(model), ["y"])
    inputs = [torch.tensor(value) for value in feed.values()]
    with torch.no_grad():
        rounded, plain = (found(*inputs, rounded=how)["y"].numpy() for how in (True, False))
    close([rounded], run(with_values(model, stored(model, tmp_path)), feed))
    close([plain], run(model, feed))
    assert not np.allclose(rounded, plain, rtol=1e-4)
    assert all((found.values[each.name] == each.values).all() for each in twin(model).tunables)


@pytest.mark.parametrize("form", ["elements", "low rank + elements"])
def test_what_is_no_stored_weight_is_left_alone(form):
    """Sparse and computed weights, the factors of a computed one, biases: nothing that quantize_static stores."""
    model = compressed(form)
    found, x = Student(twin(model), ["y"]), torch.tensor(normal(2, 30, 7, 6))
    assert not twin(model).channels
    with torch.no_grad():
        assert torch.equal(found(x, rounded=True)["y"], found(x)["y"])


def test_weights_in_constant_nodes_are_rounded_as_the_initialisers_that_preprocessing_makes_of_them():
    w = normal(6, 4, 3, 3)
    nodes = [node("Constant", [], ["w"], value=numpy_helper.from_array(w)), node("Conv", ["x", "w"], ["y"])]
    assert twin(make(nodes, {"x": (2, 4, 6, 5)}, ["y"], {})).channels == {"w": 0}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("case", ["conv", "transposed", "gemm", "gemm turned", "matmul", "form both"])
def test_the_gradient_is_that_at_the_rounded_weights(case):
    """A finite difference of the loss by the weights that the call computes with, against the leaves' gradient."""
    model = STORED[case]
    feed = {name: torch.tensor(value) for name, value in feed_of(model).items()}
    trained = Student(twin(model), ["y"])
    trained(*feed.values(), rounded=True)["y"].double().square().sum().backward()
    at, rounded = Student(twin(model), ["y"]), rounded_values(model)
    with torch.no_grad():
        for name, values in rounded.items():
            at.leaves[at.keys[name]].copy_(torch.tensor(values))

    def loss():
        return at(*feed.values())["y"].double().square().sum()

    loss().backward()
    for name, key in trained.keys.items():
        leaf, found = at.leaves[at.keys[name]], trained.leaves[key].grad
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max()))
        direction = torch.tensor(normal(*leaf.shape, seed=7))
        ends = []
        for step in (1e-2, -2e-2, 1e-2):
            with torch.no_grad():
                leaf.add_(step * direction)
                ends.append(float(loss()))
        slope = (ends[0] - ends[1]) / 2e-2
        assert float((found * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-2 * abs(ends[0]))
        assert found.any()


def test_straight_through_is_the_rounded_weight_to_the_bit():
    weight = (torch.tensor(normal(7, 9)) * torch.logspace(-30, 30, 7)[:, None]).requires_grad_()
    found = straight_through(weight, 0)
    assert torch.equal(found, nearest(weight, 0))
    (found * torch.arange(63.0).reshape(7, 9)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(63.0).reshape(7, 9))


# ---------------------------------------------------------------- training


def coarse():
    """A teacher and a student near it: a low-rank pair whose middle channels differ in size by a factor of 256.

    Within a row of the left factor small values fall between two levels, and rounding costs more than all the noise.
    """
    sizes = np.geomspace(1 / 16, 16, 8).astype(np.float32)
    left, right = normal(24, 8, seed=1) * sizes, normal(8, 16, seed=2) / sizes[:, None]
    constants = {"right": right, "left": left, "b": normal(24), "w": normal(24, 6, seed=3)}
    constants["w"][::3] = 0
    nodes = [node("Gemm", ["x", "right"], ["m"], transB=1), node("Gemm", ["m", "left", "b"], ["h"], transB=1)]
    nodes += [node("Relu", ["h"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    teacher = make(nodes, {"x": ("N", 16)}, {"y": ("N", 6)}, constants)
    noisy = {name: values * (1 + 0.02 * normal(*values.shape, seed=9)) for name, values in constants.items()}
    return teacher, with_values(teacher, noisy)


def trainer(training=COURSE):
    teacher, model = coarse()

    def teach(feed):
        return {"y": run(teacher, feed)[0]}

    pools = tuple(
        Pool([{"x": row[None]} for row in normal(count, 16, seed=seed)], None, True)
        for count, seed in ((128, 3), (64, 4))
    )
    scale = float(np.square(teach({"x": normal(64, 16, seed=4)})["y"]).sum() / 64)
    loss = Loss([Goal("y", "l2", scale=scale)], 1.0, 0.0)
    return Trainer(Student(twin(model), ["y"]), teach, loss, pools, training, 0)


def trained(training=COURSE):
    return trainer(training).run(None, lambda state: None, lambda epoch: None)


def error(model):
    x = normal(256, 16, seed=5)
    wanted = run(coarse()[0], {"x": x})[0]
    return np.linalg.norm(run(model, {"x": x})[0] - wanted) / np.linalg.norm(wanted)


def test_training_recovers_what_rounding_costs(tmp_path):
    """On other samples, with the weights that ONNX Runtime's own quantisation stores."""
    _, model = coarse()
    start, found = error(with_values(model, stored(model, tmp_path))), {}
    assert start > 3 * error(model)
    for how in (True, False):
        best = with_values(model, trained(dataclasses.replace(COURSE, fake_quant=how)).best)
        found[how] = error(with_values(best, stored(best, tmp_path)))
    assert error(best) < 0.5 * error(model)  # trained well, but for float32
    assert found[True] < 0.9 * start
    assert found[True] < 0.9 * found[False]


def test_the_best_epoch_is_chosen_and_told_by_the_rounded_weights():
    state = trained()
    again = trainer()
    assert state.history[0].selected == again.held_out()[0]
    again.take(dataclasses.replace(state, values=state.best))
    assert again.held_out()[0] == state.best_epoch.selected
    plain = trainer(dataclasses.replace(COURSE, fake_quant=False))
    plain.take(dataclasses.replace(state, values=state.best))
    assert plain.held_out()[0] != state.best_epoch.selected


def test_zeros_stay_zero_and_what_is_kept_is_not_rounded():
    _, model = coarse()
    state = trained()
    assert not state.best["w"][::3].any()
    assert (state.best["left"] != 0).all()
    again = rounded_values(with_values(model, state.best))
    assert all((again[name] != state.best[name]).any() for name in again)
    assert not again["w"][::3].any()


def test_a_run_goes_on_as_it_would_have():
    states = []
    whole = trainer().run(None, states.append, lambda epoch: None)
    rest = trainer().run(states[2], lambda state: None, lambda epoch: None)
    assert all(np.array_equal(rest.values[name], whole.values[name]) for name in whole.values)


def test_nothing_is_rounded_unless_asked_for(monkeypatch):
    plain = dataclasses.replace(COURSE, fake_quant=False, epochs=2)
    expected = trained(plain)
    monkeypatch.setattr(rounding, "nearest", None)
    monkeypatch.setattr(student, "straight_through", None)
    found = trained(plain)
    assert all(np.array_equal(found.values[name], expected.values[name]) for name in expected.values)
    with pytest.raises(TypeError):
        trained(dataclasses.replace(plain, fake_quant=True))
