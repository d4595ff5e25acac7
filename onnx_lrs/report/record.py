"""Records that are written as JSON, and how a report gets into its file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
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
