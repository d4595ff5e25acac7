"""Where a result was made: versions, machine, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

PACKAGES = ("onnx-lrs", "numpy", "scipy", "onnx", "onnx-graphsurgeon", "onnxruntime-gpu", "onnxruntime")


def environment(provider: str, threads: int, seed: int) -> dict[str, Any]:
    """Return versions of what decides the result, the machine's kind, and how it was used."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "provider": provider,
        "threads": threads,
        "seed": seed,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
