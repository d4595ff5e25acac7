"""What planning and fitting work with: the bench, the capture of the original network, who solves, what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from onnx_lrs.calibration.capture import Capture, Roles, Setting, Statistic, solves_at_once
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.candidates import Bench
from onnx_lrs.planning.workers import Workers
from onnx_lrs.progress import Progress, Timer
from onnx_lrs.work import Work


@dataclasses.dataclass(frozen=True)
class Shop:
    """Tools of one run; ``capture`` is None without data, ``shelf`` where no cascade follows."""

    bench: Bench
    capture: Capture | None
    setting: Setting
    workers: Workers
    timer: Timer
    shelf: Shelf | None = None
    work: Work = dataclasses.field(default_factory=Work)

    def on_branch(self, tag: str) -> Shop:
        """Return the same tools with what is kept apart from that of other tags."""
        return dataclasses.replace(self, work=self.work.branch(tag))

    def captured(
        self, group: Sequence[Layer], roles: Roles, progress: Progress, known: Collection[str]
    ) -> dict[str, dict[str, Statistic]]:
        """Return the statistics of a group's layers, less the known ones; none without data."""
        if self.capture is None:
            return {}
        return self.capture.statistics(group, roles, progress, self.bench.with_columns, known)

    def at_once(self, group: Sequence[Layer], roles: int) -> int:
        """Return how many solves of a group have room in memory beside its statistics."""
        return solves_at_once(group, roles, self.setting.memory_bytes, self.bench.with_columns)
