"""Calibration data: every source gives the same samples, and every misuse is a DataError that says what to do."""

import dataclasses
import gc
import itertools
import os
import pickle
import tempfile
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnx_lrs import data
from onnx_lrs.config import Preprocess
from onnx_lrs.data import Dataset, TensorSpec, batches, open_labels, open_samples, random_samples, split
from onnx_lrs.errors import ConfigError, DataError


def spec(name="x", dtype=np.float32, shape=("N", 4)):
    return TensorSpec(name, np.dtype(dtype), shape)


X = spec()
IMAGE = spec(shape=("N", 3, 8, 8))
TWO = (spec("ids", np.int64, ("N", 5)), spec("mask", np.float32, ("N", 5)))


def table(rows=6, width=4, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def photos(count=6, height=8, width=8, seed=0, channels=3):
    shape = (count, height, width, channels) if channels > 1 else (count, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def two(rows=6):
    return {"ids": np.arange(rows * 5).reshape(rows, 5), "mask": table(rows, 5)}


def items(samples):
    return [samples.item(index) for index in range(len(samples))]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


class Reader:
    """Behaves like ONNX Runtime's CalibrationDataReader."""

    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


class Loader:
    """Re-iterable without being a list."""

    def __init__(self, feeds):
        self.feeds = feeds

    def __iter__(self):
        return iter(self.feeds)


def one_row_feeds(arrays):
    rows = len(next(iter(arrays.values())))
    return [{name: values[row : row + 1] for name, values in arrays.items()} for row in range(rows)]


def sources(arrays, folder):
    """Every way to give the same rows."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    feeds = one_row_feeds(arrays)
    yield "npz", folder / "plain.npz"
    yield "packed", str(folder / "packed.npz")
    yield "mapping", arrays
    yield "list", feeds
    yield "tuple", tuple(feeds)
    yield "loader", Loader(feeds)
    yield "generator", (feed for feed in feeds)
    yield "dataset", Dataset(range(len(feeds)), lambda row: feeds[row])
    yield "identity dataset", Dataset(feeds)
    yield "reader", Reader(feeds)
    yield "fortran", {name: np.asfortranarray(values) for name, values in arrays.items()}
    yield "big endian", {name: values.astype(values.dtype.newbyteorder(">")) for name, values in arrays.items()}
    if len(arrays) == 1:
        values = next(iter(arrays.values()))
        np.save(folder / "a.npy", values)
        yield "npy", folder / "a.npy"
        yield "array", values
        yield "other name", {"whatever": values}
        yield "bare arrays", [values[row : row + 1] for row in range(len(values))]
        yield "bare transform", Dataset(range(len(values)), lambda row: values[row : row + 1])
        yield "float64", values.astype(np.float64)


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(("inputs", "arrays"), [((X,), {"x": table()}), (TWO, two())])
def test_every_source_gives_the_same_samples(tmp_path, inputs, arrays):
    expected = one_row_feeds(arrays)
    for name, source in sources(arrays, tmp_path):
        with open_samples(source, inputs, None) as samples:
            assert_same(items(samples), expected)
            assert_same([samples.item(3)], expected[3:4])  # random access, again
            assert [samples.rows(i) for i in range(len(samples))] == [1] * 6, name
            assert (samples.row_count, samples.total_rows) == (6, 6)
            assert samples.labels is None
            assert samples.preprocess is None
            assert not samples.guessed
            assert samples.description
            assert all(values.flags.c_contiguous for values in samples.item(0).values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6), st.integers(0, 99))
def test_one_shot_generator_equals_list_for_varying_shapes(shapes, seed):
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.standard_normal((rows, width)).astype(np.float32)} for rows, width in shapes]
    inputs = [spec(shape=("N", "W"))]
    listed = open_samples(feeds, inputs, None)
    with open_samples((feed for feed in feeds), inputs, None) as streamed:
        assert_same(items(streamed), items(listed))
        assert [streamed.rows(i) for i in range(len(feeds))] == [rows for rows, _ in shapes]
        assert streamed.total_rows == sum(rows for rows, _ in shapes)


def test_values_are_cast_when_that_is_exact():
    assert open_samples(np.arange(8).reshape(2, 4), [X], None).item(1)["x"].dtype == np.float32
    assert open_samples(np.ones((2, 4), bool), [X], None).item(0)["x"].sum() == 4
    ids = spec(dtype=np.int32)
    assert open_samples(np.arange(8).reshape(2, 4), [ids], None).item(0)["x"].dtype == np.int32
    assert open_samples([{"x": [[1, 2, 3, 4]]}], [X], None).item(0)["x"].shape == (1, 4)


def test_items_cannot_be_changed_through_a_view():
    values = table()
    feed = open_samples(values, [X], None).item(0)["x"]
    assert np.shares_memory(feed, values)
    with pytest.raises(ValueError, match="read-only"):
        feed[0, 0] = 1.0
    values[0, 0] = 2.0  # the caller's own array stays writeable


def test_npy_is_mapped_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", table())
    feed = open_samples(tmp_path / "a.npy", [X], None).item(2)["x"]
    base = feed
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


def test_scalar_input_of_an_iterable():
    inputs = [X, spec("scale", np.float32, ())]
    feeds = [{"x": table(2), "scale": np.float32(3.0)}]
    for source in (feeds, Loader(feeds)):
        with open_samples(source, inputs, None) as samples:
            assert samples.item(0)["scale"].shape == ()
            assert samples.rows(0) == 2
    with pytest.raises(DataError, match="scalar"):
        open_samples({"x": table(2), "scale": np.ones(2, np.float32)}, inputs, None)


def test_only_what_is_asked_for_is_unpacked_from_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x=table(), extra=table(), labels=np.arange(6))
    with open_samples(tmp_path / "a.npz", [X], None) as samples:
        np.testing.assert_array_equal(samples.labels, np.arange(6))
        assert "ignored: extra" in samples.description
        assert samples.class_names == ()


def test_labels_is_an_input_where_the_model_has_one_so_named():
    inputs = (X, spec("labels", np.int64, ("N",)))
    samples = open_samples({"x": table(), "labels": np.arange(6)}, inputs, None)
    assert samples.labels is None
    assert samples.item(4)["labels"] == 4


def test_single_array_beside_labels_needs_no_name(tmp_path):
    np.savez(tmp_path / "a.npz", pixels=table(), labels=np.arange(6))
    with open_samples(tmp_path / "a.npz", [X], None) as samples:
        assert len(samples) == 6
        assert samples.labels is not None


def test_index_outside_is_an_index_error():
    samples = open_samples(table(), [X], None)
    for index in (-1, 6):
        with pytest.raises(IndexError):
            samples.item(index)
        with pytest.raises(IndexError):
            samples.rows(index)


# -------------------------------------------------------------------------------------------------------- static batch


@pytest.mark.parametrize(("rows", "kept"), [(8, 8), (9, 8), (11, 8), (4, 4)])
def test_static_batch_cuts_rows_into_chunks(rows, kept):
    values = table(rows)
    samples = open_samples({"x": values, "labels": np.arange(rows)}, [spec(shape=(4, 4))], None)
    assert len(samples) == kept // 4
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in items(samples)]), values[:kept])
    assert samples.rows(0) == 4
    assert (samples.row_count, samples.total_rows) == (kept, rows)
    np.testing.assert_array_equal(samples.labels, np.arange(kept))
    assert (f"{rows - kept} of {rows} samples dropped" in samples.description) == (kept < rows)


def test_static_batch_of_images(tmp_path):
    for number, pixels in enumerate(photos(5)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    with open_samples(tmp_path, [spec(shape=(2, 3, 8, 8))], None) as samples:
        assert len(samples) == 2
        assert samples.item(1)["x"].shape == (2, 3, 8, 8)
        assert "1 of 5 images dropped" in samples.description


def test_fewer_rows_than_the_static_batch():
    with pytest.raises(DataError, match="batch of 8"):
        open_samples(table(6), [spec(shape=(8, 4))], None)


def test_iterable_items_must_have_the_static_batch():
    assert open_samples([{"x": table(8)}], [spec(shape=(8, 4))], None).rows(0) == 8
    with pytest.raises(DataError, match="Item 1"):
        open_samples([{"x": table(8)}, {"x": table(7)}], [spec(shape=(8, 4))], None)


def test_inputs_with_different_static_batches():
    inputs = [spec("a", shape=(1, 4)), spec("b", shape=(2, 4))]
    with pytest.raises(DataError, match="first dimension"):
        open_samples({"a": table(), "b": table()}, inputs, None)


# -------------------------------------------------------------------------------------------------------------- images


def fill(folder, pixels, names):
    for name, image in zip(names, pixels, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def test_folder_array_npy_and_npz_of_images_agree(tmp_path):
    pixels = photos(4, 11, 9)
    folder = tmp_path / "calibration"
    fill(folder, pixels, [f"{n}.png" for n in range(4)])
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", whatever=pixels)
    chosen = Preprocess(mean=(0.5,), std=(0.2, 0.3, 0.4), channels="BGR", layout="NCHW")
    for preprocess in (None, chosen):
        opened = [
            open_samples(s, [IMAGE], preprocess) for s in (folder, tmp_path / "a.npy", tmp_path / "a.npz", pixels)
        ]
        planar = open_samples(np.moveaxis(pixels, 3, 1), [IMAGE], chosen)
        for samples in opened[1:]:
            assert_same(items(samples), items(opened[0]))
        for samples in opened:
            assert samples.guessed == (preprocess is None)
            assert samples.preprocess.crop == (8, 8)
            samples.close()
    assert_same(items(planar), items(opened[-1]))


def test_description_of_a_folder(tmp_path):
    fill(tmp_path, photos(3), ["a.png", "b.png", "c.png"])
    samples = open_samples(tmp_path, [IMAGE], None)
    assert samples.description == f"folder {tmp_path}{os.sep}: 3 images, RGB 8x8, NCHW, scaled to 0..1"
    assert samples.guessed
    assert samples.labels is None
    assert not open_samples(tmp_path, [IMAGE], Preprocess()).guessed
    assert open_samples(tmp_path, [IMAGE], Preprocess(preset="default")).guessed


def test_class_folders_become_labels(tmp_path):
    fill(tmp_path, photos(4), ["dog/1.png", "cat/x/2.png", "cat/1.png", "owl/1.png"])
    (tmp_path / "cow").mkdir()  # no image of this class, but it keeps its number
    samples = open_samples(tmp_path, [IMAGE], None)
    assert samples.class_names == ("cat", "cow", "dog", "owl")
    np.testing.assert_array_equal(samples.labels, [0, 0, 2, 3])
    np.testing.assert_array_equal(open_labels("folders", samples), [0, 0, 2, 3])
    fill(tmp_path, photos(1), ["stray.png"])
    assert open_samples(tmp_path, [IMAGE], None).labels is None


def test_grey_planes_are_images():
    planes = photos(3, channels=1)
    samples = open_samples(planes, [spec(shape=(1, 1, 8, 8))], None)
    np.testing.assert_allclose(samples.item(1)["x"][0, 0], planes[1] / 255, rtol=1e-6)
    assert samples.guessed


def test_uint8_planar_array_is_cast_as_it_is_unless_preprocessing_is_named():
    planar = np.moveaxis(photos(3), 3, 1)
    samples = open_samples(planar, [IMAGE], None)
    np.testing.assert_array_equal(samples.item(2)["x"][0], planar[2].astype(np.float32))
    assert not samples.guessed
    assert samples.preprocess is None
    assert "uint8 (3, 8, 8) cast to float32 as it is, not scaled" in samples.description
    named = open_samples(planar, [IMAGE], Preprocess())
    np.testing.assert_allclose(named.item(2)["x"][0], planar[2] / 255, rtol=1e-6)


def test_float_array_of_images_is_used_as_it_is():
    values = np.random.default_rng(0).random((3, 3, 8, 8)).astype(np.float32)
    samples = open_samples(values, [IMAGE], Preprocess(mean=(9.0,)))
    np.testing.assert_array_equal(samples.item(1)["x"][0], values[1])
    assert samples.preprocess is None
    assert "do not apply" in samples.description


def test_uint8_input_takes_a_fitting_array_as_it_is():
    pixels = photos(3)
    samples = open_samples(pixels, [spec(dtype=np.uint8, shape=("N", 8, 8, 3))], None)
    np.testing.assert_array_equal(samples.item(1)["x"][0], pixels[1])
    assert not samples.guessed


def test_images_beside_another_input():
    inputs = (IMAGE, spec("angle", shape=("N", 1)))
    samples = open_samples({"x": photos(), "angle": table(6, 1)}, inputs, None)
    assert samples.item(5)["x"].shape == (1, 3, 8, 8)
    assert samples.guessed


def test_dynamic_image_size(tmp_path):
    inputs = [spec(shape=("N", 3, "h", "w"))]
    fill(tmp_path, photos(2, 7, 9), ["a.png", "b.png"])
    assert open_samples(tmp_path, inputs, None).item(0)["x"].shape == (1, 3, 7, 9)
    assert open_samples(photos(2, 7, 9), inputs, None).item(0)["x"].shape == (1, 3, 7, 9)
    fill(tmp_path, photos(1, 9, 7), ["c.png"])
    with pytest.raises(DataError, match="--resize HxW"):
        open_samples(tmp_path, inputs, None)
    assert open_samples(tmp_path, inputs, Preprocess(resize=(6, 6))).item(2)["x"].shape == (1, 3, 6, 6)


def test_mean_of_wrong_length_is_named():
    with pytest.raises(ConfigError, match="--mean has 2"):
        open_samples(photos(), [IMAGE], Preprocess(mean=(0.1, 0.2)))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["nowhere", "nowhere.npy"])
def test_missing_path(tmp_path, name):
    with pytest.raises(DataError, match="does not exist"):
        open_samples(tmp_path / name, [IMAGE], None)


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="holds no image") as caught:
        open_samples(tmp_path, [IMAGE], None)
    assert "jpg" in caught.value.remedy


def test_unreadable_image_names_the_file(tmp_path):
    fill(tmp_path, photos(1), ["a.png"])
    (tmp_path / "b.png").write_bytes(b"nonsense")
    samples = open_samples(tmp_path, [IMAGE], None)
    samples.item(0)
    with pytest.raises(DataError, match=r"b\.png"):
        samples.item(1)


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jpg", "a"])
def test_unknown_extension(tmp_path, name):
    (tmp_path / name).write_text("1,2")
    with pytest.raises(DataError, match="unknown extension") as caught:
        open_samples(tmp_path / name, [X], None)
    assert all(word in caught.value.remedy for word in (".npy", ".npz", "folder"))


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return os.putenv, ("ONNX_LRS_TRAP", "1")


def test_pickles_are_refused_without_being_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("unpickled"))
    np.save(tmp_path / "a.npy", np.array([Trap(), None], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([Trap(), None], object))
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(DataError, match="cannot be read") as caught:
            open_samples(tmp_path / name, [X], None)
        assert "object arrays are refused" in caught.value.remedy


def test_damaged_array_files(tmp_path):
    np.save(tmp_path / "a.npy", table(400))
    np.savez(tmp_path / "a.npz", x=table(400))
    for name in ("a.npy", "a.npz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=name):
            open_samples(tmp_path / name, [X], None)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    (tmp_path / "c.npz").write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"c\.npz"):
        open_samples(tmp_path / "c.npz", [X], None)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.npy"):
        open_samples(tmp_path / "empty.npy", [X], None)


def wrong_names(tmp_path):
    np.savez(tmp_path / "a.npz", a=table(), b=table())
    yield tmp_path / "a.npz"
    yield {"a": table(), "b": table()}
    yield [{"a": table(1), "b": table(1)}]
    yield iter([{"a": table(1), "b": table(1)}])
    yield Reader([{"a": table(1), "b": table(1)}])


@pytest.mark.parametrize("inputs", [(X,), TWO])
def test_wrong_names_list_both_sides(tmp_path, inputs):
    for source in wrong_names(tmp_path):
        with pytest.raises(DataError, match="a, b") as caught:
            open_samples(source, inputs, None)
        assert all(one.name in caught.value.message for one in inputs)


def test_missing_and_unknown_inputs_of_an_item():
    with pytest.raises(DataError, match="missing: mask"):
        open_samples([{"ids": two(1)["ids"]}], TWO, None)
    with pytest.raises(DataError, match="missing: mask"):
        open_samples({"ids": two(1)["ids"], "labels": np.zeros(1, int)}, TWO, None)
    with pytest.raises(DataError, match="unknown: y"):
        open_samples([{"x": table(1), "y": table(1)}], [X], None)


def test_wrong_shape_says_input_expected_and_got():
    with pytest.raises(DataError, match=r"Item 1: input 'x' takes shape \(N, 4\), but the data has shape \(1, 5\)"):
        open_samples([{"x": table(1)}, {"x": table(1, 5)}], [X], None)
    with pytest.raises(DataError, match=r"array: input 'x' takes shape \(N, 4\).*\(6, 5\)"):
        open_samples(table(6, 5), [X], None)
    with pytest.raises(DataError, match="Item 0") as caught:
        open_samples(iter([table()[0]]), [X], None)
    assert "leading batch dimension" in caught.value.remedy
    with pytest.raises(DataError, match="input 'x'"):
        open_samples(np.float32(3.0), [X], None)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.int64, table()),
        (np.float32, np.array([["a"] * 4])),
        (np.float32, np.array([[object()] * 4])),
        (np.float32, np.ones((2, 4), complex)),
        (np.bool_, np.ones((2, 4), np.int64)),
    ],
)
def test_wrong_dtype(dtype, values):
    for source in (values, [{"x": values}], iter([{"x": values}])):
        with pytest.raises(DataError, match="takes"):
            open_samples(source, [spec(dtype=dtype)], None)


def test_values_outside_the_inputs_dtype():
    big = np.full((3, 4), 2**24 + 1)
    with pytest.raises(DataError, match="16777216"):
        open_samples(big, [X], None).item(0)
    with pytest.raises(DataError, match="uint8"):
        open_samples([{"x": np.array([[-1, 0, 0, 0]])}], [spec(dtype=np.uint8)], None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_item_and_input(bad):
    values = table()
    values[2, 1] = bad
    for source in (values, one_row_feeds({"x": values}), Loader(one_row_feeds({"x": values}))):
        with open_samples(source, [X], None) as samples:
            samples.item(1)
            with pytest.raises(DataError, match="Item 2, input 'x': 1 of 4"):
                samples.item(2)


def test_float16_overflow_is_reported_not_warned():
    samples = open_samples(np.full((1, 4), 1e6), [spec(dtype=np.float16)], None)
    with pytest.raises(DataError, match="as float16"):
        samples.item(0)


def test_several_inputs_and_one_array(tmp_path):
    np.save(tmp_path / "a.npy", table())
    fill(tmp_path / "images", photos(1), ["a.png"])
    for source in (table(), tmp_path / "a.npy", tmp_path / "images", [table(1)]):
        with pytest.raises(DataError, match="2 inputs") as caught:
            open_samples(source, TWO, None)
        assert ".npz" in caught.value.remedy


def test_arrays_of_different_length():
    with pytest.raises(DataError, match="ids 6, mask 5"):
        open_samples({"ids": two(6)["ids"], "mask": two(5)["mask"]}, TWO, None)


@pytest.mark.parametrize(
    "source", [[], (), iter([]), Reader([]), np.zeros((0, 4), np.float32), {"x": np.zeros((0, 4))}]
)
def test_no_samples(source):
    with pytest.raises(DataError):
        open_samples(source, [X], None)


def test_item_without_rows():
    with pytest.raises(DataError, match="no rows"):
        open_samples([{"x": table(0)}], [X], None)


@pytest.mark.parametrize("item", [(table(1), 3), "file.png", 5, [[1.0, 2.0, 3.0, 4.0]]])
def test_item_that_is_no_feed(item):
    with pytest.raises(DataError, match="not a dict") as caught:
        open_samples([item], [X], None)
    assert "transform" in caught.value.remedy


@pytest.mark.parametrize("source", [5, None, b"bytes", object()])
def test_unsupported_type(source):
    with pytest.raises(DataError, match="not supported"):
        open_samples(source, [X], None)


def test_ragged_values():
    with pytest.raises(DataError, match="not an array"):
        open_samples([{"x": [[1.0, 2.0], [3.0]]}], [X], None)


def test_model_without_usable_inputs():
    with pytest.raises(DataError, match="no inputs"):
        open_samples(table(), [], None)
    with pytest.raises(DataError, match="dtype"):
        open_samples(table(), [spec(dtype=np.str_)], None)


def test_errors_of_the_users_iterable_pass_through():
    def broken():
        yield {"x": table(1)}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_samples(broken(), [X], None)


# --------------------------------------------------------------------------------------------------------------- spool


def test_stream_is_not_held_in_memory():
    alive = []

    def stream():
        for row in range(20):
            gc.collect()
            assert sum(reference() is not None for reference in alive) <= 1  # the one just handed over
            values = table(1, seed=row)
            alive.append(weakref.ref(values))
            yield {"x": values}

    with open_samples(stream(), [X], None) as samples:
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        held = [value for value in vars(samples.store).values() if isinstance(value, np.ndarray | dict)]
        assert held == []
        assert samples.item(7)["x"][0, 0] == table(1, seed=7)[0, 0]


def test_closing_and_errors_close_the_temporary_file(monkeypatch):
    opened = []
    make = tempfile.TemporaryFile

    def recording(**options):
        opened.append(make(**options))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", recording)
    with open_samples(iter([{"x": table(1)}]), [X], None):
        assert not opened[0].closed
    with pytest.raises(DataError):
        open_samples(iter([{"x": table(1)}, {"x": table(1, 5)}]), [X], None)
    with pytest.raises(DataError):
        open_samples(iter([]), [X], None)
    assert [file.closed for file in opened] == [True] * 3


def test_npz_temporary_files_are_closed(tmp_path, monkeypatch):
    opened = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **o: opened.append(make(**o)) or opened[-1])
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 9, 9, 9, 9), np.float32))
    with pytest.raises(DataError):
        open_samples(tmp_path / "a.npz", [X], None)
    np.savez(tmp_path / "b.npz", x=table())
    with open_samples(tmp_path / "b.npz", [X], None) as samples:
        assert not opened[-1].closed
        samples.item(5)
    assert len(opened) == 2
    assert all(file.closed for file in opened)


def test_full_disk_says_where(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.npy_format, "write_array", full)
    with pytest.raises(DataError, match="No space left") as caught:
        open_samples(iter([{"x": table(1)}]), [X], None)
    assert "TMPDIR" in caught.value.remedy


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_from_every_source(tmp_path):
    samples = open_samples(table(), [X], None)
    expected = np.array([0, 1, 2, 0, 1, 2])
    np.save(tmp_path / "l.npy", expected.astype(np.int32))
    np.savez(tmp_path / "l.npz", labels=expected)
    for source in (expected, expected.tolist(), expected.astype(np.uint8), tmp_path / "l.npy", str(tmp_path / "l.npz")):
        got = open_labels(source, samples)
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected)
    assert open_labels(None, samples) is None


def test_labels_may_cover_dropped_rows():
    samples = open_samples(table(7), [spec(shape=(3, 4))], None)
    for count in (6, 7):
        np.testing.assert_array_equal(open_labels(np.arange(count), samples), np.arange(6))
    with pytest.raises(DataError, match="7 rows"):
        open_labels(np.arange(5), samples)


def test_labels_of_a_stream_count_rows_not_items():
    with open_samples(iter([{"x": table(2)}, {"x": table(3)}]), [X], None) as samples:
        assert len(open_labels(np.arange(5), samples)) == 5
        with pytest.raises(DataError, match="5 rows"):
            open_labels(np.arange(2), samples)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (np.arange(5), "6 rows"),
        (np.eye(6, dtype=int), "6 rows"),
        (np.arange(6.0), "float64"),
        (np.array(list("abcdef")), "integers"),
        (np.array([0, 1, -1, 0, 0, 0]), "-1"),
        ("folders", "no class sub-folders"),
        ("nowhere.npy", "not a file"),
        ([[1], [1, 2]], "not an array"),
    ],
)
def test_wrong_labels(labels, match):
    with pytest.raises(DataError, match=match):
        open_labels(labels, open_samples(table(), [X], None))


def test_label_files_of_the_wrong_kind(tmp_path):
    samples = open_samples(table(), [X], None)
    np.savez(tmp_path / "l.npz", y=np.arange(6))
    (tmp_path / "l.csv").write_text("1")
    with pytest.raises(DataError, match="no array 'labels'; it holds y"):
        open_labels(tmp_path / "l.npz", samples)
    with pytest.raises(DataError, match=r"\.csv"):
        open_labels(tmp_path / "l.csv", samples)


# --------------------------------------------------------------------------------------------------------------- split


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 500), st.floats(0.001, 0.9), st.integers(0, 2**32))
def test_split_invariants(count, holdout, seed):
    parts = split(count, holdout, seed)
    arrays = (parts.fit, parts.select, parts.held_out)
    assert all(part.dtype == np.int64 and len(part) >= 1 for part in arrays)
    assert all((np.diff(part) > 0).all() for part in arrays)
    np.testing.assert_array_equal(np.sort(np.concatenate(arrays)), np.arange(count))
    np.testing.assert_array_equal(parts.fit_and_select, np.setdiff1d(np.arange(count), parts.held_out))
    again = split(count, holdout, seed)
    assert all((a == b).all() for a, b in zip(arrays, (again.fit, again.select, again.held_out), strict=True))
    if count >= 20 and 0.05 <= holdout <= 0.8:
        assert len(parts.held_out) == round(holdout * count)
        assert len(parts.select) == max(1, round(0.2 * (count - len(parts.held_out))))


def test_split_depends_on_the_seed():
    assert (split(100, 0.2, 0).held_out != split(100, 0.2, 1).held_out).any()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_split_needs_three(count):
    with pytest.raises(DataError, match="at least 3"):
        split(count, 0.2, 0)


def test_split_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        split(5, 0.2, 0).fit = np.arange(2)


# ------------------------------------------------------------------------------------------------------------- batches


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_batches_join_items_in_order(shapes, size, dynamic, random):
    rng = np.random.default_rng(len(shapes))
    feeds = [{"x": rng.standard_normal((rows, width)).astype(np.float32)} for rows, width in shapes]
    samples = open_samples(feeds, [spec(shape=("N", "W"))], None)
    order = list(range(len(feeds)))
    random.shuffle(order)
    seen = []
    for indexes, feed in batches(samples, np.array(order), size, dynamic):
        assert indexes.dtype == np.int64
        assert len(indexes) == 1 or (dynamic and len(feed["x"]) <= size)
        np.testing.assert_array_equal(feed["x"], np.concatenate([feeds[i]["x"] for i in indexes]))
        seen.append(indexes.tolist())
    assert list(itertools.chain.from_iterable(seen)) == order
    if dynamic:  # greedy: a batch ends only when it is full or the next item has another width
        for left, right in itertools.pairwise(seen):
            rows = sum(shapes[i][0] for i in (*left, right[0]))
            assert rows > size or shapes[left[0]][1] != shapes[right[0]][1]


def test_batch_sizes_of_uniform_items():
    samples = open_samples(two(7), TWO, None)
    got = list(batches(samples, range(7), 3, True))
    assert [indexes.tolist() for indexes, _ in got] == [[0, 1, 2], [3, 4, 5], [6]]
    np.testing.assert_array_equal(np.concatenate([feed["ids"] for _, feed in got]), two(7)["ids"])
    assert list(batches(samples, [], 3, True)) == []


def test_items_with_an_input_that_has_no_rows_are_not_joined():
    inputs = [X, spec("table", shape=("K", 2))]
    feeds = [{"x": table(1), "table": table(5, 2)} for _ in range(3)]
    samples = open_samples(feeds, inputs, None)
    assert [len(indexes) for indexes, _ in batches(samples, range(3), 3, True)] == [1, 1, 1]


def test_single_item_batches_are_not_copied():
    values = table()
    samples = open_samples(values, [X], None)
    assert all(np.shares_memory(feed["x"], values) for _, feed in batches(samples, range(6), 4, False))


# -------------------------------------------------------------------------------------------------------------- random


def test_random_samples():
    inputs = (
        spec("x", np.float32, ("N", 3, "h", 5)),
        spec("ids", np.int64, (2, 7)),
        spec("flag", np.bool_, (None, 1)),
        spec("half", np.float16, ()),
    )
    samples = random_samples(inputs, {"x": (2, 3, 4, 5)}, 9, 3)
    assert len(samples) == 9
    feed = samples.item(4)
    assert [feed[one.name].shape for one in inputs] == [(2, 3, 4, 5), (2, 7), (1, 1), ()]
    assert [feed[one.name].dtype for one in inputs] == [one.dtype for one in inputs]
    assert set(np.unique(feed["ids"])) <= {0, 1}
    again = random_samples(inputs, {"x": (2, 3, 4, 5)}, 9, 3)
    assert_same([again.item(4)], [feed])
    assert not np.array_equal(samples.item(5)["x"], feed["x"])
    assert not np.array_equal(random_samples(inputs, {"x": (2, 3, 4, 5)}, 9, 4).item(4)["x"], feed["x"])
    assert (samples.rows(0), samples.total_rows, samples.labels, samples.guessed) == (2, 18, None, False)
    assert "random" in samples.description


def test_random_floats_are_standard_normal():
    values = np.concatenate([f["x"] for f in items(random_samples([spec(shape=(1, 1000))], {}, 20, 0))])
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1.0) < 0.03


def test_random_needs_dynamic_dimensions():
    with pytest.raises(DataError, match="h, axis 3") as caught:
        random_samples([spec(shape=("N", 3, "h", None))], {}, 4, 0)
    assert "--shape x:1,3,224,224" in caught.value.remedy


@pytest.mark.parametrize("shape", [(1, 5), (4,), (0, 4), (1, 4, 1)])
def test_random_shape_must_fit(shape):
    with pytest.raises(DataError, match="--shape x:"):
        random_samples([X], {"x": shape}, 4, 0)


def test_random_shape_of_an_unknown_input():
    with pytest.raises(DataError, match="names y"):
        random_samples([X], {"y": (1, 4)}, 4, 0)
    with pytest.raises(DataError, match="0 random items"):
        random_samples([X], {}, 0, 0)
