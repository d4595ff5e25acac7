"""The one place that knows the order of the steps: load, look, plan, fit, rewrite, verify, write."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Capture, Roles, Setting, groups, is_wide, steps
from onnx_lrs.calibration.subject import Inputs, Material, Subject, examine, measure_shapes, open_material
from onnx_lrs.config import Config
from onnx_lrs.errors import ConfigError, VerificationError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.model import ModelSource, View
from onnx_lrs.graph.rewrite import Rewritten, rewrite
from onnx_lrs.planning.candidates import FIT, JUDGE, SELECT, Bench, Fitted
from onnx_lrs.graph.cost import macs_by_node
from onnx_lrs.planning.plan import Plan, error_curves, make_plan, weighted
from onnx_lrs.planning.sensitivity import sensitivities
from onnx_lrs.progress import Progress
from onnx_lrs.report.environment import environment, peak_memory_bytes
from onnx_lrs.report.result import LayerResult, OutputQuality, Result, SkippedLayer, Totals, ratio_of
from onnx_lrs.runtime.latency import interleaved
from onnx_lrs.runtime.session import Session
from onnx_lrs.runtime.verify import check_structure, compare_outputs
from onnx_lrs.solvers import METHODS
from onnx_lrs.solvers.closed_form import form_of
from onnx_lrs.solvers.problem import AnyFactors, SpatialFactors

POOR = 0.5  # relative error of an output beyond which the console warns


@dataclasses.dataclass(frozen=True)
class Job:
    """What the caller asked for."""

    source: ModelSource
    output: pathlib.Path | None
    inputs: Inputs
    config: Config
    progress: Progress


class Clock:
    """Wall-clock seconds by stage; tells the progress display as well."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, count: int = 1) -> Iterator[None]:
        """Time one stage of ``count`` steps."""
        self._progress.stage(name, count)
        begun = time.perf_counter()
        yield
        if count == 1:
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
            subject = examine(job.source, original, job.config, material.samples)
        notes = _opening_notes(job, subject, material)
        for note in notes:
            job.progress.note(note)
        plan, fitted = _plan_and_fit(job, subject, material, clock)
        with clock.stage("rewrite"):
            factors = {node: f.factors for node, f in fitted.items()}
            rewritten = rewrite(subject.view, subject.layers, factors, subject.ranks)
        before, after, quality = _judge(job, subject, material, rewritten.model, clock)
        after = _write(job, subject, rewritten.model, after, clock)
    return Result(
        input=None if isinstance(job.source, onnx.ModelProto) else str(job.source),
        output=None if job.output is None else str(job.output),
        before=before,
        after=after,
        ratio=ratio_of(before, after),
        quality=quality,
        layers=tuple(_layer_result(subject, rewritten, fitted, layer) for layer in subject.layers),
        skipped=_skipped(subject),
        settings=job.config.to_dict(),
        environment=environment("CPUExecutionProvider", job.config.threads, job.config.seed),
        seconds=clock.total(),
        peak_memory_bytes=peak_memory_bytes(),
        notes=(*notes, *_closing_notes(before, after, quality)),
        model=rewritten.model,
    )


def check_request(job: Job) -> None:
    """Refuse what cannot work before anything is read.

    Raises
    ------
    ConfigError
        Unknown method, or an output that is the input.
    """
    if job.config.method not in METHODS:
        raise ConfigError(f"--method is {job.config.method!r}.", f"Known methods: {', '.join(METHODS)}.")
    if job.output is None or isinstance(job.source, onnx.ModelProto):
        return
    source = pathlib.Path(job.source)
    if source.exists() and job.output.exists() and os.path.samefile(source, job.output):
        raise ConfigError(f"The output {job.output} is the input itself.", "Choose another name for -o.")


