"""Records that are written as JSON, and how a report gets into its file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from onnx_lrs.errors import OutputError


@dataclasses.dataclass(frozen=True)
class Report:
    """A record with a JSON form; a field whose metadata says ``json=False`` is left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values (non-finite numbers become None)."""
        clean: dict[str, Any] = _jsonable(self)
        return clean

    def to_json(self, indent: int | None = 2) -> str:
        """Return the record as a JSON text with keys in a fixed order."""
        return json.dumps(self.to_dict(), indent=indent)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.metadata.get("json", True)}
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that a file could not be written into at the end of a run.

    Raises
    ------
    OutputError
        If it is missing, or nothing can be written there; ``flag`` named the file.
    """
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of {flag} does not exist.", "Create it first.")
    try:  # access rights alone do not tell: the file system may be read-only, or not for files
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = f"Choose another folder for {flag}."
        raise OutputError(f"The folder {folder} cannot be written to: {error.strerror or error}.", remedy) from None


def check_file(place: Path, flag: str) -> None:
    """Refuse a place that a text could not be written to at the end of a run; pipes and devices may be there.

    Raises
    ------
    OutputError
        If it is a folder, or its folder is missing or cannot be written to.
    """
    if place.is_dir():
        raise OutputError(f"{flag} {place} is a folder.", "Name a file in a folder that exists.")
    if place.is_file() or not place.exists():
        check_folder(place.resolve().parent, flag)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; a link is followed, a pipe or device is written to directly.

    Raises
    ------
    OutputError
        If the file cannot be written; what was there before is untouched.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The report could not be written to {path}: {error.strerror or error}.",
            "Check the folder's permissions and free space; the model file is not affected.",
        ) from error
