"""Calibration data: every source becomes indexed samples, each item ready to feed to the model.

A source is a folder of images, a .npy or .npz file, an array, a mapping of arrays, an iterable of dicts, a
:class:`Dataset` or ONNX Runtime's CalibrationDataReader (anything with ``get_next``). Folders and arrays are read
lazily; a stream that can be read only once is copied to an anonymous temporary file, so that later passes have random
access and memory holds only offsets. One *item* is one inference call; its *rows* are its length along axis 0.

Names, dtypes and shapes are checked when a source is opened (for a stream: when it is copied), values when an item is
read. Nothing is repaired silently: what was dropped, cast or ignored stands in :attr:`Samples.description`.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.lib import format as npy_format

from onnx_lrs import images
from onnx_lrs.config import Preprocess
from onnx_lrs.errors import DataError

Feed: TypeAlias = dict[str, np.ndarray]

LABELS = "labels"
FOLDERS = "folders"
SELECT_SHARE = 0.2
LEAST_SAMPLES = 3  # one each to fit, to select and to judge
FEEDABLE_KINDS = "fiub"  # floats, integers, bool
ACCEPTED = f"a folder of images ({' '.join(e[1:] for e in images.EXTENSIONS)}), a .npy file or a .npz file"
READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a model input or output; a dynamic dimension is a str (its name) or None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {images.shape_text(self.shape)}"


@runtime_checkable
class CalibrationReader(Protocol):
    """What ONNX Runtime's CalibrationDataReader offers: the next feed, None at the end."""

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next feed or None."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An iterable and how one of its elements becomes a feed (the convention of NNCF).

    Parameters
    ----------
    iterable : iterable
        For example a torch DataLoader; it is read once.
    transform : callable, optional
        Maps an element to a dict of arrays named as the model's inputs, or to one array if the model has one input.
        Default: the element is the feed.
    """

    iterable: Iterable[Any]
    transform: Callable[[Any], Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Return a fresh iterator over the feeds."""
        return iter(self.iterable) if self.transform is None else map(self.transform, self.iterable)


Source: TypeAlias = str | os.PathLike[str] | np.ndarray | Mapping[str, Any] | Iterable[Any] | CalibrationReader


class Store(Protocol):
    """Where items lie: the seam between the kinds of sources."""

    def __len__(self) -> int:
        """Return the number of items."""

    def read(self, index: int) -> Feed:
        """Return one item, of the model's names, dtypes and shapes."""

    def rows(self, index: int) -> int:
        """Return the length of one item along axis 0."""

    def close(self) -> None:
        """Release files."""


