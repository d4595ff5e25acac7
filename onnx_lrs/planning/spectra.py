"""How many directions the outputs of a layer really use: what low rank can save before anything is fitted."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lrs.calibration.capture import Capture, Setting, groups, is_wide, steps
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Config
from onnx_lrs.data import Samples
from onnx_lrs.graph.layers import Layer, weight_matrix
from onnx_lrs.progress import Progress, Timer
from onnx_lrs.solvers import Moments

ENERGY = 0.99  # of the variance of the outputs
ALL = "all"  # the only role: nothing is fitted, so nothing has to be held back


def effective_ranks(subject: Subject, samples: Samples, config: Config, progress: Progress) -> dict[str, int]:
    """Return for each layer, by node, the lowest rank that keeps 99 % of the variance of its outputs on the samples.

    That is the number of largest eigenvalues of W cov(x) W^T, x being the layer's im2col columns, which make up that
    share of its trace; a layer of this rank in the H-metric is off by 10 % in the norm of its outputs.

    Raises
    ------
    DataError
        If the samples cannot be read or the network gives values that are not finite.
    """
    roles = {ALL: np.arange(len(samples))}
    setting = Setting(
        config.memory_bytes, config.columns, subject.batch, config.threads, config.seed, subject.dynamic_batch
    )
    parts = groups(subject.layers, len(roles), config.memory_bytes)
    progress.stage("statistics", len(subject.layers) + len(parts) * steps(roles[ALL], setting))
    capture, found = Capture(subject.folded, subject.layers, samples, setting, Timer()), {}
    try:
        for group in parts:
            statistics = capture.moments(group, roles, progress)
            for layer in group:
                known = statistics.pop(layer.node)[ALL]
                found[layer.node] = _effective_rank(subject, layer, known, config.memory_bytes)
                progress.step(layer.name)
    finally:
        capture.close()
    return found


def _effective_rank(subject: Subject, layer: Layer, moments: Moments, memory_bytes: int) -> int:
    spread = moments.cov
    if not is_wide(layer, memory_bytes):  # else these are the moments of the outputs already
        weight = weight_matrix(subject.view, layer)
        spread = weight @ spread @ weight.T
    energy = np.maximum(scipy.linalg.eigvalsh(spread), 0.0)[::-1].cumsum()
    return int(np.searchsorted(energy, ENERGY * energy[-1]) + 1) if energy[-1] > 0 else 0
