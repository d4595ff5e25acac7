"""How much an error in one layer matters at the outputs: measured, one compressed layer at a time in the real network.

The loss that plans are weighed by is a candidate's own relative squared error e, carried to the outputs by its layer's
law,

    loss = a e^p,

laid through up to three probes of the layer: compressed candidates that are put into the network one at a time, each
with its own error and the relative squared change of the outputs that came of it. Between two probes the power p is
theirs, beyond the largest that of the last two; below the smallest it is 1, since a network answers to small errors in
proportion. Low-rank forms and kept channels have laws of their own: at the same error, kept channels do two to six
times as much to the outputs of VGG-16. An error of the last layer reaches the outputs as it is; one before a wide,
redundant layer is averaged away as long as it is small (p > 1). The knapsack over plain layer errors does not know the
difference, that over one probe takes small errors for dearer than they are, and that over two, laid on below them,
takes tiny ones for nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
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
PROBE_ERRORS = (0.001, 0.01, 0.1)  # relative squared errors of the probes: what plans give a layer lies around them
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
    """The relative squared error of the outputs with one layer of a relative squared error, through some points.

    ``points`` rise. Straight lines between their logs; below the first in proportion, beyond the last to ``power``.
    """

    points: tuple[Point, ...] = ((1.0, 1.0),)
    power: float = 1.0

    def loss(self, error: float) -> float:
        """Return what a layer's error makes of the outputs; none of none."""
        if error <= 0:
            return 0.0
        (first, low), (last, high) = self.points[0], self.points[-1]
        if error <= first:
            return low * error / first
        if error >= last:
            return float(high * (error / last) ** self.power)
        return float(np.exp(np.interp(np.log(error), *np.log(self.points).T)))


def kind_of(form: str) -> Kind:
    """Return which law a form follows: that of kept channels alone, of single entries alone, or of low rank."""
    return form if form in ("channels", "elements") else "low-rank"


def probes_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return for each kind of form the candidates whose losses are nearest to PROBE_ERRORS on a log scale.

    Fewer where those are close to each other: then the largest ones, which are the furthest from rounding.
    """
    kinds = dict.fromkeys(kind_of(c.form) for c in candidates)
    return [probe for kind in kinds for probe in _probes_of([c for c in candidates if kind_of(c.form) == kind])]


def _probes_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    usable = [c for c in candidates if c.loss > 0]
    nearest = [min(usable, key=lambda c: abs(np.log(c.loss / at))) for at in PROBE_ERRORS if usable]
    found: list[Candidate] = []
    for probe in sorted(nearest, key=lambda c: -c.loss):
        if not found or probe.loss * APART <= found[-1].loss:
            found.append(probe)
    return found[::-1]


def laws(measured: Mapping[str, Points], bound: float = BOUND) -> dict[str, dict[Kind, Law]]:
    """Return each layer's laws by kind from the points measured of it; none at all if no probe moved the outputs."""
    rows = {(node, kind): own for node, kinds in measured.items() for kind, own in kinds.items()}
    found: dict[str, dict[Kind, Law]] = {}
    for (node, kind), law in _laws(rows, bound).items():
        found.setdefault(node, {})[kind] = law
    return found


def _laws(measured: Mapping[Row, Sequence[Point]], bound: float) -> dict[Row, Law]:
    """Return the law of each row of points; a row is one kind of form in one layer.

    Where a row has no point the median power of those with several leads there. Levels are bounded around their
    median; one that moves nothing is at the lower bound, one whose outputs are not finite at the upper one.
    """
    logs = {
        row: np.log([point for point in points if 0 < point[1] < np.inf]).reshape(-1, 2)
        for row, points in measured.items()
    }
    powers = [_slope(own[0], own[-1]) for own in logs.values() if len(own) > 1]
    usual = float(np.median(powers)) if powers else 1.0
    lines = {row: _line(own, usual) for row, own in logs.items() if len(own)}
    if not lines:
        return {}
    middle = float(np.mean(np.log(PROBE_ERRORS)))
    levels = {row: float(np.interp(middle, *line.T)) for row, line in lines.items()}
    median, most = float(np.median(list(levels.values()))), float(np.log(bound))
    found = {}
    for row, points in measured.items():
        if row in lines:
            line, power = lines[row], usual if len(logs[row]) == 1 else _slope(*logs[row][-2:])
            line = line + np.array([0.0, np.clip(levels[row], median - most, median + most) - levels[row]])
        else:
            silent = all(change == 0 for _, change in points)
            line, power = _line(np.array([[middle, median - most if silent else median + most]]), usual), usual
        found[row] = Law(tuple((float(error), float(change)) for error, change in np.exp(line)), power)
    return found


def _line(logs: NDArray[np.float64], usual: float) -> NDArray[np.float64]:
    """Return the logs of a row's points as a line whose powers are possible, from the smallest probe to the largest.

    Where powers are noise the line lies in the middle of the points. Shape (n, 2).
    """
    steps = [_slope(one, other) * (other[0] - one[0]) for one, other in itertools.pairwise(logs)]
    rising = np.cumsum([0.0, *steps])
    line = np.stack([logs[:, 0], rising + np.mean(logs[:, 1] - rising)], axis=1)
    ends = np.log(PROBE_ERRORS[0]), np.log(PROBE_ERRORS[-1])
    (first, low), (last, high) = line[0], line[-1]
    before = [(ends[0], low - usual * (first - ends[0]))] if first > ends[0] else []
    after = [(ends[1], high + usual * (ends[1] - last))] if last < ends[1] else []
    return np.array([*before, *line, *after])


def _slope(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.clip((other[1] - one[1]) / (other[0] - one[0]), *POWERS))


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
