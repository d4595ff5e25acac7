"""Where a result was made: versions, machine, memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from threadpoolctl import threadpool_info

PACKAGES = ("onnx-lrs", "numpy", "scipy", "onnx", "onnx-graphsurgeon", "onnxruntime-gpu", "onnxruntime")


def environment(provider: str, threads: int, seed: int) -> dict[str, Any]:
    """Return versions of what decides the result, the machine's kind, and how it was used."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "provider": provider,
        "threads": threads,
        "seed": seed,
    }


def processor(entries: Sequence[str] = ("model name", "Hardware")) -> str:
    """Return the processor's name; on Linux these entries of /proc/cpuinfo, as far as they are there."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    about = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = [value.strip() for name in entries for key, value in about.items() if key.strip() == name]
    return " ".join(found) or platform.machine()


def accelerators() -> str:
    """Return the names and drivers of NVIDIA's devices, as their own tool tells them."""
    wanted = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(wanted, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "GPU without a name"
    return "; ".join(line.strip() for line in told.splitlines())


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that decide the result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def arithmetic() -> dict[str, Any]:
    """Return what decides the last bits of a result besides the versions: the machine, and which BLAS kernels it gets.

    With them comes a hash of this package's own source.
    """
    names = ("prefix", "version", "architecture", "threading_layer", "num_threads")
    libraries = [{name: one.get(name) for name in names} for one in threadpool_info() if one["user_api"] == "blas"]
    return {
        "machine": platform.machine(),
        "blas": sorted(libraries, key=str),
        "source": _source_digest(),
    }


def _source_digest() -> str:
    package = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far; 0 where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
