"""Layers behind compressed ones: pairs of columns and responses -> problems -> refitted factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnx_lrs.calibration.pairs import WEIGHTS_PER_REFIT, PairStatistic
from onnx_lrs.graph.layers import Layer, affine_behind, bias_row, weight_matrix
from onnx_lrs.planning.candidates import FIT, JUDGE, SELECT, Bench, Fitted
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task
from onnx_lrs.solvers.behind import activation_error, output_error
from onnx_lrs.solvers.cascade import GRID, ROUNDS, Refit, Tried, as_it_is, finish, linear
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, Problem


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer in the cascade: the factors it starts from, and what is known of its pairs, by role."""

    layer: Layer
    start: AnyFactors
    pairs: Mapping[str, PairStatistic]


def refits(shop: Shop, places: Sequence[Place], behind_activation: bool, done: Callable[[Layer, Fitted], None]) -> None:
    """Refit layers: fitted on FIT, chosen on SELECT and judged on JUDGE pairs.

    Every damping of every layer is a solve of its own. ``done`` is told each layer as soon as it is known.
    """
    bench, workers, most = shop.bench, shop.workers, _at_once(shop, places)
    problems = [paired_problem(bench, place) for place in places]
    starts = workers.map(as_it_is, [Task(p.d, (p, e.start)) for p, e in zip(problems, places, strict=True)], most)
    pulls: list[list[Tried]] = [[] for _ in places]
    fixed = [isinstance(place.start, ElementFactors) for place in places]
    asked = [(i, damping) for i in range(len(places)) for damping in GRID if not fixed[i]]
    tasks = [Task(problems[i].d, (problems[i], places[i].start, damping)) for i, damping in asked]
    for (i, _), tried in zip(asked, workers.map(linear, tasks, most), strict=True):
        pulls[i].append(tried)

    def finished(number: int, end: Refit) -> None:
        done(places[number].layer, _fitted(bench, places[number], problems[number], end))

    rounds = ROUNDS if behind_activation else ()
    ends = zip(problems, starts, pulls, strict=True)
    workers.map(finish, [Task(p.d, (p, own, tried, rounds)) for p, own, tried in ends], most, finished)


def _at_once(shop: Shop, places: Sequence[Place]) -> int:
    """Return how many refits have room in memory at the same time; at least one."""
    layers = [place.layer for place in places]
    largest = max(8 * WEIGHTS_PER_REFIT * layer.params for layer in layers)
    return max(1, min(shop.at_once(layers, 1), shop.setting.memory_bytes // largest))


def _fitted(bench: Bench, place: Place, problem: Problem, found: Refit) -> Fitted:
    layer, judge = place.layer, place.pairs[JUDGE].sample
    error = output_error(problem, found.factors, judge)
    behind = activation_error(problem, found.factors, judge)
    return Fitted(bench.of_layer(layer, found.factors), error, behind, damping=found.damping)


def paired_problem(bench: Bench, place: Place) -> Problem:
    """Return the problem of a layer behind layers that are compressed; wide ones in the space of their outputs."""
    layer, pairs, view = place.layer, place.pairs, bench.view
    wide = bench.in_outputs(layer)
    square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
    return Problem(
        np.eye(layer.out) if wide else weight_matrix(view, layer),
        1 if wide else layer.taps,
        pairs[FIT].moments,
        affine=layer.affine,
        kernel=(layer.geometry.kernel[0], layer.geometry.kernel[1]) if square and not wide else None,
        width=layer.d if wide else None,
        bias=bias_row(view, layer),
        activation=layer.activation,
        columns=pairs[FIT].sample,
        checks=pairs[SELECT].sample,
        response=pairs[FIT].response,
        scale=affine_behind(view, layer)[0],
    )
