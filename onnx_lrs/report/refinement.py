"""The record that refining a compressed model leaves; docs/refine.md describes it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

from onnx_lrs.report.record import Report
from onnx_lrs.report.result import SCHEMA, OutputQuality
from onnx_lrs.report.training import Trained


@dataclasses.dataclass(frozen=True)
class Refinement(Report):
    """The outcome of :func:`onnx_lrs.refine`.

    ``before`` and ``after`` hold the compressed and the refined model against the original, on samples that nothing was
    trained on; ``call`` repeats the run.
    """

    original: str | None
    compressed: str | None
    output: str | None
    before: tuple[OutputQuality, ...]
    after: tuple[OutputQuality, ...]
    trained: Trained
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()
    call: str = ""
    schema: int = SCHEMA
    model: onnx.ModelProto | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
