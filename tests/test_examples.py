"""Which answers changed: counted here again, in the right order, with names and pictures of the samples."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import onnx_lrs
from onnx_lrs import Budget, CompareConfig, Config, Preprocess
from onnx_lrs.data import TensorSpec, open_samples
from onnx_lrs.images import thumbnail
from onnx_lrs.runtime.examples import EXAMPLES, Changed
from tests import small_nets as nets

COUNT = 60
TINY = Budget(params=0.06)  # so that answers change


def pictures(root: Path) -> Path:
    """Save pictures in class folders whose order on disk is not that of the classes' answers."""
    for number, pixels in enumerate(nets.pictures(COUNT, seed=3)):
        folder = root / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory) -> tuple[onnx_lrs.Result, Path]:
    folder = pictures(tmp_path_factory.mktemp("pictures"))
    config = Config(budget=TINY, threads=1, report=folder.parent / "page.html", multiple=1)
    data = nets.as_floats(nets.pictures(48))
    return onnx_lrs.compress(nets.conv_net(), data=data, test=folder, labels="folders", config=config), folder


def inputs_of(folder: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return what the model is fed, in the order of the samples, with file names and classes."""
    files = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).parts)
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    names = [file.relative_to(folder).as_posix() for file in files]
    return nets.as_floats(pixels), names, np.array([int(name[5]) for name in names])


def test_what_changed_is_what_both_models_answer(squeezed):
    result, folder = squeezed
    images, names, labels = inputs_of(folder)
    before, after = (nets.run(m, {"image": images})[0].astype(float) for m in (nets.conv_net(), result.model))
    first, second = before.argmax(axis=1), after.argmax(axis=1)
    (found,) = result.changes
    assert found.output == "logits"
    assert found.changed == np.sum(first != second) > 0
    assert found.lost == np.sum((first == labels) & (second != labels))
    assert found.won == np.sum((first != labels) & (second == labels))
    assert found.changed == round((1 - result.quality[0].top1_agreement) * COUNT)
    assert len(found.examples) == min(found.changed, EXAMPLES)
    for answer in found.examples:
        row = answer.sample
        assert answer.name == names[row]
        assert (answer.before, answer.after, answer.label) == (first[row], second[row], labels[row])
        texts = answer.before_text, answer.after_text, answer.label_text
        assert texts == tuple(f"class{n}" for n in (first[row], second[row], labels[row]))
        assert answer.before_scores == pytest.approx([before[row, first[row]], before[row, second[row]]], rel=1e-3)
        assert answer.after_scores == pytest.approx([after[row, first[row]], after[row, second[row]]], rel=1e-3)
        assert answer.before_scores[0] > answer.before_scores[1]
        assert answer.after_scores[0] < answer.after_scores[1]


def test_the_picture_of_a_sample_is_the_file(squeezed):
    result, folder = squeezed
    for answer in result.changes[0].examples:
        shown = np.asarray(Image.open(io.BytesIO(answer.thumbnail)).convert("RGB"), float)
        real = np.asarray(Image.open(folder / answer.name), float)
        assert shown.shape == real.shape
        assert np.abs(shown - real).mean() < 30  # JPEG of noise, half of its colours; another picture is off by 85
        assert len(answer.thumbnail) < 4000


def test_without_labels_and_files_numbers_have_to_do():
    data = nets.as_floats(nets.pictures(60))
    result = onnx_lrs.compress(nets.conv_net(), data=data, config=Config(budget=TINY, threads=1, multiple=1))
    (found,) = result.changes
    assert (found.lost, found.won) == (None, None)
    for answer in found.examples:
        assert (answer.name, answer.label, answer.before_text, answer.thumbnail) == ("", None, "", b"")


def test_only_outputs_with_classes_have_answers():
    config = Config(budget=Budget(params=0.3), threads=1)
    assert onnx_lrs.compress(nets.block(), data=nets.sentences(), config=config).changes == ()
    assert onnx_lrs.compress(nets.conv_net(), config=config).changes is None


def test_a_comparison_tells_what_changed_too(squeezed):
    result, folder = squeezed
    models = [nets.conv_net(), result.model]
    config = CompareConfig(rounds=20, threads=1)
    found = onnx_lrs.compare(models, data=folder, labels="folders", config=config)
    assert found.models[0].changes is None
    (ours,), (theirs,) = found.models[1].changes, result.changes
    assert (ours.changed, ours.lost, ours.won) == (theirs.changed, theirs.lost, theirs.won)
    assert [answer.name for answer in ours.examples] == [answer.name for answer in theirs.examples]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_same_is_found_however_the_samples_come(data):
    """In calls of any size: counts by hand, lost answers first, the clearest first."""
    count, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    x, y = rng.integers(0, 6, (2, count, classes)).astype(float)
    labels = rng.integers(0, classes, count) if data.draw(st.booleans()) else None
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    whole, parts = Changed("y"), Changed("y")
    whole.add(x, y, labels, np.arange(count))
    for rows in np.split(np.arange(count), cuts):
        if len(rows):
            parts.add(x[rows], y[rows], None if labels is None else labels[rows], rows)
    found = whole.changes()
    assert found == parts.changes()
    first, second = x.argmax(axis=1), y.argmax(axis=1)
    changed = [i for i in range(count) if first[i] != second[i]]
    lost = {i for i in changed if labels is not None and first[i] == labels[i]}
    margin = {i: x[i, first[i]] - x[i, second[i]] for i in changed}
    order = sorted(changed, key=lambda i: (i not in lost, -margin[i], i))
    assert [answer.sample for answer in found.examples] == order[:EXAMPLES]
    assert found.changed == len(changed)
    assert found.lost == (None if labels is None else len(lost))


# ------------------------------------------------------------------------------------------------ pictures


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), float)


@pytest.mark.parametrize(
    "preprocess",
    [
        None,
        Preprocess.from_preset("imagenet"),
        Preprocess.from_preset("caffe"),
        Preprocess.from_preset("raw"),
        Preprocess(mean=(0.5,), std=(0.25,), layout="NHWC"),
        Preprocess(channels="GRAY"),
    ],
    ids=["default", "imagenet", "caffe", "raw", "nhwc", "grey"],
)
def test_a_picture_is_what_it_was_before_it_was_an_input(preprocess, tmp_path):
    flat = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.png")
    grey = preprocess is not None and preprocess.channels == "GRAY"
    nhwc = preprocess is not None and preprocess.layout == "NHWC"
    depth = 1 if grey else 3
    shape = ("N", 32, 32, depth) if nhwc else ("N", depth, 32, 32)
    if preprocess is not None and preprocess.preset == "imagenet":
        preprocess = dataclasses.replace(preprocess, resize=32)
    with open_samples(tmp_path, [TensorSpec("x", np.dtype(np.float32), shape)], preprocess) as samples:
        shown = opened(samples.thumbnail(0, 0))
        assert samples.name_of(0) == "a.png"
    wanted = np.asarray(Image.fromarray(flat).convert("L"), float) if grey else flat
    assert shown.shape == wanted.shape
    inner = np.zeros((32, 32), bool)
    inner[3::8, 3::8] = inner[4::8, 4::8] = True  # away from the edges, which JPEG blurs
    assert np.abs(shown - wanted)[inner].mean() < 8


def test_numbers_that_are_a_picture_lie_between_black_and_white():
    ramp = np.linspace(-3, 7, 64, dtype=np.float32).repeat(32).reshape(1, 64, 32)
    shown = opened(thumbnail(ramp, None))
    assert shown.shape == (64, 32)
    assert (shown[0].max() < 12, shown[-1].min() > 243) == (True, True)
    assert np.all(np.diff(shown.mean(axis=1)) > -2)
    assert opened(thumbnail(np.zeros((1, 16, 16), np.float32), None)).max() == 0
    assert max(opened(thumbnail(np.ones((3, 500, 300), np.uint8), None)).shape) == 64


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 8, 8), np.float32), ((1, 4, 4), np.float32), ((1, 128, 8), np.float32), ((3, 16, 16), np.int64)],
)
def test_what_is_no_picture_has_none(shape, dtype):
    assert thumbnail(np.zeros(shape, dtype), None) == b""
