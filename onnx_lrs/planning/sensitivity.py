"""How much an error in one layer matters at the outputs: measured, one compressed layer at a time in the real network.

The loss of a candidate is its relative squared error times the layer's sensitivity,

    s = (relative squared change of the outputs with one probe in place) / (relative squared error of the probe).

An error of the last layer reaches the outputs as it is; one before a wide, redundant layer is averaged away. The
knapsack over plain layer errors does not know the difference. A probe is one point of a curve that is not straight, and
errors of many layers do not simply add up, so the measured values are bounded around their median (see
:func:`bounded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.data import Samples, batches
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.progress import Progress
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.runtime.verify import check_original_finite
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import AnyFactors
from onnx_lrs.work import Work

KIND = "sensitivity"  # of what is kept
PROBE_LOSS = 0.03  # relative squared error of a probe: about what a plan at half of the parameters gives a layer
# cifar_resnet20 at params 0.7 / 0.5, without the spatial form, accuracy on 1,000 test images: no weights 90.2 / 78.7,
# bound 2 89.8 / 81.2, bound 3 87.0 / 81.3, unbounded 87.0 / 77.3; efficientnet_lite0 at 0.8: no weights 72.0, unbounded
# 78.4. The value is coarse on purpose: it was read off test images, once.
# Wider bounds rank random plans about as well or better, yet cifar_resnet20's real plans get worse: docs/losses.md.
BOUND = 2.0
PROBE_ROWS = 64  # samples on which the outputs are compared


def probe_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate whose loss is nearest to PROBE_LOSS on a log scale."""
    usable = [c for c in candidates if c.loss > 0]
    return min(usable, key=lambda c: abs(np.log(c.loss / PROBE_LOSS)), default=None)


def bounded(measured: Mapping[str, float], bound: float = BOUND) -> dict[str, float]:
    """Return the measured sensitivities as weights: relative to their median, within 1 / bound and bound."""
    values = np.array([value for value in measured.values() if np.isfinite(value)])
    median = float(np.median(values)) if len(values) else 0.0
    if median <= 0:
        return dict.fromkeys(measured, 1.0)
    ratios = {node: value / median if np.isfinite(value) else bound for node, value in measured.items()}
    return {node: float(np.clip(ratio, 1 / bound, bound)) for node, ratio in ratios.items()}


def sensitivities(
    subject: Subject,
    probes: Mapping[str, tuple[float, AnyFactors]],
    samples: Samples,
    items: NDArray[np.int64],
    batching: tuple[int, bool, int],
    progress: Progress,
    work: Work,
) -> dict[str, float]:
    """Return the sensitivity of every layer that has a probe.

    Parameters
    ----------
    subject : Subject
        The model.
    probes : mapping of node to (loss, factors)
        One candidate a layer, with its relative squared error.
    samples, items
        What the outputs are compared on; never the samples that judge.
    batching : (int, bool, int)
        Largest batch, whether the batch is dynamic, threads.
    progress : Progress
        Told one step a layer.
    work : Work
        Keeps what was measured.

    Raises
    ------
    DataError
        If the original's own outputs are not finite.
    """
    size, dynamic, threads = batching
    found: dict[str, float] = work.found(KIND, probes)
    for node in found:
        progress.step(node)
    if len(found) == len(probes):
        return found
    rows = np.cumsum([samples.rows(int(i)) for i in items])
    few = items[: max(int(np.searchsorted(rows, PROBE_ROWS, side="right")), 1)]
    feeds = [feed for _, feed in batches(samples, few, size, dynamic)]
    with Session(subject.folded, threads) as session:
        reference = [session.run(feed) for feed in feeds]
    names = [name for name, value in reference[0].items() if value.dtype.kind == "f"]
    for name in names:
        check_original_finite(name, (outputs[name] for outputs in reference))
    for layer in subject.layers if names else ():
        if layer.node not in probes or layer.node in found:
            continue
        loss, factors = probes[layer.node]
        change = _change(subject, layer, factors, feeds, reference, threads)
        found[layer.node] = work.put(KIND, layer.node, change / loss)
        progress.step(layer.name)
    return found


def _change(
    subject: Subject,
    layer: Layer,
    factors: AnyFactors,
    feeds: Sequence[Feed],
    reference: Sequence[Feed],
    threads: int,
) -> float:
    """Return the relative squared change of the floating-point outputs, averaged over them."""
    model = rewrite(subject.view, subject.layers, {layer.node: factors}, subject.ranks).model
    names = [name for name, value in reference[0].items() if value.dtype.kind == "f"]
    changed, total = np.zeros(len(names)), np.zeros(len(names))
    with Session(model, threads) as session:
        for feed, wanted in zip(feeds, reference, strict=True):
            got = session.run(feed, names)
            changed += [np.square(got[n].astype(np.float64) - wanted[n]).sum() for n in names]
            total += [np.square(wanted[n].astype(np.float64)).sum() for n in names]
    return float(np.mean(changed / np.maximum(total, 1e-300)))