def _nameless(row: int) -> str:
    """Return no name."""
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Calibration items with random access; close them, or use them as a context manager.

    Parameters
    ----------
    store : Store
        Where the items lie.
    description : str
        What the data is and what was done to it, in one line.
    total_rows : int
        Rows of the source, with those that were dropped because the model's batch is static.
    labels : ndarray of int64, shape (rows,), optional
        From class sub-folders or the array ``labels``; dropped rows are cut off.
    class_names : tuple of str
        Names of the class sub-folders; empty if the labels did not come from folders.
    preprocess : Preprocess, optional
        The effective image preprocessing; None if there was none.
    guessed : bool
        Images were preprocessed, and nobody named how.
    name_of : callable
        The name of a row: the path of an image within its folder; empty where rows have none.
    """

    store: Store
    description: str
    total_rows: int
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    guessed: bool = False
    name_of: Callable[[int], str] = _nameless

    def __len__(self) -> int:
        return len(self.store)

    def item(self, index: int) -> Feed:
        """Return one item: every model input with its dtype and a leading batch dimension; treat it as read-only.

        Raises
        ------
        DataError
            If an image cannot be read or a value is NaN, infinite or outside the input's dtype.
        """
        _check_index(index, len(self))
        feed = self.store.read(index)
        for name, values in feed.items():
            _check_finite(values, f"Item {index}, input {name!r}")
        return feed

    def rows(self, index: int) -> int:
        """Return the length of one item along axis 0."""
        _check_index(index, len(self))
        return self.store.rows(index)

    def thumbnail(self, index: int, row: int) -> bytes:
        """Return a row of an item as a small JPEG: its first input that is a picture; empty where there is none."""
        for values in self.item(index).values():
            if values.ndim == 4 and row < len(values):
                found = images.thumbnail(values[row], self.preprocess)
                if found:
                    return found
        return b""

    @property
    def row_count(self) -> int:
        """Rows of all items together."""
        return sum(self.store.rows(index) for index in range(len(self)))

    def close(self) -> None:
        """Release the temporary file, if there is one; items cannot be read afterwards."""
        self.store.close()

    def __enter__(self) -> Samples:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def open_samples(data: Source, inputs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Samples:
    """Open calibration data for a model.

    Parameters
    ----------
    data : path, array, mapping, iterable, Dataset or CalibrationDataReader
        Folders and arrays are cut into items of the model's static batch (one row if it is dynamic); items of
        iterables are fed as they are. uint8 arrays (N, H, W) or (N, H, W, C) for an image-like input are images.
    inputs : sequence of TensorSpec
        The model's inputs.
    preprocess : Preprocess, optional
        How images become inputs; None: pixels in 0..1, covering the input size, centre crop.

    Raises
    ------
    DataError
        If the data is missing, damaged, or does not fit the inputs.
    ConfigError
        If the preprocessing contradicts the inputs.
    """
    specs = _feedable(inputs)
    if isinstance(data, str | os.PathLike):
        return _open_path(Path(data), specs, preprocess)
    if isinstance(data, CalibrationReader):
        return _open_stream(_drain(data), type(data).__name__, specs)
    if isinstance(data, Mapping):
        return _open_arrays(data, _Origin("arrays"), specs, preprocess)
    if hasattr(data, "__array__"):
        values = _as_array(data, "The array")
        return _open_arrays({_only_input(specs, "One array").name: values}, _Origin("array"), specs, preprocess)
    if isinstance(data, list | tuple):
        return _open_list(data, specs)
    if not isinstance(data, bytes | bytearray) and (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        return _open_stream(data, type(data).__name__, specs)
    raise DataError(
        f"Calibration data of type {type(data).__name__} is not supported.",
        f"Give {ACCEPTED}, an array, a mapping of arrays, an iterable of dicts or a CalibrationDataReader.",
    )


def _feedable(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    if not inputs:
        raise DataError("The model has no inputs, so there is nothing to calibrate it with.")
    for spec in inputs:
        if spec.dtype.kind not in FEEDABLE_KINDS:
            raise DataError(
                f"Input {spec.name!r} has dtype {spec.dtype}; data can feed floats, integers and bool.",
                "Cut the model behind that input.",
            )
    return tuple(inputs)


def _only_input(inputs: Sequence[TensorSpec], what: str) -> TensorSpec:
    if len(inputs) > 1:
        raise DataError(
            f"{what} cannot feed a model with {len(inputs)} inputs: {_listed(inputs)}.",
            "Give a .npz file, or dicts, with one array for each input name.",
        )
    return inputs[0]


def _listed(things: Iterable[object]) -> str:
    return ", ".join(str(thing) for thing in things) or "none"


def _nothing() -> None:
    """Do nothing."""


def fingerprint(samples: Samples, tell: Callable[[], None] = _nothing) -> str:
    """Return a hash of what a model would be fed: name, dtype, shape and bytes of every item, in order.

    Every item is read once, so images are decoded once; ``tell`` is called after each.

    Raises
    ------
    DataError
        If an item cannot be read.
    """
    digest = hashlib.sha256()
    for index in range(len(samples)):
        for name, values in samples.item(index).items():
            digest.update(repr((index, name, values.dtype.str, values.shape)).encode("utf-8", "surrogatepass"))
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        tell()
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ folders and files


def _open_path(path: Path, inputs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Samples:
    if not path.exists():
        raise DataError(f"Calibration data {path} does not exist.", f"Give {ACCEPTED}.")
    if path.is_dir():
        return _open_folder(path, inputs, preprocess)
    if path.suffix.lower() == ".npy":
        name = _only_input(inputs, f"The single array of {path}").name
        return _open_arrays({name: _map_npy(path)}, _Origin(str(path)), inputs, preprocess)
    if path.suffix.lower() == ".npz":
        with contextlib.ExitStack() as guard:
            arrays = guard.enter_context(contextlib.closing(_Npz(path)))
            samples = _open_arrays(arrays, _Origin(str(path), close=arrays.close), inputs, preprocess)
            guard.pop_all()
            return samples
    raise DataError(f"Calibration data {path} has the unknown extension {path.suffix!r}.", f"Give {ACCEPTED}.")


def _open_folder(folder: Path, inputs: Sequence[TensorSpec], preprocess: Preprocess | None) -> Samples:
    spec = _only_input(inputs, f"The image folder {folder}")
    files = images.image_files(folder)
    if not files:
        raise DataError(f"Folder {folder} holds no image.", f"Calibration data is {ACCEPTED}.")
    plan = images.plan_images(spec.name, spec.dtype, spec.shape, preprocess)
    plan = images.settle(plan, ((str(file), images.image_size(file)) for file in files))
    classes = images.class_folders(folder)
    numbers = {name: number for number, name in enumerate(classes)}
    homes = [file.relative_to(folder).parts for file in files]
    origin = _Origin(
        f"folder {folder}{os.sep}", unit="images", name_of=lambda row: files[row].relative_to(folder).as_posix()
    )
    if classes and all(len(parts) > 1 for parts in homes):
        labels = np.array([numbers[parts[0]] for parts in homes], np.int64)
        origin = dataclasses.replace(origin, labels=labels, class_names=classes)
    return _cut_into_items({spec.name: _Files(files, plan)}, origin, inputs, preprocess)


def _map_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return _map_file(file)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _map_file(file: IO[bytes]) -> np.ndarray:
    """Map an open .npy file; it is read as the pages are touched. Objects are refused before anything is unpickled."""
    version = npy_format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy_format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy_format.read_array_header_2_0(file)
    else:
        raise ValueError(f"format version {version} is not supported")
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects")
    return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"{path} cannot be read: {error or type(error).__name__}.",
        "Save it again with numpy.save or numpy.savez; object arrays are refused, because loading one can run code.",
    )


class _Npz(Mapping[str, np.ndarray]):
    """The arrays of a .npz file, each unpacked to an anonymous temporary file and mapped when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = contextlib.ExitStack()
        try:
            self._archive = self._files.enter_context(zipfile.ZipFile(path))
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
        self._names = [name[: -len(".npy")] for name in self._archive.namelist() if name.endswith(".npy")]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(name)
        try:
            file = self._files.enter_context(tempfile.TemporaryFile(prefix="onnx-lrs-"))  # noqa: SIM115
            with self._archive.open(f"{name}.npy") as packed:
                shutil.copyfileobj(packed, file)
            file.flush()
            file.seek(0)
            return _map_file(file)
        except READ_ERRORS as error:
            raise _unreadable(self._path, error) from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Delete the temporary files."""
        self._files.close()


# ----------------------------------------------------------------------------- columns: one input of folders and arrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Origin:
    """What messages and descriptions say about folder or array data, its labels, and how to close it."""

    name: str
    unit: str = "samples"
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    close: Callable[[], None] = _nothing
    name_of: Callable[[int], str] = _nameless


class _Column(Protocol):
    """All rows of one input."""

    @property
    def plan(self) -> images.ImagePlan | None:
        """How its images are read, None if its values are used as they are."""

    def __len__(self) -> int: ...

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return consecutive rows, ready to feed."""

    def describe(self) -> str:
        """Return what the column is."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Image files, decoded when they are taken."""

    paths: Sequence[Path]
    plan: images.ImagePlan

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, start: int, stop: int) -> np.ndarray:
        return _stack([images.read_image(path, self.plan) for path in self.paths[start:stop]])

    def describe(self) -> str:
        return images.describe(self.plan)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pixels:
    """An array of uint8 images; ``order`` names its axes behind the first."""

    values: np.ndarray
    order: str
    plan: images.ImagePlan

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int, stop: int) -> np.ndarray:
        rows = range(start, stop)
        return _stack([images.pixels_to_input(self.image(row), self.plan, f"Image {row}") for row in rows])

    def image(self, row: int) -> np.ndarray:
        """Return one image, (H, W) or (H, W, C)."""
        pixels = np.asarray(self.values[row])
        return np.moveaxis(pixels, 0, -1) if self.order == "CHW" else pixels

    def describe(self) -> str:
        return f"uint8 images to {images.describe(self.plan)}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Plain:
    """An array whose shape already fits the input."""

    values: np.ndarray
    spec: TensorSpec
    note: str = ""
    plan: None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int, stop: int) -> np.ndarray:
        return _cast(self.values[start:stop], self.spec, f"Row {start}" + f" to {stop - 1}" * (stop - start > 1))

    def describe(self) -> str:
        shape = images.shape_text(self.values.shape[1:])
        if self.values.dtype == self.spec.dtype:
            return f"{self.spec.name} {self.values.dtype} {shape} as it is{self.note}"
        return f"{self.spec.name} {self.values.dtype} {shape} cast to {self.spec.dtype} as it is, not scaled{self.note}"


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _open_arrays(
    arrays: Mapping[str, Any], origin: _Origin, inputs: Sequence[TensorSpec], preprocess: Preprocess | None
) -> Samples:
    chosen = _match(list(arrays), inputs, origin.name)
    reserved = LABELS in arrays and LABELS not in chosen.values()
    ignored = [name for name in arrays if name not in chosen.values() and name != LABELS]
    columns = {
        spec.name: _column(_as_array(arrays[chosen[spec.name]], origin.name), spec, preprocess, origin.name)
        for spec in inputs
    }
    labels = _as_array(arrays[LABELS], f"{origin.name}, {LABELS}") if reserved else None
    notes = (f"ignored: {_listed(ignored)}",) if ignored else ()
    return _cut_into_items(columns, dataclasses.replace(origin, labels=labels, notes=notes), inputs, preprocess)


