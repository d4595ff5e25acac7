"""Which layer becomes what: error curves of all layers, then the exact knapsack over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnx_lrs.calibration.capture import Roles, Statistic, groups
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Budget
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.forms import GEMM_C_OPTIONAL
from onnx_lrs.graph.layers import Layer, read_elsewhere
from onnx_lrs.graph.model import weight_count
from onnx_lrs.graph.rewrite import alive_outputs
from onnx_lrs.planning.allocate import Choice, allocate
from onnx_lrs.planning.candidates import Question, candidates_and_probe
from onnx_lrs.planning.sensitivity import bounded
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task
from onnx_lrs.progress import Progress
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import AnyFactors
from onnx_lrs.solvers.spatial import FORM

SLACK_ROUNDS = 8
SLACK_SHARE = 0.005  # of the limit: less is not worth another round
Curves = Mapping[str, Sequence[Candidate]]
Curve = tuple[list[Candidate], tuple[float, AnyFactors] | None]  # of one layer, with its probe's loss and factors
CURVE, PLAN, START = "curve", "plan", "start"  # kinds of what is kept


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidate chosen for each layer that is compressed, by node; the others stay dense."""

    chosen: Mapping[str, Candidate]


Solved = tuple[Mapping[str, int], Plan]  # cost of each layer, and the plan


def error_curves(
    subject: Subject,
    shop: Shop,
    roles: Roles,
    progress: Progress,
) -> tuple[dict[str, list[Candidate]], dict[str, tuple[float, AnyFactors]]]:
    """Return every layer's candidates, and with data one fitted probe of each layer (see planning/sensitivity.py).

    Statistics are captured group by group; after use they are dropped, or put on the shelf. What is in the work
    folder already is neither captured nor solved again.
    """
    bench = shop.bench
    found: dict[str, list[Candidate]] = {}
    probes: dict[str, tuple[float, AnyFactors]] = {}
    for group in groups(subject.layers, len(roles), bench.memory_bytes, bench.with_columns):
        known = {layer.node: kept for layer in group if (kept := _kept(layer, shop)) is not None}
        rest = [layer for layer in group if layer.node not in known]
        statistics = shop.captured(group, roles, progress, known)

        def finish(
            number: int,
            answer: Curve,
            rest: Sequence[Layer] = rest,
            statistics: dict[str, dict[str, Statistic]] = statistics,
            known: dict[str, Curve] = known,
        ) -> None:
            layer = rest[number]
            known[layer.node] = _put(layer, answer, statistics.pop(layer.node, {}), shop)

        tasks = [
            Task(layer.d, functools.partial(_asked, shop, layer, statistics.get(layer.node, {}))) for layer in rest
        ]
        shop.workers.map(candidates_and_probe, tasks, shop.at_once(group, len(roles)), finish)
        for layer in group:
            found[layer.node], probe = known[layer.node]
            if probe is not None:
                probes[layer.node] = probe
            progress.step(layer.name)
    return found, probes


def _kept(layer: Layer, shop: Shop) -> Curve | None:
    """Return a layer's curve where that was kept, and with it what the fit needs."""
    curve: Curve | None = shop.work.get(CURVE, layer.node)
    if curve is None or not curve[0] or shop.shelf is None:
        return curve
    return curve if shop.work.has(START, layer.node) or shop.shelf.has(layer.node) else None


def _asked(shop: Shop, layer: Layer, own: Mapping[str, Statistic]) -> tuple[Question]:
    return (shop.bench.question(layer, own),)


def _put(layer: Layer, answer: Curve, own: Mapping[str, Statistic], shop: Shop) -> Curve:
    """Keep a layer's candidates and probe; its statistics go on the shelf."""
    candidates, probe = answer
    if shop.shelf is not None and candidates:
        shop.shelf.put(layer.node, own)
    if probe is not None:
        probe = probe[0], shop.bench.of_layer(layer, probe[1])
    curve: Curve = shop.work.put(CURVE, layer.node, (candidates, probe))
    return curve


def weighted(curves: Curves, sensitivity: Mapping[str, float]) -> dict[str, list[Candidate]]:
    """Return the curves with every loss times the layer's weight (see planning/sensitivity.py)."""
    weights = bounded(sensitivity)
    return {
        node: [dataclasses.replace(c, loss=c.loss * weights.get(node, 1.0)) for c in candidates]
        for node, candidates in curves.items()
    }


def make_plan(subject: Subject, curves: Curves, budget: Budget) -> Plan:
    """Choose one candidate for each layer so that the whole model keeps to the budget at the least total loss.

    Filters that no reader needs any more (graph/rewrite.py) make a plan cheaper than the sum of its layers. That slack
    is given out again until the real cost comes close to the budget.

    Raises
    ------
    BudgetError
        If even the smallest candidates exceed it; names what can be reached.
    """
    layers = [layer for layer in subject.layers if curves[layer.node]]
    choices = [_choices(subject, layer, curves[layer.node], budget) for layer in layers]
    before = subject.params if budget.kind == "params" else sum(subject.macs.values())
    now = weight_count(subject.folded) if budget.kind == "params" else before
    fixed = now - sum(options[0].cost for options in choices)
    limit = int(budget.fraction * before) - fixed
    best = _solve(layers, choices, curves, limit)
    if best is None:
        smallest = (fixed + sum(min(c.cost for c in options) for options in choices)) / before
        raise BudgetError(
            f"--{budget.kind} {budget.fraction} cannot be reached: the smallest candidates of the {len(layers)} layers "
            f"that can be compressed leave {smallest:.3f} of the {budget.kind}.",
            f"Allow at least --{budget.kind} {math.ceil(1000 * smallest) / 1000}, or a smaller --multiple.",
        )
    return _spend_slack(best, limit, lambda given: _solve(layers, choices, curves, given), subject, budget)


