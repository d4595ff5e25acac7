"""Which layer becomes what: error curves of all layers, then the exact knapsack over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Roles, Statistic, groups
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import alive_outputs
from onnx_lrs.planning.allocate import Choice, allocate, supported
from onnx_lrs.planning.candidates import Question, candidates_and_probes
from onnx_lrs.planning.prices import CHANNELS, Alive, Macs, Params, Plan, Price, Size, alive_after, reads_of, saved
from onnx_lrs.planning.sensitivity import Kind, Law, Points, Probe, kind_of, laws
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task
from onnx_lrs.progress import Progress
from onnx_lrs.solvers import Candidate

AROUND_ROUNDS = 6  # of solving the knapsack with costs that hold around the best plan so far
LEAST_GAIN = 1e-3  # of the loss: less is not worth another of these rounds
EXACT = 1e-12  # relative squared error: no more than float32 makes itself
SHRINKS = 4  # of the limits in such a round
Curves = Mapping[str, Sequence[Candidate]]
Curve = tuple[list[Candidate], list[Probe]]  # of one layer, with its probes
Reads = Mapping[str, NDArray[np.int64]]
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
    """A plan with its loss, and the sum of its layers' costs under each limit once dead filters are gone.

    ``chosen`` numbers what each layer becomes, 0 for as it is.
    """

    plan: Plan
    chosen: tuple[int, ...]
    loss: float
    spent: tuple[int, ...]


def limits_of(subject: Subject, fractions: Mapping[str, float], timing: Price | None) -> tuple[Limit, ...]:
    """Return limits from fractions of the original by name; ``timing`` is the price of latency where it is measured."""
    prices: dict[str, Callable[[], Price]] = {
        "params": lambda: Params(subject),
        "macs": lambda: Macs(subject),
        "size": lambda: Size(subject, subject.precision),
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
) -> tuple[dict[str, list[Candidate]], dict[str, list[Probe]]]:
    """Return every layer's candidates, and with data fitted probes of each layer (see planning/sensitivity.py).

    Statistics are captured group by group; after use they are dropped, or put on the shelf. What is in the work
    folder already is neither captured nor solved again.
    """
    bench = shop.bench
    found: dict[str, list[Candidate]] = {}
    probes: dict[str, list[Probe]] = {}
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
        shop.workers.map(candidates_and_probes, tasks, shop.at_once(group, len(roles)), finish)
        for layer in group:
            found[layer.node], own = known[layer.node]
            if own:
                probes[layer.node] = own
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
    """Keep a layer's candidates and probes; its statistics go on the shelf."""
    candidates, probes = answer
    if shop.shelf is not None and candidates:
        shop.shelf.put(layer.node, own)
    kept = [(kind, error, shop.bench.of_layer(layer, factors)) for kind, error, factors in probes]
    curve: Curve = shop.work.put(CURVE, layer.node, (candidates, kept))
    return curve


def carried(curves: Curves, measured: Mapping[str, Points]) -> Curves:
    """Return the curves with what every candidate makes of the outputs (see planning/sensitivity.py)."""
    found = laws(measured)
    return {
        node: [_at_outputs(c, found[node]) if node in found else c for c in candidates]
        for node, candidates in curves.items()
    }


def _at_outputs(candidate: Candidate, own: Mapping[Kind, Law]) -> Candidate:
    law = own.get(kind_of(candidate.form))
    return candidate if law is None else dataclasses.replace(candidate, at_outputs=law.loss(_tempered(candidate.loss)))


