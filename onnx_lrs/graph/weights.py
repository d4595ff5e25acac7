"""Weights that lie in files: references that hold wherever a TensorProto goes, and a scratch file for new weights.

A model with external data names its data file relative to its own folder. In memory the name is absolute instead, so a
tensor may be copied into any other ModelProto and still be found: :func:`read` loads it, :func:`written` streams it to
a new data file, and a session maps it. Only initialisers and Constant nodes of the main graph stay outside, and only
from 64 KiB on; everything else is loaded with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from onnx_lrs.errors import ModelError, OutputError, remedy_of

SMALLEST_OUTSIDE = 64 * 1024  # bytes; smaller tensors are in memory
SMALLEST_SAVED = 1024  # bytes; smaller ones stay in the model file, as onnx.save_model does it
PAGE = 4096  # bytes; large tensors begin at a page of the data file, so that a mapping of one needs no copy
CHUNK = 1 << 24  # bytes copied at a time
EXTENT = 1 << 28  # bytes of a scratch file that are mapped at a time at most: each mapping holds a file descriptor
SMALLEST_EXTENT = 1 << 20  # bytes that are mapped at first
KINDS = {  # element types whose bytes in a file are NumPy's own
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16),
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    path: pathlib.Path
    offset: int
    length: int


def is_outside(tensor: TensorProto) -> bool:
    """Return whether a tensor's data lies in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def references(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield the initialisers and values of Constant nodes of the main graph that lie in files."""
    yield from filter(is_outside, model.graph.initializer)
    for node in model.graph.node:
        if constant_outside(node):
            yield node.attribute[0].t


def constant_outside(node: onnx.NodeProto) -> bool:
    """Return whether a node is a Constant whose value lies in a file."""
    return node.op_type == "Constant" and len(node.attribute) == 1 and is_outside(node.attribute[0].t)


def place_of(tensor: TensorProto) -> Place:
    """Return where a tensor of :func:`references` lies."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return Place(pathlib.Path(entries["location"]), int(entries.get("offset", 0)), int(entries["length"]))


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor a reference in place; what it held in memory goes."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def may_stay_outside(tensor: TensorProto) -> bool:
    """Return whether a tensor just read from a model file is large, plain, and as long as its shape says."""
    size = least_bytes(tensor)
    return size >= SMALLEST_OUTSIDE and ExternalDataInfo(tensor).length in (None, size)


def least_bytes(tensor: TensorProto) -> int:
    """Return how many bytes of a file a tensor needs by its shape; 0 where a file may hold its type in another way."""
    return _size(tensor) if tensor.data_type in KINDS else 0


def anchor(tensor: TensorProto, folder: pathlib.Path) -> None:
    """Make a model file's reference absolute, with offset and length."""
    info = ExternalDataInfo(tensor)
    refer(tensor, str(folder / info.location), info.offset or 0, _size(tensor))


def _size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * _kind(tensor).itemsize


