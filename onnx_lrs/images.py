"""Images become model inputs: find the files, decode, resize, centre crop, scale.

Everything that can be decided before the first pixel is decided once, in :class:`ImagePlan`. A pixel value p has only
256 values, so the formula of :class:`onnx_lrs.config.Preprocess`, ``(p * scale - mean) / std``, is computed in float64
for 0..255 per channel, rounded once to the input's dtype, and every image is a look-up in that table.

Sizes are (height, width) everywhere; Pillow's own (width, height) stays inside this file.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from onnx_lrs.config import Preprocess
from onnx_lrs.errors import ConfigError, DataError

Size: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int | str | None, ...]
Layout: TypeAlias = Literal["NCHW", "NHWC"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
CHANNEL_COUNTS = (1, 3)
PIXEL_VALUES = 256
# torchvision's and timm's evaluation recipe for ImageNet: 224 is cropped out of 256.
IMAGENET_CROP_SHARE = 0.875
THUMBNAIL = 64  # pixels of the longer side
THUMBNAIL_SIDE, THUMBNAIL_ASPECT = 8, 4  # at least, at most: beyond that it is no picture to look at
THUMBNAIL_QUALITY = 80  # of JPEG: about 2 kB a picture
EXIF_ORIENTATION = 0x0112
EXIF_TURNED = (5, 6, 7, 8)
# What Pillow raises on damaged or hostile files; OSError includes UnidentifiedImageError.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ImagePlan:
    """How images become one model input; nothing in it depends on a pixel.

    Parameters
    ----------
    input_name : str
        The model input, for messages.
    preprocess : Preprocess
        The effective settings: layout and channels are filled in, crop as well once :func:`settle` has run.
    exact : (int, int), optional
        Size every image is resized to, whatever its aspect ratio.
    cover : (int, int), optional
        Otherwise: the smallest size of the image's own aspect ratio that contains this one.
    static : (int or None, int or None)
        Height and width the model fixes.
    table : ndarray, shape (channels, 256)
        Input value of every pixel value, in the input's dtype.
    """

    input_name: str
    preprocess: Preprocess
    exact: Size | None
    cover: Size | None
    static: tuple[int | None, int | None]
    table: np.ndarray


def image_files(folder: Path) -> list[Path]:
    """Return all images below a folder, sorted by the parts of their path; hidden files and folders are left out.

    Raises
    ------
    DataError
        If a folder cannot be read or links to one of its own parents.
    """
    return sorted(_walk(folder, frozenset()), key=lambda path: path.relative_to(folder).parts)


def _walk(folder: Path, parents: frozenset[Path]) -> Iterable[Path]:
    real = folder.resolve()
    if real in parents:
        raise DataError(f"Folder {folder} is a link to one of its own parents ({real}).", "Remove the link.")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), parents | {real})
        elif Path(entry.name).suffix.lower() in EXTENSIONS:
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"Folder {folder} cannot be read: {error.strerror}.", "Check its permissions.") from error


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the sub-folders; the position is the class number, also where a class is empty."""
    return tuple(sorted(entry.name for entry in _entries(folder) if entry.is_dir()))


def input_layout(shape: Shape, preprocess: Preprocess | None) -> Layout | None:
    """Return the layout of an image-like input (rank 4, one or three channels), None if it is not one."""
    if len(shape) != 4:
        return None
    if preprocess is not None and preprocess.layout is not None:
        return preprocess.layout
    if shape[1] in CHANNEL_COUNTS:
        return "NCHW"
    return "NHWC" if shape[3] in CHANNEL_COUNTS else None


def is_named(preprocess: Preprocess | None) -> bool:
    """Return whether somebody chose the preprocessing."""
    return preprocess is not None and preprocess.preset != "default"


