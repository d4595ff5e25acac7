"""What the machine that runs the tests has."""

from __future__ import annotations

import functools

from onnx_lrs.errors import RuntimeEnvironmentError
from onnx_lrs.runtime.session import check_provider


@functools.cache
def starts(provider: str) -> bool:
    """Return whether a provider of ONNX Runtime starts here."""
    try:
        check_provider(provider)
    except RuntimeEnvironmentError:
        return False
    return True