def _kind(tensor: TensorProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


def read(tensor: TensorProto) -> NDArray[Any]:
    """Return the values of a tensor that lies in a file, read afresh.

    Raises
    ------
    ModelError
        If the file is gone or has become shorter since the model was loaded.
    """
    return np.frombuffer(_bytes(tensor), _kind(tensor)).reshape(tuple(tensor.dims))


def _bytes(tensor: TensorProto) -> bytes:
    place = place_of(tensor)
    with _opened(place) as source:
        content = source.read(place.length)
    if len(content) < place.length:
        raise _changed(place)
    return content


@contextlib.contextmanager
def _opened(place: Place) -> Iterator[BinaryIO]:
    try:
        source = place.path.open("rb")
    except OSError:
        raise _changed(place) from None
    with source:
        source.seek(place.offset)
        yield source


def _changed(place: Place) -> ModelError:
    return ModelError(f"The data file {place.path} changed while it was in use.", "Leave it alone and start again.")


def outside_bytes(model: onnx.ModelProto) -> int:
    """Return how many bytes of a model's weights lie in files."""
    return sum(place_of(tensor).length for tensor in references(model))


def common_folder(model: onnx.ModelProto) -> pathlib.Path | None:
    """Return the folder above all files that hold the model's weights; None without any, or on different drives."""
    folders = {str(place_of(tensor).path.parent) for tensor in references(model)}
    drives = {pathlib.PurePath(folder).drive for folder in folders}
    return pathlib.Path(os.path.commonpath(folders)) if len(drives) == 1 else None


def below(model: onnx.ModelProto, root: pathlib.Path) -> onnx.ModelProto:
    """Return a copy of the model whose references are relative to a folder above them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in references(copy):
        place = place_of(tensor)
        refer(tensor, place.path.relative_to(root).as_posix(), place.offset, place.length)
    return copy


def loaded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with all weights in memory."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in references(copy):
        tensor.raw_data = _bytes(tensor)
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return copy


def written(model: onnx.ModelProto, data: BinaryIO, name: str) -> onnx.ModelProto:
    """Return a copy of the model that refers to the file ``name``; its weights are appended to ``data``, that file.

    Weights that lie in other files are copied from there in chunks.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in (*copy.graph.initializer, *(n.attribute[0].t for n in copy.graph.node if constant_outside(n))):
        if is_outside(tensor):
            place = place_of(tensor)
            offset, length = _aligned(data, place.length), place.length
            _stream(place, data)
        elif len(tensor.raw_data) >= SMALLEST_SAVED:
            offset, length = _aligned(data, len(tensor.raw_data)), len(tensor.raw_data)
            data.write(tensor.raw_data)
        else:
            continue
        refer(tensor, name, offset, length)
    return copy


def _aligned(data: BinaryIO, length: int) -> int:
    """Fill up to where a tensor of that length may begin, and return that offset."""
    step = PAGE if length >= SMALLEST_OUTSIDE else 64
    data.write(b"\0" * (-data.tell() % step))
    return data.tell()


def _stream(place: Place, data: BinaryIO) -> None:
    with _opened(place) as source:
        left = place.length
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise _changed(place)
            data.write(chunk)
            left -= len(chunk)


class Scratch:
    """A file for new weights and factors of a model that is not to be held in memory.

    It lies beside the output, where there has to be room for the same weights anyway (a folder for temporary files may
    be memory itself); see :func:`scratch_for`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._path = folder / "weights"
        self._path.touch()
        self._end = 0  # of what is written
        self._begin = 0  # of the extent that is mapped
        self._extent: mmap.mmap | None = None

    def keep(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the same values mapped from the file; small arrays as they are.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        if values.nbytes < SMALLEST_OUTSIDE:
            return values
        place = self._append(values)
        try:
            extent, begin = self._mapped(place)
        except OSError as error:
            raise self._failed(error) from None
        return np.frombuffer(extent, values.dtype, values.size, place.offset - begin).reshape(values.shape)

    def _mapped(self, place: Place) -> tuple[mmap.mmap, int]:
        """Return a mapping of the file that holds a place, and where it begins in the file.

        The file is made longer for it than what is written yet, about twice at most: where the file system has holes
        that takes no space.
        """
        end = place.offset + place.length
        if self._extent is None or end > self._begin + len(self._extent):
            begin = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
            length = max(end - begin, min(max(begin, SMALLEST_EXTENT), EXTENT))
            with self._path.open("r+b") as data:
                data.truncate(begin + length)
                extent = mmap.mmap(data.fileno(), length, access=mmap.ACCESS_READ, offset=begin)
            self._begin, self._extent = begin, extent
        return self._extent, self._begin

    def tensor(self, name: str, values: NDArray[Any]) -> TensorProto:
        """Return a reference to values in the file.

        Raises
        ------
        OutputError
            If they cannot be written.
        """
        place = self._append(values)
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=values.shape)
        refer(tensor, str(place.path), place.offset, place.length)
        return tensor

    def _append(self, values: NDArray[Any]) -> Place:
        try:
            with self._path.open("r+b") as data:
                data.seek(self._end)
                offset = _aligned(data, values.nbytes)
                data.write(np.ascontiguousarray(values).data)
                self._end = data.tell()
        except OSError as error:
            raise self._failed(error) from None
        return Place(self._path, offset, values.nbytes)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"New weights could not be written to {self._path.parent.parent}: {error.strerror or error}.",
            remedy_of(error, "Free space there, or choose another folder for the output."),
        )


@contextlib.contextmanager
def scratch_for(model: onnx.ModelProto, output: pathlib.Path | None) -> Iterator[Scratch | None]:
    """Give a scratch file beside the output to a model whose weights lie in files; None to one that is in memory.

    Raises
    ------
    OutputError
        If there is no place for it.
    """
    if not any(True for _ in references(model)):
        yield None
        return
    prefix, parent = ("onnx-lrs-", None) if output is None else (f".{output.name}.", output.resolve().parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"No temporary folder could be made: {error}.", "Choose another folder for -o.") from None
    with folder as name:
        yield Scratch(pathlib.Path(name).resolve())
