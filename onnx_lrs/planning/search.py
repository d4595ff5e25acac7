"""Find the plan: within a measured latency, or as fast as it gets within what may be lost.

Latency does not depend on the values of weights. So plans are put into the real network with random factors and timed
against the original before anything is fitted: the limit is corrected by what the whole network really takes, and
layers that do not make it faster are taken back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Budget
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.graph.small import Shape, random_elements, random_factors
from onnx_lrs.planning.fitting import Fitter, candidate_key
from onnx_lrs.planning.gate import Drop, Gate
from onnx_lrs.planning.plan import Limit, limits_of, loss_of, make_plan
from onnx_lrs.planning.prices import CHANNELS, Plan
from onnx_lrs.planning.timing import Stopwatch, Timing
from onnx_lrs.progress import Progress, Silent
from onnx_lrs.report.result import SearchStep
from onnx_lrs.runtime.latency import calls_in_turn, fast_quarter, there_and_back
from onnx_lrs.runtime.session import Session
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import AnyFactors

REFINEMENTS = 6  # of a plan by measuring what it picked
ROUNDS = 6  # of correcting the limit by what the whole network takes
CALIBRATIONS = 2  # of what layers take by what the whole network takes
CLOSE = 0.97  # of the limit: what a plan leaves of it is not worth another round
SECONDS = 3.0  # of timing a plan against the original
ALIKE = 1.03  # two readings this close need no third
WINDOWS = 5  # of time in which two models are held against each other
CALLS = (10, 1000)  # of each of the two, at least and at most
LAYER_SECONDS = 0.8  # of timing it against itself without one of its layers
CLEAR = 0.08  # of the original's latency: a layer that is predicted to save more pays without another look
TOLD = 0.03  # of a plan's latency: less is not told from noise in LAYER_SECONDS
SCATTER = 0.005  # of what two models that are equally fast differ by in SECONDS
STEPS = 6  # of the bisection; the last halves an interval of 3 % of the latency
CASCADES = 3  # plans that are fitted in full
SEARCH_STEPS = STEPS + CASCADES  # at least
TIGHTER = 0.85  # of the latency that layers fitted alone allow: the next to be tried in the cascade


class EndToEnd:
    """The original and plans of it, timed in turn with random weights."""

    def __init__(self, subject: Subject, stopwatch: Stopwatch) -> None:
        self._subject, self._stopwatch = subject, stopwatch
        self._layers = {layer.node: layer for layer in subject.layers}
        self._proven: set[tuple[str, str]] = set()  # layers with what was in their place

    def assembled(self, plan: Plan) -> onnx.ModelProto:
        """Return the network with a plan's factors, their values random."""
        factors = {node: stand_in(self._layers[node], c) for node, c in plan.chosen.items()}
        found = rewrite(self._subject.view, self._subject.layers, factors, self._subject.ranks).model
        return self._stopwatch.as_run(found)

    def ratio(self, plan: Plan) -> float:
        """Return the plan's latency as a fraction of the original's, by two readings that agree or three."""
        models = self._subject.original, self.assembled(plan)
        readings = [self._against(*models, SECONDS) for _ in range(2)]
        if max(readings) > ALIKE * min(readings):
            readings.append(self._against(*models, SECONDS))
        return float(np.median(readings))

    def _against(self, one: onnx.ModelProto, other: onnx.ModelProto, seconds: float) -> float:
        """Return the second model's latency as a fraction of the first's: the median over a few windows of time.

        On a busy machine other work may slow one model for a second or two and not the other.
        """
        watch = self._stopwatch
        with contextlib.ExitStack() as stack:
            opened = (Session(model, watch.threads, provider=watch.provider) for model in (one, other))
            calls = [functools.partial(stack.enter_context(session).run, watch.feed) for session in opened]
            times = calls_in_turn(calls, seconds, CALLS, there_and_back(2))
        windows = [fast_quarter(window) for window in np.array_split(times, WINDOWS)]
        return float(np.median([second / first for first, second in windows]))

    def without_idle(self, plan: Plan, timing: Timing) -> Plan:
        """Return a plan without the layers that do not make the network faster.

        What a layer of a large network saves is less than noise, what many of them save is not. So they are asked in
        groups, those that are predicted to save least first, and what seemed idle is asked once more together.
        """
        whole = timing.predict_ns(plan)
        saved = {node: timing.predict_ns(without(plan, [node])) - whole for node in plan.chosen}
        current = without(plan, [node for node, ns in saved.items() if ns <= 0])
        asked = [node for node in current.chosen if _placed(plan, node) not in self._proven]
        doubtful = [node for node in asked if saved[node] < CLEAR * timing.now]
        shares = {node: saved[node] / whole for node in sorted(doubtful, key=lambda n: saved[n])}
        idle: list[str] = []
        for group in together(shares):
            idle += self._idle(without(current, idle), {node: shares[node] for node in group})
        while idle and self._longer(current, idle, SECONDS) > SCATTER:
            self._proven |= {_placed(plan, node) for node in idle[len(idle) // 2 :]}
            idle = idle[: len(idle) // 2]
        return without(current, idle)

    def _longer(self, plan: Plan, nodes: Collection[str], seconds: float) -> float:
        """Return by which share of its time a plan takes longer without some layers."""
        return self._against(self.assembled(plan), self.assembled(without(plan, nodes)), seconds) - 1

    def _idle(self, plan: Plan, shares: Mapping[str, float]) -> list[str]:
        """Return which of some layers the plan is no slower without, given the share of its time that each saves.

        Noise has to say so twice. A group that saves much less than predicted is asked in halves.
        """
        nodes, longer = list(shares), self._longer(plan, shares, LAYER_SECONDS)
        if longer <= 0 and self._longer(plan, shares, LAYER_SECONDS) <= 0:
            return nodes
        expected = sum(shares.values())
        if len(nodes) == 1 or expected < TOLD or longer >= expected / 2:
            self._proven |= {_placed(plan, node) for node in nodes}
            return []
        first, second = ({node: shares[node] for node in nodes[part::2]} for part in (0, 1))
        idle = self._idle(plan, first)
        return idle + self._idle(without(plan, idle), second)


def _placed(plan: Plan, node: str) -> tuple[str, str]:
    """Return a layer with what a plan puts in its place: another candidate of it may pay or not."""
    return node, candidate_key(plan.chosen[node])


def together(shares: Mapping[str, float]) -> list[list[str]]:
    """Return the layers in groups which are each predicted to save what can be told from noise, if there are enough.

    ``shares`` rise. A layer that saves as much by itself hides no other one.
    """
    groups: list[list[str]] = []
    for node, share in shares.items():
        if not groups or share >= TOLD or sum(shares[other] for other in groups[-1]) >= TOLD:
            groups.append([])
        groups[-1].append(node)
    return groups


def without(plan: Plan, nodes: Collection[str]) -> Plan:
    """Return a plan with some layers left as they are."""
    return Plan({node: candidate for node, candidate in plan.chosen.items() if node not in nodes})


def stand_in(layer: Layer, candidate: Candidate) -> AnyFactors:
    """Return factors of a candidate's shape with random values."""
    shape = Shape(candidate.form, candidate.rank, len(candidate.support), inner=candidate.inner)
    if candidate.elements:
        return random_elements(layer, candidate.rank, candidate.elements)
    return random_factors(layer, shape, np.sort(candidate.support))


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes plans of one model from its layers' curves; ``timing`` is None where latency plays no part."""

    subject: Subject
    curves: Mapping[str, Sequence[Candidate]]
    budget: Budget
    timing: Timing | None = None

    def plan(self, latency: float | None = None, dense: frozenset[str] = frozenset()) -> Plan:
        """Return the plan of least loss within the budget, its latency limit replaced by a given one.

        Raises
        ------
        BudgetError
            If nothing keeps to it.
        """
        fractions = self.budget.limits if latency is None else self.budget.limits | {"latency": min(latency, 1.0)}
        limits: Sequence[Limit] = limits_of(self.subject, fractions, self.timing)
        plan = make_plan(self.subject, self.curves, limits, dense)
        for _ in range(REFINEMENTS if self.timing is not None else 0):
            if not self.timing.refine(plan):  # type: ignore[union-attr]
                break
            plan = make_plan(self.subject, self.curves, limits, dense)
        return plan

    @property
    def has_other_limits(self) -> bool:
        """Whether more than latency counts, so that a layer which is no faster may still be of use."""
        return bool(self.budget.limits.keys() - {"latency"})

    def ceiling(self) -> float:
        """Return the fraction of the latency that the model takes with no layer compressed: 1 in float32."""
        assert self.timing is not None
        return min(self.timing.now / self.timing.before, 1.0)

    def floor(self) -> float:
        """Return about the least fraction of the latency that a plan is predicted to reach.

        That of the fastest candidates, each alone, or of the fewest channels, which make layers in front faster.
        """
        assert self.timing is not None
        least, fewest = 0, {}
        for layer in self.subject.layers:
            took = functools.partial(self.timing.of, layer)
            candidates, dense = self.curves[layer.node], self.timing.dense(layer)
            least += min([dense, *map(took, candidates)]) - dense
            narrow = [c for c in candidates if c.form == CHANNELS]
            if narrow:
                fewest[layer.node] = min(narrow, key=took)
        reached = min(self.timing.now + least, self.timing.predict_ns(Plan(fewest)))
        return max(reached / self.timing.before, 0.0)


def calibrated(planner: Planner, end_to_end: EndToEnd) -> None:
    """Let the whole network say what a plan of half of the possible gain takes."""
    assert planner.timing is not None
    for _ in range(CALIBRATIONS):
        try:
            plan = planner.plan((planner.ceiling() + planner.floor()) / 2)
        except BudgetError:  # other limits cannot be kept; who asks for the plan will say so
            return
        if not plan.chosen:
            return
        planner.timing.calibrate(plan, end_to_end.ratio(plan))


def within_latency(planner: Planner, end_to_end: EndToEnd, wanted: float, progress: Progress) -> Plan:
    """Return the plan of least loss whose measured latency keeps to a fraction of the original's.

    What layers take is scaled to what the whole network took with that plan.

    Raises
    ------
    BudgetError
        If no plan does; names the nearest that was measured.
    """
    assert planner.timing is not None
    given, dense = wanted, frozenset[str]()
    best: tuple[Plan, float] | None = None
    loosest, low, high, nearest = 0.0, 0.0, np.inf, np.inf  # low and high: limits known as too tight and too loose
    for _ in range(ROUNDS):
        try:
            plan = planner.plan(given, dense)
        except BudgetError:
            if not np.isfinite(nearest):
                raise
            low = given
            given = (low + min(high, 1.0)) / 2
            continue
        kept = plan if planner.has_other_limits else end_to_end.without_idle(plan, planner.timing)
        dense |= plan.chosen.keys() - kept.chosen.keys()
        real = end_to_end.ratio(kept) if kept.chosen else planner.ceiling()
        progress.step(f"{real:.3f} of the latency")
        nearest = min(nearest, real)
        if real > wanted:
            high = min(high, given)
        else:
            loosest = max(loosest, given)
            if best is None or loss_of(kept) <= loss_of(best[0]):  # a looser one may be without layers
                best = kept, real
        if CLOSE * wanted <= real <= wanted or loosest == 1.0 or (real <= wanted and not kept.chosen):
            break
        given = _corrected(given, wanted / real, max(low, loosest), high)
    if best is None and dense:
        best = _with_all_layers(planner, end_to_end, wanted, given)
    if best is None:
        raise BudgetError(
            f"--latency {wanted:g} was not reached: the fastest plan tried takes {nearest:.3f} of the original's.",
            f"Allow at least --latency {np.ceil(100 * nearest) / 100:.2f}.",
        )
    planner.timing.calibrate(*best)
    return best[0]


def _with_all_layers(planner: Planner, end_to_end: EndToEnd, wanted: float, given: float) -> tuple[Plan, float] | None:
    """Return a plan of layers that looser plans left out too, with its latency; None if it is too slow as well."""
    try:
        plan = planner.plan(given)
    except BudgetError:
        return None
    real = end_to_end.ratio(plan)
    return (plan, real) if real <= wanted else None


def _corrected(given: float, factor: float, low: float, high: float) -> float:
    """Return the limit to be tried next: in proportion, or half-way between the loosest that held and what did not.

    A network's latency may jump where a plan of many small layers changes; in proportion the search would then go back
    and forth over the jump.
    """
    proportional = min(given * factor * (1.0 if factor >= 1.0 else 0.99), 1.0)
    return proportional if low < proportional < high else (low + min(high, 1.0)) / 2


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a search ended: the plan, every step, why there is no plan, and what the user should know.

    ``in_float`` names what stays in float32 where the model is quantised, by the tensors that nodes make.
    """

    plan: Plan
    steps: tuple[SearchStep, ...]
    why: str = ""
    notes: tuple[str, ...] = ()
    in_float: frozenset[str] = frozenset()


Build = Callable[[Mapping[str, AnyFactors]], onnx.ModelProto]
AsRun = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, frozenset[str]]]  # and what of it stays in float32


class Search:
    """The fastest plan that passes a gate; ``build`` puts factors into the graph, ``as_run`` gives it its precision.

    Plans are tried in float32, which takes no calibration; those that are confirmed, as they will run.
    """

    def __init__(
        self,
        planner: Planner,
        fitter: Fitter,
        gate: Gate,
        build: Build,
        as_run: AsRun = lambda model: (model, frozenset()),
    ) -> None:
        self._planner, self._fitter, self._gate, self._build = planner, fitter, gate, build
        self._as_run = as_run
        self._end_to_end: EndToEnd | None = None
        self._dense: frozenset[str] = frozenset()
        self._paying: dict[float, Plan | None] = {}
        self._top = min(planner.budget.latency or 1.0, planner.ceiling())
        self.steps: list[SearchStep] = []

    def run(self, end_to_end: EndToEnd | None, progress: Progress) -> Found:
        """Return the fastest plan found; one without layers says why in ``why``.

        Raises
        ------
        BudgetError
            If the other limits cannot be kept.
        """
        planner, self._end_to_end = self._planner, end_to_end
        floor = min(planner.floor(), self._top)
        if planner.budget.limits:
            planner.plan(self._top)
        low, high, found = floor, self._top, False
        for _ in range(STEPS):
            middle = (low + high) / 2
            if self._try(middle, False, progress):
                high, found = middle, True
            else:
                low = middle
        if not found and not (planner.budget.limits and self._try(self._top, True, progress)):
            return self._nothing()
        plan, kept = self._plan(high), self._without_idle(self._plan(high))
        if plan is not None and kept is not None:
            self._dense = frozenset(plan.chosen.keys() - kept.chosen.keys())
        return self._confirmed(high, floor, progress)

    def _confirmed(self, high: float, floor: float, progress: Progress) -> Found:
        """Return the tightest of a few plans, fitted in full, that holds on both parts."""
        for latency in self._to_be_tried(high, floor, progress):
            plan = self._plan_to_fit(latency)
            if plan is None:
                continue
            if not plan.chosen:
                break
            model, in_float = self._as_run(self._model(plan, full=True))
            first = self._gate.drop(model, self._gate.search)
            if not self._gate.holds(first):
                self._note(latency, plan, first, (self._fitter.fit, False), progress)
                continue
            second = self._gate.drop(model, self._gate.confirm)
            held = self._gate.holds(second)
            self._note(latency, plan, second, ("confirm", held), progress)
            if held:
                return Found(plan, tuple(self.steps), notes=(self._said(first, second),), in_float=in_float)
        return self._nothing()

    def _to_be_tried(self, high: float, floor: float, progress: Progress) -> list[float]:
        """Return latencies to be confirmed, the tightest first."""
        steps = ((1, 0.25), (2, 0.5), (4, 0.75))  # of TIGHTER, and of the way to the loosest: the nearer one
        looser = [min(high / TIGHTER**power, high + share * (self._top - high)) for power, share in steps]
        held: list[float] = []
        low, at = floor, high * TIGHTER
        for _ in range(CASCADES - 1):
            if at <= floor:
                break
            if self._try(at, True, progress):
                held.append(at)
                at = max(at * TIGHTER, (low + at) / 2)
            else:
                low = at
                at = (at + (held[-1] if held else high)) / 2
        if self._planner.budget.limits:
            looser.append(self._top)  # of all plans within the limits the one of least loss
        return list(dict.fromkeys([*sorted(held), high, *looser]))

    def _plan(self, latency: float) -> Plan | None:
        """Return the plan for a latency; None where that is out of reach, be it by what was measured since."""
        try:
            return self._planner.plan(latency, self._dense)
        except BudgetError:
            return None

    def _without_idle(self, plan: Plan | None) -> Plan | None:
        timing = self._planner.timing
        if plan is None or timing is None or self._end_to_end is None or self._planner.has_other_limits:
            return plan
        return self._end_to_end.without_idle(plan, timing)

    def _plan_to_fit(self, latency: float) -> Plan | None:
        """Return the plan for a latency without idle layers, the same one whenever it is asked for."""
        if latency not in self._paying:
            self._paying[latency] = self._without_idle(self._plan(latency))
        return self._paying[latency]

    def _try(self, latency: float, full: bool, progress: Progress) -> bool:
        plan = self._plan_to_fit(latency) if full else self._plan(latency)
        if plan is None:
            progress.step(f"latency {latency:.3f}: not reachable")
            return False
        drop = self._gate.drop(self._model(plan, full), self._gate.search)
        held = self._gate.holds(drop)
        self._note(latency, plan, drop, (self._fitter.fit if full else "alone", held), progress)
        return held

    def _model(self, plan: Plan, full: bool) -> onnx.ModelProto:
        if not full:
            return self._build(self._fitter.alone(plan, Silent()))
        return self._build({node: f.factors for node, f in self._fitter.full(plan, Silent()).items()})

    def _note(self, latency: float, plan: Plan, drop: Drop, how: tuple[str, bool], progress: Progress) -> None:
        timing = self._planner.timing
        assert timing is not None
        predicted = timing.predict_ms(plan) / timing.original_ms
        self.steps.append(SearchStep(latency, predicted, drop.value, drop.measure, *how))
        progress.step(f"latency {latency:.3f}: {drop.measure} lost {drop.value:.2%}")

    def _said(self, first: Drop, second: Drop) -> str:
        gate = self._gate
        said = (
            f"--max-drop {gate.limit:g}: {first.measure} lost {first.value:.2%} on the {len(gate.search)} items of the "
            f"search, {second.value:.2%} on {len(gate.confirm)} that the search did not ask."
        )
        asked = sum(step.fit == "confirm" for step in self.steps)
        if asked > 1:
            said += f" They refused {asked - 1} tighter plan{'s' * (asked > 2)} before."
        if first.measure in ("accuracy", "agreement") and len(gate.confirm) * gate.limit < 1:
            said += f" One of {len(gate.confirm)} is more than the limit; more samples would let it go further."
        return said

    def _nothing(self) -> Found:
        lost = [step.drop for step in self.steps if not step.held]
        why = "no layer becomes faster"
        if lost:
            why = f"no plan keeps to --max-drop {self._gate.limit:g}; the least drop found is {min(lost):.2%}"
        return Found(Plan({}), tuple(self.steps), why=why)
