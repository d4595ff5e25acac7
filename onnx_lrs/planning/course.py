"""From what was asked for to fitted layers: statistics, curves, the plan and how it is found, the fit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping

import numpy as np
import onnx

from onnx_lrs.calibration.capture import Capture, Roles, Setting, groups, steps
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.calibration.store import Store
from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.config import Budget
from onnx_lrs.errors import BudgetError, ConfigError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.planning.candidates import FIT, SELECT, Bench, Fitted
from onnx_lrs.planning.fitting import Fitter, fit_independently, independent_roles
from onnx_lrs.planning.gate import Gate
from onnx_lrs.planning.guarantee import Promise, promise
from onnx_lrs.planning.job import Job
from onnx_lrs.planning.plan import PLAN, Curves, carried, error_curves
from onnx_lrs.planning.plan_file import read_plan
from onnx_lrs.planning.precision import Quantiser, kept_within, with_rounding
from onnx_lrs.planning.prices import Plan
from onnx_lrs.planning.search import (
    ROUNDS,
    SEARCH_STEPS,
    EndToEnd,
    Found,
    Planner,
    Search,
    calibrated,
    stand_in,
    within_latency,
)
from onnx_lrs.planning.sensitivity import probed
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.timing import Stopwatch, Timing
from onnx_lrs.planning.workers import Workers
from onnx_lrs.progress import Clock
from onnx_lrs.report.result import SearchStep, Totals
from onnx_lrs.runtime.session import Feed, is_mapped
from onnx_lrs.runtime.table import Device, Table
from onnx_lrs.solvers import METHODS, Settings, Status
from onnx_lrs.solvers.problem import CHAINS, AnyFactors, SpatialFactors
from onnx_lrs.work import Work

SHELF_SHARE = 4  # of the memory holds statistics between plan and fit; the rest goes to disk
MIXED_FORMS = ("low-rank", "channels", "low-rank + channels")
CHANNEL_FORMS = (*MIXED_FORMS, *CHAINS)
ELEMENT_FORMS = ("low-rank", "elements", "low-rank + elements")
FORMS = {  # that a method fits, where it is not all of CHANNEL_FORMS
    **dict.fromkeys(("hsvd", "svd", "ddlr"), ("low-rank",)),
    **dict.fromkeys(("channels", "magnitude"), ("channels",)),
    "spatial": ("low-rank", SpatialFactors.form),
    **dict.fromkeys(("admm", "greedy"), MIXED_FORMS),
    "nettrim": ("elements",),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was fitted, by node, what it promises together (or why nothing), and how solves of layers left ended.

    ``cascaded``: behind compressed layers, where a damping of None says that new weights were no better. ``plan`` is
    what was carried out, None for a gain; ``timing`` what its latency was predicted with, where latency decides.
    ``nothing`` says why a search found no plan, ``curves`` what the layers were offered, ``in_float`` what of a
    quantised model stays in float32.
    """

    fitted: dict[str, Fitted]
    promised: Promise | str | None = None
    left: dict[str, Status] = dataclasses.field(default_factory=dict)
    cascaded: bool = False
    plan: Plan | None = None
    timing: Timing | None = None
    steps: tuple[SearchStep, ...] = ()
    nothing: str = ""
    gate: Gate | None = None
    notes: tuple[str, ...] = ()
    curves: Curves = dataclasses.field(default_factory=dict)
    in_float: frozenset[str] = frozenset()

    @property
    def factors(self) -> dict[str, AnyFactors]:
        """What was fitted, by node."""
        return {node: fitted.factors for node, fitted in self.fitted.items()}

    @property
    def predicted_on(self) -> str:
        """The device that latency was predicted for, where that is another one; else empty."""
        return "" if self.timing is None or self.timing.is_here else str(self.timing.device)

    def predicted_ms(self, before: Totals) -> float | None:
        """Return what the whole model is predicted to take beside what the original took, where latency decides."""
        if self.timing is None or self.plan is None:
            return None
        predicted = self.timing.predict_ms(self.plan)
        if not self.timing.is_here or before.latency_ms is None:
            return predicted  # on the other device
        return predicted / self.timing.original_ms * before.latency_ms


