"""Arrays that wait: in memory up to a limit, beyond it in temporary files without a name.

A file without a name is gone with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Hashable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.errors import OutputError, remedy_of

Key = Hashable
_ALL = object()  # the name of the file that all names share


@dataclasses.dataclass(frozen=True)
class _Spilled:
    """Where an array lies in its file. It is mapped when it is asked for: every mapping holds a file descriptor."""

    file: IO[bytes]
    place: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def mapped(self) -> NDArray[Any]:
        return np.memmap(self.file, self.dtype, "r", self.place, self.shape)


def _failed(error: OSError) -> OutputError:
    return OutputError(
        f"Arrays could not be kept in {tempfile.gettempdir()}: {error.strerror or error}.",
        remedy_of(error, "Free space there, point TMPDIR elsewhere, or allow more --memory."),
    )


class Store:
    """Arrays by name and number; those of one name are dropped together. Close it, or use it as a context manager.

    Parameters
    ----------
    limit_bytes : int
        What is held in memory at most.
    one_file : bool
        All names in one file, which keeps its length until the end; for hundreds of names at a time. Otherwise every
        name has a file, and a descriptor, of its own: space is free as soon as the name is dropped.
    """

    def __init__(self, limit_bytes: int, one_file: bool = False) -> None:
        self._room = limit_bytes
        self._one_file = one_file
        self._held: dict[Key, dict[int, NDArray[Any] | _Spilled]] = {}
        self._files: dict[Key, IO[bytes]] = {}
        self.spilled_bytes = 0

    def put(self, name: Key, number: int, values: NDArray[Any]) -> None:
        """Keep an array.

        Raises
        ------
        OutputError
            If it has to go to disk and the disk is full.
        """
        held = self._held.setdefault(name, {})
        if values.nbytes <= self._room or values.dtype.hasobject:  # what is no numbers cannot be mapped
            self._room -= values.nbytes
            held[number] = values
        else:
            held[number] = self._on_disk(name, values)

    def _on_disk(self, name: Key, values: NDArray[Any]) -> _Spilled:
        key = _ALL if self._one_file else name
        try:
            if key not in self._files:
                # unbuffered: what a full disk refuses fails here, and nothing is left to be written on close
                self._files[key] = tempfile.TemporaryFile(prefix="onnx-lrs-", buffering=0)  # noqa: SIM115
            file = self._files[key]
            place = file.seek(0, 2)
            rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise _failed(error) from None
        self.spilled_bytes += values.nbytes
        return _Spilled(file, place, values.dtype, values.shape)

    def get(self, name: Key, number: int) -> NDArray[Any]:
        """Return an array that was put; treat it as read-only.

        Raises
        ------
        OutputError
            If there are too many open files to map it.
        """
        values = self._held[name][number]
        if not isinstance(values, _Spilled):
            return values
        try:
            return values.mapped()
        except OSError as error:
            raise _failed(error) from None

    def __contains__(self, name: Key) -> bool:
        return name in self._held

    def names(self) -> set[Key]:
        """Return the names of what is kept."""
        return set(self._held)

    def drop(self, name: Key) -> None:
        """Forget the arrays of a name, if there are any."""
        for values in self._held.pop(name, {}).values():
            if not isinstance(values, _Spilled):
                self._room += values.nbytes
        with contextlib.suppress(KeyError):
            self._files.pop(name).close()

    def close(self) -> None:
        """Forget everything."""
        for name in [*self._held]:
            self.drop(name)
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