def _opening_notes(job: Job, subject: Subject, material: Material) -> list[str]:
    """Return what the user has to know about the basis of this run."""
    notes = []
    if material.samples is None:
        notes.append(
            "No calibration data: the fit sees weights only and nothing is known about quality. "
            "Give typical inputs with --data FOLDER (images) or --data FILE.npy/.npz."
        )
    elif job.inputs.data is None:
        notes.append("Fitted and judged on random inputs (--random-data): the quality figures say little.")
    elif material.samples.guessed:
        notes.append(
            f"No preprocessing was named; assumed {material.samples.description}. "
            "If the model was trained otherwise, use --preset or --scale, --mean, --std."
        )
    wide = [layer.name for layer in subject.layers if is_wide(layer, job.config.memory_bytes)]
    if wide and material.samples is not None:
        notes.append(f"Too wide for channel selection within --memory, low rank only: {', '.join(wide)}.")
    return notes


def _plan_and_fit(job: Job, subject: Subject, material: Material, clock: Clock) -> tuple[Plan, dict[str, Fitted]]:
    """Two passes over the data: error curves of all layers and the plan, then the chosen layers on more samples."""
    config, split = job.config, material.split
    bench = Bench(subject.view, config.method, config.multiple, config.memory_bytes)
    setting = Setting(
        config.memory_bytes, config.columns, config.batch, config.threads, config.seed, subject.dynamic_batch
    )
    with contextlib.ExitStack() as stack:
        capture = None
        if material.samples is not None and subject.layers:
            capture = Capture(subject.folded, subject.layers, material.samples, setting)
            stack.callback(capture.close)
        roles: Roles = {} if split is None else {FIT: split.fit, SELECT: split.select}
        with clock.stage("plan", _step_count(subject.layers, roles, material, setting)):
            curves, probes = error_curves(subject, bench, capture, roles, job.progress)
        if probes and material.samples is not None and split is not None:
            with clock.stage("sensitivity", len(probes)):
                batching = config.batch, subject.dynamic_batch, config.threads
                found = sensitivities(subject, probes, material.samples, split.select, batching, job.progress)
                curves = weighted(curves, found)
        plan = make_plan(subject, curves, config.budget)
        chosen = tuple(layer for layer in subject.layers if layer.node in plan.chosen)
        roles = {} if split is None else {FIT: split.fit_and_select, JUDGE: split.held_out}
        with clock.stage("fit", _step_count(chosen, roles, material, setting)):
            return plan, _fit(chosen, plan, bench, capture, roles, job.progress)


def _step_count(layers: tuple[Layer, ...], roles: Roles, material: Material, setting: Setting) -> int:
    passes = len(groups(layers, len(roles), setting.memory_bytes)) if material.samples is not None else 0
    return len(layers) + passes * sum(steps(items, setting) for items in roles.values())


def _fit(
    layers: tuple[Layer, ...], plan: Plan, bench: Bench, capture: Capture | None, roles: Roles, progress: Progress
) -> dict[str, Fitted]:
    fitted: dict[str, Fitted] = {}
    for group in groups(layers, len(roles), bench.memory_bytes):
        moments = capture.moments(group, roles, progress) if capture else {}
        for layer in group:
            fitted[layer.node] = bench.fit(layer, plan.chosen[layer.node], moments.pop(layer.node, {}))
            progress.step(layer.name)
    return fitted


