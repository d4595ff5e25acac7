"""What planning and fitting work with: the bench, the capture of the original network, and who solves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnx_lrs.calibration.capture import Capture, Setting, solves_at_once
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.candidates import Bench
from onnx_lrs.planning.workers import Workers
from onnx_lrs.progress import Timer


@dataclasses.dataclass(frozen=True)
class Shop:
    """Tools of one run; ``capture`` is None without data."""

    bench: Bench
    capture: Capture | None
    setting: Setting
    workers: Workers
    timer: Timer

    def at_once(self, group: Sequence[Layer], roles: int) -> int:
        """Return how many solves of a group have room in memory beside its statistics."""
        return solves_at_once(group, roles, self.setting.memory_bytes, self.bench.with_columns)
