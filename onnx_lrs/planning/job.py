"""One run: what the caller asked for, and a clock over its stages."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

from onnx_lrs.calibration.subject import Inputs
from onnx_lrs.config import Budget, Config
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.planning.gate import Metric
from onnx_lrs.planning.workers import Executor
from onnx_lrs.progress import Progress, Timer


@dataclasses.dataclass(frozen=True)
class Job:
    """What the caller asked for."""

    source: ModelSource
    output: pathlib.Path | None
    inputs: Inputs
    config: Config
    progress: Progress
    executor: Executor | None = None
    metric: Metric | None = None

    @property
    def budget(self) -> Budget:
        """The budget; without limits where a plan is carried out."""
        return self.config.budget or Budget(params=1.0)

    @property
    def replays(self) -> bool:
        """Whether a plan that exists is carried out."""
        return self.config.budget is None


class Clock:
    """Wall-clock seconds by stage; tells the progress display as well."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.perf_counter()
        self.timer = Timer()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, count: int | None = None) -> Iterator[None]:
        """Time one stage of ``count`` steps, which its work tells; None: of one step, told here."""
        self._progress.stage(name, 1 if count is None else count)
        begun = time.perf_counter()
        yield
        if count is None:
            self._progress.step(name)
        self.seconds[name] = round(time.perf_counter() - begun, 3)

    def total(self) -> dict[str, float]:
        """Return the stages and the total."""
        return self.seconds | {"total": round(time.perf_counter() - self._start, 3)}