def _match(names: Sequence[str], inputs: Sequence[TensorSpec], origin: str) -> dict[str, str]:
    """Return the name of the array for each input; ``labels`` is nobody's input unless the model has one so named."""
    wanted = [spec.name for spec in inputs]
    free = [name for name in names if name != LABELS or LABELS in wanted]
    if all(name in free for name in wanted):
        return dict(zip(wanted, wanted, strict=True))
    if len(wanted) == len(free) == 1:
        return {wanted[0]: free[0]}
    raise _wrong_names(origin, free, wanted)


def _wrong_names(where: str, found: Sequence[str], wanted: Sequence[str]) -> DataError:
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    return DataError(
        f"{where} has the arrays {_listed(found)}; the model's inputs are {_listed(wanted)} "
        f"(missing: {_listed(missing)}; unknown: {_listed(unknown)}).",
        "Name the arrays as the model's inputs; Dataset(iterable, transform) renames them on the way.",
    )


def _column(values: np.ndarray, spec: TensorSpec, preprocess: Preprocess | None, origin: str) -> _Column:
    batched = _batched(spec)
    order = _pixel_order(values, batched, preprocess)
    if order is not None:
        plan = images.plan_images(spec.name, spec.dtype, spec.shape, preprocess)
        height, width = values.shape[2:] if order == "CHW" else values.shape[1:3]
        return _Pixels(values, order, images.settle(plan, [("every image", (height, width))]))
    _check_dtype(values.dtype, spec, origin)
    _check_shape(values.shape, batched, origin)
    return _Plain(values, spec, " (image settings do not apply)" if images.is_named(preprocess) else "")


