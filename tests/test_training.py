"""The training loop: oracles of its losses, planted students, and runs that go on where they were interrupted."""

import dataclasses

import numpy as np
import pytest
import scipy.special

torch = pytest.importorskip("torch")
pytest.importorskip("onnx2torch")

from onnx_lrs.config import Training  # noqa: E402
from onnx_lrs.graph.tuning import twin, with_values  # noqa: E402
from onnx_lrs.training import loop  # noqa: E402
from onnx_lrs.training.augment import layout_of, moved  # noqa: E402
from onnx_lrs.training.loop import Kept, Pool, Trainer, one_cycle  # noqa: E402
from onnx_lrs.training.losses import Goal, Loss, scores  # noqa: E402
from onnx_lrs.training.student import Student  # noqa: E402
from tests.builders import make, node, normal, run  # noqa: E402

COURSE = Training(epochs=6, train_batch=16, learning_rate=0.03, patience=20, autocast="off")


# ---------------------------------------------------------------- losses


def test_the_divergence_is_that_of_the_book():
    t, s = normal(5, 4, seed=1).astype(np.float64), normal(5, 4, seed=2).astype(np.float64)
    p, q = scipy.special.softmax(t / 4, 1), scipy.special.softmax(s / 4, 1)
    expected = 16 * (p * np.log(p / q)).sum(1).mean()
    found = Loss([Goal("y", "kl")], 4.0, 0.0)({"y": torch.tensor(s)}, {"y": torch.tensor(t)}, None)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_relative_error_is_that_of_the_result():
    t, s = normal(6, 3, 2, seed=1), normal(6, 3, 2, seed=2)
    goal = Goal("y", "l2", scale=float(np.square(t).sum() / len(t)))
    found = Loss([goal], 4.0, 0.0)({"y": torch.tensor(s)}, {"y": torch.tensor(t)}, None)
    assert float(found) == pytest.approx(np.square(s - t).sum() / np.square(t).sum(), rel=1e-5)


def test_labels_take_their_share():
    t, s = torch.tensor(normal(5, 4, seed=1)), torch.tensor(normal(5, 4, seed=2))
    labels, goals = torch.tensor([0, 3, 1, 2, 0]), [Goal("y", "kl", classes=True)]
    alone, of_labels, mixed = (Loss(goals, 2.0, share)({"y": s}, {"y": t}, labels) for share in (0, 1, 0.25))
    chosen = scipy.special.log_softmax(s.numpy(), 1)[np.arange(5), labels]
    assert float(of_labels) == pytest.approx(-chosen.mean(), rel=1e-5)
    assert float(mixed) == pytest.approx(0.75 * float(alone) + 0.25 * float(of_labels), rel=1e-5)


def test_labels_take_their_share_of_the_relative_error_of_scores_only():
    t, s, labels = torch.tensor(normal(5, 4, seed=1)), torch.tensor(normal(5, 4, seed=2)), torch.tensor([0, 3, 1, 2, 0])
    for classes in (True, False):
        goals = [Goal("y", "l2", classes=classes)]
        alone, of_labels, mixed = (float(Loss(goals, 2.0, share)({"y": s}, {"y": t}, labels)) for share in (0, 1, 0.25))
        assert (of_labels != alone) == classes
        assert mixed == pytest.approx(0.75 * alone + 0.25 * of_labels, rel=1e-5)


def test_probabilities_are_compared_as_the_scores_they_came_from():
    t, s = torch.tensor(normal(5, 4, seed=1)), torch.tensor(normal(5, 4, seed=2))
    of_scores = Loss([Goal("y", "kl")], 4.0, 0.0)({"y": s}, {"y": t}, None)
    softmax = torch.softmax
    of_softmax = Loss([Goal("y", "kl", probabilities=True)], 4.0, 0.0)({"y": softmax(s, 1)}, {"y": softmax(t, 1)}, None)
    assert float(of_softmax) == pytest.approx(float(of_scores), rel=1e-4)
    assert torch.isfinite(scores(torch.tensor([[0.0, 1.0]]), True)).all()


def test_a_student_that_agrees_has_no_loss():
    values = torch.tensor(normal(5, 4))
    for kind in ("kl", "l2"):
        assert float(Loss([Goal("y", kind)], 4.0, 0.0)({"y": values}, {"y": values}, None)) == pytest.approx(
            0, abs=1e-6
        )


# ---------------------------------------------------------------- augmentation