def plan_images(name: str, dtype: np.dtype, shape: Shape, preprocess: Preprocess | None) -> ImagePlan:
    """Fill every open setting from the model's input.

    Parameters
    ----------
    name, dtype, shape : str, dtype, tuple
        The model input; a dynamic dimension is a str or None.
    preprocess : Preprocess, optional
        None: pixels in 0..1, cover the input size and centre crop.

    Raises
    ------
    DataError
        If images cannot feed this input.
    ConfigError
        If a setting contradicts the input.
    """
    chosen = preprocess if preprocess is not None else Preprocess(preset="default")
    layout = input_layout(shape, chosen)
    if layout is None:
        raise DataError(
            f"Images cannot feed input {name!r} of shape {shape_text(shape)}: it needs four dimensions, one of them "
            "1 or 3 channels.",
            "Name the layout (--layout NCHW or --layout NHWC) if it is one, or give the data as .npy or .npz.",
        )
    if dtype.kind != "f" and dtype != np.uint8:
        raise DataError(
            f"Images cannot feed input {name!r} of dtype {dtype}; that needs a float or uint8 input.",
            "Give the data as .npy or .npz with integer values.",
        )
    depth, height, width = shape[1:] if layout == "NCHW" else (shape[3], shape[1], shape[2])
    static = (_static(height), _static(width))
    count = _channel_count(name, depth, chosen)
    crop = _crop_size(name, static, chosen)
    exact = chosen.resize if isinstance(chosen.resize, tuple) else None
    cover = _cover_target(chosen, crop)
    _check_crop_fits(exact, cover, crop)
    effective = dataclasses.replace(
        chosen,
        layout=layout,
        channels=chosen.channels or ("GRAY" if count == 1 else "RGB"),
        crop=crop,
        resize=exact or (cover[0] if cover is not None and cover[0] == cover[1] else None),
        scale=1.0 if dtype == np.uint8 else chosen.scale,
    )
    return ImagePlan(name, effective, exact, cover, static, _table(name, dtype, count, effective))


def _static(dim: int | str | None) -> int | None:
    return dim if isinstance(dim, int) else None


def _channel_count(name: str, depth: int | str | None, chosen: Preprocess) -> int:
    wanted = None if chosen.channels is None else (1 if chosen.channels == "GRAY" else 3)
    if not isinstance(depth, int):
        return wanted or 3
    if depth not in CHANNEL_COUNTS:
        raise DataError(
            f"Input {name!r} has {depth} channels in layout {chosen.layout}; images have 1 or 3.",
            "Name the other layout with --layout, or give the data as .npy or .npz.",
        )
    if wanted is not None and wanted != depth:
        raise ConfigError(
            f"--channels {chosen.channels} makes {wanted} channels, but input {name!r} has {depth}.",
            f"Use --channels {'GRAY' if depth == 1 else 'RGB (or BGR)'}.",
        )
    return depth


def _crop_size(name: str, static: tuple[int | None, int | None], chosen: Preprocess) -> Size | None:
    """Return the size of the result, None if neither the model nor a setting fixes it."""
    wish = chosen.crop or (chosen.resize if isinstance(chosen.resize, tuple) else (None, None))
    height, width = static[0] or wish[0], static[1] or wish[1]
    if height is None or width is None:
        return None
    if chosen.crop is not None and chosen.crop != (height, width):
        raise ConfigError(
            f"--crop is {size_text(chosen.crop)}, but input {name!r} takes {height}x{width} (height x width).",
            f"Use --crop {height}x{width} or leave it out.",
        )
    return height, width


def _cover_target(chosen: Preprocess, crop: Size | None) -> Size | None:
    if isinstance(chosen.resize, int):
        return chosen.resize, chosen.resize
    if chosen.resize is not None or crop is None:
        return None
    share = IMAGENET_CROP_SHARE if chosen.preset == "imagenet" else 1.0
    return round(crop[0] / share), round(crop[1] / share)


def _check_crop_fits(exact: Size | None, cover: Size | None, crop: Size | None) -> None:
    """Refuse a resize after which no image can contain the crop."""
    resized = exact or cover
    if resized is None or crop is None:
        return
    small = exact[0] < crop[0] or exact[1] < crop[1] if exact is not None else min(resized) < min(crop)
    if small:
        raise ConfigError(
            f"--resize to {size_text(resized)} leaves less than the centre crop of {size_text(crop)}.",
            f"Use --resize {size_text(crop)} or larger, or a smaller --crop.",
        )


def _table(name: str, dtype: np.dtype, count: int, effective: Preprocess) -> np.ndarray:
    """Return the input value of each pixel value, shape (channels, 256)."""
    per_channel = {"mean": effective.mean, "std": effective.std}
    for flag, values in per_channel.items():
        if len(values) not in (1, count):
            raise ConfigError(
                f"--{flag} has {len(values)} values, but input {name!r} has {count} channel{'s' * (count > 1)}.",
                f"Give one value{f' or {count}' if count > 1 else ''}.",
            )
    pixels = np.arange(PIXEL_VALUES, dtype=np.float64)
    if dtype == np.uint8:
        if any(effective.mean) or any(value != 1.0 for value in effective.std):
            raise ConfigError(
                f"Input {name!r} is uint8: it takes pixel values as they are, so --mean and --std cannot apply.",
                "Leave out --mean, --std and the presets that set them.",
            )
        return np.tile(pixels.astype(np.uint8), (count, 1))
    mean, std = (np.broadcast_to(np.asarray(v, np.float64), (count,))[:, None] for v in per_channel.values())
    with np.errstate(over="ignore"):  # an infinite value is reported with its item when it is read
        return np.asarray(((pixels * effective.scale - mean) / std).astype(dtype))