Tools = tuple[Feed, Quantiser]  # what is timed on, and the precision in which


def plan_and_fit(job: Job, subject: Subject, material: Material, means: tuple[Work, Tools], clock: Clock) -> Outcome:
    """Make a plan from the error curves of all layers, or take one, and fit it; or fit every layer to its own gain."""
    config, (work, tools) = job.config, means
    method = METHODS[config.method]
    solver = Settings(structure=config.structure, steps=config.steps, seed=config.seed)
    assert config.multiple is not None  # settled
    bench = Bench(
        subject.view,
        config.method,
        config.multiple,
        config.memory_bytes,
        method.needs_columns,
        solver,
        subject.scratch,
    )
    setting = Setting(
        config.memory_bytes, config.columns, subject.batch, config.threads, config.seed, subject.dynamic_batch
    )
    with contextlib.ExitStack() as stack:
        capture = shelf = None
        if material.samples is not None and subject.layers:
            capture = Capture(subject.folded, subject.layers, material.samples, setting, clock.timer)
            stack.callback(capture.close)
        if _in_cascade(job, material) or job.budget.max_drop is not None:
            shelf = Shelf(stack.enter_context(Store(config.memory_bytes // SHELF_SHARE, one_file=True)), work)
        workers = stack.enter_context(Workers(config.jobs or config.threads, config.threads, job.executor))
        shop = Shop(bench, capture, setting, workers, clock.timer, shelf, work)
        if job.budget.gain is not None:
            return _fit_to_gain(job, subject, material, shop, clock)
        return _fit_to_plan(job, subject, material, (shop, tools), clock)


def _fit_to_gain(job: Job, subject: Subject, material: Material, shop: Shop, clock: Clock) -> Outcome:
    """Fit every layer to its own error."""
    gain, roles = job.budget.gain, independent_roles(material)
    assert gain is not None
    if shop.capture is not None:
        shop.capture.expect(subject.layers)
    with clock.stage("fit", _step_count(subject.layers, roles, shop)):
        fitted, items, left = fit_independently(subject.layers, gain, shop, roles, job.progress)
    if not fitted:
        why = "; ".join(sorted({status.value for status in left.values() if status is not Status.DENSE}))
        raise BudgetError(
            f"No layer becomes smaller with --method {job.config.method} at --gain {gain}{f': {why}' if why else ''}.",
            "Raise the gain, or use another method.",
        )
    return Outcome(fitted, promise(subject, fitted, items), left)


def _fit_to_plan(job: Job, subject: Subject, material: Material, means: tuple[Shop, Tools], clock: Clock) -> Outcome:
    """Make a plan, or take the one that is given, and fit its layers."""
    config, (shop, tools) = job.config, means
    in_cascade = _in_cascade(job, material)
    fitter = Fitter(subject, shop, material, config.fit if in_cascade else "independent")
    if job.replays:
        assert config.plan is not None
        forms = ELEMENT_FORMS if config.structure == "elements" else FORMS.get(config.method, CHANNEL_FORMS)
        outcome = Outcome({}, plan=read_plan(pathlib.Path(config.plan), subject, forms, config.memory_bytes))
        if in_cascade:
            _collect(job, subject, material, shop, clock)
    else:
        outcome = _planned(job, subject, material, (shop, tools, fitter), clock)
    plan = outcome.plan
    assert plan is not None
    if config.dry_run:
        return dataclasses.replace(outcome, fitted=_stand_ins(subject, plan, material.samples is not None))
    layers = fitter.chosen(plan)
    count = 2 * len(layers) if in_cascade else _step_count(tuple(layers), independent_roles(material), shop)
    with clock.stage("fit", count):
        fitted = fitter.full(plan, job.progress)
    return dataclasses.replace(outcome, fitted=fitted, cascaded=in_cascade)


def _collect(job: Job, subject: Subject, material: Material, shop: Shop, clock: Clock) -> None:
    """Put the statistics of all layers on the shelf: what a plan that is given is fitted from."""
    assert material.split is not None
    assert shop.shelf is not None
    roles: Roles = {FIT: material.split.fit, SELECT: material.split.select}
    with clock.stage("statistics", _step_count(subject.layers, roles, shop)):
        for group in groups(subject.layers, len(roles), shop.setting.memory_bytes, shop.bench.with_columns):
            known = [layer.node for layer in group if shop.shelf.has(layer.node)]
            found = shop.captured(group, roles, job.progress, known)
            for layer in group:
                if layer.node in found:
                    shop.shelf.put(layer.node, found.pop(layer.node))
                job.progress.step(layer.name)


def _stand_ins(subject: Subject, plan: Plan, with_mean: bool) -> dict[str, Fitted]:
    """Return factors of a plan's shapes with random values, each layer's error that of its candidate.

    ``with_mean``: a fit to data moves the bias, so that layers without one get one.
    """
    found = {}
    for layer in subject.layers:
        c = plan.chosen.get(layer.node)
        if c is not None:
            shift = np.full(layer.out, float(with_mean))
            factors = dataclasses.replace(stand_in(layer, c), bias_shift=shift)
            found[layer.node] = Fitted(factors, math.sqrt(c.loss) if c.loss >= 0 else None)
    return found


def _in_cascade(job: Job, material: Material) -> bool:
    """Return whether layers are fitted to what the compressed ones in front of them give."""
    config = job.config
    possible = material.samples is not None and METHODS[config.method].sees_data and job.budget.gain is None
    return possible and config.fit != "independent"


def _planned(
    job: Job, subject: Subject, material: Material, means: tuple[Shop, Tools, Fitter], clock: Clock
) -> Outcome:
    """Choose a candidate for each layer by its error curve and what each layer's error makes of the outputs."""
    shop, (feed, quantiser), fitter = means
    curves, work = _curves(job, subject, material, shop, clock), shop.work
    if not job.budget.is_timed:
        asked_for = f"{job.budget!r} {quantiser.precision}"  # exactly: in words a budget is rounded
        kept = work.get(PLAN, asked_for)
        if kept is None:
            kept = work.put(PLAN, asked_for, dict(Planner(subject, curves, job.budget).plan().chosen))
        return Outcome({}, plan=Plan(kept), curves=curves)
    # a plan that was timed or judged is not kept for a run that goes on: the judging samples are not part of what the
    # work folder is known by, and the machine may be another; what was fitted is kept
    timing = _timing(job, subject, feed, quantiser)
    asked = job.config.latency_table is not None and not pathlib.Path(job.config.latency_table).exists()
    with clock.stage("latency", timing.count):
        timing.prepare(curves, job.progress)
    try:
        outcome = _chosen(job, material, Planner(subject, curves, job.budget, timing), (fitter, quantiser), clock)
        return dataclasses.replace(outcome, curves=curves)
    finally:
        if asked and job.config.latency_table is not None:
            timing.exported.write(pathlib.Path(job.config.latency_table))


def _curves(job: Job, subject: Subject, material: Material, shop: Shop, clock: Clock) -> Curves:
    """Return the candidates of all layers, with data also what each makes of the outputs."""
    split = material.split
    roles: Roles = {} if split is None else {FIT: split.fit, SELECT: split.select}
    with clock.stage("plan", _step_count(subject.layers, roles, shop)):
        curves, probes = error_curves(subject, shop, roles, job.progress)
        curves = with_rounding(subject, curves)
    if not probes or material.samples is None or split is None:
        return curves
    with clock.stage("sensitivity", len(probes)):
        batching = subject.batch, subject.dynamic_batch, job.config.threads
        return carried(
            curves, probed(subject, probes, material.samples, split.select, batching, job.progress, shop.work)
        )


def _chosen(job: Job, material: Material, planner: Planner, means: tuple[Fitter, Quantiser], clock: Clock) -> Outcome:
    """Return the plan for the budget: the knapsack's, corrected by the clock, or searched for by what is lost."""
    subject, timing, budget, (fitter, quantiser) = planner.subject, planner.timing, job.budget, means
    assert timing is not None
    end_to_end = None
    if timing.stopwatch is not None and not is_mapped(subject.original):
        end_to_end = EndToEnd(subject, timing.stopwatch)
        calibrated(planner, end_to_end)
    if budget.max_drop is not None:
        gate = Gate(subject, material, budget.max_drop, (job.config.threads, job.config.seed), job.metric)

        def build(factors: Mapping[str, AnyFactors]) -> onnx.ModelProto:
            return rewrite(subject.view, subject.layers, factors, subject.ranks, subject.scratch).model

        with clock.stage("search", SEARCH_STEPS):
            search = Search(planner, fitter, gate, build, functools.partial(kept_within, quantiser, gate))
            found = search.run(end_to_end, job.progress)
        real = timing.predict_ms(found.plan) / timing.original_ms
        if end_to_end is not None and found.plan.chosen:
            real = end_to_end.ratio(found.plan)
            timing.calibrate(found.plan, real)
        _refuse_if_apart(budget, found, real)
        return Outcome(
            {},
            plan=found.plan,
            timing=timing,
            steps=found.steps,
            nothing=found.why,
            gate=gate,
            notes=found.notes,
            in_float=found.in_float,
        )
    assert budget.latency is not None
    if end_to_end is None:
        return Outcome({}, plan=planner.plan(), timing=timing)
    with clock.stage("race", ROUNDS):
        plan = within_latency(planner, end_to_end, budget.latency, job.progress)
    return Outcome({}, plan=plan, timing=timing)


def _refuse_if_apart(budget: Budget, found: Found, real: float) -> None:
    """Refuse a limit that is not met within what may be lost, and say how near one gets.

    ``real`` is what the plan takes of the original's latency: timed in the network where that was possible.
    """
    if not budget.limits:
        return
    if found.why:
        raise BudgetError(f"{budget} cannot be had together: {found.why}.", "Allow more to be lost, or more to remain.")
    if budget.latency is None or real <= budget.latency:
        return
    lost = [step.drop for step in found.steps if step.predicted <= budget.latency and not step.held]
    beyond = f" Plans of --latency {budget.latency:g} and below lost {min(lost):.2%} at least." if lost else ""
    raise BudgetError(
        f"{budget} cannot be had together: what was found within --max-drop takes {real:.3f} of the latency.{beyond}",
        f"Allow --latency {math.ceil(100 * real) / 100:.2f}, or more to be lost.",
    )


def _timing(job: Job, subject: Subject, feed: Feed, quantiser: Quantiser) -> Timing:
    """Return the price of latency: of this machine, or of the device whose table was given."""
    config, digest = job.config, models.digest(job.source)
    here = Device.here(config.provider, config.threads, quantiser.label)
    stopwatch = Stopwatch(config.provider, config.threads, feed, quantiser.stand_in)
    place = None if config.latency_table is None else pathlib.Path(config.latency_table)
    if place is None or not place.exists():
        return Timing(subject, stopwatch, Table.cached(here), digest, feed)
    table = Table.read(place)
    if table.device.precision != quantiser.label:
        raise ConfigError(
            f"--latency-table {place} holds latencies in {table.device.precision}, and this run is in "
            f"{quantiser.label}.",
            "Make one with the same --quantize and --quantize-option.",
        )
    return Timing(subject, stopwatch if table.device == here else None, table, digest, feed)


def _step_count(layers: tuple[Layer, ...], roles: Roles, shop: Shop) -> int:
    """Return a step for each layer and each call of the passes over the data."""
    passes = 0
    if shop.capture is not None:
        passes = len(groups(layers, len(roles), shop.setting.memory_bytes, shop.bench.with_columns))
    return len(layers) + passes * sum(steps(items, shop.setting) for items in roles.values())