def test_every_image_is_a_shifted_and_perhaps_mirrored_one():
    images = torch.tensor(normal(40, 3, 16, 24))
    found = moved(images, "NCHW", torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (3, 3, 2, 2), mode="replicate")
    seen = set()
    for image, source in zip(found, padded, strict=True):
        matches = [
            (flip, row, column)
            for flip in (False, True)
            for row in range(5)
            for column in range(7)
            if torch.equal(image, shifted(source, row, column, flip))
        ]
        assert matches
        seen.update(matches)
    assert len(seen) > 20


def shifted(source, row, column, flip):
    window = source[:, row : row + 16, column : column + 24]
    return window.flip(2) if flip else window


def test_grey_images_are_not_mirrored():
    ramp = torch.arange(32.0).expand(20, 1, 32, 32)
    found = moved(ramp, "NCHW", torch.Generator().manual_seed(1))
    assert (found.diff(dim=3) >= 0).all()


def test_channels_may_come_last():
    images = torch.tensor(normal(6, 3, 16, 16))
    first = moved(images, "NCHW", torch.Generator().manual_seed(1))
    last = moved(images.permute(0, 2, 3, 1), "NHWC", torch.Generator().manual_seed(1))
    assert torch.equal(first, last.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 3, 32, 32), "NCHW"), ((8, 32, 32, 1), "NHWC"), ((8, 3), None), ((8, 64, 7, 7), None), ((8, 3, 4), None)],
)
def test_what_counts_as_an_image(shape, expected):
    assert layout_of(shape) == expected


# ---------------------------------------------------------------- the loop


def teacher_model():
    constants = {"w1": normal(24, 8, seed=1), "b1": normal(24), "w2": normal(5, 24, seed=2)}
    nodes = [node("Gemm", ["x", "w1", "b1"], ["h"], transB=1), node("Relu", ["h"], ["r"])]
    return make([*nodes, node("Gemm", ["r", "w2"], ["y"], transB=1)], {"x": ("N", 8)}, ["y"], constants)


def pool(rows, joined=True):
    return Pool([{"x": row[None]} for row in rows], None, joined)


def trainer(training=COURSE, noise=0.3, half=False, seed=0):
    """A student that is its teacher with noise on the weights, one of them half zero."""
    teacher = teacher_model()
    found = {t.name: t.values + noise * normal(*t.values.shape, seed=9) for t in twin(teacher).tunables}
    found["w2"][:, ::2] = 0
    pools = tuple(pool(normal(count, 8, seed=seed)) for count, seed in ((128, 3), (40, 4)))

    def teach(feed):
        return {"y": run(teacher, feed)[0]}

    model = with_values(teacher, found)
    loss = Loss([Goal("y", "kl", classes=True)], 2.0, 0.0)
    return Trainer(Student(twin(model), ["y"]), teach, loss, pools, training, seed)


def course(training=COURSE, state=None, keep=lambda state: None, tell=lambda epoch: None):
    trained = trainer(training)
    return trained, trained.run(state, keep, tell)


def test_a_student_comes_near_its_teacher_and_zeros_stay():
    trained, state = course()
    first, best = state.history[0].selected, state.best_epoch.selected
    assert best < 0.5 * first
    assert not state.best["w2"][:, ::2].any()
    assert state.best["w2"][:, 1::2].all()
    assert trained.ended == "epochs"
    assert [epoch.number for epoch in state.history] == list(range(7))
    assert state.best_epoch.agreement > state.history[0].agreement


def test_the_best_weights_are_those_of_the_best_epoch():
    states = []
    _, last = course(dataclasses.replace(COURSE, learning_rate=0.5, epochs=8), keep=states.append)
    number = last.best_epoch.number
    expected = states[number - 1].values if number else trainer().student.values
    assert all(np.array_equal(last.best[name], expected[name]) for name in expected)


def test_a_run_that_goes_on_does_what_it_would_have_done():
    states = []
    _, whole = course(keep=states.append)
    for done in (1, 4):
        _, rest = course(state=states[done - 1])
        assert all(np.array_equal(rest.values[name], whole.values[name]) for name in whole.values)
        assert [e.selected for e in rest.history] == [e.selected for e in whole.history]


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_an_interruption_keeps_the_best_so_far(error, monkeypatch):
    states = []
    _, whole = course(keep=states.append)
    trained, calls = trainer(), []
    step = trained._step

    def third(items, generator):
        calls.append(None)
        if len(calls) > 20:
            raise error
        return step(items, generator)

    monkeypatch.setattr(trained, "_step", third)
    state = trained.run(None, lambda state: None, lambda epoch: None)
    assert trained.ended == ("interrupted" if error is KeyboardInterrupt else "diverged")
    assert [e.selected for e in state.history] == [e.selected for e in whole.history][:3]
    assert all(np.array_equal(state.best[name], states[1].best[name]) for name in state.best)


