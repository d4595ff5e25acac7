"""The one place that knows the order of the steps: load, look, plan, fit, rewrite, verify, write."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs import __version__
from onnx_lrs.calibration.capture import Statistic
from onnx_lrs.calibration.subject import Material, Subject, examine, measure_shapes, open_material
from onnx_lrs.config import DEFAULT_DROP, Budget, Config
from onnx_lrs.data import Samples, fingerprint
from onnx_lrs.errors import BudgetError, ConfigError, ModelError, OutputError, VerificationError
from onnx_lrs.graph import model as models
from onnx_lrs.graph import weights
from onnx_lrs.graph.cost import macs_by_node
from onnx_lrs.graph.model import View
from onnx_lrs.graph.quantised import floated, is_quantised
from onnx_lrs.graph.rewrite import Rewritten, merged, rewrite
from onnx_lrs.graph.weights import scratch_for
from onnx_lrs.planning.candidates import Fitted
from onnx_lrs.planning.contest import COMPRESSED, Contest, held
from onnx_lrs.planning.course import Outcome, plan_and_fit
from onnx_lrs.planning.front import pareto
from onnx_lrs.planning.guarantee import Promise
from onnx_lrs.planning.job import Job
from onnx_lrs.planning.plan import limits_of
from onnx_lrs.planning.plan_file import write_plan
from onnx_lrs.planning.precision import Quantiser
from onnx_lrs.planning.prices import Plan
from onnx_lrs.progress import Clock
from onnx_lrs.report.environment import arithmetic, environment, peak_memory_bytes, processor, versions
from onnx_lrs.report.html import check_place, publish
from onnx_lrs.report.layers import layer_results, skipped_layers, with_curves
from onnx_lrs.report.notes import (
    ELEMENT_METHODS,
    closing_notes,
    element_notes,
    fit_notes,
    latency_notes,
    mapped_notes,
    opening_notes,
    precision_notes,
    refined_notes,
    side_notes,
)
from onnx_lrs.report.record import check_folder
from onnx_lrs.report.result import (
    Certificate,
    Changes,
    LayerResult,
    Optimised,
    OutputQuality,
    Pareto,
    Refined,
    Result,
    Totals,
    ratio_of,
)
from onnx_lrs.report.tolerances import ROUNDING
from onnx_lrs.report.training import Trained
from onnx_lrs.runtime.examples import told
from onnx_lrs.runtime.latency import interleaved
from onnx_lrs.runtime.optimised import look_at_both
from onnx_lrs.runtime.quantise import Recipe
from onnx_lrs.runtime.session import Feed, Session, check_provider, is_mapped
from onnx_lrs.runtime.verify import change_of_output, check_structure, compare_answers, compare_outputs
from onnx_lrs.solvers import METHODS, Candidate, Moments, Status
from onnx_lrs.solvers.problem import Columns, ElementFactors, Factors, ProjectedFactors, SpatialFactors, TuckerFactors
from onnx_lrs.training.door import KEPT as KEPT_OF_TRAINING
from onnx_lrs.training.door import check_operators, check_training, train
from onnx_lrs.work import Identity, Work, refuse_file

KEPT = (  # in a folder
    *(Candidate, Columns, Fitted, Moments, Statistic, Status),
    *(ElementFactors, Factors, ProjectedFactors, SpatialFactors, TuckerFactors),
    *KEPT_OF_TRAINING,
)


def compress(job: Job) -> Result:
    """Run the whole way; see :func:`onnx_lrs.compress`."""
    job = _settled(job)
    check_request(job)
    job = _in_float(job)
    found = _run(job, Clock(job.progress))
    if job.config.report is not None:
        written = "" if found.output is None else f"{found.output} was already written"
        publish(pathlib.Path(job.config.report), found, job.progress, written)
    return found


def _in_float(job: Job) -> Job:
    """Return the job with the float model behind one that is quantised already; that one is what counts as original.

    Raises
    ------
    ModelError
        If it cannot be undone.
    ConfigError
        If something else than INT8 was asked for, or training.
    """
    model = models.load(job.source)
    if not is_quantised(model):
        return job
    if job.config.precision == "fp16" or job.config.refine is not None:
        what = "--quantize fp16" if job.config.refine is None else "--refine"
        raise ConfigError(f"The model is quantised already, which does not go with {what}.", "Give the float model.")
    found = floated(model)
    job.progress.note("The model is in INT8 (QDQ): weights are dequantised, and the scales of its activations kept.")
    config = dataclasses.replace(job.config, precision="int8")
    job = dataclasses.replace(job, source=found.model, reference=job.source, config=config, scales=found.scales)
    _check_precision(job)
    return job


@dataclasses.dataclass(frozen=True)
class Made:
    """A compressed model that nobody has judged yet, and what it was made from; ``notes`` were said already."""

    subject: Subject
    material: Material
    outcome: Outcome
    rewritten: Rewritten
    refined: Refined | None
    feed: Feed
    notes: list[str]
    quantiser: Quantiser


def _run(job: Job, clock: Clock) -> Result:
    job, earlier = _approached(job, clock)
    with contextlib.ExitStack() as stack:
        made = _make(job, clock, stack)
        subject, material = made.subject, made.material
        contest = _contest(job, made, clock)
        outcome, rewritten, refined = _handed_in(made, contest, earlier)
        final = rewritten.model if contest is None else contest.winner.model
        verdict = _judge(job, subject, material, ((rewritten.model, final), outcome, made.feed), clock)
        if verdict.unchanged:
            outcome = dataclasses.replace(outcome, fitted={}, promised=None, notes=(), plan=Plan({}))
            rewritten, refined, final = Rewritten(subject.original, {}), None, subject.original
        outside = models.weight_files(job.original)
        after = _write(job, final, verdict.after, bool(outside), clock)
        layers, curve = _layers(job, subject, rewritten, outcome, material.samples is not None)
        model = _handed_over(job, final)
        _write_plan(job, subject, outcome, verdict)
    return Result(
        input=None if isinstance(job.original, onnx.ModelProto) else str(job.original),
        output=None if job.output is None or job.config.dry_run else str(job.output),
        before=verdict.before,
        after=after,
        ratio=ratio_of(verdict.before, after),
        quality=verdict.quality,
        layers=layers,
        skipped=skipped_layers(subject),
        settings=_effective(job.config, material).to_dict(),
        environment=environment(verdict.provider, job.config.threads, job.config.seed) | {"cpu": processor()},
        seconds=clock.total(),
        profile=clock.timer.rounded(),
        peak_memory_bytes=peak_memory_bytes(),
        certificate=verdict.certificate,
        optimised=verdict.optimised,
        predicted_latency_ms=outcome.predicted_ms(verdict.before),
        predicted_on=outcome.predicted_on,
        search=outcome.steps,
        unchanged=verdict.unchanged,
        dry_run=job.config.dry_run,
        changes=verdict.changes,
        pareto=curve,
        refined=refined,
        variants=() if contest is None else contest.variants,
        call=job.call,
        notes=(
            *made.notes,
            *outcome.notes,
            *([] if contest is None else precision_notes(contest.variants)),
            *fit_notes(subject, outcome),
            *closing_notes(verdict.before, after, verdict.quality, bool(verdict.unchanged)),
            *latency_notes(job, outcome, (verdict.before, after)),
            *element_notes(layers),
            *([] if refined is None else refined_notes(refined.rounds, True, job.config.precision == "int8")),
            *side_notes(job, material, verdict.quality, bool(outside)),
            *mapped_notes(subject),
        ),
        model=model,
    )


def _make(job: Job, clock: Clock, stack: contextlib.ExitStack, on_the_way: bool = False) -> Made:
    """Do everything up to the new model; ``stack`` closes what that needs. Rounds on the way have nothing to tell."""
    with clock.stage("load"):
        source = models.load(job.source)
        original = source if job.reference is None else models.load(job.reference)
        material = open_material(job.inputs, models.signature(original)[0], job.config, stack)
        _refuse_what_cannot_be_judged(job, original, material)
        _refuse_to_overwrite(job, models.weight_files(job.original))
        scratch = stack.enter_context(scratch_for(source, job.output))
        subject = examine(job.source, source, job.config, material.samples, scratch)
        _refuse_without_layers(job, subject)
        if job.config.refine is not None and not job.config.dry_run:
            check_operators(original)
        if job.reference is not None:
            subject = dataclasses.replace(
                subject,
                original=original,
                params=subject.params if job.scales else models.weight_count(original),
                file_bytes=models.source_bytes(job.original),
            )
        feed = timed_feed(subject, job.config.batch)
    work = stack.enter_context(_open_work(job, material, clock))
    notes = [] if on_the_way else _told(job, opening_notes(job, subject, material))
    quantiser = Quantiser(subject, material, job.config, job.scales)
    outcome = plan_and_fit(job, subject, material, (work, (feed, quantiser)), clock)
    with clock.stage("rewrite"):
        rewritten = rewrite(subject.view, subject.layers, outcome.factors, subject.ranks, scratch)
    rewritten, refined = _refined(job, subject, material, (rewritten, outcome), (work, quantiser, clock))
    return Made(subject, material, outcome, rewritten, refined, feed, notes, quantiser)


def _handed_in(
    made: Made, contest: Contest | None, earlier: tuple[Trained, ...]
) -> tuple[Outcome, Rewritten, Refined | None]:
    """Return what is judged: the compressed network, unless a contest was won by one that is not compressed."""
    if contest is not None and not contest.winner.name.startswith(COMPRESSED):
        outcome = dataclasses.replace(made.outcome, fitted={}, promised=None, plan=Plan({}))
        return outcome, Rewritten(made.subject.folded, {}), None
    refined = None if made.refined is None else Refined(made.refined.before, (*earlier, *made.refined.rounds))
    return made.outcome, made.rewritten, refined


def _contest(job: Job, made: Made, clock: Clock) -> Contest | None:
    """Bring the model into the precision that was asked for and time it beside the other ways; None for float32."""
    quantiser, outcome = made.quantiser, made.outcome
    if not quantiser.rounds:
        return None
    if made.refined is not None and job.config.refine is not None and job.config.refine.fake_quant:
        quantiser = quantiser.in_this_basis()
    steps = None
    if made.material.judge is not None and not job.config.dry_run:
        items = _judging(made.material, outcome)
        steps = -(-len(items) // (made.subject.batch if made.subject.dynamic_batch else 1))
    with clock.stage("precision", steps):
        small = made.rewritten.model if outcome.factors else None
        entries = small, outcome.in_float, outcome.gate
        return held(job, made.subject, made.material, entries, (quantiser, made.feed))


def _approached(job: Job, clock: Clock) -> tuple[Job, tuple[Trained, ...]]:
    """Compress a little and train, round by round, all but the last one; return what the last one starts from.

    A round hands on the network as it was, dense, with the weights that it has come to: the next one chooses forms,
    ranks and channels anew.
    """
    training, budget = job.config.refine, job.config.budget
    count = 1 if training is None or job.config.dry_run else training.rounds
    if training is None or budget is None or count == 1:
        return job, ()
    minutes = None if training.minutes is None else training.minutes / count
    whole, rest = divmod(training.epochs, count)
    share = dataclasses.replace(training, epochs=whole, minutes=minutes, rounds=1)
    config = dataclasses.replace(job.config, refine=share)
    done: list[Trained] = []
    for number in range(1, count):
        eased = Budget(**{kind: limit ** (number / count) for kind, limit in budget.limits.items()})
        job.progress.note(f"Round {number} of {count}: {eased}.")
        course = dataclasses.replace(share, epochs=whole + (number <= rest))
        eased_config = dataclasses.replace(config, budget=eased, report=None, refine=course)
        step = dataclasses.replace(job, output=None, config=eased_config)
        with contextlib.ExitStack() as stack:
            made = _make(step, clock, stack, on_the_way=True)
            model = merged(made.subject.view, made.subject.layers, made.subject.ranks, made.rewritten)
        done += [] if made.refined is None else made.refined.rounds
        job = dataclasses.replace(job, source=model, reference=job.original)
    job.progress.note(f"Round {count} of {count}: {budget}.")
    return dataclasses.replace(job, config=config), tuple(done)


def _layers(
    job: Job, subject: Subject, rewritten: Rewritten, outcome: Outcome, known: bool
) -> tuple[tuple[LayerResult, ...], Pareto | None]:
    """Return what became of the layers; for a report with what each was offered and what other budgets had cost.

    ``known`` says whether there are samples that errors were measured on. Without a plan there is no more to tell.
    """
    layers = layer_results(subject, rewritten, outcome, known)
    if job.config.report is None or outcome.plan is None or not outcome.curves:
        return layers, None
    curve = pareto(subject, outcome.curves, outcome.plan, job.budget, outcome.timing)
    return with_curves(subject, layers, outcome), curve


def _told(job: Job, notes: list[str]) -> list[str]:
    """Return the notes, said to the user at once."""
    for note in notes:
        job.progress.note(note)
    return notes


def _settled(job: Job) -> Job:
    """Return the job with the settings that were left open."""
    method = METHODS.get(job.config.method)
    faster = method is not None and method.structures != ("elements",) and job.config.structure != "elements"
    return dataclasses.replace(job, config=job.config.settled(job.inputs.data is not None, faster))


def timed_feed(subject: Subject, batch: int) -> Feed:
    """Return what latency is measured on: one input, or so many in one call.

    Raises
    ------
    ConfigError
        If the model takes no such batch.
    """
    if batch == 1:
        return subject.feed
    specs = models.signature(subject.original)[0]
    open_ended = {spec.name for spec in specs if spec.shape and not isinstance(spec.shape[0], int)}
    if not open_ended:
        raise ConfigError(
            f"--batch {batch}: the model does not take it, its batch is fixed.",
            "Use the batch that it was exported with.",
        )
    feed = dict(subject.feed)
    for name in open_ended & feed.keys():
        feed[name] = np.repeat(feed[name][:1], batch, axis=0)
    try:
        with Session(subject.original, 1) as session:
            session.run(feed)
    except ModelError as error:
        raise ConfigError(
            f"--batch {batch}: the model does not take it: {error.message}", "Use the batch that it was exported with."
        ) from None
    return feed


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
    _check_refining(job)
    _check_precision(job)
    _check_files(job)
    if job.config.work is not None:
        refuse_file(pathlib.Path(job.config.work))
    if job.config.provider != "cpu":
        check_provider(job.config.provider)
    if job.output is None:
        return
    if not isinstance(job.source, onnx.ModelProto) and models.same_file(pathlib.Path(job.source), job.output):
        raise ConfigError(f"The output {job.output} is the input itself.", "Choose another name for -o.")
    if job.output.is_dir():
        raise OutputError(f"The output {job.output} is a folder.", "Give a file name, for example small.onnx.")
    check_folder(job.output.parent, "-o")


def _check_files(job: Job) -> None:
    """Refuse files beside the model that could not be written at the end, or that would replace it."""
    if job.config.report is not None:
        others = [job.source, job.inputs.data, job.inputs.labels, job.inputs.test]
        others += [job.output, job.config.plan, job.config.latency_table]
        if job.output is not None:
            others.append(job.output.with_name(models.external_name(job.output)))
        check_place(pathlib.Path(job.config.report), others)
    for flag, name in (("--plan", job.config.plan), ("--latency-table", job.config.latency_table)):
        if name is None:
            continue
        place = pathlib.Path(name)
        if not place.exists():  # else it is read
            check_folder(place.parent, flag)
        if job.output is not None and place.resolve() == job.output.resolve():
            raise ConfigError(f"{flag} {place} is the output itself.", "Choose another name.")
    plan, table = job.config.plan, job.config.latency_table
    if plan is not None and table is not None and pathlib.Path(plan).resolve() == pathlib.Path(table).resolve():
        raise ConfigError(f"--plan and --latency-table name the same file, {plan}.", "Give each its own.")


def _check_method(job: Job) -> None:
    """Refuse a method that does not exist, or that cannot do what else was asked for."""
    name, budget = job.config.method, job.budget
    if name not in METHODS:
        raise ConfigError(f"--method is {name!r}.", f"Known methods: {', '.join(METHODS)}.")
    method = METHODS[name]
    if budget.gain is not None and method.within_error is None:
        able = ", ".join(other for other, m in METHODS.items() if m.within_error is not None)
        raise ConfigError(
            f"--gain asks for a guaranteed error; --method {name} gives none.", f"Methods that do: {able}."
        )
    for kind, wanted in (("macs", budget.macs), ("latency", budget.latency), ("max-drop", budget.max_drop)):
        if wanted is not None and method.structures == ("elements",):
            raise ConfigError(
                f"--{kind} does not go with --method {name}: single weights run as a dense layer.", "Use --params."
            )
    if budget.is_timed and job.config.structure == "elements":
        raise ConfigError("--structure elements makes no layer faster.", "Use --params or --size.")
    if budget.gain is not None and (job.config.plan is not None or job.config.dry_run):
        raise ConfigError("--gain makes no plan: --plan and --dry-run do not go with it.", "Leave one of them out.")
    if job.config.latency_table is not None and not budget.is_timed and not job.replays:
        raise ConfigError(
            f"--latency-table: no latency decides {budget}.", "Use --latency or --max-drop, or leave the table out."
        )
    if budget.max_drop is not None and job.inputs.data is None:
        raise ConfigError(
            "--max-drop needs typical inputs to see what is lost.",
            "Give them with --data, or use --latency or --params.",
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


def _check_refining(job: Job) -> None:
    """Refuse a refinement that could not be made, or that would break what was asked for."""
    if job.config.refine is None:
        return
    if job.budget.gain is not None:
        raise ConfigError(
            "--refine changes the weights that --gain guarantees an error for.", "Leave one of the two out."
        )
    if job.inputs.data is None:
        raise ConfigError("--refine needs typical inputs to train on.", "Give them with --data; labels are not needed.")
    if job.config.refine.rounds > 1 and (job.budget.max_drop is not None or job.replays):
        raise ConfigError(
            "--rounds goes down to a limit step by step.", "Give one: --params, --macs, --size or --latency."
        )
    check_training(job.config.refine)


def _check_precision(job: Job) -> None:
    """Refuse a precision that could not be reached, or that would break what was asked for."""
    config = job.config
    if config.precision == "float32":
        return
    if job.budget.gain is not None:
        raise ConfigError(
            "--quantize rounds the weights that --gain guarantees an error for.", "Leave one of the two out."
        )
    if config.structure == "elements" or METHODS[config.method].structures == ("elements",):
        raise ConfigError(
            "--quantize does not go with single elements: their weight is computed when the model is loaded.",
            "Use --structure channels.",
        )
    if config.precision == "int8" and job.inputs.data is None and not config.random_data:
        raise ConfigError(
            "--quantize int8 needs typical inputs: they tell the ranges of activations.", "Give them with --data."
        )
    Recipe.of(config.quantize_options)


def _refuse_to_overwrite(job: Job, outside: set[pathlib.Path]) -> None:
    """Refuse files that would replace the input's weights: a.onnx keeps them in b.onnx.data, -o b.onnx."""
    written = [] if job.output is None else [job.output, job.output.with_name(models.external_name(job.output))]
    for target in (*written, *([] if job.config.report is None else [pathlib.Path(job.config.report)])):
        if any(models.same_file(target, place) for place in outside):
            writing, flag = (job.output, "-o") if target in written else (target, "--report")
            raise ConfigError(
                f"Writing {writing} would overwrite {target}, which holds the input's weights.",
                f"Choose another name for {flag}.",
            )


