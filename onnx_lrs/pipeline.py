"""The one place that knows the order of the steps: load, look, plan, fit, rewrite, verify, write."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs import __version__
from onnx_lrs.calibration.capture import Capture, Roles, Setting, Statistic, groups, has_few_columns, is_wide, steps
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.calibration.store import Store
from onnx_lrs.calibration.subject import Inputs, Material, Subject, examine, measure_shapes, open_material
from onnx_lrs.config import Budget, Config
from onnx_lrs.data import Samples, fingerprint
from onnx_lrs.errors import BudgetError, ConfigError, OutputError, VerificationError
from onnx_lrs.graph import model as models
from onnx_lrs.graph import weights
from onnx_lrs.graph.cost import macs_by_node
from onnx_lrs.graph.forms import element_params, stored_entries
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.model import ModelSource, View, takes_sparse
from onnx_lrs.graph.rewrite import Rewritten, rewrite, take_rows
from onnx_lrs.graph.weights import scratch_for
from onnx_lrs.planning.candidates import (
    FIT,
    FITTED,
    JUDGE,
    LOW_RANK,
    SELECT,
    Bench,
    Fitted,
    Question,
    solution_of,
    solution_within,
)
from onnx_lrs.planning.cascade import Cascade
from onnx_lrs.planning.guarantee import Promise, promise
from onnx_lrs.planning.plan import PLAN, START, Plan, error_curves, macs_of, make_plan, weighted
from onnx_lrs.planning.sensitivity import sensitivities
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Executor, Task, Workers
from onnx_lrs.progress import Progress, Timer
from onnx_lrs.report.environment import arithmetic, environment, peak_memory_bytes, versions
from onnx_lrs.report.result import (
    Certificate,
    Form,
    LayerResult,
    Optimised,
    OutputQuality,
    Result,
    SkippedLayer,
    Totals,
    ratio_of,
)
from onnx_lrs.runtime.latency import interleaved
from onnx_lrs.runtime.optimised import look_at_both
from onnx_lrs.runtime.session import Session, check_provider, is_mapped
from onnx_lrs.runtime.verify import change_of_output, check_structure, compare_outputs
from onnx_lrs.solvers import METHODS, Candidate, Moments, Settings, Solution, Status
from onnx_lrs.solvers.closed_form import form_of
from onnx_lrs.solvers.problem import AnyFactors, Columns, ElementFactors, Factors, SpatialFactors
from onnx_lrs.work import Identity, Work, refuse_file

ELEMENT_METHODS = tuple(name for name, method in METHODS.items() if "elements" in method.structures)
ROUNDING = 1e-3  # of a bound: the file's float32 weights
HELD = 1.25  # times the allowed error on held-out samples is beyond chance
SHELF_SHARE = 4  # of the memory holds statistics between plan and fit; the rest goes to disk
POOR = 0.3  # relative error of an output beyond which the console warns
NAMED = 5  # layers that a note calls by name
KEPT = (Candidate, Columns, ElementFactors, Factors, Fitted, Moments, SpatialFactors, Statistic, Status)  # in a folder


@dataclasses.dataclass(frozen=True)
class Job:
    """What the caller asked for."""

    source: ModelSource
    output: pathlib.Path | None
    inputs: Inputs
    config: Config
    progress: Progress
    executor: Executor | None = None


class Clock:
    """Wall-clock seconds by stage; tells the progress display as well."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.perf_counter()
        self.timer = Timer()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, count: int | None = None) -> Iterator[None]:
        """Time one stage of ``count`` steps, which its work tells; None: of one step, told here."""
        self._progress.stage(name, 1 if count is None else count)
        begun = time.perf_counter()
        yield
        if count is None:
            self._progress.step(name)
        self.seconds[name] = round(time.perf_counter() - begun, 3)

    def total(self) -> dict[str, float]:
        """Return the stages and the total."""
        return self.seconds | {"total": round(time.perf_counter() - self._start, 3)}