def _batched(spec: TensorSpec) -> TensorSpec:
    """Return the spec of many rows."""
    if not spec.shape:
        raise DataError(
            f"Input {spec.name!r} is a scalar without a batch dimension; arrays are cut along their first axis.",
            "Give an iterable of dicts, one ready feed each.",
        )
    return dataclasses.replace(spec, shape=("N", *spec.shape[1:]))


def _pixel_order(values: np.ndarray, batched: TensorSpec, preprocess: Preprocess | None) -> str | None:
    """Return the axes of one image (HW, HWC or CHW) if the array holds images to preprocess, else None."""
    layout = images.input_layout(batched.shape, preprocess)
    takes_images = layout is not None and (batched.dtype.kind == "f" or batched.dtype == np.uint8)
    if values.dtype != np.uint8 or not takes_images or values.ndim not in (3, 4):
        return None
    if values.ndim == 3:
        return "HW"
    named, fits = images.is_named(preprocess), _fits(values.shape, batched.shape)
    if fits and not named and (layout == "NCHW" or batched.dtype == np.uint8):
        return None
    planar = values.shape[1] in images.CHANNEL_COUNTS and named
    if planar and layout == "NCHW" and fits:
        return "CHW"
    if values.shape[3] in images.CHANNEL_COUNTS:
        return "HWC"
    return "CHW" if planar else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Columns:
    """Items of ``batch`` consecutive rows of every column."""

    columns: Mapping[str, _Column]
    batch: int
    count: int
    close: Callable[[], None]

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Feed:
        start = index * self.batch
        return {name: column.take(start, start + self.batch) for name, column in self.columns.items()}

    def rows(self, index: int) -> int:
        return self.batch


