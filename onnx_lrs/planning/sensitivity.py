"""How much an error in one layer matters at the outputs: measured, one compressed layer at a time in the real network.

The loss that plans are weighed by is a candidate's own relative squared error e, carried to the outputs by its layer's
law,

    loss = a e^p,

laid through one or two probes of the layer: compressed candidates that are put into the network one at a time, each
with its own error and the relative squared change of the outputs that came of it. Low-rank forms and kept channels have
laws of their own: at the same error, kept channels do two to six times as much to the outputs of VGG-16. An error of
the last layer reaches the outputs as it is; one before a wide, redundant layer is averaged away as long as it is small
(p > 1). The knapsack over plain layer errors does not know the difference, and that over one probe takes small errors
for dearer than they are.
"""

from __future__ import annotations

import dataclasses
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
PROBE_ERRORS = (0.01, 0.1)  # relative squared errors of the probes: plans at 0.8 to 0.3 of the parameters lie between
APART = 4.0  # at least, the errors of two probes: a change is uncertain by a third, the power would be read off that
POWERS = (0.5, 2.0)  # an error that is averaged away has 1 to 1.5 (docs/losses.md); steeper ones are noise
# Of a layer's level around the median of all layers, at the middle of the probes. Measured levels of VGG-16 and
# EfficientNet-Lite0 lie within 1/12 and 12 of it: the bound keeps a probe that by chance does nothing, or everything,
# from deciding the plan.
BOUND = 16.0
PROBE_ROWS = 64  # samples on which the outputs are compared
Kind = str  # of form
Probe = tuple[Kind, float, AnyFactors]  # a candidate's kind of form, its relative squared error, and its factors
Point = tuple[float, float]  # a probe's relative squared error, and that of the outputs with it
Row = tuple[str, Kind]  # node and kind
Points = Mapping[Kind, Sequence[Point]]  # of one layer, by rising error


@dataclasses.dataclass(frozen=True)
class Law:
    """The relative squared error of the outputs with one layer of a relative squared error e: ``scale * e**power``."""

    scale: float = 1.0
    power: float = 1.0

    def loss(self, error: float) -> float:
        """Return what a layer's error makes of the outputs; none of none."""
        if error <= 0:
            return 0.0
        return float(self.scale * error**self.power)


def kind_of(form: str) -> Kind:
    """Return which law a form follows: that of kept channels alone, of single entries alone, or of low rank."""
    return form if form in ("channels", "elements") else "low-rank"


def probes_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return for each kind of form the candidates whose losses are nearest to PROBE_ERRORS on a log scale.

    Two, or one if they are close.
    """
    kinds = dict.fromkeys(kind_of(c.form) for c in candidates)
    return [probe for kind in kinds for probe in _probes_of([c for c in candidates if kind_of(c.form) == kind])]


def _probes_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    usable = [c for c in candidates if c.loss > 0]
    found = [min(usable, key=lambda c: abs(np.log(c.loss / at))) for at in PROBE_ERRORS if usable]
    if len(found) == 2 and found[1].loss < APART * found[0].loss:
        del found[0]  # the larger error is the further from rounding
    return found


def laws(measured: Mapping[str, Points], bound: float = BOUND) -> dict[str, dict[Kind, Law]]:
    """Return each layer's laws by kind from the points measured of it; none at all if no probe moved the outputs."""
    rows = {(node, kind): own for node, kinds in measured.items() for kind, own in kinds.items()}
    found: dict[str, dict[Kind, Law]] = {}
    for (node, kind), law in _laws(rows, bound).items():
        found.setdefault(node, {})[kind] = law
    return found


def _laws(measured: Mapping[Row, Sequence[Point]], bound: float) -> dict[Row, Law]:
    """Return the law of each row of points; a row is one kind of form in one layer.

    One with one usable point gets the median power of those with two. Levels are bounded around their median;
    one that moves nothing is at the lower bound, one whose outputs are not finite at the upper one.
    """
    middle = float(np.mean(np.log(PROBE_ERRORS)))
    logs = {
        node: np.log([point for point in points if 0 < point[1] < np.inf]).reshape(-1, 2)
        for node, points in measured.items()
    }
    powers = {node: _slope(own) for node, own in logs.items() if len(own) > 1}
    usual = float(np.median(list(powers.values()))) if powers else 1.0
    levels = {
        node: float(np.mean(own[:, 1] + powers.get(node, usual) * (middle - own[:, 0])))
        for node, own in logs.items()
        if len(own)
    }
    if not levels:
        return {}
    median, most = float(np.median(list(levels.values()))), float(np.log(bound))
    found = {}
    for node, points in measured.items():
        silent = all(change == 0 for _, change in points)
        level = levels.get(node, median - most if silent else median + most)
        power = powers.get(node, usual)
        found[node] = Law(float(np.exp(np.clip(level, median - most, median + most) - power * middle)), power)
    return found


def _slope(logs: NDArray[np.float64]) -> float:
    (first, low), (last, high) = logs[0], logs[-1]
    return float(np.clip((high - low) / (last - first), *POWERS))


def probed(
    subject: Subject,
    probes: Mapping[str, Sequence[Probe]],
    samples: Samples,
    items: NDArray[np.int64],
    batching: tuple[int, bool, int],
    progress: Progress,
    work: Work,
) -> dict[str, dict[Kind, tuple[Point, ...]]]:
    """Return what the probes of every layer that has some do to the outputs, by kind of form, in their order.

    Parameters
    ----------
    subject : Subject
        The model.
    probes : mapping of node to sequence of (kind, relative squared error, factors)
        Candidates of a layer; of each kind by rising error.
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
    found: dict[str, dict[Kind, tuple[Point, ...]]] = work.found(KIND, probes)
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
        points: dict[Kind, tuple[Point, ...]] = {}
        for kind, error, factors in probes[layer.node]:
            change = _change(subject, layer, factors, feeds, reference, threads)
            points[kind] = (*points.get(kind, ()), (error, change))
        found[layer.node] = work.put(KIND, layer.node, points)
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
    """Return the relative squared change of the floating-point outputs, averaged over those that are not zero."""
    model = rewrite(subject.view, subject.layers, {layer.node: factors}, subject.ranks).model
    names = [name for name, value in reference[0].items() if value.dtype.kind == "f"]
    changed, total = np.zeros(len(names)), np.zeros(len(names))
    with Session(model, threads) as session:
        for feed, wanted in zip(feeds, reference, strict=True):
            got = session.run(feed, names)
            changed += [np.square(got[n].astype(np.float64) - wanted[n]).sum() for n in names]
            total += [np.square(wanted[n].astype(np.float64)).sum() for n in names]
    there = total > 0  # an output that is zero throughout has no relative error
    return float(np.mean(changed[there] / total[there])) if there.any() else 0.0