def compress(job: Job) -> Result:
    """Run the whole way; see :func:`onnx_lrs.compress`."""
    check_request(job)
    clock = Clock(job.progress)
    with contextlib.ExitStack() as stack:
        with clock.stage("load"):
            original = models.load(job.source)
            material = open_material(job.inputs, models.signature(original)[0], job.config, stack)
            outside = _external_places(job.source)
            _refuse_to_overwrite(job, outside)
            scratch = stack.enter_context(scratch_for(original, job.output))
            subject = examine(job.source, original, job.config, material.samples, scratch)
            _refuse_without_layers(job, subject)
        work = stack.enter_context(_open_work(job, material, clock))
        notes = _opening_notes(job, subject, material)
        for note in notes:
            job.progress.note(note)
        outcome = _plan_and_fit(job, subject, material, work, clock)
        fitted = outcome.fitted
        with clock.stage("rewrite"):
            factors = {node: f.factors for node, f in fitted.items()}
            rewritten = rewrite(subject.view, subject.layers, factors, subject.ranks, scratch)
        layers = _layer_results(subject, rewritten, outcome, known=material.samples is not None)
        before, after, quality, provider, certificate, optimised = _judge(
            job, subject, material, (rewritten.model, outcome.promised), clock
        )
        after = _write(job, rewritten.model, after, bool(outside), clock)
        model = _handed_over(job, rewritten.model)
    return Result(
        input=None if isinstance(job.source, onnx.ModelProto) else str(job.source),
        output=None if job.output is None else str(job.output),
        before=before,
        after=after,
        ratio=ratio_of(before, after),
        quality=quality,
        layers=layers,
        skipped=_skipped(subject),
        settings=_effective(job.config, material).to_dict(),
        environment=environment(provider, job.config.threads, job.config.seed),
        seconds=clock.total(),
        profile=clock.timer.rounded(),
        optimised=optimised,
        peak_memory_bytes=peak_memory_bytes(),
        certificate=certificate,
        notes=(
            *notes,
            *_fit_notes(subject, outcome),
            *_closing_notes(before, after, quality),
            *_element_notes(layers),
            *_side_notes(job, material, quality, bool(outside)),
            *_mapped_notes(subject),
        ),
        model=model,
    )


def check_request(job: Job) -> None:
    """Refuse what cannot work before anything is read.

    Raises
    ------
    ConfigError
        Unknown method, a method that needs data without any, an output that is the input, or a work folder that is a
        file.
    OutputError
        The output is a folder, or its folder is missing or cannot be written to.
    RuntimeEnvironmentError
        The provider does not start.
    """
    _check_method(job)
    if job.config.work is not None:
        refuse_file(pathlib.Path(job.config.work))
    if job.config.provider != "cpu":
        check_provider(job.config.provider)
    if job.output is None:
        return
    if not isinstance(job.source, onnx.ModelProto) and _same_file(pathlib.Path(job.source), job.output):
        raise ConfigError(f"The output {job.output} is the input itself.", "Choose another name for -o.")
    folder = job.output.parent
    if job.output.is_dir():
        raise OutputError(f"The output {job.output} is a folder.", "Give a file name, for example small.onnx.")
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} does not exist.", "Create it first.")
    try:  # access rights alone do not tell: the file system may be read-only, or not for files
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "Choose another folder for -o."
        raise OutputError(f"The folder {folder} cannot be written to: {error.strerror or error}.", remedy) from None


