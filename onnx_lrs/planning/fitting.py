"""From a plan to fitted layers: each alone, or in graph order behind the compressed ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Roles, Statistic, groups
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.candidates import FIT, FITTED, JUDGE, Bench, Fitted, Question, solution_of, solution_within
from onnx_lrs.planning.cascade import Cascade
from onnx_lrs.planning.plan import START
from onnx_lrs.planning.prices import Plan
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task
from onnx_lrs.progress import Progress
from onnx_lrs.solvers import Candidate, Solution, Status
from onnx_lrs.solvers.problem import AnyFactors

Items = dict[str, NDArray[np.int64] | None]
Fit = tuple[Fitted | Status, NDArray[np.int64] | None]  # of one layer, or why it stays dense; the samples it saw


def candidate_key(candidate: Candidate) -> str:
    """Return a short text that is equal for equal candidates."""
    said = f"{candidate.form} {candidate.rank} {candidate.elements} {candidate.inner} {candidate.damping!r} ".encode()
    return hashlib.sha256(said + np.asarray(candidate.support, np.int64).tobytes()).hexdigest()[:16]


def plan_key(plan: Plan) -> str:
    """Return a short text that is equal for equal plans."""
    said = "".join(f"{node}\0{candidate_key(c)}\0" for node, c in sorted(plan.chosen.items()))
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Fitter:
    """Fits plans from the statistics on the shelf; a layer whose candidate was fitted before is not fitted again."""

    def __init__(self, subject: Subject, shop: Shop, material: Material, fit: str) -> None:
        self._subject, self._shop, self._material = subject, shop, material
        self.fit = fit
        self._starts: dict[tuple[str, str], AnyFactors] = {}
        self._full: dict[str, dict[str, Fitted]] = {}

    def chosen(self, plan: Plan) -> list[Layer]:
        """Return the layers of a plan in graph order."""
        return [layer for layer in self._subject.layers if layer.node in plan.chosen]

    def alone(self, plan: Plan, progress: Progress) -> dict[str, AnyFactors]:
        """Return the factors of a plan's candidates, each fitted alone; ``progress`` is told one step a layer."""
        layers = self.chosen(plan)
        keys = {la.node: (la.node, candidate_key(plan.chosen[la.node])) for la in layers}
        rest = []
        for layer in layers:
            if keys[layer.node] not in self._starts:
                kept = self._shop.work.get(START, " ".join(keys[layer.node]))
                if kept is None:
                    rest.append(layer)
                    continue
                self._starts[keys[layer.node]] = self._shop.bench.mapped(kept)
            progress.step("known layer")

        def finish(number: int, solution: Solution) -> None:
            node = rest[number].node
            kept = self._shop.work.put(START, " ".join(keys[node]), solution.factors)
            self._starts[keys[node]] = self._shop.bench.mapped(kept)
            progress.step(rest[number].name)

        shelf = self._shop.shelf
        assert shelf is not None
        tasks = [Task(la.d, functools.partial(_from_shelf, self._shop.bench, la, shelf, plan)) for la in rest]
        with self._shop.timer.of("solve"):
            most = min(self._shop.at_once([la], 2) for la in rest) if rest else 1
            self._shop.workers.map(solution_of, tasks, most, finish)
        return {node: self._starts[key] for node, key in keys.items()}

    def full(self, plan: Plan, progress: Progress) -> dict[str, Fitted]:
        """Return a plan's candidates as the file gets them; fitted once.

        In the cascade: alone, then in graph order behind each other, two steps a layer. Independent: each alone on the
        samples that fit and those that select.
        """
        key = plan_key(plan)
        if key not in self._full:
            whole = self._independently if self.fit == "independent" else self._cascade
            self._full[key] = whole(plan, progress)
        return self._full[key]

    def _independently(self, plan: Plan, progress: Progress) -> dict[str, Fitted]:
        layers, roles = tuple(self.chosen(plan)), independent_roles(self._material)
        if self._shop.capture is not None:
            self._shop.capture.expect(layers)
        return fit_independently(layers, plan, self._shop, roles, progress)[0]

    def _cascade(self, plan: Plan, progress: Progress) -> dict[str, Fitted]:
        assert self._material.samples is not None
        assert self._material.split is not None
        starts = self.alone(plan, progress)
        data = self._material.samples, self._material.split
        shop = self._shop.on_branch(plan_key(plan))
        return Cascade(self._subject, shop, data, self.fit == "cascade").run(self.chosen(plan), starts, progress)


def independent_roles(material: Material) -> Roles:
    """Return what layers that are fitted alone see in a pass of their own; nothing without data."""
    split = material.split
    return {} if split is None else {FIT: split.fit_and_select, JUDGE: split.held_out}


def _from_shelf(bench: Bench, layer: Layer, shelf: Shelf, plan: Plan) -> tuple[Question, Candidate | float]:
    """Return what the start of one layer is fitted with, taken from the shelf when its turn comes."""
    return _asked(bench, layer, shelf.look(layer.node), plan)


def fit_independently(
    layers: tuple[Layer, ...], plan: Plan | float, shop: Shop, roles: Roles, progress: Progress
) -> tuple[dict[str, Fitted], Items, dict[str, Status]]:
    """Fit the plan's candidates, or to a gain, each layer alone, on a pass of its own over the data.

    Returns what was fitted, which samples the columns came from, and how the solves of layers left dense ended.
    """
    bench, work = shop.bench, shop.work.branch(plan_key(plan) if isinstance(plan, Plan) else f"gain {plan!r}")
    fitted: dict[str, Fitted] = {}
    left: dict[str, Status] = {}
    items: Items = {}
    known: dict[str, Fit] = work.found(FITTED, (layer.node for layer in layers))
    for group in groups(layers, len(roles), bench.memory_bytes, bench.with_columns):
        rest = [layer for layer in group if layer.node not in known]
        statistics = shop.captured(group, roles, progress, known)

        def finish(
            number: int,
            solution: Solution | None,
            rest: Sequence[Layer] = rest,
            statistics: dict[str, dict[str, Statistic]] = statistics,
        ) -> None:
            layer = rest[number]
            own = statistics.pop(layer.node, {})
            done = bench.outcome(layer, bench.question(layer, own), solution, own)
            known[layer.node] = work.put(FITTED, layer.node, (done, own[FIT].items if FIT in own else None))

        solve: Callable[..., Solution | None] = solution_of if isinstance(plan, Plan) else solution_within
        tasks = [
            Task(layer.d, functools.partial(_asked, bench, layer, statistics.get(layer.node, {}), plan))
            for layer in rest
        ]
        shop.workers.map(solve, tasks, shop.at_once(group, len(roles)), finish)
        for layer in group:
            found, items[layer.node] = known.pop(layer.node)
            if isinstance(found, Status):
                left[layer.node] = found
            else:
                fitted[layer.node] = found
            progress.step(layer.name)
    return fitted, items, left


def _asked(
    bench: Bench, layer: Layer, own: Mapping[str, Statistic], plan: Plan | float
) -> tuple[Question, Candidate | float]:
    """Return what a solve of one layer is called with."""
    return bench.question(layer, own), plan.chosen[layer.node] if isinstance(plan, Plan) else plan