def resized_size(plan: ImagePlan, size: Size) -> Size:
    """Return the size an image of the given size is resized to, before the crop.

    An image that already has the size of the result is not resampled, unless an exact size was asked for. The long
    side is rounded down, as in torchvision's Resize.
    """
    if plan.exact is not None:
        return plan.exact
    if plan.cover is None or size == plan.preprocess.crop:
        return size
    (height, width), (least_height, least_width) = size, plan.cover
    if width * least_height >= height * least_width:
        return least_height, max(least_width, int(least_height * width / height))
    return max(least_height, int(least_width * height / width)), least_width


def settle(plan: ImagePlan, sizes: Iterable[tuple[str, Size]]) -> ImagePlan:
    """Fix the size of the result where model and settings leave it open: the size all images share.

    Parameters
    ----------
    plan : ImagePlan
        Returned as it is, without reading ``sizes``, if its crop is known.
    sizes : iterable of (str, (int, int))
        Name and size of every image.

    Raises
    ------
    DataError
        If the images differ in size, or differ from the height or width that the model fixes.
    """
    if plan.preprocess.crop is not None:
        return plan
    first_name, common = "", None
    for name, size in sizes:
        result = resized_size(plan, size)
        if common is None:
            first_name, common = name, result
        if result != common:
            raise DataError(
                f"Input {plan.input_name!r} has no fixed height and width, and the images differ in size: {first_name} "
                f"gives {size_text(common)} and {name} gives {size_text(result)} (height x width).",
                f"Name one size with --resize HxW, for example --resize {size_text(common)}.",
            )
    assert common is not None  # callers pass at least one image
    wanted = (plan.static[0] or common[0], plan.static[1] or common[1])
    if wanted != common:
        raise DataError(
            f"Input {plan.input_name!r} takes {size_text(wanted)}, but the images have {size_text(common)}.",
            f"Name the size with --resize HxW: --resize {size_text(wanted)}.",
        )
    return dataclasses.replace(plan, preprocess=dataclasses.replace(plan.preprocess, crop=common))


