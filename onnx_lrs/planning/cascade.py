"""Fit the planned layers in graph order to what the compressed network in front of them really gives.

The original and the compressed network advance side by side, one level of layers after the other
(calibration/frontier.py). A layer's columns come from the compressed prefix, its targets from the original network;
where its output is added to a shortcut, the target makes up for the shortcut's error as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import ACTIVATIONS_SHARE, lots_of, uniform_numbers, wanted_columns
from onnx_lrs.calibration.frontier import Call, Frontier, calls_of
from onnx_lrs.calibration.pairs import (
    MOST_JUDGE,
    PairStatistic,
    Reading,
    Sink,
    bytes_of,
    pair_of,
    reading_of,
    rows_to_keep,
    target_of,
)
from onnx_lrs.calibration.store import Store
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.data import Samples, Split
from onnx_lrs.graph.behind import Behind
from onnx_lrs.graph.layers import Layer, tensors_around
from onnx_lrs.graph.model import View
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.graph.segments import Cutter
from onnx_lrs.planning.candidates import FIT, FITTED, JUDGE, SELECT, Fitted
from onnx_lrs.planning.refits import Place, refits
from onnx_lrs.planning.shop import Shop
from onnx_lrs.progress import Progress
from onnx_lrs.runtime.session import Feed
from onnx_lrs.solvers.activation import LINEAR
from onnx_lrs.solvers.problem import AnyFactors


@dataclasses.dataclass(frozen=True)
class Level:
    """Layers that do not wait for each other, and the nodes that they begin; level 0 has no layers."""

    layers: tuple[Layer, ...]
    nodes: tuple[int, ...]


def levels_of(cutter: Cutter, layers: Sequence[Layer]) -> list[Level]:
    """Return the levels in the order in which they can be fitted."""
    starts = {layer.node: _waits_for(layer) for layer in layers}
    wanted = [name for layer in layers for name in (layer.input, layer.behind.total)]
    nodes, heights = cutter.levels(starts, wanted)
    return [
        Level(tuple(la for la, h in zip(layers, heights, strict=True) if h == number), tuple(own))
        for number, own in enumerate(nodes)
    ]


def _waits_for(layer: Layer) -> list[str]:
    return [] if layer.behind.shortcut is None else [layer.behind.shortcut]


def with_targets(cutter: Cutter, layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """Return the layers with a shortcut only where one can be made up for.

    Of two layers that are added to each other the deeper one does it, and a sum that broadcasts the layer's output is
    no sum of equals. Without its shortcut a layer is fitted to its own output.
    """
    alone = {layer.node: _by_itself(layer) for layer in layers}
    same = [
        la
        for la in layers
        if la.behind.shortcut is None
        or (
            shapes.get(la.behind.total) == shapes.get(la.output) == shapes.get(la.behind.shortcut)
            and cutter.follows_samples(la.input)  # else one output serves all samples of a call
        )
    ]
    _, heights = cutter.levels({la.node: [] for la in layers}, [la.behind.total for la in layers])
    ways = [len(cutter.ancestors([la.input])) for la in layers]  # of equally deep ones the longer way, dense layers too
    order = {la.node: key for la, *key in zip(layers, heights, ways, range(len(layers)), strict=True)}
    deepest = {_summands(layer): layer.node for layer in sorted(same, key=lambda la: order[la.node])}
    kept = {la.node for la in same if la.behind.shortcut is None or deepest[_summands(la)] == la.node}
    return [la if la.node in kept else alone[la.node] for la in layers]


def _summands(layer: Layer) -> frozenset[str]:
    """Return the two tensors that are added, which name the Add whatever the layer sees behind it."""
    ways = [layer.output, *(name for name, is_behind_add in layer.behind.norms if not is_behind_add)]
    return frozenset({ways[-1], layer.behind.shortcut or ""})


def _by_itself(layer: Layer) -> Layer:
    return dataclasses.replace(layer, behind=Behind(total=layer.output, label="linear"), activation=LINEAR)


@dataclasses.dataclass(frozen=True)
class Courses:
    """Both networks on their way, and the calls that they run."""

    original: Frontier
    compressed: Frontier
    calls: Sequence[Call]


class Cascade:
    """One run of both networks over the samples, fitting the layers as they come."""

    def __init__(
        self, subject: Subject, shop: Shop, material: tuple[Samples, Split], behind_activation: bool = True
    ) -> None:
        samples, split = material
        self._subject = subject
        self._shop = shop
        self._samples = samples
        self._roles = {FIT: split.fit, SELECT: split.select, JUDGE: split.held_out}
        self._setting = shop.setting
        self._timer = shop.timer
        self._behind_activation = behind_activation
        self._rows = {role: sum(samples.rows(int(i)) for i in items) for role, items in self._roles.items()}

    def run(self, layers: Sequence[Layer], starts: Mapping[str, AnyFactors], progress: Progress) -> dict[str, Fitted]:
        """Return the fitted layers by node; what was fitted in an earlier run is only put in its place.

        Parameters
        ----------
        layers : sequence of Layer
            Those to be compressed.
        starts : mapping of node to factors
            What each was fitted to alone; form, rank and channels stay.
        progress : Progress
            Told one step a layer.
        """
        memory, cutter = self._setting.memory_bytes, Cutter(self._subject.view, tensors_around(layers))
        known: dict[str, Fitted] = self._shop.work.found(FITTED, (layer.node for layer in layers))
        if len(known) == len(layers):
            for layer in layers:
                progress.step(layer.name)
            return known
        levels = levels_of(cutter, with_targets(cutter, layers, self._subject.shapes))
        with Store(memory // ACTIVATIONS_SHARE) as store:
            courses = self._begin(cutter, levels, store)
            for number, level in enumerate(levels):
                later = _needed(cutter, levels[number + 1 :])
                totals = {target_of(layer) for layer in level.layers}
                _exhaust(courses.original.advance(level.nodes, later | totals))
                for group in self._groups(level.layers):
                    rest = [layer for layer in group if layer.node not in known]
                    if rest:
                        self._fit(rest, starts, courses, known)
                    for layer in group:
                        progress.step(layer.name)
                if level.layers:
                    change = functools.partial(self._replaced, level.layers, known)
                    _exhaust(courses.compressed.advance(level.nodes, later, change=change))
                for network in (courses.original, courses.compressed):
                    network.release(later)
        return known

    def _groups(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Return the layers of a level in groups whose pairs fit into memory together; at least one a group."""
        memory = self._setting.memory_bytes
        found: list[list[Layer]] = []
        left = 0
        for layer in layers:
            size = bytes_of(reading_of(self._subject.view, layer, memory), memory)
            if size > left:
                found.append([])
                left = memory
            found[-1].append(layer)
            left -= size
        return found

    def _fit(
        self,
        group: Sequence[Layer],
        starts: Mapping[str, AnyFactors],
        courses: Courses,
        known: dict[str, Fitted],
    ) -> None:
        """Put the layers of a group among the known ones."""
        pairs, work = self._pairs(group, courses), self._shop.work
        places = [Place(layer, starts[layer.node], pairs[layer.node]) for layer in group]

        def finish(layer: Layer, fitted: Fitted) -> None:
            known[layer.node] = work.put(FITTED, layer.node, fitted)

        with self._timer.of("solve"):
            refits(self._shop, places, self._behind_activation, finish)

    def _begin(self, cutter: Cutter, levels: Sequence[Level], store: Store) -> Courses:
        setting, timer = self._setting, self._timer
        calls: list[Call] = []
        original = Frontier(cutter, store, setting.threads, timer)
        inputs = [name for name in _needed(cutter, levels) if cutter.is_given(name)]

        def feeds() -> Iterator[Feed]:
            for call, feed in calls_of(self._samples, [*self._roles.items()], setting.batch, setting.dynamic_batch):
                calls.append(call)
                yield feed

        with timer.of("read"):
            original.begin(feeds(), inputs)
        return Courses(original, Frontier(cutter, store, setting.threads, timer, original), calls)

    def _pairs(self, group: Sequence[Layer], courses: Courses) -> dict[str, dict[str, PairStatistic]]:
        """Return node -> role -> what the layers of a group get and should give."""
        memory = self._setting.memory_bytes
        readings = [reading_of(self._subject.view, layer, memory) for layer in group]
        sinks = {
            (reading.layer.node, role): Sink(reading, rows_to_keep(reading, memory, role == FIT), role == FIT)
            for reading in readings
            for role in self._roles
        }
        networks = courses.original, courses.compressed
        for number, call in enumerate(courses.calls):
            for reading in readings:
                with self._timer.of("columns"):
                    uniform = self._uniform(reading, call)
                    pair = pair_of(reading, networks, number, call, uniform)
                    seed, count = self._setting.seed, len(pair.columns)
                    drawn = lots_of(self._samples, seed, call.items, count, pair.by_sample)
                with self._timer.of("moments"):
                    sinks[reading.layer.node, call.role].add(pair, *drawn)
        return {la.node: {role: sinks.pop((la.node, role)).statistic() for role in self._roles} for la in group}

    def _uniform(self, reading: Reading, call: Call) -> NDArray[np.float64]:
        wanted = wanted_columns(reading.layer, self._setting) if call.role == FIT else MOST_JUDGE
        return uniform_numbers(self._samples, self._setting.seed, call.items, wanted, self._rows[call.role])

    def _replaced(
        self, layers: Sequence[Layer], fitted: Mapping[str, Fitted], model: onnx.ModelProto
    ) -> onnx.ModelProto:
        factors = {layer.node: fitted[layer.node].factors for layer in layers}
        return rewrite(View(model), layers, factors, self._subject.ranks).model


def _needed(cutter: Cutter, levels: Sequence[Level]) -> set[str]:
    """Return the tensors that the nodes and layers of some levels read from before."""
    nodes = [node for level in levels for node in level.nodes]
    layers = [layer for level in levels for layer in level.layers]
    read = cutter.reads(nodes) | {name for la in layers for name in (la.input, *_waits_for(la))}
    return read - cutter.makes(nodes)


def _exhaust(steps: Iterable[object]) -> None:
    for _ in steps:
        continue
