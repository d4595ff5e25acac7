"""Finished parts of a run in a folder, so that a run that was interrupted goes on where it was.

A part is one file: a line that names the format, an index as JSON, then the arrays as they lie in memory. Nothing is
pickled, so reading a part runs no code; floats and arrays come back bit by bit. Parts of one run share a subfolder,
named by a hash of everything that decides their content (:class:`Identity`), so nothing can be taken for something
else. A part is written under another name and then moved into place; one that is damaged all the same counts as
missing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import hashlib
import json
import os
import re
import secrets
import struct
import sys
import threading
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.errors import ConfigError, OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Arrays = list[NDArray[Any]]

MAGIC = b"onnx-lrs part 1\n"
HEAD = struct.Struct("<QI")  # length and CRC of the index
ALIGNED = 64  # bytes; arrays begin at multiples of it
SUFFIX, DRAFT = ".part", ".tmp"
DESCRIPTION, LOCK = "run.json", "lock"
LOCKED_BYTE = 1 << 30  # far behind the process id: Windows lets nobody read what is locked
KEY_DIGITS = 16
READABLE = 40  # characters of a part's name that its file's name shows


# ------------------------------------------------------------------------------------------------ values <-> trees
# A tree holds what JSON holds, and an object with the key "is" for everything else. Classes stand in it as they are.


def encode(value: Any) -> tuple[Any, Arrays]:
    """Return a value as a tree and the arrays that it refers to by number, C-contiguous.

    Known are dataclasses, enums, tuples, lists, dicts, strings, numbers, bool, None, NumPy's arrays and scalars, and
    SciPy's CSR arrays.

    Raises
    ------
    TypeError
        For anything else.
    """
    arrays: Arrays = []
    return _encoded(value, arrays), arrays


def _encoded(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, enum.Enum):
        return {"is": "enum", "class": type(value), "name": value.name}
    if isinstance(value, np.ndarray | np.generic):
        return {"is": "array" if isinstance(value, np.ndarray) else "scalar", "number": _noted(value, arrays)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encoded(each, arrays) for each in value]
    if type(value) is tuple:
        return {"is": "tuple", "of": [_encoded(each, arrays) for each in value]}
    if isinstance(value, dict | types.MappingProxyType):
        return {"is": "dict", "of": [[_encoded(key, arrays), _encoded(each, arrays)] for key, each in value.items()]}
    if isinstance(value, scipy.sparse.csr_array):
        parts = [_noted(part, arrays) for part in (value.data, value.indices, value.indptr)]
        return {"is": "csr", "numbers": parts, "shape": [int(size) for size in value.shape]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encoded(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"is": "record", "class": type(value), "fields": fields}
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def _noted(values: Any, arrays: Arrays) -> int:
    found = np.asarray(values, order="C")
    if found.dtype.kind in "OV":
        raise TypeError(f"an array of {found.dtype} cannot be kept")
    arrays.append(found)
    return len(arrays) - 1


def decode(tree: Any, arrays: Sequence[NDArray[Any]]) -> Any:
    """Return the value of a tree; see :func:`encode`."""
    if isinstance(tree, list):
        return [decode(each, arrays) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree["is"]
    if kind == "array":
        return arrays[tree["number"]]
    if kind == "scalar":
        return arrays[tree["number"]][()]
    if kind == "tuple":
        return tuple(decode(each, arrays) for each in tree["of"])
    if kind == "dict":
        return {decode(key, arrays): decode(each, arrays) for key, each in tree["of"]}
    if kind == "csr":
        return _csr([arrays[number] for number in tree["numbers"]], tree["shape"])
    if kind == "enum":
        return tree["class"][tree["name"]]
    return tree["class"](**{name: decode(each, arrays) for name, each in tree["fields"].items()})


def _csr(parts: Sequence[NDArray[Any]], shape: Sequence[int]) -> scipy.sparse.csr_array:
    data, indices, indptr = parts
    matrix = scipy.sparse.csr_array((data, indices, indptr), shape=tuple(shape))
    matrix.indices, matrix.indptr = indices, indptr  # SciPy may have chosen smaller integers
    return matrix


def tidied(value: Any) -> Any:
    """Return a value as it would come back from a folder: equal bit by bit, every array C-contiguous.

    BLAS takes another way, and rounds in another place, for a transposed array; whoever goes on with the tidied value
    goes on as a run would that reads it from a folder.
    """
    return decode(*encode(value))


# ------------------------------------------------------------------------------------------------ parts <-> files


class DamagedError(ValueError):
    """A part that cannot be what was written."""


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8) if values.nbytes else np.zeros(0, np.uint8)


def _aligned(place: int) -> int:
    return -(-place // ALIGNED) * ALIGNED


def write_part(file: IO[bytes], name: str, value: Any, classes: Mapping[type, str]) -> None:
    """Write a value; only the given classes may occur in it.

    Raises
    ------
    TypeError
        If it holds something that cannot be kept.
    """
    tree, arrays = encode(value)
    listed, place = [], 0
    for values in arrays:
        crc = zlib.crc32(_bytes_of(values).data)
        listed.append({"dtype": values.dtype.str, "shape": values.shape, "at": place, "crc": crc})
        place = _aligned(place + values.nbytes)

    def named(kind: Any) -> str:
        if kind not in classes:
            raise TypeError(f"{kind} is not among the records that may be kept")
        return classes[kind]

    index = json.dumps({"name": name, "value": tree, "arrays": listed}, default=named).encode("ascii")
    head = MAGIC + HEAD.pack(len(index), zlib.crc32(index)) + index
    file.write(head.ljust(_aligned(len(head)), b"\0"))
    for values in arrays:
        file.write(_bytes_of(values).data)
        file.write(bytes(_aligned(values.nbytes) - values.nbytes))


def read_part(file: IO[bytes], name: str, classes: Mapping[str, type], mapped: bool = False) -> Any:
    """Return the value of a part; ``mapped`` leaves its arrays in the file, read-only.

    Raises
    ------
    ValueError
        If the file is not whole, or is not the part of that name.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(len(MAGIC) + HEAD.size)
    if len(head) < len(MAGIC) + HEAD.size or not head.startswith(MAGIC):
        raise DamagedError("it has no head")
    length, crc = HEAD.unpack_from(head, len(MAGIC))
    if length > size:
        raise DamagedError("it is cut off")
    text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise DamagedError("its index is damaged")
    index = json.loads(text)
    if index["name"] != name:
        raise DamagedError(f"it belongs to {index['name']!r}")
    start = _aligned(len(head) + length)
    arrays = [_read_array(file, size, start + one["at"], one, mapped) for one in index["arrays"]]
    return decode(_with_classes(index["value"], classes), arrays)