def _check_method(job: Job) -> None:
    """Refuse a method that does not exist, or that cannot do what else was asked for."""
    name, budget = job.config.method, job.config.budget
    if name not in METHODS:
        raise ConfigError(f"--method is {name!r}.", f"Known methods: {', '.join(METHODS)}.")
    method = METHODS[name]
    if budget.kind == "gain" and method.within_error is None:
        able = ", ".join(other for other, m in METHODS.items() if m.within_error is not None)
        raise ConfigError(
            f"--gain asks for a guaranteed error; --method {name} gives none.", f"Methods that do: {able}."
        )
    if budget.kind == "macs" and method.structures == ("elements",):
        raise ConfigError(
            f"--macs does not go with --method {name}: single weights run as a dense layer.", "Use --params."
        )
    if job.config.structure == "elements" and name not in ELEMENT_METHODS:
        raise ConfigError(
            f"--structure elements does not go with --method {name}, which keeps whole channels or none.",
            f"Methods with single elements: {', '.join(ELEMENT_METHODS)}.",
        )
    blind = [other for other, m in METHODS.items() if not m.needs_columns]
    if method.needs_columns and job.inputs.data is None and not job.config.random_data:
        raise ConfigError(
            f"--method {name} is fitted to activations, and there is no calibration data.",
            f"Give typical inputs with --data. On weights alone work: {', '.join(blind)}.",
        )