def _judge(
    job: Job, subject: Subject, material: Material, model: onnx.ModelProto, clock: Clock
) -> tuple[Totals, Totals, tuple[OutputQuality, ...] | None]:
    """Check the new model and measure both; nothing is written before this is through."""
    config = job.config
    batching = (config.batch, subject.dynamic_batch)
    judges = 0 if material.judge is None else -(-len(material.judge_items) // config.batch)
    with clock.stage("verify", max(judges, 1)), contextlib.ExitStack() as stack:
        check_structure(subject.original, model)
        view = View(model)
        shapes = measure_shapes(model, view, [], subject.feed, config.threads)
        sessions = (
            stack.enter_context(Session(subject.original, config.threads)),
            stack.enter_context(Session(model, config.threads)),
        )
        quality = None
        if material.judge is not None:
            quality = compare_outputs(
                sessions, material.judge, material.judge_items, material.labels, batching, job.progress
            )
        else:
            _check_finite(sessions[1], subject)
        slow, fast = interleaved(sessions, subject.feed)
    before = Totals(subject.params, sum(subject.macs.values()), subject.file_bytes, slow)
    after = Totals(models.weight_count(model), sum(macs_by_node(view, shapes).values()), model.ByteSize(), fast)
    return before, after, quality


def _check_finite(session: Session, subject: Subject) -> None:
    """Without data the graph is run once on random numbers: it must not produce nonsense."""
    for name, value in session.run(subject.feed).items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise VerificationError(f"The compressed model's output {name!r} is not finite.", "Nothing was written.")


def _write(job: Job, subject: Subject, model: onnx.ModelProto, after: Totals, clock: Clock) -> Totals:
    if job.output is None:
        return after
    with clock.stage("write"):
        models.save(model, job.output, external=_had_external_data(job.source))
    return dataclasses.replace(after, file_bytes=models.file_bytes(job.output))


def _had_external_data(source: ModelSource) -> bool:
    if isinstance(source, onnx.ModelProto):
        return False
    return bool(models.external_places(pathlib.Path(source)))


def _layer_result(subject: Subject, rewritten: Rewritten, fitted: Mapping[str, Fitted], layer: Layer) -> LayerResult:
    done = fitted.get(layer.node)
    outputs = rewritten.kept_outputs.get(layer.node)
    kept_outputs = layer.out if outputs is None else len(outputs)
    factors = done.factors if done else None
    form, rank, kept = _describe(factors)
    params = _params(layer, factors, outputs)
    macs = subject.macs[layer.node]
    return LayerResult(
        name=layer.name,
        op=layer.op,
        shape=layer.weight_shape,
        form=form,  # type: ignore[arg-type]
        rank=rank,
        kept_channels=kept,
        channels=layer.channels,
        outputs=layer.out,
        kept_outputs=kept_outputs,
        params_before=layer.params,
        params_after=params,
        macs_before=macs,
        macs_after=params * (macs // layer.params),
        error=done.error if done else (0.0 if subject_has_data(fitted) else None),
    )


def subject_has_data(fitted: Mapping[str, Fitted]) -> bool:
    """Return whether errors are known at all."""
    return any(f.error is not None for f in fitted.values())


def _describe(factors: AnyFactors | None) -> tuple[str, int, int]:
    if factors is None:
        return "dense", 0, 0
    if isinstance(factors, SpatialFactors):
        return "spatial", factors.rank, 0
    return form_of(factors.rank, len(factors.kept)), factors.rank, len(factors.kept)


def _params(layer: Layer, factors: AnyFactors | None, outputs: NDArray[np.int64] | None) -> int:
    """Return the layer's weights after rewriting; rows that went are not counted."""
    share = 0 if outputs is None else layer.out - len(outputs)
    if factors is None:
        return layer.params - share * layer.d
    if isinstance(factors, SpatialFactors):
        return factors.params - share * factors.left[0].size
    return factors.params - share * (factors.rank + factors.sparse.shape[1])


def _skipped(subject: Subject) -> tuple[SkippedLayer, ...]:
    return tuple(
        SkippedLayer(s.name, s.op, s.params, subject.macs.get(s.node or "", 0), s.reason) for s in subject.skipped
    )


def _closing_notes(before: Totals, after: Totals, quality: tuple[OutputQuality, ...] | None) -> list[str]:
    notes = []
    if after.file_bytes >= before.file_bytes:
        notes.append(f"The output is not smaller: {after.file_bytes} bytes against {before.file_bytes}.")
    for output in quality or ():
        if output.relative_l2 > POOR:
            notes.append(
                f"Output {output.name!r} is off by {output.relative_l2:.0%} on held-out samples: "
                "the budget is too tight for this model without retraining."
            )
    return notes