def _cut_into_items(
    columns: Mapping[str, _Column], origin: _Origin, inputs: Sequence[TensorSpec], preprocess: Preprocess | None
) -> Samples:
    total = _common_length(columns, origin.name)
    batch = _static_batch(inputs)
    if total < batch:
        raise DataError(
            f"{origin.name} has {total} {origin.unit}; the model's batch of {batch} needs at least as many.",
            "Give more data, or export the model with a dynamic batch.",
        )
    kept = total - total % batch
    dropped = f"{total - kept} of {total} {origin.unit} dropped: the model's batch is {batch}"
    notes = (*origin.notes, *((dropped,) if kept < total else ()))
    labels = _usable_labels(origin, (total, kept))
    plans = [column.plan for column in columns.values() if column.plan is not None]
    contents = ", ".join(column.describe() for column in columns.values())
    return Samples(
        store=_Columns(columns, batch, total // batch, origin.close),
        description="; ".join((f"{origin.name}: {total} {origin.unit}, {contents}", *notes)),
        total_rows=total,
        labels=labels,
        class_names=origin.class_names,
        preprocess=plans[0].preprocess if plans else None,
        guessed=bool(plans) and not images.is_named(preprocess),
        name_of=origin.name_of,
    )


def _usable_labels(origin: _Origin, lengths: tuple[int, int]) -> np.ndarray | None:
    """Return the labels that came with the data; None if there are none or they are no class numbers."""
    if origin.labels is None:
        return None
    try:
        return _label_array(origin.labels, lengths, origin.name)
    except DataError:
        if origin.class_names:
            raise
        return None  # an array called `labels` that nobody asked for may hold anything


def _common_length(columns: Mapping[str, _Column], origin: str) -> int:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{origin} has arrays of different length: {_listed(f'{n} {length}' for n, length in lengths.items())}.",
            "The first axis counts the samples and is the same for every input.",
        )
    return next(iter(lengths.values()))


def _static_batch(inputs: Sequence[TensorSpec]) -> int:
    """Return the number of rows the model takes at once, 1 if it is dynamic."""
    fixed = {spec.name: spec.shape[0] for spec in inputs if isinstance(spec.shape[0], int)}
    if len(set(fixed.values())) > 1:
        raise DataError(
            f"The model's inputs differ in their first dimension ({_listed(inputs)}); arrays cannot be cut into items.",
            "Give an iterable of dicts, one ready feed each.",
        )
    return next(iter(fixed.values()), 1)


# ----------------------------------------------------------------------------------------------- iterables and readers


def _drain(reader: CalibrationReader) -> Iterator[Any]:
    """Yield the feeds of a reader until it returns None."""
    while (feed := reader.get_next()) is not None:
        yield feed


@dataclasses.dataclass(frozen=True, eq=False)
class _Listed:
    """Items of a list that the caller holds in memory anyway."""

    items: Sequence[Any]
    inputs: Sequence[TensorSpec]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Feed:
        return _conform(self.items[index], self.inputs, index)

    def rows(self, index: int) -> int:
        return self.lengths[index]

    def close(self) -> None:
        """Nothing to release."""


def _open_list(items: Sequence[Any], inputs: Sequence[TensorSpec]) -> Samples:
    lengths = [_rows(_conform(item, inputs, index)) for index, item in enumerate(items)]
    return _stream_samples(_Listed(tuple(items), inputs, lengths), type(items).__name__)


