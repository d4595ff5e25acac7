"""What each candidate of a layer takes in ONNX Runtime: measured on a grid, interpolated, measured where it counts.

A candidate's latency is that of the layer alone in a small graph (graph/small.py), relative to the dense layer's in the
same rounds. A plan's prediction is the model's own latency plus what each layer takes more or less,

    T + s * sum_l (t_l(chosen) - t_l(dense)),

all of it in the precision in which the model will run: T is the original brought into it, and limits are fractions of
the original as it was given.

s being set so that it holds for plans that were timed in the network (:meth:`Timing.calibrate`), the one chosen last.

First a few ranks of each form are measured and the others interpolated. What a plan then picks is measured, or measured
again (:meth:`Timing.refine`), and the plan made anew: it picks what takes little time, and with it what noise made
faster than it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnx_lrs.calibration.subject import Subject, measure_shapes
from onnx_lrs.config import Provider
from onnx_lrs.errors import ConfigError
from onnx_lrs.graph.layers import Layer, tensors_around
from onnx_lrs.graph.rewrite import alive_outputs
from onnx_lrs.graph.small import Shape, Small, build_small, small_of, streamer
from onnx_lrs.planning.prices import Alive, Plan, alive_after, row_params
from onnx_lrs.progress import Progress
from onnx_lrs.runtime.latency import fast_quarter, times_in_turn
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.runtime.table import Device, Entry, Table
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import spread
from onnx_lrs.solvers.projected import tucker_params

NS_PER_MS = 1e6
DENSE = Shape()
POINTS = 6  # of a form that are measured before anything is chosen
PAIRS = 3  # of rank and kept channels, to learn what the sum of both branches takes beside them
AT_ONCE = 6  # sessions that are timed in turn, beside the dense layer's
SECONDS = 0.25  # of one such group, at least 10 rounds
MODEL_SECONDS = 2.0
BASELINES = 3  # readings of a dense layer, at least
READINGS = 3  # of what a plan picks, at most; the median counts
AGREE = 1.1  # two readings this close need no third; what was interpolated counts as one
SCALES = (0.25, 4.0)  # by which one calibration may correct


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """Times small graphs on one provider; ``feed`` is what the whole model is timed on.

    ``as_run`` brings a float model into the precision it would run in.
    """

    provider: Provider
    threads: int
    feed: Feed
    as_run: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model

    def model_ms(self, model: onnx.ModelProto) -> float:
        """Return what the whole model takes."""
        with Session(model, self.threads, provider=self.provider) as session:
            return float(fast_quarter(times_in_turn([session], [self.feed], MODEL_SECONDS))[0])

    def shapes_ms(self, small: Small, shapes: Sequence[Shape]) -> list[float]:
        """Return what each shape of one layer takes, in turn with the others."""
        with contextlib.ExitStack() as stack:
            sessions, feeds = [], []
            for shape in shapes:
                model, feed = build_small(small, shape)
                sessions.append(stack.enter_context(Session(self.as_run(model), self.threads, provider=self.provider)))
                feeds.append(feed)
            between = None
            if small.cold_mib:
                stream, given = streamer(small.cold_mib)
                between = functools.partial(
                    stack.enter_context(Session(stream, self.threads, provider=self.provider)).run, given
                )
            return [float(ms) for ms in fast_quarter(times_in_turn(sessions, feeds, SECONDS, between))]


class Timing:
    """The price of latency, in nanoseconds; see :class:`onnx_lrs.planning.prices.Price`.

    Parameters
    ----------
    subject : Subject
        The model.
    stopwatch : Stopwatch, optional
        Measures what the table lacks. None: the table is of another device, and what it lacks is an error.
    table : Table
        What is known already; what is measured joins it.
    digest : str
        The model, for its own latency in the table.
    feed : dict of arrays
        What the model is timed on.
    """

    def __init__(self, subject: Subject, stopwatch: Stopwatch | None, table: Table, digest: str, feed: Feed) -> None:
        self._subject = subject
        self.stopwatch = stopwatch
        self.table = table
        shapes = measure_shapes(subject.folded, subject.view, sorted(tensors_around(subject.layers)), feed, 1)
        self._smalls = {la.node: small_of(subject.view, la, shapes, subject.params) for la in subject.layers}
        self._layers = {self._smalls[layer.node]: layer for layer in subject.layers}
        self._gathers = {la.node: not _frees_producer(subject, la) for la in subject.layers}
        self._estimates: dict[tuple[str, str], float] = {}
        self._dense_ms: dict[str, float] = {}
        self._shapes: dict[Small, list[Shape]] = {}  # of all candidates
        self._sure: set[tuple[str, str]] = set()  # shapes of layers that were measured more than once
        self._model = f"{digest} {sorted((name, value.shape) for name, value in feed.items())}"
        self.original_ms = self.start_ms = 0.0
        self.scale = 1.0
        self.before = self.now = 0

    @property
    def is_here(self) -> bool:
        """Whether this machine is the device, so that what is missing can be measured."""
        return self.stopwatch is not None

    @property
    def device(self) -> Device:
        """What the latencies hold for."""
        return self.table.device

    @property
    def exported(self) -> Table:
        """What the table knows of this model and its layers."""
        models = {self._model, f"{self._model} {self.device.precision}"}
        return self.table.part({small.key for small in self._smalls.values()}, models)

    @property
    def count(self) -> int:
        """Steps of :meth:`prepare`: different layers."""
        return len(set(self._smalls.values())) + 1

    def prepare(self, curves: Mapping[str, Sequence[Candidate]], progress: Progress) -> None:
        """Measure the original model, its different layers, and a grid of each one's candidates.

        Raises
        ------
        ConfigError
            If the table of another device lacks this model or one of its layers.
        """
        self.original_ms = self._model_ms(self._model, self._subject.original)
        self.start_ms = self.original_ms
        if self.device.precision != "float32":
            self.start_ms = self._model_ms(f"{self._model} {self.device.precision}", self._subject.folded, as_run=True)
        progress.step("model")
        wanted: dict[Small, dict[Shape, None]] = {}
        for layer in self._subject.layers:
            shapes = wanted.setdefault(self._smalls[layer.node], {})
            shapes |= dict.fromkeys(self._shape(layer, c) for c in curves[layer.node])
        self._shapes = {small: list(shapes) for small, shapes in wanted.items()}
        for small, every in self._shapes.items():
            self._measure(small, _grid(every))
            self._interpolate(small)
            if self.is_here:
                self.table.keep()
            progress.step(small.op)
        self.before, self.now = round(NS_PER_MS * self.original_ms), round(NS_PER_MS * self.start_ms)

    def _model_ms(self, key: str, model: onnx.ModelProto, as_run: bool = False) -> float:
        if self.stopwatch is not None:
            self.table.models[key] = self.stopwatch.model_ms(self.stopwatch.as_run(model) if as_run else model)
        if key not in self.table.models:
            raise self._lacking("this model at this batch")
        return self.table.models[key]

    def _lacking(self, what: str) -> ConfigError:
        return ConfigError(
            f"--latency-table was made on {self.device} and lacks {what}.",
            "Make it there with the same model, --method and --batch: --dry-run --latency-table FILE (a new file).",
        )

    def _measure(self, small: Small, shapes: Iterable[Shape]) -> None:
        """Put what is missing into the table; the dense layer is timed again in any case."""
        entry = self.table.layers.setdefault(small.key, Entry(0.0, {}))
        missing = [shape for shape in shapes if shape != DENSE and shape.key not in entry.ratios]
        if self.stopwatch is None:
            if not entry.dense_ms:
                raise self._lacking(f"a layer of its kind ({small.op} {small.input_shape} -> {small.out})")
            self._dense_ms[small.key] = entry.dense_ms
            return
        dense: list[float] = []
        starts = range(0, len(missing), AT_ONCE)
        groups = [missing[start : start + AT_ONCE] for start in starts]
        groups += [[] for _ in range(len(groups), BASELINES)]
        for group in groups:
            times = self.stopwatch.shapes_ms(small, [DENSE, *group])
            dense.append(times[0])
            entry.ratios |= {shape.key: ms / times[0] for shape, ms in zip(group, times[1:], strict=True)}
        self._dense_ms[small.key] = entry.dense_ms = float(np.median(dense))

    def _interpolate(self, small: Small) -> None:
        shapes, known = self._shapes[small], self.table.layers[small.key].ratios
        for shape, ratio in _interpolated([*shapes, *self._told(small)], known).items():
            self._estimates[small.key, shape.key] = ratio
        for shape in shapes:
            if shape != DENSE and shape.key not in known and (small.key, shape.key) not in self._estimates:
                raise self._lacking(
                    f"the form {shape.form!r} of a layer ({small.op} {small.input_shape} -> {small.out})"
                )

    def _told(self, small: Small) -> list[Shape]:
        """Return what else the table knows of a layer: ranks that other runs, or other data, had among theirs."""
        layer, own = self._layers[small], {shape.key for shape in self._shapes[small]}
        found = [Shape.of_key(key) for key in self.table.layers[small.key].ratios if key not in own]
        sizes = layer.channels, layer.out, layer.taps
        return [
            dataclasses.replace(s, weights=tucker_params(*sizes, (s.inner, s.rank))) if s.inner else s for s in found
        ]

    def _shape(self, layer: Layer, candidate: Candidate | None, outputs: int | None = None) -> Shape:
        if candidate is None or candidate.elements or candidate.form.endswith("elements"):
            return Shape(outputs=outputs)
        gathered = self._gathers[layer.node] or bool(candidate.rank)
        found = Shape(candidate.form, candidate.rank, len(candidate.support), outputs, gathered)
        if candidate.inner:
            found = dataclasses.replace(found, inner=candidate.inner, weights=candidate.params)
        return found

    def _ns(self, layer: Layer, shape: Shape, shrinking: float = 1.0) -> int:
        """Return what a shape takes; ``shrinking`` is the share of its work that goes with its outputs."""
        small = self._smalls[layer.node]
        ratio = 1.0 if shape == DENSE else self.table.layers[small.key].ratios.get(shape.key)
        if ratio is None:
            ratio = self._estimates.get((small.key, shape.key))
        if ratio is None:  # with so few outputs not measured: in proportion
            whole = dataclasses.replace(shape, outputs=None)
            gone = 1.0 - (shape.outputs or layer.out) / layer.out
            return round(self._ns(layer, whole) * (1.0 - shrinking * gone))
        return round(NS_PER_MS * self.scale * self._dense_ms[small.key] * ratio)

    def dense(self, layer: Layer) -> int:
        """Return what the layer takes as it is."""
        return self._ns(layer, DENSE)

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return what the layer takes with a candidate in its place."""
        return self._ns(layer, self._shape(layer, candidate))

    def less(self, layer: Layer, candidate: Candidate | None, rows: int) -> int:
        """Return what the layer takes less once only so many of its filters are read."""
        whole = self._ns(layer, self._shape(layer, candidate))
        return whole - self._ns(layer, self._shape(layer, candidate, rows), _shrinking(layer, candidate))

    def _in_plan(self, layer: Layer, plan: Plan, alive: Alive) -> Shape:
        """Return the shape of a layer beside the others of a plan."""
        rows = alive.get(layer.node)
        shape = self._shape(layer, plan.chosen.get(layer.node), None if rows is None else len(rows))
        return shape if shape != Shape(outputs=layer.out) else DENSE

    def _ns_in_plan(self, layer: Layer, plan: Plan, alive: Alive) -> int:
        shape = self._in_plan(layer, plan, alive)
        return self._ns(layer, shape, _shrinking(layer, plan.chosen.get(layer.node)))

    def refine(self, plan: Plan) -> bool:
        """Measure what a plan picks until two readings agree; return whether anything was measured."""
        if self.stopwatch is None:
            return False
        alive = alive_after(self._subject, plan)
        wanted: dict[Small, dict[Shape, None]] = {}
        for layer in self._subject.layers:
            small, shape = self._smalls[layer.node], self._in_plan(layer, plan, alive)
            if shape != DENSE and (small.key, shape.key) not in self._sure:
                wanted.setdefault(small, {})[shape] = None
        for small, shapes in wanted.items():
            self._make_sure(small, list(shapes), self.stopwatch)
            self._interpolate(small)
        if wanted:
            self.table.keep()
        return bool(wanted)

    def _make_sure(self, small: Small, shapes: Sequence[Shape], stopwatch: Stopwatch) -> None:
        """Put the median of a few readings into the table; what it held before, or foresaw, is one of them."""
        known = self.table.layers[small.key].ratios
        foreseen = {shape: known.get(shape.key, self._estimates.get((small.key, shape.key))) for shape in shapes}
        readings = {shape: [] if ratio is None else [ratio] for shape, ratio in foreseen.items()}
        while waiting := [shape for shape in shapes if not _agree(readings[shape])]:
            group = waiting[:AT_ONCE]
            dense, *times = stopwatch.shapes_ms(small, [DENSE, *group])
            for shape, ms in zip(group, times, strict=True):
                readings[shape].append(ms / dense)
        for shape in shapes:
            known[shape.key] = float(np.median(readings[shape]))
            self._sure.add((small.key, shape.key))

    def calibrate(self, plan: Plan, real: float) -> None:
        """Scale what layers take so that a plan's prediction is what the whole network really took.

        ``real`` is a fraction of the original's latency. Layers in small graphs and in the network differ most where
        calls take less than a millisecond.
        """
        saved = self.start_ms - self.predict_ms(plan)
        really = self.start_ms - self.original_ms * real
        if saved > 0:
            self.scale *= float(np.clip(really / saved, *SCALES))

    def predict_ms(self, plan: Plan) -> float:
        """Return what the whole model is predicted to take."""
        return self.start_ms + (self.predict_ns(plan) - self.now) / NS_PER_MS

    def predict_ns(self, plan: Plan) -> int:
        """Return the same in whole nanoseconds."""
        alive = alive_after(self._subject, plan)
        return self.now + sum(self._ns_in_plan(la, plan, alive) - self.dense(la) for la in self._subject.layers)

    def layers_ms(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """Return each layer's latency before and in a plan, by node."""
        alive = alive_after(self._subject, plan)
        return {
            la.node: (
                self.dense(la) / NS_PER_MS,
                self._ns_in_plan(la, plan, alive) / NS_PER_MS,
            )
            for la in self._subject.layers
        }


def _shrinking(layer: Layer, candidate: Candidate | None) -> float:
    """Return the share of a layer's weights that makes its outputs; the first part of a chain is the same for few."""
    if candidate is None or candidate.form.endswith("elements"):
        return 1.0
    return layer.out * row_params(layer, candidate) / candidate.params


def _agree(readings: Sequence[float]) -> bool:
    """Return whether no other reading is needed."""
    return len(readings) == READINGS or (len(readings) > 1 and max(readings) <= AGREE * min(readings))


def _frees_producer(subject: Subject, layer: Layer) -> bool:
    """Return whether the channels that this layer does not keep go from their producer, so that none is gathered."""
    few = np.arange(max(layer.channels // 2, 1), dtype=np.int64)
    return bool(alive_outputs(subject.view, subject.layers, {layer.node: few}, subject.reach)[0])


def _grid(shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes to be measured first: of each form a few ranks, of pairs only the corners."""
    found: list[Shape] = []
    for form, group in _by_form(shapes):
        if form.kept and form.rank:
            found += spread(sorted(group, key=lambda s: (s.rank / 64 + s.kept / 64, s.rank)), PAIRS)
            found += [_alone(s, "low-rank") for s in spread(_ranks(group), POINTS)]
            found += [_alone(s, "channels") for s in spread(_kept(group), POINTS)]
        else:
            found += spread(sorted(group, key=lambda s: (s.size, s.rank)), POINTS)
    return list(dict.fromkeys(found))


def _ranks(group: Sequence[Shape]) -> list[Shape]:
    return sorted({s.rank: s for s in group}.values(), key=lambda s: s.rank)


def _kept(group: Sequence[Shape]) -> list[Shape]:
    return sorted({s.kept: s for s in group}.values(), key=lambda s: s.kept)


def _by_form(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, list[Shape]]]:
    """Yield groups of shapes that differ in ranks and kept channels only, each with one of its own."""
    groups: dict[tuple[str, int | None, bool], list[Shape]] = {}
    for shape in shapes:
        if shape != DENSE:
            groups.setdefault((shape.form, shape.outputs, shape.gathered), []).append(shape)
    for group in groups.values():
        yield group[0], group


def _interpolated(shapes: Sequence[Shape], known: Mapping[str, float]) -> dict[Shape, float]:
    """Return the ratios of the shapes that were not measured, from those of their form that were.

    Straight lines between the measured ones. Where there are both a low-rank part and kept channels: the sum of both
    alone, and what pairs took beyond that in the median; never less than the longer of both.
    """
    found: dict[Shape, float] = {}
    for form, group in _by_form(shapes):
        if not (form.kept and form.rank):
            found |= _on_lines(group, known)
            continue
        low, kept = [_alone(s, "low-rank") for s in group], [_alone(s, "channels") for s in group]
        parts = {
            shape: ratio
            for part, name in ((low, "low-rank"), (kept, "channels"))
            for shape, ratio in _on_lines([*part, *_beside(part[0], name, shapes)], known, every=True).items()
        }
        ends = [(s, a, b) for s, a, b in zip(group, low, kept, strict=True) if a in parts and b in parts]
        sums = {s: parts[a] + parts[b] for s, a, b in ends}
        least = {s: max(parts[a], parts[b]) for s, a, b in ends}
        more = [known[s.key] - total for s, total in sums.items() if s.key in known]
        extra = float(np.median(more)) if more else 0.0
        found |= {s: max(total + extra, least[s]) for s, total in sums.items() if s.key not in known}
    return found


def _beside(one: Shape, form: str, shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes of a form whose outputs and channels are as those of another shape."""
    return [s for s in shapes if (s.form, s.outputs, s.gathered) == (form, one.outputs, one.gathered)]


def _alone(shape: Shape, form: str) -> Shape:
    """Return one branch of a pair of them."""
    if form == "low-rank":
        return dataclasses.replace(shape, form=form, kept=0)
    return dataclasses.replace(shape, form=form, rank=0)


def _on_lines(group: Sequence[Shape], known: Mapping[str, float], every: bool = False) -> dict[Shape, float]:
    """Return the ratios of one form along its rank or its kept channels; with ``every`` those of measured ones too."""
    points: dict[int, list[float]] = {}
    for s in dict.fromkeys(group):
        if s.key in known:
            points.setdefault(s.size, []).append(known[s.key])
    if not points:
        return {}
    places = sorted(points)
    ratios = [float(np.mean(points[place])) for place in places]
    return {s: float(np.interp(s.size, places, ratios)) for s in group if every or s.key not in known}