def _spend_slack(
    best: Solved, limit: int, solve: Callable[[int], Solved | None], subject: Subject, budget: Budget
) -> Plan:
    """Raise the knapsack's limit while the real cost (less dead filters) keeps to ``limit``; halve what overshoots."""
    given, step = limit, limit - _spent(subject, best, budget)
    for _ in range(SLACK_ROUNDS):
        if step <= limit * SLACK_SHARE:
            break
        trial = solve(given + step)
        if trial is None or _spent(subject, trial, budget) > limit:
            step //= 2
            continue
        best, given = trial, given + step
        step = min(step, limit - _spent(subject, best, budget))
    return best[1]


def _solve(layers: Sequence[Layer], choices: Sequence[Sequence[Choice]], curves: Curves, limit: int) -> Solved | None:
    """Return the cost of each layer and the plan, or None if the limit cannot be kept."""
    chosen = allocate(choices, limit)
    if chosen is None:
        return None
    costs = {layer.node: choices[i][chosen[i]].cost for i, layer in enumerate(layers)}
    picked = {layer.node: curves[layer.node][c - 1] for layer, c in zip(layers, chosen, strict=True) if c > 0}
    return costs, Plan(picked)


def _spent(subject: Subject, solved: Solved, budget: Budget) -> int:
    costs, plan = solved
    return sum(costs.values()) - _saved(subject, plan, budget)


def _saved(subject: Subject, plan: Plan, budget: Budget) -> int:
    """Return what dead filters save in the budget's unit: rows of weights (and their biases)."""
    reads = {node: np.sort(c.support) for node, c in plan.chosen.items() if c.form == "channels"}
    alive, _ = alive_outputs(subject.view, subject.layers, reads)
    saved = 0
    for layer in subject.layers:
        if layer.node not in alive:
            continue
        rows = layer.out - len(alive[layer.node])
        row = _row_params(layer, plan.chosen.get(layer.node))
        positions = subject.macs[layer.node] // layer.params
        saved += rows * (row * positions if budget.kind == "macs" else row + (layer.bias is not None))
        if budget.kind == "params" and layer.node not in plan.chosen and _shares_bias(subject, layer):
            saved -= layer.out  # the shorter bias is a new one beside the old
    return saved


def _shares_bias(subject: Subject, layer: Layer) -> bool:
    """Return whether others read a layer's bias too, so that it stays where the layer gets a new one."""
    return layer.bias is not None and read_elsewhere(subject.view, layer.bias) is not None


def _row_params(layer: Layer, chosen: Candidate | None) -> int:
    """Return the weights that go with one output of the layer."""
    if chosen is None:
        return layer.d
    if chosen.form == FORM:
        return chosen.rank * layer.geometry.kernel[1]
    return chosen.rank + len(chosen.support) * layer.taps  # which rows single entries lie in is not known yet


def _choices(subject: Subject, layer: Layer, candidates: Sequence[Candidate], budget: Budget) -> list[Choice]:
    """Return the layer's choices, dense first, each with its cost in the budget's unit."""
    if budget.kind == "macs":
        costs = [macs_of(subject, layer, c.form, c.rank, c.params) for c in candidates]
        dense = subject.macs[layer.node]
    else:
        new_bias = layer.out if layer.affine and (layer.bias is None or _shares_bias(subject, layer)) else 0
        if layer.op == "Gemm" and subject.view.opset < GEMM_C_OPTIONAL:
            new_bias += 2  # a zero for the C of each Gemm that has no bias
        costs, dense = [c.params + new_bias for c in candidates], layer.params
    pairs = zip(costs, candidates, strict=True)
    return [Choice(dense, 0.0), *(Choice(cost, _tempered(c.loss)) for cost, c in pairs)]


def _tempered(loss: float) -> float:
    """Return a loss above 1 (worse than no layer at all) on a log scale, or one wild curve would drown the others."""
    return loss if loss <= 1.0 else 1.0 + math.log(loss)


def macs_of(subject: Subject, layer: Layer, form: str, rank: int, params: int) -> int:
    """Return the multiply-accumulates of a layer in a given form with that many weights.

    Every form works at the output's positions, but for the k x 1 part of the spatial one: it keeps the input's width.
    """
    positions = subject.macs[layer.node] // layer.params
    if form.endswith("elements"):  # run as the dense layer they are folded to
        return subject.macs[layer.node]
    if form != FORM:
        return params * positions
    vertical = rank * layer.channels * layer.geometry.kernel[0]
    rows = positions // subject.shapes[layer.node][3]
    return vertical * rows * subject.shapes[layer.input][3] + (params - vertical) * positions
