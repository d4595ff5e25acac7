"""Where a training run stands: what a work folder keeps of it."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.report.training import TrainedEpoch


@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands behind an epoch: weights, the moments of AdamW, the best weights so far.

    ``half`` says whether products are taken in bfloat16: which is faster may be measured only once in a run.
    """

    history: tuple[TrainedEpoch, ...]
    values: dict[str, NDArray[np.float32]]
    moments: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    steps: int
    best: dict[str, NDArray[np.float32]]
    elapsed: float
    half: bool = False

    @property
    def best_epoch(self) -> TrainedEpoch:
        """The one with the least loss on the samples that select; ``best`` are its weights."""
        return min(self.history, key=lambda epoch: epoch.selected)