def test_a_loss_that_is_not_finite_ends_the_run():
    trained, state = course(dataclasses.replace(COURSE, learning_rate=1e30))
    assert trained.ended == "diverged"
    assert all(np.isfinite(values).all() for values in state.best.values())


def test_without_a_gain_the_run_ends():
    trained, state = course(dataclasses.replace(COURSE, learning_rate=2.0, epochs=30, patience=3))
    assert trained.ended == "no gain"
    assert state.history[-1].number == state.best_epoch.number + 3


def test_the_time_limit_ends_the_run_with_a_low_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    trained = trainer(dataclasses.replace(COURSE, epochs=1000, minutes=1.0))
    rates, step = [], trained._step

    def slow(items, generator):
        now[0] += 1.0
        rates.append(trained._optimiser.param_groups[0]["lr"] / trained._optimiser.param_groups[0]["scale"])
        return step(items, generator)

    monkeypatch.setattr(trained, "_step", slow)
    trained.run(None, lambda state: None, lambda epoch: None)
    assert trained.ended == "time"
    assert 58 <= len(rates) <= 61
    assert max(rates) == pytest.approx(COURSE.learning_rate, rel=1e-3)
    assert rates[-1] < 0.01 * COURSE.learning_rate


def test_the_rate_rises_and_falls():
    rates = [one_cycle(share) for share in np.linspace(0, 1, 201)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1)
    assert all(np.diff(rates[: top + 1]) >= 0)
    assert all(np.diff(rates[top:]) <= 0)
    assert rates[-1] < rates[0] < 0.1


def test_steps_are_in_units_of_what_they_change():
    """Ten times the weights and a tenth of the input: the same course."""
    found = []
    for factor in (1.0, 10.0):
        teacher = teacher_model()
        noisy = {t.name: t.values + 0.3 * normal(*t.values.shape, seed=9) for t in twin(teacher).tunables}
        noisy["w1"] *= np.float32(factor)
        pools = tuple(pool(normal(count, 8, seed=count) / np.float32(factor)) for count in (64, 32))

        def teach(feed, teacher=teacher, factor=factor):
            return {"y": run(teacher, {"x": feed["x"] * np.float32(factor)})[0]}

        student = Student(twin(with_values(teacher, noisy)), ["y"])
        trained = Trainer(student, teach, Loss([Goal("y", "kl")], 2.0, 0.0), pools, COURSE, 0)
        found.append([e.selected for e in trained.run(None, lambda s: None, lambda e: None).history])
    np.testing.assert_allclose(found[0], found[1], rtol=2e-2)


def test_samples_that_cannot_be_joined_go_through_one_by_one():
    both = []
    for joined in (True, False):
        trained = trainer(dataclasses.replace(COURSE, epochs=1))
        trained._pool = dataclasses.replace(trained._pool, joined=joined)
        trained.run(None, lambda state: None, lambda epoch: None)
        both.append(trained.student.values)
    for name in both[0]:
        np.testing.assert_allclose(both[0][name], both[1][name], rtol=1e-3, atol=1e-4)


def test_samples_of_one_shape_are_joined_and_labels_stay_with_them():
    shapes = [(1, 4, 2), (1, 5, 2), (1, 4, 2), (2, 4, 2), (1, 4, 2)]
    feeds = [{"x": np.full(shape, i, np.float32)} for i, shape in enumerate(shapes)]
    labels = [np.full(len(feed["x"]), i) for i, feed in enumerate(feeds)]
    found = list(Pool(feeds, labels, True).batches([4, 0, 1, 3, 2], 2))
    assert [batch.labels.tolist() for batch in found] == [[4, 0], [2], [1], [3, 3]]
    assert [batch.samples for batch in found] == [2, 1, 1, 1]
    for batch in found:
        assert (batch.feed["x"] == batch.labels[:, None, None]).all()


def test_samples_stay_in_memory_as_long_as_there_is_room():
    read = []

    def item(number):
        read.append(number)
        return {"x": np.full((1, 10), number, np.float32)}

    kept = Kept(item, [7, 3, 5], 80)
    for _ in range(2):
        assert [feed["x"][0, 0] for feed in kept] == [7, 3, 5]
    assert read == [7, 3, 5, 5]