def _same_file(one: pathlib.Path, other: pathlib.Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _external_places(source: ModelSource) -> set[pathlib.Path]:
    """Return the files beside the model in which it keeps weights."""
    if isinstance(source, onnx.ModelProto):
        return set()
    path = pathlib.Path(source)
    return {path.parent / place for place in models.external_places(path)}


def _refuse_to_overwrite(job: Job, outside: set[pathlib.Path]) -> None:
    """Refuse an output whose files would replace the input's weights: a.onnx keeps them in b.onnx.data, -o b.onnx."""
    if job.output is None:
        return
    for target in (job.output, job.output.with_name(models.external_name(job.output))):
        if any(_same_file(target, place) for place in outside):
            raise ConfigError(
                f"Writing {job.output} would overwrite {target}, which holds the input's weights.",
                "Choose another name for -o.",
            )


def _refuse_without_layers(job: Job, subject: Subject) -> None:
    """Say at once, and why, if nothing can be compressed and the exact rewrites alone miss the budget."""
    budget = job.config.budget
    if budget.kind == "gain" and subject.layers:
        return
    before = subject.params if budget.kind != "macs" else sum(subject.macs.values())
    left = models.weight_count(subject.folded) if budget.kind == "params" else before
    if subject.layers or (budget.kind != "gain" and left <= int(budget.fraction * before)):
        return
    counts = collections.Counter(layer.reason for layer in subject.skipped)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    raise BudgetError(
        f"--{budget.kind} {budget.fraction} cannot be reached: no layer of this model can be compressed "
        f"({reasons or 'it has no Conv, Gemm or MatMul'}).",
        "onnx-lrs inspect MODEL lists every layer with its reason.",
    )


def _effective(config: Config, material: Material) -> Config:
    """Return the settings with the image preprocessing that was really used, guessed values included."""
    if material.samples is None or material.samples.preprocess is None:
        return config
    return dataclasses.replace(config, preprocess=material.samples.preprocess)


def _opening_notes(job: Job, subject: Subject, material: Material) -> list[str]:
    """Return what the user has to know about the basis of this run."""
    notes = []
    if material.samples is None:
        notes.append(
            "No calibration data: the fit sees weights only and nothing is known about quality. "
            "Give typical inputs with --data FOLDER (images) or --data FILE.npy/.npz."
        )
    elif job.inputs.data is None:
        judged = "Fitted" if job.inputs.test is not None else "Fitted and judged"
        notes.append(
            f"{judged} on random inputs (--random-data); typical inputs (--data) would tell more and fit better."
        )
    else:
        notes.append(f"Calibrated on {material.samples.description}.")
    if material.judge is not None and job.inputs.test is not None:
        notes.append(f"Judged on {material.judge.description}.")
    if any(samples.guessed for samples in (material.samples, material.judge) if samples is not None):
        notes.append(
            "No preprocessing was named, so this one is assumed. "
            "If the model was trained otherwise, use --preset or --scale, --mean, --std."
        )
    return notes + _wide_notes(job, subject, material)


def _wide_notes(job: Job, subject: Subject, material: Material) -> list[str]:
    notes = []
    if METHODS[job.config.method].fully_connected_only:
        convolutions = sum(layer.op == "Conv" for layer in subject.layers)
        if convolutions:
            notes.append(f"--method {job.config.method} is for fully connected layers: {convolutions} Conv stay dense.")
    if job.config.method in ELEMENT_METHODS and not takes_sparse(subject.folded):
        notes.append(f"IR version {subject.folded.ir_version} has no sparse tensors (6 has): no single entries.")
    if material.samples is None or not METHODS[job.config.method].sees_data:
        return notes
    memory, cramped = job.config.memory_bytes, METHODS[job.config.method].needs_columns
    wide = [la.name for la in subject.layers if is_wide(la, memory) or (cramped and has_few_columns(la, memory))]
    low_rank = job.config.method in LOW_RANK and job.config.structure == "channels"
    outcome = "low rank only" if low_rank else "they stay dense"
    if wide:
        notes.append(f"Too wide for --method {job.config.method} within --memory, {outcome}: {', '.join(wide)}.")
    return notes


def _open_work(job: Job, material: Material, clock: Clock) -> Work:
    """Return the finished parts of this very run, from its work folder if it has one."""
    if job.config.work is None:
        return Work()
    return Work.open(pathlib.Path(job.config.work), _identity(job, material, clock), KEPT, job.progress.note)


def _identity(job: Job, material: Material, clock: Clock) -> Identity:
    """Return what decides the finished layers; the samples that judge do not."""
    samples = material.samples
    with clock.stage("fingerprint", 1 + (0 if samples is None else len(samples))):
        model = models.digest(job.source)
        job.progress.step("model")
        data = None if samples is None else fingerprint(samples, lambda: job.progress.step("sample"))
    deciding = {
        "model": model,
        "samples": data,
        "settings": job.config.deciding(),
        "versions": versions() | {"onnx-lrs": __version__},
        "machine": arithmetic(),
    }
    words = {
        "what this is": "finished parts of one onnx-lrs run; it may be deleted when the run is done",
        "model file": "given in memory" if isinstance(job.source, onnx.ModelProto) else str(job.source),
        "calibration data": "none" if samples is None else samples.description,
    }
    return Identity(deciding, words)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was fitted, by node, what it promises together (or why nothing), and how solves of layers left ended.

    ``cascaded``: behind compressed layers, where a damping of None says that new weights were no better.
    """

    fitted: dict[str, Fitted]
    promised: Promise | str | None = None
    left: dict[str, Status] = dataclasses.field(default_factory=dict)
    cascaded: bool = False


def _plan_and_fit(job: Job, subject: Subject, material: Material, work: Work, clock: Clock) -> Outcome:
    """Two passes over the data: error curves of all layers and the plan, then the chosen layers on more samples.

    A gain needs no plan: every layer becomes as small as its own error allows.
    """
    config, split = job.config, material.split
    with_columns = METHODS[config.method].needs_columns
    solver = Settings(structure=config.structure, steps=config.steps, seed=config.seed)
    bench = Bench(
        subject.view,
        config.method,
        config.multiple,
        config.memory_bytes,
        config.threads,
        with_columns,
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
        if _in_cascade(job, material):
            shelf = Shelf(stack.enter_context(Store(config.memory_bytes // SHELF_SHARE, one_file=True)), work)
        workers = stack.enter_context(Workers(config.jobs or config.threads, config.threads, job.executor))
        shop = Shop(bench, capture, setting, workers, clock.timer, shelf, work)
        plan = None
        if config.budget.kind != "gain":
            plan = _plan(job, subject, material, shop, clock)
        if shelf is not None and plan is not None:
            return Outcome(_fit_in_cascade(job, subject, material, shop, plan, clock), cascaded=True)
        chosen = tuple(layer for layer in subject.layers if plan is None or layer.node in plan.chosen)
        if capture is not None:
            capture.expect(chosen)
        roles: Roles = {} if split is None else {FIT: split.fit_and_select, JUDGE: split.held_out}
        with clock.stage("fit", _step_count(chosen, roles, material, setting, with_columns)):
            fitted, items, left = _fit(chosen, plan or config.budget.fraction, shop, roles, job.progress)
    if plan is not None:
        return Outcome(fitted)
    if not fitted:
        why = "; ".join(sorted({status.value for status in left.values() if status is not Status.DENSE}))
        raise BudgetError(
            f"No layer becomes smaller with --method {config.method} at --gain {config.budget.fraction}"
            f"{f': {why}' if why else ''}.",
            "Raise the gain, or use another method.",
        )
    return Outcome(fitted, promise(subject, fitted, items), left)


def _in_cascade(job: Job, material: Material) -> bool:
    """Return whether layers are fitted to what the compressed ones in front of them give."""
    config = job.config
    possible = material.samples is not None and METHODS[config.method].sees_data and config.budget.kind != "gain"
    return possible and config.fit != "independent"


def _fit_in_cascade(
    job: Job, subject: Subject, material: Material, shop: Shop, plan: Plan, clock: Clock
) -> dict[str, Fitted]:
    """Fit the plan's candidates alone, from what the plan was made of, then in graph order behind each other."""
    assert shop.shelf is not None
    assert material.samples is not None
    assert material.split is not None
    chosen = [layer for layer in subject.layers if layer.node in plan.chosen]
    with clock.stage("fit", 2 * len(chosen)):
        starts: dict[str, AnyFactors] = shop.work.found(START, (layer.node for layer in chosen))
        rest = [layer for layer in chosen if layer.node not in starts]
        for _ in range(len(chosen) - len(rest)):
            job.progress.step("known layer")

        def finish(number: int, solution: Solution) -> None:
            node = rest[number].node
            starts[node] = shop.bench.mapped(shop.work.put(START, node, solution.factors))
            job.progress.step(rest[number].name)

        shelf = shop.shelf
        tasks = [Task(la.d, functools.partial(_from_shelf, shop.bench, la, shelf, plan)) for la in rest]
        with clock.timer.of("solve"):
            shop.workers.map(solution_of, tasks, min(shop.at_once([la], 2) for la in rest) if rest else 1, finish)
        cascade = Cascade(subject, shop, (material.samples, material.split), job.config.fit == "cascade")
        return cascade.run(chosen, starts, job.progress)


def _from_shelf(bench: Bench, layer: Layer, shelf: Shelf, plan: Plan) -> tuple[Question, Candidate | float]:
    """Return what the start of one layer is fitted with, taken from the shelf when its turn comes."""
    return _asked(bench, layer, shelf.take(layer.node), plan)


def _plan(job: Job, subject: Subject, material: Material, shop: Shop, clock: Clock) -> Plan:
    """Choose a candidate for each layer: error curves, weighed by how much each layer's error moves the outputs."""
    config, split = job.config, material.split
    setting, work = shop.setting, shop.work
    roles: Roles = {} if split is None else {FIT: split.fit, SELECT: split.select}
    with clock.stage("plan", _step_count(subject.layers, roles, material, setting, shop.bench.with_columns)):
        curves, probes = error_curves(subject, shop, roles, job.progress)
    if probes and material.samples is not None and split is not None:
        with clock.stage("sensitivity", len(probes)):
            batching = subject.batch, subject.dynamic_batch, config.threads
            found = sensitivities(subject, probes, material.samples, split.select, batching, job.progress, work)
            curves = weighted(curves, found)
    chosen = work.get(PLAN, PLAN)
    return Plan(work.put(PLAN, PLAN, make_plan(subject, curves, config.budget).chosen) if chosen is None else chosen)


def _step_count(
    layers: tuple[Layer, ...], roles: Roles, material: Material, setting: Setting, with_columns: bool
) -> int:
    passes = 0
    if material.samples is not None:
        passes = len(groups(layers, len(roles), setting.memory_bytes, with_columns))
    return len(layers) + passes * sum(steps(items, setting) for items in roles.values())


Items = dict[str, NDArray[np.int64] | None]
Fit = tuple[Fitted | Status, NDArray[np.int64] | None]  # of one layer, or why it stays dense; the samples it saw


def _fit(
    layers: tuple[Layer, ...], plan: Plan | float, shop: Shop, roles: Roles, progress: Progress
) -> tuple[dict[str, Fitted], Items, dict[str, Status]]:
    """Fit the plan's candidates, or to a gain, each layer alone.

    Returns what was fitted, which samples the columns came from, and how the solves of layers left dense ended.
    """
    bench, work = shop.bench, shop.work
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


def _judge(
    job: Job, subject: Subject, material: Material, made: tuple[onnx.ModelProto, Promise | str | None], clock: Clock
) -> tuple[Totals, Totals, tuple[OutputQuality, ...] | None, str, Certificate | None, Optimised | None]:
    """Check the new model and measure both; nothing is written before this is through."""
    config, (model, promised) = job.config, made
    batching = (subject.batch, subject.dynamic_batch)
    every = subject.batch if subject.dynamic_batch else 1
    judges = None if material.judge is None else -(-len(material.judge_items) // every)
    with clock.stage("verify", judges), contextlib.ExitStack() as stack:
        check_structure(subject.original, model)
        view = View(model)
        shapes = measure_shapes(model, view, [], subject.feed, config.threads)
        optimised = look_at_both((subject.original, model), config.threads, config.provider)
        mapped = is_mapped(subject.original)  # both alike, or their latencies do not compare
        sessions = (
            stack.enter_context(Session(subject.original, config.threads, mapped, config.provider)),
            stack.enter_context(Session(model, config.threads, mapped, config.provider)),
        )
        quality = None
        if material.judge is not None:
            quality = compare_outputs(
                sessions, material.judge, material.judge_items, material.labels, batching, job.progress
            )
        else:
            _check_finite(sessions, subject)
        certificate = None
        if isinstance(promised, Promise) and material.samples is not None:
            certificate = _certificate(promised, sessions, material.samples, batching)
        slow, fast = interleaved(sessions, subject.feed)
    before = Totals(subject.params, sum(subject.macs.values()), subject.file_bytes, slow)
    after = Totals(
        models.weight_count(model), sum(macs_by_node(view, shapes).values()), models.stored_bytes(model), fast
    )
    _check_budget(job.config.budget, before, after)
    return before, after, quality, sessions[1].provider, certificate, optimised


def _certificate(
    promised: Promise, sessions: tuple[Session, Session], samples: Samples, batching: tuple[int, bool]
) -> Certificate | None:
    """Put what was promised beside what is measured on the same samples."""
    change, size = change_of_output(sessions, promised.chain.output, samples, promised.items, batching)
    scale = max(size, 1e-300)
    if change > promised.bound * (1 + ROUNDING):  # then what it rests on does not hold for this model
        return None
    names = tuple(layer.name for layer in promised.chain.layers)
    return Certificate(promised.chain.output, names, len(promised.items), promised.bound / scale, change / scale)


def _check_budget(budget: Budget, before: Totals, after: Totals) -> None:
    """Count the finished graph: the plan promised to keep to the budget."""
    if budget.kind == "gain":
        return
    limit, real = int(budget.fraction * getattr(before, budget.kind)), getattr(after, budget.kind)
    if real > limit:
        raise VerificationError(
            f"The compressed model has {real} {budget.kind}, more than the budget of {limit}.",
            "Nothing was written. This is a bug in onnx-lrs; please report it with the model.",
        )


def _check_finite(sessions: tuple[Session, Session], subject: Subject) -> None:
    """Without data both models run once on random numbers: the compressed one must not be the first to overflow."""
    original, compressed = (session.run(subject.feed) for session in sessions)
    for name, value in compressed.items():
        if value.dtype.kind == "f" and np.isfinite(original[name]).all() and not np.isfinite(value).all():
            raise VerificationError(f"The compressed model's output {name!r} is not finite.", "Nothing was written.")


def _write(job: Job, model: onnx.ModelProto, after: Totals, external: bool, clock: Clock) -> Totals:
    if job.output is None:
        return after
    with clock.stage("write"):
        models.save(model, job.output, external)
    return dataclasses.replace(after, file_bytes=models.file_bytes(job.output))


def _handed_over(job: Job, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model for the caller, whose weights must not lie in files that go with this run."""
    if not weights.outside_bytes(model):
        return model
    return weights.loaded(model) if job.output is None else models.bare(job.output)


def _mapped_notes(subject: Subject) -> list[str]:
    """Say under which conditions the latency of a large model was measured."""
    if not is_mapped(subject.original):
        return []
    return ["Both latencies are those of weights mapped from their files; ONNX Runtime's default packs them in memory."]


def _layer_results(subject: Subject, rewritten: Rewritten, outcome: Outcome, known: bool) -> tuple[LayerResult, ...]:
    """Return what became of each layer; ``known`` says whether there are samples that errors were measured on."""
    kept = rewritten.kept_outputs
    return tuple(_layer_result(subject, layer, kept.get(layer.node), outcome, known) for layer in subject.layers)


def _layer_result(
    subject: Subject, layer: Layer, outputs: NDArray[np.int64] | None, outcome: Outcome, known: bool
) -> LayerResult:
    done = outcome.fitted.get(layer.node)
    macs = subject.macs[layer.node]
    kept_outputs = layer.out if outputs is None else len(outputs)
    factors = done.factors if done else None
    if isinstance(factors, ElementFactors) and outputs is not None:
        factors = take_rows(factors, outputs)  # which rows the entries lie in is known only now
    form, rank, kept = _describe(factors)
    params = _params(subject, layer, factors, outputs)
    return LayerResult(
        name=layer.name,
        op=layer.op,
        shape=layer.weight_shape,
        form=form,
        rank=rank,
        kept_channels=kept,
        elements=int(stored_entries(factors.sparse).nnz) if isinstance(factors, ElementFactors) else 0,
        channels=layer.channels,
        outputs=layer.out,
        kept_outputs=kept_outputs,
        params_before=layer.params,
        params_after=params,
        macs_before=macs,
        macs_after=_macs_after(subject, layer, factors, outputs, params),
        error=done.error if done else (0.0 if known else None),
        activation_error=done.activation_error if done else None,
        allowed_error=done.allowed / done.scale if done and done.allowed is not None and done.scale else None,
        reached_error=done.reached / done.scale if done and done.reached is not None and done.scale else None,
        status=done.status.name.lower() if done else "dense",
        activation=layer.behind.label,
        damping=done.damping if done else None,
    )


def _describe(factors: AnyFactors | None) -> tuple[Form, int, int]:
    """Return form, rank and number of kept channels."""
    if factors is None:
        return "dense", 0, 0
    if isinstance(factors, SpatialFactors):
        return "spatial", factors.rank, 0
    if isinstance(factors, ElementFactors):
        return "low-rank + elements" if factors.rank else "elements", factors.rank, 0
    form: Form = form_of(factors.rank, len(factors.kept))  # type: ignore[assignment]
    return form, factors.rank, len(factors.kept)


def _macs_after(
    subject: Subject, layer: Layer, factors: AnyFactors | None, outputs: NDArray[np.int64] | None, params: int
) -> int:
    """Return the layer's cost after rewriting; one with single elements runs dense."""
    macs = subject.macs[layer.node]
    if isinstance(factors, ElementFactors):
        return macs if outputs is None else macs // layer.out * len(outputs)
    if factors is None and outputs is None:
        return macs
    form, rank, _ = _describe(factors)
    return macs_of(subject, layer, form, rank, params)


def _params(subject: Subject, layer: Layer, factors: AnyFactors | None, outputs: NDArray[np.int64] | None) -> int:
    """Return the layer's weights after rewriting; rows that went are not counted."""
    if isinstance(factors, ElementFactors):
        entries = stored_entries(factors.sparse)
        return element_params(factors.rank, int(entries.nnz), entries.shape, takes_sparse(subject.folded))
    share = 0 if outputs is None else layer.out - len(outputs)
    if factors is None:
        return layer.params - share * layer.d
    if isinstance(factors, SpatialFactors):
        return factors.params - share * int(factors.left[0].size)
    return factors.params - share * (factors.rank + int(factors.sparse.shape[1]))


def _skipped(subject: Subject) -> tuple[SkippedLayer, ...]:
    return tuple(
        SkippedLayer(s.name, s.op, s.params, subject.macs.get(s.node or "", 0), s.reason) for s in subject.skipped
    )


def _called(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _fit_notes(subject: Subject, outcome: Outcome) -> list[str]:
    """Return how solves ended that did not simply succeed, and why guarantees add up to none for the network."""
    fitted, notes = outcome.fitted, []
    ended = outcome.left | {node: done.status for node, done in fitted.items()}
    for status in Status:
        names = [layer.name for layer in subject.layers if ended.get(layer.node) is status]
        if names and status not in (Status.SOLVED, Status.DENSE):
            notes.append(f"{_called(names)}: {status.value}.")
    for layer in subject.layers:
        done = fitted.get(layer.node)
        if done is None or not done.allowed or not done.scale or done.activation_error is None:
            continue
        if done.activation_error > HELD * done.allowed / done.scale:
            notes.append(
                f"{layer.name}: {done.activation_error:.1%} off on held-out samples, more than the "
                f"{done.allowed / done.scale:.1%} that were kept to on the calibration columns; give more data."
            )
    refitted = [layer for layer in subject.layers if outcome.cascaded and layer.node in fitted]
    alone = [
        layer.name
        for layer in refitted
        if fitted[layer.node].damping is None and not isinstance(fitted[layer.node].factors, ElementFactors)
    ]
    if alone:
        notes.append(
            f"{_called(alone)}: weights as fitted alone. New ones for what the compressed layers in front give were no "
            "better on other samples; more data may help."
        )
    if isinstance(outcome.promised, str):
        notes.append(f"No bound for the whole network: {outcome.promised}.")
    return notes


def _closing_notes(before: Totals, after: Totals, quality: tuple[OutputQuality, ...] | None) -> list[str]:
    notes = []
    if after.file_bytes >= before.file_bytes:
        notes.append(f"The output is not smaller: {after.file_bytes} bytes against {before.file_bytes}.")
    for output in quality or ():
        if output.relative_l2 > POOR:
            notes.append(
                f"Output {output.name!r} is off by {output.relative_l2:.0%} on held-out samples: "
                "if that is too much, allow a larger budget or give more data."
            )
    return notes


def _element_notes(layers: tuple[LayerResult, ...]) -> list[str]:
    """Say what layers with single elements gain, and what not."""
    names = [layer.name for layer in layers if layer.elements and layer.params_after < layer.params_before]
    if not names:
        return []
    called = _called(names)
    same = "ONNX Runtime runs them as dense layers"
    return [f"Element-sparse layers ({called}) make a smaller file at the same speed: {same}."]


def _side_notes(job: Job, material: Material, quality: tuple[OutputQuality, ...] | None, external: bool) -> list[str]:
    """Return what happened besides the wish: labels without use, a second file."""
    notes = []
    if material.labels is not None and all(output.accuracy_before is None for output in quality or ()):
        notes.append("The labels were not used: no floating-point output has the shape (batch, classes).")
    if job.config.work is not None:
        notes.append(f"The work folder {job.config.work} is no longer needed and may be deleted.")
    if external and job.output is not None:
        notes.append(f"Its weights are in {models.external_name(job.output)} beside it, as the original's are outside.")
    return notes