class _Spool:
    """Items in an anonymous temporary file; memory holds one offset and one row count an item."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self._names = [spec.name for spec in inputs]
        self._offsets = array.array("q")
        self._rows = array.array("q")
        self._lock = threading.Lock()
        self._file = tempfile.TemporaryFile(prefix="onnx-lrs-")  # noqa: SIM115 - closed by close()

    def append(self, feed: Feed) -> None:
        """Write one item behind the last."""
        try:
            offset = self._file.seek(0, os.SEEK_END)
            for name in self._names:
                npy_format.write_array(self._file, feed[name], allow_pickle=False)
        except OSError as error:
            raise DataError(
                f"Item {len(self)} cannot be copied to a temporary file in {tempfile.gettempdir()}: {error.strerror}.",
                "Free some space or name another folder in the environment variable TMPDIR.",
            ) from error
        self._offsets.append(offset)
        self._rows.append(_rows(feed))

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Feed:
        with self._lock:
            self._file.seek(self._offsets[index])
            return {name: npy_format.read_array(self._file, allow_pickle=False) for name in self._names}

    def rows(self, index: int) -> int:
        return self._rows[index]

    def close(self) -> None:
        self._file.close()


def _open_stream(items: Iterable[Any], name: str, inputs: Sequence[TensorSpec]) -> Samples:
    """Copy a stream to a temporary file; an error on the way deletes the file."""
    with contextlib.ExitStack() as guard:
        spool = guard.enter_context(contextlib.closing(_Spool(inputs)))
        for index, item in enumerate(items):
            spool.append(_conform(item, inputs, index))
        samples = _stream_samples(spool, name)
        guard.pop_all()
        return samples


def _stream_samples(store: Store, name: str) -> Samples:
    if not len(store):
        raise DataError(
            f"The calibration data ({name}) has no items.", "An iterator or reader that was read before is empty."
        )
    rows = sum(store.rows(index) for index in range(len(store)))
    return Samples(store, f"{name}: {len(store)} items, {rows} rows, as they are", total_rows=rows)


def _conform(item: Any, inputs: Sequence[TensorSpec], index: int) -> Feed:
    """Return an item of an iterable with the names, dtypes and shapes of the inputs."""
    where = f"Item {index}"
    if not isinstance(item, Mapping):
        if not hasattr(item, "__array__"):
            raise DataError(
                f"{where} of the calibration data is a {type(item).__name__}, not a dict of arrays.",
                "Use Dataset(iterable, transform) with a transform that returns a dict named as the model's inputs.",
            )
        item = {_only_input(inputs, f"{where} (one array)").name: item}
    wanted = [spec.name for spec in inputs]
    if set(wanted) != set(item):
        raise _wrong_names(where, [str(name) for name in item], wanted)
    feed = {}
    for spec in inputs:
        values = _as_array(item[spec.name], f"{where}, input {spec.name!r}")
        _check_dtype(values.dtype, spec, where)
        _check_shape(values.shape, spec, where)
        feed[spec.name] = _cast(values, spec, where)
    if not _rows(feed):
        raise DataError(f"{where} of the calibration data has no rows.", "Leave empty items out.")
    return feed


def _rows(feed: Feed) -> int:
    """Return the length along axis 0 of the first input that has one."""
    return next((values.shape[0] for values in feed.values() if values.ndim), 1)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_index(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise IndexError(f"item {index} of {count}")


def _as_array(values: Any, where: str) -> np.ndarray:
    try:
        return values if isinstance(values, np.ndarray) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is not an array: {error}.", "Convert it to a numpy array first.") from error


def _fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(dim == want or not isinstance(want, int) for dim, want in zip(shape, wanted, strict=True))


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, where: str) -> None:
    if _fits(shape, spec.shape):
        return
    if _fits((1, *shape), (None, *spec.shape[1:])):
        remedy = "Add the leading batch dimension: values[None]."
    else:
        remedy = "Reshape or resize the data, or check that it belongs to this model."
    raise DataError(
        f"{where}: input {spec.name!r} takes shape {images.shape_text(spec.shape)}, "
        f"but the data has shape {images.shape_text(shape)}.",
        remedy,
    )


def _check_dtype(dtype: np.dtype, spec: TensorSpec, where: str) -> None:
    allowed = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}[spec.dtype.kind]
    if dtype.kind not in allowed:
        raise DataError(
            f"{where}: input {spec.name!r} takes {spec.dtype}, but the data is {dtype}.",
            f"Convert it on purpose, for example with values.astype('{spec.dtype}').",
        )


def _cast(values: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Return a read-only array of the input's dtype; no copy if it has that dtype and is contiguous."""
    if values.dtype != spec.dtype:
        _check_range(values, spec, where)
        with np.errstate(over="ignore"):  # an overflow is infinite, which is reported when the item is read
            values = values.astype(spec.dtype)
    view = np.asarray(values, order="C").view()
    view.flags.writeable = False
    return view


def _check_range(values: np.ndarray, spec: TensorSpec, where: str) -> None:
    """Refuse integers that the input's dtype cannot hold exactly."""
    if values.dtype.kind not in "iu" or not values.size or np.can_cast(values.dtype, spec.dtype):
        return
    if spec.dtype.kind == "f":
        high = 2 ** (int(np.finfo(spec.dtype).nmant) + 1)
        low = -high
    else:
        low, high = int(np.iinfo(spec.dtype).min), int(np.iinfo(spec.dtype).max)
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        raise DataError(
            f"{where}: input {spec.name!r} takes {spec.dtype}, which holds integers from {low} to {high} exactly, "
            f"but the data is {values.dtype} from {least} to {most}.",
            "Convert the data on purpose with values.astype.",
        )


def _check_finite(values: np.ndarray, where: str) -> None:
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if not finite.all():
        raise DataError(
            f"{where}: {values.size - int(finite.sum())} of {values.size} values are NaN or infinite "
            f"(as {values.dtype}).",
            "Leave the sample out or repair it; statistics cannot be taken over it.",
        )


# --------------------------------------------------------------------------------------------------------------- labels