def image_size(path: Path) -> Size:
    """Return (height, width) of an image file after its EXIF orientation, reading only the header."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION) in EXIF_TURNED
            return image.size if turned else (image.height, image.width)
    except DECODE_ERRORS as error:
        raise _unreadable(path, error) from error


def read_image(path: Path, plan: ImagePlan) -> np.ndarray:
    """Return an image file as the model's input with a leading axis of length one.

    Raises
    ------
    DataError
        If the file cannot be decoded, has more than 8 bits a channel, or is smaller than the crop.
    """
    try:
        with Image.open(path) as image:
            _check_depth(path, image)
            pixels = _fit(ImageOps.exif_transpose(image), plan)
    except DECODE_ERRORS as error:
        raise _unreadable(path, error) from error
    return _finish(pixels, plan, str(path))


def pixels_to_input(pixels: np.ndarray, plan: ImagePlan, where: str) -> np.ndarray:
    """Return one uint8 image (H, W) or (H, W, C), C 1 or 3 in RGB order, as the input; the same path as a file's.

    Parameters
    ----------
    pixels : ndarray of uint8
        One image.
    plan : ImagePlan
        A settled plan.
    where : str
        Names the image in messages.
    """
    plane = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    size = (plane.shape[0], plane.shape[1])
    grey = plan.preprocess.channels == "GRAY"
    if resized_size(plan, size) != size or (grey and plane.ndim == 3):
        return _finish(_fit(Image.fromarray(np.ascontiguousarray(plane)), plan), plan, where)
    if plane.ndim == 2:
        plane = np.broadcast_to(plane[:, :, None], (*size, 1 if grey else 3))
    return _finish(plane, plan, where)


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"Image {path} cannot be read: {error or type(error).__name__}.", "Replace it or move it out of the folder."
    )


def _check_depth(path: Path, image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"Image {path} has pixels of mode {image.mode} (more than 8 bits); images are read with values 0..255.",
            "Convert it to 8 bits, or give the data as a float32 .npy file.",
        )


def _fit(image: Image.Image, plan: ImagePlan) -> np.ndarray:
    """Convert and resize; the result is uint8 (H, W, C) before the crop."""
    image = image.convert("L" if plan.preprocess.channels == "GRAY" else "RGB")
    size = resized_size(plan, (image.height, image.width))
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _finish(pixels: np.ndarray, plan: ImagePlan, where: str) -> np.ndarray:
    """Crop, order the channels and look the values up; the result has shape (1, C, H, W) or (1, H, W, C)."""
    settings = plan.preprocess
    assert settings.crop is not None  # settled
    (height, width), (crop_height, crop_width) = pixels.shape[:2], settings.crop
    if height < crop_height or width < crop_width:
        raise DataError(
            f"{where} has {height}x{width} pixels (height x width) after the resize, fewer than the centre crop of "
            f"{size_text(settings.crop)} for input {plan.input_name!r}.",
            f"Use --resize {size_text(settings.crop)}, a larger --resize or a smaller --crop.",
        )
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    cropped = pixels[top : top + crop_height, left : left + crop_width]
    if settings.channels == "BGR":
        cropped = cropped[:, :, ::-1]
    planes = np.empty((1, len(plan.table), *settings.crop), plan.table.dtype)
    for channel, values in enumerate(plan.table):
        np.take(values, cropped[:, :, channel], out=planes[0, channel], mode="clip")
    return planes if settings.layout == "NCHW" else np.ascontiguousarray(np.moveaxis(planes, 1, 3))


def thumbnail(values: np.ndarray, preprocess: Preprocess | None) -> bytes:
    """Return one row of an input as a small JPEG; empty where it is no picture.

    With ``preprocess`` its pixels are what they were; without, the smallest value is black and the largest white.

    Parameters
    ----------
    values : ndarray, shape (channels, height, width) or (height, width, channels)
        What the model is fed.
    preprocess : Preprocess, optional
        The settled settings that made it of an image.
    """
    layout = input_layout((None, *values.shape), preprocess)
    if layout is None or values.dtype.kind not in "fu":
        return b""
    planes = np.moveaxis(values, 0, 2) if layout == "NCHW" else values
    height, width, depth = planes.shape
    sides = sorted((height, width))
    if depth not in CHANNEL_COUNTS or sides[0] < THUMBNAIL_SIDE or sides[1] > THUMBNAIL_ASPECT * sides[0]:
        return b""
    pixels = _as_pixels(planes.astype(np.float64), preprocess)
    picture = Image.fromarray(pixels[:, :, 0] if depth == 1 else pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


def _as_pixels(planes: np.ndarray, preprocess: Preprocess | None) -> np.ndarray:
    """Return values (H, W, C) as uint8 pixels in RGB or grey."""
    if preprocess is None:
        low, high = float(planes.min()), float(planes.max())
        planes = (planes - low) * ((PIXEL_VALUES - 1) / (high - low) if high > low else 0.0)
    else:
        planes = (planes * np.asarray(preprocess.std) + np.asarray(preprocess.mean)) / preprocess.scale
        if preprocess.channels == "BGR":
            planes = planes[:, :, ::-1]
    return np.ascontiguousarray(planes.round().clip(0, PIXEL_VALUES - 1), np.uint8)


def describe(plan: ImagePlan) -> str:
    """Return the settled plan in words, for example ``RGB 32x32, NCHW, scaled to 0..1``."""
    settings = plan.preprocess
    assert settings.crop is not None  # settled
    text = f"{settings.channels} {size_text(settings.crop)}, {settings.layout}, {_scaling_text(plan)}"
    return f"{text} (preset {settings.preset})" if is_named(settings) and settings.preset else text


def _scaling_text(plan: ImagePlan) -> str:
    settings = plan.preprocess
    if not any(settings.mean) and all(value == 1.0 for value in settings.std):
        if settings.scale == 1.0:
            return "pixels 0..255"
        return f"scaled to 0..{(PIXEL_VALUES - 1) * settings.scale:g}"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (settings.mean, settings.std))
    return f"(p * {settings.scale:.6g} - [{mean}]) / [{std}]"


def size_text(size: Sequence[int]) -> str:
    """Return a (height, width) as the flags spell it: 224x224."""
    return f"{size[0]}x{size[1]}"


def shape_text(shape: Sequence[int | str | None]) -> str:
    """Return a shape with its dynamic dimensions: (batch, 3, ?, ?)."""
    return f"({', '.join('?' if dim is None else str(dim) for dim in shape)})"
