"""One run: what the caller asked for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from onnx_lrs.calibration.subject import Inputs
from onnx_lrs.config import Budget, Config
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.graph.quantised import Scale
from onnx_lrs.planning.gate import Metric
from onnx_lrs.planning.workers import Executor
from onnx_lrs.progress import Progress


@dataclasses.dataclass(frozen=True)
class Job:
    """What the caller asked for; ``call`` repeats it, as a command line or as Python.

    ``reference`` is the original where ``source`` is what an earlier round of refining has made of it, or the float
    model behind one that was given in INT8, whose activations have the ``scales``.
    """

    source: ModelSource
    output: pathlib.Path | None
    inputs: Inputs
    config: Config
    progress: Progress
    executor: Executor | None = None
    metric: Metric | None = None
    call: str = ""
    reference: ModelSource | None = None
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=dict)

    @property
    def original(self) -> ModelSource:
        """What everything is compared with."""
        return self.source if self.reference is None else self.reference

    @property
    def budget(self) -> Budget:
        """The budget; without limits where a plan is carried out."""
        return self.config.budget or Budget(params=1.0)

    @property
    def replays(self) -> bool:
        """Whether a plan that exists is carried out."""
        return self.config.budget is None
