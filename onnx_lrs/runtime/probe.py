"""One model alone in a process: how long it takes to load, and how much memory it takes.

``python -m onnx_lrs.runtime.probe`` reads an Order as JSON from stdin and writes a Reading as JSON to stdout, or the
error's kind, message and remedy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np

from onnx_lrs import errors
from onnx_lrs.config import CudaOptions, Provider
from onnx_lrs.errors import ModelError, OnnxLrsError
from onnx_lrs.native import STDERR, STDOUT
from onnx_lrs.runtime.session import Gpu, Session, runtime

RUNS = 3
STATUS = pathlib.Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class Order:
    """What to load and run: the model's file, a .npz file with a feed, and how."""

    model: str
    feed: str
    threads: int
    provider: Provider
    gpu: Gpu

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Return the order that ``json.dumps(dataclasses.asdict(order))`` wrote."""
        values = json.loads(text)
        gpu = values.pop("gpu")
        return cls(**values, gpu=Gpu(CudaOptions(**gpu.pop("cuda")), **gpu))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Milliseconds to load, the largest memory of the process in bytes, and what of that was there before."""

    load_ms: float
    peak_bytes: int | None
    idle_bytes: int | None


def probe(order: Order) -> Reading:
    """Return what a fresh process reads.

    It imports what this process would: the current folder, where an ``onnx.py`` of the user's may lie, is not searched
    unless it is here.

    Raises
    ------
    OnnxLrsError
        What the process raised.
    ModelError
        If the process ended without an answer, as one does that is killed for its memory.
    """
    command = [sys.executable, "-P", "-m", "onnx_lrs.runtime.probe"]
    paths = os.pathsep.join(place or str(pathlib.Path.cwd()) for place in sys.path)
    done = subprocess.run(
        command,
        input=json.dumps(dataclasses.asdict(order)),
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = " ".join(done.stderr.split())[-500:]
        raise ModelError(
            f"The process that loads and runs the model alone ended with code {done.returncode}: {said or 'no word'}.",
            "A negative code is a signal: -9 comes from a system that is out of memory.",
        ) from None
    if "kind" in answer:
        raise getattr(errors, answer["kind"])(answer["message"], answer["remedy"])
    return Reading(**answer)


def measured(order: Order) -> Reading:
    """Return what this process, which has done nothing else, reads."""
    runtime()
    with np.load(order.feed) as arrays:
        feed = dict(arrays)
    idle, begun = _peak_bytes(), time.perf_counter()
    with Session(pathlib.Path(order.model), order.threads, False, order.provider, gpu=order.gpu) as session:
        load_ms = 1e3 * (time.perf_counter() - begun)
        for _ in range(RUNS):
            session.run(feed)
        return Reading(load_ms, _peak_bytes(), idle)


def _peak_bytes() -> int | None:
    """Return the largest resident memory so far; None where the system does not tell.

    On Linux not by getrusage: a process inherits the peak of the one that started it there.
    """
    if STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        return 1024 * int(found[1]) if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def main() -> int:
    """Answer one order on the stdout that was given; what native libraries print there goes to stderr instead."""
    answer: dict[str, Any]
    with os.fdopen(os.dup(STDOUT), "w", encoding="utf-8") as given:
        os.dup2(STDERR, STDOUT)
        try:
            answer = dataclasses.asdict(measured(Order.from_json(sys.stdin.read())))
        except OnnxLrsError as error:
            answer = {"kind": type(error).__name__, "message": error.message, "remedy": error.remedy}
        json.dump(answer, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