def open_labels(labels: Any, samples: Samples) -> np.ndarray | None:
    """Return the class of every row.

    Parameters
    ----------
    labels : None, "folders", path or array-like
        None: no labels. ``"folders"``: the class sub-folders of the image folder. A .npy file, or a .npz file with
        the array ``labels``. Or the integers themselves.
    samples : Samples
        The rows the labels belong to. Labels may cover the rows that were dropped; those are cut off.

    Returns
    -------
    ndarray of int64, shape (rows,), or None

    Raises
    ------
    DataError
        If labels are missing, not integers, negative or of the wrong length.
    """
    if labels is None:
        return None
    if isinstance(labels, str) and labels == FOLDERS:
        if not samples.class_names:
            raise DataError(
                f"There are no class sub-folders to take labels from ({samples.description}).",
                "Put every image into a sub-folder named after its class, or give labels as .npy.",
            )
        return samples.labels
    lengths = (samples.total_rows, samples.row_count)
    if isinstance(labels, str | os.PathLike):
        return _label_array(_read_labels(Path(labels)), lengths, str(labels))
    return _label_array(_as_array(labels, "The labels"), lengths, "The labels")


def _read_labels(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"Labels {path} are not a file.", f"Give a .npy file, a .npz file or the word {FOLDERS}.")
    if path.suffix.lower() == ".npy":
        return np.array(_map_npy(path))
    if path.suffix.lower() == ".npz":
        with contextlib.closing(_Npz(path)) as arrays:
            if LABELS not in arrays:
                raise DataError(
                    f"Labels {path} have no array {LABELS!r}; it holds {_listed(arrays)}.",
                    f"Save it with numpy.savez(path, {LABELS}=...).",
                )
            return np.array(arrays[LABELS])
    raise DataError(
        f"Labels {path} have the unknown extension {path.suffix!r}.",
        f"Give a .npy file, a .npz file with the array {LABELS!r}, or the word {FOLDERS}.",
    )


def _label_array(values: np.ndarray, lengths: tuple[int, int], where: str) -> np.ndarray:
    """Return labels as int64, cut to the kept rows; ``lengths`` are the rows of the source and those kept."""
    total, kept = lengths
    if values.ndim != 1 or len(values) not in lengths:
        raise DataError(
            f"{where}: the labels have shape {images.shape_text(values.shape)}, but there are {total} rows.",
            f"Give one class number for each row: shape ({total},).",
        )
    if values.dtype.kind not in "iu":
        raise DataError(
            f"{where}: the labels are {values.dtype}; they are class numbers, so integers.",
            "Convert them on purpose, for example with labels.astype('int64') or labels.argmax(axis=1).",
        )
    if len(values) and int(values.min()) < 0:
        raise DataError(
            f"{where}: the labels have the negative value {int(values.min())}; class numbers start at 0.",
            "Leave unlabelled samples out.",
        )
    return np.array(values[:kept], np.int64)