def _refuse_without_layers(job: Job, subject: Subject) -> None:
    """Say at once, and why, if nothing can be compressed and the exact rewrites alone miss the budget."""
    budget = job.budget
    if subject.layers or budget.max_drop is not None:
        return
    limits = limits_of(subject, {k: v for k, v in budget.limits.items() if k != "latency"}, None)
    if budget.gain is None and budget.latency in (None, 1.0) and all(x.price.now <= x.most for x in limits):
        return
    counts = collections.Counter(layer.reason for layer in subject.skipped)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    raise BudgetError(
        f"{budget} cannot be reached: no layer of this model can be compressed "
        f"({reasons or 'it has no Conv, Gemm or MatMul'}).",
        "onnx-lrs inspect MODEL lists every layer with its reason.",
    )


def _refuse_what_cannot_be_judged(job: Job, original: onnx.ModelProto, material: Material) -> None:
    """Refuse a limit of what may be lost where nothing would tell what is lost."""
    if job.budget.max_drop is None:
        return
    what = f"--max-drop {job.budget.max_drop:g} (the default with data is {DEFAULT_DROP:g})"
    if len(material.judge_items) < 2:
        raise ConfigError(
            f"{what} needs two samples that judge: one for the search, one that confirms.",
            "Give more data, a larger --holdout, samples of their own with --test, or a budget such as --params 0.5.",
        )
    if job.metric is None and not any(spec.dtype.kind == "f" for spec in models.signature(original)[1]):
        raise ConfigError(
            f"{what} needs an output of floating-point numbers; this model has none.",
            "Give compress(metric=...), or a budget such as --latency 0.5 or --params 0.5.",
        )


