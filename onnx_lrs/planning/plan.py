"""Which layer becomes what: error curves of all layers, then the exact knapsack over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from onnx_lrs.calibration.capture import Roles, Statistic, groups
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.allocate import Choice, allocate
from onnx_lrs.planning.candidates import Question, candidates_and_probe
from onnx_lrs.planning.prices import Macs, Params, Plan, Price, Size, alive_after
from onnx_lrs.planning.sensitivity import bounded
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task
from onnx_lrs.progress import Progress
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import AnyFactors

SLACK_ROUNDS = 8
SLACK_SHARE = 0.005  # of the limit: less is not worth another round
Curves = Mapping[str, Sequence[Candidate]]
Curve = tuple[list[Candidate], tuple[float, AnyFactors] | None]  # of one layer, with its probe's loss and factors
CURVE, PLAN, START = "curve", "plan", "start"  # kinds of what is kept


@dataclasses.dataclass(frozen=True)
class Limit:
    """At most a fraction of the original, under one price; ``name`` is that of the flag."""

    name: str
    price: Price
    fraction: float

    @property
    def most(self) -> int:
        """What may be spent in all."""
        return int(self.fraction * self.price.before)


@dataclasses.dataclass(frozen=True)
class Solved:
    """A plan with the sum of its layers' costs under each limit, and what is left of that once dead filters go."""

    plan: Plan
    costs: tuple[int, ...]
    spent: tuple[int, ...]


def limits_of(subject: Subject, fractions: Mapping[str, float], timing: Price | None) -> tuple[Limit, ...]:
    """Return limits from fractions of the original by name; ``timing`` is the price of latency where it is measured."""
    prices: dict[str, Callable[[], Price]] = {
        "params": lambda: Params(subject),
        "macs": lambda: Macs(subject),
        "size": lambda: Size(subject),
    }
    found = []
    for name, fraction in fractions.items():
        price = timing if name == "latency" else prices[name]()
        assert price is not None  # measured before, see Budget.is_timed
        found.append(Limit(name, price, fraction))
    return tuple(found)


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
    return curve if shop.shelf.has(layer.node) else None


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


def make_plan(subject: Subject, curves: Curves, limits: Sequence[Limit], dense: Collection[str] = ()) -> Plan:
    """Choose one candidate for each layer so that the whole model keeps to the limits at the least total loss.

    Filters that no reader needs any more (graph/rewrite.py) make a plan cheaper than the sum of its layers. That slack
    is given out again until the real cost comes close to the limits.

    Parameters
    ----------
    subject : Subject
        The model.
    curves : mapping of node to candidates
        What each layer may become, dense apart.
    limits : sequence of Limit
        What must hold of the whole model; at least one.
    dense : collection of str
        Nodes of layers that stay dense whatever they would save.

    Raises
    ------
    BudgetError
        If even the smallest candidates exceed it; names what can be reached.
    """
    layers = [layer for layer in subject.layers if curves[layer.node] and layer.node not in dense]
    choices = [_choices(layer, curves[layer.node], limits) for layer in layers]
    most = []
    for k, limit in enumerate(limits):
        fixed = limit.price.now - sum(options[0].costs[k] for options in choices)
        most.append(limit.most - fixed)
    room = tuple(most)

    def solve(given: Sequence[int]) -> Solved | None:
        chosen = allocate(choices, given)
        if chosen is None:
            return None
        picked = {layer.node: curves[layer.node][c - 1] for layer, c in zip(layers, chosen, strict=True) if c > 0}
        plan = Plan(picked)
        costs = tuple(sum(o[c].costs[k] for o, c in zip(choices, chosen, strict=True)) for k in range(len(limits)))
        alive = alive_after(subject, plan)
        saved = (limit.price.saved(plan, alive) for limit in limits)
        return Solved(plan, costs, tuple(cost - less for cost, less in zip(costs, saved, strict=True)))

    best = solve(room)
    if best is None:
        raise _unreachable(layers, choices, limits, room)
    return _spend_slack(best, room, solve).plan


def _unreachable(
    layers: Sequence[Layer], choices: Sequence[Sequence[Choice]], limits: Sequence[Limit], room: Sequence[int]
) -> BudgetError:
    """Return the error that says what can be reached instead."""
    least = []
    asked_for = [(k, limit) for k, limit in enumerate(limits) if limit.name != "latency" or limit.fraction < 1.0]
    for k, limit in asked_for or list(enumerate(limits)):
        fixed = limit.most - room[k]
        smallest = fixed + sum(min(c.costs[k] for c in options) for options in choices)
        least.append(math.ceil(1000 * smallest / limit.price.before) / 1000)
    limits = [limit for _, limit in asked_for] or list(limits)
    asked = " ".join(f"--{limit.name} {limit.fraction:g}" for limit in limits)
    alone = all(value <= limit.fraction for value, limit in zip(least, limits, strict=True))
    reachable = " and ".join(f"{value:.3f} of the {limit.name}" for value, limit in zip(least, limits, strict=True))
    each = "" if len(limits) == 1 else ", each alone" if not alone else ", each alone but not together"
    advice = " ".join(f"--{limit.name} {value}" for value, limit in zip(least, limits, strict=True))
    return BudgetError(
        f"{asked} cannot be reached: the smallest candidates of the {len(layers)} layers that can be compressed leave "
        f"{reachable}{each}.",
        f"Allow at least {advice}, or a smaller --multiple." if not alone else "Allow more of one of them.",
    )


def _spend_slack(best: Solved, room: Sequence[int], solve: Callable[[Sequence[int]], Solved | None]) -> Solved:
    """Raise the knapsack's limits while the real costs (less dead filters) keep to ``room``; halve what overshoots."""
    given, step = list(room), [most - spent for most, spent in zip(room, best.spent, strict=True)]
    for _ in range(SLACK_ROUNDS):
        if all(more <= most * SLACK_SHARE for more, most in zip(step, room, strict=True)):
            break
        raised = [most + max(more, 0) for most, more in zip(given, step, strict=True)]
        trial = solve(raised)
        if trial is None or any(spent > most for spent, most in zip(trial.spent, room, strict=True)):
            step = [more // 2 for more in step]
            continue
        best, given = trial, raised
        step = [min(more, most - spent) for more, most, spent in zip(step, room, best.spent, strict=True)]
    return best


def _choices(layer: Layer, candidates: Sequence[Candidate], limits: Sequence[Limit]) -> list[Choice]:
    """Return the layer's choices, dense first, each with its costs."""
    dense = Choice(tuple(limit.price.dense(layer) for limit in limits), 0.0)
    return [dense, *(Choice(tuple(x.price.of(layer, c) for x in limits), _tempered(c.loss)) for c in candidates)]


def _tempered(loss: float) -> float:
    """Return a loss above 1 (worse than no layer at all) on a log scale, or one wild curve would drown the others."""
    return loss if loss <= 1.0 else 1.0 + math.log(loss)