# ---------------------------------------------------------------------------------------------------- split and batches


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Which items serve what; sorted, disjoint, together all of them.

    Parameters
    ----------
    fit : ndarray of int64
        Items the weights are fitted to.
    select : ndarray of int64
        Items that choose between candidates.
    held_out : ndarray of int64
        Items used only for judging.
    """

    fit: np.ndarray
    select: np.ndarray
    held_out: np.ndarray

    @property
    def fit_and_select(self) -> np.ndarray:
        """Everything but the held-out items, sorted."""
        return np.union1d(self.fit, self.select)


def split(count: int, holdout: float, seed: int) -> Split:
    """Split items at random, the same way for the same seed.

    Parameters
    ----------
    count : int
        Number of items.
    holdout : float
        Share of all items that is held out; a fifth of the rest selects. Each part has at least one item.
    seed : int
        Decides the permutation.

    Raises
    ------
    DataError
        If there are fewer than three items.
    """
    if count < LEAST_SAMPLES:
        raise DataError(
            f"There {'is' if count == 1 else 'are'} {count} calibration item{'s' * (count != 1)}; "
            f"at least {LEAST_SAMPLES} are needed: one each to fit, to select and to judge.",
            "Give more data; a few hundred samples are usual.",
        )
    held_out = min(max(1, round(holdout * count)), count - 2)
    rest = count - held_out
    select = min(max(1, round(SELECT_SHARE * rest)), rest - 1)
    order = np.random.default_rng(seed).permutation(count).astype(np.int64)
    parts = np.split(order, [rest - select, rest])
    return Split(*(np.sort(part) for part in parts))


def batches(
    samples: Samples, indices: Iterable[int], size: int, dynamic_batch: bool
) -> Iterator[tuple[np.ndarray, Feed]]:
    """Yield items in the given order, joined along axis 0 where the model allows it.

    Parameters
    ----------
    samples : Samples
        Where the items come from.
    indices : iterable of int
        Items to read, each once.
    size : int
        Most rows in a batch; an item with more is a batch of its own.
    dynamic_batch : bool
        Whether every input has a dynamic axis 0. Consecutive items are joined as long as they agree in every other
        axis; otherwise each item is a batch.

    Yields
    ------
    (ndarray of int64, dict of str to ndarray)
        The items and their feed.
    """
    indexes: list[int] = []
    feeds: list[Feed] = []
    for index in indices:
        feed = samples.item(int(index))
        full = sum(map(_rows, feeds)) + _rows(feed) > size
        if feeds and (full or not dynamic_batch or not _joinable(feeds[0], feed)):
            batch = _join(indexes, feeds)
            indexes, feeds = [], []
            yield batch
        indexes.append(int(index))
        feeds.append(feed)
    if feeds:
        yield _join(indexes, feeds)


def _joinable(first: Feed, second: Feed) -> bool:
    """Return whether axis 0 counts rows in every array of both feeds, and the other axes agree."""
    for feed in (first, second):
        if any(values.ndim == 0 or values.shape[0] != _rows(feed) for values in feed.values()):
            return False
    return all(first[name].shape[1:] == second[name].shape[1:] for name in first)


def _join(indexes: list[int], feeds: list[Feed]) -> tuple[np.ndarray, Feed]:
    feed = {name: _stack([feed[name] for feed in feeds]) for name in feeds[0]}
    return np.array(indexes, np.int64), feed


# ---------------------------------------------------------------------------------------------------------- random data


@dataclasses.dataclass(frozen=True, eq=False)
class _Random:
    """Items drawn anew from (seed, index) whenever they are read."""

    inputs: Sequence[TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Feed:
        generator = np.random.default_rng((self.seed, index))
        return {spec.name: self._draw(generator, spec) for spec in self.inputs}

    def _draw(self, generator: np.random.Generator, spec: TensorSpec) -> np.ndarray:
        shape = self.shapes[spec.name]
        if spec.dtype.kind == "f":
            return np.asarray(generator.standard_normal(shape)).astype(spec.dtype)
        return np.asarray(generator.integers(0, 2, shape)).astype(spec.dtype)

    def rows(self, index: int) -> int:
        return next((shape[0] for shape in self.shapes.values() if shape), 1)

    def close(self) -> None:
        """Nothing to release."""


def random_samples(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], count: int, seed: int
) -> Samples:
    """Return items of random numbers: standard normal floats, integers 0 or 1, random bools.

    Parameters
    ----------
    inputs : sequence of TensorSpec
        The model's inputs.
    shapes : mapping of str to tuple of int
        Full shapes, with the batch, of inputs that have dynamic dimensions other than the batch.
    count : int
        Number of items.
    seed : int
        Same seed, same items, in whatever order they are read.

    Raises
    ------
    DataError
        If a dynamic dimension is not given, or a given shape contradicts the model.
    """
    specs = _feedable(inputs)
    unknown = [name for name in shapes if name not in {spec.name for spec in specs}]
    if unknown:
        raise DataError(
            f"--shape names {_listed(unknown)}, but the model's inputs are {_listed(specs)}.", "Correct the name."
        )
    if count < 1:
        raise DataError(f"{count} random items were asked for.", "At least one is needed.")
    sizes = {spec.name: _random_shape(spec, shapes.get(spec.name)) for spec in specs}
    store = _Random(specs, sizes, count, seed)
    text = _listed(f"{name} {images.shape_text(shape)}" for name, shape in sizes.items())
    rows = count * store.rows(0)
    return Samples(store, f"random numbers, no data: {count} items, {text}", total_rows=rows)


def _random_shape(spec: TensorSpec, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is not None:
        if not _fits(given, spec.shape) or any(dim < 1 for dim in given):
            raise DataError(
                f"--shape {spec.name}:{','.join(map(str, given))} does not fit the model's input {spec}.",
                "Give every dimension as a positive number, with the batch; fixed dimensions stay as they are.",
            )
        return tuple(given)
    dims = [1 if axis == 0 and not isinstance(dim, int) else dim for axis, dim in enumerate(spec.shape)]
    open_dims = [
        dim if isinstance(dim, str) else f"axis {axis}" for axis, dim in enumerate(dims) if not isinstance(dim, int)
    ]
    if open_dims:
        example = ",".join(str(dim) if isinstance(dim, int) else _example_dim(spec) for dim in dims)
        raise DataError(
            f"Input {spec.name!r} of shape {images.shape_text(spec.shape)} has open dimensions: {_listed(open_dims)}.",
            f"Give its shape, for example --shape {spec.name}:{example}.",
        )
    return tuple(dim for dim in dims if isinstance(dim, int))


def _example_dim(spec: TensorSpec) -> str:
    return "224" if len(spec.shape) == 4 else "128"
