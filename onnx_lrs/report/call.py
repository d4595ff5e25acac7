"""A call of the library as a person would write it again, objects that cannot be written abbreviated."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 1000  # characters of a value
MOST = 16  # entries of a list that are written out
PLAIN = (bool, int, float, str)


def python_call(function: str, given: Sequence[Any], named: Mapping[str, Any]) -> str:
    """Return a call of a function of ``onnx_lrs``; arguments that are None are left out.

    Settings are written with the fields that differ from their defaults, other objects than texts, numbers and paths as
    ``<their type>``, arrays with their shape.
    """
    while given and given[-1] is None:
        given = given[:-1]
    parts = [_written(value) for value in given]
    parts += [f"{name}={_written(value)}" for name, value in named.items() if value is not None]
    return f"onnx_lrs.{function}({', '.join(parts)})"


def _written(value: Any) -> str:
    if value is None or isinstance(value, PLAIN):
        return repr(value) if len(repr(value)) <= LONGEST else reprlib.repr(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if dataclasses.is_dataclass(value) and type(value).__module__ == "onnx_lrs.config":
        return f"onnx_lrs.{type(value).__name__}({', '.join(_fields(value))})"
    if isinstance(value, list | tuple) and len(value) <= MOST and all(_is_short(each) for each in value):
        inner = ", ".join(map(_written, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, dict) and len(value) <= MOST and all(_is_short(each) for each in value.values()):
        return f"{{{', '.join(f'{_written(name)}: {_written(each)}' for name, each in value.items())}}}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<array {value.dtype} {tuple(value.shape)}>"
    return f"<{type(value).__name__}>"


def _is_short(value: Any) -> bool:
    return isinstance(value, (*PLAIN, os.PathLike, tuple)) or value is None or hasattr(value, "SerializeToString")


def _fields(settings: Any) -> list[str]:
    """Return the fields of settings that were given another value than their default."""
    found = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            found.append(f"{field.name}={_written(value)}")
    return found
