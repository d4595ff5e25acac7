"""Arrays that wait: in memory up to a limit, beyond it in temporary files without a name.

A file without a name is gone with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Hashable
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.errors import OutputError

Key = Hashable


class Store:
    """Arrays by name and number; those of one name are dropped together. Close it, or use it as a context manager."""

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._held: dict[Key, dict[int, NDArray[Any]]] = {}
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
        if values.nbytes <= self._room:
            self._room -= values.nbytes
            held[number] = values
        else:
            held[number] = self._on_disk(name, values)

    def _on_disk(self, name: Key, values: NDArray[Any]) -> NDArray[Any]:
        try:
            if name not in self._files:
                self._files[name] = tempfile.TemporaryFile(prefix="onnx-lrs-")  # noqa: SIM115 - dropped by name
            file = self._files[name]
            place = file.seek(0, 2)
            np.ascontiguousarray(values).tofile(file)
            file.flush()
        except OSError as error:
            raise OutputError(
                f"Activations could not be kept in {tempfile.gettempdir()}: {error.strerror or error}.",
                "Free space there, point TMPDIR elsewhere, or allow more --memory.",
            ) from None
        self.spilled_bytes += values.nbytes
        return np.memmap(file, values.dtype, "r", place, values.shape)

    def get(self, name: Key, number: int) -> NDArray[Any]:
        """Return an array that was put; treat it as read-only."""
        return self._held[name][number]

    def __contains__(self, name: Key) -> bool:
        return name in self._held

    def names(self) -> set[Key]:
        """Return the names of what is kept."""
        return set(self._held)

    def drop(self, name: Key) -> None:
        """Forget the arrays of a name, if there are any."""
        for values in self._held.pop(name, {}).values():
            if not isinstance(values, np.memmap):
                self._room += values.nbytes
        with contextlib.suppress(KeyError):
            self._files.pop(name).close()

    def close(self) -> None:
        """Forget everything."""
        for name in [*self._held]:
            self.drop(name)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