def _effective(config: Config, material: Material) -> Config:
    """Return the settings with the image preprocessing that was really used, guessed values included."""
    if material.samples is None or material.samples.preprocess is None:
        return config
    return dataclasses.replace(config, preprocess=material.samples.preprocess)


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
class Verdict:
    """Both models measured; ``unchanged`` says why the original is kept, where it is."""

    before: Totals
    after: Totals
    quality: tuple[OutputQuality, ...] | None
    provider: str
    certificate: Certificate | None = None
    optimised: Optimised | None = None
    unchanged: str = ""
    changes: tuple[Changes, ...] | None = None


def _refined(
    job: Job,
    subject: Subject,
    material: Material,
    made: tuple[Rewritten, Outcome],
    means: tuple[Work, Quantiser, Clock],
) -> tuple[Rewritten, Refined | None]:
    """Train the new model where that was asked for, and tell what it was like before.

    Training that sees rounded weights has to see them in the basis in which they will be rounded.
    """
    (rewritten, outcome), (work, quantiser, clock), training = made, means, job.config.refine
    if training is None or job.config.dry_run or not outcome.factors:
        return rewritten, None
    assert material.judge is not None
    if training.fake_quant:
        rewritten = dataclasses.replace(rewritten, model=quantiser.balanced(rewritten.model))
    pair, joined = (subject.original, rewritten.model), subject.dynamic_batch
    items, batching = _judging(material, outcome), (subject.batch, joined)
    every = subject.batch if joined else 1
    with clock.stage("judge", -(-len(items) // every)), contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(Session(model, job.config.threads)) for model in pair)
        before = compare_outputs((first, second), material.judge, items, material.labels, batching, job.progress)
    model, trained = train(pair, material, (training, job.config), joined, work, clock, job.progress)
    return dataclasses.replace(rewritten, model=model), Refined(before, (trained,))


def _judging(material: Material, outcome: Outcome) -> NDArray[np.int64]:
    """Return the samples that judge: where a search has seen some of them, the others."""
    return material.judge_items if outcome.gate is None else outcome.gate.confirm


def _judge(
    job: Job,
    subject: Subject,
    material: Material,
    made: tuple[tuple[onnx.ModelProto, onnx.ModelProto], Outcome, Feed],
    clock: Clock,
) -> Verdict:
    """Check the new model and measure both; nothing is written before this is through.

    Of the new one there is a form in float32, whose weights and products count, and the form that runs.
    """
    config, ((counted, model), outcome, feed) = job.config, made
    items = _judging(material, outcome)
    every = subject.batch if subject.dynamic_batch else 1
    judges = None if material.judge is None or config.dry_run else -(-len(items) // every)
    with clock.stage("verify", judges), contextlib.ExitStack() as stack:
        check_structure(subject.original, model)
        view = View(counted)
        shapes = measure_shapes(counted, view, [], subject.feed, config.threads)
        optimised = look_at_both((subject.original, model), config.threads, config.provider)
        mapped = is_mapped(subject.original)  # both alike, or their latencies do not compare
        sessions = (
            stack.enter_context(Session(subject.original, config.threads, mapped, config.provider)),
            stack.enter_context(Session(model, config.threads, mapped, config.provider)),
        )
        quality, certificate, changes = None, None, None
        batching = (subject.batch, subject.dynamic_batch)
        if config.dry_run:
            pass  # its weights are random
        elif material.judge is not None:
            judge, labels = material.judge, material.labels
            quality, changes = compare_answers(sessions, judge, items, labels, batching, job.progress)
            changes = told(changes, judge, labels, pictures=config.report is not None)
        else:
            _check_finite(sessions, subject)
        if isinstance(outcome.promised, Promise) and material.samples is not None:
            certificate = _certificate(outcome.promised, sessions, material.samples, batching)
        slow, fast = interleaved(sessions, feed)
    before = Totals(subject.params, sum(subject.macs.values()), subject.file_bytes, slow)
    after = Totals(
        models.weight_count(counted), sum(macs_by_node(view, shapes).values()), models.stored_bytes(model), fast
    )
    verdict = Verdict(before, after, quality, sessions[1].provider, certificate, optimised, changes=changes)
    reason = _why_unchanged(job, outcome, (before, after), model is subject.original)
    if reason:
        return dataclasses.replace(verdict, after=before, quality=None, optimised=None, unchanged=reason, changes=None)
    if not job.replays:
        _check_budget(job.budget, before, after)
    return verdict


def _why_unchanged(job: Job, outcome: Outcome, totals: tuple[Totals, Totals], is_original: bool) -> str:
    """Return why the original is kept: where latency decides, what is not faster is not handed out."""
    before, after = totals
    if outcome.timing is None or job.replays:
        return ""
    if job.config.precision != "float32":
        return f"nothing in {job.config.precision} is faster within the limits" if is_original else ""
    if outcome.nothing:
        return outcome.nothing
    if outcome.plan is None or not outcome.plan.chosen:
        return "no layer becomes faster"
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    others = job.budget.limits.keys() - {"latency"}  # which the original may not keep to
    if outcome.timing.is_here and after.latency_ms >= before.latency_ms and not others:
        return f"compressed it takes {after.latency_ms / before.latency_ms:.2f} of its latency"
    return ""


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
    """Count the finished graph: the plan promised to keep to the limits (latency is told, not counted)."""
    fields = {"params": "params", "macs": "macs", "size": "file_bytes"}
    for kind, fraction in budget.limits.items():
        if kind not in fields:
            continue
        limit, real = int(fraction * getattr(before, fields[kind])), getattr(after, fields[kind])
        if real > limit:
            raise VerificationError(
                f"The compressed model has {real} {fields[kind]}, more than the budget of {limit}.",
                "Nothing was written. This is a bug in onnx-lrs; please report it with the model.",
            )


def _check_finite(sessions: tuple[Session, Session], subject: Subject) -> None:
    """Without data both models run once on random numbers: the compressed one must not be the first to overflow."""
    original, compressed = (session.run(subject.feed) for session in sessions)
    for name, value in compressed.items():
        if value.dtype.kind == "f" and np.isfinite(original[name]).all() and not np.isfinite(value).all():
            raise VerificationError(f"The compressed model's output {name!r} is not finite.", "Nothing was written.")


def _write(job: Job, model: onnx.ModelProto, after: Totals, external: bool, clock: Clock) -> Totals:
    if job.output is None or job.config.dry_run:
        return after
    with clock.stage("write"):
        models.save(model, job.output, external)
    return dataclasses.replace(after, file_bytes=models.file_bytes(job.output))


def _handed_over(job: Job, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model for the caller, whose weights must not lie in files that go with this run."""
    if not weights.outside_bytes(model):
        return model
    return weights.loaded(model) if job.output is None or job.config.dry_run else models.bare(job.output)


def _write_plan(job: Job, subject: Subject, outcome: Outcome, verdict: Verdict) -> None:
    """Write the plan of this run where that was asked for."""
    if job.config.plan is None or job.replays or outcome.plan is None:
        return
    about = {
        "model": None if isinstance(job.source, onnx.ModelProto) else str(job.source),
        "budget": str(job.budget),
        "method": job.config.method,
        "onnx-lrs": __version__,
        "latency_ms": [verdict.before.latency_ms, verdict.after.latency_ms],
        "latencies": None if outcome.timing is None else str(outcome.timing.device),
    }
    costs = {} if outcome.timing is None else outcome.timing.layers_ms(outcome.plan)
    try:
        write_plan(pathlib.Path(job.config.plan), subject, outcome.plan, about, costs)
    except OutputError as error:
        if job.output is None or job.config.dry_run:
            raise
        raise OutputError(f"{error.message} {job.output} was already written.", error.remedy) from None
