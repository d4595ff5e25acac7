"""Records that are written as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """A record with a JSON form; a field whose metadata says ``json=False`` is left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values (non-finite numbers become None)."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("json", True)}
        clean: dict[str, Any] = _jsonable(plain)
        return clean

    def to_json(self, indent: int | None = 2) -> str:
        """Return the record as a JSON text with keys in a fixed order."""
        return json.dumps(self.to_dict(), indent=indent)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