def make_plan(subject: Subject, curves: Curves, limits: Sequence[Limit], dense: Collection[str] = ()) -> Plan:
    """Choose one candidate for each layer so that the whole model keeps to the limits at the least total loss.

    Filters that no reader needs any more (graph/rewrite.py) make a plan cheaper than the sum of its layers, which a
    knapsack does not see. So from its plan, and from that of kept channels alone, it is solved again and again with
    costs that hold while one layer of the plan changes, as long as the plan gets better; the real cost is looked at
    each time.

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
    desk = Desk(subject, curves, limits, dense)
    found = [desk.improved(start) for start in desk.starts()]
    within = [solved for solved in found if desk.is_within(solved)]
    if not within:
        raise desk.unreachable(found)
    return min(within, key=lambda solved: solved.loss).plan


class Desk:
    """The knapsack of one plan: layers, what each may become at which costs, and how much room there is."""

    def __init__(self, subject: Subject, curves: Curves, limits: Sequence[Limit], dense: Collection[str]) -> None:
        self._subject, self._limits = subject, limits
        self._layers = [layer for layer in subject.layers if curves[layer.node] and layer.node not in dense]
        self._options = [[None, *curves[layer.node]] for layer in self._layers]  # None: as it is
        self._choices = [_choices(layer, curves[layer.node], limits) for layer in self._layers]
        fixed = [x.price.now - sum(o[0].costs[k] for o in self._choices) for k, x in enumerate(limits)]
        self._room = tuple(x.most - cost for x, cost in zip(limits, fixed, strict=True))
        self._producers: dict[str, list[Layer]] = {}
        for layer in subject.layers:
            for reader in subject.reach.get(layer.node, ((), ()))[0]:
                self._producers.setdefault(reader, []).append(layer)

    def starts(self) -> list[Solved]:
        """Return plans to begin from: the blind knapsack's, and that of kept channels alone where they save others.

        Where a knapsack that does not see what layers save each other finds none within the limits: the smallest one.
        """
        return [self._start(offered) for offered in self._offers()]

    def _offers(self) -> list[list[list[int]]]:
        """Return which options of each layer a knapsack may take: all; where layers are coupled, also channels only."""
        every = [list(range(len(options))) for options in self._options]
        if not self._is_coupled:
            return [every]
        narrow = [[i for i in some if _is_narrowing(o[i])] for some, o in zip(every, self._options, strict=True)]
        return [every, narrow]

    @functools.cached_property
    def _is_coupled(self) -> bool:
        """Whether what one layer becomes can make another one cheaper."""
        return any(
            layer.node in self._producers and any(c is not None and c.form == CHANNELS for c in options)
            for layer, options in zip(self._layers, self._options, strict=True)
        )

    def _start(self, offered: Sequence[Sequence[int]]) -> Solved:
        choices = [[own[i] for i in some] for own, some in zip(self._choices, offered, strict=True)]
        chosen = allocate(choices, self._room)
        if chosen is None:
            weights = [1 / max(limit.price.before, 1) for limit in self._limits]
            chosen = [int(np.argmin([np.dot(choice.costs, weights) for choice in own])) for own in choices]
        return self._solved([some[c] for some, c in zip(offered, chosen, strict=True)])

    def along(self, plan: Plan, most: int) -> list[Solved]:
        """Return plans from the smallest to the one of least loss, by what they really cost; see allocate.supported.

        They come from three kinds of costs, at most so many from each: of layers alone, of kept channels alone, and
        those that hold beside ``plan``.
        """
        every, *narrow = self._offers()
        offers = [(self._choices, offered) for offered in (every, *narrow)]
        if self._is_coupled:
            offers.append((self._choices_beside(plan), every))
        found = []
        for choices, offered in offers:
            own = [[of[i] for i in some] for of, some in zip(choices, offered, strict=True)]
            found += [
                self._solved([some[c] for some, c in zip(offered, picked, strict=True)])
                for picked in supported(own, most)
            ]
        return found

    def cost(self, solved: Solved) -> int:
        """Return what the whole model costs with a plan under the first limit."""
        return solved.spent[0] + self._limits[0].most - self._room[0]

    def is_within(self, solved: Solved) -> bool:
        """Return whether a plan keeps to the limits by what it really costs."""
        return all(spent <= most for spent, most in zip(solved.spent, self._room, strict=True))

    def improved(self, start: Solved) -> Solved:
        """Return a better plan found around the given one, or that one."""
        best = start
        for _ in range(AROUND_ROUNDS if self._is_coupled else 0):
            trial = self._around(best)
            if trial is None or (self.is_within(best) and trial.loss >= (1 - LEAST_GAIN) * best.loss):
                break
            best = trial
        return best

    def unreachable(self, found: Sequence[Solved]) -> BudgetError:
        """Return the error that says what can be reached instead of the limits, ``found`` being what was tried."""
        least = []
        for k, most in enumerate(self._room):
            smallest = sum(min(choice.costs[k] for choice in own) for own in self._choices)
            least.append(self._limits[k].most - most + min(smallest, *(solved.spent[k] for solved in found)))
        return _unreachable(len(self._layers), self._limits, least)

    def _solved(self, chosen: Sequence[int]) -> Solved:
        """Return a plan with what it loses and really costs."""
        picked = {la.node: o[c] for la, o, c in zip(self._layers, self._options, chosen, strict=True)}
        plan = Plan({node: candidate for node, candidate in picked.items() if candidate is not None})
        alive = alive_after(self._subject, plan)
        taken = [own[c] for own, c in zip(self._choices, chosen, strict=True)]
        spent = []
        for k, limit in enumerate(self._limits):
            alone = sum(choice.costs[k] for choice in taken)
            spent.append(alone - saved(limit.price, self._subject, plan, alive))
        return Solved(plan, tuple(chosen), sum(choice.loss for choice in taken), tuple(spent))

    def _around(self, solved: Solved) -> Solved | None:
        """Return the best plan with costs that hold while one layer of the given plan changes; None if none is within.

        Where several layers change at once what they save each other is another, so the real cost is looked at, and
        what is too much is taken from the limits.
        """
        choices = self._choices_beside(solved.plan)
        counted = _counted(choices, solved.chosen)
        given = [most - real + own for most, real, own in zip(self._room, solved.spent, counted, strict=True)]
        for _ in range(SHRINKS):
            chosen = allocate(choices, given)
            if chosen is None:
                return None
            trial = self._solved(chosen)
            if self.is_within(trial):
                return trial
            over = [spent - most for spent, most in zip(trial.spent, self._room, strict=True)]
            counted = _counted(choices, chosen)
            given = [min(g, c - o) if o > 0 else g for g, c, o in zip(given, counted, over, strict=True)]
        return None

    def _choices_beside(self, plan: Plan) -> list[list[Choice]]:
        """Return the choices of all layers with the costs that they have in a plan."""
        context = plan, alive_after(self._subject, plan), reads_of(plan)
        return [
            [
                Choice(self._beside(layer, candidate, choice.costs, context), choice.loss)
                for candidate, choice in zip(options, own, strict=True)
            ]
            for layer, options, own in zip(self._layers, self._options, self._choices, strict=True)
        ]

    def _beside(
        self, layer: Layer, candidate: Candidate | None, costs: Sequence[int], context: tuple[Plan, Alive, Reads]
    ) -> tuple[int, ...]:
        """Return the costs of a candidate in a plan: less its own dead filters, less those that it leaves unread."""
        plan, alive, reads = context
        found = list(costs)
        if layer.node in alive:
            for k, limit in enumerate(self._limits):
                found[k] -= limit.price.less(layer, candidate, len(alive[layer.node]))
        if candidate is None or candidate.form != CHANNELS:
            return tuple(found)
        reads = {**reads, layer.node: candidate.support}
        producers = self._producers.get(layer.node, ())
        narrower, _ = alive_outputs(self._subject.view, producers, reads, self._subject.reach)
        for producer in producers:
            if producer.node in narrower:
                for k, limit in enumerate(self._limits):
                    rows = len(narrower[producer.node])
                    found[k] -= limit.price.less(producer, plan.chosen.get(producer.node), rows)
        return tuple(found)


def _is_narrowing(candidate: Candidate | None) -> bool:
    return candidate is None or candidate.form == CHANNELS


def _counted(choices: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> list[int]:
    """Return the sums of the chosen costs under each limit."""
    return [sum(costs) for costs in zip(*(own[c].costs for own, c in zip(choices, chosen, strict=True)), strict=True)]


def _unreachable(count: int, limits: Sequence[Limit], costs: Sequence[int]) -> BudgetError:
    """Return the error that says what can be reached instead, ``costs`` under each limit."""
    pairs = [
        (limit, math.ceil(1000 * cost / limit.price.before) / 1000) for limit, cost in zip(limits, costs, strict=True)
    ]
    asked_for = [pair for pair in pairs if pair[0].name != "latency" or pair[0].fraction < 1.0] or pairs
    asked = " ".join(f"--{limit.name} {limit.fraction:g}" for limit, _ in asked_for)
    alone = all(value <= limit.fraction for limit, value in asked_for)
    reachable = " and ".join(f"{value:.3f} of the {limit.name}" for limit, value in asked_for)
    each = "" if len(asked_for) == 1 else ", each alone" if not alone else ", each alone but not together"
    advice = " ".join(f"--{limit.name} {value}" for limit, value in asked_for)
    return BudgetError(
        f"{asked} cannot be reached: the smallest candidates of the {count} layers that can be compressed leave "
        f"{reachable}{each}.",
        f"Allow at least {advice}, or a smaller --multiple." if not alone else "Allow more of one of them.",
    )


def _choices(layer: Layer, candidates: Sequence[Candidate], limits: Sequence[Limit]) -> list[Choice]:
    """Return the layer's choices, dense first, each with its costs."""
    dense = Choice(tuple(limit.price.dense(layer) for limit in limits), 0.0)
    return [dense, *(Choice(tuple(x.price.of(layer, c) for x in limits), _loss(c)) for c in candidates)]


def loss_of(plan: Plan) -> float:
    """Return what a plan loses: the sum over its layers."""
    return sum(_loss(candidate) for candidate in plan.chosen.values())


def _loss(candidate: Candidate) -> float:
    """Return what a candidate loses at the outputs; its own error where that was not measured."""
    if candidate.loss <= EXACT:
        return 0.0
    return _tempered(candidate.loss) if candidate.at_outputs is None else candidate.at_outputs


def _tempered(loss: float) -> float:
    """Return a loss above 1 (worse than no layer at all) on a log scale, or one wild curve would drown the others."""
    return loss if loss <= 1.0 else 1.0 + math.log(loss)
