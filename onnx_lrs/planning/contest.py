"""The same network four ways: as given, brought into the wanted precision, compressed, and both; which is handed out.

Whoever quantises would have quantised without this tool as well, so that what it makes must not be slower than that,
nor than the model as given.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.graph.model import stored_bytes
from onnx_lrs.planning.gate import Gate
from onnx_lrs.planning.job import Job
from onnx_lrs.planning.precision import Quantiser, kept_within
from onnx_lrs.report.result import OutputQuality, Variant
from onnx_lrs.runtime.latency import SECONDS, times_in_turn
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.runtime.verify import compare_several

CLEARLY = 0.97  # of the latency: what is faster by less may be noise
ORIGINAL, COMPRESSED = "original", "low-rank + sparse"
NAMES = {"int8": "INT8", "fp16": "FP16"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the ways: its name, the model as it runs, the float model with its layers, what of it is in float32."""

    name: str
    model: onnx.ModelProto
    in_float: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Contest:
    """The ways that there are, the place of the one that is handed out, and their figures."""

    entries: tuple[Entry, ...]
    chosen: int
    variants: tuple[Variant, ...]

    @property
    def winner(self) -> Entry:
        """What is handed out."""
        return self.entries[self.chosen]


def held(
    job: Job,
    subject: Subject,
    material: Material,
    made: tuple[onnx.ModelProto | None, frozenset[str], Gate | None],
    means: tuple[Quantiser, Feed],
) -> Contest:
    """Return all ways with their figures, and which is handed out.

    Parameters
    ----------
    made : tuple
        The compressed model in float32 (None: no plan was found), what of it stays so, and what judges, if anything.
    """
    (small, in_float, gate), (quantiser, feed) = made, means
    entries = _entries(job, subject, (small, in_float, gate), quantiser)
    latencies = _latencies(job, [entry.model for entry in entries], feed)
    chosen = _chosen(job, entries, latencies, gate)
    items = material.judge_items if gate is None else gate.confirm
    qualities = _qualities(job, subject, material, entries, items)
    variants = []
    for place, (entry, latency, quality) in enumerate(zip(entries, latencies, qualities, strict=True)):
        kept = tuple(sorted(entry.in_float))
        bytes_of = subject.file_bytes if place == 0 else stored_bytes(entry.model)
        variants.append(Variant(entry.name, bytes_of, latency, quality, kept, place == chosen, entry.model))
    return Contest(tuple(entries), chosen, tuple(variants))


def _entries(
    job: Job, subject: Subject, made: tuple[onnx.ModelProto | None, frozenset[str], Gate | None], quantiser: Quantiser
) -> list[Entry]:
    (small, in_float, gate), name = made, NAMES[quantiser.precision]
    kept = frozenset[str]()
    if gate is not None:
        whole, kept = kept_within(quantiser, gate, subject.folded)
    else:
        whole = quantiser.stand_in(subject.folded) if job.config.dry_run else quantiser.finished(subject.folded)
    entries = [Entry(ORIGINAL, subject.original), Entry(name, whole, kept)]
    if small is not None:
        both = quantiser.stand_in(small) if job.config.dry_run else quantiser.finished(small, in_float)
        entries += [Entry(COMPRESSED, small), Entry(f"{COMPRESSED}, {name}", both, in_float)]
    return entries


def _latencies(job: Job, models: Sequence[onnx.ModelProto], feed: Feed) -> list[float]:
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(Session(model, job.config.threads, provider=job.config.provider)) for model in models
        ]
        times = times_in_turn(sessions, [feed] * len(models), SECONDS * len(models) / 2)
    return [float(ms) for ms in np.median(times, axis=0)]


def _chosen(job: Job, entries: Sequence[Entry], latencies: Sequence[float], gate: Gate | None) -> int:
    """Return the place of what is handed out: the last way, unless latency counts and another one is faster.

    What another way loses has to be allowed, too. A budget of parameters, bytes or multiply-accumulates is met by the
    compressed ones alone.
    """
    best = len(entries) - 1
    if job.replays or not job.budget.is_timed:
        return best
    ways = range(len(entries)) if not job.budget.limits.keys() - {"latency"} else range(2, len(entries))
    for place in ways:
        if latencies[place] < CLEARLY * latencies[best] and _is_allowed(entries[place], place, gate):
            best = place
    return best


def _is_allowed(entry: Entry, place: int, gate: Gate | None) -> bool:
    return gate is None or place == 0 or gate.holds(gate.drop(entry.model, gate.confirm))


def _qualities(
    job: Job, subject: Subject, material: Material, entries: Sequence[Entry], items: NDArray[np.int64]
) -> Sequence[tuple[OutputQuality, ...] | None]:
    """Return each way's outputs beside the original's; the original's own quality is what the others are held to."""
    if material.judge is None or job.config.dry_run:
        return [None] * len(entries)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(entry.model, job.config.threads)) for entry in entries]
        batching = subject.batch, subject.dynamic_batch
        found = compare_several(sessions, material.judge, items, material.labels, batching, job.progress)
    return [tuple(_of_itself(quality) for quality in found[0][0]), *(quality for quality, _ in found)]


def _of_itself(quality: OutputQuality) -> OutputQuality:
    """Return what the original is to itself, from a comparison with another model."""
    same = None if quality.top1_agreement is None else 1.0
    return dataclasses.replace(
        quality,
        relative_l2=0.0,
        cosine=1.0,
        top1_agreement=same,
        top5_agreement=same,
        accuracy_after=quality.accuracy_before,
    )
