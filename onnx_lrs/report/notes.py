"""What a user has to know besides the figures, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lrs.calibration.capture import has_few_columns, is_wide
from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.graph import model as models
from onnx_lrs.graph.model import takes_sparse
from onnx_lrs.planning.candidates import LOW_RANK
from onnx_lrs.planning.course import Outcome
from onnx_lrs.planning.job import Job
from onnx_lrs.report.result import LayerResult, OutputQuality, Totals, Variant
from onnx_lrs.report.tolerances import SLOWER
from onnx_lrs.report.training import Trained
from onnx_lrs.runtime.session import is_mapped
from onnx_lrs.solvers import METHODS, Status
from onnx_lrs.solvers.problem import ElementFactors

ELEMENT_METHODS = tuple(name for name, method in METHODS.items() if "elements" in method.structures)
HELD = 1.25  # times the allowed error on held-out samples is beyond chance
POOR = 0.3  # relative error of an output beyond which the console warns
NAMED = 5  # layers that a note calls by name

ASSUMED = (
    "No preprocessing was named, so this one is assumed. "
    "If the model was trained otherwise, use --preset or --scale, --mean, --std."
)


def opening_notes(job: Job, subject: Subject, material: Material) -> list[str]:
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
        notes.append(ASSUMED)
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


def _called(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def fit_notes(subject: Subject, outcome: Outcome) -> list[str]:
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


def closing_notes(
    before: Totals, after: Totals, quality: tuple[OutputQuality, ...] | None, unchanged: bool
) -> list[str]:
    """Return what is no gain after all, and what may be too much of a loss."""
    notes: list[str] = []
    if unchanged:
        return notes
    if before.latency_ms and after.latency_ms and after.latency_ms > SLOWER * before.latency_ms:
        notes.append(
            f"The output is not faster: {after.latency_ms:.3g} ms against {before.latency_ms:.3g}. "
            "--latency and --max-drop choose by what is measured."
        )
    if after.file_bytes >= before.file_bytes:
        notes.append(f"The output is not smaller: {after.file_bytes} bytes against {before.file_bytes}.")
    for output in quality or ():
        if output.relative_l2 > POOR:
            notes.append(
                f"Output {output.name!r} is off by {output.relative_l2:.0%} on held-out samples: "
                "if that is too much, allow a larger budget or give more data."
            )
    return notes


def latency_notes(job: Job, outcome: Outcome, totals: tuple[Totals, Totals]) -> list[str]:
    """Say what a plan was made with, and where the last measurement is above the limit that it kept to."""
    notes, wanted, (before, after) = _file_notes(job, outcome), job.budget.latency, totals
    if wanted is None or before.latency_ms is None or after.latency_ms is None:
        return notes
    if outcome.timing is not None and not outcome.timing.is_here:  # the limit is another device's
        return notes
    real = after.latency_ms / before.latency_ms
    if real > wanted * SLOWER:
        kept = f"--latency {wanted:g} was kept to when the plan was made"
        notes.append(f"Measured at last: {real:.2f} of the latency; {kept}.")
    return notes


def _file_notes(job: Job, outcome: Outcome) -> list[str]:
    """Say what was written beside the model, and whose latencies a plan was made with."""
    notes, table, plan = [], job.config.latency_table, job.config.plan
    if table is not None and outcome.timing is not None:
        known = f"The latencies in {table} are those of {outcome.timing.device}"
        rest = "" if outcome.timing.is_here else "; the plan was made with them, and nothing was timed for it"
        notes.append(f"{known}{rest}.")
    if plan is not None and not job.replays and outcome.plan is not None:
        notes.append(f"The plan is in {plan}.")
    return notes


def element_notes(layers: tuple[LayerResult, ...]) -> list[str]:
    """Say what layers with single elements gain, and what not."""
    names = [layer.name for layer in layers if layer.elements and layer.params_after < layer.params_before]
    if not names:
        return []
    called = _called(names)
    same = "ONNX Runtime runs them as dense layers"
    return [f"Element-sparse layers ({called}) make a smaller file at the same speed: {same}."]


def side_notes(job: Job, material: Material, quality: tuple[OutputQuality, ...] | None, external: bool) -> list[str]:
    """Return what happened besides the wish: labels without use, a second file."""
    notes = []
    judged = material.labels is not None and quality is not None
    if judged and all(output.accuracy_before is None for output in quality or ()):
        notes.append("The labels were not used: no floating-point output has the shape (batch, classes).")
    if job.config.work is not None and not job.config.dry_run:
        notes.append(f"The work folder {job.config.work} is no longer needed and may be deleted.")
    if external and job.output is not None and not job.config.dry_run:
        notes.append(f"Its weights are in {models.external_name(job.output)} beside it, as the original's are outside.")
    return notes


def precision_notes(variants: Sequence[Variant]) -> list[str]:
    """Say which of the ways was handed out where it is not the expected one, and what stays in float32."""
    chosen = next(variant for variant in variants if variant.chosen)
    notes = []
    if chosen is not variants[-1]:
        notes.append(
            f"Handed out is the {chosen.name} model: {variants[-1].name} takes {variants[-1].latency_ms:.3g} ms, it "
            f"{chosen.latency_ms:.3g}."
        )
    elif len(variants) == 2:
        notes.append(f"Low rank and sparse parts add nothing here: this is the original in {chosen.name}.")
    if chosen.in_float:
        notes.append(f"In float32, because in INT8 too much was lost: {_called(list(chosen.in_float))}.")
    slower = [variant.name for variant in variants if variant.latency_ms < chosen.latency_ms / SLOWER]
    if slower:
        notes.append(f"It is slower than {' and '.join(slower)}; --latency and --max-drop choose by what is measured.")
    return notes


def mapped_notes(subject: Subject) -> list[str]:
    """Say under which conditions the latency of a large model was measured."""
    if not is_mapped(subject.original):
        return []
    return ["Both latencies are those of weights mapped from their files; ONNX Runtime's default packs them in memory."]


def refined_notes(rounds: Sequence[Trained], layers: bool = False, quantised: bool = False) -> list[str]:
    """Return what the user has to know about training.

    ``layers`` says whether errors of layers are shown, ``quantised`` whether the model itself is in INT8.
    """
    notes, last = [], rounds[-1]
    if layers:
        notes.append("The errors of the layers are those before training.")
    if last.best == 0:
        notes.append("Training made nothing better: the weights are those of before.")
    if last.rounded and not quantised:
        told = "The epochs were trained and judged with weights rounded to INT8"
        notes.append(f"{told}; the file holds them unrounded, and its quality is measured so.")
    endings = {
        "time": "the time was over",
        "no gain": "nothing had become better for a while",
        "interrupted": "it was interrupted",
        "diverged": "the loss was no longer finite; a smaller --learning-rate may help",
    }
    for trained in rounds:
        if trained.ended in endings:
            which = "" if len(rounds) == 1 else f" in round {rounds.index(trained) + 1}"
            done = trained.epochs[-1].number
            notes.append(
                f"Training ended{which} behind epoch {done}: {endings[trained.ended]}. Its best state is kept."
            )
    return notes
