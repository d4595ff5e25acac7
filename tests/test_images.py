"""Image preprocessing against direct computations that share no code with it."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnx_lrs import images
from onnx_lrs.config import Preprocess
from onnx_lrs.errors import ConfigError, DataError

F32 = np.dtype(np.float32)


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plan(shape, preprocess=None, dtype=F32, size=None):
    made = images.plan_images("x", np.dtype(dtype), shape, preprocess)
    return images.settle(made, [("image", size)] if size else [])


def feed(pixels, shape, preprocess=None, dtype=F32):
    return images.pixels_to_input(pixels, plan(shape, preprocess, dtype, pixels.shape[:2]), "Image 0")


def triangle_weights(old: int, new: int) -> np.ndarray:
    """Antialiased bilinear resampling along one axis, (new, old), written from its definition."""
    ratio = old / new
    support = max(ratio, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * ratio
    weights = np.maximum(0.0, 1.0 - np.abs((np.arange(old)[None] + 0.5 - centres) / support))
    return weights / weights.sum(axis=1, keepdims=True)


def resampled(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows = np.einsum("ih,hwc->iwc", triangle_weights(pixels.shape[0], size[0]), pixels.astype(float))
    return np.einsum("jw,iwc->ijc", triangle_weights(pixels.shape[1], size[1]), rows)


# ------------------------------------------------------------------------------------------------------------ values


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1 / 255, 1.0, 0.5]),
    st.lists(st.floats(-200, 200), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from(["RGB", "BGR"]),
)
def test_formula_layout_and_channel_order(height, width, scale, mean, std, layout, channels):
    pixels = photo(height, width)
    preprocess = Preprocess(mean=tuple(mean), std=tuple(std), scale=scale, layout=layout, channels=channels)
    shape = (1, 3, height, width) if layout == "NCHW" else (1, height, width, 3)
    ordered = pixels[:, :, ::-1] if channels == "BGR" else pixels
    expected = (ordered.astype(np.float64) * scale - np.array(mean)) / np.array(std)
    expected = (expected.transpose(2, 0, 1) if layout == "NCHW" else expected)[None].astype(np.float32)
    got = feed(pixels, shape, preprocess)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_result_has_the_inputs_dtype(dtype):
    pixels = photo(4, 5)
    got = feed(pixels, ("N", 3, 4, 5), dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[0], (pixels.transpose(2, 0, 1) * (1 / 255)).astype(dtype))


def test_uint8_input_takes_pixels_unscaled():
    pixels = photo(4, 5)
    made = plan((1, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.pixels_to_input(pixels, made, "i")[0], pixels)
    assert made.preprocess.scale == 1.0
    assert "pixels 0..255" in images.describe(made)


@pytest.mark.parametrize(
    "settings_", [Preprocess(mean=(1.0,)), Preprocess(std=(2.0,)), Preprocess.from_preset("imagenet")]
)
def test_uint8_input_refuses_mean_and_std(settings_):
    with pytest.raises(ConfigError, match="uint8"):
        plan((1, 4, 5, 3), settings_, np.uint8)


def test_presets():
    pixels = photo(8, 8)
    raw = feed(pixels, (1, 3, 8, 8), Preprocess.from_preset("raw"))
    np.testing.assert_array_equal(raw[0], pixels.transpose(2, 0, 1))
    caffe = feed(pixels, (1, 3, 8, 8), Preprocess.from_preset("caffe"))
    np.testing.assert_array_equal(caffe[0, 0], pixels[:, :, 2].astype(np.float32) - 104)
    np.testing.assert_array_equal(caffe[0, 2], pixels[:, :, 0].astype(np.float32) - 123)


# ---------------------------------------------------------------------------------------------------- resize and crop


def test_default_covers_the_input_and_crops_the_centre():
    pixels = photo(40, 60)
    got = feed(pixels, (1, 3, 20, 20), Preprocess(scale=1.0))[0].transpose(1, 2, 0)
    np.testing.assert_allclose(got, resampled(pixels, (20, 30))[:, 5:25], atol=1.01)


def test_default_covers_a_wide_input():
    pixels = photo(30, 30)
    got = feed(pixels, (1, 3, 10, 20), Preprocess(scale=1.0))[0].transpose(1, 2, 0)
    np.testing.assert_allclose(got, resampled(pixels, (20, 20))[5:15], atol=1.01)


def test_imagenet_resizes_to_256_and_crops_224():
    pixels = photo(300, 400)
    big = Image.fromarray(pixels).resize((int(256 * 400 / 300), 256), Image.Resampling.BILINEAR)
    left = round((341 - 224) / 2)
    part = np.asarray(big)[16:240, left : left + 224] / 255
    expected = ((part - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)
    made = plan(("N", 3, 224, 224), Preprocess.from_preset("imagenet"))
    np.testing.assert_allclose(images.pixels_to_input(pixels, made, "i")[0], expected, rtol=1e-6, atol=1e-6)
    assert (made.preprocess.resize, made.preprocess.crop) == (256, (224, 224))
    assert "preset imagenet" in images.describe(made)


@pytest.mark.parametrize("preset", ["imagenet", "raw"])
def test_image_of_the_target_size_is_not_resampled(preset):
    pixels = photo(16, 16)
    made = plan((1, 3, 16, 16), Preprocess.from_preset(preset))
    assert images.resized_size(made, (16, 16)) == (16, 16)
    if preset == "raw":
        np.testing.assert_array_equal(images.pixels_to_input(pixels, made, "i")[0], pixels.transpose(2, 0, 1))


def test_exact_resize_changes_the_aspect_ratio():
    pixels = photo(12, 30)
    got = feed(pixels, (1, 3, None, None), Preprocess(resize=(6, 10), scale=1.0))[0].transpose(1, 2, 0)
    assert got.shape == (6, 10, 3)
    np.testing.assert_allclose(got, resampled(pixels, (6, 10)), atol=1.01)


def test_short_side_resize_then_crop():
    made = plan((1, 3, "h", "w"), Preprocess(resize=20, crop=(18, 16)))
    assert images.resized_size(made, (40, 61)) == (20, 30)
    assert images.resized_size(made, (61, 40)) == (30, 20)
    assert feed(photo(40, 61), (1, 3, "h", "w"), Preprocess(resize=20, crop=(18, 16))).shape == (1, 3, 18, 16)


def test_crop_without_resize_on_the_centre():
    pixels = photo(9, 9)
    got = feed(pixels, (1, 3, 5, 5), Preprocess(resize=(9, 9), scale=1.0))
    np.testing.assert_array_equal(got[0], pixels[2:7, 2:7].transpose(2, 0, 1))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([None, "imagenet"]),
)
def test_default_resize_always_contains_the_crop_and_keeps_the_ratio(size, target, preset):
    made = plan((1, 3, *target), Preprocess(preset=preset))
    resized = images.resized_size(made, size)
    assert all(r >= t for r, t in zip(resized, target, strict=True))
    if size != target:
        factor = max(c / s for c, s in zip(made.cover, size, strict=True))
        assert all(abs(r - s * factor) < 1 + 1e-6 for r, s in zip(resized, size, strict=True))


def test_effective_settings_are_idempotent():
    for shape, preprocess in [((1, 3, 224, 224), Preprocess.from_preset("imagenet")), ((1, 20, 30, 1), None)]:
        once = plan(shape, preprocess)
        twice = plan(shape, once.preprocess)
        assert once.preprocess == twice.preprocess
        for size in [(224, 224), (300, 401), (20, 30), (31, 17)]:
            assert images.resized_size(once, size) == images.resized_size(twice, size)


# ----------------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("shape", "layout", "channels"),
    [
        (("N", 3, 8, 8), "NCHW", "RGB"),
        ((1, 8, 8, 3), "NHWC", "RGB"),
        ((1, 1, 8, 8), "NCHW", "GRAY"),
        ((None, 8, 8, 1), "NHWC", "GRAY"),
    ],
)
def test_layout_and_channels_are_read_off_the_input(shape, layout, channels):
    made = plan(shape).preprocess
    assert (made.layout, made.channels, made.crop, made.preset) == (layout, channels, (8, 8), "default")


def test_named_layout_settles_dynamic_channels():
    made = plan(("N", "c", 8, 8), Preprocess(layout="NCHW", channels="GRAY"))
    assert made.table.shape == (1, 256)
    assert plan(("N", "c", 8, 8), Preprocess(layout="NCHW")).table.shape == (3, 256)


def test_dynamic_size_keeps_the_images_size():
    made = plan(("N", 3, "h", "w"), size=(7, 11))
    assert made.preprocess.crop == (7, 11)
    assert images.describe(made) == "RGB 7x11, NCHW, scaled to 0..1"


def test_dynamic_size_with_different_images_asks_for_resize():
    made = images.plan_images("x", F32, ("N", 3, "h", "w"), None)
    with pytest.raises(DataError, match=r"b\.png gives 8x7") as caught:
        images.settle(made, [("a.png", (7, 8)), ("b.png", (8, 7))])
    assert "--resize HxW" in caught.value.remedy


def test_half_dynamic_size_must_match_the_fixed_side():
    with pytest.raises(DataError, match="takes 9x8"):
        plan(("N", 3, 9, "w"), size=(7, 8))


@pytest.mark.parametrize(
    ("shape", "preprocess", "dtype", "error", "match"),
    [
        ((1, 3, 8), None, F32, DataError, "four dimensions"),
        (("N", "c", "h", "w"), None, F32, DataError, "four dimensions"),
        ((1, 4, 8, 8), None, F32, DataError, "four dimensions"),
        ((1, 4, 8, 8), Preprocess(layout="NCHW"), F32, DataError, "4 channels"),
        ((1, 3, 8, 8), None, np.int64, DataError, "int64"),
        ((1, 3, 8, 8), Preprocess(channels="GRAY"), F32, ConfigError, "--channels GRAY"),
        ((1, 1, 8, 8), Preprocess(channels="BGR"), F32, ConfigError, "--channels BGR"),
        ((1, 3, 8, 8), Preprocess(mean=(0.1, 0.2)), F32, ConfigError, "--mean has 2"),
        ((1, 1, 8, 8), Preprocess(std=(1.0, 1.0, 1.0)), F32, ConfigError, "--std has 3"),
        ((1, 3, 8, 8), Preprocess(crop=(7, 8)), F32, ConfigError, "--crop is 7x8"),
        ((1, 3, 8, 8), Preprocess(resize=(7, 9)), F32, ConfigError, "--resize to 7x9"),
        ((1, 3, 8, 8), Preprocess(resize=7), F32, ConfigError, "--resize to 7x7"),
    ],
)
def test_contradictions_are_refused(shape, preprocess, dtype, error, match):
    with pytest.raises(error, match=match):
        plan(shape, preprocess, dtype, (8, 8))


def test_crop_larger_than_the_resized_image_names_the_image():
    with pytest.raises(DataError, match="Image 0 has 10x20"):
        feed(photo(10, 20), (1, 3, "h", "w"), Preprocess(resize=10, crop=(15, 10)))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("shape", [(1, 3, 20, 24), (1, 1, 20, 24), (1, 20, 24, 3), (1, 30, 33, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_file_and_array_take_the_same_path(tmp_path, shape, channels):
    pixels = photo(30, 33, channels=channels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    made = plan(shape)
    np.testing.assert_array_equal(
        images.read_image(tmp_path / "a.png", made), images.pixels_to_input(pixels, made, "i")
    )


def test_array_with_one_channel_axis_equals_the_plane():
    pixels = photo(6, 7, channels=1)
    np.testing.assert_array_equal(feed(pixels[:, :, None], (1, 3, 6, 7)), feed(pixels, (1, 3, 6, 7)))


def test_grey_is_pillows_l():
    pixels = photo(6, 7)
    expected = np.asarray(Image.fromarray(pixels).convert("L")) / 255
    np.testing.assert_allclose(feed(pixels, (1, 1, 6, 7))[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_orientation_is_respected(tmp_path, orientation, turn):
    pixels = photo(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(pixels, turn)
    size = images.image_size(tmp_path / "a.png")
    assert size == turned.shape[:2]
    got = images.read_image(tmp_path / "a.png", plan((1, "h", "w", 3), Preprocess.from_preset("raw"), size=size))
    np.testing.assert_array_equal(got[0], turned)


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "RGBA", "CMYK"])
def test_common_modes_are_converted(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.fromarray(photo(5, 6)).convert(mode).save(tmp_path / name)
    assert images.read_image(tmp_path / name, plan((1, 3, 5, 6))).shape == (1, 3, 5, 6)


def test_sixteen_bit_image_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png.*more than 8 bits"):
        images.read_image(tmp_path / "deep.png", plan((1, 1, 4, 4)))


def test_damaged_images_name_the_file(tmp_path):
    Image.fromarray(photo(60, 60)).save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    damaged = {"text.png": b"no image", "empty.jpg": b"", "cut.png": content[: len(content) // 2]}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            images.read_image(tmp_path / name, plan((1, 3, 60, 60)))
    with pytest.raises(DataError, match=r"text\.png"):
        images.image_size(tmp_path / "text.png")


def test_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(photo(60, 60)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png"):
        images.read_image(tmp_path / "bomb.png", plan((1, 3, 60, 60)))


def test_files_are_found_in_a_fixed_order(tmp_path):
    names = [
        "b/2.PNG",
        "b/1.jpeg",
        "a/z/1.webp",
        "a.bmp",
        "a/notes.txt",
        ".hidden/x.png",
        "a/.x.png",
        "c.gif",
        "c-1/x.tif",
    ]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in images.image_files(tmp_path)]
    assert found == ["a/z/1.webp", "a.bmp", "b/1.jpeg", "b/2.PNG", "c-1/x.tif", "c.gif"]
    assert images.class_folders(tmp_path) == ("a", "b", "c-1")


def test_linked_folders_are_followed_and_loops_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert images.image_files(root) == [root / "cat" / "1.png"]
    (root / "loop").symlink_to(root, target_is_directory=True)
    with pytest.raises(DataError, match="link to one of its own parents"):
        images.image_files(root)


@pytest.mark.parametrize("module", ["data.py", "images.py"])
def test_modules_stay_on_the_ground(module):
    tree = ast.parse((Path(images.__file__).parent / module).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "PIL", "onnx_lrs"}
    assert {name for name in imported if name.startswith("onnx_lrs.")} <= {"onnx_lrs.errors", "onnx_lrs.config"}