def _read_array(file: IO[bytes], size: int, place: int, about: Mapping[str, Any], mapped: bool) -> NDArray[Any]:
    dtype, shape = np.dtype(about["dtype"]), tuple(about["shape"])
    length = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if place + length > size:
        raise DamagedError("it is cut off")
    if mapped and length:
        values = np.asarray(np.memmap(file, dtype, "r", place, shape))
    else:
        values = np.empty(shape, dtype)
        file.seek(place)
        if length and file.readinto(_bytes_of(values).data) < length:  # type: ignore[attr-defined]
            raise DamagedError("it is cut off")
    if zlib.crc32(_bytes_of(values).data) != about["crc"]:
        raise DamagedError("its numbers are damaged")
    return values


def _with_classes(tree: Any, classes: Mapping[str, type]) -> Any:
    """Return a tree with the classes in place of their names."""
    if isinstance(tree, list):
        return [_with_classes(each, classes) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {name: classes[each] if name == "class" else _with_classes(each, classes) for name, each in tree.items()}


# ------------------------------------------------------------------------------------------------ the folder


def _plain(value: Any) -> Any:
    """Return a NumPy scalar, which a setting may be, as a number of Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a setting of type {type(value).__name__} cannot be told apart from others")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What parts belong to.

    Parameters
    ----------
    deciding : mapping of str to JSON value
        Everything that decides what the parts hold: the key is its hash.
    words : mapping of str to str
        What it is in plain words, for whoever finds the folder.
    """

    deciding: Mapping[str, Any]
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """The hash that stands for it, hexadecimal."""
        return hashlib.sha256(json.dumps(self.deciding, sort_keys=True, default=_plain).encode()).hexdigest()


def _says_nothing(text: str) -> None:
    """Drop a note."""


class Work:
    """Finished parts by kind and name. Without a folder nothing is kept, and nothing is found.

    Close it, or use it as a context manager; the parts stay. Call it from one thread.
    """

    def __init__(
        self,
        folder: Path | None = None,
        records: Iterable[type] = (),
        note: Callable[[str], None] = _says_nothing,
    ) -> None:
        self.folder = folder
        self._classes = {kind.__name__: kind for kind in records}
        self._names = {kind: name for name, kind in self._classes.items()}
        self._note = note
        self._guard = contextlib.ExitStack()
        self._tag = ""

    def branch(self, tag: str) -> Work:
        """Return a view that keeps its parts apart from those of other tags, in the same folder; it is never closed."""
        twin = copy.copy(self)
        twin._tag = f"{self._tag}{tag} "
        return twin

    @classmethod
    def open(cls, place: Path | None, identity: Identity, records: Iterable[type], note: Callable[[str], None]) -> Work:
        """Return the parts of one run under ``place``, which is made if it is missing.

        Parameters
        ----------
        place : Path, optional
            The work folder; None: nothing is kept.
        identity : Identity
            What the run is; each has its own subfolder.
        records : iterable of type
            Dataclasses and enums that parts may hold.
        note : callable
            Is told in a sentence what was found.

        Raises
        ------
        ConfigError
            If another process works on the same subfolder, or ``place`` is a file.
        OutputError
            If the folder cannot be made or written to.
        """
        if place is None:
            return cls(None, records, note)
        refuse_file(place)
        work = cls(place / identity.key[:KEY_DIGITS], records, note)
        assert work.folder is not None
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
            work._guard.enter_context(_locked(work.folder))
            work._begin(place, identity)
        except OSError as error:
            work.close()
            raise OutputError(
                f"The work folder {work.folder} cannot be used: {error.strerror or error}.",
                "Name another folder with --work, or leave it out.",
            ) from None
        return work

    def _begin(self, place: Path, identity: Identity) -> None:
        """Say what there is, remove what was half-written, and describe the folder."""
        assert self.folder is not None
        for draft in self.folder.glob(f"*{DRAFT}"):
            draft.unlink()
        count = sum(1 for _ in self.folder.glob(f"*{SUFFIX}"))
        if count:
            parts = "1 finished part is" if count == 1 else f"{count} finished parts are"
            self._note(f"Going on from {self.folder}: {parts} not computed again.")
        elif others := _others(self.folder, identity):
            self._note(f"Nothing in {place} belongs to this run, it starts from the beginning; {others}.")
        text = json.dumps({**identity.words, "key": identity.key, **identity.deciding}, indent=2, default=_plain)
        with replacing(self.folder / DESCRIPTION) as file:
            file.write(text.encode("ascii") + b"\n")

    def put(self, kind: str, name: str, value: Any) -> Any:
        """Keep a value and return it tidied (:func:`tidied`), which is what :meth:`get` will return.

        Raises
        ------
        OutputError
            If it cannot be written; what was kept before stays.
        """
        value = tidied(value)
        if self.folder is None:
            return value
        try:
            with replacing(self._path(kind, name)) as file:
                write_part(file, name, value, self._names)
        except OSError as error:
            raise OutputError(
                f"The {kind} of {name!r} could not be kept in {self.folder}: {error.strerror or error}.",
                "Free space there or name another folder with --work; nothing that was finished before is lost.",
            ) from None
        return value

    def get(self, kind: str, name: str, mapped: bool = False) -> Any:
        """Return what was kept, None if there is nothing; ``mapped`` arrays stay in the file and are read-only."""
        if self.folder is None:
            return None
        path = self._path(kind, name)
        try:
            with path.open("rb") as file:
                return read_part(file, name, self._classes, mapped)
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as error:
            self._note(f"The {kind} of {name!r} in {path} is damaged ({error}) and is computed again.")
            return None

    def has(self, kind: str, name: str) -> bool:
        """Return whether something was kept and is whole."""
        return self.get(kind, name, mapped=True) is not None

    def found(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """Return what was kept under some of these names, in their order."""
        kept = ((name, self.get(kind, name)) for name in names)
        return {name: value for name, value in kept if value is not None}

    def _path(self, kind: str, name: str) -> Path:
        assert self.folder is not None
        name = self._tag + name
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-READABLE:].strip("-")
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_DIGITS]
        return self.folder / f"{kind}-{readable}-{digest}{SUFFIX}"

    def close(self) -> None:
        """Let others work on the folder."""
        self._guard.close()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def refuse_file(place: Path) -> None:
    """Refuse a work folder that is a file.

    Raises
    ------
    ConfigError
        Says so.
    """
    if place.exists() and not place.is_dir():
        raise ConfigError(f"--work {place} is not a folder.", "Name a folder; it is made if it is missing.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of ``path`` when the block ends well, and is gone when it does not."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    try:
        with draft.open("xb") as file:  # for others to read as the system's default says; mkstemp's are not
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _others(own: Path, identity: Identity) -> str:
    """Say in what the last of the other runs beside a run's own folder differs; empty if there is none."""
    files = [path for path in own.parent.glob(f"*/{DESCRIPTION}") if path.parent.name != own.name]
    files.sort(key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text(encoding="ascii"))
            now = json.loads(json.dumps(identity.deciding, default=_plain))
            different = ", ".join(_differences(before, now))
            return f"the run in {path.parent.name} differs in: {different}"
    return ""


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, f"{above}{name}.")
        elif value != old:
            found.append(f"{above}{name}")
    return found


# ------------------------------------------------------------------------------------------------ one run a folder

_busy: set[Path] = set()  # folders of this process: the locks of the system are between processes
_busy_lock = threading.Lock()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; the system lets go of it when the process ends, however that happens."""
    own = folder.resolve()
    with _busy_lock:
        if own in _busy:
            raise _in_use(folder, str(os.getpid()))
        _busy.add(own)
    try:
        with (folder / LOCK).open("a+b") as file:
            if not _lock(file):
                file.seek(0)
                raise _in_use(folder, file.read(20).decode("ascii", "replace").strip() or "unknown")
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield
    finally:
        with _busy_lock:
            _busy.discard(own)


def _in_use(folder: Path, process: str) -> ConfigError:
    return ConfigError(
        f"The work folder {folder} is in use by process {process}.",
        "Wait until it ends, or name another folder with --work.",
    )


def _lock(file: IO[bytes]) -> bool:
    """Return whether the file could be locked for this process until it is closed."""
    try:
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:  # not flock: children would inherit it, and outlive a killed parent
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
